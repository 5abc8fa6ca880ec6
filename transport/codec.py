"""Messages ⇄ bytes: msgpack, of which only the canonical form of plain values is accepted.

A value is None, a bool, an int of 64 bits, a finite float, str, bytes, a list, or a dict with str keys. The package
msgpack reads and writes; around it stands what its defaults let through (tried on version 1.2.4): ext types and
timestamps, NaN, equal keys of which the last wins, integers and lengths in longer forms than they need, 1000 levels of
nesting, and 16 MiB of empty maps that become 1.3 GB.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import msgpack  # type: ignore[import-untyped]

from transport.errors import DecodeError

MAX_DEPTH = 8  # containers inside one another; a message of the pipeline has 3
MAX_CONTAINERS = 1024  # lists and maps in one message; a report has one for each stage
MAX_ITEMS = 1024  # in one list or map; token ids and tensors travel as bytes

_SCALARS = (int, str, bytes, bool, type(None))


def encode(value: Any) -> bytes:
    """The bytes of `value`. A memoryview of bytes and a tuple are taken too, and read back as bytes and list.

    Raises:
        TypeError, ValueError: `decode` would not read it.
    """
    _check(value, MAX_DEPTH, (list, tuple), (*_SCALARS, bytearray, memoryview))
    try:
        data: bytes = msgpack.packb(value)
    except OverflowError:
        raise ValueError("an int does not fit into 64 bits") from None
    return data


def decode(data: bytes | bytearray) -> Any:
    """The one value that `data` encodes.

    Raises:
        DecodeError: it is not exactly what `encode` writes. Nothing is kept of it, and the error quotes nothing of it.
    """
    containers = _Containers()
    try:
        value = msgpack.unpackb(
            data,
            strict_map_key=True,
            list_hook=containers.of_list,
            object_pairs_hook=containers.of_map,
            ext_hook=_no_ext,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
        _check(value, MAX_DEPTH, (list,), _SCALARS)
    except msgpack.ExtraData:
        raise DecodeError("message: bytes follow its end") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        # ValueError is the root of the package's FormatError and StackError, of UnicodeDecodeError, and of ours
        reason = str(error) if type(error) in (ValueError, TypeError) else type(error).__name__
        raise DecodeError(f"message: not msgpack as it is spoken here: {reason[:80]}") from None
    if msgpack.packb(value) != data:
        raise DecodeError("message: a number or a length is not in its shortest form")
    return value


class _Containers:
    """Counts lists and maps while they are read, before they fill the memory."""

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    def of_list(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def of_map(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        self._count()
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a key appears twice")
        return fields

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {MAX_CONTAINERS} lists and maps")


def _no_ext(_code: int, _data: bytes) -> NoReturn:
    raise ValueError("ext types are not allowed")


def _check(value: Any, depth: int, lists: tuple[type, ...], scalars: tuple[type, ...]) -> None:
    """Raises TypeError or ValueError unless it is a plain value, of not too many levels or items."""
    kind = type(value)
    if kind in scalars:
        return
    if kind is dict or kind in lists:
        if depth == 0 or len(value) > MAX_ITEMS:
            raise ValueError(f"more than {MAX_DEPTH} levels, or {MAX_ITEMS} items in one list or map")
        if kind is dict:
            if not all(type(key) is str for key in value):
                raise TypeError("a key is not text")
            value = value.values()
        for item in value:
            _check(item, depth - 1, lists, scalars)
    elif kind is float:
        if not math.isfinite(value):
            raise ValueError("a float is not finite")
    else:
        raise TypeError(f"a {kind.__name__} is not allowed")
