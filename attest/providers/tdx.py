"""Intel TDX: a quote says which trust domain (TD), a virtual machine, runs on which platform.

    header 48  u16 version 4 or 5 | u16 key type 2 | u32 TEE 0x81 | 4 | vendor 16 | 20              (little-endian)
    version 5  u16 body type, u32 size: 2, 584; or 3, 648                                  version 4 has type 2, unsaid
    body       what `Statement` lists first, in its order; the last two are of type 3 only
    u32 size   signature 64 | key 64 | u16 6 | u32 size | QE report 384 | its signature 64 | u16 size | auth
               | u16 5 | u32 size | PEM: three certificates, perhaps a zero byte            behind it: padding, ignored

    Intel's root ──► PCK certificate ──► QE report, of SHA-256(key ‖ auth) ──► key ──► all before the u32 size

Signatures are ECDSA P-256 SHA-256, r ‖ s big-endian. The binding B is the body's report_data. Whether a platform is up
to date, Intel says apart: the endorsements are the seven parts of `tdx_collateral`, or none.

Three layers, in this order: `parse` reads, `authenticate` checks who says so, `appraise` compares with pins.
"""

import base64
import binascii
import hashlib
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from Crypto.Hash import SHA256
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
    ecdsa,
    provider_name,
    tsm,
    x509,
)
from attest.certificates import Files
from attest.document import Place
from attest.policy import differences
from attest.providers import AnyCode, Platform
from attest.providers.tdx_collateral import (
    MAX_ITEMS,
    REVOKED,
    SIGNATURE,
    STATUSES,
    Collateral,
    Facts,
    Pck,
    QeReport,
    in_files,
    is_signed,
)
from attest.x509 import Certificate

BEGINS = (b"\4\0\2\0\x81\0\0\0", b"\5\0\2\0\x81\0\0\0")  # of a quote: versions, key type, TEE
MAX_QUOTE = 16 * 1024  # bytes; genuine ones have 5 KB
MAX_SIGNED = 8192  # bytes of what follows the body

# SHA-256 of the certificate "Intel SGX Root CA", as Intel publishes it.
ROOTS = frozenset([bytes.fromhex("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3")])
PCK = "Intel SGX PCK Certificate"
AUTHORITIES = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")

_HEADER, _REPORT = 48, 384
_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_BODIES = {2: 584, 3: 648}  # bytes, by type
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
_LINE = 64  # characters of base64
_DEBUG, SEPT_VE_DISABLE, _MIGRATABLE = 0xFF, 1 << 28, 1 << 29  # bits of td_attributes

# The checks in their order, pins aside, and what holds where one passes. The first two end the rest.
CHECKS = {
    "malformed": "a TDX quote and its collateral, as specified",
    "alg": "ECDSA P-256",
    "chain": "the certificates lead to a pinned root",
    "not-yet-valid": "all certificates had begun",
    "expired": "no certificate had ended",
    "signature": "the quote is signed by its key, and what Intel says by Intel",
    "qe-binding": "Intel's quoting enclave reported that key",
    "collateral-required": "there is collateral",
    "collateral-expired": "the collateral is of the time judged by",
    "revoked": "nothing is in a revocation list",
    "fmspc": "the collateral is of this kind of processor",
    "module": "the TDX module is Intel's",
    "qe-identity": "the quoting enclave is Intel's",
    "tcb": "Intel knows the versions of its firmware, module and quoting enclave",
    "binding": "made for this handshake, by this end, with these claims",
    "claims": "as pinned",
    "debug": "off",
    "migratable": "no other host may have had it",
    "mrsignerseam": "zero: Intel's module",
    "seam_attributes": "zero: a module for production",
    "statuses": "acceptable",
    "advisories": "none that is not acceptable",
}
# What the collateral says counts for nothing unless these hold.
_GROUND = ("chain", "signature", "qe-binding", "collateral-required")
NEEDS = dict.fromkeys(
    ("collateral-expired", "revoked", "fmspc", "module", "qe-identity", "tcb", "statuses", "advisories"), _GROUND
) | {"statuses": (*_GROUND, "tcb"), "advisories": (*_GROUND, "tcb")}


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

    @property
    def attributes(self) -> int:
        return int.from_bytes(self.td_attributes, "little")

    @property
    def debug(self) -> bool:
        """Whether the host may read the TD's memory."""
        return bool(self.attributes & _DEBUG)

    @property
    def migratable(self) -> bool:
        """Whether another TD may take this one to other hosts."""
        return bool(self.attributes & _MIGRATABLE)


