"""Signs of life: an end that owes an answer sends a PING every 5 s, however long it computes.

So whoever waits can tell a peer that computes from one that is stopped, stuck behind a relay, or gone: TCP's keep-alive
tells none of the three, because a kernel or a relay answers it. PINGs come from a thread of their own, one for the
process.
"""

import threading
import time

from transport.channel import Channel
from transport.fork import own
from transport.session import PING_INTERVAL

_LOOK = 1.0  # seconds between two looks at what is due; so an answer that takes less costs no PING
_RETRY = 60.0  # seconds until a thread is asked for again, where the system gave none


class Pinger:
    """Keeps those alive who wait for this process. Where the system gives it no thread, it does nothing."""

    def __init__(self) -> None:
        self.disown()
        own(self)

    def disown(self) -> None:
        """In the child of a fork, which has neither the thread nor the channels: starts afresh."""
        self._dues: set[Due] = set()
        self._starting = threading.Lock()
        self._running = False
        self._retry = 0.0

    def due(self, channel: Channel) -> "Due":
        """`with pinger.due(channel):` around the time in which this end owes an answer on it. Costs about a µs."""
        if not self._running:
            self._start()
        return Due(self._dues, channel)

    def _start(self) -> None:
        with self._starting:
            if self._running or time.monotonic() < self._retry:
                return
            try:
                threading.Thread(target=self._run, args=(self._dues,), name="pinger", daemon=True).start()
                self._running = True
            except RuntimeError:  # whoever waits takes a long computation for death: better than no answer to anyone
                self._retry = time.monotonic() + _RETRY

    def _run(self, dues: "set[Due]") -> None:
        seen: dict[Channel, float] = {}  # when each was first seen to be due, in all looks since
        while True:
            time.sleep(_LOOK)
            now = time.monotonic()
            seen = {channel: seen.get(channel, now) for channel in {due.channel for due in dues.copy()}}
            for channel, since in seen.items():
                if now - max(since, channel.spoke) > PING_INTERVAL - _LOOK / 2:
                    channel.ping()


class Due:
    """One answer that is due. Adding to a set and taking out of it needs no lock, and wakes nobody."""

    __slots__ = ("_dues", "channel")

    def __init__(self, dues: "set[Due]", channel: Channel) -> None:
        self._dues = dues
        self.channel = channel

    def begin(self) -> None:
        self._dues.add(self)

    def end(self) -> None:
        self._dues.discard(self)

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *error: object) -> None:
        self.end()


PINGER = Pinger()  # this process's
