"""The fields of messages: how a value becomes a plain one, and how a plain one is checked on its way back.

Each function here makes the rule for one kind of field. A value that breaks its rule is a MessageError, which says what
was received and what was expected, and never shows a string or bytes, because they may be a prompt.
"""

import enum
import math
import struct
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import MessageError


class Field(NamedTuple):
    """A rule: `encode` makes a plain value, `decode` checks one and converts it.

    A field that may be `absent` is left out where it has a false value, its default. `names` are those of the fields
    inside it.
    """

    encode: Callable[[Any], object]
    decode: Callable[[object], Any]
    absent: bool = False
    names: tuple[str, ...] = ()


def _same(value: Any) -> Any:
    return value


def integer(low: int, high: int, *, absent: bool = False) -> Field:
    """An integer from low to high; a bool is not one. `absent` leaves a 0 out."""

    def decode(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _wrong(value, f"an integer from {low} to {high}")
        return value

    return Field(_same, decode, absent)


def number(low: float, high: float, *, absent: bool = False) -> Field:
    """A float from low to high, which are finite. `absent` leaves a 0 out."""

    def decode(value: object) -> float:
        if type(value) is not float or not low <= value <= high:  # NaN is in no range
            raise _wrong(value, f"a float from {low} to {high}")
        return value

    return Field(float, decode, absent)


def text(limit: int, *, absent: bool = False) -> Field:
    """A string of at most `limit` characters; a longer one is cut when it is sent. `absent` leaves an empty one out."""

    def decode(value: object) -> str:
        if type(value) is not str or len(value) > limit:
            raise _wrong(value, f"a string of at most {limit} characters")
        return value

    return Field(lambda value: value[:limit], decode, absent)


def boolean(*, absent: bool = False) -> Field:
    """True or false; `absent` leaves a false one out."""

    def decode(value: object) -> bool:
        if type(value) is not bool:
            raise _wrong(value, "true or false")
        return value

    return Field(_same, decode, absent)


def choice(kind: type[enum.StrEnum]) -> Field:
    """One of an enumeration's strings."""
    choices = {str(member): member for member in kind}

    def decode(value: object) -> enum.StrEnum:
        if type(value) is not str or value not in choices:
            raise _wrong(value, "one of " + ", ".join(choices))
        return choices[value]

    return Field(str, decode)


def optional(rule: Field) -> Field:
    """None, or what another rule takes."""
    return Field(
        lambda value: None if value is None else rule.encode(value),
        lambda value: None if value is None else rule.decode(value),
    )


def numbers(kind: str, limit: int) -> Field:
    """A tuple of at most `limit` numbers, packed little-endian: struct's "I" or "d"."""
    width = struct.calcsize("<" + kind)

    def decode(value: object) -> tuple[Any, ...]:
        if type(value) is not bytes or len(value) % width or len(value) > limit * width:
            raise _wrong(value, f"the bytes of at most {limit} numbers of {width} bytes")
        if not value:  # as log-probabilities and spans usually are
            return ()
        unpacked = struct.unpack(f"<{len(value) // width}{kind}", value)
        if kind == "d" and not all(map(math.isfinite, unpacked)):
            raise MessageError("got NaN or infinity, wanted finite numbers")
        return unpacked

    return Field(lambda values: struct.pack(f"<{len(values)}{kind}", *values), decode)


def pairs(limit: int) -> Field:
    """A tuple of at most `limit` pairs of a token id and a float, packed little-endian; may be absent if empty."""
    one = struct.Struct("<Id")

    def decode(value: object) -> tuple[tuple[int, float], ...]:
        if type(value) is not bytes or len(value) % one.size or len(value) > limit * one.size:
            raise _wrong(value, f"the bytes of at most {limit} pairs of {one.size} bytes")
        found: tuple[tuple[int, float], ...] = tuple(one.iter_unpack(value))
        if not all(math.isfinite(amount) for _, amount in found):
            raise MessageError("got NaN or infinity, wanted finite numbers")
        return found

    return Field(lambda items: b"".join(one.pack(*item) for item in items), decode, absent=True)


def vector(limit: int) -> Field:
    """A float32 array (N,), as packed bytes."""
    return Field(lambda array: np.asarray(array, "<f4").tobytes(), lambda value: _packed(value, limit))


def tuples(kind: type, limit: int) -> Field:
    """A tuple of at most `limit` named tuples of floats that are not negative, as packed bytes."""
    width = len(kind.__annotations__)
    floats = numbers("d", limit * width)

    def decode(value: object) -> tuple[Any, ...]:
        flat = floats.decode(value)
        if not flat:
            return ()
        if len(flat) % width:
            raise MessageError(f"got {len(flat)} numbers, wanted a multiple of {width}")
        if min(flat) < 0:
            raise MessageError(f"got {min(flat)}, wanted at least 0")
        return tuple(kind(*flat[start : start + width]) for start in range(0, len(flat), width))

    return Field(lambda rows: floats.encode([part for row in rows for part in row]), decode)


def listed(kind: type, limit: int) -> Field:
    """A tuple of at most `limit` dataclasses whose fields have rules."""
    rules = schema(kind)

    def decode(value: object) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > limit:
            raise _wrong(value, f"a list of at most {limit}")
        return tuple(read(item, kind, rules) for item in value)

    return Field(lambda items: [write(item, rules) for item in items], decode, names=tuple(rules))


def nested(kind: type, rules: dict[str, Field]) -> Field:
    """A dataclass of another module, with the rules given here."""
    return Field(lambda item: write(item, rules), lambda value: read(value, kind, rules), names=tuple(rules))


def schema(kind: type) -> dict[str, Field]:
    """The rules of a dataclass whose fields are declared as Annotated[type, rule]."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def write(item: Any, rules: dict[str, Field]) -> dict[str, object]:
    """The plain dict of a dataclass."""
    return {
        name: rule.encode(getattr(item, name)) for name, rule in rules.items() if not rule.absent or getattr(item, name)
    }


def read(value: object, kind: type, rules: dict[str, Field]) -> Any:
    """The dataclass of a plain dict, which must have exactly its fields. Raises MessageError."""
    if type(value) is not dict or (value.keys() != rules.keys() and not _complete(value, rules)):
        count = f"{len(value)} fields" if isinstance(value, dict) else type(value).__name__
        raise MessageError(f"{kind.__name__}: got {count}, wanted exactly: {', '.join(rules) or 'none'}")
    fields = {}
    for name, plain in value.items():
        try:
            fields[name] = rules[name].decode(plain)
        except MessageError as error:
            raise MessageError(f"{kind.__name__}.{name}: {error}") from None
    try:
        return kind(**fields)
    except ValueError as error:  # what the fields say together
        raise MessageError(f"{kind.__name__}: {error}") from None


def _complete(value: dict[Any, Any], rules: dict[str, Field]) -> bool:
    """Whether only fields that may be absent are missing, and no others are there."""
    for name, rule in rules.items():  # a loop: a set and a generator take 0.7 µs more, for each Step
        if name not in value and not rule.absent:
            return False
    return value.keys() <= rules.keys()


def _packed(value: object, limit: int) -> NDArray[np.float32]:
    """The read-only array of at most `limit` finite numbers in these bytes."""
    if type(value) is not bytes or len(value) % 4 or len(value) > 4 * limit:
        raise _wrong(value, f"the bytes of at most {limit} numbers of 4 bytes")
    array = np.frombuffer(value, "<f4")
    if not np.isfinite(array).all():
        raise MessageError("got NaN or infinity, wanted finite numbers")
    return array


def _wrong(got: object, wanted: str) -> MessageError:
    shown = repr(got) if isinstance(got, int | float) and abs(got) < 1e18 else type(got).__name__
    return MessageError(f"got {shown}, wanted {wanted}")
