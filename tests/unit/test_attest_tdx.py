"""TDX quotes: genuine ones give the published verdict, and everything else that could be shown is refused."""

import hashlib
import itertools
import json
import re
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import domains
import enclaves
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from domains import (
    HOLDERS,
    ROOT,
    collateral,
    firmware,
    holders,
    level,
    module,
    pem,
    platform,
    quote,
    revocations,
)
from enclaves import NOW
from ends import client, meet, stage
from hypothesis import given
from hypothesis import strategies as st

from attest import AttestationError, Binding, Evidence, EvidenceError, PolicyError, Provider
from attest.document import DocumentError, load
from attest.providers import ANY_CODE, tdx
from attest.providers.tdx import TdxPins, TdxVerifier
from attest.providers.tdx_collateral import STATUSES

LEAF, AUTHORITY, TOP = (HOLDERS[who].der for who in ("pck", "authority", "root"))
SECOND = timedelta(seconds=1)
SAMPLES = ("v4_prod_phala", "v4_prod_google", "v4_debug_coco", "v5_prod_phala")


def seven(path: Path) -> list[bytes]:
    """The parts of a published collateral."""
    read = json.loads(path.read_bytes())
    assert read["tcb_info_issuer_chain"] == read["qe_identity_issuer_chain"]
    signer = x509.load_pem_x509_certificates(read["tcb_info_issuer_chain"].encode())[0]
    texts = []
    for name in ("tcb_info", "qe_identity"):
        texts += [read[name].encode(), bytes.fromhex(read[f"{name}_signature"])]
    lists = [bytes.fromhex(read[name]) for name in ("root_ca_crl", "pck_crl")]
    return [*texts, signer.public_bytes(serialization.Encoding.DER), *lists]


Sample = tuple[bytes, list[bytes], dict[str, Any], datetime]


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest, vectors: Path) -> Sample:
    """A genuine quote, its collateral, what is published about it, and a time to judge it by."""
    name = f"tdx/{request.param}.bin"
    expected = json.loads((vectors / "expected.json").read_text())[name]
    parts = seven(vectors / expected["collateral"]) if expected["collateral"] else []
    at = expected["evaluate_at"] or expected["pck_not_before"]
    return (vectors / name).read_bytes(), parts, expected, datetime.fromisoformat(at)


def reasons(call: Callable[[], object]) -> list[str]:
    with pytest.raises(EvidenceError) as caught:
        call()
    found = [reason for reason, _ in caught.value.failures]
    assert caught.value.reason == found[0]
    return found


def refused(evidence: bytes, parts: Sequence[bytes] = (), roots=(ROOT,), now: datetime = NOW) -> list[str]:
    return reasons(lambda: tdx.authenticate(evidence, parts, roots, now))


def accepted(evidence: bytes, parts: Sequence[bytes] = (), roots=(ROOT,), now: datetime = NOW) -> tdx.Statement:
    return tdx.authenticate(evidence, parts, roots, now)


# --- genuine quotes ---


def test_a_genuine_quote_gives_the_published_verdict(sample: Sample) -> None:
    data, parts, expected, now = sample
    if expected["policy_default"] == "reject:tcb":
        assert refused(data, parts, None, now) == ["tcb"]
        statement = accepted(data, (), None, now)
        parts = []
    else:
        statement = accepted(data, parts, None, now)
    for name in ("tee_tcb_svn", "mrseam", "mrsignerseam", "td_attributes", "xfam", "mrtd", "mrconfigid", "mrowner",
                 "mrownerconfig", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "report_data"):  # fmt: skip
        assert getattr(statement, name).hex() == expected[name]
    assert statement.seam_attributes.hex() == expected["seam_attr"]
    assert statement.status == (expected["tcb_status"] if parts else None)
    found = [reason for reason, _ in tdx.failures(statement, ANY_CODE)]
    debug = ["debug"] if expected["policy_default"] == "reject:debug" else []
    assert found == debug + ([] if parts else ["collateral-required"])
    assert [reason for reason, _ in tdx.failures(statement, ANY_CODE, allow_no_collateral=True)] == debug
    tdx.appraise(statement, ANY_CODE, allow_debug=True, allow_no_collateral=True)
    read = tdx.parse(data)
    assert read.version == expected["version"]
    assert read.pck is not None
    if "fmspc" in expected:
        assert (statement.fmspc or b"").hex() == expected["fmspc"] == read.pck.fmspc.hex()
        assert (list(read.pck.components), read.pck.pcesvn) == (expected["sgx_tcb_components"], expected["pcesvn"])


def test_what_intel_says_of_the_genuine_platform(vectors: Path) -> None:
    folder, now = vectors / "tdx", datetime(2025, 6, 25, tzinfo=UTC)
    parts = seven(folder / "v4_prod_phala_collateral.json")
    statement = accepted((folder / "v4_prod_phala.bin").read_bytes(), parts, None, now)
    assert (statement.status, statement.advisories, statement.tcb_evaluation) == ("UpToDate", (), 17)
    assert statement.crl_numbers == (1, 1)
    other = seven(folder / "v5_prod_phala_collateral.json")
    for name in ("v4_prod_google", "v5_prod_phala"):  # of another platform, and of another time
        assert "fmspc" in refused((folder / f"{name}.bin").read_bytes(), parts, None, now)
    then = datetime(2026, 3, 1, tzinfo=UTC)
    assert "fmspc" in refused((folder / "v4_prod_phala.bin").read_bytes(), other, None, then)
    for mixed in ([*parts[:2], *other[2:]], [*parts[:5], other[5], other[6]], [*parts[:6], other[6]]):
        assert refused((folder / "v4_prod_phala.bin").read_bytes(), mixed, None, now) != []


def test_genuine_collateral_has_its_time(vectors: Path) -> None:
    data = (vectors / "tdx" / "v4_prod_phala.bin").read_bytes()
    parts = seven(vectors / "tdx" / "v4_prod_phala_collateral.json")
    for moment in ("2025-06-19T10:32:27+00:00", "2025-07-19T10:00:35+00:00"):
        accepted(data, parts, None, datetime.fromisoformat(moment))
    for moment in ("2025-06-19T10:32:26+00:00", "2025-07-19T10:00:36+00:00", "2025-09-01T00:00:00+00:00"):
        assert set(refused(data, parts, None, datetime.fromisoformat(moment))) == {"collateral-expired"}


