"""The links of a pipeline: what the manifest demands of both ends, and how one end asks the other.

Link 0 leads from a client to stage 0, link i from stage i - 1 to stage i. The manifest alone decides who is acceptable
at either end; no flag weakens it.
"""

from dataclasses import replace
from typing import Any

from attest import (
    AcceptUnattested,
    AttestationError,
    Attester,
    EvidenceError,
    PolicyError,
    Unattested,
    dump_evidence,
)
from minigpt.errors import (
    LateStage,
    MessageError,
    RequestRefused,
    StageError,
    UnreachableStage,
    UntrustedStage,
    UsageError,
)
from minigpt.protocol import batches, messages
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import Failure, Message, Refusal, StageReport
from minigpt.protocol.request import Traffic
from transport.channel import PROCESS_BUDGET, Budget, Channel, Deadlines
from transport.errors import (
    Abandoned,
    Alert,
    Closed,
    Foreign,
    PeerAlert,
    Silent,
    TimedOut,
    TransportError,
    Unanswered,
    Unauthentic,
    Unreachable,
)
from transport.link import CLIENT, End
from transport.records import MAX_MESSAGE
from transport.session import SILENCE
from transport.sockets import connect

PROBE_AFTER = 5.0  # seconds of idleness after which a link is tried before anything begins on it
PROBE = 2.0  # seconds that it may take to answer
_FAILURES: dict[str, type[StageError]] = {
    "attestation": UntrustedStage,
    "unreachable": UnreachableStage,
}  # other reasons are a StageError


def calling_end(manifest: Manifest, index: int, attester: Attester | None, static_private: bytes | None = None) -> End:
    """The initiator's end of link `index`. A client has no attester; its static key is fresh unless given."""
    return End(
        attester=attester or Unattested(),
        verifier=manifest.verifier(index),
        manifest_sha256=manifest.digest,
        mac_key=manifest.mac_key,
        own_id=CLIENT if index == 0 else index - 1,
        peer_id=index,
        static_private=static_private,
        suites=manifest.suites,
        keys=messages.KEYS,
    )


def answering_end(manifest: Manifest, index: int, attester: Attester) -> End:
    """The responder's end of link `index`, in stage `index`."""
    first = index == 0
    return End(
        attester=attester,
        verifier=AcceptUnattested() if first else manifest.verifier(index - 1),
        manifest_sha256=manifest.digest,
        mac_key=manifest.mac_key,
        own_id=index,
        peer_id=CLIENT if first else index - 1,
        admit=manifest.clients if first else None,
        suites=manifest.suites,
        keys=messages.KEYS,
    )


def largest(manifest: Manifest, index: int) -> int:
    """Bytes of the largest message that stage `index` takes: all the ids that a Generate can have, so that they are
    refused in words where the model has fewer positions; or a batch with a chunk and as many tokens as can be, each
    with the ids that it needs."""
    rows, config = messages.CHUNK + batches.MAX_SEGMENTS, manifest.config
    array = 4 * rows * (config.n_embd + config.n_positions) if index else 4 * messages.MAX_IDS
    return min(array + 2**17, MAX_MESSAGE)


def dial(
    manifest: Manifest,
    addresses: Addresses,
    index: int,
    end: End,
    deadlines: Deadlines,
    budget: Budget = PROCESS_BUDGET,
) -> Channel:
    """Connects to stage `index`, where it is now. Raises UntrustedStage or UnreachableStage."""
    try:
        address = addresses.of(index)
    except UsageError as error:  # while it changes, perhaps
        raise UnreachableStage(f"stage {index} cannot be reached: {error}", stage=index) from None
    try:
        return Channel.connect(address, end, deadlines=deadlines, budget=budget)
    except AttestationError as error:
        raise _untrusted(error, manifest, index) from error
    except Unauthentic as error:
        text = (
            f"stage {index}: its answer in the handshake is not authentic: something between altered it, or whatever "
            f"answers at {address} is no stage of this manifest"
        )
        raise UntrustedStage(text, stage=index) from error
    except Unanswered as error:
        text = (
            f"stage {index} hung up in the handshake: most likely it has another manifest; ours has the sha256 "
            f"{manifest.digest.hex()}: compare it with the file there, and see its log. Or another stage or none "
            f"listens at {address}, or it was just ending: then try again"
        )
        raise UnreachableStage(text, stage=index) from error
    except Foreign as error:
        text = (
            f"what listens at {address} is most likely no stage of this version of minigpt ({error}): "
            f"correct the place of stage {index}, or see what runs there"
        )
        raise UnreachableStage(text, stage=index) from error
    except TransportError as error:
        found = broken(error, index)
        hint = ""
        if isinstance(error, Unreachable):
            hint = ": start it, or correct its place"
        elif isinstance(error, TimedOut):
            option = "--handshake-timeout (handshake_timeout=)"
            late = f": allow it more with {option}, or see what listens at {address}"
            hint = late if "handshake" in str(error) else ": see whether its machine runs, or correct its place"
        elif isinstance(found, UntrustedStage) and index == 0 and manifest.clients is not None:
            hint = ": the manifest lists its clients, and this one's key (--client-key, client_key=) is not among them"
        kind = UntrustedStage if isinstance(found, UntrustedStage) else UnreachableStage
        raise kind(f"{found}{hint}", stage=index) from error


