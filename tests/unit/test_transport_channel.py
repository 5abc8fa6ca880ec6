"""Channels over real sockets: deadlines, ends, threads, and the errors of the system."""

import contextlib
import re
import socket
import time

import pytest
from ends import CLIENT_END, MAC_KEY, STAGE_END, Refuses, background, make, tcp_pair
from hypothesis import given
from hypothesis import strategies as st
from places import SCHEMES
from places import pair as connected
from processes import eventually

from attest import EvidenceError, Unattested
from transport import channel, codec, sockets
from transport.channel import Budget, Channel
from transport.errors import (
    Alert,
    Closed,
    DecodeError,
    LimitError,
    PeerAlert,
    RecordError,
    Silent,
    TimedOut,
    TransportError,
    Truncated,
)
from transport.link import CLIENT, End
from transport.records import Type


@pytest.fixture(params=["unix", *SCHEMES])
def pair(request):
    a, b = make(socket.socketpair() if request.param == "unix" else connected(request.param))
    yield a, b
    a.abort()
    b.abort()


@pytest.mark.parametrize("alerted", [False, True])
def test_why_a_channel_ended_is_told_to_whoever_sends_and_holds_no_message(pair, alerted):
    a, b = pair
    if alerted:
        b._part(lambda: b._session.alert(Alert.LIMIT))
    else:
        b.abort()
    with pytest.raises(PeerAlert if alerted else Truncated) as ended:
        a.receive(60.0)
    for _ in range(2):
        with pytest.raises(type(ended.value)) as told:
            a.send({})
        assert (str(told.value), vars(told.value)) == (str(ended.value), vars(ended.value))
    assert a._why is not ended.value  # whose frames have the message that was refused
    assert a._why is not told.value
    assert a._why.__traceback__ is a._why.__context__ is None


def test_messages_pass_both_ways_and_are_counted(pair):
    a, b = pair
    for size in (0, 3072, 70_000, 1 << 20):
        message = {"rows": bytes(size), "n": size, "t": [1, None, True, -1.5, "é"]}
        reader = background(b.receive, 5.0)
        a.send(message)
        assert reader.join() == message
    b.send({"ok": True})
    assert a.receive(5.0) == {"ok": True}
    assert a.bytes_sent == b.bytes_received > 1 << 20
    assert b.bytes_sent == a.bytes_received > 0
    assert a.records_sent == b.records_received > 18
    assert a.seal_seconds > 0
    assert b.open_seconds > 0
    assert a.peer.provider == 0
    assert a.peer_static_key == a.peer_binding.static_key
    assert a.peer_evidence.claims == b"\x80"
    assert a.fileno() >= 0
    assert a.made <= time.monotonic()
    assert not a.expired


def test_close_is_closed_at_the_other_end_and_truth_before_it(pair):
    a, b = pair
    a.send({"n": 1})
    a.close()
    a.close()
    assert b.receive(5.0) == {"n": 1}
    for _ in range(2):
        with pytest.raises(Closed, match="peer"):
            b.receive(5.0)
    for call in (lambda: a.send({}), a.receive):
        with pytest.raises(Closed, match="this end"):
            call()
    assert a.fileno() == -1
    assert a.poll()
    assert a.gone()


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_the_end_of_a_connection_without_close_is_truncation(cut):
    one, two = socket.socketpair()
    a, b = make((one, two))
    one.settimeout(60)  # from here on it is the test that writes
    one.sendall(a._session.seal(b"\x80")[:cut])
    one.close()
    with pytest.raises(Truncated):
        b.receive(5.0)
    with pytest.raises(Closed):
        b.receive(5.0)
    assert b.fileno() == -1


def test_abort_is_truncation_and_reaches_a_peer_that_waits(pair):
    a, b = pair
    reader = background(b.receive)
    a.abort()
    with pytest.raises(Truncated):
        reader.join()


