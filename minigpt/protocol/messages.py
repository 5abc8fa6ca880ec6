"""The messages between a client and the stages.

    client → stage 0     Generate, Cancel, Reset, Status stage 0 → client     Tokens | Logits | Scores, Done, Report
    stage i → i + 1      batches, Reset, Status          stage i + 1 → i      answers, Done, Report
    instead of an answer Refusal: this request is refused; the channel lives
                         Failure: a stage failed; the channel ends

batches.py has the batches of rows and their answers.

On the link a message is a map: its `type`, and exactly the fields declared here, each checked by its rule; anything
else is a MessageError. Token ids and floats travel as packed arrays of fixed width, so the length of a message reveals
how many there are, and nothing about their values. docs/protocol.md describes every message.
"""

import enum
import sys
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.sampling import MAX_BIASES, MAX_TEMPERATURE, MAX_TOP, MAX_TOP_K, Sampling
from minigpt.errors import MessageError, RequestRefused
from minigpt.protocol import schema

SCHEMA = 3  # the number of what is declared here and in batches.py: any change of a field or of a byte needs a new one
MAX_IDS = 2**20  # token ids, rows or columns in one message; GPT-2 has 1024 positions and 50257 ids
MAX_STAGES = 256
# Rows of a prompt computed at once. The next stage starts after the first. But BLAS repacks every matrix for each
# chunk: in chunks of 128, 1000 tokens took a quarter longer. The smaller one is for while others wait for tokens.
CHUNK, SHARED_CHUNK = 256, 96
MAX_DRAFT = 64  # ids guessed for one step; the logits of 65 rows are 13 MB for GPT-2


class Wanted(enum.StrEnum):
    """What a step must answer."""

    NOTHING = "nothing"  # a chunk of the prompt before the last: no answer at all, so that stages overlap
    TOKEN = "token"  # the token drawn after the last row
    TOKENS = "tokens"  # the most likely token after each row, up to the first that only a plain step can decide
    LOGITS = "logits"  # the logits of the last row
    SCORES = "scores"  # for each row, how likely the token is that follows it in the text


class Reason(enum.StrEnum):
    """Why a request ended."""

    LENGTH = "length"  # max_tokens reached
    END = "end"  # a stop id, such as the end-of-text token
    STOP = "stop"  # a stop string: the client decides, because only it knows text
    CONTEXT = "context"  # the model's last position is used
    CANCELLED = "cancelled"
    LOGITS = "logits"  # the requested logits were sent
    SCORES = "scores"  # every token but the first was scored
    RESET = "reset"  # the sequence is forgotten


class Span(NamedTuple):
    """Where one stage's time went for one answer, in seconds, and what its link to the next stage carried."""

    compute: float
    seal: float
    open: float
    wait: float  # for the next stage's answer: its whole span, and the wire
    bytes: float  # of ciphertext, in both directions


Flag = Annotated[bool, schema.boolean()]
Index = Annotated[int, schema.integer(0, 0xFFFE)]  # of a stage; on the link, FFFF is the client
Count = Annotated[int, schema.integer(0, 2**63 - 1)]
Position = Annotated[int, schema.integer(0, MAX_IDS)]
Seconds = Annotated[float, schema.number(0.0, 1e12)]
CountIfTold = Annotated[int | None, schema.optional(schema.integer(0, 2**63 - 1))]
MeanIfTold = Annotated[float | None, schema.optional(schema.number(0.0, 1e12))]
Word = Annotated[str, schema.text(32)]
Sentence = Annotated[str, schema.text(4096)]
Ids = Annotated[tuple[int, ...], schema.numbers("I", MAX_IDS)]
Drawn = Annotated[tuple[int, ...], schema.numbers("I", 1 + MAX_DRAFT)]
Floats = Annotated[tuple[float, ...], schema.numbers("d", 1 + MAX_DRAFT)]
Spans = Annotated[tuple[Span, ...], schema.tuples(Span, MAX_STAGES)]
Likely = tuple[tuple[int, float], ...]  # token ids and their log-probabilities
GREEDY = Sampling()
_FINITE = sys.float_info.max
SamplingField = Annotated[
    Sampling,
    schema.nested(
        Sampling,
        {
            "temperature": schema.number(0.0, MAX_TEMPERATURE),
            "top_k": schema.integer(0, MAX_TOP_K),
            "top_p": schema.number(0.0, 1.0),
            "seed": schema.integer(0, 2**64 - 1),
            "min_p": schema.number(0.0, 1.0, absent=True),
            "repetition_penalty": schema.number(0.0, _FINITE),
            "presence_penalty": schema.number(-_FINITE, _FINITE, absent=True),
            "frequency_penalty": schema.number(-_FINITE, _FINITE, absent=True),
            "logit_bias": schema.pairs(MAX_BIASES),
        },
    ),
]
WantedField = Annotated[Wanted, schema.choice(Wanted)]


