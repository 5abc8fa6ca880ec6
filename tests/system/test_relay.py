"""The relay: what goes in comes out, both ways, whatever either end does; and it sees nothing but ciphertext."""

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made import SMALL, random_tensors, write
from places import VSOCK, anywhere
from processes import ROOT, Stages, eventually, out_of_threads

import minigpt
from minigpt.client.pipeline import Pipeline
from minigpt.protocol import messages
from transport import codec, relay
from transport.address import Address
from transport.errors import Unreachable
from transport.relay import Relay
from transport.sockets import Listener, Wire, connect

Serve = Callable[[socket.socket], None]
PATIENCE = 60.0  # seconds, for what takes milliseconds: 10 were too few for a hundred connections in a busy guest
WAYS = [("tcp", "tcp")]  # how the relay is reached, and how it reaches its target
if VSOCK:
    WAYS += [("tcp", "vsock"), ("vsock", "tcp")]  # what goes to enclaves, and what comes from them


class Running:
    """A relay to a target whose every connection is served by a function, in a thread."""

    def __init__(self, way: tuple[str, str], serve: Serve, **options: int) -> None:
        self.target = Listener(anywhere(way[1]))
        self.relay = Relay(anywhere(way[0]), self.target.address, **options)
        self.served: list[threading.Thread] = []
        self._serve = serve
        self._threads = [threading.Thread(target=work) for work in (self.relay.serve, self._accept)]
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        while (accepted := self.target.accept()) is not None:
            accepted[0].settimeout(PATIENCE)
            self.served.append(threading.Thread(target=self._serve, args=accepted[:1]))
            self.served[-1].start()

    def connect(self) -> socket.socket:
        sock = connect(self.relay.address, PATIENCE)
        sock.settimeout(PATIENCE)
        return sock

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.stop()
        self.target.close()
        for thread in (*self._threads, *self.served):
            thread.join(PATIENCE)
            assert not thread.is_alive()


