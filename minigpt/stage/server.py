"""Accepts the channels of a stage, one thread for each, and makes room for newcomers."""

import ctypes
import itertools
import logging
import threading
import time
from typing import Any

from minigpt.protocol import links
from minigpt.protocol.messages import StageReport
from minigpt.stage.clients import ClientConversation
from minigpt.stage.conversation import Conversation, State
from minigpt.stage.stage import Stage
from minigpt.stage.upstream import UpstreamConversation
from transport.channel import Channel, Listener

log = logging.getLogger("minigpt.stage")

YOUNG = 1.0  # seconds; a channel that has been silent for less is not ended for a newcomer
M_ARENA_MAX = -8  # of malloc.h
HANDSHAKE_SHARE = 0.1  # of one core, spent on handshakes; at 5 ms each, 20 a second


class Pace:
    """Limits what is spent on something to a share of the time, with bursts of up to a second."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._free = 0.0  # when everything spent so far is made up for
        self._lock = threading.Lock()

    def spend(self, seconds: float) -> None:
        with self._lock:
            self._free = max(self._free, time.monotonic() - 1.0) + seconds / self._share

    def delay(self) -> float:
        """Seconds to wait before more is spent."""
        return max(0.0, self._free - time.monotonic())


def _share_heap() -> None:
    """Lets all threads allocate from one heap. The GNU C library gives most threads one of their own, and keeps up to
    64 MB in each that nobody uses: as much as all the messages that strangers have ever sent at once."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


class Server:
    """Serves a stage's channels."""

    def __init__(self, stage: Stage, exposed: str = "") -> None:
        self.stage = stage
        self._exposed = exposed  # what this process could not lock down
        self.open: dict[int, Conversation] = {}  # by number; handshakes under way included
        self._pace = Pace(HANDSHAKE_SHARE)
        _share_heap()
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def serve(self, listener: Listener) -> None:
        """Accepts channels until `stop` is called."""
        for number in itertools.count(1):
            self.stage.stopping.wait(self._pace.delay())  # newcomers wait in the listener's queue meanwhile
            accepted = listener.accept()
            if accepted is None:
                return
            sock, peer = accepted
            kind = UpstreamConversation if self.stage.index else ClientConversation
            conversation: Conversation = kind(self.stage, number, peer, sock, self)
            with self._lock:
                unwanted = self._least_wanted()
                if unwanted is not None:
                    del self.open[unwanted.number]
                full = len(self.open) >= self.stage.limits.channels
                if not full:
                    self.open[number] = conversation
            if unwanted is not None:
                unwanted.turn_out()
            if full:
                log.warning("%s: turned away, %d channels are open", peer, self.stage.limits.channels)
                sock.close()
                continue
            try:
                threading.Thread(target=conversation.run, name=f"channel {number}", daemon=True).start()
            except RuntimeError:  # the system gives no thread: this stage is as full as one with all its channels
                log.warning("%s: turned away, the system gives no more threads", peer)
                self.forget(number)
                sock.close()

    def _least_wanted(self) -> Conversation | None:
        """The conversation to end for a newcomer; None if there is room, or if all are busy.

        With too many handshakes under way, the oldest of them: an honest one takes milliseconds. With too many
        channels, a handshake, else the channel that has been idle longest.
        """
        waiting = [one for one in self.open.values() if one.state in (State.OPENING, State.IDLE)]
        waiting.sort(key=lambda one: one.since)
        strangers = [one for one in waiting if one.state is State.OPENING]
        if len(strangers) >= self.stage.limits.handshakes:
            return strangers[0]
        if len(self.open) < self.stage.limits.channels:
            return None
        silent = [one for one in waiting if time.monotonic() - one.since > YOUNG]
        return next(iter(strangers + silent), None)

    def accept(self, sock: Any) -> Channel:
        """The handshake of a new channel."""
        began = time.thread_time()
        self.stage.manifest.check_time(time.time())
        try:
            stage = self.stage
            end = links.answering_end(stage.manifest, stage.index, stage.attester)
            most = links.largest(stage.manifest, stage.index)
            return Channel.accept(sock, end, deadlines=stage.limits.deadlines, budget=stage.budget, max_message=most)
        finally:
            self._pace.spend(time.thread_time() - began)

    def forget(self, number: int) -> None:
        with self._lock:
            self.open.pop(number, None)

    def stop(self, patience: float = 2.0) -> None:
        """Ends every channel, at the next token if it is generating; waits `patience` seconds at most."""
        self.stage.stop()
        with self._lock:
            conversations = list(self.open.values())
        for conversation in conversations:
            conversation.stop()
        until = time.monotonic() + patience
        while self.open and time.monotonic() < until:
            time.sleep(0.01)

    def report(self) -> StageReport:
        """This stage's state."""
        with self._lock:
            conversations = list(self.open.values())
        meter, now = self.stage.layers.meter, time.monotonic()
        return StageReport(
            stage=self.stage.index,
            uptime=now - self._began,
            weights_bytes=self.stage.model.nbytes,
            channels=len(conversations),
            sequences=self.stage.places.sequences,
            cache_bytes=self.stage.places.reserved,
            steps=self.stage.layers.steps,
            tokens=meter.tokens,
            rate=meter.rate(now),
            batch=meter.batch(now),
            queue=self.stage.places.waiting,
            cache_limit=self.stage.places.total,
            exposed=self._exposed,
        )
