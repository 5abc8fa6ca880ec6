"""What all channels of a stage share: its layers, its schedule, its places, and its links to the next stage."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import IO

from minigpt.engine.model import GPT2
from minigpt.errors import MiniGPTError, RequestRefused, StageError, UntrustedStage
from minigpt.protocol import links
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.batchlink import BatchLink
from minigpt.protocol.links import StageLink
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import StageReport
from minigpt.stage.below import Below, Reports
from minigpt.stage.evidence import EvidenceQueue
from minigpt.stage.layers import Layers
from minigpt.stage.places import Identity, Places
from minigpt.stage.schedule import Schedule
from transport.channel import Budget, Channel, Deadlines

log = logging.getLogger("minigpt.stage")

VISITORS = range(64, 1024)  # as many as there are descriptors for
STATUS_TIMEOUT = 5.0  # seconds for each stage that is still to be asked
FIRST, LAST = 0.1, 5.0  # seconds from one attempt to reach the next stage to the following


@dataclass(frozen=True)
class Limits:
    """What one stage process gives to all its peers together."""

    channels: int  # threads, and sockets
    sequences: int
    cache_bytes: int  # of all sequences
    queue: int  # requests that wait for a place
    batch: int  # sequences in one pass
    handshakes: int  # under way at once; one more newcomer ends another
    answer: float  # seconds that the next stage may take for one step
    idle: float  # seconds that a channel may be silent
    deadlines: Deadlines
    visitors: int = VISITORS.stop  # connections that have not shown yet that they have the manifest
    buffers: int = 256 * 2**20  # bytes of incoming messages, as `records.Budget` counts them


class Stage:
    """Stage number `index` of the manifest's pipeline; `cores` as in `Turns`."""

    def __init__(
        self,
        manifest: Manifest,
        addresses: Addresses,
        index: int,
        model: GPT2,
        evidence: EvidenceQueue,
        limits: Limits,
        cores: IO[bytes] | None,
    ) -> None:
        self.manifest = manifest
        self.addresses = addresses
        self.index = index
        self.model = model
        self.limits = limits
        self.stopping = threading.Event()  # set when the process ends
        self.evidence = evidence
        self.layers = Layers(model, index, cores)
        self.places = Places(index, limits.sequences, limits.cache_bytes, limits.queue)
        connect = None if model.is_last else self.batch_link
        self.schedule = Schedule(self.layers, connect, most=limits.batch, overlap=cores is None)  # the first stage's
        self.budget = Budget(limits.buffers)
        self._ready: BatchLink | None = None  # made before it was needed
        self._dialling = threading.Lock()
        self._idle: Channel | None = None  # for the next who asks for `status`: evidence can take seconds
        self.below = Below(self._ask_below)
        self._lock = threading.Lock()

    def identity(self, channel: Channel, source: str) -> Identity:
        """Who a peer is, for its share: the listed key that it has, otherwise where it connects from."""
        if self.index > 0:
            return Identity(source, known=True)  # one of our own stages
        listed = (self.manifest.clients or frozenset()) | (self.manifest.operators or frozenset())
        key = channel.peer_static_key
        return Identity(key.hex(), known=True) if key in listed else Identity(source)

    def batch_link(self) -> BatchLink:
        """A link to the next stage that nobody else has. Raises StageError if there is none."""
        with self._dialling:
            link, self._ready = self._ready, None
            if link is not None:
                if link.usable():
                    return link
                link.close()
            return BatchLink(self._dial(), self.manifest, self.index + 1, self._patience())

    def open_ahead(self) -> None:
        """Makes the link to the next stage in the background, and tries until it is up: stages start in any order."""
        if not self.model.is_last:
            threading.Thread(target=self._open_ahead, name="next stage", daemon=True).start()

    def _open_ahead(self) -> None:
        delay, said = FIRST, ""
        while not self.stopping.is_set():
            try:
                link = self.batch_link()
            except (MiniGPTError, OSError) as error:
                if str(error) != said:
                    said = str(error)
                    log.info("the next stage is not there yet, trying again: %s", said)
                self.stopping.wait(delay)
                delay = min(2 * delay, LAST)
                continue
            with self._dialling:
                self._ready = link
            return

    def _ask_below(self) -> Reports:
        """The reports of the stages after this one; that of the next with its evidence, as this stage verified it."""
        if self.model.is_last:
            return ()
        following, link = len(self.manifest.stages) - self.index - 1, None
        try:
            link = self._take_link()
            return link.status(STATUS_TIMEOUT * following)
        except (StageError, RequestRefused) as error:
            reason = "attestation" if isinstance(error, UntrustedStage) else "failed"
            return (StageReport(stage=self.index + 1, error=str(error), reason=reason),)
        finally:
            if link is not None:
                self._keep(link)

    def _take_link(self) -> StageLink:
        """A link to the next stage, for one question. Raises StageError if there is none."""
        while True:
            with self._lock:
                channel, self._idle = self._idle, None
            if channel is None:
                return StageLink(self._dial(), self.manifest, self.index + 1, self._patience())
            link = StageLink(channel, self.manifest, self.index + 1, self._patience())
            if link.usable():
                return link
            channel.close()

    def _keep(self, link: StageLink) -> None:
        """Keeps the channel of a link for the next question."""
        channel = link.release()
        if channel is None:
            return
        with self._lock:
            if not self.stopping.is_set() and self._idle is None:
                self._idle = channel
                return
        channel.close()

    def _patience(self) -> float:
        # Each stage waits a little less than the one before it, so that a stage that hangs is named by its neighbour.
        return max(self.limits.answer / 2, self.limits.answer - 5.0 * self.index)

    def _dial(self) -> Channel:
        self.manifest.check_time(time.time())
        index = self.index + 1
        end = links.calling_end(self.manifest, index, self.evidence.ticket(first=True))
        channel = links.dial(self.manifest, self.addresses, index, end, self.limits.deadlines, self.budget)
        log.info("link to stage %d: evidence accepted", index)
        return channel

    def stop(self) -> None:
        """From now on every channel ends, at its next step if it is generating."""
        self.stopping.set()
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None:
            idle.close()
