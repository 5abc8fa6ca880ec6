"""Intel TDX: a quote says which trust domain (TD), a virtual machine, runs on which platform.

    Intel's root ──► PCK certificate ──► QE report, of SHA-256(key ‖ auth) ──► key ──► the body of `tdx_quote`

Signatures are ECDSA P-256 SHA-256, r ‖ s big-endian. The binding B is the body's report_data. Whether a platform is up
to date, Intel says apart: the endorsements are the seven parts of `tdx_collateral`, or none.

Three layers, in this order: `parse` reads, `authenticate` checks who says so, `appraise` compares with pins.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from Crypto.Hash import SHA256

from attest import AttestationError, Binding, Evidence, Failure, Provider, ecdsa, tsm, x509
from attest.certificates import Files
from attest.document import Place
from attest.providers import AnyCode, Platform
from attest.providers.tdx_collateral import (
    MAX_ITEMS,
    REVOKED,
    STATUSES,
    Collateral,
    Facts,
    QeReport,
    in_files,
    is_signed,
)  # fmt: skip
from attest.providers.tdx_quote import (
    BEGINS,
    DEBUG,
    HEX,
    MAX_QUOTE,
    MIGRATABLE,
    REQUIRED,
    Quote,
    Statement,
    parse,
)  # fmt: skip
from attest.providers.vendor import FieldPins, Pinned, VendorAttester, VendorVerifier, accept, believed

__all__ = [
    "BEGINS", "CHECKS", "MAX_QUOTE", "NEEDS", "PLATFORM", "ROOTS", "Statement", "TdxAttester", "TdxPins", "TdxVerifier",
    "appraise", "authenticate", "endorsements", "examine", "failures", "parse", "pinned",
]  # fmt: skip

# SHA-256 of the certificate "Intel SGX Root CA", as Intel publishes it.
ROOTS = frozenset([bytes.fromhex("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3")])
PCK = "Intel SGX PCK Certificate"
AUTHORITIES = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
SEPT_VE_DISABLE = 1 << 28  # of td_attributes

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
    return believed(examine(evidence, endorsements, roots, now))


def examine(
    evidence: bytes, endorsements: Sequence[bytes], roots: Collection[bytes] | None, now: datetime | None
) -> tuple[Statement, list[Failure]]:
    """What a quote says, and all reasons not to believe it. Raises EvidenceError for malformed and alg."""
    roots, now = ROOTS if roots is None else roots, now or datetime.now(UTC)
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
    if not ecdsa.is_signed_raw(quote.key, "P-256", SHA256, quote.signed, quote.signature):
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
            statement = replace(statement, **vars(verdict))
    return statement, wrong


def appraise(statement: Statement, pins: Pinned, allow_debug: bool = False, allow_no_collateral: bool = False) -> None:
    """Accepts an authentic statement, or raises PolicyError with all that differs. Arguments as of `failures`."""
    accept(failures(statement, pins, allow_debug, allow_no_collateral))


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
    value = getattr(statement, name) if name in HEX else None
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


class TdxPins(FieldPins):
    """The pins of a stage's virtual machine."""

    @classmethod
    def read(cls, place: Place) -> "TdxPins":
        place.only("provider", "covers", *HEX, "min_tcb_evaluation", "min_crl_numbers", "statuses", "advisories")
        covers = place.get("covers")
        if covers.value not in COVERS:
            covers.refuse('"image": the registers include our code; or "initdata": mrconfigid does')
        found: dict[str, Any] = {"provider": "tdx", "covers": covers.value}
        code = ("mrtd",) if covers.value == "image" else ("mrtd", "mrconfigid")  # others may be pinned to zero
        for name, size in HEX.items():
            if name in code:
                found[name] = place.get(name).pin(size).hex()
            elif name in REQUIRED or name in place.value:
                found[name] = place.get(name).bytes(size).hex()
        if int.from_bytes(bytes.fromhex(found["td_attributes"]), "little") & (DEBUG | MIGRATABLE):
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


def pinned(statement: Statement) -> TdxPins:
    """What a manifest would pin of this, which has collateral, if its registers include our code."""
    registers = {name: getattr(statement, name).hex() for name in REQUIRED}
    least = {"min_tcb_evaluation": statement.tcb_evaluation}
    return TdxPins({"provider": "tdx", "covers": "image"} | registers | least)


@dataclass(frozen=True)
class TdxVerifier(VendorVerifier):
    provider = Provider.TDX
    roots: Collection[bytes] = ROOTS
    examine = staticmethod(examine)
    failures = staticmethod(failures)


@dataclass(frozen=True)
class TdxAttester(VendorAttester):
    """Asks the guest's kernel for a quote, and puts Intel's collateral beside it."""

    provider = Provider.TDX
    ask: Callable[[bytes], tuple[bytes, bytes]]  # 64 bytes of report data: a quote, and nothing
    files: Files  # of the collateral: asked each time

    def ask_for(self, binding: Binding) -> tuple[bytes, Statement, tuple[bytes, ...]]:
        data, _ = self.ask(binding.digest)
        quote = parse(data)
        return data, quote.statement, endorsements(quote, self.files())


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
    registers = {name: getattr(statement, name) for name in HEX if name != "ppid"}
    return {
        "debug": statement.debug,
        "collateral": bool(evidence.endorsements),
        "registers": {name: value.hex() for name, value in registers.items() if value is not None},
    } | {name: value for name, value in named.items() if value is not None}


PLATFORM = Platform(Provider.TDX, TdxPins.read, TdxVerifier.of_stage, _describe, CHECKS, _attester, NEEDS)
