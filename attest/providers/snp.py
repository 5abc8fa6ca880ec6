"""AMD SEV-SNP: an attestation report says which image a guest was started with, and on which platform.

    report     1184 bytes, little-endian, `parse` lists them                  ECDSA P-384 SHA-384 by the VEK
    VEK        the key of a chip (VCEK) or of a cloud (VLEK), for one version of the firmware: the reported TCB
    chain      SEV-VCEK <- SEV-Milan <- ARK-Milan                             or Genoa, Turin
               SEV-VLEK <- SEV-VLEK-Milan <- ARK-Milan

The binding B is its report_data. Endorsements are the VEK and, in any order, ASK (or ASVK), ARK and perhaps the ARK's
revocation list, each in DER. A report has no date: it is as fresh as its binding.

Three layers, in this order: `parse` reads, `authenticate` checks who says so, `appraise` compares with pins.
"""

import hashlib
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from typing import Any

from Crypto.Hash import SHA384
from Crypto.PublicKey.ECC import EccKey

from attest import (
    AttestationError,
    AttestationResult,
    Binding,
    Evidence,
    EvidenceError,
    Failure,
    PolicyError,
    Provider,
    certificates,
    ecdsa,
    provider_name,
    sev_guest,
    tsm,
    x509,
)
from attest.certificates import Files
from attest.der import IA5, INTEGER, OCTETS, Reader
from attest.document import Place
from attest.policy import differences
from attest.providers import AnyCode, Platform
from attest.x509 import Certificate, Crl

SIZE = 1184  # bytes of a report
SIGNED = 0x2A0  # bytes of it that are signed
MASKED = bytes(64)  # the chip_id of a platform that does not say which it is
MAX_LISTED = 64  # measurements or chips in one manifest entry
SIGNERS = {0: "vcek", 1: "vlek"}
SMT, MUST_BE_ONE, MIGRATE, DEBUG = 16, 17, 18, 19  # bits of the policy

# SHA-256 of the certificates ARK-Milan, ARK-Genoa, ARK-Turin, as AMD's key server gives them.
ROOTS = frozenset(
    map(
        bytes.fromhex,
        (
            "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
            "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
            "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
        ),
    )
)

# What the eight bytes of a TCB are, "" being zero; numbers of security versions, higher is newer.
_MILAN = ("bootloader", "tee", "", "", "", "", "snp", "microcode")
_TURIN = ("fmc", "bootloader", "tee", "snp", "", "", "", "microcode")
TCB = {"Milan": _MILAN, "Genoa": _MILAN, "Turin": _TURIN}
_MODELS = {  # of a report's processor, by family
    0x19: {"Milan": [*range(0x10)], "Genoa": [*range(0x10, 0x20), *range(0xA0, 0xB0)]},
    0x1A: {"Turin": [*range(0x12)]},
}
_CHIP = {"Milan": 64, "Genoa": 64, "Turin": 8}  # bytes of a certificate's hwID; chip_id is that and zeros

_OID = "1.3.6.1.4.1.3704.1."
_VERSIONS = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}  # below _OID
_CRL_NUMBER = "2.5.29.20"

# The checks in their order, pins aside, and what holds where one passes. The first two end the rest.
CHECKS = {
    "malformed": "an SNP report, and certificates in DER, as specified",
    "alg": "ECDSA P-384 with SHA-384",
    "chain": "the certificates lead to a pinned root, by the names of the report's signer",
    "not-yet-valid": "all certificates had begun",
    "expired": "no certificate had ended",
    "signature": "the report is signed by the VEK",
    "product": "one product: the VEK's, its signers' and the report's processor's",
    "tcb": "the VEK is of the reported TCB",
    "chip-id": "the VEK is of the chip, if it is a chip's",
    "collateral-expired": "the revocation list is of this time, if there is one",
    "revoked": "no certificate is on the list",
    "binding": "made for this handshake, by this end, with these claims",
    "claims": "as pinned",
    "debug": "off",
    "migratable": "no",
}


