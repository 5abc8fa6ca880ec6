"""The model's invariants: cutting, caching, chunks and batching change nothing; what is not supported is refused."""

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import ODD, SMALL, cut, odd, random_tensors, whole

from minigpt.engine import linalg, model, threads
from minigpt.engine.config import Config, tensor_shapes
from minigpt.engine.model import GPT2
from minigpt.engine.sampling import Sampling, logprob, sample
from minigpt.errors import CheckpointError, ConfigError

IDS = np.random.default_rng(1).integers(0, SMALL.vocab_size, SMALL.n_positions).tolist()
MODEL = whole()


def run(stages: list[GPT2], ids: list[int], chunks: list[int] | None = None) -> np.ndarray:
    """The logits after every id, fed in chunks of these sizes (all at once by default)."""
    caches = [stage.new_cache() for stage in stages]
    rows, start = [], 0
    for size in chunks or [len(ids)]:
        x = stages[0].embed(ids[start : start + size], start)
        for stage, cache in zip(stages, caches, strict=True):
            x = stage.forward(x, [(cache, size)])
        rows.append(stages[-1].logits(x))
        start += size
    return np.concatenate(rows)


@pytest.mark.parametrize("bounds", [(1,), (2,), (3,), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("chunks", [[40], [5] + [1] * 35])
def test_a_cut_is_invisible_to_the_bit(bounds: tuple[int, ...], chunks: list[int]) -> None:
    tensors = random_tensors(SMALL)
    whole_logits = run([MODEL], IDS[:40], chunks)
    assert np.array_equal(run(cut(SMALL, tensors, *bounds), IDS[:40], chunks), whole_logits)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 140), min_size=1).filter(lambda sizes: sum(sizes) <= SMALL.n_positions))
def test_chunks_of_any_size_equal_the_whole(sizes: list[int]) -> None:
    ids = IDS[: sum(sizes)]
    assert np.abs(run([MODEL], ids, sizes) - run([MODEL], ids)).max() < 1e-5


@pytest.mark.parametrize("name", ODD)
def test_cache_equals_no_cache(name: str) -> None:
    config = odd(name)
    model, ids = whole(config), IDS[: min(30, config.n_positions)]
    fresh = np.stack([run([model], ids[: n + 1])[-1] for n in range(len(ids))])
    assert np.abs(run([model], ids, [1] * len(ids)) - fresh).max() < 1e-5


@settings(max_examples=30)
@given(st.integers(0, 70), st.integers(1, 70), st.integers(1, 20))
def test_rewinding_equals_a_fresh_run(kept: int, dropped: int, again: int) -> None:
    cache = MODEL.new_cache()
    MODEL.forward(MODEL.embed(IDS[: kept + dropped], 0), [(cache, kept + dropped)])
    cache.truncate(kept)
    other = IDS[100 : 100 + again]
    x = MODEL.forward(MODEL.embed(other, kept), [(cache, again)])
    expected = run([MODEL], IDS[:kept] + other)[kept:]
    assert np.abs(MODEL.logits(x) - expected).max() < 1e-5
    assert cache.length == kept + again


def test_several_sequences_in_one_step_equal_each_alone() -> None:
    caches, lengths, rows = [MODEL.new_cache() for _ in range(3)], [0, 7, 60], [33, 1, 5]
    for cache, length in zip(caches, lengths, strict=True):
        if length:
            MODEL.forward(MODEL.embed(IDS[:length], 0), [(cache, length)])
    x = np.concatenate([MODEL.embed(IDS[n : n + t], n) for n, t in zip(lengths, rows, strict=True)])
    got = MODEL.logits(MODEL.forward(x, list(zip(caches, rows, strict=True))))
    expected = [run([MODEL], IDS[: n + t])[n:] for n, t in zip(lengths, rows, strict=True)]
    assert np.abs(got - np.concatenate(expected)).max() < 1e-5
    assert [cache.length for cache in caches] == [33, 8, 65]


