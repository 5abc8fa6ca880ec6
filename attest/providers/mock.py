"""Evidence without hardware: signed for real and verified for real, by keys that the operator makes.

It stands in for a TEE where there is none, and goes through the very path that a platform's evidence goes through. What
it proves: the holder of a stage's key said this about this handshake. It proves *nothing about hardware*: whoever has
the key can claim any measurement.

    root ──endorses──► stage's key ──signs──► measurement, debug, binding of this handshake

    evidence     226   "MGPTMOCK" | u8 1 | u64 ms since epoch | measurement[48] | B[64] | u8 flags (bit 0 = debug)
                       | stage's Ed25519 public key[32] | signature[64] over everything before it
    endorsement  117   "MGPTMOCKCA" | u8 1 | stage's key[32] | u16 stage index | u64 not after, ms since epoch
                       | root's signature[64] over everything before it                      (big-endian, RFC 8032)

The layout of bytes, the checking of signatures, and policy are three things: `parse_evidence` and `parse_endorsement`,
`authenticate`, and `attest.policy`.
"""

import hmac
import json
import secrets
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from Crypto.PublicKey.ECC import EccKey
from Crypto.Signature import eddsa

from attest import AttestationResult, Binding, Evidence, EvidenceError, Provider, file_fields, hex_field, provider_name
from attest.document import DocumentError, Place
from attest.measure import measure
from attest.policy import CLIENT_ID, MAX_MEASUREMENTS, MEASUREMENT_SIZE, Policy, date
from attest.providers import Platform

# Freshness comes from the handshake hash alone. The window only keeps a stage whose clock is wrong (or was set back, so
# that an expired key works again) from going unnoticed. Five minutes is what Kerberos allows between clocks (RFC 4120).
MAX_SKEW = 300  # seconds, to either side

_EVIDENCE = struct.Struct(">8sBQ48s64sB32s64s")
_EVIDENCE_MAGIC = b"MGPTMOCK"
_ENDORSEMENT = struct.Struct(">10sB32sHQ64s")
_ENDORSEMENT_MAGIC = b"MGPTMOCKCA"
_VERSION = 1
_DEBUG = 1
_SIGNATURE_SIZE = 64


@dataclass(frozen=True)
class MockEvidence:
    """The fields of mock evidence, as found: nothing of them is verified."""

    timestamp_ms: int
    measurement: bytes
    binding_digest: bytes
    debug: bool
    key: bytes
    signed: bytes
    signature: bytes


@dataclass(frozen=True)
class MockEndorsement:
    """The fields of a mock endorsement, as found: nothing of them is verified."""

    key: bytes
    stage: int
    not_after_ms: int
    signed: bytes
    signature: bytes


def parse_evidence(data: bytes) -> MockEvidence:
    """Take mock evidence apart.

    Raises:
        EvidenceError: length, magic, version or flags are not those of the format.
    """
    _require_length("mock evidence", data, _EVIDENCE)
    magic, version, timestamp_ms, measurement, digest, flags, key, signature = _EVIDENCE.unpack(data)
    _require_magic("mock evidence", magic, version, _EVIDENCE_MAGIC)
    if flags & ~_DEBUG:
        raise EvidenceError(f"mock evidence: got flags {flags:#04x}, wanted none but {_DEBUG:#04x} (debug)")
    return MockEvidence(timestamp_ms, measurement, digest, bool(flags), key, data[:-_SIGNATURE_SIZE], signature)


def parse_endorsement(data: bytes) -> MockEndorsement:
    """Take a mock endorsement apart.

    Raises:
        EvidenceError: length, magic, version or stage index are not those of the format.
    """
    _require_length("mock endorsement", data, _ENDORSEMENT)
    magic, version, key, stage, not_after_ms, signature = _ENDORSEMENT.unpack(data)
    _require_magic("mock endorsement", magic, version, _ENDORSEMENT_MAGIC)
    if stage == CLIENT_ID:
        raise EvidenceError(f"mock endorsement: got stage index {stage}, which is the id of clients")
    return MockEndorsement(key, stage, not_after_ms, data[:-_SIGNATURE_SIZE], signature)


def _require_length(what: str, data: bytes, layout: struct.Struct) -> None:
    if len(data) != layout.size:
        raise EvidenceError(f"{what}: got {len(data)} bytes, wanted exactly {layout.size}")


