"""Pipelines of SNP and of TDX guests, end to end: real processes, each with a configfs-tsm made of FIFOs, behind which
a process signs under the tests' own roots."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, eventually
from serving import Serving
from tsm.pipeline import Guests, pins, tdx_files

import minigpt
from minigpt.client.pipeline import Pipeline
from minigpt.errors import StageError, UntrustedStage

PROMPT = [1, 2, 3, 4]
MOST = 60.0  # seconds that something bounded may take here
CODE = {"snp": "measurements", "tdx": "mrtd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    return ids(minigpt.load(str(folder)))


@pytest.fixture(params=["snp", "tdx"])
def stages(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[Guests]:
    with Guests(folder, "2+2", tmp_path, request.param) as made:
        yield made


def ids(model: Any) -> list[int]:
    return [token.id for token in model.generate(PROMPT, max_tokens=12)]


def connect(stages: Guests) -> Pipeline:
    return Pipeline.connect(stages.path, allow_test_root=True, retry_for=0)


def says(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=MOST)


def generate(stages: Guests, *flags: str) -> subprocess.CompletedProcess[str]:
    return says("minigpt", "generate", "1 2 3 4", "--manifest", stages.path, "--max-tokens", "12", *flags)


def ended(stage: "subprocess.Popen[str]") -> int:
    """The exit code of a stage that does not come up."""
    with stage:
        return stage.wait(MOST)


def test_a_pipeline_of_guests_gives_the_tokens_of_one_process(
    stages: Guests, expected: list[int], tmp_path: Path
) -> None:
    stages.start_all()
    with connect(stages) as pipeline:
        assert ids(pipeline) == expected
        assert [report.error for report in pipeline.status()] == ["", ""]
    for index in (0, 1):
        assert eventually(lambda index=index: "evidence\n" in stages.log(index))  # of the line that it is ready
        assert "own evidence made in" in stages.log(index)
        assert "peers will refuse" not in stages.log(index)
    allowed = ("--manifest", stages.path, "--allow-test-root")
    assert generate(stages).returncode == 3  # without the switch
    status = says("minigpt", "status", *allowed, "--save-evidence", tmp_path)
    assert f"{stages.kind} evidence accepted under a test's root  endorsements end in " in status.stdout
    for index in (0, 1):
        file = tmp_path / f"stage-{index}.json"
        checked = says("attest", "verify", file, "--stage", index, *allowed)
        assert checked.returncode == 0, checked.stdout
        for name in ("chain", "signature", "binding", "claims", "debug", CODE[stages.kind]):
            assert f"PASS {name}: " in checked.stdout
        swapped = says("attest", "verify", file, "--stage", 1 - index, *allowed)
        assert swapped.returncode == 3
        assert f"FAIL {CODE[stages.kind]}: got" in swapped.stdout
    with Serving("--manifest", str(stages.path), "--allow-test-root", "--connections", "2") as server:
        told = server.get("/v1/attestation").json()
        assert 2000 < server.metric("minigpt_stage_endorsements_expire_days") < 73_000  # of both: they end in 2049
    for stage in told["stages"]:
        assert (stage["provider"], stage["verdict"]) == (stages.kind, "PASS")
        assert stage["endorsed_until"] == "2049-01-01T00:00:00+00:00"
        assert all(line.startswith("PASS ") for line in stage["checks"])


def test_each_handshake_asks_the_kernel_once(stages: Guests, expected: list[int]) -> None:
    stages.start_all()
    assert eventually(lambda: "link to stage 1: evidence accepted" in stages.log(0))
    assert eventually(lambda: [stages.answers(0), stages.answers(1)] == [2, 2])
    with connect(stages) as pipeline:
        assert ids(pipeline) == expected
    assert [stages.answers(0), stages.answers(1)] == [3, 2]


@pytest.mark.parametrize(
    ("index", "flags", "name"),
    [(0, ["--measurement", "9"], ""), (1, ["--measurement", "9"], ""), (0, ["--debug"], "debug"),
     (0, ["--foreign"], "chain")],
    ids=["measurement", "measurement of stage 1", "debug", "foreign root"],
)  # fmt: skip
def test_a_guest_with_wrong_evidence_serves_nobody(stages: Guests, index: int, flags: list[str], name: str) -> None:
    name = name or CODE[stages.kind]
    stages.device(index, *flags)
    stages.start_all()
    assert eventually(lambda: f"FAIL {name}: got" in stages.log(index))  # the log may come after "ready"
    assert "peers will refuse this stage's evidence" in stages.log(index)
    with pytest.raises(UntrustedStage) as caught, connect(stages) as pipeline:
        ids(pipeline)
    assert caught.value.stage == index
    refused = generate(stages, "--allow-test-root")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert f"{name}: got" in refused.stderr


def test_an_answer_that_was_given_before_is_not_believed(stages: Guests) -> None:
    stages.start(1)
    stages.device(0, "--twice")
    stages.start(0)
    with pytest.raises(StageError):
        connect(stages)
    assert eventually(lambda: "binding: got report_data" in stages.log(0))


def test_a_host_without_certificates_needs_a_folder_of_them(folder: Path, tmp_path: Path, expected: list[int]) -> None:
    with Guests(folder, "4", tmp_path, "snp") as stages:
        stages.device(0, "--bare")
        assert ended(stages.spawn(0)) == 3
        assert "the VCEK of this report is missing; put https://kdsintf.amd.com/vcek/v1/Milan/" in stages.log(0)
        stages.start(0, endorsed=True)
        with connect(stages) as pipeline:
            assert ids(pipeline) == expected


def test_collateral_that_is_replaced_counts_from_then_on(folder: Path, tmp_path: Path, expected: list[int]) -> None:
    with Guests(folder, "4", tmp_path, "tdx") as stages:
        assert ended(stages.spawn(0, endorsed=False)) == 3
        assert "give --endorsements" in stages.log(0)
        kept = (stages.endorsements / "tcbInfo").rename(tmp_path / "kept")
        assert ended(stages.spawn(0)) == 3
        assert "TCB info missing" in stages.log(0)
        assert "/tdx/certification/v4/tcb?fmspc=b0c06f000000" in stages.log(0)
        kept.rename(stages.endorsements / "tcbInfo")
        stages.start(0)
        (stages.endorsements / "tcbInfo").rename(kept)
        with pytest.raises(StageError):
            connect(stages)
        kept.rename(stages.endorsements / "tcbInfo")
        with connect(stages) as pipeline:
            assert ids(pipeline) == expected


@contextlib.contextmanager
def delivering(folder: Path) -> Iterator[str]:
    """Meanwhile `minigpt endorsements` has a folder's files at an address."""
    command = [sys.executable, "-m", "minigpt", "endorsements", "tcp://127.0.0.1:0", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("endorsements ready: ").strip()
        finally:
            process.terminate()
            assert process.wait(MOST) == 0


def refusal(stages: Guests) -> str:
    """Why a new client refuses a stage; "" if it does not."""
    try:
        connect(stages).close()
    except UntrustedStage as error:
        return str(error)
    return ""


def test_endorsements_that_end_are_replaced_over_an_address_while_the_stage_serves(
    folder: Path, tmp_path: Path, expected: list[int]
) -> None:
    with Guests(folder, "4", tmp_path, "tdx") as stages:

        def put(files: dict[str, bytes]) -> None:
            for name, data in files.items():
                (stages.endorsements / f".{name}").write_bytes(data)
                (stages.endorsements / f".{name}").rename(stages.endorsements / name)

        put(tdx_files(ends=datetime.now(UTC) + timedelta(seconds=2)))
        with delivering(stages.endorsements) as address:
            stages.start(0, "--endorsements", address, endorsed=False)
            assert eventually(lambda: "collateral-expired: " in refusal(stages))
            put(tdx_files())
            assert eventually(lambda: refusal(stages) == "")
            assert f"files of endorsements came from {address}" in stages.log(0)
        assert eventually(lambda: refusal(stages) == "" and f"no endorsements came from {address}" in stages.log(0))
        assert "the 5 files from before still count" in stages.log(0)
        with connect(stages) as pipeline:
            assert ids(pipeline) == expected


def test_an_address_where_nobody_is_costs_only_those_who_need_it(
    folder: Path, tmp_path: Path, expected: list[int]
) -> None:
    nobody = ("--endorsements", "tcp://127.0.0.1:1")
    for kind in ("tdx", "snp"):
        (tmp_path / kind).mkdir()
        with Guests(folder, "4", tmp_path / kind, kind) as stages:
            if kind == "tdx":
                assert ended(stages.spawn(0, *nobody, endorsed=False)) == 3
                assert "TCB info" in stages.log(0)
            else:  # its host hands them over
                stages.start(0, *nobody, endorsed=False)
                with connect(stages) as pipeline:
                    assert ids(pipeline) == expected
            assert "no endorsements came from tcp://127.0.0.1:1: " in stages.log(0)
            assert "there are none yet" in stages.log(0)


def test_a_folder_with_a_key_in_it_is_delivered_to_nobody(tmp_path: Path) -> None:
    assert says("attest", "keygen", "-o", tmp_path / "root.json").returncode == 0
    refused = says("minigpt", "endorsements", "tcp://127.0.0.1:0", tmp_path)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "root.json: tcbInfo is missing: wanted an answer of Intel's service" in refused.stderr


def test_a_guest_of_another_platform_is_refused_at_start(folder: Path, tmp_path: Path) -> None:
    with Guests(folder, "2+2", tmp_path, "snp", pins=[pins("tdx", 0), pins("snp", 1)]) as stages:
        assert ended(stages.spawn(0)) == 3
        assert "got the provider 'sev_guest', wanted tdx_guest" in stages.log(0)
        assert ended(stages.spawn(1, "--evidence", "tdx")) == 2
        assert "--evidence tdx, but the manifest wants snp of stage 1" in stages.log(1)


def test_platforms_mix_in_one_pipeline(folder: Path, tmp_path: Path, expected: list[int]) -> None:
    with Guests(folder, "2+2", tmp_path, "tdx", pins=[pins("tdx", 0), pins("snp", 1)]) as stages:
        stages.device(1, "--kind", "snp")
        stages.start_all()
        with connect(stages) as pipeline:
            assert ids(pipeline) == expected
