"""The layout of AMD's attestation report: 1184 bytes, little-endian, of which the first 672 are signed."""

from dataclasses import dataclass
from typing import Any

from attest import Binding, EvidenceError
from attest.providers.vendor import Bound, Reader

SIZE = 1184  # bytes of a report
SIGNED = 0x2A0  # bytes of it that are signed
SIGNERS = {0: "vcek", 1: "vlek"}
SMT, MUST_BE_ONE, MIGRATE, DEBUG = 16, 17, 18, 19  # bits of the policy


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

    def bound(self, binding: Binding) -> Bound:
        return [("report_data", self.report_data, binding.digest)]


def parse(evidence: bytes) -> Report:
    """The fields of a report. Raises EvidenceError, malformed or alg."""
    if len(evidence) != SIZE:
        raise EvidenceError(f"SNP report: got {len(evidence)} bytes, wanted {SIZE}")
    at = Reader("SNP report", evidence)
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
    at.zeros(0x1A0 - at.at)
    found |= {"chip_id": at.take(64), "committed_tcb": at.take(8), "versions": at.take(8), "launch_tcb": at.take(8)}
    found["mitigations"] = at.take(16)
    if version < 5 and any(found["mitigations"]):
        raise EvidenceError(f"SNP report: got mitigations in version {version}, wanted zeros")
    at.zeros(SIGNED - at.at)
    numbers = []
    for _ in range(2):
        numbers.append(at.number(48))
        at.zeros(24)  # cutting them would let one signature have two encodings
    at.zeros(SIZE - at.at)
    return Report(**found, signed=evidence[:SIGNED], signature=(numbers[0], numbers[1]))
