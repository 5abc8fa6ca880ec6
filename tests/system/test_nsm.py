"""Stages as they are, at a real `/dev/nsm` (by CUSE, from a process), with links over vsock: test_uml.py runs this."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from nitro import pipeline as enclaves
from nitro.pipeline import Rooted
from places import VSOCK, anywhere
from processes import ROOT, Stages, eventually

import minigpt
from minigpt.client.pipeline import Pipeline
from minigpt.errors import UntrustedStage
from transport.sockets import Listener

if not VSOCK or not Path("/dev/cuse").exists():
    pytest.skip("no vsock loopback or no CUSE here; test_uml.py brings a kernel that has both", allow_module_level=True)

PROMPT = [1, 2, 3, 4]


@contextlib.contextmanager
def device(where: Path, *flags: str) -> Iterator[None]:
    """Meanwhile there is a device. The stages of one machine share it, so they have one image."""
    command = [sys.executable, str(enclaves.HERE / "cuse.py"), "--pcr", "2=100", *flags]
    with (where / "nsm").open("w") as said:
        process = subprocess.Popen(command, stdout=said)
    try:
        assert eventually(lambda: (where / "nsm").read_text() == "ready\n" and Path("/dev/nsm").exists())
        yield
    finally:
        process.kill()
        process.wait()
        assert eventually(lambda: not Path("/dev/nsm").exists())


def places() -> list[str]:
    found = []
    for _ in range(2):
        with Listener(anywhere("vsock")) as listener:
            found.append(str(listener.address))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


@pytest.fixture
def stages(folder: Path, tmp_path: Path) -> Iterator[Stages]:
    with Stages(folder, "2+2", tmp_path, places=places(), pins=[Rooted(enclaves.image(0))]) as made:
        yield made


def start(stages: Stages, *flags: str) -> None:
    for index in (1, 0):
        place = str(stages.addresses.of(index))
        stages.start(index, "--listen", place, "--allow-test-root", *flags)


def ids(stages: Stages, count: int) -> list[int]:
    with Pipeline.connect(stages.path, allow_test_root=True, retry_for=0) as pipeline:
        return [token.id for token in pipeline.generate(PROMPT, max_tokens=count)]


def test_a_pipeline_over_vsock_takes_its_evidence_from_the_device(stages: Stages, folder: Path, tmp_path: Path) -> None:
    with device(tmp_path):
        start(stages)
        wanted = [token.id for token in minigpt.load(str(folder)).generate(PROMPT, max_tokens=8)]
        assert ids(stages, 8) == wanted
        assert "peers will refuse" not in stages.log(0) + stages.log(1)
        # Their own checks, both ends of the link between them, and the client's link.
        assert eventually(lambda: (tmp_path / "nsm").read_text().count("answered") == 5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pcr", "0=9"], "pcr0: got 0909"),
        (["--age", "301"], "wanted within 300 s"),
        (["--foreign"], "chain: got the root"),
    ],
    ids=["pcr", "stale", "foreign"],
)
def test_a_device_that_says_something_else_is_not_believed(
    stages: Stages, tmp_path: Path, flags: list[str], sentence: str
) -> None:
    with device(tmp_path, *flags):
        start(stages)
        with pytest.raises(UntrustedStage) as caught:
            ids(stages, 1)
        assert sentence in str(caught.value)
        command = ["generate", "1 2 3", "--manifest", str(stages.path), "--allow-test-root"]
        done = subprocess.run([sys.executable, "-m", "minigpt", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 3
        assert sentence in done.stderr


def test_a_device_that_is_silent_ends_its_stage(stages: Stages, tmp_path: Path) -> None:
    with device(tmp_path, "--silent"):
        place = str(stages.addresses.of(1))
        process = stages.spawn(1, "--listen", place, "--allow-test-root", "--handshake-timeout", "2")
        assert eventually(lambda: "the platform gave none in 2 s" in stages.log(1))
    # The kernel keeps a process until its call has come back, and the device's end ends the call.
    assert process.wait(60) == 3
