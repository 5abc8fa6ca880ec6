"""Weights: however a checkpoint is stored, a stage gets the same tensors, and what is damaged is refused by name."""

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import SMALL, expected_digest, odd, random_tensors, write

import minigpt
from minigpt.checkpoint import weights
from minigpt.engine import linalg
from minigpt.engine.config import Config, tensor_shapes
from minigpt.engine.model import GPT2
from minigpt.errors import CheckpointError

TENSORS = random_tensors(SMALL)
ALL = range(SMALL.n_layer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", SMALL, TENSORS)


def bfloat16(tensor: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, as integers."""
    return (tensor.view(np.uint32) >> 16).astype(np.uint16)


def write_raw(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file by hand, for dtypes that NumPy lacks."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("layers", [range(2), range(1, 3), range(2, 4), ALL])
def test_files_and_prefix_change_neither_tensors_nor_digest(
    tmp_path: Path, prefix: str, shards: int, layers: range
) -> None:
    masks = {f"{prefix}h.{i}.attn.bias": np.ones((1, 1, 9, 9), np.bool_) for i in ALL}
    masks |= {f"{prefix}h.{i}.attn.masked_bias": np.full((), -1e4) for i in ALL}
    write(tmp_path, SMALL, TENSORS, prefix=prefix, shards=shards, extra=masks)
    loaded = weights.load(tmp_path, SMALL, layers)
    names = set(tensor_shapes(SMALL, layers))
    assert set(loaded.tensors) == names == set(tensor_shapes(SMALL, layers))
    assert all(np.array_equal(loaded.tensors[name], TENSORS[name]) for name in names)
    assert loaded.digest == expected_digest(b"F32", {name: TENSORS[name] for name in names})
    assert weights.digest(tmp_path, SMALL, layers) == loaded.digest
    assert loaded.nbytes == sum(TENSORS[name].nbytes for name in names)
    GPT2(SMALL, layers, loaded.tensors)


def test_float16_is_widened_exactly(tmp_path: Path) -> None:
    write(tmp_path, SMALL, TENSORS, dtype=np.float16)
    loaded = weights.load(tmp_path, SMALL, ALL)
    halves = {name: tensor.astype(np.float16) for name, tensor in TENSORS.items()}
    assert all(np.array_equal(loaded.tensors[name], half.astype(np.float32)) for name, half in halves.items())
    assert loaded.digest == weights.digest(tmp_path, SMALL, ALL) == expected_digest(b"F16", halves)


@pytest.mark.parametrize("block", [2, 64, 1000, 2**20])
def test_bfloat16_is_widened_exactly_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(weights, "BLOCK", block)
    config = Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=1, n_head=2, n_inner=6)
    stored = {name: bfloat16(tensor) for name, tensor in random_tensors(config).items()}
    write_raw(tmp_path / weights.SINGLE, {n: ("BF16", t.shape, t.tobytes()) for n, t in stored.items()})
    loaded = weights.load(tmp_path, config, range(1))
    wide = {name: (tensor.astype(np.uint32) << 16).view(np.float32) for name, tensor in stored.items()}
    assert all(np.array_equal(loaded.tensors[name], tensor) for name, tensor in wide.items())
    assert loaded.digest == weights.digest(tmp_path, config, range(1)) == expected_digest(b"BF16", stored)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_how_matrices_lie_in_memory_changes_neither_them_nor_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type
) -> None:
    write(tmp_path, SMALL, TENSORS, dtype=dtype)
    monkeypatch.setattr(weights, "BLOCK", 1000)
    layers = {name for name, tensor in TENSORS.items() if name.startswith("h.") and tensor.ndim == 2}
    shrinking = {name for name in layers if TENSORS[name].shape[0] > TENSORS[name].shape[1]}
    assert SMALL.tie_word_embeddings
    assert shrinking
    digests = set()
    for blocked, part, turned in (
        (False, ALL, {*shrinking, "wte.weight"}),  # the longer side in one piece
        (True, ALL, layers),  # columns in one piece; the head's are the embedding's rows
        (False, range(1), {name for name in shrinking if name.startswith("h.0.")}),  # here it only embeds
    ):
        monkeypatch.setattr(linalg, "BLOCKED", blocked)
        loaded = weights.load(tmp_path, SMALL, part)
        assert all(np.array_equal(tensor, TENSORS[name].astype(dtype)) for name, tensor in loaded.tensors.items())
        assert {name for name, tensor in loaded.tensors.items() if not tensor.flags.c_contiguous} == turned
        assert all(loaded.tensors[name].T.flags.c_contiguous for name in turned)
        digests |= {loaded.digest} if part == ALL else set()
    assert len(digests) == 1


def test_dtypes_may_be_mixed_and_unknown_neighbours_passed_over(tmp_path: Path) -> None:
    stored = {name: ("F32", t.shape, t.tobytes()) for name, t in TENSORS.items()}
    stored["ln_f.bias"] = ("F16", TENSORS["ln_f.bias"].shape, TENSORS["ln_f.bias"].astype(np.float16).tobytes())
    odd_sizes = {"a.u8": ("U8", (3,), b"abc"), "a.f8": ("F8_E4M3", (5,), b"12345"), "a.i64": ("I64", (), b"8 bytes!")}
    write_raw(tmp_path / weights.SINGLE, odd_sizes | stored)
    loaded = weights.load(tmp_path, SMALL, ALL)
    assert all(np.array_equal(loaded.tensors[n], t) for n, t in TENSORS.items() if n != "ln_f.bias")
    assert np.array_equal(loaded.tensors["ln_f.bias"], TENSORS["ln_f.bias"].astype(np.float16).astype(np.float32))


def test_the_head_is_the_embedding_unless_the_config_unties_them(tmp_path: Path) -> None:
    config = odd("own head")
    tensors = random_tensors(config)
    write(tmp_path / "own", config, tensors)
    last = weights.load(tmp_path / "own", config, range(3, 4))
    assert "wte.weight" not in last.tensors
    assert np.array_equal(last.tensors["lm_head.weight"], tensors["lm_head.weight"])
    same = write(tmp_path / "stored twice", SMALL, TENSORS, extra={"lm_head.weight": TENSORS["wte.weight"]})
    assert weights.load(same, SMALL, ALL).digest == expected_digest(b"F32", TENSORS)
    other = write(tmp_path / "not the same", SMALL, TENSORS, extra={"lm_head.weight": tensors["lm_head.weight"]})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        weights.load(other, SMALL, ALL)
    renamed = {("lm_head.weight" if name == "wte.weight" else name): tensor for name, tensor in TENSORS.items()}
    write(tmp_path / "kept as head", SMALL, renamed)
    loaded = weights.load(tmp_path / "kept as head", SMALL, ALL)
    assert np.array_equal(loaded.tensors["wte.weight"], TENSORS["wte.weight"])


def test_one_changed_bit_changes_the_digest_of_the_stage_that_holds_it(folder: Path) -> None:
    before = [weights.load(folder, SMALL, layers).digest for layers in (range(2), range(2, 4))]
    changed = TENSORS | {"h.3.mlp.c_fc.weight": TENSORS["h.3.mlp.c_fc.weight"].copy()}
    changed["h.3.mlp.c_fc.weight"].view(np.uint32)[5, 5] ^= 1
    write(folder, SMALL, changed)
    after = [weights.load(folder, SMALL, layers).digest for layers in (range(2), range(2, 4))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_a_missing_tensor_names_itself(folder: Path) -> None:
    write(folder, SMALL, {name: t for name, t in TENSORS.items() if name != "h.2.ln_2.bias"})
    with pytest.raises(CheckpointError, match=r"tensor h\.2\.ln_2\.bias is missing"):
        weights.load(folder, SMALL, ALL)
    weights.load(folder, SMALL, range(2))


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [("I64", (48,), r"dtype I64"), ("F32", (96,), r"shape \(96,\)"), ("F32", (48, 1), "shape"), ("F32", (), "shape")],
)
def test_a_tensor_of_another_type_or_shape_is_refused(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], message: str
) -> None:
    stored = {name: ("F32", t.shape, t.tobytes()) for name, t in TENSORS.items()}
    stored["ln_f.weight"] = (dtype, shape, bytes({"I64": 8, "F32": 4}[dtype] * int(np.prod(shape))))
    write_raw(tmp_path / weights.SINGLE, stored)
    with pytest.raises(CheckpointError, match=rf"ln_f\.weight.*{message}"):
        weights.load(tmp_path, SMALL, ALL)


def test_a_tensor_stored_under_both_names_is_refused(folder: Path) -> None:
    write(folder, SMALL, TENSORS, extra={"ln_f.bias": TENSORS["ln_f.bias"]})
    with pytest.raises(CheckpointError, match="twice"):
        weights.load(folder, SMALL, ALL)


@pytest.mark.parametrize(
    "file", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "a\0.safetensors", 3, None, []]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, file: object) -> None:
    write(tmp_path / "inside", SMALL, TENSORS, shards=2)
    write_raw(tmp_path / "evil.safetensors", {})
    index = json.loads((tmp_path / "inside" / weights.INDEX).read_text())
    index["weight_map"]["transformer.wte.weight"] = file
    (tmp_path / "inside" / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"wanted a \*\.safetensors file beside it"):
        weights.load(tmp_path / "inside", SMALL, ALL)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', "[" * 100_000, "\xff"])
def test_a_damaged_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / weights.INDEX).write_text(index, encoding="latin-1")
    with pytest.raises(CheckpointError):
        weights.load(tmp_path, SMALL, ALL)


def test_a_lying_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path, SMALL, TENSORS, shards=2)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    name = "transformer.ln_f.bias"
    index["weight_map"][name] = files[1 - files.index(index["weight_map"][name])]
    (tmp_path / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json says it is"):
        weights.load(tmp_path, SMALL, ALL)
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[1]} is missing"):
        weights.load(tmp_path, SMALL, ALL)


def test_pickles_are_not_read_and_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        weights.load(tmp_path, SMALL, ALL)
    for name in ("pytorch_model.bin", "model.pt", "tf_model.h5", "flax_model.msgpack", "model.gguf"):
        (tmp_path / name).write_bytes(b"\x80")
        with pytest.raises(CheckpointError, match=f"only {name}, .*pickles can run code.*: convert it"):
            weights.load(tmp_path, SMALL, ALL)
        (tmp_path / name).unlink()


DISGUISES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n": "git-lfs, .*run `git lfs pull`",
    b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n": "a page of HTML or XML, .*fetch the file again",
    b"PK\x03\x04\0\0\x08\x08" + bytes(40): "a pickle of torch's, .*convert it",
    b"\x80\x02}q\0X\5\0\0\0hello": "a pickle, which can run code",
    b"\x89HDF\r\n\x1a\n" + bytes(40): "HDF5",
    b"": "empty: fetch it again",
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", DISGUISES)
def test_a_file_that_is_something_else_is_refused_for_what_it_is(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write(tmp_path / "checkpoint", SMALL, random_tensors(SMALL))
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: th.*{DISGUISES[content]}"):
        minigpt.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_to_nothing_is_refused_for_that(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "checkpoint", SMALL, random_tensors(SMALL))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0123")
    with pytest.raises(
        CheckpointError, match=rf"{name}: not a file, but a link to \.\./\.\./blobs/0123, where nothing is: .*fetch it"
    ):
        minigpt.load(folder)


def test_a_header_that_begins_as_a_pickle_does_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((0x80).to_bytes(8, "little") + b"{" + bytes(10))
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        weights.load(tmp_path, SMALL, ALL)


TINY = Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=1, n_head=1, n_inner=2)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_give_a_checkpoint_error_or_other_numbers(tmp_path: Path, data: st.DataObject) -> None:
    write(tmp_path, TINY, random_tensors(TINY))
    path = tmp_path / weights.SINGLE
    content = bytearray(path.read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "add"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del content[place:]
    else:
        content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        weights.load(tmp_path, TINY, range(1))


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def shrinking(file: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(folder / weights.SINGLE, 5000)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(CheckpointError, match="become shorter"):
        weights.load(folder, SMALL, ALL)


def test_short_reads_are_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, preadv = weights.load(folder, SMALL, ALL).digest, os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:1000]], offset))
    assert weights.load(folder, SMALL, ALL).digest == whole


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_loading_takes_little_more_memory_than_the_tensors(tmp_path: Path, dtype: type) -> None:
    config = Config(vocab_size=20000, n_positions=64, n_embd=768, n_layer=2, n_head=12)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config, range(2)).items()}
    write(tmp_path, config, zeros, dtype=dtype)
    program = (
        "import sys, resource, numpy; from pathlib import Path\n"
        "from minigpt.checkpoint import sources, weights\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "folder = Path(sys.argv[1]); config = sources.read_config(folder); before = peak()\n"
        "loaded = weights.load(folder, config, range(2))\n"
        "print(loaded.nbytes // 1024, peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    tensors, grown = map(int, result.stdout.split())
    unit = 1024 if sys.platform == "darwin" else 1  # getrusage counts bytes there
    assert grown / unit < tensors + 30 * 1024, f"{grown} KiB for {tensors} KiB of tensors"
