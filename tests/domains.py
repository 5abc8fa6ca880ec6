"""TDX quotes of the tests' own: chains with Intel's names under another root, and collateral. All can be made wrong.

As in `enclaves`, the `cryptography` package signs, and nothing is shared with the readers under test.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from enclaves import (
    NOW,
    SHA256_ECDSA,
    SIGNS,
    SIGNS_CERTIFICATES,
    Holder,
    authority,
    certificate,
    extension,
    integer,
    time,
    tlv,
    usage,
)

KEYS = {
    who: ec.derive_private_key(2**250 + i, ec.SECP256R1())
    for i, who in enumerate(("root", "authority", "pck", "signer", "quote"))
}
SGX = "2a864886f84d010d01"  # the OID 1.2.840.113741.1.13.1
PPID, FMSPC, PCEID = bytes(range(16)), bytes.fromhex("b0c06f000000"), bytes(2)
COMPONENTS = (3, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0)
PCESVN = 11
TEE_TCB_SVN = bytes.fromhex("06010300000000000000000000000000")  # module 1, version 6; firmware 3


def name(common: str) -> bytes:
    parts = (("550403", common), ("55040a", "Intel Corporation"), ("550406", "US"))
    return tlv(0x30, *(tlv(0x31, tlv(0x30, tlv(6, bytes.fromhex(o)), tlv(12, t.encode()))) for o, t in parts))


def pair(number: str, value: bytes) -> bytes:
    return tlv(0x30, tlv(6, bytes.fromhex(SGX + number)), value)


def platform(
    ppid: bytes = PPID,
    components: tuple[int, ...] = COMPONENTS,
    pcesvn: int = PCESVN,
    pceid: bytes = PCEID,
    fmspc: bytes = FMSPC,
    more: bytes = b"",
) -> bytes:
    """A PCK certificate's own extension."""
    versions = [pair(f"02{i:02x}", integer(value)) for i, value in enumerate(components, 1)]
    tcb = tlv(0x30, *versions, pair("0211", integer(pcesvn)), pair("0212", tlv(4, bytes(components))))
    values = pair("01", tlv(4, ppid)), pair("02", tcb), pair("03", tlv(4, pceid)), pair("04", tlv(4, fmspc))
    return extension(SGX, tlv(0x30, *values, pair("05", tlv(10, b"\0")), more), critical=False)


NAMES = {
    "root": "Intel SGX Root CA",
    "authority": "Intel SGX PCK Platform CA",
    "pck": "Intel SGX PCK Certificate",
    "signer": "Intel SGX TCB Signing",
}
_SIGNERS = {"root": "root", "authority": "root", "pck": "authority", "signer": "root"}
SERIALS = {"root": 1, "authority": 2, "pck": 3, "signer": 4}


def holders(changes: Mapping[str, Mapping[str, Any]] = {}) -> dict[str, Holder]:
    """Root, authority, PCK certificate and the collateral's signer. `changes` are arguments of `certificate`."""
    leaf = extension("551d13", tlv(0x30)), usage(SIGNS)
    extensions = {
        "root": (authority(1), usage(SIGNS_CERTIFICATES)),
        "authority": (authority(0), usage(SIGNS_CERTIFICATES)),
        "pck": (*leaf, platform()),
        "signer": leaf,
    }
    made: dict[str, Holder] = {}
    for who, by in _SIGNERS.items():
        key, own = changes.get(who, {}).get("key", KEYS[who]), name(NAMES[who])
        above = made.get(by)
        fields: dict[str, Any] = {
            "subject": own,
            "key": key,
            "signer": above.key if above else key,
            "issuer": above.name if above else own,
            "begins": NOW - timedelta(days=365),
            "ends": NOW + timedelta(days=365),
            "extensions": extensions[who],
            "algorithm": SHA256_ECDSA,
            "serial": integer(SERIALS[who]),
        } | dict(changes.get(who, {}))
        made[who] = Holder(fields["subject"], key, certificate(**fields))
    return made


HOLDERS = holders()
ROOT = hashlib.sha256(HOLDERS["root"].der).digest()


def pem(*certificates: bytes) -> bytes:
    lines = []
    for der in certificates:
        text = base64.b64encode(der).decode()
        lines += ["-----BEGIN CERTIFICATE-----", *(text[i : i + 64] for i in range(0, len(text), 64))]
        lines += ["-----END CERTIFICATE-----"]
    return "".join(line + "\n" for line in lines).encode()


def signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """r ‖ s."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def point(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


BODY = {
    "tee_tcb_svn": TEE_TCB_SVN,
    "mrseam": b"\x51" * 48,
    "mrsignerseam": bytes(48),
    "seam_attributes": bytes(8),
    "td_attributes": bytes.fromhex("0000001000000000"),
    "xfam": bytes.fromhex("e702060000000000"),
    "mrtd": b"\x01" * 48,
    "mrconfigid": b"\x02" * 48,
    "mrowner": b"\x03" * 48,
    "mrownerconfig": b"\x04" * 48,
    "rtmr0": b"\x10" * 48,
    "rtmr1": b"\x11" * 48,
    "rtmr2": b"\x12" * 48,
    "rtmr3": bytes(48),
    "report_data": b"\x64" * 64,
    "tee_tcb_svn_2": bytes(16),
    "mrservicetd": b"\x05" * 48,
}
MRSIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
QE = {"miscselect": bytes(4), "attributes": bytes.fromhex("11" + "00" * 15), "mrsigner": MRSIGNER, "isvprodid": 2,
      "isvsvn": 4}  # fmt: skip


def body(kind: int = 2, **changes: bytes) -> bytes:
    """The body of a quote of type 2 or 3."""
    return b"".join(value for value in (BODY | changes).values())[: 584 if kind == 2 else 648]


def report(report_data: bytes, **changes: Any) -> bytes:
    """A quoting enclave's."""
    fields: dict[str, Any] = QE | changes
    data = bytearray(384)
    for at, value in ((16, fields["miscselect"]), (48, fields["attributes"]), (128, fields["mrsigner"]),
                      (256, fields["isvprodid"].to_bytes(2, "little")), (258, fields["isvsvn"].to_bytes(2, "little")),
                      (320, report_data)):  # fmt: skip
        data[at : at + len(value)] = value
    return bytes(data)


def quote(
    made: Mapping[str, Holder] = HOLDERS,
    version: int = 4,
    kind: int = 2,
    header: bytes = b"\2\0\x81\0\0\0" + bytes(4) + bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20),
    typed: bytes | None = None,
    text: bytes | None = None,
    auth: bytes = bytes(range(32)),
    key: ec.EllipticCurvePrivateKey = KEYS["quote"],
    reported: bytes | None = None,
    qe: Mapping[str, Any] = {},
    outer: int = 6,
    inner: int = 5,
    more: int = 0,
    behind: bytes = b"",
    **changes: bytes,
) -> bytes:
    """A quote of HOLDERS' platform. `changes` are fields of the body, `qe` of the quoting enclave's report."""
    content = body(kind, **changes)
    if version == 5:
        content = (typed or kind.to_bytes(2, "little") + len(content).to_bytes(4, "little")) + content
    signed = version.to_bytes(2, "little") + header + content
    bound = reported or hashlib.sha256(point(key) + auth).digest() + bytes(32)
    enclave = report(bound, **qe)
    text = pem(*(made[who].der for who in ("pck", "authority", "root"))) if text is None else text
    data = enclave + signature(made["pck"].key, enclave) + len(auth).to_bytes(2, "little") + auth
    data += inner.to_bytes(2, "little") + (len(text) + more).to_bytes(4, "little") + text
    data = outer.to_bytes(2, "little") + len(data).to_bytes(4, "little") + data
    data = signature(key, signed) + point(key) + data
    return signed + len(data).to_bytes(4, "little") + data + behind


def date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def level(status: str = "UpToDate", *advisories: str, **tcb: Any) -> dict[str, Any]:
    return {"tcb": tcb, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": status} | (
        {"advisoryIDs": list(advisories)} if advisories else {}
    )


def components(values: tuple[int, ...]) -> list[dict[str, int]]:
    return [{"svn": value} for value in values]


TDX_COMPONENTS = (5, 0, 2) + (0,) * 13


def firmware(
    status: str = "UpToDate",
    *advisories: str,
    sgx: tuple[int, ...] = COMPONENTS,
    pcesvn: int = PCESVN,
    tdx: tuple[int, ...] = TDX_COMPONENTS,
) -> dict[str, Any]:
    """A level of the platform."""
    versions = {"sgxtcbcomponents": components(sgx), "pcesvn": pcesvn, "tdxtcbcomponents": components(tdx)}
    return level(status, *advisories, **versions)


DATES = {"issueDate": date(NOW - timedelta(days=10)), "nextUpdate": date(NOW + timedelta(days=20))}
SEAM = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}


def module(number: str = "01", *levels: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"id": f"TDX_{number}"} | SEAM | {"tcbLevels": list(levels) or [level(isvsvn=6)]} | changes