@dataclass(frozen=True)
class Report:
    """The fields of a report. Nobody has checked its signature."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    processor: bytes  # family, model, stepping; zeros in version 2
    chip_id: bytes
    committed_tcb: bytes
    versions: bytes
    launch_tcb: bytes
    mitigations: bytes
    signed: bytes
    signature: tuple[int, int]  # r, s

    @property
    def signer(self) -> str:
        """Whose key signed it: "vcek", a chip's, or "vlek", a cloud's on any of its chips."""
        return SIGNERS[self.key_info >> 2 & 7]

    @property
    def debug(self) -> bool:
        """Whether the host may read the guest's memory."""
        return bool(self.policy >> DEBUG & 1)

    @property
    def migratable(self) -> bool:
        """Whether a migration agent may move the guest, and so has its keys."""
        return bool(self.policy >> MIGRATE & 1) or self.report_id_ma != b"\xff" * 32


@dataclass(frozen=True)
class Statement(Report):
    """What a report says, on AMD's word, with what its endorsements say."""

    product: str
    csp_id: str | None  # the cloud whose VLEK it is
    crl_number: int | None  # of the revocation list; None if there is none

    def tcb(self, encoded: bytes) -> dict[str, int]:
        """One of its TCBs as numbers, by their names."""
        return {name: number for name, number in zip(TCB[self.product], encoded, strict=True) if name}


