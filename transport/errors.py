"""What can go wrong on a link, grouped by what a caller does about it.

Bytes from outside raise these errors and the verifier's `attest.AttestationError`, and no others.
"""

import enum
from typing import Self


class Alert(enum.IntEnum):
    """The reasons that an ALERT can give."""

    UNEXPECTED = 1
    DECODE = 2
    ATTESTATION = 3
    LIMIT = 4
    BUSY = 5
    INTERNAL = 6


_REASONS: dict[int, str] = {
    Alert.UNEXPECTED: "it received something that the protocol does not allow there",
    Alert.DECODE: "it could not decode a message",
    Alert.ATTESTATION: "it refuses our evidence or our static key",
    Alert.LIMIT: "a limit of its own was reached",
    Alert.BUSY: "it is busy",
    Alert.INTERNAL: "something failed inside it",
}


class TransportError(Exception):
    """Root of the package's errors."""

    exit_code = 4  # what the command line ends with


class AddressError(TransportError, ValueError):
    """Not an address of a link: correct it."""

    exit_code = 2


class SettingError(TransportError):
    """An environment variable has a bad value, or names a package that is not installed: correct it."""

    exit_code = 2


class Unreachable(TransportError):
    """Nobody answers there, or it cannot be bound: start the peer, or correct the address."""


class TimedOut(TransportError):
    """A deadline passed: try again, or allow more time."""


class Silent(TimedOut):
    """The peer owed an answer and gave no sign of life: it counts as dead."""


class Unanswered(TransportError):
    """The peer hung up after the first message of a handshake: most likely it has another manifest, or is ending."""


class Abandoned(TransportError):
    """The peer that asked for the awaited message has left: stop, nobody wants the answer."""


class Closed(TransportError):
    """The peer ended its direction with a CLOSE, or this end is closed: nothing more will come."""


class Truncated(TransportError):
    """The connection ended without a CLOSE: what came before is authentic, but not complete."""


class ProtocolError(TransportError):
    """The bytes are not this protocol's, or were altered: the link is dead."""

    alert = Alert.UNEXPECTED


class HandshakeError(ProtocolError):
    """The handshake failed. The peer is told nothing: it is a stranger."""


class Foreign(HandshakeError):
    """What came is not of this protocol, or of another version of it: of something else that listens, or connects."""


class Unauthentic(HandshakeError):
    """A handshake message failed authentication: it was altered, or made by somebody who does not have our manifest."""


class RecordError(ProtocolError):
    """A record failed authentication, or breaks a rule of records, messages or their order."""


class DecodeError(ProtocolError):
    """An authentic message is not msgpack that this protocol allows."""

    alert = Alert.DECODE


class LimitError(TransportError):
    """More than this end will hold, or a link that is too old: the link is dead."""

    alert = Alert.LIMIT


class PeerAlert(TransportError):
    """The peer ended the link and said why.

    Attributes:
        code: an `Alert`, or another number that a later version may send.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"the peer ended the link: {_REASONS.get(code, f'alert {code}')}")
        self.code = code
        if code == Alert.ATTESTATION:
            self.exit_code = 3

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """The reason in an ALERT. Raises RecordError if its body is not one byte."""
        if len(body) != 1:
            raise RecordError(f"an ALERT of {len(body)} bytes, wanted 1")
        return cls(body[0])
