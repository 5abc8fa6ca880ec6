"""Evidence without hardware: signed for real and verified for real, with keys that the operator makes.

It stands in for a TEE and takes the same path as a platform's evidence. It proves that the holder of a stage's key said
this about this handshake. It proves *nothing about hardware*: whoever has the key can claim any measurement.

    root ──endorses──► stage's key ──signs──► measurement, debug, binding of this handshake

    evidence     226   "MGPTMOCK" | u8 1 | u64 ms since epoch | measurement[48] | B[64] | u8 flags (bit 0 = debug)
                       | stage's Ed25519 public key[32] | signature[64] over everything before it
    endorsement  117   "MGPTMOCKCA" | u8 1 | stage's key[32] | u16 stage index | u64 not after, ms since epoch
                       | root's signature[64] over everything before it                      (big-endian, RFC 8032)
"""

import hmac
import secrets
import struct
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from Crypto.PublicKey.ECC import EccKey
from Crypto.Signature import eddsa

from attest import AttestationResult, Binding, Evidence, EvidenceError, Provider, dump_file, open_file, provider_name
from attest.certificates import Files
from attest.document import MOCK_KEY, MOCK_ROOT, DocumentError, Place
from attest.measure import own
from attest.policy import CLIENT_ID, MAX_MEASUREMENTS, MEASUREMENT_SIZE, Policy, date
from attest.providers import Platform

# Freshness comes from the handshake hash alone. This window only makes a wrong clock visible, or one that was set back
# so that an expired key works again. Kerberos allows five minutes between clocks (RFC 4120).
MAX_SKEW = 300  # seconds, to either side

_EVIDENCE = struct.Struct(">8sBQ48s64sB32s")  # both without their signature
_EVIDENCE_MAGIC = b"MGPTMOCK"
_ENDORSEMENT = struct.Struct(">10sB32sHQ")
_ENDORSEMENT_MAGIC = b"MGPTMOCKCA"
ENDORSEMENT_SIZE = _ENDORSEMENT.size + 64  # bytes
_VERSION = 1
_DEBUG = 1
_SIGNATURE_SIZE = 64


@dataclass(frozen=True)
class MockEvidence:
    """The fields of mock evidence, unverified."""

    timestamp_ms: int
    measurement: bytes
    binding_digest: bytes
    debug: bool
    key: bytes


@dataclass(frozen=True)
class MockEndorsement:
    """The fields of a mock endorsement, unverified."""

    key: bytes
    stage: int
    not_after_ms: int


def parse_evidence(data: bytes) -> MockEvidence:
    """The fields of mock evidence. Raises EvidenceError for a wrong length, magic, version or flags."""
    timestamp_ms, measurement, digest, flags, key = _unpack("evidence", _EVIDENCE, _EVIDENCE_MAGIC, data)
    if flags & ~_DEBUG:
        raise EvidenceError(f"mock evidence: got flags {flags:#04x}, wanted none but {_DEBUG:#04x} (debug)")
    return MockEvidence(timestamp_ms, measurement, digest, bool(flags), key)


def parse_endorsement(data: bytes) -> MockEndorsement:
    """The fields of a mock endorsement. Raises EvidenceError for a wrong length, magic, version or stage index."""
    key, stage, not_after_ms = _unpack("endorsement", _ENDORSEMENT, _ENDORSEMENT_MAGIC, data)
    if stage == CLIENT_ID:
        raise EvidenceError(f"mock endorsement: got stage index {stage}, which is the id of clients")
    return MockEndorsement(key, stage, not_after_ms)


def _unpack(what: str, layout: struct.Struct, wanted: bytes, data: bytes) -> list[Any]:
    size = layout.size + _SIGNATURE_SIZE
    if len(data) != size:
        raise EvidenceError(f"mock {what}: got {len(data)} bytes, wanted exactly {size}")
    magic, version, *fields = layout.unpack_from(data)
    if magic != wanted or version != _VERSION:
        got = f"got magic {magic.hex()} version {version}"
        raise EvidenceError(f"mock {what}: {got}, wanted {wanted.hex()} ({wanted!r}) version {_VERSION}")
    return fields


