"""How many of BLAS's threads compute a token: fewer while other processes keep the cores busy.

BLAS's threads wait for each other: they spin, and give their processor away when somebody else wants it. Beside one
busy process on one of two cores, a token of GPT-2 small took 72 to 82 ms instead of 28 to 30, and on one thread 39 to
40 with or without it. A thread that gives its processor away counts as an involuntary context switch: that is the
signal. What helps is then tried out and timed, because neither systems nor models are alike.

A number of threads that somebody has set is never changed: sums over another number of threads can differ in the last
bits. So can those of one text beside neighbours that come and go.
"""

import functools
import os
import resource
import threading
import time
from typing import Protocol

from minigpt.engine import blas, threads

WINDOW = 4  # passes that are judged together
MANY = 4  # switches per pass: quiet, GPT-2 small has 1 to 3; beside one busy process on two cores 10 to 90
FIRST, LAST = 0.5, 8.0  # seconds from one trial to the next; twice as many after each that failed
FORK = 60.0  # seconds that a fork waits for passes at most, and they for it
SHARE = 20  # and at least so many times what the failed one took, in seconds of passes: also where pauses are long


class Machine(Protocol):
    """What a `Crew` sees of the system."""

    def place(self, count: int) -> None:
        """Puts so many threads where they compute best."""

    def now(self) -> float:
        """Seconds."""

    def switches(self) -> int:
        """Involuntary context switches of this process so far."""


class Crew:
    """Chooses the number of threads from passes that are alike: `begin` and `end` each of them.

    A trial is a window with half or twice as many threads. Fewer are tried when there are many switches, and more
    otherwise, since on one thread nothing shows whether the neighbour has left. The faster number stays.
    """

    def __init__(self, most: int, machine: Machine) -> None:
        self.count = most
        self._most = most
        self._machine = machine
        self._delay = FIRST
        self._next = 0.0  # when a trial is due: a time,
        self._rest = 0.0  # and the seconds of passes until then
        self._before: tuple[int, float] | None = None  # during a trial: the count before it, and its window's seconds
        self._clear()

    def begin(self) -> None:
        self._began, self._switched = self._machine.now(), self._machine.switches()

    def end(self) -> None:
        now = self._machine.now()
        self._passes += 1
        self._seconds += now - self._began
        self._rest -= now - self._began
        self._switches += self._machine.switches() - self._switched
        if self._before is not None:
            count, seconds = self._before
            if self._seconds >= seconds:  # at once: it can only get worse
                self._delay = min(2 * self._delay, LAST)
                self._next = now + self._delay
                self._rest = SHARE * self._seconds
                self._change(count)
            elif self._passes == WINDOW:
                self._delay = FIRST
                self._next = now + self._delay
                self._before = None
                self._clear()
        elif self._passes == WINDOW:
            before = self.count, self._seconds
            due = now >= self._next and self._rest <= 0
            if due and self.count > 1 and self._switches > MANY * WINDOW:
                self._change(self.count // 2, before)
            elif due and self.count < self._most:
                self._change(min(2 * self.count, self._most), before)
            else:
                self._clear()

    def _change(self, count: int, before: tuple[int, float] | None = None) -> None:
        self.count = count
        self._before = before
        self._machine.place(count)
        self._clear()

    def _clear(self) -> None:
        self._passes, self._seconds, self._switches = 0, 0.0, 0


class _System:
    """This process, on its system."""

    place = staticmethod(threads.place)
    now = staticmethod(time.perf_counter)

    @staticmethod
    def switches() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class _Own:
    """The crew of this process, the lock for its use, and the passes under way.

    A fork waits for the passes of other threads: the child has none of those threads, and would wait for ever for the
    locks of BLAS that they held.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(before=self._hold, after_in_parent=self._let_go, after_in_child=self._reset)

    def _reset(self) -> None:
        self.lock = threading.Lock()
        self.crew = Crew(threads.THREADS, _System())
        self._passes: set[int] = set()  # the identifiers of their threads
        self._forks = 0
        self._changed = threading.Condition()

    def begin(self, mine: int) -> None:
        """A pass begins in the thread with this identifier."""
        with self._changed:
            while self._forks:
                if not self._changed.wait(FORK):
                    break
            self._passes.add(mine)

    def end(self, mine: int) -> None:
        with self._changed:
            self._passes.discard(mine)
            if self._forks:
                self._changed.notify_all()

    def _hold(self) -> None:
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: not self._passes - {threading.get_ident()}, FORK)

    def _let_go(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()


_own = functools.cache(_Own)  # the process's only one, made when it is first used


class fitted:
    """A context for a pass of so many rows: one row is a token, and BLAS uses the crew's number of threads for it.

    Outside, BLAS has its usual number, for prompts and for whoever else uses it. While a pass is under way, those of
    other Python threads are neither timed nor fitted, and a fork waits.

    A class rather than a generator, as `Turns` is: every token waits for it.
    """

    __slots__ = ("_mine", "_rows", "_usual")

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._mine = threading.get_ident()
        self._usual = 0  # BLAS's threads outside, where they are fitted

    def __enter__(self) -> None:
        own = _own()
        own.begin(self._mine)
        if self._rows != 1 or threads.SET or threads.THREADS < 2:
            return
        control = blas.control()
        if control is not None and own.lock.acquire(blocking=False):
            self._usual = control.get()
            control.set(min(own.crew.count, self._usual))
            own.crew.begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        own = _own()
        try:
            if self._usual:
                try:
                    if kind is None:
                        own.crew.end()
                finally:
                    control = blas.control()
                    if control is not None:
                        control.set(self._usual)
                    own.lock.release()
        finally:
            own.end(self._mine)
