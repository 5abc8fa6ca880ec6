"""Sampling: draws depend on seed and position only, follow the distribution, and the filters keep what they say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minigpt.engine.sampling import MAX_TOP, RUN, Sampling, logprob, sample, scored

LOGITS = np.random.default_rng(5).standard_normal(5000).astype(np.float32) * 3
logits_arrays = arrays(np.float32, st.integers(1, 60), elements=st.floats(-30, 30, width=16))  # 16 bits: many ties


def allowed(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """What the filters leave, the slow and obvious way."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: sampling.top_k or None]
    top = float(logits.max())
    weights = [math.exp((float(logits[token]) - top) / sampling.temperature) for token in order]
    total, cumulative, kept = sum(weights), 0.0, set()
    exact = set(weights) <= {0.0, 1.0}  # then no sum is rounded
    for token, weight in zip(order, weights, strict=True):
        kept.add(token)
        cumulative += weight
        excess = cumulative - sampling.top_p * total
        if excess > 1e-14 * total or (exact and excess >= 0):  # below that, rounding may decide either way
            break
    kept = kept if sampling.top_p < 1 else set(order)
    least = sampling.min_p * (1 - 1e-14)
    return {token for token, weight in zip(order, weights, strict=True) if token in kept and weight >= least}


@given(logits_arrays)
def test_greedy_takes_the_first_of_the_largest(logits: np.ndarray) -> None:
    best = min(token for token in range(len(logits)) if logits[token] == logits.max())
    assert sample(logits, Sampling(), 3) == best
    assert sample(logits, Sampling(temperature=2, top_k=1, seed=9), 3) == best
    assert sample(logits, Sampling(temperature=1e-300, seed=9, top_p=0.1), 3) == best


@settings(max_examples=300)
@given(
    logits_arrays,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 70),
    st.sampled_from([1.0, 0.95, 0.5, 1e-9]),
    st.sampled_from([0.0, 1e-300, 0.05, 0.5, 1.0]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2048),
)
def test_a_draw_is_among_those_the_filters_leave(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> None:
    sampling = Sampling(temperature, top_k, top_p, seed, min_p)
    assert sample(logits, sampling, position) in allowed(logits, sampling)


@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 200, "top_p": 0.7}])
def test_draws_follow_the_distribution(filters: dict) -> None:
    logits = LOGITS[:300]
    counts = np.zeros(300)
    for position in range(4000):
        counts[sample(logits, Sampling(0.8, seed=1, **filters), position)] += 1
    kept = allowed(logits, Sampling(0.8, **filters))
    weights = np.where(np.isin(np.arange(300), list(kept)), np.exp(logits.astype(float) / 0.8), 0)
    expected = weights / weights.sum() * 4000
    likely = expected > 8
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum()
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert counts[weights == 0].sum() == 0


def test_a_draw_depends_on_seed_and_position_only() -> None:
    sampling = Sampling(1.0, seed=7)
    first = [sample(LOGITS, sampling, position) for position in range(50)]
    np.random.default_rng(3).random(1000)
    assert [sample(LOGITS, sampling, position) for position in reversed(range(50))][::-1] == first
    assert [sample(LOGITS, Sampling(1.0, seed=8), position) for position in range(50)] != first
    assert len(set(first)) > 10


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(0.8, seed=3), [4671, 4523, 871, 2919, 1650, 2488, 803, 2488]),
        (Sampling(1.2, 40, seed=4), [4430, 2204, 4523, 2522, 615, 3868, 3830, 185]),
        (Sampling(1.0, top_p=0.9, seed=5), [3600, 2964, 4430, 4953, 2522, 2668, 1650, 944]),
        (Sampling(2.0, 300, 0.7, seed=6), [182, 4430, 4300, 2059, 3782, 4392, 4256, 3035]),
    ],
)
def test_a_seed_draws_what_it_has_always_drawn(sampling: Sampling, wanted: list[int]) -> None:
    assert [sample(LOGITS, sampling, position) for position in range(8)] == wanted


def test_the_generator_is_philox_by_its_published_definition() -> None:
    """Philox4x64-10 in plain integers (Salmon et al., 2011, figure 2), its first word as a number in [0, 1)."""
    seed, position, mask = 12345678901234567890, 37, 2**64 - 1
    counter, key = [1, 0, 0, position], [seed, 0]  # NumPy counts once before its first draw
    for _ in range(10):
        (high0, low0), (high1, low1) = (
            divmod(counter[0] * 0xD2E7470EE14C6C93, 2**64),
            divmod(counter[2] * 0xCA5A826395121157, 2**64),
        )
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    uniform = (counter[0] >> 11) / 2**53
    flat = np.zeros(1000, np.float32)
    assert sample(flat, Sampling(1.0, seed=seed), position) == int(uniform * 1000)


@given(logits_arrays)
def test_log_probabilities_sum_to_one(logits: np.ndarray) -> None:
    assert math.isclose(sum(math.exp(logprob(logits, token)) for token in range(len(logits))), 1, rel_tol=1e-12)


ties = st.sampled_from([-2.0, 0.0, 1.0])
many = arrays(np.float32, st.integers(1, 5 * RUN), elements=ties | st.floats(-30, 30, width=16), fill=ties)


@given(many, st.integers(0, MAX_TOP), st.integers(0, 5 * RUN))
def test_the_most_likely_are_told_best_first_and_of_equal_ones_the_lowest_id(
    logits: np.ndarray, top: int, token: int
) -> None:
    token %= len(logits)
    told = scored(logits, token, top)
    order = sorted(range(len(logits)), key=lambda one: (-logits[one], one))
    assert [one for one, _ in told.top] == order[:top]
    best = float(logits.max())
    log_sum = best + math.log(math.fsum(math.exp(float(logit) - best) for logit in logits))
    for one, value in ((token, told.logprob), *told.top):
        assert math.isclose(value, float(logits[one]) - log_sum, rel_tol=1e-12, abs_tol=1e-12)
    assert told.logprob == logprob(logits, token) == dict(told.top).get(token, told.logprob)


@given(many, st.integers(1, 5 * RUN), st.integers(0, 2**64 - 1))
def test_top_k_keeps_the_lowest_ids_of_equal_ones(logits: np.ndarray, top_k: int, seed: int) -> None:
    flat = Sampling(1e6, top_k, seed=seed)
    assert {sample(logits, flat, position) for position in range(20)} <= allowed(logits, flat)


@pytest.mark.parametrize("top", [-1, 21])
def test_only_so_many_of_the_most_likely_are_told(top: int) -> None:
    with pytest.raises(ValueError, match=f"top is {top}, wanted 0 .none. to 20; 5 is usual"):
        scored(LOGITS, 0, top)


def test_one_token_alone_is_certain() -> None:
    logits = np.array([-np.inf, 3, -np.inf], np.float32)
    assert logprob(logits, 1) == 0
    assert {sample(logits, Sampling(5.0, seed=s), 0) for s in range(20)} == {1}


@pytest.mark.parametrize("bad", [[1, np.nan], [np.inf, 0], [-np.inf, -np.inf]])
def test_logits_that_are_no_numbers_are_not_sampled_from(bad: list[float]) -> None:
    with pytest.raises(FloatingPointError, match="logit"):
        sample(np.array(bad, np.float32), Sampling(), 0)
    with pytest.raises(FloatingPointError, match="logit"):
        scored(np.array(bad, np.float32), 0, 1)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0},
     {"top_p": 1.1}, {"top_p": math.nan}, {"seed": -1}, {"seed": 2**64}],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
