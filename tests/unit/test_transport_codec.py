"""The message codec: one form of each value, and only DecodeError for everything else."""

import contextlib
import time
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import codec
from transport.errors import DecodeError

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=20) | st.dictionaries(st.text("abé\n", max_size=40), v), max_leaves=30
)


def depth(value):
    if isinstance(value, list | dict):
        return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@given(values)
def test_what_is_encoded_is_decoded_and_msgpack_agrees(value):
    if depth(value) > codec.MAX_DEPTH:
        with pytest.raises(ValueError, match="levels"):
            codec.encode(value)
        return
    data = codec.encode(value)
    assert data == msgpack.packb(value)
    assert codec.decode(data) == value == codec.decode(bytearray(data))


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_any_bytes_give_a_plain_value_or_a_decode_error(data):
    decoded_or_refused(data)


def decoded_or_refused(data):
    try:
        value = codec.decode(data)
    except DecodeError:
        return
    assert codec.decode(codec.encode(value)) == value


@given(values.filter(lambda value: depth(value) <= codec.MAX_DEPTH), st.data())
def test_a_flipped_byte_gives_a_plain_value_or_a_decode_error(value, data):
    message = bytearray(codec.encode(value))
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    decoded_or_refused(bytes(message))


@given(values.filter(lambda value: depth(value) <= codec.MAX_DEPTH))
def test_every_prefix_and_every_suffix_is_refused(value):
    data = codec.encode(value)
    for cut in range(len(data)):
        with pytest.raises(DecodeError):
            codec.decode(data[:cut])
    with pytest.raises(DecodeError, match="follow"):
        codec.decode(data + b"\xc0")


@pytest.mark.parametrize(
    "number",
    [
        0,
        1,
        127,
        128,
        255,
        256,
        65535,
        65536,
        2**32 - 1,
        2**32,
        2**63,
        2**64 - 1,
        -1,
        -32,
        -33,
        -128,
        -129,
        -32768,
        -32769,
        -(2**31),
        -(2**31) - 1,
        -(2**63),
    ],
)
def test_an_integer_may_take_more_bytes_than_it_needs(number):
    right = codec.encode(number)
    assert codec.decode(right) == number
    for tag, size, signed in [
        (0xCC, 1, False),
        (0xCD, 2, False),
        (0xCE, 4, False),
        (0xCF, 8, False),
        (0xD0, 1, True),
        (0xD1, 2, True),
        (0xD2, 4, True),
        (0xD3, 8, True),
    ]:
        try:
            other = bytes([tag]) + number.to_bytes(size, "big", signed=signed)
        except OverflowError:
            continue
        assert codec.decode(other) == number


@pytest.mark.parametrize("size", [0, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_a_length_may_take_more_bytes_than_it_needs(size):
    for value in (b"x" * size, "x" * size, [1] * min(size, 1024), {str(i): 1 for i in range(min(size, 1024))}):
        right = codec.encode(value)
        assert codec.decode(right) == value
        count = len(value)
        for tag, width in [
            (0xC4, 1),
            (0xC5, 2),
            (0xC6, 4),
            (0xD9, 1),
            (0xDA, 2),
            (0xDB, 4),
            (0xDC, 2),
            (0xDD, 4),
            (0xDE, 2),
            (0xDF, 4),
        ]:
            if count >= 1 << 8 * width:
                continue
            body = right[len(msgpack_head(value)) :]
            other = bytes([tag]) + count.to_bytes(width, "big") + body
            if other != right:
                with contextlib.suppress(DecodeError):  # under another type's tag the body may mean nothing
                    read = codec.decode(other)
                    assert type(read) is not type(value) or read == value


def msgpack_head(value):
    packer = msgpack.Packer()
    if isinstance(value, dict):
        return packer.pack_map_header(len(value))
    if isinstance(value, list):
        return packer.pack_array_header(len(value))
    data = packer.pack(value)
    return data[: len(data) - len(value)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",  # never used
        b"\x91" * 1000 + b"\xc0",
        b"\x81\xa1a" * 1000 + b"\xc0",
        b"\xdd\x00\x0f\x42\x40" + b"\x80" * 1_000_000,  # a million empty maps
        b"\xdd\xff\xff\xff\xff" * 500,  # arrays that announce 4 G items each
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xffabc",
        b"\x82\xa1a\x01\xa1a\x02",  # equal keys
        b"\x81\x01\x02",  # a key that is not text
        b"\x81\xc4\x01a\x02",
        b"\x81\x90\x02",
        b"\x81\x80\x02",
        b"\xd4\x01\x00",  # ext
        b"\xc7\x01\x05a",
        b"\xd6\xff\x00\x00\x00\x00",  # timestamp
        b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # NaN
        b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",  # Inf
        b"\xa1\xff",
        b"\xa3\xed\xa0\x80",  # half a surrogate pair
        b"\xa2\xc0\x80",  # NUL, over-long
        b"\xc0\xc0",
    ],
)
def test_bombs_and_forbidden_kinds_are_refused_at_once_and_in_bounded_memory(data):
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(DecodeError) as caught:
        codec.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - start < 10
    assert peak < 16 * 2**20
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        2**64,
        -(2**63) - 1,
        {1: 2},
        {b"a": 1},
        {1, 2},
        object(),
        1j,
        "\ud800",
        [0] * 1025,
        [[[[[[[[[0]]]]]]]]],
    ],
)
def test_what_could_not_be_decoded_is_not_encoded(value):
    with pytest.raises((TypeError, ValueError)):
        codec.encode(value)


def test_memory_of_arrays_travels_as_bytes():
    assert codec.decode(codec.encode({"rows": memoryview(bytearray(b"abcd")), "t": (1, 2)})) == {
        "rows": b"abcd",
        "t": [1, 2],
    }


def test_depth_is_bounded_exactly():
    value: object = 0
    for _ in range(codec.MAX_DEPTH):
        value = [value]
    assert codec.decode(codec.encode(value)) == value
    with pytest.raises(DecodeError, match="levels"):
        codec.decode(b"\x91" + codec.encode(value))


def test_only_keys_that_are_known_are_read_as_text():
    """Python 3.12 keeps each key that msgpack reads as text for good."""
    known = frozenset({b"a", "é".encode()})
    value = {"a": [{"é": "text"}, b"bytes"]}
    assert codec.decode(codec.encode(value), known) == value
    for unknown in ({"b": 1}, {"a": {"b": 1}}, {"a": [{"b": 1}]}, {"x" * 1000: 1}):
        with pytest.raises(DecodeError, match="a key that no message has"):
            codec.decode(codec.encode(unknown), known)
    with pytest.raises(DecodeError):
        codec.decode(b"\x81\xc4\x01a\x02", known)  # bytes, and not text
    with pytest.raises(DecodeError, match="twice"):
        codec.decode(b"\x82\xa1a\x01\xc4\x01a\x02", known)
