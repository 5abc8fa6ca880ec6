"""A stage's layers, which compute the rows of several sequences in one pass.

Letters: T new positions of one sequence, R rows of all, C n_embd, V vocabulary.
"""

import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.crew import fitted
from minigpt.engine.drafting import settled
from minigpt.engine.model import GPT2, KVCache
from minigpt.engine.penalties import adjusted
from minigpt.engine.sampling import Scored, logprob, sample, scored
from minigpt.engine.scoring import scores
from minigpt.protocol.batches import NONE_GIVEN, Given, Result
from minigpt.protocol.messages import CHUNK, Likely, Logits, Refusal, Scores, Tokens, Wanted
from minigpt.protocol.request import Ask
from minigpt.stage.meter import Meter
from minigpt.stage.turns import Turns


class Part(NamedTuple):
    """New positions of one sequence in a pass."""

    cache: KVCache
    start: int  # position of the first row; at most the cache's length, which is cut to it
    rows: NDArray[Any]  # (T,) token ids in the first stage, (T, C) hidden states in the others
    ask: Ask
    given: Given = NONE_GIVEN


class Layers:
    """The layers of stage `index`. Any thread may compute; one does at a time. `cores` as in `Turns`."""

    def __init__(self, model: GPT2, index: int = 0, cores: IO[bytes] | None = None) -> None:
        self.model = model
        self.index = index
        self._cores = cores
        self.disown()

    def disown(self) -> None:
        """In the child of a fork, where other threads' turns never end: starts afresh."""
        self.meter = Meter()
        self._turns = Turns(self._cores)

    @property
    def steps(self) -> int:
        """Passes asked for so far."""
        return self._turns.taken

    def count(self, results: Sequence[Result]) -> None:
        """Notes the results of a pass, for `status`; after they are told, for nobody waits for this."""
        self.meter.note(len(results), sum(len(result.ids) for result in results if isinstance(result, Tokens)))

    def compute(self, parts: Sequence[Part]) -> tuple[NDArray[np.float32], list[Result], float]:
        """The hidden states (R, C); the results, in the last stage only; and the seconds that both took.

        Raises StageError if the turn does not come in time.
        """
        model = self.model
        with self._turns, fitted(sum(len(part.rows) for part in parts)):
            began = time.perf_counter()
            for part in parts:
                part.cache.truncate(part.start)
            rows = [model.embed(part.rows, part.start) if model.is_first else part.rows for part in parts]
            hidden = rows[0] if len(rows) == 1 else np.concatenate(rows)
            hidden = model.forward(hidden, [(part.cache, len(part.rows)) for part in parts])
            results = self._draw(hidden, parts) if model.is_last else []
            return hidden, results, time.perf_counter() - began

    def whole(self, part: Part) -> Result:
        """The result for a sequence that nothing follows, in a model of one stage: nothing is cached.

        Raises StageError as `compute`.
        """
        with self._turns, fitted(len(part.rows)):
            hidden = self.model.forward_whole(self.model.embed(part.rows, part.start), CHUNK)
            return self._draw(hidden, [part])[0]

    def _draw(self, hidden: NDArray[np.float32], parts: Sequence[Part]) -> list[Result]:
        """What each part asks for. The head, a third of the weights, is read once for all of them."""
        chosen: list[int] = []  # rows whose logits are needed
        end = 0
        for part in parts:
            end += len(part.rows)
            if part.ask.wanted is Wanted.TOKENS:
                chosen += range(end - len(part.rows), end)
            elif part.ask.wanted in (Wanted.TOKEN, Wanted.LOGITS):
                chosen.append(end - 1)
        logits = self.model.logits(hidden if len(chosen) == len(hidden) else hidden[chosen]) if chosen else hidden[:0]
        results: list[Result] = []
        at = end = 0
        for part in parts:
            count = {Wanted.NOTHING: 0, Wanted.SCORES: 0, Wanted.TOKENS: len(part.rows)}.get(part.ask.wanted, 1)
            start, end = end, end + len(part.rows)
            try:
                if part.ask.wanted is Wanted.SCORES:
                    results.append(self._scores(hidden[start:end], part))
                else:
                    results.append(self._drawn(logits[at : at + count], part) if count else None)
            except FloatingPointError:  # of this sequence alone: rows do not depend on each other
                text = "the logits are not finite: the weights are damaged, or hidden states were"
                results.append(Refusal(self.index, "not-finite", text))
            at += count
        return results

    def _scores(self, hidden: NDArray[np.float32], part: Part) -> Scores:
        """Of one part, from its hidden states (T, C). Raises FloatingPointError."""
        told = scores(self.model, hidden, part.given.ids, part.ask.top)
        return Scores(part.start + 1, tuple(one.logprob for one in told), (), _likely(told))

    def _drawn(self, logits: NDArray[np.float32], part: Part) -> Result:
        """Of one part, from the logits (1 or T, V) of its last row, or of each. Raises FloatingPointError."""
        if not np.isfinite(logits).all():
            raise FloatingPointError
        ask, end = part.ask, part.start + len(part.rows)
        if ask.wanted is Wanted.LOGITS:
            return Logits(end, logits[0])
        each = ask.wanted is Wanted.TOKENS
        position = part.start + 1 if each else end
        ids: list[int] = []
        for row in logits:
            if ask.sampling.adjusts:
                row = adjusted(row, ask.sampling, part.given.prompt, part.given.ids)
            token = sample(row, ask.sampling, position + len(ids))
            if each and not settled(row, token):
                break
            ids.append(token)
        if ask.top:
            told = [scored(row, token, ask.top) for row, token in zip(logits, ids, strict=False)]
            logprobs = tuple(one.logprob for one in told) if ask.logprobs else ()
            return Tokens(position, tuple(ids), logprobs, (), _likely(told))
        return Tokens(position, tuple(ids), tuple(map(logprob, logits, ids)) if ask.logprobs else ())


def _likely(told: list[Scored]) -> Likely:
    return tuple(pair for one in told for pair in one.top)
