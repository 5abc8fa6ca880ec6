"""X.509 certificates and revocation lists (RFC 5280), as far as the makers of platforms use them, and their checks.

    certificate = SEQUENCE { tbs, algorithm, BITS signature over tbs }
    tbs         = SEQUENCE { [0] version 3, serial, algorithm, issuer, SEQUENCE { not before, not after }, subject,
                             SEQUENCE { algorithm, BITS key }, [3] SEQUENCE { extension, ... } }
    extension   = SEQUENCE { OID, BOOLEAN critical (by default false), OCTETS value }
    name        = SEQUENCE { SET { SEQUENCE { OID, string } }, ... }
    list        = SEQUENCE { tbs, algorithm, BITS signature over tbs }
    its tbs     = SEQUENCE { version 2, algorithm, issuer, this update, next update,
                             SEQUENCE { SEQUENCE { serial, date, extensions }, ... }, [0] extensions }

Signatures are ECDSA with SHA-256 or SHA-384, or AMD's: RSA-4096 PSS with SHA-384. A chain travels whole, and is
believed for the digest of its root alone.
"""

import functools
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from Crypto.Hash import SHA256, SHA384
from Crypto.PublicKey import RSA
from Crypto.PublicKey.ECC import EccKey
from Crypto.PublicKey.RSA import RsaKey
from Crypto.Signature import pss

from attest import EvidenceError, Failure, ecdsa
from attest.der import OCTETS, SEQUENCE, SET, Reader, only, only_integer

MAX_SIZE = 4096  # bytes of a certificate; genuine ones have at most 1.7 KB
MAX_LIST = 64 * 1024  # bytes of a revocation list
MAX_PARTS = 16  # of a name, and extensions; genuine certificates have at most 11
LENGTHS = range(2, 7)  # certificates of a chain; Nitro's have 5

COMMON_NAME, BASIC_CONSTRAINTS, KEY_USAGE, CRL_NUMBER = "2.5.4.3", "2.5.29.19", "2.5.29.15", "2.5.29.20"
DIGITAL_SIGNATURE, KEY_CERT_SIGN, CRL_SIGN = 0, 5, 6  # bits of KEY_USAGE

# Algorithms by their whole encoding: so none has parameters of its own.
_ECDSA = {
    bytes.fromhex("300a06082a8648ce3d040302"): SHA256,
    bytes.fromhex("300a06082a8648ce3d040303"): SHA384,
}
_SALT = 48  # bytes
_PSS_PARAMETERS = (  # hash SHA-384, mask MGF1 with SHA-384, salt 48
    "a00f300d06096086480165030402020500a11c301a06092a864886f70d010108300d06096086480165030402020500a203020130"
)
_PSS = (
    bytes.fromhex("304106092a864886f70d01010a3034" + _PSS_PARAMETERS),
    bytes.fromhex("304606092a864886f70d01010a3039" + _PSS_PARAMETERS + "a303020101"),  # Milan's: the default trailer
)
_CURVES = {
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107"): "P-256",
    bytes.fromhex("301006072a8648ce3d020106052b81040022"): "P-384",
}
Key = EccKey | RsaKey
_RSA = bytes.fromhex("300d06092a864886f70d0101010500")
_RSA_BITS, _RSA_EXPONENT = 4096, 65537


@dataclass(frozen=True)
class _Signed:
    tbs: bytes  # what is signed
    algorithm: bytes  # of the signature, encoded
    signature: bytes | tuple[int, int]  # RSA's; or (r, s)

    def is_signed_by(self, key: Key) -> bool:
        if isinstance(self.signature, tuple):
            hasher = _ECDSA[self.algorithm]
            return isinstance(key, EccKey) and ecdsa.is_signed(key, hasher, self.tbs, *self.signature)
        return isinstance(key, RsaKey) and is_signed_pss(key, self.tbs, self.signature)


