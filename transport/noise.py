"""The Noise Protocol Framework, revision 34, and its hybrid forward secrecy extension. No I/O.

    XX:                       XXhfs:
      -> e                      -> e, e1
      <- e, ee, s, es           <- e, ee, ekem1, s, es
      -> s, se                  -> s, se

The letters are the specification's: s and e are one's own static and ephemeral key pairs, rs and re the peer's public
keys, e1 an ephemeral key of a KEM, ck the chaining key, h the hash of everything said so far, k and n a cipher's key
and nonce. https://noiseprotocol.org/noise.html, https://github.com/noiseprotocol/noise_hfs_spec

With XXhfs the keys depend on ML-KEM-768 as well as on X25519: somebody who records the traffic today and has a quantum
computer later still cannot read it. Only X25519 authenticates.
"""

import hashlib
import hmac
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Random import get_random_bytes

from transport.aead import TAGLEN, Bytes, Cipher
from transport.errors import HandshakeError, LimitError, RecordError, Unauthentic
from transport.kem import CTLEN, EKLEN, KemKey, encapsulate

DHLEN = 32  # bytes of a public key
MAX_MESSAGE = 65535  # bytes of a Noise message (section 3)
MAX_NONCE = 2**64 - 1  # reserved for rekey (section 5.1)

Pattern = Sequence[Sequence[str]]
XX: Pattern = (("e",), ("e", "ee", "s", "es"), ("s", "se"))
XXHFS: Pattern = (("e", "e1"), ("e", "ee", "ekem1", "s", "es"), ("s", "se"))

_PUBLIC = {"e": DHLEN, "s": DHLEN, "e1": EKLEN, "ekem1": CTLEN}  # bytes that a token puts into its message


def _hkdf(ck: bytes, ikm: bytes) -> tuple[bytes, bytes]:
    """HKDF(ck, ikm, 2), section 4.3."""
    temp = hmac.digest(ck, ikm, "sha256")
    first = hmac.digest(temp, b"\x01", "sha256")
    return first, hmac.digest(temp, first + b"\x02", "sha256")


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair, 32 bytes each."""

    private: bytes = field(repr=False)
    public: bytes

    @classmethod
    def from_private(cls, private: bytes) -> Self:
        """Raises ValueError unless `private` is 32 bytes."""
        if len(private) != DHLEN:
            raise ValueError(f"private key: got {len(private)} bytes, wanted {DHLEN}")
        return cls(private, import_x25519_private_key(private).public_key().export_key(format="raw"))

    @classmethod
    def generate(cls) -> Self:
        return cls.from_private(get_random_bytes(DHLEN))

    def dh(self, public: bytes) -> bytes:
        """DH(self, public). Raises HandshakeError for points of low order, whose result anybody can know."""
        shared = b""
        with suppress(ValueError):
            theirs = import_x25519_public_key(public)  # refuses the known encodings of those points
            mine = import_x25519_private_key(self.private)
            shared = bytes(key_agreement(kdf=bytes, static_priv=mine, static_pub=theirs))
        if not any(shared):
            raise HandshakeError("the peer's public key is a point of low order")
        return shared

    def owns(self, public: bytes) -> bool:
        """Whether `public` is this pair's own key, ignoring its unused highest bit (RFC 7748, section 5)."""
        return len(public) == DHLEN and public[:-1] == self.public[:-1] and (public[-1] ^ self.public[-1]) & 0x7F == 0


def generate_keypair() -> tuple[bytes, bytes]:
    """A fresh static key: (private, public), 32 bytes each."""
    pair = KeyPair.generate()
    return pair.private, pair.public


class CipherState:
    """A key and the number of the next message under it (section 5.1)."""

    __slots__ = ("_cipher", "k", "n")

    def __init__(self, k: bytes | None = None) -> None:
        self.k = k
        self.n = 0
        self._cipher = None if k is None else Cipher(k)

    def encrypt_with_ad(self, ad: Bytes, plaintext: Bytes) -> bytes:
        """Raises LimitError after 2^64 - 1 messages."""
        if self._cipher is None:
            return bytes(plaintext)
        ciphertext = self._cipher.encrypt(self._nonce(), ad, plaintext)
        self.n += 1
        return ciphertext

    def decrypt_with_ad(self, ad: Bytes, ciphertext: Bytes) -> bytes:
        """Raises RecordError if it is not authentic, LimitError after 2^64 - 1 messages."""
        if self._cipher is None:
            return bytes(ciphertext)
        try:
            plaintext = self._cipher.decrypt(self._nonce(), ad, ciphertext)
        except ValueError:
            raise RecordError(f"record {self.n}: it was altered or moved, or sealed with another key") from None
        self.n += 1
        return plaintext

    def rekey(self) -> None:
        """REKEY(k), section 4.2; n goes on."""
        if self._cipher is not None:
            self.k = self._cipher.encrypt(MAX_NONCE, b"", bytes(32))[:32]
            self._cipher = Cipher(self.k)

    def _nonce(self) -> int:
        if self.n >= MAX_NONCE:
            raise LimitError("this key has sealed as many records as it may: make a new link")
        return self.n


