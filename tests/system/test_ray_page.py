"""The section on Ray of docs/deployment.md, in an environment that has nothing: its commands, and no others, lead from
a checkout to a text. Slow: it asks the package index."""

import os
import re
import shutil
import subprocess
import tempfile
import venv
from pathlib import Path

import pytest
from processes import ROOT

NEW_NETWORK = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]  # whose processes all end with it
CHECKOUT = ("attest", "minigpt", "transport", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("ip") is None or subprocess.run([*NEW_NETWORK, "true"], capture_output=True).returncode != 0,
        reason="nobody gives us a network of our own, in which the page's port is free",
    ),
]


def commands() -> list[str]:
    page = (ROOT / "docs" / "deployment.md").read_text()
    section = page.partition("\n## Ray\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"^```text\n(.*?)^```$", section, re.M | re.S) for line in block.splitlines()]


def test_seven_commands_lead_to_a_pipeline_on_three_nodes_and_to_a_text(tmp_path: Path) -> None:
    install, token, mode, head, node, up, generate = commands()
    source, home, where = (tmp_path / name for name in ("source", "home", "where"))
    for folder in (source, home, where):
        folder.mkdir()
    for name in CHECKOUT:  # a copy, so that the checkout stays as it is
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    venv.create(tmp_path / "venv", with_pip=True)
    short = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets below it have long names already
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")} | {
        "HOME": str(home), "PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin",
        "RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    try:
        subprocess.run(["bash", "-ec", install], cwd=source, env=environment, check=True, timeout=900)
        script = "\n".join([
            "ip link set lo up", token, mode, head, node, node, f"{up} &",
            "until [ -e pipeline.json ]; do kill -0 $!; sleep 0.5; done", generate, "kill $!", "wait $!",
        ])  # fmt: skip
        done = subprocess.run(
            [*NEW_NETWORK, "bash", "-euc", script.replace("HEAD:", "127.0.0.1:")],
            cwd=where, env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    finally:
        shutil.rmtree(short, ignore_errors=True)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert " Tokyo" in done.stdout, told
    assert "warning" not in done.stderr, told  # each stage is on a node of its own
    assert not (where / "pipeline.json").exists()
