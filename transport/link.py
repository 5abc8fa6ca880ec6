"""One end of a link, without I/O: handshake, evidence both ways, then a session.

    I → R   preamble, msg1, mac            clear: version and suite; the prologue binds them, the manifest and both ids
    R → I   msg2
    I → R   msg3                           then both have keys, and h
    R → I   ATTEST, sealed to h            or one ALERT
    I → R   ATTEST, sealed to h            after I has verified R's; messages may follow at once
            MESSAGE, PING, CLOSE, ALERT    either way, once the peer's evidence is accepted

`initiate` and `respond` are this page in code. They yield bytes to send, or the number of bytes they need next, and
return the `Session`: there is none before evidence was accepted. Before there are keys, an end that refuses says
nothing; afterwards it sends at most one ALERT, whose length does not depend on the reason.

The mac is keyed by the manifest's bytes, and checked before anything that costs more than microseconds: it turns away
scanners and other strangers. It authenticates nobody: whoever has the manifest can make it, and the host has it.
"""

import functools
import hashlib
import hmac
import struct
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from attest import (
    MAX_CLAIMS,
    MAX_ENDORSEMENTS,
    MAX_EVIDENCE,
    MAX_TOTAL,
    AttestationError,
    Attester,
    Binding,
    Evidence,
    Verifier,
)
from transport import noise
from transport.errors import (
    Alert,
    DecodeError,
    Foreign,
    HandshakeError,
    LimitError,
    PeerAlert,
    RecordError,
    TransportError,
    Truncated,
    Unanswered,
)
from transport.noise import KeyPair, Split
from transport.records import MAX_MESSAGE, PROCESS_BUDGET, Budget, Opener, Sealer, Type
from transport.session import Session

__all__ = [
    "CLIENT", "SUITES", "End", "Opening", "Session", "Steps", "dump_attest", "initiate", "load_attest", "mac_key",
    "opening", "respond",
]  # fmt: skip

VERSION = 2
ATTEST_VERSION = 1
CLIENT = 0xFFFF  # the id of a client, which is no stage
MACLEN = 16  # bytes

_MAGIC = b"mGPT"
_PREAMBLE = struct.Struct(">4sBBxx")
_PROLOGUE = struct.Struct(">12s8s32sHH")
_LENGTH = struct.Struct(">H")
_ATTEST = struct.Struct(">BBH")
_U32 = struct.Struct(">I")

# The types that are allowed before the peer's evidence is accepted, with the largest body of each in bytes. All records
# but the last are full, so a stranger can make an end open five at most.
_FIRST: dict[int, int] = {Type.ATTEST: MAX_TOTAL, Type.ALERT: 1}


@dataclass(frozen=True)
class Suite:
    """A handshake."""

    protocol_name: bytes
    pattern: noise.Pattern

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The exact bytes of its messages, because payloads are empty."""
        return noise.message_lengths(self.pattern)


SUITES = {
    1: Suite(b"Noise_XX_25519_ChaChaPoly_SHA256", noise.XX),  # 32, 96, 64 bytes
    2: Suite(b"Noise_XXhfs_25519+MLKEM768_ChaChaPoly_SHA256", noise.XXHFS),  # 1216, 1200, 64 bytes
}


@dataclass(frozen=True)
class End:
    """What one end is, and what it requires of the other. Raises ValueError if a field has another form."""

    attester: Attester  # makes this end's evidence
    verifier: Verifier  # judges the peer's
    manifest_sha256: bytes  # 32 bytes; a peer with another manifest cannot complete the handshake
    mac_key: bytes = field(repr=False)  # `mac_key` of the same manifest, 32 bytes
    own_id: int  # index of the stage at this end, or CLIENT
    peer_id: int  # and at the other
    # 32 bytes, if the peer knows this end by its static key; None for a fresh one
    static_private: bytes | None = field(default=None, repr=False)
    # static public keys of the initiators that a responder serves; None leaves that to the verifier
    admit: frozenset[bytes] | None = None
    suites: tuple[int, ...] = (2,)  # the acceptable ones; an initiator proposes the first
    keys: frozenset[bytes] | None = None  # of the peer's messages, as in `codec.decode`

    def __post_init__(self) -> None:
        if len(self.manifest_sha256) != 32:
            raise ValueError(f"manifest_sha256: got {len(self.manifest_sha256)} bytes, wanted 32")
        if len(self.mac_key) != 32:
            raise ValueError(f"mac_key: got {len(self.mac_key)} bytes, wanted 32")
        for name, number in (("own_id", self.own_id), ("peer_id", self.peer_id)):
            if not 0 <= number <= CLIENT:
                raise ValueError(f"{name}: got {number}, wanted 0..{CLIENT}")
        if self.static_private is not None and len(self.static_private) != noise.DHLEN:
            raise ValueError(f"static_private: got {len(self.static_private)} bytes, wanted {noise.DHLEN}")
        if not self.suites or not set(self.suites) <= set(SUITES):
            raise ValueError(f"suites: got {self.suites}, wanted some of {tuple(SUITES)}")

    def prologue(self, preamble: bytes, role: str) -> bytes:
        """What this end, the `role` "I" or "R" of a handshake, takes as agreed on: 56 bytes."""
        ids = (self.own_id, self.peer_id) if role == "I" else (self.peer_id, self.own_id)
        return _PROLOGUE.pack(b"MGPT-LINK-v2", preamble, self.manifest_sha256, *ids)


def mac_key(manifest: bytes) -> bytes:
    """The key of the mac after message 1, 32 bytes, from a manifest's bytes."""
    return hashlib.sha256(b"MGPT-LINK-v2 mac1" + manifest).digest()