def _require_magic(what: str, magic: bytes, version: int, wanted: bytes) -> None:
    if magic != wanted or version != _VERSION:
        raise EvidenceError(
            f"{what}: got magic {magic.hex()} version {version}, wanted {wanted.hex()} ({wanted!r}) version {_VERSION}"
        )


def authenticate(evidence: Evidence, binding: Binding, root: bytes, now_ms: int) -> AttestationResult:
    """What `evidence` says, if `root` endorsed its key, that key signed it for `binding`, and it is of now.

    Whether it is acceptable is not asked here. All checks of well-formed evidence are made even after one has failed:
    then the time of a refusal does not tell a peer which it was, and an operator reads all of them at once.

    Args:
        evidence: as received.
        binding: what it has to be sealed to: the peer's role and static key, this handshake.
        root: the pinned Ed25519 public key, 32 bytes.
        now_ms: the verifier's time, milliseconds since the epoch.

    Raises:
        EvidenceError: it is malformed or not authentic.
    """
    if evidence.provider != Provider.MOCK:
        later = " (not supported yet)" if evidence.provider in (Provider.NITRO, Provider.SNP, Provider.TDX) else ""
        raise EvidenceError(f"provider: got {provider_name(evidence.provider)}{later}, wanted mock (1)")
    if len(evidence.endorsements) != 1:
        raise EvidenceError(f"mock evidence: got {len(evidence.endorsements)} endorsements, wanted 1")
    statement = parse_evidence(evidence.evidence)
    endorsement = parse_endorsement(evidence.endorsements[0])

    failures = []
    if not _is_signed(root, endorsement.signed, endorsement.signature):
        failures.append(f"endorsement: got a signature by another key, wanted the pinned root's, {root.hex()}")
    if endorsement.key != statement.key:
        failures.append(f"evidence: got key {statement.key.hex()}, wanted the endorsed one, {endorsement.key.hex()}")
    if not _is_signed(statement.key, statement.signed, statement.signature):
        failures.append(f"evidence: got a signature that is not by its own key, {statement.key.hex()}")
    if (evidence.provider, evidence.claims) != (binding.provider, binding.claims):
        failures.append("evidence: got another provider or other claims than are in the binding, wanted the same")
    if not hmac.compare_digest(statement.binding_digest, binding.digest):
        failures.append(
            f"evidence: got binding {statement.binding_digest.hex()}, wanted {binding.digest.hex()}; "
            "it was made for another handshake, role, static key or claims"
        )
    failures += _untimely(statement, endorsement, now_ms)
    if failures:
        raise EvidenceError("; ".join(failures))
    return AttestationResult(
        Provider.MOCK,
        statement.measurement,
        statement.debug,
        evidence.claims,
        endorsement.stage,
        statement.timestamp_ms,
    )


def _untimely(statement: MockEvidence, endorsement: MockEndorsement, now_ms: int) -> list[str]:
    failures = []
    age_ms = now_ms - statement.timestamp_ms
    if abs(age_ms) > MAX_SKEW * 1000:
        when = f"{age_ms / 1000:.0f} s ago" if age_ms > 0 else f"{-age_ms / 1000:.0f} s in the future"
        failures.append(f"evidence: made {when}, wanted within {MAX_SKEW} s of the verifier's time; compare the clocks")
    if now_ms > endorsement.not_after_ms:
        late = (now_ms - endorsement.not_after_ms) / 1000
        failures.append(
            f"endorsement: expired {late:.0f} s ago, wanted one that is valid; "
            "make a new key with `python -m attest keygen`"
        )
    return failures


def _public_key(data: bytes) -> EccKey:
    """An Ed25519 public key from 32 bytes.

    A point of small order is refused. With such a "key" (32 zero bytes are one), the signature 01 00* verifies for
    every message: pycryptodome, as RFC 8032 permits, accepts that, and so an all-zero pin would accept anybody.

    Raises:
        ValueError: it is not a point of the curve, or one of small order.
    """
    key = eddsa.import_public_key(data)
    if (key.pointQ * 8).is_point_at_infinity():
        raise ValueError("Ed25519 public key: got a point of small order, wanted a key that somebody made")
    return key


