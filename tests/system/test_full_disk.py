"""A disk that is full: what was there stays, nothing half-written is left, and the error names the file."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages

from attest.providers.mock import MockRoot

PLAN = ("minigpt", "plan", "--root-key", MockRoot.generate().public.hex(), "--split", "6+6", "-o")
KEYGENS = {"a client's": ("minigpt", "keygen", "-o"), "a root's": ("attest", "keygen", "-o")}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of eight pages."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def fill(disk: Path) -> None:
    """Takes what is left."""
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(1024))


def run(*arguments: object, code: int = 1, output: str | None = None) -> subprocess.CompletedProcess[str]:
    with open(output or os.devnull, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120,
        )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_plan_that_finds_no_space_leaves_nothing(disk: Path) -> None:
    run(*PLAN, disk / "pipeline.json", code=0)
    fill(disk)
    places = disk / "pipeline-2.places.json"
    assert run(*PLAN, disk / "pipeline-2.json").stderr == f"minigpt: {places}: No space left on device\n"
    assert sorted(os.listdir(disk)) == ["filler", "pipeline.json", "pipeline.places.json"]


@pytest.mark.parametrize("whose", KEYGENS)
def test_keygen_leaves_no_file_and_works_once_there_is_space(disk: Path, whose: str) -> None:
    command = KEYGENS[whose]
    fill(disk)
    assert run(*command, disk / "key").stderr == f"{command[0]}: {disk / 'key'}: No space left on device\n"
    assert os.listdir(disk) == ["filler"]
    (disk / "filler").unlink()
    run(*command, disk / "key", code=0)


def test_status_leaves_the_evidence_that_was_there(disk: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "4", tmp_path) as stages:
        stages.start_all()
        status = ("minigpt", "status", "--manifest", stages.path, "--allow-mock", "--save-evidence", disk)
        run(*status, code=0)
        path = disk / "stage-0.json"
        before = path.read_bytes()
        fill(disk)
        assert run(*status).stderr == f"minigpt: {path}: No space left on device\n"
        assert path.read_bytes() == before
        assert sorted(os.listdir(disk)) == ["filler", "stage-0.json"]


def test_an_image_is_whole_or_as_it_was(disk: Path) -> None:
    from scripts.image import eif

    image = eif.Image(b"kernel", b"cmdline", (b"boot", b"application"))
    eif.extract(image, disk)
    with pytest.raises(OSError, match="No space") as caught:
        eif.extract(eif.Image(bytes(100_000), b"cmdline", (b"boot", b"application")), disk)
    assert caught.value.filename == str(disk / "kernel")
    assert (disk / "kernel").read_bytes() == b"kernel"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "command", [("minigpt", "--help"), ("minigpt", "generate", "hi"), ("attest", "--help"), ("attest", "measure")]
)
def test_standard_output_is_blamed_where_it_is_full(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert run(*command, output="/dev/full").stderr.endswith(
        f"{command[0]}: standard output: No space left on device\n"
    )
