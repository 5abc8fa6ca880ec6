"""Who may import whom, as a dict; and what a running stage has imported."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages

from minigpt.client import Pipeline

# Of the three packages, what each module may import. A package stands for its __init__ alone.
MAY_IMPORT = {
    "attest": set(),
    "attest.measure": {"attest"},
    "attest.mock": {"attest", "attest.measure", "attest.policy"},
    "attest.policy": {"attest"},
    "attest.__main__": {"attest", "attest.measure", "attest.mock", "attest.policy"},
}
OUTSIDE = {  # of what is not in the standard library
    "attest.mock": {"Crypto"},
    "attest.policy": {"msgpack"},
    "attest.__main__": {"Crypto", "msgpack"},
    "transport.aead": {"Crypto", "cryptography"},
    "transport.codec": {"msgpack"},
    "transport.kem": {"Crypto"},
    "transport.noise": {"Crypto"},
    "minigpt.config": set(),
    "minigpt.weights": {"numpy", "safetensors"},
    "minigpt.checkpoints": {"huggingface_hub"},
    "minigpt.tokenizer": {"tokenizers"},
}
KNOW_SOCKETS = {"minigpt.stage", "minigpt.serving", "minigpt.conversation", "minigpt.links", "minigpt.client",
                "minigpt.local"}  # fmt: skip
NUMPY_ONLY = {"minigpt.config", "minigpt.linalg", "minigpt.model", "minigpt.sampling", "minigpt.threads"}
LAZY = {"minigpt.checkpoints": "huggingface_hub", "minigpt.tokenizer": "tokenizers"}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("attest", "minigpt", "transport"):
        for path in sorted((ROOT / package).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def imports(path: Path, *, at_top: bool = False) -> set[str]:
    """Full names of what a module imports; what is for type checkers alone does not count."""
    names = set()
    tree = ast.parse(path.read_text())
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in tree.body if at_top else ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            assert node.level == 0, f"{path}: a relative import"
            known = modules()
            names |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in known}
            if any(f"{node.module}.{alias.name}" not in known for alias in node.names):
                names.add(str(node.module))
    return names


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_it_may(name: str) -> None:
    imported = imports(modules()[name])
    ours = {module for module in imported if module.split(".")[0] in ("attest", "minigpt", "transport")}
    package = name.split(".", maxsplit=1)[0]
    if package == "attest":
        assert ours <= MAY_IMPORT[name]
    elif package == "transport":
        assert {module for module in ours if not module.startswith("transport")} <= {"attest"}
    else:
        sockets = {module for module in ours if module in ("transport.channel", "transport.sockets", "socket")}
        assert not sockets or name in KNOW_SOCKETS
        if name in NUMPY_ONLY:
            assert {module.split(".")[0] for module in ours} <= {"minigpt"}
            assert ours <= NUMPY_ONLY | {"minigpt.errors"}
    outside = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names)
    outside -= {"attest", "minigpt", "transport"}
    allowed = OUTSIDE.get(name, {"numpy"} if package == "minigpt" else set())
    assert outside <= allowed


@pytest.mark.parametrize("name", modules())
def test_only_one_module_opens_sockets(name: str) -> None:
    imported = imports(modules()[name])
    allowed = {"transport.sockets", "minigpt.local"}  # local binds the ports that it hands down
    assert "socket" not in imported or name in allowed


@pytest.mark.parametrize("name", LAZY)
def test_what_a_stage_does_not_need_is_imported_lazily(name: str) -> None:
    assert LAZY[name] not in {module.split(".")[0] for module in imports(modules()[name], at_top=True)}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, minigpt; print([name for name in ('numpy', 'Crypto', 'msgpack') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_importing_numpy_first_is_warned_of() -> None:
    code = "import numpy, warnings; warnings.simplefilter('error'); import minigpt"
    environment = {"PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], text=True, cwd=ROOT, capture_output=True, env=environment)
    assert "import minigpt first" in run.stderr


WATCHED = """
import json, sys, threading
def tell():
    sys.stdin.readline()
    print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), flush=True)
    sys.stdin.read()
threading.Thread(target=tell, daemon=True).start()
from minigpt.stage import main
arguments = [word for word in sys.argv[1:] if word != '--until-eof']
sys.exit(main(arguments))
"""


def test_a_running_stage_has_imported_only_what_it_needs(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start(1, python=("-c", WATCHED))
        stages.start(0, python=("-c", WATCHED))
        with Pipeline.connect(stages.bytes, allow_mock=True) as pipeline:
            assert len(list(pipeline.generate([1, 2, 3], max_tokens=4))) == 4
            pipeline.status()
        for process in stages.processes.values():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            imported = set(json.loads(process.stdout.readline()))
            outside = {name for name in imported if not name.startswith("_") or name in ("_cffi_backend",)}
            outside -= set(sys.stdlib_module_names)
            known = {"attest", "minigpt", "transport", "numpy", "safetensors", "msgpack", "Crypto"}
            uses_cffi = {"cffi", "_cffi_backend", "pycparser", "cython_runtime"}  # pycryptodome does, where it is there
            assert outside - known <= uses_cffi
