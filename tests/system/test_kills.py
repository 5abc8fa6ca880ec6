"""`scripts/bench/kills.py`: a part of it."""

import subprocess
import sys

import pytest
from processes import ROOT

KILLS = [sys.executable, str(ROOT / "scripts" / "bench" / "kills.py")]


@pytest.mark.parametrize("how", ["supervised", pytest.param("local", marks=pytest.mark.slow)])
def test_every_answer_goes_on_after_a_kill_of_any_stage(how: str) -> None:
    command = [*KILLS, "--how", how, "--stages", "2", "--tokens", "8", "--every", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all 18 texts as they should be"  # 3 modes, 3 tokens, 2 stages
