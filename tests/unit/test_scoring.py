"""Scores of given tokens: they are the log-softmax of the logits, in blocks that nobody sees but the memory."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made import SMALL, random_tensors, whole, write

import minigpt
from minigpt.engine.config import Config
from minigpt.engine.model import GPT2
from minigpt.engine.scoring import BLOCK, scores
from minigpt.engine.threads import in_parts

RNG = np.random.default_rng(4)


def hidden(model: GPT2, rows: int) -> np.ndarray:
    return RNG.standard_normal((rows, model.config.n_embd), np.float32)


@pytest.mark.parametrize("rows", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_scores_are_the_log_softmax_of_the_logits(rows: int) -> None:
    model = whole()
    x, targets = hidden(model, rows), RNG.integers(0, SMALL.vocab_size, rows)
    told = scores(model, x, targets, top=5)
    assert len(told) == rows
    for row, target, one in zip(x, targets.tolist(), told, strict=True):
        logits = model.logits(row[np.newaxis])[0].astype(float)
        wanted = logits - logits.max() - math.log(math.fsum(np.exp(logits - logits.max())))
        assert one.logprob == pytest.approx(wanted[target], abs=1e-5)  # rows together differ in their last bits
        assert [value for _, value in one.top] == pytest.approx(sorted(wanted)[:-6:-1], abs=1e-5)
        assert all(value == pytest.approx(wanted[token], abs=1e-5) for token, value in one.top)


def test_a_sequence_scores_the_same_in_chunks() -> None:
    model, ids = whole(), RNG.integers(0, SMALL.vocab_size, 150)
    cache = model.new_cache()
    at_once = scores(model, model.forward(model.embed(ids[:-1], 0), [(cache, 149)]), ids[1:])
    cache, told = model.new_cache(), []
    for start, stop in ((0, 96), (96, 97), (97, 149)):
        x = model.forward(model.embed(ids[start:stop], start), [(cache, stop - start)])
        told += scores(model, x, ids[start + 1 : stop + 1])
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in at_once], abs=1e-4)


@pytest.mark.parametrize("rows", [1, 95, 96, 97, 250])
def test_a_whole_sequence_is_computed_as_in_steps_to_the_bit(rows: int) -> None:
    model, ids = whole(), RNG.integers(0, SMALL.vocab_size, rows)
    cache, steps = model.new_cache(), []
    for start in range(0, rows, 96):
        part = ids[start : start + 96]
        steps.append(model.forward(model.embed(part, start), [(cache, len(part))]))
    np.testing.assert_array_equal(model.forward_whole(model.embed(ids, 0), 96), np.concatenate(steps))


def test_a_model_in_process_scores_without_a_cache(tmp_path: Path) -> None:
    config = replace(SMALL, n_layer=40)
    model = minigpt.load(write(tmp_path, config, random_tensors(config)))
    cache = whole(config).cache_bytes(config.n_positions)
    ids = RNG.integers(0, config.vocab_size, config.n_positions)
    model.score(ids[:2])
    tracemalloc.start()
    try:
        model.score(ids, top=20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < cache / 2


def test_logits_of_a_few_rows_exist_at_a_time() -> None:
    config = Config(n_embd=8, n_head=1, n_layer=1, n_inner=8, n_positions=8)
    model = GPT2(config, range(1), random_tensors(config))
    x = hidden(model, 512)  # whose logits are 103 MB
    in_parts(lambda part: None, 2)
    tracemalloc.start()
    try:
        scores(model, x, [7] * 512, top=20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30e6


def test_what_does_not_fit_is_refused() -> None:
    model = whole()
    x = hidden(model, 3)
    with pytest.raises(ValueError, match=r"got [(]2,[)], wanted one for each of 3 rows"):
        scores(model, x, [1, 2])
    for bad in (-1, SMALL.vocab_size):
        with pytest.raises(ValueError, match=r"^a target is outside the vocabulary, wanted 0 to 96$"):
            scores(model, x, [0, bad, 0])
    with pytest.raises(ValueError, match="top is 21"):
        scores(model, x, [0, 1, 2], top=21)


def test_damaged_hidden_states_are_not_scored() -> None:
    model = whole()
    x = hidden(model, 3)
    x[1, 0] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        scores(model, x, [0, 1, 2])
