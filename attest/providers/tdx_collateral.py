"""Intel's collateral: which of its platforms are up to date, as Intel says it anew every month and anybody delivers it.

    TCB info, signature 64, QE identity, signature 64     JSON, signed over its exact bytes: ECDSA P-256 SHA-256, r ‖ s
    certificate of their signer, root CRL, PCK CRL        DER; "Intel SGX TCB Signing" is signed by the quote's root

A platform is a kind of processor (FMSPC) with the versions of its firmware (its PCK certificate's, not those that its
own report claims), a TDX module and a quoting enclave (QE). Each of the three has a status; the worst of them counts.
"""

import json
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from Crypto.Hash import SHA256

from attest import AttestationError, EvidenceError, Failure, certificates, ecdsa, x509
from attest.der import OCTETS, SEQUENCE, Reader, only, only_integer
from attest.document import DocumentError, Place, load
from attest.x509 import Certificate, Crl

PARTS = 7
MAX_TEXT = 64 * 1024  # bytes of a JSON text; genuine ones have at most 5 KB
MAX_ITEMS = 64  # levels, identities or advisories of a list; genuine ones have at most 20
SIGNATURE = 64  # bytes
COMPONENTS = 16  # versions of firmware
SIGNER = "Intel SGX TCB Signing"
STATUSES = (  # each is worse than those before it
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)
REVOKED = STATUSES[-1]

# What Intel's service answers, an object of two: a text, and the signature of its exact bytes.
_TEXTS = {"tcbInfo": "TCB info", "enclaveIdentity": "QE identity"}
_BEFORE_TEXT = re.compile(rf'\s*\{{\s*(?:"signature"\s*:\s*"[^"]*"\s*,\s*)?"(?:{"|".join(_TEXTS)})"\s*:\s*')

_EXTENSION = "1.2.840.113741.1.13.1"
_QE = struct.Struct("<16x4s28x16s64x32s96xHH60x64s")


@dataclass(frozen=True)
class Pck:
    """What a PCK certificate says of its platform."""

    ppid: bytes  # 16, which names the platform
    components: tuple[int, ...]
    pcesvn: int
    pceid: bytes  # 2
    fmspc: bytes  # 6

    @classmethod
    def read(cls, certificate: Certificate) -> "Pck | None":
        """None if it is no PCK certificate. Raises EvidenceError for an extension of another form."""
        if _EXTENSION not in certificate.extensions:
            return None
        values = _pairs(certificate.extensions[_EXTENSION][1], _EXTENSION)
        tcb = _pairs(_value(values, 2), f"{_EXTENSION}.2")
        components = tuple(_integer(tcb, i, 0xFF) for i in range(1, COMPONENTS + 1))
        ppid, pceid, fmspc = (_octets(values, number, size) for number, size in ((1, 16), (3, 2), (4, 6)))
        return cls(ppid, components, _integer(tcb, COMPONENTS + 1, 0xFFFF), pceid, fmspc)


def _pairs(data: bytes, above: str) -> dict[int, bytes]:
    """The values, encoded, of a sequence of (OID, value), by the last number of their OIDs."""
    entries, values = Reader(only(data)), {}
    while entries.more:
        pair = entries.inside(SEQUENCE)
        parent, _, last = pair.oid().rpartition(".")
        if parent != above or int(last) in values:
            raise EvidenceError(f"PCK certificate: got another OID than one below {above}, or one twice")
        values[int(last)] = pair.data[pair.at :]
    return values


def _value(values: dict[int, bytes], number: int) -> bytes:
    if number not in values:
        raise EvidenceError(f"PCK certificate: its value {number} is missing")
    return values[number]


def _integer(values: dict[int, bytes], number: int, most: int) -> int:
    value = only_integer(_value(values, number))
    if value > most:
        raise EvidenceError(f"PCK certificate: got {value} as its value {number}, wanted at most {most}")
    return value


def _octets(values: dict[int, bytes], number: int, size: int) -> bytes:
    value = only(_value(values, number), OCTETS)
    if len(value) != size:
        raise EvidenceError(f"PCK certificate: got {len(value)} bytes as its value {number}, wanted {size}")
    return value


@dataclass(frozen=True)
class QeReport:
    """What the quoting enclave's report says of it."""

    miscselect: bytes
    attributes: bytes
    mrsigner: bytes
    isvprodid: int
    isvsvn: int
    report_data: bytes

    @classmethod
    def read(cls, report: bytes) -> "QeReport":
        """Of its 384 bytes."""
        return cls(*_QE.unpack(report))


