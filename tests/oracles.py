"""Other people's readers of CBOR and X.509, to compare ours with wherever ours accept."""

import math
import warnings
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from attest.x509 import BASIC_CONSTRAINTS, KEY_USAGE, Certificate, Crl

try:
    import cbor2
except ImportError:  # of the extra `test`
    cbor2 = None  # type: ignore[assignment]

_USAGES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
           "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip


def cbor_agrees(data: bytes, value: Any) -> None:
    """cbor2 reads the same."""
    if cbor2 is not None:
        theirs = cbor2.loads(data)
        assert repr(theirs) == repr(value), "not what cbor2 reads"  # repr: 1 is not True, and keys have an order


def certificate_agrees(data: bytes, ours: Certificate) -> None:
    """`cryptography` reads the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about serial numbers of 0, which are AMD's
        theirs = x509.load_der_x509_certificate(data)
        assert theirs.version is x509.Version.v3
        assert theirs.serial_number == ours.serial
        assert theirs.issuer.public_bytes() == ours.issuer
        assert theirs.subject.public_bytes() == ours.subject
        names = theirs.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        assert (names[0].value if len(names) == 1 else "") == ours.common_name
        assert (theirs.not_valid_before_utc, theirs.not_valid_after_utc) == (ours.not_before, ours.not_after)
        assert theirs.tbs_certificate_bytes == ours.tbs
        key = theirs.public_key()
        if isinstance(key, ec.EllipticCurvePublicKey):
            numbers = key.public_numbers()
            assert (numbers.x, numbers.y) == tuple(map(int, ours.key.pointQ.xy))
        else:
            assert isinstance(key, rsa.RSAPublicKey)
            assert (key.public_numbers().n, key.public_numbers().e) == (ours.key.n, ours.key.e)
        raw = {extension.oid.dotted_string: extension.critical for extension in _extensions(theirs)}
        if raw:
            assert raw == {oid: critical for oid, (critical, _) in ours.extensions.items()}
            assert list(raw) == list(ours.extensions)
        for extension in _extensions(theirs):
            if extension.oid.dotted_string == BASIC_CONSTRAINTS:
                room = extension.value.path_length
                assert (extension.value.ca, math.inf if room is None else room) == (
                    ours.authority,
                    math.inf if ours.path_length is None else ours.path_length,
                )
            if extension.oid.dotted_string == KEY_USAGE:
                bits = {i for i, usage in enumerate(_USAGES) if getattr(extension.value, f"_{usage}")}
                assert bits == {bit for bit in ours.usage if bit < len(_USAGES)}


def list_agrees(data: bytes, ours: Crl) -> None:
    """`cryptography` reads the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of countries
        theirs = x509.load_der_x509_crl(data)
        assert theirs.issuer.public_bytes() == ours.issuer
        assert theirs.tbs_certlist_bytes == ours.tbs
        assert (theirs.last_update_utc, theirs.next_update_utc) == (ours.this_update, ours.next_update)
        assert {entry.serial_number for entry in theirs} == ours.serials


def _extensions(certificate: x509.Certificate) -> list[x509.Extension[Any]]:
    """All extensions; none where one that we do not read is damaged inside."""
    try:
        return list(certificate.extensions)
    except ValueError:
        return []