def _untrusted(error: AttestationError, manifest: Manifest, index: int) -> UntrustedStage:
    if not isinstance(error, EvidenceError | PolicyError):
        return UntrustedStage(f"stage {index}: evidence refused: {error}", stage=index)
    failures = error.failures
    rest = f" (and {len(failures) - 1} more of its checks failed)" if len(failures) > 1 else ""
    text = f"stage {index}: evidence refused: {failures[0][1]}{rest}"
    return UntrustedStage(
        text, stage=index, failures=failures, checks=[str(check) for check in manifest.checks(index, failures)]
    )


def listens(addresses: Addresses, index: int, timeout: float) -> str:
    """For people: whether anything listens where stage `index` is, which is not asked for more."""
    try:
        address = addresses.of(index)
        connect(address, timeout).close()
    except (UsageError, TransportError) as error:
        return f"it cannot be reached from here either: {error}"
    return f"something listens at {address}"


def broken(error: TransportError, index: int) -> StageError:
    """What a failure of the link to stage `index` means to whoever waits for its answer."""
    if isinstance(error, PeerAlert):
        kind: type[StageError] = UntrustedStage if error.code == Alert.ATTESTATION else StageError
        return kind(f"stage {index} refuses the link: {error}", stage=index)
    if isinstance(error, Unreachable):
        return StageError(f"stage {index} cannot be reached: {error}", stage=index)
    if isinstance(error, Silent):
        return StageError(f"stage {index} {error}", stage=index)
    if isinstance(error, TimedOut):
        return LateStage(f"stage {index} did not answer in time: {error}", stage=index)
    kind = UnreachableStage if isinstance(error, Closed) else StageError  # whoever says CLOSE has not died
    return kind(f"stage {index} is gone: {error}", stage=index)


def failed(failure: Failure) -> StageError:
    """The error that a Failure reports."""
    return _FAILURES.get(failure.reason, StageError)(failure.text, stage=failure.stage)


def failure(error: StageError, stage: int) -> Failure:
    """The Failure that `stage` reports an error with; the error may name another stage."""
    reason = next((word for word, kind in _FAILURES.items() if isinstance(error, kind)), "failed")
    return Failure(stage if error.stage is None else error.stage, reason, str(error))


