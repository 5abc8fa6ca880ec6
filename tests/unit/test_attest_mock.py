"""Mock evidence: its bytes against an independent construction, and everything that must be refused."""

import hashlib
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from hypothesis import given
from hypothesis import strategies as st

from attest import (
    NO_CLAIMS,
    AcceptUnattested,
    AttestationError,
    Binding,
    Evidence,
    EvidenceError,
    PolicyError,
    Provider,
    Unattested,
)
from attest.policy import Policy
from attest.providers.mock import MockAttester, MockKey, MockRoot, MockVerifier, authenticate

NOW = 1_800_000_000.0  # seconds since the epoch; every clock here is a constant
NOW_MS = 1_800_000_000_000
YEAR_MS = 365 * 86_400_000
CLAIMS = b"\x81\xa5stage\x00"  # {"stage": 0}
MEASUREMENT = bytes(range(1, 49))
ROOT = MockRoot(bytes([1]) * 32)
KEY = MockKey.generate(ROOT, 0, NOW_MS + YEAR_MS)
OTHER_ROOT = MockRoot(bytes([2]) * 32)
BINDING = Binding("R", Provider.MOCK, bytes([3]) * 32, bytes([4]) * 32, CLAIMS)
EVIDENCE = MockAttester(KEY, CLAIMS, measurement=MEASUREMENT, clock=lambda: NOW).attest(BINDING)
POLICY = Policy(Provider.MOCK, frozenset({MEASUREMENT}), CLAIMS, 0)
VERIFIER = MockVerifier(ROOT.public, POLICY, clock=lambda: NOW)


# An oracle that shares no code with attest: hashlib, struct by hand, and pycryptodome's Ed25519.


def oracle_binding(role: str, provider: int, handshake_hash: bytes, static_key: bytes, claims: bytes) -> bytes:
    head = b"minigpt attestation binding v1\0" + role.encode() + struct.pack("B", provider)
    return hashlib.sha512(head + handshake_hash + static_key + hashlib.sha256(claims).digest()).digest()


def oracle_key(seed: bytes) -> tuple[ECC.EccKey, bytes]:
    private = ECC.construct(curve="Ed25519", seed=seed)
    return private, private.public_key().export_key(format="raw")


def oracle_sign(private: ECC.EccKey, message: bytes) -> bytes:
    return message + eddsa.new(private, "rfc8032").sign(message)


def oracle_endorsement(root_seed: bytes, key: bytes, stage: int, not_after_ms: int) -> bytes:
    body = b"MGPTMOCKCA" + b"\x01" + key + struct.pack(">H", stage) + struct.pack(">Q", not_after_ms)
    return oracle_sign(oracle_key(root_seed)[0], body)


def oracle_evidence(seed: bytes, digest: bytes, *, flags: int = 0, time_ms: int = NOW_MS) -> bytes:
    private, public = oracle_key(seed)
    body = b"MGPTMOCK" + b"\x01" + struct.pack(">Q", time_ms) + MEASUREMENT + digest + struct.pack("B", flags) + public
    return oracle_sign(private, body)


def refused(evidence: Evidence, binding: Binding = BINDING, verifier: MockVerifier = VERIFIER) -> str:
    with pytest.raises(AttestationError) as caught:
        verifier.verify(evidence, binding)
    assert type(caught.value) in (EvidenceError, PolicyError)
    assert caught.value.exit_code == 3
    return f"{type(caught.value).__name__}: {caught.value}"


def test_genuine_evidence_is_accepted() -> None:
    result = VERIFIER.verify(EVIDENCE, BINDING)
    assert (result.provider, result.measurement, result.debug) == (Provider.MOCK, MEASUREMENT, False)
    assert (result.claims, result.stage, result.timestamp_ms) == (CLAIMS, 0, NOW_MS)


def test_binding_matches_the_known_answers(vectors) -> None:
    known = json.loads((vectors / "noise" / "link_v1_kat.json").read_text())
    handshake_hash, claims = bytes.fromhex(known["handshake_hash"]), bytes.fromhex(known["claims"])
    for role, provider, static, name in (
        ("R", 1, "resp_static_pub", "binding_R_mock"),
        ("I", 0, "init_static_pub", "binding_I_none"),
    ):
        fields = (role, provider, handshake_hash, bytes.fromhex(known[static]), claims)
        assert Binding(*fields).digest.hex() == oracle_binding(*fields).hex() == known[name]


def test_bytes_are_those_of_an_independent_construction() -> None:
    digest = oracle_binding("R", 1, BINDING.handshake_hash, BINDING.static_key, CLAIMS)
    assert EVIDENCE.evidence == oracle_evidence(KEY.private, digest)
    assert EVIDENCE.endorsements == (oracle_endorsement(ROOT.private, KEY.public, 0, NOW_MS + YEAR_MS),)
    assert (len(EVIDENCE.evidence), len(EVIDENCE.endorsements[0])) == (226, 117)
    assert (EVIDENCE.provider, EVIDENCE.claims) == (1, CLAIMS)


