"""Evidence: what one end of a link says about itself, and what the other makes of it.

The terms are those of RFC 9334 (Remote ATtestation procedureS). An *attester* makes *evidence*: a signed statement of
which code runs (the *measurement*), sealed to one handshake by the *binding*, and accompanied by *claims*, which the
measured code makes about itself. *Endorsements* lead from the evidence's key to a root that the verifier has pinned.
A *verifier* authenticates the evidence and appraises it by a policy; only then is there a result to trust.

This module is the interface, and all of this package that a transport needs to know. Each file of `attest.providers`
implements it for one platform.
"""

import enum
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from attest.document import EVIDENCE, PRIVATE, DocumentError, Place, check_kind, load

MAX_CLAIMS = 4096  # bytes; a stage's claims are about 120
MAX_EVIDENCE = 64 * 1024  # bytes; a Nitro document is about 5 KB, a TDX quote about 8 KB
MAX_ENDORSEMENTS = 16  # a Nitro chain has 5 certificates
MAX_TOTAL = 256 * 1024  # bytes of claims, evidence and endorsements together; what a link buffers before it trusts
MAX_FILE = 2 * MAX_TOTAL + 4096  # characters of an evidence file: the bytes above in hex, and the fields around them

NO_CLAIMS = b"\x80"  # the empty map of msgpack: the only claims of an end that has no TEE

_BINDING_DOMAIN = b"minigpt attestation binding v1\0"
_FILE_FORMAT = "minigpt-evidence"
_FILE_FIELDS = ("provider", "role", "handshake_hash", "static_key", "claims", "evidence", "endorsements")


class Provider(enum.IntEnum):
    """Who made the evidence: the code on the wire."""

    NONE = 0
    MOCK = 1
    NITRO = 2
    SNP = 3
    TDX = 4


class AttestationError(Exception):
    """Root of the package's errors."""

    exit_code = 3  # what a command line ends with


Failure = tuple[str, str]  # of a check: its name in a word, such as "chain"; and a sentence: got, wanted, what to do


class EvidenceError(AttestationError):
    """The evidence is malformed or not authentic for this handshake: altered, or by another than it says.

    `failures` has every check that failed, `reason` the name of the first; the message is all sentences.
    """

    def __init__(self, text: str, reason: str = "malformed", failures: tuple[Failure, ...] = ()) -> None:
        super().__init__(text)
        self.reason = reason
        self.failures = failures or ((reason, text),)

    @classmethod
    def of(cls, failures: Sequence[Failure]) -> "EvidenceError":
        """The error of checks that failed, at least one, in the order in which they were made."""
        return cls("; ".join(sentence for _, sentence in failures), failures[0][0], tuple(failures))


class PolicyError(AttestationError):
    """The evidence is authentic, but not acceptable: compare the pins with what is running.

    `mismatches` has one sentence for each thing that differs, which begins with the thing's name and a colon; the
    message is all of them. `failures` has them with their names apart.
    """

    def __init__(self, *mismatches: str) -> None:
        super().__init__("; ".join(mismatches))
        self.mismatches = mismatches

    @property
    def failures(self) -> tuple[Failure, ...]:
        return tuple((sentence.partition(":")[0], sentence) for sentence in self.mismatches)


@dataclass(frozen=True)
class Evidence:
    """What an end sends about itself. Nothing in it is to be believed before a `Verifier` has accepted it.

    provider is the code as received, which need not be a known `Provider`. The parser keeps the limits of size.
    """

    provider: int
    claims: bytes
    evidence: bytes
    endorsements: tuple[bytes, ...]


@dataclass(frozen=True)
class Binding:
    """What evidence is bound to: one handshake, and one end of it.

    The final handshake hash makes the evidence fresh; role and own static key make it useless at the other end
    (reflection) and to anybody in between (relay). All fields are the *attester's*; ValueError if one has not the form
    given here.
    """

    role: str  # "I" for the initiator, "R" for the responder
    provider: int  # 0..255, as sent
    handshake_hash: bytes  # 32 bytes, the final h of the Noise handshake
    static_key: bytes  # 32 bytes, the attester's own static public key
    claims: bytes  # as sent

    def __post_init__(self) -> None:
        if self.role not in ("I", "R"):
            raise ValueError(f"role of a binding: got {self.role!r}, wanted 'I' or 'R'")
        if not 0 <= self.provider <= 255:
            raise ValueError(f"provider of a binding: got {self.provider}, wanted 0..255")
        for name, value in (("handshake hash", self.handshake_hash), ("static key", self.static_key)):
            if len(value) != 32:
                raise ValueError(f"{name} of a binding: got {len(value)} bytes, wanted 32")

    @property
    def digest(self) -> bytes:
        """The 64 bytes that evidence must carry: B of the link protocol."""
        return hashlib.sha512(
            _BINDING_DOMAIN
            + self.role.encode("ascii")
            + bytes([self.provider])
            + self.handshake_hash
            + self.static_key
            + hashlib.sha256(self.claims).digest()
        ).digest()


@dataclass(frozen=True)
class AttestationResult:
    """What a verifier has established. Made by verifiers only; holding one means that the evidence was accepted."""

    provider: Provider  # who vouches for it; NONE means nobody does
    measurement: bytes  # of the code; 48 bytes, of an image PCR0; empty for NONE
    debug: bool  # whether the platform lets its owner look inside
    claims: bytes  # what the measured code says about itself
    stage: int | None  # the index that the attester's key is endorsed for, None where the provider has no such thing
    timestamp_ms: int | None  # when the evidence was made, ms since the epoch by its own clock; None if it does not say
    registers: tuple[tuple[str, bytes], ...] = ()  # what else the platform has measured, by its name
    valid_until: datetime | None = None  # when the first of its endorsements ends; None if it has none