class _Fields:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise EvidenceError(f"SNP report: wanted {count} bytes at {self.at:#x}, got {len(self.data) - self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def zeros(self, count: int) -> None:
        at = self.at
        if any(self.take(count)):
            raise EvidenceError(f"SNP report: got something in the {count} bytes at {at:#x}, wanted zeros")

    def zeros_to(self, end: int) -> None:
        self.zeros(end - self.at)


def parse(evidence: bytes) -> Report:
    """The fields of a report. Raises EvidenceError, malformed or alg."""
    if len(evidence) != SIZE:
        raise EvidenceError(f"SNP report: got {len(evidence)} bytes, wanted {SIZE}")
    at = _Fields(evidence)
    found: dict[str, Any] = {"version": at.number(4), "guest_svn": at.number(4), "policy": at.number(8)}
    version, policy = found["version"], found["policy"]
    if not 2 <= version <= 5:
        raise EvidenceError(f"SNP report: got version {version}, wanted 2 to 5")
    if not policy >> MUST_BE_ONE & 1 or policy >> 26:
        raise EvidenceError(f"SNP report: got the policy {policy:#x}, wanted bit {MUST_BE_ONE} and none above 25")
    found |= {"family_id": at.take(16), "image_id": at.take(16), "vmpl": at.number(4)}
    algorithm = at.number(4)
    if algorithm != 1:
        text = f"alg: got a report with the signature algorithm {algorithm}, wanted 1, ECDSA P-384 with SHA-384"
        raise EvidenceError(text, "alg")
    found |= {"current_tcb": at.take(8), "platform_info": at.number(8), "key_info": at.number(4)}
    if found["key_info"] >> 5 or found["key_info"] >> 2 not in SIGNERS:
        raise EvidenceError(f"SNP report: got the key info {found['key_info']:#x}, wanted a VCEK or VLEK as signer")
    at.zeros(4)
    found |= {"report_data": at.take(64), "measurement": at.take(48), "host_data": at.take(32)}
    found |= {"id_key_digest": at.take(48), "author_key_digest": at.take(48)}
    found |= {"report_id": at.take(32), "report_id_ma": at.take(32), "reported_tcb": at.take(8)}
    found["processor"] = at.take(3)
    if version < 3 and any(found["processor"]):
        raise EvidenceError("SNP report: got a processor in version 2, wanted zeros")
    at.zeros_to(0x1A0)
    found |= {"chip_id": at.take(64), "committed_tcb": at.take(8), "versions": at.take(8), "launch_tcb": at.take(8)}
    found["mitigations"] = at.take(16)
    if version < 5 and any(found["mitigations"]):
        raise EvidenceError(f"SNP report: got mitigations in version {version}, wanted zeros")
    at.zeros_to(SIGNED)
    numbers = []
    for _ in range(2):
        numbers.append(at.number(48))
        at.zeros(24)  # cutting them would let one signature have two encodings
    at.zeros_to(SIZE)
    return Report(**found, signed=evidence[:SIGNED], signature=(numbers[0], numbers[1]))


@dataclass(frozen=True)
class _Vek:
    """What AMD says about the key of a report, in extensions of its certificate."""

    product: str
    versions: dict[str, int]  # the TCB that it is of
    chip: bytes | None
    csp_id: str | None

    @classmethod
    def read(cls, certificate: Certificate) -> "_Vek":
        extensions = {oid: value for oid, (_, value) in certificate.extensions.items()}
        text, csp = extensions.get(_OID + "2"), extensions.get(_OID + "5")
        product = "" if text is None else _only(text, IA5).decode("ascii", "replace").partition("-")[0]
        found = {name: _OID + number for name, number in _VERSIONS.items() if _OID + number in extensions}
        versions = {name: int.from_bytes(_only(extensions[oid], INTEGER), "big") for name, oid in found.items()}
        chip = extensions.get(_OID + "4")
        if chip is not None and len(chip) not in _CHIP.values():  # newer ones wrap it
            chip = _only(chip, OCTETS)
        return cls(product, versions, chip, None if csp is None else _only(csp, IA5).decode("ascii", "replace"))

    def tcb(self) -> bytes | None:
        """As its report has it; None if a number is missing, or too large."""
        numbers = [self.versions.get(name, -1) if name else 0 for name in TCB.get(self.product, ("none",))]
        return bytes(numbers) if all(0 <= number < 256 for number in numbers) else None


def _only(encoded: bytes, tag: int) -> bytes:
    """The content of the one element that this is."""
    outer = Reader(encoded)
    if tag == INTEGER:
        number = outer.integer()
        content = number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big")
    else:
        content = outer.content(tag)
    outer.end()
    return content


def _read(endorsements: Sequence[bytes]) -> tuple[list[Certificate], bytes | None]:
    """The chain, leaf first, and the revocation list, still encoded. Raises EvidenceError."""
    if not 3 <= len(endorsements) <= 4:
        wanted = "wanted VEK, ASK or ASVK, ARK and perhaps a revocation list"
        raise EvidenceError(f"SNP endorsements: got {len(endorsements)}, {wanted}")
    lists = [item for item in endorsements[1:] if certificates.is_list(item)]
    vek, *above = [Certificate.read(item) for item in endorsements if item not in lists]
    if len(above) != 2 or len(lists) != len(endorsements) - 3:
        raise EvidenceError("SNP endorsements: got another number of certificates than three, or of lists than one")
    above.sort(key=lambda certificate: certificate.issuer == certificate.subject)  # the root is its own issuer
    return [vek, *above], lists[0] if lists else None


def authenticate(
    evidence: bytes,
    endorsements: Sequence[bytes] = (),
    roots: Collection[bytes] | None = None,
    now: datetime | None = None,
) -> Statement:
    """What a report says, if AMD has vouched for its key, and that key signed it.

    Args:
        endorsements: VEK first; ASK or ASVK, ARK, and perhaps the ARK's revocation list, in any order. Each in DER.
        roots: SHA-256 digests of the certificates that may be its root; None is AMD's.
        now: the verifier's time, with a zone; None is the clock's.

    Raises EvidenceError. Whether it is acceptable is another question: `appraise`.
    """
    statement, wrong = examine(evidence, endorsements, ROOTS if roots is None else roots, now or datetime.now(UTC))
    if wrong:
        raise EvidenceError.of(wrong)
    return statement


def examine(
    evidence: bytes, endorsements: Sequence[bytes], roots: Collection[bytes], now: datetime
) -> tuple[Statement, list[Failure]]:
    """What a report says, and all reasons not to believe it. Raises EvidenceError for malformed and alg."""
    report = parse(evidence)
    chain, listed = _read(endorsements)
    vek = _Vek.read(chain[0])
    if vek.product not in TCB:
        raise EvidenceError(f"SNP endorsements: got a VEK of {vek.product[:40]!a}, wanted {', '.join(TCB)}")
    wrong = x509.path(chain, roots, now) + _misnamed(report, chain, vek)
    if not _is_by(report, chain[0]):
        wrong.append(("signature", "signature: got one that is not by the VEK: it was altered, or is of another chip"))
    wrong += _unfit(report, chain, vek)
    number = None
    if listed is not None and hashlib.sha256(chain[2].der).digest() in roots:
        number, revoked = _revoked(listed, chain, now)
        wrong += revoked
    found = {field.name: getattr(report, field.name) for field in fields(report)}
    return Statement(**found, product=vek.product, csp_id=vek.csp_id, crl_number=number), wrong


def _revoked(listed: bytes, chain: Sequence[Certificate], now: datetime) -> tuple[int | None, list[Failure]]:
    """A list's number, and what it and the chain have against each other. The root is one to believe.

    What it did not sign is not read any further: a list may be long.
    """
    if len(listed) > x509.MAX_LIST or not x509.is_signed_by(listed, chain[2].key):
        return None, [("chain", f"chain: got a revocation list that is not signed by {chain[2].common_name!a}")]
    crl = Crl.read(listed)
    wrong = crl.failures(chain[2], now)
    for certificate in chain[1:]:
        if certificate.serial in crl.serials:
            name = f"{certificate.common_name[:80]!a} (serial {certificate.serial})"
            wrong.append(("revoked", f"revoked: got {name} on AMD's list, wanted none that is there"))
    number = crl.extensions.get(_CRL_NUMBER)
    return None if number is None else int.from_bytes(_only(number[1], INTEGER), "big"), wrong


def _is_by(report: Report, vek: Certificate) -> bool:
    key = vek.key
    if not isinstance(key, EccKey) or key.curve != "NIST P-384":
        return False
    return ecdsa.is_signed(key, SHA384, report.signed, *report.signature)


def _misnamed(report: Report, chain: Sequence[Certificate], vek: _Vek) -> list[Failure]:
    """Whether the chain is one of the key that the report names. Whole names: parts prove nothing."""
    got = [certificate.common_name[:80] for certificate in chain]
    middle = {"vcek": f"SEV-{vek.product}", "vlek": f"SEV-VLEK-{vek.product}"}[report.signer]
    wanted = [f"SEV-{report.signer.upper()}", middle, f"ARK-{vek.product}"]
    return [] if got == wanted else [("chain", f"chain: got the names {got!a}, wanted {wanted!a}")]


def _unfit(report: Report, chain: Sequence[Certificate], vek: _Vek) -> list[Failure]:
    """What the VEK's certificate says otherwise than the report."""
    wrong = []
    family, model, _ = report.processor
    products = [name for name, models in _MODELS.get(family, {}).items() if model in models]
    if report.version >= 3 and products != [vek.product]:
        made = f"a processor of family {family:x}h, model {model:x}h"
        wrong.append(("product", f"product: got {made}, and a VEK of {vek.product}, wanted one product"))
    tcb = vek.tcb()
    if report.reported_tcb != tcb:
        of = "no TCB" if tcb is None else tcb.hex()
        advice = "wanted them equal; the firmware was changed: fetch the VEK of the reported TCB"
        wrong.append(("tcb", f"tcb: got the reported TCB {report.reported_tcb.hex()}, and a VEK of {of}, {advice}"))
    unused = [i for i, name in enumerate(TCB[vek.product]) if not name]
    if any(tcb[i] for tcb in (report.current_tcb, report.committed_tcb, report.launch_tcb) for i in unused):
        wrong.append(("tcb", f"tcb: got a TCB with numbers that {vek.product} has not, wanted zeros there"))
    if report.signer == "vlek":
        if vek.csp_id is None or vek.chip is not None:
            wrong.append(("chip-id", "chip-id: got a VLEK of a chip or of no cloud, wanted one of a cloud"))
    elif report.chip_id == MASKED:
        wrong.append(("chip-id", "chip-id: got none, wanted the chip's; let the host not mask it (MaskChipId)"))
    elif vek.csp_id is not None or vek.chip is None or len(vek.chip) != _CHIP[vek.product]:
        wrong.append(("chip-id", f"chip-id: got a VCEK of no chip, wanted one of {report.chip_id.hex()}"))
    elif report.chip_id != vek.chip.ljust(64, b"\0"):
        of = f"and a VCEK of {vek.chip.hex()}"
        wrong.append(("chip-id", f"chip-id: got {report.chip_id.hex()}, {of}, wanted them equal"))
    return wrong


def appraise(statement: Statement, pins: Mapping[str, Any] | AnyCode, allow_debug: bool = False) -> None:
    """Accepts an authentic statement, or raises PolicyError with all that differs. Arguments as of `failures`."""
    wrong = failures(statement, pins, allow_debug)
    if wrong:
        raise PolicyError(*(sentence for _, sentence in wrong))


def failures(statement: Statement, pins: Mapping[str, Any] | AnyCode, allow_debug: bool = False) -> list[Failure]:
    """What of an authentic statement is not acceptable, all at once.

    Args:
        pins: the fields of a manifest's `evidence` object that are to be compared, at least one; or ANY_CODE.
        allow_debug: for tests; no manifest can say it.
    """
    wrong = []
    if statement.debug and not allow_debug:
        wrong.append(("debug", "debug: got on (policy bit 19), wanted off; start the guest without it"))
    if statement.migratable:
        wrong.append(("migratable", "migratable: got yes, wanted no; start the guest without a migration agent"))
    wanted: Mapping[str, Any] = {} if isinstance(pins, AnyCode) else pins
    if not isinstance(pins, AnyCode) and not _COMPARE.keys() & wanted.keys() - {"provider", "covers"}:
        wrong.append(("pins", "pins: got none, wanted some: nothing would be compared"))
    if not any(statement.measurement):
        wrong.append(("measurements", "measurements: got zeros, wanted a measurement: nothing was measured"))
    for name, value in ({"vmpl": 0} | dict(wanted)).items():
        sentence = _COMPARE[name](statement, value, wanted) if name in _COMPARE else "got none, wanted no such pin"
        if sentence:
            wrong.append((name, f"{name}: {sentence}"))
    return wrong


_Compare = Callable[[Statement, Any, Mapping[str, Any]], str]  # what differs, or nothing


def _plain(show: Callable[[Statement], Any], advice: str) -> _Compare:
    def compare(statement: Statement, value: Any, _: Mapping[str, Any]) -> str:
        got = show(statement)
        same = type(got) is type(value) and got == value
        return "" if same else f"got {_told(got)}, wanted {_told(value)}; {advice}"

    return compare


def _one_of(show: Callable[[Statement], Any], advice: str) -> _Compare:
    def compare(statement: Statement, value: Any, _: Mapping[str, Any]) -> str:
        got = show(statement)
        if isinstance(value, list | tuple) and got is not None and got in value:
            return ""
        listed = " or ".join(map(_told, value)) if isinstance(value, list | tuple) else _told(value)
        return f"got {_told(got)}, wanted {listed or 'one of none'}; {advice}"

    return compare


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return hex(value) if type(value) is int and value > 255 else ascii(value).strip("'")[:200]


def _at_least(statement: Statement, value: Any, _: Mapping[str, Any]) -> str:
    """The reported TCB is that of the key; the committed one what the host cannot go below; the launch one the past."""
    if not isinstance(value, Mapping) or not value:
        return f"got {_told(value)} as the pin, wanted numbers by their names"
    sentences = []
    for kind in ("reported", "committed", "launch"):
        got = statement.tcb(getattr(statement, f"{kind}_tcb"))
        for name, least in value.items():
            if type(least) is not int or got.get(name, -1) < least:
                found = f"{kind} {name} {got.get(name, 'none')}"
                sentences.append(f"got {found}, wanted at least {_told(least)}; update the platform's firmware")
    return "; ".join(sentences)


def _bits(set_: bool) -> _Compare:
    def compare(statement: Statement, value: Any, _: Mapping[str, Any]) -> str:
        if not isinstance(value, list | tuple) or not all(type(bit) is int and 0 <= bit < 64 for bit in value):
            return f"got {_told(value)} as the pin, wanted bits, 0 to 63"
        bits = [bit for bit in value if bool(statement.platform_info >> bit & 1) != set_]
        state = "on" if set_ else "off"
        return f"got bits {bits} of platform_info {'off' if set_ else 'on'}, wanted {state}" if bits else ""

    return compare


def _listed(statement: Statement, value: Any, _: Mapping[str, Any]) -> str:
    got = statement.crl_number
    if type(value) is int and got is not None and got >= value:
        return ""
    found = "no revocation list with a number" if got is None else str(got)
    return f"got {found}, wanted {_told(value)} or later; renew the stage's endorsements"


def _covered(_: Statement, value: Any, pins: Mapping[str, Any]) -> str:
    if value == "image" or (value == "initdata" and "host_data" in pins):
        return ""
    return f'got {_told(value)}, wanted "image", or "initdata" with host_data'


_COMPARE: dict[str, _Compare] = {
    "provider": _plain(lambda _: "snp", "this is SNP evidence"),
    "covers": _covered,
    "product": _plain(lambda found: found.product, "it runs on other hardware than was pinned"),
    "measurements": _one_of(
        lambda found: found.measurement.hex(), "another image, or other CPUs, than was pinned: compare what was started"
    ),
    "policy": _plain(lambda found: found.policy, "the guest was started under another policy than was pinned"),
    "min_tcb": _at_least,
    "vmpl": _plain(lambda found: found.vmpl, "at another level, what runs below rules the stage"),
    "chip_ids": _one_of(
        lambda found: found.chip_id.hex() if found.signer == "vcek" else None, "it runs on another machine"
    ),
    "csp_id": _plain(lambda found: found.csp_id, "it runs at another cloud, or with a chip's own key"),
    "host_data": _plain(lambda found: found.host_data.hex(), "the guest was started with other data than was pinned"),
    "id_key_digest": _plain(lambda found: found.id_key_digest.hex(), "another key signed the guest's identity"),
    "author_key_digest": _plain(lambda found: found.author_key_digest.hex(), "another author's key vouches for it"),
    "guest_svn": _plain(lambda found: found.guest_svn, "another version of the guest was started"),
    "platform_required": _bits(True),
    "platform_forbidden": _bits(False),
    "min_crl_number": _listed,
}


@dataclass(frozen=True)
class SnpPins:
    """What of a stage's report is pinned: the fields of a manifest's `evidence` object, which `read` has checked."""

    fields: dict[str, Any]

    @classmethod
    def read(cls, place: Place) -> "SnpPins":
        place.only(*_COMPARE)  # get() has made sure of an object
        covers, product = place.get("covers"), place.get("product")
        if covers.value not in ("image", "initdata"):
            covers.refuse('"image": the measurement includes our code; or "initdata": host_data does')
        if type(product.value) is not str or product.value not in TCB:
            product.refuse(" or ".join(f'"{name}"' for name in TCB))
        names = [name for name in TCB[product.value] if name]
        least = place.get("min_tcb")
        versions = {name: least.get(name).integer(0, 255) for name in names}
        least.only(*names)
        policy = place.get("policy").integer(1 << MUST_BE_ONE, (1 << 26) - 1)
        if not policy >> MUST_BE_ONE & 1 or policy >> DEBUG & 1 or policy >> MIGRATE & 1:
            place.get("policy").refuse("a policy with bit 17, and without bits 18 (migration) and 19 (debug)")
        found = {
            "provider": "snp",
            "covers": covers.value,
            "product": product.value,
            "measurements": [item.pin(48).hex() for item in place.get("measurements").items(1, MAX_LISTED)],
            "policy": policy,
            "min_tcb": versions,
        }
        if covers.value == "initdata":
            place.get("host_data").pin(32)
        readers: dict[str, Callable[[Place], Any]] = {
            "vmpl": lambda at: at.integer(0, 3),
            "chip_ids": lambda at: [item.pin(64).hex() for item in at.items(1, MAX_LISTED)],
            "csp_id": lambda at: at.text(200),
            "host_data": lambda at: at.bytes(32).hex(),
            "id_key_digest": lambda at: at.bytes(48).hex(),
            "author_key_digest": lambda at: at.bytes(48).hex(),
            "guest_svn": lambda at: at.integer(0, 2**32 - 1),
            "platform_required": lambda at: [bit.integer(0, 63) for bit in at.items(1, 64)],
            "platform_forbidden": lambda at: [bit.integer(0, 63) for bit in at.items(1, 64)],
            "min_crl_number": lambda at: at.integer(0, 2**63 - 1),
        }
        return cls(found | {name: read(place.get(name)) for name, read in readers.items() if name in place.value})

    def to_json(self) -> dict[str, Any]:
        return dict(self.fields)

    def verifier(self, claims: bytes, stage: int, clock: Callable[[], float]) -> "SnpVerifier":
        return SnpVerifier(self, claims, clock=clock)  # the stage's index is among the claims


def pinned(statement: Statement) -> SnpPins:
    """What a manifest would pin of this, on any chip."""
    tcbs = [statement.tcb(tcb) for tcb in (statement.reported_tcb, statement.committed_tcb, statement.launch_tcb)]
    found: dict[str, Any] = {
        "provider": "snp",
        "covers": "image",
        "product": statement.product,
        "measurements": [statement.measurement.hex()],
        "policy": statement.policy,
        "min_tcb": {name: min(tcb[name] for tcb in tcbs) for name in tcbs[0]},
    }
    numbers = {"vmpl": statement.vmpl, "guest_svn": statement.guest_svn, "csp_id": statement.csp_id}
    digests = {name: getattr(statement, name) for name in ("host_data", "id_key_digest", "author_key_digest")}
    found |= {name: value for name, value in numbers.items() if value}
    return SnpPins(found | {name: value.hex() for name, value in digests.items() if any(value)})


@dataclass(frozen=True)
class SnpVerifier:
    """Judges a report: authentic, made for this handshake by an end with these claims, and as pinned."""

    pins: SnpPins
    claims: bytes  # exactly what the stage has to claim
    _: KW_ONLY
    roots: frozenset[bytes] = ROOTS
    clock: Callable[[], float] = time.time  # seconds since the epoch

    def verify(self, evidence: Evidence, binding: Binding) -> AttestationResult:
        """The result, once authenticated and accepted; see `attest.Verifier`. An error has all failures."""
        if evidence.provider != Provider.SNP:
            raise EvidenceError(f"provider: got {provider_name(evidence.provider)}, wanted snp (3)", "provider")
        now = datetime.fromtimestamp(self.clock(), UTC)
        statement, wrong = examine(evidence.evidence, evidence.endorsements, self.roots, now)
        wrong += _unbound(statement, evidence, binding)
        differing = failures(statement, self.pins.to_json())
        refused = PolicyError(*(text for _, text in differing), *differences(evidence.claims, self.claims))
        if wrong:
            raise EvidenceError.of([*wrong, *refused.failures])
        if refused.failures:
            raise refused
        digests = ((name, getattr(statement, name)) for name in ("host_data", "id_key_digest", "author_key_digest"))
        registers = (("measurements", statement.measurement), *digests)  # by the names of their pins
        return AttestationResult(
            Provider.SNP, statement.measurement, statement.debug, evidence.claims, None, None, registers
        )


def _unbound(report: Report, evidence: Evidence, binding: Binding) -> list[Failure]:
    """What of a report is not of this handshake and end."""
    pairs = [
        ("provider", bytes([evidence.provider]), bytes([binding.provider])),
        ("claims", evidence.claims, binding.claims),
        ("report_data", report.report_data, binding.digest),
    ]
    advice = "it was made for another handshake, role, static key or claims; or a paravisor, as Azure's, fills it"
    return [
        ("binding", f"binding: got {name} {got.hex() or 'none'}, wanted {wanted.hex()}; {advice}")
        for name, got, wanted in pairs
        if got != wanted
    ]


@dataclass(frozen=True)
class SnpAttester:
    """Asks the guest's platform for reports, one for each handshake, and finds their endorsements."""

    provider = Provider.SNP
    claims: bytes  # what the stage claims about itself; never a peer's choice
    ask: Callable[[bytes], tuple[bytes, bytes]]  # 64 bytes of report data: a report, and a table of certificates
    _: KW_ONLY
    files: Files | None = None  # of more endorsements: asked each time

    def attest(self, binding: Binding) -> Evidence:
        """Evidence for `binding`; ValueError if its provider or claims are not the attester's own.

        Raises AttestationError if the platform fails, its report is of anything else, or endorsements are missing.
        """
        if (binding.provider, binding.claims) != (self.provider, self.claims):
            raise ValueError("binding: its provider or claims are not this attester's own")
        data, table = self.ask(binding.digest)
        report = parse(data)
        pool = certificates.in_table(table) + (certificates.in_files(self.files()) if self.files else [])
        evidence = Evidence(self.provider, self.claims, data, endorsements(report, pool))
        wrong = _unbound(report, evidence, binding)
        if wrong:
            raise EvidenceError.of(wrong)
        return evidence


def endorsements(report: Report, pool: Sequence[bytes]) -> tuple[bytes, ...]:
    """Those of `pool`, certificates and lists in DER, that lead from a report to its root.

    Raises AttestationError if one is missing; it says where AMD has it.
    """
    lists = {item: Crl.read(item) for item in pool if certificates.is_list(item)}
    found = [Certificate.read(item) for item in pool if item not in lists]
    chain = [certificate for certificate in found if _is_by(report, certificate)][:1]
    while 0 < len(chain) < 3:
        below = chain[-1]
        signers = [above for above in found if below.issuer == above.subject and below.is_signed_by(above.key)]
        if not signers:
            break
        chain.append(signers[0])
    if len(chain) < 3:
        missing = (report.signer.upper(), "ASK or ASVK", "ARK")[len(chain)]
        raise AttestationError(f"endorsements: the {missing} of this report is missing; {_where(report)}")
    root = chain[2]
    issued = [item for item, crl in lists.items() if crl.issuer == root.subject and crl.is_signed_by(root.key)]
    newest = sorted(issued, key=lambda item: lists[item].this_update)[-1:]
    return (*(certificate.der for certificate in chain), *newest)


def _where(report: Report) -> str:
    """Where AMD publishes a report's endorsements, for a person."""
    if report.signer == "vlek":
        return "a VLEK is the cloud's: its host gives it with the report"
    family, model, _ = report.processor
    product = next((name for name, models in _MODELS.get(family, {}).items() if model in models), "PRODUCT")
    names = {"fmc": "fmc", "bootloader": "bl", "tee": "tee", "snp": "snp", "microcode": "ucode"}
    layout = zip(TCB.get(product, _MILAN), report.reported_tcb, strict=True)
    versions = "&".join(f"{names[name]}SPL={number:02}" for name, number in layout if name)
    site, chip = f"https://kdsintf.amd.com/vcek/v1/{product}", report.chip_id[: _CHIP.get(product, 64)].hex()
    return f"put {site}/{chip}?{versions} and {site}/cert_chain into the folder of --endorsements"


def _attester(key: bytes, claims: bytes, files: Files | None) -> SnpAttester:
    if os.path.isdir(tsm.FOLDER):
        return SnpAttester(claims, partial(tsm.report, provider="sev_guest", folder=tsm.FOLDER), files=files)
    if os.path.exists(sev_guest.DEVICE):
        return SnpAttester(claims, partial(sev_guest.report, device=sev_guest.DEVICE), files=files)
    wanted = f"wanted {tsm.FOLDER}, which root makes once, or {sev_guest.DEVICE}"
    raise AttestationError(f"got no way to ask for an SNP report, {wanted}: is this an SNP guest?")


def _describe(evidence: Evidence) -> dict[str, Any]:
    report = parse(evidence.evidence)
    shown = {
        "version": report.version,
        "measurement": report.measurement,
        "policy": hex(report.policy),
        "debug": report.debug,
        "migratable": report.migratable,
        "vmpl": report.vmpl,
        "signer": report.signer,
        "guest_svn": report.guest_svn,
        "platform_info": hex(report.platform_info),
    }
    names = ("report_data", "host_data", "chip_id", "id_key_digest", "author_key_digest", "reported_tcb",
             "committed_tcb", "launch_tcb", "current_tcb")  # fmt: skip
    shown |= {name: getattr(report, name) for name in names}
    return shown | {"endorsements": [hashlib.sha256(item).hexdigest() for item in evidence.endorsements]}


PLATFORM = Platform(Provider.SNP, SnpPins.read, SnpPins.verifier, _describe, CHECKS, _attester)