def test_a_genuine_quote_ends_with_its_certificate(sample: Sample) -> None:
    data, _, expected, _ = sample
    begins, ends = (datetime.fromisoformat(expected[f"pck_not_{end}"]) for end in ("before", "after"))
    for moment in (begins, ends):
        accepted(data, (), None, moment)
    assert refused(data, (), None, begins - SECOND) == ["not-yet-valid"]
    assert refused(data, (), None, ends + SECOND) == ["expired"]


def test_others_find_the_signatures_of_genuine_quotes_good(sample: Sample) -> None:
    """By `cryptography`, and by offsets of this test's own."""
    data, parts, expected, _ = sample
    size = 48 + (6 + 648 if expected["version"] == 5 else 584)
    ours = data[size + 4 : size + 4 + 128]
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + ours[64:])
    check(key, ours[:64], data[:size])
    at = size + 4 + 128 + 6
    texts = re.findall(b"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----\n", data)
    leaf, authority, root = certificates = [x509.load_pem_x509_certificate(text) for text in texts]
    check(leaf.public_key(), data[at + 384 : at + 448], data[at : at + 384])
    leaf.verify_directly_issued_by(authority)
    authority.verify_directly_issued_by(root)
    assert [certificate.public_bytes(serialization.Encoding.DER) for certificate in certificates] == [
        certificate.der for certificate in tdx.parse(data).chain
    ]
    if parts:
        signer = x509.load_der_x509_certificate(parts[4])
        signer.verify_directly_issued_by(root)
        check(signer.public_key(), parts[1], parts[0])
        check(signer.public_key(), parts[3], parts[2])
        for listed, issuer in ((parts[5], root), (parts[6], authority)):
            signer_key = issuer.public_key()
            assert isinstance(signer_key, ec.EllipticCurvePublicKey)
            assert x509.load_der_x509_crl(listed).is_signature_valid(signer_key)


def check(key: Any, signed: bytes, message: bytes) -> None:
    r, s = int.from_bytes(signed[:32], "big"), int.from_bytes(signed[32:], "big")
    key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        key.verify(encode_dss_signature(r, s), message + b"\0", ec.ECDSA(hashes.SHA256()))


def flipped(data: bytes, position: int, step: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << position // step % 8
    return bytes(changed)


def flips(sample: Sample, step: int) -> None:
    """Of the quote but its padding, and of each part of the collateral."""
    data, parts, expected, now = sample
    judged = parts if expected["tcb_status"] == "UpToDate" else []  # the other collateral refuses by itself
    length = len(data) - (expected["trailing_bytes"] or 0)
    accepted(data[:length], judged, None, now)
    for position in range(0, length, step):
        assert refused(flipped(data, position, step), (), None, now), position
    for number, part in enumerate(judged):
        for position in range(0, len(part), step):
            changed = [*judged[:number], flipped(part, position, step), *judged[number + 1 :]]
            assert refused(data, changed, None, now), (number, position)


def test_any_16th_byte_flipped_is_refused(sample: Sample) -> None:
    flips(sample, 16)


@pytest.mark.slow
def test_any_flipped_byte_is_refused(sample: Sample) -> None:
    flips(sample, 1)


def test_padding_is_ignored(sample: Sample) -> None:
    data, _, expected, now = sample
    length = len(data) - expected["trailing_bytes"]
    for padding in (b"", bytes(70), b"text", data):
        accepted(data[:length] + padding, (), None, now)
    assert refused(data[:length] + bytes(16 * 1024), (), None, now) == ["malformed"]


def test_cut_quotes_are_malformed(sample: Sample) -> None:
    data, _, expected, now = sample
    for length in [*range(0, len(data) - expected["trailing_bytes"], 37), len(data) - expected["trailing_bytes"] - 1]:
        assert refused(data[:length], (), None, now) == ["malformed"]


def test_another_root_is_not_believed(sample: Sample) -> None:
    data, parts, _, now = sample
    for roots in ([ROOT], []):
        assert set(refused(data, (), roots, now)) == {"chain"}
        assert set(refused(data, parts, roots, now)) == {"chain"}


def test_the_pinned_root_is_the_published_one(vectors: Path) -> None:
    published = x509.load_pem_x509_certificate((vectors / "tdx" / "intel_sgx_root.pem").read_bytes())
    assert {published.fingerprint(hashes.SHA256())} == tdx.ROOTS


def cost(call: Callable[[], object]) -> float:
    """Processor seconds, the best of several."""
    times = []
    for _ in range(20):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def test_verifying_costs_little(sample: Sample) -> None:
    """20 ms and 2 MB are what an end may spend."""
    data, parts, _, now = sample

    def run() -> None:
        tdx.examine(data, parts, tdx.ROOTS, now)

    assert cost(run) < 0.020
    assert memory(run) < 2 * 2**20


def memory(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def hostile_shapes() -> dict[str, tuple[bytes, list[bytes]]]:
    good, parts = quote(), collateral()
    return {
        "empty": (b"", parts),
        "too long": (bytes(2**20), parts),
        "zeros": (bytes(8000), parts),
        "8 KB of certificates": (quote(text=b"-----BEGIN CERTIFICATE-----\n" * 3 + b"A" * 3500), parts),
        "a root that is none": (quote(text=pem(LEAF, AUTHORITY, TOP[:-1])), parts),
        "six parts": (good, parts[:6]),
        "a million parts": (good, parts * 150_000),
        "a long signature": (good, [parts[0], bytes(2**16), *parts[2:]]),
        "a long text": (good, [b"[" * (2**16 + 1), *parts[1:]]),
        "a long list": (good, [*parts[:6], bytes(2**16 + 1)]),
        "no list": (good, [*parts[:6], bytes(2**16)]),
        "a signer that is none": (good, [*parts[:4], bytes(4096), *parts[5:]]),
    }


@pytest.mark.parametrize("name", hostile_shapes())
def test_refusing_a_malformed_shape_costs_little(name: str) -> None:
    data, parts = hostile_shapes()[name]

    def run() -> None:
        assert refused(data, parts) == ["malformed"]

    assert cost(run) < 0.001
    assert memory(run) < 2 * 2**20


def test_texts_that_nobody_signed_are_not_read() -> None:
    for text in (b"[" * 2**16, b"{}", b"\xff"):
        parts = collateral()
        assert refused(quote(), [text, *parts[1:]]) == ["signature"]
        assert refused(quote(), [*parts[:2], text, *parts[3:]]) == ["signature"]
        signed = collateral(info=text)
        assert refused(quote(), signed) == ["malformed"]
        assert set(refused(quote(), signed, None)) == {"chain"}  # by a foreign root: signed, and still not read


# --- quotes of our own ---


@pytest.mark.parametrize(("version", "kind"), [(4, 2), (5, 2), (5, 3)])
def test_a_good_quote_is_accepted(version: int, kind: int) -> None:
    statement = accepted(quote(version=version, kind=kind), collateral())
    for name, value in domains.BODY.items():
        assert getattr(statement, name) == (
            value if kind == 3 or name not in ("tee_tcb_svn_2", "mrservicetd") else None
        )
    assert (statement.ppid, statement.fmspc) == (domains.PPID, domains.FMSPC)
    assert (statement.status, statement.advisories, statement.tcb_evaluation) == ("UpToDate", (), 17)
    assert statement.crl_numbers == (1, 1)
    assert tdx.failures(statement, ANY_CODE) == []
    assert accepted(quote(version=version, kind=kind)).status is None


HEADER = b"\2\0\x81\0\0\0" + bytes(4) + bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 3}, "malformed"), ({"version": 6}, "malformed"), ({"header": b"\3" + HEADER[1:]}, "alg"),
        ({"header": b"\2\0\0\0\0\0" + HEADER[6:]}, "malformed"), ({"header": HEADER[:10] + bytes(36)}, "malformed"),
        *(({"version": 5, "typed": bytes.fromhex(typed)}, "malformed")
          for typed in ("020088020000", "010048020000", "040088020000")),
        ({"outer": 5}, "malformed"), ({"inner": 6}, "malformed"), ({"more": 1}, "malformed"),
        ({"more": -1}, "malformed"), ({"text": b""}, "chain"), ({"text": bytes(9000)}, "malformed"),
    ],
    ids=ascii,
)  # fmt: skip
def test_another_frame_is_refused(change: dict, reason: str) -> None:
    assert refused(quote(**change))[0] == reason