class SymmetricState:
    """Everything that both ends have said and agreed on so far (section 5.2)."""

    def __init__(self, protocol_name: bytes) -> None:
        long = len(protocol_name) > 32
        self.h = hashlib.sha256(protocol_name).digest() if long else protocol_name.ljust(32, b"\0")
        self.ck = self.h
        self.cipher = CipherState()

    def mix_key(self, input_key_material: bytes) -> None:
        self.ck, temp_k = _hkdf(self.ck, input_key_material)
        self.cipher = CipherState(temp_k)

    def mix_hash(self, data: bytes) -> None:
        self.h = hashlib.sha256(self.h + data).digest()

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        ciphertext = self.cipher.encrypt_with_ad(self.h, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        try:
            plaintext = self.cipher.decrypt_with_ad(self.h, ciphertext)
        except RecordError:
            raise Unauthentic("handshake: altered, or the ends differ in prologue (manifest, ids) or keys") from None
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        """The cipher states of the initiator's and of the responder's direction."""
        k1, k2 = _hkdf(self.ck, b"")
        return CipherState(k1), CipherState(k2)


@dataclass(frozen=True)
class Split:
    """The result of a handshake."""

    sending: CipherState = field(repr=False)
    receiving: CipherState = field(repr=False)
    h: bytes  # the final handshake hash, 32 bytes; the same at both ends, and nowhere else
    rs: bytes  # the peer's static public key, 32 bytes
    payloads: tuple[bytes, ...] = field(repr=False)  # those that were received, in order


Handshake = Generator[bytes | None, bytes | None, Split]


def handshake(
    protocol_name: bytes,
    pattern: Pattern,
    *,
    initiator: bool,
    prologue: bytes,
    s: KeyPair,
    payloads: Sequence[bytes] = (),
) -> Handshake:
    """One end of a handshake: yields a message to send, or None and is then sent the message received.

    The ephemeral key is always fresh. `payloads` are for our own messages, in order; missing ones are empty. Raises
    HandshakeError if a message is too short or too long, not authentic, or its keys are our own or of low order.
    """
    symmetric = SymmetricState(protocol_name)
    symmetric.mix_hash(prologue)
    state = _State(symmetric, initiator, s)
    mine, received, least = list(payloads), [], message_lengths(pattern)
    for number, tokens in enumerate(pattern):
        if (number % 2 == 0) == initiator:
            parts = [state.write(token) for token in tokens]
            yield b"".join((*parts, symmetric.encrypt_and_hash(mine.pop(0) if mine else b"")))
        else:
            message = yield None
            if message is None:
                raise TypeError("the handshake waits for a message")
            if not least[number] <= len(message) <= MAX_MESSAGE:  # before any cryptography touches it
                raise HandshakeError(f"handshake message {number + 1}: {len(message)} bytes, wanted {least[number]}")
            for token in tokens:
                message = state.read(token, message)
            received.append(symmetric.decrypt_and_hash(message))
    first, second = symmetric.split()
    sending, receiving = (first, second) if initiator else (second, first)
    return Split(sending, receiving, symmetric.h, state.public["rs"], tuple(received))


class _State:
    """HandshakeState (section 5.3): the keys, and what each token does with them."""

    def __init__(self, symmetric: SymmetricState, initiator: bool, s: KeyPair) -> None:
        self.symmetric = symmetric
        self.initiator = initiator
        self.own: dict[str, KeyPair] = {"s": s}
        self.public: dict[str, bytes] = {}  # the peer's, by "re", "rs" and "re1"
        self.e1: KemKey | None = None

    def write(self, token: str) -> bytes:
        symmetric = self.symmetric
        match token:
            case "e":
                self.own["e"] = e = KeyPair.generate()
                symmetric.mix_hash(e.public)
                return e.public
            case "s":
                return symmetric.encrypt_and_hash(self.own["s"].public)
            case "e1":
                self.e1 = KemKey()
                return symmetric.encrypt_and_hash(self.e1.public)
            case "ekem1":
                try:
                    ciphertext, shared = encapsulate(self.public["re1"])
                except ValueError:
                    raise HandshakeError("the peer's ML-KEM key is invalid") from None
                written = symmetric.encrypt_and_hash(ciphertext)
                symmetric.mix_key(shared)
                return written
            case _:
                self._mix_dh(token)
                return b""

    def read(self, token: str, message: bytes) -> bytes:
        """The rest of `message` after `token`."""
        if token not in _PUBLIC:
            self._mix_dh(token)
            return message
        symmetric = self.symmetric
        end = _length(token, keyed=symmetric.cipher.k is not None)
        if token == "e":
            public = message[:end]
            symmetric.mix_hash(public)
        else:
            public = symmetric.decrypt_and_hash(message[:end])
        if token == "ekem1":
            if self.e1 is None:
                raise AssertionError("a pattern has e1 before ekem1")
            symmetric.mix_key(self.e1.decapsulate(public))
            self.e1 = None
        else:
            if any(pair.owns(public) for pair in self.own.values()):
                raise HandshakeError("the peer sent our own public key: it is ourselves, or an echo")
            self.public["r" + token] = public
        return message[end:]

    def _mix_dh(self, token: str) -> None:
        """ee, es, se, ss: the first letter is the initiator's key, the second the responder's."""
        own, theirs = (token[0], token[1]) if self.initiator else (token[1], token[0])
        self.symmetric.mix_key(self.own[own].dh(self.public["r" + theirs]))


def message_lengths(pattern: Pattern) -> tuple[int, ...]:
    """The bytes of each message with an empty payload."""
    keyed, lengths = False, []
    for tokens in pattern:
        length = 0
        for token in tokens:
            length += _length(token, keyed=keyed)
            keyed = keyed or token not in ("e", "s", "e1")
        lengths.append(length + (TAGLEN if keyed else 0))
    return tuple(lengths)


def _length(token: str, *, keyed: bool) -> int:
    """How many bytes a token takes; `keyed` says whether a key exists before it."""
    return _PUBLIC.get(token, 0) + (TAGLEN if keyed and token in _PUBLIC and token != "e" else 0)
