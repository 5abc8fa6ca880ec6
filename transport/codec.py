"""Messages to bytes and back: the plain part of msgpack, checked in one pass and read in another.

A value is None, a bool, an int of 64 bits, a finite float, str, bytes, a list, or a dict with str keys. The msgpack
package lets through more than that (tried on version 1.2.4): ext types and timestamps, NaN, duplicate keys of which the
last wins, 1000 levels of nesting, and 16 MiB of empty maps that become 1.3 GB of objects. And it interns each key that
it reads as text, which Python 3.12 keeps for good: a peer that makes up keys would fill the memory. So the first pass
reads text as bytes, looks keys up among those that are known, and keeps nothing of what it has checked.
"""

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import msgpack

from transport.errors import DecodeError

MAX_DEPTH = 8  # containers inside one another; a message of the pipeline has 3
MAX_CONTAINERS = 1024  # lists and maps in one message; a report has one for each stage
MAX_ITEMS = 1024  # in one list or map; token ids and tensors travel as bytes

_BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}  # msgpack's byte strings, and the bytes of their lengths
_SCALARS = frozenset({int, str, bytes, bool, type(None), bytearray, memoryview})


def encode(value: Any) -> bytes:
    """The bytes of `value`. A memoryview of bytes and a tuple are allowed, and read back as bytes and a list.

    Raises:
        TypeError, ValueError: `decode` would refuse it.
    """
    _check_items((value,), MAX_DEPTH)
    try:
        data: bytes = msgpack.packb(value)
    except OverflowError:
        raise ValueError("an int does not fit into 64 bits") from None
    return data


def decode(data: bytes | bytearray, keys: frozenset[bytes] | None = None) -> Any:
    """The one value that `data` encodes. Raises DecodeError if it is no such value, and quotes nothing of it.

    Args:
        keys: the only ones that a map may have, in UTF-8. None is for any, and not for what a stranger sent.
    """
    check = _Check(keys)
    try:
        value = msgpack.unpackb(
            data,
            raw=True,
            strict_map_key=True,
            list_hook=check.of_list,
            object_pairs_hook=check.of_map,
            ext_hook=_no_ext,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
        if type(value) is float and not math.isfinite(value):
            raise ValueError("a float is not finite")
        return msgpack.unpackb(data, object_hook=_text_keys)
    except msgpack.ExtraData:
        raise DecodeError("message: more bytes follow its end") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        # ValueError is the root of the package's FormatError and StackError, of UnicodeDecodeError, and of ours
        reason = str(error) if type(error) in (ValueError, TypeError) else type(error).__name__
        raise DecodeError(f"message: msgpack this protocol does not allow: {reason[:80]}") from None


def is_parts(data: bytes | bytearray) -> bool:
    """Whether these bytes begin a short array, which `decode_parts` reads."""
    return len(data) > 0 and data[0] >> 4 == 9


def decode_parts(data: bytes | bytearray) -> list[bytes]:
    """The byte strings in an array of at most 15, and of nothing else. Raises DecodeError.

    Read by hand: the package would make objects of whatever else is in it, before it could be refused.
    """
    parts, at = [], 1
    for _ in range(data[0] & 15):
        width = _BINARY.get(data[at]) if at < len(data) else None
        if width is None:
            raise DecodeError("message: wanted an array of byte strings")
        start = at + 1 + width
        at = start + int.from_bytes(data[at + 1 : start], "big")
        if at > len(data):
            raise DecodeError("message: a byte string is longer than what follows")
        parts.append(bytes(data[start:at]))
    if at != len(data):
        raise DecodeError("message: more bytes follow its end")
    return parts


class _Check:
    """Checks each list and map as soon as it is read, the innermost first, and leaves its level in its place.

    The level is in a tuple, which nothing else becomes.
    """

    def __init__(self, keys: frozenset[bytes] | None) -> None:
        self._keys = keys
        self._containers = 0

    def of_list(self, items: Iterable[Any]) -> tuple[int]:
        level = 1
        for item in items:
            kind = type(item)
            if kind is float:
                if not math.isfinite(item):
                    raise ValueError("a float is not finite")
            elif kind is tuple:
                level = max(level, 1 + item[0])
        if level > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of lists and maps")
        self._containers += 1
        if self._containers > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} lists and maps")
        return (level,)

    def of_map(self, pairs: list[tuple[bytes, Any]]) -> tuple[int]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a key appears twice")
        if self._keys is not None and not fields.keys() <= self._keys:
            raise ValueError("a key that no message has")
        return self.of_list(fields.values())


def _text_keys(fields: dict[Any, Any]) -> dict[Any, Any]:
    """The same map. Raises TypeError for a key that is bytes, which the first pass cannot tell from text."""
    "".join(fields)  # takes text alone
    return fields


def _no_ext(_code: int, _data: bytes) -> NoReturn:
    raise ValueError("ext types are not allowed")


def _check_items(items: Iterable[Any], depth: int) -> None:
    """Raises TypeError or ValueError unless all are plain values, of not too many levels or items."""
    for item in items:
        kind = type(item)
        if kind in _SCALARS:
            continue
        if kind is float:
            if not math.isfinite(item):
                raise ValueError("a float is not finite")
        elif kind is dict or kind is list or kind is tuple:
            if depth == 0 or len(item) > MAX_ITEMS:
                raise ValueError(f"more than {MAX_DEPTH} levels, or {MAX_ITEMS} items in one list or map")
            if kind is dict:
                if not all(type(key) is str for key in item):
                    raise TypeError("a key is not text")
                item = item.values()
            _check_items(item, depth - 1)
        else:
            raise TypeError(f"a {kind.__name__} is not allowed")