def read_all(sock: socket.socket) -> bytes:
    """Up to the end."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def echo(sock: socket.socket) -> None:
    with sock:
        while data := sock.recv(1 << 16):
            sock.sendall(data)


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]} to {way[1]}")
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    made: tuple[str, str] = request.param
    return made


def test_what_goes_in_comes_out_both_ways(way: tuple[str, str]) -> None:
    data = random.Random(1).randbytes(3_000_000)
    with Running(way, echo) as running, running.connect() as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        found = bytearray()
        while len(found) < len(data):
            found += sock.recv(1 << 16)
        sender.join(PATIENCE)
        assert found == data


def test_the_end_of_one_direction_is_passed_on_and_the_other_goes_on(way: tuple[str, str]) -> None:
    def answer(sock: socket.socket) -> None:
        with sock:
            asked = read_all(sock)
            time.sleep(0.1)
            sock.sendall(asked[::-1] * 1000)

    with Running(way, answer) as running, running.connect() as sock:
        sock.sendall(b"abc")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"cba" * 1000


def test_a_target_that_ends_first_still_receives(way: tuple[str, str]) -> None:
    found = []

    def part(sock: socket.socket) -> None:
        with sock:
            sock.sendall(b"last words")
            sock.shutdown(socket.SHUT_WR)
            found.append(read_all(sock))

    with Running(way, part) as running:
        with running.connect() as sock:
            assert read_all(sock) == b"last words"
            for _ in range(10):
                sock.sendall(bytes(10_000))
        assert eventually(lambda: [len(data) for data in found] == [100_000])


def test_when_one_end_breaks_off_so_does_the_other(way: tuple[str, str]) -> None:
    ends = []

    def wait(sock: socket.socket) -> None:
        with sock:
            try:
                ends.append(sock.recv(1))
            except ConnectionError:
                ends.append(b"")

    with Running(way, wait) as running:
        sock = running.connect()
        assert eventually(lambda: len(running.served) == 1)
        Wire(sock).abort()
        assert eventually(lambda: ends == [b""])
        assert eventually(lambda: not threads_of_connections())


def threads_of_connections() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("connection")]


def test_a_hundred_connections_do_not_meet(way: tuple[str, str]) -> None:
    with Running(way, echo) as running, ExitStack() as stack:
        socks = [stack.enter_context(running.connect()) for _ in range(100)]
        for turn in range(2):
            for number, sock in enumerate(socks):
                sock.sendall(f"{number} in turn {turn}\n".encode() * 20)
            for number, sock in enumerate(socks):
                wanted = f"{number} in turn {turn}\n".encode() * 20
                assert sock.recv(len(wanted), socket.MSG_WAITALL) == wanted
        assert len(running.served) == 100


def test_more_than_allowed_are_turned_away_until_there_is_room(way: tuple[str, str]) -> None:
    with Running(way, echo, connections=2) as running:
        first, second = running.connect(), running.connect()
        for sock in (first, second):
            assert answers(sock)
        assert not reaches(running)
        first.close()
        assert eventually(lambda: reaches(running))
        assert answers(second)
        second.close()


def answers(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"x")
        return sock.recv(1) == b"x"
    except ConnectionError:
        return False


def reaches(running: Running) -> bool:
    try:
        with running.connect() as sock:
            return answers(sock)
    except Unreachable:  # it was cut off before `connect` had seen that it was there
        return False


def test_a_target_that_is_down_closes_the_connection_and_the_relay_lives(way: tuple[str, str]) -> None:
    with Running(way, echo) as running:
        running.target.close()
        for _ in range(3):
            assert not reaches(running)
        with Listener(running.target.address) as again:
            sock = running.connect()
            accepted = again.accept()
            assert accepted is not None
            with sock, accepted[0] as served:
                sock.sendall(b"x")
                assert served.recv(1) == b"x"


def speaking(running: Running) -> socket.socket:
    """A connection in use, however late this process was with its first byte."""
    while not answers(sock := running.connect()):
        sock.close()
    return sock


def ends(sock: socket.socket) -> bool:
    """Waits for the end, or for a byte."""
    sock.settimeout(PATIENCE)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def is_cut_off(sock: socket.socket) -> bool:
    with sock:
        return ends(sock)


def test_newcomers_make_room_for_themselves_but_not_at_the_cost_of_connections_in_use(way: tuple[str, str]) -> None:
    def hang_up_on_silence(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(0.2)
            try:
                if sock.recv(1):
                    sock.sendall(b"x")
                    sock.settimeout(PATIENCE)
                    echo(sock)
            except TimeoutError:
                pass

    with Running(way, hang_up_on_silence, connections=5) as running, speaking(running) as used:
        strangers = [running.connect() for _ in range(8)]
        assert is_cut_off(strangers.pop(0))
        assert eventually(lambda: reaches(running))  # while some are silent …
        assert eventually(lambda: sum(thread.is_alive() for thread in running.served) == 1)
        assert eventually(lambda: reaches(running))  # … and when the target has hung up on them all
        assert answers(used)
        for sock in strangers:
            sock.close()


def test_silence_at_the_beginning_has_a_deadline(way: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_FIRST", 0.2)
    with Running(way, echo) as running, speaking(running) as used:
        assert is_cut_off(running.connect())
        assert eventually(lambda: len(threads_of_connections()) == 2)
        assert answers(used)  # later silence has none


@pytest.mark.parametrize("who", ["client", "target"])
def test_when_one_end_has_ended_the_silence_of_the_other_has_a_deadline(
    who: str, way: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "_STALL", 0.5)
    done = threading.Event()

    def serve(sock: socket.socket) -> None:
        with sock:
            sock.sendall(sock.recv(1))
            if who == "target":
                sock.shutdown(socket.SHUT_WR)
            done.wait(PATIENCE)

    with Running(way, serve) as running, running.connect() as sock:
        assert answers(sock)
        if who == "client":
            sock.shutdown(socket.SHUT_WR)
        ended = eventually(lambda: not threads_of_connections())
        done.set()
        assert ended


def test_an_end_that_does_not_read_has_a_deadline(way: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_STALL", 0.5)
    done = threading.Event()

    def deaf(sock: socket.socket) -> None:
        with sock:
            done.wait(PATIENCE)

    with Running(way, deaf) as running, running.connect() as sock:
        with pytest.raises(ConnectionError):
            sock.sendall(bytes(1 << 28))
        ended = eventually(lambda: not threads_of_connections())
        done.set()
        assert ended


def test_stopping_ends_every_connection_and_leaves_no_thread(way: tuple[str, str]) -> None:
    with Running(way, echo) as running:
        socks = [running.connect() for _ in range(5)]
        assert all(answers(sock) for sock in socks)
        running.relay.stop()
        assert not threads_of_connections()
        for sock in socks:
            assert not answers(sock)
            sock.close()
        with pytest.raises(Unreachable):
            connect(running.relay.address, 1.0)


# As a process


class Process:
    """`minigpt relay` as a process, between tcp ports."""

    def __init__(self, target: Address, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "minigpt", "relay", "tcp://127.0.0.1:0", str(target)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        ready = re.fullmatch(r"relay ready: (tcp://127\.0\.0\.1:\d+) to (\S+)\n", line)
        assert ready, log.read_text()
        assert ready[2] == str(target)
        self.address = Address.parse(ready[1])

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        code = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        self.process.stdout.close()
        return code

    def memory(self) -> int:
        """Bytes that it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly_and_its_log_holds_no_content(how: signal.Signals, code: int, tmp_path: Path) -> None:
    with Listener(anywhere("tcp")) as target:
        running = Process(target.address, tmp_path / "log")
        try:
            with connect(running.address, PATIENCE) as sock:
                accepted = target.accept()
                assert accepted is not None
                with accepted[0] as served:
                    sock.sendall(b"a secret word")
                    assert served.recv(100) == b"a secret word"
                    assert running.end(how) == code
                    assert served.recv(1) == b""
        finally:
            running.process.kill()
            running.process.wait()
        log = running.log.read_text()
        assert "open from tcp://127.0.0.1" in log
        assert "closed, 13 bytes there, 0 back" in log
        assert "Traceback" not in log
        assert "secret" not in log


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_a_reader_that_does_not_read_costs_no_memory_and_loses_nothing(tmp_path: Path) -> None:
    count, data = 8, random.Random(2).randbytes(1 << 20)
    with Listener(anywhere("tcp")) as target:
        running = Process(target.address, tmp_path / "log")
        try:
            ends, sent = [], [0] * count
            for _ in range(count):
                sock, accepted = connect(running.address, PATIENCE), target.accept()
                assert accepted is not None
                ends.append((sock, accepted[0]))
            before = running.memory()
            for number, (sock, _) in enumerate(ends):
                sock.settimeout(0.3)
                try:
                    while True:
                        sent[number] += sock.send(data)
                except TimeoutError:
                    pass
            assert min(sent) > 1 << 20  # what the system's own buffers hold
            assert running.memory() - before < count * (1 << 18)
            for number, (sock, served) in enumerate(ends):
                served.settimeout(PATIENCE)
                sock.shutdown(socket.SHUT_WR)
                assert same(read_all(served), data, sent[number])
                sock.close()
                served.close()
            assert running.end(signal.SIGTERM) == 0
        finally:
            running.process.kill()
            running.process.wait()