def authenticate(evidence: Evidence, binding: Binding, root: bytes, now_ms: int) -> AttestationResult:
    """What `evidence` says, if `root` endorsed its key, that key signed it for `binding`, and it was made now.

    Whether it is acceptable is another question. Every check of well-formed evidence runs even after one has failed: so
    the time of a refusal does not tell a peer which check it was, and an operator reads all failures at once.

    Args:
        binding: the peer's role and static key, and this handshake.
        root: the pinned Ed25519 public key, 32 bytes.
        now_ms: the verifier's time, milliseconds since the epoch.

    Raises EvidenceError if it is malformed or not authentic.
    """
    if evidence.provider != Provider.MOCK:
        raise EvidenceError(f"provider: got {provider_name(evidence.provider)}, wanted mock (1)")
    if len(evidence.endorsements) != 1:
        raise EvidenceError(f"mock evidence: got {len(evidence.endorsements)} endorsements, wanted 1")
    signed, endorsed = evidence.evidence, evidence.endorsements[0]
    statement, endorsement = parse_evidence(signed), parse_endorsement(endorsed)

    failures: list[str] = []
    if not _is_signed(root, endorsed[:-_SIGNATURE_SIZE], endorsed[-_SIGNATURE_SIZE:]):
        failures.append(f"endorsement: got a signature by another key, wanted the pinned root's, {root.hex()}")
    if endorsement.key != statement.key:
        failures.append(f"evidence: got key {statement.key.hex()}, wanted the endorsed one, {endorsement.key.hex()}")
    if not _is_signed(statement.key, signed[:-_SIGNATURE_SIZE], signed[-_SIGNATURE_SIZE:]):
        failures.append(f"evidence: got a signature that is not by its own key, {statement.key.hex()}")
    if (evidence.provider, evidence.claims) != (binding.provider, binding.claims):
        failures.append("evidence: got a provider or claims other than those of the binding, wanted the same")
    if not hmac.compare_digest(statement.binding_digest, binding.digest):
        failures.append(
            f"evidence: got binding {statement.binding_digest.hex()}, wanted {binding.digest.hex()}; "
            "it was made for another handshake, role, static key or claims"
        )
    age_ms = now_ms - statement.timestamp_ms
    if abs(age_ms) > MAX_SKEW * 1000:
        when = f"{age_ms / 1000:.0f} s ago" if age_ms > 0 else f"{-age_ms / 1000:.0f} s in the future"
        failures.append(f"evidence: made {when}, wanted within {MAX_SKEW} s of the verifier's time; compare the clocks")
    if now_ms > endorsement.not_after_ms:
        late = (now_ms - endorsement.not_after_ms) / 1000
        remedy = "make a new key with `python -m attest keygen`"
        failures.append(f"endorsement: expired {late:.0f} s ago, wanted one that is valid; {remedy}")
    if failures:
        raise EvidenceError.of([(sentence.partition(":")[0], sentence) for sentence in failures])
    made, stage = statement.timestamp_ms, endorsement.stage
    return AttestationResult(Provider.MOCK, statement.measurement, statement.debug, evidence.claims, stage, made)


