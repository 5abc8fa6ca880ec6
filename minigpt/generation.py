"""The one loop that turns a prompt into tokens, and a stage's part in each of its steps.

    Sequence    one sequence in one stage: its cache, its layers, and whatever comes after them
    generate    feeds the prompt in chunks, then the tokens back (`Decoding`), until something ends it

The loop runs in the first stage of a pipeline, or in process; a Sequence runs in every stage. What comes after a
Sequence is anything with the same `step`: another Sequence in this process, or a link to the next stage.

Letters: T new positions, C n_embd, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minigpt.drafting import Decoding, first, settled
from minigpt.errors import RequestRefused
from minigpt.messages import Generate, Logits, Reason, Span, Token, Wanted
from minigpt.model import GPT2, KVCache
from minigpt.sampling import Sampling, logprob, sample

# Rows of a prompt computed at once: what the token of another channel waits for at most, and the stages after this one
# begin with. Each chunk costs a repacking of all matrices: chunks of 128 took a quarter longer for 1000 tokens.
CHUNK = 256

_ALONE = nullcontext()

Answer = Token | Logits
Traffic = tuple[float, float, float]  # of a link so far: seconds sealing, seconds opening, bytes carried


@dataclass(frozen=True, slots=True)
class Ask:
    """What a step shall answer, and how a token is drawn."""

    wanted: Wanted
    sampling: Sampling
    logprobs: bool = False

    def fits(self, answer: Answer, start: int, rows: int) -> bool:
        """Whether this may be the answer to a step of so many rows."""
        if isinstance(answer, Logits):
            return self.wanted is Wanted.LOGITS and answer.position == start + rows
        told = len(answer.ids)
        if self.wanted is Wanted.TOKENS:
            counted = answer.position == start + 1 and told <= rows
        else:
            counted = self.wanted is Wanted.TOKEN and answer.position == start + rows and told == 1
        return counted and len(answer.logprobs) == (told if self.logprobs else 0)


class Steps(Protocol):
    """A sequence, or the way to the rest of it in another process."""

    def step(self, start: int, rows: NDArray[Any], ask: Ask) -> Answer | None:
        """Computes the positions from `start` on; None if nothing was wanted."""

    @property
    def traffic(self) -> Traffic: ...


class Sequence:
    """One sequence in one stage.

    Args:
        model: the stage's layers.
        following: what comes after them; None in the last stage.
        stage: the stage's index, for what it says.
        turns: held for each computation, so that channels take turns.
    """

    def __init__(
        self,
        model: GPT2,
        following: Steps | None = None,
        *,
        stage: int = 0,
        turns: AbstractContextManager[Any] = _ALONE,
    ) -> None:
        if (following is None) != model.is_last:
            raise ValueError("a stage that is not the last has another after it, and the last has none")
        self.model = model
        self.cache: KVCache = model.new_cache()
        self.following = following
        self.stage = stage
        self.turns = turns

    def step(self, start: int, rows: NDArray[Any], ask: Ask) -> Answer | None:
        """Computes new positions and says what was wanted of them.

        Args:
            start: position of the first row; at most the cache's length. A smaller one rewinds.
            rows: (T,) token ids in the first stage, (T, C) hidden states in the others.
            ask: what to answer.

        Raises:
            RequestRefused: as `check`; nothing has changed then.
        """
        self.check(start, rows)
        with self.turns:
            began = time.perf_counter()
            self.cache.truncate(start)
            hidden = self.model.embed(rows, start) if self.model.is_first else rows
            hidden = self.model.forward(hidden, [(self.cache, len(rows))])
            answer = self._draw(hidden, start, ask) if self.following is None else None
            computed = time.perf_counter()
        following = self.following
        if following is None:
            return answer and with_span(answer, Span(computed - began, 0.0, 0.0, 0.0, 0.0))
        before = following.traffic
        answer = following.step(start, hidden, ask)
        if answer is None:
            return None
        return with_span(answer, span(computed - began, time.perf_counter() - computed, before, following.traffic))

    def check(self, start: int, rows: NDArray[Any]) -> None:
        """Raises RequestRefused for no rows, a gap, too many positions, or an id outside the vocabulary."""
        config = self.model.config
        if len(rows) == 0:
            raise self._refused("bad-request", "no token ids: a sequence needs at least one to go on from")
        if start > self.cache.length:
            raise self._refused(
                "gap", f"start is {start}, but {self.cache.length} positions are known: send those between first"
            )
        if start + len(rows) > config.n_positions:
            raise self._refused(
                "too-long", f"{start + len(rows)} positions, and the model has {config.n_positions}: shorten the prompt"
            )
        if not self.model.is_first and rows.shape[1] != config.n_embd:
            raise self._refused("bad-request", f"{rows.shape[1]} columns, wanted {config.n_embd}")
        if self.model.is_first and ((rows < 0) | (rows >= config.vocab_size)).any():
            raise self._refused("bad-token", f"a token id is outside the vocabulary, 0 to {config.vocab_size - 1}")

    def _refused(self, reason: str, text: str) -> RequestRefused:
        return RequestRefused(text, reason=reason, stage=self.stage)

    def _draw(self, hidden: NDArray[np.float32], start: int, ask: Ask) -> Answer | None:
        if ask.wanted is Wanted.NOTHING:
            return None
        each = ask.wanted is Wanted.TOKENS
        position = start + (1 if each else len(hidden))
        logits = self.model.logits(hidden if each else hidden[-1:])
        if not np.isfinite(logits).all():
            raise FloatingPointError("the logits are not finite: the weights are damaged")
        if ask.wanted is Wanted.LOGITS:
            return Logits(position, logits[0])
        ids: list[int] = []
        for row in logits:
            token = sample(row, ask.sampling, position + len(ids))
            if each and not settled(row, token):
                break
            ids.append(token)
        return Token(position, tuple(ids), tuple(map(logprob, logits, ids)) if ask.logprobs else ())


def with_span(answer: Answer, own: Span) -> Answer:
    """The answer with one more stage's span in front."""
    return replace(answer, spans=(own, *answer.spans))


