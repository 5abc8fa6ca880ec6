"""ChaCha20-Poly1305 (RFC 8439): the only file that knows which library computes it.

The package `cryptography` (the extra `fast`) does where it is installed, in a tenth of the time, and pycryptodome
otherwise; MINIGPT_AEAD names one of the two to force it. The bytes are the same. A process loads one of them only,
because pycryptodome's own cipher is five times slower beside the other.
"""

import os
import struct
from importlib.util import find_spec

from transport.errors import SettingError

TAGLEN = 16  # bytes that encryption adds

Bytes = bytes | bytearray | memoryview

_NONCE = struct.Struct("<4xQ")  # Noise, section 12.3: 32 zero bits, then n, little-endian


class Pycryptodome:
    """The AEAD under one key k, 32 bytes."""

    __slots__ = ("_k",)

    def __init__(self, k: bytes) -> None:
        self._k = k

    def encrypt(self, n: int, ad: Bytes, plaintext: Bytes) -> bytes:
        """ENCRYPT(k, n, ad, plaintext): the ciphertext and its tag; n < 2^64."""
        cipher = _pycryptodome.new(key=self._k, nonce=_NONCE.pack(n))
        if ad:
            cipher.update(ad)
        ciphertext, tag = cipher.encrypt_and_digest(plaintext)
        return ciphertext + tag

    def decrypt(self, n: int, ad: Bytes, ciphertext: Bytes) -> bytes:
        """DECRYPT(k, n, ad, ciphertext): the plaintext. Raises ValueError if it is not authentic."""
        if len(ciphertext) < TAGLEN:
            raise ValueError("shorter than its tag")
        cipher = _pycryptodome.new(key=self._k, nonce=_NONCE.pack(n))
        if ad:
            cipher.update(ad)
        view = memoryview(ciphertext)
        return cipher.decrypt_and_verify(view[:-TAGLEN], view[-TAGLEN:])


class Cryptography:
    """The same. The key is set up once, because that takes as long as a record of a token."""

    __slots__ = ("_cipher",)

    def __init__(self, k: bytes) -> None:
        self._cipher = _cryptography(k)

    def encrypt(self, n: int, ad: Bytes, plaintext: Bytes) -> bytes:
        return self._cipher.encrypt(_NONCE.pack(n), plaintext, ad)

    def decrypt(self, n: int, ad: Bytes, ciphertext: Bytes) -> bytes:
        try:
            return self._cipher.decrypt(_NONCE.pack(n), ciphertext, ad)
        except _InvalidTag:
            raise ValueError("MAC check failed") from None


BACKEND = os.environ.get("MINIGPT_AEAD") or ("cryptography" if find_spec("cryptography") else "pycryptodome")
Cipher: type[Pycryptodome] | type[Cryptography]
if BACKEND == "pycryptodome":
    from Crypto.Cipher import ChaCha20_Poly1305 as _pycryptodome

    Cipher = Pycryptodome
elif BACKEND == "cryptography":
    try:
        from cryptography.exceptions import InvalidTag as _InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305 as _cryptography
    except ImportError as error:
        advice = "install the extra fast, or set MINIGPT_AEAD=pycryptodome"
        raise SettingError(f"the package cryptography cannot be imported ({error}): {advice}") from None
    Cipher = Cryptography
else:
    raise SettingError(f"MINIGPT_AEAD is {BACKEND!r}, wanted pycryptodome or cryptography")