GOOD = pem(LEAF, AUTHORITY, TOP)


def test_a_chain_is_three_certificates_in_one_form() -> None:
    for text in (GOOD, GOOD + b"\0"):
        accepted(quote(text=text))
    for text in (pem(LEAF, AUTHORITY), pem(LEAF), pem(LEAF, AUTHORITY, TOP, TOP), pem(LEAF, AUTHORITY, AUTHORITY, TOP)):
        assert refused(quote(text=text))[0] == "chain"
    for text in (pem(AUTHORITY, LEAF, TOP), pem(LEAF, TOP, AUTHORITY), pem(LEAF, TOP, TOP)):
        assert refused(quote(text=text))[0] == "chain"
    other_lines = GOOD.replace(b"CERTIFICATE-----\nM", b"CERTIFICATE-----\n M", 1)
    for text in (GOOD + b"\0\0", GOOD + b"\n", b"\n" + GOOD, GOOD.replace(b"\n", b"\r\n"), GOOD[:-1],
                 b"\0" + GOOD, other_lines, GOOD.replace(b"=", b"", 1)):  # fmt: skip
        assert refused(quote(text=text))[0] in ("malformed", "chain"), text[:60]
    lines = GOOD.split(b"\n")
    lines[1:3] = [lines[1] + lines[2]]
    assert refused(quote(text=b"\n".join(lines))) == ["malformed"]


def test_certificates_have_intels_names() -> None:
    for who, wanted in (("pck", "chain"), ("authority", "chain")):
        for common in (
            "Intel SGX PCK",
            "Intel SGX PCK Certificate ",
            "intel sgx pck certificate",
            "Intel SGX TCB Signing",
        ):
            made = holders({who: {"subject": domains.name(common)}})
            assert refused(quote(made)) == [wanted]
    accepted(quote(holders({"authority": {"subject": domains.name("Intel SGX PCK Processor CA")}})))
    other = holders({"signer": {"subject": domains.name("Intel SGX PCK Certificate")}})
    assert refused(quote(), collateral(other)) == ["chain"]
    leaf = enclaves.extension("551d13", enclaves.tlv(0x30)), enclaves.usage(enclaves.SIGNS)
    assert refused(quote(holders({"pck": {"extensions": leaf}}))) == ["chain"]  # no PCK extension


@pytest.mark.parametrize("who", ["root", "authority", "pck", "signer"])
def test_every_certificate_has_its_signature_and_time(who: str) -> None:
    def found(change: dict) -> set[str]:
        made = holders({who: change})
        root = hashlib.sha256(made["root"].der).digest()
        return set(refused(quote(made), collateral(made), [root]))

    assert found({"damage": 1}) == {"chain"}
    assert found({"ends": NOW - SECOND}) == {"expired"}
    assert found({"begins": NOW + SECOND}) == {"not-yet-valid"}
    assert found({"issuer": domains.name("Somebody")}) == {"chain"}
    if who != "root":
        assert found({"signer": ec.derive_private_key(5, ec.SECP256R1())}) == {"chain"}


def test_a_foreign_root_with_intels_names_is_refused() -> None:
    assert set(refused(quote(), collateral(), None)) == {"chain"}
    foreign = holders({"root": {"key": ec.derive_private_key(7, ec.SECP256R1())}})
    assert set(refused(quote(foreign), collateral(foreign))) == {"chain"}
    assert "chain" in refused(quote(), collateral(foreign))  # collateral by another root than the quote's
    assert "chain" in refused(quote(foreign), collateral())


def test_signatures_are_by_the_keys_that_they_should_be_by() -> None:
    stranger = ec.derive_private_key(9, ec.SECP256R1())
    own = HOLDERS | {"pck": replace(HOLDERS["pck"], key=stranger)}
    assert refused(quote(own)) == ["signature"]  # a QE report that somebody else has signed
    data = bytearray(quote())
    data[632 + 4 : 632 + 4 + 64] = domains.signature(stranger, bytes(data[:632]))
    assert refused(bytes(data)) == ["signature"]
    for r, s in ((0, 0), (0, 1), (2**256 - 1, 1), (1, 2**256 - 1)):
        data[636 : 636 + 64] = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        assert refused(bytes(data)) == ["signature"]
    data[636 + 64 : 636 + 128] = bytes(64)
    assert refused(bytes(data)) == ["malformed"]  # the point at infinity: anybody's signature holds
    p384 = holders({"pck": {"key": ec.derive_private_key(9, ec.SECP384R1())}})
    with pytest.raises(OverflowError):
        quote(p384)


