"""AMD SEV-SNP: an attestation report says which image a guest was started with, and on which platform.

    AMD's root (ARK) ──► ASK or ASVK ──► VEK ──► report          the certificates: `snp_chain`; the report: `snp_report`

The binding B is its report_data. Endorsements are the VEK and, in any order, ASK (or ASVK), ARK and perhaps the ARK's
revocation list, each in DER. A report has no date: it is as fresh as its binding.

Three layers, in this order: `parse` reads, `authenticate` checks who says so, `appraise` compares with pins.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from datetime import UTC, datetime
from functools import partial
from typing import Any

from attest import (
    AttestationError,
    AttestationResult,
    Binding,
    Evidence,
    EvidenceError,
    Failure,
    Provider,
    certificates,
    sev_guest,
    tsm,
    x509,
)
from attest.certificates import Files
from attest.document import Place
from attest.providers import AnyCode, Platform
from attest.providers.snp_chain import TCB, Vek, endorsements, is_by, misnamed, read, revoked, unfit
from attest.providers.snp_report import DEBUG, MIGRATE, MUST_BE_ONE, SIGNED, SIZE, Report, parse
from attest.providers.vendor import FieldPins, Pinned, VendorAttester, VendorVerifier, accept, believed

__all__ = [
    "CHECKS", "PLATFORM", "ROOTS", "SIGNED", "SIZE", "SnpAttester", "SnpPins", "SnpVerifier", "Statement", "appraise",
    "authenticate", "endorsements", "examine", "failures", "parse", "pinned",
]  # fmt: skip

MAX_LISTED = 64  # measurements or chips in one manifest entry
DIGESTS = ("host_data", "id_key_digest", "author_key_digest")

# SHA-256 of the certificates ARK-Milan, ARK-Genoa, ARK-Turin, as AMD's key server gives them.
ROOTS = frozenset(bytes.fromhex(digest) for digest in (
    "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
    "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
))  # fmt: skip

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
class Statement(Report):
    """What a report says, on AMD's word, with what its endorsements say."""

    product: str
    csp_id: str | None  # the cloud whose VLEK it is
    crl_number: int | None  # of the revocation list; None if there is none
    valid_until: datetime  # when the first of its endorsements ends

    def tcb(self, encoded: bytes) -> dict[str, int]:
        """One of its TCBs as numbers, by their names."""
        return {name: number for name, number in zip(TCB[self.product], encoded, strict=True) if name}

    def result(self, claims: bytes) -> AttestationResult:
        digests = ((name, getattr(self, name)) for name in DIGESTS)
        registers = (("measurements", self.measurement), *digests)  # by the names of their pins
        return AttestationResult(
            Provider.SNP, self.measurement, self.debug, claims, None, None, registers, self.valid_until
        )


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
    return believed(examine(evidence, endorsements, roots, now))


def examine(
    evidence: bytes, endorsements: Sequence[bytes], roots: Collection[bytes] | None, now: datetime | None
) -> tuple[Statement, list[Failure]]:
    """What a report says, and all reasons not to believe it. Raises EvidenceError for malformed and alg."""
    roots, now = ROOTS if roots is None else roots, now or datetime.now(UTC)
    report = parse(evidence)
    chain, listed = read(endorsements)
    vek = Vek.read(chain[0])
    if vek.product not in TCB:
        raise EvidenceError(f"SNP endorsements: got a VEK of {vek.product[:40]!a}, wanted {', '.join(TCB)}")
    wrong = x509.path(chain, roots, now) + misnamed(report, chain, vek)
    if not is_by(report, chain[0]):
        wrong.append(("signature", "signature: got one that is not by the VEK: it was altered, or is of another chip"))
    wrong += unfit(report, chain, vek)
    number, ends = None, [certificate.not_after for certificate in chain]
    if listed is not None and hashlib.sha256(chain[2].der).digest() in roots:
        crl, more = revoked(listed, chain, now)
        wrong += more
        if crl is not None:
            number = crl.number
            ends.append(crl.next_update)
    found = {field.name: getattr(report, field.name) for field in fields(report)}
    return Statement(**found, product=vek.product, csp_id=vek.csp_id, crl_number=number, valid_until=min(ends)), wrong


def appraise(statement: Statement, pins: Pinned, allow_debug: bool = False) -> None:
    """Accepts an authentic statement, or raises PolicyError with all that differs. Arguments as of `failures`."""
    accept(failures(statement, pins, allow_debug))


def failures(statement: Statement, pins: Pinned, allow_debug: bool = False) -> list[Failure]:
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


class SnpPins(FieldPins):
    """What of a stage's report is pinned."""

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
    digests = {name: getattr(statement, name) for name in DIGESTS}
    found |= {name: value for name, value in numbers.items() if value}
    return SnpPins(found | {name: value.hex() for name, value in digests.items() if any(value)})


@dataclass(frozen=True)
class SnpVerifier(VendorVerifier):
    provider = Provider.SNP
    roots: Collection[bytes] = ROOTS
    examine = staticmethod(examine)
    failures = staticmethod(failures)


@dataclass(frozen=True)
class SnpAttester(VendorAttester):
    """Asks the guest's platform for a report, and finds its endorsements."""

    provider = Provider.SNP
    ask: Callable[[bytes], tuple[bytes, bytes]]  # 64 bytes of report data: a report, and a table of certificates
    _: KW_ONLY
    files: Files | None = None  # of more endorsements: asked each time

    def ask_for(self, binding: Binding) -> tuple[bytes, Report, tuple[bytes, ...]]:
        data, table = self.ask(binding.digest)
        report = parse(data)
        pool = certificates.in_table(table) + (certificates.in_files(self.files()) if self.files else [])
        return data, report, endorsements(report, pool)


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


PLATFORM = Platform(Provider.SNP, SnpPins.read, SnpVerifier.of_stage, _describe, CHECKS, _attester)
