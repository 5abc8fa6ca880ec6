"""The command of an image: gives the stage what it asks for evidence, gives up every privilege, and becomes the stage.

It runs as root inside the image's rootfs, whoever was process 1: ours, or the vendor's in a Nitro enclave.
Its arguments are those of `python -m minigpt.stage`, fixed when the image was built.
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

NOBODY = 65534
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 23, 24, 38
ISOLATED = "/usr/lib/python3/dist-packages/minigpt/launch/isolated.py"  # all packages of the image lie there
# What makes evidence: the stage may use it, and no other device.
NSM = Path("/dev/nsm")  # in a Nitro enclave
REPORTS = Path("/sys/kernel/config/tsm/report")  # in a guest of SEV-SNP or TDX: each folder below is a place to ask

libc = ctypes.CDLL(None, use_errno=True)


def give_devices() -> None:
    """What cannot be given, the stage misses and says so."""
    if NSM.exists():
        os.chown(NSM, NOBODY, NOBODY)
    with suppress(OSError):
        folder = REPORTS / "minigpt"
        folder.mkdir(exist_ok=True)  # the kernel fills it
        os.chown(folder / "inblob", NOBODY, NOBODY)  # to ask with; the answer is for all to read


def drop_privileges() -> None:
    capability = 0
    while libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1:
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "cannot drop capabilities")
        capability += 1
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot forbid new privileges")


if __name__ == "__main__":
    give_devices()
    drop_privileges()
    os.execv(sys.executable, [sys.executable, "-IBS", ISOLATED, "", "minigpt.stage", *sys.argv[1:]])