@pytest.fixture
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are multiplied as large ones are: in several blocks, with a rest, by several threads."""
    monkeypatch.setattr(linalg, "_BLOCK_WORK", 40_000)
    monkeypatch.setattr(linalg, "_LARGE", 1)
    monkeypatch.setattr(threads, "THREADS", 2)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Sequences in any order: how many positions each has, and how many rows it adds; most add one."""
    lengths = draw(st.lists(st.integers(0, 250), min_size=2, max_size=20))
    more = draw(st.lists(st.integers(2, 70), max_size=2))
    rows = draw(st.permutations([*more, *[1] * len(lengths)][: len(lengths)]))
    return list(zip(lengths, rows, strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches(), st.booleans(), st.sampled_from([1, 10**9]))
def test_a_batch_of_mixed_sequences_equals_each_alone(
    in_small_blocks: None, batch: list[tuple[int, int]], blocked: bool, many: int
) -> None:
    wanted, x, segments = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "BLOCKED", blocked)
        patch.setattr(linalg, "FEW_ROWS", 64 if blocked else 3)
        patch.setattr(model, "MANY_POSITIONS", many)
        for number, (length, rows) in enumerate(batch):
            ids = IDS[number:] + IDS[:number]
            alone, together = MODEL.new_cache(), MODEL.new_cache()
            for cache in (alone, together):
                if length:
                    MODEL.forward(MODEL.embed(ids[:length], 0), [(cache, length)])
            new = MODEL.embed(ids[length : length + rows], length)
            wanted.append(MODEL.logits(MODEL.forward(new, [(alone, rows)])))
            x.append(new)
            segments.append((together, rows))
        got = MODEL.logits(MODEL.forward(np.concatenate(x), segments))
    assert np.abs(got - np.concatenate(wanted)).max() < 1e-5 * np.abs(got).max()
    assert [cache.length for cache, _ in segments] == [length + rows for length, rows in batch]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("many", [1, 10**9])
@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 9, 17, 32, 65])
def test_a_sequence_that_is_not_finite_changes_no_bit_of_the_others(
    in_small_blocks: None, monkeypatch: pytest.MonkeyPatch, count: int, blocked: bool, many: int
) -> None:
    """Neither what its cache holds, nor its row, nor what lies in anybody's cache beyond its own positions."""
    monkeypatch.setattr(linalg, "BLOCKED", blocked)
    monkeypatch.setattr(linalg, "FEW_ROWS", 64 if blocked else 3)
    monkeypatch.setattr(model, "MANY_POSITIONS", many)
    bad = count // 2

    def run(value: float, row: float, beyond: float) -> np.ndarray:
        x, segments = [], []
        for number in range(count):
            cache, length = MODEL.new_cache(), 1 + 7 * number % 60
            MODEL.forward(MODEL.embed(IDS[:length], 0), [(cache, length)])
            cache._kv[:, :, :, length:] = beyond
            if number == bad:
                cache._kv[:, :, :, :length] += np.float32(value)
            x.append(MODEL.embed(IDS[number : number + 1], length) + np.float32(row if number == bad else 0))
            segments.append((cache, 1))
        return MODEL.logits(MODEL.forward(np.concatenate(x), segments))

    others = np.arange(count) != bad
    wanted = run(0, 0, 0)
    assert np.isfinite(wanted).all()
    for value, row in ((0, 0), (np.nan, 0), (np.inf, 0), (0, np.nan), (0, np.inf), (3e38, 3e38)):
        got = run(value, row, np.nan)
        assert np.array_equal(got[others], wanted[others])
        assert np.isfinite(got[bad]).all() == (value == row == 0)
    assert np.array_equal(run(0, 0, np.nan), wanted)


def test_a_later_token_does_not_change_an_earlier_position() -> None:
    other = IDS[:149] + [(IDS[149] + 1) % SMALL.vocab_size]
    a, b = run([MODEL], IDS[:150]), run([MODEL], other)
    assert np.abs(a[:-1] - b[:-1]).max() < 1e-5
    assert np.abs(a[-1] - b[-1]).max() > 1e-2


def test_the_cache_grows_in_steps_up_to_the_context_and_no_further() -> None:
    cache, sizes = MODEL.new_cache(), set()
    assert cache.nbytes == 0
    for n, token in enumerate(IDS):
        MODEL.forward(MODEL.embed([token], n), [(cache, 1)])
        sizes.add(cache.nbytes)
    per_position = 2 * 4 * SMALL.n_layer * SMALL.n_embd
    assert sizes == {positions * per_position for positions in (64, 128, 192, 256, 320)}
    with pytest.raises(ValueError, match="321 positions, the model has 320"):
        MODEL.forward(np.zeros((1, SMALL.n_embd), np.float32), [(cache, 1)])
    assert cache.length == 320
    cache.truncate(0)
    with pytest.raises(ValueError, match="rewind"):
        cache.truncate(1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, SMALL.n_positions), st.integers(0, 3), st.integers(1, 4))
def test_what_a_cache_takes_is_known_before_it_is_made(positions: int, first: int, count: int) -> None:
    stage = GPT2(SMALL, range(first, min(first + count, 4)), random_tensors(SMALL))
    cache = stage.new_cache()
    cache.reserve(positions)
    assert stage.cache_bytes(positions) == cache.nbytes
    with pytest.raises(ValueError, match="321 positions, the model has 320"):
        stage.cache_bytes(321)


