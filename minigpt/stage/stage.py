"""What all channels of a stage share: its layers, its schedule, and its links to the next stage."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import IO

from attest import Attester
from minigpt.engine.model import GPT2
from minigpt.errors import RequestRefused
from minigpt.protocol import links
from minigpt.protocol.links import StageLink
from minigpt.protocol.manifest import Manifest
from minigpt.stage.generation import StageSequence
from minigpt.stage.schedule import Schedule
from transport.channel import Budget, Channel, Deadlines

log = logging.getLogger("minigpt.stage")

IDLE_LINKS = 4  # links to the next stage kept for the next sequence: evidence can take seconds on some platforms


@dataclass(frozen=True)
class Limits:
    """What one stage process gives to all its peers together."""

    channels: int  # threads, and sockets
    sequences: int  # each has a cache, of 38 MB for six full layers of GPT-2 small
    handshakes: int  # under way at once; one more newcomer ends another
    answer: float  # seconds that the next stage may take for one step
    idle: float  # seconds that a channel may be silent
    deadlines: Deadlines
    buffers: int = 256 * 2**20  # bytes of incoming messages, as `records.Budget` counts them


class Stage:
    """Stage number `index` of the manifest's pipeline; `cores` as in `schedule.Turns`."""

    def __init__(
        self, manifest: Manifest, index: int, model: GPT2, attester: Attester, limits: Limits, cores: IO[bytes] | None
    ) -> None:
        self.manifest = manifest
        self.index = index
        self.model = model
        self.limits = limits
        self.stopping = threading.Event()  # set when the process ends
        self.attester = links.OneAtATime(attester)
        self.schedule = Schedule(model, cores)
        self.budget = Budget(limits.buffers)
        self._sequences = threading.BoundedSemaphore(limits.sequences)
        self._idle: list[Channel] = []
        self._lock = threading.Lock()

    def begin(self, asker: Channel) -> StageSequence:
        """A new sequence, with a link to the next stage if there is one; `end` it.

        Raises:
            RequestRefused: the stage has as many sequences as it may.
            StageError: the next stage cannot be reached, or is not accepted.
        """
        if not self._sequences.acquire(blocking=False):
            busy = f"stage {self.index} is busy with {self.limits.sequences} sequences: try again later"
            raise RequestRefused(busy, reason="busy", stage=self.index)
        try:
            following = None if self.model.is_last else self.take_link(asker)
            return StageSequence(self.schedule, following, stage=self.index)
        except BaseException:
            self._sequences.release()
            raise

    def end(self, sequence: StageSequence) -> None:
        """Drops a sequence, here and in the stages after this one."""
        self._sequences.release()
        if isinstance(sequence.following, StageLink):
            self.give_back(sequence.following)

    def take_link(self, asker: Channel) -> StageLink:
        """A link to the next stage without a sequence; `asker` as in `StageLink`. StageError if there is none."""
        index = self.index + 1
        # Each stage waits a little less than the one before it, so that a stage that hangs is named by its neighbour.
        timeout = max(self.limits.answer / 2, self.limits.answer - 5.0 * self.index)
        while True:
            with self._lock:
                channel = self._idle.pop() if self._idle else None
            if channel is None:
                break
            link = StageLink(channel, self.manifest, index, timeout, asker)
            if not link.stale:
                return link
            channel.close()
        self.manifest.check_time(time.time())
        end = links.calling_end(self.manifest, index, self.attester)
        channel = links.dial(self.manifest, index, end, self.limits.deadlines, self.budget)
        log.info("link to stage %d: evidence accepted", index)
        return StageLink(channel, self.manifest, index, timeout, asker)

    def give_back(self, link: StageLink) -> None:
        """Keeps the channel of a link for another sequence, if the next stage has forgotten this one."""
        channel = link.release(reuse=not self.stopping.is_set())
        if channel is None:
            return
        with self._lock:
            if not self.stopping.is_set() and len(self._idle) < IDLE_LINKS:
                self._idle.append(channel)
                return
        channel.close()

    def stop(self) -> None:
        """From now on every channel ends, at its next step if it is generating."""
        self.stopping.set()
        with self._lock:
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()
