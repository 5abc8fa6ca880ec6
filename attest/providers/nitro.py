"""AWS Nitro Enclaves: an attestation document says by which registers (PCRs) an enclave was measured.

    document = [protected, {}, payload, signature]                             a COSE_Sign1 (RFC 9052) in CBOR, untagged
    payload  = {module_id, digest: "SHA384", timestamp: ms, pcrs: {0..31: 48 bytes}, certificate, cabundle: [root, ...],
                public_key, user_data, nonce}                                  the last three may be null, or missing
    signed   = ["Signature1", protected, h'', payload]                         ECDSA P-384 SHA-384 by `certificate`

The binding B is its user_data, the handshake hash its nonce, the static key its public_key. The chain of certificates
lies in the document, so there are no endorsements; it ends at AWS's root, valid until 2049. AWS revokes nothing.

Three layers, in this order: `parse` reads, `authenticate` checks who says so and when, `appraise` compares with pins.
"""

import fcntl
import os
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from typing import Any

from Crypto.Hash import SHA384

from attest import (
    AttestationError,
    AttestationResult,
    Binding,
    Evidence,
    EvidenceError,
    Failure,
    Provider,
    cbor,
    ecdsa,
    nsm,
    x509,
)
from attest.certificates import Files
from attest.document import Place
from attest.policy import date
from attest.providers import AnyCode, Platform
from attest.providers.vendor import Bound, Pinned, VendorAttester, VendorVerifier, accept, believed
from attest.x509 import Certificate

MAX_DOCUMENT = 12 * 1024  # bytes; what the device gives at most. Genuine ones have 4.5 KB
MAX_AUTHORITIES = 5
MAX_CERTIFICATE = 1024  # bytes
MAX_AGE = 300  # seconds to either side of the verifier's time; freshness comes from the binding
REGISTERS, SIZE = 32, 48  # PCRs, and bytes of one
CODE = (0, 1, 2)  # what every manifest pins: all of an image, its kernel and boot, its application

