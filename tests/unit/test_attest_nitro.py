"""Nitro documents: genuine ones give the published verdict, and everything else that could be shown is refused."""

import hashlib
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import enclaves
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from enclaves import NOW, PCRS, ROOT, cbor, chain, document, fields, sign
from ends import Side, client, meet, stage
from hypothesis import given
from hypothesis import strategies as st
from oracles import cbor_agrees

from attest import AttestationError, Binding, Evidence, EvidenceError, PolicyError, Provider, nsm
from attest import cbor as our_cbor
from attest.document import DocumentError, load
from attest.providers import ANY_CODE, nitro
from attest.providers.nitro import NitroPins, NitroVerifier

SAMPLES = ("debug_2022", "prod_2022", "prod_pcr16_2025")


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest, vectors: Path) -> tuple[bytes, dict[str, Any], datetime]:
    """A genuine document, what is published about it, and its own time."""
    name = f"nitro/{request.param}.bin"
    expected = json.loads((vectors / "expected.json").read_text())[name]
    return (vectors / name).read_bytes(), expected, datetime.fromtimestamp(expected["timestamp_ms"] / 1000, UTC)


def reasons(call: Callable[[], object]) -> list[str]:
    with pytest.raises(EvidenceError) as caught:
        call()
    found = [reason for reason, _ in caught.value.failures]
    assert caught.value.reason == found[0]
    return found


def refused(evidence: bytes, roots=(ROOT,), now: datetime = NOW) -> list[str]:
    return reasons(lambda: nitro.authenticate(evidence, (), roots, now))


# --- genuine documents ---


def test_a_genuine_document_gives_the_published_verdict(sample) -> None:
    data, expected, now = sample
    statement = nitro.authenticate(data, (), None, now)
    assert (statement.module_id, statement.timestamp) == (expected["module_id"], expected["timestamp_ms"])
    assert {str(index): value.hex() for index, value in statement.pcrs.items()} == expected["pcrs"]
    for name in ("user_data", "nonce", "public_key"):
        value = getattr(statement, name)
        assert (None if value is None else value.hex()) == expected[name]
    found = [reason for reason, _ in nitro.failures(statement, ANY_CODE)]
    assert found == (["debug"] if expected["policy_default"] == "reject:debug" else [])
    assert nitro.failures(statement, ANY_CODE, allow_debug=True) == []
    assert len(nitro.parse(data).chain) == expected["cabundle_len"] + 1


def test_a_genuine_document_ends_with_its_leaf(sample) -> None:
    data, expected, now = sample
    begins, ends = (datetime.fromisoformat(expected[f"leaf_not_{end}"]) for end in ("before", "after"))
    second = timedelta(seconds=1)
    assert begins <= now <= ends
    nitro.authenticate(data, (), None, begins)
    assert refused(data, None, ends) == ["stale"]
    for moment in (begins - second, now - timedelta(days=365)):
        assert refused(data, None, moment)[0] == "not-yet-valid"
    for moment in (ends + second, datetime.now(UTC)):
        assert refused(data, None, moment)[0] == "expired"


def flips(data: bytes, now: datetime, step: int) -> None:
    for position in range(0, len(data), step):
        changed = bytearray(data)
        changed[position] ^= 1 << position // step % 8
        assert refused(bytes(changed), None, now), position


def test_any_16th_byte_flipped_is_refused(sample) -> None:
    data, _, now = sample
    flips(data, now, 16)


@pytest.mark.slow
def test_any_flipped_byte_is_refused(sample) -> None:
    data, _, now = sample
    flips(data, now, 1)


def test_cut_or_lengthened_documents_are_malformed(sample) -> None:
    data, _, now = sample
    for length in range(0, len(data), 37):
        assert refused(data[:length], None, now) == ["malformed"]
    assert refused(data + b"\0", None, now) == ["malformed"]


def test_cbor2_reads_genuine_documents_as_we_do(sample) -> None:
    pytest.importorskip("cbor2")
    frame = our_cbor.read(sample[0])
    cbor_agrees(sample[0], frame)
    cbor_agrees(frame[2], our_cbor.read(frame[2]))


def test_another_root_is_not_believed(sample) -> None:
    data, _, now = sample
    assert refused(data, [ROOT], now) == ["chain"]
    assert refused(data, [], now) == ["chain"]


