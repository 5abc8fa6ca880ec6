"""Policies refuse everything that differs, at once and in words; evidence files hold exactly what was dumped."""

import json
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attest import (
    MAX_CLAIMS,
    MAX_ENDORSEMENTS,
    MAX_EVIDENCE,
    AttestationResult,
    Binding,
    Evidence,
    EvidenceError,
    PolicyError,
    Provider,
    dump_evidence,
    load_evidence,
)
from attest.policy import Policy, decode_claims

PIN = bytes([0xAB]) * 48
FIELDS = {"stage": 1, "first_layer": 6, "end_layer": 12, "weights_sha256": b"w" * 32, "manifest_sha256": b"m" * 32}
CLAIMS = msgpack.packb(FIELDS)
POLICY = Policy(Provider.MOCK, frozenset({PIN}), CLAIMS, 1)
RESULT = AttestationResult(Provider.MOCK, PIN, False, CLAIMS, 1, 0)


def mismatches(result: AttestationResult, policy: Policy = POLICY) -> tuple[str, ...]:
    with pytest.raises(PolicyError) as caught:
        policy.check(result)
    assert str(caught.value) == "; ".join(caught.value.mismatches)
    return caught.value.mismatches


def test_what_was_pinned_is_accepted() -> None:
    POLICY.check(RESULT)
    replace(POLICY, measurements=frozenset({bytes([1]) * 48, PIN})).check(RESULT)


@pytest.mark.parametrize(
    "change",
    [
        {"measurements": frozenset()},
        {"measurements": frozenset({b""})},
        {"measurements": frozenset({bytes(48)})},
        {"measurements": frozenset({PIN, bytes(48)})},
        {"measurements": frozenset({PIN[:-1]})},
        {"measurements": frozenset({PIN + b"x"})},
        {"stage": -1},
        {"stage": 0xFFFF},
        {"claims": bytes(MAX_CLAIMS + 1)},
        {"provider": Provider.NONE},
        {"provider": Provider.NITRO},
        {"provider": Provider.SNP},
        {"provider": Provider.TDX},
    ],
)
def test_a_policy_without_real_pins_cannot_be_made(change: dict) -> None:
    with pytest.raises(ValueError, match="policy"):
        replace(POLICY, **change)