@pytest.mark.parametrize("end", ["close", "abort"])
def test_close_and_abort_from_another_thread_wake_a_reader(pair, end):
    a, _ = pair
    reader = background(a.receive)
    time.sleep(0.05)
    getattr(a, end)()
    with pytest.raises(Closed, match="this end"):
        reader.join()


@pytest.mark.parametrize("end", ["close", "abort"])
def test_close_and_abort_from_another_thread_wake_a_sender_whom_the_peer_keeps_waiting(end, monkeypatch):
    monkeypatch.setattr(channel, "_PARTING", 0.1)
    a, b = make()
    sender = background(a.send, {"rows": bytes(8 << 20)})
    time.sleep(0.1)
    start = time.monotonic()
    getattr(a, end)()
    assert time.monotonic() - start < 10
    with pytest.raises(Closed, match="this end"):
        sender.join()
    with pytest.raises(Truncated):
        b.receive(5.0)


def test_one_thread_sends_while_another_waits(pair):
    a, b = pair
    reader = background(a.receive, 5.0)
    senders = [background(a.send, {"from": n, "rows": bytes(20_000)}) for n in range(4)]
    got = sorted(b.receive(5.0)["from"] for _ in range(4))
    for sender in senders:
        sender.join()
    assert got == [0, 1, 2, 3]
    b.send({"n": 9})
    assert reader.join() == {"n": 9}


def test_a_timeout_of_the_callers_own_leaves_the_channel_alive(pair):
    a, b = pair
    for timeout in (0, 0.05):
        with pytest.raises(TimedOut, match="no message was complete in") as caught:
            b.receive(timeout)
        assert not isinstance(caught.value, Silent)
        waited = re.search(r"in ([0-9.e-]+) s", str(caught.value))
        assert waited is not None
        assert float(waited[1]) >= 0.95 * timeout  # what was waited, in three digits
    a.send({"n": 1})
    assert b.receive(5.0) == {"n": 1}


def test_a_message_in_pieces_survives_timeouts_between_them():
    one, two = socket.socketpair()
    a, b = make((one, two))
    one.settimeout(60)  # from here on it is the test that writes
    data = a._session.seal(codec.encode({"rows": bytes(100_000)}))
    for at in range(0, len(data), 30_000):
        with pytest.raises(TimedOut, match="no message"):
            b.receive(0)
        one.sendall(data[at : at + 30_000])
    assert b.receive(5.0) == {"rows": bytes(100_000)}
    a.abort()
    b.abort()


def test_one_byte_writes_make_no_difference():
    one, two = socket.socketpair()
    a, b = make((one, two))
    one.settimeout(60)  # from here on it is the test that writes
    data = a._session.seal(b"\x80") + a._session.seal(b"\x81\xa1n\x01") + a._session.close()
    got = []

    def read():
        while True:
            got.append(b.receive(5.0))

    reader = background(read)
    for byte in data:
        one.sendall(bytes([byte]))
    with pytest.raises(Closed, match="peer"):
        reader.join()
    assert got == [{}, {"n": 1}]
    a.abort()
    b.abort()


def test_poll_and_gone_tell_what_waits_and_who_left(pair):
    a, b = pair
    assert not b.poll()
    assert not b.gone()
    a.send({"n": 1})
    a.send({"n": 2})
    assert eventually(b.poll)  # vsock delivers a moment later
    assert not b.gone()
    assert b.receive(5.0) == {"n": 1}
    assert eventually(b.poll)  # where it has been read from the socket already, too
    a.close()
    assert eventually(b.gone)  # although a message still waits
    assert b.receive(5.0) == {"n": 2}
    assert b.poll()


def test_gone_where_the_system_has_no_pollrdhup(monkeypatch):
    one, two = socket.socketpair()
    monkeypatch.setattr(sockets, "_RDHUP", 0)
    monkeypatch.setattr(sockets, "_GONE", 0)
    wire = sockets.Wire(two)
    assert not wire.gone()
    one.sendall(b"x")
    assert not wire.gone()
    assert wire.read(1) == b"x"
    one.shutdown(socket.SHUT_WR)
    assert wire.gone()
    one.close()
    wire.close()


