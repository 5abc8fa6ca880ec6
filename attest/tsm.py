"""The kernel's folder for reports, configfs-tsm (Linux 6.7): one for SNP and TDX alike.

Root makes the folder once. What is written into `inblob` is what the next report is about; `outblob` and `auxblob` are
that report, and what else the host gave with it. Each write raises `generation` by one: so two that use the folder at
the same time find out, and ask again.
"""

import os
import threading

from attest import AttestationError
from attest.document import read_file

FOLDER = "/sys/kernel/config/tsm/report/minigpt"
MAX_BLOB = 32 * 1024  # bytes; the kernel's own limit
TRIES = 3
_LOCK = threading.Lock()  # one folder, one at a time


def report(data: bytes, provider: str, *, folder: str = FOLDER) -> tuple[bytes, bytes]:
    """A report about `data`, 64 bytes, and the auxiliary data of SNP's (else none). The kernel bounds the wait.

    Args:
        provider: the kernel's name of the platform that is wanted: "sev_guest" or "tdx_guest".

    Raises AttestationError.
    """
    try:
        with _LOCK:
            found = _read(folder, "provider").decode("ascii", "replace").strip()
            if found != provider:
                raise AttestationError(f"{folder}: got the provider {found[:40]!a}, wanted {provider}")
            for _ in range(TRIES):
                before = _generation(folder)
                _write(folder, data)
                made = _read(folder, "outblob")
                more = _read(folder, "auxblob") if provider == "sev_guest" else b""
                if _generation(folder) == before + 1:
                    return made, more
    except OSError as error:
        raise AttestationError(f"{folder}: {error.strerror}: wanted what the kernel makes for a guest") from None
    raise AttestationError(f"{folder}: others asked at the same time, {TRIES} times: give each stage its own folder")


def _generation(folder: str) -> int:
    text = _read(folder, "generation").strip()
    if not text.isdigit() or len(text) > 20:
        raise AttestationError(f"{folder}: got a generation that is no number")
    return int(text)


def _write(folder: str, data: bytes) -> None:
    descriptor = os.open(os.path.join(folder, "inblob"), os.O_WRONLY | os.O_CLOEXEC)
    try:
        if os.write(descriptor, data) != len(data):  # at once: the kernel takes each write for a whole
            raise AttestationError(f"{folder}: inblob took a part of {len(data)} bytes")
    finally:
        os.close(descriptor)


def _read(folder: str, name: str) -> bytes:
    data = read_file(os.path.join(folder, name), MAX_BLOB)
    if len(data) > MAX_BLOB:
        raise AttestationError(f"{folder}: got more than {MAX_BLOB} bytes of {name}")
    return data