_SIZES = {
    "tee_tcb_svn": 16,
    "seam_attributes": 8,
    "td_attributes": 8,
    "xfam": 8,
    "report_data": 64,
    "tee_tcb_svn_2": 16,
}
_BODY = [(field.name, _SIZES.get(field.name, 48)) for field in fields(Statement)[:17]]
REGISTERS = ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3")


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


class _Reader:
    """Takes bytes from the front, little-endian. Raises EvidenceError where there are not as many."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise EvidenceError(f"TDX quote: wanted {count} bytes at {self.at}, got {len(self.data) - self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def rest(self, kind: int) -> "_Reader":
        """All that is left: u16 kind | u32 size | as many bytes, exactly."""
        got, size = self.number(2), self.number(4)
        if got != kind or size != len(self.data) - self.at:
            wanted = f"wanted {kind} of {len(self.data) - self.at}"
            raise EvidenceError(f"TDX quote: got certification data {got} of {size} bytes, {wanted}")
        return _Reader(self.take(size))


def parse(evidence: bytes) -> Quote:
    """Takes a quote apart. Raises EvidenceError: malformed or alg."""
    if len(evidence) > MAX_QUOTE:
        raise EvidenceError(f"TDX quote: got {len(evidence)} bytes, wanted at most {MAX_QUOTE}")
    reader = _Reader(evidence)
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
    values: dict[str, Any] = {name: reader.take(length) for name, length in (_BODY if body == 3 else _BODY[:-2])}
    signed = evidence[: reader.at]
    length = reader.number(4)
    if length > MAX_SIGNED:
        raise EvidenceError(f"TDX quote: got {length} bytes of signatures, wanted at most {MAX_SIGNED}")
    parts = _Reader(reader.take(length))
    signature, point = parts.take(SIGNATURE), parts.take(64)
    parts = parts.rest(6)
    report, report_signature = parts.take(_REPORT), parts.take(SIGNATURE)
    auth = parts.take(parts.number(2))
    pem = parts.rest(5)
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


def authenticate(
    evidence: bytes,
    endorsements: Sequence[bytes] = (),
    roots: Collection[bytes] | None = None,
    now: datetime | None = None,
) -> Statement:
    """What a quote says, if Intel has vouched for its platform's key, and the quoting enclave there signed it.

    Args:
        endorsements: the collateral's seven parts; or none, and the statement says nothing of the platform's status.
        roots: SHA-256 digests of the certificates that may be its root; None is Intel's.
        now: the verifier's time, with a zone; None is the clock's.

    Raises EvidenceError. Whether it is acceptable is another question: `appraise`. A quote has no time of its own:
    that it is fresh follows from its binding.
    """
    statement, wrong = examine(evidence, endorsements, ROOTS if roots is None else roots, now or datetime.now(UTC))
    if wrong:
        raise EvidenceError.of(wrong)
    return statement


def examine(
    evidence: bytes, endorsements: Sequence[bytes], roots: Collection[bytes], now: datetime
) -> tuple[Statement, list[Failure]]:
    """What a quote says, and all reasons not to believe it. Raises EvidenceError for malformed and alg."""
    collateral = Collateral.read(endorsements) if endorsements else None  # first: it is quicker to read
    quote = parse(evidence)
    statement, qe = replace(quote.statement, collateral=bool(endorsements)), QeReport.read(quote.qe_report)
    wrong: list[Failure] = []
    if quote.chain:
        wrong += x509.path(quote.chain, roots, now)
        names = [certificate.common_name for certificate in quote.chain[:2]]
        if quote.pck is None or names[0] != PCK or names[1] not in AUTHORITIES:
            wrong.append(("chain", f"chain: got certificates of {names!a:.200}, wanted a PCK certificate and its CA"))
    else:
        wrong.append(("chain", "chain: got more or fewer certificates than three, wanted leaf, authority and root"))
    numbers = int.from_bytes(quote.signature[:32], "big"), int.from_bytes(quote.signature[32:], "big")
    if not ecdsa.is_signed(quote.key, SHA256, quote.signed, *numbers):
        wrong.append(("signature", "signature: got one that is not by the quote's key: it was altered"))
    if not quote.chain or not is_signed(quote.chain[0], quote.qe_report, quote.qe_signature):
        wrong.append(("signature", "signature: got a QE report that the PCK certificate's key has not signed"))
    if qe.report_data != quote.bound + bytes(32):
        wrong.append(("qe-binding", "qe-binding: got another key than the quoting enclave reported: anybody's"))
    if collateral is not None and quote.chain and quote.pck is not None:
        facts = Facts(statement.tee_tcb_svn, statement.mrsignerseam, statement.seam_attributes, qe, quote.pck)
        verdict, more = collateral.examine(facts, quote.chain, roots, now)
        wrong += [failure for failure in more if failure not in wrong]  # both chains end at one root
        if verdict is not None:
            statement = replace(
                statement,
                status=verdict.status,
                advisories=verdict.advisories,
                tcb_evaluation=verdict.evaluation,
                crl_numbers=verdict.crl_numbers,
            )
    return statement, wrong


# The fields of a manifest's `evidence` object that are to be compared; or ANY_CODE.
Pinned = Mapping[str, Any] | AnyCode


def appraise(statement: Statement, pins: Pinned, allow_debug: bool = False, allow_no_collateral: bool = False) -> None:
    """Accepts an authentic statement, or raises PolicyError with all that differs. Arguments as of `failures`."""
    wrong = failures(statement, pins, allow_debug, allow_no_collateral)
    if wrong:
        raise PolicyError(*(sentence for _, sentence in wrong))


def failures(
    statement: Statement, pins: Pinned, allow_debug: bool = False, allow_no_collateral: bool = False
) -> list[Failure]:
    """What of an authentic statement is not acceptable, all at once.

    Args:
        pins: those that are to be compared, at least one; or ANY_CODE.
        allow_debug, allow_no_collateral: for tests; no manifest can say it.
    """
    given = {} if isinstance(pins, AnyCode) else pins
    wrong = _always(statement, allow_debug)
    if not statement.collateral and not allow_no_collateral:
        advice = "wanted the seven parts of Intel's: nothing says whether that platform is up to date"
        wrong.append(("collateral-required", f"collateral-required: got none, {advice}"))
    if statement.collateral or "statuses" in given or "advisories" in given:
        wrong += _status(statement, given)
    for name, pin in given.items():
        match name:
            case "statuses" | "advisories":
                continue  # judged above, by default too
            case "min_tcb_evaluation":
                wrong += _least(name, statement.tcb_evaluation, pin)
            case "min_crl_numbers":
                numbers = dict(zip(_LISTS, statement.crl_numbers or (None, None), strict=True))
                known = isinstance(pin, Mapping) and pin and set(pin) <= set(_LISTS)
                for which, least in pin.items() if known else [(f"{pin!a:.80}", None)]:
                    wrong += _least(name, numbers.get(which), least, f" ({which})")
            case _:
                wrong += _equal(statement, name, pin)
    if not isinstance(pins, AnyCode) and not set(pins) - {"provider", "covers"}:
        wrong.append(("pins", "pins: got none of a register, wanted some: nothing would be compared"))
    return wrong


def _always(statement: Statement, allow_debug: bool) -> list[Failure]:
    wrong = []
    if statement.debug and not allow_debug:
        got = statement.td_attributes.hex()
        wrong.append(("debug", f"debug: got on (td_attributes {got}), wanted off; the host may read its memory"))
    if statement.migratable:
        wrong.append(("migratable", "migratable: got on, wanted off; another TD may take this one to other hosts"))
    for name in ("mrsignerseam", "seam_attributes"):
        value = getattr(statement, name)
        if any(value):
            wrong.append((name, f"{name}: got {value.hex()}, wanted zeros: the TDX module is none of Intel's"))
    return wrong


def _status(statement: Statement, pins: Mapping[str, Any]) -> list[Failure]:
    """UpToDate is acceptable; another status if it is named, with all its advisories; Revoked never is."""
    status, named, excused = statement.status, pins.get("statuses", ()), pins.get("advisories", ())
    for name, value in (("statuses", named), ("advisories", excused)):
        if not isinstance(value, list | tuple):
            return [(name, f"{name}: got the pin {value!a:.80}, wanted a list")]
    if status == STATUSES[0]:
        return []
    acceptable = [STATUSES[0], *(each for each in named if each != REVOKED)]
    if status not in acceptable:
        wanted = " or ".join(map(str, acceptable))
        advice = "its firmware, TDX module or quoting enclave needs what Intel advises"
        return [("statuses", f"statuses: got {status or 'none'}, wanted {wanted:.200}; {advice}")]
    missing = [advisory for advisory in statement.advisories if advisory not in excused]
    if missing:
        return [("advisories", f"advisories: got {', '.join(missing)}, wanted none that is not named: read it first")]
    return []


def _least(name: str, got: int | None, least: object, which: str = "") -> list[Failure]:
    if got is not None and type(least) is int and got >= least:
        return []
    shown = "none" if got is None else got
    return [(name, f"{name}: got {shown}{which}, wanted at least {least!a:.80}; an old collateral may be replayed")]


def _equal(statement: Statement, name: str, wanted: object) -> list[Failure]:
    value = getattr(statement, name) if name in _HEX else None
    got = None if value is None else value.hex()
    if name == "provider":
        got = "tdx"
    if name == "covers":  # the operator's word, which no quote has
        got = next((each for each in COVERS if each == wanted), COVERS[0])
    if got is not None and got == wanted:
        return []
    meaning = _MEANING.get(name, "that")
    advice = f"{meaning} is not what was pinned: compare the pins with what was built and started"
    return [(name, f"{name}: got {got or 'none'}, wanted {wanted!s:.200}; {advice}")]


COVERS = ("image", "initdata")
_LISTS = ("root", "pck")  # of min_crl_numbers
_REQUIRED = {"mrtd": 48, "rtmr0": 48, "rtmr1": 48, "rtmr2": 48, "rtmr3": 48, "td_attributes": 8, "xfam": 8}
_OPTIONAL = {"mrseam": 48, "mrconfigid": 48, "mrowner": 48, "mrownerconfig": 48, "mrservicetd": 48, "ppid": 16}
_HEX = _REQUIRED | _OPTIONAL  # bytes of each
_MEANING = {
    "mrtd": "the firmware, or what else the machine was made of,",
    "rtmr0": "the firmware's configuration",
    "rtmr1": "the boot loader or kernel",
    "rtmr2": "the command line or the boot ramdisk",
    "rtmr3": "what the guest measured itself",
    "td_attributes": "how the machine is protected",
    "xfam": "the set of processor features",
    "mrseam": "the TDX module",
    "mrconfigid": "the configuration (initdata)",
    "ppid": "the processor",
}


@dataclass(frozen=True)
class TdxPins:
    """The pins of a stage's virtual machine, as in the manifest."""

    fields: Mapping[str, Any]

    @classmethod
    def read(cls, place: Place) -> "TdxPins":
        place.only("provider", "covers", *_HEX, "min_tcb_evaluation", "min_crl_numbers", "statuses", "advisories")
        covers = place.get("covers")
        if covers.value not in COVERS:
            covers.refuse('"image": the registers include our code; or "initdata": mrconfigid does')
        found: dict[str, Any] = {"provider": "tdx", "covers": covers.value}
        code = ("mrtd",) if covers.value == "image" else ("mrtd", "mrconfigid")  # others may be pinned to zero
        for name, size in _HEX.items():
            if name in code:
                found[name] = place.get(name).pin(size).hex()
            elif name in _REQUIRED or name in place.value:
                found[name] = place.get(name).bytes(size).hex()
        if int.from_bytes(bytes.fromhex(found["td_attributes"]), "little") & (_DEBUG | _MIGRATABLE):
            place.get("td_attributes").refuse("attributes without debug (bits 0 to 7) and migration (bit 29)")
        found["min_tcb_evaluation"] = place.get("min_tcb_evaluation").integer(1, 2**31)
        if "min_crl_numbers" in place.value:
            lists = place.get("min_crl_numbers")
            found["min_crl_numbers"] = {name: lists.get(name).integer(0, 2**63) for name in _LISTS}
            lists.only(*_LISTS)
        for name in ("statuses", "advisories"):
            if name in place.value:
                found[name] = [each.text(64) for each in place.get(name).items(1, MAX_ITEMS)]
        if set(found.get("statuses", ())) - set(STATUSES[:-1]):
            place.get("statuses").refuse(f"some of {', '.join(STATUSES[:-1])}")
        return cls(found)

    def to_json(self) -> dict[str, Any]:
        return dict(self.fields)

    @property
    def warnings(self) -> list[str]:
        """What to think about before these are pinned."""
        attributes = int.from_bytes(bytes.fromhex(self.fields["td_attributes"]), "little")
        found = []
        if not attributes & SEPT_VE_DISABLE:
            found.append("td_attributes: without SEPT_VE_DISABLE (bit 28) a page that the host took away raises an "
                         "exception, which a kernel may survive")  # fmt: skip
        zero = [name for name in ("rtmr1", "rtmr2") if not any(bytes.fromhex(self.fields[name]))]
        if zero:
            found.append(f"{' and '.join(zero)} zero: nobody measured a kernel or its command line there, so MRTD must "
                         "cover them and our code")  # fmt: skip
        return found

    def verifier(self, claims: bytes, stage: int, clock: Callable[[], float]) -> "TdxVerifier":
        return TdxVerifier(self, claims, clock=clock)  # the stage's index is among the claims


