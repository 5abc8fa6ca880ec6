"""Who may import whom, as a dict: every file of the three packages and of scripts/ is walked, and there is no cycle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from processes import ROOT

PACKAGES = ("attest", "minigpt", "transport")

# What the files of a folder, or one file, may import of the three packages. The longest name that fits decides; a name
# allows the module and all below it. `=` allows a package's own __init__ and nothing below it.
MAY_IMPORT = {
    "attest": {"attest"},
    "attest.document": set(),
    "attest.__init__": {"attest.document"},
    "transport": {"transport", "=attest"},
    "minigpt.__init__": {"minigpt.client", "minigpt.engine.blas", "minigpt.errors"},
    "minigpt.__main__": {"minigpt.cli", "minigpt.errors", "=attest", "attest.document", "transport.errors"},
    "minigpt.errors": set(),
    "minigpt.engine": {"minigpt.engine", "minigpt.errors"},
    "minigpt.checkpoint": {
        "minigpt.checkpoint", "minigpt.engine.config", "minigpt.engine.linalg", "minigpt.errors", "attest.document",
    },
    "minigpt.protocol": {
        "minigpt.protocol", "minigpt.engine.config", "minigpt.engine.sampling", "minigpt.errors", "attest", "transport",
    },
    "minigpt.stage": {
        "minigpt.stage", "minigpt.engine", "minigpt.checkpoint.weights", "minigpt.checkpoint.sources",
        "minigpt.protocol", "minigpt.cli.terminal", "minigpt.cli.values", "minigpt.errors", "=minigpt", "attest",
        "transport",
    },
    "minigpt.launch": {
        "minigpt.launch", "minigpt.protocol", "minigpt.checkpoint", "minigpt.engine.config", "minigpt.errors", "attest",
        "transport",
    },
    "minigpt.client": {
        "minigpt.client", "minigpt.protocol", "minigpt.engine", "minigpt.checkpoint", "minigpt.launch.launcher",
        "minigpt.launch.local", "minigpt.errors", "=attest", "transport",
    },
    "minigpt.client.inprocess": {
        "minigpt.client", "minigpt.protocol", "minigpt.engine", "minigpt.checkpoint", "minigpt.stage.layers",
        "minigpt.stage.schedule", "minigpt.stage.sequence", "minigpt.errors",
    },
    "minigpt.serve": {
        "minigpt.serve", "minigpt.client", "minigpt.protocol", "minigpt.checkpoint.tokenizer", "minigpt.errors",
        "=minigpt", "attest",
    },
    "minigpt.cli": {"minigpt", "attest", "transport"},
    "minigpt.cli.terminal": set(),
    "minigpt.cli.values": set(),
}  # fmt: skip
OUTSIDE = {  # of what is not in the standard library
    "attest.ecdsa": {"Crypto"},
    "attest.providers": {"Crypto"},
    "attest.x509": {"Crypto"},
    "attest.policy": {"msgpack"},
    "minigpt.launch.on_ray": {"ray"},
    "transport.aead": {"Crypto", "cryptography"},
    "transport.codec": {"msgpack"},
    "transport.kem": {"Crypto"},
    "transport.noise": {"Crypto"},
    "minigpt.engine": {"numpy"},
    "minigpt.engine.config": set(),
    "minigpt.checkpoint.weights": {"numpy", "safetensors"},
    "minigpt.checkpoint.sources": {"huggingface_hub"},
    "minigpt.checkpoint.tokenizer": {"tokenizers"},
    "minigpt.checkpoint.tokenizer_files": {"tokenizers"},
    "minigpt.protocol.schema": {"numpy"},
    "minigpt.protocol.messages": {"numpy"},
    "minigpt.protocol.batches": {"numpy"},
    "minigpt.stage.generation": {"numpy"},
    "minigpt.stage.lanes": {"numpy"},
    "minigpt.stage.layers": {"numpy"},
    "minigpt.stage.sequence": {"numpy"},
    "minigpt.client": {"numpy"},
    "minigpt.cli.plot": {"matplotlib"},
    "minigpt.serve": {"fastapi", "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"},
    "minigpt.serve.template": {"jinja2"},
}
LAZY = {
    "minigpt.checkpoint.sources": "huggingface_hub",
    "minigpt.checkpoint.tokenizer": "tokenizers",
    "minigpt.checkpoint.tokenizer_files": "tokenizers",
}
KNOW_SOCKETS = {
    "minigpt.stage", "minigpt.protocol.links", "minigpt.protocol.batchlink", "minigpt.client.pipeline",
    "minigpt.launch.local", "minigpt.cli.commands",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the three packages by its name; a package is NAME.__init__."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


MODULES = modules()


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Full names of what a file imports: at its top, in functions and for type checkers alike."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {_module(alias.name, known) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            assert node.level == 0, "a relative import"
            for alias in node.names:
                inner = _module(f"{node.module}.{alias.name}", known)
                names.add(inner if inner in known else _module(str(node.module), known))
    return names


def _module(name: str, known: dict[str, Path]) -> str:
    return f"{name}.__init__" if f"{name}.__init__" in known else name


def fitting(name: str, rules: dict[str, set[str]]) -> set[str]:
    """The rule for a module: that of the longest name that it lies below."""
    fit = [rule for rule in rules if name == rule or name.startswith(rule + ".")]
    return rules[max(fit, key=len)] if fit else set()


def broken_rules(name: str, tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """What a module imports and may not."""
    imported = imports(tree, known)
    ours = {module for module in imported if module.split(".")[0] in PACKAGES}
    may = fitting(name, MAY_IMPORT)
    allowed = {
        module
        for module in ours
        for rule in may
        if module == rule or module.startswith(rule + ".") or (rule[0] == "=" and module == f"{rule[1:]}.__init__")
    }
    outside = {module.split(".")[0] for module in imported - ours} - set(sys.stdlib_module_names)
    return (ours - allowed) | (outside - fitting(name, OUTSIDE))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_it_may(name: str) -> None:
    assert not broken_rules(name, ast.parse(MODULES[name].read_text()), MODULES)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("minigpt.engine.model", "import minigpt.protocol.messages"),
        ("minigpt.engine.model", "def f():\n    from minigpt import checkpoint"),
        ("minigpt.checkpoint.weights", "from minigpt.stage import server"),
        ("minigpt.stage.server", "if TYPE_CHECKING:\n    from minigpt.client import pipeline"),
        ("minigpt.client.pipeline", "from minigpt.launch import plan"),
        ("minigpt.client.pipeline", "from attest.providers import mock"),
        ("minigpt.launch.local", "from minigpt.client.pipeline import Pipeline"),
        ("transport.link", "from attest.policy import Policy"),
        ("attest.policy", "import transport"),
        ("minigpt.stage.server", "import requests"),
        ("minigpt.stage.server", "from minigpt.serve.schema import Problem"),
        ("minigpt.client.pipeline", "from minigpt.serve import service"),
        ("minigpt.client.pipeline", "import fastapi"),
        ("minigpt.serve.service", "from minigpt.stage import server"),
        ("minigpt.engine.config", "import numpy"),
        ("minigpt.newcomer", "import minigpt.errors"),
    ],
)
def test_a_broken_rule_is_noticed(name: str, line: str) -> None:
    assert broken_rules(name, ast.parse(line), MODULES)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_import_cycle() -> None:
    """Imports within functions and for type checkers count, and those of a package's __init__."""
    graph = {name: imports(ast.parse(path.read_text()), MODULES) & MODULES.keys() for name, path in MODULES.items()}
    assert cycle(graph) == []
    assert cycle(graph | {"minigpt.engine.config": {"minigpt.engine.model"}})


