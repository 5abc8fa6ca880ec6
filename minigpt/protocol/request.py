"""A request: the options of a generation, what each step asks of the stages, when it ends, and where its time goes."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

from minigpt.engine.config import Config
from minigpt.engine.sampling import MAX_TOP, Sampling
from minigpt.errors import MessageError, UsageError
from minigpt.protocol import messages
from minigpt.protocol.messages import (
    MAX_DRAFT,
    Answer,
    Done,
    Generate,
    Likely,
    Logits,
    Message,
    Reason,
    Refusal,
    Scores,
    Span,
    Tokens,
    Wanted,
)

_WORDS: dict[type, str] = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a string", bytes: "bytes",
    Mapping: "a dict", Path: "a pathlib.Path", list: "a list", tuple: "a tuple", type(None): "None",
}  # fmt: skip
_TYPES: tuple[tuple[str, *tuple[type, ...]], ...] = (  # of the options below
    ("max_tokens", int),
    ("temperature", float),
    ("top_k", int),
    ("top_p", float),
    ("seed", int, type(None)),
    ("logprobs", bool),
    ("draft", int, type(None)),
    ("spans", bool),
    ("min_p", float),
    ("repetition_penalty", float),
    ("presence_penalty", float),
    ("frequency_penalty", float),
    ("logit_bias", Mapping, type(None)),
)

Traffic = tuple[float, float, float]  # of a link so far: seconds sealing, seconds opening, bytes carried


def check_type(name: str, value: object, *kinds: type) -> None:
    """Raises UsageError unless an argument is of one of these types. An int will do for a float, a bool for neither."""
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if not fits:
        got = value if value is None or isinstance(value, bool | int | float) else type(value).__name__  # no secrets
        hint = " of Python's own: give its .item()" if type(value).__module__ == "numpy" else ""
        raise UsageError(f"{name} is {got!s:.80}, wanted {' or '.join(_WORDS[kind] for kind in kinds)}{hint}")


class Keywords(TypedDict, total=False):
    """The keywords of `generate`, for functions that pass them on; `Options` says what they mean."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: Sequence[str]
    logprobs: bool
    draft: int | None
    spans: bool
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    top_logprobs: int


@dataclass(frozen=True, slots=True)
class Options:
    """How to continue a prompt.

    Args:
        max_tokens: how many tokens at most.
        temperature: 0 takes the most likely token each time; 1 draws from the model's distribution.
        top_k: draw among the k most likely tokens only; 0 for all.
        top_p: draw among the most likely tokens that together have this probability; 1 for all.
        seed: of the draws; the same seed gives the same tokens, whatever the number of stages. None draws a new one.
        stop: strings to end before. The client finds them: stages never see text.
        logprobs: return each token's log-probability.
        draft: how many ids to guess ahead at most where the text repeats itself; 0 for none, None for the first
            stage's own choice (`drafting.DRAFT`). Greedy decoding only. The tokens are the same, and come sooner where
            guesses are right, several at once; their log-probabilities may differ in the last bits.
        spans: return where each token's time went, stage by stage.
        min_p: draw only among tokens at least so probable relative to the most likely one, 0 to 1; 0 for all.
        repetition_penalty: of every token in the prompt or generated, a positive logit is divided by it and a negative
            one multiplied; 1 for none, 1.1 to 1.3 is usual.
        presence_penalty: subtracted from the logit of every generated token; 0 for none.
        frequency_penalty: the same, times how often it was generated; 0 for none.
        logit_bias: for each of these ids, what is added to its logit: -100 never takes it, 100 always.
        top_logprobs: return the log-probabilities of so many of the most likely tokens, 0 to 20.

    Bias and penalties come before temperature, top_k, top_p and min_p, in that order, and nothing is drafted with them.
    The log-probabilities returned are the model's own, before all of these.
    """

    max_tokens: int = 20
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: bool = False
    draft: int | None = None
    spans: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    top_logprobs: int = 0

    def check(self) -> Sampling:
        """How tokens are drawn, but for `logit_bias`, which depends on the model. Raises UsageError for an option of a
        wrong type or range."""
        if isinstance(self.stop, str):
            raise UsageError("stop is a string, wanted a list of strings: write [stop]")
        check_type("stop", self.stop, list, tuple)
        for text in self.stop:
            check_type("a stop string", text, str)
            if not text:
                raise UsageError("a stop string is empty, and would end every text at once")
        for name, *kinds in _TYPES:
            check_type(name, getattr(self, name), *kinds)
        check_top("top_logprobs", self.top_logprobs)
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}, wanted at least 1")
        if self.draft is not None and not 0 <= self.draft <= MAX_DRAFT:
            raise UsageError(f"draft is {self.draft}, wanted 0 (none) to {MAX_DRAFT}")
        seed = self.seed
        if seed is None:
            seed = secrets.randbits(32) if self.temperature > 0 else 0
        try:
            return Sampling(
                float(self.temperature), self.top_k, float(self.top_p), seed, float(self.min_p),
                float(self.repetition_penalty), float(self.presence_penalty), float(self.frequency_penalty),
            )  # fmt: skip
        except (ValueError, OverflowError) as error:  # the latter for an integer beyond all floats
            raise UsageError(str(error)) from None

    def request(self, ids: tuple[int, ...], config: Config) -> Generate:
        """The message for a prompt of these ids. Raises UsageError as `check`, and for an id of `logit_bias`."""
        try:
            sampling = replace(self.check(), logit_bias=_bias(self.logit_bias or {}, config))
        except (ValueError, OverflowError) as error:
            raise UsageError(str(error)) from None
        return Generate(
            start=0,
            ids=ids,
            max_tokens=min(self.max_tokens, config.n_positions + 1),
            stop_ids=config.eos_token_id,
            sampling=sampling,
            logprobs=self.logprobs,
            draft=self.draft,
            spans=self.spans,
            top=self.top_logprobs,
        )