def pinned(statement: Statement) -> TdxPins:
    """What a manifest would pin of this, which has collateral, if its registers include our code."""
    registers = {name: getattr(statement, name).hex() for name in _REQUIRED}
    least = {"min_tcb_evaluation": statement.tcb_evaluation}
    return TdxPins({"provider": "tdx", "covers": "image"} | registers | least)


@dataclass(frozen=True)
class TdxVerifier:
    """Judges a quote: authentic, of a platform that Intel vouches for, made for this handshake, and as pinned."""

    pins: TdxPins
    claims: bytes  # exactly what the stage has to claim
    _: KW_ONLY
    roots: frozenset[bytes] = ROOTS
    clock: Callable[[], float] = time.time  # seconds since the epoch

    def verify(self, evidence: Evidence, binding: Binding) -> AttestationResult:
        """The result, once authenticated and accepted; see `attest.Verifier`. An error has all failures."""
        if evidence.provider != Provider.TDX:
            raise EvidenceError(f"provider: got {provider_name(evidence.provider)}, wanted tdx (4)", "provider")
        now = datetime.fromtimestamp(self.clock(), UTC)
        statement, wrong = examine(evidence.evidence, evidence.endorsements, self.roots, now)
        wrong += _unbound(statement, evidence, binding)
        differing = failures(statement, self.pins.to_json())
        refused = PolicyError(*(text for _, text in differing), *differences(evidence.claims, self.claims))
        if wrong:
            raise EvidenceError.of([*wrong, *refused.failures])
        if refused.failures:
            raise refused
        registers = tuple((name, getattr(statement, name)) for name in _HEX if getattr(statement, name) is not None)
        return AttestationResult(Provider.TDX, statement.mrtd, statement.debug, evidence.claims, None, None, registers)