def test_every_single_bit_of_the_measurement_counts() -> None:
    for bit in range(8 * 48):
        flipped = bytearray(PIN)
        flipped[bit // 8] ^= 1 << bit % 8
        (only,) = mismatches(replace(RESULT, measurement=bytes(flipped)))
        assert bytes(flipped).hex() in only
        assert PIN.hex() in only


def test_all_mismatches_are_named_at_once() -> None:
    other = msgpack.packb(FIELDS | {"end_layer": 11, "weights_sha256": b"x" * 32})
    found = mismatches(AttestationResult(Provider.NONE, b"", True, other, None, None))
    assert [text.split(":")[0] for text in found] == [
        "provider",
        "measurement",
        "debug",
        "key",
        "claim 'end_layer'",
        "claim 'weights_sha256'",
    ]
    for text in found:
        assert "got " in text
        assert "wanted " in text


def test_a_differing_claim_is_named_with_both_values() -> None:
    (only,) = mismatches(replace(RESULT, claims=msgpack.packb(FIELDS | {"manifest_sha256": b"n" * 32})))
    assert only == f"claim 'manifest_sha256': got {(b'n' * 32).hex()}, wanted {(b'm' * 32).hex()}"
    (only,) = mismatches(replace(RESULT, claims=msgpack.packb({k: v for k, v in FIELDS.items() if k != "stage"})))
    assert only == "claim 'stage': got no such claim, wanted 1"
    (only,) = mismatches(replace(RESULT, claims=msgpack.packb(FIELDS | {"more\x1b": True})))
    assert only == r"claim 'more\x1b': got True, wanted no such claim"


@pytest.mark.parametrize(
    "claims",
    [
        b"",
        b"\x80",
        b"\xc1",
        b"\xff",
        CLAIMS + b"\x00",
        CLAIMS[:-1],
        b"\x90",
        msgpack.packb(dict(reversed(FIELDS.items()))),  # the same fields in another order
        CLAIMS.replace(b"\xa5stage\x01", b"\xa5stage\xcc\x01"),  # a number in more bytes than it needs
        CLAIMS.replace(b"\xa5stage\x01", b"\xa5stage\xc3"),  # True, which Python calls equal to 1
    ],
)
def test_claims_are_compared_as_bytes(claims: bytes) -> None:
    assert all(text.startswith("claim") for text in mismatches(replace(RESULT, claims=claims)))


def test_claims_are_decoded_only_if_canonical_and_plain() -> None:
    assert decode_claims(CLAIMS) == FIELDS
    assert decode_claims(b"\x80") == {}
    for claims in (
        b"\x82\xa1a\x01\xa1a\x01",  # a key twice
        b"\x81\xa1a\xcd\x00\x01",
        b"\x81\x01\x01",
        b"\x81\xa1a\x90",
        b"\x81\xa1a\xd4\x01\x00",
        b"\x81\xa1a\xd6\xff" + bytes(4),
        b"\x81\xa1\xff\x01",
        b"\x81\x90\x01",
        b"\x81\xa1a\xca\x7f\xc0\x00\x00",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 2000,
        b"\x81\xa1a" + b"\x91" * 1000 + b"\x00",
        msgpack.packb({"a": bytes(MAX_CLAIMS)}),
        b"\x01",
    ):
        assert decode_claims(claims) is None, claims


@given(st.binary(max_size=200))
def test_any_claims_but_the_right_ones_are_a_policy_error(claims: bytes) -> None:
    mismatches(replace(RESULT, claims=claims))


# --- evidence files ---

BINDING = Binding("R", 1, b"h" * 32, b"s" * 32, CLAIMS)
EVIDENCE = Evidence(1, CLAIMS, b"evidence", (b"one", b""))


@given(st.data())
def test_a_file_gives_back_what_was_dumped(data: st.DataObject) -> None:
    provider, claims, key = data.draw(st.tuples(st.integers(0, 255), st.binary(), st.binary(min_size=32, max_size=32)))
    endorsements = tuple(data.draw(st.lists(st.binary(), max_size=MAX_ENDORSEMENTS)))
    binding = Binding(data.draw(st.sampled_from("IR")), provider, key[::-1], key, claims)
    pair = Evidence(provider, claims, data.draw(st.binary()), endorsements), binding
    assert load_evidence(dump_evidence(*pair)) == pair
    assert load_evidence(dump_evidence(*pair).encode()) == pair


def test_the_largest_evidence_fits_into_a_file() -> None:
    claims, evidence = bytes(MAX_CLAIMS), bytes(MAX_EVIDENCE)
    endorsements = (bytes(192 * 1024 - MAX_CLAIMS),) + (b"",) * (MAX_ENDORSEMENTS - 1)
    pair = Evidence(255, claims, evidence, endorsements), Binding("I", 255, b"h" * 32, b"s" * 32, claims)
    assert load_evidence(dump_evidence(*pair)) == pair
    endorsements = (endorsements[0] + b"x", *endorsements[1:])
    with pytest.raises(EvidenceError, match="together"):
        load_evidence(dump_evidence(replace(pair[0], endorsements=endorsements), pair[1]))


def test_only_what_belongs_together_is_dumped() -> None:
    for change in ({"claims": b"\x80"}, {"provider": 2}):
        with pytest.raises(ValueError, match="belong together"):
            dump_evidence(replace(EVIDENCE, **change), BINDING)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "minigpt-mock-key"},
        {"format": 1},
        {"format": ...},
        {"version": ...},
        {"version": 2},
        {"version": True},
        {"version": 1.0},
        {"extra": 1},
        {"provider": True},
        {"provider": "mock"},
        {"provider": -1},
        {"provider": 256},
        {"provider": 1.0},
        {"provider": None},
        {"provider": ...},
        {"role": "r"},
        {"role": []},
        {"role": ...},
        {"handshake_hash": "00" * 31},
        {"handshake_hash": "00" * 33},
        {"handshake_hash": ["00"] * 32},
        {"static_key": "0" * 63},
        {"static_key": "GG" * 32},
        {"static_key": "AA" * 32},
        {"static_key": "é" * 64},
        {"claims": "0"},
        {"claims": 0},
        {"claims": " 80"},
        {"claims": "00" * (MAX_CLAIMS + 1)},
        {"evidence": "00" * (MAX_EVIDENCE + 1)},
        {"evidence": None},
        {"endorsements": "00"},
        {"endorsements": {}},
        {"endorsements": [1]},
        {"endorsements": [["00"]]},
        {"endorsements": ...},
        {"endorsements": ["00"] * (MAX_ENDORSEMENTS + 1)},
        {"endorsements": ["00" * (192 * 1024)] * 2},
    ],
)
def test_a_wrong_field_in_a_file_is_refused(change: dict) -> None:
    fields = {
        name: value
        for name, value in (json.loads(dump_evidence(EVIDENCE, BINDING)) | change).items()
        if value is not ...
    }
    with pytest.raises(EvidenceError):
        load_evidence(json.dumps(fields))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "1" * 5000,
        "[" * 100_000,
        '{"a":' * 100_000,
        "NaN",
        " " * 600_000,
        "\ud800",
        b"\xff",
        b"\xff\xfe{\0}\0",
        dump_evidence(EVIDENCE, BINDING).replace('"version": 1', '"version": 1, "version": 1'),
        dump_evidence(EVIDENCE, BINDING).replace('"version": 1', '"version": 1' + "0" * 5000),
        dump_evidence(EVIDENCE, BINDING)[:-3],
        dump_evidence(EVIDENCE, BINDING) * 2,
    ],
    ids=lambda text: f"{len(text)}-long",
)
def test_what_is_no_evidence_file_is_refused(text: str | bytes) -> None:
    with pytest.raises(EvidenceError):
        load_evidence(text)


@given(st.one_of(st.text(), st.binary()))
def test_any_text_as_a_file_is_only_an_evidence_error(text: str | bytes) -> None:
    with pytest.raises(EvidenceError):
        load_evidence(text)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(json.loads(dump_evidence(EVIDENCE, BINDING)))), JSON)
def test_any_value_of_any_field_is_only_an_evidence_error(name: str, value: object) -> None:
    text = json.dumps(json.loads(dump_evidence(EVIDENCE, BINDING)) | {name: value})
    try:
        evidence, binding = load_evidence(text)
    except EvidenceError:
        return
    assert json.loads(dump_evidence(evidence, binding))[name] == value
