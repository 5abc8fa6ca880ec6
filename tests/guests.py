"""SNP guests of the tests' own: chains with AMD's names under another root, and reports. All can be made wrong.

The `cryptography` package signs, and DER is written by hand: nothing is shared with the readers under test. Keys are
the same in every process.
"""

import ctypes
import functools
import hashlib
import itertools
import json
import os
import struct
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from enclaves import NOW, P256, P384, authority, extension, integer, time, tlv, usage

_PRIMES = [int(p, 16) for p in json.loads((Path(__file__).parent / "data" / "primes.json").read_text())["primes"]]
_SHA384 = bytes.fromhex("300d06096086480165030402020500")
_PARAMETERS = (tlv(0xA0, _SHA384), tlv(0xA1, tlv(0x30, bytes.fromhex("06092a864886f70d010108"), _SHA384)),
               tlv(0xA2, integer(48)))  # fmt: skip
PSS = tlv(0x30, bytes.fromhex("06092a864886f70d01010a"), tlv(0x30, *_PARAMETERS))
RSA = bytes.fromhex("300d06092a864886f70d0101010500")
AMD = "2b06010401" + "9c78" + "01"  # 1.3.6.1.4.1.3704.1
SERIALS = {"ark": 65536, "ask": 65537, "vek": 0}
VEK = ec.derive_private_key(2**381 + 1, ec.SECP384R1())
CHIP = bytes(range(1, 65))
VERSIONS = {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 217}
TURIN = VERSIONS | {"fmc": 2}
_BELOW = {"bootloader": "0301", "tee": "0302", "snp": "0303", "microcode": "0308", "fmc": "0309"}


@functools.cache
def rsa_key(number: int) -> rsa.RSAPrivateKey:
    """One of three keys."""
    p, q = _PRIMES[number], _PRIMES[number - 1]
    d = pow(65537, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPublicNumbers(65537, p * q)
    parts = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q)
    return rsa.RSAPrivateNumbers(p, q, d, *parts, numbers).private_key(unsafe_skip_rsa_key_validation=True)


def name(common: str) -> bytes:
    parts = (("55040b", "Engineering"), ("550406", "US"), ("55040a", "Advanced Micro Devices"), ("550403", common))
    return tlv(0x30, *(tlv(0x31, tlv(0x30, tlv(6, bytes.fromhex(o)), tlv(12, t.encode()))) for o, t in parts))


def amd(number: str, value: bytes) -> bytes:
    return extension(AMD + number, value, False)


def vek_extensions(
    product: str = "Milan-B0",
    versions: Mapping[str, int] = VERSIONS,
    chip: bytes | None = CHIP,
    csp: str | None = None,
) -> tuple[bytes, ...]:
    """What AMD says about a key; `chip` is the value as it stands there."""
    made = [amd("01", integer(0)), amd("02", tlv(22, product.encode()))]
    made += [amd(_BELOW[part], integer(number)) for part, number in versions.items()]
    made += [] if chip is None else [amd("04", chip)]
    return (*made, *([] if csp is None else [amd("05", tlv(22, csp.encode()))]))


@functools.cache
def sign_pss(key: rsa.RSAPrivateKey, data: bytes) -> bytes:
    """RFC 8017, section 9.1.1, with a salt of zeros: the same in every process."""
    salt, hashed = bytes(48), hashlib.sha384(data).digest()
    digest = hashlib.sha384(bytes(8) + hashed + salt).digest()
    plain = b"\1".rjust(512 - 2 * 48 - 1, b"\0") + salt
    mask = b"".join(hashlib.sha384(digest + bytes([0, 0, 0, i])).digest() for i in range(10))
    masked = bytearray(a ^ b for a, b in zip(plain, mask, strict=False))
    masked[0] &= 0x7F
    numbers = key.private_numbers()
    encoded = int.from_bytes(bytes(masked) + digest + b"\xbc", "big")
    one, two = pow(encoded, numbers.dmp1, numbers.p), pow(encoded, numbers.dmq1, numbers.q)
    return (two + (one - two) * numbers.iqmp % numbers.p * numbers.q).to_bytes(512, "big")


def certificate(
    common: str, issuer: str, key: Any, signer: rsa.RSAPrivateKey, serial: int, extensions: tuple[bytes, ...],
    begins: datetime = NOW - timedelta(days=300), ends: datetime = NOW + timedelta(days=300), damage: int = 0,
) -> bytes:  # fmt: skip
    numbers, size = key.public_key().public_numbers(), key.key_size // 8
    if isinstance(key, rsa.RSAPrivateKey):
        public = tlv(0x30, RSA, tlv(3, b"\0", tlv(0x30, integer(numbers.n), integer(numbers.e))))
    else:
        point = b"\4" + numbers.x.to_bytes(size, "big") + numbers.y.to_bytes(size, "big")
        public = tlv(0x30, P384 if size == 48 else P256, tlv(3, b"\0", point))
    dates, listed = tlv(0x30, time(begins), time(ends)), tlv(0xA3, tlv(0x30, *extensions))
    tbs = tlv(0x30, tlv(0xA0, integer(2)), integer(serial), PSS, name(issuer), dates, name(common), public, listed)
    signed = bytearray(sign_pss(signer, tbs))
    signed[-1] ^= damage
    return tlv(0x30, tbs, PSS, tlv(3, b"\0", bytes(signed)))


