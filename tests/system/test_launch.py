"""Stages that a program starts for itself, as users meet them: in scripts of their own, which fork, exit and forget."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, alive, eventually

import minigpt
from attest.measure import PACKAGES, measure
from attest.providers.mock import MockPins, MockRoot
from minigpt.checkpoint import sources
from minigpt.client.pipeline import Pipeline
from minigpt.errors import INSIDE, StageError
from minigpt.launch import isolated, local
from minigpt.launch.agent import Agent
from minigpt.launch.plan import plan
from minigpt.protocol import addresses
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import StageReport

SCRIPT = """
import json, os, signal, sys, time
import minigpt
def ids(pipeline, prompt="The capital of France is"):
    return [token.id for token in pipeline.generate(prompt, max_tokens=3)]
"""


def script(body: str, *, python: str = sys.executable, **environment: str) -> Any:
    """What a user's program prints last, as JSON. It must end by itself, with nothing wrong."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [python, "-c", SCRIPT + textwrap.dedent(body)],
        cwd=ROOT,
        env={**clean, **environment},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def gone(pids: list[int]) -> bool:
    return eventually(lambda: not any(alive(pid) for pid in pids), 30)


def test_an_agent_tells_how_far_its_stage_has_read_its_weights(tmp_path: Path) -> None:
    folder, root = write(tmp_path / "small", SMALL, random_tensors(SMALL)), MockRoot.generate()
    document = plan(sources.find(str(folder)), 1, pins=[MockPins(root.public, frozenset([measure()]))])
    expires = int(Manifest.parse(document).expires.timestamp() * 1000)
    agent = Agent(0, str(folder), None, 1)
    try:
        public = agent.begin(document, addresses.write([agent.bind("127.0.0.1")], 1))
        assert agent.loading() == ""
        agent.serve(root.endorse(bytes.fromhex(public), 0, expires))
        assert agent.loading().startswith("stage 0 reading weights: 100 % of ")
    finally:
        agent.end()
        assert agent._port is not None
        agent._port.close()
        os.close(agent._broom)


# Forks.


def test_a_forked_child_makes_links_of_its_own_and_leaves_the_parents_alone() -> None:
    told = script(
        """
        with minigpt.Pipeline.local() as pipeline:
            before = ids(pipeline)
            running = pipeline.generate("The capital of Japan is", max_tokens=5)
            first = next(running).id
            reading, writing = os.pipe()
            if os.fork() == 0:
                told = {}
                try:
                    next(running)
                except minigpt.errors.StageError as error:
                    told["running"] = str(error)
                told["ids"] = ids(pipeline)
                pipeline.close()
                told["pids"] = pipeline.pids
                os.write(writing, json.dumps(told).encode())
                os._exit(0)
            os.wait()
            rest = [token.id for token in running]
            print(json.dumps([before, json.loads(os.read(reading, 65536)), [first, *rest], ids(pipeline)]))
        """
    )
    before, child, running, after = told
    assert before == child["ids"] == after
    assert "forked child" in child["running"]
    assert child["pids"] == []
    with minigpt.Pipeline.local() as pipeline:
        assert running == [token.id for token in pipeline.generate("The capital of Japan is", max_tokens=5)]


def test_a_pool_of_forked_workers_shares_one_pipeline() -> None:
    told = script(
        """
        import multiprocessing
        pipeline = minigpt.Pipeline.local()
        own = ids(pipeline)
        def work(_number):
            return ids(pipeline)
        with multiprocessing.get_context("fork").Pool(3) as pool:
            theirs = pool.map(work, range(6))
        print(json.dumps([own, theirs, ids(pipeline)]))
        """
    )
    own, theirs, after = told
    assert theirs == [own] * 6
    assert after == own


