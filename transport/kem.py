"""ML-KEM-768 (FIPS 203) from pycryptodome, for suite 2: a key exchange that a quantum computer does not break.

pycryptodome's public interface has no bare encapsulation, so two private methods are called here, and nowhere else.
The tests compare them with another library.
"""

from Crypto.PublicKey import MLKEM

EKLEN = 1184  # bytes of an encapsulation key
CTLEN = 1088  # bytes of a ciphertext


class KemKey:
    """A fresh key pair. `public` is the encapsulation key."""

    def __init__(self) -> None:
        self._key = MLKEM.generate(param_set=MLKEM.ML_KEM_768)
        self.public = bytes(self._key.ek)

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The shared secret, 32 bytes. An altered ciphertext gives a different one (implicit rejection)."""
        return bytes(self._key._decaps(ciphertext))


def encapsulate(public: bytes) -> tuple[bytes, bytes]:
    """A ciphertext for the owner of `public`, and the shared secret, 32 bytes.

    Raises ValueError if that is no encapsulation key, by its length or FIPS 203's modulus check (section 7.2).
    """
    shared, ciphertext = MLKEM.construct(param_set=MLKEM.ML_KEM_768, ek=public)._encaps()
    return bytes(ciphertext), bytes(shared)
