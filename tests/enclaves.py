"""Nitro enclaves of the tests' own: chains with AWS's names under another root, and documents. All can be made wrong.

The `cryptography` package signs, and DER and CBOR are written here: nothing is shared with the readers under test.
Keys and signatures are the same in every process.
"""

import ctypes
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

NOW = datetime(2027, 1, 15, 12, 0, 0, tzinfo=UTC)
SHA256_ECDSA, SHA384_ECDSA = (bytes.fromhex(f"300a06082a8648ce3d04030{i}") for i in (2, 3))
P256, P384 = (bytes.fromhex(code) for code in ("301306072a8648ce3d020106082a8648ce3d030107",
                                               "301006072a8648ce3d020106052b81040022"))  # fmt: skip
CONSTRAINTS, USAGE = "551d13", "551d0f"  # OIDs
PCRS = {i: bytes([i + 1]) * 48 if i < 3 else bytes(48) for i in range(16)}


def cbor(value: Any) -> bytes:
    """A value, encoded in the shortest form."""
    if value is None or isinstance(value, bool):
        return {None: b"\xf6", False: b"\xf4", True: b"\xf5"}[value]
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes | str):
        data = value.encode() if isinstance(value, str) else value
        return _head(3 if isinstance(value, str) else 2, len(data)) + data
    if isinstance(value, list):
        return _head(4, len(value)) + b"".join(map(cbor, value))
    return _head(5, len(value)) + b"".join(cbor(key) + cbor(item) for key, item in value.items())


def _head(kind: int, number: int) -> bytes:
    for i, size in enumerate((1, 2, 4, 8)):
        if number < 24:
            return bytes([kind << 5 | number])
        if number < 256**size:
            return bytes([kind << 5 | 24 + i]) + number.to_bytes(size, "big")
    raise OverflowError(number)


def tlv(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 128 + len(length)]) + length + content


def integer(value: int) -> bytes:
    return tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def name(common: str, kind: int = 12) -> bytes:
    parts = (("550406", "US"), ("55040a", "Amazon"), ("55040b", "AWS"), ("550403", common))
    return tlv(0x30, *(tlv(0x31, tlv(0x30, tlv(6, bytes.fromhex(o)), tlv(kind, t.encode()))) for o, t in parts))


def time(moment: datetime) -> bytes:
    late = moment.year >= 2050
    return tlv(24 if late else 23, moment.strftime("%Y%m%d%H%M%SZ" if late else "%y%m%d%H%M%SZ").encode())


def extension(oid: str, value: bytes, critical: bool = True) -> bytes:
    return tlv(0x30, tlv(6, bytes.fromhex(oid)), tlv(1, b"\xff") if critical else b"", tlv(4, value))


def authority(room: int | None = None) -> bytes:
    return extension(CONSTRAINTS, tlv(0x30, tlv(1, b"\xff"), b"" if room is None else integer(room)))


def usage(bits: str) -> bytes:
    return extension(USAGE, bytes.fromhex(bits))


SIGNS_CERTIFICATES, SIGNS = "03020186", "030206c0"


@dataclass(frozen=True)
class Holder:
    """Somebody with a certificate and its key."""

    name: bytes
    key: ec.EllipticCurvePrivateKey
    der: bytes


