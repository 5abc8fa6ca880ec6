"""The near end of the link between two stages, which carries the sequences of all clients in batches."""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from minigpt.errors import MessageError, StageError
from minigpt.protocol import batches, messages
from minigpt.protocol.batches import NO_ROWS, Batch, Due, Result
from minigpt.protocol.links import PROBE, PROBE_AFTER, StageLink
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.request import Ask
from transport.channel import Channel

HALF_A_RECORD = 0.02  # seconds until the rest of one is looked for: what has come of it would end each wait at once


class BatchLink(StageLink):
    """The near end of the link between two stages, which carries the sequences of all clients.

    One thread at a time may send batches, and one receive answers; any may `end` lanes. Once it has failed, it is
    `dead`, and so are all its lanes.
    """

    def __init__(self, channel: Channel, manifest: Manifest, stage: int, timeout: float) -> None:
        super().__init__(channel, manifest, stage, timeout)
        self.dead: StageError | None = None  # why nothing can be asked any more
        self._lanes = itertools.count()
        self._awaited: deque[list[Due]] = deque()

    def open(self) -> int:
        """The number of a new lane, for the next batch."""
        return next(self._lanes)

    def send_batch(self, batch: Batch, asks: Sequence[Ask], missing: int = 0) -> None:
        """Sends a batch whose segments ask for these answers, padded as if `missing` rows more were in it.

        Raises StageError.
        """
        if self.dead is not None:
            raise self.dead
        if batch.answered:
            self._awaited.append(list(map(Due, batch.segments, asks)))
        try:
            parts = batches.encode(batch)
            whole = sum(map(len, parts)) + batches.OVERHEAD + 4 * self._config.n_embd * missing if missing else 0
            self._send(parts, whole)
        except StageError as error:
            raise self._died(error) from None
        except BaseException:  # no memory, for example: answers would be taken for those of this batch
            self._died(StageError(f"a batch for stage {self.stage} could not be sent", stage=self.stage))
            raise

    def receive_answers(self, timeout: float | None = None) -> tuple[Result, ...]:
        """The answers to the first batch that has none yet, one for each segment. Raises StageError."""
        if self.dead is not None:
            raise self.dead
        try:
            plain = self._receive(timeout)
            if type(plain) is not list:
                raise self._illegal(f"sent {messages.name(self._heard(plain))} out of turn")
            if not self._awaited:
                raise self._illegal("sent answers that nobody asked for")
            try:
                results = batches.decode_answers(plain, self._awaited.popleft(), self._config, self._behind)
            except MessageError as error:
                raise self._illegal(f"sent something wrong: {error}") from None
            return results
        except StageError as error:
            raise self._died(error) from None

    def await_answers(self, look: float) -> bool:
        """Waits until an answer is due, looking every so many seconds; False once the link has ended here.

        Raises StageError if that stage says something unasked.
        """
        while self.dead is None:
            if self._awaited:
                return True
            try:
                if not self.channel.wait(look) or self._awaited:
                    continue
                if (news := self._unasked()) is not None:
                    raise self._illegal(f"sent {messages.name(news)} out of turn")
                if self.channel.poll():
                    time.sleep(HALF_A_RECORD)
            except StageError as error:
                raise self._died(error) from None
        return False

    def usable(self) -> bool:
        """Whether sequences can begin on this link; one that was idle is asked first. Nothing may be under way."""
        if self.dead is not None or self.stale:
            return False
        try:
            if self.channel.idle >= PROBE_AFTER:
                self.send_batch(Batch((), NO_ROWS), ())
                self.receive_answers(PROBE)
        except StageError:
            return False
        return True

    def close(self) -> None:
        """Ends the link, and all its lanes."""
        if self.dead is None:
            self.dead = StageError(f"the link to stage {self.stage} is closed", stage=self.stage)
        self.channel.close()

    def end(self, lanes: Sequence[int]) -> None:
        """Makes that stage, and those after it, forget sequences."""
        if self.dead is None and lanes:
            with suppress(StageError):  # then they are forgotten as well
                self.send_batch(Batch((), NO_ROWS, (), tuple(lanes)), ())

    def _died(self, error: StageError) -> StageError:
        if self.dead is None:
            self.dead = error
            self.channel.abort()
        return self.dead
