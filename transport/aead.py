"""ChaCha20-Poly1305 (RFC 8439): the only file that knows which library computes it.

pycryptodome does, unless MINIGPT_AEAD=cryptography is set when this is first imported: that package (the extra `fast`)
takes a tenth of the time, 0.004 ms instead of 0.05 for a step of 3 KB. There is one backend in a process, because
pycryptodome's own cipher is five times slower in a process that has run the other. The bytes are the same.
"""

from __future__ import annotations

import os
import struct

from transport.errors import SettingError

TAGLEN = 16  # bytes that encryption adds

Bytes = bytes | bytearray | memoryview

_NONCE = struct.Struct("<4xQ")  # Noise, section 12.3: 32 zero bits, then n, little-endian

BACKEND = os.environ.get("MINIGPT_AEAD", "pycryptodome")
if BACKEND == "pycryptodome":
    from Crypto.Cipher import ChaCha20_Poly1305

    class Cipher:
        """The AEAD under one key k, 32 bytes."""

        __slots__ = ("_k",)

        def __init__(self, k: bytes) -> None:
            self._k = k

        def encrypt(self, n: int, ad: Bytes, plaintext: Bytes) -> bytes:
            """ENCRYPT(k, n, ad, plaintext): the ciphertext and its tag; n < 2^64."""
            cipher = ChaCha20_Poly1305.new(key=self._k, nonce=_NONCE.pack(n))
            if ad:
                cipher.update(ad)
            ciphertext, tag = cipher.encrypt_and_digest(plaintext)
            return ciphertext + tag

        def decrypt(self, n: int, ad: Bytes, ciphertext: Bytes) -> bytes:
            """DECRYPT(k, n, ad, ciphertext): the plaintext. Raises ValueError if it is not authentic."""
            if len(ciphertext) < TAGLEN:
                raise ValueError("shorter than its tag")
            cipher = ChaCha20_Poly1305.new(key=self._k, nonce=_NONCE.pack(n))
            if ad:
                cipher.update(ad)
            view = memoryview(ciphertext)
            return cipher.decrypt_and_verify(view[:-TAGLEN], view[-TAGLEN:])

elif BACKEND == "cryptography":
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    except ImportError:
        raise SettingError("MINIGPT_AEAD=cryptography, but that package is not installed: get the extra fast") from None

    class Cipher:  # type: ignore[no-redef]
        """The AEAD under one key k, 32 bytes, which is set up once: that takes as long as a record of a token."""

        __slots__ = ("_cipher",)

        def __init__(self, k: bytes) -> None:
            self._cipher = ChaCha20Poly1305(k)

        def encrypt(self, n: int, ad: Bytes, plaintext: Bytes) -> bytes:
            return self._cipher.encrypt(_NONCE.pack(n), plaintext, ad)

        def decrypt(self, n: int, ad: Bytes, ciphertext: Bytes) -> bytes:
            try:
                return self._cipher.decrypt(_NONCE.pack(n), ciphertext, ad)
            except InvalidTag:
                raise ValueError("MAC check failed") from None

else:
    raise SettingError(f"MINIGPT_AEAD is {BACKEND!r}, wanted pycryptodome or cryptography")
