"""`minigpt up --on ray`, on a cluster of three nodes and a head on this machine. Slow: it is in the extra `ray`."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from processes import ROOT, alive, eventually

import minigpt
from minigpt.checkpoint import sources
from minigpt.checkpoint import weights as tensors
from minigpt.errors import StageError

pytest.importorskip("ray", reason="Ray is not installed: it is the extra `ray`")
pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
TOKEN = secrets.token_hex(32)
MODES = {"token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, "open": {"RAY_AUTH_MODE": "disabled"}}


def environment(mode: str, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | MODES[mode] | {
        "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(folder),
    }  # fmt: skip


class Cluster:
    """Nodes of Ray, below one process."""

    def __init__(self, mode: str, nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # sockets below it have long names already
        self.environment = environment(mode, self.folder)
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "cluster.py"), str(nodes)],
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert ":" in self.address

    def tell(self, words: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate(timeout=120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with contextlib.closing(Cluster("token", 3)) as made:
        yield made


def stages_below(folder: Path) -> dict[int, int]:
    """The stages whose files lie in this folder: process ids by their numbers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "minigpt.stage" in words and any(word.startswith(str(folder)) for word in words):
                found[int(words[words.index("--index") + 1])] = int(path.parent.name)
    return found


class Up:
    """`minigpt up --on ray`, serving."""

    def __init__(self, cluster: Cluster, where: Path, *flags: str) -> None:
        self.cluster = cluster
        self.path = where / "pipeline.json"
        self.log: IO[str] = (where / "log").open("w+")
        words = ["-m", "minigpt", "up", "--on", "ray", "--address", cluster.address, "-o", str(self.path), *flags]
        self.process = subprocess.Popen(
            [sys.executable, *words], env=cluster.environment, cwd=where, stdout=self.log, stderr=self.log, text=True
        )
        try:
            assert eventually(lambda: self.path.exists() or self.process.poll() is not None, 180.0)
            assert self.path.exists(), self.told()
        except BaseException:
            self.close()
            raise

    def told(self) -> str:
        return Path(self.log.name).read_text()

    def connect(self) -> minigpt.Pipeline:
        return minigpt.Pipeline.connect(self.path, allow_mock=True, retry_for=120.0, connections=8)

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.told()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
        assert eventually(lambda: not stages_below(self.cluster.folder))


@pytest.fixture
def up(cluster: Cluster, tmp_path: Path) -> Iterator[Up]:
    with contextlib.closing(Up(cluster, tmp_path, "--split", "4+4+4")) as started:
        yield started


def alone(prompts: list[str], count: int) -> list[list[int]]:
    model = minigpt.load("tiny")
    return [[token.id for token in model.generate(prompt, max_tokens=count)] for prompt in prompts]


def test_each_node_has_a_stage_with_its_own_tensors_and_the_tokens_are_the_models(up: Up) -> None:
    with up.connect() as pipeline:
        assert [[token.id for token in pipeline.generate(PROMPT, max_tokens=20)]] == alone([PROMPT], 20)
        reports = pipeline.status()
    weights = [report.weights_bytes for report in reports]
    folder = sources.local("tiny")
    config = sources.read_config(folder)
    wanted = [tensors.load(folder, config, range(first, first + 4)).nbytes for first in (0, 4, 8)]
    assert weights == wanted
    assert "share" not in up.told()
    assert "stage 1 ready at tcp://" in up.told()
    up.end()
    assert not stages_below(up.cluster.folder)


@pytest.mark.parametrize("how", ["stage", "actor", "node"])
def test_what_dies_amid_eight_answers_is_started_again_and_no_answer_is_lost(up: Up, how: str) -> None:
    prompts = [
        f"The capital of {land} is" for land in ("France", "Japan", "Italy", "Spain", "Egypt", "Peru", "Chad", "Cuba")
    ]
    wanted = alone(prompts, 100)
    before = stages_below(up.cluster.folder)
    answers: dict[int, list[int]] = {}
    with up.connect() as pipeline:

        def ask(number: int) -> None:
            answers[number] = [token.id for token in pipeline.generate(prompts[number], max_tokens=100)]

        asking = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in asking:
            thread.start()
        time.sleep(0.1)
        match how:
            case "stage":
                os.kill(before[1], signal.SIGKILL)
            case "actor":
                stat = Path(f"/proc/{before[1]}/stat").read_text()
                os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
            case _:
                up.cluster.tell(f"remove {before[1]}")
                up.cluster.tell("add")
        for thread in asking:
            thread.join(300)
        assert [answers[number] for number in range(8)] == wanted, up.told()
    assert eventually(lambda: len(stages_below(up.cluster.folder)) == 3)
    after = stages_below(up.cluster.folder)
    assert after[1] != before[1]
    assert {index: pid for index, pid in after.items() if index != 1} == {0: before[0], 2: before[2]}


def test_what_up_started_ends_with_it_however_it_dies(up: Up) -> None:
    pids = stages_below(up.cluster.folder).values()
    with up.connect() as pipeline:
        generation = pipeline.generate(PROMPT, max_tokens=200)
        next(generation)
        pipeline._retry_for = 0.5
        up.process.kill()
        with contextlib.suppress(StageError):
            list(generation)
    assert eventually(lambda: not any(map(alive, pids)))
    assert eventually(lambda: not list(up.cluster.folder.glob("minigpt-stage-*")))


def test_nothing_secret_passes_through_ray(up: Up) -> None:
    with up.connect() as pipeline:
        text = "".join(token.text or "" for token in pipeline.generate(PROMPT, max_tokens=20))
    assert " Paris" in text
    kept = b""
    for path in [*up.cluster.folder.rglob("*"), *Path("/dev/shm").glob("*plasma*")]:
        if path.is_file() and "minigpt-stage-" not in str(path):
            kept += path.read_bytes()
    assert b"minigpt.launch" in kept or b"_Actor" in kept  # what does pass through it is found
    for secret in (PROMPT, text, TOKEN[:32]):
        assert secret.encode() not in kept


def test_a_cluster_that_asks_for_no_token_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(Cluster("open", 1)) as unsafe:
        words = ["-m", "minigpt", "up", "--on", "ray", "--address", unsafe.address, "--stages", "1", "-o", "p.json"]
        done = subprocess.run([sys.executable, *words], env=unsafe.environment, cwd=tmp_path, capture_output=True,
                              text=True, timeout=180)  # fmt: skip
        assert done.returncode == 2
        assert "asks nobody for a token" in done.stderr
        assert "--insecure-ray" in done.stderr
        assert not (tmp_path / "p.json").exists()
        started = Up(unsafe, tmp_path, "--stages", "1", "--insecure-ray")
        with contextlib.closing(started), started.connect() as pipeline:
            assert len(list(pipeline.generate(PROMPT, max_tokens=3))) == 3


def test_where_no_cluster_answers_it_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        words = ["-m", "minigpt", "up", "--on", "ray", "--address", address, "-o", "p.json"]
        done = subprocess.run([sys.executable, *words], env=environment("token", tmp_path), cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 2
    assert f"no Ray cluster at {address} answers" in done.stderr
