"""A stage's evidence: the platform answers one request at a time, perhaps slowly; whose is next is decided here.

Each handshake has a `Ticket`, and each ticket a request and an answer of its own: no answer serves two handshakes.
First come our own links to the next stage, listed clients, and sources that have shown accepted evidence before; then
whoever's source has cost the platform least. No wait is longer than a deadline, even if the platform never answers.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable

from attest import AttestationError, Attester, Binding, Evidence, Provider
from minigpt.stage.newcomers import Accounts

SHARE = 0.8  # of a handshake's time: so long its evidence may take, and the rest is for the two ends
LOOK = 0.1  # seconds between two looks at whether somebody who waits has left
MOST = 64  # who wait; one more ends a stranger's, else one of whoever has most, the last of these
KNOWN = 256  # sources


class Ticket:
    """One handshake's attester. `source` is whom it is for, None for ourselves; `left` whether that end has gone."""

    def __init__(
        self, queue: "EvidenceQueue", source: str | None, first: bool, left: Callable[[], bool] = lambda: False
    ) -> None:
        self.source = source
        self.first = first
        self.left = left
        self.asked = False  # whether its peer has come so far that it is given evidence: it has sent message 3
        self.waits = False  # for the platform: nothing that its peer does shortens that
        self.seconds = 0.0  # of the processor that its evidence has cost
        self._queue = queue

    @property
    def provider(self) -> Provider:
        return self._queue.attester.provider

    @property
    def claims(self) -> bytes:
        return self._queue.attester.claims

    def attest(self, binding: Binding) -> Evidence:
        """As the platform's attester. Raises AttestationError also if that takes too long, or the peer has left."""
        self.asked = self.waits = True
        try:
            return self._queue.answer(self, binding)
        finally:
            self.waits = False


class _Request:
    def __init__(self, ticket: Ticket, binding: Binding, number: int) -> None:
        self.ticket = ticket
        self.binding = binding
        self.number = number
        self.dropped = False
        self.evidence: Evidence | None = None
        self.error: BaseException | None = None


class EvidenceQueue:
    """Those who wait for an attester. For any number of threads.

    Args:
        patience: seconds that evidence may take, with the wait for others'.
    """

    def __init__(self, attester: Attester, patience: float) -> None:
        self.attester = attester
        self._patience = patience
        self._waiting: list[_Request] = []
        self._asked: _Request | None = None  # of the platform, now
        self._accounts = Accounts()  # seconds of the platform
        self._known: dict[str, None] = {}  # sources, the oldest first
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    def ticket(self, source: str | None = None, left: Callable[[], bool] = lambda: False, *, first: bool) -> Ticket:
        """For one handshake; those of known sources are `first` too."""
        return Ticket(self, source, first or source in self._known, left)

    def know(self, source: str) -> None:
        """Somebody at `source` has shown accepted evidence."""
        with self._changed:
            self._known[source] = None
            if len(self._known) > KNOWN:
                del self._known[next(iter(self._known))]

    def answer(self, ticket: Ticket, binding: Binding) -> Evidence:
        """The platform's answer for one ticket, when its turn comes. Raises as `Ticket.attest`."""
        until = time.monotonic() + self._patience
        request = _Request(ticket, binding, next(self._numbers))
        with self._changed:
            self._waiting.append(request)
            if len(self._waiting) > MOST:
                last = self._last()
                last.dropped = True
                self._waiting.remove(last)
                self._changed.notify_all()
            try:
                while request.evidence is None and request.error is None:
                    self._begin_next()
                    if request.dropped:
                        raise AttestationError(f"evidence: {MOST} others wait for the platform")
                    if ticket.left():
                        raise AttestationError("evidence: the peer left while it waited for it")
                    left = until - time.monotonic()
                    if left <= 0:
                        raise AttestationError(f"evidence: the platform gave none in {self._patience:.0f} s")
                    self._changed.wait(min(left, LOOK))
            finally:
                if request in self._waiting:
                    self._waiting.remove(request)
                    self._begin_next()  # somebody else's may be due
        if request.evidence is None:
            assert request.error is not None, "a request that has ended has either"
            raise request.error
        return request.evidence

    def _in_order(self) -> list[_Request]:
        """Those who wait, whoever is next first."""
        sources = {request.ticket.source for request in self._waiting}
        cost = {source: self._accounts.spent(source) if source else -1.0 for source in sources}  # it falls: ask once
        return sorted(self._waiting, key=lambda one: (not one.ticket.first, cost[one.ticket.source], one.number))

    def _last(self) -> _Request:
        """Who is dropped: not we ourselves; strangers first, and the latest of the source with the most."""
        number = Counter(request.ticket.source for request in self._waiting)
        return max(
            reversed(self._in_order()),
            key=lambda one: (one.ticket.source is not None, not one.ticket.first, number[one.ticket.source]),
        )

    def _begin_next(self) -> None:
        while self._asked is None and self._waiting:
            request = self._in_order()[0]
            self._waiting.remove(request)
            try:  # a thread for it, because nothing ends a call that a device does not answer
                threading.Thread(target=self._ask, args=(request,), name="evidence", daemon=True).start()
            except RuntimeError as error:  # the system gives none
                request.error = error
                self._changed.notify_all()
            else:
                self._asked = request

    def _ask(self, request: _Request) -> None:
        """One request to the platform. A thread's only function."""
        began = time.monotonic()
        try:
            request.evidence = self.attester.attest(request.binding)
        except BaseException as error:
            request.error = error
        with self._changed:
            request.ticket.seconds += time.thread_time()
            if request.ticket.source:
                self._accounts.spend(request.ticket.source, time.monotonic() - began)
            self._asked = None
            self._begin_next()
            self._changed.notify_all()