def _bias(logit_bias: Mapping[int, float], config: Config) -> Likely:
    """By rising id. Raises UsageError."""
    for token, amount in logit_bias.items():
        check_type("an id of logit_bias", token, int)
        check_type("a number of logit_bias", amount, float)
        if not 0 <= token < config.vocab_size:
            raise UsageError(f"logit_bias has the id {token}, wanted one of the model's, 0 to {config.vocab_size - 1}")
    return tuple((token, float(amount)) for token, amount in sorted(logit_bias.items()))


def check_top(name: str, value: int) -> None:
    """Raises UsageError unless so many most likely tokens can be told."""
    check_type(name, value, int)
    if not 0 <= value <= MAX_TOP:
        raise UsageError(f"{name} is {value}, wanted 0 (none) to {MAX_TOP}; 5 is usual")


def seed_of(seed: int, index: int) -> int:
    """The seed of answer `index` to one prompt: the request's own, then others that follow from it."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "big") + index.to_bytes(8, "big")).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Ask:
    """What a step must answer, and how a token is drawn."""

    wanted: Wanted
    sampling: Sampling
    logprobs: bool = False
    spans: bool = False
    top: int = 0

    def fits(self, answer: Answer, start: int, rows: int) -> bool:
        """Whether this may be the answer to a step of `rows` rows from position `start` on."""
        if isinstance(answer, Logits):
            return self.wanted is Wanted.LOGITS and answer.position == start + rows
        if isinstance(answer, Scores):
            placed = self.wanted is Wanted.SCORES and answer.position == start + 1
            return placed and len(answer.logprobs) == rows
        count = len(answer.ids)
        if self.wanted is Wanted.TOKENS:
            placed = answer.position == start + 1 and count <= rows
        else:
            placed = self.wanted is Wanted.TOKEN and answer.position == start + rows and count == 1
        return placed and len(answer.logprobs) == (count if self.logprobs else 0)


class Replies:
    """What may still answer a Generate: tokens in order, up to its end, and then the Done that says why.

    The end is the request's own (`ending`), not the stage's word: a stage can stop earlier only if it is cancelled.

    Args:
        stages: how many the pipeline has.
    """

    def __init__(self, request: Generate, config: Config, stages: int) -> None:
        self.cancelled = False  # whether a Cancel was sent
        self.over = False  # whether the end has come, and the link is free for another request
        self._request = request
        self._config = config
        self._spans = stages if request.spans else 0
        # Of the next token, or of the next one that is scored.
        self._position = request.start + (1 if request.wanted is Wanted.SCORES else len(request.ids))
        self._produced = 0
        self._reason: Reason | None = None  # why only a Done can follow

    def take(self, message: Message) -> None:
        """The next message of stage 0. Raises MessageError if it may not come now, RequestRefused if it refuses."""
        if isinstance(message, Done):
            reason = self._reason or (Reason.CANCELLED if self.cancelled else None)
            if message.reason is not reason:
                raise self._illegal(f'an end by "{message.reason}"', f'one by "{reason}"' if reason else "more tokens")
            self.over = True
            return
        if isinstance(message, Refusal) and self._reason is None:
            self.over = True
            raise messages.refused(message)
        kind: type[Answer] = {Wanted.LOGITS: Logits, Wanted.SCORES: Scores}.get(self._request.wanted, Tokens)
        if self._reason is not None or not isinstance(message, kind):
            raise MessageError(f"stage 0 sent {messages.name(message)} out of turn", stage=0)
        if message.position != self._position:
            raise self._illegal(f"position {message.position}", str(self._position))
        match message:
            case Tokens():
                self._take_tokens(message)
            case Scores():
                self._take_scores(message)
            case Logits():
                self._reason = Reason.LOGITS
        if (wrong := flaw(message, self._config, self._spans, self._request.top)) is not None:
            raise MessageError(f"stage 0 sent {wrong}", stage=0)

    def _take_tokens(self, answer: Tokens) -> None:
        request, count = self._request, len(answer.ids)
        if not 1 <= count <= request.most:
            raise self._illegal(f"{count} tokens at once", f"1 to {request.most}")
        if len(answer.logprobs) != (count if request.logprobs else 0):
            raise self._illegal(f"{len(answer.logprobs)} log-probabilities", "one for each token, if asked for")
        for token in answer.ids:
            if self._reason is not None:
                raise MessageError(f"stage 0 sent tokens after the last one ({self._reason})", stage=0)
            self._produced += 1
            self._reason = ending(request, self._config.n_positions, self._produced, token)
        self._position += count

    def _take_scores(self, answer: Scores) -> None:
        left = self._request.start + len(self._request.ids) - self._position
        if not 1 <= len(answer.logprobs) <= left:
            raise self._illegal(f"{len(answer.logprobs)} scores", f"1 to {left}, of the ids that have none")
        self._position += len(answer.logprobs)
        if len(answer.logprobs) == left:
            self._reason = Reason.SCORES

    @staticmethod
    def _illegal(sent: str, wanted: str) -> MessageError:
        return MessageError(f"stage 0 sent {sent}, wanted {wanted}", stage=0)


def flaw(answer: Answer, config: Config, spans: int, top: int = 0) -> str | None:
    """What is wrong with the values in an answer that must have so many spans, and of each token so many of the most
    likely ones; None if nothing is."""
    if len(answer.spans) != spans:
        return f"{len(answer.spans)} spans, wanted {spans}"
    if isinstance(answer, Logits):
        if len(answer.values) != config.vocab_size:
            return f"{len(answer.values)} logits, wanted one for each of {config.vocab_size} ids"
        return None
    count = len(answer.logprobs)
    if isinstance(answer, Tokens):
        count = len(answer.ids)
        if max(answer.ids, default=0) >= config.vocab_size:
            return f"a token id outside the vocabulary, 0 to {config.vocab_size - 1}"
    if max(answer.logprobs, default=0.0) > 0:
        return "a log-probability above 0"
    return _flaw_of_top(answer.top, config, count, min(top, config.vocab_size)) if top or answer.top else None


def _flaw_of_top(top: Likely, config: Config, count: int, each: int) -> str | None:
    if len(top) != count * each:
        return f"{len(top)} of the most likely ids, wanted {each} for each of {count} tokens"
    for start in range(0, len(top), each):
        ids, logprobs = zip(*top[start : start + each], strict=True)
        if len(set(ids)) < each or max(ids) >= config.vocab_size:
            return f"most likely ids with one twice, or outside the vocabulary, 0 to {config.vocab_size - 1}"
        if logprobs[0] > 0 or any(later > earlier for earlier, later in pairwise(logprobs)):
            return "most likely ids whose log-probabilities are above 0, or do not fall"
    return None


def ending(request: Generate, n_positions: int, produced: int, token: int) -> Reason | None:
    """Why a generation ends after its token number `produced`, or None if it goes on.

    A token drawn for the position after the model's last can be returned, but not fed back.
    """
    if token in request.stop_ids:
        return Reason.END
    if produced >= request.max_tokens:
        return Reason.LENGTH
    if request.start + len(request.ids) + produced - 1 >= n_positions:
        return Reason.CONTEXT
    return None


def with_span(answer: Answer, own: Span) -> Answer:
    """The answer with one more stage's span in front."""
    return replace(answer, spans=(own, *answer.spans))


def span(compute: float, elapsed: float, before: Traffic, after: Traffic) -> Span:
    """The span of a stage that computed for `compute` seconds and then used its link for `elapsed` seconds."""
    seal, unseal, carried = (now - then for now, then in zip(after, before, strict=True))
    return Span(compute, seal, unseal, max(0.0, elapsed - seal - unseal), carried)
