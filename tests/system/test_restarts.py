"""Stages of a local pipeline that end unasked: they are started again, and nothing is left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, eventually
from serving import Serving

from minigpt.client.pipeline import Pipeline
from minigpt.errors import StageError
from minigpt.launch import isolated, restarts

PROMPT = [1, 2, 3]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that no other test's stages serve, so that they can be told from those."""
    return write(tmp_path / "small", SMALL, random_tensors(SMALL))


def ids(pipeline: Pipeline) -> list[int]:
    return [token.id for token in pipeline.generate(PROMPT, max_tokens=4)]


def sooner_or_later(pipeline: Pipeline) -> list[int]:
    """An answer, within a minute."""
    until = time.monotonic() + 60
    while True:
        try:
            return ids(pipeline)
        except StageError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def serving(model: Path, index: int | None = None) -> list[int]:
    """Ids of the processes that serve this model, or one stage of it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        stage = b"minigpt.stage" in words and bytes(model) in words
        if stage and (index is None or words[words.index(b"--index") + 1] == b"%d" % index):
            found.append(int(entry.parent.name))
    return found


def nothing_serves(model: Path) -> bool:
    return eventually(lambda: not serving(model))


# They are started again.


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_stage_that_is_killed_serves_again(model: Path, index: int) -> None:
    told: list[str] = []
    with Pipeline.local(model, 3, progress=told.append) as pipeline:
        before, pids = ids(pipeline), pipeline.pids
        told.clear()
        os.kill(pids[index], signal.SIGKILL)
        assert eventually(lambda: pipeline.restarts[index] == 1)
        assert sooner_or_later(pipeline) == before
        assert [report.error for report in pipeline.status()] == [""] * 3
        assert [now == then for now, then in zip(pipeline.pids, pids, strict=True)] == [i != index for i in range(3)]
        assert sorted(serving(model)) == sorted(pipeline.pids)
        assert pipeline.failure is None
        killed = f"stage {index} was killed by signal 9, perhaps for lack of memory; it is started again"
        assert eventually(lambda: len(told) == 2)
        assert told == [killed, f"stage {index} serves again"]
    assert nothing_serves(model)


def test_a_stage_that_ends_by_itself_is_started_again_though_whoever_is_told_fails(model: Path) -> None:
    def fail(line: str) -> None:
        if "started again" in line:
            raise ValueError(line)

    with Pipeline.local(model, 2, progress=fail) as pipeline:
        before = ids(pipeline)
        for count in (1, 2):
            os.kill(pipeline.pids[1], signal.SIGTERM)
            assert eventually(lambda count=count: pipeline.restarts == [0, count])  # type: ignore[misc]
            assert sooner_or_later(pipeline) == before


def test_a_stage_that_serves_for_long_enough_may_end_any_number_of_times(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "EARLY", 0.0)
    with Pipeline.local(model, 1) as pipeline:
        before = ids(pipeline)
        for _ in range(restarts.TRIES + 2):
            os.kill(pipeline.pids[0], signal.SIGKILL)
            assert eventually(lambda: pipeline.pids == serving(model))
            assert sooner_or_later(pipeline) == before


# They are given up.


def test_a_stage_that_cannot_live_is_given_up_and_every_request_says_why(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with Pipeline.local(model, 2, progress=told.append) as pipeline:
        ids(pipeline)
        told.clear()
        monkeypatch.setattr(isolated, "command", lambda *_: ["/bin/sh", "-c", "echo no room >&2; exit 7"])
        os.kill(pipeline.pids[1], signal.SIGKILL)
        assert eventually(lambda: pipeline.failure is not None)
        why = "stage 1 ended with code 7: no room; it ended early 3 times in a row and is not started again"
        for call in (ids, Pipeline.status):
            with pytest.raises(StageError) as caught:
                call(pipeline)
            assert (str(caught.value), caught.value.stage) == (why, 1)
        assert pipeline.restarts == [0, 2]
        assert [line.rpartition("; ")[2] for line in told[:2]] == [
            "it is started again",
            "it is started again in 0.5 s",
        ]
        assert told[2:] == [why]
    assert nothing_serves(model)


def test_a_stage_that_cannot_be_started_again_is_given_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.local(model, 1) as pipeline:
        monkeypatch.setattr(isolated, "command", lambda *_: ["/nowhere/python"])
        os.kill(pipeline.pids[0], signal.SIGKILL)
        assert eventually(lambda: pipeline.failure is not None)
        assert "stage 0 cannot be started: [Errno 2]" in str(pipeline.failure)


def test_a_stage_that_is_not_ready_at_the_start_is_not_started_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"echo again >> {tmp_path}/starts; echo no room >&2; kill -9 $$"
    monkeypatch.setattr(isolated, "command", lambda *_: ["/bin/sh", "-c", script])
    with pytest.raises(StageError, match=r"stage 0 was killed by signal 9, perhaps .* before it was ready: no room"):
        Pipeline.local(model, 1)
    assert (tmp_path / "starts").read_text() == "again\n"


# Nothing is left behind.

SCRIPT = """
import json, os, signal, sys, threading, time
from minigpt.client.pipeline import Pipeline
MODEL = sys.argv[1]
def ids(pipeline):
    return [token.id for token in pipeline.generate([1, 2, 3], max_tokens=4)]
def kill(pipeline, index):
    os.kill(pipeline.pids[index], signal.SIGKILL)
