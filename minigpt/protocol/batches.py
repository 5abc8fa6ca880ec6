"""What one stage asks of the next: a batch of rows, of as many sequences as wait; and the answers to it.

A sequence has a number on the link, its *lane*. The sender opens lanes in order, 0, 1, 2, …, and uses none again. What
holds for a whole sequence, its *terms*, is sent once. On the link, a batch is an array of six byte strings and its
answers one of seven: a map of checked fields costs a call for each field, and a hop has no time for them.
docs/protocol.md describes every byte.

Letters: R rows of all segments, C n_embd, V vocabulary.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.config import Config
from minigpt.engine.sampling import MAX_BIASES, MAX_TOP, Sampling
from minigpt.errors import MessageError
from minigpt.protocol import messages, schema
from minigpt.protocol.messages import MAX_DRAFT, Answer, Likely, Logits, Refusal, Scores, Span, Tokens, Wanted
from minigpt.protocol.request import Ask, flaw
from transport import codec
from transport.errors import DecodeError

MAX_SEGMENTS = 1024  # in one batch
_SEGMENT = struct.Struct("<IIII")
_TERMS = struct.Struct("<IIIBBHQ6d")
_BIASES = schema.pairs(MAX_SEGMENTS * MAX_BIASES)
_TOP = schema.pairs(messages.MAX_IDS)
_LANE = struct.Struct("<I")
_RESULT = struct.Struct("<BB")
_WANTED = tuple(Wanted)
_CODES = {wanted: code for code, wanted in enumerate(_WANTED)}
_LOGPROBS, _SPANS = 1, 2  # flags of terms
_NOTHING, _TOKENS, _LOGITS, _REFUSAL, _SCORES = range(5)  # kinds of results
OVERHEAD = 16  # bytes of msgpack around the parts of a batch with more than 64 KiB of rows


NO_ROWS = np.empty((0, 0), np.float32)


class Given(NamedTuple):
    """What the last stage must be told to answer a segment, because no stage but the first remembers ids."""

    ids: tuple[int, ...] = ()  # for scores each row's target; for penalties those generated so far
    prompt: tuple[int, ...] = ()  # for repetition_penalty, what else is in the prompt, each id once, rising


NONE_GIVEN = Given()


class Segment(NamedTuple):
    """Rows of one sequence in a batch."""

    lane: int
    start: int  # position of the first row
    rows: int  # at least 1
    wanted: Wanted
    given: Given = NONE_GIVEN


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for all of a sequence: how tokens are drawn, and how much room it takes."""

    positions: int  # that it will have at most
    sampling: Sampling
    logprobs: bool = False
    spans: bool = False
    top: int = 0  # of the most likely ids, how many are told for each token

    def ask(self, wanted: Wanted) -> Ask:
        return Ask(wanted, self.sampling, self.logprobs, self.spans, self.top)


@dataclass(frozen=True, slots=True)
class Batch:
    """Hidden states (R, C) for the layers of the receiver, segment after segment.

    Each lane stands in one segment at most. `terms` come with or before the first segment of their lane, and replace
    those that it had. `ended` lanes are forgotten first. A batch that only ends lanes has no answer.
    """

    segments: tuple[Segment, ...]
    hidden: NDArray[np.float32]
    terms: tuple[tuple[int, Terms], ...] = ()
    ended: tuple[int, ...] = ()

    @property
    def answered(self) -> bool:
        return bool(self.segments) or not self.ended


class Due(NamedTuple):
    """A segment whose answer is awaited."""

    segment: Segment
    ask: Ask


Result = Answer | Refusal | None  # of a segment; None if nothing was wanted


def encode(batch: Batch) -> list[bytes | memoryview]:
    """The array that the link carries."""
    return [
        b"".join(_SEGMENT.pack(lane, start, rows, _CODES[wanted]) for lane, start, rows, wanted, _ in batch.segments),
        b"".join(_pack_given(segment) for segment in batch.segments if any(segment.given)),
        b"".join(map(_pack_terms, batch.terms)) if batch.terms else b"",
        b"".join(_packed(_BIASES, terms.sampling.logit_bias) for _, terms in batch.terms) if batch.terms else b"",
        b"".join(map(_LANE.pack, batch.ended)) if batch.ended else b"",
        np.ascontiguousarray(batch.hidden, "<f4").data.cast("B") if batch.segments else b"",
    ]


