"""ECDSA on the curves P-256 and P-384 (FIPS 186-5): a key from its point, and whether a signature is by it.

pycryptodome does the arithmetic. The signature's two numbers are checked before it sees them.
"""

from types import ModuleType

from Crypto.PublicKey import ECC
from Crypto.PublicKey.ECC import EccKey
from Crypto.Signature import DSS

from attest import EvidenceError

SIZE = {"P-256": 32, "P-384": 48}  # bytes of a coordinate, and of r and s
_ORDER = {
    "NIST P-256": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "NIST P-384": 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
}


def public_key(curve: str, point: bytes) -> EccKey:
    """The key at a point, x ‖ y big-endian. Raises EvidenceError if it is not on the curve, or has another length."""
    size = SIZE[curve]
    if len(point) != 2 * size:
        raise EvidenceError(f"{curve} key: got {len(point)} bytes, wanted {2 * size}")
    x, y = int.from_bytes(point[:size], "big"), int.from_bytes(point[size:], "big")
    try:
        key = ECC.construct(curve=curve, point_x=x, point_y=y)
    except ValueError:
        raise EvidenceError(f"{curve} key: got a point that is not on the curve") from None
    # The library takes (0, 0) for the point at infinity, under which anybody can sign, and coordinates above the prime.
    if key.pointQ.is_point_at_infinity() or tuple(map(int, key.pointQ.xy)) != (x, y):
        raise EvidenceError(f"{curve} key: got a point at infinity, or in another form than its own")
    return key


def is_signed(key: EccKey, hasher: ModuleType, message: bytes, r: int, s: int) -> bool:
    """Whether (r, s) is the signature of `message` by `key`; `hasher` is a module of Crypto.Hash.

    s may be in the upper half of its range: that of a genuine Nitro document is.
    """
    order = _ORDER[key.curve]
    if not (0 < r < order and 0 < s < order):
        return False
    size = order.bit_length() // 8
    try:
        DSS.new(key, "fips-186-3").verify(hasher.new(message), r.to_bytes(size, "big") + s.to_bytes(size, "big"))
    except ValueError:
        return False
    return True


def is_signed_raw(key: object, curve: str, hasher: ModuleType, message: bytes, signature: bytes) -> bool:
    """Whether r ‖ s, big-endian, is the signature of `message` by `key`, and that is one of the curve."""
    half = SIZE[curve]
    if not isinstance(key, EccKey) or key.curve != f"NIST {curve}" or len(signature) != 2 * half:
        return False
    return is_signed(
        key, hasher, message, *(int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
    )