"""


def start(model: Path, body: str) -> subprocess.Popen[str]:
    """A user's program, in a process group of its own."""
    command = [sys.executable, "-c", SCRIPT + textwrap.dedent(body), str(model)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def program(model: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Put a program here that is to be ended, with its children."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_pipeline_that_is_closed_while_a_stage_is_started_again_leaves_nothing(model: Path) -> None:
    """Whenever that is: before it is noticed, while the process is made, while it loads, and after that."""
    process = start(
        model,
        """
        with Pipeline.local(MODEL, 2):
            pass
        before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for number in range(16):
            with Pipeline.local(MODEL, 2) as pipeline:
                kill(pipeline, number % 2)
                if number % 4 == 3:
                    while not pipeline.restarts[1]:
                        pass
                else:
                    time.sleep(0.002 * 1.5**number)
            left = [len(os.listdir("/proc/self/fd")) - before, threading.active_count() - threads]
            try:
                left.append(os.waitpid(-1, os.WNOHANG))
            except ChildProcessError:
                pass
            if left != [0, 0]:
                break
        print(json.dumps(left))
        """,
    )
    out, _ = process.communicate(timeout=180)
    assert json.loads(out) == [0, 0]
    assert not serving(model)


def test_a_pipeline_that_is_forgotten_while_a_stage_is_started_again_leaves_nothing(model: Path) -> None:
    process = start(
        model,
        """
        for number in range(6):
            pipeline = Pipeline.local(MODEL, 2)
            kill(pipeline, number % 2)
            time.sleep(0.03 * number)
            del pipeline
        until = time.monotonic() + 60
        while threading.active_count() > 1 and time.monotonic() < until:
            time.sleep(0.01)
        print(json.dumps(threading.active_count()))
        kept = Pipeline.local(MODEL, 2)
        kill(kept, 0)  # and this ends with the interpreter
        """,
    )
    out, _ = process.communicate(timeout=180)
    assert (json.loads(out), process.returncode) == (1, 0)
    assert not serving(model)


def test_forks_while_a_stage_is_started_again_have_nothing_of_it(
    model: Path, program: list[subprocess.Popen[str]]
) -> None:
    """Otherwise a child would keep a port open at which nobody answers, or the end of a pipe that is waited for."""
    process = start(
        model,
        """
        with Pipeline.local(MODEL, 2) as pipeline:
            before, children = ids(pipeline), []
            kill(pipeline, 0)
            reading, writing = os.pipe()
            for _ in range(60):
                child = os.fork()
                if child == 0:
                    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 100)
                             if os.path.lexists(f"/proc/self/fd/{fd}")]
                    pipes = {os.readlink(f"/proc/self/fd/{fd}") for fd in (reading, writing)}
                    pipeline.close()
                    told = json.dumps([pipeline.pids, [name for name in names if name not in pipes]]) + "\\n"
                    os.write(writing, told.encode())
                    time.sleep(300)
                    os._exit(0)
                children.append(child)
                time.sleep(0.002)
            with open(reading) as lines:
                heard = [json.loads(lines.readline()) for _ in children]
            until = time.monotonic() + 60
            while True:
                try:
                    after = ids(pipeline)
                    break
                except Exception:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.05)
            began = time.monotonic()
            pipeline.close()
            took = time.monotonic() - began
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps([before == after, took, heard]))
        """,
    )
    program.append(process)
    out, _ = process.communicate(timeout=180)
    same, took, heard = json.loads(out)
    assert same
    assert took < 4
    assert [pids for pids, _ in heard] == [[]] * len(heard)
    kinds = ("socket:", "pipe:", "/tmp")
    assert [name for _, names in heard for name in names if name.startswith(kinds)] == []
    assert not serving(model)


def test_a_program_that_is_killed_while_a_stage_is_started_again_leaves_nothing(model: Path) -> None:
    for wait in (0, 0.02, 0.05, 0.1, 0.3):
        process = start(
            model,
            f"""
            pipeline = Pipeline.local(MODEL, 2)
            kill(pipeline, 1)
            time.sleep({wait})
            os.kill(os.getpid(), signal.SIGKILL)
            """,
        )
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
        assert nothing_serves(model)


def test_ctrl_c_while_a_stage_is_started_again_leaves_nothing(
    model: Path, program: list[subprocess.Popen[str]]
) -> None:
    """A terminal sends it to all processes of the foreground."""
    process = start(
        model,
        """
        with Pipeline.local(MODEL, 2) as pipeline:
            kill(pipeline, 0)
            print("now", flush=True)
            time.sleep(300)
        """,
    )
    program.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert nothing_serves(model)


# What `minigpt serve` says.


def test_a_server_tells_what_was_started_again_and_why_it_gives_up(model: Path) -> None:
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 2}
    with Serving("--model", str(model), "--stages", "2", "--log-format", "json") as server:
        assert server.post("/v1/completions", body).status_code == 200
        assert server.metric("minigpt_stage_restarts_total") == 0
        (pid,) = serving(model, 1)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: server.metric("minigpt_stage_restarts_total") == 1)
        assert eventually(lambda: server.post("/v1/completions", body).status_code == 200)
        assert 'minigpt_stage_restarts_total{stage="1"} 1.0' in server.get("/metrics").text
        assert server.get("/health").status_code == 200

        def messages() -> list[str]:
            lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
            return [line["message"] for line in lines if "message" in line]

        assert eventually(lambda: len(messages()) == 2)
        killed, back = messages()
        assert killed == "stage 1 was killed by signal 9, perhaps for lack of memory; it is started again"
        assert back == "stage 1 serves again"

        def kill_until_unhealthy() -> bool:
            for found in serving(model, 1):
                os.kill(found, signal.SIGKILL)
            return server.get("/health").status_code == 503

        assert eventually(kill_until_unhealthy)
        for answer in (server.get("/health"), server.get("/ready"), server.post("/v1/completions", body)):
            assert answer.status_code == 503
            assert "ended early 3 times in a row and is not started again" in answer.text
            assert "stage 1 was killed by signal 9" in answer.text
            assert "and is not started again: restart minigpt serve" in answer.text
    assert nothing_serves(model)
