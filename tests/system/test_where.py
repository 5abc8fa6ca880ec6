"""Where stages are: a places file that may change, and that nobody needs to trust."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, eventually

import minigpt
from attest.providers.mock import MockRoot
from minigpt.client.pipeline import Pipeline
from minigpt.errors import StageError, UnreachableStage, UsageError
from minigpt.protocol import addresses
from transport.address import Address
from transport.relay import Relay

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


@pytest.fixture(scope="module")
def stages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    with Stages(folder, "2+2", tmp_path_factory.mktemp("stages")) as made:
        yield made.start_all()


@pytest.fixture
def free() -> Iterator[int]:
    """A port that is kept from everybody but a listener that reuses the address."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]


def ids(pipeline: Pipeline, count: int = 3) -> list[int]:
    return [token.id for token in pipeline.generate(PROMPT, max_tokens=count)]


def expected(folder: Path, count: int = 3) -> list[int]:
    return [token.id for token in minigpt.load(str(folder)).generate(PROMPT, max_tokens=count)]


def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_plan_writes_the_places_beside_the_manifest_whose_bytes_do_not_name_them(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.json"
    root = MockRoot.generate().public.hex()
    plan = ("minigpt", "plan", "--root-key", root, "--stages", "2", "-o")
    run(*plan, path)
    assert json.loads((tmp_path / "pipeline.places.json").read_bytes()) == {
        "0": "tcp://127.0.0.1:5001",
        "1": "tcp://127.0.0.1:5002",
    }
    assert b"tcp" not in path.read_bytes()
    run(*plan, tmp_path / "other.json", "--address", "tcp://a:1", "--address", "vsock://3:2")
    assert json.loads((tmp_path / "other.places.json").read_bytes()) == {"0": "tcp://a:1", "1": "vsock://3:2"}
    third = (tmp_path / "third.json", "--address", "tcp://a:1")
    assert "give --address once for each" in run(*plan, *third, code=2).stderr


def test_a_stage_that_moves_is_found_by_clients_and_by_the_stage_before_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spare").mkdir()
    with Stages(folder, "2+2", tmp_path) as stages, Stages(folder, "4", tmp_path / "spare") as spare:
        stages.start_all()
        with Pipeline.connect(stages.path, allow_mock=True, retry_for=120) as pipeline:
            assert ids(pipeline) == expected(folder)
            for index in (1, 0):  # stage 1 to a spare port, and stage 0 to where stage 1 was
                stages.kill(index)
                stages.ports[index], other = spare.ports[0], stages.ports[index]
                served = [f"tcp://127.0.0.1:{port}" for port in stages.ports]
                stages.places.write_bytes(addresses.write(served, 2))
                stages.start(index)
                spare.ports[0] = other
                assert ids(pipeline) == expected(folder)


def test_an_override_leads_to_a_relay_and_needs_no_places_file(stages: Stages, folder: Path) -> None:
    relay = Relay(Address.parse("tcp://127.0.0.1:0"), stages.addresses.of(0))
    with contextlib.closing(relay):
        serving = threading.Thread(target=relay.serve)
        serving.start()
        try:
            place = str(relay.address)
            with Pipeline.connect(stages.bytes, place={0: place}, allow_mock=True) as pipeline:
                assert ids(pipeline) == expected(folder)
            flags = (
                "--manifest",
                stages.path,
                "--allow-mock",
                "--places",
                "/nowhere",
                "--place",
                f"0={place}",
                "--json",
            )
            told = json.loads(run("minigpt", "status", *flags).stdout)
            assert [stage["address"] for stage in told["stages"]] == [place, None]
            told = json.loads(run("minigpt", "generate", "1 2 3", *flags, "--max-tokens", "3").stdout)
            assert [token["id"] for token in told["tokens"]] == expected(folder)
        finally:
            relay.stop()
            serving.join(60)


def test_a_wrong_place_is_a_failed_handshake(stages: Stages) -> None:
    with pytest.raises(UnreachableStage, match="Or another stage or none listens at"):
        Pipeline.connect(stages.path, place={0: str(stages.addresses.of(1))}, allow_mock=True)


def test_a_place_where_nobody_listens_is_an_unreachable_stage(stages: Stages, free: int) -> None:
    with pytest.raises(StageError, match=f"stage 0 cannot be reached: tcp://127.0.0.1:{free}"):
        Pipeline.connect(stages.path, place={0: f"tcp://127.0.0.1:{free}"}, allow_mock=True)


def test_places_that_are_not_acceptable_are_refused_before_anything_is_dialled(stages: Stages, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"0": "tcp://127.0.0.1:1"}')
    with pytest.raises(UsageError, match="1 is missing"):
        Pipeline.connect(stages.path, places=bad, allow_mock=True)
    with pytest.raises(UsageError, match=r"the place of stage 0 is not known: give the places file"):
        Pipeline.connect(stages.bytes, allow_mock=True)
    with pytest.raises(UsageError, match="a stage's number in place is str, wanted a whole number"):
        Pipeline.connect(stages.path, place={"0": "tcp://127.0.0.1:1"}, allow_mock=True)  # type: ignore[dict-item]
    flags = ("--manifest", stages.path, "--allow-mock")
    for words, told in (
        (("--places", bad), "1 is missing"),
        (("--place", "x"), "0=tcp://127.0.0.1:9000"),
        (("--place", "7=tcp://a:1"), "got stage 7"),
        (("--place", "0=tcp://a:1", "--place", "0=tcp://a:1"), "a stage twice"),
    ):
        assert told in run("minigpt", "generate", "1", *flags, *words, code=2).stderr
    assert "needs --manifest" in run("minigpt", "generate", "1", "--place", "0=tcp://a:1", code=2).stderr
    stage = ("minigpt.stage", "--manifest", stages.path, "--index", "0", "--allow-mock")
    assert "1 is missing" in run(*stage, "--places", bad, code=2).stderr


def test_a_places_file_that_is_broken_for_a_while_is_waited_for(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "4", tmp_path) as stages:
        stages.start_all()
        with Pipeline.connect(stages.path, allow_mock=True, retry_for=120) as pipeline:
            running = pipeline.generate(PROMPT, max_tokens=50, draft=0)
            next(running)
            good = stages.places.read_bytes()
            stages.places.write_bytes(good[:-9])  # as a writer that is not done leaves it
            stages.kill(0)
            stages.start(0)

            timer = threading.Timer(1.0, stages.places.write_bytes, (good,))
            timer.start()
            rest = [token.id for token in running]
            timer.join()
            assert len(rest) == 49
        broken = stages.places
        broken.write_bytes(b"{}")
        with pytest.raises(UsageError, match="0 is missing"):
            Pipeline.connect(stages.path, allow_mock=True)


def test_a_stage_without_listen_serves_at_its_own_place(folder: Path, tmp_path: Path, free: int) -> None:
    place = f"tcp://127.0.0.1:{free}"
    with Stages(folder, "4", tmp_path, places=[place]) as stages:
        words = ["--manifest", stages.path, "--model", folder, "--mock-key", stages.key(0), "--index", 0]
        with subprocess.Popen(
            [sys.executable, "-m", "minigpt.stage", *map(str, words), "--allow-mock", "--until-eof"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline().endswith(f"{place}\n")
            with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
                assert ids(pipeline) == expected(folder)
            process.stdin.close()
            assert process.wait(60) == 0


def test_a_stage_receives_its_places_at_an_address_once(folder: Path, tmp_path: Path, free: int) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start(1)
        process = stages.spawn(0, "--places", f"tcp://127.0.0.1:{free}")
        assert eventually(lambda: "waiting for the places at tcp://" in stages.log(0))
        for data in (b"{}", stages.places.read_bytes()):
            with socket.create_connection(("127.0.0.1", free), timeout=60) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(1) == b""
        assert process.stdout is not None
        assert process.stdout.readline().startswith("stage 0 ready"), stages.log(0)
        said = "did not send the places, still waiting: 'places: the address of stage 0 is missing"
        assert eventually(lambda: said in stages.log(0))
        with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
            assert ids(pipeline) == expected(folder)
