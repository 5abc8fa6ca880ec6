"""Process 1 of a user-mode Linux guest: mounts what a program needs, loads AF_VSOCK, runs one job, and halts.

`guest.py` starts it. Its one argument is a file of JSON: the modules to load, in order, and the job's command, folder
and environment. The guest sees the host's files, read-only; what it writes goes to memory. It says how the job ended
in the last line that it prints, because the kernel's own exit code says nothing.
"""

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_FINIT_MODULE, _REBOOT = 313, 169  # system calls of x86-64 without a function, or with another, in the C library
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def check(result: int, what: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


def mount(kind: str, place: str) -> None:
    check(_LIBC.mount(kind.encode(), place.encode(), kind.encode(), 0, None), place)


def load(module: str) -> None:
    with open(module, "rb") as file:
        check(_LIBC.syscall(_FINIT_MODULE, file.fileno(), b"", 0), module)


def raise_loopback() -> None:
    """127.0.0.1 is there once the interface `lo` is up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def run() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())  # before /run and /dev hide what the host has there
    for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run")):
        mount(kind, place)
    Path("/dev/shm").mkdir()  # the kernel has mounted /dev, and left it without this and the next
    mount("tmpfs", "/dev/shm")
    Path("/dev/fd").symlink_to("/proc/self/fd")
    raise_loopback()
    for module in job["modules"]:
        load(module)
    environment = job["environment"] | {"TMPDIR": "/dev/shm", "HOME": "/run"}
    return subprocess.run(job["command"], cwd=job["folder"], env=environment, check=False).returncode


if __name__ == "__main__":
    try:
        outcome = str(run())
    except Exception as error:
        outcome = repr(error)
    print(f"\nguest: {outcome}", flush=True)
    _LIBC.syscall(_REBOOT, 0xFEE1DEAD, 672274793, 0x4321FEDC, 0)  # reboot(2): two magic numbers, then "power off"