def test_the_quoting_enclave_reports_the_key() -> None:
    """Without qe-binding anybody signs with a key of his own."""
    mine = ec.derive_private_key(11, ec.SECP256R1())
    genuine = hashlib.sha256(domains.point(domains.KEYS["quote"]) + bytes(range(32))).digest()
    assert refused(quote(key=mine, reported=genuine + bytes(32))) == ["qe-binding"]
    accepted(quote(key=mine))  # which it did report
    bound = hashlib.sha256(domains.point(domains.KEYS["quote"]) + b"other").digest()
    accepted(quote(auth=b"other", reported=bound + bytes(32)))
    assert refused(quote(reported=bound + bytes(32))) == ["qe-binding"]
    assert refused(quote(reported=genuine + b"\1" * 32)) == ["qe-binding"]
    assert refused(quote(reported=bytes(32) + genuine)) == ["qe-binding"]
    accepted(quote(auth=b""))


@pytest.mark.parametrize(
    "change",
    [{"ppid": bytes(15)}, {"fmspc": bytes(7)}, {"pceid": b""}, {"components": (1,) * 15}, {"components": (255,) * 17},
     {"more": domains.pair("01", enclaves.tlv(4, bytes(16)))}, {"more": enclaves.tlv(0x30, b"\6\1\x2a\5\0")},
     {"more": b"\5\0"}],
    ids=ascii,
)  # fmt: skip
def test_a_pck_extension_of_another_form_is_malformed(change: dict) -> None:
    leaf = enclaves.extension("551d13", enclaves.tlv(0x30)), enclaves.usage(enclaves.SIGNS)
    made = holders({"pck": {"extensions": (*leaf, platform(**change))}})
    assert refused(quote(made)) == ["malformed"]


def test_a_time_has_a_zone() -> None:
    with pytest.raises(TypeError):
        accepted(quote(), now=NOW.replace(tzinfo=None))


@given(st.binary(max_size=200))
def test_any_bytes_are_malformed(data: bytes) -> None:
    assert refused(data)[0] in ("malformed", "alg")
    assert refused(quote(), [data] * 7) == ["malformed"]
    assert refused(quote(), collateral(info=data)) == ["malformed"]


# --- collateral ---


def judged(parts: Sequence[bytes], **changes: Any) -> tdx.Statement:
    return accepted(quote(**changes), parts)


def test_collateral_is_all_seven_parts_or_none() -> None:
    parts = collateral()
    for some in (parts[:6], [*parts, b""], parts[:1], [b""], [b""] * 7, parts[::-1]):
        assert refused(quote(), some) == ["malformed"]
    for number, part in enumerate(parts):
        for other in (b"", part[:-1], part + b"\0"):
            found = refused(quote(), [*parts[:number], other, *parts[number + 1 :]])
            assert found in (["malformed"], ["signature"]), number


def test_revoked_certificates_are_refused() -> None:
    root, authority = HOLDERS["root"], HOLDERS["authority"]
    judged(collateral(root_list=revocations(root, 3, 77), pck_list=revocations(authority, 2, 4, 77)))  # others' serials
    for serial in (2, 4):
        assert refused(quote(), collateral(root_list=revocations(root, 77, serial))) == ["revoked"]
    assert refused(quote(), collateral(pck_list=revocations(authority, 3))) == ["revoked"]


def test_revocation_lists_are_their_signers() -> None:
    root, authority, signer = HOLDERS["root"], HOLDERS["authority"], HOLDERS["signer"]
    swapped = {"root_list": revocations(authority), "pck_list": revocations(root)}
    assert set(refused(quote(), collateral(**swapped))) == {"chain"}
    for change in (
        {"root_list": revocations(signer)}, {"pck_list": revocations(signer)},
        {"root_list": revocations(root, key=signer.key)}, {"pck_list": revocations(authority, key=root.key)},
        {"root_list": revocations(root, critical=True)}, {"pck_list": revocations(authority, critical=True)},
    ):  # fmt: skip
        assert set(refused(quote(), collateral(**change))) == {"chain"}
    assert refused(quote(), collateral(root_list=revocations(root, number=None))) == ["malformed"]


def test_entries_of_a_list_that_nobody_signed_are_not_read() -> None:
    authority, key = HOLDERS["authority"], HOLDERS["signer"].key
    serials = range(2500)
    broken = revocations(authority, *serials, key=key, behind=b"\5\0")
    assert 50_000 < len(broken) < 64 * 1024
    parts = collateral(pck_list=broken)
    assert refused(quote(), parts) == ["chain"]
    assert cost(lambda: tdx.examine(quote(), parts, [ROOT], NOW)) < 0.020
    assert refused(quote(), collateral(pck_list=revocations(authority, *serials, behind=b"\5\0"))) == ["malformed"]


EARLY: dict[str, Any] = {"begins": NOW + SECOND}
LATE: dict[str, Any] = {"ends": NOW - SECOND}


@pytest.mark.parametrize(
    "change",
    [
        *({listed: revocations(HOLDERS[who], **dates)}
          for listed, who in (("root_list", "root"), ("pck_list", "authority")) for dates in (EARLY, LATE)),
        *({text: {date: domains.date(NOW + delta)}} for text in ("info", "identity")
          for date, delta in (("issueDate", SECOND), ("nextUpdate", -SECOND))),
    ],
    ids=range(8),
)  # fmt: skip
def test_each_part_has_its_time(change: dict) -> None:
    assert refused(quote(), collateral(**change)) == ["collateral-expired"]


def test_the_bounds_of_a_parts_time_are_its_own() -> None:
    at = {"issueDate": domains.date(NOW), "nextUpdate": domains.date(NOW)}
    lists = {
        "root_list": revocations(HOLDERS["root"], begins=NOW, ends=NOW),
        "pck_list": revocations(HOLDERS["authority"], begins=NOW, ends=NOW),
    }
    judged(collateral(info=at, identity=at, **lists))
    for moment in (NOW + SECOND, NOW - SECOND):
        found = refused(quote(), collateral(info=at, identity=at, **lists), now=moment)
        assert found == ["collateral-expired"] * 4


