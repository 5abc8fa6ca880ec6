"""`scripts/bench/soak.py`: a short form of it, and what it says when something is wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, alive, eventually

from scripts.bench import soak

SOAK = [sys.executable, str(ROOT / "scripts" / "bench" / "soak.py"), "--clients", "4", "--every", "0.5"]
LOOSE = ["--memory", "0.5", "--threads", "8", "--descriptors", "8"]  # it has only begun: buffers still grow


@pytest.mark.parametrize("stages", ["1", "3"])
def test_a_few_clients_for_some_seconds_lose_nothing_and_leave_nothing(stages: str) -> None:
    command = [*SOAK, *LOOSE, "--minutes", "0.2", "--stages", stages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all as it should be"
    assert [line.split(":")[0] for line in lines[4:-1]] == [f"stage {index}" for index in range(int(stages))]


@pytest.mark.slow
def test_a_few_clients_whose_stages_are_killed_lose_nothing_and_leave_nothing() -> None:
    command = [*SOAK, *LOOSE, "--minutes", "0.5", "--kill", "12", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all as it should be"
    assert "stages killed" in done.stdout


def test_a_stage_that_dies_is_told_and_ends_it() -> None:
    process = subprocess.Popen([*SOAK, "--minutes", "20"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "4 clients of 2 stages ask for 1200 s\n"
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(children[1], signal.SIGKILL)
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 1
        assert "\nWRONG: stage 1 has died\n" in said
        assert eventually(lambda: not any(map(alive, children)))
    finally:
        process.kill()
        process.wait()


def test_what_grew_is_noticed() -> None:
    flat = [9.0, 1.0, 5.0, 5.0, 7.0, 7.0, 5.0, 5.0]  # only the second and the last quarter count
    assert soak.quarters(flat) == (5.0, 5.0)
    assert soak.grown("threads", flat, lambda was: was) == ("threads 5.0 → 5.0 (most 9.0)", False)
    assert soak.grown("threads", [*flat[:6], 5.0, 6.0], lambda was: was)[1]
    assert not soak.grown("threads", [*flat[:6], 5.0, 6.0], lambda was: was + 1)[1]


def test_a_look_at_a_process_counts_its_descriptors() -> None:
    before = soak.look(os.getpid())
    with open(os.devnull):
        assert soak.look(os.getpid()).descriptors == (before.descriptors or 0) + 1
    assert before.memory > 10**7
    assert before.threads >= 1


def test_a_process_that_has_ended_is_not_looked_at() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it stays, without memory, until it is collected
        with pytest.raises(ProcessLookupError, match="has ended"):
            soak.look(ended.pid)
    with pytest.raises(FileNotFoundError):
        soak.look(ended.pid)
