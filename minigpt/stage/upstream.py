"""The channel of the stage before, in all stages but the first: batches in, answers out, in order.

A stage in the middle sends each batch on as soon as it is computed, and a second thread brings the answers back: so a
batch can be computed here while the next stage computes another.
"""

import logging
import math
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

from minigpt.errors import INSIDE, MessageError, StageError
from minigpt.protocol import batches, messages
from minigpt.protocol.batches import Result
from minigpt.protocol.batchlink import BatchLink
from minigpt.protocol.messages import Answer, Done, Reason, Span
from minigpt.protocol.request import Traffic, span, with_span
from minigpt.stage.conversation import Conversation
from minigpt.stage.lanes import Lanes, Taken
from minigpt.stage.sequence import send_on
from transport.channel import Channel
from transport.errors import TransportError
from transport.liveness import PINGER, Due

log = logging.getLogger("minigpt.stage")

MOST = 4  # batches under way on one link; a stage before this one has two
LOOK = 1.0  # seconds
QUIET = 2.0  # seconds without a step, after which a link that drains is taken to have no answer under way


class _Sent(NamedTuple):
    """A batch whose answers are awaited; `link` is None if it was not sent on, because all of it is refused."""

    taken: Taken
    link: BatchLink | None
    computed: float  # seconds
    sent: float  # time.perf_counter()
    traffic: Traffic  # before it


class UpstreamConversation(Conversation):
    """Its sequences are dropped, here and in the stages after this one, as soon as the stage before is gone."""

    _asked = frozenset({messages.Status, messages.Reset})

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lanes = Lanes(self._stage.layers, self._stage.places)
        self._link: BatchLink | None = None
        self._sent: deque[_Sent] = deque()
        self._owed: Due | None = None  # while answers come back by the other thread
        self._lock = threading.Lock()  # of the order of answers
        self._worked = -math.inf  # when a step was last computed, here or in a later stage

    def _answer(self, channel: Channel, plain: Any) -> bool:
        if type(plain) is list:
            self._batch(channel, plain)
            return True
        match messages.decode(plain, self._asked, self._here):
            case messages.Status():
                self._report(channel)
            case messages.Reset():
                self._forget()
                self._send(channel, Done(Reason.RESET))
        return False

    def _batch(self, channel: Channel, plain: list[Any]) -> None:
        if self._stage.stopping.is_set():
            raise self._stopped()
        batch = batches.decode(plain, self._stage.model.config.n_embd)
        if len(self._sent) >= MOST:
            raise MessageError(f"batch: got one more while {MOST} are under way")
        taken = self._lanes.take(batch)
        if not batch.answered:
            return
        layers = self._stage.layers
        if not taken.parts:
            with self._lock:
                if self._sent:
                    self._sent.append(_Sent(taken, None, 0.0, 0.0, (0.0, 0.0, 0.0)))
                else:
                    self._tell(channel, taken.results)
            return
        hidden, results, computed = layers.compute(taken.parts)
        self._worked = time.monotonic()
        if layers.model.is_last:
            own = Span(computed, 0.0, 0.0, 0.0, 0.0)
            self._tell(channel, taken.merge(with_spans(taken, results, own)))
            layers.count(results)
            return
        link = self._linked(channel)
        with self._lock:
            if self._owed is None:
                self._owed = PINGER.due(channel)
            self._owed.begin()
            self._sent.append(_Sent(taken, link, computed, time.perf_counter(), link.traffic))
        send_on(link, taken.sequences, taken.parts, hidden)

    def _linked(self, channel: Channel) -> BatchLink:
        """The link to the next stage, and a thread that brings back what it answers."""
        if self._link is None:
            self._link = self._stage.batch_link()
            back = threading.Thread(target=self._bring_back, args=(channel, self._link), daemon=True)
            back.start()
        return self._link

    def _bring_back(self, channel: Channel, link: BatchLink) -> None:
        """Passes answers on until the link or the channel has ended. A thread's first function."""
        try:
            while link.await_answers(LOOK):
                results = link.receive_answers()
                with self._lock:
                    sent = self._sent.popleft()
                    self._worked = time.monotonic()
                    own = span(sent.computed, time.perf_counter() - sent.sent, sent.traffic, link.traffic)
                    self._tell(channel, sent.taken.merge(with_spans(sent.taken, list(results), own)))
                    while self._sent and self._sent[0].link is None:
                        self._tell(channel, self._sent.popleft().taken.results)
                    if not self._sent and self._owed is not None:
                        self._owed.end()
                self._stage.layers.count(results)
        except StageError as error:
            log.warning("%s: %s", self._name, error)
            with suppress(TransportError):
                self._fail(channel, error)
        except TransportError:
            pass  # the channel's own thread says why
        except Exception as error:  # its text may hold what the peer sent
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: ended by %s\n%s", self._name, type(error).__name__, where)
            with suppress(TransportError):
                self._fail(channel, StageError(f"{self._here} {INSIDE}"))
        finally:
            channel.deafen()  # nothing can be answered any more

    def _rests(self) -> bool:
        # The stage before keeps lanes of which nobody asks anything, so this one cannot tell which have an answer
        # under way. What is refused is no sign of one: those who are refused ask again.
        return not self._sent and (not self._lanes or time.monotonic() - self._worked > QUIET)

    def _tell(self, channel: Channel, results: list[Result]) -> None:
        channel.send(batches.encode_answers(results))

    def _forget(self) -> None:
        self._lanes.end_all()

    def _end(self) -> None:
        try:
            super()._end()
        finally:
            if self._owed is not None:
                self._owed.end()
            if self._link is not None:
                self._link.close()


def with_spans(taken: Taken, results: list[Result], own: Span) -> list[Result]:
    """The results, with this stage's span in those that shall have spans."""
    return [
        with_span(result, own) if part.ask.spans and isinstance(result, Answer) else result
        for part, result in zip(taken.parts, results, strict=True)
    ]
