"""What all channels of a stage share: its layers, who may compute when, and its links to the next stage."""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import IO

from attest import Attester
from minigpt.engine.model import GPT2
from minigpt.protocol import links
from minigpt.protocol.links import StageLink
from minigpt.protocol.manifest import Manifest
from transport.channel import Budget, Deadlines

log = logging.getLogger("minigpt.stage")

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


class Stage:
    """One stage of a pipeline.

    Args:
        manifest: the pipeline's.
        index: of this stage in it.
        model: the stage's layers.
        attester: makes this stage's evidence.
        limits: of this process.
        cores: by which it takes turns with other processes, as `Turns` has it.

    Attributes:
        stopping: set when the process ends.
        sequences: acquired for each sequence, so that there are not too many.
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
        self.attester = links.OneAtATime(attester)
        self.turns = Turns(cores)
        self.budget = Budget(limits.buffers)
        self._idle_links: list[StageLink] = []
        self._lock = threading.Lock()

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
        end = links.calling_end(self.manifest, index, self.attester)
        channel = links.dial(self.manifest, index, end, self.limits.deadlines, self.budget)
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

    def stop(self) -> None:
        """From now on every channel ends, at its next step if it is generating."""
        self.stopping.set()
        with self._lock:
            idle = list(self._idle_links)
            self._idle_links.clear()
        for link in idle:
            link.channel.close()
