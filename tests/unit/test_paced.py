"""Messages of a client that do no useful work are paced, and none is answered once the client has left."""

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from made import SMALL, cut, random_tensors

from minigpt.errors import UnreachableStage
from minigpt.protocol import messages
from minigpt.protocol.messages import Cancel, Done, Generate, Message, Reason, Reset, Tokens
from minigpt.stage.clients import MOST, ClientConversation
from minigpt.stage.conversation import State
from minigpt.stage.layers import Layers
from minigpt.stage.newcomers import Pace
from minigpt.stage.places import Identity, Places
from minigpt.stage.schedule import Schedule
from minigpt.stage.server import Server
from transport.errors import Closed

MANY = 10**7  # channels: among so many, a message that takes 1 µs has to wait for 100 s


class Stopping:
    """In the place of the stage's event: remembers how long was waited for it, and lets no time pass."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def is_set(self) -> bool:
        return len(self.waited) > 3

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return self.is_set()


class Client:
    """In the place of a client's channel."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.left = False

    def send(self, plain: Any) -> None:
        self.sent.append(messages.decode(plain))

    def poll(self) -> bool:
        return False

    def gone(self) -> bool:
        return self.left


class Ends:
    """A conversation and what surrounds it."""

    def __init__(self, channels: int) -> None:
        (model,) = cut(SMALL, random_tensors(SMALL))
        self.stopping = Stopping()
        layers = Layers(model)
        stage: Any = SimpleNamespace(
            index=0, model=model, layers=layers, places=Places(0, 4, 2**24, 0), schedule=Schedule(layers),
            stopping=self.stopping, identity=lambda channel, source: Identity(source),
        )  # fmt: skip
        host: Any = SimpleNamespace(owing=channels)
        self.client = Client()
        self.conversation = ClientConversation(stage, 1, "tcp://192.0.2.1:1", None, host)
        self.conversation.who = Identity("tcp://192.0.2.1")
        self.conversation._rested = self.conversation.since

    def say(self, message: Message) -> bool:
        """Whether that was useful."""
        return self.conversation._answer(self.client, messages.encode(message))  # type: ignore[arg-type]


ASKED = Generate(0, (1, 2), 3)
REFUSED = Generate(0, (SMALL.vocab_size,), 3)


@pytest.mark.parametrize("useless", [Cancel(), Reset(), REFUSED])
def test_a_message_that_does_nothing_waits_for_what_the_ones_before_have_cost(useless: Message) -> None:
    ends = Ends(MANY)
    assert not ends.say(useless)
    assert not ends.stopping.waited
    assert not ends.say(useless)
    assert ends.stopping.waited


def test_the_fewer_channels_the_larger_is_the_share_of_each() -> None:
    ends = Ends(1)
    for _ in range(int(0.1 / MOST)):  # a tenth of a core, a second's worth at once
        assert not ends.say(Reset())
    assert not ends.stopping.waited


def test_a_request_waits_for_no_message_before_it() -> None:
    ends = Ends(MANY)
    ends.say(Reset())
    assert ends.say(ASKED)
    assert not ends.stopping.waited
    assert [type(one) for one in ends.client.sent] == [Done, Tokens, Tokens, Tokens, Done]


def test_a_request_that_was_told_nothing_is_no_useful_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends(MANY)
    ends.say(Reset())
    monkeypatch.setattr(ends.client, "poll", lambda: True)
    monkeypatch.setattr(ends.client, "receive", lambda _: messages.encode(Cancel()), raising=False)
    assert not ends.say(ASKED)
    assert ends.stopping.waited
    assert ends.client.sent[1:] == [Done(Reason.CANCELLED)]


@pytest.mark.parametrize("message", [Cancel(), Reset(), REFUSED, ASKED])
def test_nothing_is_answered_once_the_client_has_left(message: Message) -> None:
    ends = Ends(1)
    ends.client.left = True
    with pytest.raises(Closed):
        ends.say(message)
    assert not ends.client.sent


def test_whoever_waits_for_its_turn_is_idle_and_waits_no_longer_once_it_has_left() -> None:
    ends = Ends(MANY)
    ends.say(Reset())
    ends.conversation.state = State.WORKING

    def wait(_: float) -> bool:
        assert ends.conversation.state is State.IDLE
        ends.client.left = True
        return False

    ends.stopping.wait = wait  # type: ignore[assignment, method-assign]
    with pytest.raises(Closed):
        ends.say(Reset())
    assert len(ends.client.sent) == 1


