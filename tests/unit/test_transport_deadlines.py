"""Deadlines: neither silence, nor a drip, nor a peer that does not read, holds a channel for long."""

import contextlib
import math
import socket
import threading
import time

import pytest
from ends import STAGE_END, background, make

from transport import codec
from transport.channel import Channel, Deadlines
from transport.errors import Closed, Silent, TimedOut
from transport.sockets import Wire


def drip(sock, data, pause, stop):
    sock.settimeout(60)
    with contextlib.suppress(OSError):
        for byte in data:
            sock.sendall(bytes([byte]))
            if stop.wait(pause):
                return


@pytest.mark.parametrize("pause", [0.1, 0.001])
def test_a_drip_does_not_prolong_the_deadline_of_a_message(pause):
    one, two = socket.socketpair()
    a, b = make((one, two), stage={"deadlines": Deadlines(message=0.3)})
    stop = threading.Event()
    task = background(drip, one, a._session.seal(bytes(60_000)), pause, stop)
    start = time.monotonic()
    with pytest.raises(Silent, match=r"did not finish a message in 0.3 s: its process has stopped, or"):
        b.receive()
    assert 0.2 < time.monotonic() - start < 10
    assert b.fileno() == -1
    with pytest.raises(Silent, match="did not finish a message"):  # another thread, which sends, is told too
        b.send({"n": 1})
    stop.set()
    task.join()
    a.abort()


def test_bytes_that_come_one_at_a_time_are_let_gather(monkeypatch):
    reads, read = [], Wire.read
    monkeypatch.setattr(Wire, "read", lambda wire, count: reads.append(count) or read(wire, count))
    one, two = socket.socketpair()
    a, b = make((one, two))
    reads.clear()
    start = time.monotonic()
    task = background(drip, one, a._session.seal(codec.encode({"rows": bytes(60_000)})), 0, threading.Event())
    assert b.receive(60.0) == {"rows": bytes(60_000)}
    assert len(reads) < 20 + 1000 * (time.monotonic() - start)  # a millisecond each, after the first
    reads.clear()
    start = time.monotonic()
    other = background(drip, one, bytes(60_000), 0, threading.Event())
    assert b._wire.read_exactly(60_000, start + 60.0) == bytes(60_000)
    assert len(reads) < 20 + 1000 * (time.monotonic() - start)
    for each in (task, other):
        each.join()
    a.abort()
    b.abort()


@pytest.mark.parametrize("data", [b"", b"mGPT\x02\x02\0\0\4\xc0" + bytes(20), b"mG"])
def test_a_drip_or_silence_does_not_prolong_the_deadline_of_the_handshake(data):
    one, two = socket.socketpair()
    stop = threading.Event()
    task = background(drip, one, data, 0.05, stop)
    start = time.monotonic()
    with pytest.raises(TimedOut, match=r"the handshake in 0.3 s"):
        Channel.accept(two, STAGE_END, deadlines=Deadlines(handshake=0.3))
    assert 0.2 < time.monotonic() - start < 10
    assert two.fileno() == -1
    stop.set()
    task.join()
    one.close()


def test_a_peer_that_does_not_read_does_not_hold_a_sender_for_ever():
    a, b = make(client={"deadlines": Deadlines(message=0.3)})
    with pytest.raises(Silent, match=r"did not take what was sent to it in 0.3 s: its process has stopped, or"):
        a.send({"rows": bytes(8 << 20)})
    with pytest.raises(Closed):
        a.send({})  # half a record may have left: nothing can follow it
    a.abort()
    b.abort()


def test_idleness_has_a_deadline_and_pings_are_no_activity():
    a, b = make(stage={"deadlines": Deadlines(idle=0.3)})
    assert a.ping()
    start = time.monotonic()
    with pytest.raises(TimedOut, match="idle"):
        b.receive()
    assert time.monotonic() - start < 10
    a.abort()


@pytest.mark.parametrize("bad", [{"connect": 0}, {"handshake": -1}, {"message": math.nan}, {"idle": 0}])
def test_deadlines_are_checked(bad):
    with pytest.raises(ValueError, match="seconds"):
        Deadlines(**bad)
