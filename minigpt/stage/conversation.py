"""One channel of a stage: what its peer asks, and the sequence that it asks about.

The first stage is asked to Generate and runs the loop; the others are asked for Steps. A channel's cache lives and dies
with it, and its sequence is dropped, here and in the stages after, as soon as the peer is gone or has cancelled.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from attest import AttestationError, dump_evidence
from minigpt.errors import ManifestError, MessageError, MiniGPTError, RequestRefused, StageError, UntrustedStage
from minigpt.protocol import links, messages
from minigpt.protocol.links import StageLink
from minigpt.protocol.messages import (
    Ask,
    Cancel,
    Done,
    Failure,
    Generate,
    Message,
    Reason,
    Report,
    Reset,
    StageReport,
    Status,
    Step,
    Wanted,
)
from minigpt.stage.generation import Sequence, generate
from minigpt.stage.stage import Stage
from transport.channel import Channel, hang_up
from transport.errors import Closed, TimedOut, TransportError

log = logging.getLogger("minigpt.stage")

STATUS_TIMEOUT = 5.0  # seconds for each stage that is still to be asked


class _Cancelled(Exception):
    """The client does not want the rest."""


class Host(Protocol):
    """Who accepts channels: what a conversation asks of it."""

    def accept(self, sock: Any) -> Channel: ...

    def forget(self, number: int) -> None: ...

    def report(self) -> StageReport: ...


class Conversation:
    """One channel of a stage: what its peer asks, and the sequence that it asks about.

    Attributes:
        busy: whether something that the peer asked for is under way.
        since: time.monotonic() when the peer last came, was accepted, or had its answer.
    """

    def __init__(self, stage: Stage, number: int, peer: str, sock: Any, host: Host) -> None:
        self.stage = stage
        self._host = host
        self.name = f"channel {number} ({peer})"
        self.number = number
        self.sequence: Sequence | None = None
        self.busy = False
        self.since = time.monotonic()
        self._sock = sock
        self._channel: Channel | None = None
        self._link: StageLink | None = None
        self._refused: RequestRefused | None = None

    @property
    def stranger(self) -> bool:
        """Whether the handshake is under way."""
        return self._channel is None

    def run(self) -> None:
        """Serves the channel until either side ends it. Raises nothing: this is a thread's first function."""
        try:
            self._channel = self._host.accept(self._sock)
            self.since = time.monotonic()
            log.info("%s: open", self.name)
            self._serve(self._channel)
        except Closed:
            log.info("%s: closed", self.name)
        except (TransportError, AttestationError, MiniGPTError) as error:
            log.warning("%s: %s: %s", self.name, type(error).__name__, error)
        except Exception as error:  # of one channel: the others live on. Its text may hold what the peer sent
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: ended by %s\n%s", self.name, type(error).__name__, where)
        finally:
            self._end()

    def _serve(self, channel: Channel) -> None:
        try:
            while not self.stage.stopping.is_set():
                message = messages.decode(channel.receive(self.stage.limits.idle))
                self.busy = True
                self._answer(channel, message)
                self.since = time.monotonic()
                self.busy = False
            raise StageError(f"stage {self.stage.index} is stopping", stage=self.stage.index)
        except TransportError:
            raise
        except StageError as error:
            log.warning("%s: %s", self.name, error)
            self._fail(channel, error)
        except ManifestError as error:  # it has expired
            self._fail(channel, StageError(f"stage {self.stage.index}: {error}", stage=self.stage.index))
            raise
        except Exception:
            index = self.stage.index
            with suppress(TransportError):
                self._fail(channel, StageError(f"stage {index} failed inside: its log says where", stage=index))
            raise

    def _answer(self, channel: Channel, message: Message) -> None:
        first = self.stage.index == 0
        match message:
            case Generate() if first:
                if message.start == 0:
                    self._forget_broken()
                self._generate(channel, message)
            case Step() if not first:
                self._step(channel, message)
            case Status():
                self._forget_broken()
                self._send(channel, Report((self._host.report(), *self._reports_from_below())))
            case Reset():
                self._forget()
                self._send(channel, Done(Reason.RESET))
            case Cancel():
                pass  # it crossed with the end of what it meant
            case _:
                raise MessageError(f"{type(message).__name__} is not for stage {self.stage.index}")

    # What is asked of the first stage.

    def _generate(self, channel: Channel, request: Generate) -> None:
        try:
            steps = generate(self._sequence(), request, lambda: self._check_client(channel))
            reason = self._send_all(channel, steps)
        except _Cancelled:
            reason = Reason.CANCELLED
            if self._link is not None and self._link.outstanding:
                self._forget()  # chunks of a prompt are under way: the stages after this one shall drop them too
        except RequestRefused as error:
            if error.stage != self.stage.index:
                self._forget()  # this stage has computed what a later one refused
            self._send(channel, messages.refusal(error))
            return
        self._send(channel, Done(reason))

    def _send_all(self, channel: Channel, steps: Generator[Any, None, Reason]) -> Reason:
        while True:
            try:
                answer = next(steps)
            except StopIteration as end:
                return Reason(end.value)
            self._send(channel, answer)

    def _check_client(self, channel: Channel) -> None:
        """Between two steps: is the client still there, and does it want to go on?"""
        self._check_stopping()
        if not channel.poll():
            return
        try:
            message = messages.decode(channel.receive(0))
        except TimedOut:
            return  # what waits is not a whole message: a PING, or the beginning of one
        if not isinstance(message, Cancel):
            raise MessageError(f"{type(message).__name__} while a request is running: wait for its end, or Cancel")
        raise _Cancelled

    # What is asked of the stages after it.

    def _step(self, channel: Channel, step: Step) -> None:
        """Answers a step that wants an answer. A refusal waits for such a step: the sender of others reads none."""
        self._check_stopping()
        if channel.gone():
            raise Closed("the peer left before its step was computed")
        if step.start == 0:
            self._refused = None
            self._forget_broken()
        if self._refused is None:
            try:
                answer = self._sequence().step(step.start, step.hidden, Ask(step.wanted, step.sampling, step.logprobs))
            except RequestRefused as error:
                self._refused = error
        if step.wanted is Wanted.NOTHING:
            return
        if self._refused is not None:
            refused, self._refused = self._refused, None
            self._send(channel, messages.refusal(refused))
        elif answer is not None:
            self._send(channel, answer)

    # The sequence.

    def _sequence(self) -> Sequence:
        """The channel's sequence, begun if there is none. Raises RequestRefused when the stage is full."""
        if self.sequence is None:
            stage = self.stage
            if not stage.sequences.acquire(blocking=False):
                raise RequestRefused(
                    f"stage {stage.index} is busy with {stage.limits.sequences} sequences: try again later",
                    reason="busy",
                    stage=stage.index,
                )
            try:
                link = None if stage.model.is_last else self._take_link()
                self.sequence = Sequence(stage.model, link, stage=stage.index, turns=stage.turns)
            except BaseException:
                stage.sequences.release()
                raise
        return self.sequence

    def _take_link(self) -> StageLink:
        """The channel's link to the next stage, made if there is none."""
        if self._link is None:
            self._link = self.stage.take_link()
            self._link.waiting = self._check_peer
        return self._link

    def _check_peer(self) -> None:
        """While the next stage is waited for: an answer that nobody wants any more is not waited for."""
        self._check_stopping()
        if self._channel is not None and self._channel.gone():
            raise Closed("the peer left")

    def _forget_broken(self) -> None:
        """Drops the sequence if its link has broken while it was idle: then a new one can be begun."""
        if self._link is not None and (self._link.channel.expired or self._link.channel.poll()):
            self._forget()

    def _forget(self) -> None:
        """Drops the sequence, here and in the stages after this one."""
        if self.sequence is not None:
            self.sequence = None
            self.stage.sequences.release()
        self._refused = None
        if self._link is not None:
            link, self._link = self._link, None
            link.waiting = links.patient
            self.stage.give_back(link)

    def _reports_from_below(self) -> tuple[StageReport, ...]:
        """The reports of the stages after this one; that of the next with its evidence, as this stage verified it."""
        if self.stage.model.is_last:
            return ()
        following = len(self.stage.manifest.stages) - self.stage.index - 1
        try:
            link = self._take_link()
            report = link.ask(Status(), timeout=STATUS_TIMEOUT * following)
            if not isinstance(report, Report) or not report.stages:
                raise MessageError(f"stage {link.stage} did not answer with a report", stage=link.stage)
        except (StageError, RequestRefused) as error:
            self._forget()  # and with it a link that has broken
            reason = "attestation" if isinstance(error, UntrustedStage) else "failed"
            return (StageReport(stage=self.stage.index + 1, error=str(error), reason=reason),)
        evidence = dump_evidence(link.channel.peer_evidence, link.channel.peer_binding)
        return (replace(report.stages[0], evidence=evidence), *report.stages[1:])

    # The end.

    def stop(self) -> None:
        """Called by another thread: ends the channel now if it is idle, at its next step otherwise."""
        channel = self._channel
        if channel is not None and not self.busy:
            channel.close()

    def turn_out(self) -> None:
        """Called by another thread: ends the channel, to make room."""
        log.warning("%s: ended for a newcomer", self.name)
        hang_up(self._sock)

    def _check_stopping(self) -> None:
        if self.stage.stopping.is_set():
            raise StageError(f"stage {self.stage.index} is stopping", stage=self.stage.index)

    def _fail(self, channel: Channel, error: StageError) -> None:
        """Tells the peer what failed, and in which stage; the channel ends with it."""
        reason = "attestation" if isinstance(error, UntrustedStage) else "failed"
        stage = self.stage.index if error.stage is None else error.stage
        self._send(channel, Failure(stage, reason, str(error)))

    def _send(self, channel: Channel, message: Message) -> None:
        channel.send(messages.encode(message))

    def _end(self) -> None:
        try:
            self._forget()
        finally:
            self._channel.close() if self._channel is not None else self._sock.close()
            self._host.forget(self.number)