class Seats:
    """A server with `channels`, and those who have one."""

    def __init__(self, channels: int, operators: frozenset[bytes] | None = None) -> None:
        self.server = Server.__new__(Server)
        limits, manifest = SimpleNamespace(channels=channels, handshakes=8), SimpleNamespace(operators=operators)
        self.server.stage = cast("Any", SimpleNamespace(index=0, limits=limits, manifest=manifest))
        self.server._lock, self.server.open, self.server._paces = threading.Lock(), {}, {}
        self.ended: list[int] = []

    def come(self, who: str, known: bool = False, **changes: Any) -> int | None:
        """The number of one that has a channel now, None if it has none. It is at work, unless `changes` say else."""
        number = len(self.server.open) + len(self.ended) + 100
        made = SimpleNamespace(number=number, who=None, turn_out=lambda: self.ended.append(number))
        vars(made).update({"pace": Pace(1.0), "state": State.WORKING, "useful": True, "since": -100.0} | changes)
        self.server.open[number] = cast("Any", made)
        try:
            self.server.seat(cast("Any", made), Identity(who, known))
        except UnreachableStage:
            del self.server.open[number]
            return None
        return number

    def fill(self, who: str, **changes: Any) -> list[int]:
        """As many of them as there is room for."""
        found = []
        while (number := self.come(who, **changes)) is not None and not self.ended:
            found.append(number)
        return found


def test_room_is_made_by_who_never_did_anything_useful_then_by_who_has_not_for_longest() -> None:
    seats = Seats(3)
    never = seats.come("a", state=State.IDLE, useful=False, since=20.0)
    long = seats.come("a", state=State.IDLE, since=10.0)
    lately = seats.come("a", state=State.IDLE, since=15.0)
    for _ in range(3):
        assert seats.come("a")
    assert seats.ended == [never, long, lately]
    assert seats.come("a") is None


def test_one_identity_has_seven_eighths_of_the_channels_and_others_have_the_rest_whatever_it_does() -> None:
    seats = Seats(128)
    assert len(seats.fill("flood")) == 112
    assert len(seats.fill("other")) == 14
    assert len(seats.fill("third")) == 2
    assert not seats.ended  # they are at work


def test_a_newcomer_ends_an_idle_channel_of_whoever_has_most_and_none_that_is_at_work() -> None:
    seats = Seats(8)
    young = time.monotonic()
    idle = [seats.come("flood", state=State.IDLE, since=young) for _ in range(4)]
    seats.come("flood")
    few = [seats.come("few", state=State.IDLE) for _ in range(2)]
    seats.come("one", state=State.IDLE)
    for count in (1, 2):
        assert seats.come(f"newcomer {count}")
        assert seats.ended == idle[:count]
    assert seats.come("flood") is None  # what it has is not silent for long enough, and others have no more
    assert seats.come("newcomer 3")
    assert seats.come("newcomer 4")
    assert set(seats.ended) == {*idle[:3], few[0]}
    assert [seats.come("newcomer 4") for _ in range(2)] == [None, None]  # nobody has more than it would


def test_a_channel_that_is_silent_for_less_than_a_second_is_ended_for_whoever_has_two_fewer_only() -> None:
    for since, ends in ((time.monotonic(), False), (-100.0, True)):
        seats = Seats(2)
        seats.come("a", state=State.IDLE, since=since)
        seats.come("b")
        assert (seats.come("c") is not None) is ends


def test_strangers_make_room_for_listed_clients_and_never_the_other_way() -> None:
    seats, now = Seats(16, operators=frozenset([b"key"])), time.monotonic()
    idle = [number for name in range(20) if (number := seats.come(str(name), state=State.IDLE, since=now))]
    assert len(idle) == 14  # the last eighth is for those who are listed
    while seats.come("key", known=True):
        pass
    assert seats.ended == idle[:12]  # it has 7/8
    assert seats.come("other", known=True)
    assert seats.ended == idle[:13]
    assert seats.come("stranger") is None


def test_what_does_nothing_is_no_activity() -> None:
    ends = Ends(1)
    conversation, began = ends.conversation, ends.conversation.since - 100
    for message, useful in ((Cancel(), False), (ASKED, True), (Reset(), False)):
        conversation.since = began
        channel: Any = SimpleNamespace(
            receive=lambda _, message=message: messages.encode(message), gone=lambda: False, poll=lambda: False,
            send=ends.client.send, spoke=0.0,
        )  # fmt: skip
        conversation._stage.limits = SimpleNamespace(idle=1.0)  # type: ignore[misc, assignment]
        conversation._turn(channel)
        assert conversation.state is State.IDLE
        assert (conversation.since > began) is useful
    assert conversation.useful