def test_a_fork_that_python_is_not_told_of_disturbs_nobody() -> None:
    """As C code may do it: no hook runs in the child, so it has everything, and may use none of it."""
    child, parent, alive_after = script(
        """
        import ctypes
        pipeline = minigpt.Pipeline.local()
        running = pipeline.generate("The capital of Japan is", max_tokens=5)
        first = next(running).id
        reading, writing = os.pipe()
        if ctypes.PyDLL(None).fork() == 0:
            told = []
            try:
                running.close()
                told.append(ids(pipeline))
                pipeline.close()
            except Exception as error:
                told.append(repr(error))
            os.write(writing, json.dumps(told).encode())
            os._exit(0)
        os.wait()
        parent = [first, *(token.id for token in running)]
        alive = [os.path.exists(f"/proc/{pid}") for pid in pipeline.pids]
        print(json.dumps([json.loads(os.read(reading, 65536)), parent, alive]))
        """
    )
    with minigpt.Pipeline.local() as pipeline:
        assert parent == [token.id for token in pipeline.generate("The capital of Japan is", max_tokens=5)]
        assert child == [[token.id for token in pipeline.generate("The capital of France is", max_tokens=3)]]
    assert alive_after == [True, True]


def test_one_thing_that_cannot_be_let_go_of_does_not_keep_a_forked_child_from_the_others() -> None:
    told = script(
        """
        from transport import fork
        class Stuck:
            def disown(self):
                raise OSError("stuck")
        stuck = [Stuck() for _ in range(20)]
        with minigpt.Pipeline.local() as pipeline:
            before = ids(pipeline)
            for each in stuck:
                fork.own(each)
            reading, writing = os.pipe()
            if os.fork() == 0:
                os.write(writing, json.dumps([pipeline.pids, ids(pipeline)]).encode())
                os._exit(0)
            os.wait()
            print(json.dumps([before, json.loads(os.read(reading, 65536))]))
        """
    )
    before, child = told
    assert child == [[], before]


def test_stages_end_at_once_though_a_forked_worker_lives_on() -> None:
    took, pids = script(
        """
        pipeline = minigpt.Pipeline.local()
        ids(pipeline)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        pids, began = pipeline.pids, time.monotonic()
        pipeline.close()
        took = time.monotonic() - began
        os.kill(worker, signal.SIGKILL)
        os.wait()
        print(json.dumps([took, pids]))
        """
    )
    assert took < local.PATIENCE - 1
    assert not any(alive(pid) for pid in pids)


# How stages end.


def test_stages_end_when_their_pipeline_is_forgotten_even_while_it_generates() -> None:
    before, after = script(
        """
        def pids():
            pipeline = minigpt.Pipeline.local()
            next(pipeline.generate("The capital of France is"))
            return pipeline.pids
        before = pids() + pids()
        after = [pid for pid in before if os.path.exists(f"/proc/{pid}")]
        print(json.dumps([before, after]))
        """
    )
    assert len(before) == 4
    assert after == []


def test_stages_end_with_a_program_that_never_closes_its_pipeline() -> None:
    assert gone(script("pipeline = minigpt.Pipeline.local(); ids(pipeline); print(json.dumps(pipeline.pids))"))


@pytest.mark.parametrize("how", ["close", "kill"])
def test_stages_end_though_their_parent_blocks_signals(how: str) -> None:
    pids = script(
        f"""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pipeline = minigpt.Pipeline.local()
        ids(pipeline)
        print(json.dumps(pipeline.pids), flush=True)
        if {how == "kill"}:
            os._exit(0)
        pipeline.close()
        """
    )
    assert gone(pids)


def test_a_stage_ends_by_sigterm_though_its_parent_blocks_it() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with Pipeline.local() as pipeline:
            pids = pipeline.pids[:1]  # it is started again, as another process
            os.kill(pids[0], signal.SIGTERM)
            assert gone(pids)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def test_a_program_may_keep_its_pipeline_for_a_century() -> None:
    with Pipeline.local() as pipeline:
        assert pipeline.manifest.expires.timestamp() > time.time() + 99 * 365 * 24 * 3600


# How they start.


