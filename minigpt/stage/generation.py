"""The one loop that turns a prompt into tokens, and a stage's part in each of its steps.

    StageSequence   one sequence in one stage: its cache, and whatever comes after this stage's layers
    generate        feeds the prompt in chunks, then the tokens back (`Decoding`), until something ends it

The loop runs in the first stage of a pipeline, or in process; a StageSequence runs in every stage. What comes after it
is anything with the same `step`: another one in this process, or a link to the next stage.

Letters: T new positions, C n_embd, V vocabulary.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minigpt.engine import drafting
from minigpt.engine.drafting import Lookup, settled
from minigpt.engine.sampling import logprob, sample
from minigpt.errors import RequestRefused
from minigpt.protocol.messages import CHUNK, Answer, Generate, Logits, Reason, Span, Tokens, Wanted
from minigpt.protocol.request import Ask, Traffic, ending, span, with_span
from minigpt.stage.schedule import Schedule

# If more positions than this were computed in a batch, they are recomputed one by one as soon as nothing is guessed. A
# wrong guess leaves one or two; without this, a near tie much later would go back to all of them.
FEW = 2


class Following(Protocol):
    """What comes after a stage's layers: the rest of the model, here or in another process."""

    def step(self, start: int, rows: NDArray[Any], ask: Ask) -> Answer | None:
        """Computes the positions from `start` on; None if nothing was wanted."""

    @property
    def traffic(self) -> Traffic: ...


class StageSequence:
    """One sequence in one stage: `following` is what comes after the stage's layers, None in the last stage."""

    def __init__(self, schedule: Schedule, following: Following | None = None, *, stage: int = 0) -> None:
        if (following is None) != schedule.model.is_last:
            raise ValueError("a stage that is not the last has another after it, and the last has none")
        self.model = schedule.model
        self.cache = schedule.model.new_cache()
        self.following = following
        self.stage = stage
        self._schedule = schedule

    def step(self, start: int, rows: NDArray[Any], ask: Ask) -> Answer | None:
        """Computes new positions and answers what was wanted of them.

        Args:
            start: position of the first row; at most the cache's length. A smaller one rewinds.
            rows: (T,) token ids in the first stage, (T, C) hidden states in the others.
            ask: what to answer.

        Raises:
            RequestRefused: as `check`; nothing has changed then.
        """
        self.check(start, rows)
        answer = self._computed(start, rows, ask)
        self._schedule.meter.note(1, len(answer.ids) if isinstance(answer, Tokens) else 0)
        return answer

    def _computed(self, start: int, rows: NDArray[Any], ask: Ask) -> Answer | None:
        compute, following = self._schedule.compute, self.following
        if following is None:
            answer, computed = compute(self.cache, start, rows, lambda hidden: self._draw(hidden, start, ask))
            if answer is None or not ask.spans:
                return answer
            return with_span(answer, Span(computed, 0.0, 0.0, 0.0, 0.0))
        hidden, computed = compute(self.cache, start, rows, lambda hidden: hidden)
        if not ask.spans:
            return following.step(start, hidden, ask)
        began, before = time.perf_counter(), following.traffic
        answer = following.step(start, hidden, ask)
        if answer is None:
            return None
        return with_span(answer, span(computed, time.perf_counter() - began, before, following.traffic))

    def check(self, start: int, rows: NDArray[Any]) -> None:
        """Raises RequestRefused for no rows, a gap, too many positions, or an id outside the vocabulary."""
        config, known = self.model.config, self.cache.length
        end, most = start + len(rows), config.n_positions
        if len(rows) == 0:
            raise self._refused("bad-request", "no token ids: a sequence needs at least one to go on from")
        if start > known:
            raise self._refused("gap", f"start is {start}, but {known} positions are known: send those between first")
        if end > most:
            raise self._refused("too-long", f"{end} positions, and the model has {most}: shorten the prompt")
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
        return Tokens(position, tuple(ids), tuple(map(logprob, logits, ids)) if ask.logprobs else ())