def _is_signed(public: bytes, message: bytes, signature: bytes) -> bool:
    try:
        eddsa.new(_public_key(public), "rfc8032").verify(message, signature)
    except ValueError:
        return False
    return True


def _sign(private: bytes, message: bytes) -> bytes:
    return eddsa.new(eddsa.import_private_key(private), "rfc8032").sign(message)


def _public(private: bytes) -> bytes:
    return bytes(eddsa.import_private_key(private).public_key().export_key(format="raw"))


@dataclass(frozen=True)
class MockRoot:
    """The operator's key, which endorses the stages' keys. Its public half is what manifests pin."""

    private: bytes = field(repr=False)  # bytes, because the repr of pycryptodome's key object prints the private seed

    @classmethod
    def generate(cls) -> "MockRoot":
        return cls(secrets.token_bytes(32))

    @property
    def public(self) -> bytes:
        """32 bytes, the Ed25519 public key."""
        return _public(self.private)

    def endorse(self, stage_public: bytes, stage: int, not_after_ms: int) -> bytes:
        """An endorsement: the key `stage_public` (32 bytes) may speak for `stage` until `not_after_ms`.

        Raises:
            ValueError: it is no public key, or a number is out of range.
        """
        _public_key(stage_public)
        if not 0 <= stage < CLIENT_ID:
            raise ValueError(f"stage index: got {stage}, wanted 0..{CLIENT_ID - 1}")
        if not 0 <= not_after_ms < 2**64:
            raise ValueError(f"not after: got {not_after_ms}, wanted milliseconds since the epoch")
        unsigned = _ENDORSEMENT.pack(_ENDORSEMENT_MAGIC, _VERSION, stage_public, stage, not_after_ms, b"")[
            :-_SIGNATURE_SIZE
        ]
        return unsigned + _sign(self.private, unsigned)

    def to_json(self) -> str:
        """The text of a root key's file: it holds the private key."""
        return _key_file("minigpt-mock-root", {"private": self.private.hex(), "public": self.public.hex()})

    @classmethod
    def from_json(cls, text: str | bytes) -> "MockRoot":
        """Read a root key's file; EvidenceError if it is not one."""
        fields = file_fields(text, "minigpt-mock-root", ("private", "public"))
        root = cls(hex_field("private key of a mock root", fields["private"], 32, 32))
        if hex_field("public key of a mock root", fields["public"], 32, 32) != root.public:
            raise EvidenceError("mock root file: its public key is not that of its private key; it is damaged")
        return root


@dataclass(frozen=True)
class MockKey:
    """A stage's key with its endorsement.

    Raises:
        EvidenceError: the endorsement is malformed, or for another key.
    """

    private: bytes = field(repr=False)
    endorsement: bytes

    def __post_init__(self) -> None:
        if parse_endorsement(self.endorsement).key != self.public:
            raise EvidenceError("mock key: its endorsement is for another key; make both anew")

    @classmethod
    def generate(cls, root: MockRoot, stage: int, not_after_ms: int) -> "MockKey":
        """A new key for `stage`, endorsed by `root`; ValueError as in `MockRoot.endorse`."""
        private = secrets.token_bytes(32)
        return cls(private, root.endorse(_public(private), stage, not_after_ms))

    @property
    def public(self) -> bytes:
        """32 bytes, the Ed25519 public key."""
        return _public(self.private)

    @property
    def stage(self) -> int:
        """The index it is endorsed for."""
        return parse_endorsement(self.endorsement).stage

    def to_json(self) -> str:
        """The text of a stage key's file: it holds the private key."""
        return _key_file("minigpt-mock-key", {"private": self.private.hex(), "endorsement": self.endorsement.hex()})

    @classmethod
    def from_json(cls, text: str | bytes) -> "MockKey":
        """Read a stage key's file; EvidenceError if it is not one. Who endorsed it, verifiers find out."""
        fields = file_fields(text, "minigpt-mock-key", ("private", "endorsement"))
        private = hex_field("private key of a mock key", fields["private"], 32, 32)
        size = _ENDORSEMENT.size
        return cls(private, hex_field("endorsement of a mock key", fields["endorsement"], size, size))


def _key_file(kind: str, fields: dict[str, str]) -> str:
    return json.dumps({"format": kind, "version": 1, **fields}, indent=2) + "\n"


