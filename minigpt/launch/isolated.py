"""Starts Python with the packages of this folder, and with nothing else that this machine's Python would run by itself.

    python -I -S minigpt/launch/isolated.py FOLDERS MODULE [ARGUMENT …]

With -I -S, Python runs no sitecustomize and no `.pth` file, and reads no PYTHON… variable; it finds the standard
library and nothing else. This file, run as a script, then adds the folder that holds it and the folders of the
packages that a stage imports, after the standard library, and runs a module as `python -m` would.
"""

import importlib.util
import os
import re
import runpy
import sys

HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PACKAGES = ("numpy", "safetensors", "msgpack", "Crypto", "cryptography", "_cffi_backend")  # the last two are optional


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of these packages. Raises FileNotFoundError if there is no Python."""
    found = [spec.origin for name in PACKAGES if (spec := importlib.util.find_spec(name)) is not None and spec.origin]
    # A package's origin is its __init__.py; a module's is the file itself.
    folders = {os.path.dirname(os.path.dirname(path) if "__init__" in path else path): None for path in found}
    return [interpreter(), "-I", "-S", os.path.abspath(__file__), os.pathsep.join(folders), module, *arguments]


def interpreter() -> str:
    """The Python that runs this. `sys.executable` may be empty, or the program that Python is embedded in."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [sys.executable, getattr(sys, "_base_executable", None), os.path.join(sys.exec_prefix, "bin", name)]
    for path in filter(None, candidates):
        if re.match(r"python[0-9.]*$", os.path.basename(path)) and os.access(path, os.X_OK):
            return str(path)
    raise FileNotFoundError(
        f"got {sys.executable!r} as sys.executable, wanted a Python to start stages with: set sys.executable to one"
    )


if __name__ == "__main__":
    folders, module = sys.argv[1:3]
    sys.path += [HOME, *filter(None, folders.split(os.pathsep))]
    del sys.argv[1:3]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
