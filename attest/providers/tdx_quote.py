"""The layout of Intel's quote.

    header 48  u16 version 4 or 5 | u16 key type 2 | u32 TEE 0x81 | 4 | vendor 16 | 20              (little-endian)
    version 5  u16 body type, u32 size: 2, 584; or 3, 648                                  version 4 has type 2, unsaid
    body       what `Statement` lists first, in its order; the last two are of type 3 only
    u32 size   signature 64 | key 64 | u16 6 | u32 size | QE report 384 | its signature 64 | u16 size | auth
               | u16 5 | u32 size | PEM: three certificates, perhaps a zero byte            behind it: padding, ignored

All before the u32 size is signed by the key: ECDSA P-256 SHA-256, r ‖ s big-endian.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from Crypto.PublicKey.ECC import EccKey

from attest import AttestationResult, Binding, EvidenceError, Provider, ecdsa
from attest.providers.tdx_collateral import SIGNATURE, Pck
from attest.providers.vendor import Bound, Reader
from attest.x509 import Certificate

BEGINS = (b"\4\0\2\0\x81\0\0\0", b"\5\0\2\0\x81\0\0\0")  # of a quote: versions, key type, TEE
MAX_QUOTE = 16 * 1024  # bytes; genuine ones have 5 KB
MAX_SIGNED = 8192  # bytes of what follows the body

# The fields that a manifest may pin, and the bytes of each.
REQUIRED = {"mrtd": 48, "rtmr0": 48, "rtmr1": 48, "rtmr2": 48, "rtmr3": 48, "td_attributes": 8, "xfam": 8}
_OPTIONAL = {"mrseam": 48, "mrconfigid": 48, "mrowner": 48, "mrownerconfig": 48, "mrservicetd": 48, "ppid": 16}
HEX = REQUIRED | _OPTIONAL

_WHAT = "TDX quote"
_HEADER, _REPORT = 48, 384
_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_BODIES = {2: 584, 3: 648}  # bytes, by type
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
_LINE = 64  # characters of base64
DEBUG, MIGRATABLE = 0xFF, 1 << 29  # bits of td_attributes


@dataclass(frozen=True)
class Statement:
    """What a quote says. That of `authenticate` is Intel's word; that of `parse` anybody's."""

    tee_tcb_svn: bytes  # versions of the TDX module and of firmware
    mrseam: bytes  # the TDX module
    mrsignerseam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes  # processor features
    mrtd: bytes  # what the TD was made of: its firmware
    mrconfigid: bytes  # three that the host chose as it made the TD
    mrowner: bytes
    mrownerconfig: bytes
    rtmr0: bytes  # what the TD itself has measured since
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    report_data: bytes
    tee_tcb_svn_2: bytes | None = None
    mrservicetd: bytes | None = None  # of the TDs that serve this one
    # Of its PCK certificate.
    ppid: bytes | None = None
    fmspc: bytes | None = None
    # Of its collateral.
    collateral: bool = False  # whether there was any
    status: str | None = None
    advisories: tuple[str, ...] = ()
    tcb_evaluation: int | None = None
    crl_numbers: tuple[int, int] | None = None  # of the root's list and the PCK authority's
    valid_until: datetime | None = None  # when the first part of it, or certificate, ends

    @property
    def attributes(self) -> int:
        return int.from_bytes(self.td_attributes, "little")

    @property
    def debug(self) -> bool:
        """Whether the host may read the TD's memory."""
        return bool(self.attributes & DEBUG)

    @property
    def migratable(self) -> bool:
        """Whether another TD may take this one to other hosts."""
        return bool(self.attributes & MIGRATABLE)

    def bound(self, binding: Binding) -> Bound:
        return [("report_data", self.report_data, binding.digest)]

    def result(self, claims: bytes) -> AttestationResult:
        registers = tuple((name, getattr(self, name)) for name in HEX if getattr(self, name) is not None)
        return AttestationResult(Provider.TDX, self.mrtd, self.debug, claims, None, None, registers, self.valid_until)


_SIZES = {
    "tee_tcb_svn": 16,
    "seam_attributes": 8,
    "td_attributes": 8,
    "xfam": 8,
    "report_data": 64,
    "tee_tcb_svn_2": 16,
}
BODY = [(field.name, _SIZES.get(field.name, 48)) for field in fields(Statement)[:17]]