@dataclass(frozen=True)
class Certificate(_Signed):
    """The fields of a certificate. Nobody has checked its signature."""

    der: bytes
    issuer: bytes  # encoded names
    subject: bytes
    serial: int
    not_before: datetime  # both inclusive
    not_after: datetime
    key: Key
    extensions: dict[str, tuple[bool, bytes]]  # critical, value; by OID
    authority: bool  # whether it may sign certificates
    path_length: int | None  # authorities that may lie between it and a leaf; None is any number
    usage: frozenset[int] | None  # the bits of KEY_USAGE; None if it says nothing

    @classmethod
    def read(cls, data: bytes) -> "Certificate":
        """Raises EvidenceError for what is not such a certificate."""
        if len(data) > MAX_SIZE:
            raise EvidenceError(f"certificate: got {len(data)} bytes, wanted at most {MAX_SIZE}")
        tbs, algorithm, signature = _signed(data)
        fields = Reader(tbs).inside(SEQUENCE)
        version = fields.inside(0xA0)
        if version.integer() != 2:
            raise EvidenceError("certificate: got another version than 3")
        version.end()
        serial = fields.integer()
        if serial.bit_length() > 8 * 20:
            raise EvidenceError("certificate: got a serial number of more than 20 bytes")
        if fields.whole(SEQUENCE) != algorithm:
            raise EvidenceError("certificate: got two algorithms for one signature")
        issuer = _name(fields)
        dates = fields.inside(SEQUENCE)
        not_before, not_after = dates.time(), dates.time()
        dates.end()
        subject = _name(fields)
        key = _key(fields.inside(SEQUENCE))
        extensions = _extensions(fields, 0xA3) if fields.more else {}
        authority, path_length = _constraints(extensions)
        return cls(
            tbs, algorithm, signature, data, issuer, subject, serial, not_before, not_after, key, extensions, authority,
            path_length, _usage(extensions),
        )  # fmt: skip

    @property
    def common_name(self) -> str:
        """The subject's name; empty if it has none, or several."""
        names, found = Reader(self.subject).inside(SEQUENCE), []
        while names.more:
            attribute = names.inside(SET).inside(SEQUENCE)
            kind, text = attribute.oid(), attribute.text()
            found += [text] if kind == COMMON_NAME else []
        return found[0] if len(found) == 1 else ""


@dataclass(frozen=True)
class Crl(_Signed):
    """The fields of a revocation list. Nobody has checked its signature."""

    issuer: bytes
    this_update: datetime
    next_update: datetime
    entries: bytes  # of the certificates that are revoked, encoded
    extensions: dict[str, tuple[bool, bytes]]  # critical, value; by OID

    @classmethod
    def read(cls, data: bytes) -> "Crl":
        """Raises EvidenceError for what is not such a list."""
        if len(data) > MAX_LIST:
            raise EvidenceError(f"revocation list: got {len(data)} bytes, wanted at most {MAX_LIST}")
        tbs, algorithm, signature = _signed(data)
        fields = Reader(tbs).inside(SEQUENCE)
        if fields.integer() != 1 or fields.whole(SEQUENCE) != algorithm:
            raise EvidenceError("revocation list: got another version than 2, or two algorithms for one signature")
        issuer, this_update, next_update = _name(fields), fields.time(), fields.time()
        entries = fields.content(SEQUENCE) if fields.next_is(SEQUENCE) else b""
        extensions = _extensions(fields, 0xA0) if fields.more else {}
        return cls(tbs, algorithm, signature, issuer, this_update, next_update, entries, extensions)

    @functools.cached_property
    def serials(self) -> frozenset[int]:
        """The serial numbers of the certificates that are revoked. Raises EvidenceError.

        64 KB of them take 30 ms to read: ask once the signature is checked.
        """
        entries, serials = Reader(self.entries), set()
        while entries.more:
            entry = entries.inside(SEQUENCE)
            serials.add(entry.integer())
            entry.time()
            if entry.more and any(critical for critical, _ in _extensions(entry).values()):
                raise EvidenceError("revocation list: got an entry with a critical extension")
        return frozenset(serials)

    @property
    def number(self) -> int | None:
        """Its own, which grows with each list; None if it has none. Raises EvidenceError."""
        return only_integer(self.extensions[CRL_NUMBER][1]) if CRL_NUMBER in self.extensions else None

    def failures(self, signer: Certificate, now: datetime) -> list[Failure]:
        """What is wrong with it as a list of `signer`, whose own chain is another question, as is what it lists."""
        wrong = []
        named = self.issuer == signer.subject and CRL_SIGN in (signer.usage or ())
        if not named or any(critical for critical, _ in self.extensions.values()):
            wrong.append(("chain", f"chain: got a revocation list that is not one of {_called(signer)}"))
        if not self.is_signed_by(signer.key):
            wrong.append(("chain", f"chain: got a revocation list that is not signed by {_called(signer)}"))
        if not self.this_update <= now <= self.next_update:
            dates = f"{self.this_update} to {self.next_update}, wanted one of {now}"
            wrong.append(("collateral-expired", f"collateral-expired: got a revocation list of {dates}"))
        return wrong