def test_three_hundred_silent_strangers_do_not_keep_a_client_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with socket.create_server(("127.0.0.1", 0)) as keeper, ExitStack() as stack:
        running = Process(Address("tcp", "127.0.0.1", keeper.getsockname()[1]), tmp_path / "log")
        stack.callback(running.end, signal.SIGKILL)
        stages = stack.enter_context(Stages(folder, "4", tmp_path, places=[str(running.address)]))
        handed = ("--listen", f"fd:{keeper.fileno()}", "--handshake-timeout", "1")
        stages.start(0, *handed, pass_fds=[keeper.fileno()])
        for wait in (False, True):  # at once, and long after the stage has hung up on them all
            strangers = [stack.enter_context(connect(running.address, PATIENCE)) for _ in range(300)]
            if wait:
                assert all(map(ends, strangers))
            with Pipeline.connect(stages.path, allow_mock=True, timeout=PATIENCE) as pipeline:
                assert len(list(pipeline.generate([1, 2], max_tokens=3))) == 3


def test_a_thread_that_the_system_refuses_costs_the_relay_one_connection(tmp_path: Path) -> None:
    with Listener(anywhere("tcp")) as target:
        running = Process(target.address, tmp_path / "log")
        try:

            def refused(count: int) -> bool:
                return running.log.read_text().count("the system gives no more threads") == count

            for threads in (0, 1):  # none for the connection; or one, and none for the way back
                with out_of_threads(running.process.pid, threads):
                    for number in range(13):
                        with contextlib.suppress(Unreachable):  # cut off before `connect` had seen that it was there
                            assert is_cut_off(connect(running.address, PATIENCE))
                        assert eventually(partial(refused, 13 * threads + number + 1))
            with connect(running.address, PATIENCE) as sock:
                sock.sendall(b"x")
                while (accepted := target.accept()) is not None:
                    with accepted[0] as served:  # those before it were cut off
                        served.settimeout(PATIENCE)
                        if not ends(served):
                            break
            assert running.end(signal.SIGTERM) == 0
        finally:
            running.process.kill()
            running.process.wait()


