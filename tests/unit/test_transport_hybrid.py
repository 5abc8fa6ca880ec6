"""Suite 2 against a second computation of it: hashlib, hmac and the package `cryptography`, written from the pages of
Noise and of its hybrid forward secrecy extension, and sharing nothing with ours. Known answers: test_link_answers.py.
"""

import hashlib
import hmac
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from ends import LENGTHS, MAC_KEY, MANIFEST, Side, client, stage, told

from attest import NO_CLAIMS
from transport.errors import HandshakeError
from transport.link import SUITES, initiate, respond

PREAMBLE = b"mGPT\x02\x02\0\0"
PROLOGUE = b"MGPT-LINK-v2" + PREAMBLE + MANIFEST + b"\xff\xff\x00\x00"


class Hybrid:
    """Noise_XXhfs_25519+MLKEM768_ChaChaPoly_SHA256, one end."""

    def __init__(self, s: bytes = b"", e: bytes = b"", e1: bytes = b"") -> None:
        self.s = X25519PrivateKey.from_private_bytes(s or os.urandom(32))
        self.e = X25519PrivateKey.from_private_bytes(e or os.urandom(32))
        self.e1 = MLKEM768PrivateKey.from_seed_bytes(e1 or os.urandom(64))
        self.ck = hashlib.sha256(b"Noise_XXhfs_25519+MLKEM768_ChaChaPoly_SHA256").digest()
        self.h = hashlib.sha256(self.ck + PROLOGUE).digest()

    def mix_key(self, material: bytes) -> None:
        temp = hmac.digest(self.ck, material, "sha256")
        self.ck = hmac.digest(temp, b"\x01", "sha256")
        self.k, self.n = hmac.digest(temp, self.ck + b"\x02", "sha256"), 0

    def mix_hash(self, data: bytes) -> bytes:
        self.h = hashlib.sha256(self.h + data).digest()
        return data

    def nonce(self) -> bytes:
        self.n += 1
        return bytes(4) + (self.n - 1).to_bytes(8, "little")

    def seal(self, plaintext: bytes) -> bytes:
        return self.mix_hash(ChaCha20Poly1305(self.k).encrypt(self.nonce(), plaintext, self.h))

    def open(self, ciphertext: bytes) -> bytes:
        plaintext = ChaCha20Poly1305(self.k).decrypt(self.nonce(), ciphertext, self.h)
        self.mix_hash(ciphertext)
        return plaintext

    def dh(self, private: X25519PrivateKey, public: bytes) -> None:
        self.mix_key(private.exchange(X25519PublicKey.from_public_bytes(public)))

    def split(self) -> tuple[bytes, bytes]:
        temp = hmac.digest(self.ck, b"", "sha256")
        first = hmac.digest(temp, b"\x01", "sha256")
        return first, hmac.digest(temp, first + b"\x02", "sha256")

    # -> e, e1    <- e, ee, ekem1, s, es    -> s, se

    def write_1(self) -> bytes:
        e, e1 = self.e.public_key().public_bytes_raw(), self.e1.public_key().public_bytes_raw()
        self.mix_hash(e)
        self.mix_hash(e1)  # EncryptAndHash before there is a key
        self.mix_hash(b"")
        return e + e1

    def read_1(self, message: bytes) -> None:
        self.re, self.re1 = message[:32], message[32:]
        for part in (self.re, self.re1, b""):
            self.mix_hash(part)

    def write_2(self) -> bytes:
        e = self.mix_hash(self.e.public_key().public_bytes_raw())
        self.dh(self.e, self.re)
        shared, ciphertext = MLKEM768PublicKey.from_public_bytes(self.re1).encapsulate()
        ekem1 = self.seal(ciphertext)
        self.mix_key(shared)
        s = self.seal(self.s.public_key().public_bytes_raw())
        self.dh(self.s, self.re)
        return e + ekem1 + s + self.seal(b"")

    def read_2(self, message: bytes) -> None:
        self.re = self.mix_hash(message[:32])
        self.dh(self.e, self.re)
        self.mix_key(self.e1.decapsulate(self.open(message[32 : 32 + 1104])))
        self.rs = self.open(message[1136:1184])
        self.dh(self.e, self.rs)
        assert self.open(message[1184:]) == b""

    def write_3(self) -> bytes:
        s = self.seal(self.s.public_key().public_bytes_raw())
        self.dh(self.s, self.re)
        return s + self.seal(b"")

    def read_3(self, message: bytes) -> None:
        self.rs = self.open(message[:48])
        self.dh(self.e, self.rs)
        assert self.open(message[48:]) == b""


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def opening(message: bytes) -> bytes:
    """What the client says before it is answered."""
    return PREAMBLE + framed(message) + hmac.digest(MAC_KEY, PROLOGUE + framed(message), "sha256")[:16]


