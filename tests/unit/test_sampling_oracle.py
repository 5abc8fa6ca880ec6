"""Bias, penalties, filters and scores against transformers' own, on torch, in the same process.

transformers has no presence and frequency penalties: for those the test has the formula of OpenAI's documentation.
Where numbers tie, transformers' top-k keeps all that equal the k-th and its top-p cuts anywhere among equals, while
here the lowest ids stay. So these two see scores of which each is less by a trace than an equal one of a lower id.
"""

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made import SMALL, random_tensors, write

from minigpt.checkpoint import sources, weights
from minigpt.engine import sampling as ours
from minigpt.engine.model import GPT2
from minigpt.engine.penalties import adjusted
from minigpt.engine.sampling import Sampling, sample
from minigpt.engine.scoring import scores
from minigpt.errors import CheckpointError

torch = pytest.importorskip("torch", reason="the oracle needs torch: pip install the extra `reference`")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers: pip install the extra `reference`"
)

CLOSE = 1e-9  # of a probability to the bound of a filter: rounding decides
TRACE = 1e-11  # less than any two different scores of `case` are apart


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def changed(logits: np.ndarray, sampling: Sampling, prompt: list[int], generated: list[int]) -> np.ndarray:
    """Bias and repetition penalty by transformers, in float32; the two others by their formula."""
    processors = transformers.generation.logits_process
    ids, scores = torch.tensor([prompt + generated]), torch.from_numpy(logits.copy())[None]
    if sampling.logit_bias:
        scores = processors.SequenceBiasLogitsProcessor({(one,): bias for one, bias in sampling.logit_bias})(
            ids, scores
        )
    if sampling.repetition_penalty != 1 and ids.numel():
        scores = processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids.long(), scores)
    values = scores[0].numpy()
    for one in set(generated):  # c × alpha_frequency + (c > 0) × alpha_presence
        less = generated.count(one) * sampling.frequency_penalty + sampling.presence_penalty
        values[one] = float(values[one]) - less
    return np.clip(values, -ours.LARGEST, ours.LARGEST)  # where ours stay, and transformers' are infinite


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """Of each id, by transformers' warpers in float64; None if rounding decides what they keep."""
    processors = transformers.generation.logits_process
    plain = torch.from_numpy(logits.astype(np.float64) - float(logits.max()))[None] / sampling.temperature
    scores = plain - TRACE * torch.arange(len(logits))
    if sampling.top_k:
        scores = processors.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        cumulative = torch.sort(scores)[0].softmax(-1).cumsum(-1)
        if (cumulative - (1 - sampling.top_p)).abs().min() < CLOSE:
            return None
        scores = processors.TopPLogitsWarper(sampling.top_p)(None, scores)
    scores = torch.where(torch.isfinite(scores), plain, -torch.inf)
    if sampling.min_p:
        relative = scores.softmax(-1)
        bound = sampling.min_p * relative.max()
        if ((relative - bound).abs().min() < CLOSE) and sampling.min_p < 1:
            return None
        scores = processors.MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


def agree(logits: np.ndarray, sampling: Sampling, prompt: list[int], generated: list[int]) -> bool:
    """Asserts that probabilities and sets are the oracle's; False if there is nothing to compare."""
    wanted = changed(logits, sampling, prompt, generated)
    got = adjusted(logits, sampling, prompt, generated)
    np.testing.assert_allclose(got, wanted, rtol=2e-7, atol=1e-6)
    oracle = probabilities(got, sampling)
    if oracle is None:
        return False
    ids, weights = ours._candidates(got, sampling, ours.most_likely(got))
    drawn = np.zeros(len(logits))
    drawn[ids] = weights / weights.sum()
    np.testing.assert_allclose(drawn, oracle, rtol=1e-9, atol=1e-12)
    assert set(np.flatnonzero(oracle)) <= set(ids.tolist())
    assert (oracle[ids] > 0).all() or weights.min() < 1e-200  # but where exp underflows
    assert sample(got, sampling, len(prompt) + len(generated)) in ids
    return True


