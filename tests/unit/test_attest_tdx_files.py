"""Intel's collateral as files: JSON is read however it is written, the signed text in it byte for byte, and every file
that is anything else is refused by its name."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import domains
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from domains import HOLDERS, ROOT, collateral, files, info, quote
from enclaves import NOW

from attest import AttestationError, certificates
from attest.certificates import MAX_FILE, MAX_FILES
from attest.providers import tdx

PARTS = tuple(collateral())
TEXT, SIGNATURE = PARTS[0].decode(), PARTS[1].hex()
PLAIN = f'{{"tcbInfo":{TEXT},"signature":"{SIGNATURE}"}}'
Read = Callable[..., tuple[bytes, ...]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The parts of a folder in which some files are other ones, or missing."""

    def parts(**changes: bytes | str | None) -> tuple[bytes, ...]:
        folder = tmp_path / "endorsements"
        folder.mkdir(exist_ok=True)
        for name, data in (files(HOLDERS, PARTS) | changes).items():
            if data is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return tdx.endorsements(tdx.parse(quote()), certificates.files(str(folder)))

    return parts


def test_files_are_known_by_what_they_hold_and_others_are_left_out(read: Read) -> None:
    assert read() == PARTS
    intel = files(HOLDERS, PARTS)
    others = {"tcbInfo": intel["pck.crl"], "pck.crl": intel["tcbInfo"], "signer.pem": PARTS[4], ".new": b"{"}
    stranger = domains.revocations(HOLDERS["signer"])
    assert read(**others, more=HOLDERS["root"].der, list=stranger) == PARTS
    assert tdx.authenticate(quote(), read(), [ROOT], NOW).status == "UpToDate"


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN,
        f"\n\t {PLAIN}\r\n",
        f'{{ "tcbInfo": {TEXT}, "signature": "{SIGNATURE}" }}',
        f'{{\r\n\t"tcbInfo" : {TEXT} ,\r\n\t"signature" : "{SIGNATURE.upper()}"\r\n}}\r\n',
        f'{{"signature":"{SIGNATURE}","tcbInfo":{TEXT}}}',
        f'{{ "signature" :\n"{SIGNATURE}" ,\n"tcbInfo" :\n{TEXT}\n}}',
    ],
    ids=["as Intel", "around", "spaces", "lines", "signature first", "both"],
)
def test_an_answer_may_be_spaced_and_ordered_in_any_way(read: Read, answer: str) -> None:
    assert read(tcbInfo=answer) == PARTS


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(info(), indent=2),
        json.dumps(info(), separators=(",", ":")),
        json.dumps(info() | {"more": 'é "}{, \\ \u2028', "é": 1}, ensure_ascii=False),
        json.dumps({"signature": "0" * 128, "tcbInfo": {}, "more": [{"enclaveIdentity": {}}]} | info()),
        '{"a" :1.50e+01 , "b":"\\u0041\\/" }',
        "{ }",
    ],
)
def test_a_text_is_taken_byte_for_byte(read: Read, text: str) -> None:
    for answer in (
        f'{{"tcbInfo":{text},"signature":"{SIGNATURE}"}}',
        f'{{"signature":"{SIGNATURE}","tcbInfo": {text}}}',
    ):
        assert read(tcbInfo=answer)[0] == text.encode()