def record(key: bytes, number: int, kind: int, body: bytes) -> bytes:
    plaintext = bytes([kind, 1, 0, 0]) + body
    return framed(ChaCha20Poly1305(key).encrypt(bytes(4) + number.to_bytes(8, "little"), plaintext, b""))


def opened(key: bytes, number: int, data: bytes) -> tuple[int, bytes]:
    plaintext = ChaCha20Poly1305(key).decrypt(bytes(4) + number.to_bytes(8, "little"), data[2:], b"")
    return plaintext[0], plaintext[4 : len(plaintext) - int.from_bytes(plaintext[2:4], "big")]


def binding(other: Hybrid, role: bytes, provider: int) -> bytes:
    own = other.s.public_key().public_bytes_raw()
    domain = b"minigpt attestation binding v1\0" + role + bytes([provider])
    return hashlib.sha512(domain + other.h + own + hashlib.sha256(NO_CLAIMS).digest()).digest()


def test_a_second_computation_as_the_client() -> None:
    other, side = Hybrid(), Side(respond(stage()))
    side.inbox += opening(other.write_1())
    other.read_2(side.run()[2:])
    side.inbox += framed(other.write_3())
    i2r, r2i = other.split()
    assert opened(r2i, 0, side.run())[0] == 1
    side.inbox += record(i2r, 0, 1, b"\x01\x00\x00\x01\x80" + bytes(4) + b"\x00")
    side.run()
    assert side.session.handshake_hash == other.h
    assert told(side.session, record(i2r, 1, 2, b"question")) == b"question"
    assert opened(r2i, 1, side.session.seal(b"answer")) == (2, b"answer")


def test_a_second_computation_as_the_stage() -> None:
    other, side = Hybrid(), Side(initiate(client()))
    flight = side.run()
    assert flight == opening(flight[10:-16])
    other.read_1(flight[10:-16])
    side.inbox += framed(other.write_2())
    other.read_3(side.run()[2:])
    i2r, r2i = other.split()
    evidence = binding(other, b"R", 1)
    side.inbox += record(r2i, 0, 1, b"\x01\x01\x00\x01\x80" + len(evidence).to_bytes(4, "big") + evidence + b"\x00")
    assert opened(i2r, 0, side.run()) == (1, b"\x01\x00\x00\x01\x80" + bytes(4) + b"\x00")
    assert side.session.handshake_hash == other.h
    assert told(side.session, record(r2i, 1, 2, b"answer")) == b"answer"


def test_the_lengths_are_exactly_those_of_the_page() -> None:
    assert {number: suite.lengths for number, suite in SUITES.items()} == LENGTHS


@pytest.mark.parametrize("bad", [b"\xff" * 1184, b"\x00" * 383 + b"\xff" * 801], ids=["all ones", "half"])
def test_a_key_that_fails_the_modulus_check_is_dead(bad: bytes) -> None:
    other, side = Hybrid(), Side(respond(stage()))
    side.inbox += opening(other.write_1()[:32] + bad)
    assert side.run() == b""
    assert isinstance(side.error, HandshakeError)


def test_a_ciphertext_for_another_key_is_dead() -> None:
    other, side = Hybrid(), Side(initiate(client()))
    other.read_1(side.run()[10:-16])
    other.re1 = MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
    side.inbox += framed(other.write_2())
    assert side.run() == b""
    assert isinstance(side.error, HandshakeError)