def test_verifying_costs_little(sample) -> None:
    """20 ms and 2 MB are what an end may spend; measured in processor time, the best of several."""
    data, _, now = sample
    times = []
    for _ in range(20):
        began = time.process_time()
        nitro.authenticate(data, (), None, now)
        times.append(time.process_time() - began)
    assert min(times) < 0.020
    tracemalloc.start()
    try:
        nitro.authenticate(data, (), None, now)
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


def hostile_shapes() -> dict[str, bytes]:
    bad_last = chain({"root": {"version": b""}})
    many_names = b"".join(enclaves.tlv(0x31, enclaves.tlv(0x30, b"\6\1\x2a", b"\x0c\0")) for _ in range(80))
    long_name = chain({"leaf": {"subject": enclaves.tlv(0x30, many_names)}})
    return {
        "empty": b"",
        "too long": bytes(2**20),
        "12 KB of numbers": sign(cbor([0] * 11000), enclaves.CHAIN[-1].key),
        "12 KB of maps": b"\x84" + b"\xbf\x00" * 6000,
        "a huge array": b"\x9b" + b"\xff" * 8,
        "the root is malformed": document(bad_last),
        "a name of 80 parts": document(long_name),
        "registers without end": sign(cbor(fields(pcrs=dict.fromkeys(range(3000), 0))), enclaves.CHAIN[-1].key),
    }


@pytest.mark.parametrize("name", hostile_shapes())
def test_refusing_a_malformed_shape_costs_little(name: str) -> None:
    data, times = hostile_shapes()[name], []
    for _ in range(20):
        began = time.process_time()
        assert refused(data) == ["malformed"]
        times.append(time.process_time() - began)
    assert min(times) < 0.001
    tracemalloc.start()
    try:
        refused(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


# --- documents of our own ---


def test_a_good_document_is_accepted() -> None:
    statement = nitro.authenticate(document(nonce=b"n", user_data=b"", public_key=None), (), [ROOT], NOW)
    assert (statement.nonce, statement.user_data, statement.public_key) == (b"n", b"", None)
    assert statement.pcrs == PCRS
    assert nitro.authenticate(document(nonce=..., user_data=..., public_key=...), (), [ROOT], NOW).nonce is None


@pytest.mark.parametrize(
    "change",
    [
        {"module_id": ...}, {"module_id": 1}, {"digest": "SHA256"}, {"digest": ...}, {"digest": b"SHA384"},
        {"timestamp": -1}, {"timestamp": None}, {"timestamp": True}, {"timestamp": "1"}, {"pcrs": []}, {"pcrs": ...},
        {"pcrs": PCRS | {32: bytes(48)}}, {"pcrs": PCRS | {-1: bytes(48)}}, {"pcrs": PCRS | {3: bytes(47)}},
        {"pcrs": PCRS | {3: bytes(64)}}, {"pcrs": PCRS | {"3": bytes(48)}}, {"pcrs": PCRS | {3: "0" * 48}},
        {"certificate": ...}, {"certificate": b""}, {"certificate": None}, {"cabundle": ...}, {"cabundle": []},
        {"cabundle": b""}, {"cabundle": [None]}, {"cabundle": [enclaves.CHAIN[0].der] * 6}, {"nonce": "text"},
        {"nonce": 0}, {"nonce": []}, {"user_data": False}, {"public_key": {}}, {"more": None},
        {"certificate": bytes(1025)}, {"cabundle": [bytes(1025)]},
    ],
    ids=lambda change: ascii(change)[:40],
)  # fmt: skip
def test_a_payload_of_another_form_is_malformed(change: dict) -> None:
    assert refused(document(**change)) == ["malformed"]


def frame(**parts: Any) -> bytes:
    read = dict(zip(("protected", "others", "payload", "signature"), our_cbor.read(document()), strict=True))
    return cbor(list((read | parts).values()))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (cbor(None), "malformed"), (cbor({}), "malformed"), (b"\xd2" + document(), "malformed"),
        (frame(more=b""), "malformed"), (frame(others=None), "malformed"), (frame(payload=None), "malformed"),
        (frame(payload="x"), "malformed"), (frame(payload=cbor([])), "malformed"), (frame(payload=b""), "malformed"),
        (frame(signature=bytes(95)), "malformed"), (frame(signature=bytes(97)), "malformed"),
        (frame(signature=bytes(96)), "signature"), (frame(signature=b"\xff" * 96), "signature"),
        (frame(protected=b""), "alg"), (frame(protected=cbor({1: -7})), "alg"), (frame(protected=cbor({})), "alg"),
        (frame(protected=bytes.fromhex("bf013822ff")), "alg"), (frame(others={4: b"key"}), "alg"),
        (frame(protected=cbor({1: -35, 3: 0})), "alg"),
        (sign(cbor(fields()), enclaves.CHAIN[-1].key, cbor({1: -7})), "alg"),
        (sign(cbor(fields()), enclaves.CHAIN[-2].key), "signature"),
        (sign(cbor(fields()), enclaves.CHAIN[-1].key, hasher=hashes.SHA512()), "signature"),
        (cbor(["Signature1", b"", b"", b""]), "malformed"), (bytes(12 * 1024 + 1), "malformed"),
    ],
)  # fmt: skip
def test_another_frame_is_refused(data: bytes, reason: str) -> None:
    assert refused(data) == [reason]