def test_texts_are_signed_by_intels_signer() -> None:
    parts = collateral()
    stranger = domains.signature(HOLDERS["pck"].key, parts[0])
    assert refused(quote(), collateral(info_signature=stranger)) == ["signature"]
    assert refused(quote(), collateral(identity_signature=parts[1])) == ["signature"]  # the other text's
    assert refused(quote(), [parts[2], parts[3], parts[0], parts[1], *parts[4:]]) == ["malformed"]  # each the other's
    spaced = [parts[0] + b" ", *parts[1:]]
    assert refused(quote(), spaced) == ["signature"]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "SGX"}, {"id": "TD_QE"}, {"version": 2}, {"version": "3"}, {"version": 3.0}, {"version": True},
        {"issueDate": "yesterday"}, {"nextUpdate": None}, {"fmspc": "B0C06F0000"}, {"fmspc": 0}, {"pceId": "zzzz"},
        {"tcbEvaluationDataNumber": -1}, {"tcbEvaluationDataNumber": "17"}, {"tdxModule": None}, {"tdxModule": {}},
        {"tdxModuleIdentities": {}}, {"tcbLevels": None}, {"tcbLevels": [None]}, {"tcbLevels": [firmware("Fine")]},
        {"tcbLevels": [firmware(sgx=(1,) * 15)]}, {"tcbLevels": [firmware(tdx=(1,) * 17)]},
        {"tcbLevels": [firmware(sgx=(256,) * 16)]}, {"tcbLevels": [firmware(pcesvn=-1)]},
        {"tcbLevels": [firmware() | {"advisoryIDs": "INTEL-SA-1"}]}, {"tcbLevels": [firmware()] * 65},
        {"tcbLevels": [firmware("OutOfDate", "\x1b[2J")]}, {"tcbLevels": [firmware("OutOfDate", "\ud800")]},
        {"tcbLevels": [firmware() | {"tcbStatus": None}]}, {"tcbLevels": [{"tcbStatus": "UpToDate"}]},
        {"tdxModuleIdentities": [{"id": 1}]}, {"tdxModuleIdentities": [module(mrsigner="00")]},
        {"tdxModuleIdentities": [module(attributesMask=None)]}, {"tdxModuleIdentities": [module("01", level())]},
    ],
    ids=lambda change: ascii(change)[:50],
)  # fmt: skip
def test_tcb_info_of_another_form_is_malformed(change: dict) -> None:
    if "tdxModule" in change:  # which is read only where there are no modules with numbers
        data = quote(tee_tcb_svn=b"\6\0\3" + bytes(13))
    else:
        data = quote()
    assert refused(data, collateral(info=change)) == ["malformed"]


@pytest.mark.parametrize(
    "change",
    [{"id": "TDX"}, {"id": "QE"}, {"version": 3}, {"mrsigner": "00"}, {"isvprodid": "2"}, {"attributes": "11"},
     {"attributesMask": "FF"}, {"miscselect": None}, {"miscselectMask": "FFFFFFFFFF"}, {"tcbLevels": {}},
     {"tcbLevels": [level("Fine", isvsvn=4)]}, {"tcbLevels": [level(isvsvn="4")]}, {"tcbEvaluationDataNumber": None}],
    ids=ascii,
)  # fmt: skip
def test_a_qe_identity_of_another_form_is_malformed(change: dict) -> None:
    assert refused(quote(), collateral(identity=change)) == ["malformed"]


def test_a_key_twice_refuses() -> None:
    for which, text in (("info", domains.info()), ("identity", domains.identity())):
        data = json.dumps(text).encode()
        judged(collateral(**{which: data}))
        for twice in (b'{"id": "TDX", ' + data[1:], data.replace(b'"svn"', b'"svn": 0, "svn"'),
                      data.replace(b'"isvsvn"', b'"isvsvn": 0, "isvsvn"')):  # fmt: skip
            if twice != data:
                assert refused(quote(), collateral(**{which: twice})) == ["malformed"]


def test_collateral_is_of_this_kind_of_processor() -> None:
    assert refused(quote(), collateral(info={"fmspc": "B0C06F000001"})) == ["fmspc"]
    assert refused(quote(), collateral(info={"pceId": "0001"})) == ["fmspc"]
    leaf = enclaves.extension("551d13", enclaves.tlv(0x30)), enclaves.usage(enclaves.SIGNS)
    other = holders({"pck": {"extensions": (*leaf, platform(fmspc=b"\1" * 6, pceid=b"\0\1"))}})
    assert refused(quote(other), collateral(other)) == ["fmspc", "fmspc"]
    judged(collateral(other, info={"fmspc": "01" * 6, "pceId": "0001"}), made=other)


def less(values: Sequence[int], index: int, by: int = 1) -> tuple[int, ...]:
    return tuple(value - by * (i == index) for i, value in enumerate(values))


@pytest.mark.parametrize("index", range(16))
def test_every_component_of_the_firmware_counts(index: int) -> None:
    higher = firmware(sgx=less(domains.COMPONENTS, index, -1))
    assert refused(quote(), collateral(info={"tcbLevels": [higher]})) == ["tcb"]
    judged(collateral(info={"tcbLevels": [firmware(sgx=(0,) * 16)]}))


@pytest.mark.parametrize("index", range(16))
def test_every_component_of_tdx_counts(index: int) -> None:
    own = domains.TEE_TCB_SVN
    higher = collateral(info={"tcbLevels": [firmware(tdx=less(own, index, -1))]})
    if index < 2:  # the module's, which its identity judges
        judged(higher)
        plain = b"\6\0\3" + bytes(13)  # but not where modules have no numbers
        higher = collateral(info={"tcbLevels": [firmware(tdx=less(plain, index, -1))]})
        assert refused(quote(tee_tcb_svn=plain), higher) == ["tcb"]
        judged(collateral(info={"tcbLevels": [firmware(tdx=tuple(plain))]}), tee_tcb_svn=plain)
    else:
        assert refused(quote(), higher) == ["tcb"]


