"""The readers of CBOR, DER, X.509 and ECDSA: strict, and wherever they accept, others read the same."""

import hashlib
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import enclaves
import oracles
import pytest
from Crypto.Hash import SHA256, SHA384
from Crypto.IO import PEM
from Crypto.PublicKey import RSA
from cryptography.hazmat.primitives.asymmetric import ec
from enclaves import NOW, authority, cbor, chain, extension, integer, tlv, usage
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import cbor_agrees, certificate_agrees

from attest import EvidenceError, ecdsa, x509
from attest import cbor as our_cbor
from attest.der import SEQUENCE, Reader
from attest.x509 import Certificate

# --- CBOR ---

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.integers(-(2**64), 2**64 - 1) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def depth(value) -> int:
    if not isinstance(value, list | dict):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@given(VALUES)
def test_every_value_of_the_subset_is_read(value) -> None:
    data = cbor(value)
    if depth(value) <= our_cbor.MAX_DEPTH:
        assert repr(our_cbor.read(data)) == repr(value)
        cbor_agrees(data, value)
    else:
        with pytest.raises(EvidenceError):
            our_cbor.read(data)


@given(st.binary(max_size=60))
@example(b"\xbf\x01\x02\xff")
@example(b"\x9f\x01\xff")
@example(b"\x9b" + b"\xff" * 8)
@example(b"\xbb" + b"\xff" * 8)
@example(b"\x5b" + b"\xff" * 8)
def test_any_bytes_are_read_as_by_others_or_refused(data: bytes) -> None:
    try:
        value = our_cbor.read(data)
    except EvidenceError as error:
        assert error.reason == "malformed"
    else:
        cbor_agrees(data, value)


@pytest.mark.parametrize(
    "data",
    [
        "", "18", "1817", "1900ff", "1a0000ffff", "1b00000000ffffffff", "1c", "1f", "3817", "5f41004100ff", "7f6161ff",
        "5801", "580141", "6180", "62c080", "63eda080", "80ff", "9f", "9f01", "bf", "bf01ff", "c000", "c24101", "8080",
        "e0", "f0", "f7", "f800", "f814", "f90000", "fa00000000", "fb0000000000000000", "fc", "ff", "0000", "f6f6",
        "a1f600", "a14100", "a1f500", "a18000", "a1a000", "a201000100", "a2616100616100", "bf010001ff", "8181818181",
        "d83d00", "a101", "8201", "9f9f9f9f9fffffffffff", "99012c" + "00" * 300,
    ],
)  # fmt: skip
def test_what_is_not_cbor_in_its_one_form_is_refused(data: str) -> None:
    with pytest.raises(EvidenceError):
        our_cbor.read(bytes.fromhex(data))


def test_a_number_has_its_shortest_head() -> None:
    for number in (0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1):
        assert our_cbor.head(0, number) == cbor(number)
        assert our_cbor.read(our_cbor.head(0, number)) == number
    assert our_cbor.byte_string(b"x" * 300) == cbor(b"x" * 300)


# --- DER ---


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("integer", "0200"), ("integer", "0201ff"), ("integer", "02020001"), ("integer", "0202"), ("integer", "028100"),
        ("integer", "02810101"), ("integer", "0282000101"), ("integer", "0280010000"), ("integer", "0285000000000101"),
        ("integer", "02ff01"), ("integer", "030101"), ("integer", "02"), ("integer", ""), ("boolean", "010101"),
        ("boolean", "0100"), ("boolean", "01020000"), ("optional_true", "010100"), ("oid", "0600"), ("oid", "060180"),
        ("oid", "06022a80"), ("oid", "06032a8001"), ("oid", "0640" + "01" * 64), ("bits", "0300"), ("bits", "03020101"),
        ("bits", "030101"), ("named_bits", "030100"), ("named_bits", "03020801"), ("named_bits", "03020101"),
        ("text", ""), ("text", "0401ff"), ("text", "0c01ff"), ("text", "1301ff"), ("text", "1e020041"),
        ("time", "1700"), ("time", "170b" + b"2701010000Z".hex()), ("time", "170d" + b"270101000000+".hex()),
        ("time", "170d" + b"270230000000Z".hex()), ("time", "170d" + b"27010100006 Z".hex()),
        ("time", "170d" + b"270101000060Z".hex()), ("time", "1711" + b"270101000000+0000".hex()),
        ("time", "180f" + b"20270101000000Z".hex()), ("time", "180f" + b"00000101000000Z".hex()),
    ],
)  # fmt: skip
def test_what_is_not_der_in_its_one_form_is_refused(method: str, data: str) -> None:
    with pytest.raises(EvidenceError):
        getattr(Reader(bytes.fromhex(data)), method)()