# SHA-256 of the certificate "aws.nitro-enclaves", Root G1, as AWS publishes it. Its other partitions have other roots.
ROOTS = frozenset([bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b")])

_PROTECTED = bytes.fromhex("a1013822")  # {1: -35}: the algorithm is ES384
_FIELDS = {"module_id": str, "digest": str, "timestamp": int, "pcrs": dict, "certificate": bytes, "cabundle": list}
_BOUND = ("public_key", "user_data", "nonce")
_MEANING = {0: "the image", 1: "the kernel or boot", 2: "the application", 3: "the parent instance's role",
            4: "the parent instance", 8: "the image's signer"}  # fmt: skip

# The checks in their order, pins aside, and what holds where one passes. The first two end the rest.
CHECKS = {
    "malformed": "a Nitro document, as specified",
    "alg": "ES384",
    "chain": "the certificates lead to a pinned root",
    "not-yet-valid": "all certificates had begun",
    "expired": "no certificate had ended",
    "signature": "the document is signed by its certificate",
    "stale": f"made within {MAX_AGE} s of the time judged by",
    "binding": "made for this handshake, by this end, with these claims",
    "claims": "as pinned",
    "debug": "off",
}


@dataclass(frozen=True)
class Statement:
    """What a document says. That of `authenticate` is AWS's word; that of `parse` anybody's."""

    module_id: str
    timestamp: int  # ms since the epoch
    pcrs: dict[int, bytes]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None

    @property
    def debug(self) -> bool:
        """Whether the enclave's owner reads its console: its code registers are zero then."""
        return not any(any(self.pcrs.get(index, b"")) for index in CODE)

    @property
    def registers(self) -> dict[str, bytes]:
        """The PCRs by the names of their pins."""
        return {f"pcr{index}": value for index, value in sorted(self.pcrs.items())}

    def bound(self, binding: Binding) -> Bound:
        return [
            ("user_data", self.user_data, binding.digest),
            ("nonce", self.nonce, binding.handshake_hash),
            ("public_key", self.public_key, binding.static_key),
        ]

    def result(self, claims: bytes) -> AttestationResult:
        registers = tuple(self.registers.items())
        return AttestationResult(Provider.NITRO, self.pcrs[0], self.debug, claims, None, self.timestamp, registers)


@dataclass(frozen=True)
class Document:
    """A document taken apart, unverified."""

    statement: Statement
    signed: bytes
    signature: bytes  # r ‖ s
    chain: tuple[Certificate, ...]  # leaf first


def parse(evidence: bytes) -> Document:
    """Takes a document apart. Raises EvidenceError: malformed or alg."""
    if len(evidence) > MAX_DOCUMENT:
        raise EvidenceError(f"Nitro document: got {len(evidence)} bytes, wanted at most {MAX_DOCUMENT}")
    frame = cbor.read(evidence)
    if type(frame) is not list or [type(part) for part in frame] != [bytes, dict, bytes, bytes]:
        raise EvidenceError("Nitro document: got another value than [protected, {}, payload, signature]")
    protected, unprotected, payload, signature = frame
    if len(signature) != 96:
        raise EvidenceError(f"Nitro document: got a signature of {len(signature)} bytes, wanted 96")
    if protected != _PROTECTED or unprotected:
        wanted = f"wanted {_PROTECTED.hex()} (ES384) and none"
        raise EvidenceError(f"alg: got header {protected[:32].hex()} and {len(unprotected)} others, {wanted}", "alg")
    fields = cbor.read(payload)
    if type(fields) is not dict or set(fields) - set(_BOUND) != set(_FIELDS):
        raise EvidenceError(f"Nitro document: wanted the fields {', '.join((*_FIELDS, *_BOUND))} and no others")
    for name, kind in _FIELDS.items():
        if type(fields[name]) is not kind:
            raise EvidenceError(f"Nitro document: got {name} of type {type(fields[name]).__name__}")
    bound = [fields.get(name) for name in _BOUND]
    if not all(value is None or type(value) is bytes for value in bound):
        raise EvidenceError(f"Nitro document: got {', '.join(_BOUND)} that are neither bytes nor null")
    pcrs, timestamp, certificates = fields["pcrs"], fields["timestamp"], [fields["certificate"], *fields["cabundle"]]
    if fields["digest"] != "SHA384" or timestamp < 0:
        raise EvidenceError("Nitro document: got another digest than SHA384, or a time before 1970")
    for index, value in pcrs.items():
        if type(index) is not int or not 0 <= index < REGISTERS or type(value) is not bytes or len(value) != SIZE:
            raise EvidenceError(f"Nitro document: wanted PCRs 0 to {REGISTERS - 1} of {SIZE} bytes each")
    if not 2 <= len(certificates) <= 1 + MAX_AUTHORITIES:
        raise EvidenceError(f"Nitro document: got {len(certificates)} certificates, wanted 2 to {1 + MAX_AUTHORITIES}")
    if not all(type(item) is bytes and len(item) <= MAX_CERTIFICATE for item in certificates):
        raise EvidenceError(f"Nitro document: wanted certificates of at most {MAX_CERTIFICATE} bytes")
    leaf, *authorities = map(Certificate.read, certificates)
    return Document(
        Statement(fields["module_id"], timestamp, pcrs, *bound),
        cbor.head(4, 4) + cbor.head(3, 10) + b"Signature1" + b"".join(map(cbor.byte_string, (protected, b"", payload))),
        signature,
        (leaf, *reversed(authorities)),
    )


def authenticate(
    evidence: bytes,
    endorsements: Sequence[bytes] = (),
    roots: Collection[bytes] | None = None,
    now: datetime | None = None,
) -> Statement:
    """What a document says, if AWS has vouched for its key, that key signed it, and it was made now.

    Args:
        endorsements: none.
        roots: SHA-256 digests of the certificates that may be its root; None is AWS's.
        now: the verifier's time, with a zone; None is the clock's.

    Raises EvidenceError. Whether it is acceptable is another question: `appraise`.
    """
    return believed(examine(evidence, endorsements, roots, now))


def examine(
    evidence: bytes, endorsements: Sequence[bytes], roots: Collection[bytes] | None, now: datetime | None
) -> tuple[Statement, list[Failure]]:
    """What a document says, and all reasons not to believe it. Raises EvidenceError for malformed and alg."""
    roots, now = ROOTS if roots is None else roots, now or datetime.now(UTC)
    if endorsements:
        raise EvidenceError(f"Nitro document: got {len(endorsements)} endorsements beside it, wanted none")
    document = parse(evidence)
    wrong = x509.path(document.chain, roots, now)
    if not ecdsa.is_signed_raw(document.chain[0].key, "P-384", SHA384, document.signed, document.signature):
        wrong.append(("signature", "signature: got one that is not by the document's certificate: it was altered"))
    made = document.statement.timestamp
    if abs(now.timestamp() * 1000 - made) > MAX_AGE * 1000:
        advice = f"wanted within {MAX_AGE} s of {date(int(now.timestamp() * 1000))}; compare the clocks"
        wrong.append(("stale", f"stale: got a document of {date(made)}, {advice}"))
    return document.statement, wrong


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
        wrong.append(("debug", "debug: got on (PCR0 to PCR2 are zero), wanted off; run the enclave without debug mode"))
    if isinstance(pins, AnyCode):
        return wrong
    found = {name: value.hex() for name, value in statement.registers.items()}
    for name, wanted in pins.items():
        got = found.get(name, "none")
        if name in ("provider", "covers"):
            got = {"provider": "nitro", "covers": "image"}[name]
        if got != wanted or got == "none":
            meaning = _MEANING.get(int(name[3:]) if name in _NAMES else -1, "that")
            advice = f"{meaning} is not what was pinned: compare the pins with what was built and started"
            wrong.append((name, f"{name}: got {got}, wanted {wanted}; {advice}"))
    if not any(name in _NAMES for name in pins):
        wrong.append(("pins", "pins: got none of a register, wanted some: nothing would be compared"))
    return wrong


_NAMES = tuple(f"pcr{index}" for index in range(REGISTERS))


@dataclass(frozen=True)
class NitroPins:
    """The registers of a stage's image, 48 bytes each, by their number: 0, 1 and 2 at least."""

    pcrs: dict[int, bytes]

    @classmethod
    def read(cls, place: Place) -> "NitroPins":
        place.only("provider", "covers", *_NAMES)
        if place.get("covers").value != "image":
            place.get("covers").refuse('"image": the registers include our code')
        code = {index: place.get(_NAMES[index]).pin(SIZE) for index in CODE}
        others = [index for index in range(REGISTERS) if index not in CODE and _NAMES[index] in place.value]
        return cls(code | {index: place.get(_NAMES[index]).bytes(SIZE) for index in others})  # these start at zero

    def to_json(self) -> dict[str, Any]:
        registers = {_NAMES[index]: value.hex() for index, value in sorted(self.pcrs.items())}
        return {"provider": "nitro", "covers": "image"} | registers


def pinned(statement: Statement) -> NitroPins:
    """What a manifest would pin of this: all registers that say something."""
    return NitroPins({index: value for index, value in statement.pcrs.items() if any(value) or index in CODE})


@dataclass(frozen=True)
class NitroVerifier(VendorVerifier):
    provider = Provider.NITRO
    roots: Collection[bytes] = ROOTS
    examine = staticmethod(examine)
    failures = staticmethod(failures)


@dataclass(frozen=True)
class NitroAttester(VendorAttester):
    """Asks the enclave's device."""

    provider = Provider.NITRO
    _: KW_ONLY
    device: str = nsm.DEVICE
    ioctl: nsm.Ioctl = fcntl.ioctl

    def ask_for(self, binding: Binding) -> tuple[bytes, Statement, tuple[bytes, ...]]:
        document = nsm.document(
            binding.digest, binding.handshake_hash, binding.static_key, device=self.device, ioctl=self.ioctl
        )
        return document, parse(document).statement, ()


def _attester(key: bytes, claims: bytes, files: Files | None) -> NitroAttester:
    if not os.path.exists(nsm.DEVICE):
        raise AttestationError(f"{nsm.DEVICE} is missing, wanted the device of a Nitro enclave: this is none")
    return NitroAttester(claims)


def _describe(evidence: Evidence) -> dict[str, Any]:
    statement = parse(evidence.evidence).statement
    return {
        "made": date(statement.timestamp),
        "module": statement.module_id,
        "debug": statement.debug,
        "registers": statement.registers,
    } | {name: getattr(statement, name) for name in _BOUND if getattr(statement, name) is not None}


PLATFORM = Platform(Provider.NITRO, NitroPins.read, NitroVerifier.of_stage, _describe, CHECKS, _attester)