def interpreter(where: Path, body: str) -> str:
    """A program called python, which does something first."""
    path = where / "python"
    path.write_text(f'#!/bin/sh\n{body}\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_stage_that_failed_inside_is_told_with_the_end_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StageError(f"stage 1 {INSIDE}", stage=1)

    with Pipeline.local("tiny", retry_for=0) as pipeline:
        generation = pipeline.generate("The", max_tokens=2)
        monkeypatch.setattr(pipeline._pool, "take", fail)
        with pytest.raises(StageError, match=r"^stage 1 failed inside; the end of its log:\n(.*\n)*stage 1: INFO rea"):
            next(generation)


def test_stages_start_though_python_says_a_lot_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    much = "i=0; while [ $i -lt 20000 ]; do echo stage 0 readies itself; echo no >&2; i=$((i+1)); done"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, much))
    with Pipeline.local() as pipeline:
        assert len(list(pipeline.generate("The capital of France is", max_tokens=3))) == 3


def test_a_stage_that_is_never_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, f"echo $$ >> {tmp_path}/pids; exec sleep 100"))
    monkeypatch.setattr(local, "READY", 1.0)
    with pytest.raises(StageError, match="stage 0 was not ready in 1 s"):
        Pipeline.local()
    assert gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


@pytest.mark.parametrize("executable", ["", None, "/bin/true"])
def test_stages_start_though_the_program_is_not_python(executable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with Pipeline.local() as pipeline:
        assert len(list(pipeline.generate("The capital of France is", max_tokens=3))) == 3


def test_without_any_python_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("executable", "_base_executable", "exec_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, "/nowhere/program")
    with pytest.raises(StageError, match="wanted a Python to start stages with"):
        Pipeline.local()


def test_stages_start_without_proc_and_dev_fd() -> None:
    hidden = "mount -t tmpfs none /proc && ! ls /dev/fd/0 && "
    command = f'exec "{sys.executable}" -m minigpt generate "The capital of France is" --max-tokens 1'
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made: needs root")
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hidden + command], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, " Paris\n"), run.stderr


# What runs in them.


def test_no_code_of_the_environment_runs_in_a_stage(tmp_path: Path) -> None:
    """Neither sitecustomize and PYTHON variables, nor a .pth file of a virtual environment."""
    marker = f"import os, sys; open({str(tmp_path / 'ran')!r}, 'a').write(f'{{os.getpid()}}\\n')"
    (tmp_path / "sitecustomize.py").write_text(marker)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    inherited = [path for path in sys.path if path.endswith("-packages")]
    (packages / "a.pth").write_text("\n".join(inherited) + "\n" + marker + "\n")
    told = script(
        """
        with minigpt.Pipeline.local() as pipeline:
            print(json.dumps([os.getpid(), pipeline.pids, ids(pipeline)]))
        """,
        python=str(tmp_path / "venv" / "bin" / "python"),
        PYTHONPATH=str(tmp_path),
    )
    parent, stages, found = told
    ran = [int(pid) for pid in (tmp_path / "ran").read_text().split()]
    assert ran.count(parent) >= 2  # the test can see what it looks for
    assert not set(ran) & set(stages)
    assert len(found) == 3


def test_a_stage_searches_the_standard_library_first(tmp_path: Path) -> None:
    command = isolated.command("platform")
    assert command[1:3] == ["-I", "-S"]
    (tmp_path / "platform.py").write_text("print('another')")
    command[4] = str(tmp_path)
    assert subprocess.check_output(command, text=True).strip() == platform.platform()


def test_a_stage_started_by_hand_says_what_it_cannot_exclude(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0)
        words = "not isolated: sitecustomize, .pth files and PYTHON variables may have run code"
        assert eventually(lambda: words in stages.log(0))
        stages.kill(0)
        stages.start(0, python=tuple(isolated.command("minigpt.stage")[1:]))
        assert stages.log(0).count("not isolated") == 1


def own_measurement(path: list[Path], first: str = "") -> str:
    """What a Python that looks for the packages there, and imports them, has measured; or its error's last line."""
    lines = [
        "import sys",
        f"sys.path[:0] = {[str(folder) for folder in path]}",
        first,
        "import minigpt, transport.link",
    ]
    code = "\n".join([*lines, "import attest.measure", "print(attest.measure.measure().hex())"])
    run = subprocess.run([sys.executable, "-c", code], cwd="/", text=True, capture_output=True, check=False)
    return (run.stdout or run.stderr).splitlines()[-1]