def test_versions_are_the_pck_certificates_not_the_reports() -> None:
    assert refused(quote(), collateral(info={"tcbLevels": [firmware(pcesvn=12)]})) == ["tcb"]
    leaf = enclaves.extension("551d13", enclaves.tlv(0x30)), enclaves.usage(enclaves.SIGNS)
    old = holders({"pck": {"extensions": (*leaf, platform(pcesvn=10))}})
    assert refused(quote(old), collateral(old)) == ["tcb"]


def test_the_highest_level_that_fits_counts_in_whatever_order() -> None:
    levels = [
        firmware("UpToDate", sgx=less(domains.COMPONENTS, 0, -1)),  # too high
        firmware("SWHardeningNeeded", "INTEL-SA-2"),
        firmware("OutOfDate", "INTEL-SA-3", pcesvn=5),
        firmware("Revoked", sgx=(0,) * 16, pcesvn=0),
    ]
    for order in (levels, levels[::-1]):
        statement = judged(collateral(info={"tcbLevels": order}))
        assert (statement.status, statement.advisories) == ("SWHardeningNeeded", ("INTEL-SA-2",))
    assert refused(quote(), collateral(info={"tcbLevels": levels[:1]})) == ["tcb"]
    assert refused(quote(), collateral(info={"tcbLevels": []})) == ["tcb"]


def test_the_module_is_one_that_intel_knows() -> None:
    def found(*identities: dict, svn: str = "0601") -> list[str]:
        own = bytes.fromhex(svn) + b"\3" + bytes(13)
        return refused(quote(tee_tcb_svn=own), collateral(info={"tdxModuleIdentities": list(identities)}))

    assert found() == found(module("03")) == ["tcb"]
    assert found(module("01", level(isvsvn=7))) == ["tcb"]
    assert found(module(mrsigner="00" * 47 + "01")) == ["module"]
    assert found(module(attributes="00" * 7 + "01")) == ["module"]
    ten = [module("0a"), module("0A")]
    for each in ten:
        judged(collateral(info={"tdxModuleIdentities": [each]}), tee_tcb_svn=b"\6\x0a\3" + bytes(13))
    assert found(module(), svn="0602") == ["tcb"]
    signed = quote(mrsignerseam=b"\1" * 48, seam_attributes=b"\1" + bytes(7))
    assert refused(signed, collateral()) == ["module"]
    masked = module(attributesMask="00" * 8, mrsigner="01" * 48)
    statement = accepted(signed, collateral(info={"tdxModuleIdentities": [masked]}))
    assert [name for name, _ in tdx.failures(statement, ANY_CODE)] == ["mrsignerseam", "seam_attributes"]
    plain = quote(tee_tcb_svn=b"\6\0\3" + bytes(13), mrsignerseam=b"\1" * 48)
    assert refused(plain, collateral()) == ["module"]  # without a number, tdxModule says


def test_the_quoting_enclave_is_intels() -> None:
    for change in (
        {"mrsigner": bytes(32)},
        {"isvprodid": 1},
        {"attributes": b"\x13" + bytes(15)},
        {"miscselect": b"\1" * 4},
    ):
        assert refused(quote(qe=change), collateral()) == ["qe-identity"]
        accepted(quote(qe=change))  # nothing says so without collateral, which is required
    judged(collateral(), qe={"attributes": b"\x15" + bytes(7) + b"\xff" * 8})  # outside the mask
    assert refused(quote(qe={"isvsvn": 3}), collateral()) == ["tcb"]
    judged(collateral(), qe={"isvsvn": 9})


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("where", ["module", "platform", "enclave"])
def test_each_status_of_each_part_counts_and_must_be_named(where: str, status: str) -> None:
    advisory = () if status == "UpToDate" else (f"INTEL-SA-{where}",)
    change: dict[str, Any] = {
        "module": {"info": {"tdxModuleIdentities": [module("01", level(status, *advisory, isvsvn=6))]}},
        "platform": {"info": {"tcbLevels": [firmware(status, *advisory)]}},
        "enclave": {"identity": {"tcbLevels": [level(status, *advisory, isvsvn=4)]}},
    }[where]
    statement = judged(collateral(**change))
    assert (statement.status, statement.advisories) == (status, advisory)
    assert differing(ANY_CODE, statement) == ([] if status == "UpToDate" else ["statuses"])
    named = PINS | {"statuses": [status], "advisories": list(advisory)}
    assert differing(named, statement) == (["statuses"] if status == "Revoked" else [])
    if status not in ("UpToDate", "Revoked"):
        assert differing(PINS | {"statuses": [status]}, statement) == ["advisories"]
        assert differing(PINS | {"statuses": [status], "advisories": ["INTEL-SA-0"]}, statement) == ["advisories"]
        others = [each for each in STATUSES if each not in (status, "Revoked")]
        assert differing(PINS | {"statuses": others, "advisories": list(advisory)}, statement) == ["statuses"]


def test_the_worst_status_counts_with_all_advisories() -> None:
    for first, second in itertools.pairwise(STATUSES):
        for platform_, enclave, seam in ((first, second, first), (second, first, first), (first, first, second)):
            statement = judged(
                collateral(
                    info={
                        "tcbLevels": [firmware(platform_, "B")],
                        "tdxModuleIdentities": [module("01", level(seam, "C", isvsvn=6))],
                    },
                    identity={"tcbLevels": [level(enclave, "A", "B", isvsvn=4)]},
                )
            )
            assert (statement.status, statement.advisories) == (second, ("A", "B", "C"))


def test_the_older_of_two_evaluations_counts() -> None:
    for info, identity in ((17, 18), (18, 17)):
        numbers = ({"tcbEvaluationDataNumber": number} for number in (info, identity))
        statement = judged(collateral(**dict(zip(("info", "identity"), numbers, strict=True))))
        assert statement.tcb_evaluation == 17


def test_replayed_collateral_is_below_the_pinned_numbers() -> None:
    """Anybody may deliver an old one until its end; the manifest's numbers do not go back."""
    parts = collateral(
        info={"tcbEvaluationDataNumber": 16}, root_list=revocations(HOLDERS["root"], number=4),
        pck_list=revocations(HOLDERS["authority"], number=9),
    )  # fmt: skip
    statement = judged(parts)
    assert differing(PINS, statement) == ["min_tcb_evaluation"]
    assert differing(PINS | {"min_tcb_evaluation": 16}, statement) == []
    for root, pck, wanted in ((4, 9, []), (5, 9, ["min_crl_numbers"]), (4, 10, ["min_crl_numbers"])):
        numbers = {"min_tcb_evaluation": 16, "min_crl_numbers": {"root": root, "pck": pck}}
        assert differing(PINS | numbers, statement) == wanted


