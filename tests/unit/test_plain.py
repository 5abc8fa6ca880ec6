"""GPT-2 written plainly, and the fast engine held to it: whatever the model, the chunks and the cuts, one answer."""

import ast
import doctest
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import GOLDEN, ODD, SMALL, cut, odd, random_tensors, write

import minigpt
from minigpt.checkpoint import sources, weights
from minigpt.engine import linalg, plain
from minigpt.engine.config import ACTIVATIONS, Config, tensor_shapes
from minigpt.engine.model import QUERY_BLOCK
from minigpt.protocol.messages import Reason

DATA = Path(__file__).resolve().parents[1] / "data"
TOLERANCE = 1e-5  # of a gap


def gap(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of two logits, as a part of the largest logit's magnitude.

    Not of each logit by itself: one near zero is a sum whose terms cancel, and has their rounding errors.
    """
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype == np.float32
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def random_ids(config: Config, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()


def embedded() -> tuple[Config, Mapping[str, np.ndarray]]:
    """The embedded checkpoint's config and tensors."""
    folder = sources.local("tiny")
    config = sources.read_config(folder)
    return config, weights.load(folder, config, range(config.n_layer)).tensors


def fast_logits(
    tensors: Mapping[str, np.ndarray], config: Config, ids: list[int], chunks: list[int], bounds: list[int]
) -> np.ndarray:
    """The engine's logits after every id, fed in chunks of these sizes to stages cut at these layers."""
    stages = cut(config, dict(tensors), *bounds)
    caches = [stage.new_cache() for stage in stages]
    rows, start = [], 0
    for size in chunks:
        x = stages[0].embed(ids[start : start + size], start)
        for stage, cache in zip(stages, caches, strict=True):
            x = stage.forward(x, [(cache, size)])
        rows.append(stages[-1].logits(x))
        start += size
    assert start == len(ids)
    return np.concatenate(rows)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A model of any shape and rules.

    The lower bounds keep out what float32 has no firm answer for: a norm of two numbers that are nearly equal divides
    by next to nothing, and so few logits may all be near zero. Heads are narrow where their scores are not scaled,
    or softmax magnifies rounding errors.
    """
    scaled = draw(st.booleans())
    head_dim = draw(st.integers(1, 24 if scaled else 4))
    n_head = draw(st.integers(-(-16 // head_dim), max(6, -(-16 // head_dim))))
    return Config(
        vocab_size=draw(st.integers(10, 120)),
        n_positions=draw(st.integers(1, 2 * QUERY_BLOCK + 20)),
        n_embd=n_head * head_dim,
        n_layer=draw(st.integers(1, 4)),
        n_head=n_head,
        n_inner=draw(st.integers(1, 200)),
        activation_function=draw(st.sampled_from(ACTIVATIONS)),
        layer_norm_epsilon=draw(st.sampled_from([1e-6, 1e-5, 1e-3, 0.1])),
        scale_attn_weights=scaled,
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        reorder_and_upcast_attn=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        eos_token_id=(),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Config, int, int, list[int], list[int]]:
    """A config, a seed, a number of ids, the sizes of the chunks they come in, and the layers to cut at."""
    config = draw(configs())
    seed = draw(st.integers(0, 2**32 - 1))
    count = draw(st.integers(1, config.n_positions))
    starts = draw(st.sets(st.integers(1, count - 1), max_size=12)) if count > 1 else set()
    bounds = draw(st.sets(st.integers(1, config.n_layer - 1))) if config.n_layer > 1 else set()
    edges = [0, *sorted(starts), count]
    return config, seed, count, [b - a for a, b in itertools.pairwise(edges)], sorted(bounds)


@settings(max_examples=400)
@given(cases(), st.booleans(), st.booleans())
def test_the_fast_engine_is_the_plain_one(
    case: tuple[Config, int, int, list[int], list[int]], blocked: bool, turned: bool
) -> None:
    """With either CPU's way to multiply a few rows, and matrices either way in memory, as the loader lays them."""
    config, seed, count, chunks, bounds = case
    tensors = random_tensors(config, seed)
    if turned:
        tensors = {name: np.asfortranarray(tensor) for name, tensor in tensors.items()}
    ids = random_ids(config, count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "BLOCKED", blocked)
        patch.setattr(linalg, "FEW_ROWS", 64 if blocked else 3)
        patch.setattr(linalg, "EVEN_ROWS", 1 if blocked else 8)
        fast = fast_logits(tensors, config, ids, chunks, bounds)
    assert gap(fast, plain.logits(tensors, config, ids)) < TOLERANCE


@pytest.mark.parametrize("name", ODD)
def test_the_fast_engine_is_the_plain_one_token_by_token(name: str) -> None:
    config, tensors = odd(name), random_tensors(odd(name))
    ids = random_ids(config, min(config.n_positions, QUERY_BLOCK + 10))
    wanted = plain.logits(tensors, config, ids)
    assert gap(fast_logits(tensors, config, ids, [1] * len(ids), []), wanted) < TOLERANCE


@pytest.mark.parametrize("name", [*GOLDEN, "tiny"])
def test_plain_logits_are_those_of_transformers(name: str) -> None:
    config, tensors = embedded() if name == "tiny" else (GOLDEN[name], random_tensors(GOLDEN[name]))
    golden = np.load(DATA / f"golden_{name}.npz", allow_pickle=False)
    rows = golden["rows"]
    rows = rows[rows < 320]  # no position sees a later one, so the beginning will do of GPT-2 small, which takes long
    got = plain.logits(tensors, config, golden["ids"][: rows[-1] + 1].tolist())
    assert len(rows) >= 2
    assert gap(got[rows][:, golden["columns"]], golden["logits"][: len(rows)]) < TOLERANCE


@pytest.mark.parametrize("prompt", ["The capital of France is", "What is the capital of Peru?", "Once upon a time"])
def test_plain_writes_what_the_pipeline_writes(prompt: str) -> None:
    model = minigpt.load("tiny")
    assert model.tokenizer is not None
    config, tensors = embedded()
    fast = [token.id for token in model.generate(prompt, max_tokens=24)]
    assert len(fast) > 1
    assert plain.generate(tensors, config, model.tokenizer.encode(prompt), 24) == fast


def test_plain_ends_where_the_pipeline_ends(tmp_path: Path) -> None:
    config = replace(SMALL, n_positions=20, eos_token_id=())
    tensors, prompt = random_tensors(config), random_ids(config, 12)
    full = plain.generate(tensors, config, prompt, 100)
    assert len(full) == 20 - 12 + 1  # the last is told, and has no position to be fed back at
    assert plain.generate(tensors, config, prompt, 0) == []
    ending = replace(config, eos_token_id=(full[3],))
    for rules, count, reason in ((config, 100, Reason.CONTEXT), (config, 5, Reason.LENGTH), (ending, 100, Reason.END)):
        generation = minigpt.load(str(write(tmp_path / reason.name, rules, tensors))).generate(prompt, max_tokens=count)
        assert [token.id for token in generation] == plain.generate(tensors, rules, prompt, count)
        assert generation.reason == reason


# Controls: what differs is noticed.

IDS = random_ids(SMALL, 40)
TENSORS = random_tensors(replace(SMALL, tie_word_embeddings=False))
FAST = fast_logits(TENSORS, SMALL, IDS, [40], [])


def test_the_controls_begin_from_what_agrees() -> None:
    assert gap(FAST, plain.logits(TENSORS, SMALL, IDS)) < TOLERANCE


@pytest.mark.parametrize("name", tensor_shapes(SMALL, range(SMALL.n_layer)))
def test_another_weight_is_noticed(name: str) -> None:
    changed = TENSORS | {name: TENSORS[name] * np.float32(1.01)}
    assert gap(FAST, plain.logits(changed, SMALL, IDS)) > TOLERANCE


@pytest.mark.parametrize(
    "fields",
    [
        {"n_head": 6}, {"n_layer": 3}, {"activation_function": "gelu"}, {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-4}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
    ],
)  # fmt: skip
def test_another_rule_is_noticed_and_followed(fields: dict) -> None:
    """A field that both engines passed over would not make them differ from each other."""
    config = replace(SMALL, **fields)
    changed = plain.logits(TENSORS, config, IDS)
    assert gap(FAST, changed) > TOLERANCE
    assert gap(fast_logits(TENSORS, config, IDS, [40], []), changed) < TOLERANCE


def sees_everything(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    return plain.softmax(q @ k.transpose(0, 2, 1) * scale) @ v


def sees_not_itself(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    seen = np.tri(q.shape[1], k=-1, dtype=bool)
    seen[0, 0] = True
    return plain.softmax(np.where(seen, q @ k.transpose(0, 2, 1) * scale, -np.inf)) @ v


def norm_afterwards(tensors: plain.Tensors, config: Config, i: int, x: np.ndarray) -> np.ndarray:
    x = plain.layer_norm(tensors, config, f"h.{i}.ln_1", x + plain.attn(tensors, config, i, x))
    return plain.layer_norm(tensors, config, f"h.{i}.ln_2", x + plain.mlp(tensors, config, i, x))


def side_by_side(tensors: plain.Tensors, config: Config, i: int, x: np.ndarray) -> np.ndarray:
    a, b = (plain.layer_norm(tensors, config, f"h.{i}.{name}", x) for name in ("ln_1", "ln_2"))
    return x + plain.attn(tensors, config, i, a) + plain.mlp(tensors, config, i, b)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("attention", sees_everything), ("attention", sees_not_itself),
        ("block", norm_afterwards), ("block", side_by_side),
    ],
)  # fmt: skip
def test_another_formula_is_noticed(name: str, other: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, name, other)
    assert gap(FAST, plain.logits(TENSORS, SMALL, IDS)) > TOLERANCE


# The file itself.


def test_plain_can_be_read_in_one_sitting_and_by_itself() -> None:
    source = Path(plain.__file__).read_text()
    assert len(source.splitlines()) <= 150
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    # nothing of the fast engine, whose mistakes it would share
    assert imported <= {"collections.abc", "math", "typing", "numpy", "numpy.typing", "minigpt.engine.config"}


def test_its_docstring_runs_as_printed() -> None:
    failed, tried = doctest.testmod(plain)
    assert (failed, tried) == (0, 6)
