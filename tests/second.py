"""A link computed a second time, from docs/protocol.md and FIPS 203, sharing nothing with ours.

    python tests/second.py        writes tests/data/link_v2_kat.json

It is link 1, between two stages that both show mock evidence, once with each suite: all that passes in both directions,
from the preamble to CLOSE, across the change of keys. X25519, ChaCha20-Poly1305 and Ed25519 are those of the package
`cryptography`; ML-KEM-768, whose coins that keeps to itself, is here. Every key is the SHA-256 of its name.
"""

import hashlib
import hmac
import json
import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

TARGET = Path(__file__).resolve().parent / "data" / "link_v2_kat.json"
NAMES = {1: b"Noise_XX_25519_ChaChaPoly_SHA256", 2: b"Noise_XXhfs_25519+MLKEM768_ChaChaPoly_SHA256"}
MANIFEST = b'{"any": "bytes", "as far as": "a link knows"}\n'
MADE_MS = 1_800_000_000_000
NOT_AFTER_MS = MADE_MS + 86_400_000
MEASUREMENT = hashlib.sha384(b"measurement").digest()
MESSAGES = 1030  # in each direction: across the change of keys before record 1024


def secret(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


# ML-KEM-768: FIPS 203, with the names and numbers of its algorithms.

Q, K = 3329, 3
ZETAS = [pow(17, int(f"{i:07b}"[::-1], 2), Q) for i in range(128)]
Poly = list[int]


def ntt(f: Poly) -> Poly:
    """Algorithm 9."""
    f, i, length = list(f), 1, 128
    while length >= 2:
        for start in range(0, 256, 2 * length):
            for j in range(start, start + length):
                t = ZETAS[i] * f[j + length] % Q
                f[j], f[j + length] = (f[j] + t) % Q, (f[j] - t) % Q
            i += 1
        length //= 2
    return f


def inverse_ntt(f: Poly) -> Poly:
    """Algorithm 10."""
    f, i, length = list(f), 127, 2
    while length <= 128:
        for start in range(0, 256, 2 * length):
            for j in range(start, start + length):
                t = f[j]
                f[j], f[j + length] = (t + f[j + length]) % Q, ZETAS[i] * (f[j + length] - t) % Q
            i -= 1
        length *= 2
    return [x * 3303 % Q for x in f]


def multiply(f: Poly, g: Poly) -> Poly:
    """Algorithms 11 and 12."""
    h = []
    for i in range(128):
        (a, b), (c, d) = f[2 * i : 2 * i + 2], g[2 * i : 2 * i + 2]
        h += [(a * c + b * d * pow(17, 2 * int(f"{i:07b}"[::-1], 2) + 1, Q)) % Q, (a * d + b * c) % Q]
    return h


def total(*polys: Poly) -> Poly:
    return [sum(column) % Q for column in zip(*polys, strict=True)]


def sample_ntt(seed: bytes) -> Poly:
    """Algorithm 7."""
    stream, found = hashlib.shake_128(seed).digest(3 * 1024), []
    for a, b, c in struct.iter_unpack("BBB", stream):
        found += [d for d in (a + 256 * (b % 16), b // 16 + 16 * c) if d < Q]
    return found[:256]


def noise_poly(seed: bytes, n: int) -> Poly:
    """Algorithm 8, with eta = 2."""
    bits = int.from_bytes(hashlib.shake_256(seed + bytes([n])).digest(128), "little")
    quads = [bits >> 4 * i & 15 for i in range(256)]
    return [((q & 1) + (q >> 1 & 1) - (q >> 2 & 1) - (q >> 3 & 1)) % Q for q in quads]


def encode(f: Poly, d: int) -> bytes:
    """Algorithm 5."""
    return sum(x << d * i for i, x in enumerate(f)).to_bytes(32 * d, "little")


def decode(data: bytes, d: int) -> Poly:
    """Algorithm 6."""
    bits = int.from_bytes(data, "little")
    return [bits >> d * i & (1 << d) - 1 for i in range(256)]


def compress(f: Poly, d: int) -> Poly:
    return [((x << d) + Q // 2) // Q % (1 << d) for x in f]


def matrix(rho: bytes) -> list[list[Poly]]:
    return [[sample_ntt(rho + bytes([j, i])) for j in range(K)] for i in range(K)]


def kem_public(seed: bytes) -> bytes:
    """The encapsulation key of a seed d | z: algorithms 13 and 16."""
    both = hashlib.sha3_512(seed[:32] + bytes([K])).digest()
    rho, sigma = both[:32], both[32:]
    s, e = ([ntt(noise_poly(sigma, first + i)) for i in range(K)] for first in (0, K))
    rows = matrix(rho)
    t = [total(*(multiply(rows[i][j], s[j]) for j in range(K)), e[i]) for i in range(K)]
    return b"".join(encode(part, 12) for part in t) + rho


def kem_encapsulate(public: bytes, m: bytes) -> tuple[bytes, bytes]:
    """Shared secret and ciphertext: algorithms 14 and 17."""
    both = hashlib.sha3_512(m + hashlib.sha3_256(public).digest()).digest()
    shared, r = both[:32], both[32:]
    t = [decode(public[384 * i : 384 * i + 384], 12) for i in range(K)]
    rows = matrix(public[384 * K :])
    y = [ntt(noise_poly(r, i)) for i in range(K)]
    u = [
        total(inverse_ntt(total(*(multiply(rows[j][i], y[j]) for j in range(K)))), noise_poly(r, K + i))
        for i in range(K)
    ]
    v = inverse_ntt(total(*(multiply(t[i], y[i]) for i in range(K))))
    v = total(v, noise_poly(r, 2 * K), [bit * 1665 for bit in decode(m, 1)])
    return shared, b"".join(encode(compress(part, 10), 10) for part in u) + encode(compress(v, 4), 4)


# The handshake.


class Pair:
    def __init__(self, name: str) -> None:
        self.private = X25519PrivateKey.from_private_bytes(secret(name))
        self.public = self.private.public_key().public_bytes_raw()


def shared(one: Pair, other: Pair) -> bytes:
    return one.private.exchange(X25519PublicKey.from_public_bytes(other.public))


class Symmetric:
    def __init__(self, name: bytes, prologue: bytes) -> None:
        self.ck = name if len(name) == 32 else hashlib.sha256(name).digest()
        self.h = self.ck
        self.k = b""
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> bytes:
        self.h = hashlib.sha256(self.h + data).digest()
        return data

    def expand(self, material: bytes) -> tuple[bytes, bytes]:
        t = hmac.new(self.ck, material, hashlib.sha256).digest()
        first = hmac.new(t, b"\1", hashlib.sha256).digest()
        return first, hmac.new(t, first + b"\2", hashlib.sha256).digest()

    def mix_key(self, material: bytes) -> None:
        self.ck, self.k = self.expand(material)
        self.n = 0

    def seal(self, plaintext: bytes) -> bytes:
        if not self.k:
            return self.mix_hash(plaintext)
        self.n += 1
        return self.mix_hash(sealed(self.k, self.n - 1, plaintext, self.h))


def sealed(key: bytes, n: int, plaintext: bytes, data: bytes = b"") -> bytes:
    return ChaCha20Poly1305(key).encrypt(bytes(4) + n.to_bytes(8, "little"), plaintext, data)


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


# Evidence.


def claims(stage: int) -> bytes:
    """Those of a stage with 6 layers."""
    manifest, weights = hashlib.sha256(MANIFEST).digest(), secret(f"weights {stage}")
    return (
        b"\x85\xa3end" + bytes([6 * stage + 6]) + b"\xa5first" + bytes([6 * stage])
        + b"\xa8manifest\xc4\x20" + manifest + b"\xa5stage" + bytes([stage]) + b"\xa7weights\xc4\x20" + weights
    )  # fmt: skip


def ed25519(name: str) -> tuple[Ed25519PrivateKey, bytes]:
    private = Ed25519PrivateKey.from_private_bytes(secret(name))
    return private, private.public_key().public_bytes_raw()


def attest(role: bytes, h: bytes, static: bytes, stage: int) -> dict[str, bytes]:
    """The evidence of an end, part for part, and the body of its ATTEST."""
    said = claims(stage)
    b = hashlib.sha512(
        b"minigpt attestation binding v1\0" + role + b"\1" + h + static + hashlib.sha256(said).digest()
    ).digest()
    root, _ = ed25519("root")
    key, public = ed25519(f"signs for stage {stage}")
    statement = b"MGPTMOCK\1" + struct.pack(">Q", MADE_MS) + MEASUREMENT + b + b"\0" + public
    statement += key.sign(statement)
    endorsement = b"MGPTMOCKCA\1" + public + struct.pack(">HQ", stage, NOT_AFTER_MS)
    endorsement += root.sign(endorsement)
    body = b"\1\1" + framed(said) + struct.pack(">I", len(statement)) + statement
    body += b"\1" + struct.pack(">I", len(endorsement)) + endorsement
    return {"claims": said, "binding": b, "evidence": statement, "endorsement": endorsement, "attest": body}


# Records.


def padded(length: int) -> int:
    if length <= 256:
        return 256
    low = length.bit_length() - 1 - (length.bit_length() - 1).bit_length()
    return -(-length >> low << low)


def body_of(role: str, n: int) -> bytes:
    """The body of message `n`; the first takes two records."""
    return f"message {n} of {role}".encode() * (5000 if n == 0 else 1)


def stream(key: bytes, messages: list[tuple[int, bytes]]) -> list[bytes]:
    """One direction: a record after the other."""
    records: list[bytes] = []
    for kind, body in messages:
        left = body + bytes(padded(len(body)) - len(body))
        zeros = len(left) - len(body)
        while True:
            piece, left = left[:65515], left[65515:]
            pad = max(0, zeros - len(left))
            zeros -= pad
            if records and len(records) % 1024 == 0:
                key = sealed(key, 2**64 - 1, bytes(32))[:32]
            records.append(framed(sealed(key, len(records), struct.pack(">BBH", kind, not left, pad) + piece)))
            if not left:
                break
    return records


def link(suite: int) -> dict[str, Any]:
    """All that passes, and what it was made from."""
    preamble = b"mGPT" + bytes([2, suite, 0, 0])
    prologue = b"MGPT-LINK-v2" + preamble + hashlib.sha256(MANIFEST).digest() + struct.pack(">HH", 0, 1)
    state = Symmetric(NAMES[suite], prologue)
    s_i, e_i, s_r, e_r = (Pair(name) for name in ("s of I", "e of I", "s of R", "e of R"))
    seed, coins = secret("d") + secret("z"), secret("m")

    message_1 = state.mix_hash(e_i.public)
    if suite == 2:
        message_1 += state.seal(kem_public(seed))
    message_1 += state.seal(b"")
    key = hashlib.sha256(b"MGPT-LINK-v2 mac1" + MANIFEST).digest()
    mac = hmac.new(key, prologue + framed(message_1), hashlib.sha256).digest()[:16]

    message_2 = state.mix_hash(e_r.public)
    state.mix_key(shared(e_r, e_i))
    if suite == 2:
        known, ciphertext = kem_encapsulate(kem_public(seed), coins)
        message_2 += state.seal(ciphertext)
        state.mix_key(known)
    message_2 += state.seal(s_r.public)
    state.mix_key(shared(s_r, e_i))
    message_2 += state.seal(b"")

    message_3 = state.seal(s_i.public)
    state.mix_key(shared(s_i, e_r))
    message_3 += state.seal(b"")

    keys = dict(zip(("I", "R"), state.expand(b""), strict=True))
    evidence = {"I": attest(b"I", state.h, s_i.public, 0), "R": attest(b"R", state.h, s_r.public, 1)}
    ends = {}
    for role in ("I", "R"):
        messages = [(2, body_of(role, n)) for n in range(MESSAGES)]
        sent = stream(keys[role], [(1, evidence[role]["attest"]), *messages, (4, struct.pack(">Q", MESSAGES + 1))])
        ends[role] = {
            "key": keys[role].hex(),
            **{name: value.hex() for name, value in evidence[role].items()},
            "records": {str(n): sent[n].hex() for n in (0, 3, 1023, 1024, 1025, len(sent) - 1)},
            "count": len(sent),
            "sha256": hashlib.sha256(b"".join(sent)).hexdigest(),  # of all records
        }
    return {
        "preamble": preamble.hex(),
        "prologue": prologue.hex(),
        "mac_key": key.hex(),
        "mac": mac.hex(),
        "messages": [message.hex() for message in (message_1, message_2, message_3)],
        "h": state.h.hex(),
        **ends,
    }


def answers() -> dict[str, Any]:
    """The whole of tests/data/link_v2_kat.json."""
    return {str(suite): link(suite) for suite in NAMES}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(answers(), indent=1) + "\n")
