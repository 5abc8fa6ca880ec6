"""`minigpt up`: stages of this machine that outlive their clients, and end with it."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, alive, eventually

import minigpt
from attest.providers.mock import NewKey
from minigpt.client.pipeline import Pipeline
from minigpt.protocol import addresses
from minigpt.protocol.manifest import Manifest

PROMPT = [1, 2, 3]


class Up:
    """The command, in a folder of its own, until the block ends."""

    def __init__(self, where: Path, *flags: str) -> None:
        self.where = where
        self.manifest, self.places = where / "pipeline.json", where / "pipeline.places.json"
        self._log = (where / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minigpt", "up", *flags],
            cwd=where, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True,
        )  # fmt: skip

    def serves(self) -> "Up":
        assert eventually(lambda: self.manifest.exists() or self.process.poll() is not None), self.log()
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        return (self.where / "log").read_text()

    def stages(self, folder: Path) -> dict[int, int]:
        """Process ids of its stages, by their number."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes().split(b"\0")
                if b"minigpt.stage" in words and bytes(folder) in words and alive(int(entry.parent.name)):
                    found[int(words[words.index(b"--index") + 1])] = int(entry.parent.name)
        return found

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)

    def __enter__(self) -> "Up":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that no other test's stages serve, so that they can be told from those."""
    return write(tmp_path / "small", SMALL, random_tensors(SMALL))


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "where").mkdir()
    return tmp_path / "where"


@pytest.fixture
def up(folder: Path, where: Path) -> Iterator[Up]:
    with Up(where, "--on", "local", "--model", str(folder), "--stages", "2") as made:
        yield made.serves()


def expected(folder: Path, count: int) -> list[int]:
    return [token.id for token in minigpt.load(str(folder)).generate(PROMPT, max_tokens=count, draft=0)]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_stages_serve_until_it_ends_and_end_with_it(up: Up, folder: Path, how: signal.Signals, code: int) -> None:
    assert sorted(up.stages(folder)) == [0, 1]
    for _ in range(2):  # clients come and go
        with Pipeline.connect(up.manifest, allow_mock=True, text=False) as pipeline:
            assert [token.id for token in pipeline.generate(PROMPT, max_tokens=5)] == expected(folder, 5)
    assert up.end(how) == code
    assert eventually(lambda: not up.stages(folder))


def test_whoever_waits_for_the_manifest_finds_places_for_it(up: Up) -> None:
    count = len(Manifest.parse(up.manifest.read_bytes()).stages)
    served = addresses.read(up.places.read_bytes(), count)
    assert up.places.stat().st_mtime_ns <= up.manifest.stat().st_mtime_ns
    for index, place in enumerate(served):
        assert f"stage {index} of 2 loads its layers" in up.log()
        assert f"stage {index} serves at {place}" in up.log()


def test_the_lines_that_it_prints_can_be_copied(up: Up, folder: Path) -> None:
    assert up.process.stdout is not None
    generate, serve = (shlex.split(up.process.stdout.readline()) for _ in range(2))
    assert generate[:2] == ["minigpt", "generate"]
    assert serve == ["minigpt", "serve", *generate[3:]]
    generate[2] = "1 2 3"  # this checkpoint has no tokenizer
    done = subprocess.run(
        [sys.executable, "-m", *generate, "--max-tokens", "4"],
        cwd=up.where, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == expected(folder, 4)


def test_a_stage_that_is_killed_is_started_again_and_the_answer_goes_on(up: Up, folder: Path) -> None:
    with Pipeline.connect(up.manifest, allow_mock=True, text=False, retry_for=120) as pipeline:
        for index in (1, 0):
            running = pipeline.generate(PROMPT, max_tokens=100, draft=0)
            first = next(running)
            os.kill(up.stages(folder)[index], signal.SIGKILL)
            assert [first.id, *(token.id for token in running)] == expected(folder, 100)
            assert f"stage {index} was killed by signal 9" in up.log()


def test_when_it_is_killed_its_stages_end(up: Up, folder: Path) -> None:
    assert up.end(signal.SIGKILL) == -signal.SIGKILL
    assert eventually(lambda: not up.stages(folder))


def test_a_stage_that_is_given_up_ends_it_with_the_reason(up: Up, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"damaged")
    os.kill(up.stages(folder)[1], signal.SIGKILL)
    assert up.process.wait(60) == 4
    assert "it ended early 3 times in a row and is not started again" in up.log()
    assert eventually(lambda: not up.stages(folder))


def test_nothing_is_written_if_a_stage_cannot_start(folder: Path, where: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"damaged")
    with Up(where, "--model", str(folder), "--stages", "2") as up:
        assert up.process.wait(60) == 1
        assert "model.safetensors" in up.log()
        assert not up.manifest.exists()
        assert not up.places.exists()
    for flags, told in ((("--on", "moon"), "wanted local"), (("--stages", "9"), "9 stages for 4 layers")):
        with Up(where, "--model", str(folder), *flags) as up:
            assert up.process.wait(60) == 2
            assert told in up.log()


def test_it_writes_over_no_file_and_takes_its_own_along(folder: Path, where: Path) -> None:
    taken = where / "pipeline.json"
    taken.write_text("of somebody")
    with Up(where, "--model", str(folder), "--stages", "2") as up:
        assert up.process.wait(60) == 2
        assert "pipeline.json: exists, and a pipeline may run by it: choose another name" in up.log()
        assert "loads" not in up.log()
    assert taken.read_text() == "of somebody"
    taken.unlink()
    with Up(where, "--model", str(folder), "--stages", "2", "-o", "none/pipeline.json") as up:
        assert up.process.wait(60) == 2
        assert "there is no such folder" in up.log()


def test_once_it_has_ended_its_files_are_gone(up: Up) -> None:
    assert up.manifest.exists()
    assert up.end(signal.SIGTERM) == 0
    assert not up.manifest.exists()
    assert not up.places.exists()


# A stage that makes its own mock key.


def test_a_stage_takes_only_an_endorsement_of_the_key_that_it_made(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "4", tmp_path) as stages:
        expires = int(stages.manifest.expires.timestamp() * 1000)
        for genuine in (False, True):
            read, write_end = os.pipe()
            words = ["--manifest", stages.path, "--model", folder, "--index", 0, "--endorsement", f"fd:{read}"]
            with subprocess.Popen(
                [sys.executable, "-m", "minigpt.stage", *map(str, words), "--listen", "tcp://127.0.0.1:0",
                 "--allow-mock", "--until-eof"],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                pass_fds=[read],
            ) as process:  # fmt: skip
                os.close(read)
                assert process.stdin is not None
                assert process.stdout is not None
                assert process.stderr is not None
                said = process.stdout.readline().split()
                assert said[:3] == ["stage", "0", "key"]
                public = bytes.fromhex(said[3]) if genuine else NewKey.generate().public
                os.write(write_end, stages.root.endorse(public, 0, expires))  # the pipe stays open
                if genuine:
                    place = process.stdout.readline().split()[-1]
                    with Pipeline.connect(stages.path, place={0: place}, allow_mock=True, text=False) as pipeline:
                        assert [token.id for token in pipeline.generate(PROMPT, max_tokens=5)] == expected(folder, 5)
                    process.stdin.close()
                    assert process.wait(60) == 0
                else:
                    assert process.wait(60) == 3
                    assert "its endorsement is for another key" in process.stderr.read()
                os.close(write_end)
        process = stages.spawn(0, "--endorsement", "x")  # which also has --mock-key
        assert process.wait(60) == 2
        assert "leave out --mock-key" in stages.log(0)