def _mac(end: End, preamble: bytes, role: str, first: bytes) -> bytes:
    """What follows message 1, `first` with its length. It is no part of the handshake hash."""
    return hmac.digest(end.mac_key, end.prologue(preamble, role) + first, "sha256")[:MACLEN]


def _framed(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message


Steps = Generator[bytes | int, bytes | None, Session]


def initiate(end: End, *, max_message: int = MAX_MESSAGE, budget: Budget = PROCESS_BUDGET) -> Steps:
    """The end that connects.

    Raises:
        TransportError: the handshake failed, or the peer refused.
        attest.AttestationError: the peer's evidence is refused, or our own attester cannot make any.
    """
    preamble = _PREAMBLE.pack(_MAGIC, VERSION, end.suites[0])
    s, steps = _handshake(end, preamble, "I")
    first = _framed(next(steps) or b"")
    try:
        yield preamble + first + _mac(end, preamble, "I", first)
        split = yield from _shake(steps, preamble, None)
    except Truncated as error:
        raise Unanswered(f"the peer hung up after the first message: {error}") from error
    stranger = _Stranger(split, s.public, "I", budget)
    session = yield from stranger.verify(end.verifier, max_message)
    yield from stranger.attest(end.attester)
    return session


class Opening(NamedTuple):
    """What an initiator has said before it is answered."""

    preamble: bytes
    message: bytes  # 1


def respond(
    end: End, opened: Opening | None = None, *, max_message: int = MAX_MESSAGE, budget: Budget = PROCESS_BUDGET
) -> Steps:
    """The end that listens; `opened` is what `opening` returned, if that was received already. Raises as `initiate`."""
    preamble, message = opened or (yield from opening(end))
    s, steps = _handshake(end, preamble, "R")
    next(steps)
    split = yield from _shake(steps, preamble, message)
    stranger = _Stranger(split, s.public, "R", budget)
    if end.admit is not None and split.rs not in end.admit:
        why = HandshakeError("the peer's static key is not among those that the manifest admits")
        yield from stranger.refuse(Alert.ATTESTATION, why)
    yield from stranger.attest(end.attester)
    return (yield from stranger.verify(end.verifier, max_message))


def opening(end: End) -> Generator[int, bytes | None, Opening]:
    """Receives what the initiator says first, whose mac shows that it has the manifest. It costs microseconds.

    Raises HandshakeError.
    """
    preamble = yield from _receive(_PREAMBLE.size)
    suite = preamble[5]
    if preamble != _PREAMBLE.pack(_MAGIC, VERSION, suite):
        raise Foreign(f"preamble: got {preamble.hex()}, wanted that of this protocol, version {VERSION}")
    if suite not in end.suites:
        raise HandshakeError(f"preamble: suite {suite}, wanted one of {end.suites}: the peer has another manifest")
    length = yield from _length(1, SUITES[suite].lengths[0])
    received = yield from _receive(length + MACLEN)
    message, mac = received[:length], received[length:]
    if not hmac.compare_digest(mac, _mac(end, preamble, "R", _framed(message))):
        raise HandshakeError("message 1: the mac is wrong: the peer has another manifest, or wants another stage")
    return Opening(preamble, message)


def _receive(count: int) -> Generator[int, bytes | None, bytes]:
    data = yield count
    if data is None or len(data) != count:
        raise TypeError(f"the link waits for exactly {count} bytes")
    return data


def _length(number: int, wanted: int) -> Generator[int, bytes | None, int]:
    """The length before message `number`."""
    (announced,) = _LENGTH.unpack((yield from _receive(_LENGTH.size)))
    if announced != wanted:
        raise Foreign(f"handshake message {number}: {announced} bytes, wanted {wanted}")
    return wanted


def _handshake(end: End, preamble: bytes, role: str) -> tuple[KeyPair, noise.Handshake]:
    """Our static key, and our end of the Noise handshake."""
    suite = SUITES[preamble[5]]
    s = KeyPair.generate() if end.static_private is None else KeyPair.from_private(end.static_private)
    prologue = end.prologue(preamble, role)
    return s, noise.handshake(suite.protocol_name, suite.pattern, initiator=role == "I", prologue=prologue, s=s)


def _shake(
    steps: noise.Handshake, preamble: bytes, message: bytes | None
) -> Generator[bytes | int, bytes | None, Split]:
    """The handshake from message 2 on, each after its length; `message` is the first, at the end that received it."""
    try:
        for number, length in enumerate(SUITES[preamble[5]].lengths[1:], 2):
            outgoing = steps.send(message)
            if outgoing is not None:
                yield _framed(outgoing)
                message = None
            else:
                message = yield from _receive((yield from _length(number, length)))
        steps.send(message)
    except StopIteration as finished:
        split: Split = finished.value
        return split
    raise AssertionError("a suite has one length for each message of its pattern")


class _Stranger:
    """The other end of a finished handshake: keys are shared, but it has not shown what it is."""

    def __init__(self, split: Split, own_static: bytes, role: str, budget: Budget) -> None:
        self.split = split
        self.role = role
        self.own_static = own_static
        self.sealer = Sealer(split.sending)
        self.opener = Opener(split.receiving, _FIRST, budget)

    def attest(self, attester: Attester) -> Generator[bytes | int, bytes | None, None]:
        """Sends our own evidence."""
        try:
            binding = Binding(self.role, attester.provider, self.split.h, self.own_static, attester.claims)
            body = dump_attest(attester.attest(binding))
        except Exception as error:  # any error of a platform: the peer learns that there is nothing to wait for
            yield from self.refuse(Alert.INTERNAL, error)
        yield self.sealer.seal(Type.ATTEST, body)

    def verify(self, verifier: Verifier, max_message: int) -> Generator[bytes | int, bytes | None, Session]:
        """Receives the peer's evidence. Before it is accepted, nothing else is."""
        peer = "I" if self.role == "R" else "R"
        try:
            message = None
            while message is None:  # and not a byte more than the peer's first message
                header = yield from _receive(_LENGTH.size)
                self.opener.feed(header)
                self.opener.feed((yield from _receive(*_LENGTH.unpack(header))))
                message = self.opener.next()
            if message.type == Type.ALERT:
                raise PeerAlert.from_body(message.body)
            evidence = load_attest(message.body)
            binding = Binding(peer, evidence.provider, self.split.h, self.split.rs, evidence.claims)
            result = verifier.verify(evidence, binding)
        except AttestationError as error:
            yield from self.refuse(Alert.ATTESTATION, error)
        except (RecordError, DecodeError, LimitError) as error:
            yield from self.refuse(error.alert, error)
        except BaseException:  # the driver's too, as when the peer is gone: what it made us hold goes with it
            self.opener.discard()
            raise
        return Session(self.sealer, self.opener, result, evidence, binding, max_message=max_message)

    def refuse(self, code: Alert, error: Exception) -> Generator[bytes | int, bytes | None, NoReturn]:
        """Tells the peer, and raises."""
        self.opener.discard()
        with suppress(TransportError):  # the driver's, if the peer is gone already: `error` is the better reason
            yield self.sealer.seal(Type.ALERT, bytes([code]))
        self.sealer.discard()
        raise error


def dump_attest(evidence: Evidence) -> bytes:
    """The body of an ATTEST. Raises ValueError if the evidence is more than it may hold."""
    try:
        body = _ATTEST.pack(ATTEST_VERSION, evidence.provider, len(evidence.claims)) + evidence.claims
        body += _U32.pack(len(evidence.evidence)) + evidence.evidence
        body += bytes([len(evidence.endorsements)])
        for item in evidence.endorsements:
            body += _U32.pack(len(item)) + item
        load_attest(body)  # what the peer would refuse is refused here
    except (TransportError, struct.error, ValueError) as error:
        raise ValueError(f"one's own evidence cannot be sent: {error}") from None
    return body


def load_attest(body: bytes) -> Evidence:
    """The evidence in an ATTEST, unverified. Raises DecodeError for its layout, LimitError for a size."""
    if len(body) > MAX_TOTAL:
        raise LimitError(f"ATTEST: {len(body)} bytes, wanted at most {MAX_TOTAL}")
    at = 0

    def take(what: str, count: int, most: int = MAX_TOTAL) -> bytes:
        nonlocal at
        if count > most:
            raise LimitError(f"ATTEST: {what} of {count} bytes, wanted at most {most}")
        if count > len(body) - at:
            raise DecodeError(f"ATTEST: {what} of {count} bytes announced, {len(body) - at} left")
        at += count
        return body[at - count : at]

    def sized(what: str, most: int) -> bytes:
        (count,) = _U32.unpack(take(f"length of {what}", _U32.size))
        return take(what, count, most)

    version, provider, length = _ATTEST.unpack(take("head", _ATTEST.size))
    if version != ATTEST_VERSION:
        raise DecodeError(f"ATTEST: version {version}, wanted {ATTEST_VERSION}")
    claims = take("claims", length, MAX_CLAIMS)
    evidence = sized("evidence", MAX_EVIDENCE)
    count = take("number of endorsements", 1)[0]
    if count > MAX_ENDORSEMENTS:
        raise LimitError(f"ATTEST: {count} endorsements, wanted at most {MAX_ENDORSEMENTS}")
    endorsements = tuple(sized("endorsement", MAX_TOTAL) for _ in range(count))
    if at != len(body):
        raise DecodeError(f"ATTEST: {len(body) - at} bytes follow its end")
    return Evidence(provider, claims, evidence, endorsements)