def info(**changes: Any) -> dict[str, Any]:
    """TCB info of the platform."""
    return {
        "id": "TDX", "version": 3, **DATES, "fmspc": FMSPC.hex().upper(), "pceId": PCEID.hex(), "tcbType": 0,
        "tcbEvaluationDataNumber": 17, "tdxModule": SEAM, "tdxModuleIdentities": [module("03"), module()],
        "tcbLevels": [firmware()],
    } | changes  # fmt: skip


def identity(**changes: Any) -> dict[str, Any]:
    """The identity of the quoting enclave."""
    return {
        "id": "TD_QE", "version": 2, **DATES, "tcbEvaluationDataNumber": 18, "miscselect": "00" * 4,
        "miscselectMask": "FF" * 4, "attributes": "11" + "00" * 15, "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
        "mrsigner": MRSIGNER.hex().upper(), "isvprodid": 2, "tcbLevels": [level(isvsvn=4)],
    } | changes  # fmt: skip


def revocations(
    signer: Holder,
    *serials: int,
    number: int | None = 1,
    begins: datetime = NOW - timedelta(days=10),
    ends: datetime = NOW + timedelta(days=20),
    key: ec.EllipticCurvePrivateKey | None = None,
    critical: bool = False,
    behind: bytes = b"",
) -> bytes:
    """A revocation list; `behind` is what follows its last entry."""
    entries = tlv(0x30, *(tlv(0x30, integer(serial), time(NOW)) for serial in serials), behind) if serials else b""
    listed = b"" if number is None else tlv(0xA0, tlv(0x30, extension("551d14", integer(number), critical)))
    tbs = tlv(0x30, integer(1), SHA256_ECDSA, signer.name, time(begins) + time(ends), entries, listed)
    signed = (key or signer.key).sign(tbs, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return tlv(0x30, tbs, SHA256_ECDSA, tlv(3, b"\0", signed))


EVER: dict[str, Any] = {"begins": datetime(2020, 1, 1, tzinfo=UTC), "ends": datetime(2049, 1, 1, tzinfo=UTC)}


def living(key: ec.EllipticCurvePrivateKey | None = None, **changes: Mapping[str, Any]) -> dict[str, Holder]:
    """HOLDERS at any time; `key` is another root's, `changes` as of `holders`."""
    rooted = {"root": {"key": key}} if key else {}
    return holders({who: EVER | rooted.get(who, {}) | dict(changes.get(who, {})) for who in _SIGNERS})


def living_collateral(
    made: Mapping[str, Holder] | None = None, ends: datetime = EVER["ends"], **changes: Any
) -> list[bytes]:
    """The collateral of `living`, at any time until its texts end; `changes` as of `collateral`."""
    made, dates = made or living(), {"issueDate": date(EVER["begins"]), "nextUpdate": date(ends)}
    lists = {
        "root_list": revocations(made["root"], **EVER),
        "pck_list": revocations(made["authority"], **EVER),
    }
    dated = {text: dates | changes[text] for text in ("info", "identity") if type(changes.get(text)) is dict}
    return collateral(made, **({"info": dates, "identity": dates} | lists | changes | dated))


PARTS = ("info", "info_signature", "identity", "identity_signature", "signer", "root_list", "pck_list")


def collateral(made: Mapping[str, Holder] = HOLDERS, /, **changes: Any) -> list[bytes]:
    """The seven parts. `changes` are of PARTS: dicts of fields for the texts, else bytes; a text is signed as it is."""
    texts = {}
    for which, text in (("info", info), ("identity", identity)):
        change = changes.get(which, {})
        texts[which] = change if isinstance(change, bytes) else json.dumps(text(**change)).encode()
    parts = {
        "info": texts["info"],
        "info_signature": signature(made["signer"].key, texts["info"]),
        "identity": texts["identity"],
        "identity_signature": signature(made["signer"].key, texts["identity"]),
        "signer": made["signer"].der,
        "root_list": revocations(made["root"]),
        "pck_list": revocations(made["authority"]),
    }
    return [(parts | changes | texts)[part] for part in PARTS]


def files(made: Mapping[str, Holder], parts: Sequence[bytes]) -> dict[str, bytes]:
    """The files of a folder with collateral, as Intel's service answers."""
    info, info_signature, identity, identity_signature, signer, root_list, pck_list = parts
    answers = {"tcbInfo": (info, info_signature), "enclaveIdentity": (identity, identity_signature)}
    files = {
        name: b'{"%s":%s,"signature":"%s"}' % (name.encode(), text, signature.hex().encode())
        for name, (text, signature) in answers.items()
    }
    return files | {"signer.pem": pem(signer, made["root"].der), "root.crl": root_list, "pck.crl": pck_list}