def test_scripts_import_no_tests() -> None:
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        tree = ast.parse(path.read_text())
        tops = {name.split(".")[0] for name in imports(tree, {})}
        ours = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"attacks", "fuzz", "system", "tests", "unit"}
        if path.name not in ("hostile_host.py", "reference_logits.py"):
            assert not tops & ours, path


@pytest.mark.parametrize("name", MODULES)
def test_only_one_module_opens_sockets(name: str) -> None:
    imported = imports(ast.parse(MODULES[name].read_text()), MODULES)
    # local binds the ports that it hands down, as agent does; readiness tells systemd; type checkers want a name
    assert "socket" not in imported or name in {
        "transport.sockets",
        "minigpt.launch.local",
        "minigpt.launch.agent",
        "minigpt.stage.readiness",
        "transport.channel",
        "transport.relay",
    }
    sockets = imported & {"transport.channel", "transport.sockets"}
    package = name.rpartition(".")[0]
    assert not sockets or name.startswith("transport") or {name, package} & KNOW_SOCKETS


@pytest.mark.parametrize("name", LAZY)
def test_what_a_stage_does_not_need_is_imported_lazily(name: str) -> None:
    top = ast.Module([node for node in ast.parse(MODULES[name].read_text()).body if not isinstance(node, ast.If)], [])
    top.body = [node for node in top.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert LAZY[name] not in {module.split(".")[0] for module in imports(top, MODULES)}
