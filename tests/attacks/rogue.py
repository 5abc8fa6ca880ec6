"""A malicious end of a link: it shakes hands like any other, with a key of its own or a stolen one. Then it says what
it is told to say, be it a record or not.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import time
from typing import Any, NamedTuple

import msgpack

from attest import Attester, Binding, Evidence, Unattested
from minigpt.protocol.manifest import Manifest
from transport import noise
from transport.link import MACLEN, SUITES, VERSION, dump_attest
from transport.noise import CipherState, KeyPair

ATTEST, MESSAGE, ALERT, CLOSE, PING = range(1, 6)
FIN = 1
ROOM = 65515  # bytes of body and padding in a full record; all records but a message's last are full
PATIENCE = 20.0  # seconds


class Record(NamedTuple):
    """A record that was opened. An `ended` connection is a record of type 0."""

    kind: int
    flags: int
    body: bytes

    @property
    def ended(self) -> bool:
        return self.kind == 0


ENDED = Record(0, 0, b"")


class Rogue:
    """One end of a link, whatever the other end thinks of it.

    Args:
        sock: connected.
        role: "I" or "R".
        manifest: that it claims to follow.
        own_id, peer_id: what it claims to be, and to talk to.
        suite: that it proposes; as responder, what the initiator proposes is taken.
        static: its key; a fresh one if None.
    """

    def __init__(
        self,
        sock: socket.socket,
        role: str,
        manifest: Manifest,
        own_id: int,
        peer_id: int,
        *,
        suite: int,
        static: KeyPair | None = None,
    ) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.role = role
        self.manifest = manifest
        self.ids = (own_id, peer_id) if role == "I" else (peer_id, own_id)
        self.suite = suite
        self.static = static or KeyPair.generate()
        self.h = b""
        self.peer_static = b""
        self._sending = CipherState()
        self._receiving = CipherState()

    # The handshake.

    def preamble(self) -> bytes:
        """Sends it, or receives it."""
        if self.role == "I":
            data = b"mGPT" + bytes([VERSION, self.suite, 0, 0])
            self.write(data)
        else:
            data = self.exactly(8)
            self.suite = data[5]
        return data

    def first_message(self) -> bytes:
        """An honest message 1 of the suite, without its length; what it was made with is forgotten."""
        suite = SUITES[self.suite]
        steps = noise.handshake(suite.protocol_name, suite.pattern, initiator=True, prologue=b"", s=self.static)
        message = next(steps)
        assert message is not None
        return message

    def prologue(self, preamble: bytes) -> bytes:
        return struct.pack(">12s8s32sHH", b"MGPT-LINK-v2", preamble, self.manifest.digest, *self.ids)

    def opening(self, message: bytes) -> bytes:
        """A message 1 as it goes on the wire, with the mac that anybody can make who has the manifest."""
        framed = len(message).to_bytes(2, "big") + message
        preamble = b"mGPT" + bytes([VERSION, self.suite, 0, 0])
        return framed + hmac.digest(self.manifest.mac_key, self.prologue(preamble) + framed, "sha256")[:MACLEN]

    def hear_opening(self) -> bytes:
        """The other end's message 1."""
        message = self.frame()
        self.exactly(MACLEN)
        return message

    def shake(self) -> Rogue:
        """The whole handshake. Raises ConnectionError or noise's errors if the other end does not play along."""
        preamble = self.preamble()
        suite = SUITES[self.suite]
        steps = noise.handshake(
            suite.protocol_name, suite.pattern, initiator=self.role == "I", prologue=self.prologue(preamble),
            s=self.static,
        )  # fmt: skip
        message: bytes | None = None
        try:
            for number in range(1, 4):
                outgoing = steps.send(message)
                message = None
                if outgoing is None:
                    message = self.hear_opening() if number == 1 else self.frame()
                else:
                    self.write(self.opening(outgoing) if number == 1 else len(outgoing).to_bytes(2, "big") + outgoing)
            steps.send(message)
        except StopIteration as finished:
            self._sending, self._receiving = finished.value.sending, finished.value.receiving
            self.h, self.peer_static = finished.value.h, finished.value.rs
        return self

    # Records.

    def seal(self, kind: int, body: bytes = b"", *, flags: int = FIN, padding: bytes = b"", pad: int = -1) -> bytes:
        """One record as it goes on the wire, with whatever header it is told."""
        plaintext = struct.pack(">BBH", kind, flags, len(padding) if pad < 0 else pad) + body + padding
        return self.seal_raw(plaintext)

    def seal_raw(self, plaintext: bytes) -> bytes:
        """One record of any plaintext."""
        if self._sending.n % 1024 == 0 and self._sending.n:
            self._sending.rekey()
        ciphertext = self._sending.encrypt_with_ad(b"", plaintext)
        return len(ciphertext).to_bytes(2, "big") + ciphertext

    def say(self, kind: int, body: bytes = b"", **more: Any) -> None:
        """Sends one record."""
        self.write(self.seal(kind, body, **more))

    def say_message(self, value: dict[str, Any] | list[Any]) -> None:
        """Sends a message, in as many records as it takes."""
        self.write(self.seal_message(msgpack.packb(value)))

    def seal_message(self, body: bytes, kind: int = MESSAGE) -> bytes:
        """The records of a message, as they go on the wire, without padding."""
        pieces = [body[i : i + ROOM] for i in range(0, len(body), ROOM)] or [b""]
        return b"".join(
            self.seal(kind, piece, flags=FIN if i == len(pieces) - 1 else 0) for i, piece in enumerate(pieces)
        )

    def hear(self) -> Record:
        """The next record; ENDED when the connection has."""
        try:
            data = self.frame()
        except ConnectionError:
            return ENDED
        if self._receiving.n % 1024 == 0 and self._receiving.n:
            self._receiving.rekey()
        plaintext = self._receiving.decrypt_with_ad(b"", data)
        kind, flags, padding = struct.unpack_from(">BBH", plaintext)
        return Record(kind, flags, plaintext[4 : len(plaintext) - padding])

    def hear_message(self) -> Any:
        """The next message, a map or an array; None for anything else than a message."""
        body = b""
        while (record := self.hear()).kind == MESSAGE:
            body += record.body
            if record.flags & FIN:
                return msgpack.unpackb(body)
        return None

    def last_words(self) -> list[Record]:
        """Everything until the other end hangs up."""
        found = []
        while not (record := self.hear()).ended:
            found.append(record)
        return found

    # Evidence.

    def binding(self, attester: Attester, *, h: bytes | None = None, role: str | None = None) -> Binding:
        return Binding(role or self.role, attester.provider, h or self.h, self.static.public, attester.claims)

    def attest(self, attester: Attester | None = None) -> Evidence:
        """Sends evidence as an honest end would."""
        made = attester or Unattested()
        evidence = made.attest(self.binding(made))
        self.say(ATTEST, dump_attest(evidence))
        return evidence

    def hear_attest(self) -> bytes:
        """The body of the other end's ATTEST; b"" if something else came."""
        body = b""
        while (record := self.hear()).kind == ATTEST:
            body += record.body
            if record.flags & FIN:
                return body
        return b""

    # Bytes.

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # what the other end made of it, reading tells
            self.sock.sendall(data)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            if not part:
                raise ConnectionError("the other end hung up")
            data += part
        return data

    def frame(self) -> bytes:
        return self.exactly(int.from_bytes(self.exactly(2), "big"))

    def wait_end(self, timeout: float = PATIENCE) -> tuple[bytes, float]:
        """Reads until the other end closes: what it said, and the seconds that it took. Raises TimeoutError."""
        began, data = time.monotonic(), b""
        self.sock.settimeout(timeout)
        with contextlib.suppress(ConnectionError):
            while part := self.sock.recv(1 << 16):
                data += part
        return data, time.monotonic() - began

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Rogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