def test_evidence_made_independently_is_accepted() -> None:
    seed = bytes([9]) * 32
    public = oracle_key(seed)[1]
    digest = oracle_binding("I", 1, b"h" * 32, b"s" * 32, CLAIMS)
    endorsement = oracle_endorsement(ROOT.private, public, 0, NOW_MS)
    evidence = Evidence(1, CLAIMS, oracle_evidence(seed, digest), (endorsement,))
    assert VERIFIER.verify(evidence, Binding("I", 1, b"h" * 32, b"s" * 32, CLAIMS)).stage == 0


@pytest.mark.parametrize("part", ["evidence", "endorsement"])
def test_every_flipped_byte_is_refused(part: str) -> None:
    original = EVIDENCE.evidence if part == "evidence" else EVIDENCE.endorsements[0]
    for position in range(len(original)):
        flipped = bytearray(original)
        flipped[position] ^= 1 << position % 8
        changed = (
            replace(EVIDENCE, evidence=bytes(flipped))
            if part == "evidence"
            else replace(EVIDENCE, endorsements=(bytes(flipped),))
        )
        assert refused(changed).startswith("EvidenceError"), position


@pytest.mark.parametrize("part", ["evidence", "endorsement"])
def test_only_the_exact_length_is_read(part: str) -> None:
    original = EVIDENCE.evidence if part == "evidence" else EVIDENCE.endorsements[0]
    for data in (b"", original[:-1], original + b"\0", original + original):
        changed = replace(EVIDENCE, evidence=data) if part == "evidence" else replace(EVIDENCE, endorsements=(data,))
        assert f"wanted exactly {len(original)}" in refused(changed)


@pytest.mark.parametrize("count", [0, 2, 17])
def test_exactly_one_endorsement_is_wanted(count: int) -> None:
    assert "wanted 1" in refused(replace(EVIDENCE, endorsements=EVIDENCE.endorsements * count))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "I"),
        ("handshake_hash", bytes(32)),
        ("static_key", bytes(32)),
    ],
)
def test_evidence_of_another_session_or_end_is_refused(field: str, value: Any) -> None:
    assert "binding" in refused(EVIDENCE, replace(BINDING, **{field: value}))


def test_altered_claims_are_refused() -> None:
    other = b"\x81\xa5stage\x01"
    assert "EvidenceError" in refused(replace(EVIDENCE, claims=other), replace(BINDING, claims=other))
    assert "EvidenceError" in refused(replace(EVIDENCE, claims=other))
    assert "EvidenceError" in refused(EVIDENCE, replace(BINDING, claims=other))


@pytest.mark.parametrize("provider", [0, 2, 3, 4, 5, 255])
def test_another_provider_is_refused(provider: int) -> None:
    message = refused(replace(EVIDENCE, provider=provider), replace(BINDING, provider=provider))
    assert "wanted mock (1)" in message
    assert ("not supported yet" in message) == (provider in (3, 4))
    assert "EvidenceError" in refused(EVIDENCE, replace(BINDING, provider=provider))


def test_another_root_is_refused() -> None:
    verifier = MockVerifier(OTHER_ROOT.public, POLICY, clock=lambda: NOW)
    assert OTHER_ROOT.public.hex() in refused(EVIDENCE, verifier=verifier)


def test_a_key_that_endorses_itself_is_refused() -> None:
    endorsement = MockRoot(KEY.private).endorse(KEY.public, 0, NOW_MS + YEAR_MS)
    assert "the pinned root's" in refused(replace(EVIDENCE, endorsements=(endorsement,)))


def test_an_endorsement_of_another_key_is_refused() -> None:
    other = MockKey.generate(ROOT, 0, NOW_MS + YEAR_MS)
    assert "wanted the endorsed one" in refused(replace(EVIDENCE, endorsements=(other.endorsement,)))


def test_one_stage_forges_no_other() -> None:
    key = MockKey.generate(ROOT, 1, NOW_MS + YEAR_MS)
    evidence = MockAttester(key, CLAIMS, measurement=MEASUREMENT, clock=lambda: NOW).attest(BINDING)
    assert refused(evidence) == "PolicyError: key: got one endorsed for stage 1, wanted stage 0; check its key file"


def test_debug_is_refused_unless_allowed() -> None:
    evidence = MockAttester(KEY, CLAIMS, measurement=MEASUREMENT, debug=True, clock=lambda: NOW).attest(BINDING)
    assert refused(evidence).startswith("PolicyError: debug: got on, wanted off")
    lenient = MockVerifier(ROOT.public, replace(POLICY, allow_debug=True), clock=lambda: NOW)
    assert lenient.verify(evidence, BINDING).debug