def test_documents_have_no_endorsements() -> None:
    for endorsements in ([b""], [enclaves.CHAIN[0].der]):
        assert reasons(lambda e=endorsements: nitro.authenticate(document(), e, [ROOT], NOW)) == ["malformed"]


def test_a_leaf_on_another_curve_signs_no_document() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    assert refused(document(chain({"leaf": {"key": key}}))) == ["signature"]


def test_a_document_of_a_broken_chain_is_refused() -> None:
    """The vendor's names under a foreign root, and an enclave that signs as if it were an instance."""
    assert refused(document(), None) == ["chain"]
    stolen = chain({"leaf": {"extensions": (enclaves.authority(),)}})
    assert refused(document(stolen)) == ["chain"]
    assert set(refused(document(cabundle=[holder.der for holder in enclaves.CHAIN[-2::-1]]))) == {"chain"}
    expired = chain({"zone": {"ends": NOW - timedelta(seconds=1)}, "leaf": {"begins": NOW + timedelta(seconds=1)}})
    assert refused(document(expired)) == ["not-yet-valid", "expired"]


def test_a_document_is_of_now() -> None:
    second = timedelta(seconds=1)
    for age in (-300, 0, 300):
        nitro.authenticate(document(), (), [ROOT], NOW + age * second)
    for age in (-301, 301, -3600, 3600):
        assert refused(document(), now=NOW + age * second) == ["stale"]
    for timestamp in (0, 2**63, 2**64 - 1):
        assert refused(document(timestamp=timestamp)) == ["stale"]


def test_all_failures_are_told_at_once_in_order() -> None:
    broken = chain({"leaf": {"damage": 1, "ends": NOW - timedelta(seconds=1)}})
    altered = sign(cbor(fields(broken, timestamp=0)), enclaves.CHAIN[0].key)
    assert refused(altered, None) == ["chain", "chain", "expired", "signature", "stale"]


def test_a_time_has_a_zone() -> None:
    with pytest.raises(TypeError):
        nitro.authenticate(document(), (), [ROOT], NOW.replace(tzinfo=None))


@given(st.binary(max_size=200))
def test_any_bytes_are_malformed(data: bytes) -> None:
    assert refused(data)[0] in ("malformed", "alg")


@given(st.binary(max_size=100), st.binary(max_size=4))
def test_any_payload_is_malformed(payload: bytes, protected: bytes) -> None:
    assert refused(cbor([bytes.fromhex("a1013822"), {}, payload, bytes(96)])) == ["malformed"]
    assert refused(cbor([protected, {}, payload, bytes(96)]))[0] in ("malformed", "alg")


# --- pins ---

STATEMENT = nitro.authenticate(document(), (), [ROOT], NOW)
HEX = {f"pcr{index}": value.hex() for index, value in PCRS.items()}
PINS = {"provider": "nitro", "covers": "image"} | {name: HEX[name] for name in ("pcr0", "pcr1", "pcr2")}


def differing(pins, statement=STATEMENT, **options) -> list[str]:
    found = [reason for reason, _ in nitro.failures(statement, pins, **options)]
    if found:
        with pytest.raises(PolicyError) as caught:
            nitro.appraise(statement, pins, **options)
        assert [reason for reason, _ in caught.value.failures] == found
    else:
        nitro.appraise(statement, pins, **options)
    return found


