"""A stage in the middle: the thread that brings answers back."""

from types import SimpleNamespace
from typing import Any

import pytest
from made import SMALL, cut, random_tensors

from minigpt.protocol import messages
from minigpt.protocol.messages import Failure
from minigpt.stage.layers import Layers
from minigpt.stage.places import Places
from minigpt.stage.upstream import UpstreamConversation

SECRET = "what the peer sent"


class Link:
    """In the place of the link to the next stage."""

    def await_answers(self, look: float) -> bool:
        return True

    def receive_answers(self) -> Any:
        raise MemoryError(SECRET)


class Before:
    """In the place of the channel of the stage before."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.deaf = False

    def send(self, plain: Any) -> None:
        self.sent.append(plain)

    def deafen(self) -> None:
        self.deaf = True


def test_a_failure_inside_is_told_to_the_stage_before_and_its_text_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    model = cut(SMALL, random_tensors(SMALL), 1, 2)[1]
    stage = SimpleNamespace(index=1, layers=Layers(model, 1), places=Places(1, 4, 2**20, 0))
    conversation = UpstreamConversation(stage, 1, "tcp://192.0.2.1:1", None, None)  # type: ignore[arg-type]
    before = Before()
    conversation._bring_back(before, Link())  # type: ignore[arg-type]
    (told,) = before.sent
    failure = messages.decode(told, messages.ANSWERS, "a test")
    assert isinstance(failure, Failure)
    assert "failed inside" in failure.text
    assert before.deaf
    assert "MemoryError" in caplog.text
    assert SECRET not in caplog.text + failure.text
