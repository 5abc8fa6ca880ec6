"""Records, and the messages that they carry, inside a session. Bytes in, bytes out.

    record      u16 length (20..65535) | ChaCha20-Poly1305 of
                u8 type | u8 flags | u16 pad_len | body | zeros[pad_len]
    message     one or more records of one type, contiguous, FIN on the last; all before it are full

A record's number is implicit: it is the nonce, and both ends count. So a record that was deleted, replayed, moved or
inserted fails authentication. Before each record whose number is a multiple of 1024, except 0, the key is replaced by a
one-way function of itself. Padding is computed for the whole message and cut up with it: an observer sees one of few
lengths.
"""

import struct
import threading
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

from transport.aead import TAGLEN
from transport.errors import Closed, LimitError, RecordError, TransportError
from transport.fork import identity, own
from transport.noise import CipherState

REKEY_INTERVAL = 1024  # records
MAX_RECORDS = 2**32  # in one direction; then a new link is needed, with fresh evidence
MAX_PLAINTEXT = 65535 - TAGLEN  # bytes of a record, so that its ciphertext fits a Noise message and a u16
MAX_MESSAGE = 16 * 2**20  # bytes; a prefill of 1024 tokens of GPT-2 XL in float32 is 6.25 MiB
MIN_PADDED = 256  # bytes; the smallest size that an observer sees

FIN = 0x01
_HEADER = struct.Struct(">BBH")
_LENGTH = struct.Struct(">H")
_ROOM = MAX_PLAINTEXT - _HEADER.size  # bytes of body and padding in one record
_LEAST = _HEADER.size + TAGLEN  # bytes of an empty record's ciphertext


class Type(IntEnum):
    ATTEST = 1
    MESSAGE = 2
    ALERT = 3
    CLOSE = 4
    PING = 5


class Message(NamedTuple):
    type: int
    body: bytes


def padded_size(length: int) -> int:
    """The padded size of `length` bytes: Padmé, and at least 256.

    Padmé (Nikitin et al., "Reducing Metadata Leakage from Encrypted Files and Communication with PURBs", PETS 2019)
    rounds up to a number with few significant bits: it adds at most 12 %, and leaks O(log log) bits of the length.
    """
    if length <= MIN_PADDED:
        return MIN_PADDED
    exponent = length.bit_length() - 1
    low_bits = exponent - exponent.bit_length()
    mask = (1 << low_bits) - 1
    return (length + mask) & ~mask


class Budget:
    """How many bytes of received messages all links of a process may hold together.

    A message of several records counts from its first one on, until the next message is asked for: that is, until it is
    answered. One of a single record never counts: each link may hold one at any time.
    """

    def __init__(self, total: int) -> None:
        if total < MAX_PLAINTEXT:
            raise ValueError(f"budget: got {total} bytes, wanted at least {MAX_PLAINTEXT}, one record")
        self._total = total
        self.disown()
        own(self)

    def disown(self) -> None:
        """In the child of a fork, which has no messages yet: starts afresh."""
        self._left = self._total
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        return self._total - self._left

    def reserve(self, count: int) -> None:
        """Raises LimitError if that many bytes are not free."""
        with self._lock:
            if count > self._left:
                raise LimitError(f"{count} more bytes of an incoming message: the budget of {self._total} is used up")
            self._left -= count

    def release(self, count: int) -> None:
        with self._lock:
            self._left += count


PROCESS_BUDGET = Budget(256 * 2**20)  # 16 of the largest messages at once


