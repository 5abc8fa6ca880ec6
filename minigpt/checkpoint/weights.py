"""A checkpoint's tensors for a range of layers, read into memory and digested on the way.

    model.safetensors                                       one file, or
    model.safetensors.index.json + model-*-of-*.safetensors   several, and which tensor is in which

The `safetensors` package checks each file's header; the bytes are then read directly, because its NumPy interface knows
no bfloat16 and takes twice the memory. A stage reads only its own tensors, each once, in blocks, which are digested and
then copied to their place as float32. So the digest covers the very bytes that are used, whatever happens to the file
meanwhile, and loading needs only a few blocks of memory beside the tensors.

All tensors are in one allocation, which Linux backs with huge pages: a token reads every weight, and 4 KiB pages cost
many walks through the page tables. This took 4 % off a token's matrices on two threads, and 5 to 10 % on one. Matrices
lie in memory as `linalg.by_columns` says.

The digest is SHA-256 over, for each tensor in the order of its name (bytewise, without the prefix `transformer.`),

    u16 length of the name, the name
    u8 length of the dtype, the dtype as safetensors spells it: F32, F16, BF16 or F64
    u8 number of dimensions, each dimension as u64
    SHA-256 of the stored bytes

with big-endian integers, after the 19 bytes of "minigpt-weights-v1" and a zero. It does not depend on how the
checkpoint is split into files, or on what else they hold.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from attest.document import parse_json, read_file
from minigpt.checkpoint.sources import dangling, disguise, unreadable
from minigpt.engine.config import Config, tensor_shapes
from minigpt.engine.linalg import Array, by_columns
from minigpt.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHERS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
)  # files of weights that we do not read
MAX_HEADER = 4 * 2**20  # bytes of a file's header, or of an index; GPT-2 XL's are 60 KB, with 1024 layers 1.5 MB
BLOCK = 2 * 2**20  # bytes read, digested and widened at a time: few enough to be in the cache when they are hashed
READERS = 2  # threads; hashing releases the GIL, and two outrun most disks

_ALIGN = 16  # numbers: a tensor begins with a cache line
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_PLAIN = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.safetensors")  # a name of a file beside the index
_DOMAIN = b"minigpt-weights-v1\0"
_PREFIX = "transformer."
_HEAD = "lm_head.weight"
# Bits of an element, by safetensors' names: the size of every tensor is needed to find the next one.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The weights of a stage."""

    tensors: Mapping[str, Array]  # by name without prefix
    digest: bytes  # 32 bytes, as defined above
    nbytes: int  # the tensors' size in memory


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's bytes are in a file."""

    path: Path
    offset: int  # bytes from the file's start
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def load(folder: Path, config: Config, layers: range, progress: Callable[[str], None] = lambda line: None) -> Weights:
    """Reads the tensors of `layers` from the checkpoint in `folder`, and says after each how far it has come.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or of another shape or type than the config says.
    """
    return _read_all(folder, config, layers, progress, keep=True)


def digest(folder: Path, config: Config, layers: range, progress: Callable[[str], None] = lambda line: None) -> bytes:
    """The digest that `load` finds, in a fraction of its time, and in no memory. Raises CheckpointError as `load`."""
    return _read_all(folder, config, layers, progress, keep=False).digest


def _read_all(folder: Path, config: Config, layers: range, progress: Callable[[str], None], *, keep: bool) -> Weights:
    shapes = tensor_shapes(config, layers)
    places = _places(folder, shapes, tied=config.tie_word_embeddings)
    for name, shape in shapes.items():
        if places[name].shape != shape:
            raise CheckpointError(f"tensor {name}: got shape {places[name].shape!s:.80}, the config wants {shape}")
        if places[name].dtype not in _DTYPES:
            raise CheckpointError(f"tensor {name}: got dtype {places[name].dtype}, wanted F32, F16, BF16 or F64")
    tied = places["wte.weight"] if config.tie_word_embeddings and layers.stop == config.n_layer else None
    head = _stored_head(folder, tied) if tied else None
    tensors = _room(shapes, config.head if layers.stop == config.n_layer else "") if keep else {}
    # The largest first, so that the readers finish together.
    names = sorted(shapes, key=lambda name: places[name].nbytes, reverse=True)
    with ThreadPoolExecutor(READERS, "weights") as readers:
        read = readers.map(lambda name: _read(name, places[name], tensors.get(name)), names)
        digests, done, size = {}, 0, sum(place.nbytes for place in places.values())
        for name, digests[name] in zip(names, read, strict=True):
            done += places[name].nbytes
            progress(f"reading weights: {100 * done // size} % of {size / 1e6:.0f} MB")
    if head:
        _check_tied(head, digests["wte.weight"])
    whole = hashlib.sha256(_DOMAIN)
    for name in sorted(shapes, key=str.encode):
        label, dtype, shape = name.encode(), places[name].dtype.encode(), shapes[name]
        whole.update(len(label).to_bytes(2, "big") + label + bytes([len(dtype)]) + dtype)
        whole.update(bytes([len(shape)]) + b"".join(size.to_bytes(8, "big") for size in shape) + digests[name])
    return Weights(tensors, whole.digest(), sum(tensor.nbytes for tensor in tensors.values()))


