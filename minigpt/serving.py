"""A stage at work: its layers, the channels it serves, and its links to the next stage.

Every stage runs this same code. One thread serves one channel (`minigpt.conversation`), and the channels take turns at
computing, in the order of their asking.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import IO, Any

from attest import Attester
from minigpt import links
from minigpt.conversation import Conversation
from minigpt.links import StageLink
from minigpt.manifest import Manifest
from minigpt.messages import StageReport
from minigpt.model import GPT2
from transport.channel import Budget, Channel, Deadlines, Listener

log = logging.getLogger("minigpt.stage")

YOUNG = 1.0  # seconds; a channel that has been silent for less is not ended for a newcomer
HANDSHAKE_SHARE = 0.1  # of one core: what strangers can make a stage spend; at 5 ms a handshake, 20 a second
IDLE_LINKS = 4  # links to the next stage kept for the next sequence: evidence can take seconds on some platforms


@dataclass(frozen=True)
class Limits:
    """What one stage process gives to all its peers together."""

    channels: int = 64  # threads, and sockets
    sequences: int = 8  # each has a cache, of 38 MB for six full layers of GPT-2 small
    handshakes: int = 32  # under way at once; at one newcomer more the oldest is ended
    buffers: int = 256 * 2**20  # bytes of incoming messages that are not whole yet
    answer: float = 120.0  # seconds that the next stage may take for one step
    idle: float = 3600.0  # seconds that a channel may be silent
    deadlines: Deadlines = field(default_factory=Deadlines)


class Turns:
    """A lock for what computes, granted in the order of asking: no channel waits for more than one step of each other.

    A class and no generator: on a token's way between two stages all code has left the caches, and the end of a turn
    took 50 µs with two nested generators, where it takes 30.

    Args:
        cores: a file that the stages which share this machine's cores have open, each for itself; whoever computes has
            it locked. BLAS's threads wait for each other by spinning: two stages that computed chunks of a prompt at
            once, on two cores, took up to twice the time of one after the other. None where it shares them with nobody.

    Attributes:
        taken: turns so far.
    """

    def __init__(self, cores: IO[bytes] | None = None) -> None:
        self.taken = 0
        self._cores = cores
        self._lock = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            self.taken += 1
            mine = threading.Lock() if self._held else None
            if mine is not None:
                mine.acquire()
                self._waiting.append(mine)
            self._held = True
        if mine is not None:
            mine.acquire()  # released by whoever goes before
        if self._cores is not None:
            try:
                fcntl.lockf(self._cores, fcntl.LOCK_EX)  # the system unlocks it if this process dies
            except BaseException:
                self._next()
                raise

    def __exit__(self, *error: object) -> None:
        try:
            if self._cores is not None:
                fcntl.lockf(self._cores, fcntl.LOCK_UN)
        finally:
            self._next()

    def _next(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False


class Pace:
    """Keeps what is spent on something to a share of the time, but for bursts of a second."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._free = 0.0  # when all that was spent is made up for
        self._lock = threading.Lock()

    def spend(self, seconds: float) -> None:
        with self._lock:
            self._free = max(self._free, time.monotonic() - 1.0) + seconds / self._share

    def delay(self) -> float:
        """Seconds to wait before more is spent."""
        return max(0.0, self._free - time.monotonic())


