"""What the code measures to: one SHA-384 over the source of the three packages.

    SHA-384 over, for each *.py, in the order of the names' bytes:   u64 len | name | u64 len | content     (big-endian)

A name is the path below the folder that holds the packages, with "/" between its parts ("transport/noise.py"). The
lengths make it one-to-one: no bytes can move from a name to a content, or from one file to the next, unseen.

It covers the source on the disk, at the moment of measuring: not the interpreter, the dependencies, bytecode in
`__pycache__`, or what else the host may do to a process; only an enclave's image measures all of that. Data files are
not code: weights and manifest have digests of their own.

What could run without being measured, or is not where its name says, is refused, not skipped: symbolic links to code or
to folders (what they point at can change without anything here changing, and they can lead out of the package or round
in circles), compiled modules (an `x.so` beside `x.py` is imported instead of it), and any *.py that is no regular file.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

from attest import AttestationError

PACKAGES = ("attest", "minigpt", "transport")
_COMPILED = (".so", ".pyc", ".pyd")


class MeasurementError(AttestationError):
    """The code cannot be measured: it is not there, or something among it could run unmeasured."""

    exit_code = 1


def measure(root: Path | None = None) -> bytes:
    """The 48-byte measurement of the packages that lie in the folder `root`: by default, those that run here.

    Raises MeasurementError if there are none, one holds what is refused (above), or a file cannot be read; by default
    also if a module of theirs was loaded from anywhere else, because then it is not what runs that was measured.
    """
    folder = Path(os.path.abspath(__file__)).parent.parent if root is None else root
    sources: list[Path] = []
    digest = hashlib.sha384()
    try:
        for package in (folder / name for name in PACKAGES):
            if package.is_symlink():
                raise MeasurementError(f"{package}: got a symbolic link, wanted the package's own folder")
            if package.is_dir():
                sources += _sources(package)
        if not sources:
            raise MeasurementError(f"{folder}: got no source of {', '.join(PACKAGES)}, wanted the folder they lie in")
        for name, path in sorted((os.fsencode(path.relative_to(folder).as_posix()), path) for path in sources):
            for item in (name, path.read_bytes()):
                digest.update(len(item).to_bytes(8, "big") + item)
    except OSError as error:
        raise MeasurementError(f"{error.filename}: cannot be measured: {error.strerror}") from error
    if root is None:
        _check_loaded(folder)
    return digest.digest()


@functools.cache
def own() -> bytes:
    """The measurement of the packages that run here, made once: call it before anything waits.

    What is changed on the disk later does not run. Raises MeasurementError as `measure`.
    """
    return measure()


def _check_loaded(folder: Path) -> None:
    """Raises MeasurementError unless the loaded modules came from this folder's files, and later ones will."""
    for key, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        for name in {key, getattr(spec, "name", key)}:  # a program run with -m is called __main__
            if name.partition(".")[0] not in PACKAGES:
                continue
            path = os.path.join(folder, *name.split("."))
            file, places = getattr(module, "__file__", None), list(getattr(module, "__path__", []))
            wanted = os.path.join(path, "__init__.py") if places else path + ".py"
            plain = isinstance(getattr(spec, "loader", None), SourceFileLoader) and places in ([], [path])
            if not plain or file is None or os.path.abspath(file) != wanted:
                raise MeasurementError(f"{name} was loaded from {file}, wanted {wanted}, the code that is measured")


def _sources(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                if path.suffix == ".py" or path.suffix in _COMPILED or entry.is_dir():
                    raise MeasurementError(f"{path}: got a symbolic link to code, wanted the code itself")
            elif entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _sources(path)
            elif path.suffix in _COMPILED:
                raise MeasurementError(f"{path}: got compiled code, which would run unmeasured; wanted only source")
            elif path.suffix == ".py":
                if not entry.is_file():
                    raise MeasurementError(f"{path}: got something that is no regular file, wanted source")
                yield path