def test_genuine_collateral_is_read_from_files(vectors: Path, tmp_path: Path) -> None:
    given = json.loads((vectors / "tdx" / "v4_prod_phala_collateral.json").read_bytes())
    for name, text in (("tcbInfo", "tcb_info"), ("enclaveIdentity", "qe_identity")):
        answer = f'{{"{name}": {given[text]},\n "signature": "{given[f"{text}_signature"]}"}}'
        (tmp_path / name).write_text(answer)
    (tmp_path / "signer").write_text(given["tcb_info_issuer_chain"])
    for name in ("root_ca_crl", "pck_crl"):
        (tmp_path / name).write_bytes(bytes.fromhex(given[name]))
    evidence = (vectors / "tdx" / "v4_prod_phala.bin").read_bytes()
    signer = x509.load_pem_x509_certificates(given["tcb_info_issuer_chain"].encode())[0]
    parts = tdx.endorsements(tdx.parse(evidence), certificates.files(str(tmp_path)))
    assert (parts[0], parts[2]) == (given["tcb_info"].encode(), given["qe_identity"].encode())
    assert parts[4] == signer.public_bytes(serialization.Encoding.DER)
    dates = json.loads(given["tcb_info"])["issueDate"], json.loads(given["qe_identity"])["issueDate"]
    now = datetime.strptime(max(dates), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert tdx.authenticate(evidence, parts, now=now).collateral


REFUSED = {
    "a key twice in the text": (PLAIN.replace('"id"', '"version": 3, "id"', 1), "a key appears twice"),
    "a text twice": (f'{{"tcbInfo":{TEXT},{PLAIN[1:]}', "a key appears twice"),
    "a signature twice": (f'{PLAIN[:-1]},"signature":"{SIGNATURE}"}}', "a key appears twice"),
    "a key twice, once in escapes": (f'{{"tcb\\u0049nfo":{TEXT},{PLAIN[1:]}', "a key appears twice"),
    "a name in escapes": (PLAIN.replace("tcbInfo", "tcb\\u0049nfo"), "wanted names without escapes"),
    "no signature": (f'{{"tcbInfo":{TEXT}}}', "signature is missing"),
    "no text": (f'{{"signature":"{SIGNATURE}"}}', "tcbInfo is missing"),
    "nothing": ("{}", "tcbInfo is missing"),
    "another text": (PLAIN.replace("tcbInfo", "tdxInfo"), "tcbInfo is missing"),
    "both texts": (f'{{"enclaveIdentity":{TEXT},{PLAIN[1:]}', "unknown field 'enclaveIdentity'"),
    "one member more": (f'{PLAIN[:-1]},"more":1}}', "unknown field 'more'"),
    "a text that is text": (json.dumps({"tcbInfo": TEXT, "signature": SIGNATURE}), "wanted an object"),
    "a text that is a list": (f'{{"tcbInfo":[{TEXT}],"signature":"{SIGNATURE}"}}', "wanted an object"),
    "a text that is null": (f'{{"tcbInfo":null,"signature":"{SIGNATURE}"}}', "wanted an object"),
    "a signature that is a number": (f'{{"tcbInfo":{TEXT},"signature":1}}', "wanted a string"),
    "a signature that is a list": (f'{{"tcbInfo":{TEXT},"signature":["{SIGNATURE}"]}}', "wanted a string"),
    "a signature that is null": (f'{{"tcbInfo":{TEXT},"signature":null}}', "wanted a string"),
    "a short signature": (PLAIN.replace(SIGNATURE, SIGNATURE[2:]), "lower-case hex"),
    "a long signature": (PLAIN.replace(SIGNATURE, SIGNATURE + "00"), "wanted a string"),
    "no hex": (PLAIN.replace(SIGNATURE, "g" * 128), "lower-case hex"),
    "no signature in it": (PLAIN.replace(SIGNATURE, ""), "wanted a string"),
    "something behind it": (f"{PLAIN} {{}}", "Extra data"),
    "two answers": (f"{PLAIN}\n{PLAIN}", "Extra data"),
    "no number": (PLAIN.replace('"version": 3', '"version": NaN'), "NaN is not a JSON number"),
    "too many digits": (PLAIN.replace('"version": 3', f'"version": {"3" * 5000}'), "too many digits"),
    "too deep": ('{"tcbInfo":' + '{"a":' * 9000, "nested too deeply"),
    "no UTF-8": (PLAIN.replace('"id"', '"é": 1, "id"').encode("latin-1"), "not UTF-8"),
    "no JSON": (PLAIN.replace('"', "'"), "not JSON"),
    "a comma too many": (f"{PLAIN[:-1]},}}", "not JSON"),
    "a mark of UTF-8 before it": (b"\xef\xbb\xbf" + PLAIN.encode(), "DER: got the tag"),
    "a list": (f"[{PLAIN}]", "DER: got the tag"),
    "an empty file": ("", "DER: wanted 1 bytes"),
    "too large": (PLAIN + " " * (MAX_FILE + 1 - len(PLAIN)), f"more than {MAX_FILE} bytes"),
    "far too large": (PLAIN + " " * 2**22, f"more than {MAX_FILE} bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_of_another_form_is_refused_by_its_name(read: Read, name: str) -> None:
    answer, wanted = REFUSED[name]
    with pytest.raises(AttestationError) as caught:
        read(tcbInfo=answer)
    assert "/endorsements/tcbInfo: " in str(caught.value) or "/endorsements/tcbInfo." in str(caught.value)
    assert wanted in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_largest_answer_is_read(read: Read) -> None:
    room = MAX_FILE - len(PLAIN)
    assert read(tcbInfo=PLAIN + " " * room) == PARTS
    text = TEXT[:-1] + " " * room + "}"
    assert read(tcbInfo=PLAIN.replace(TEXT, text))[0] == text.encode()


def test_a_cut_file_is_refused(read: Read) -> None:
    for name, data in files(HOLDERS, PARTS).items():
        end = data.index(b"-----END") if name == "signer.pem" else len(data)  # the root is behind it, and not needed
        for size in range(0, end, max(1, end // 24)):
            with pytest.raises(AttestationError):
                read(**{name: data[:size]})


def test_every_part_is_there_once(read: Read) -> None:
    names = {"tcbInfo": "TCB info", "enclaveIdentity": "QE identity", "signer.pem": "the signer's certificate",
             "root.crl": "the root's revocation list", "pck.crl": "the PCK authority's revocation list"}  # fmt: skip
    newer = files(HOLDERS, collateral(
        info={"tcbEvaluationDataNumber": 18}, identity={"tcbEvaluationDataNumber": 19},
        signer=domains.holders({"signer": {"serial": b"\2\1\x09"}})["signer"].der,
        root_list=domains.revocations(HOLDERS["root"], number=2),
        pck_list=domains.revocations(HOLDERS["authority"], number=2),
    ))  # fmt: skip
    for name, what in names.items():
        with pytest.raises(AttestationError, match=f"{what} missing"):
            read(**{name: None})
        assert read(again=files(HOLDERS, PARTS)[name]) == PARTS  # twice the same
        with pytest.raises(AttestationError, match=f"got two of {what}"):
            read(again=newer[name])
        read(again=None)


def test_a_folder_has_few_files(read: Read) -> None:
    more = {f"more{i}": PARTS[5] for i in range(MAX_FILES - 5)}
    assert read(**more) == PARTS
    with pytest.raises(AttestationError, match=f"got {MAX_FILES + 1} files, wanted at most {MAX_FILES}"):
        read(**more, one=PARTS[5])
