"""Connections before their opening is complete: one poller for all, next to nothing for any."""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from attacks.load import Crowd, processor
from ends import Side, background
from made import SMALL, random_tensors, write
from places import SCHEMES, anywhere
from processes import Stages, eventually

from minigpt.client.pipeline import Pipeline
from minigpt.protocol.links import calling_end
from minigpt.protocol.manifest import Manifest
from minigpt.stage.newcomers import Pace
from minigpt.stage.server import LINE, Server
from transport import sockets
from transport.errors import HandshakeError, TimedOut, TransportError
from transport.link import initiate
from transport.sockets import Door, Listener, connect

PATIENCE = 60.0


class Doors:
    """A door whose openings are `mGPT`, a length of one byte, and so many bytes."""

    def __init__(self, scheme: str = "tcp", most: int = 1024) -> None:
        self.listener = Listener(anywhere(scheme))
        self.refused: list[str] = []
        self.steps = 0
        self.door: Door[bytes] = Door(self.listener, self.opening, self.refuse, most)

    def refuse(self, _peer: str, error: TransportError) -> None:
        self.refused.append(str(error))

    def opening(self) -> Generator[int, bytes | None, bytes]:
        magic = yield 4
        self.steps += 1
        if magic != b"mGPT":
            raise HandshakeError("another magic")
        length = yield 1
        assert length
        self.steps += 1
        said = yield length[0]
        assert said is not None
        return said

    def connect(self, said: bytes = b"") -> socket.socket:
        sock = connect(self.listener.address, PATIENCE)
        sock.sendall(said)
        return sock

    def accept(self) -> bytes:
        accepted = self.door.accept(time.monotonic() + PATIENCE)
        assert accepted is not None
        accepted[0].close()
        return accepted[2]

    def stir(self, until: Callable[[], bool]) -> None:
        """Lets the door look at who is there, though nobody opens a link."""

        def stirred() -> bool:
            with contextlib.suppress(TimedOut):
                self.door.accept(time.monotonic() + 0.01)
            return until()

        assert eventually(stirred)


@pytest.fixture(params=SCHEMES)
def doors(request: pytest.FixtureRequest) -> Iterator[Doors]:
    made = Doors(request.param)
    yield made
    made.door.close()
    made.listener.close()


def hung_up(sock: socket.socket) -> bool:
    with sock, contextlib.suppress(ConnectionError):
        sock.settimeout(PATIENCE)
        return sock.recv(1) == b""
    return True


def test_an_opening_comes_out_whole_and_not_a_byte_more_is_read(doors: Doors) -> None:
    for said in (b"mGPT\5hello", b"mGPT\5hello, and more"):
        with doors.connect(said):
            accepted = doors.door.accept(time.monotonic() + PATIENCE)
            assert accepted is not None
            sock, peer, opening = accepted
            with sock:
                assert opening == b"hello"
                assert peer.startswith(f"{doors.listener.address.scheme}://")
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
                rest = said[10:]
                assert not rest or sock.recv(100) == rest


def test_silent_ones_and_those_that_drip_keep_nobody_waiting(doors: Doors) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(doors.connect(said)) for said in (b"", b"m", b"mGPT", b"mGPT\5", b"mGPT\5hell")]
        with doors.connect(b"mGPT\2me"):
            assert doors.accept() == b"me"
        slow[4].sendall(b"o")
        assert doors.accept() == b"hello"
        for byte in b"GPT\3abc":
            slow[1].sendall(bytes([byte]))
        assert doors.accept() == b"abc"


def test_whoever_says_something_else_is_hung_up_on_at_once_and_told_of(doors: Doors) -> None:
    with doors.connect(b"mGP") as slow:
        other = doors.connect(b"GET / HTTP/1.0\r\n\r\n")
        doors.stir(lambda: bool(doors.refused))
        assert hung_up(other)
        assert doors.refused == ["another magic"]
        slow.sendall(b"T\1x")
        assert doors.accept() == b"x"


def test_those_that_leave_are_forgotten_without_a_word(doors: Doors) -> None:
    for said in (b"", b"mGP"):
        doors.connect(said).close()
        doors.stir(lambda: not doors.door._waiting)
    assert doors.refused == []
    assert doors.door._sources == {}


