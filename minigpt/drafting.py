"""Drafted greedy decoding: several guessed tokens verified in one step, and the text of plain decoding to the letter.

    Lookup      guesses: what followed the end of the sequence where it stood before
    settled     whether a token stays the likeliest, however its row was computed
    Decoding    the steps: guess, verify, keep what is right; and go back to plain steps where they must decide

Guesses looked up in the sequence itself take no second model (prompt lookup decoding, Saxena, 2023). The stages compute
the last token and the guesses as the rows of one step, the last stage tells the likeliest token after each row, and
what was guessed wrong is rewound by the next step's smaller start.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minigpt.linalg import BLOCKED
from minigpt.messages import Generate, Token, Wanted

if TYPE_CHECKING:
    from minigpt.generation import Answer, Ask, Sequence

# By so much of the largest logit, at most, does a logit depend on how its row was computed: 128 roundings of float32.
# The most seen was a sixth of it, 2.7e-6 (the embedded model; GPT-2 small and ten other shapes with random weights stay
# below 1.1e-6). A larger bound costs time, since each tie that it sees leads to plain steps.
ROUNDING = 2.0**-16

# Ids that are guessed ahead at most unless the request says how many. None where a step of a few rows costs twice one
# of a single row: there they gain little on most texts.
DRAFT = 8 if BLOCKED else 0

SHORTEST = 3  # ids that must have stood before; shorter runs recur in any text, and tell little of what follows
LONGEST = 64  # no more are ever demanded, so that a text that begins to repeat itself late is noticed

# So few positions that are not as plain steps leave them are computed again as soon as nothing is guessed. A wrong
# guess leaves one or two; without this, a near tie much later would go back to them.
FEW = 2


class Lookup:
    """A sequence of token ids that grows, and what may follow it.

    The longest run of ids that stands at its end and stood in it before is looked up, and what followed it the last
    time is guessed to follow again. A guess pays only if enough of it is right: so a run must have some length, which
    doubles when a guess was mostly wrong and halves when it was mostly right, and no guess is longer than its run. This
    follows from the sequence, and never from time or load: the same request makes the same guesses.

    >>> lookup = Lookup([7, 1, 2, 3, 4, 5, 9, 1, 2, 3])
    >>> lookup.guess(2), lookup.guess(8)
    ([4, 5], [4, 5, 9])
    >>> lookup.extend([4])
    >>> lookup.guess(8)
    [5, 9, 1, 2]
    """

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._seen: set[tuple[int, ...]] = set()  # every run of SHORTEST ids
        self._recurs = False  # whether the last of them stood before
        self._demanded = SHORTEST
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Adds ids to the sequence. A set is asked first, because most texts do not repeat what they have just said."""
        for token in ids:
            self._ids.append(token)
            run = tuple(self._ids[-SHORTEST:])
            self._recurs = run in self._seen
            self._seen.add(run)

    def guess(self, most: int) -> list[int]:
        """At most so many ids that may follow; none where no run that stood before is long enough."""
        if not self._recurs:
            return []
        ids = np.array(self._ids)
        ends = np.flatnonzero(ids[:-1] == ids[-1]) + 1  # where the run of one id stood before: the index after it
        longest = 1
        while longest < LONGEST:
            longer = ends[ends > longest]
            longer = longer[ids[longer - longest - 1] == ids[-longest - 1]]
            if not longer.size:
                break
            ends, longest = longer, longest + 1
        if longest < self._demanded:
            return []
        after = int(ends[-1])
        guess: list[int] = []
        for place in range(after, after + min(most, longest)):  # past the end, it goes on with what it guessed
            guess.append(self._ids[place] if place < len(ids) else guess[place - len(ids)])
        return guess

    def learn(self, guessed: int, right: int) -> None:
        """What came of a guess decides how long a run must be for the next one."""
        if 2 * right < guessed:
            self._demanded = min(2 * self._demanded, LONGEST)
        else:
            self._demanded = max(self._demanded // 2, SHORTEST)


def settled(logits: NDArray[np.float32], token: int) -> bool:  # (V,), the likeliest id
    """Whether no rounding can make another token the likeliest: it leads by more than two logits can be off."""
    best = float(logits[token])
    second = float(max(logits[:token].max(initial=-np.inf), logits[token + 1 :].max(initial=-np.inf)))
    return best - second > 2 * ROUNDING * max(abs(best), -float(logits.min()))


class Decoding:
    """The steps after the prompt: each feeds the last token back, alone or with guesses of what follows it.

    Rows that are computed together differ in their last bits from rows computed alone, in what they give and in the
    keys and values that they leave, and so does all that is computed from those. (The length of the sequence adds
    nothing: a layer sees what the layers before it left, never its own errors.) The last stage therefore tells only
    tokens that are `settled`. What it leaves open is decided as plain decoding does, to the bit: the positions since
    the last plain one are computed again, one by one, and then the token. Since no position is so computed twice, a
    text costs its plain steps and its guesses at most.

    Args:
        sequence: of the first stage; it has been fed `request.ids`, in the steps of plain decoding.
        ask: how to draw.
        token: what was drawn then.
        check: called before each step.
    """

    def __init__(
        self, sequence: Sequence, request: Generate, ask: Ask, token: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._sequence = sequence
        self._ask = ask
        self._check = check
        self._draft = DRAFT if request.draft is None else request.draft
        if request.sampling.temperature > 0:
            self._draft = 0
        self._start = request.start
        self._ids = [*request.ids, token]
        self._lookup = Lookup(self._ids) if self._draft else None
        self._plain = request.start + len(request.ids)  # the positions before it are as plain decoding leaves them
        self._open = False  # whether the next token was left open

    def step(self, most: int) -> Token:
        """The next tokens, at least one and at most `most`."""
        position = self._start + len(self._ids) - 1  # of the last token, which is not fed yet
        guess = [] if self._open or self._lookup is None else self._lookup.guess(min(self._draft, most - 1))
        if guess or (position - self._plain > FEW and not self._open):
            answer = self._verified(position, guess)
            if not answer.ids:
                answer = self._plainly(position)
        else:
            answer = self._plainly(position)
        self._ids += answer.ids
        if self._lookup is not None:
            self._lookup.extend(answer.ids)
        return answer

    def _verified(self, position: int, guess: list[int]) -> Token:
        """The settled tokens after `position` and after each right guess; none if the first is not settled."""
        answer = self._asked(position, [self._ids[-1], *guess], Wanted.TOKENS)
        right = 0
        while right < min(len(guess), len(answer.ids)) and guess[right] == answer.ids[right]:
            right += 1
        if guess and self._lookup is not None:
            self._lookup.learn(len(guess), right)
        self._open = right == len(answer.ids)
        return first(answer, right + 1)

    def _plainly(self, position: int) -> Token:
        """The token after `position`, as plain decoding gives it."""
        for again in range(self._plain, position):
            self._feed(again, [self._ids[again - self._start]], Wanted.NOTHING)
        self._plain = position + 1
        self._open = False
        return self._asked(position, [self._ids[-1]], Wanted.TOKEN)

    def _asked(self, position: int, ids: list[int], wanted: Wanted) -> Token:
        answer = self._feed(position, ids, wanted)
        if not isinstance(answer, Token):
            raise AssertionError("a step that wants tokens is answered with them")
        return answer

    def _feed(self, position: int, ids: list[int], wanted: Wanted) -> Answer | None:
        self._check()
        return self._sequence.step(position, np.asarray(ids, np.int64), replace(self._ask, wanted=wanted))


def first(answer: Token, count: int) -> Token:
    """An answer with its first tokens only."""
    return replace(answer, ids=answer.ids[:count], logprobs=answer.logprobs[:count])