def test_what_was_pinned_is_accepted() -> None:
    assert differing(PINS) == []
    assert differing(HEX) == []
    assert differing({"pcr3": "00" * 48}) == []  # what starts at zero may be pinned to it
    assert differing(ANY_CODE) == []


@pytest.mark.parametrize("name", HEX)
def test_every_pin_is_compared(name: str) -> None:
    other = HEX[name][:-1] + ("1" if HEX[name][-1] == "0" else "0")
    assert differing(HEX | {name: other}) == [name]
    assert differing({name: other}) == [name]


def test_a_pinned_register_that_is_absent_refuses() -> None:
    assert differing(PINS | {"pcr16": "00" * 48, "pcr31": "11" * 48}) == ["pcr16", "pcr31"]
    assert differing(PINS | {"pcr16": "none"}) == ["pcr16"]
    for index in range(3):
        without = replace(STATEMENT, pcrs={i: value for i, value in PCRS.items() if i != index})
        assert differing(PINS, without) == [f"pcr{index}"]


def test_a_pin_that_would_not_be_compared_refuses() -> None:
    for name in ("pcr32", "pcr00", "PCR0", "measurement", "allow_debug", ""):
        assert differing(PINS | {name: "00" * 48}) == [name]
    for value in (None, b"\1" * 48, True, HEX["pcr0"].upper() + "A", [HEX["pcr0"]], ""):
        assert differing(PINS | {"pcr0": value}) == ["pcr0"]
    assert differing({}) == ["pins"]
    assert differing({"covers": "image"}) == ["pins"]
    assert differing(PINS | {"covers": "initdata", "provider": "snp"}) == ["provider", "covers"]


def test_debug_is_refused_unless_allowed() -> None:
    zero = dict.fromkeys(range(3), bytes(48))
    for pcrs in (PCRS | zero, {}, {3: b"\1" * 48}):
        statement = replace(STATEMENT, pcrs=pcrs)
        assert differing(ANY_CODE, statement) == ["debug"]
        assert differing(ANY_CODE, statement, allow_debug=True) == []
    pinned = {f"pcr{index}": "00" * 48 for index in range(3)}
    assert differing(pinned, replace(STATEMENT, pcrs=PCRS | zero)) == ["debug"]
    for index in range(3):
        assert not replace(STATEMENT, pcrs=PCRS | zero | {index: b"\1" * 48}).debug


def test_sentences_say_got_and_wanted() -> None:
    failures = nitro.failures(replace(STATEMENT, pcrs={}), PINS)
    assert [reason for reason, _ in failures] == ["debug", "pcr0", "pcr1", "pcr2"]
    for reason, sentence in failures:
        assert sentence.startswith(f"{reason}: got ")
        assert "wanted" in sentence


MANIFEST = NitroPins({index: PCRS[index] for index in range(3)}).to_json()


def test_pins_survive_the_manifest() -> None:
    more = NitroPins({index: PCRS[index] for index in (0, 1, 2, 3, 8)} | {31: b"\x07" * 48})
    for pins in (NitroPins.read(load("m", json.dumps(MANIFEST).encode(), 10000)), more):
        assert NitroPins.read(load("m", json.dumps(pins.to_json()).encode(), 10000)) == pins
    assert MANIFEST == PINS


@pytest.mark.parametrize(
    "change",
    [{"covers": ...}, {"covers": "initdata"}, {"covers": True}, {"pcr0": ...}, {"pcr1": ...}, {"pcr2": ...},
     {"pcr0": "00" * 48}, {"pcr2": "00" * 48}, {"pcr1": "11" * 47}, {"pcr3": "11"}, {"pcr3": None}, {"roots": []},
     {"pcr03": "11" * 48}, {"allow_debug": True}, {"pcr32": "11" * 48}, {"PCR3": "11" * 48}],
    ids=ascii,
)  # fmt: skip
def test_other_pins_are_refused(change: dict) -> None:
    edited = {name: value for name, value in (MANIFEST | change).items() if value is not ...}
    with pytest.raises(DocumentError):
        NitroPins.read(load("m", json.dumps(edited).encode(), 10000))


# --- the verifier of a link ---