@pytest.mark.parametrize(
    ("spoil", "error", "code"),
    [
        (lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:], RecordError, Alert.UNEXPECTED),
        (lambda data: b"\0\0" + data, RecordError, Alert.UNEXPECTED),
    ],
)
def test_a_broken_record_ends_the_channel_with_an_alert(spoil, error, code):
    one, two = socket.socketpair()
    a, b = make((one, two))
    one.settimeout(60)  # from here on it is the test that writes
    one.sendall(spoil(a._session.seal(b"\x80")))
    with pytest.raises(error):
        b.receive(5.0)
    assert b.fileno() == -1
    with pytest.raises(PeerAlert) as caught:
        a.receive(5.0)
    assert caught.value.code == code
    assert a.fileno() == -1


@pytest.mark.parametrize("body", [b"\xc1", b"\x91\x90", b"\x01", b""])
def test_a_message_that_is_no_map_is_a_decode_error(body):
    one, two = socket.socketpair()
    a, b = make((one, two))
    one.settimeout(60)  # from here on it is the test that writes
    one.sendall(a._session.seal(body))
    with pytest.raises(DecodeError):
        b.receive(5.0)
    with pytest.raises(PeerAlert) as caught:
        a.receive(5.0)
    assert caught.value.code == Alert.DECODE


def test_a_message_over_the_limit_ends_the_channel_and_frees_the_budget():
    budget = Budget(1 << 20)
    a, b = make(stage={"budget": budget})
    b._session._opener.limits |= {Type.MESSAGE: 200_000}
    sender = background(a.send, {"rows": bytes(300_000)})
    with pytest.raises(LimitError):
        b.receive(5.0)
    with contextlib.suppress(TransportError):
        sender.join()
    assert budget.held == 0
    with pytest.raises(PeerAlert) as caught:  # what the peer said before it went can still be read
        a.receive(5.0)
    assert caught.value.code == Alert.LIMIT


def test_a_dead_channel_gives_its_part_of_the_budget_back():
    budget = Budget(1 << 20)
    one, two = socket.socketpair()
    a, b = make((one, two), stage={"budget": budget})
    one.settimeout(60)  # from here on it is the test that writes
    one.sendall(a._session.seal(bytes(200_000))[:150_000])
    with pytest.raises(TimedOut):
        b.receive(0.1)
    assert budget.held == 131_030
    b.abort()
    assert budget.held == 0
    a.abort()


def test_a_client_is_told_that_it_is_refused_even_after_it_has_spoken():
    one, two = tcp_pair()
    other = background(Channel.accept, two, End(Unattested(), Refuses(), bytes(32), MAC_KEY, 0, CLIENT))
    a = Channel.initiate(one, CLIENT_END)
    with contextlib.suppress(TransportError):
        a.send({"n": 1})
    with pytest.raises(PeerAlert) as caught:
        a.receive(5.0)
    assert caught.value.code == Alert.ATTESTATION
    with pytest.raises(EvidenceError):
        other.join()
    assert two.fileno() == -1


def test_the_reason_survives_a_peer_that_is_gone_already():
    one, two = socket.socketpair()

    class Leaves:
        def verify(self, evidence, binding):
            two.shutdown(socket.SHUT_RDWR)
            raise EvidenceError("no")

    other = background(Channel.accept, two, STAGE_END)
    with pytest.raises(EvidenceError):
        Channel.initiate(one, End(Unattested(), Leaves(), bytes(32), MAC_KEY, CLIENT, 0))
    assert one.fileno() == -1
    with pytest.raises(TransportError):
        other.join()


@given(st.binary(max_size=300))
def test_any_bytes_to_a_listening_end_give_a_transport_error(data):
    one, two = socket.socketpair()
    one.sendall(data)
    one.close()
    with pytest.raises(TransportError):
        Channel.accept(two, STAGE_END)
    assert two.fileno() == -1