def generate(
    sequence: StageSequence, request: Generate, check: Callable[[], None] = lambda: None
) -> Generator[Answer, None, Reason]:
    """Yields answers of one token, or of several that were drafted, and returns why it ended.

    Args:
        sequence: of the first stage.
        check: called before each step; what it raises ends the generation there.

    Raises:
        RequestRefused: before anything is computed.
    """
    ask = Ask(request.wanted, request.sampling, request.logprobs, request.spans)
    start, rows = request.start, np.asarray(request.ids, np.int64)
    fed, n_positions = start + len(rows), sequence.model.config.n_positions
    sequence.check(start, rows)
    sequence.cache.reserve(fed)  # at once: chunk by chunk it would be copied each time
    while len(rows) > CHUNK:
        check()
        sequence.step(start, rows[:CHUNK], replace(ask, wanted=Wanted.NOTHING))
        start, rows = start + CHUNK, rows[CHUNK:]
    check()
    answer = sequence.step(start, rows, ask)
    assert answer is not None, "a step that wants an answer has one"
    yield answer
    if isinstance(answer, Logits):
        return Reason.LOGITS
    produced, reason = 1, ending(request, n_positions, 1, answer.ids[0])
    decoding = Decoding(sequence, request, ask, answer.ids[0], check)
    while reason is None:
        last = fed + produced - 1  # position of the last token
        answer = decoding.step(min(request.max_tokens - produced, n_positions - last))
        for told, token in enumerate(answer.ids, 1):
            reason = ending(request, n_positions, produced + told, token)
            if reason is not None:
                answer = first(answer, told)  # there is nothing after the end, whatever was drafted
                break
        produced += len(answer.ids)
        yield answer
    # What was drafted past the end is not known to the client, so a later request must not go on from it.
    sequence.cache.truncate(min(sequence.cache.length, fed + produced - 1))
    return reason


class Decoding:
    """The steps after the prompt: each feeds the last token back, alone or with guesses of what follows it.

    `sequence`, of the first stage, has been fed `request.ids` in the steps of plain decoding, and `token` drawn then.

    Rows that are computed together differ in their last bits from rows computed alone, in what they give and in the
    keys and values that they leave, and so does all that is computed from those. (The length of the sequence adds
    nothing: a layer sees what the layers before it left, never its own errors.) The last stage therefore tells only
    tokens that are `settled`. What it leaves open is decided as plain decoding does, to the bit: the positions since
    the last plain one are computed again, one by one, and then the token. No position is so computed twice: a text
    costs its plain steps and its guesses at most.
    """

    def __init__(
        self, sequence: StageSequence, request: Generate, ask: Ask, token: int, check: Callable[[], None]
    ) -> None:
        self._sequence = sequence
        self._ask = ask
        self._check = check
        self._draft = drafting.DRAFT if request.draft is None else request.draft
        if request.sampling.temperature > 0:
            self._draft = 0
        self._start = request.start
        self._ids = [*request.ids, token]
        self._lookup = Lookup(self._ids) if self._draft else None
        self._plain = request.start + len(request.ids)  # the positions before it are as plain decoding leaves them
        self._open = False  # whether the next token was left open

    def step(self, most: int) -> Tokens:
        """The next tokens, at least one and at most `most`."""
        position = self._start + len(self._ids) - 1  # of the last token, which is not fed yet
        guess = [] if self._open or self._lookup is None else self._lookup.guess(min(self._draft, most - 1))
        verify = guess or (position - self._plain > FEW and not self._open)
        answer = self._verified(position, guess) if verify else self._plainly(position)
        self._ids += answer.ids
        if self._lookup is not None:
            self._lookup.extend(answer.ids)
        return answer

    def _verified(self, position: int, guess: list[int]) -> Tokens:
        """The settled tokens after `position` and each right guess; the plain one if the first is not settled."""
        answer = self._asked(position, [self._ids[-1], *guess], Wanted.TOKENS)
        right = 0
        while right < min(len(guess), len(answer.ids)) and guess[right] == answer.ids[right]:
            right += 1
        if guess and self._lookup is not None:
            self._lookup.learn(len(guess), right)
        self._open = right == len(answer.ids)
        return first(answer, right + 1) if answer.ids else self._plainly(position)

    def _plainly(self, position: int) -> Tokens:
        """The token after `position`, as plain decoding gives it."""
        for again in range(self._plain, position):
            self._feed(again, [self._ids[again - self._start]], Wanted.NOTHING)
        self._plain = position + 1
        self._open = False
        return self._asked(position, [self._ids[-1]], Wanted.TOKEN)

    def _asked(self, position: int, ids: list[int], wanted: Wanted) -> Tokens:
        answer = self._feed(position, ids, wanted)
        assert isinstance(answer, Tokens), "a step that wants tokens is answered with them"
        return answer

    def _feed(self, position: int, ids: list[int], wanted: Wanted) -> Answer | None:
        self._check()
        return self._sequence.step(position, np.asarray(ids, np.int64), replace(self._ask, wanted=wanted))


def first(answer: Tokens, count: int) -> Tokens:
    """An answer with its first tokens only."""
    return replace(answer, ids=answer.ids[:count], logprobs=answer.logprobs[:count])