@dataclass(frozen=True)
class Facts:
    """What is to be judged, of an authentic quote."""

    tee_tcb_svn: bytes  # versions of the TDX module and firmware
    mrsignerseam: bytes
    seam_attributes: bytes
    qe: QeReport
    pck: Pck


@dataclass(frozen=True)
class Verdict:
    """What Intel says of a platform: fields of a `Statement`."""

    status: str  # one of STATUSES
    advisories: tuple[str, ...]  # Intel's, on what is not up to date
    tcb_evaluation: int  # the number of Intel's evaluation, which grows
    crl_numbers: tuple[int, int]  # of the root's list and the PCK authority's
    valid_until: datetime  # when the first part of the collateral, or certificate, ends


@dataclass(frozen=True)
class _Level:
    key: tuple[int, ...]  # the versions that it demands
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True)
class Collateral:
    """The seven parts taken apart, unverified: what is in texts and lists is read once their signatures are checked."""

    texts: tuple[bytes, bytes]  # TCB info, QE identity
    signatures: tuple[bytes, bytes]
    signer: Certificate
    lists: tuple[Crl, Crl]  # the root's, the PCK authority's

    @classmethod
    def read(cls, parts: Sequence[bytes]) -> "Collateral":
        """Raises EvidenceError."""
        if len(parts) != PARTS:
            raise EvidenceError(f"TDX collateral: got {len(parts)} parts, wanted {PARTS}")
        info, info_signature, identity, identity_signature, signer, root_list, pck_list = parts
        if len(info_signature) != SIGNATURE or len(identity_signature) != SIGNATURE:
            raise EvidenceError(f"TDX collateral: got a signature of another size than {SIGNATURE} bytes")
        if max(len(info), len(identity)) > MAX_TEXT:
            raise EvidenceError(f"TDX collateral: got a text of more than {MAX_TEXT} bytes")
        lists = Crl.read(root_list), Crl.read(pck_list)
        return cls((info, identity), (info_signature, identity_signature), Certificate.read(signer), lists)

    def examine(
        self, facts: Facts, chain: Sequence[Certificate], roots: Collection[bytes], now: datetime
    ) -> tuple[Verdict | None, list[Failure]]:
        """What Intel says of a platform, and all reasons not to believe it.

        Args:
            chain: of the quote: PCK certificate, authority, root.

        Raises EvidenceError for signed texts that are malformed.
        """
        pck, authority, root = chain
        wrong = x509.path((self.signer, root), roots, now)
        if self.signer.common_name != SIGNER:
            wrong.append(("chain", f"chain: got collateral of {self.signer.common_name[:80]!a}, wanted {SIGNER!a}"))
        root_list, pck_list = self.lists
        wrong += root_list.failures(root, now) + pck_list.failures(authority, now)
        for what, text, signature in zip(("TCB info", "QE identity"), self.texts, self.signatures, strict=True):
            if not is_signed(self.signer, text, signature):
                wrong.append(("signature", f"signature: got a {what} that its signer has not signed: it was altered"))
        if any(name in ("chain", "signature") for name, _ in wrong):
            return None, wrong
        for what, listed, revoked in (
            ("the PCK authority", authority, root_list),
            ("the collateral's signer", self.signer, root_list),
            ("the platform's PCK certificate", pck, pck_list),
        ):
            if listed.serial in revoked.serials:
                wrong.append(("revoked", f"revoked: got {what}, {listed.serial:x}, in a revocation list"))
        try:
            verdict, more = self._judge(facts, chain, now)
        except DocumentError as error:
            raise EvidenceError(str(error)) from None
        return verdict, wrong + more

    def _judge(self, facts: Facts, chain: Sequence[Certificate], now: datetime) -> tuple[Verdict | None, list[Failure]]:
        info = load("TCB info", self.texts[0], MAX_TEXT)
        identity = load("QE identity", self.texts[1], MAX_TEXT)
        wrong: list[Failure] = []
        last = [
            *(certificate.not_after for certificate in (self.signer, *chain)),
            *(one.next_update for one in self.lists),
        ]
        for text, name, version in ((info, "TDX", 3), (identity, "TD_QE", 2)):
            if text.get("id").value != name or text.get("version").integer(0, 2**31) != version:
                text.refuse(f'"id" {name} and "version" {version}')
            begins, ends = text.get("issueDate").time(), text.get("nextUpdate").time()
            last.append(ends)
            if not begins <= now <= ends:
                dates = f"{begins} to {ends}, wanted one of {now}"
                wrong.append(("collateral-expired", f"collateral-expired: got a {text.name} of {dates}"))
        for field, got in (("fmspc", facts.pck.fmspc), ("pceId", facts.pck.pceid)):
            wanted = _hex(info.get(field), len(got))
            if got != wanted:
                sentence = f"fmspc: got TCB info of the {field} {wanted.hex()}, wanted {got.hex()}: another processor's"
                wrong.append(("fmspc", sentence))
        levels = [_module(info, facts, wrong), _platform(info, facts), _quoting_enclave(identity, facts, wrong)]
        numbers = [text.get("tcbEvaluationDataNumber").integer(0, 2**31) for text in (info, identity)]
        root_number, pck_number = map(_number, self.lists)
        for what, level in zip(("TDX module", "platform", "quoting enclave"), levels, strict=True):
            if level is None:
                wrong.append(
                    ("tcb", f"tcb: got a {what} of no level that Intel knows, wanted one: update its firmware")
                )
        found = [level for level in levels if level is not None]
        if len(found) < len(levels):
            return None, wrong
        status = max((level.status for level in found), key=STATUSES.index)
        advisories = tuple(sorted({advisory for level in found for advisory in level.advisories}))
        return Verdict(status, advisories, min(numbers), (root_number, pck_number), min(last)), wrong