def test_a_failed_step_leaves_every_cache_as_it_was() -> None:
    full, fresh = MODEL.new_cache(), MODEL.new_cache()
    MODEL.forward(MODEL.embed(IDS, 0), [(full, len(IDS))])
    with pytest.raises(ValueError, match="positions"):
        MODEL.forward(np.zeros((2, SMALL.n_embd), np.float32), [(fresh, 1), (full, 1)])
    assert (fresh.length, full.length) == (0, len(IDS))
    with pytest.raises(ValueError, match="twice"):
        MODEL.forward(np.zeros((2, SMALL.n_embd), np.float32), [(fresh, 1), (fresh, 1)])
    with pytest.raises(ValueError, match="segments of"):
        MODEL.forward(np.zeros((2, SMALL.n_embd), np.float32), [(fresh, 1)])


@pytest.mark.parametrize("ids", [[-1], [97], [], [1.5], [[1]], [2**70], ["a"]])
def test_ids_the_model_does_not_have_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token id"):
        MODEL.embed(ids, 0)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (320, 1), (319, 2), (0, 321)])
def test_positions_the_model_does_not_have_are_refused(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="320 positions"):
        MODEL.embed([1] * count, start)


def test_a_model_is_frozen_and_copies_nothing() -> None:
    tensors = random_tensors(SMALL)
    model = GPT2(SMALL, range(4), tensors)
    assert model.wte is tensors["wte.weight"]
    assert not any(tensor.flags.writeable for tensor in tensors.values())
    assert model.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_a_stage_needs_its_own_tensors_and_no_others() -> None:
    tensors = random_tensors(SMALL)
    middle = {name: tensor for name, tensor in tensors.items() if name.startswith(("h.1.", "h.2."))}
    assert set(middle) == set(tensor_shapes(SMALL, range(1, 3)))
    stage = GPT2(SMALL, range(1, 3), middle)
    assert (stage.is_first, stage.is_last) == (False, False)
    del middle["h.2.mlp.c_fc.bias"]
    with pytest.raises(CheckpointError, match=r"h\.2\.mlp\.c_fc\.bias is missing"):
        GPT2(SMALL, range(1, 3), middle)
    with pytest.raises(CheckpointError, match=r"wte.weight: got float64"):
        GPT2(SMALL, range(4), tensors | {"wte.weight": tensors["wte.weight"].astype(float)})


@pytest.mark.parametrize("layers", [range(0), range(2, 2), range(-1, 2), range(3, 5), range(0, 4, 2), range(3, 1, -1)])
def test_only_a_contiguous_range_of_layers_is_accepted(layers: range) -> None:
    with pytest.raises(ValueError, match="wanted a range within"):
        tensor_shapes(SMALL, layers)


# The arithmetic, each against its definition.

GRID = np.concatenate([np.linspace(-12, 12, 100_001), [-1e30, 1e30, 0.0]]).astype(np.float32)
EXACT_ERF = np.array([math.erf(x) for x in GRID])


def test_erf_is_the_error_function() -> None:
    assert np.abs(linalg.erf(GRID) - EXACT_ERF).max() < 5e-7


def test_gelu_is_x_times_the_normal_distribution() -> None:
    x = GRID[np.abs(GRID) < 20].astype(float)
    exact = np.array([0.5 * value * math.erfc(-value / math.sqrt(2)) for value in x])
    approximate = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    for function, expected in ((linalg.gelu_erf, exact), (linalg.gelu_tanh, approximate)):
        got = function(x.astype(np.float32)[np.newaxis])
        assert (np.abs(got - expected) / np.maximum(1, np.abs(expected))).max() < 1e-6


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("new", [1, 2, 9, 33])
@pytest.mark.parametrize("seen", [33, 40, 700, 1000])
def test_queries_times_keys_are_dot_products(
    new: int, seen: int, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "BLOCKED", blocked)
    rng = np.random.default_rng(0)
    q, k = (
        rng.standard_normal((new, 3, 64), np.float32).transpose(1, 0, 2),
        rng.standard_normal((3, 1024, 64), np.float32),
    )
    got = linalg.dot_products(q, k[:, :seen])
    assert got.flags.c_contiguous
    assert np.abs(got - np.einsum("htd,hsd->hts", q.astype(float), k[:, :seen])).max() < 1e-4