class StageLink:
    """The near end of a link to a stage.

    Args:
        channel: to that stage.
        manifest: of the pipeline.
        stage: its index.
        timeout: seconds to wait for an answer.
        asker: the channel of whoever waits for the answers; if that peer leaves, the wait ends with `Abandoned`.
    """

    def __init__(
        self, channel: Channel, manifest: Manifest, stage: int, timeout: float, asker: Channel | None = None
    ) -> None:
        self.channel = channel
        self.stage = stage
        self._config = manifest.config
        self._behind = range(stage, len(manifest.stages))  # that stage and those after it: it may speak for them
        self._timeout = timeout
        self._asker = asker
        self._due = False  # whether that stage still owes something: then the channel is of no use to others

    @property
    def traffic(self) -> Traffic:
        """Seconds spent sealing, seconds spent opening, and bytes carried, so far."""
        link = self.channel
        return link.seal_seconds, link.open_seconds, float(link.bytes_sent + link.bytes_received)

    @property
    def stale(self) -> bool:
        """Whether nothing can begin on this link: it is too old, or the stage said something unasked, or is gone."""
        if self.channel.expired:
            return True
        try:
            return self._unasked() is not None or self.channel.poll()
        except StageError:
            return True

    def usable(self) -> bool:
        """Whether a sequence can begin on this link, on which there is none: one that was idle is asked first."""
        return not self.stale and (self.channel.idle < PROBE_AFTER or self._reset(PROBE))

    def status(self, timeout: float | None = None) -> tuple[StageReport, ...]:
        """The state of that stage, with its evidence as verified here, and of those after it, up to one that fails."""
        answer = self.ask(messages.Status(), timeout=timeout)
        found = answer.stages if isinstance(answer, messages.Report) else ()
        last = bool(found) and (bool(found[-1].error) or len(found) == len(self._behind))
        if (
            not last
            or [report.stage for report in found] != list(self._behind[: len(found)])
            or any(report.error for report in (found[0], *found[:-1]))
        ):
            raise self._illegal("did not answer with a report of the stages in order")
        evidence = dump_evidence(self.channel.peer_evidence, self.channel.peer_binding)
        return (replace(found[0], evidence=evidence), *found[1:])

    def ask(self, message: Message, *, timeout: float | None = None) -> Message:
        """Sends a message and waits for its answer; a Refusal is raised as RequestRefused."""
        self._due = True
        self.send(message)
        answer = self.receive(timeout)
        self._due = False
        if isinstance(answer, Refusal):
            raise messages.refused(answer)
        return answer

    def send(self, message: Message) -> None:
        """Sends a message. Raises StageError."""
        self._send(messages.encode(message))

    def receive(self, timeout: float | None = None) -> Message:
        """The next message, while one is due; a Failure is raised as StageError.

        Raises Abandoned if the asker leaves first.
        """
        return self._heard(self._receive(timeout))

    def _send(self, plain: Any, least: int = 0) -> None:
        try:
            self.channel.send(plain, least)
        except TransportError as error:
            raise self._last_words(error) from error

    def _receive(self, timeout: float | None = None) -> Any:
        limit = self._timeout if timeout is None else timeout
        try:
            return self.channel.receive(limit, asker=self._asker, silence=SILENCE)
        except Abandoned:
            raise
        except TransportError as error:
            if isinstance(error, TimedOut) and not isinstance(error, Silent):
                option = "--answer-timeout" if self.stage else "--timeout (timeout=)"
                hint = f"allow it more with {option}, or " if timeout is None else ""
                text = f"stage {self.stage} did not answer in time, {limit:g} s: {hint}see what it is doing"
                raise LateStage(text, stage=self.stage) from error
            raise broken(error, self.stage) from error

    def _unasked(self) -> Message | None:
        """What that stage has said though nothing is due; PINGs are nothing. Raises as `receive`, and never waits."""
        if not self.channel.poll():
            return None
        try:
            return self._heard(self.channel.receive(0))
        except TimedOut:
            return None
        except TransportError as error:
            raise broken(error, self.stage) from error

    def _heard(self, plain: object) -> Message:
        """The message in a plain value, if it may come now; a Failure is raised."""
        try:
            message = self._read(plain)
        except MessageError as error:
            raise self._illegal(f"sent something wrong: {error}") from None
        if isinstance(message, Failure | Refusal) and message.stage not in self._behind:
            raise self._illegal(f"speaks for stage {message.stage}, which is not behind it")
        if isinstance(message, Failure):
            raise failed(message)
        return message

    def _read(self, plain: object) -> Message:
        asker = "a client" if self.stage == 0 else f"stage {self.stage - 1}"
        return messages.shown(messages.decode(plain, messages.ANSWERS, asker))

    def release(self) -> Channel | None:
        """The channel, if somebody else may use it; otherwise it is closed."""
        if not self._due:
            return self.channel
        self.channel.abort()
        return None

    def _reset(self, timeout: float | None = None) -> bool:
        """Makes that stage forget the sequence; whether it says that it has."""
        asker, self._asker = self._asker, None  # who may be gone, and that stage must forget all the same
        try:
            return self.ask(messages.Reset(), timeout=timeout) == messages.Done(messages.Reason.RESET)
        except (StageError, RequestRefused):
            return False
        finally:
            self._asker = asker

    def _last_words(self, error: TransportError) -> StageError:
        """A stage that fails says so before it hangs up: that is a better reason than the broken pipe."""
        try:
            message = self._read(self.channel.receive(1.0))
        except Closed as closed:
            if self.channel.fileno() < 0:  # it was this end that ended it, for the error that we have
                return broken(error, self.stage)
            return broken(closed, self.stage)
        except (TransportError, MessageError):
            return broken(error, self.stage)
        return failed(message) if isinstance(message, Failure) else broken(error, self.stage)

    def _illegal(self, what: str) -> MessageError:
        self._due = True  # whatever else comes cannot be trusted to be in step
        return MessageError(f"stage {self.stage} {what}", stage=self.stage)
