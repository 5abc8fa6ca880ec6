"""`scripts/bench/limits.py`: a few values of what it sweeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

SWEEP = [sys.executable, str(ROOT / "scripts" / "bench" / "limits.py"), "--clients", "4", "--kind"]
KILLED = "import os, sys; 'minigpt.stage' in sys.orig_argv and os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [("descriptors", [16, 1000], ["ends", "serves"]), ("memory", [8, 8192], ["Python does not start", "serves"])],
)
def test_under_any_limit_stages_serve_or_say_why_not(kind: str, values: list[int], wanted: list[str]) -> None:
    done = subprocess.run([*SWEEP, kind, "--values", *map(str, values)], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    for line, value, word in zip(lines, values, wanted, strict=False):
        assert line.startswith(f"{kind} {value}: {word}"), done.stdout


def test_a_death_without_a_word_is_wrong(tmp_path: Path) -> None:
    """With a `minigpt.stage` that only kills itself, in place of ours."""
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*SWEEP, "descriptors", "--values", "1000"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "descriptors 1000: WRONG" in done.stdout
    assert "a stage ended with -9" in done.stdout
