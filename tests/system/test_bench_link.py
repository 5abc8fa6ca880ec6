"""`scripts/bench/link.py`: a short form of it."""

import subprocess
import sys
from importlib.util import find_spec

from processes import ROOT

WHAT = [
    "handshake, suite 1", "stranger, suite 1", "handshake, suite 2", "stranger, suite 2", "message, 1 MiB",
    "message, 3 KiB",
]  # fmt: skip


def test_each_cipher_has_its_handshakes_and_messages_measured() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "link.py"), "--handshakes", "2", "--megabytes", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stderr) == (0, "")
    _, _, _, _, *lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    ciphers = ["pycryptodome", *(["cryptography"] if find_spec("cryptography") else [])]
    assert [row[:2] for row in rows] == [[cipher, what] for cipher in ciphers for what in WHAT]
    for _, what, rate, megabytes, ms, *used in rows:
        assert float(rate) > 0
        assert (megabytes == "–") if not what.startswith("message") else (float(megabytes) > 0)
        assert float(ms) > 0
        assert len(used) == 2
        assert all(float(value) > 0 for value in used)
