"""Runs one command in a user-mode Linux: a kernel as an ordinary process, without root, that has vsock over loopback.

    python tests/system/uml/guest.py python -m pytest tests/system/test_vsock.py

Its one dependency is Debian's package user-mode-linux, installed, or unpacked into a folder that MINIGPT_UML names:

    apt-get download user-mode-linux && dpkg-deb -x user-mode-linux_*.deb FOLDER

The guest has one processor and sees the host's files, read-only, but for /dev, /run and /sys, which are its own; what
lies in those on the host (a checkout in /dev/shm, say) is not there. Its TMPDIR is in memory.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INIT = Path(__file__).with_name("init.py")
# In the order of their dependencies. `cuse` makes devices of processes.
MODULES = ("vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback", "fuse", "cuse")


class NoGuest(Exception):
    """There is no user-mode Linux here; the message says where it was looked for."""


@dataclass(frozen=True)
class Result:
    """How a command ended: its exit code, None if the guest did not get that far, and all that the guest printed."""

    code: int | None
    output: str


def find() -> Path:
    """The root of the package's files. Raises NoGuest."""
    named = os.environ.get("MINIGPT_UML")
    found = shutil.which("linux.uml", path=f"{named}/usr/bin" if named else None)
    if found is None:
        where = f"in MINIGPT_UML={named}" if named else "on PATH, and MINIGPT_UML names no folder"
        raise NoGuest(f"no linux.uml {where}: it is Debian's package user-mode-linux")
    if " amx_tile" in Path("/proc/cpuinfo").read_text():
        raise NoGuest("user-mode Linux 6.1 has no room for the registers of a CPU with AMX, as this one")
    return Path(found).resolve().parents[2]


def run(command: Sequence[str], *, timeout: float, memory: int = 1024, show: bool = False) -> Result:
    """Boots a guest, runs `command` in the present folder, and halts it.

    Args:
        timeout: seconds for all of it; then it is killed.
        memory: MiB; a file in TMPDIR or /dev/shm that grows with use.
        show: print what the guest prints, as it comes.

    Raises:
        NoGuest: there is no user-mode Linux here.
    """
    root = find()
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.json")
        job.write_text(
            json.dumps(
                {
                    "modules": [str(_module(root, name)) for name in MODULES],
                    "command": list(command),
                    "folder": os.getcwd(),
                    "environment": {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
                }
            )
        )
        kernel = [
            str(root / "usr/bin/linux.uml"), f"mem={memory}M", f"uml_dir={folder}/",
            "rootfstype=hostfs", "rootflags=/", "ro", "con=null", "con0=null,fd:1", "quiet",
            f'init="{sys.executable}"', "--", "-P", f'"{INIT}"', f'"{job}"',
        ]  # fmt: skip
        process = subprocess.Popen(
            kernel, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        timer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))  # a guest is several processes
        timer.start()
        try:
            return _follow(process, show)
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _follow(process: "subprocess.Popen[bytes]", show: bool) -> Result:
    assert process.stdout is not None
    lines = []
    with process.stdout as stream:
        for data in stream:
            lines.append(data.decode(errors="replace").rstrip("\r\n"))
            if show:
                print(lines[-1], flush=True)
    output = "\n".join(lines)
    said = re.findall(r"^guest: (\d+)$", output, re.MULTILINE)
    return Result(int(said[-1]) if said else None, output)


def _module(root: Path, name: str) -> Path:
    found = sorted((root / "usr/lib/uml/modules").glob(f"*/kernel/**/{name}.ko"))
    if not found:
        raise NoGuest(f"no module {name} below {root / 'usr/lib/uml/modules'}")
    return found[-1]


if __name__ == "__main__":
    try:
        ended = run(sys.argv[1:], timeout=3600, show=True)
    except NoGuest as error:
        sys.exit(f"guest.py: {error}")
    sys.exit(1 if ended.code is None else ended.code)