def in_answer(place: str, data: bytes) -> tuple[str, bytes, bytes] | None:
    """Of one of Intel's answers, however it is spaced and ordered: what its text is, its exact bytes, their signature.
    None of a file that is no JSON.

    Raises AttestationError, which names the file.
    """
    if data.lstrip()[:1] != b"{":
        return None
    try:
        answer = load(place, data, certificates.MAX_FILE)
        name = next((name for name in _TEXTS if name in answer.value), "tcbInfo")
        if type(answer.get(name).value) is not dict:
            answer.get(name).refuse("an object")
        signature = _hex(answer.get("signature"), SIGNATURE)
        answer.only(name, "signature")
        text = data.decode()
        begins = _BEFORE_TEXT.match(text)
        if begins is None:
            answer.refuse("names without escapes")
    except DocumentError as error:
        raise AttestationError(f"{error}: wanted an answer of Intel's service") from None
    _, end = json.JSONDecoder().raw_decode(text, begins.end())
    return _TEXTS[name], text[begins.end() : end].encode(), signature


def in_files(files: Mapping[str, bytes], chain: Sequence[Certificate]) -> tuple[bytes, ...]:
    """The seven parts, from files as Intel has them: both answers of its service, their signer's certificate, and the
    revocation lists of the root and of the PCK authority. Other certificates and lists are left out.

    Args:
        chain: of the quote: PCK certificate, authority, root.

    Raises AttestationError, also if one is missing or there twice. Nothing is verified: peers do that.
    """
    parts: dict[str, tuple[bytes, ...]] = {}

    def keep(what: str, *found: bytes) -> None:
        if parts.setdefault(what, found) != found:
            raise AttestationError(f"endorsements: got two of {what}, wanted one: keep the newer")

    _, authority, root = chain
    owners = {root.subject: "the root's revocation list", authority.subject: "the PCK authority's revocation list"}
    for place, data in files.items():
        answer = in_answer(place, data)
        if answer is not None:
            keep(*answer)
            continue
        try:
            for item in certificates.in_file(place, data):
                if certificates.is_list(item):
                    owner = owners.get(Crl.read(item).issuer)
                    if owner is not None:
                        keep(owner, item)
                elif Certificate.read(item).common_name == SIGNER:
                    keep("the signer's certificate", item)
        except EvidenceError as error:
            raise AttestationError(f"{place}: {error}: wanted Intel's collateral") from None
    wanted = (*_TEXTS.values(), "the signer's certificate", *owners.values())
    missing = [what for what in wanted if what not in parts]
    if missing:
        raise AttestationError(
            f"endorsements: {' and '.join(missing)} missing: wanted Intel's collateral of this platform"
        )
    return tuple(part for what in wanted for part in parts[what])


def is_signed(signer: Certificate, message: bytes, signature: bytes) -> bool:
    """Whether 64 bytes, r ‖ s, are a certificate's signature of `message`: ECDSA P-256 SHA-256."""
    return ecdsa.is_signed_raw(signer.key, "P-256", SHA256, message, signature)


