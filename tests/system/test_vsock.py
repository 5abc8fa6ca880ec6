"""Real AF_VSOCK, over its loopback: sockets, errors, and a pipeline of processes whose links are vsock."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ends import background
from made import SMALL, random_tensors, write
from places import LOCAL, VSOCK, anywhere
from processes import ROOT, Stages

import minigpt
from minigpt.client.pipeline import Pipeline
from minigpt.errors import StageError
from transport.address import Address
from transport.channel import receive_all
from transport.errors import Unreachable
from transport.sockets import Listener, Wire, connect

if not VSOCK:
    pytest.skip("this kernel has no vsock loopback; test_uml.py brings one that has", allow_module_level=True)

ANY = 2**32 - 1  # VMADDR_CID_ANY
TINY = Path(minigpt.__file__).parent / "data"
PROMPT = "The capital of France is"


def free() -> Address:
    """An address that nobody listens at; ports are given out in turn, so it stays so."""
    with Listener(anywhere("vsock")) as listener:
        return listener.address


# Sockets


def test_a_listener_knows_its_port_and_its_peers() -> None:
    with Listener(anywhere("vsock")) as listener:
        assert listener.address.host == str(LOCAL)
        assert listener.address.port != 0
        with connect(listener.address, 5.0) as sock:
            accepted = listener.accept()
            assert accepted is not None
            with accepted[0]:
                peer = Address.parse(accepted[1])
                assert (peer.scheme, peer.host) == ("vsock", str(LOCAL))
                assert peer.port == sock.getsockname()[1]


def test_a_listener_for_any_context_id_is_reached() -> None:
    with Listener(Address("vsock", str(ANY), 0)) as listener:
        assert listener.address.host == str(ANY)
        connect(Address("vsock", str(LOCAL), listener.address.port), 5.0).close()


def test_a_listener_that_a_parent_hands_down() -> None:
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    server.bind((LOCAL, socket.VMADDR_PORT_ANY))
    server.listen()
    port = server.getsockname()[1]
    with Listener(server.detach()) as listener:
        assert listener.address == Address("vsock", str(LOCAL), port)
        connect(listener.address, 5.0).close()


def test_closing_a_listener_wakes_who_accepts() -> None:
    listener = Listener(anywhere("vsock"))
    waiting = background(listener.accept)
    time.sleep(0.05)
    listener.close()
    assert waiting.join() is None


def test_a_port_is_free_again_as_soon_as_its_listener_is_closed() -> None:
    with Listener(anywhere("vsock")) as listener:
        sock = connect(listener.address, 5.0)
        with pytest.raises(Unreachable, match=f"cannot listen on {listener.address}: Address already in use"):
            Listener(listener.address)
    Listener(listener.address).close()
    sock.close()


def test_a_closed_port_and_an_unknown_context_id_are_unreachable_at_once() -> None:
    for address in (free(), Address("vsock", "77", 5000), Address("vsock", str(ANY), 5000)):
        began = time.monotonic()
        with pytest.raises(Unreachable, match=f"^{address}: "):
            connect(address, 5.0)
        assert time.monotonic() - began < 30


def test_a_context_id_of_others_cannot_be_bound() -> None:
    with pytest.raises(Unreachable, match="cannot listen on vsock://77:5000"):
        Listener(Address("vsock", "77", 5000))


@pytest.mark.parametrize("how", [Wire.close, Wire.abort, Wire.shut, Wire.finish])
def test_however_an_end_leaves_what_it_wrote_arrives_and_then_its_end(how) -> None:
    with Listener(anywhere("vsock")) as listener:
        left = Wire(connect(listener.address, 5.0))
        right = Wire(listener.accept()[0])
    soon = time.monotonic() + 60
    left.write(bytes(100_000), soon)
    assert not right.gone()
    how(left)
    assert right.wait(soon)
    assert right.readable()
    while not right.gone():
        assert time.monotonic() < soon
    assert right.read_exactly(100_000, soon) == bytes(100_000)
    assert right.read(1) == b""
    left.close()
    right.abort()


def test_what_one_connection_sends_is_received_whole() -> None:
    with Listener(anywhere("vsock")) as listener, connect(listener.address, 60.0) as sock:
        accepted = listener.accept()
        assert accepted is not None
        receiving = background(receive_all, accepted[0], 1 << 20, 60.0)
        sock.sendall(bytes(500_000))
        sock.shutdown(socket.SHUT_WR)
        assert receiving.join() == bytes(500_000)


# A pipeline


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Two stages of the embedded model that listen where the manifest says, as on a host of enclaves."""
    places = [str(free()) for _ in range(2)]
    with Stages(TINY, "6+6", tmp_path_factory.mktemp("vsock"), model="tiny", places=places) as made:
        for index in (1, 0):
            made.start(index, "--listen", places[index])
        yield made


