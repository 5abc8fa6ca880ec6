"""Who is given evidence next, where the platform is slow, and that every wait for it ends."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from ends import background
from processes import eventually

from attest import AttestationError, Binding, Evidence, Provider
from minigpt.stage import evidence
from minigpt.stage.evidence import EvidenceQueue, Ticket

CLAIMS = b"\x80"


def binding(number: int) -> Binding:
    return Binding("R", Provider.MOCK, bytes([number]) * 32, bytes(32), CLAIMS)


class Platform:
    """Answers when it is told to. `asked` is what it was asked, in order."""

    provider = Provider.MOCK
    claims = CLAIMS

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._answers = threading.Semaphore(0)

    def attest(self, binding: Binding) -> Evidence:
        self.asked.append(binding.handshake_hash[0])
        assert self._answers.acquire(timeout=60)
        return Evidence(self.provider, self.claims, binding.digest, ())

    def give(self, count: int = 1) -> None:
        self._answers.release(count)


class Waiting:
    """Tickets that wait, in threads of their own."""

    def __init__(self, patience: float = 60.0) -> None:
        self.platform = Platform()
        self.queue = EvidenceQueue(self.platform, patience)
        self.threads: list[Any] = []

    def ask(self, source: str | None, *, first: bool = False, left: Callable[[], bool] = lambda: False) -> Ticket:
        """One more who waits; this returns when it does."""
        ticket = self.queue.ticket(source, left, first=first)
        number = len(self.threads)
        self.threads.append(background(ticket.attest, binding(number)))
        assert eventually(lambda: number in self.platform.asked or self.known(number))
        return ticket

    def known(self, number: int) -> bool:
        return any(request.binding == binding(number) for request in list(self.queue._waiting))

    def served(self) -> list[int]:
        """All answers are given; the order in which they were asked for."""
        self.platform.give(len(self.threads))
        for number, thread in enumerate(self.threads):
            assert thread.join().evidence == binding(number).digest
        return self.platform.asked


def test_everyone_gets_an_answer_of_their_own_and_the_platform_one_request_at_a_time() -> None:
    waiting = Waiting()
    for _ in range(3):
        waiting.ask("tcp://a")
    assert waiting.platform.asked == [0]
    assert waiting.served() == [0, 1, 2]


def test_ourselves_and_listed_clients_come_before_strangers() -> None:
    waiting = Waiting()
    for source, first in (("tcp://a", False), ("tcp://a", False), ("tcp://b", True), (None, True)):
        waiting.ask(source, first=first)
    assert waiting.served() == [0, 3, 2, 1]


def test_whoever_has_shown_accepted_evidence_comes_before_strangers() -> None:
    waiting = Waiting()
    waiting.queue.know("tcp://stage")
    for source in ("tcp://a", "tcp://a", "tcp://stage"):
        waiting.ask(source)
    assert waiting.served() == [0, 2, 1]


def test_a_source_waits_behind_those_that_have_cost_less() -> None:
    waiting = Waiting()
    waiting.ask("tcp://flood")
    time.sleep(0.05)  # what it costs
    waiting.platform.give()
    waiting.threads[0].join()
    waiting.ask("tcp://x")
    for source in ("tcp://flood", "tcp://flood", "tcp://honest"):
        waiting.ask(source)
    assert waiting.served() == [0, 1, 4, 2, 3]


def test_a_platform_that_never_answers_ends_no_wait_late() -> None:
    waiting = Waiting(patience=0.3)
    for _ in range(3):
        waiting.ask("tcp://a")
    for thread in waiting.threads:
        with pytest.raises(AttestationError, match="the platform gave none in 0 s"):
            thread.join()
    assert waiting.platform.asked == [0]
    waiting.platform.give(2)  # the late answer is nobody's
    ticket = waiting.queue.ticket("tcp://a", first=False)
    assert eventually(lambda: waiting.queue._asked is None)
    assert ticket.attest(binding(9)).evidence == binding(9).digest


def test_a_peer_that_leaves_is_not_asked_for() -> None:
    waiting, left = Waiting(), threading.Event()
    waiting.ask("tcp://a")
    waiting.ask("tcp://b", left=left.is_set)
    left.set()
    with pytest.raises(AttestationError, match="left"):
        waiting.threads[1].join()
    waiting.platform.give()
    waiting.threads[0].join()
    assert waiting.platform.asked == [0]


def test_those_who_wait_are_bounded_and_the_last_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MOST", 2)
    waiting = Waiting()
    for _ in range(3):
        waiting.ask("tcp://a")
    waiting.threads.append(background(waiting.queue.ticket(None, first=True).attest, binding(3)))
    with pytest.raises(AttestationError, match="2 others wait"):
        waiting.threads[2].join()
    waiting.platform.give(3)
    for number in (0, 1, 3):
        assert waiting.threads[number].join().evidence == binding(number).digest
    assert waiting.platform.asked == [0, 3, 1]


def test_strangers_fill_it_for_nobody_known_and_no_source_fills_it_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MOST", 4)
    waiting, dropped = Waiting(), []

    def drop(source: str | None, first: bool, number: int) -> None:
        """One more asks, and `number` is dropped."""
        waiting.threads.append(
            background(waiting.queue.ticket(source, first=first).attest, binding(len(waiting.threads)))
        )
        with pytest.raises(AttestationError, match="4 others wait"):
            waiting.threads[number].join()
        dropped.append(number)

    for source in ("tcp://flood", "tcp://flood", "tcp://flood", "tcp://flood", "tcp://flood"):  # 0 is asked for
        waiting.ask(source)
    drop("tcp://other", False, 4)
    drop("tcp://flood", False, 6)
    drop("tcp://listed", True, 3)
    drop("tcp://listed", True, 2)
    drop("tcp://listed", True, 5)  # of those with as many, the latest
    drop(None, True, 1)
    drop("tcp://other", False, 11)  # a stranger, while those who wait are not
    drop("tcp://next", True, 9)  # and of those the source with the most
    waiting.platform.give(12)
    for number, thread in enumerate(waiting.threads):
        if number not in dropped:
            assert thread.join().evidence == binding(number).digest
    assert waiting.platform.asked == [0, 10, 7, 12, 8]


def test_an_error_of_the_platform_is_that_of_one_request() -> None:
    class Fails(Platform):
        def attest(self, binding: Binding) -> Evidence:
            raise AttestationError("device")

    queue = EvidenceQueue(Fails(), 60.0)
    for number in range(2):
        with pytest.raises(AttestationError, match="device"):
            queue.ticket("tcp://a", first=False).attest(binding(number))


def test_a_ticket_waits_only_while_it_waits() -> None:
    waiting = Waiting()
    ticket = waiting.ask("tcp://a")
    assert ticket.waits
    waiting.served()
    assert not ticket.waits
    assert ticket.seconds > 0