def span(compute: float, elapsed: float, before: Traffic, after: Traffic) -> Span:
    """A stage's span: it computed for `compute` seconds, and was then for `elapsed` seconds at its link to the next."""
    seal, unseal, carried = (now - then for now, then in zip(after, before, strict=True))
    return Span(compute, seal, unseal, max(0.0, elapsed - seal - unseal), carried)


def generate(
    sequence: Sequence, request: Generate, check: Callable[[], None] = lambda: None
) -> Generator[Answer, None, Reason]:
    """Yields answers of one token, or of several that were drafted, and returns why it ended.

    Args:
        sequence: of the first stage.
        request: what to feed and how to go on.
        check: called before each step; what it raises ends the generation there.

    Raises:
        RequestRefused: before anything is computed.
    """
    ask = Ask(request.wanted, request.sampling, request.logprobs)
    start, rows = request.start, np.asarray(request.ids, np.int64)
    n_positions = sequence.model.config.n_positions
    sequence.check(start, rows)
    sequence.cache.reserve(start + len(rows))  # at once: chunk by chunk it would be copied each time
    while len(rows) > CHUNK:
        check()
        sequence.step(start, rows[:CHUNK], replace(ask, wanted=Wanted.NOTHING))
        start, rows = start + CHUNK, rows[CHUNK:]
    check()
    answer = sequence.step(start, rows, ask)
    if answer is None:
        raise AssertionError("a step that wants an answer has one")
    yield answer
    if isinstance(answer, Logits):
        return Reason.LOGITS
    produced = 1
    reason = ending(request, n_positions, produced, answer.ids[0])
    decoding = Decoding(sequence, request, ask, answer.ids[0], check)
    while reason is None:
        last = request.start + len(request.ids) + produced - 1  # position of the last token
        answer = decoding.step(min(request.max_tokens - produced, n_positions - last))
        for told, token in enumerate(answer.ids, 1):
            reason = ending(request, n_positions, produced + told, token)
            if reason is not None:
                answer = first(answer, told)  # there is nothing after the end, whatever was drafted
                break
        produced += len(answer.ids)
        yield answer
    return reason


def ending(request: Generate, n_positions: int, produced: int, token: int) -> Reason | None:
    """Why a generation ends after its token number `produced`, or None if it goes on.

    A token drawn for the position after the model's last can be told, but not fed back.
    """
    if token in request.stop_ids:
        return Reason.END
    if produced >= request.max_tokens:
        return Reason.LENGTH
    if request.start + len(request.ids) + produced - 1 >= n_positions:
        return Reason.CONTEXT
    return None
