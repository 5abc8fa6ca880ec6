"""Batches and answers on the link between two stages: what is sent is what is read, and all else is refused."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import SMALL

from minigpt.engine.sampling import Sampling
from minigpt.errors import MessageError
from minigpt.protocol import batches
from minigpt.protocol.batches import NO_ROWS, Batch, Due, Given, Result, Segment, Terms
from minigpt.protocol.messages import MAX_DRAFT, Logits, Refusal, Scores, Span, Tokens, Wanted
from minigpt.protocol.request import Ask
from transport import codec
from transport.errors import DecodeError

COLUMNS = SMALL.n_embd
BEHIND = range(1, 3)
GREEDY = Sampling()
BIAS = ((0, -100.0), (2**31 - 1, 2.5))
PENALISED = Sampling(0.7, 40, 0.9, 3, 0.05, 1.2, -0.5, 0.25, BIAS)


def hidden(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, COLUMNS), np.float32)


BATCHES = [
    Batch((), NO_ROWS),
    Batch((), NO_ROWS, (), (0, 2**32 - 1)),
    Batch((Segment(0, 0, 1, Wanted.TOKEN),), hidden(1)),
    Batch(
        (Segment(7, 3, 2, Wanted.NOTHING), Segment(2**32 - 1, 0, 3, Wanted.TOKENS), Segment(1, 9, 1, Wanted.LOGITS)),
        hidden(6),
        ((7, Terms(2**20, Sampling(0.7, 40, 0.9, 2**64 - 1), True)), (1, Terms(1, GREEDY, False, True))),
        (3,),
    ),
    Batch(
        (
            Segment(4, 9, 1, Wanted.TOKEN, Given((5, 5), (1, 2**32 - 1))),
            Segment(2, 9, 1, Wanted.TOKEN),
            Segment(3, 0, 2, Wanted.SCORES, Given((7, 8))),
            Segment(5, 9, 1, Wanted.TOKEN, Given((), (3,))),
        ),
        hidden(5),
        ((4, Terms(16, PENALISED, top=20)), (2, Terms(16, GREEDY)), (5, Terms(9, Sampling(logit_bias=((3, 1.0),))))),
    ),
]


def carried(parts: Any) -> list[bytes]:
    return codec.decode_parts(codec.encode(parts))


@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_the_batch_that_is_sent_is_read(batch: Batch) -> None:
    read = batches.decode(carried(batches.encode(batch)), COLUMNS)
    assert (read.segments, read.terms, read.ended) == (batch.segments, batch.terms, batch.ended)
    assert np.array_equal(read.hidden, batch.hidden.reshape(-1, COLUMNS))
    assert read.hidden.dtype == "<f4"


def test_only_a_batch_that_ends_lanes_and_does_nothing_else_has_no_answer() -> None:
    assert [batch.answered for batch in BATCHES] == [True, False, True, True, True]


def parts(**changed: bytes) -> list[bytes]:
    """The parts of a batch of two segments, some of them changed."""
    batch = Batch(
        (Segment(0, 5, 1, Wanted.TOKEN), Segment(1, 0, 2, Wanted.TOKEN)), hidden(3), ((1, Terms(9, GREEDY)),), (4,)
    )
    names = ("segments", "ids", "terms", "biases", "ended", "hidden")
    return [changed.get(name, bytes(part)) for name, part in zip(names, batches.encode(batch), strict=True)]


def segment(*fields: int) -> bytes:
    return struct.pack("<IIII", *fields)


def terms(
    positions: int = 9,
    top_k: int = 0,
    flags: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top: int = 0,
    biases: int = 0,
    min_p: float = 0.0,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> bytes:
    numbers = (temperature, top_p, min_p, repetition, presence, frequency)
    return struct.pack("<IIIBBHQ6d", 1, positions, top_k, flags, top, biases, 0, *numbers)


def ids(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def pairs(*told: tuple[int, float]) -> bytes:
    return b"".join(struct.pack("<Id", *pair) for pair in told)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"segments": segment(0, 5, 1, 1) + segment(1, 0, 1, 1)}, "2 rows"),
        ({"segments": segment(0, 5, 1, 1) + segment(1, 0, 3, 1)}, "4 rows"),
        ({"segments": segment(0, 5, 1, 1) + segment(1, 0, 2**32 - 1, 1)}, "rows in a segment"),
        ({"segments": segment(0, 5, 3, 1) + segment(1, 0, 0, 1)}, "0 rows"),
        ({"segments": segment(0, 5, 1, 1) + segment(0, 0, 2, 1)}, "a lane twice"),
        ({"segments": segment(0, 5, 1, 5) + segment(1, 0, 2, 1)}, "wanted"),
        ({"segments": segment(0, 5, MAX_DRAFT + 2, 2)}, "rows in a segment"),
        ({"segments": segment(0, 5, 3, 1)[:-1]}, "segments"),
        ({"segments": segment(0, 5, 1, 1) * (batches.MAX_SEGMENTS + 1)}, "segments"),
        ({"segments": b""}, "0 rows"),
        ({"hidden": b""}, "3 rows"),
        ({"hidden": bytes(4 * 3 * COLUMNS + 4)}, "3 rows"),
        ({"hidden": bytes(4 * 3 * COLUMNS - 1)}, "3 rows"),
        ({"terms": terms()[:-1]}, "terms"),
        ({"terms": terms(positions=0)}, "0 positions"),
        ({"terms": terms(positions=2**20 + 1)}, "positions"),
        ({"terms": terms(top_k=2**31)}, "top_k"),
        ({"terms": terms(flags=4)}, "flags"),
        ({"terms": terms(temperature=-1.0)}, "temperature"),
        ({"terms": terms(temperature=math.nan)}, "temperature"),
        ({"terms": terms(temperature=math.inf)}, "temperature"),
        ({"terms": terms(top_p=0.0)}, "top_p"),
        ({"terms": terms(top_p=math.nan)}, "top_p"),
        ({"ended": bytes(3)}, "ended"),
        ({"terms": terms(top=21)}, "top"),
        ({"terms": terms(min_p=1.5)}, "min_p"),
        ({"terms": terms(min_p=math.nan)}, "min_p"),
        ({"terms": terms(repetition=0.0)}, "repetition_penalty"),
        ({"terms": terms(repetition=math.inf)}, "repetition_penalty"),
        ({"terms": terms(repetition=math.nan)}, "repetition_penalty"),
        ({"terms": terms(presence=math.inf)}, "presence_penalty"),
        ({"terms": terms(frequency=math.nan)}, "frequency_penalty"),
        ({"terms": terms(biases=1)}, "0 biases, wanted 1"),
        ({"biases": pairs((1, 1.0))}, "1 biases, wanted 0"),
        ({"terms": b"", "biases": pairs((1, 1.0))}, "1 biases, wanted 0"),
        ({"terms": terms(biases=2), "biases": pairs((1, 1.0))}, "1 biases, wanted 2"),
        ({"terms": terms(biases=1), "biases": pairs((1, 1.0))[:-1]}, "pairs of 12 bytes"),
        ({"terms": terms(biases=1), "biases": pairs((1, math.nan))}, "NaN"),
        ({"terms": terms(biases=1), "biases": pairs((2**31, 1.0))}, "logit_bias"),
        ({"terms": terms(biases=2), "biases": pairs((3, 1.0), (3, 1.0))}, "logit_bias"),
        ({"terms": terms(biases=2), "biases": pairs((3, 1.0), (2, 1.0))}, "logit_bias"),
        ({"terms": terms(biases=1025), "biases": pairs(*((i, 1.0) for i in range(1025)))}, "logit_bias"),
        ({"ids": bytes(3)}, "3 bytes of ids"),
        ({"ids": ids(0)}, "another number of ids"),
        ({"ids": ids(0, 0)}, "another number of ids"),
        ({"ids": ids(0, 0, 0)}, "another number of ids"),
        ({"ids": ids(0, 1, 0)}, "another number of ids"),
        ({"ids": ids(0, 0, 2, 7)}, "another number of ids"),
        ({"ids": ids(0, 2**32 - 1, 2**32 - 1, 7)}, "another number of ids"),
        ({"ids": ids(0, 0, 1, 7, 9)}, "another number of ids"),
        ({"ids": ids(2, 0, 1, 7)}, "ids of lane 2"),
        ({"ids": ids(0, 0, 1, 7, 0, 0, 1, 7)}, "ids of lane 0"),
        ({"ids": ids(1, 0, 1, 7, 0, 0, 1, 7)}, "ids of lane 0"),
    ],
    ids=str,
)
def test_a_batch_whose_parts_disagree_is_refused(changed: dict[str, bytes], reason: str) -> None:
    batches.decode(parts(), COLUMNS)
    with pytest.raises(MessageError, match=reason):
        batches.decode(parts(**changed), COLUMNS)


@pytest.mark.parametrize("plain", [{}, [], [b""] * 5, [b""] * 7, [*[b""] * 5, "x"], [*[b""] * 5, 7], None])
def test_what_is_no_array_of_six_byte_strings_is_refused(plain: object) -> None:
    with pytest.raises(MessageError, match="array of 6"):
        batches.decode(plain, COLUMNS)


SPANS = (Span(0.1, 0.0, 0.0, 0.0, 5.0), Span(0.2, 0.0, 0.0, 0.0, 6.0))
DUE = [
    Due(Segment(0, 4, 1, Wanted.TOKEN), Ask(Wanted.TOKEN, GREEDY)),
    Due(Segment(1, 0, 9, Wanted.NOTHING), Ask(Wanted.NOTHING, GREEDY)),
    Due(Segment(2, 4, 3, Wanted.TOKENS), Ask(Wanted.TOKENS, GREEDY, True, True)),
    Due(Segment(3, 0, 2, Wanted.LOGITS), Ask(Wanted.LOGITS, GREEDY, False, True)),
    Due(Segment(4, 0, 2, Wanted.TOKEN), Ask(Wanted.TOKEN, GREEDY)),
    Due(Segment(5, 0, 2, Wanted.TOKEN), Ask(Wanted.TOKEN, GREEDY, True)),
    Due(Segment(6, 4, 2, Wanted.SCORES), Ask(Wanted.SCORES, GREEDY, False, True, 2)),
    Due(Segment(7, 4, 3, Wanted.TOKENS), Ask(Wanted.TOKENS, GREEDY, top=1)),
]
RESULTS: list[Result] = [
    Tokens(5, (7,)),
    None,
    Tokens(5, (1, 2), (-0.5, -1.5), SPANS),
    Logits(2, np.linspace(-1, 1, SMALL.vocab_size, dtype=np.float32), SPANS),
    Refusal(2, "busy", "try again in 3 s"),
    Tokens(2, (3,), (-2.5,)),
    Scores(5, (-0.5, 0.0), SPANS, ((1, -0.5), (2, -0.5), (2, 0.0), (1, -3.0))),
    Tokens(5, (1, 2), (), (), ((1, -0.25), (2, 0.0))),
]


def test_the_answers_that_are_sent_are_read() -> None:
    read = batches.decode_answers(carried(batches.encode_answers(RESULTS)), DUE, SMALL, BEHIND)
    for got, sent in zip(read, RESULTS, strict=True):
        if isinstance(sent, Logits):
            assert isinstance(got, Logits)
            assert (got.position, got.spans) == (sent.position, sent.spans)
            assert np.array_equal(got.values, sent.values)
        else:
            assert got == sent


@pytest.mark.parametrize(
    ("index", "result"),
    [
        (0, None),
        (0, Tokens(5, ())),
        (0, Tokens(5, (1, 2))),
        (0, Tokens(5, (SMALL.vocab_size,))),
        (0, Tokens(5, (1,), (-0.5,))),
        (0, Tokens(5, (1,), (), SPANS)),
        (0, RESULTS[3]),
        (1, Tokens(9, (1,))),
        (2, Tokens(5, (1, 2, 3, 4), (-1.0,) * 4, SPANS)),
        (2, Tokens(5, (1, 2), (), SPANS)),
        (2, Tokens(5, (1, 2), (-1.0, -1.0))),
        (2, Tokens(5, (1, 2), (-1.0, 0.5), SPANS)),
        (2, Tokens(5, (1, 2), (-1.0, math.nan), SPANS)),
        (2, Tokens(5, (1, 2), (-1.0, -1.0), (*SPANS, SPANS[0]))),
        (2, Tokens(5, (1, 2), (-1.0, -1.0), (SPANS[0], Span(-1.0, 0.0, 0.0, 0.0, 0.0)))),
        (2, Tokens(5, (1, 2), (-1.0, -1.0), (SPANS[0], Span(math.inf, 0.0, 0.0, 0.0, 0.0)))),
        (3, Logits(2, np.zeros(SMALL.vocab_size - 1, np.float32), SPANS)),
        (3, Logits(2, np.full(SMALL.vocab_size, np.nan, np.float32), SPANS)),
        (3, Tokens(2, (1,), (), SPANS)),
        (0, Scores(5, (-0.5,))),
        (0, Tokens(5, (7,), (), (), ((1, -0.5),))),
        (6, Scores(5, (-0.5,), SPANS, ((1, -0.5), (2, -0.5)))),
        (6, Scores(5, (-0.5,) * 3, SPANS, ((1, -0.5), (2, -0.5)) * 3)),
        (6, Scores(5, (-0.5, 0.5), SPANS, ((1, -0.5), (2, -0.5)) * 2)),
        (6, Scores(5, (-0.5, math.nan), SPANS, ((1, -0.5), (2, -0.5)) * 2)),
        (6, Scores(5, (-0.5, -0.5), (), ((1, -0.5), (2, -0.5)) * 2)),
        (6, Scores(5, (-0.5, -0.5), SPANS)),
        (6, Scores(5, (-0.5, -0.5), SPANS, ((1, -0.5), (2, -0.5)))),
        (6, Scores(5, (-0.5, -0.5), SPANS, ((1, -0.5), (1, -0.5)) * 2)),
        (6, Scores(5, (-0.5, -0.5), SPANS, ((1, -0.5), (2, -0.25)) * 2)),
        (6, Scores(5, (-0.5, -0.5), SPANS, ((1, 0.5), (2, -0.25)) * 2)),
        (6, Scores(5, (-0.5, -0.5), SPANS, ((1, -0.5), (SMALL.vocab_size, -0.5)) * 2)),
        (6, Scores(5, (-0.5, -0.5), SPANS, ((1, -0.5), (2, -math.inf)) * 2)),
        (6, Tokens(6, (1,), (), SPANS, ((1, -0.5), (2, -0.5)))),
        (6, RESULTS[3]),
        (6, None),
        (7, Tokens(5, (1, 2))),
        (7, Tokens(5, (1, 2), (), (), ((1, -0.25),))),
        (7, Tokens(5, (1, 2), (), (), ((1, -0.25), (2, 0.25)))),
        (4, Refusal(0, "busy", "it speaks for a stage before it")),
        (4, Refusal(3, "busy", "it speaks for a stage that is not there")),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_answer_to_something_else_is_refused(index: int, result: Result) -> None:
    results = [*RESULTS[:index], result, *RESULTS[index + 1 :]]
    with pytest.raises(MessageError):
        batches.decode_answers(carried(batches.encode_answers(results)), DUE, SMALL, BEHIND)


def test_as_many_answers_come_as_were_asked_for() -> None:
    for results in (RESULTS[:-1], [*RESULTS, None], []):
        with pytest.raises(MessageError, match="results"):
            batches.decode_answers(carried(batches.encode_answers(results)), DUE, SMALL, BEHIND)
    sent = batches.encode_answers(RESULTS)
    for place, more in ((1, bytes(4)), (2, bytes(8)), (3, bytes(40)), (4, bytes(4)), (1, b"\0")):
        changed = [part + more if index == place else part for index, part in enumerate(sent)]
        with pytest.raises(MessageError):
            batches.decode_answers(changed, DUE, SMALL, BEHIND)


def test_a_refusals_words_are_shown_with_escapes() -> None:
    refusal = Refusal(1, "busy", "\x1b[2Jgone\n")
    due = [Due(Segment(0, 0, 1, Wanted.TOKEN), Ask(Wanted.TOKEN, GREEDY))]
    (read,) = batches.decode_answers(carried(batches.encode_answers([refusal])), due, SMALL, BEHIND)
    assert read == Refusal(1, "busy", "\\x1b[2Jgone\\n")


@given(st.lists(st.binary(max_size=80), min_size=6, max_size=6))
def test_other_bytes_are_read_or_refused_and_never_anything_else(given_: list[bytes]) -> None:
    for read in (
        lambda: batches.decode(given_[:4], COLUMNS),
        lambda: batches.decode_answers(given_, DUE, SMALL, BEHIND),
    ):
        try:
            read()
        except MessageError as error:
            assert len(str(error)) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"\x91",
        b"\x91\xc0",
        b"\x91\xa1a",
        b"\x91\x90",
        b"\x91\xc4",
        b"\x91\xc4\x02a",
        b"\x91\xc4\x01aa",
        b"\x92\xc4\x01a",
        b"\x91\xc6\xff\xff\xff\xff",
        b"\x91" * 1000,
    ],
)
def test_an_array_of_anything_but_byte_strings_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        codec.decode_parts(data)


@given(st.lists(st.binary(max_size=300), max_size=15))
def test_an_array_of_byte_strings_is_read_as_the_package_reads_it(sent: list[bytes]) -> None:
    assert codec.is_parts(codec.encode(sent))
    assert codec.decode_parts(codec.encode(sent)) == codec.decode(codec.encode(sent)) == sent