CLAIMS = b"\x81\xa5stage\x00"  # {"stage": 0}
BINDING = Binding("R", Provider.NITRO, b"h" * 32, b"s" * 32, CLAIMS)
BOUND = {"user_data": BINDING.digest, "nonce": BINDING.handshake_hash, "public_key": BINDING.static_key}
VERIFIER = NitroVerifier(
    NitroPins({index: PCRS[index] for index in range(3)}), CLAIMS, roots=frozenset([ROOT]), clock=NOW.timestamp
)


def shown(**changes: Any) -> Evidence:
    return Evidence(Provider.NITRO, CLAIMS, document(**(BOUND | changes)), ())


def test_bound_evidence_is_accepted() -> None:
    result = VERIFIER.verify(shown(), BINDING)
    assert (result.provider, result.measurement, result.debug) == (Provider.NITRO, PCRS[0], False)
    assert (result.claims, result.timestamp_ms) == (CLAIMS, NOW.timestamp() * 1000)
    assert dict(result.registers) == HEX_BYTES


HEX_BYTES = {f"pcr{index}": value for index, value in PCRS.items()}


@pytest.mark.parametrize("name", ["user_data", "nonce", "public_key"])
def test_all_three_fields_bind(name: str) -> None:
    for value in (None, ..., b"", BOUND[name][:-1], BOUND[name] + b"\0", bytes(len(BOUND[name]))):
        assert reasons(lambda v=value: VERIFIER.verify(shown(**{name: v}), BINDING)) == ["binding"]


@pytest.mark.parametrize(
    "change", [{"role": "I"}, {"handshake_hash": bytes(32)}, {"static_key": bytes(32)}, {"provider": 1}]
)
def test_evidence_of_another_session_or_end_is_refused(change: dict) -> None:
    assert reasons(lambda: VERIFIER.verify(shown(), replace(BINDING, **change)))[0] == "binding"


def test_altered_claims_are_refused() -> None:
    other = b"\x81\xa5stage\x01"
    assert reasons(lambda: VERIFIER.verify(replace(shown(), claims=other), BINDING)) == ["binding", "claim 'stage'"]
    binding = replace(BINDING, claims=other)  # honestly bound: authentic, and not what the manifest says
    bound = {"user_data": binding.digest}
    with pytest.raises(PolicyError) as caught:
        VERIFIER.verify(replace(shown(**bound), claims=other), binding)
    assert [reason for reason, _ in caught.value.failures] == ["claim 'stage'"]


def test_other_code_is_a_policy_error_and_forged_evidence_is_none() -> None:
    with pytest.raises(PolicyError, match=r"pcr1: got 6363.* wanted 0202"):
        VERIFIER.verify(shown(pcrs=PCRS | {1: b"c" * 48}), BINDING)
    with pytest.raises(PolicyError, match="debug: got on"):
        VERIFIER.verify(shown(pcrs=PCRS | dict.fromkeys(range(3), bytes(48))), BINDING)
    stranger = replace(VERIFIER, roots=nitro.ROOTS)
    found = reasons(lambda: stranger.verify(shown(pcrs=PCRS | {1: b"c" * 48}, nonce=None), BINDING))
    assert found == ["chain", "binding", "pcr1"]
    assert reasons(lambda: VERIFIER.verify(replace(shown(), provider=1), BINDING)) == ["provider"]
    assert reasons(lambda: VERIFIER.verify(replace(shown(), endorsements=(b"",)), BINDING)) == ["malformed"]


