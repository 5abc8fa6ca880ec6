"""What drafted greedy decoding needs: guesses of what follows, and whether a verified one is beyond doubt.

Guesses looked up in the sequence itself take no second model (prompt lookup decoding, Saxena, 2023). The stages compute
the last token and the guesses as the rows of one step, the last stage tells the likeliest token after each row, and
what was guessed wrong is rewound by the next step's smaller start: see `Decoding` in minigpt/stage/generation.py.

Letters: V vocabulary.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.linalg import BLOCKED

# Upper bound on how far a logit moves when its row is computed in another batch, relative to the largest logit: 128
# roundings of float32. The most seen was a sixth of it, 2.7e-6 (the embedded model; GPT-2 small and ten other shapes
# with random weights stay below 1.1e-6). A larger bound costs time: each tie that it sees leads to plain steps.
ROUNDING = 2.0**-16

# Ids guessed ahead at most, unless the request says how many. None where a step of a few rows costs twice one of a
# single row: there they gain little on most texts.
DRAFT = 8 if BLOCKED else 0

SHORTEST = 3  # ids that must have stood before; shorter runs recur in any text, and tell little of what follows
LONGEST = 64  # no more are ever demanded, so that a text that begins to repeat itself late is noticed


class Lookup:
    """A sequence of token ids that grows, and what may follow it.

    The longest run of ids that stands at its end and stood in it before is looked up, and what followed it the last
    time is guessed to follow again. A guess pays only if enough of it is right: so a run must have some length, which
    doubles when a guess was mostly wrong and halves when it was mostly right, and no guess is longer than its run. None
    of this depends on time or load: the same request makes the same guesses.

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
        after = self._ids[int(ends[-1]) :]
        return [after[i % len(after)] for i in range(min(most, longest))]  # past the end, it repeats what it guessed

    def learn(self, guessed: int, right: int) -> None:
        """How much of a guess was right decides how long a run must be for the next one."""
        if 2 * right < guessed:
            self._demanded = min(2 * self._demanded, LONGEST)
        else:
            self._demanded = max(self._demanded // 2, SHORTEST)


def settled(logits: NDArray[np.float32], token: int) -> bool:  # (V,), the likeliest id
    """Whether no rounding can make another token the likeliest: it leads by more than two logits can be off."""
    best = float(logits[token])
    second = float(max(logits[:token].max(initial=-np.inf), logits[token + 1 :].max(initial=-np.inf)))
    return best - second > 2 * ROUNDING * max(abs(best), -float(logits.min()))
