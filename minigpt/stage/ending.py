"""How a stage's process ends: when it is told to, in time, whatever its threads are doing.

    SIGTERM                            while it loads: at once; while it serves: it drains
    SIGTERM again, or the drain's end  at once
    SIGINT, end of standard input      at once

Python runs a signal's handler in the main thread, between two of its instructions: not while that thread is inside a
library or waits for a disk. So here a thread of its own hears of signals, by `signal.set_wakeup_fd`, and keeps time.

The process is left by `os._exit`. An end in order runs the BLAS library's destructor, which waits for the computation
under way: at times for ever, if the thread that has it waits for Python, which is gone.
"""

import logging
import math
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from minigpt.stage import streams

log = logging.getLogger("minigpt.stage")

PATIENCE = 4.0  # seconds from being told to end at once until it has; whoever starts local stages kills them after 5
_NOW = b"\0"  # the number of no signal


def leave(code: int) -> NoReturn:
    """Ends the process, after a moment for what it has printed and logged to leave."""
    try:
        streams.drain()
    finally:
        os._exit(code)


class Ending:
    """The end of this process. Only the main thread can make one; it starts a thread.

    Args:
        drain: seconds that answers may take after the first SIGTERM.

    Raises RuntimeError if the system gives no thread.
    """

    def __init__(self, drain: float) -> None:
        self.now = threading.Event()  # set once there is no time for answers any more
        self._drain = drain
        self._stop: Callable[[], object] | None = None
        self._code = 0
        bell, self._ring = os.pipe()
        os.set_blocking(self._ring, False)
        threading.Thread(target=self._watch, args=(bell,), name="ending", daemon=True).start()
        signal.set_wakeup_fd(self._ring, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda _signal, _frame: None)  # the thread hears of it; so does nobody else

    def serving(self, stop: Callable[[], object]) -> None:
        """From now on `stop` is called when the process is told to end, instead of ending it; by another thread."""
        self._stop = stop

    def begin(self) -> None:
        """The process is to end at once. Any thread may say so."""
        with suppress(BlockingIOError):  # it was told so very often
            os.write(self._ring, _NOW)

    def _watch(self, bell: int) -> None:
        until = math.inf
        with selectors.DefaultSelector() as waiting:
            waiting.register(bell, selectors.EVENT_READ)
            while waiting.select(None if until == math.inf else max(0.0, until - time.monotonic())):
                for number in os.read(bell, 64):
                    if number == signal.SIGINT:  # the main thread hears of it too, if it can
                        self._code = 130
                    elif self._stop is None:
                        leave(0)
                    if number == signal.SIGTERM and until == math.inf:
                        until = time.monotonic() + self._drain + PATIENCE
                    else:
                        until = min(until, time.monotonic() + PATIENCE)
                        self.now.set()
                    if number != signal.SIGINT and self._stop is not None:
                        with suppress(OSError):
                            self._stop()
        log.warning("did not end in %g s: a computation, or whoever it waits for, takes longer", PATIENCE)
        leave(self._code)