def _unbound(statement: Statement, evidence: Evidence, binding: Binding) -> list[Failure]:
    """What of a quote is not of this handshake and end."""
    pairs = [
        ("provider", bytes([evidence.provider]), bytes([binding.provider])),
        ("claims", evidence.claims, binding.claims),
        ("report_data", statement.report_data, binding.digest),
    ]
    advice = "it was made for another handshake, role, static key or claims"
    return [
        ("binding", f"binding: got {name} {got.hex()}, wanted {wanted.hex()}; {advice}")
        for name, got, wanted in pairs
        if got != wanted
    ]


@dataclass(frozen=True)
class TdxAttester:
    """Asks the guest's kernel for quotes, one for each handshake, and puts Intel's collateral beside them."""

    provider = Provider.TDX
    claims: bytes  # what the stage claims about itself; never a peer's choice
    ask: Callable[[bytes], tuple[bytes, bytes]]  # 64 bytes of report data: a quote, and nothing
    files: Files  # of the collateral: asked each time

    def attest(self, binding: Binding) -> Evidence:
        """Evidence for `binding`; ValueError if its provider or claims are not the attester's own.

        Raises AttestationError if the platform fails, its quote is of anything else, or collateral is missing.
        """
        if (binding.provider, binding.claims) != (self.provider, self.claims):
            raise ValueError("binding: its provider or claims are not this attester's own")
        data, _ = self.ask(binding.digest)
        evidence = Evidence(self.provider, self.claims, data, endorsements(parse(data), self.files()))
        wrong = _unbound(parse(data).statement, evidence, binding)
        if wrong:
            raise EvidenceError.of(wrong)
        return evidence


