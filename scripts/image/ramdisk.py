"""What is in an image's two ramdisks, and how it is packed: the same content always gives the same bytes.

    boot           init, modules/RELEASE/*.ko, dev/console; lib, lib64 and usr, which are links into rootfs/
    application    cmd, env, rootfs/: interpreter, wheels, the three packages, start.py, the stage's tensors

The kernel unpacks one after the other into the same place.
"""

import io
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from attest.measure import PACKAGES
from scripts.image import packages

ROOT = Path(__file__).resolve().parents[2]

PYTHON = f"usr/bin/python{packages.PYTHON}"
SITE = "usr/lib/python3/dist-packages"  # where Debian's interpreter looks for packages
START = "usr/lib/minigpt/start.py"
MODEL = "model"
SHARED = "lib/x86_64-linux-gnu"

# The modules that find a network card or a vsock under qemu and in confidential virtual machines, and those by which
# such a machine reports on itself, in loading order. The kernel has the rest of virtio built in.
MODULES = [
    "drivers/virtio/virtio_mmio.ko", "net/core/failover.ko", "drivers/net/net_failover.ko", "drivers/net/virtio_net.ko",
    "net/vmw_vsock/vsock.ko", "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko",
    "fs/configfs/configfs.ko", "drivers/virt/coco/tsm.ko", "drivers/virt/coco/sev-guest/sev-guest.ko",
    "drivers/virt/coco/tdx-guest/tdx-guest.ko",
]  # fmt: skip

# What a stage needs of Debian's packages: the interpreter, its library, and a few shared objects.
WANTED = [
    PYTHON, f"usr/lib/python{packages.PYTHON}/*",
    *(f"{place}/{name}" for place in (SHARED, f"usr/{SHARED}") for name in (
        "ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1",
        "libexpat.so.*", "libffi.so.*", "libgcc_s.so.*", "libstdc++.so.*[0-9]", "libz.so.*",
    )),
    "lib64/ld-linux-x86-64.so.2",
]  # fmt: skip
# What it does not need of what is left: other programs' modules, those whose libraries are not here, tests, headers.
UNWANTED = [
    f"usr/lib/python{packages.PYTHON}/{part}" for part in (
        "asyncio/*", "curses/*", "dbm/*", "distutils/*", "ensurepip/*", "email/*", "html/*", "http/*", "idlelib/*",
        "lib2to3/*", "multiprocessing/*", "pydoc_data/*", "sqlite3/*", "test/*", "tkinter/*", "tomllib/*", "turtle*",
        "unittest/*", "venv/*", "wsgiref/*", "xml/*", "xmlrpc/*", "zoneinfo/*", "pydoc.py", "pdb.py", "doctest.py",
        "smtp*", "ftplib*", "imaplib*", "nntplib*", "poplib*", "telnetlib*", "mailbox*", "_sysconfigdata*", "config-*",
        *(f"lib-dynload/{name}.*" for name in (
            "_asyncio", "_bz2", "_codecs_*", "_crypt", "_ctypes_test", "_curses*", "_dbm", "_decimal", "_hashlib",
            "_lsprof", "_lzma", "_multibytecodec", "_multiprocessing", "_posixshmem", "_sqlite3", "_ssl", "_test*",
            "_uuid", "_xx*", "_zoneinfo", "audioop", "nis", "ossaudiodev", "readline", "xx*",
        )),
    )
] + [
    f"{SITE}/{part}" for part in (
        "*.pyi", "*/tests/*", "*.dist-info/*", "Crypto/SelfTest/*", "numpy/_core/include/*", "numpy/_core/lib/*",
        "numpy/_core/_simd.*", "numpy/f2py/*", "numpy/_pyinstaller/*", "numpy/conftest.py", "numpy/*.pxd",
        "numpy/random/lib/*", "numpy/random/_examples/*", "safetensors/torch.py", "safetensors/tensorflow.py",
        "safetensors/flax.py", "safetensors/paddle.py", "safetensors/mlx.py",
    )
]  # fmt: skip


class RamdiskError(Exception):
    """A ramdisk cannot be made."""