def test_silence_at_the_door_has_a_deadline(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_AT_THE_DOOR", 0.05)
    silent = [doors.connect(said) for said in (b"", b"mG")]
    doors.stir(lambda: bool(doors.door._waiting))
    doors.stir(lambda: not doors.door._waiting)
    assert all(map(hung_up, silent))
    with pytest.raises(TimedOut, match="nobody opened a link to"):
        doors.door.accept(time.monotonic())


def test_a_full_door_ends_the_oldest_of_the_address_with_the_most() -> None:
    doors = Doors(most=4)

    def come(host: str) -> socket.socket:
        before = len(doors.door._waiting)
        sock = socket.create_connection((doors.listener.address.host, doors.listener.address.port or 0), PATIENCE,
                                        source_address=(host, 0))  # fmt: skip
        doors.stir(lambda: len(doors.door._waiting) == min(before + 1, 4))
        return sock

    with doors.listener, contextlib.ExitStack() as stack:
        honest = stack.enter_context(come("127.0.0.1"))
        crowd = [come("127.0.0.2") for _ in range(3)]
        crowd += [come("127.0.0.2") for _ in range(3)]
        doors.stir(lambda: True)
        assert all(map(hung_up, crowd[:3]))
        honest.sendall(b"mGPT\1x")
        assert doors.accept() == b"x"
        doors.door.close()
        assert all(map(hung_up, crowd[3:]))


def test_bytes_one_by_one_wake_nobody_until_they_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    doors, looks = Doors(), [0]
    real = Door._complete

    def counted(self: Door[bytes], visitor: sockets._Visitor[bytes]) -> bool:
        looks[0] += 1
        return real(self, visitor)

    monkeypatch.setattr(Door, "_complete", counted)
    with doors.listener, doors.connect() as sock:
        task = background(doors.accept)
        assert eventually(lambda: looks[0] == 1)
        for byte in b"mGPT\xff" + bytes(254):
            sock.sendall(bytes([byte]))
        sock.sendall(b"\0")
        assert task.join() == bytes(255)
        doors.door.close()
    assert looks[0] <= 6  # at the beginning, at the first byte, and for each of the three lengths


def test_closing_the_listener_ends_the_wait_at_once(doors: Doors) -> None:
    silent = doors.connect()
    task = background(doors.door.accept)
    assert eventually(lambda: bool(doors.door._waiting))
    doors.listener.close()
    assert task.join() is None
    doors.door.close()
    assert hung_up(silent)


def test_an_error_of_the_opening_is_the_only_thing_that_ends_one(doors: Doors) -> None:
    def broken() -> Generator[int, bytes | None, bytes]:
        yield 1
        raise TransportError("no")

    doors.door._opening = broken
    other = doors.connect(b"x")
    doors.stir(lambda: doors.refused == ["no"])
    assert hung_up(other)


def test_strangers_without_the_manifest_have_no_thread_and_no_slot_and_hear_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0, "--max-handshakes", "1", "--max-channels", "2")
        other = Manifest.parse(stages.bytes.replace(b'"id": "small"', b'"id": "smalL"'))
        greeting = Side(initiate(calling_end(other, 0, None))).run()
        pid, port = stages.processes[0].pid, stages.ports[0]
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        with Crowd(port, 100, b"") as silent, Crowd(port, 100, greeting[:-20]) as slow:
            assert eventually(lambda: silent.made + slow.made == 200)
            assert len(list(Path(f"/proc/{pid}/task").iterdir())) == threads
            with Pipeline.connect(stages.path, allow_mock=True) as pipeline:  # the one handshake that there may be
                assert pipeline.status()[0].channels == 1
            assert eventually(lambda: silent.closed + slow.closed == 200)  # after 3 s
        with Crowd(port, 1, greeting) as wrong:
            assert eventually(lambda: wrong.closed == 1)
            assert wrong.received == 0
        log = stages.log(0)
        assert "newcomer (tcp://127.0.0.1:" in log
        assert "the mac is wrong: the peer has another manifest, or wants another stage" in log


def test_a_flood_of_strangers_costs_little_of_the_processor_and_keeps_nobody_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0)
        other = Manifest.parse(stages.bytes.replace(b'"id": "small"', b'"id": "smalL"'))
        greeting = Side(initiate(calling_end(other, 0, None))).run()
        before = processor(stages.processes[0].pid)
        with Crowd(stages.ports[0], 20, greeting, renew=True) as crowd:
            assert eventually(lambda: crowd.closed > 2000)
            spent, number = processor(stages.processes[0].pid) - before, crowd.closed
            with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
                assert len(list(pipeline.generate([1, 2], max_tokens=3))) == 3
        assert spent / number < 0.0005, f"{1e6 * spent / number:.0f} µs each"  # what it is: scripts/bench/link.py
        assert crowd.received == 0


def test_the_log_tells_of_some_strangers_and_counts_the_others(caplog: pytest.LogCaptureFixture) -> None:
    server: Any = Server(None)  # type: ignore[arg-type]
    began = time.monotonic()
    for number in range(5000):
        server._refused(f"tcp://192.0.2.1:{number}", HandshakeError("the mac is wrong"))
    most = 101 + (time.monotonic() - began) / LINE
    assert 100 <= len(caplog.messages) <= most
    assert caplog.messages[0] == "newcomer (tcp://192.0.2.1:0): HandshakeError: the mac is wrong"
    missed = 5000 - len(caplog.messages)
    server._lines = Pace(1.0)
    server._refused("tcp://192.0.2.1:1", HandshakeError("the mac is wrong"))
    told = [int(found[1]) for found in map(re.compile(r"\(and (\d+) others since").search, caplog.messages) if found]
    assert sum(told) == missed