@dataclass(frozen=True, slots=True)
class Generate:
    """Feed `ids` from position `start` on, then generate; or score each of `ids` but the first.

    A `start` of 0 begins a sequence, one below its length rewinds it, and one beyond its length is refused.
    """

    start: Position
    ids: Ids
    max_tokens: Annotated[int, schema.integer(1, MAX_IDS)]
    stop_ids: Annotated[tuple[int, ...], schema.numbers("I", 1024)] = ()
    sampling: SamplingField = GREEDY
    logprobs: Flag = False
    wanted: WantedField = Wanted.TOKEN
    # How many ids to guess ahead at most, for greedy decoding; None leaves it to the first stage.
    draft: Annotated[int | None, schema.optional(schema.integer(0, MAX_DRAFT))] = 0
    spans: Annotated[bool, schema.boolean(absent=True)] = False
    # How many of the last `ids` were generated for this request before, over a link that was lost.
    delivered: Annotated[int, schema.integer(0, MAX_IDS, absent=True)] = 0
    # Of how many of the most likely ids to tell the log-probabilities, for each token.
    top: Annotated[int, schema.integer(0, MAX_TOP, absent=True)] = 0

    def __post_init__(self) -> None:
        if self.delivered and not 0 < self.delivered < len(self.ids):
            raise ValueError(f"{self.delivered} of {len(self.ids)} ids delivered: wanted fewer, as a prompt has one")
        if self.wanted not in (Wanted.TOKEN, Wanted.LOGITS, Wanted.SCORES):
            raise ValueError(f"{self.wanted} wanted: a generation returns tokens one at a time, logits, or scores")

    @property
    def most(self) -> int:
        """How many tokens one answer may have."""
        if self.sampling.temperature > 0 or self.sampling.adjusts:
            return 1
        return 1 + (MAX_DRAFT if self.draft is None else self.draft)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens drawn for `position` and the positions after it: one, or several from a drafted step.

    `logprobs` is empty unless asked for, and as long as `ids` then; so is `spans`, which begins with the sender's.
    `top` has as many pairs as were asked for, or as the vocabulary has ids if that is less, for one id after the other.
    """

    position: Position
    ids: Drawn
    logprobs: Floats = ()
    spans: Spans = ()
    top: Annotated[Likely, schema.pairs((1 + MAX_DRAFT) * MAX_TOP)] = ()

    def __post_init__(self) -> None:
        if len(self.logprobs) not in (0, len(self.ids)):
            raise ValueError(f"{len(self.logprobs)} log-probabilities for {len(self.ids)} tokens")


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits (V,) after the last row of a step, which decide `position`."""

    position: Position
    values: Annotated[NDArray[np.float32], schema.vector(MAX_IDS)]
    spans: Spans = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """The log-probabilities of the ids given for `position` and the positions after it, and `top` as in Tokens."""

    position: Position
    logprobs: Annotated[tuple[float, ...], schema.numbers("d", MAX_IDS)]
    spans: Spans = ()
    top: Annotated[Likely, schema.pairs(MAX_IDS)] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The request has ended, and why."""

    reason: Annotated[Reason, schema.choice(Reason)]


@dataclass(frozen=True, slots=True)
class Refusal:
    """`stage` refuses the request. `reason` is one word for programs, `text` a sentence for people."""

    stage: Index
    reason: Word
    text: Sentence


@dataclass(frozen=True, slots=True)
class Failure:
    """`stage` failed, and this ends the channel. `reason` is "attestation", "unreachable" or "failed"."""

    stage: Index
    reason: Word
    text: Sentence


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the generation that is running; its Done answers this."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget the channel's sequence; answered with Done."""


