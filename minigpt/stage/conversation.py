"""One channel of a stage: what its peer asks, and the sequence that it asks about.

The first stage is asked to Generate and runs the loop; the others are asked for Steps. A channel's cache lives and dies
with it, and its sequence is dropped, here and in the stages after this one, as soon as the peer is gone or cancels.

    opening ──handshake──► idle ──message──► working ──answer──► idle
       └──────────────┬─────┴──────────────────┘
                      ▼ end of the channel, for whatever reason
                   ending
"""

import enum
import logging
import time
import traceback
from contextlib import suppress
from typing import Any, Protocol

from attest import AttestationError
from minigpt.errors import ManifestError, MiniGPTError, RequestRefused, StageError, UntrustedStage
from minigpt.protocol import messages
from minigpt.protocol.links import StageLink
from minigpt.protocol.messages import (
    Cancel,
    Done,
    Failure,
    Generate,
    Message,
    Reason,
    Refusal,
    StageReport,
    Step,
    Wanted,
)
from minigpt.protocol.request import Ask
from minigpt.stage.generation import StageSequence, generate
from minigpt.stage.newcomers import source_of
from minigpt.stage.stage import Stage
from transport.channel import Channel, hang_up
from transport.errors import Abandoned, Closed, TimedOut, TransportError

log = logging.getLogger("minigpt.stage")

STATUS_TIMEOUT = 5.0  # seconds for each stage that is still to be asked


class State(enum.Enum):
    OPENING = enum.auto()  # the handshake is under way
    IDLE = enum.auto()  # nothing is asked
    WORKING = enum.auto()  # something is
    ENDING = enum.auto()


class _Cancelled(Exception):
    """The client does not want the rest."""


class Host(Protocol):
    """What a conversation asks of the server that accepted it."""

    def accept(self, sock: Any, source: str) -> Channel: ...
    def forget(self, number: int) -> None: ...
    def report(self) -> StageReport: ...


