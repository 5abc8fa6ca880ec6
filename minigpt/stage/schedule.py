"""The schedule: the one place in a stage that decides what the next forward pass computes.

Today a pass computes the rows of one sequence, in the order of asking.
"""

import fcntl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any, TypeVar

from numpy.typing import NDArray

from minigpt.engine.crew import fitted
from minigpt.engine.model import GPT2, KVCache

T = TypeVar("T")


class Turns:
    """A lock, granted in the order of asking: a channel waits for at most one step of each other channel.

    A class rather than a generator: the end of a turn took 50 µs with two nested generators, where it takes 30.

    Args:
        cores: a file that every stage on these cores has open, and locks while it computes. BLAS's threads spin while
            they wait for each other: two stages that computed chunks of a prompt at once, on two cores, took up to
            twice as long as one after the other. None if the cores are not shared.
    """

    def __init__(self, cores: IO[bytes] | None = None) -> None:
        self.taken = 0  # turns so far
        self._cores = cores
        self._lock = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        mine = threading.Lock()
        with self._lock:
            self.taken += 1
            if self._held:
                mine.acquire()
                self._waiting.append(mine)
            self._held = True
        mine.acquire()  # at once, or when whoever goes before releases it
        if self._cores is not None:
            try:
                fcntl.lockf(self._cores, fcntl.LOCK_EX)  # the system unlocks it if this process dies
            except BaseException:
                self._next()
                raise

    def __exit__(self, *error: object) -> None:
        try:
            if self._cores is not None:
                fcntl.lockf(self._cores, fcntl.LOCK_UN)
        finally:
            self._next()

    def _next(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False


class Schedule:
    """Computes passes through a stage's layers. Any thread may ask. `cores` as in `Turns`."""

    def __init__(self, model: GPT2, cores: IO[bytes] | None = None) -> None:
        self.model = model
        self._turns = Turns(cores)

    @property
    def steps(self) -> int:
        """Passes asked for so far."""
        return self._turns.taken

    def compute(
        self, cache: KVCache, start: int, rows: NDArray[Any], finish: Callable[[NDArray[Any]], T]
    ) -> tuple[T, float]:
        """Computes a pass and `finish` of its result, the hidden states (T, C); and the seconds that both took.

        Args:
            cache: the sequence's; it is cut to `start` positions first.
            start: position of the first row.
            rows: (T,) token ids in the first stage, (T, C) hidden states in the others.
        """
        with self._turns, fitted(len(rows)):
            began = time.perf_counter()
            cache.truncate(start)
            hidden = self.model.embed(rows, start) if self.model.is_first else rows
            hidden = self.model.forward(hidden, [(cache, len(rows))])
            return finish(hidden), time.perf_counter() - began