@functools.cache
def _plain_chain(product: str, vlek: bool) -> tuple[bytes, ...]:
    return tuple(chain(product, vlek, {"vek": {}}))


def chain(product: str = "Milan", vlek: bool = False, changes: Mapping[str, Mapping[str, Any]] = {}) -> list[bytes]:
    """VEK, ASK or ASVK, ARK at NOW, as AMD has them. `changes` are arguments of `certificate`, for vek, ask or ark."""
    if not changes:
        return list(_plain_chain(product, vlek))
    turin = product == "Turin"
    middle = f"SEV-VLEK-{product}" if vlek else f"SEV-{product}"
    chip = None if vlek else CHIP[:8] if turin else CHIP
    leaf = vek_extensions(
        product, TURIN if turin else VERSIONS, chip, "CN=cc-us-east-2.amazonaws.com" if vlek else None
    )
    ark, ask = rsa_key(0), rsa_key(1)
    made: dict[str, dict[str, Any]] = {
        "vek": {"common": "SEV-VLEK" if vlek else "SEV-VCEK", "issuer": middle, "key": VEK, "signer": ask,
                "extensions": leaf},
        "ask": {"common": middle, "issuer": f"ARK-{product}", "key": ask, "signer": ark,
                "extensions": (authority(0), usage("03020204"))},
        "ark": {"common": f"ARK-{product}", "issuer": f"ARK-{product}", "key": ark, "signer": ark,
                "extensions": (authority(), usage("03020106"))},
    }  # fmt: skip
    found = []
    for level, usual in made.items():
        arguments: dict[str, Any] = {"serial": SERIALS[level]} | usual
        found.append(certificate(**(arguments | dict(changes.get(level, {})))))
    return found


EVER: dict[str, Any] = {"begins": datetime(2020, 1, 1, tzinfo=UTC), "ends": datetime(2049, 1, 1, tzinfo=UTC)}


def living(key: rsa.RSAPrivateKey | None = None, *, vlek: bool = False, **changes: Mapping[str, Any]) -> list[bytes]:
    """Milan's chain at any time; `key` is another root's, `changes` as of `chain`."""
    root = rsa_key(0) if key is None else key
    usual: dict[str, dict[str, Any]] = {"vek": {}, "ask": {"signer": root}, "ark": {"key": root, "signer": root}}
    return chain(vlek=vlek, changes={who: EVER | usual[who] | dict(changes.get(who, {})) for who in usual})


def root(ends: Sequence[bytes]) -> bytes:
    """The digest of the last of a chain."""
    return hashlib.sha256(ends[2]).digest()


def tcb(versions: Mapping[str, int] = VERSIONS) -> bytes:
    """As a report has it; Turin's, if there is an fmc."""
    names = ("bootloader", "tee", "", "", "", "", "snp", "microcode")
    if "fmc" in versions:
        names = ("fmc", "bootloader", "tee", "snp", "", "", "", "microcode")
    return bytes(versions.get(part, 0) for part in names)


_LAYOUT: dict[str, tuple[int, int]] = {
    "version": (0x000, 4), "guest_svn": (0x004, 4), "policy": (0x008, 8), "family_id": (0x010, 16),
    "image_id": (0x020, 16), "vmpl": (0x030, 4), "algorithm": (0x034, 4), "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8), "key_info": (0x048, 4), "report_data": (0x050, 64), "measurement": (0x090, 48),
    "host_data": (0x0C0, 32), "id_key_digest": (0x0E0, 48), "author_key_digest": (0x110, 48), "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32), "reported_tcb": (0x180, 8), "processor": (0x188, 3), "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8), "versions": (0x1E8, 8), "launch_tcb": (0x1F0, 8), "mitigations": (0x1F8, 16),
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "version": 3, "policy": 0x30000, "algorithm": 1, "current_tcb": tcb(), "platform_info": 0x25,
    "measurement": b"\x07" * 48, "report_id": b"\x08" * 32, "report_id_ma": b"\xff" * 32, "reported_tcb": tcb(),
    "processor": bytes([0x19, 1, 1]), "chip_id": CHIP, "committed_tcb": tcb(), "launch_tcb": tcb(),
    "versions": bytes.fromhex("1d3701001d370100"),
}  # fmt: skip
MODELS = {"Milan": bytes([0x19, 1, 1]), "Genoa": bytes([0x19, 0x11, 1]), "Turin": bytes([0x1A, 2, 1])}


@functools.cache
def plain() -> bytes:
    """A report that nothing is wrong with."""
    return report()