def _module(info: Place, facts: Facts, wrong: list[Failure]) -> _Level | None:
    """The level of the TDX module. Modules of a number above 0 have identities of their own; 0 has no levels."""
    version, number = facts.tee_tcb_svn[:2]
    level: _Level | None = _Level((), STATUSES[0], ())
    identity: Place | None = info.get("tdxModule")
    if number:
        name = f"TDX_{number:02X}"
        identities = info.get("tdxModuleIdentities").items(0, MAX_ITEMS)
        identity = next((each for each in identities if each.get("id").text(64).upper() == name), None)
        level = None if identity is None else _first(identity, _isvsvn, lambda key: key[0] <= version)
    if identity is not None and not (
        facts.mrsignerseam == _hex(identity.get("mrsigner"), 48)
        and _masked(facts.seam_attributes, identity, "attributes")
    ):
        wrong.append(("module", "module: got another signer or other attributes of the TDX module than Intel's"))
    return level


def _platform(info: Place, facts: Facts) -> _Level | None:
    """The highest level whose versions the platform has."""
    pck, own = facts.pck, facts.tee_tcb_svn
    from_index = 2 if own[1] else 0  # the first two are then the module's, which its identity judges

    def fits(key: tuple[int, ...]) -> bool:
        sgx, pcesvn, tdx = key[:COMPONENTS], key[COMPONENTS], key[COMPONENTS + 1 :]
        return (
            all(wanted <= got for wanted, got in zip(sgx, pck.components, strict=True))
            and pcesvn <= pck.pcesvn
            and all(wanted <= got for wanted, got in zip(tdx[from_index:], own[from_index:], strict=True))
        )

    return _first(info, _versions, fits)


def _quoting_enclave(identity: Place, facts: Facts, wrong: list[Failure]) -> _Level | None:
    qe = facts.qe
    if not (
        qe.mrsigner == _hex(identity.get("mrsigner"), 32)
        and qe.isvprodid == identity.get("isvprodid").integer(0, 0xFFFF)
        and _masked(qe.attributes, identity, "attributes")
        and _masked(qe.miscselect, identity, "miscselect")
    ):
        wrong.append(("qe-identity", "qe-identity: got a quote by another enclave than Intel's quoting enclave"))
    return _first(identity, _isvsvn, lambda key: key[0] <= qe.isvsvn)


def _first(
    place: Place, read: Callable[[Place], tuple[int, ...]], fits: Callable[[tuple[int, ...]], bool]
) -> _Level | None:
    """Of the levels of a module, a platform or an enclave, the highest that fits."""
    levels = []
    for item in place.get("tcbLevels").items(0, MAX_ITEMS):
        status = item.get("tcbStatus")
        if status.value not in STATUSES:
            status.refuse(" or ".join(STATUSES))
        listed = item.get("advisoryIDs").items(0, MAX_ITEMS) if "advisoryIDs" in item.value else []
        advisories = tuple(advisory.text(64) for advisory in listed)
        if not "".join(advisories).isascii() or not "".join(advisories).isprintable():
            item.get("advisoryIDs").refuse("names such as INTEL-SA-00615")
        levels.append(_Level(read(item.get("tcb")), status.value, advisories))
    levels.sort(key=lambda level: level.key, reverse=True)
    return next((level for level in levels if fits(level.key)), None)


def _isvsvn(tcb: Place) -> tuple[int, ...]:
    return (tcb.get("isvsvn").integer(0, 0xFFFF),)


def _versions(tcb: Place) -> tuple[int, ...]:
    sgx, tdx = (
        tuple(each.get("svn").integer(0, 0xFF) for each in tcb.get(name).items(COMPONENTS, COMPONENTS))
        for name in ("sgxtcbcomponents", "tdxtcbcomponents")
    )
    return (*sgx, tcb.get("pcesvn").integer(0, 0xFFFF), *tdx)


def _masked(got: bytes, identity: Place, name: str) -> bool:
    wanted, mask = _hex(identity.get(name), len(got)), _hex(identity.get(f"{name}Mask"), len(got))
    return bytes(a & b for a, b in zip(got, mask, strict=True)) == wanted


def _hex(place: Place, size: int) -> bytes:
    """Hex digits of either case."""
    return Place(place.name, place.text(2 * size).lower()).bytes(size)


def _number(listed: Crl) -> int:
    number = listed.number
    if number is None:
        raise EvidenceError("revocation list: its number is missing")
    return number
