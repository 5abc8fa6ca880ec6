"""Packages that images are made of: Debian's and Python's, pinned by a lock file, fetched by the ordinary clients.

The lock file (image.lock) is JSON: groups of packages, each with its name, version and the SHA-256 of its file. It
names no host: where packages come from is the business of apt and pip on this machine, and what they bring is taken
only if its SHA-256 is the locked one. An archive drops old versions; then `update` locks what it has instead.

    kernel            boots images in qemu, and gives the modules that go with it
    interpreter       Python and the libraries that it and the wheels need
    wheels            what the stage imports
    user-mode-linux   not in any image: a kernel as a program, and a user-mode network, to run images anywhere

`python scripts/image/packages.py` fetches the last group, unpacks it into the cache, and prints the folder.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

from attest.document import write_file

LOCK = Path(__file__).with_name("image.lock")
FORMAT = "minigpt-image-lock-1"
PYTHON = "3.11"  # of the interpreter in the image, which the wheels must fit
WHEELS = "wheels"
KERNEL = "kernel"
UML = "user-mode-linux"
GROUPS = {
    # A package that is empty, and depends on the kernel of the day. Debian 12's cloud kernel of old, 6.1, has no driver
    # for SNP's reports and TDX's quotes.
    KERNEL: ["linux-image-6.12-cloud-amd64"],
    "interpreter": [
        f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib",
        "libc6", "libexpat1", "libffi8", "libgcc-s1", "libstdc++6", "zlib1g",
    ],
    WHEELS: ["numpy", "pycryptodome", "msgpack", "safetensors"],
    UML: ["user-mode-linux", "libslirp0", "libglib2.0-0", "libpcre2-8-0"],
}  # fmt: skip
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux2014_x86_64"]  # the image's C library is 2.36


class PackageError(Exception):
    """A package cannot be had, or is not the locked one; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One package of the lock file: `sha256` is its file's, in hex."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class File:
    """A file, or a symbolic link, of a package."""

    path: str  # without a slash in front
    data: bytes
    executable: bool = False
    target: str | None = None  # of a symbolic link


Lock = dict[str, list[Package]]