def _pack_given(segment: Segment) -> bytes:
    ids, prompt = segment.given
    return struct.pack(f"<{3 + len(prompt) + len(ids)}I", segment.lane, len(prompt), len(ids), *prompt, *ids)


def _packed(rule: schema.Field, pairs: Likely) -> bytes:
    packed: Any = rule.encode(pairs)
    return bytes(packed)


def _pack_terms(item: tuple[int, Terms]) -> bytes:
    lane, terms = item
    drawn = terms.sampling
    flags = (_LOGPROBS if terms.logprobs else 0) | (_SPANS if terms.spans else 0)
    return _TERMS.pack(
        lane, terms.positions, drawn.top_k, flags, terms.top, len(drawn.logit_bias), drawn.seed, drawn.temperature,
        drawn.top_p, drawn.min_p, drawn.repetition_penalty, drawn.presence_penalty, drawn.frequency_penalty,
    )  # fmt: skip


def decode(plain: object, columns: int) -> Batch:
    """The batch in an array, with rows of so many columns.

    Whether its lanes are open and its rows finite is not checked here: that concerns one sequence, not the batch.

    Raises MessageError.
    """
    segments, given, terms, biases, ended, hidden = _parts(plain, 6)
    _fits(segments, _SEGMENT, "segments")
    _fits(terms, _TERMS, "terms")
    _fits(ended, _LANE, "ended")
    try:
        parts = tuple(
            Segment(lane, start, rows, _WANTED[wanted]) for lane, start, rows, wanted in _SEGMENT.iter_unpack(segments)
        )
    except IndexError:
        raise MessageError(f"batch: got something unknown wanted, wanted 0 to {len(_WANTED) - 1}") from None
    count = 0
    for segment in parts:
        most = 1 + MAX_DRAFT if segment.wanted is Wanted.TOKENS else messages.MAX_IDS
        if not 1 <= segment.rows <= most:
            raise MessageError(f"batch: got {segment.rows} rows in a segment, wanted 1 to {most}")
        count += segment.rows
    if len(hidden) != 4 * count * columns:
        raise MessageError(f"batch: got {len(hidden)} bytes of rows, wanted {count} rows of {columns} float32")
    if len(parts) > 1 and len({segment.lane for segment in parts}) != len(parts):
        raise MessageError("batch: got a lane twice, wanted one segment for each")
    return Batch(
        _read_given(given, parts) if given else parts,
        np.frombuffer(hidden, "<f4").reshape(count, columns),
        _read_terms(terms, biases) if terms or biases else (),
        tuple(lane for (lane,) in _LANE.iter_unpack(ended)) if ended else (),
    )


