"""What the stages after this one report: one asks at a time, and all who wait for it are told."""

import threading
from collections.abc import Callable

from minigpt.protocol.messages import StageReport

LOOK = 0.25  # seconds between two looks at whether somebody still waits

Reports = tuple[StageReport, ...]


class Below:
    """Asks the next stage by `ask`, in the thread of whoever wants to know. For any number of threads.

    However many want to know at once, and however many of them have left meanwhile, the next stage is asked one
    question, over one link: each other would cost it a handshake, with evidence.
    """

    def __init__(self, ask: Callable[[], Reports]) -> None:
        self._ask = ask
        self._begun = self._answered = 0  # numbers of questions
        self._asks = False  # whether one is under way
        self._reports: Reports = ()  # the last answer
        self._changed = threading.Condition()

    def reports(self, check: Callable[[], None]) -> Reports:
        """The answer to a question that was asked after this call. While it waits for its turn, it calls `check`, which
        raises if nobody wants the answer any more. Raises what `ask` does, where this is who asks."""
        with self._changed:
            wanted = self._begun + 1
            while self._asks and self._answered < wanted:
                self._changed.wait(LOOK)
                check()
            if self._answered >= wanted:
                return self._reports
            self._asks, self._begun = True, self._begun + 1
            number = self._begun
        try:
            found = self._ask()
            with self._changed:
                self._answered, self._reports = number, found
        finally:
            with self._changed:
                self._asks = False
                self._changed.notify_all()
        return found