def read_lock(path: Path = LOCK) -> Lock:
    """The packages of a lock file, by group. Raises PackageError."""
    try:
        document = json.loads(path.read_text())
        if document.pop("format") != FORMAT:
            raise ValueError
        return {group: [Package(**package) for package in packages] for group, packages in document.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PackageError(f"{path}: not a lock file ({type(error).__name__}): make one with --update-lock") from None


def cache_folder() -> Path:
    """Where fetched packages are kept: `minigpt-packages` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt-packages"


def fetch(group: str, package: Package, cache: Path) -> Path:
    """The package's file, from the cache or else from its archive. Raises PackageError."""
    suffix = ".whl" if group == WHEELS else ".deb"
    kept = cache / (package.sha256 + suffix)
    if kept.is_file() and _sha256(kept) == package.sha256:
        return kept
    with tempfile.TemporaryDirectory() as folder:
        equals = "==" if group == WHEELS else "="
        (found,) = _download(group, [package.name + equals + package.version], Path(folder))
        if _sha256(found) != package.sha256:
            raise PackageError(
                f"{package.name} {package.version}: sha256 {_sha256(found)}, the lock file wants {package.sha256}: "
                "the archive has another build of that version, or was tampered with; look before you --update-lock"
            )
        _keep(found, kept)
    return kept


def update(path: Path, cache: Path) -> Lock:
    """Locks what the archives have today: fetches it, and writes the lock file. Raises PackageError."""
    lock: Lock = {}
    for group, names in GROUPS.items():
        if group == WHEELS:
            lock[group] = _newest_wheels(names, cache)
        else:
            lock[group] = _newest_debs([_kernel_of_the_day(name) if group == KERNEL else name for name in names])
        for package in lock[group]:
            fetch(group, package, cache)
    document = {group: [vars(package) for package in packages] for group, packages in lock.items()}
    write_file(path, json.dumps({"format": FORMAT} | document, indent=2) + "\n")
    return lock


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(found: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_file(kept, found.read_bytes())  # whole or not at all, whoever else fetches it


def _download(group: str, wanted: list[str], folder: Path) -> list[Path]:
    """Fetches packages, each a name or a name and a version as the client of their archive wants it, into a folder."""
    if group == WHEELS:
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest=."]
        command += [f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    else:
        command = ["apt-get", "download"]
    _run([*command, *wanted], folder, ", ".join(wanted))
    files = list(folder.iterdir())
    if len(files) != len(wanted):
        raise PackageError(f"{', '.join(wanted)}: {command[0]} brought {len(files)} files, wanted {len(wanted)}")
    return files


def _run(command: list[str], folder: Path | None, what: str) -> str:
    try:
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    except OSError as error:
        raise PackageError(f"{what}: cannot run {command[0]}: {error.strerror}; wanted on Debian or Ubuntu, "
                           "or with the packages in the cache already") from None  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PackageError(
            f"{what}: not to be had: {said}\nIf apt's lists are old, run `apt-get update`. If the archive has dropped "
            "this version, lock the present one with `python scripts/image/build.py --update-lock`; images then "
            "measure to something else, and manifests must pin that."
        )
    return done.stdout


def _kernel_of_the_day(name: str) -> str:
    words = _run(["apt-cache", "depends", "--important", name], None, name).split()
    found = [word for word in words if word.startswith("linux-image-")]
    if len(found) != 2:
        raise PackageError(f"{name}: depends on {found[1:]}, wanted one kernel: run `apt-get update`")
    return found[1]


def _newest_debs(names: list[str]) -> list[Package]:
    shown = _run(["apt-cache", "show", "--no-all-versions", *names], None, names[0])
    found = {}
    for stanza in shown.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in stanza.splitlines() if re.match("(Package|Version|SHA256): ", line)
        )
        if len(fields) == 3:
            found[fields["Package"]] = Package(fields["Package"], fields["Version"], fields["SHA256"])
    missing = [name for name in names if name not in found]
    if missing:
        raise PackageError(f"{', '.join(missing)}: apt knows no version: run `apt-get update`")
    return [found[name] for name in names]


def _newest_wheels(names: list[str], cache: Path) -> list[Package]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in _download(WHEELS, names, Path(folder)):
            name, version = path.name.split("-")[:2]
            found[name] = Package(name, version, _sha256(path))
            _keep(path, cache / (found[name].sha256 + path.suffix))
    return [found[name] for name in names]


def deb_files(path: Path) -> Iterator[File]:
    """The files of a Debian package: an `ar` archive with a tar in it. Raises PackageError."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise PackageError(f"{path}: not a Debian package")
        while header := file.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            data = file.read(size + size % 2)
            if name.startswith("data.tar"):
                break
        else:
            raise PackageError(f"{path}: has no data.tar")
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                place = member.name.removeprefix("./")
                if member.issym():
                    yield File(place, b"", target=member.linkname)
                elif member.isfile() or member.islnk():
                    content = archive.extractfile(member)
                    yield File(place, content.read() if content else b"", executable=bool(member.mode & stat.S_IXUSR))
    except tarfile.ReadError:
        raise PackageError(f"{path}: {name} is compressed in a way that this Python cannot read") from None


def wheel_files(path: Path) -> Iterator[File]:
    """The files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not name.endswith("/"):
                yield File(name, archive.read(name))


def unpack(package: Path, folder: Path) -> None:
    """Writes a Debian package's files into a folder, as `dpkg-deb -x` does."""
    for file in deb_files(package):
        place = folder / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.target is not None:
            place.symlink_to(file.target)
        else:
            write_file(place, file.data)
            place.chmod(0o755 if file.executable else 0o644)


def unpacked(lock: Lock, group: str, cache: Path) -> Path:
    """A folder in the cache where a group of Debian packages is unpacked. Raises PackageError."""
    folder = cache / "-".join([group, *(package.sha256[:8] for package in lock[group])])
    if not folder.is_dir():
        files = [fetch(group, package, cache) for package in lock[group]]
        with tempfile.TemporaryDirectory(dir=cache) as made:
            for file in files:
                unpack(file, Path(made, "root"))
            with contextlib.suppress(OSError):  # somebody else was faster
                Path(made, "root").rename(folder)
    return folder


if __name__ == "__main__":
    try:
        print(unpacked(read_lock(), UML, cache_folder()))
    except (PackageError, OSError) as problem:
        sys.exit(f"packages.py: {problem}")