@dataclass(frozen=True)
class Entry:
    """A file, folder, link or device of a ramdisk: `mode` as in stat(2), `data` a file's content or a link's target."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    @classmethod
    def file(cls, data: bytes, *, executable: bool = False) -> "Entry":
        return cls(0o100755 if executable else 0o100644, data)

    @classmethod
    def link(cls, target: str) -> "Entry":
        return cls(0o120777, target.encode())


FOLDER = Entry(0o040755)
CONSOLE = Entry(0o020600, device=(5, 1))
Tree = dict[str, Entry]


def cpio(tree: Mapping[str, Entry]) -> bytes:
    """An archive that the kernel unpacks at boot (newc; kernel documentation, early-userspace/buffer-format).

    Folders are added, everything is sorted, owned by root and of the year 1970: the same tree gives the same bytes.
    """
    folders = {str(parent) for path in tree for parent in Path(path).parents if str(parent) != "."}
    entries = dict.fromkeys(folders, FOLDER) | dict(tree)
    ordered = [*sorted(entries.items(), key=lambda item: item[0].encode()), ("TRAILER!!!", Entry(0))]
    parts = []
    for number, (path, entry) in enumerate(ordered, start=1):
        name = path.encode() + b"\0"
        size, (major, minor) = len(entry.data), entry.device
        fields = [number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name), 0]
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        parts += [header, bytes(-len(header) % 4), entry.data, bytes(-size % 4)]
    total = sum(map(len, parts))
    return b"".join([*parts, bytes(-total % 512)])


def tar(tree: Mapping[str, Entry]) -> bytes:
    """A tar of files and links, as container images are made of; deterministic like `cpio`."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, entry in sorted(tree.items()):
            member = tarfile.TarInfo(path)
            member.mode = entry.mode & 0o777
            if entry.mode & 0o170000 == 0o120000:
                member.type, member.linkname = tarfile.SYMTYPE, entry.data.decode()
            elif entry == FOLDER:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(entry.data)
            archive.addfile(member, io.BytesIO(entry.data))
    return made.getvalue()


def boot(kernel_files: Mapping[str, bytes]) -> bytes:
    """Process 1, the modules, and the ways by which process 1 finds its interpreter in the other ramdisk."""
    tree = {"dev/console": CONSOLE, "init": Entry.file(_script("init.py"), executable=True)}
    tree |= {name: Entry.link(f"rootfs/{name}") for name in ("lib", "lib64", "usr")}
    for number, module in enumerate(MODULES):
        found = [path for path in kernel_files if path.endswith(f"/kernel/{module}.xz")]
        if len(found) != 1:
            raise RamdiskError(f"kernel: its package has {len(found)} files {module}.xz, wanted one")
        release = found[0].split("/")[2]
        data = lzma.decompress(kernel_files[found[0]])
        tree[f"modules/{release}/{number:02}-{Path(module).name}"] = Entry.file(data)
    return cpio(tree)


def application(rootfs: Mapping[str, Entry], command: Sequence[str], environment: Mapping[str, str]) -> bytes:
    """What PCR2 measures: the stage, its weights, and how it is started."""
    tree = {f"rootfs/{path}": entry for path, entry in rootfs.items()}
    tree["cmd"] = Entry.file("".join(f"{word}\n" for word in command).encode())
    tree["env"] = Entry.file("".join(f"{name}={value}\n" for name, value in environment.items()).encode())
    return cpio(tree)


def system(lock: packages.Lock, cache: Path) -> Tree:
    """The interpreter, its libraries and the wheels, without what a stage does not need."""
    tree = dict.fromkeys(("dev", "proc", "run", "sys", "tmp"), FOLDER)  # where whoever starts it mounts things
    for package in lock["interpreter"]:
        for file in packages.deb_files(packages.fetch("interpreter", package, cache)):
            if _any(file.path, WANTED) and not _any(file.path, UNWANTED):
                link = file.target is not None
                tree[file.path] = (
                    Entry.link(str(file.target)) if link else Entry.file(file.data, executable=file.executable)
                )
    for package in lock[packages.WHEELS]:
        for file in packages.wheel_files(packages.fetch(packages.WHEELS, package, cache)):
            if not _any(f"{SITE}/{file.path}", UNWANTED):
                tree[f"{SITE}/{file.path}"] = Entry.file(file.data)
    return tree


def _any(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def code() -> Tree:
    """The three packages' sources, all of them: what `python -m attest measure` measures, and nothing else."""
    sources = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    tree = {f"{SITE}/{path.relative_to(ROOT)}": Entry.file(path.read_bytes()) for path in sources}
    return tree | {START: Entry.file(_script("start.py"))}


def _script(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()
