"""`status`, for many at once: one question to the stages below for all who wait, whoever of them leaves."""

import threading
from collections.abc import Callable, Iterator

import pytest
from processes import eventually

from minigpt.protocol.messages import StageReport
from minigpt.stage.below import Below, Reports
from transport.errors import Closed


class Slow:
    """Stages below that answer when they are let."""

    def __init__(self) -> None:
        self.asked = 0
        self.free = threading.Semaphore(0)
        self.below = Below(self.ask)
        self.told: list[Reports] = []
        self.left: list[Closed] = []
        self.threads: list[threading.Thread] = []

    def ask(self) -> Reports:
        self.asked += 1
        number = self.asked
        assert self.free.acquire(timeout=60)
        return (StageReport(stage=1, steps=number),)

    def come(self, check: Callable[[], None] = lambda: None) -> None:
        def wait() -> None:
            try:
                self.told.append(self.below.reports(check))
            except Closed as closed:
                self.left.append(closed)

        self.threads.append(threading.Thread(target=wait))
        self.threads[-1].start()

    def end(self) -> None:
        for thread in self.threads:
            thread.join(60)


def test_all_who_wait_are_told_by_one_question_that_was_asked_after_theirs() -> None:
    slow = Slow()
    slow.come()
    assert eventually(lambda: slow.asked == 1)
    for _ in range(20):
        slow.come()
    assert slow.asked == 1
    slow.free.release()
    assert eventually(lambda: slow.asked == 2)
    slow.free.release()
    slow.end()
    assert sorted(reports[0].steps or 0 for reports in slow.told) == [1] + [2] * 20


def test_who_leaves_waits_no_longer_and_holds_nobody_up() -> None:
    slow = Slow()
    slow.come()
    assert eventually(lambda: slow.asked == 1)

    def gone() -> None:
        raise Closed("the client has left")

    slow.come(gone)
    assert eventually(lambda: len(slow.left) == 1)
    slow.come()
    slow.free.release(2)
    slow.end()
    assert slow.asked == 2
    assert len(slow.told) == 2


def test_a_question_that_fails_is_asked_again_by_the_next() -> None:
    answers: Iterator[OSError | Reports] = iter([OSError("broken"), (StageReport(stage=1),)])

    def ask() -> Reports:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    below = Below(ask)
    with pytest.raises(OSError, match="broken"):
        below.reports(lambda: None)
    assert below.reports(lambda: None) == (StageReport(stage=1),)