def report(key: ec.EllipticCurvePrivateKey = VEK, edits: Mapping[int, bytes] = {}, **changes: Any) -> bytes:
    """A report of Milan, on CHIP. `edits` are bytes by their place, signed too if they are."""
    data = bytearray(1184)
    for field, value in (FIELDS | changes).items():
        at, size = _LAYOUT[field]
        data[at : at + size] = value.to_bytes(size, "little") if isinstance(value, int) else value
    for at, value in edits.items():
        data[at : at + len(value)] = value
    r, s = decode_dss_signature(key.sign(bytes(data[:0x2A0]), ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
    data[0x2A0 : 0x2A0 + 48], data[0x2E8 : 0x2E8 + 48] = r.to_bytes(48, "little"), s.to_bytes(48, "little")
    for at, value in edits.items():
        data[at : at + len(value)] = value
    assert len(data) == 1184
    return bytes(data)


def turin(**changes: Any) -> bytes:
    """A report of Turin, whose chips have names of 8 bytes and whose TCBs an fmc."""
    tcbs = dict.fromkeys(("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"), tcb(TURIN))
    return report(**({"processor": MODELS["Turin"], "chip_id": CHIP[:8].ljust(64, b"\0")} | tcbs | changes))


def revocations(
    *serials: int, number: int | None = 5, issuer: str = "ARK-Milan", signer: rsa.RSAPrivateKey | None = None,
    begins: datetime = NOW - timedelta(days=1), ends: datetime = NOW + timedelta(days=1),
) -> bytes:  # fmt: skip
    """The ARK's revocation list."""
    entries = tlv(0x30, *(tlv(0x30, integer(serial), time(NOW)) for serial in serials)) if serials else b""
    more = b"" if number is None else tlv(0xA0, tlv(0x30, extension("551d14", integer(number), False)))
    tbs = tlv(0x30, integer(1), PSS, name(issuer), time(begins), time(ends), entries, more)
    return tlv(0x30, tbs, PSS, tlv(3, b"\0", sign_pss(signer or rsa_key(0), tbs)))


GUIDS = {"vcek": "63da758d-e664-4564-adc5-f4b93be8accd", "vlek": "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
         "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782", "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae"}  # fmt: skip


def table(**certificates: bytes) -> bytes:
    """A host's table; of kinds that are GUIDs, too."""
    at = 24 * (len(certificates) + 1)
    entries, data = b"", b""
    for kind, item in certificates.items():
        entries += uuid.UUID(GUIDS.get(kind, kind)).bytes + struct.pack("<II", at + len(data), len(item))
        data += item
    return entries + bytes(24) + data


def full_table(ends: Sequence[bytes], leaf: str = "vcek") -> bytes:
    return table(**{leaf: ends[0], "ask": ends[1], "ark": ends[2]})


class Device:
    """`/dev/sev-guest`, to be called in place of `fcntl.ioctl`."""

    def __init__(self, certificates: bytes, **changes: Any) -> None:
        self.certificates, self.changes = certificates, changes
        self.head = struct.pack("<II24x", 0, 1184)
        self.requests: list[bytes] = []

    def __call__(self, descriptor: int, code: int, message: bytearray) -> int:
        assert (code, len(message), bytes(message[:8])) == (0xC0205302, 32, b"\1" + bytes(7))
        asked, answer, _ = struct.unpack("=3Q", message[8:])
        request = ctypes.string_at(asked, 112)
        self.requests.append(request)
        place, room = struct.unpack("=QI", request[96:108])
        assert request[64:96] == bytes(32)  # at VMPL 0
        assert room % 4096 == 0
        ctypes.memmove(place, self.certificates, len(self.certificates))
        made = self.head + report(**({"report_data": request[:64]} | self.changes))
        ctypes.memmove(answer, made, len(made))
        return 0


class Folder:
    """A folder of configfs-tsm made of FIFOs, with a platform behind it, until it is closed."""

    def __init__(
        self, path: Path, certificates: bytes, answer: Callable[[bytes], bytes] = lambda data: report(report_data=data),
        provider: str = "sev_guest",
    ) -> None:  # fmt: skip
        self.path, self.certificates, self.answer = path, certificates, answer
        self.steps: Iterator[int] = itertools.repeat(1)  # by which generation rises
        self.provider, self.generation, self.requests = provider, 0, list[bytes]()
        path.mkdir()
        for file in ("inblob", "outblob", "auxblob"):
            os.mkfifo(path / file)
        self._tell()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _tell(self) -> None:
        (self.path / "provider").write_text(self.provider + "\n")
        (self.path / "generation").write_text(f"{self.generation}\n")

    def _serve(self) -> None:
        while data := (self.path / "inblob").read_bytes():
            self.requests.append(data)
            self.generation += next(self.steps)
            self._tell()
            (self.path / "outblob").write_bytes(self.answer(data))
            if self.provider == "sev_guest":
                (self.path / "auxblob").write_bytes(self.certificates)

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(os.open(self.path / "inblob", os.O_WRONLY))  # and writes nothing: the end
        self.thread.join(60)