# --- pins ---

STATEMENT = tdx.authenticate(quote(version=5, kind=3), collateral(), [ROOT], NOW)
REQUIRED = ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "td_attributes", "xfam")
OPTIONAL = ("mrseam", "mrconfigid", "mrowner", "mrownerconfig", "mrservicetd", "ppid")
HEX = {name: getattr(STATEMENT, name).hex() for name in (*REQUIRED, *OPTIONAL)}
PINS = {"provider": "tdx", "covers": "image", "min_tcb_evaluation": 17} | {name: HEX[name] for name in REQUIRED}


def differing(pins, statement=STATEMENT, **options) -> list[str]:
    found = [reason for reason, _ in tdx.failures(statement, pins, **options)]
    if found:
        with pytest.raises(PolicyError) as caught:
            tdx.appraise(statement, pins, **options)
        assert [reason for reason, _ in caught.value.failures] == found
    else:
        tdx.appraise(statement, pins, **options)
    return found


def test_what_was_pinned_is_accepted() -> None:
    assert differing(PINS) == differing(HEX) == differing(ANY_CODE) == []
    assert differing({"rtmr3": "00" * 48}) == []  # what starts at zero may be pinned to it


@pytest.mark.parametrize("name", HEX)
def test_every_pin_is_compared(name: str) -> None:
    other = HEX[name][:-1] + ("1" if HEX[name][-1] == "0" else "0")
    assert differing(HEX | {name: other}) == [name]
    assert differing({name: other}) == [name]


def test_a_pinned_register_that_is_absent_refuses() -> None:
    plain = tdx.authenticate(quote(), collateral(), [ROOT], NOW)
    for value in ("00" * 48, HEX["mrservicetd"], "none", None, ""):
        assert differing(PINS | {"mrservicetd": value}, plain) == ["mrservicetd"]


def test_a_pin_that_would_not_be_compared_refuses() -> None:
    for name in ("rtmr4", "MRTD", "measurement", "allow_debug", "allow_no_collateral", "report_data", "debug", ""):
        assert differing(PINS | {name: "none"}) == [name]
    for value in (None, b"\1" * 48, True, [HEX["mrtd"]], "", "none"):
        assert differing(PINS | {"mrtd": value}) == ["mrtd"]
    for number in (None, "17", True, 17.0, 18, [17]):
        assert differing(PINS | {"min_tcb_evaluation": number}) == ["min_tcb_evaluation"]
    for numbers in (None, {}, [], 1, {"root": "1"}, {"other": 0}, {"pck": None}):
        assert differing(PINS | {"min_crl_numbers": numbers}) == ["min_crl_numbers"]
    for name in ("statuses", "advisories"):
        assert differing(PINS | {name: "OutOfDate"}) == [name]
    assert differing({}) == differing({"covers": "image", "provider": "tdx"}) == ["pins"]
    assert differing({"min_tcb_evaluation": 18}) == ["min_tcb_evaluation"]
    assert differing(PINS | {"covers": "nothing", "provider": "snp"}) == ["provider", "covers"]


@pytest.mark.parametrize("bit", range(64))
def test_debug_and_migration_are_refused(bit: int) -> None:
    statement = replace(STATEMENT, td_attributes=(1 << bit).to_bytes(8, "little"))
    wanted = ["debug"] if bit < 8 else ["migratable"] if bit == 29 else []
    assert differing(ANY_CODE, statement) == wanted
    assert differing(ANY_CODE, statement, allow_debug=True) == (wanted if bit == 29 else [])
    assert differing({"td_attributes": statement.td_attributes.hex()}, statement) == wanted


def test_missing_collateral_is_refused_unless_allowed() -> None:
    bare = tdx.authenticate(quote(), (), [ROOT], NOW)
    assert differing(ANY_CODE, bare) == ["collateral-required"]
    assert differing(ANY_CODE, bare, allow_no_collateral=True) == []
    assert differing(PINS, bare, allow_no_collateral=True) == ["min_tcb_evaluation"]
    assert differing({"mrtd": HEX["mrtd"]}, bare, allow_no_collateral=True) == []
    for pins in ({"statuses": ["OutOfDate"]}, {"advisories": []}):
        assert differing(pins, bare, allow_no_collateral=True) == ["statuses"]  # pinned, and not compared with anything


def test_sentences_say_got_and_wanted() -> None:
    other = replace(STATEMENT, td_attributes=b"\xff" * 8, mrsignerseam=b"\1" * 48, status="OutOfDate", mrtd=bytes(48))
    failures = tdx.failures(other, PINS | {"min_tcb_evaluation": 99})
    names = ["debug", "migratable", "mrsignerseam", "statuses", "min_tcb_evaluation", "mrtd", "td_attributes"]
    assert [reason for reason, _ in failures] == names
    for reason, sentence in failures:
        assert sentence.startswith(f"{reason}: got ")
        assert "wanted" in sentence


def read(**changes: Any) -> TdxPins:
    edited = {name: value for name, value in (PINS | changes).items() if value is not ...}
    return TdxPins.read(load("m", json.dumps(edited).encode(), 10000))


def test_pins_survive_the_manifest() -> None:
    more = HEX | {"min_crl_numbers": {"root": 1, "pck": 2}, "statuses": ["OutOfDate"], "advisories": ["INTEL-SA-1"]}
    for changes in ({}, more, {"covers": "initdata", "mrconfigid": HEX["mrconfigid"]}, {"rtmr1": "00" * 48}):
        assert read(**changes).to_json() == PINS | changes
    assert tdx.pinned(STATEMENT).to_json() == PINS