def ids(generation: minigpt.Generation) -> list[int]:
    return [token.id for token in generation]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"])
def test_a_pipeline_gives_the_tokens_of_one_process_and_those_over_tcp(stages: Stages, options) -> None:
    with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
        found = ids(pipeline.generate(PROMPT, max_tokens=15, **options))
        assert all(not report.error for report in pipeline.status())
    assert found == ids(minigpt.load("tiny").generate(PROMPT, max_tokens=15, **options))
    if not options:
        with Pipeline.local("tiny", split="6+6", threads=1) as pipeline:
            assert [pipeline.addresses.of(index).scheme for index in range(2)] == ["tcp", "tcp"]
            assert ids(pipeline.generate(PROMPT, max_tokens=15)) == found


def test_the_command_line_reaches_it(stages: Stages) -> None:
    command = ["-m", "minigpt", "generate", PROMPT, "--manifest", str(stages.path), "--allow-mock", "--json"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["text"].startswith(" Paris")
    assert [stage["address"].startswith("vsock://1:") for stage in told["stages"]] == [True, True]


def test_stages_get_manifest_and_key_over_vsock_and_one_that_dies_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    places = [str(free()) for _ in range(2)]
    with Stages(folder, "2+2", tmp_path, places=places) as stages:
        stages.start(1, "--listen", places[1])
        entries = {"--manifest": free(), "--mock-key": free()}
        process = stages.spawn(0, "--listen", places[0], *(str(word) for pair in entries.items() for word in pair))
        for address, data in zip(entries.values(), (stages.bytes, stages.key(0).read_bytes()), strict=True):
            hand_over(address, data)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("stage 0 ready"), stages.log(0)
        with Pipeline.connect(stages.path, allow_mock=True, retry_for=0) as pipeline:
            wanted = ids(minigpt.load(str(folder)).generate([1, 2, 3], max_tokens=5))
            assert ids(pipeline.generate([1, 2, 3], max_tokens=5)) == wanted
            running = pipeline.generate([1, 2, 3], max_tokens=150, draft=0)
            next(running)
            stages.kill(1)
            began = time.monotonic()
            with pytest.raises(StageError, match="stage 1"):
                ids(running)
            assert time.monotonic() - began < 20
            with pytest.raises(StageError, match="stage 1 cannot be reached: vsock://1:"):
                ids(pipeline.generate([1, 2, 3], max_tokens=5))


def hand_over(address: Address, data: bytes) -> None:
    """Sends `data` to `address` as soon as somebody listens there."""
    until = time.monotonic() + 30
    while True:
        try:
            with connect(address, 1.0) as sock:
                sock.sendall(data)
                return
        except Unreachable:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_pipeline_at_an_unknown_context_id_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with (
        Stages(folder, "4", tmp_path, places=["vsock://77:5000"]) as stages,
        pytest.raises(StageError, match="stage 0 cannot be reached: vsock://77:5000"),
    ):
        Pipeline.connect(stages.path, allow_mock=True)


def test_no_thread_is_left() -> None:
    assert [thread for thread in threading.enumerate() if not thread.daemon] == [threading.main_thread()]
