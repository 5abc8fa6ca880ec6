"""Standard input, output and error of a process that serves: whatever happens to them, it serves.

Nobody may read a pipe, a disk may be full, or one of them may be closed. Whoever writes to standard output or error
never waits: a thread passes it on, and what is too much is dropped and counted.
"""

import atexit
import contextlib
import fcntl
import io
import logging
import os
import queue
import resource
import sys
import threading
import time
from typing import TextIO, cast

from minigpt.errors import UsageError

HELD = 2**20  # bytes that may wait for a reader
BURST = 2000  # lines at once; a start and a hundred connections are some hundred
RATE = 100.0  # lines a second after that: 1 GB a day at most, whoever connects
SPARE = 64  # descriptors for all else: files, locks, the links to the next stage
_PATIENCE = 1.0  # seconds that what still waits may take to leave at the end
_LINE = 2**13  # bytes; what is longer is passed on in parts


class Stream(io.TextIOBase):
    """A text stream to a descriptor. Writing to it never waits and never fails."""

    def __init__(self, fd: int) -> None:
        """Starts the thread. Raises RuntimeError if the system gives none."""
        self._fd = fd
        self._lock = threading.Condition(threading.RLock())
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._line = ""  # the beginning of one
        self._held = 0  # bytes in the queue, and being written
        self._dropped = 0  # lines, since the last that was not
        self._allowed, self._since = float(BURST), time.monotonic()
        threading.Thread(target=self._run, name=f"descriptor {fd}", daemon=True).start()

    def write(self, text: str) -> int:
        with self._lock:
            self._line += text
            if self._line.endswith("\n") or len(self._line) >= _LINE:
                line, self._line = self._line, ""
                self._put(line)
        return len(text)

    def flush(self) -> None:
        """Passes the beginning of a line on, such as one that the next replaces."""
        with self._lock:
            line, self._line = self._line, ""
            if line:
                self._put(line)

    def _put(self, line: str) -> None:
        now = time.monotonic()
        self._allowed = min(float(BURST), self._allowed + RATE * (now - self._since))
        self._since = now
        notice = f"{self._dropped} lines were dropped here: too many, or nobody read them\n" if self._dropped else ""
        data = (notice + line).encode("utf-8", "backslashreplace")
        if self._allowed < 1 or self._held + len(data) > HELD:
            self._dropped += bool(line)
            return
        self._dropped = 0
        self._allowed -= 1
        self._held += len(data)
        self._queue.put(data)

    def drain(self) -> None:
        """Waits a moment until all has been passed on."""
        with self._lock:
            rest, self._line = self._line, ""
            if rest or self._dropped:
                self._allowed = 1.0
                self._put(rest)
            self._lock.wait_for(lambda: not self._held, _PATIENCE)

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def _run(self) -> None:
        while True:
            data = self._queue.get()
            try:
                self._pass_on(data)
            except OSError as error:  # the disk is full, or the reader has gone: there is nobody to tell
                if self._fd != 2:
                    print(f"standard output: {error.strerror}", file=sys.stderr)
            with self._lock:
                self._held -= len(data)
                self._lock.notify_all()

    def _pass_on(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # whoever shares it has made it non-blocking
                time.sleep(0.05)


def set_up(name: str) -> None:
    """Puts a `Stream` in place of standard output and error, and logs to the latter.

    Where both are the same file, as on a terminal, they are one stream: what is written comes in that order.
    """
    try:
        error = Stream(2)
        output = error if os.path.samestat(os.fstat(1), os.fstat(2)) else Stream(1)
    except RuntimeError:
        sys.exit(f"{name}: the system gives this process no threads")
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, error)
    atexit.register(drain)
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(levelname)s %(message)s")


def drain() -> None:
    """Waits a moment until what was printed and logged has been passed on, if these streams were set up."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Stream):
            stream.drain()


def open_standard() -> list[int]:
    """Opens descriptors 0 to 2 where they are closed, and returns which were: the next socket would become one."""
    closed = []
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            closed.append(fd)
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    return closed


def moved_up(fd: int) -> int:
    """An inherited descriptor by a number above 2. If it was 0, 1 or 2, nothing is there any more.

    Raises OSError.
    """
    if fd > 2:
        return fd
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    with contextlib.closing(open(os.devnull, "r+b", buffering=0)) as nothing:
        os.dup2(nothing.fileno(), fd)
    return moved


def make_room(sockets: int, what: str, advice: str = "", more: int = 0) -> int:
    """Lets this process have so many sockets at once, and a few other files; and `more`, or how many of these it may.

    Returns how many of these. Raises UsageError if the system forbids the rest: connections that say nothing would keep
    clients out, and nobody would be told.
    """
    needed = sockets + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed + more:
        return more
    wanted = needed + more if hard == resource.RLIM_INFINITY else min(needed + more, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        soft = max(soft, wanted)
    if soft < needed:
        text = f"{what} may need {needed} open files, and this process may have {max(soft, hard)}"
        raise UsageError(f"{text}: raise that limit (ulimit -n {needed}){advice}")
    return min(more, soft - needed)
