"""The fast engine against the plain one, over random shapes, chunks and splits; the plain one against transformers."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ODD, SMALL, odd, random_tensors

import minigpt
from minigpt.checkpoint import sources, weights
from minigpt.engine import plain
from minigpt.engine.config import Config
from minigpt.engine.model import GPT2

TOLERANCE = 1e-5  # of the largest logit
GOLDEN = Path(__file__).resolve().parents[1] / "data"


def fast(config: Config, tensors: dict[str, np.ndarray], ids: list[int], sizes: list[int], cuts: list[int]) -> Any:
    """Logits of the fast engine: ids in chunks of these sizes, layers in ranges that end at these cuts."""
    bounds = [0, *cuts, config.n_layer]
    stages = [GPT2(config, range(first, end), tensors) for first, end in itertools.pairwise(bounds)]
    caches = [stage.new_cache() for stage in stages]
    rows, start = [], 0
    for size in sizes:
        x = stages[0].embed(ids[start : start + size], start)
        for stage, cache in zip(stages, caches, strict=True):
            x = stage.forward(x, [(cache, size)])
        rows.append(stages[-1].logits(x))
        start += size
    return np.concatenate(rows)


def furthest(ours: Any, theirs: Any) -> float:
    """The largest difference of two logits, relative to the largest of all."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@st.composite
def cases(draw: st.DrawFn) -> tuple[Config, list[int], list[int], list[int]]:
    heads = draw(st.integers(1, 4))
    # At least 12 columns: over two or three, layer_norm can magnify a rounding a thousand times, in either engine.
    head_dim = draw(st.integers(12 // heads, 12))
    layers = draw(st.integers(1, 4))
    config = Config(
        vocab_size=draw(st.integers(10, 90)),
        n_positions=64,
        n_embd=heads * head_dim,
        n_layer=layers,
        n_head=heads,
        n_inner=draw(st.integers(1, 70)),
        activation_function=draw(st.sampled_from(list(plain.ACTIVATIONS))),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        scale_attn_weights=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        eos_token_id=(),
    )
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    ids = draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=sum(sizes), max_size=sum(sizes)))
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1)))) if layers > 1 else []
    return config, ids, sizes, cuts


@given(cases(), st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_the_fast_engine_computes_the_same(case: tuple[Config, list[int], list[int], list[int]], seed: int) -> None:
    config, ids, sizes, cuts = case
    tensors = random_tensors(config, seed)
    assert furthest(fast(config, tensors, ids, sizes, cuts), plain.logits(tensors, config, ids)) < TOLERANCE


@pytest.mark.parametrize("kind", ODD)
def test_the_fast_engine_computes_the_same_for_odd_architectures(kind: str) -> None:
    config = odd(kind)
    tensors, ids = random_tensors(config, 3), [index % config.vocab_size for index in range(7)]
    assert furthest(fast(config, tensors, ids, [3, 4], []), plain.logits(tensors, config, ids)) < TOLERANCE


def test_the_embedded_model_says_the_same() -> None:
    folder = sources.local("tiny")
    config = sources.read_config(folder)
    tensors = weights.load(folder, config, range(config.n_layer)).tensors
    model = minigpt.load("tiny")
    assert model.tokenizer is not None
    prompt = model.tokenizer.encode("The capital of France is")
    generated = [token.id for token in model.generate(prompt, max_tokens=8)]
    assert plain.generate(tensors, config, prompt, 8) == generated
    golden = np.load(GOLDEN / "golden_tiny.npz", allow_pickle=False)
    got = plain.logits(tensors, config, golden["ids"].tolist())[golden["rows"]][:, golden["columns"]]
    assert np.abs(got - golden["logits"]).max() < 1e-4  # what transformers gave


@pytest.mark.parametrize("changed", ["a weight", "the causal mask", "the order of ids"])
def test_a_difference_is_noticed(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, ids = random_tensors(SMALL, 1), [5, 6, 7, 8]
    ours = fast(SMALL, tensors, ids, [4], [2])
    if changed == "a weight":
        other = tensors["h.1.mlp.c_fc.weight"].copy()
        other[0] *= 2
        tensors = tensors | {"h.1.mlp.c_fc.weight": other}
    elif changed == "the causal mask":
        monkeypatch.setattr(np, "triu", lambda ones, _above: np.zeros_like(ones))
    else:
        ids = ids[::-1]
    assert furthest(ours, plain.logits(tensors, SMALL, ids)) > TOLERANCE


def test_it_is_read_in_one_sitting() -> None:
    assert len(Path(plain.__file__).read_text().splitlines()) <= 150