def certificate(
    subject: bytes,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    issuer: bytes,
    begins: datetime,
    ends: datetime,
    extensions: tuple[bytes, ...],
    algorithm: bytes = SHA384_ECDSA,
    inner_algorithm: bytes | None = None,
    version: bytes = tlv(0xA0, integer(2)),
    serial: bytes = integer(7),
    point: bytes | None = None,
    public: bytes | None = None,
    signature: bytes | None = None,
    damage: int = 0,
) -> bytes:
    numbers = key.public_key().public_numbers()
    size = key.key_size // 8
    point = point or b"\x04" + numbers.x.to_bytes(size, "big") + numbers.y.to_bytes(size, "big")
    public = public or tlv(0x30, P384 if size == 48 else P256, tlv(3, b"\0", point))
    listed = tlv(0xA3, tlv(0x30, *extensions)) if extensions else b""
    dates = tlv(0x30, time(begins), time(ends))
    inner = algorithm if inner_algorithm is None else inner_algorithm
    tbs = tlv(0x30, version, serial, inner, issuer, dates, subject, public, listed)
    hasher: Any = hashes.SHA256() if algorithm == SHA256_ECDSA else hashes.SHA384()
    signed = bytearray(signature or signer.sign(tbs, ec.ECDSA(hasher, deterministic_signing=True)))
    signed[-1] ^= damage
    return tlv(0x30, tbs, algorithm, tlv(3, b"\0", bytes(signed)))


LEVELS = ("root", "region", "zone", "instance", "leaf")
_NAMES = {
    "root": "aws.nitro-enclaves",
    "region": "2f442bd2442676f0.us-east-1.aws.nitro-enclaves",
    "zone": "be9b7ab27d54882b.zonal.us-east-1.aws.nitro-enclaves",
    "instance": "i-03ad7cdb817437eeb.us-east-1.aws.nitro-enclaves",
    "leaf": "i-03ad7cdb817437eeb-enc0183cc7569b3f6e1.us-east-1.aws",
}
_LIVES = {"root": 30 * 365, "region": 20, "zone": 5, "instance": 1, "leaf": 0.125}  # days
_EXTENSIONS = {
    "root": (authority(), usage(SIGNS_CERTIFICATES)),
    "region": (authority(2), usage(SIGNS_CERTIFICATES)),
    "zone": (authority(1), usage(SIGNS_CERTIFICATES)),
    "instance": (authority(0), usage("03020204")),
    "leaf": (extension(CONSTRAINTS, tlv(0x30)), usage(SIGNS)),
}
_KEYS = {level: ec.derive_private_key(2**380 + i, ec.SECP384R1()) for i, level in enumerate(LEVELS)}


def chain(changes: Mapping[str, Mapping[str, Any]] = {}) -> list[Holder]:
    """A chain at NOW, root first, as AWS has it. `changes` are arguments of `certificate`, for one of LEVELS."""
    holders: list[Holder] = []
    for level in LEVELS:
        key = changes.get(level, {}).get("key", _KEYS[level])
        own, above = name(_NAMES[level]), holders[-1] if holders else None
        fields: dict[str, Any] = {
            "subject": own,
            "key": key,
            "signer": above.key if above else key,
            "issuer": above.name if above else own,
            "begins": NOW - timedelta(days=_LIVES[level] / 2),
            "ends": NOW + timedelta(days=_LIVES[level] / 2),
            "extensions": _EXTENSIONS[level],
        }
        fields |= changes.get(level, {})
        holders.append(Holder(fields["subject"], key, certificate(**fields)))
    return holders


def living(now: datetime, changes: Mapping[str, Mapping[str, Any]] = {}) -> list[Holder]:
    """CHAIN as it is at any other time: the root is the same."""
    half = {level: timedelta(days=_LIVES[level] / 2) for level in LEVELS[1:]}
    dates = {level: {"begins": now - half[level], "ends": now + half[level]} for level in LEVELS[1:]}
    return chain({level: {**dates.get(level, {}), **changes.get(level, {})} for level in LEVELS})


CHAIN = chain()
ROOT = hashlib.sha256(CHAIN[0].der).digest()


def fields(holders: list[Holder] = CHAIN, **changes: Any) -> dict[str, Any]:
    """The fields of a payload; `...` leaves one out."""
    made = {
        "module_id": "i-03ad7cdb817437eeb-enc0183cc7569b3f6e1",
        "digest": "SHA384",
        "timestamp": int(NOW.timestamp() * 1000),
        "pcrs": PCRS,
        "certificate": holders[-1].der,
        "cabundle": [holder.der for holder in holders[:-1]],
        "public_key": None,
        "user_data": None,
        "nonce": None,
    }
    return {key: value for key, value in (made | changes).items() if value is not ...}


