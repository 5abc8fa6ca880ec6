"""A checkpoint made by an enemy is refused in words: nothing of it is loaded wrongly, and it exhausts no memory.

What a damaged one does is in test_weights.py; these are files that no writer would make.
"""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made import random_tensors

from minigpt.checkpoint import sources, weights
from minigpt.engine.config import Config, tensor_shapes
from minigpt.errors import CheckpointError, ConfigError

TINY = Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=1, n_head=1, n_inner=2, eos_token_id=(2,))
TENSORS = random_tensors(TINY)
FIRST, LAST = "wpe.weight", "wte.weight"  # of those in the data, in the order of their names
SIZES = {name: tensor.nbytes for name, tensor in TENSORS.items()}
DATA = b"".join(TENSORS[name].tobytes() for name in sorted(TENSORS))
Header = dict[str, dict]


def header() -> Header:
    """A sound one."""
    entries, at = {}, 0
    for name in sorted(TENSORS):
        entries[name] = {"dtype": "F32", "shape": list(TENSORS[name].shape), "data_offsets": [at, at + SIZES[name]]}
        at += SIZES[name]
    return entries


def store(path: Path, text: str | bytes, data: bytes = DATA, *, length: int | None = None) -> None:
    """A safetensors file with this header, whatever it is."""
    text = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def refusal(folder: Path, layers: range = range(1), config: Config = TINY) -> str:
    """What is said of a checkpoint that must be refused, in a few words and in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            weights.load(folder, config, layers)
        with pytest.raises(CheckpointError):
            weights.digest(folder, config, layers)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert len(said) < 600 + len(str(folder))
    assert said.isprintable()
    return said


def assert_loaded(folder: Path) -> None:
    loaded = weights.load(folder, TINY, range(1)).tensors
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_the_sound_one_is_loaded(tmp_path: Path) -> None:
    """The control of what follows."""
    store(tmp_path / weights.SINGLE, json.dumps(header()))
    assert_loaded(tmp_path)


def moved(first: int, last: int) -> Callable[[Header], None]:
    def change(entries: Header) -> None:
        for place, by in enumerate((first, last)):
            entries[LAST]["data_offsets"][place] += by

    return change


def given(name: str, field: str, value: object) -> Callable[[Header], None]:
    def change(entries: Header) -> None:
        entries[name][field] = value

    return change


def swapped(entries: Header) -> None:
    offsets = entries[LAST]["data_offsets"]
    offsets.reverse()


HEADERS: dict[str, Callable[[Header], None]] = {
    "overlaps the one before": moved(-8, -8),
    "begins inside the one before": moved(-8, 0),
    "leaves a hole": moved(8, 8),
    "ends behind the file": moved(0, 8),
    "lies behind the file": moved(2**40, 2**40),
    "begins before the file": moved(-(2**20), 0),
    "ends before it begins": swapped,
    "lies where another lies": given(LAST, "data_offsets", [0, SIZES[LAST]]),
    "is empty of bytes": given(LAST, "data_offsets", [0, 0]),
    "offsets wrap": given(LAST, "data_offsets", [2**64 - 8, 16]),
    "offsets of 65 bits": given(LAST, "data_offsets", [2**64, 2**64 + SIZES[LAST]]),
    "offsets are text": given(LAST, "data_offsets", ["0", "24"]),
    "one offset": given(LAST, "data_offsets", [0]),
    "a shape whose product wraps": given(LAST, "shape", [2**32, 2**32]),
    "a shape too large for its bytes": given(LAST, "shape", [3, 2, 1000]),
    "a shape of negative numbers": given(LAST, "shape", [-3, -2]),
    "a shape of fractions": given(LAST, "shape", [3.0, 2.0]),
    "a shape of zero": given(LAST, "shape", [0, 2]),
    "a shape of many ones": given(LAST, "shape", [1] * 1000 + [3, 2]),
    "another dtype as wide": given(LAST, "dtype", "I32"),
    "a narrower dtype": given(LAST, "dtype", "F16"),
    "an unknown dtype": given(LAST, "dtype", "F128"),
    "an object for a dtype": given(LAST, "dtype", "O"),
    "no dtype": given(LAST, "dtype", None),
    "metadata that are none": lambda entries: entries.update(__metadata__={"a": {"b": 1}}),
    "a tensor that is a list": lambda entries: entries.update({LAST: []}),  # type: ignore[dict-item]
    "no tensors": lambda entries: entries.clear(),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    entries = header()
    HEADERS[name](entries)
    store(tmp_path / weights.SINGLE, json.dumps(entries))
    refusal(tmp_path)


def test_a_header_of_two_opinions_is_refused(tmp_path: Path) -> None:
    text = json.dumps(header())
    entry = json.dumps({LAST: header()[LAST] | {"shape": [2, 3]}})
    for twice in (text[:-1] + ", " + entry[1:], entry[:-1] + ", " + text[1:], text[:-1] + ", " + text[1:]):
        store(tmp_path / weights.SINGLE, twice)
        assert "a key appears twice" in refusal(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b'{"a":' * 50_000, b"[" * 100_000, b"\0" * 8])
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, text: bytes) -> None:
    store(tmp_path / weights.SINGLE, text)
    refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\1", b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(8), b"\x80" + bytes(7)])
def test_a_file_shorter_than_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / weights.SINGLE).write_bytes(content)
    refusal(tmp_path)


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path: Path) -> None:
    store(tmp_path / weights.SINGLE, json.dumps(header()), DATA + b"!")
    refusal(tmp_path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / weights.SINGLE
    for length in (weights.MAX_HEADER + 1, 90 * 10**6):
        store(path, json.dumps(header()), length=length)
        os.truncate(path, 8 + length + len(DATA))  # of blanks it would be a header that the package accepts
        assert f"a header of {length} bytes, wanted at most {weights.MAX_HEADER}" in refusal(tmp_path)


def test_a_header_of_a_great_many_tensors_takes_bounded_memory(tmp_path: Path) -> None:
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    store(tmp_path / weights.SINGLE, "{" + ",".join(entry % i for i in range(20_000)) + "}", b"")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is missing"):
        weights.load(tmp_path, TINY, range(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_order_and_empty_and_odd_neighbours_move_nothing(tmp_path: Path) -> None:
    """Offsets are what counts; a tensor that is passed over takes the bytes that it takes."""
    entries, end = header(), len(DATA)
    first = entries[min(entries)]["data_offsets"][1]
    entries["a.0"] = {"dtype": "F64", "shape": [0, 7], "data_offsets": [first, first]}
    entries["z.4"] = {"dtype": "F4", "shape": [2], "data_offsets": [end, end + 1]}
    entries["z.6"] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [end + 1, end + 4]}
    for order in (sorted(entries), sorted(entries, reverse=True)):
        store(tmp_path / weights.SINGLE, json.dumps({name: entries[name] for name in order}), DATA + b"1234")
        assert_loaded(tmp_path)


def test_a_name_from_outside_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    name = "\x1b]0;owned\x07\x1b[2J" + "a" * 10_000
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": {name: "/etc/" + name}}))
    assert "wanted a *.safetensors file beside it" in refusal(tmp_path)
    (tmp_path / weights.INDEX).unlink()
    store(tmp_path / weights.SINGLE, json.dumps({name: {"dtype": name, "shape": [], "data_offsets": [0, 0]}}), b"")
    refusal(tmp_path)


# The index, and what its files are.


def index(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    names = dict.fromkeys(TENSORS, "one.safetensors") if weight_map is None else weight_map
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": names}))


def test_an_index_of_two_opinions_is_refused(tmp_path: Path) -> None:
    store(tmp_path / "one.safetensors", json.dumps(header()))
    index(tmp_path)
    assert_loaded(tmp_path)
    text = (tmp_path / weights.INDEX).read_text()
    for twice in (text[:-2] + f', "{LAST}": "two.safetensors"' + "}}", text[:-1] + ', "weight_map": {}}'):
        (tmp_path / weights.INDEX).write_text(twice)
        assert "a key appears twice" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["part one.safetensors", "teil-ß-1.safetensors", "モデル.safetensors", "-1.safetensors"]
)
def test_a_shard_may_have_any_plain_name(tmp_path: Path, name: str) -> None:
    store(tmp_path / name, json.dumps(header()))
    index(tmp_path, dict.fromkeys(TENSORS, name))
    assert_loaded(tmp_path)


def test_a_huge_index_is_refused(tmp_path: Path) -> None:
    with (tmp_path / weights.INDEX).open("wb") as file:
        file.truncate(2**36)
    assert f"more than {weights.MAX_HEADER} bytes" in refusal(tmp_path)


@pytest.mark.parametrize("name", [weights.SINGLE, "one.safetensors", weights.INDEX])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "device", "dangling"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    if name == "one.safetensors":
        index(tmp_path)
    path = tmp_path / name
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to(tmp_path / "nothing")
    refusal(tmp_path)


def test_a_link_is_followed_as_the_hubs_cache_needs_but_what_it_leads_to_must_be_sound(tmp_path: Path) -> None:
    """The hub's client keeps blobs, and snapshots of links to them. Links come from this machine, not from the hub."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    store(tmp_path / "blobs" / "0123", json.dumps(header()))
    (tmp_path / "snapshot" / "one.safetensors").symlink_to("../blobs/0123")
    index(tmp_path / "snapshot")
    assert_loaded(tmp_path / "snapshot")
    (tmp_path / "blobs" / "0123").write_text("root:secret:0:0:root:/root:/bin/sh\n" * 9)
    assert "secret" not in refusal(tmp_path / "snapshot")