class Stage:
    """One stage of a pipeline, ready to serve.

    Args:
        manifest: the pipeline's.
        index: of this stage in it.
        model: the stage's layers.
        attester: makes this stage's evidence.
        limits: of this process.
        cores: by which it takes turns with other processes, as `Turns` has it.
    """

    def __init__(
        self,
        manifest: Manifest,
        index: int,
        model: GPT2,
        attester: Attester,
        limits: Limits,
        cores: IO[bytes] | None = None,
    ) -> None:
        self.manifest = manifest
        self.index = index
        self.model = model
        self.limits = limits
        self.stopping = threading.Event()
        self.sequences = threading.BoundedSemaphore(limits.sequences)
        self.open: dict[int, Conversation] = {}
        self._attester = links.OneAtATime(attester)
        self.turns = Turns(cores)
        self._budget = Budget(limits.buffers)
        self._pace = Pace(HANDSHAKE_SHARE)
        self._began = time.monotonic()
        self._idle_links: list[StageLink] = []
        self._lock = threading.Lock()

    # The way on.

    def take_link(self) -> StageLink:
        """A link to the next stage that carries no sequence. Raises StageError if there is none to be had."""
        while True:
            with self._lock:
                link = self._idle_links.pop() if self._idle_links else None
            if link is None:
                break
            if not link.channel.expired and not link.channel.poll():
                return link
            link.channel.close()
        index = self.index + 1
        self.manifest.check_time(time.time())
        end = links.calling_end(self.manifest, index, self._attester)
        channel = links.dial(self.manifest, index, end, self.limits.deadlines, self._budget)
        log.info("link to stage %d: evidence accepted", index)
        # Each stage waits a little less than the one before it, so that a stage that hangs is named by its neighbour.
        return StageLink(channel, index, max(self.limits.answer / 2, self.limits.answer - 5.0 * self.index))

    def give_back(self, link: StageLink) -> None:
        """Keeps a link for another sequence if the next stage has forgotten this one, and closes it otherwise."""
        if not self.stopping.is_set() and link.reset():
            with self._lock:
                if len(self._idle_links) < IDLE_LINKS:
                    self._idle_links.append(link)
                    return
        link.channel.abort() if link.outstanding else link.channel.close()

    # Serving.

    def serve(self, listener: Listener) -> None:
        """Accepts channels until `stop` is called."""
        for number in itertools.count(1):
            self.stopping.wait(self._pace.delay())  # whoever comes meanwhile waits in the listener's queue
            accepted = listener.accept()
            if accepted is None:
                return
            sock, peer = accepted
            with self._lock:
                unwanted = self._least_wanted()
                if unwanted is not None:
                    del self.open[unwanted.number]
                full = len(self.open) >= self.limits.channels
                if not full:
                    conversation = self.open[number] = Conversation(self, number, peer, sock)
            if unwanted is not None:
                unwanted.turn_out()
            if full:
                log.warning("%s: turned away, %d channels are open", peer, self.limits.channels)
                sock.close()
                continue
            threading.Thread(target=conversation.run, name=f"channel {number}", daemon=True).start()

    def _least_wanted(self) -> Conversation | None:
        """Whom to end, so that those who hold places and do nothing keep no newcomer out; None if there is room.

        Of the handshakes under way the oldest: an honest one takes milliseconds. Else who has been silent longest.
        """
        waiting = sorted((one for one in self.open.values() if not one.busy), key=lambda one: one.since)
        strangers = [one for one in waiting if one.stranger]
        if len(strangers) >= self.limits.handshakes:
            return strangers[0]
        if len(self.open) < self.limits.channels:
            return None
        silent = [one for one in waiting if time.monotonic() - one.since > YOUNG]
        return next(iter(strangers + silent), None)

    def accept(self, sock: Any) -> Channel:
        """The handshake of a new channel."""
        began = time.thread_time()
        self.manifest.check_time(time.time())
        try:
            end = links.answering_end(self.manifest, self.index, self._attester)
            return Channel.accept(sock, end, deadlines=self.limits.deadlines, budget=self._budget)
        finally:
            self._pace.spend(time.thread_time() - began)

    def forget(self, number: int) -> None:
        with self._lock:
            self.open.pop(number, None)

    def stop(self, patience: float = 2.0) -> None:
        """Ends every channel, at the next token if it is generating; waits `patience` seconds at most."""
        self.stopping.set()
        with self._lock:
            conversations = list(self.open.values())
            idle = list(self._idle_links)
            self._idle_links.clear()
        for conversation in conversations:
            conversation.stop()
        for link in idle:
            link.channel.close()
        until = time.monotonic() + patience
        while self.open and time.monotonic() < until:
            time.sleep(0.01)

    def report(self) -> StageReport:
        """This stage's state."""
        with self._lock:
            conversations = list(self.open.values())
        sequences = [found for conversation in conversations if (found := conversation.sequence) is not None]
        return StageReport(
            stage=self.index,
            uptime=time.monotonic() - self._began,
            weights_bytes=self.model.nbytes,
            channels=len(conversations),
            sequences=len(sequences),
            cache_bytes=sum(sequence.cache.nbytes for sequence in sequences),
            steps=self.turns.taken,
        )
