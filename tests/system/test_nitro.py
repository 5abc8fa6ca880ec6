"""A pipeline of Nitro stages, end to end: real processes, with a device each that signs under the tests' own root."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import enclaves
import pytest
from attacks.rogue import Rogue
from ends import background
from made import SMALL, random_tensors, write
from nitro.pipeline import Enclaves, image
from processes import ROOT, eventually
from serving import Serving

import minigpt
from attest import Provider
from minigpt.client.pipeline import Pipeline
from minigpt.errors import ManifestError, StageError, UntrustedStage
from transport.link import CLIENT

PROMPT = [1, 2, 3, 4]
MOST = 60.0  # seconds that something bounded may take here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    return ids(minigpt.load(str(folder)), 12)


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Enclaves]:
    """Two stages that no test ends or changes."""
    with Enclaves(folder, "2+2", tmp_path_factory.mktemp("stages")) as made:
        yield made.start_all()


@pytest.fixture
def stages(folder: Path, tmp_path: Path) -> Iterator[Enclaves]:
    with Enclaves(folder, "2+2", tmp_path) as made:
        yield made


def ids(model: Any, count: int) -> list[int]:
    return [token.id for token in model.generate(PROMPT, max_tokens=count)]


def connect(stages: Enclaves, **options: Any) -> Pipeline:
    return Pipeline.connect(stages.path, **{"allow_test_root": True} | options)


def minigpt_says(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=MOST)


def generate(stages: Enclaves, *flags: str) -> subprocess.CompletedProcess[str]:
    return minigpt_says("minigpt", "generate", "1 2 3 4", "--manifest", stages.path, "--max-tokens", "12", *flags)


# What works


def test_a_pipeline_of_enclaves_gives_the_tokens_of_one_process(shared: Enclaves, expected: list[int]) -> None:
    with connect(shared) as pipeline:
        assert ids(pipeline, 12) == expected
        assert [report.error for report in pipeline.status()] == ["", ""]
    assert [stage.platform.provider for stage in shared.manifest.stages] == [Provider.NITRO] * 2
    for index in (0, 1):
        log = shared.log(index)
        assert "peers will refuse" not in log
        assert "own evidence made in" in log
        assert f"stage 1 is believed under a test's root, {enclaves.ROOT.hex()}" in log


def test_each_handshake_asks_the_device_once(stages: Enclaves, expected: list[int]) -> None:
    stages.start_all()
    assert eventually(lambda: "link to stage 1: evidence accepted" in stages.log(0))
    # Stage 1: its own check, and the link that stage 0 opens ahead. Stage 0: its own check, and its end of that link.
    assert eventually(lambda: [stages.answers(0), stages.answers(1)] == [2, 2])
    for count in (3, 4):
        with connect(stages) as pipeline:
            assert ids(pipeline, 12) == expected
        assert [stages.answers(0), stages.answers(1)] == [count, 2]


def test_evidence_is_saved_shown_and_verified_line_by_line(shared: Enclaves, tmp_path: Path) -> None:
    allowed = ("--manifest", shared.path, "--allow-test-root")
    status = minigpt_says("minigpt", "status", *allowed, "--save-evidence", tmp_path)
    assert status.returncode == 0, status.stderr
    assert "which proves nothing about hardware" in status.stderr
    assert "the manifest expires in 30.0 days" in status.stderr
    assert "nitro evidence accepted under a test's root" in status.stdout
    for index in (0, 1):
        file = tmp_path / f"stage-{index}.json"
        checked = minigpt_says("attest", "verify", file, "--stage", index, *allowed)
        assert checked.returncode == 0, checked.stdout
        pinned = image(index).to_json()
        for name in ("chain", "signature", "binding", "claims", "debug"):
            assert f"PASS {name}: " in checked.stdout
        assert f"PASS pcr2: {pinned['pcr2']}, as pinned\n" in checked.stdout
        assert "believed under a test's root" in checked.stderr
        swapped = minigpt_says("attest", "verify", file, "--stage", 1 - index, *allowed)
        assert swapped.returncode == 3
        assert "FAIL pcr2: got" in swapped.stdout
        assert minigpt_says("attest", "verify", file, "--stage", index, *allowed[:2]).returncode == 3


def test_every_check_is_shown_by_serve(shared: Enclaves) -> None:
    with Serving("--manifest", str(shared.path), "--allow-test-root", "--connections", "2") as server:
        told = server.get("/v1/attestation").json()
        assert "believed under a test's root" in server.log
        assert 29.9 < server.metric("minigpt_manifest_expires_days") <= 30
    assert not told["simulated"]
    assert len(told["warnings"]) == 2
    for index, stage in enumerate(told["stages"]):
        assert (stage["provider"], stage["verdict"], stage["test_root"]) == ("nitro", "PASS", enclaves.ROOT.hex())
        assert all(line.startswith("PASS ") for line in stage["checks"])
        assert f"PASS pcr2: {image(index).to_json()['pcr2']}, as pinned" in stage["checks"]
        assert "PASS binding: made for this handshake, by this end, with these claims" in stage["checks"]


# What must not


def test_a_root_that_is_not_the_vendors_needs_the_switch_at_both_ends(stages: Enclaves) -> None:
    process = stages.spawn(1, switches=[])
    assert process.wait(MOST) == 3
    assert "refused without --allow-test-root" in stages.log(1)
    with pytest.raises(ManifestError, match="refused without --allow-test-root"):
        Pipeline.connect(stages.path)
    refused = generate(stages)
    assert refused.returncode == 3
    assert "refused without --allow-test-root" in refused.stderr


def test_the_tests_root_is_not_believed_where_no_manifest_names_it(folder: Path, tmp_path: Path) -> None:
    with Enclaves(folder, "4", tmp_path, pins=[image(0)]) as stages:
        stages.start(0, switches=[])  # it says that peers will refuse it
        assert "chain: got the root" in stages.log(0)
        refused = generate(stages)
        assert refused.returncode == 3
        assert "FAIL chain: got the root" in refused.stderr


WRONG = {
    "pcr": (["--pcr", "1=9"], "pcr1", f"got {'09' * 48}, wanted {'02' * 48}"),
    "debug": (["--pcr", "0=0", "--pcr", "1=0", "--pcr", "2=0"], "debug", "got on"),
    "stale": (["--age", "301"], "stale", "wanted within 300 s"),
    "foreign": (["--foreign"], "chain", "got the root"),
}


@pytest.mark.parametrize(
    ("index", "flags", "name", "sentence"),
    [*((0, *wrong) for wrong in WRONG.values()), (1, *WRONG["pcr"])],
    ids=[*WRONG, "pcr of stage 1"],
)
def test_a_stage_with_wrong_evidence_serves_nobody(
    stages: Enclaves, index: int, flags: list[str], name: str, sentence: str
) -> None:
    stages.device(index, *flags)
    stages.start_all()
    assert eventually(lambda: f"FAIL {name}: got" in stages.log(index))  # the log may come after "ready"
    assert "peers will refuse this stage's evidence" in stages.log(index)
    assert [line for line in stages.log(index).splitlines() if f"FAIL {name}: got" in line and sentence in line]
    with pytest.raises(UntrustedStage) as caught, connect(stages, retry_for=0) as pipeline:
        ids(pipeline, 1)
    assert caught.value.stage == index
    assert sentence in str(caught.value)
    if index == 0:  # the client has met it itself
        assert name in [failed for failed, _ in caught.value.failures]
        assert [line for line in caught.value.checks if line.startswith(f"FAIL {name}: got") and sentence in line]
        assert "PASS binding: made for this handshake, by this end, with these claims" in caught.value.checks
    refused = generate(stages, "--allow-test-root")
    assert refused.returncode == 3
    assert sentence in refused.stderr
    assert refused.stdout == ""


def test_a_stage_whose_device_is_silent_ends_in_time(stages: Enclaves) -> None:
    stages.device(1, "--silent")
    process = stages.spawn(1, "--handshake-timeout", "2")
    assert process.wait(MOST) == 3
    assert "the platform gave none in 2 s" in stages.log(1)


def test_a_device_that_falls_silent_costs_a_client_no_more_than_the_deadline(stages: Enclaves) -> None:
    for index in (1, 0):
        stages.start(index, "--handshake-timeout", "3")
    stages.device(0, "--silent")
    began = time.monotonic()
    with pytest.raises(StageError) as caught:
        connect(stages)
    assert not isinstance(caught.value, UntrustedStage)
    assert time.monotonic() - began < MOST
    assert generate(stages, "--allow-test-root", "--retry-for", "0").returncode == 4
    assert eventually(lambda: "the platform gave none in" in stages.log(0))


def test_a_device_that_answers_two_requests_alike_is_not_believed(stages: Enclaves) -> None:
    stages.start(1)
    stages.device(0, "--twice")
    stages.start(0)
    with pytest.raises(StageError):
        connect(stages)
    assert eventually(lambda: "binding: got user_data" in stages.log(0))


def test_a_device_that_is_missing_or_another_kind_of_evidence_is_refused_at_start(stages: Enclaves) -> None:
    plain = ("-m", "minigpt.stage")
    assert super(Enclaves, stages).spawn(0, "--allow-test-root", python=plain).wait(MOST) == 3
    assert "/dev/nsm is missing" in stages.log(0)
    assert super(Enclaves, stages).spawn(1, "--allow-test-root", "--evidence", "mock", python=plain).wait(MOST) == 2
    assert "--evidence mock, but the manifest wants nitro of stage 1" in stages.log(1)


# What a slow device costs


def test_a_slow_device_is_waited_for_and_strangers_wait_behind_others(stages: Enclaves, expected: list[int]) -> None:
    for index in (1, 0):
        stages.device(index, "--delay", "0.4")
        stages.start(index)
    assert eventually(lambda: "link to stage 1: evidence accepted" in stages.log(0))
    began = time.monotonic()
    with connect(stages) as pipeline:
        took = time.monotonic() - began
        assert took >= 0.4
        assert ids(pipeline, 12) == expected
    print(f"handshake: {took:.2f} s")


def test_strangers_who_want_evidence_wait_behind_whoever_has_cost_less(stages: Enclaves) -> None:
    """16 of them, at another address, would take the device 16 times before it is an honest client's turn."""
    for index in (1, 0):
        stages.device(index, *(["--delay", "0.4"] if index == 0 else []))
        stages.start(index)
    assert eventually(lambda: "link to stage 1: evidence accepted" in stages.log(0))
    over = threading.Event()

    def stranger() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", stages.ports[0]), timeout=MOST, source_address=("127.0.0.2", 0)
            ) as sock:  # fmt: skip
                Rogue(sock, "I", stages.manifest, CLIENT, 0, suite=2).shake().hear_attest()

    crowd = [background(stranger) for _ in range(16)]
    try:
        assert eventually(lambda: stages.answers(0) > 4)
        before, began = stages.answers(0), time.monotonic()
        with connect(stages):
            took, answered = time.monotonic() - began, stages.answers(0) - before
        print(f"handshake among 16 strangers: {took:.2f} s, {answered} answers of the device")
        assert answered < 10
    finally:
        over.set()
    for one in crowd:
        one.join()