def same(found: bytes, data: bytes, count: int) -> bool:
    """Whether what was found is `count` bytes, written in parts that each began where `data` begins."""
    return len(found) == count and found[: len(data)] == data[:count]


def test_what_cannot_be_is_refused() -> None:
    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "minigpt", "relay", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == ""
        return done.returncode, done.stderr

    code, words = run("tcp://127.0.0.1:0", "elsewhere")
    assert (code, "'elsewhere'" in words) == (2, True)
    code, words = run("tcp://192.0.2.1:1", "tcp://127.0.0.1:1")  # an address for documentation: nobody's
    assert (code, "cannot listen on tcp://192.0.2.1:1" in words) == (4, True)
    code, words = run("tcp://127.0.0.1:0", "tcp://127.0.0.1:1", "--connections", "0")
    assert (code, "at least 1" in words) == (2, True)


# With a pipeline


class Recording(Wire):
    """A wire that keeps a copy of all that is read from it: what the relay's host can see."""

    seen = bytearray()

    def read(self, count: int) -> bytes | None:
        data = super().read(count)
        self.seen += data or b""
        return data


@pytest.fixture(params=[WAYS[:1] * 2, WAYS[1:]][: len(VSOCK) + 1], ids=["tcp", "vsock"][: len(VSOCK) + 1])
def relayed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Stages, bytearray]]:
    """A pipeline of two stages, each of which is reached through a relay of its own; and all that these read."""
    monkeypatch.setattr(relay, "Wire", Recording)
    monkeypatch.setattr(Recording, "seen", seen := bytearray())
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with ExitStack() as stack:
        relays = [Relay(anywhere(way[0]), anywhere(way[1])) for way in request.param]
        places = [str(made.address) for made in relays]
        stages = stack.enter_context(Stages(folder, "2+2", tmp_path, places=places))
        for index, made in enumerate(relays):
            if made._target.scheme == "tcp":  # which had to be chosen before there were stages
                stages.start(index)
                made._target = Address("tcp", "127.0.0.1", stages.ports[index])
            else:
                with Listener(anywhere("vsock")) as free:
                    made._target = free.address
                stages.start(index, "--listen", str(made._target))
            stack.callback(made.stop)
            threading.Thread(target=made.serve, daemon=True).start()
        yield stages, seen


IDS = tuple(np.random.default_rng(5).integers(0, SMALL.vocab_size - 1, 40).tolist())


def test_a_pipeline_does_not_notice_and_the_relay_sees_ciphertext_only(
    relayed: tuple[Stages, bytearray], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, seen = relayed
    plain = bytearray()
    encode = codec.encode

    def keep(message: dict[str, object]) -> bytes:
        data = encode(message)
        plain.extend(data)
        return data

    monkeypatch.setattr(codec, "encode", keep)
    model = minigpt.load(str(stages.folder))
    with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
        found = [token.id for token in pipeline.generate(IDS, max_tokens=12)]
        assert [not report.error for report in pipeline.status()] == [True, True]
    assert found == [token.id for token in model.generate(IDS, max_tokens=12)]

    assert seen.count(b"mGPT") == 3  # links of the client, of batches and of `status`: what is in clear is seen
    ids = messages.encode(messages.Generate(0, IDS, 12))["ids"]
    assert isinstance(ids, bytes)
    for secret in (ids, ids[:16], b"generate", b"sampling"):
        assert secret in plain  # it was said …
        assert secret not in seen  # … and did not show
    for token in itertools.pairwise(found):
        assert np.array(token, "<u4").tobytes() not in seen
    for word in (b"hidden", b"token", b"position", b"spans"):
        assert word not in seen