def sign(
    payload: bytes, key: ec.EllipticCurvePrivateKey, protected: bytes = bytes.fromhex("a1013822"), hasher: Any = None
) -> bytes:
    """The document of a payload, whatever that is."""
    signed = cbor(["Signature1", protected, b"", payload])
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hasher or hashes.SHA384(), deterministic_signing=True)))
    return cbor([protected, {}, payload, r.to_bytes(48, "big") + s.to_bytes(48, "big")])


def document(holders: list[Holder] = CHAIN, **changes: Any) -> bytes:
    """A document of CHAIN's leaf at NOW."""
    return sign(cbor(fields(holders, **changes)), holders[-1].key)


def revocations(
    *serials: int, signer: Holder = CHAIN[0], begins: datetime = NOW, ends: datetime = NOW, critical: bool = False
) -> bytes:
    """A revocation list."""
    entries = tlv(0x30, *(tlv(0x30, integer(serial), time(NOW)) for serial in serials)) if serials else b""
    dates, extensions = time(begins) + time(ends), tlv(0xA0, tlv(0x30, extension("551d14", integer(1), critical)))
    tbs = tlv(0x30, integer(1), SHA384_ECDSA, signer.name, dates, entries, extensions)
    signed = signer.key.sign(tbs, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    return tlv(0x30, tbs, SHA384_ECDSA, tlv(3, b"\0", signed))


def amd() -> bytes:
    """A certificate of AMD's kind, RSA-4096 PSS inside and out. It is well formed, and nobody has signed it."""
    sha384 = bytes.fromhex("300d06096086480165030402020500")
    parameters = tlv(0xA0, sha384), tlv(0xA1, tlv(0x30, bytes.fromhex("06092a864886f70d010108"), sha384))
    pss = tlv(0x30, bytes.fromhex("06092a864886f70d01010a"), tlv(0x30, *parameters, tlv(0xA2, integer(48))))
    modulus = int.from_bytes(b"\xc1" * 512, "big")
    key = tlv(3, b"\0", tlv(0x30, integer(modulus), integer(65537)))
    public = tlv(0x30, bytes.fromhex("300d06092a864886f70d0101010500"), key)
    change = {"algorithm": pss, "public": public, "signature": b"\1" * 512, "serial": integer(0), "extensions": ()}
    return chain({"leaf": change})[-1].der


class Device:
    """A Security Module, to be called in place of `fcntl.ioctl`. It signs with CHAIN's leaf; `answer` replaces that."""

    def __init__(self, holders: list[Holder] = CHAIN, **changes: Any) -> None:
        self.holders, self.changes = holders, changes
        self.answer: bytes | None = None
        self.requests: list[bytes] = []

    def __call__(self, descriptor: int, code: int, message: bytearray) -> int:
        assert (code, len(message)) == (0xC0200A00, 32)
        request, size, response, room = struct.unpack("=4Q", message)
        answer = self.reply(ctypes.string_at(request, size))
        ctypes.memmove(response, answer, min(len(answer), room))
        message[24:] = struct.pack("=Q", len(answer))
        return 0

    def reply(self, asked: bytes) -> bytes:
        """The answer to a request."""
        self.requests.append(asked)
        # {"Attestation": {"user_data": 64 bytes, "nonce": 32, "public_key": 32}}, whose layout is fixed
        places = {"user_data": (26, 64), "nonce": (98, 32), "public_key": (143, 32)}
        bound = {name: asked[at : at + length] for name, (at, length) in places.items()}
        made = document(self.holders, **(bound | self.changes))
        return cbor({"Attestation": {"document": made}}) if self.answer is None else self.answer
