"""The two libraries that may compute the AEAD write the same bytes, and refuse the same."""

import os
import subprocess
import sys

import pytest
from processes import ROOT

SCRIPT = """
import hashlib, sys
from transport import aead
def text(n): return hashlib.shake_128(b"%d" % n).digest(n)
said, cipher = hashlib.sha256(), aead.Cipher(text(32))
for n in (0, 1, 15, 16, 63, 64, 65, 3072, 65519):
    for ad in (b"", b"ad"):
        sealed = cipher.encrypt(2**40 + n, ad, memoryview(text(n)))
        said.update(sealed)
        assert cipher.decrypt(2**40 + n, ad, bytearray(sealed)) == text(n)
        for bad in (sealed[:-1], sealed[1:], sealed[:-1] + bytes([sealed[-1] ^ 1]), b""):
            try:
                cipher.decrypt(2**40 + n, ad, bad)
            except ValueError:
                continue
            raise AssertionError("accepted")
print(aead.BACKEND, said.hexdigest(), sum(name in sys.modules for name in ("Crypto.Cipher", "cryptography")))
"""


def run(backend: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MINIGPT_AEAD": backend}
    return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_the_two_libraries_write_the_same_bytes_and_only_one_is_loaded() -> None:
    pytest.importorskip("cryptography", reason="the extra fast is not installed")
    (one, first, loaded), (two, second, also) = (run(name).stdout.split() for name in ("pycryptodome", "cryptography"))
    assert (one, two) == ("pycryptodome", "cryptography")
    assert first == second
    assert loaded == also == "1"


def test_another_name_is_refused_in_words() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minigpt", "keygen", "-o", os.devnull],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"MINIGPT_AEAD": "openssl"},
    )
    assert done.returncode == 2
    assert done.stderr == "minigpt: MINIGPT_AEAD is 'openssl', wanted pycryptodome or cryptography\n"