@dataclass(frozen=True, slots=True)
class Status:
    """Report the state of the receiver and of the stages after it; answered with Report."""


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage's state, and its evidence as verified by the stage before it.

    A stage that cannot be reached is reported by the one before it, with an `error`. What all clients together cause
    is told to operators, and is None for others.
    """

    stage: Index
    error: Sentence = ""
    reason: Word = ""  # with an error: "attestation" if its evidence was refused, else "failed"
    uptime: Seconds = 0.0
    weights_bytes: Count = 0
    channels: CountIfTold = None
    sequences: CountIfTold = None
    cache_bytes: CountIfTold = None
    steps: CountIfTold = None  # computed since the process started
    tokens: CountIfTold = None  # drawn since then, in the last stage, for passes through this one
    rate: MeanIfTold = None  # tokens a second, over the last 10 s
    batch: MeanIfTold = None  # sequences in a pass, over the last 10 s
    queue: CountIfTold = None  # requests that wait for a place
    resumed: CountIfTold = None  # since the start, after a link was lost; only the first stage counts them
    cache_limit: CountIfTold = None  # bytes that all caches together may have; 0 for no such limit
    evidence: Annotated[str, schema.text(2**20)] = ""  # the text of an evidence file
    exposed: Annotated[str, schema.text(4096, absent=True)] = ""  # what could not be locked down, for people


@dataclass(frozen=True, slots=True)
class Report:
    """The state of the answering stage, and of those after it."""

    stages: Annotated[tuple[StageReport, ...], schema.listed(StageReport, MAX_STAGES)]


Answer = Tokens | Logits | Scores
Message = Generate | Tokens | Logits | Scores | Done | Refusal | Failure | Cancel | Reset | Status | Report

_KINDS = {
    "generate": Generate, "token": Tokens, "logits": Logits, "scores": Scores, "done": Done, "refusal": Refusal,
    "failure": Failure, "cancel": Cancel, "reset": Reset, "status": Status, "report": Report,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _KINDS.items()}
_RULES = {kind: schema.schema(kind) for kind in _NAMES}
# All names of fields, as `codec.decode` looks them up.
KEYS = frozenset(
    name.encode()
    for rules in _RULES.values()
    for field, rule in (*rules.items(), ("type", schema.boolean()))
    for name in (field, *rule.names)
)
ANSWERS = frozenset({Tokens, Logits, Scores, Done, Refusal, Failure, Report})  # what whoever asks may be told


def name(message: Message) -> str:
    """What a message is called on the link, for errors."""
    return _NAMES[type(message)].capitalize()


def encode(message: Message) -> dict[str, object]:
    """The plain map that the link carries."""
    kind = type(message)
    return {"type": _NAMES[kind], **schema.write(message, _RULES[kind])}


def decode(
    value: object, kinds: Container[type] = frozenset(_RULES), end: str = "this end", positions: int = MAX_IDS
) -> Message:
    """The message in a plain value.

    Args:
        kinds: of messages that may come to this `end`, which an error names.
        positions: of the model.

    Raises:
        MessageError: it is no message, or none of those kinds: that is seen before its fields are read.
        RequestRefused: a Generate has more ids than the model has positions. They were not unpacked.
    """
    if type(value) is not dict or type(tag := value.get("type")) is not str:
        raise MessageError(f"got {type(value).__name__}, wanted a map with a type")
    kind = _KINDS.get(tag)
    if kind is None:
        raise MessageError(f"got a message of an unknown type, wanted one of {', '.join(_KINDS)}")
    if kind not in kinds:
        raise MessageError(f"{_NAMES[kind].capitalize()} is not for {end}")
    plain = dict(value)
    del plain["type"]
    excess = kind is Generate and _excess(plain, positions)
    message: Message = schema.read(plain, kind, _RULES[kind])
    if excess and isinstance(message, Generate):
        text = f"{message.start + excess} positions, and the model has {positions}: shorten the prompt"
        raise RequestRefused(text, reason="too-long", stage=0)
    return message


def _excess(plain: dict[str, object], positions: int) -> int:
    """How many ids a Generate has, if that is more than the model has positions; they are taken out then."""
    packed = plain.get("ids")
    if type(packed) is not bytes or len(packed) % 4 or not 4 * positions < len(packed) <= 4 * MAX_IDS:
        return 0
    plain["ids"] = b""
    count = len(packed) // 4
    if type(delivered := plain.get("delivered")) is int and 0 <= delivered < count:
        del plain["delivered"]  # right of those ids, and not of none
    return count


def shown(message: Message) -> Message:
    """A message as people may see it: a peer's words have escapes for all that a terminal or a log would obey."""
    match message:
        case Refusal() | Failure():
            return replace(message, reason=printable(message.reason), text=printable(message.text))
        case Report():
            return Report(tuple(map(_shown_report, message.stages)))
    return message


def for_any_client(one: StageReport) -> StageReport:
    """What a client is told that is no operator: whether the stage is there and with what evidence, and to the minute
    since when. Nothing of it depends on other clients."""
    uptime = one.uptime - one.uptime % 60.0
    return StageReport(
        one.stage, one.error, one.reason, uptime, one.weights_bytes, evidence=one.evidence, exposed=one.exposed
    )


def _shown_report(one: StageReport) -> StageReport:
    error, reason, exposed = map(printable, (one.error, one.reason, one.exposed))
    return replace(one, error=error, reason=reason, exposed=exposed)


def printable(text: str) -> str:
    """Without new lines, colours or other directions of writing.

    >>> printable("gone\\n\\x1b[2J")
    'gone\\\\n\\\\x1b[2J'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def refused(refusal: Refusal) -> RequestRefused:
    """The error for a Refusal."""
    return RequestRefused(refusal.text, reason=refusal.reason, stage=refusal.stage)


def refusal(error: RequestRefused) -> Refusal:
    """The Refusal for an error."""
    return Refusal(error.stage, error.reason, str(error))