def test_unknown_flags_are_refused_although_signed() -> None:
    for flags in (2, 3, 128):
        assert "flags" in refused(replace(EVIDENCE, evidence=oracle_evidence(KEY.private, BINDING.digest, flags=flags)))


def test_the_index_of_clients_is_never_a_stage() -> None:
    endorsement = oracle_endorsement(ROOT.private, KEY.public, 0xFFFF, NOW_MS + YEAR_MS)
    assert "65535" in refused(replace(EVIDENCE, endorsements=(endorsement,)))
    with pytest.raises(ValueError, match="stage index"):
        ROOT.endorse(KEY.public, 0xFFFF, NOW_MS)


@pytest.mark.parametrize(("seconds", "word"), [(301, "301 s ago"), (-301, "301 s in the future"), (10**6, "ago")])
def test_stale_evidence_and_evidence_from_the_future_are_refused(seconds: int, word: str) -> None:
    verifier = MockVerifier(ROOT.public, POLICY, clock=lambda: NOW + seconds)
    assert word in refused(EVIDENCE, verifier=verifier)


@pytest.mark.parametrize("seconds", [0, 300, -300])
def test_clocks_may_differ_by_five_minutes(seconds: int) -> None:
    MockVerifier(ROOT.public, POLICY, clock=lambda: NOW + seconds).verify(EVIDENCE, BINDING)


def test_an_endorsement_ends_when_it_says() -> None:
    key = MockKey.generate(ROOT, 0, NOW_MS)
    evidence = MockAttester(key, CLAIMS, measurement=MEASUREMENT, clock=lambda: NOW).attest(BINDING)
    authenticate(evidence, BINDING, ROOT.public, NOW_MS)
    with pytest.raises(EvidenceError, match="endorsement: expired 0 s ago, wanted one that is valid"):
        authenticate(evidence, BINDING, ROOT.public, NOW_MS + 1)


def test_authentication_is_not_appraisal() -> None:
    """What no policy would accept is authentic all the same, and what a policy would accept may be forged."""
    evidence = MockAttester(KEY, CLAIMS, measurement=bytes(48), debug=True, clock=lambda: NOW).attest(BINDING)
    assert authenticate(evidence, BINDING, ROOT.public, NOW_MS).debug
    with pytest.raises(EvidenceError):
        authenticate(EVIDENCE, BINDING, OTHER_ROOT.public, NOW_MS)


def test_the_twin_of_a_signature_is_refused() -> None:
    """S + L verifies the same equation; RFC 8032 section 5.1.7 wants S < L, so that evidence has one form only."""
    order = 2**252 + 27742317777372353535851937790883648493
    data = EVIDENCE.evidence
    twin = int.from_bytes(data[-32:], "little") + order
    assert "EvidenceError" in refused(replace(EVIDENCE, evidence=data[:-32] + twin.to_bytes(32, "little")))


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f")])
def test_a_point_of_small_order_is_no_key(point: bytes) -> None:
    """Under such a key the signature (1, 0) verifies for every message."""
    with pytest.raises(ValueError, match="small order"):
        MockVerifier(point, POLICY)
    with pytest.raises(ValueError, match="small order"):
        ROOT.endorse(point, 0, NOW_MS)
    endorsement = oracle_endorsement(ROOT.private, point, 0, NOW_MS + YEAR_MS)
    body = b"MGPTMOCK\x01" + struct.pack(">Q", NOW_MS) + MEASUREMENT + BINDING.digest + b"\0" + point
    signature = b"\x01" + bytes(63)
    eddsa.new(eddsa.import_public_key(point), "rfc8032").verify(body, signature)  # the control: the library accepts it
    assert "not by its own key" in refused(Evidence(1, CLAIMS, body + signature, (endorsement,)))


@pytest.mark.parametrize("root", [b"", bytes(31), b"\xff" * 32, bytes([1]) * 33])
def test_only_a_point_can_be_pinned_as_root(root: bytes) -> None:
    with pytest.raises(ValueError, match=r"key|Ed25519"):
        MockVerifier(root, POLICY)


def test_an_attester_signs_nothing_that_is_not_its_own() -> None:
    attester = MockAttester(KEY, CLAIMS, measurement=MEASUREMENT)
    for binding in (replace(BINDING, claims=NO_CLAIMS), replace(BINDING, provider=0)):
        with pytest.raises(ValueError, match="own"):
            attester.attest(binding)
    with pytest.raises(ValueError, match="48"):
        MockAttester(KEY, CLAIMS, measurement=b"short")


