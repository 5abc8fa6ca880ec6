"""CBOR (RFC 8949), read strictly: what Nitro documents and the answers of `/dev/nsm` are made of.

    first byte    3 bits major type | 5 bits: a number below 24; or 24, 25, 26, 27: it follows in 1, 2, 4, 8 bytes
    types         0 integer n | 1 integer -1-n | 2 bytes, n of them | 3 text, n bytes of UTF-8
                  4 array of n items | 5 map of n pairs | 7: 20 false, 21 true, 22 null

An array or map of indefinite length has 31 in place of its number, and ends at the byte FF. Everything else is refused:
tags, floats, strings in pieces, a number in more bytes than it needs, a key twice or of another type, trailing bytes.
"""

from collections.abc import Iterator
from typing import Any

from attest import EvidenceError

MAX_DEPTH = 4  # arrays and maps within each other; a Nitro document has 2, and so has its payload
MAX_VALUES = 256  # in all; a payload with all registers has 88
_BREAK = b"\xff"
_INDEFINITE = 31
_SIMPLE = {20: False, 21: True, 22: None}


def read(data: bytes) -> Any:
    """The value that `data` encodes, whole. Raises EvidenceError."""
    reader = _Reader(data)
    value = reader.value(0)
    if reader.at != len(data):
        raise EvidenceError(f"CBOR: got {len(data) - reader.at} bytes behind the value, wanted none")
    return value


def head(kind: int, number: int) -> bytes:
    """The first bytes of a value: its major type and number, in the shortest form."""
    if number < 24:
        return bytes([32 * kind + number])
    power = next(power for power in range(4) if number < 1 << (8 << power))
    return bytes([32 * kind + 24 + power]) + number.to_bytes(1 << power, "big")


def byte_string(data: bytes) -> bytes:
    """Bytes, encoded."""
    return head(2, len(data)) + data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.values = data, 0, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise EvidenceError(f"CBOR: wanted {count} bytes at {self.at}, got {len(self.data) - self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def value(self, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise EvidenceError(f"CBOR: got more than {MAX_VALUES} values")
        kind, low = divmod(self.take(1)[0], 32)
        match kind:
            case 0:
                return self.number(low)
            case 1:
                return -1 - self.number(low)
            case 2:
                return self.take(self.number(low))
            case 3:
                return self.text(self.number(low))
            case 4 | 5 if depth < MAX_DEPTH:
                count = None if low == _INDEFINITE else self.number(low)
                return self.pairs(count, depth + 1) if kind == 5 else [self.value(depth + 1) for _ in self.turns(count)]
            case 7 if low in _SIMPLE:
                return _SIMPLE[low]
        raise EvidenceError(f"CBOR: got the byte {32 * kind + low:02x} in depth {depth}, which is not read here")

    def number(self, low: int) -> int:
        if low < 24:
            return low
        size = 1 << low - 24
        if size > 8:
            raise EvidenceError(f"CBOR: got {low} in place of a number, wanted at most 27")
        number = int.from_bytes(self.take(size), "big")
        if number < (24 if size == 1 else 1 << 4 * size):
            raise EvidenceError(f"CBOR: got the number {number} in {size} bytes, wanted the shortest form")
        return number

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise EvidenceError("CBOR: got text that is not UTF-8") from None

    def turns(self, count: int | None) -> Iterator[None]:
        """As many turns as there are items: `count`, or until the break."""
        if count is not None:
            for _ in range(count):
                yield
            return
        while self.data[self.at : self.at + 1] != _BREAK:
            yield
        self.at += 1

    def pairs(self, count: int | None, depth: int) -> dict[int | str, Any]:
        pairs: dict[int | str, Any] = {}
        for _ in self.turns(count):
            key = self.value(depth)
            if type(key) not in (int, str):
                raise EvidenceError(f"CBOR: got a key of type {type(key).__name__}, wanted an integer or text")
            if key in pairs:
                raise EvidenceError(f"CBOR: got the key {key!a:.40} twice")
            pairs[key] = self.value(depth)
        return pairs
