"""What becomes of a request when a link or a stage dies: whether it is asked again, when, and for what.

There is no I/O here, and clock and chance are passed in: the pipeline reports what happens, and does what it is told.

    rest ──asked──► told, told, … ──fault──► wait ──► rest, with what was delivered as a part of the prompt

A token depends on the seed, its position and those before it, so the text goes on as it would have. (The positions
before the seam are computed in chunks this time, and differ in their last bits: a near tie may resolve differently.)
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace

from minigpt.errors import LateStage, MessageError, RequestRefused, StageError, UnreachableStage, UntrustedStage
from minigpt.protocol.messages import Answer, Generate, Logits, Reason, Scores, Tokens, Wanted
from minigpt.protocol.request import ending

RETRY_FOR = 30.0  # seconds
FIRST, LAST = 0.05, 2.0  # seconds between two tries, doubling; each times a random 0.5 to 1
DEATHS = 2  # that a request may see while it is computed: it could be what kills them

Fault = StageError | RequestRefused


class Resumption:
    """One request, over all the links that it takes.

    Args:
        request: as the caller made it.
        n_positions: the model's.
        retry_for: seconds to try for, from a fault until answers come again; 0 to end with the first fault.
        interruptions: each fault that the request survives is added to these.
        clock: seconds, never backwards.
        chance: gives a number from 0 to 1.
    """

    def __init__(
        self,
        request: Generate,
        n_positions: int,
        retry_for: float,
        interruptions: list[str],
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._request = request
        self._n_positions = n_positions
        self._retry_for = retry_for
        self._interruptions = interruptions
        self._clock = clock
        self._chance = chance
        self._delivered: list[int] = []
        self._scored = 0  # ids
        self._asked = self._answered = False
        self._deaths: list[str] = []
        self._cause = ""  # of the interruption that lasts
        self._since = 0.0  # when it began
        self._tries = 0  # since then

    def rest(self) -> Generate:
        """What is to be asked now."""
        self._asked = True
        request, count = self._request, len(self._delivered)
        if not count:
            return request
        ids = (*request.ids, *self._delivered)
        delivered = request.delivered + count
        return replace(request, ids=ids, max_tokens=request.max_tokens - count, delivered=delivered)

    def told(self, answer: Answer) -> None:
        """Takes note of an answer, before the caller gets it."""
        match answer:
            case Logits():
                self._answered = True
            case Scores():  # all of them come again over another link: they are soon computed
                self._scored = answer.position + len(answer.logprobs) - self._request.start
            case Tokens():
                self._delivered += answer.ids
        if self._cause:
            self._interruptions.append(self._cause)
            self._cause, self._tries = "", 0

    @property
    def reason(self) -> Reason | None:
        """Why the request is complete, if it is: what was lost then is no more than the word for it."""
        if self._answered:
            return Reason.LOGITS
        if self._scored == len(self._request.ids):
            return Reason.SCORES
        if not self._delivered:
            return None
        return ending(self._request, self._n_positions, len(self._delivered), self._delivered[-1])

    def fault(self, error: Fault, *, again: bool) -> float | None:
        """Takes note of a fault. Returns the seconds to wait before the rest is asked, or None if nothing is missing.

        Args:
            again: whether anything can be asked again.

        Raises:
            StageError, RequestRefused: the request ends with this. It says how many tokens had arrived.
        """
        if not (again and self._retry_for > 0 and self._transient(error)):
            ended = self.end(error)
            raise ended from (None if ended is error else error)
        if self.reason is not None:
            return None
        now = self._clock()
        if not self._cause:
            self._cause, self._since = str(error), now
        if isinstance(error, StageError) and not isinstance(error, UnreachableStage):
            self._deaths.append(str(error))
            if len(self._deaths) >= DEATHS:
                text = f"a link or stage has died {DEATHS} times while this request was computed, so it is given up"
                raise self.end(error, f"{text}. Before, {self._deaths[0]}") from error
        left = self._since + self._retry_for - now
        if left <= 0:
            raise self.end(error, f"given up after {now - self._since:.1f} s of trying") from error
        wait = min(FIRST * 2.0 ** min(self._tries, 10), LAST) * (0.5 + self._chance() / 2)
        self._tries += 1
        return min(wait, left)

    def _transient(self, error: Fault) -> bool:
        """Whether another link may do better, now or later."""
        if isinstance(error, RequestRefused):  # a place that was had once is worth waiting for
            return error.reason == "draining" or (error.reason == "busy" and bool(self._delivered or self._cause))
        return not isinstance(error, UntrustedStage | MessageError | LateStage)

    def end(self, error: Fault, why: str = "") -> Fault:
        """An error of the same kind that also says how far the request got."""
        parts = [str(error)]
        if self._asked and self._request.wanted is Wanted.TOKEN:
            count = len(self._delivered)
            parts.append(f"{count or 'no'} token{'s' if count > 1 else ''} had arrived")
        text = "; ".join([*parts, why] if why else parts)
        if isinstance(error, RequestRefused):
            if not (self._delivered or self._cause):  # it was refused at once: there is nothing to say
                return error
            return type(error)(text, reason=error.reason, stage=error.stage)
        ended = type(error)(text, stage=error.stage)
        vars(ended).update(vars(error))  # the checks of evidence
        return ended