def case(seed: int, kind: str) -> tuple[np.ndarray, Sampling, list[int], list[int]]:
    """Any logits and options; "ties" has many equal ones, and "extreme" numbers at float32's end."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 300))
    logits = (rng.standard_normal(size) * rng.choice([0.1, 3, 20])).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits * 2) / np.float32(2)
    elif kind == "extreme":
        logits[rng.integers(0, size, size // 3)] = rng.choice(np.array([-3e38, -1e30, -1e4, 0], np.float32))
    biased = np.unique(rng.integers(0, size, rng.integers(0, 6))).tolist()

    def some(off: float, *values: float) -> float:
        return float(rng.choice(values) if rng.random() < 0.5 else off)

    sampling = Sampling(
        temperature=float(rng.choice([0.25, 0.7, 1.0, 3.0])),
        top_k=int(some(0, 1, 2, 40, size)),
        top_p=some(1, 0.95, 0.5, 0.1, rng.uniform(0.01, 1)),
        seed=seed,
        min_p=some(0, 0.02, 0.1, 0.6, 1, rng.uniform(0, 1)),
        repetition_penalty=some(1, 1.2, 0.5, 2, 100, 0.01),
        presence_penalty=some(0, 0.5, 2, -2, 1e6),
        frequency_penalty=some(0, 0.5, 2, -2, 1e6),
        logit_bias=tuple((one, some(-100, 100, 1.5, -3)) for one in biased),
    )
    prompt, generated = (rng.integers(0, size, rng.integers(0, 30)).tolist() for _ in range(2))
    return logits, sampling, prompt, generated


KINDS = ("plain", "ties", "extreme")


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.sampled_from(KINDS))
@example(0, "plain")
def test_options_of_any_kind_give_transformers_probabilities(seed: int, kind: str) -> None:
    agree(*case(seed, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_10_000_random_cases_give_transformers_probabilities(kind: str) -> None:
    compared = sum(agree(*case(seed, kind)) for seed in range(10_000))
    assert compared > 8_000


def models(tmp_path: Any) -> tuple[Any, GPT2]:
    """The embedded model, or where it is not installed a small one, as transformers reads it and as we do."""
    try:
        folder = sources.local("tiny")
    except CheckpointError:
        folder = write(tmp_path, SMALL, random_tensors(SMALL))
    config = sources.read_config(folder)
    layers = range(config.n_layer)
    model = GPT2(config, layers, weights.load(folder, config, layers).tensors)
    oracle = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return oracle, model


@pytest.mark.parametrize("prompts", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_greedy_text_with_a_repetition_penalty_is_transformers(prompts: int, tmp_path: Any) -> None:
    oracle, model = models(tmp_path)
    sampling = Sampling(repetition_penalty=1.2)
    for seed in range(prompts):
        prompt = np.random.default_rng(seed).integers(0, model.config.vocab_size, 5 + seed % 7).tolist()
        with torch.inference_mode():
            wanted = oracle.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, repetition_penalty=1.2, eos_token_id=None
            )[0, len(prompt) :].tolist()
        cache, generated, fed = model.new_cache(), [], prompt
        while len(generated) < 30:
            x = model.forward(model.embed(fed, cache.length), [(cache, len(fed))])
            logits = adjusted(model.logits(x[-1:])[0], sampling, prompt, generated)
            fed = [sample(logits, sampling, cache.length)]
            generated += fed
        assert generated == wanted


def test_scores_of_a_text_are_transformers(tmp_path: Any) -> None:
    oracle, model = models(tmp_path)
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, min(model.config.n_positions, 300)).tolist()
    cache = model.new_cache()
    told = scores(model, model.forward(model.embed(ids[:-1], 0), [(cache, len(ids) - 1)]), ids[1:], top=20)
    with torch.inference_mode():
        rows = oracle(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    assert [one.logprob for one in told] == pytest.approx(rows[range(len(told)), ids[1:]].tolist(), abs=1e-4)
    for one, row in zip(told, rows, strict=True):
        assert [value for _, value in one.top] == pytest.approx(row.topk(20).values.tolist(), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(row[[token for token, _ in one.top]].tolist(), abs=1e-4)