class MockAttester:
    """Makes mock evidence with a stage's key.

    The code is measured once, when the attester is made, as a platform measures what it starts.

    Args:
        key: the stage's own.
        claims: what the stage claims about itself; never a peer's choice.
        measurement: 48 bytes; by default of the code that lies on the disk.
        debug: set the debug flag, which verifiers refuse.
        clock: seconds since the epoch.
    """

    provider = Provider.MOCK

    def __init__(
        self,
        key: MockKey,
        claims: bytes,
        *,
        measurement: bytes | None = None,
        debug: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.claims = claims
        self._key = key
        self._measurement = measure() if measurement is None else measurement
        self._debug = debug
        self._clock = clock
        if len(self._measurement) != MEASUREMENT_SIZE:
            raise ValueError(f"measurement: got {len(self._measurement)} bytes, wanted {MEASUREMENT_SIZE}")

    def attest(self, binding: Binding) -> Evidence:
        """Evidence for `binding`; ValueError if its provider or claims are not the attester's own."""
        if (binding.provider, binding.claims) != (self.provider, self.claims):
            raise ValueError("binding: its provider or claims are not this attester's own")
        unsigned = _EVIDENCE.pack(
            _EVIDENCE_MAGIC,
            _VERSION,
            int(self._clock() * 1000),
            self._measurement,
            binding.digest,
            _DEBUG if self._debug else 0,
            self._key.public,
            b"",
        )[:-_SIGNATURE_SIZE]
        signed = unsigned + _sign(self._key.private, unsigned)
        return Evidence(self.provider, self.claims, signed, (self._key.endorsement,))


class MockVerifier:
    """Judges mock evidence: authentic under `root` at the time of `clock` (seconds since the epoch), then by `policy`.

    Raises:
        ValueError: `root` is no public key that could be pinned: not 32 bytes, not on the curve, or of small order.
    """

    def __init__(self, root: bytes, policy: Policy, *, clock: Callable[[], float] = time.time) -> None:
        _public_key(root)
        self._root = root
        self._policy = policy
        self._clock = clock

    def verify(self, evidence: Evidence, binding: Binding) -> AttestationResult:
        """The result, once authenticated and accepted; see `attest.Verifier`."""
        result = authenticate(evidence, binding, self._root, int(self._clock() * 1000))
        self._policy.check(result)
        return result


@dataclass(frozen=True)
class MockPins:
    """The pins of a mock stage.

    Args:
        root_key: the Ed25519 public key that endorses the stages' keys, 32 bytes.
        measurements: 48 bytes each; any of them is acceptable.
    """

    root_key: bytes
    measurements: frozenset[bytes]

    @classmethod
    def read(cls, place: Place) -> "MockPins":
        place.only("provider", "root_key", "measurements")
        measurements = [pin.bytes(MEASUREMENT_SIZE) for pin in place.get("measurements").items(MAX_MEASUREMENTS)]
        root = place.get("root_key")
        try:
            _public_key(root.bytes(32))
        except ValueError as error:
            raise DocumentError(f"{root.name}: {error}") from None
        return cls(root.bytes(32), frozenset(measurements))

    def to_json(self) -> dict[str, Any]:
        measurements = sorted(pin.hex() for pin in self.measurements)
        return {"provider": "mock", "root_key": self.root_key.hex(), "measurements": measurements}


def _verifier(pins: MockPins, claims: bytes, stage: int, clock: Callable[[], float]) -> MockVerifier:
    return MockVerifier(pins.root_key, Policy(Provider.MOCK, pins.measurements, claims, stage), clock=clock)


def _attester(key: bytes, claims: bytes) -> MockAttester:
    return MockAttester(MockKey.from_json(key), claims)


def _describe(evidence: Evidence) -> dict[str, Any]:
    statement = parse_evidence(evidence.evidence)
    return {
        "made": date(statement.timestamp_ms),
        "measurement": statement.measurement.hex(),
        "debug": statement.debug,
        "key": statement.key.hex(),
        "endorsed": [
            {"key": endorsement.key.hex(), "stage": endorsement.stage, "until": date(endorsement.not_after_ms)}
            for endorsement in map(parse_endorsement, evidence.endorsements)
        ],
    }


PLATFORM = Platform(Provider.MOCK, MockPins.read, _verifier, _attester, _describe, simulated=True)