@pytest.mark.parametrize(("dtype", "width"), [("F32", 2**30), ("F16", 2)])
def test_a_head_of_another_size_than_the_embedding_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, width: int
) -> None:
    """A sparse file holds terabytes for nothing; reading them is what costs."""
    end = len(DATA) + 3 * width * (4 if dtype == "F32" else 2)
    head = {"dtype": dtype, "shape": [3, width], "data_offsets": [len(DATA), end]}
    text = json.dumps(header() | {"lm_head.weight": head})
    store(tmp_path / weights.SINGLE, text)
    os.truncate(tmp_path / weights.SINGLE, 8 + len(text) + end)
    monkeypatch.setattr(weights, "_blocks", lambda *_: pytest.fail("bytes of a tensor are read"))
    assert "set tie_word_embeddings to false" in refusal(tmp_path)


# The config.


def read(folder: Path, text: str) -> str:
    """What is said of a config.json that must be refused, in a few words and in little memory."""
    (folder / "config.json").write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            sources.read_config(folder)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert len(said) < 500 + len(str(folder))
    assert said.isprintable()
    return said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_norm_epsilon", "NaN"), ("layer_norm_epsilon", "Infinity"), ("layer_norm_epsilon", "1e999"),
        ("layer_norm_epsilon", "-1e-5"), ("n_layer", "1025"), ("n_layer", "16777216"), ("n_embd", "9" * 4000),
        ("n_head", "9" * 5000), ("vocab_size", "-1"), ("n_inner", "1e3"), ("n_positions", '"' + "9" * 100_000 + '"'),
        ("n_embd", "[" * 900 + "]" * 900), ("activation_function", '"' + "\\u001b[2J" * 1000 + '"'),
        ("architectures", '["' + "x" * 100_000 + '"]'), ("eos_token_id", "[" + "-1," * 100_000 + "-1]"),
        ("hidden_size", '{"a":' * 400 + "1" + "}" * 400), ("\\u001b[2Jrope" + "x" * 100_000, "1"),
    ],
)  # fmt: skip
def test_a_config_that_would_break_the_engine_is_refused_in_few_words(tmp_path: Path, field: str, value: str) -> None:
    fields = {name: json.dumps(given) for name, given in TINY.to_json().items()} | {field: value}
    read(tmp_path, "{" + ", ".join(f'"{name}": {given}' for name, given in fields.items()) + "}")


