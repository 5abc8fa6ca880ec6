"""The certificates behind a report: AMD's word on the key that signed it, and so on the chip and its firmware.

    SEV-VCEK ◄── SEV-Milan ◄── ARK-Milan             a chip's key; or Genoa, Turin
    SEV-VLEK ◄── SEV-VLEK-Milan ◄── ARK-Milan        a cloud's key, on any of its chips

Each such key (VEK) is for one version of the firmware, the reported TCB, which is in extensions of its certificate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from Crypto.Hash import SHA384
from Crypto.PublicKey.ECC import EccKey

from attest import AttestationError, EvidenceError, Failure, certificates, ecdsa, x509
from attest.der import IA5, OCTETS, only, only_integer
from attest.providers.snp_report import Report
from attest.x509 import Certificate, Crl

MASKED = bytes(64)  # the chip_id of a platform that does not say which it is

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


@dataclass(frozen=True)
class Vek:
    """What AMD says about the key of a report, in extensions of its certificate."""

    product: str
    versions: dict[str, int]  # the TCB that it is of
    chip: bytes | None
    csp_id: str | None

    @classmethod
    def read(cls, certificate: Certificate) -> "Vek":
        extensions = {oid: value for oid, (_, value) in certificate.extensions.items()}
        text, csp = extensions.get(_OID + "2"), extensions.get(_OID + "5")
        product = "" if text is None else only(text, IA5).decode("ascii", "replace").partition("-")[0]
        found = {name: _OID + number for name, number in _VERSIONS.items() if _OID + number in extensions}
        versions = {name: only_integer(extensions[oid]) for name, oid in found.items()}
        chip = extensions.get(_OID + "4")
        if chip is not None and len(chip) not in _CHIP.values():  # newer ones wrap it
            chip = only(chip, OCTETS)
        return cls(product, versions, chip, None if csp is None else only(csp, IA5).decode("ascii", "replace"))

    def tcb(self) -> bytes | None:
        """As its report has it; None if a number is missing, or too large."""
        numbers = [self.versions.get(name, -1) if name else 0 for name in TCB.get(self.product, ("none",))]
        return bytes(numbers) if all(0 <= number < 256 for number in numbers) else None


def read(endorsements: Sequence[bytes]) -> tuple[list[Certificate], bytes | None]:
    """The chain, leaf first, and the revocation list, still encoded. Raises EvidenceError."""
    if not 3 <= len(endorsements) <= 4:
        wanted = "wanted VEK, ASK or ASVK, ARK and perhaps a revocation list"
        raise EvidenceError(f"SNP endorsements: got {len(endorsements)}, {wanted}")
    lists = [item for item in endorsements[1:] if certificates.is_list(item)]
    chain = [Certificate.read(item) for item in endorsements if item not in lists]
    if len(chain) != 3 or len(lists) != len(endorsements) - 3:
        raise EvidenceError("SNP endorsements: got another number of certificates than three, or of lists than one")
    vek, *above = chain
    above.sort(key=lambda certificate: certificate.issuer == certificate.subject)  # the root is its own issuer
    return [vek, *above], lists[0] if lists else None


def revoked(listed: bytes, chain: Sequence[Certificate], now: datetime) -> tuple[Crl | None, list[Failure]]:
    """A list, and what it and the chain have against each other. The root is one to believe.

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
    return crl, wrong


def is_by(report: Report, vek: Certificate) -> bool:
    key = vek.key
    if not isinstance(key, EccKey) or key.curve != "NIST P-384":
        return False
    return ecdsa.is_signed(key, SHA384, report.signed, *report.signature)


def misnamed(report: Report, chain: Sequence[Certificate], vek: Vek) -> list[Failure]:
    """Whether the chain is one of the key that the report names. Whole names: parts prove nothing."""
    got = [certificate.common_name[:80] for certificate in chain]
    middle = {"vcek": f"SEV-{vek.product}", "vlek": f"SEV-VLEK-{vek.product}"}[report.signer]
    wanted = [f"SEV-{report.signer.upper()}", middle, f"ARK-{vek.product}"]
    return [] if got == wanted else [("chain", f"chain: got the names {got!a}, wanted {wanted!a}")]


def unfit(report: Report, chain: Sequence[Certificate], vek: Vek) -> list[Failure]:
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


def endorsements(report: Report, pool: Sequence[bytes]) -> tuple[bytes, ...]:
    """Those of `pool`, certificates and lists in DER, that lead from a report to its root.

    Raises AttestationError if one is missing; it says where AMD has it.
    """
    lists = {item: Crl.read(item) for item in pool if certificates.is_list(item)}
    found = [Certificate.read(item) for item in pool if item not in lists]
    chain = [certificate for certificate in found if is_by(report, certificate)][:1]
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