def _read_given(packed: bytes, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """The segments with the ids that are given for some of them."""
    if len(packed) % 4:
        raise MessageError(f"batch: got {len(packed)} bytes of ids, wanted a multiple of 4")
    numbers = struct.unpack(f"<{len(packed) // 4}I", packed)
    given: dict[int, Given] = {}
    order, at = iter(segments), 0
    while at < len(numbers):
        lane, prompt, ids = numbers[at : at + 3] if at + 3 <= len(numbers) else (0, 0, 0)
        middle, end = at + 3 + prompt, at + 3 + prompt + ids
        if not prompt + ids or end > len(numbers):
            raise MessageError("batch: got another number of ids than they say, or none")
        if not any(segment.lane == lane for segment in order):
            raise MessageError(f"batch: got ids of lane {lane}, wanted those of its segments, in their order")
        given[lane] = Given(numbers[middle:end], numbers[at + 3 : middle])
        at = end
    return tuple(segment._replace(given=given.get(segment.lane, NONE_GIVEN)) for segment in segments)


def _read_terms(packed: bytes, biases: bytes) -> tuple[tuple[int, Terms], ...]:
    pairs, found, at = _BIASES.decode(biases), [], 0
    for fields in _TERMS.iter_unpack(packed):
        end = at + fields[5]
        found.append(_terms(fields, pairs[at:end]))
        at = end
    if at != len(pairs):
        raise MessageError(f"batch: got {len(pairs)} biases, wanted {at}, as its terms say")
    return tuple(found)


def _terms(fields: tuple[Any, ...], bias: Likely) -> tuple[int, Terms]:
    lane, positions, top_k, flags, top, _, seed, temperature, top_p, min_p, repetition, presence, frequency = fields
    if flags & ~(_LOGPROBS | _SPANS):
        raise MessageError(f"terms: got flags {flags:#x}, wanted 0 to 3")
    if not 1 <= positions <= messages.MAX_IDS:
        raise MessageError(f"terms: got {positions} positions, wanted 1 to {messages.MAX_IDS}")
    if top > MAX_TOP:
        raise MessageError(f"terms: got a top of {top}, wanted 0 to {MAX_TOP}")
    try:
        sampling = Sampling(temperature, top_k, top_p, seed, min_p, repetition, presence, frequency, bias)
    except ValueError as error:
        raise MessageError(f"terms: {error}") from None
    return lane, Terms(positions, sampling, bool(flags & _LOGPROBS), bool(flags & _SPANS), top)


def encode_answers(results: Sequence[Result]) -> list[bytes]:
    """The array that answers a batch: a result for each of its segments, in order."""
    kinds, ids, logprobs, top, spans, logits, refusals = [], [], [], [], [], [], []  # type: ignore[var-annotated]
    for result in results:
        match result:
            case Tokens():
                kinds.append(_RESULT.pack(_TOKENS, len(result.ids)))
                ids += result.ids
                logprobs += result.logprobs
                top += result.top
            case Scores():
                kinds.append(_RESULT.pack(_SCORES, 0))
                logprobs += result.logprobs
                top += result.top
            case None:
                kinds.append(_RESULT.pack(_NOTHING, 0))
            case Logits():
                kinds.append(_RESULT.pack(_LOGITS, 0))
                logits.append(np.asarray(result.values, "<f4").tobytes())
            case Refusal():
                kinds.append(_RESULT.pack(_REFUSAL, 0))
                refusals.append([result.stage, result.reason[:32], result.text[:4096]])
        if isinstance(result, Answer):
            for span in result.spans:
                spans += span
    return [
        b"".join(kinds),
        struct.pack(f"<{len(ids)}I", *ids),
        struct.pack(f"<{len(logprobs)}d", *logprobs) if logprobs else b"",
        _packed(_TOP, tuple(top)) if top else b"",
        struct.pack(f"<{len(spans)}d", *spans) if spans else b"",
        b"".join(logits),
        codec.encode(refusals) if refusals else b"",
    ]


def decode_answers(plain: object, due: Sequence[Due], config: Config, behind: range) -> tuple[Result, ...]:
    """The results in an array, which answers segments that are due.

    Args:
        behind: the stages that may speak: the sender and those after it.

    Raises MessageError for all that is not exactly an answer to what was asked.
    """
    kinds, ids, logprobs, top, spans, logits, refusals = _parts(plain, 7)
    if len(kinds) != _RESULT.size * len(due):
        raise MessageError(f"answers: got {len(kinds)} bytes of results, wanted {_RESULT.size} for each of {len(due)}")
    reader = _Reader(ids, logprobs, top, spans, logits, refusals, behind)
    results = tuple(
        reader.result(kind, count, segment, ask, config)
        for (segment, ask), (kind, count) in zip(due, _RESULT.iter_unpack(kinds), strict=True)
    )
    reader.end()
    return results


class _Reader:
    """Reads the parts of answers from their fronts."""

    def __init__(
        self, ids: bytes, logprobs: bytes, top: bytes, spans: bytes, logits: bytes, refusals: bytes, behind: range
    ) -> None:
        self._stages = len(behind)
        self._ids = _unpacked(ids, "I", "ids")
        self._logprobs = _unpacked(logprobs, "d", "log-probabilities") if logprobs else ()
        self._top: Likely = _TOP.decode(top) if top else ()
        self._spans = _unpacked(spans, "d", "spans") if spans else ()
        self._logits = _floats(logits) if logits else ()
        self._refusals = _refusals(refusals, behind) if refusals else ()
        if self._spans and min(self._spans) < 0:
            raise MessageError("answers: got a span below 0")

    def result(self, kind: int, count: int, segment: Segment, ask: Ask, config: Config) -> Result:
        """The next result. Raises MessageError if it is none, not all there, or not what was asked for."""
        answer: Answer
        if kind == _TOKENS:
            ids, self._ids = _cut(self._ids, count, "ids")
            logprobs: tuple[float, ...] = ()
            if ask.logprobs:
                logprobs, self._logprobs = _cut(self._logprobs, count, "log-probabilities")
            position = segment.start + (1 if ask.wanted is Wanted.TOKENS else segment.rows)
            answer = Tokens(position, ids, logprobs, self._told(ask), self._likely(ask, count, config))
        elif kind == _SCORES and ask.wanted is Wanted.SCORES:
            logprobs, self._logprobs = _cut(self._logprobs, segment.rows, "log-probabilities")
            likely = self._likely(ask, segment.rows, config)
            answer = Scores(segment.start + 1, logprobs, self._told(ask), likely)
        elif kind == _LOGITS:
            values, self._logits = _cut(self._logits, config.vocab_size, "logits")
            answer = Logits(segment.start + segment.rows, values, self._told(ask))
        elif kind == _REFUSAL:
            refusals, self._refusals = _cut(self._refusals, 1, "refusals")
            refusal: Refusal = refusals[0]
            return refusal
        elif kind == _NOTHING and ask.wanted is Wanted.NOTHING:
            return None
        else:
            raise MessageError("answers: got what was not asked for")
        if not ask.fits(answer, segment.start, segment.rows):
            raise MessageError("answers: got what was not asked for")
        if (wrong := flaw(answer, config, self._stages if ask.spans else 0, ask.top)) is not None:
            raise MessageError(f"answers: got {wrong}")
        return answer

    def _told(self, ask: Ask) -> tuple[Span, ...]:
        if not ask.spans:
            return ()
        width = len(Span._fields)
        told, self._spans = _cut(self._spans, width * self._stages, "spans")
        return tuple(Span(*told[at : at + width]) for at in range(0, len(told), width))

    def _likely(self, ask: Ask, count: int, config: Config) -> Likely:
        if not ask.top:
            return ()
        likely: Likely
        likely, self._top = _cut(self._top, count * min(ask.top, config.vocab_size), "most likely ids")
        return likely

    def end(self) -> None:
        """Raises MessageError if something is left."""
        if any(map(len, (self._ids, self._logprobs, self._top, self._spans, self._logits, self._refusals))):
            raise MessageError("answers: got more than their results say")


def _cut(part: Any, count: int, name: str) -> tuple[Any, Any]:
    if len(part) < count:
        raise MessageError(f"answers: got {len(part)} {name}, wanted {count} more")
    return part[:count], part[count:]


def _floats(part: bytes) -> NDArray[np.float32]:
    if len(part) % 4:
        raise MessageError(f"answers: got {len(part)} bytes of logits, wanted a multiple of 4")
    found = np.frombuffer(part, "<f4")
    if not np.isfinite(found).all():
        raise MessageError("answers: got logits with NaN or infinity, wanted finite numbers")
    return found


def _parts(plain: object, count: int) -> list[bytes]:
    if type(plain) is not list or len(plain) != count or any(type(part) is not bytes for part in plain):
        raise MessageError(f"got {type(plain).__name__}, wanted an array of {count} byte strings")
    return plain


def _fits(part: bytes, each: struct.Struct, name: str) -> None:
    if len(part) % each.size or len(part) > MAX_SEGMENTS * each.size:
        raise MessageError(
            f"batch: got {len(part)} bytes of {name}, wanted a multiple of {each.size}, and {MAX_SEGMENTS} at most"
        )


def _unpacked(part: bytes, kind: str, name: str) -> tuple[Any, ...]:
    width = 4 if kind == "I" else 8
    if len(part) % width:
        raise MessageError(f"answers: got {len(part)} bytes of {name}, wanted a multiple of {width}")
    found = struct.unpack(f"<{len(part) // width}{kind}", part)
    if kind == "d" and not all(map(math.isfinite, found)):
        raise MessageError(f"answers: got {name} with NaN or infinity, wanted finite numbers")
    return found


def _refusals(packed: bytes, behind: range) -> list[Refusal]:
    """Those in a byte string, each of a stage that may speak."""
    try:
        plain = codec.decode(packed, frozenset())
    except DecodeError as error:
        raise MessageError(f"answers: refusals: {error}") from None
    if type(plain) is not list or not plain:
        raise MessageError("answers: refusals: wanted a list of [stage, reason, text]")
    found = []
    for item in plain:
        if type(item) is not list or list(map(type, item)) != [int, str, str] or item[0] not in behind:
            raise MessageError("answers: refusals: wanted [stage, reason, text], of the sender or a stage behind it")
        stage, reason, text = item
        found.append(Refusal(stage, messages.printable(reason[:32]), messages.printable(text[:4096])))
    return found
