"""A session: its order, its end and its limits."""

import random

import pytest
from ends import Side, client, meet, sessions, stage, told

from transport import session
from transport.errors import (
    Alert,
    Closed,
    LimitError,
    PeerAlert,
    RecordError,
    Truncated,
)
from transport.link import initiate, respond
from transport.records import Budget, Message, Opener, Sealer, Type


def test_close_is_the_only_end():
    a, b = sessions()
    data = a.seal(b"one") + a.seal(bytes(70_000)) + a.close()
    b.feed(data)
    assert b.next_message() == b"one"
    assert b.next_message() == bytes(70_000)
    for _ in range(2):
        with pytest.raises(Closed):
            b.next_message()
        with pytest.raises(Closed):
            b.eof()
    with pytest.raises(Closed):
        a.seal(b"more")
    assert told(a, b.seal(b"the other direction lives")) == b"the other direction lives"


@pytest.mark.parametrize("left", [0, 1, 300, 70_000])
def test_an_end_without_close_is_truncation(left):
    a, b = sessions()
    b.feed(a.seal(bytes(100_000))[:left])
    assert b.next_message() is None
    with pytest.raises(Truncated, match="between messages" if left == 0 else "inside a message"):
        b.eof()


def test_a_forged_count_bytes_after_close_and_a_malformed_alert_are_errors():
    a, b = sessions()
    with pytest.raises(RecordError, match="count"):
        told(b, a._sealer.seal(Type.CLOSE, (1).to_bytes(8, "big")))
    a, b = sessions()
    b.feed(a.close() + b"x")
    with pytest.raises(RecordError, match="after CLOSE"):
        b.next_message()
    a, b = sessions()
    with pytest.raises(RecordError, match="0 bytes"):
        told(b, a._sealer.seal(Type.ALERT, b""))
    with pytest.raises(RecordError, match="dead"):
        b.next_message()


def test_what_came_before_an_error_is_delivered_whatever_the_pieces():
    for step in (1, 10_000):
        a, b = sessions()
        data, got = a.seal(b"1") + a.seal(b"2") + a.alert(Alert.INTERNAL), []

        def deliver(b=b, data=data, got=got, step=step):
            for at in range(0, len(data), step):
                b.feed(data[at : at + step])
                while (message := b.next_message()) is not None:
                    got.append(message)

        with pytest.raises(PeerAlert, match="inside it") as caught:
            deliver()
        assert caught.value.code == Alert.INTERNAL
        assert got == [b"1", b"2"]


def clocked():
    """Two ends of a session, and their clock."""
    a, b = sessions()
    now = [0.0]
    for s in (a, b):
        s._clock, s._made = (lambda: now[0]), 0.0
    return a, b, now


def test_pings_are_counted_and_spaced():
    a, b, now = clocked()
    for _ in range(5):
        now[0] += session.PING_INTERVAL / 2
        assert told(b, a.ping()) is None
    for _ in range(2):
        b.feed(a.ping())
        assert b.next_message() is None  # two may be early
    b.feed(a.ping())
    with pytest.raises(RecordError, match="PING 8 came too soon"):
        b.next_message()


def test_pings_of_an_honest_peer_never_come_too_soon():
    a, b, now = clocked()
    jitter = random.Random(0)
    held = b""
    while now[0] < session.MAX_AGE:
        now[0] += 0.99 * session.PING_INTERVAL  # the peer's clock is faster than any is
        held += a.ping()
        if jitter.random() < 0.5:  # the network, or this end, lets some gather
            assert told(b, held) is None
            held = b""
    assert told(b, held) is None


def test_a_flood_of_pings_ends_the_link():
    a, b, now = clocked()
    now[0] = 60.0
    with pytest.raises(RecordError, match="PING 27 came too soon"):
        told(b, b"".join(a.ping() for _ in range(1000)))
    with pytest.raises(RecordError, match="dead"):
        b.next_message()


def test_messages_and_links_have_limits():
    one, two = Side(initiate(client(), max_message=1000)), Side(respond(stage(), max_message=500))
    meet(one, two)
    with pytest.raises(LimitError, match="at most 1000"):
        one.session.seal(bytes(1001))
    assert two.session is not None
    with pytest.raises(LimitError, match="more than 500"):
        told(two.session, one.session.seal(bytes(1000)))
    a, _ = sessions()
    assert not a.expired
    a._clock = lambda: a._made + session.MAX_AGE + 1
    assert a.expired
    with pytest.raises(LimitError, match="24 h"):
        a.seal(b"x")


def test_the_records_of_a_link_are_those_of_the_records_layer():
    a, b = sessions()
    k = a._sealer._cipher.k
    reader = Opener(type(a._sealer._cipher)(k), {Type.ATTEST: 1 << 18, Type.MESSAGE: 9}, Budget(1 << 20))
    reader._cipher.n = a.records_sent
    reader.feed(a.seal(b"same"))
    assert reader.next() == Message(Type.MESSAGE, b"same")
    assert isinstance(a._sealer, Sealer)
    assert b.records_received == 1