def test_der_is_read() -> None:
    assert Reader(bytes.fromhex("02020080")).integer() == 128
    assert Reader(bytes.fromhex("0609608648016503040202")).oid() == "2.16.840.1.101.3.4.2.2"
    assert Reader(bytes.fromhex("06032b0601")).oid() == "1.3.6.1"
    assert Reader(bytes.fromhex("0603883703")).oid() == "2.999.3"
    assert Reader(bytes.fromhex("03020186")).named_bits() == {0, 5, 6}
    assert Reader(tlv(23, b"491231235959Z")).time() == datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert Reader(tlv(23, b"500101000000Z")).time() == datetime(1950, 1, 1, tzinfo=UTC)
    assert Reader(tlv(24, b"20500101000000Z")).time() == datetime(2050, 1, 1, tzinfo=UTC)
    long = tlv(4, bytes(70000))
    reader = Reader(tlv(SEQUENCE, long)).inside(SEQUENCE)
    assert reader.whole(4) == long
    assert not reader.more
    reader.end()


# --- ECDSA and PSS ---


def cases(vectors: Path, name: str) -> list[tuple[dict, dict]]:
    groups = json.loads((vectors / "wycheproof" / name).read_text())["testGroups"]
    return [(group, case) for group in groups for case in group["tests"]]


@pytest.mark.parametrize(
    ("name", "curve", "hasher"),
    [
        ("ecdsa_secp256r1_sha256_p1363_test.json", "P-256", SHA256),
        ("ecdsa_secp384r1_sha384_p1363_test.json", "P-384", SHA384),
    ],
)
def test_ecdsa_agrees_with_wycheproof(vectors: Path, name: str, curve: str, hasher) -> None:
    size, seen = ecdsa.SIZE[curve], 0
    for group, case in cases(vectors, name):
        signature = bytes.fromhex(case["sig"])
        if len(signature) != 2 * size:  # a reader's check: what it hands on are two numbers
            assert case["result"] == "invalid"
            continue
        key = ecdsa.public_key(curve, bytes.fromhex(group["publicKey"]["uncompressed"])[1:])
        r, s = int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big")
        accepted = ecdsa.is_signed(key, hasher, bytes.fromhex(case["msg"]), r, s)
        assert accepted == (case["result"] == "valid"), case
        seen += 1
    assert seen > 200


def test_ecdsa_in_der_agrees_with_wycheproof(vectors: Path) -> None:
    seen = 0
    for group, case in cases(vectors, "ecdsa_secp384r1_sha384_test.json"):
        key = ecdsa.public_key("P-384", bytes.fromhex(group["publicKey"]["uncompressed"])[1:])
        try:
            r, s = x509._signature(enclaves.SHA384_ECDSA, bytes.fromhex(case["sig"]))
            accepted = ecdsa.is_signed(key, SHA384, bytes.fromhex(case["msg"]), r, s)
        except EvidenceError:
            accepted = False
        assert accepted == (case["result"] == "valid"), case
        seen += 1
    assert seen > 400


