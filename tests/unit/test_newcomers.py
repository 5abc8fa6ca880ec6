"""Whose handshake begins next, and when."""

import math
import socket
from typing import Any

import pytest

from minigpt.stage import newcomers
from minigpt.stage.newcomers import LOOK, MEMORY, SHARE, SOURCES, WAITING, WORST, Newcomers, source_of
from transport.link import Opening


class Clock:
    """Stands for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


SAID = Opening(b"", b"")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(newcomers, "time", made)
    monkeypatch.setattr(newcomers, "has_left", lambda _sock: False)  # there are no sockets
    return made


def come(door: Newcomers, *peers: str) -> None:
    for peer in peers:
        sock: Any = None
        assert door.add((sock, peer, SAID)) is None


def begin(door: Newcomers, *busy: str, crowded: tuple[str, ...] = ()) -> str | None:
    """The peer whose handshake begins now, if one may."""
    delay, newcomer = door.following(busy, crowded)
    if newcomer is None or delay > 0:
        return None
    door.take(newcomer)
    return newcomer[1]


def test_a_source_is_an_address_without_its_port() -> None:
    assert source_of("tcp://192.0.2.1:4711") == "tcp://192.0.2.1"
    assert source_of("tcp://[2001:db8::1]:4711") == "tcp://[2001:db8::1]"
    assert source_of("vsock://3:4711") == "vsock://3"


def test_newcomers_begin_at_once_and_in_order_while_nobody_has_cost_anything(clock: Clock) -> None:
    door = Newcomers()
    assert door.following((), ()) == (math.inf, None)
    peers = [f"tcp://a:{port}" for port in range(50)]
    come(door, *peers)
    assert [begin(door, "tcp://a") for _ in peers] == peers


def test_what_handshakes_cost_paces_all_newcomers_of_a_source(clock: Clock) -> None:
    door = Newcomers()
    come(door, *(f"tcp://a:{port}" for port in range(5)))
    for _ in range(2):
        assert begin(door, "tcp://a")
        door.spend("tcp://a", SHARE)
    assert begin(door, "tcp://a") is None  # 2 s of its share, of which 1 s is a burst
    clock.now += 0.99
    assert begin(door, "tcp://a") is None
    clock.now += 0.02
    assert begin(door, "tcp://a")


def test_another_source_does_not_wait_for_it(clock: Clock) -> None:
    door = Newcomers()
    come(door, *(f"tcp://a:{port}" for port in range(100)))
    door.spend("tcp://a", 5.0)
    come(door, "tcp://b:1")
    assert begin(door, "tcp://a") == "tcp://b:1"
    come(door, "tcp://b:2")
    assert begin(door, "tcp://a", "tcp://b") is None  # one at a time, as long as all wait
    assert begin(door, "tcp://a") == "tcp://b:2"


def test_those_that_go_ahead_are_paced_too_and_the_cheapest_is_first(clock: Clock) -> None:
    door = Newcomers()
    door.spend("tcp://a", 100.0)
    come(door, *(f"tcp://a:{port}" for port in range(100)))
    began = clock.now
    for _ in range(8):
        while begin(door) is None:
            clock.now += 0.01
        door.spend("tcp://a", WORST)
    assert 7 * WORST / SHARE - 1.01 <= clock.now - began <= 7 * WORST / SHARE  # a burst of a second
    come(door, "tcp://b:1")
    clock.now += WORST / SHARE
    assert begin(door) == "tcp://b:1"


def test_whose_source_has_cost_less_begins_first_and_costs_are_forgotten(clock: Clock) -> None:
    door = Newcomers()
    door.spend("tcp://a", 0.02)
    door.spend("tcp://b", 0.01)
    come(door, "tcp://a:1", "tcp://b:1", "tcp://c:1", "tcp://c:2")
    assert [begin(door) for _ in range(4)] == ["tcp://c:1", "tcp://c:2", "tcp://b:1", "tcp://a:1"]
    clock.now += 5 * MEMORY
    assert door.spent("tcp://a") < 0.02 / 100
    door.spend("tcp://b", 0.01)
    come(door, "tcp://b:2", "tcp://a:2")
    assert [begin(door) for _ in range(2)] == ["tcp://a:2", "tcp://b:2"]


def test_newcomers_wait_rather_than_end_a_handshake_of_their_own_source(clock: Clock) -> None:
    door = Newcomers()
    come(door, "tcp://a:0", "tcp://b:1")
    assert begin(door, "tcp://a", crowded=("tcp://a",)) == "tcp://b:1"
    assert door.following(("tcp://a",), ("tcp://a",)) == (LOOK, None)
    come(door, *(f"tcp://a:{port}" for port in range(1, WAITING // 2 + 1)))
    assert begin(door, "tcp://a", crowded=("tcp://a",)) == "tcp://a:0"  # too many wait


def test_without_room_the_latest_of_the_source_with_the_most_is_turned_away(clock: Clock) -> None:
    door = Newcomers()
    come(door, "tcp://b:1", *(f"tcp://a:{port}" for port in range(WAITING - 2)), "tcp://b:2")
    for newest, unwanted in (("tcp://c:1", f"tcp://a:{WAITING - 3}"), ("tcp://a:999", "tcp://a:999")):
        sock: Any = None
        turned_away = door.add((sock, newest, SAID))
        assert turned_away is not None
        assert turned_away[1] == unwanted


def test_accounts_are_bounded_and_the_costliest_are_kept(clock: Clock) -> None:
    door = Newcomers()
    door.spend("tcp://a", 1.0)
    for number in range(2 * SOURCES):
        door.spend(f"tcp://{number}", 0.001)
    assert len(door._accounts._spent) == SOURCES
    assert door.spent("tcp://a") == 1.0


def test_who_waits_at_the_end_is_hung_up_on() -> None:
    one, other = socket.socketpair()
    door = Newcomers()
    door.add((one, "tcp://a:1", SAID))
    door.close()
    with other:
        assert other.recv(1) == b""


def test_newcomers_of_one_source_begin_in_order_though_what_it_has_cost_falls_meanwhile(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Newcomers()
    door.spend("tcp://a", 0.001)
    clock.now += 60.0
    monkeypatch.setattr(clock, "monotonic", lambda: setattr(clock, "now", clock.now + 1e-6) or clock.now)
    peers = [f"tcp://a:{port}" for port in range(20)]
    come(door, *peers)
    assert [begin(door) for _ in peers] == peers


def test_those_that_have_left_make_nobody_wait_and_are_hung_up_on() -> None:
    door = Newcomers()
    left = [socket.socketpair() for _ in range(WAITING)]
    for number, (own, theirs) in enumerate(left):
        assert door.add((own, f"tcp://a:{number}", SAID)) is None
        theirs.sendall(b"hello")
        theirs.close()
    for _ in range(50):
        door.spend("tcp://a", WORST)  # its next handshake would have to wait
    here, there = socket.socketpair()
    with here, there:
        assert door.following((), ()) == (math.inf, None)
        assert door.add((here, "tcp://a:999", SAID)) is None
        assert door.following((), ())[1] == (here, "tcp://a:999", SAID)
    assert [own.fileno() for own, _ in left] == [-1] * WAITING