@pytest.mark.parametrize(
    "change",
    [{"covers": ...}, {"covers": "disk"}, {"covers": "initdata"}, {"covers": "initdata", "mrconfigid": "00" * 48},
     *({name: ...} for name in (*REQUIRED, "min_tcb_evaluation")), {"mrtd": "00" * 48}, {"mrtd": ["01" * 48]},
     {"mrtd": "01" * 47}, {"xfam": "00" * 7}, {"td_attributes": "0100001000000000"},
     {"td_attributes": "0000002000000000"}, {"td_attributes": "8000000000000000"}, {"min_tcb_evaluation": 0},
     {"min_tcb_evaluation": "17"}, {"ppid": "00" * 15},
     {"min_crl_numbers": 1}, {"min_crl_numbers": {"root": 1}}, {"min_crl_numbers": {"root": 1, "pck": 1, "x": 1}},
     {"statuses": "OutOfDate"}, {"statuses": []}, {"statuses": ["Revoked"]}, {"statuses": ["outofdate"]},
     {"advisories": [1]}, {"allow_debug": True}, {"allow_no_collateral": True}, {"report_data": "00" * 64},
     {"roots": []}],
    ids=ascii,
)  # fmt: skip
def test_other_pins_are_refused(change: dict) -> None:
    with pytest.raises(DocumentError):
        read(**change)


def test_a_plan_warns_of_what_is_weak() -> None:
    assert read().warnings == []
    (one,) = read(td_attributes="00" * 8).warnings
    assert "SEPT_VE_DISABLE" in one
    (one,) = read(rtmr1="00" * 48, rtmr2="00" * 48).warnings
    assert one.startswith("rtmr1 and rtmr2 zero")
    assert "MRTD must cover" in one


# --- the verifier of a link ---

CLAIMS = b"\x81\xa5stage\x00"  # {"stage": 0}
BINDING = Binding("R", Provider.TDX, b"h" * 32, b"s" * 32, CLAIMS)
VERIFIER = TdxVerifier(TdxPins(PINS), CLAIMS, roots=frozenset([ROOT]), clock=NOW.timestamp)


def shown(parts: Sequence[bytes] | None = None, **changes: Any) -> Evidence:
    made = quote(**({"report_data": BINDING.digest} | changes))
    return Evidence(Provider.TDX, CLAIMS, made, tuple(collateral() if parts is None else parts))


def test_bound_evidence_is_accepted() -> None:
    result = VERIFIER.verify(shown(), BINDING)
    assert (result.provider, result.measurement, result.debug) == (Provider.TDX, domains.BODY["mrtd"], False)
    assert (result.claims, result.timestamp_ms) == (CLAIMS, None)
    assert dict(result.registers) == {
        name: bytes.fromhex(value) for name, value in HEX.items() if name != "mrservicetd"
    }


@pytest.mark.parametrize(
    "change", [{"role": "I"}, {"handshake_hash": bytes(32)}, {"static_key": bytes(32)}, {"provider": 1}]
)
def test_evidence_of_another_session_or_end_is_refused(change: dict) -> None:
    assert reasons(lambda: VERIFIER.verify(shown(), replace(BINDING, **change)))[0] == "binding"


def test_report_data_binds() -> None:
    for value in (bytes(64), BINDING.digest[:63] + b"\0", BINDING.digest[::-1]):
        assert reasons(lambda v=value: VERIFIER.verify(shown(report_data=v), BINDING)) == ["binding"]


def test_altered_claims_are_refused() -> None:
    other = b"\x81\xa5stage\x01"
    assert reasons(lambda: VERIFIER.verify(replace(shown(), claims=other), BINDING)) == ["binding", "claim 'stage'"]
    binding = replace(BINDING, claims=other)  # honestly bound: authentic, and not what the manifest says
    with pytest.raises(PolicyError) as caught:
        VERIFIER.verify(replace(shown(report_data=binding.digest), claims=other), binding)
    assert [reason for reason, _ in caught.value.failures] == ["claim 'stage'"]


def test_other_code_is_a_policy_error_and_forged_evidence_is_none() -> None:
    with pytest.raises(PolicyError, match=r"rtmr2: got 6363.* wanted 1212"):
        VERIFIER.verify(shown(rtmr2=b"c" * 48), BINDING)
    with pytest.raises(PolicyError, match="debug: got on"):
        VERIFIER.verify(shown(td_attributes=b"\1" + bytes(7)), BINDING)
    with pytest.raises(PolicyError, match="collateral-required"):
        VERIFIER.verify(shown(()), BINDING)
    stranger = replace(VERIFIER, roots=tdx.ROOTS)
    found = reasons(lambda: stranger.verify(shown(mrtd=b"c" * 48, report_data=bytes(64)), BINDING))
    assert list(dict.fromkeys(found)) == ["chain", "binding", "statuses", "min_tcb_evaluation", "mrtd"]
    assert reasons(lambda: VERIFIER.verify(replace(shown(), provider=1), BINDING)) == ["provider"]
    assert reasons(lambda: VERIFIER.verify(replace(shown(), endorsements=(b"",)), BINDING)) == ["malformed"]


def test_a_verifier_believes_intel_and_the_clock_by_default() -> None:
    verifier = TdxVerifier.of_stage(TdxPins(PINS), CLAIMS, 0, time.time)
    assert verifier.roots == {bytes.fromhex("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3")}
    with pytest.raises(AttestationError):
        verifier.verify(shown(), BINDING)


# --- a link ---


class Attester:
    """As a trust domain that signs with the tests' keys."""

    provider = Provider.TDX
    claims = CLAIMS

    def __init__(self, parts: Sequence[bytes], **changes: Any) -> None:
        self.parts, self.changes = parts, changes

    def attest(self, binding: Binding) -> Evidence:
        return shown(self.parts, **({"report_data": binding.digest} | self.changes))


def test_a_link_to_a_trust_domain_is_established() -> None:
    one, two = meet(client(verifier=VERIFIER), stage(attester=Attester(collateral())))
    assert one.session is not None
    assert two.session is not None


@pytest.mark.parametrize(
    ("attester", "word"),
    [
        (Attester(collateral(), mrtd=b"x" * 48), "mrtd: got 7878"),
        (Attester(()), "collateral-required"),
        (Attester(collateral(), report_data=bytes(64)), "binding"),
        (Attester(collateral(info={"tcbEvaluationDataNumber": 3})), "min_tcb_evaluation"),
        (Attester(collateral(info={"nextUpdate": domains.date(NOW - SECOND)})), "collateral-expired"),
    ],
)
def test_a_link_to_anything_else_is_not(attester: Attester, word: str) -> None:
    one, two = meet(client(verifier=VERIFIER), stage(attester=attester))
    assert one.session is None
    assert word in str(one.error) + str(one.error.__cause__)
    assert two.session is None