def _room(shapes: Mapping[str, tuple[int, ...]], head: str) -> dict[str, Array]:
    """Empty arrays in one allocation, one after another; `head` names the one that is multiplied transposed."""
    sizes = {name: -(-math.prod(shape) // _ALIGN) * _ALIGN for name, shape in shapes.items()}
    try:
        room = np.empty(sum(sizes.values()), np.float32)
    except (MemoryError, ValueError):  # the latter beyond the address space
        raise CheckpointError(f"not enough memory for the weights, {4 * sum(sizes.values())} bytes") from None
    tensors, start = {}, 0
    for name, shape in shapes.items():
        flat = room[start : start + math.prod(shape)]
        if name == head:
            turned = not by_columns(shape[1], shape[0])
        else:
            turned = name.startswith("h.") and len(shape) == 2 and by_columns(*shape)
        tensors[name] = flat.reshape(shape[::-1]).T if turned else flat.reshape(shape)
        start += sizes[name]
    return tensors


def _read(name: str, place: _Stored, tensor: Array | None) -> bytes:
    """Fills a tensor, block by block of its rows, and returns the SHA-256 of its stored bytes; of None, only this."""
    digest = hashlib.sha256()
    if tensor is None:
        for block in _blocks(name, place, BLOCK):
            digest.update(block.data)
        return digest.digest()
    rows = tensor if tensor.ndim == 2 else tensor.reshape(-1, 1)
    row = rows.shape[1] * _BITS[place.dtype] // 8  # bytes
    per_block = max(1, BLOCK // row)
    for start, block in zip(range(0, len(rows), per_block), _blocks(name, place, per_block * row), strict=True):
        digest.update(block.data)
        target = rows[start : start + per_block]
        stored = block.view(_DTYPES[place.dtype]).reshape(target.shape)
        if place.dtype == "BF16":  # the upper half of a float32
            target[:] = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            with np.errstate(over="ignore", under="ignore"):  # as torch rounds a float64
                target[:] = stored
    return digest.digest()


def _blocks(name: str, place: _Stored, size: int) -> Iterator[NDArray[np.uint8]]:
    """The stored bytes of a tensor, `size` at a time, in a buffer that the next block overwrites."""
    buffer = np.empty(min(size, place.nbytes), np.uint8)
    try:
        with open(place.path, "rb", buffering=0) as file:
            for start in range(0, place.nbytes, size):
                block = buffer[: place.nbytes - start]
                left, offset = block.data, place.offset + start
                while left:
                    count = os.preadv(file.fileno(), [left], offset)
                    if not count:
                        raise EOFError("the file has become shorter")
                    left, offset = left[count:], offset + count
                yield block
    except (OSError, EOFError) as error:
        reason = unreadable(error) or error
        raise CheckpointError(f"tensor {name}: cannot be read from {place.path}: {reason}") from None


def _stored_head(folder: Path, embedding: _Stored) -> _Stored | None:
    """Where a head is stored beside the embedding that the config ties it to. One of another size is refused unread."""
    stored = _stored_names(folder)
    if _HEAD not in stored:
        return None
    place = _header(folder / stored[_HEAD]).get(_HEAD)
    if place is None:
        raise CheckpointError(f"tensor {_HEAD} is not in {folder / stored[_HEAD]}")
    if (place.shape, place.dtype) != (embedding.shape, embedding.dtype):
        raise _untied(folder)
    return place if place != embedding else None


def _check_tied(head: _Stored, embedding: bytes) -> None:
    """Refuses a stored head that differs from the embedding of this digest."""
    if _read(_HEAD, head, None) != embedding:
        raise _untied(head.path.parent)


def _untied(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"tensor {_HEAD} in {folder} is not wte.weight, though config.json ties them: "
        "set tie_word_embeddings to false there if the model has a head of its own"
    )


def _places(folder: Path, wanted: Mapping[str, Any], *, tied: bool) -> dict[str, _Stored]:
    """Where every wanted tensor is, by its name without prefix."""
    stored = _stored_names(folder)
    files: dict[str, dict[str, str]] = {}  # file -> name as stored -> name wanted
    for name in wanted:
        spellings = [spelling for spelling in (name, _PREFIX + name) if spelling in stored]
        if not spellings and tied and name == "wte.weight" and _HEAD in stored:
            spellings = [_HEAD]  # of tied tensors a writer may keep either
        if not spellings:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint {folder}")
        if len(spellings) > 1:
            raise CheckpointError(f"tensor {name} is there twice in {folder}: as {' and as '.join(spellings)}")
        files.setdefault(stored[spellings[0]], {})[spellings[0]] = name
    places: dict[str, _Stored] = {}
    for file, names in files.items():
        found = _header(folder / file)
        for spelling, name in names.items():
            if spelling not in found:
                raise CheckpointError(f"tensor {spelling} is not in {folder / file}, where {INDEX} says it is")
            places[name] = found[spelling]
    return places


def _stored_names(folder: Path) -> dict[str, str]:
    """Each tensor's name as stored, and the file in `folder` that holds it. transformers looks in the same order."""
    try:
        if (folder / SINGLE).is_file():
            return dict.fromkeys(_header(folder / SINGLE), SINGLE)
        if (folder / INDEX).is_file():
            return _index(folder / INDEX)
        for name in (SINGLE, INDEX):
            if (gone := dangling(folder / name)) is not None:
                raise CheckpointError(f"{folder / name}: {gone}")
            if (folder / name).is_dir():
                raise CheckpointError(f"{folder / name} is a folder, wanted a file: fetch the checkpoint again")
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHERS)
    except OSError as error:
        raise CheckpointError(f"{folder}: {unreadable(error) or error.strerror}") from None
    hint = (
        f", only {', '.join(others)[:200]}, which is not read (pickles can run code): convert it with transformers' "
        "save_pretrained"
    )
    raise CheckpointError(
        f"no {SINGLE} and no {INDEX} in {folder}{hint if others else ': is this the folder of the checkpoint?'}"
    )


def _index(path: Path) -> dict[str, str]:
    """The weight_map of an index. Its files must be plain names: an index must not lead out of its folder."""
    try:
        data = read_file(path, MAX_HEADER)
        if len(data) > MAX_HEADER:
            raise CheckpointError(f"{path}: more than {MAX_HEADER} bytes")
        if (wrong := disguise(data)) is not None:
            raise CheckpointError(f"{path}: {wrong}")
        entries = dict(parse_json(data)["weight_map"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = unreadable(error) or f"not an index with a weight_map ({type(error).__name__}: {error})"
        raise CheckpointError(f"{path}: {reason}") from None
    for name, file_name in entries.items():
        if not isinstance(file_name, str) or not _PLAIN.fullmatch(file_name):
            got = f"tensor {name!r:.80} is in {file_name!r:.80}"
            raise CheckpointError(f"{path}: {got}, wanted a *.safetensors file beside it")
    return entries


def _header(path: Path) -> dict[str, _Stored]:
    """Every tensor of a safetensors file, whose header the package has checked: no holes, no overlaps."""
    try:
        if not path.is_file():
            folder = "a folder, wanted a file" if path.is_dir() else "missing, or not a file"
            raise CheckpointError(f"{path} is {dangling(path) or folder}: fetch the checkpoint again")
    except OSError as error:
        raise CheckpointError(f"{path}: {unreadable(error) or error.strerror}") from None
    wrong = None
    places: dict[str, _Stored] = {}
    try:
        with path.open("rb") as file:
            begin = file.read(32)
            length = int.from_bytes(begin[:8], "little")
            wrong = disguise(begin) if begin[8:9] != b"{" else None
            if length > MAX_HEADER:
                raise CheckpointError(f"{path}: {wrong or f'a header of {length} bytes, wanted at most {MAX_HEADER}'}")
            file.seek(8)
            parse_json(file.read(length))  # of equal names the package takes the last
        with safe_open(path, framework="numpy") as opened:
            offset = 8 + length
            for name in opened.offset_keys():
                piece = opened.get_slice(name)
                dtype, shape = str(piece.get_dtype()), tuple(piece.get_shape())
                if dtype not in _BITS:
                    raise CheckpointError(f"{path}: tensor {name!r:.80} has the unknown dtype {dtype}")
                places[name] = _Stored(path, offset, dtype, shape)
                offset += places[name].nbytes
    except (SafetensorError, OSError, ValueError) as error:
        reason = (
            unreadable(error) or wrong or f"not a valid safetensors file: {_cut_off(path) or repr(str(error)):.200}"
        )
        raise CheckpointError(f"{path}: {reason}") from None
    return places


def _cut_off(path: Path) -> str | None:
    """What to say of a file that ends before its header, or its tensors, do; None if it does not."""
    size = wanted = 0
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        wanted = 8 + length
        if wanted <= size:  # else the rest of it says nothing
            pieces = [piece for name, piece in parse_json(file.read(length)).items() if name != "__metadata__"]
            wanted += max(int(piece["data_offsets"][1]) for piece in pieces)
    return f"it has {size} bytes, and its header announces {wanted}: cut off; fetch it again" if size < wanted else None
