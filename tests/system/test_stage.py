"""A stage process by itself: how it gets its manifest, what memory it takes, how it takes turns."""

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from attacks.load import Crowd
from ends import Side
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, eventually, out_of_threads

import minigpt
from minigpt.client.pipeline import Pipeline
from minigpt.engine.config import Config
from minigpt.engine.model import CACHE_STEP
from minigpt.errors import StageError
from minigpt.protocol.links import calling_end
from minigpt.stage import turns
from minigpt.stage.turns import Turns
from transport.link import initiate


def free_port() -> tuple[socket.socket, int]:
    """A port, and the socket that keeps it from everybody but a listener that reuses the address."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    return keeper, keeper.getsockname()[1]


def hand_over(port: int, data: bytes) -> None:
    def there() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(data)
        except ConnectionRefusedError:
            return False
        return True

    assert eventually(there, 30)


def test_a_stage_receives_its_manifest_and_key_at_an_address_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    keepers = [free_port(), free_port()]
    with Stages(folder, "4", tmp_path) as stages:
        manifest_at, key_at = (f"tcp://127.0.0.1:{port}" for _, port in keepers)
        key = stages.key(0).read_bytes()
        process = stages.spawn(0, "--manifest", manifest_at, "--mock-key", key_at)
        hand_over(keepers[0][1], stages.bytes)
        hand_over(keepers[1][1], key)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("stage 0 ready")
        with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
            assert len(list(pipeline.generate([1, 2], max_tokens=3))) == 3
    for keeper, _ in keepers:
        keeper.close()


def test_a_stage_whose_caches_hold_no_sequence_does_not_start(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    least = 4 * 2 * 4 * SMALL.n_embd * CACHE_STEP
    with Stages(folder, "4", tmp_path) as stages:
        assert stages.spawn(0, "--cache-bytes", str(least - 1)).wait(60) == 2
        assert f"--cache-bytes: got {least - 1}, wanted at least {least}" in stages.log(0)


def test_a_stage_with_the_key_of_another_says_which_it_needs(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start(0, "--mock-key", str(stages.key(1)))
        assert eventually(lambda: "start it with the --mock-key of stage 0, the file that `python" in stages.log(0))


def scan(port: int, stay: float) -> None:
    """What a port scan does: connects and says nothing, says what is no manifest, breaks off, or stays."""
    hand_over(port, b"")
    hand_over(port, b"GET / HTTP/1.0\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        hand_over(port, b"x" * 2_000_000)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.settimeout(stay)
        assert sock.recv(1) == b""  # hung up on


def test_a_port_scan_does_not_end_a_boot_by_address(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    keepers = [free_port(), free_port()]
    code = "from minigpt.stage import __main__, process; process.SENDER = 1.0; __main__.main()"
    with Stages(folder, "4", tmp_path) as stages:
        manifest_at, key_at = (f"tcp://127.0.0.1:{port}" for _, port in keepers)
        key = stages.key(0).read_bytes()
        process = stages.spawn(0, "--manifest", manifest_at, "--mock-key", key_at, python=("-c", code))
        for what, (_, port), data in zip(("manifest", "mock key"), keepers, (stages.bytes, key), strict=True):
            assert eventually(lambda what=what: f"waiting for the {what} at tcp://" in stages.log(0))  # type: ignore[misc]
            scan(port, 60.0)
            hand_over(port, data)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("stage 0 ready"), stages.log(0)
        assert eventually(lambda: stages.log(0).count("did not send the manifest, still waiting") == 5)
        assert eventually(lambda: stages.log(0).count("did not send the mock key, still waiting") == 5)
    for keeper, _ in keepers:
        keeper.close()


def test_a_boot_by_address_says_what_did_not_come(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    keeper, port = free_port()
    code = "import sys; from minigpt.stage import __main__, process; process.PROVISION = 0.5; sys.exit(__main__.main())"
    with keeper, Stages(folder, "4", tmp_path) as stages:
        process = stages.spawn(0, "--manifest", f"tcp://127.0.0.1:{port}", python=("-c", code))
        assert process.wait(60) == 4
        assert f"tcp://127.0.0.1:{port}: no manifest came in" in stages.log(0)
        stages.kill(0)


def test_a_thread_that_the_system_refuses_costs_one_connection(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0)
        process = stages.processes[0]
        with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
            expected = [token.id for token in pipeline.generate([1, 2], max_tokens=3)]
            with out_of_threads(process.pid):
                for _ in range(13):
                    with socket.create_connection(("127.0.0.1", stages.ports[0]), timeout=60) as stranger:
                        stranger.sendall(Side(initiate(calling_end(stages.manifest, 0, None))).run())
                        assert stranger.recv(1) == b""  # turned away
                assert [token.id for token in pipeline.generate([1, 2], max_tokens=3)] == expected
            assert eventually(lambda: stages.log(0).count("turned away, the system gives no more threads") == 13)
            assert pipeline.status()[0].channels == 1
        with Pipeline.connect(stages.path, allow_mock=True) as pipeline:  # it lives, and has threads again
            assert [token.id for token in pipeline.generate([1, 2], max_tokens=3)] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2 without being asked")
def test_a_flood_of_handshakes_from_one_address_does_not_keep_others_waiting(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    costly = "newcomers.SHARE, newcomers.WORST = 0.02, 0.005"  # as if a handshake cost five times as much
    code = f"from minigpt.stage import __main__, newcomers; {costly}; __main__.main()"
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0, python=("-c", code))
        greeting = Side(initiate(calling_end(stages.manifest, 0, None))).run()  # the stage answers it, at some cost
        with Crowd(stages.ports[0], 200, greeting, renew=True, sources=["127.0.0.2"]) as crowd:
            assert eventually(lambda: crowd.made > 150)  # to take turns with them would take half a minute
            for _ in range(3):  # in 10 s each, or the handshake fails
                with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
                    assert len(list(pipeline.generate([1, 2], max_tokens=3))) == 3


def test_more_clients_of_one_address_than_handshakes_are_served_one_after_another(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    code = "from minigpt.stage import __main__, server; server.YOUNG = 60.0; __main__.main()"  # nobody ends a handshake
    with Stages(folder, "4", tmp_path) as stages, ThreadPoolExecutor(24) as threads, contextlib.ExitStack() as stack:
        stages.start(0, "--max-handshakes", "2", python=("-c", code))
        asked = [threads.submit(Pipeline.connect, stages.path, allow_mock=True) for _ in range(24)]
        for pipeline in asked:
            stack.enter_context(pipeline.result(60))
        assert "ended for a newcomer" not in stages.log(0)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_socket_that_was_handed_down_serves_one_process_after_another(how: signal.Signals, tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    keeper = socket.create_server(("127.0.0.1", 0))  # as systemd keeps it
    os.set_inheritable(keeper.fileno(), True)
    with keeper, Stages(folder, "4", tmp_path, places=[f"tcp://127.0.0.1:{keeper.getsockname()[1]}"]) as stages:
        for _ in range(3):
            stages.start(0, "--listen", f"fd:{keeper.fileno()}", pass_fds=[keeper.fileno()])
            with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
                assert len(list(pipeline.generate([1, 2], max_tokens=3))) == 3
            stages.kill(0, how)


def test_a_stage_takes_its_own_tensors_and_at_most_100_mb_more(tmp_path: Path) -> None:
    config = Config(vocab_size=8000, n_positions=256, n_embd=768, n_layer=4, n_head=12, n_inner=3072, eos_token_id=())
    for dtype in (np.float32, np.float16):
        folder = write(tmp_path / dtype.__name__, config, random_tensors(config), dtype=dtype)
        with Stages(folder, "2+2", tmp_path) as stages:
            stages.start_all()
            with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
                list(pipeline.generate(list(range(200)), max_tokens=5))
                reports = pipeline.status()
            for index, process in stages.processes.items():
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
                assert reports[index].weights_bytes < 90e6
                assert peak - reports[index].weights_bytes < 100e6


def test_a_process_leaves_no_core(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0)
        limits = Path(f"/proc/{stages.processes[0].pid}/limits").read_text()
        assert re.search(r"Max core file size\s+0\s+0\s", limits)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has prctl")
def test_no_other_process_of_the_user_may_read_a_stages_memory() -> None:
    code = "import ctypes; from minigpt.stage.__main__ import lock_down; lock_down(); print(ctypes.CDLL(None).prctl(3))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "0\n"  # PR_GET_DUMPABLE


def test_turns_are_taken_in_the_order_of_asking() -> None:
    lock, taken = Turns(), []

    def take(number: int) -> None:
        with lock:
            taken.append(number)
            time.sleep(0.001)

    threads = []
    with lock:
        for number in range(12):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            assert eventually(lambda number=number: len(lock._waiting) == number + 1)  # type: ignore[misc]
    for thread in threads:
        thread.join()
    assert taken == list(range(12))
    with lock:
        pass


def test_a_turn_is_given_back_when_a_computation_fails() -> None:
    lock = Turns()
    for _ in range(2):
        try:
            with lock:
                raise FloatingPointError
        except FloatingPointError:
            pass
    assert not lock._held


def test_a_turn_that_cannot_be_taken_is_given_on(tmp_path: Path) -> None:
    cores = (tmp_path / "turns").open("w+b", buffering=0)
    lock = Turns(cores)
    with pytest.raises(ValueError, match="closed"), lock:
        cores.close()  # the other end of the turn
    for _ in range(2):
        with pytest.raises(ValueError, match="closed"), lock:
            raise AssertionError("computed without a turn")
    assert not lock._held


class Holder:
    """Another process that has the lock of a file of --turns."""

    CODE = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""

    def __init__(self, turns: Path) -> None:
        words = [sys.executable, "-c", self.CODE, str(turns)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_turn_at_the_cores_comes_or_is_given_up_but_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "turns").touch()
    with (tmp_path / "turns").open("r+b", buffering=0) as cores:
        lock = Turns(cores)
        with Holder(tmp_path / "turns"):
            monkeypatch.setattr(turns, "PATIENCE", 0.2)
            for _ in range(3):
                with pytest.raises(StageError, match=r"no turn at the cores in .* stopped\?"), lock:
                    raise AssertionError("computed without a turn")
            assert not lock._held
            monkeypatch.setattr(turns, "PATIENCE", 60.0)
            waiting = threading.Thread(target=lambda: lock.__enter__() or lock.__exit__())
            waiting.start()
        waiting.join(60)  # the holder has ended
        assert not waiting.is_alive()
        with Holder(tmp_path / "turns"):
            monkeypatch.setattr(turns, "PATIENCE", 0.2)
            with pytest.raises(StageError, match="no turn"), lock:
                raise AssertionError("computed without a turn")
        with Holder(tmp_path / "turns"):  # what was given up was given back
            pass
        with lock:
            pass


def test_a_turn_in_a_stage_comes_or_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    lock = Turns()
    with lock:
        for _ in range(2):
            with pytest.raises(StageError, match="no turn at computing"), lock:
                raise AssertionError("computed out of turn")
    with lock:
        pass
    assert not lock._held


def test_a_stopped_process_that_holds_the_turn_costs_requests_and_not_stages(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    (tmp_path / "turns").touch()
    code = "from minigpt.stage import __main__, turns; turns.PATIENCE = 3.0; __main__.main()"
    with Stages(folder, "2+2", tmp_path) as stages:
        for index in (1, 0):
            stages.start(index, "--turns", str(tmp_path / "turns"), python=("-c", code))
        with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
            expected = [token.id for token in pipeline.generate([1, 2], max_tokens=3)]
            with Holder(tmp_path / "turns") as holder:
                holder.process.send_signal(signal.SIGSTOP)
                with pytest.raises(StageError, match="no turn at the cores in 3 s: another process"):
                    list(pipeline.generate([1, 2], max_tokens=3))
            assert "no turn at the cores" in stages.log(0)
            assert [token.id for token in pipeline.generate([1, 2], max_tokens=3)] == expected


def test_the_embedded_model_names_the_capitals_through_two_stages() -> None:
    countries = json.loads((Path(__file__).resolve().parents[1] / "data" / "capitals.json").read_text())
    assert len(countries) == 193
    right = 0
    with Pipeline.local("tiny", stages=2, threads=1) as pipeline:
        for entry in countries:
            text = "".join(
                token.text or "" for token in pipeline.generate(f"The capital of {entry['country']} is", max_tokens=12)
            )
            right += any(re.match(rf" {re.escape(capital)}\b", text) is not None for capital in entry["capitals"])
    assert right >= 185


def test_the_embedded_model_fits_its_limit() -> None:
    data = Path(minigpt.__file__).parent / "data"
    assert sum(path.stat().st_size for path in data.iterdir()) <= 5_000_000