class Sealer:
    """Our own direction: messages to records."""

    def __init__(self, cipher: CipherState) -> None:
        self._cipher: CipherState | None = cipher
        self._process = identity()
        self.messages = 0  # records of type MESSAGE so far, the number that CLOSE carries
        self.records = 0  # of any type

    def discard(self) -> None:
        """Forgets the key: this direction has ended."""
        self._cipher = None

    @property
    def foreign(self) -> Closed | None:
        """In any process but the one that made it: why nothing is sealed. Two messages under one key and nonce would
        give each other away."""
        if self._process == identity():
            return None
        return Closed("this link belongs to the process that made it; in a forked child, make a new one")

    def seal(self, kind: Type, body: bytes | memoryview = b"", least: int = 0) -> bytes:
        """All records of one message, padded as if it had at least `least` bytes.

        Raises:
            Closed: the direction has ended.
            LimitError: the link has carried as many records as it may. Nothing was sealed.
        """
        size = padded_size(max(len(body), least))
        count = -(-size // _ROOM)
        cipher = self._cipher
        if (foreign := self.foreign) is not None:
            raise foreign
        if cipher is None:
            raise Closed("this end of the link is closed")
        if cipher.n + count > MAX_RECORDS:
            raise LimitError(f"a link carries at most {MAX_RECORDS} records: make a new one")
        self.records += count
        if kind == Type.MESSAGE:
            self.messages += count
        if count == 1:  # a token: the common case
            return b"".join(_record(cipher, kind, FIN, body, size - len(body)))
        view = memoryview(body)
        parts: list[bytes] = []
        for start in range(0, size, _ROOM):
            room = min(_ROOM, size - start)
            piece = view[start : start + room]
            parts += _record(cipher, kind, FIN if start + room == size else 0, piece, room - len(piece))
        return b"".join(parts)


def _record(cipher: CipherState, kind: Type, flags: int, body: bytes | memoryview, padding: int) -> tuple[bytes, bytes]:
    """A record, as its length and its ciphertext."""
    if cipher.n % REKEY_INTERVAL == 0 and cipher.n:
        cipher.rekey()
    plaintext = b"".join((_HEADER.pack(kind, flags, padding), body, bytes(padding)))
    ciphertext = cipher.encrypt_with_ad(b"", plaintext)
    return _LENGTH.pack(len(ciphertext)), ciphertext


class Opener:
    """The peer's direction: bytes, in pieces of any size, to messages.

    What comes out before an error does not depend on how the bytes were cut. After an error nothing more comes out.
    """

    def __init__(self, cipher: CipherState, limits: Mapping[int, int], budget: Budget) -> None:
        self._cipher: CipherState | None = cipher
        self.limits = limits  # the types that are allowed now, with the largest body of each; the owner replaces it
        self.messages = 0  # records of type MESSAGE so far
        self.records = 0  # of any type
        self._budget = budget
        self._held = 0  # bytes of it: of the message under way, or of the one that came out last
        self._buffer = bytearray()
        self._kind = 0  # of the message under way; 0 is none
        self._body = bytearray()  # of its records so far
        self._padded = 0  # bytes of body and padding so far

    @property
    def buffered(self) -> int:
        """How many bytes were fed and not opened yet."""
        return len(self._buffer)

    @property
    def partial(self) -> bool:
        """Whether a record or a message has begun and not ended."""
        return bool(self._buffer) or self._kind != 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    def next(self) -> Message | None:
        """The next message, or None if it needs more bytes.

        Raises:
            RecordError: a record is not authentic or breaks a rule.
            LimitError: the message is too large, for its type or for the budget.
        """
        if self._held and self._kind == 0:
            self._release()
        try:
            while (plaintext := self._open()) is not None:
                message = self._accept(plaintext)
                if message is not None:
                    return message
        except TransportError:
            self.discard()
            raise
        return None

    def discard(self) -> None:
        """Forgets the key and everything buffered."""
        self._cipher = None
        self._buffer.clear()
        self._forget()
        self._release()

    def disown(self) -> None:
        """In the child of a fork: as `discard`, but what the budget lent is the parent's to give back."""
        self._cipher = None
        self._buffer, self._body = bytearray(), bytearray()
        self._kind = self._padded = 0

    def _open(self) -> bytes | None:
        """The plaintext of the next record."""
        cipher, buffer = self._cipher, self._buffer
        if cipher is None:
            raise RecordError("the link is dead")
        if len(buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + (buffer[0] << 8 | buffer[1])
        if end < _LENGTH.size + _LEAST:
            raise RecordError(f"record {cipher.n}: {end - _LENGTH.size} bytes, wanted {_LEAST}..65535")
        if len(buffer) < end:
            return None
        if cipher.n >= MAX_RECORDS:
            raise LimitError(f"a link carries at most {MAX_RECORDS} records: make a new one")
        if cipher.n % REKEY_INTERVAL == 0 and cipher.n:
            cipher.rekey()
        plaintext = cipher.decrypt_with_ad(b"", buffer[_LENGTH.size : end])
        del buffer[:end]
        self.records += 1
        return plaintext

    def _accept(self, plaintext: bytes) -> Message | None:
        """Adds an authentic record to its message; returns the message if that was its last record."""
        kind, flags, padding = _HEADER.unpack_from(plaintext)
        end = len(plaintext) - padding
        if self._kind not in (0, kind):
            raise self._error(f"type {kind} inside a message of type {self._kind}")
        if kind not in self.limits:
            raise self._error(f"type {kind} is not allowed here")
        if flags & ~FIN:
            raise self._error(f"reserved flags {flags:#04x}")
        if end < _HEADER.size:
            raise self._error(f"padding of {padding} in {len(plaintext)} bytes")
        if plaintext[end:] != bytes(padding):
            raise self._error("padding that is not zero")
        if kind == Type.MESSAGE:
            self.messages += 1
        self._kind = kind
        self._padded += len(plaintext) - _HEADER.size
        largest = self.limits[kind]
        if len(self._body) + end - _HEADER.size > largest or self._padded > padded_size(largest):
            raise LimitError(f"a message of type {kind} of more than {largest} bytes")
        if flags & FIN:
            body = plaintext[_HEADER.size : end]
            if self._body:
                self._reserve(len(body))
                body = b"".join((self._body, body))
            self._forget()
            return Message(kind, body)
        if len(plaintext) != MAX_PLAINTEXT:  # else a message could cost a decryption for each of its bytes
            room = len(plaintext) - _HEADER.size
            raise self._error(f"{room or 'nothing'} in it, wanted {_ROOM} bytes: it is not the last of its message")
        self._reserve(end - _HEADER.size)
        self._body += memoryview(plaintext)[_HEADER.size : end]
        return None

    def _forget(self) -> None:
        """Ends the message under way."""
        if self._body:
            self._body = bytearray()
        self._kind = self._padded = 0

    def _reserve(self, count: int) -> None:
        self._budget.reserve(count)
        self._held += count

    def _release(self) -> None:
        self._budget.release(self._held)
        self._held = 0

    def _error(self, what: str) -> RecordError:
        return RecordError(f"record {self.records - 1}: {what}")