class Attester(Protocol):
    """One end's way of making evidence about itself."""

    @property
    def provider(self) -> Provider: ...

    @property
    def claims(self) -> bytes: ...

    def attest(self, binding: Binding) -> Evidence:
        """Evidence for `binding`, whose provider and claims must be the attester's own (else ValueError)."""


class Verifier(Protocol):
    """One end's way of judging the other's evidence."""

    def verify(self, evidence: Evidence, binding: Binding) -> AttestationResult:
        """What `evidence` establishes, given that it must be sealed to `binding` (the *peer's* role and static key).

        Raises EvidenceError or PolicyError.
        """


class Unattested:
    """The attester of a client without a TEE: it says that there is no evidence, and nothing else."""

    provider = Provider.NONE
    claims = NO_CLAIMS

    def attest(self, binding: Binding) -> Evidence:
        if (binding.provider, binding.claims) != (self.provider, self.claims):
            raise ValueError("an unattested end can only be bound with provider none and no claims")
        return Evidence(self.provider, self.claims, b"", ())


class AcceptUnattested:
    """The verifier that accepts an end without evidence and refuses every other. It learns nothing about the peer."""

    def verify(self, evidence: Evidence, binding: Binding) -> AttestationResult:
        if evidence.provider != Provider.NONE:
            raise EvidenceError(f"provider: got {provider_name(evidence.provider)}, wanted none (0)")
        if evidence.claims != NO_CLAIMS:
            got = f"{len(evidence.claims)} bytes"
            raise EvidenceError(f"claims without evidence: got {got}, wanted exactly the empty map (80)")
        if evidence.evidence or evidence.endorsements:
            raise EvidenceError(
                f"provider none: got {len(evidence.evidence)} bytes of evidence and "
                f"{len(evidence.endorsements)} endorsements, wanted none of either"
            )
        if (binding.provider, binding.claims) != (evidence.provider, evidence.claims):
            raise EvidenceError("binding: its provider or claims are not those of the evidence")
        return AttestationResult(Provider.NONE, b"", False, NO_CLAIMS, None, None)


def provider_name(code: int) -> str:
    """A provider's code for a message: "mock (1)", "unknown (9)"."""
    name = Provider(code).name.lower() if code in tuple(Provider) else "unknown"
    return f"{name} ({code})"


def dump_evidence(evidence: Evidence, binding: Binding) -> str:
    """The text of an evidence file. Raises ValueError if provider or claims differ: the file could not hold both."""
    if (evidence.provider, evidence.claims) != (binding.provider, binding.claims):
        raise ValueError("evidence and binding do not belong together: provider or claims differ")
    fields = vars(evidence) | vars(binding)
    return dump_file(_FILE_FORMAT, **{name: fields[name] for name in _FILE_FIELDS})


def load_evidence(text: str | bytes) -> tuple[Evidence, Binding]:
    """Reads an evidence file. That verifies nothing in it. Raises EvidenceError for anything but such a file."""
    try:
        file = open_file(text, _FILE_FORMAT, _FILE_FIELDS)
        provider, role = file.get("provider").integer(0, 255), file.get("role").text(1)
        if role not in ("I", "R"):
            file.get("role").refuse('"I" or "R"')
        claims = file.get("claims").bytes(0, MAX_CLAIMS)
        evidence = file.get("evidence").bytes(0, MAX_EVIDENCE)
        endorsements = tuple(item.bytes(0, MAX_TOTAL) for item in file.get("endorsements").items(0, MAX_ENDORSEMENTS))
        if len(claims) + len(evidence) + sum(map(len, endorsements)) > MAX_TOTAL:
            raise EvidenceError(
                f"evidence file: claims, evidence and endorsements are more than {MAX_TOTAL} bytes together"
            )
        handshake_hash, static_key = file.get("handshake_hash").bytes(32), file.get("static_key").bytes(32)
        binding = Binding(role, provider, handshake_hash, static_key, claims)
    except DocumentError as error:
        raise EvidenceError(str(error)) from None
    return Evidence(provider, claims, evidence, endorsements), binding


def dump_file(kind: str, **fields: Any) -> str:
    """The text of one of this package's JSON files, for `open_file`. Bytes are written in hex."""
    return json.dumps({"format": kind, "version": 1} | fields, indent=2, default=bytes.hex) + "\n"


def open_file(text: str | bytes, kind: str, names: tuple[str, ...]) -> Place:
    """One of this package's JSON files: "format" (`kind`), "version" 1, and exactly the fields `names`.

    It may hold a private key, so no error quotes its content. Raises DocumentError.
    """
    data = text.encode(errors="replace") if isinstance(text, str) else text
    origin = "the file that keygen wrote" if kind in PRIVATE else "as `minigpt status --save-evidence` writes it"
    wanted = PRIVATE.get(kind, EVIDENCE)
    check_kind("file", data, wanted, origin)
    file = load(f"{kind} file", data, MAX_FILE, quiet=True)
    if type(file.value) is dict and "format" not in file.value:
        raise DocumentError(f"{file.name}: format is missing, wanted {wanted}, {origin}")
    label = file.get("format").value
    if label != kind:
        file.get("format").refuse(f'"{kind}"')
    if file.get("version").value != 1 or type(file.get("version").value) is not int:
        file.get("version").refuse("1: a newer program may have written this file")
    for name in names:
        file.get(name)
    file.only("format", "version", *names)
    return file
