"""Bias and penalties, by their published formulas in plain Python; test_sampling_oracle.py asks transformers."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minigpt.engine.penalties import adjusted
from minigpt.engine.sampling import MAX_BIASES, Sampling, sample

usual = st.floats(-100, 100), st.floats(0.01, 100)
extreme = (
    st.floats(-1e308, 1e308) | st.sampled_from([0.0, 5e-324, -1e308]),
    st.floats(0, 1e308, exclude_min=True) | st.sampled_from([1.0, 5e-324, 1e308]),
)
words = arrays(np.float32, st.integers(1, 30), elements=st.floats(-30, 30, width=16))  # 16 bits: many ties


@st.composite
def cases(draw: st.DrawFn, numbers: Any, above_0: Any) -> tuple[np.ndarray, Sampling, list[int], list[int]]:
    logits = draw(words)
    ids = st.integers(0, len(logits) - 1)
    bias = tuple(sorted(draw(st.dictionaries(ids, numbers, max_size=5)).items()))
    penalties = {name: draw(numbers) for name in ("presence_penalty", "frequency_penalty")}
    sampling = Sampling(repetition_penalty=draw(above_0), logit_bias=bias, **penalties)
    return logits, sampling, draw(st.lists(ids, max_size=20)), draw(st.lists(ids, max_size=20))


@given(cases(*extreme))
def test_any_bias_and_penalty_gives_numbers_to_draw_from(case: Any) -> None:
    logits, sampling, prompt, generated = case
    before = logits.copy()
    got = adjusted(logits, sampling, prompt, generated)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert np.array_equal(logits, before), "the model's own are still to be told"
    untouched = set(range(len(logits))) - {token for token, _ in sampling.logit_bias} - {*prompt, *generated}
    assert all(got[token] == logits[token] for token in untouched)
    assert 0 <= sample(got, Sampling(1.0, seed=1), 0) < len(logits)


@given(cases(*usual))
def test_bias_and_penalties_are_what_their_formulas_say(case: Any) -> None:
    logits, sampling, prompt, generated = case
    got = adjusted(logits, sampling, prompt, generated)
    bias, counts = dict(sampling.logit_bias), Counter(generated)
    for token in range(len(logits)):
        wanted = biased = float(logits[token]) + bias.get(token, 0)
        if token in prompt or token in generated:
            wanted = biased * sampling.repetition_penalty if biased < 0 else biased / sampling.repetition_penalty
        if token in generated:
            wanted -= counts[token] * sampling.frequency_penalty + sampling.presence_penalty
        # float32 rounds a number of up to 130 by 4e-6 after the bias, which the next step multiplies by up to 100.
        assert math.isclose(got[token], wanted, rel_tol=1e-6, abs_tol=1e-3), token


def test_each_penalty_by_hand() -> None:
    logits = np.array([2, -2, 4, 0, 1], np.float32)
    assert adjusted(logits, Sampling(repetition_penalty=2), [0, 0], [1, 3, 1]).tolist() == [1, -4, 4, 0, 1]
    assert adjusted(logits, Sampling(presence_penalty=0.5), [0], [1, 2, 2]).tolist() == [2, -2.5, 3.5, 0, 1]
    assert adjusted(logits, Sampling(frequency_penalty=0.5), [0], [1, 2, 2]).tolist() == [2, -2.5, 3, 0, 1]
    assert adjusted(logits, Sampling(logit_bias=((0, -100), (3, 5)))).tolist() == [-98, -2, 4, 5, 1]
    all_of_them = Sampling(
        repetition_penalty=2, presence_penalty=1, frequency_penalty=0.25, logit_bias=((0, -4), (2, 4))
    )
    assert adjusted(logits, all_of_them, [0], [2, 2]).tolist() == [-4, -2, 2.5, 0, 1]


def test_without_bias_and_penalties_the_logits_are_the_same_array() -> None:
    logits = np.array([1, 2], np.float32)
    sampling = Sampling(0.7, 40, 0.9, 3, min_p=0.1)
    assert adjusted(logits, sampling, [0], [1]) is logits
    assert not sampling.adjusts
    assert not sampling.penalises


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_penalty_needs_the_ids_so_far_and_a_bias_does_not(name: str) -> None:
    penalty: dict[str, Any] = {name: 0.5}
    assert Sampling(**penalty).penalises
    assert Sampling(**penalty).adjusts
    bias = Sampling(logit_bias=((3, 0.0),))
    assert bias.adjusts
    assert not bias.penalises


@pytest.mark.parametrize("ids", [([-1], []), ([5], []), ([], [5]), ([], [-1])])
def test_an_id_outside_the_vocabulary_is_refused_and_not_shown(ids: tuple[list[int], list[int]]) -> None:
    sampling = Sampling(repetition_penalty=2)
    with pytest.raises(ValueError, match=r"^an id is outside the vocabulary, wanted 0 to 4$"):
        adjusted(np.zeros(5, np.float32), sampling, *ids)
    with pytest.raises(ValueError, match="wanted 0 to 4"):
        adjusted(np.zeros(5, np.float32), Sampling(logit_bias=((5, 1.0),)))


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_a_bias_does_not_hide_damage(damage: float) -> None:
    with pytest.raises(FloatingPointError, match="largest logit"):
        adjusted(np.array([1, damage], np.float32), Sampling(logit_bias=((1, -1e300),)))


@pytest.mark.parametrize(
    ("bad", "usual"),
    [
        ({"repetition_penalty": 0.0}, "any number above 0; 1 is none, 1.1 to 1.3 usual"),
        ({"repetition_penalty": -1.0}, "above 0"),
        ({"repetition_penalty": math.nan}, "above 0"),
        ({"repetition_penalty": math.inf}, "above 0"),
        ({"presence_penalty": math.nan}, "0 is none, -2 to 2 usual"),
        ({"frequency_penalty": -math.inf}, "0 is none, -2 to 2 usual"),
        ({"min_p": -0.1}, "0 [(]all[)] to 1; 0.02 to 0.1 is usual"),
        ({"min_p": 1.01}, "to 1"),
        ({"min_p": math.nan}, "to 1"),
        ({"logit_bias": ((1, math.nan),)}, "-100 [(]never[)] to 100 is usual"),
        ({"logit_bias": ((1, 1.0), (1, 1.0))}, "twice"),
        ({"logit_bias": ((2, 1.0), (1, 1.0))}, "order"),
        ({"logit_bias": ((-1, 1.0),)}, "outside 0 to"),
        ({"logit_bias": ((2**31, 1.0),)}, "outside 0 to"),
        ({"logit_bias": tuple((i, 1.0) for i in range(MAX_BIASES + 1))}, "1025 ids, wanted 1024 at most"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_with_the_range_and_the_usual_value(bad: dict[str, Any], usual: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} (is|has) .*{usual}"):
        Sampling(**bad)


def test_sampling_can_be_hashed_and_compared() -> None:
    one, other = (Sampling(logit_bias=((1, 2.0),)) for _ in range(2))
    assert adjusted(np.zeros(2, np.float32), one).tolist() == [0, 2]
    assert one == other
    assert hash(one) == hash(other)