def endorsements(quote: Quote, files: Mapping[str, bytes]) -> tuple[bytes, ...]:
    """A quote's collateral, from files. Raises AttestationError if some is missing; it says where Intel has it."""
    if not quote.chain or quote.pck is None:
        raise AttestationError("TDX quote: got one without its certificates: install Intel's PCK certificates there")
    try:
        return in_files(files, quote.chain)
    except AttestationError as error:
        kind = "platform" if quote.chain[1].common_name == AUTHORITIES[0] else "processor"
        site = "https://api.trustedservices.intel.com"
        places = (
            f"{site}/tdx/certification/v4/tcb?fmspc={quote.pck.fmspc.hex()}, {site}/tdx/certification/v4/qe/identity"
        )
        lists = f"{site}/sgx/certification/v4/pckcrl?ca={kind}&encoding=der"
        root = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
        raise AttestationError(f"{error}; {places}, {lists} and {root} have it") from None


def _attester(key: bytes, claims: bytes, files: Files | None) -> TdxAttester:
    if not os.path.isdir(tsm.FOLDER):
        raise AttestationError(f"{tsm.FOLDER} is missing, wanted what root makes once: is this a TDX guest?")
    if files is None:
        raise AttestationError("got no collateral, wanted Intel's: give --endorsements")
    return TdxAttester(claims, partial(tsm.report, provider="tdx_guest", folder=tsm.FOLDER), files)


def _describe(evidence: Evidence) -> dict[str, Any]:
    statement = parse(evidence.evidence).statement
    named = {name: getattr(statement, name) for name in ("report_data", "fmspc", "ppid")}
    registers = {name: getattr(statement, name) for name in _HEX if name != "ppid"}
    return {
        "debug": statement.debug,
        "collateral": bool(evidence.endorsements),
        "registers": {name: value.hex() for name, value in registers.items() if value is not None},
    } | {name: value for name, value in named.items() if value is not None}


PLATFORM = Platform(Provider.TDX, TdxPins.read, TdxPins.verifier, _describe, CHECKS, _attester, NEEDS)