def is_signed_pss(key: RsaKey, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is RSA PSS by `key`, with SHA-384, its MGF1 and 48 bytes of salt (RFC 8017)."""
    try:
        pss.new(key, salt_bytes=_SALT).verify(SHA384.new(message), signature)
    except ValueError:
        return False
    return True


def is_signed_by(data: bytes, key: Key) -> bool:
    """Whether a certificate or a list is signed by `key`; no more of it is read. Raises EvidenceError."""
    return _Signed(*_signed(data)).is_signed_by(key)


def path(chain: Sequence[Certificate], roots: Collection[bytes], now: datetime) -> list[Failure]:
    """What is wrong with a chain, leaf first, its root included: "chain", "not-yet-valid", "expired"; or nothing.

    Args:
        roots: SHA-256 digests of the certificates that may be its root.
        now: the time to judge by, with a zone.
    """
    if len(chain) not in LENGTHS:
        wanted = f"wanted {LENGTHS[0]} to {LENGTHS[-1]}"
        return [("chain", f"chain: got {len(chain)} certificates, {wanted}")]
    wrong, leaf = [], chain[0]
    digest = hashlib.sha256(chain[-1].der).digest()
    if digest not in roots:
        wanted = " or ".join(root.hex() for root in roots)
        wrong.append(f"got the root {digest.hex()}, wanted {wanted}: another has vouched for this platform")
    for below, (certificate, signer) in enumerate(zip(chain, [*chain[1:], chain[-1]], strict=True)):
        if certificate.issuer != signer.subject:
            wrong.append(f"{_called(certificate)} names another issuer than {_called(signer)}")
        if not certificate.is_signed_by(signer.key):
            wrong.append(f"{_called(certificate)} is not signed by {_called(signer)}")
        if below:
            room = below if certificate.path_length is None else certificate.path_length
            if not certificate.authority or room < below - 1:  # of those below, one is the leaf
                wrong.append(f"{_called(certificate)} may not sign for {_called(chain[below - 1])}")
            if certificate.usage is not None and KEY_CERT_SIGN not in certificate.usage:
                wrong.append(f"{_called(certificate)} is not for signing certificates")
        for oid, (critical, _) in certificate.extensions.items():
            if critical and oid not in (BASIC_CONSTRAINTS, KEY_USAGE):
                wrong.append(f"{_called(certificate)} has the critical extension {oid}, which is not known here")
    if leaf.authority or (leaf.usage is not None and DIGITAL_SIGNATURE not in leaf.usage):
        wrong.append(f"{_called(leaf)} is not for signing evidence")
    failures = [("chain", f"chain: {sentence}") for sentence in wrong]
    for certificate in chain:
        name, begins, ends = _called(certificate), certificate.not_before, certificate.not_after
        if now < begins:
            failures.append(
                ("not-yet-valid", f"not-yet-valid: got the time {now}, wanted {begins} or later for {name}")
            )
        if now > ends:
            failures.append(("expired", f"expired: got the time {now}, wanted {ends} or earlier for {name}"))
    return failures


def _called(certificate: Certificate) -> str:
    return f"the certificate {certificate.common_name[:80]!a}"


def _name(fields: Reader) -> bytes:
    """The next element, a name, encoded: one attribute in each set, as the makers have it."""
    whole = fields.whole(SEQUENCE)
    names = Reader(whole).inside(SEQUENCE)
    for _ in _turns(names):
        one = names.inside(SET)
        attribute = one.inside(SEQUENCE)
        one.end()
        attribute.oid(), attribute.text()
        attribute.end()
    return whole


def _turns(parts: Reader) -> Iterator[None]:
    """As many turns as there are parts, but not too many."""
    for _ in range(MAX_PARTS):
        if parts.more:
            yield
    parts.end()


def _key(fields: Reader) -> Key:
    algorithm, key = fields.whole(SEQUENCE), fields.bits()
    fields.end()
    if algorithm in _CURVES:
        if key[:1] != b"\x04":
            raise EvidenceError("certificate: got a point in another form than 04, x, y")
        return ecdsa.public_key(_CURVES[algorithm], key[1:])
    if algorithm != _RSA:
        raise EvidenceError("certificate: got a key that is not of P-256, P-384 or RSA")
    numbers = Reader(only(key))
    modulus, exponent = numbers.integer(), numbers.integer()
    numbers.end()
    if modulus.bit_length() != _RSA_BITS or exponent != _RSA_EXPONENT:
        raise EvidenceError(f"certificate: got another RSA key than one of {_RSA_BITS} bits and {_RSA_EXPONENT}")
    try:
        return RSA.construct((modulus, exponent))
    except ValueError:
        raise EvidenceError("certificate: got an RSA key that cannot be one") from None


def _signed(data: bytes) -> tuple[bytes, bytes, bytes | tuple[int, int]]:
    """What is signed, by which algorithm, and the signature."""
    parts = Reader(only(data))
    tbs, algorithm, signature = parts.whole(SEQUENCE), parts.whole(SEQUENCE), parts.bits()
    parts.end()
    return tbs, algorithm, _signature(algorithm, signature)


def _signature(algorithm: bytes, signed: bytes) -> bytes | tuple[int, int]:
    if algorithm in _PSS:
        if 8 * len(signed) != _RSA_BITS:
            raise EvidenceError(f"certificate: got an RSA signature of {len(signed)} bytes, wanted {_RSA_BITS // 8}")
        return signed
    if algorithm not in _ECDSA:
        raise EvidenceError("certificate: got a signature that is not ECDSA with SHA-256 or SHA-384, nor AMD's RSA PSS")
    numbers = Reader(only(signed))
    r, s = numbers.integer(), numbers.integer()
    numbers.end()
    return r, s


def _extensions(fields: Reader, tag: int | None = None) -> dict[str, tuple[bool, bytes]]:
    """The last element, extensions, within an explicit tag if one is given."""
    outer = fields if tag is None else fields.inside(tag)
    entries = outer.inside(SEQUENCE)
    outer.end()
    fields.end()
    if not entries.more:
        raise EvidenceError("certificate: got a place for extensions and none in it")
    found: dict[str, tuple[bool, bytes]] = {}
    for _ in _turns(entries):
        entry = entries.inside(SEQUENCE)
        oid, critical, value = entry.oid(), entry.optional_true(), entry.content(OCTETS)
        entry.end()
        if oid in found:
            raise EvidenceError(f"certificate: got the extension {oid} twice")
        found[oid] = critical, value
    return found


def _constraints(extensions: dict[str, tuple[bool, bytes]]) -> tuple[bool, int | None]:
    if BASIC_CONSTRAINTS not in extensions:
        return False, None
    fields = Reader(only(extensions[BASIC_CONSTRAINTS][1]))
    authority = fields.optional_true()
    path_length = fields.integer() if authority and fields.more else None
    fields.end()
    return authority, path_length


def _usage(extensions: dict[str, tuple[bool, bytes]]) -> frozenset[int] | None:
    if KEY_USAGE not in extensions:
        return None
    outer = Reader(extensions[KEY_USAGE][1])
    usage = outer.named_bits()
    outer.end()
    return usage