def test_private_keys_are_never_shown() -> None:
    for key in (ROOT, KEY):
        assert key.private.hex() not in repr(key)
        assert repr(key.private) not in repr(key)
        assert str(list(key.private))[1:-1] not in str(key)


def test_keys_survive_their_files() -> None:
    assert MockRoot.from_json(ROOT.to_json()) == ROOT
    assert MockKey.from_json(KEY.to_json().encode()) == KEY
    assert json.loads(KEY.to_json())["format"] == "minigpt-mock-key"
    assert json.loads(ROOT.to_json())["public"] == ROOT.public.hex()
    assert KEY.stage == 0


@pytest.mark.parametrize(
    "change",
    [
        {"format": "minigpt-mock-root"},
        {"version": 2},
        {"version": True},
        {"private": "00"},
        {"private": 5},
        {"extra": 1},
        {"private": KEY.private.hex().upper()},
        {"private": " " + KEY.private.hex()[1:]},
        {"private": "zz" * 32},
        {"endorsement": None},
        {"endorsement": KEY.endorsement.hex()[2:]},
        {"endorsement": "00" * 117},
        {"private": (b"\7" * 32).hex()},
        {"private": ...},
    ],
)
def test_a_damaged_key_file_is_refused_without_quoting_it(change: dict) -> None:
    fields = {name: value for name, value in (json.loads(KEY.to_json()) | change).items() if value is not ...}
    with pytest.raises(EvidenceError) as caught:
        MockKey.from_json(json.dumps(fields))
    assert KEY.private.hex()[:8] not in str(caught.value).lower()


def test_a_damaged_root_file_is_refused() -> None:
    fields = json.loads(ROOT.to_json())
    for change in ({"public": OTHER_ROOT.public.hex()}, {"private": OTHER_ROOT.private.hex()}, {"public": ""}):
        with pytest.raises(EvidenceError):
            MockRoot.from_json(json.dumps(fields | change))


@given(st.binary(max_size=300), st.lists(st.binary(max_size=200), max_size=3), st.integers(0, 255), st.binary())
def test_any_bytes_as_evidence_are_only_evidence_errors(evidence, endorsements, provider, claims) -> None:
    with pytest.raises(EvidenceError):
        VERIFIER.verify(Evidence(provider, claims, evidence, tuple(endorsements)), BINDING)


@given(st.binary(min_size=217, max_size=217), st.binary(min_size=106, max_size=106))
def test_any_fields_of_the_right_shape_are_only_evidence_errors(evidence, endorsement) -> None:
    with pytest.raises(EvidenceError):
        VERIFIER.verify(Evidence(1, CLAIMS, b"MGPTMOCK\x01" + evidence, (b"MGPTMOCKCA\x01" + endorsement,)), BINDING)


def test_no_evidence_is_accepted_only_where_that_is_the_rule() -> None:
    binding = Binding("I", Provider.NONE, b"h" * 32, b"s" * 32, NO_CLAIMS)
    evidence = Unattested().attest(binding)
    assert evidence == Evidence(0, b"\x80", b"", ())
    result = AcceptUnattested().verify(evidence, binding)
    assert (result.provider, result.measurement, result.stage) == (Provider.NONE, b"", None)
    for change in (
        {"provider": 1},
        {"provider": 9},
        {"claims": b""},
        {"claims": CLAIMS},
        {"evidence": b"x"},
        {"endorsements": (b"",)},
    ):
        with pytest.raises(EvidenceError):
            AcceptUnattested().verify(replace(evidence, **change), binding)
    with pytest.raises(EvidenceError):
        AcceptUnattested().verify(evidence, replace(binding, claims=CLAIMS))
    with pytest.raises(EvidenceError):
        AcceptUnattested().verify(EVIDENCE, BINDING)
    with pytest.raises(ValueError, match="unattested"):
        Unattested().attest(BINDING)
    refused(evidence, binding)


@pytest.mark.parametrize(
    "change",
    [
        {"role": "X"},
        {"role": ""},
        {"provider": -1},
        {"provider": 256},
        {"handshake_hash": bytes(31)},
        {"static_key": b""},
    ],
)
def test_a_binding_has_one_form(change: dict) -> None:
    with pytest.raises(ValueError, match="binding"):
        replace(BINDING, **change)


def test_ed25519_agrees_with_wycheproof(vectors) -> None:
    """Through our own door: the vectors' keys and signatures as the root's over arbitrary messages."""
    from attest.providers.mock import _is_signed

    tests = [
        (bytes.fromhex(group["publicKey"]["pk"]), case)
        for group in json.loads((vectors / "wycheproof" / "ed25519_test.json").read_text())["testGroups"]
        for case in group["tests"]
    ]
    assert len(tests) > 100
    for public, case in tests:
        accepted = _is_signed(public, bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
        assert accepted == (case["result"] == "valid"), case
