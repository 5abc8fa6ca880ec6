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
from minigpt.errors import StageError
from minigpt.stage.meter import Meter

T = TypeVar("T")

PATIENCE = 100.0  # seconds for a turn; the stage before this one gives up after 120, and would not know why


class _Cores:
    """The lock of a file that processes share. The system unlocks it if the process that has it dies.

    lockf cannot give up waiting, so a thread waits in it: for this turn, or for the next one if this gives up.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._asking = False  # whether the thread waits
        self._wanted = False  # whether somebody waits for it
        self._answer = threading.Semaphore(0)
        self._error: Exception | None = None

    def take(self, deadline: float) -> bool:
        """Whether the file was locked in time. One thread may take it at a time. Raises OSError, ValueError."""
        with self._lock:
            if not self._asking:
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except (BlockingIOError, PermissionError):
                    threading.Thread(target=self._ask, name="turns", daemon=True).start()
                    self._asking = True
            self._wanted = True
        if not self._answer.acquire(timeout=max(0.0, deadline - time.monotonic())):
            with self._lock:
                if self._wanted:
                    self._wanted = False
                    return False
            self._answer.acquire()  # it came at the last moment
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return True

    def give_back(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _ask(self) -> None:
        error = None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
        except (OSError, ValueError) as found:
            error = found
        with self._lock:
            self._asking = False
            if self._wanted:
                self._wanted, self._error = False, error
                self._answer.release()
            elif error is None:
                self.give_back()


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
        self._cores = None if cores is None else _Cores(cores)
        self._lock = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        """Raises StageError if the turn does not come in time."""
        deadline = time.monotonic() + PATIENCE
        mine = None
        with self._lock:
            self.taken += 1
            if self._held:
                mine = threading.Lock()
                mine.acquire()
                self._waiting.append(mine)
            self._held = True
        if mine is not None and not mine.acquire(timeout=PATIENCE):  # until whoever goes before releases it
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    raise StageError(f"no turn at computing in {PATIENCE:.0f} s: other sequences of this stage hold it")
        if self._cores is not None:
            try:
                if not self._cores.take(deadline):
                    holder = "another process keeps the file of --turns locked. Is it stopped?"
                    raise StageError(f"no turn at the cores in {PATIENCE:.0f} s: {holder}")
            except BaseException:
                self._next()
                raise

    def __exit__(self, *error: object) -> None:
        try:
            if self._cores is not None:
                self._cores.give_back()
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
        self.meter = Meter()  # told of each pass by whoever knows what was drawn for it
        self._turns = Turns(cores)

    @property
    def steps(self) -> int:
        """Passes asked for so far."""
        return self._turns.taken

    def compute(
        self, cache: KVCache, start: int, rows: NDArray[Any], finish: Callable[[NDArray[Any]], T]
    ) -> tuple[T, float]:
        """Computes a pass and `finish` of its result, the hidden states (T, C); and the seconds that both took.

        Raises StageError if its turn does not come in time.

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