def test_a_stage_claims_the_code_that_it_started_with(tmp_path: Path) -> None:
    """Not the code that lies there once its manifest has come, which may take an hour."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = tmp_path / "code" / "minigpt" / "stage" / "generation.py"
    genuine = changed.read_text()
    changed.write_text(genuine + "# another\n")
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "4", tmp_path) as stages:
        os.mkfifo(tmp_path / "manifest")
        process = stages.spawn(0, "--manifest", str(tmp_path / "manifest"), cwd=tmp_path / "code")
        with open(tmp_path / "manifest", "wb") as pipe:  # the stage waits for it
            changed.write_text(genuine)
            pipe.write(stages.bytes)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("stage 0 ready")
        assert eventually(lambda: "peers will refuse this stage's evidence" in stages.log(0))


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """The packages themselves, without data, in a folder of their own."""
    ignored = shutil.ignore_patterns("__pycache__", "tiny")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "real" / package, ignore=ignored)
    return tmp_path / "real"


@pytest.mark.parametrize("package", ["minigpt", "transport"])
def test_code_from_another_folder_is_not_vouched_for(real: Path, tmp_path: Path, package: str) -> None:
    assert own_measurement([real]) == measure(ROOT).hex()
    shutil.copytree(real / package, tmp_path / "other" / package)
    said = own_measurement([tmp_path / "other", real])
    assert said.startswith("attest.measure.MeasurementError: ")
    assert f"was loaded from {tmp_path / 'other' / package}" in said


def test_code_that_was_put_in_place_of_a_module_is_not_vouched_for(real: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text((real / "transport" / "noise.py").read_text())
    paths = "import transport; transport.__path__.insert(0, '{}')"
    modules = "import types; sys.modules['transport.noise'] = types.ModuleType('transport.noise')"
    for first in (paths.format(tmp_path), modules + "; import transport; sys.modules['transport.link'] = transport"):
        assert "was loaded from" in own_measurement([real], first)


def test_a_measure_that_is_a_link_is_refused(real: Path, tmp_path: Path) -> None:
    (real / "attest" / "measure.py").rename(tmp_path / "measure.py")
    (real / "attest" / "measure.py").symlink_to(tmp_path / "measure.py")
    assert "got a symbolic link to code, wanted the code itself" in own_measurement([real])


# Refuses prctl(PR_SET_DUMPABLE, …) as a container's seccomp profile may, and then becomes a stage.
SECCOMP = """
import ctypes, errno, os, struct, sys
def op(code, yes, no, value):
    return struct.pack("HBBI", code, yes, no, value)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
program = b"".join([
    op(LOAD, 0, 0, 0), op(EQUAL, 0, 3, 157), op(LOAD, 0, 0, 16), op(EQUAL, 0, 1, 4),
    op(RETURN, 0, 0, 0x00050000 | errno.EPERM), op(RETURN, 0, 0, 0x7FFF0000),
])
class Filter(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("program", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(program) // 8, program)), 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "minigpt.stage", *sys.argv[1:]])
"""


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the filter is for x86-64 Linux")
def test_a_stage_that_could_not_be_locked_down_says_so_in_its_log_and_in_status(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start(1, python=("-c", SECCOMP))
        stages.start(0)
        words = "WARNING not locked down: other processes of its user can read its memory"
        assert eventually(lambda: words in stages.log(1))
        assert "not locked down" not in stages.log(0)
        with Pipeline.connect(stages.path, allow_mock=True, text=False) as pipeline:
            assert len(list(pipeline.generate([1, 2, 3], max_tokens=3))) == 3
            first, second = pipeline.status()
        assert (first.exposed, second.exposed) == ("", "other processes of its user can read its memory")
        for flags, wanted in (((), "not locked down: other processes"), (("--json",), '"exposed": "other processes')):
            command = ["-m", "minigpt", "status", "--manifest", stages.path, "--allow-mock", *flags]
            shown = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True, check=True)
            assert wanted in shown.stdout
    assert StageReport(0).exposed == ""