def _public_key(data: bytes) -> EccKey:
    """An Ed25519 public key from 32 bytes.

    A point of small order is refused. With such a "key" (32 zero bytes are one), the signature 01 00* verifies for
    every message: pycryptodome accepts that, as RFC 8032 permits, and so an all-zero pin would accept anybody.
    Raises ValueError, also for what is not a point of the curve.
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


@dataclass(frozen=True)
class _Key:
    private: bytes = field(repr=False)  # bytes, because the repr of pycryptodome's key object prints the private seed

    @property
    def public(self) -> bytes:
        """32 bytes, the Ed25519 public key."""
        return bytes(eddsa.import_private_key(self.private).public_key().export_key(format="raw"))


@dataclass(frozen=True)
class MockRoot(_Key):
    """The operator's key, which endorses the stages' keys. Manifests pin its public half."""

    @classmethod
    def generate(cls) -> "MockRoot":
        return cls(secrets.token_bytes(32))

    def endorse(self, stage_public: bytes, stage: int, not_after_ms: int) -> bytes:
        """An endorsement: the key `stage_public` (32 bytes) may speak for `stage` until `not_after_ms`.

        Raises ValueError if it is not a public key, or a number is out of range.
        """
        _public_key(stage_public)
        if not 0 <= stage < CLIENT_ID:
            raise ValueError(f"stage index: got {stage}, wanted 0..{CLIENT_ID - 1}")
        if not 0 <= not_after_ms < 2**64:
            raise ValueError(f"not after: got {not_after_ms}, wanted milliseconds since the epoch")
        body = _ENDORSEMENT.pack(_ENDORSEMENT_MAGIC, _VERSION, stage_public, stage, not_after_ms)
        return body + _sign(self.private, body)

    def to_json(self) -> str:
        """The text of a root key's file. It holds the private key."""
        return dump_file(MOCK_ROOT, private=self.private, public=self.public)

    @classmethod
    def from_json(cls, text: str | bytes) -> "MockRoot":
        """Reads a root key's file; EvidenceError if it is not one."""
        private, public = _read_key_file(text, MOCK_ROOT, private=32, public=32)
        if public != cls(private).public:
            raise EvidenceError("mock root file: its public key does not belong to its private key; it is damaged")
        return cls(private)


@dataclass(frozen=True)
class MockKey(_Key):
    """A stage's key with its endorsement. EvidenceError if the endorsement is malformed, or for another key."""

    endorsement: bytes

    def __post_init__(self) -> None:
        if parse_endorsement(self.endorsement).key != self.public:
            raise EvidenceError("mock key: its endorsement is for another key; make both anew")

    @classmethod
    def generate(cls, root: MockRoot, stage: int, not_after_ms: int) -> "MockKey":
        """A new key for `stage`, endorsed by `root`; ValueError as in `MockRoot.endorse`."""
        key = NewKey.generate()
        return key.endorsed(root.endorse(key.public, stage, not_after_ms))

    @property
    def stage(self) -> int:
        """The index that it is endorsed for."""
        return parse_endorsement(self.endorsement).stage

    def to_json(self) -> str:
        """The text of a stage key's file. It holds the private key."""
        return dump_file(MOCK_KEY, private=self.private, endorsement=self.endorsement)

    @classmethod
    def from_json(cls, text: str | bytes) -> "MockKey":
        """Reads a stage key's file; EvidenceError if it is not one. Verifiers find out who endorsed it."""
        return cls(*_read_key_file(text, MOCK_KEY, private=32, endorsement=ENDORSEMENT_SIZE))


@dataclass(frozen=True)
class NewKey(_Key):
    """A stage's key that nobody has endorsed yet: its private half never leaves whoever made it."""

    @classmethod
    def generate(cls) -> "NewKey":
        return cls(secrets.token_bytes(32))

    def endorsed(self, endorsement: bytes) -> MockKey:
        """The same key with its endorsement; EvidenceError as in `MockKey`."""
        return MockKey(self.private, endorsement)


def _read_key_file(text: str | bytes, kind: str, **sizes: int) -> list[bytes]:
    try:
        file = open_file(text, kind, tuple(sizes))
        return [file.get(name).bytes(size) for name, size in sizes.items()]
    except DocumentError as error:
        raise EvidenceError(str(error)) from None