def test_activations_take_arrays_of_more_than_a_piece() -> None:
    x = np.random.default_rng(0).standard_normal((7, linalg.PIECE // 3), np.float32)
    for function in linalg.ACTIVATIONS.values():
        parts = np.concatenate([function(row.copy()[np.newaxis]) for row in x])
        assert np.array_equal(function(x.copy()), parts)


def test_layer_norm_is_its_definition() -> None:
    x = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32) * 4 + 3
    got = linalg.layer_norm(x, np.full(300, 2, np.float32), np.ones(300, np.float32), 1e-5)
    wide = x.astype(float)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * 2 + 1
    assert np.abs(got - expected).max() < 5e-6


# config.json


def test_transformers_defaults_are_ours() -> None:
    assert Config.from_json({"model_type": "gpt2"}) == Config()


def test_a_config_survives_its_json() -> None:
    for name in ODD:
        assert Config.from_json(odd(name).to_json()) == odd(name)


def test_the_published_config_is_accepted() -> None:
    published = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "n_inner": None,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
        "add_cross_attention": False, "pruned_heads": {}, "is_encoder_decoder": False, "use_cache": True,
        "dtype": "float32", "transformers_version": "5.23.0", "cross_attention_hidden_size": None,
    }  # fmt: skip
    assert Config.from_json(published) == Config()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_ctx": 64}, {"n_positions": 64}),
        ({"n_ctx": 64, "n_positions": 32}, {"n_positions": 32}),
        ({"hidden_size": 96, "num_attention_heads": 6}, {"n_embd": 96, "n_head": 6, "n_inner": 384}),
        ({"eos_token_id": [3, 5]}, {"eos_token_id": (3, 5)}),
        ({"eos_token_id": None}, {"eos_token_id": ()}),
        ({"vocab_size": 100}, {"eos_token_id": ()}),
        ({"property_names": ["a"], "resize_strategy": 3}, {}),  # words of other models lie inside of these
        ({"adapters": {"adapters": {}, "config_map": {}, "fusions": {}}}, {}),  # there are none
    ],
)
def test_fields_are_read(fields: dict, expected: dict) -> None:
    config = Config.from_json({"model_type": "gpt2"} | fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"), ("model_type", 3), ("add_cross_attention", True), ("architectures", ["GPT2Moe"]),
        ("architectures", "GPT2LMHeadModel"), ("architectures", [[]]), ("activation_function", "silu"), ("n_head", 7),
        ("activation_function", []), ("n_embd", 0), ("n_embd", True), ("n_embd", 48.0), ("n_embd", "48"),
        ("n_layer", -1), ("n_layer", 2**40), ("layer_norm_epsilon", 0), ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", "x"), ("scale_attn_weights", 1), ("tie_word_embeddings", "yes"), ("hidden_size", 7),
        ("eos_token_id", -1), ("eos_token_id", [1, "x"]), ("eos_token_id", True), ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}), ("auto_map", {"AutoModel": "x.Y"}), ("multi_query", True),
        ("position_embedding_type", "relative_key"), ("rope_theta", 10000.0), ("is_encoder_decoder", True),
        ("attention_head_type", "multiquery"), ("adapters", {"config_map": {"a": "pfeiffer"}}), ("use_rope", True),
        ("n_ctx", "x"), ("n_positions", 0),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field if field != "hidden_size" else "n_embd"):
        Config.from_json(SMALL.to_json() | {field: value})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(st.sampled_from([*SMALL.to_json(), "architectures", "n_ctx", "hidden_size", "auto_map"]), json_values)
def test_any_value_in_a_config_gives_a_config_or_a_config_error(field: str, value: object) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(Config.from_json(SMALL.to_json() | {field: value}), Config)


@pytest.mark.parametrize("data", [[], None, 3, "gpt2", {}, {"model_type": None}])
def test_what_is_no_config_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError):
        Config.from_json(data)


@pytest.mark.parametrize("name", ["plain", "gelu", "relu, narrow", "unscaled"])
def test_what_the_caller_told_numpy_about_underflow_does_not_matter(name: str) -> None:
    config = odd(name)
    tensors = {key: 8 * tensor if "attn" in key else tensor for key, tensor in random_tensors(config).items()}
    model, ids = GPT2(config, range(config.n_layer), tensors), np.random.default_rng(0).integers(0, 97, 200)

    def everything() -> list[np.ndarray | float]:
        cache = model.new_cache()
        logits = model.logits(model.forward(model.embed(ids, 0), [(cache, len(ids))]))
        drawn = [sample(1e3 * logits[-1], Sampling(t, top_k, top_p, 5), 7)
                 for t in (0.0, 1e-300, 1e-3, 1.0) for top_k in (0, 5) for top_p in (0.5, 1.0)]  # fmt: skip
        return [logits, *drawn, logprob(1e3 * logits[-1], 3)]

    wanted = everything()
    with np.errstate(all="raise"):
        got = everything()
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
