#!/usr/bin/python3.11 -IBS
"""Process 1 of an image of the plain layout: prepares the system, runs the image's command in rootfs/, and halts.

It lies in the boot ramdisk as /init. The application ramdisk beside it holds what the vendor's init of a Nitro enclave
also expects: /cmd (one argument a line), /env (one NAME=value a line) and rootfs/. It loads the kernel's modules,
brings the network up where the command line says how, mounts what a stage needs (devices, processes' own entries, and
in a guest of SEV-SNP or TDX the kernel's folders for its reports), and then takes away what nobody needs any more: no
module or other kernel can be loaded, and rootfs is read-only.
"""

import ctypes
import errno
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

NETWORK = "minigpt.network="  # ADDRESS/PREFIX,GATEWAY on the kernel's command line
REPORTERS = ("sev-guest", "tdx-guest")  # drivers that refuse with ENODEV where they have nothing to drive
FINIT_MODULE = 313  # system call of x86-64
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, MOVE = 1, 2, 4, 8, 32, 4096, 8192  # flags of mount(2)
POWER_OFF = 0x4321FEDC
SIOCADDRT, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
IFF_UP, RTF_UP, RTF_GATEWAY = 1, 1, 2

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: object) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(what))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    check(libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()), target)


def load_modules() -> bool:
    """Those of this kernel, in the order of their names; another kernel (user-mode Linux) has them built in.

    Returns whether one can report on this machine.
    """
    reports = False
    folder = Path("/modules") / os.uname().release
    for module in sorted(folder.glob("*.ko")):
        reporter = module.stem.partition("-")[2] in REPORTERS
        with module.open("rb") as file:
            result = libc.syscall(FINIT_MODULE, file.fileno(), b"", 0)
        if not (reporter and result < 0 and ctypes.get_errno() == errno.ENODEV):
            check(result, module)
            reports = reports or reporter
    return reports


def mount_reports() -> None:
    """The kernel's folders for reports (configfs-tsm), where attest/tsm.py looks for them; nothing else of /sys."""
    folder = Path("/rootfs/sys/kernel/config")
    folder.mkdir(parents=True)
    mount("configfs", str(folder), "configfs", NOSUID | NODEV | NOEXEC)


def raise_interface(name: str, address: str | None = None) -> None:
    def settings(host: str) -> bytes:
        return struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(host))

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if address is not None:
            interface = ipaddress.IPv4Interface(address)
            fcntl.ioctl(sock, SIOCSIFADDR, settings(str(interface.ip)))
            fcntl.ioctl(sock, SIOCSIFNETMASK, settings(str(interface.netmask)))
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), IFF_UP))


def route(gateway: str) -> None:
    def place(host: str) -> bytes:
        return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(host))

    any_host = place("0.0.0.0")
    entry = struct.pack("=Q16s16s16sH62x", 0, any_host, place(gateway), any_host, RTF_UP | RTF_GATEWAY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCADDRT, entry)


def network(command_line: str) -> None:
    raise_interface("lo")
    settings = [word.removeprefix(NETWORK) for word in command_line.split() if word.startswith(NETWORK)]
    if not settings:
        return
    address, gateway = settings[0].split(",")
    for _ in range(100):  # a driver may take a moment to find its card
        names = [name for _, name in socket.if_nameindex() if name.startswith(("eth", "en", "vec"))]
        if names:
            raise_interface(names[0], address)
            route(gateway)
            return
        time.sleep(0.05)
    raise OSError("the command line names a network, but there is no network card")


def forbid(setting: str) -> None:
    path = Path("/rootfs/proc/sys/kernel") / setting
    if path.exists():
        path.write_text("1")


def enter() -> None:
    """In the child: the image's rootfs becomes its whole world."""
    os.chdir("/rootfs")
    mount(".", "/", flags=MOVE)
    os.chroot(".")
    os.chdir("/")


def run() -> int:
    command = Path("/cmd").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in Path("/env").read_text().splitlines())
    mount("/rootfs", "/rootfs", flags=BIND)
    mount("proc", "/rootfs/proc", "proc", NOSUID | NODEV | NOEXEC, "hidepid=2")
    mount("dev", "/rootfs/dev", "devtmpfs", NOSUID | NOEXEC)
    if load_modules():
        mount_reports()
    network(Path("/rootfs/proc/cmdline").read_text())
    for setting in ("modules_disabled", "kexec_load_disabled", "dmesg_restrict"):
        forbid(setting)
    mount("", "/rootfs", flags=REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    with open("/rootfs/dev/null", "rb") as nothing:
        return subprocess.run(command, env=environment, preexec_fn=enter, stdin=nothing, check=False).returncode


if __name__ == "__main__":
    try:
        print(f"minigpt image: the stage ended with code {run()}", flush=True)
    except Exception as error:  # whatever it was: process 1 must not end, or the kernel panics
        print(f"minigpt image: cannot run: {type(error).__name__}: {error}", flush=True)
    finally:
        os.sync()
        libc.reboot(POWER_OFF)
