"""Signs of life: a peer that owes an answer and says nothing is dead, and one that computes is not."""

import contextlib
import os
import socket
import sys
import threading
import time

import pytest
from ends import background, make, tcp_pair
from processes import eventually

from transport import channel, codec, liveness, session
from transport.errors import Closed, Silent, TimedOut
from transport.liveness import Pinger


@pytest.fixture
def ends():
    a, b = make(tcp_pair())
    yield a, b
    a.abort()
    b.abort()


@pytest.fixture
def pinger(monkeypatch):
    """One that is in a hurry, and peers that put up with it."""
    monkeypatch.setattr(liveness, "PING_INTERVAL", 0.1)
    monkeypatch.setattr(liveness, "_LOOK", 0.02)
    monkeypatch.setattr(session, "_CLOSEST", 0.001)
    return Pinger()


def test_a_peer_that_says_nothing_is_dead(ends):
    _, b = ends
    start = time.monotonic()
    with pytest.raises(Silent, match=r"said nothing for 0\.3 s: its process has stopped"):
        b.receive(60.0, silence=0.3)
    assert 0.2 < time.monotonic() - start < 30
    assert b.fileno() == -1
    with pytest.raises(Closed):
        b.receive(60.0)


def test_whoever_has_less_patience_of_its_own_leaves_the_channel_alive(ends):
    a, b = ends
    for timeout in (0, 0.05):
        with pytest.raises(TimedOut, match="no message") as caught:
            b.receive(timeout, silence=60.0)
        assert not isinstance(caught.value, Silent)
    a.send({"n": 1})
    assert b.receive(60.0, silence=60.0) == {"n": 1}


def test_a_ping_ends_a_silence(ends, monkeypatch):
    monkeypatch.setattr(session, "_CLOSEST", 0.001)
    a, b = ends
    waiting = background(b.receive, 60.0, silence=2.0)
    until = time.monotonic() + 4.0  # twice as long
    while time.monotonic() < until:
        assert a.ping()
        time.sleep(0.1)
    a.send({"n": 1})
    assert waiting.join() == {"n": 1}


def test_the_parts_of_a_long_message_end_a_silence():
    one, two = socket.socketpair()
    a, b = make((one, two))
    one.settimeout(60)  # from here on it is the test that writes
    data = a._session.seal(codec.encode({"rows": bytes(60_000)}))
    waiting = background(b.receive, 60.0, silence=2.0)
    for at in range(0, len(data), 3000):
        one.sendall(data[at : at + 3000])
        time.sleep(0.2)
    assert waiting.join() == {"rows": bytes(60_000)}
    a.abort()
    b.abort()


def test_who_was_stopped_itself_gives_its_peer_the_time_again(ends, monkeypatch):
    _, b = ends
    wait, waits = b._wire.wait, []

    def stopped(deadline, asker=None):
        waits.append(deadline)
        if len(waits) > 1:
            return wait(deadline, asker)
        time.sleep(channel._OVERSLEPT + 0.5)
        return False

    monkeypatch.setattr(b._wire, "wait", stopped)
    waiting = background(b.receive, 60.0, silence=0.2)
    with pytest.raises(Silent):
        waiting.join()
    assert len(waits) == 2
    assert waits[1] - waits[0] > channel._OVERSLEPT


def test_a_ping_never_waits(ends):
    a, b = ends
    with a._sending:  # another thread sends
        assert not a.ping()
    assert a.ping()
    filler = background(a.send, {"rows": bytes(15 << 20)})
    assert eventually(lambda: not a._wire.writable())
    assert not a.ping()  # and it waits for the peer to read
    assert len(b.receive(60.0)["rows"]) == 15 << 20
    filler.join()
    with contextlib.suppress(BlockingIOError):
        while True:  # as if the peer had read nothing of what was sent
            a._wire._sock.send(bytes(1 << 16))
    assert not a.ping()


def test_a_ping_on_a_link_that_has_ended_says_so(ends):
    a, b = ends
    b.close()
    assert eventually(a.gone)
    assert not a.ping()
    with pytest.raises(Closed, match="peer"):
        a.receive(60.0)
    a.close()
    assert not a.ping()


def test_pings_and_messages_of_many_threads_keep_their_order(ends, monkeypatch):
    monkeypatch.setattr(session, "_CLOSEST", 1e-9)
    a, b = ends
    stop = threading.Event()
    pinging = [background(lambda: [a.ping() for _ in iter(stop.is_set, True)]) for _ in range(3)]
    reading = background(lambda: [b.receive(60.0)["n"] for _ in range(300)])
    for n in range(300):
        a.send({"n": n, "rows": bytes(70 * n)})
    assert reading.join() == list(range(300))
    stop.set()
    for each in pinging:
        each.join()


def test_an_end_that_owes_an_answer_pings_and_no_other(ends, pinger):
    a, b = ends
    other, idle = make()
    with pinger.due(a):
        waiting = background(b.receive, 60.0, silence=20.0)
        assert eventually(lambda: b.records_received >= 4)
    a.send({"n": 1})
    assert waiting.join() == {"n": 1}
    time.sleep(0.3)
    with pytest.raises(TimedOut):
        b.receive(0.1)
    received = b.records_received
    with pytest.raises(TimedOut):
        b.receive(0.5)
    assert b.records_received == received
    assert other.records_sent == 1  # its ATTEST
    for end in (other, idle):
        end.abort()


def test_short_answers_that_follow_each_other_count_as_one_long_one(ends, pinger):
    a, b = ends
    waiting = background(b.receive, 60.0)
    until = time.monotonic() + 60.0
    while b.records_received < 4 and time.monotonic() < until:  # no part of a prompt has an answer of its own
        with pinger.due(a):
            time.sleep(0.03)
    a.send({"n": 1})
    assert waiting.join() == {"n": 1}
    assert b.records_received >= 5


def test_an_answer_that_is_being_told_needs_no_ping(ends, pinger, monkeypatch):
    a, _ = ends
    pings = []
    monkeypatch.setattr(a, "ping", lambda: pings.append(1))
    with pinger.due(a):
        assert eventually(lambda: bool(pings))
        a.spoke = time.monotonic() + 60.0  # as if it had always just spoken
        time.sleep(0.5)
        pings.clear()
        time.sleep(0.5)
    assert not pings


def test_a_process_without_threads_answers_without_pings(ends, pinger, monkeypatch):
    a, _ = ends
    asked = []

    def none(_thread):
        asked.append(1)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    for _ in range(5):
        with pinger.due(a):
            pass
    assert len(asked) == 1
    monkeypatch.undo()
    pinger._retry = 0.0
    with pinger.due(a):
        assert pinger._running


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="wants fork")
def test_a_forked_child_pings_for_nobody_until_it_owes_something_itself(ends, pinger):
    a, b = ends
    with pinger.due(a):
        child = os.fork()
        if child == 0:
            good = not pinger._running and not pinger._dues and not a.ping()
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
        waiting = background(b.receive, 60.0, silence=20.0)
        assert eventually(lambda: b.records_received >= 3)  # the parent's go on
    a.send({"n": 1})
    assert waiting.join() == {"n": 1}
