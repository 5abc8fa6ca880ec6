"""Accepts the channels of a stage, one thread for each, and makes room for newcomers."""

import ctypes
import itertools
import logging
import random
import threading
import time
from collections import Counter
from typing import Any

from minigpt.errors import UnreachableStage
from minigpt.protocol import links
from minigpt.protocol.messages import StageReport
from minigpt.stage.clients import ClientConversation
from minigpt.stage.conversation import Conversation, State
from minigpt.stage.newcomers import WAITING, Newcomer, Newcomers, Pace
from minigpt.stage.places import Identity
from minigpt.stage.stage import Stage
from minigpt.stage.upstream import UpstreamConversation
from transport.channel import Channel, Listener
from transport.errors import TimedOut, TransportError
from transport.link import Opening, opening
from transport.sockets import Door, has_left

log = logging.getLogger("minigpt.stage")

LOOK = 0.05  # seconds between two looks at what still goes on while the process drains
YOUNG = 1.0  # seconds; a channel that has been silent for less is not ended for a newcomer
M_ARENA_MAX = -8  # of malloc.h
LINE = 0.01  # seconds from one line about strangers to the next, after a burst of 100
CROWDED = 0.002  # seconds between two newcomers that are turned away, as that costs something too
DICE = random.SystemRandom()  # nobody foresees it
GREED = 7  # times what is free, an identity may have of the channels: alone 7/8, so that it never has all of them


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
        self._numbers = itertools.count(1)
        self._newcomers = Newcomers()
        self._lines = Pace(1.0)
        self._paces: dict[Identity, Pace] = {}  # of those who have a channel, or had one and spent something lately
        self._untold = 0  # strangers that no line of the log tells of
        _share_heap()
        self._began = time.monotonic()
        self._lock = threading.Lock()

    @property
    def owing(self) -> int:
        """How many identities have spent more than their share on messages that do no useful work."""
        with self._lock:
            return sum(pace.delay() > 0 for pace in self._paces.values())

    def serve(self, listener: Listener) -> None:
        """Accepts channels until the listener is closed."""
        end = links.answering_end(self.stage.manifest, self.stage.index, self.stage.evidence.attester)
        door = Door(listener, lambda: opening(end), self._refused, self.stage.limits.visitors)
        while True:
            delay, newcomer = self._following()
            if newcomer is not None and delay <= 0:
                self._newcomers.take(newcomer)
                self._begin(*newcomer)
            try:
                accepted = door.accept(time.monotonic() + delay)
            except TimedOut:
                continue
            if accepted is None:
                door.close()
                self._newcomers.close()
                return
            unwanted = self._newcomers.add(accepted)
            if unwanted is not None:
                sock, peer, _ = unwanted
                log.warning("%s: turned away, %d newcomers wait, most of them from there", peer, WAITING)
                sock.close()
                time.sleep(CROWDED)

    def _refused(self, peer: str, error: TransportError) -> None:
        """A line for one of those who do not have the manifest. There may be very many of them, so only for some."""
        if self._lines.delay() > 0:
            self._untold += 1
            return
        self._lines.spend(LINE)
        others = f" (and {self._untold} others since the last such line)" if self._untold else ""
        self._untold = 0
        log.warning("newcomer (%s): %s: %s%s", peer, type(error).__name__, error, others)

    def _begin(self, sock: Any, peer: str, opened: Opening) -> None:
        """Starts the thread of a handshake, for which room is made."""
        kind = UpstreamConversation if self.stage.index else ClientConversation
        conversation: Conversation = kind(self.stage, next(self._numbers), peer, sock, self, opened)
        with self._lock:
            expendable = self._expendable()
            unwanted = DICE.choice(expendable) if expendable else None
            if unwanted is not None:
                del self.open[unwanted.number]
            self.open[conversation.number] = conversation
        if unwanted is not None:
            unwanted.turn_out()
        try:
            name = f"channel {conversation.number}"
            threading.Thread(target=conversation.run, name=name, daemon=True).start()
        except RuntimeError:  # the system gives no thread: this stage is as full as one with all its channels
            log.warning("%s: turned away, the system gives no more threads", peer)
            self.forget(conversation.number)
            sock.close()

    def _following(self) -> tuple[float, Newcomer | None]:
        with self._lock:
            busy, expendable = {one.source for one in self._strangers()}, self._expendable()
        now = time.monotonic()
        quick = all(one.waits or now - one.since < YOUNG for one in expendable)
        return self._newcomers.following(busy, {one.source for one in expendable} if quick else ())

    def _strangers(self) -> list[Conversation]:
        """The handshakes under way."""
        return [one for one in self.open.values() if one.who is None]

    def _expendable(self) -> list[Conversation]:
        """The handshakes of which any may be ended for a newcomer; none if there is room.

        Half of them are for those who have sent message 3, who so make no room for those who have not. Where there are
        more, first go those that are not known, then those of whoever has most, then those that do not wait for us.
        No rule says which of those: whoever knew it could come early, or late.
        """
        strangers = self._strangers()
        if len(strangers) < self.stage.limits.handshakes:
            return []
        further = [one for one in strangers if one.ticket is not None and one.ticket.asked]
        crowd = further if 2 * len(further) > len(strangers) else [one for one in strangers if one not in further]
        number = Counter(one.source for one in crowd)
        ranks = [
            (one in further and one.ticket is not None and one.ticket.first, -number[one.source], one.waits)
            for one in crowd
        ]
        least = min(ranks)
        return [one for one, rank in zip(crowd, ranks, strict=True) if rank == least]

    def seat(self, conversation: Conversation, who: Identity) -> None:
        """Gives a channel to a peer whose handshake is finished. Raises UnreachableStage if there is none for it."""
        with self._lock:
            unwanted = self._in_the_way(who)
            conversation.who = who
            seated = {one.who for one in self.open.values()}
            self._paces = {one: pace for one, pace in self._paces.items() if one in seated or pace.lasts}
            conversation.pace = self._paces.setdefault(who, conversation.pace)
            if unwanted is not None:
                del self.open[unwanted.number]
        if unwanted is not None:
            unwanted.turn_out()

    def _in_the_way(self, who: Identity) -> Conversation | None:
        """The idle channel to end for one of `who`; None if there is room. Raises UnreachableStage if neither.

        It is one of whoever has most of them, and more, or of its own: one that never did anything useful, or else the
        one that has done nothing useful for longest. One that was opened or useful a moment ago is the last.
        """
        most, seated = self.stage.limits.channels, [(one, one.who) for one in self.open.values() if one.who is not None]
        number = Counter(owner for _, owner in seated)
        free = most - sum(owner.known >= who.known for _, owner in seated)  # or had by those who make room for it
        if not who.known and self.stage.manifest.operators:
            free -= most // 8  # for them
        greedy = number[who] >= GREED * free
        if not greedy and len(seated) < most:
            return None
        idle = []
        for one, owner in seated:
            if one.state is not State.IDLE or owner.known > who.known or (greedy and owner.known < who.known):
                continue
            young, more = time.monotonic() - one.since < YOUNG, number[owner] - number[who]
            if owner.known < who.known or more > 1 or (not young and (more == 1 or owner == who)):
                idle.append((owner.known, -number[owner], young, one.useful, one.since, one.number))
        if not idle:
            text = f"stage {self.stage.index} has no channel for one more: {len(seated)} are open"
            raise UnreachableStage(f"{text}, and none of them can be ended: try again later", stage=self.stage.index)
        return self.open[min(idle)[-1]]

    def accept(self, conversation: Conversation) -> Channel:
        """The handshake of a new channel; its source pays for it."""
        began, stage, source, sock = time.thread_time(), self.stage, conversation.source, conversation.sock
        stage.manifest.check_time(time.time())
        # A listed client is known by its key before it is given evidence; whoever else calls, only after.
        listed = stage.index == 0 and stage.manifest.clients is not None
        ticket = conversation.ticket = stage.evidence.ticket(source, lambda: has_left(sock), first=listed)
        try:
            end = links.answering_end(stage.manifest, stage.index, ticket)
            most = links.largest(stage.manifest, stage.index)
            channel = Channel.accept(
                sock, end, conversation.opening, deadlines=stage.limits.deadlines, budget=stage.budget, max_message=most
            )
        finally:
            self._newcomers.spend(source, time.thread_time() - began + ticket.seconds)
        if stage.index > 0:
            stage.evidence.know(source)
        return channel

    def forget(self, number: int) -> None:
        with self._lock:
            self.open.pop(number, None)

    def drain(self, seconds: float, now: threading.Event) -> None:
        """Refuses what is new, and lets answers under way end: for so many seconds, or until `now` is set."""
        until = time.monotonic() + seconds
        if now.is_set():
            return
        self.stage.places.drain()
        what = "answers under way" if self.stage.index == 0 else "links in use"
        left = self._undrained()
        log.info("draining: %s: %d", what, left)
        while left and time.monotonic() < until and not now.wait(LOOK):
            left = self._undrained()
        if left:
            log.warning("cut off after %.0f s: %s: %d", time.monotonic() - until + seconds, what, left)
        else:
            log.info("drained")

    def _undrained(self) -> int:
        """Closes what no answer needs. How many channels one does need."""
        with self._lock:
            conversations = list(self.open.values())
        return sum(not conversation.drained() for conversation in conversations)

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
            resumed=meter.resumed,
            cache_limit=self.stage.places.total,
            exposed=self._exposed,
        )