@dataclass(frozen=True)
class Quote:
    """A quote taken apart, unverified."""

    version: int
    statement: Statement
    signed: bytes
    signature: bytes  # r ‖ s, as the next two
    key: EccKey
    bound: bytes  # SHA-256(key ‖ auth)
    qe_report: bytes
    qe_signature: bytes
    chain: tuple[Certificate, ...]  # PCK certificate, authority, root; empty where there are not three
    pck: Pck | None  # None where there is no such certificate


def _rest(reader: Reader, kind: int) -> Reader:
    """All that is left: u16 kind | u32 size | as many bytes, exactly."""
    got, size = reader.number(2), reader.number(4)
    if got != kind or size != len(reader.data) - reader.at:
        wanted = f"wanted {kind} of {len(reader.data) - reader.at}"
        raise EvidenceError(f"TDX quote: got certification data {got} of {size} bytes, {wanted}")
    return Reader(_WHAT, reader.take(size))


def parse(evidence: bytes) -> Quote:
    """Takes a quote apart. Raises EvidenceError: malformed or alg."""
    if len(evidence) > MAX_QUOTE:
        raise EvidenceError(f"TDX quote: got {len(evidence)} bytes, wanted at most {MAX_QUOTE}")
    reader = Reader(_WHAT, evidence)
    version, kind, tee = reader.number(2), reader.number(2), reader.number(4)
    vendor = reader.take(_HEADER - 8)[4:20]
    if version not in (4, 5) or tee != 0x81 or vendor != _VENDOR:
        raise EvidenceError(
            f"TDX quote: got version {version}, TEE {tee:#x}, vendor {vendor.hex()}; wanted 4 or 5, 0x81"
        )
    if kind != 2:
        raise EvidenceError(f"alg: got the key type {kind}, wanted 2 (ECDSA P-256)", "alg")
    body, size = (reader.number(2), reader.number(4)) if version == 5 else (2, _BODIES[2])
    if _BODIES.get(body) != size:
        raise EvidenceError(f"TDX quote: got a body of type {body}, {size} bytes; wanted 2, 584 or 3, 648")
    values: dict[str, Any] = {name: reader.take(length) for name, length in (BODY if body == 3 else BODY[:-2])}
    signed = evidence[: reader.at]
    length = reader.number(4)
    if length > MAX_SIGNED:
        raise EvidenceError(f"TDX quote: got {length} bytes of signatures, wanted at most {MAX_SIGNED}")
    parts = Reader(_WHAT, reader.take(length))
    signature, point = parts.take(SIGNATURE), parts.take(64)
    parts = _rest(parts, 6)
    report, report_signature = parts.take(_REPORT), parts.take(SIGNATURE)
    auth = parts.take(parts.number(2))
    pem = _rest(parts, 5)
    chain = _chain(pem.data)
    pck = Pck.read(chain[0]) if chain else None
    if pck is not None:
        values |= {"ppid": pck.ppid, "fmspc": pck.fmspc}
    return Quote(
        version,
        Statement(**values),
        signed,
        signature,
        ecdsa.public_key("P-256", point),
        hashlib.sha256(point + auth).digest(),
        report,
        report_signature,
        chain,
        pck,
    )


def _chain(pem: bytes) -> tuple[Certificate, ...]:
    """Three certificates, leaf first; none if there are more or fewer. Only one text is each's."""
    text = pem.removesuffix(b"\0")
    if text.count(_BEGIN) != 3:
        return ()
    try:
        found = [base64.b64decode(block.removesuffix(_END)) for block in text.split(_BEGIN)[1:]]
    except binascii.Error:
        raise EvidenceError("TDX quote: got certificates that are not base64") from None
    if b"".join(map(_pem, found)) != text:
        raise EvidenceError("TDX quote: got certificates in another form of PEM than Intel's")
    leaf, authority, root = map(Certificate.read, found)
    return leaf, authority, root


def _pem(der: bytes) -> bytes:
    text = base64.b64encode(der)
    return _BEGIN + b"".join(text[i : i + _LINE] + b"\n" for i in range(0, len(text), _LINE)) + _END
