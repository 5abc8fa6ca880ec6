"""Messages of a client that do no useful work are paced, and none is answered once the client has left."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from made import SMALL, cut, random_tensors

from minigpt.protocol import messages
from minigpt.protocol.messages import Cancel, Done, Generate, Message, Reason, Reset, Tokens
from minigpt.stage.clients import MOST, ClientConversation
from minigpt.stage.conversation import State
from minigpt.stage.layers import Layers
from minigpt.stage.places import Places
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
            stopping=self.stopping, identity=lambda channel, source: source,
        )  # fmt: skip
        host: Any = SimpleNamespace(channels=channels)
        self.client = Client()
        self.conversation = ClientConversation(stage, 1, "tcp://192.0.2.1:1", None, host)
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


def test_room_is_made_by_who_never_did_anything_useful_then_by_who_has_not_for_longest() -> None:
    stage: Any = SimpleNamespace(limits=SimpleNamespace(channels=3, handshakes=8))
    server = Server.__new__(Server)
    server.stage, server._lock = stage, threading.Lock()
    never: Any = SimpleNamespace(state=State.IDLE, useful=False, since=20.0)
    long: Any = SimpleNamespace(state=State.IDLE, useful=True, since=10.0)
    lately: Any = SimpleNamespace(state=State.IDLE, useful=True, since=15.0)
    server.open = dict(enumerate([long, never, lately]))
    for wanted in (never, long, lately):
        found: Any = server._least_wanted()
        assert found is wanted
        found.state = State.WORKING
    assert server._least_wanted() is None


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