def test_a_verifier_believes_aws_and_the_clock_by_default() -> None:
    verifier = NitroVerifier.of_stage(NitroPins({index: PCRS[index] for index in range(3)}), CLAIMS, 0, time.time)
    assert verifier.roots == {bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b")}
    assert set(reasons(lambda: verifier.verify(shown(), BINDING))) >= {"chain"}


def test_the_pinned_root_is_the_published_one(vectors: Path) -> None:
    published = x509.load_pem_x509_certificate((vectors / "nitro" / "aws_nitro_root.pem").read_bytes())
    assert {published.fingerprint(hashes.SHA256())} == nitro.ROOTS
    assert hashlib.sha256(enclaves.CHAIN[0].der).digest() == ROOT


# --- a link ---


def meeting(device: enclaves.Device, **changes: Any) -> tuple[Side, Side]:
    """A client, and a stage whose evidence the device makes."""
    maker = nitro.NitroAttester(CLAIMS, device="/dev/null", ioctl=device)
    return meet(client(verifier=replace(VERIFIER, **changes)), stage(attester=maker))


def test_a_link_to_an_enclave_is_established_with_one_request() -> None:
    device = enclaves.Device()
    one, two = meeting(device)
    assert one.session is not None
    assert two.session is not None
    assert len(device.requests) == 1


FOREIGN = chain({"root": {"key": ec.derive_private_key(7, ec.SECP384R1())}})


@pytest.mark.parametrize(
    ("device", "changes", "word"),
    [
        (enclaves.Device(pcrs=PCRS | {0: b"x" * 48}), {}, "pcr0: got 7878"),
        (enclaves.Device(pcrs=PCRS | dict.fromkeys(range(3), bytes(48))), {}, "debug"),
        (enclaves.Device(), {"clock": lambda: NOW.timestamp() + 301}, "stale"),
        (enclaves.Device(FOREIGN), {}, "chain: got the root"),
        (enclaves.Device(), {"roots": nitro.ROOTS}, "chain: got the root"),
        (enclaves.Device(), {"claims": b"\x80"}, "claim"),
    ],
)
def test_a_link_to_anything_else_is_not(device: enclaves.Device, changes: dict, word: str) -> None:
    one, two = meeting(device, **changes)
    assert one.session is None
    assert word in str(one.error) + str(one.error.__cause__)
    assert two.session is None


def test_a_stage_whose_device_fails_says_so_and_nothing_more() -> None:
    device = enclaves.Device()
    device.answer = cbor({"Error": "Internal"})
    one, two = meeting(device)
    assert one.session is two.session is None
    assert "/dev" not in str(one.error)


# --- the device ---


def attester(device: enclaves.Device) -> nitro.NitroAttester:
    return nitro.NitroAttester(CLAIMS, device="/dev/null", ioctl=device)


def test_what_the_device_signs_is_accepted() -> None:
    device = enclaves.Device()
    evidence = attester(device).attest(BINDING)
    assert VERIFIER.verify(evidence, BINDING).measurement == PCRS[0]
    other = replace(BINDING, handshake_hash=b"i" * 32)
    assert VERIFIER.verify(attester(device).attest(other), other).debug is False
    asked = {name: BOUND[name] for name in ("user_data", "nonce", "public_key")}
    assert device.requests[0] == cbor({"Attestation": asked})


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x00", cbor({}), cbor(None), cbor({"Attestation": {}}), cbor({"Attestation": {"document": "text"}}),
     cbor({"Attestation": {"document": b""}}), cbor({"Error": "NotFound\x1b[2J"}), cbor({"Error": 1}),
     cbor({"Other": {}}), bytes(0x3001), cbor({"Attestation": {"document": b"x" * 0x3000}})],
    ids=lambda answer: ascii(answer)[:30],
)  # fmt: skip
def test_a_device_that_gives_no_document_is_an_error(answer: bytes) -> None:
    device = enclaves.Device()
    device.answer = answer
    with pytest.raises(AttestationError) as caught:
        attester(device).attest(BINDING)
    assert str(caught.value).isprintable()


def test_an_attester_gives_away_no_document_of_something_else() -> None:
    for change in ({"nonce": b"x" * 32}, {"user_data": None}, {"public_key": ...}):
        assert reasons(lambda c=change: attester(enclaves.Device(**c)).attest(BINDING)) == ["binding"]
    for binding in (replace(BINDING, claims=b"\x80"), replace(BINDING, provider=1)):
        with pytest.raises(ValueError, match="own"):
            attester(enclaves.Device()).attest(binding)


def test_a_missing_or_failing_device_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise OSError(110, "Connection timed out")

    with pytest.raises(AttestationError, match="/dev/null: Connection timed out"):
        nitro.NitroAttester(CLAIMS, device="/dev/null", ioctl=fails).attest(BINDING)
    with pytest.raises(AttestationError, match="No such file"):
        nitro.NitroAttester(CLAIMS, device=str(tmp_path / "nsm")).attest(BINDING)
    monkeypatch.setattr(nsm, "DEVICE", str(tmp_path / "nsm"))
    with pytest.raises(AttestationError, match="is missing"):
        nitro.PLATFORM.attester(b"", CLAIMS, None)