def test_pss_agrees_with_wycheproof(vectors: Path) -> None:
    seen = 0
    for group, case in cases(vectors, "rsa_pss_4096_sha384_mgf1_48_test.json"):
        key = RSA.construct((int(group["publicKey"]["modulus"], 16), int(group["publicKey"]["publicExponent"], 16)))
        accepted = x509.is_signed_pss(key, bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
        assert accepted == (case["result"] == "valid"), case
        seen += 1
    assert seen > 100


@pytest.mark.parametrize("curve", ["P-256", "P-384"])
def test_numbers_out_of_range_and_points_off_the_curve_are_refused(curve: str) -> None:
    size = ecdsa.SIZE[curve]
    private = ec.generate_private_key({"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}[curve])
    numbers = private.public_key().public_numbers()
    point = numbers.x.to_bytes(size, "big") + numbers.y.to_bytes(size, "big")
    key, order = ecdsa.public_key(curve, point), ecdsa._ORDER[f"NIST {curve}"]
    for r, s in ((0, 1), (1, 0), (0, 0), (order, 1), (1, order), (-1, 1), (2**600, 1), (order, order)):
        assert not ecdsa.is_signed(key, SHA384, b"m", r, s)
    for other in (point[:-1], point + b"\0", bytes(2 * size), point[:-1] + bytes([point[-1] ^ 1]), b"\xff" * 2 * size):
        with pytest.raises(EvidenceError):
            ecdsa.public_key(curve, other)


def test_a_point_has_one_form() -> None:
    """x + p is x modulo p: the library takes both, and so two keys would look different and be one."""
    p = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
    y = 31468013646237722594854082025316614106172411895747863909393730389177298123724
    ecdsa.public_key("P-256", (5).to_bytes(32, "big") + y.to_bytes(32, "big"))
    with pytest.raises(EvidenceError):
        ecdsa.public_key("P-256", (5 + p).to_bytes(32, "big") + y.to_bytes(32, "big"))


# --- X.509 ---


def genuine(vectors: Path) -> list[bytes]:
    """Every certificate of the samples."""
    found = [path.read_bytes() for path in sorted(vectors.glob("snp/*v[cl]ek.der"))]
    for path in sorted(vectors.glob("*/*.pem")):
        for block in path.read_text().split("-----END CERTIFICATE-----")[:-1]:
            found.append(PEM.decode(block[block.index("-----BEGIN") :] + "-----END CERTIFICATE-----")[0])
    for path in sorted(vectors.glob("nitro/*.bin")):
        payload = our_cbor.read(our_cbor.read(path.read_bytes())[2])
        found += [payload["certificate"], *payload["cabundle"]]
    assert len(found) > 25
    return found


def test_genuine_certificates_are_read_as_by_others(vectors: Path) -> None:
    for data in genuine(vectors):
        certificate_agrees(data, Certificate.read(data))


def agrees_or_refused(data: bytes) -> bool:
    try:
        ours = Certificate.read(data)
    except EvidenceError:
        return False
    certificate_agrees(data, ours)
    return True


def test_altered_certificates_are_read_as_by_others_or_refused(vectors: Path) -> None:
    chance, accepted = random.Random(0), 0
    for data in genuine(vectors) + [holder.der for holder in enclaves.CHAIN]:
        for _ in range(60):
            changed = bytearray(data)
            for _ in range(chance.choice((1, 1, 2))):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            accepted += agrees_or_refused(bytes(changed))
    assert accepted > 100


@given(st.binary(max_size=200))
def test_any_bytes_are_no_certificate(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        Certificate.read(data)


MALFORMED: dict[str, dict[str, Any]] = {
    "version 1": {"version": b""},
    "version 2": {"version": tlv(0xA0, integer(1))},
    "a negative serial number": {"serial": tlv(2, b"\xff")},
    "a serial number of 21 bytes": {"serial": integer(1 << 160)},
    "another algorithm inside": {"inner_algorithm": enclaves.SHA256_ECDSA},
    "a parameter of the algorithm": {"algorithm": tlv(0x30, enclaves.SHA384_ECDSA[2:], b"\x05\0")},
    "RSA PKCS 1": {"algorithm": bytes.fromhex("300d06092a864886f70d01010c0500")},
    "an extension twice": {"extensions": (usage("03020780"), usage("03020780"))},
    "no extensions in their place": {"extensions": (b"",)},
    "critical false spelled out": {
        "extensions": (tlv(0x30, tlv(6, bytes.fromhex("551d0f")), tlv(1, b"\0"), tlv(4, bytes.fromhex("03020780"))),)
    },
    "path length of no authority": {"extensions": (extension("551d13", tlv(0x30, integer(0))),)},
    "CA false spelled out": {"extensions": (extension("551d13", tlv(0x30, tlv(1, b"\0"))),)},
    "17 extensions": {"extensions": tuple(extension(f"2a03{i:02x}", b"", False) for i in range(17))},
    "a compressed point": {"point": b"\x02" + bytes(48)},
    "a point off the curve": {"point": b"\x04" + b"\1" * 96},
    "a short point": {"point": b"\x04" + b"\1" * 95},
    "a name in BMP": {"subject": enclaves.name("AA", 30)},
    "two attributes in a set": {"subject": tlv(0x30, tlv(0x31, *2 * (tlv(0x30, tlv(6, b"\x55\4\3"), tlv(12, b"a")),)))},
    "a year 2050 in two digits": {"begins": NOW.replace(year=2060), "ends": NOW.replace(year=2061)},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_certificate_is_refused(name: str) -> None:
    if name == "a year 2050 in two digits":
        certificate = Certificate.read(chain({"leaf": MALFORMED[name]})[-1].der)  # the control: four digits
        assert certificate.not_after.year == 2061
        return
    with pytest.raises(EvidenceError) as caught:
        Certificate.read(chain({"leaf": MALFORMED[name]})[-1].der)
    assert caught.value.reason == "malformed"


def test_a_certificate_is_of_bounded_size() -> None:
    padding = extension("2a03", bytes(4096), False)
    with pytest.raises(EvidenceError, match="at most 4096"):
        Certificate.read(chain({"leaf": {"extensions": (padding,)}})[-1].der)


def path(changes=None, roots=None, now=NOW, pick=lambda holders: holders) -> list[tuple[str, str]]:
    holders = pick(chain(changes or {}))
    certificates = [Certificate.read(holder.der) for holder in reversed(holders)]
    root = hashlib.sha256(holders[0].der).digest()
    return x509.path(certificates, [root] if roots is None else roots, now)


def test_a_good_chain_is_accepted() -> None:
    assert path() == []
    assert path({"root": {"extensions": (authority(3),)}}) == []
    assert path({"leaf": {"extensions": ()}, "zone": {"extensions": (authority(),)}}) == []  # AMD's leaf has neither
    assert path({"leaf": {"extensions": (usage("03020780"), extension("2a03", b"", False))}}) == []


OTHER = ec.generate_private_key(ec.SECP384R1())
BROKEN: dict[str, dict[str, Any]] = {
    "no authority above": {"zone": {"extensions": (usage(enclaves.SIGNS_CERTIFICATES),)}},
    "too many authorities below": {"region": {"extensions": (authority(1),)}},
    "none allowed below": {"zone": {"extensions": (authority(0),)}},
    "not for certificates": {"instance": {"extensions": (authority(0), usage("03020780"))}},
    "a leaf that is an authority": {"leaf": {"extensions": (authority(),)}},
    "a leaf that is not for signatures": {"leaf": {"extensions": (usage("03020204"),)}},
    "an unknown critical extension": {"zone": {"extensions": (authority(1), extension("2a03", b""))}},
    "an unknown critical extension of the leaf": {"leaf": {"extensions": (extension("2a03", b""),)}},
    "another issuer": {"leaf": {"issuer": enclaves.name("somebody")}},
    "a name in other letters": {"leaf": {"issuer": enclaves.name(enclaves._NAMES["instance"], 19)}},
    "another signer": {"zone": {"signer": OTHER}},
    "a damaged signature": {"leaf": {"damage": 1}},
    "a root that another signed": {"root": {"signer": OTHER}},
    "a key of another": {"region": {"key": OTHER}, "zone": {"signer": enclaves._KEYS["region"]}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_chain_is_refused(name: str) -> None:
    failures = path(BROKEN[name])
    assert failures
    assert {reason for reason, _ in failures} == {"chain"}
    for _, sentence in failures:
        assert sentence.startswith("chain: ")


def test_a_root_is_believed_for_its_digest_only() -> None:
    assert [reason for reason, _ in path(roots=[bytes(32)])] == ["chain"]
    assert [reason for reason, _ in path(roots=[])] == ["chain"]
    assert [reason for reason, _ in path({"root": {"key": OTHER}}, roots=[enclaves.ROOT])] == ["chain"]
    # a pinned root below another is no root
    assert path(roots=[hashlib.sha256(enclaves.CHAIN[1].der).digest()])


def test_every_certificate_of_the_chain_is_needed() -> None:
    for gone in range(1, 5):
        assert path(pick=lambda holders, gone=gone: holders[:gone] + holders[gone + 1 :])
    assert path(pick=lambda holders: holders[:1])
    assert path(pick=lambda holders: holders[:1] * 3 + holders)  # 8
    assert path(pick=lambda holders: holders[::-1])


@pytest.mark.parametrize("level", enclaves.LEVELS)
def test_every_date_counts_and_both_are_inclusive(level: str) -> None:
    def at(begins: timedelta, ends: timedelta) -> list[str]:
        return [reason for reason, _ in path({level: {"begins": NOW + begins, "ends": NOW + ends}})]

    second, none = timedelta(seconds=1), timedelta()
    assert at(none, none) == []
    assert at(second, 2 * second) == ["not-yet-valid"]
    assert at(-2 * second, -second) == ["expired"]
    assert at(second, -second) == ["not-yet-valid", "expired"]


def test_names_of_certificates_cannot_drive_a_terminal() -> None:
    failures = path({"leaf": {"subject": enclaves.name("\x1b[31m; chain: fine\n"), "damage": 1}})
    assert failures
    assert all(sentence.isprintable() for _, sentence in failures)


# --- revocation lists ---


def lists(vectors: Path) -> list[bytes]:
    found = [(vectors / "snp" / "milan_crl.der").read_bytes()]
    for path in sorted(vectors.glob("tdx/*_collateral.json")):
        collateral = json.loads(path.read_text())
        found += [bytes.fromhex(value) for name, value in collateral.items() if name.endswith("_crl")]
    assert len(found) > 2
    return found


def list_agrees(data: bytes) -> bool:
    try:
        ours = x509.Crl.read(data)
    except EvidenceError as error:
        assert error.reason == "malformed"
        return False
    oracles.list_agrees(data, ours)
    return True


def test_genuine_revocation_lists_are_read_as_by_others(vectors: Path) -> None:
    assert all(map(list_agrees, lists(vectors)))
    chance, accepted = random.Random(0), 0
    for data in lists(vectors):
        for _ in range(100):
            changed = bytearray(data)
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            accepted += list_agrees(bytes(changed))
    assert accepted > 50


def test_a_revocation_list_is_its_signers_and_of_now(vectors: Path) -> None:
    crl = x509.Crl.read(lists(vectors)[0])
    pem = (vectors / "snp" / "milan_ask_ark.pem").read_text()
    blocks = [block + "-----END CERTIFICATE-----" for block in pem.split("-----END CERTIFICATE-----")[:-1]]
    below, signer = (Certificate.read(PEM.decode(block.strip())[0]) for block in blocks)
    second = timedelta(seconds=1)
    for now in (crl.this_update, crl.next_update):
        assert crl.failures(signer, now) == []
        assert [reason for reason, _ in crl.failures(below, now)] == ["chain", "chain"]
    for now in (crl.this_update - second, crl.next_update + second):
        assert [reason for reason, _ in crl.failures(signer, now)] == ["collateral-expired"]


def test_a_revocation_list_of_another_form_is_refused() -> None:
    signer = Certificate.read(enclaves.CHAIN[0].der)
    good = x509.Crl.read(enclaves.revocations(7, 9))
    assert good.serials == {7, 9}
    assert good.failures(signer, NOW) == []
    assert x509.Crl.read(enclaves.revocations()).serials == frozenset()
    critical = x509.Crl.read(enclaves.revocations(critical=True))
    assert [reason for reason, _ in critical.failures(signer, NOW)] == ["chain"]
    instance = Certificate.read(enclaves.CHAIN[3].der)  # it may sign certificates, and no lists
    theirs = x509.Crl.read(enclaves.revocations(signer=enclaves.CHAIN[3]))
    assert [reason for reason, _ in theirs.failures(instance, NOW)] == ["chain"]
    for data in (enclaves.CHAIN[0].der, enclaves.revocations(7) + b"\0", bytes(64 * 1024 + 1)):
        with pytest.raises(EvidenceError):
            x509.Crl.read(data)


@given(st.binary(max_size=100))
def test_any_bytes_are_no_revocation_list(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        x509.Crl.read(data)