@dataclass(frozen=True)
class MockAttester:
    """Makes mock evidence with a stage's key.

    The code is measured once, when the attester is made, as a platform measures what it starts. ValueError if a
    measurement is given that is not 48 bytes.
    """

    provider = Provider.MOCK
    key: MockKey  # the stage's own
    claims: bytes  # what the stage claims about itself; never a peer's choice
    _: KW_ONLY
    measurement: bytes = field(default_factory=own)  # 48 bytes; by default of the code that runs
    debug: bool = False  # the flag, which verifiers refuse
    clock: Callable[[], float] = time.time  # seconds since the epoch

    def __post_init__(self) -> None:
        if len(self.measurement) != MEASUREMENT_SIZE:
            raise ValueError(f"measurement: got {len(self.measurement)} bytes, wanted {MEASUREMENT_SIZE}")

    def attest(self, binding: Binding) -> Evidence:
        """Evidence for `binding`; ValueError if its provider or claims are not the attester's own."""
        if (binding.provider, binding.claims) != (self.provider, self.claims):
            raise ValueError("binding: its provider or claims are not this attester's own")
        now_ms, flags = int(self.clock() * 1000), _DEBUG if self.debug else 0
        body = _EVIDENCE.pack(
            _EVIDENCE_MAGIC, _VERSION, now_ms, self.measurement, binding.digest, flags, self.key.public
        )
        return Evidence(self.provider, self.claims, body + _sign(self.key.private, body), (self.key.endorsement,))


@dataclass(frozen=True)
class MockVerifier:
    """Judges mock evidence: it must be authentic under `root` at the time of `clock`, and acceptable by `policy`."""

    root: bytes  # ValueError if it cannot be pinned: not 32 bytes, not on the curve, or of small order
    policy: Policy
    _: KW_ONLY
    clock: Callable[[], float] = time.time  # seconds since the epoch

    def __post_init__(self) -> None:
        _public_key(self.root)

    def verify(self, evidence: Evidence, binding: Binding) -> AttestationResult:
        """The result, once authenticated and accepted; see `attest.Verifier`."""
        result = authenticate(evidence, binding, self.root, int(self.clock() * 1000))
        self.policy.check(result)
        return result


@dataclass(frozen=True)
class MockPins:
    """The pins of a mock stage."""

    root_key: bytes  # the Ed25519 public key that endorses the stages' keys, 32 bytes
    measurements: frozenset[bytes]  # 48 bytes each; any of them is acceptable

    @classmethod
    def read(cls, place: Place) -> "MockPins":
        place.only("provider", "root_key", "measurements")
        root = place.get("root_key")
        root_key = root.pin(32)
        try:
            _public_key(root_key)
        except ValueError as error:
            raise DocumentError(f"{root.name}: {error}") from None
        measurements = place.get("measurements").items(1, MAX_MEASUREMENTS)
        return cls(root_key, frozenset(pin.pin(MEASUREMENT_SIZE) for pin in measurements))

    def to_json(self) -> dict[str, Any]:
        measurements = sorted(pin.hex() for pin in self.measurements)
        return {"provider": "mock", "root_key": self.root_key.hex(), "measurements": measurements}

    def verifier(self, claims: bytes, stage: int, clock: Callable[[], float]) -> MockVerifier:
        return MockVerifier(self.root_key, Policy(Provider.MOCK, self.measurements, claims, stage), clock=clock)


_CHECKS = {
    "malformed": "mock evidence, as specified",
    "endorsement": "the key is endorsed by the pinned root, and the endorsement has not ended",
    "evidence": f"signed by that key, for this handshake and end, within {MAX_SKEW} s of the time judged by",
    "measurement": "as pinned",
    "debug": "off",
    "key": "endorsed for this stage",
    "claims": "as pinned",
}


def _attester(key: bytes, claims: bytes, files: Files | None) -> MockAttester:
    return MockAttester(MockKey.from_json(key), claims)


def _describe(evidence: Evidence) -> dict[str, Any]:
    statement = parse_evidence(evidence.evidence)
    endorsed = [parse_endorsement(endorsement) for endorsement in evidence.endorsements]
    return {
        "made": date(statement.timestamp_ms),
        "measurement": statement.measurement.hex(),
        "debug": statement.debug,
        "key": statement.key.hex(),
        "endorsed": [{"key": e.key.hex(), "stage": e.stage, "until": date(e.not_after_ms)} for e in endorsed],
    }


PLATFORM = Platform(Provider.MOCK, MockPins.read, MockPins.verifier, _describe, _CHECKS, _attester, simulated=True)
