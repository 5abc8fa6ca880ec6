"""Every command of the documents runs.

A fenced block of `sh` or `python` is run as it stands, but for its ports, in an empty folder, with this Python first on
the path. GPT-2 is served by a hub on loopback: a small random model under its id, which the real hub client downloads.
Blocks of `sh install` are run by continuous integration, in an empty environment; those of `serve` are a server and its
client; one of `sh plot` needs that extra. `text` is not a command.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub
from made import random_tensors, write
from processes import ROOT
from serving import Serving

from minigpt.engine.config import Config

# docs/deployment.md has its own test, beside that of the images.
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/benchmarks/*.md")])
BLOCK = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PORTS = re.compile(r"(?<=127\.0\.0\.1:)\d+")


def blocks() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for match in BLOCK.finditer(path.read_text()):
            line = path.read_text()[: match.start()].count("\n") + 1
            found.append((f"{path.name}:{line}:{match['kind']}", match["text"]))
    return found


RUN = [block for block in blocks() if block[0].split(":")[2] in ("sh", "sh plot", "python")]


@pytest.fixture
def ports() -> Iterator[dict[str, str]]:
    """Free ports for those of the documents. They are kept: a bound socket that does not listen keeps a port from
    everybody but a listener that reuses the address."""
    kept: dict[str, socket.socket] = {}

    class Ports(dict[str, str]):
        def __missing__(self, documented: str) -> str:
            kept[documented] = socket.socket()
            kept[documented].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            kept[documented].bind(("127.0.0.1", 0))
            self[documented] = str(kept[documented].getsockname()[1])
            return self[documented]

    yield Ports()
    for each in kept.values():
        each.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    config = Config(vocab_size=2048, n_positions=256, n_embd=48, n_layer=12, n_head=4, n_inner=96, eos_token_id=())
    folder = write(tmp_path_factory.mktemp("hub") / "gpt2", config, random_tensors(config))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = (ROOT / "minigpt" / "data" / "tokenizer.json").read_bytes()
    with Hub("openai-community/gpt2", files | {"tokenizer.json": tokenizer}).serving() as hub:
        yield hub


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "sh install", "sh plot", "sh serve", "python", "python serve", "text"}
    assert {name.split(":")[2] for name, _ in blocks()} <= known
    assert sum("sh install" in name for name, _ in blocks()) == 2


def test_every_link_leads_to_a_file() -> None:
    link = re.compile(r"\]\((?!https?:|#)([^)#]+)")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in link.findall(path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_documented_server_answers_the_documented_client(tmp_path: Path) -> None:
    ((_, command),) = [block for block in blocks() if block[0].endswith(":sh serve")]
    ((_, client),) = [block for block in blocks() if block[0].endswith(":python serve")]
    assert command == "minigpt serve\n"
    assert len(client.split()) < 20  # three lines
    with Serving() as server:
        text = PORTS.sub(str(server.port), client)
        environment = os.environ | {"NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")


@pytest.mark.parametrize(("name", "text"), RUN, ids=[name for name, _ in RUN])
def test_a_documented_command_runs(name: str, text: str, tmp_path: Path, ports: dict[str, str], hub: Hub) -> None:
    if name.endswith(" plot"):
        pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    commands = tmp_path / "commands"
    commands.mkdir()
    for command, module in (("minigpt", " -m minigpt"), ("python", "")):
        (commands / command).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (commands / command).chmod(0o755)
    where = tmp_path / "here"
    where.mkdir()
    text = PORTS.sub(lambda match: ports[match[0]], text)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
    run = ["bash", "-euo", "pipefail", "-c", text] if ":sh" in name else [sys.executable, "-c", text]
    done = subprocess.run(run, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_lines_of_text_fit_a_terminal_but_for_tables() -> None:
    for page in ("README.md", "docs/deployment.md"):
        lines = (ROOT / page).read_text().splitlines()
        assert [line for line in lines if len(line) > 140 and not line.startswith("|")] == []
