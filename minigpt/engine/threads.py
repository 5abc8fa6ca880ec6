"""Parts of one computation on several threads, where BLAS itself uses one.

The parts do not touch each other, so results do not depend on the number of threads. Waking a thread and waiting for it
takes about 110 µs, so this pays only for work that takes several times that.
"""

import contextlib
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from minigpt.engine import blas, cgroups

Work = Callable[[slice], object]


def chosen() -> int | None:
    """The number of threads that somebody has set, in the order in which OpenBLAS looks."""
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        wanted = os.environ.get(name, "")
        if wanted.isdecimal() and int(wanted) > 0:
            return int(wanted)
    return None


def processors() -> list[int]:
    """Those that the calling thread may run on."""
    with contextlib.suppress(OSError, AttributeError):  # a seccomp profile may refuse it, and macOS has none
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota(proc: Path = Path("/proc/self")) -> float:
    """How many processors the control groups of this process may keep busy; infinity if there is no limit.

    `cpu.max` of version 2, and `cpu.cfs_quota_us` by `cpu.cfs_period_us` of version 1: see cgroups(7).
    """
    least = math.inf
    for folder, first_version in cgroups.folders("cpu", proc):
        with contextlib.suppress(OSError, ValueError):  # no limit, written as "max"
            if first_version:
                limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                limit, period = (folder / "cpu.max").read_text().split()
            if int(limit) > 0 < int(period):
                least = min(least, int(limit) / int(period))
    return least


def available() -> int:
    """How many threads compute: the number that was set, or one for each processor that this process may keep busy.

    Half a processor more counts as one. Under a quota of one, two threads of BLAS that wait for each other took twice
    as long for a token as one; under a quota of one and a half, three quarters.
    """
    return chosen() or max(1, math.floor(min(len(processors()), quota() + 0.5)))


SET = chosen() is not None  # whether the number stays as it is, whatever happens
THREADS = available()


def settle() -> None:
    """Leaves BLAS no more than THREADS threads: it counts processors itself, and knows nothing of quotas. If it was
    loaded before it could be told, it has as many as were set."""
    control = blas.control()
    if control is None:
        return
    if (blas.late() and control.get() != THREADS) if SET else control.get() > THREADS:
        control.set(THREADS)


_LOOK = 1.0  # seconds between two looks at whether a thread that is waited for still lives

_processors: list[int] = []  # of each computing thread, once they are spread
_workers: list[int] = []  # of BLAS, then


def native() -> list[int]:
    """The ids of this process's threads that are not Python's: right after NumPy's import, those of BLAS.

    An empty list where the system has no /proc.
    """
    ours = {thread.native_id for thread in threading.enumerate()}
    try:
        known = map(int, os.listdir("/proc/self/task"))
    except OSError:
        return []
    return sorted(tid for tid in known if tid not in ours)


def spread(workers: Sequence[int]) -> None:
    """Pins each computing thread to a processor of its own: the caller to the first, BLAS's `workers` to the others.

    For processes that compute in turns on the same processors. While the threads of one fall asleep, those of the next
    wake up, and the system often puts two on one processor for some milliseconds: one token in twenty took 5 to 15 ms
    longer, and three stages took 25 % longer than one instead of 14. Threads that the caller starts later stay on its
    processor.

    Does nothing unless there are as many threads as processors: otherwise the system knows better which are free.
    """
    if sys.platform != "linux":
        return
    found = processors()
    if len(found) == THREADS == len(workers) + 1:
        _processors[:], _workers[:] = found, workers
        place(THREADS)


def place(count: int) -> None:
    """Where threads are spread: pins all of them as `spread` says, or none if fewer than all compute."""
    if not _processors:
        return
    homes = dict(zip(_workers, _processors[1:], strict=True))
    homes |= {helper.native_id: _processors[helper.place] for helper in _pool().helpers}
    with contextlib.suppress(OSError):  # no /proc
        for thread in map(int, os.listdir("/proc/self/task")):
            _pin(thread, {homes.get(thread, _processors[0])} if count == THREADS else set(_processors))


def _pin(thread: int, processors: set[int]) -> None:
    """A refusal costs some speed and nothing else: the process's cpuset may have shrunk meanwhile."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(thread, processors)


class _Helper:
    """A thread that waits for parts to compute. It uses two bare locks, because an executor takes 30 µs longer."""

    def __init__(self, place: int) -> None:
        self.place = place  # among the computing threads; the caller is the first
        self._begin, self._end = threading.Lock(), threading.Lock()
        self._begin.acquire()
        self._end.acquire()
        self._job: tuple[Work, slice] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="helper", daemon=True)
        self._thread.start()

    def begin(self, work: Work, part: slice) -> None:
        self._job = work, part
        self._begin.release()

    def end(self) -> BaseException | None:
        """Waits until the part is computed, or the thread is dead; returns what the part raised."""
        while not self._end.acquire(timeout=_LOOK):
            if not self._thread.is_alive() and not self._end.acquire(blocking=False):
                return RuntimeError("a thread ended before its part of a computation did: try again")
        error, self._error = self._error, None
        return error

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def native_id(self) -> int:
        return self._thread.native_id or 0

    def _run(self) -> None:
        if _processors:
            _pin(0, {_processors[self.place]})
        while True:
            self._begin.acquire()
            assert self._job is not None
            (work, part), self._job = self._job, None
            try:
                work(part)
            except BaseException as error:
                self._error = error
            del work  # or it would keep its arrays alive until the next part
            self._end.release()


class _Pool:
    """The helpers of this process, and the lock for their use."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):  # in the child no helper lives, and the lock may be held for ever
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self.helpers: list[_Helper] = []
        self.in_use = threading.Lock()


_pool = functools.cache(_Pool)  # the process's only one, made when it is first used


def in_parts(work: Work, count: int) -> None:
    """Calls `work` with slices that cover range(count), in parallel on all threads.

    If another computation uses the threads already, this one runs on the calling thread alone. Where the system refuses
    more threads, or this process is ending, it runs on those that there are.
    """
    parts, pool = min(THREADS, count), _pool()
    if parts < 2 or sys.is_finalizing() or not pool.in_use.acquire(blocking=False):
        work(slice(0, count))
        return
    errors: list[BaseException | None] = []
    try:
        pool.helpers = [helper for helper in pool.helpers if helper.alive]
        with contextlib.suppress(RuntimeError):  # "can't start new thread"
            while len(pool.helpers) < parts - 1:
                pool.helpers.append(_Helper(len(pool.helpers) + 1))
        helpers = pool.helpers[: parts - 1]
        parts = len(helpers) + 1
        bounds = [count * part // parts for part in range(parts + 1)]
        for helper, start, stop in zip(helpers, bounds[1:], bounds[2:], strict=False):
            helper.begin(work, slice(start, stop))
        try:
            work(slice(0, bounds[1]))
        except BaseException as error:
            errors.append(error)
        errors += [helper.end() for helper in helpers]
    except BaseException:  # Ctrl-C while they compute: they are out of step with us
        pool.helpers.clear()
        raise
    finally:
        pool.in_use.release()
    for raised in errors:
        if raised is not None:
            raise raised
