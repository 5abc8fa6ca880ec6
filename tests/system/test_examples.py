"""The examples run: the notebook from top to bottom, and the clients against a real `minigpt serve`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from serving import Serving

import minigpt

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"
PROMPT = "The capital of France is"


def code() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "*"}


def expected(max_tokens: int) -> str:
    return "".join(token.text or "" for token in minigpt.load("tiny").generate(PROMPT, max_tokens=max_tokens))


def test_the_notebook_holds_no_outputs() -> None:
    assert [(cell["outputs"], cell["execution_count"]) for cell in code()] == [([], None)] * len(code())


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    script = "\n".join("".join(cell["source"]) for cell in code())
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("' Paris'", expected(20), "layers 6 to 11", "evidence accepted", "stage 1  computes"):
        assert words in done.stdout


def test_the_notebook_runs_in_jupyter_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="Jupyter is not installed")
    nbclient = pytest.importorskip("nbclient", reason="Jupyter is not installed")
    nbformat = pytest.importorskip("nbformat", reason="Jupyter is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The base URL of `minigpt serve`, as clients want it."""
    with Serving() as serving:
        yield serving.address + "/v1"


def example(name: str, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable] if name.endswith(".py") else ["sh"]
    done = subprocess.run(
        [*command, str(EXAMPLES / name), *arguments],
        input=given, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_the_openai_client_says_what_the_pipeline_says(server: str) -> None:
    assert example("openai_client.py", server).stdout == expected(16) + "\n"  # the interface's own default
    lines = [line for line in (EXAMPLES / "openai_client.py").read_text().splitlines() if line]
    assert len(lines) <= 10


def test_the_loop_continues_each_line(server: str) -> None:
    if subprocess.run(["sh", "-c", "curl --version && jq --version"], capture_output=True).returncode:
        pytest.skip("curl or jq is not installed")
    done = example("loop.sh", server, given=f"{PROMPT}\nSay \"\\\" & '$PATH'\n{PROMPT}\n")
    first, _, last, end = done.stdout.split("\n")
    assert (first, last, end) == (expected(20), expected(20), "")
    assert done.stderr == "> > > > "


def test_the_loop_shows_why_it_was_refused(server: str) -> None:
    if subprocess.run(["sh", "-c", "curl --version && jq --version"], capture_output=True).returncode:
        pytest.skip("curl or jq is not installed")
    assert "prompt" in example("loop.sh", server, given="\n").stdout  # an empty prompt
    assert "curl: (7)" in example("loop.sh", "http://127.0.0.1:1/v1", given="x\n").stderr
