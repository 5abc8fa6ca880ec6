"""A link to the next stage that is lost while nobody uses it costs no request, and one that is misused ends."""

import threading
import time
from types import SimpleNamespace

import pytest
from chains import Chain, Rest, told
from made import SMALL, cut, random_tensors

from minigpt.errors import LateStage, StageError, UnreachableStage
from minigpt.protocol import batches, links
from minigpt.protocol.batchlink import BatchLink
from minigpt.protocol.messages import Generate
from transport.errors import Closed, Silent, TimedOut, TransportError, Truncated


@pytest.fixture
def chain() -> Chain:
    return Chain(cut(SMALL, random_tensors(SMALL), 1))


def test_a_link_that_was_lost_unused_is_given_up_with_its_sequences(chain: Chain) -> None:
    assert isinstance(chain.rest, Rest)
    told(chain.run(Generate(0, (1, 2), 2)))
    chain.schedule.look_at_link()
    assert chain.sequence.dead is None
    chain.rest.stale = True
    chain.schedule.look_at_link()
    assert chain.sequence.dead is not None


def test_a_link_in_use_is_not_looked_at(chain: Chain) -> None:
    assert isinstance(chain.rest, Rest)
    running = chain.run(Generate(0, (1, 2), 3))
    next(running)
    chain.rest.stale = True  # as it is whenever an answer has arrived
    chain.schedule.look_at_link()
    assert chain.sequence.dead is None
    assert len(told(running)[0]) == 2


class Talking:
    """In the place of a channel: the peer says this, whatever it is asked."""

    def __init__(self, said: object) -> None:
        self.said, self.aborted = said, False

    def send(self, *_arguments: object) -> None:
        raise MemoryError

    def receive(self, *_arguments: object, **_more: object) -> object:
        return self.said

    def abort(self) -> None:
        self.aborted = True


def test_answers_that_nobody_asked_for_end_the_link() -> None:
    channel, manifest = Talking(batches.encode_answers([])), SimpleNamespace(config=SMALL, stages=[None] * 3)
    link = BatchLink(channel, manifest, 2, 1.0)  # type: ignore[arg-type]
    with pytest.raises(StageError, match="stage 2 sent answers that nobody asked for"):
        link.receive_answers()
    assert channel.aborted
    assert link.dead is not None


def test_a_batch_that_there_is_no_memory_to_send_ends_the_link() -> None:
    """The answer to the next batch would be read as an answer to this one: tokens at wrong positions."""
    channel, manifest = Talking(batches.encode_answers([])), SimpleNamespace(config=SMALL, stages=[None] * 3)
    link = BatchLink(channel, manifest, 2, 1.0)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        link.send_batch(batches.Batch((), batches.NO_ROWS), ())
    assert channel.aborted
    assert link.dead is not None


class Parting(Talking):
    """The peer has hung up, and what it sent before can still be read."""

    def send(self, *_arguments: object) -> None:
        raise Truncated("broken pipe")

    def receive(self, *_arguments: object, **_more: object) -> object:
        assert isinstance(self.said, TransportError)
        raise self.said

    def fileno(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("said", "kind"), [(Closed("the peer has closed the link"), UnreachableStage), (Truncated("reset"), StageError)]
)
def test_a_stage_that_closed_its_link_in_order_has_not_died_whoever_notices_it(
    said: TransportError, kind: type[StageError]
) -> None:
    channel, manifest = Parting(said), SimpleNamespace(config=SMALL, stages=[None] * 3)
    for use in (lambda link: link.send_batch(batches.Batch((), batches.NO_ROWS), ()), BatchLink.receive_answers):
        link = BatchLink(channel, manifest, 2, 1.0)  # type: ignore[arg-type]
        with pytest.raises(StageError) as caught:
            use(link)
        assert type(caught.value) is kind
        assert links.failed(links.failure(caught.value, 1)).args == caught.value.args
        assert type(links.failed(links.failure(caught.value, 1))) is kind


class Ended(Parting):
    """A thread that receives has found the peer dead, and ended the channel; this one would send."""

    def send(self, *_arguments: object) -> None:
        raise Silent("did not finish a message in 60 s")

    def fileno(self) -> int:
        return -1


def test_whoever_sends_on_a_link_that_ended_inside_a_message_is_told_why() -> None:
    channel, manifest = (
        Ended(Closed("this end of the link is closed")),
        SimpleNamespace(config=SMALL, stages=[None] * 3),
    )
    link = BatchLink(channel, manifest, 2, 1.0)  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"^stage 2 did not finish a message in 60 s") as caught:
        link.send_batch(batches.Batch((), batches.NO_ROWS), ())
    assert not isinstance(caught.value, UnreachableStage | LateStage)  # it has died: the caller's time was not over


class Halting(Talking):
    """The peer, or the network, has stopped in the middle of a record."""

    looks = 0

    def wait(self, timeout: float) -> bool:
        self.looks += 1
        return True

    def poll(self) -> bool:
        return True

    def receive(self, *_arguments: object, **_more: object) -> object:
        raise TimedOut("no message")

    def close(self) -> None:
        pass


def test_half_a_record_on_an_idle_link_costs_no_core() -> None:
    channel, manifest = Halting(None), SimpleNamespace(config=SMALL, stages=[None] * 3)
    link = BatchLink(channel, manifest, 2, 1.0)  # type: ignore[arg-type]
    thread = threading.Thread(target=link.await_answers, args=(1.0,))
    thread.start()
    time.sleep(0.5)
    link.close()
    thread.join(60)
    assert not thread.is_alive()
    assert channel.looks < 60
