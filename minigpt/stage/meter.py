"""What passes yield: tokens a second, and sequences in a pass, over the last ten seconds and since the start."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 10.0  # seconds
PERIOD = 0.5  # seconds that are counted together
_PERIODS = round(WINDOW / PERIOD)


@dataclass(slots=True)
class _Count:
    """What was noted in one period."""

    period: int = -1  # its number
    passes: int = 0
    sequences: int = 0
    tokens: int = 0


class Meter:
    """Counts passes, for any number of threads: `note` takes two microseconds, and memory does not grow.

    Args:
        clock: seconds, from any start on, and never backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ring = [_Count() for _ in range(_PERIODS)]
        self.passes = 0
        self.sequences = 0  # of all passes
        self.tokens = 0
        self.resumed = 0  # requests

    def note_resumed(self) -> None:
        """Counts a request that goes on after a link was lost."""
        with self._lock:
            self.resumed += 1

    def note(self, sequences: int, tokens: int) -> None:
        """Counts a pass of so many sequences, for which so many tokens were drawn."""
        with self._lock:
            period = math.floor(self._clock() / PERIOD)
            count = self._ring[period % _PERIODS]
            if count.period != period:  # it is of a window that has passed
                count.period, count.passes, count.sequences, count.tokens = period, 0, 0, 0
            count.passes += 1
            count.sequences += sequences
            count.tokens += tokens
            self.passes += 1
            self.sequences += sequences
            self.tokens += tokens

    def rate(self, now: float) -> float:
        """Tokens a second over the last 10 s."""
        # The oldest period has passed whole, and the newest has only begun.
        return self._recent(now).tokens / (WINDOW - PERIOD + now % PERIOD)

    def batch(self, now: float) -> float:
        """Sequences in a pass, as a mean over the last 10 s; 0 if there was no pass."""
        recent = self._recent(now)
        return recent.sequences / recent.passes if recent.passes else 0.0

    def _recent(self, now: float) -> _Count:
        newest = math.floor(now / PERIOD)
        found = _Count(newest)
        with self._lock:
            for count in self._ring:
                if newest - _PERIODS < count.period <= newest:
                    found.passes += count.passes
                    found.sequences += count.sequences
                    found.tokens += count.tokens
        return found
