"""`scripts/bench/distance.py`: a short form of it."""

import os
import subprocess
import sys

import pytest
from processes import ROOT


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or not {0, 1} <= os.sched_getaffinity(0), reason="each stage wants a core"
)
def test_a_token_takes_at_least_the_way_there_and_back() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "distance.py")]
    flags = ["--tiny", "--clients", "1,2", "--ms", "50", "--tokens", "4", "--rounds", "1"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stderr) == (0, "")
    _, _, _, _, *lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows] == [["1", "1"], ["1", "2"], ["2", "1"], ["2", "2"]]
    for clients, _, near, apart, *_ in rows:
        assert float(near) > 0
        assert 0 < float(apart) < int(clients) * 10.05  # 10 tokens/s each at most, but for rounding