class Conversation:
    """One channel of a stage. Its own thread alone changes its state; `since` is time.monotonic() when it did."""

    def __init__(self, stage: Stage, number: int, peer: str, sock: Any, host: Host) -> None:
        self.number = number
        self.source = source_of(peer)
        self.state, self.since = State.OPENING, time.monotonic()
        self.sequence: StageSequence | None = None  # before the first request, and once it is dropped
        self._stage = stage
        self._host = host
        self._name = f"channel {number} ({peer})"
        self._here = f"stage {stage.index}"
        self._sock = sock
        self._channel: Channel | None = None
        self._refused: Refusal | None = None  # to be told when a step wants an answer
        self._asked = {Generate if stage.index == 0 else Step, messages.Status, messages.Reset, Cancel}

    def run(self) -> None:
        """Serves the channel until either side ends it. Raises nothing: this is a thread's first function."""
        try:
            channel = self._channel = self._host.accept(self._sock, self.source)
            log.info("%s: open", self._name)
            self._serve(channel)
        except (Closed, Abandoned):
            log.info("%s: closed", self._name)
        except (TransportError, AttestationError, MiniGPTError) as error:
            log.warning("%s: %s: %s", self._name, type(error).__name__, error)
        except Exception as error:  # of one channel: the others live on. Its text may hold what the peer sent
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: ended by %s\n%s", self._name, type(error).__name__, where)
        finally:
            self._end()

    def _enter(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()

    def _serve(self, channel: Channel) -> None:
        try:
            while not self._stage.stopping.is_set():
                self._enter(State.IDLE)
                self._turn(channel)
            raise self._stopped()
        except Abandoned:
            if self._stage.stopping.is_set():
                self._fail(channel, self._stopped())
            raise
        except TransportError:
            raise
        except StageError as error:
            log.warning("%s: %s", self._name, error)
            self._fail(channel, error)
        except ManifestError as error:  # it has expired
            self._fail(channel, StageError(f"{self._here}: {error}"))
            raise
        except Exception:
            with suppress(TransportError):
                self._fail(channel, StageError(f"{self._here} failed inside: its log says where"))
            raise

    def _turn(self, channel: Channel) -> None:
        """Receives a message and answers it. Nothing of it is left then: a channel that is idle holds no request."""
        try:
            message = self._received(channel)
        except RequestRefused as error:
            self._send(channel, messages.refusal(error))
            return
        self._answer(channel, message)

    def _received(self, channel: Channel) -> Message:
        plain = channel.receive(self._stage.limits.idle)
        self._enter(State.WORKING)
        return messages.decode(plain, self._asked, self._here, self._stage.model.config.n_positions)

    def _answer(self, channel: Channel, message: Message) -> None:
        match message:
            case Generate():
                if message.start == 0:
                    self._forget_stale()
                self._generate(channel, message)
            case Step():
                self._step(channel, message)
            case messages.Status():
                self._forget_stale()
                self._send(channel, messages.Report((self._host.report(), *self._reports_from_below(channel))))
            case messages.Reset():
                self._forget()
                self._send(channel, Done(Reason.RESET))
            case Cancel():
                pass  # It crossed with the end of the request it cancels.

    # What is asked of the first stage.

    def _generate(self, channel: Channel, request: Generate) -> None:
        try:
            answers = generate(self._begun(channel), request, lambda: self._check_client(channel))
            while True:
                self._send(channel, next(answers))
        except StopIteration as end:
            reason = Reason(end.value)
        except _Cancelled:
            reason = Reason.CANCELLED
            if (link := self._link) is not None and link.due:
                self._forget()  # chunks of a prompt are under way: the stages after this one must drop them too
        except RequestRefused as error:
            if error.stage != self._stage.index:
                self._forget()  # this stage has computed what a later one refused
            self._forget_empty()
            self._send(channel, messages.refusal(error))
            return
        self._send(channel, Done(reason))

    def _check_client(self, channel: Channel) -> None:
        """Between two steps: is the client still there, and does it want to go on?"""
        if self._stage.stopping.is_set():
            raise self._stopped()
        if not channel.poll():
            return
        try:
            plain = channel.receive(0)
        except TimedOut:
            return  # what waits is not a whole message: a PING, or the beginning of one
        messages.decode(plain, {Cancel}, f"{self._here} while a request is running: wait for its end, or Cancel")
        raise _Cancelled

    # What is asked of the stages after it.

    def _step(self, channel: Channel, step: Step) -> None:
        """Answers a step that wants an answer. A refusal waits for such a step: the sender of others reads none."""
        if self._stage.stopping.is_set():
            raise self._stopped()
        if channel.gone():
            raise Closed("the peer left before its step was computed")
        if step.start == 0:
            self._refused = None
            self._forget_stale()
        answer = None
        if self._refused is None:
            try:
                ask = Ask(step.wanted, step.sampling, step.logprobs, step.spans)
                answer = self._begun(channel).step(step.start, step.hidden, ask)
            except RequestRefused as error:
                refused = messages.refusal(error)  # not the error: its traceback would keep the step
                self._forget_empty()
                self._refused = refused
        if step.wanted is Wanted.NOTHING:
            return
        if self._refused is not None:
            refused, self._refused = self._refused, None
            self._send(channel, refused)
        elif answer is not None:
            self._send(channel, answer)

    # The sequence.

    @property
    def _link(self) -> StageLink | None:
        """The sequence's link to the next stage."""
        following = None if self.sequence is None else self.sequence.following
        return following if isinstance(following, StageLink) else None

    def _begun(self, channel: Channel) -> StageSequence:
        """The channel's sequence, begun if there is none. Raises RequestRefused when the stage is full."""
        if self.sequence is None:
            self.sequence = self._stage.begin(channel)
        return self.sequence

    def _forget_stale(self) -> None:
        """Drops the sequence if its link has broken while it was idle: then a new one can begin."""
        if (link := self._link) is not None and link.stale:
            self._forget()

    def _forget_empty(self) -> None:
        """Drops a sequence that was begun for a request that is refused: it would hold a place for nothing."""
        if self.sequence is not None and not self.sequence.cache.length:
            self._forget()

    def _forget(self) -> None:
        """Drops the sequence, here and in the stages after this one."""
        self._refused = None
        if self.sequence is not None:
            sequence, self.sequence = self.sequence, None
            self._stage.end(sequence)

    def _reports_from_below(self, channel: Channel) -> tuple[StageReport, ...]:
        """The reports of the stages after this one; that of the next with its evidence, as this stage verified it."""
        if self._stage.model.is_last:
            return ()
        following = len(self._stage.manifest.stages) - self._stage.index - 1
        own, link = self._link, None
        try:
            link = own or self._stage.take_link(channel)
            return link.status(STATUS_TIMEOUT * following)
        except (StageError, RequestRefused) as error:
            self._forget()  # and with it a link that has broken
            reason = "attestation" if isinstance(error, UntrustedStage) else "failed"
            return (StageReport(stage=self._stage.index + 1, error=str(error), reason=reason),)
        finally:
            if link is not None and link is not own:
                self._stage.give_back(link)

    # The end.

    def stop(self) -> None:
        """Called by another thread: ends the channel now if it is idle, and wakes it up otherwise."""
        channel = self._channel
        if channel is not None and self.state is State.IDLE:
            channel.close()
        elif channel is not None:
            channel.deafen()

    def turn_out(self) -> None:
        """Called by another thread: ends the channel, to make room."""
        log.warning("%s: ended for a newcomer", self._name)
        hang_up(self._sock)

    def _stopped(self) -> StageError:
        return StageError(f"{self._here} is stopping", stage=self._stage.index)

    def _fail(self, channel: Channel, error: StageError) -> None:
        """Tells the peer what failed, and in which stage; the channel ends with it."""
        reason = "attestation" if isinstance(error, UntrustedStage) else "failed"
        stage = self._stage.index if error.stage is None else error.stage
        self._send(channel, Failure(stage, reason, str(error)))

    def _send(self, channel: Channel, message: Message) -> None:
        channel.send(messages.encode(message))

    def _end(self) -> None:
        self._enter(State.ENDING)
        try:
            self._forget()
        finally:
            (self._channel or self._sock).close()
            self._host.forget(self.number)
