"""Whose handshake begins next, and when: all together are paced, and whoever's source has cost least goes first.

A source is an address without its port. Clients behind a relay are one source: they may wait longer, and are served.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

from transport.link import Opening
from transport.sockets import has_left

SHARE = 0.1  # of one core, spent on handshakes; at 5 ms each, 20 a second
WORST = 0.025  # seconds of the processor that one handshake costs at worst
MEMORY = 60.0  # seconds, after which a third of what a source has cost still counts
SOURCES = 1024  # accounts, 200 bytes each
LOOK = 0.05  # seconds between two looks at those who wait: a handshake may have ended
WAITING = 128  # newcomers: as many again wait in the listener's queue

Newcomer = tuple[Any, str, Opening]  # its socket, the peer's address, and what it has said


class Pace:
    """Limits what is spent on something to a share of the time, with bursts of up to a second."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._free = -math.inf  # when everything spent so far is made up for
        self._lock = threading.Lock()

    def spend(self, seconds: float) -> None:
        with self._lock:
            self._free = max(self._free, time.monotonic() - 1.0) + seconds / self._share

    @property
    def lasts(self) -> bool:
        """Whether anything that was spent still counts."""
        return self._free > time.monotonic() - 1.0

    def delay(self) -> float:
        """Seconds to wait before more is spent."""
        return max(0.0, self._free - time.monotonic())


def source_of(peer: str) -> str:
    """Where `peer` connects from: tcp://192.0.2.1 or vsock://3."""
    return peer.rpartition(":")[0]


class Accounts:
    """What each source has cost lately, in seconds of whatever it is. For any number of threads."""

    def __init__(self) -> None:
        self._spent: dict[str, tuple[float, float]] = {}  # by source: seconds, and when that was so
        self._lock = threading.Lock()

    def spend(self, source: str, seconds: float) -> None:
        with self._lock:
            self._spent[source] = self.spent(source) + seconds, time.monotonic()
            if len(self._spent) > SOURCES:
                del self._spent[min(self._spent, key=self.spent)]

    def spent(self, source: str) -> float:
        seconds, since = self._spent.get(source, (0.0, 0.0))
        return seconds * math.exp((since - time.monotonic()) / MEMORY)


class Newcomers:
    """Connections whose handshakes have not begun. One thread has them; any thread may `spend`."""

    def __init__(self) -> None:
        self._waiting: list[Newcomer] = []  # the oldest first
        self._pace, self._ahead = Pace(SHARE), Pace(SHARE)
        self._accounts = Accounts()  # seconds of the processor

    def add(self, newcomer: Newcomer) -> Newcomer | None:
        """Returns the one that there is no room for, if so: the latest of the source with the most."""
        self._waiting.append(newcomer)
        if len(self._waiting) <= WAITING:
            return None
        [(most, _)] = Counter(source_of(peer) for _, peer, _ in self._waiting).most_common(1)
        unwanted = next(one for one in reversed(self._waiting) if source_of(one[1]) == most)
        self._waiting.remove(unwanted)
        return unwanted

    def following(self, busy: Collection[str], crowded: Collection[str]) -> tuple[float, Newcomer | None]:
        """Whose handshake begins next, and in how many seconds, as it looks now; look again after these.

        Nobody waits for what only others have cost: while the pace makes all wait, those of a source that has no
        handshake under way, and so is not `busy`, go ahead one at a time. Those of a `crowded` source would end a
        handshake of their own, so they wait while there is room. Those that have left are forgotten.
        """
        self._forget_left()
        choice = self._waiting
        if len(choice) <= WAITING // 2:
            choice = [one for one in choice if source_of(one[1]) not in crowded]
        delay = self._pace.delay()
        if delay > 0 and (rested := [one for one in choice if source_of(one[1]) not in busy]):
            delay, choice = min(delay, self._ahead.delay()), rested
        if not choice:
            return LOOK if self._waiting else math.inf, None
        cost = {source: self.spent(source) for source in {source_of(one[1]) for one in choice}}  # it falls: ask once
        return min(delay, LOOK), min(choice, key=lambda one: cost[source_of(one[1])])

    def _forget_left(self) -> None:
        for newcomer in [one for one in self._waiting if has_left(one[0])]:
            self._waiting.remove(newcomer)
            newcomer[0].close()

    def take(self, newcomer: Newcomer) -> None:
        """Its handshake begins."""
        self._waiting.remove(newcomer)
        if self._pace.delay() > 0:
            self._ahead.spend(WORST)  # what it will have cost is not known yet

    def spend(self, source: str, seconds: float) -> None:
        """A handshake has cost `seconds` of the processor."""
        self._pace.spend(seconds)
        self._accounts.spend(source, seconds)

    def spent(self, source: str) -> float:
        """What a source has cost lately."""
        return self._accounts.spent(source)

    def close(self) -> None:
        for sock, _, _ in self._waiting:
            sock.close()
