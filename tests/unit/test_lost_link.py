"""A link to the next stage that is lost while nobody uses it costs no request."""

import pytest
from chains import Chain, Rest, told
from made import SMALL, cut, random_tensors

from minigpt.protocol.messages import Generate


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
