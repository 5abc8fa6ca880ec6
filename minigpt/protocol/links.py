"""The links of a pipeline: what the manifest demands of both ends of each, and what a broken one means.

Link 0 leads from a client to stage 0, link i from stage i - 1 to stage i. The manifest decides alone who is acceptable
at either end; no flag makes it weaker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from attest import AcceptUnattested, AttestationError, Attester, Binding, Evidence, Provider, Unattested
from minigpt.errors import MessageError, RequestRefused, StageError, UntrustedStage
from minigpt.protocol import messages
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import CHUNK, Answer, Ask, Failure, Logits, Message, Refusal, Token, Traffic, Wanted
from transport.channel import PROCESS_BUDGET, Budget, Channel, Deadlines
from transport.errors import Alert, PeerAlert, TimedOut, TransportError, Unreachable
from transport.link import CLIENT, End

LOOK = 0.5  # seconds between two looks at whether an answer is still wanted


def patient() -> None:
    """Waits on."""


class OneAtATime:
    """An attester that makes one piece of evidence at a time: platforms serve one request, and slowly."""

    def __init__(self, attester: Attester) -> None:
        self._attester = attester
        self._lock = threading.Lock()

    @property
    def provider(self) -> Provider:
        return self._attester.provider

    @property
    def claims(self) -> bytes:
        return self._attester.claims

    def attest(self, binding: Binding) -> Evidence:
        with self._lock:
            return self._attester.attest(binding)


def calling_end(manifest: Manifest, index: int, attester: Attester | None, static_private: bytes | None = None) -> End:
    """The initiator's end of link `index`. A client has no attester; its static key is fresh unless given."""
    return End(
        attester=attester or Unattested(),
        verifier=manifest.verifier(index),
        manifest_sha256=manifest.digest,
        own_id=CLIENT if index == 0 else index - 1,
        peer_id=index,
        static_private=static_private,
        suites=manifest.suites,
    )


def answering_end(manifest: Manifest, index: int, attester: Attester) -> End:
    """The responder's end of link `index`, in stage `index`."""
    first = index == 0
    return End(
        attester=attester,
        verifier=AcceptUnattested() if first else manifest.verifier(index - 1),
        manifest_sha256=manifest.digest,
        own_id=index,
        peer_id=CLIENT if first else index - 1,
        admit=manifest.clients if first else None,
        suites=manifest.suites,
    )


def dial(manifest: Manifest, index: int, end: End, deadlines: Deadlines, budget: Budget = PROCESS_BUDGET) -> Channel:
    """Connects to stage `index`. Raises UntrustedStage, or StageError if it cannot be reached."""
    try:
        return Channel.connect(manifest.stages[index].address, end, deadlines=deadlines, budget=budget)
    except AttestationError as error:
        raise UntrustedStage(f"stage {index}: evidence refused: {error}", stage=index) from error
    except TransportError as error:
        raise broken(error, index) from error


def broken(error: TransportError, index: int) -> StageError:
    """What a failure of the link to stage `index` means to whoever waits for its answer."""
    if isinstance(error, PeerAlert):
        kind = UntrustedStage if error.code == Alert.ATTESTATION else StageError
        return kind(f"stage {index} refuses the link: {error}", stage=index)
    if isinstance(error, Unreachable):
        return StageError(f"stage {index} cannot be reached: {error}", stage=index)
    if isinstance(error, TimedOut):
        return StageError(f"stage {index} did not answer in time: {error}", stage=index)
    return StageError(f"stage {index} is gone: {error}", stage=index)


def failed(failure: Failure) -> StageError:
    """The error that a Failure tells of."""
    kind = UntrustedStage if failure.reason == "attestation" else StageError
    return kind(failure.text, stage=failure.stage)


class StageLink:
    """The near end of a link to a stage, for one sequence at a time: the rest of the model, seen from here.

    Attributes:
        outstanding: whether steps are under way or an answer is due; such a link is never used for another sequence.
        waiting: called now and then while an answer is waited for; what it raises ends the wait.
    """

    def __init__(self, channel: Channel, stage: int, timeout: float) -> None:
        self.channel = channel
        self.stage = stage
        self.outstanding = False
        self.waiting: Callable[[], None] = patient
        self._timeout = timeout
        self._chunk = 0  # bytes of the step before, if it was a whole chunk of a prompt

    @property
    def traffic(self) -> Traffic:
        """Seconds spent sealing, seconds spent opening, and bytes carried, so far."""
        link = self.channel
        return link.seal_seconds, link.open_seconds, float(link.bytes_sent + link.bytes_received)

    def step(self, start: int, rows: messages.Hidden, ask: Ask) -> Answer | None:
        """Sends hidden states on. Raises RequestRefused, or StageError when a stage after this one failed."""
        step = messages.Step(start, rows, ask.wanted, ask.sampling, ask.logprobs)
        if ask.wanted is Wanted.NOTHING:
            if self.channel.poll():  # nothing is due: it can only be bad news
                raise self._out_of_turn(self.receive())
            self.outstanding = True  # until a later step is answered
            size = self.send(step)
            self._chunk = size if len(rows) == CHUNK else 0
            return None
        # A long prompt's last chunk looks like the others: its own bucket, after theirs, would tell the length.
        least, self._chunk = self._chunk, 0
        answer = self.ask(step, least=least)
        if not isinstance(answer, Token | Logits) or not ask.fits(answer, start, len(rows)):
            raise self._out_of_turn(answer)
        return answer

    def ask(self, message: Message, *, least: int = 0, timeout: float | None = None) -> Message:
        """Sends a message and waits for its answer; a Refusal is raised as RequestRefused."""
        self.outstanding = True
        self.send(message, least)
        answer = self.receive(timeout)
        self.outstanding = False
        if isinstance(answer, Refusal):
            raise messages.refused(answer)
        return answer

    def send(self, message: Message, least: int = 0) -> int:
        """Sends a message, padded as if it had `least` bytes; returns how many it has."""
        try:
            return self.channel.send(messages.encode(message), least)
        except TransportError as error:
            raise self._last_words(error) from error

    def receive(self, timeout: float | None = None) -> Message:
        """The next message; a Failure is raised as StageError."""
        until = time.monotonic() + (self._timeout if timeout is None else timeout)
        message = None
        while message is None:
            left = until - time.monotonic()
            try:
                message = messages.decode(self.channel.receive(min(left, LOOK)))
            except TransportError as error:
                if not isinstance(error, TimedOut) or left <= LOOK:
                    raise broken(error, self.stage) from error
            except MessageError as error:
                raise MessageError(f"stage {self.stage}: {error}", stage=self.stage) from None
            if message is None:
                self.waiting()
        if isinstance(message, Failure):
            raise failed(message)
        return message

    def _last_words(self, error: TransportError) -> StageError:
        """A stage that fails says so before it hangs up: that is a better reason than the broken pipe."""
        try:
            message = messages.decode(self.channel.receive(1.0))
        except (TransportError, MessageError):
            return broken(error, self.stage)
        return failed(message) if isinstance(message, Failure) else broken(error, self.stage)

    def _out_of_turn(self, message: Message) -> MessageError:
        self.outstanding = True  # whatever else comes is not to be trusted to be in step
        return MessageError(f"stage {self.stage} sent {type(message).__name__} out of turn", stage=self.stage)

    def reset(self) -> bool:
        """Makes that stage forget the sequence; whether this link may then be used for another."""
        if self.outstanding:
            return False
        try:
            answer = self.ask(messages.Reset())
        except (StageError, RequestRefused):
            return False
        return answer == messages.Done(messages.Reason.RESET)