def test_two_names_of_one_field_are_compared_only_as_numbers(tmp_path: Path) -> None:
    deep = "[" * 900 + "]" * 900
    read(tmp_path, f'{{"model_type": "gpt2", "n_embd": {deep}, "hidden_size": {deep}}}')


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_config_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="not a file"):
        sources.read_config(tmp_path)


def test_a_config_larger_than_the_weights_costs_nothing(tmp_path: Path) -> None:
    store(tmp_path / weights.SINGLE, json.dumps(header()))
    most = Config.from_json(TINY.to_json() | {"vocab_size": 2**24, "n_embd": 2**24, "n_inner": 2**24})
    assert "the config wants" in refusal(tmp_path, config=most)
    deepest = Config.from_json(TINY.to_json() | {"n_layer": 1024})
    assert "is missing" in refusal(tmp_path, range(1024), deepest)
    assert len(tensor_shapes(deepest, range(1024))) < 13_000


def test_weights_that_do_not_fit_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path / weights.SINGLE, json.dumps(header()))

    def none_left(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", none_left)
    with pytest.raises(CheckpointError, match="not enough memory for the weights"):
        weights.load(tmp_path, TINY, range(1))


def test_a_config_of_two_opinions_is_refused(tmp_path: Path) -> None:
    text = json.dumps(TINY.to_json())
    for twice in (text[:-1] + ', "n_head": 1}', text[:-1] + ', "id2label": {"0": "a", "0": "b"}}',
                  text[:-1] + ', "dict": {}, "dict": {}}'):  # fmt: skip
        assert "a key appears twice" in read(tmp_path, twice)
