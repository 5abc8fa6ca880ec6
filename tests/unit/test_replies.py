"""What a stage may answer: the replies to a request in order, and nothing that is not one."""

import sys

import numpy as np
import pytest
from made import SMALL

from minigpt.cli.terminal import visible
from minigpt.engine.sampling import Sampling
from minigpt.errors import MessageError, RequestRefused
from minigpt.protocol import messages
from minigpt.protocol.messages import Done, Failure, Generate, Logits, Reason, Refusal, Scores, Span, Tokens, Wanted
from minigpt.protocol.request import Replies, flaw

STOP, V = 7, SMALL.vocab_size
REQUEST = Generate(0, (1, 2), 3, (STOP,))
TOP = Generate(0, (1,), 1, top=2)
BIASED = Generate(0, (1, 2), 3, sampling=Sampling(logit_bias=((1, 2.0),)), draft=8)
SCORED = Generate(0, (1, 2, 3), 1, wanted=Wanted.SCORES, top=1)
SPAN = Span(0.1, 0.0, 0.0, 0.0, 5.0)


def taken(request: Generate, *said: messages.Message, cancelled: bool = False) -> None:
    replies = Replies(request, SMALL, 2)
    replies.cancelled = cancelled
    for message in said:
        replies.take(message)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (REQUEST, [Tokens(2, (1,)), Tokens(3, (2,)), Tokens(4, (3,)), Done(Reason.LENGTH)]),
        (REQUEST, [Tokens(2, (1,)), Tokens(3, (STOP,)), Done(Reason.END)]),
        (Generate(0, (1, 2), 3, draft=8), [Tokens(2, (1, 2, 3)), Done(Reason.LENGTH)]),
        (Generate(0, (1,) * SMALL.n_positions, 3), [Tokens(SMALL.n_positions, (1,)), Done(Reason.CONTEXT)]),
        (Generate(0, (1,), 1, logprobs=True), [Tokens(1, (1,), (-0.5,)), Done(Reason.LENGTH)]),
        (Generate(0, (1,), 1, spans=True), [Tokens(1, (1,), (), (SPAN, SPAN)), Done(Reason.LENGTH)]),
        (Generate(0, (1,), 1, top=2), [Tokens(1, (1,), (), (), ((1, -0.5), (0, -0.5))), Done(Reason.LENGTH)]),
        (SCORED, [Scores(1, (-0.5,), (), ((1, -0.5),)), Scores(2, (0.0,), (), ((1, 0.0),)), Done(Reason.SCORES)]),
        (SCORED, [Scores(1, (-0.5, -1.0), (), ((1, -0.5), (1, 0.0))), Done(Reason.SCORES)]),
    ],
)
def test_tokens_come_in_order_and_then_the_end_that_the_request_implies(
    request_: Generate, said: list[messages.Message]
) -> None:
    taken(request_, *said)


@pytest.mark.parametrize(
    ("request_", "said", "why"),
    [
        (REQUEST, [Tokens(3, (1,))], "position 3, wanted 2"),
        (REQUEST, [Tokens(2, (1,)), Tokens(2, (1,))], "position 2, wanted 3"),
        (REQUEST, [Tokens(2, ())], "0 tokens at once"),
        (REQUEST, [Tokens(2, (1, 2))], "2 tokens at once"),
        (Generate(0, (1, 2), 3, draft=8), [Tokens(2, (1, 2, 3, 4))], "after the last"),
        (Generate(0, (1, 2), 3, (STOP,), draft=8), [Tokens(2, (STOP, 1))], "after the last"),
        (REQUEST, [Tokens(2, (STOP,)), Tokens(3, (1,))], "out of turn"),
        (REQUEST, [Tokens(2, (V,))], "outside the vocabulary"),
        (REQUEST, [Tokens(2, (2**32 - 1,))], "outside the vocabulary"),
        (REQUEST, [Tokens(2, (1,), (-0.5,))], "1 log-probabilities"),
        (REQUEST, [Tokens(2, (1,), (), (SPAN, SPAN))], "2 spans, wanted 0"),
        (Generate(0, (1,), 1, logprobs=True), [Tokens(1, (1,))], "0 log-probabilities"),
        (Generate(0, (1,), 1, logprobs=True), [Tokens(1, (1,), (7.5,))], "above 0"),
        (Generate(0, (1,), 1, spans=True), [Tokens(1, (1,), (), (SPAN,))], "1 spans, wanted 2"),
        (REQUEST, [Logits(2, np.zeros(V, np.float32))], "out of turn"),
        (REQUEST, [Done(Reason.LENGTH)], "wanted more tokens"),
        (REQUEST, [Done(Reason.CANCELLED)], "wanted more tokens"),
        (REQUEST, [Tokens(2, (1,)), Done(Reason.RESET)], "wanted more tokens"),
        (REQUEST, [Tokens(2, (STOP,)), Done(Reason.LENGTH)], 'wanted one by "end"'),
        (REQUEST, [Tokens(2, (STOP,)), Refusal(0, "busy", "later")], "out of turn"),
        (REQUEST, [messages.Report(())], "out of turn"),
        (REQUEST, [Scores(2, (-0.5,))], "out of turn"),
        (REQUEST, [Tokens(2, (1,), (), (), ((1, -0.5),))], "1 of the most likely ids, wanted 0"),
        (TOP, [Tokens(1, (1,))], "0 of the most likely ids, wanted 2"),
        (TOP, [Tokens(1, (1,), (), (), ((1, -0.5),))], "1 of the most likely ids, wanted 2"),
        (TOP, [Tokens(1, (1,), (), (), ((1, -0.5), (1, -0.5)))], "one twice"),
        (TOP, [Tokens(1, (1,), (), (), ((1, -0.5), (V, -0.5)))], "outside the vocabulary"),
        (TOP, [Tokens(1, (1,), (), (), ((1, -0.5), (2, -0.25)))], "do not fall"),
        (TOP, [Tokens(1, (1,), (), (), ((1, 0.5), (2, -0.25)))], "above 0"),
        (BIASED, [Tokens(2, (1, 2))], "2 tokens at once"),
        (SCORED, [Scores(2, (-0.5,), (), ((1, -0.5),))], "position 2, wanted 1"),
        (SCORED, [Scores(1, ())], "0 scores"),
        (SCORED, [Scores(1, (-0.5,) * 3, (), ((1, -0.5),) * 3)], "3 scores, wanted 1 to 2"),
        (SCORED, [Scores(1, (0.5,), (), ((1, -0.5),))], "above 0"),
        (SCORED, [Scores(1, (-0.5,))], "0 of the most likely ids, wanted 1"),
        (SCORED, [Scores(1, (-0.5,), (SPAN, SPAN), ((1, -0.5),))], "2 spans, wanted 0"),
        (SCORED, [Tokens(3, (1,))], "out of turn"),
        (SCORED, [Scores(1, (-0.5,), (), ((1, -0.5),)), Done(Reason.SCORES)], "wanted more tokens"),
        (SCORED, [Scores(1, (-0.5,) * 2, (), ((1, -0.5),) * 2), Done(Reason.LOGITS)], 'wanted one by "scores"'),
        (SCORED, [Scores(1, (-0.5,) * 2, (), ((1, -0.5),) * 2), Scores(3, (-0.5,))], "out of turn"),
    ],
)
def test_anything_else_is_a_fault_of_stage_0(request_: Generate, said: list[messages.Message], why: str) -> None:
    taken(request_, *said[:-1])
    with pytest.raises(MessageError, match=why) as caught:
        taken(request_, *said)
    assert caught.value.stage == 0


def test_logits_come_once_one_for_each_id() -> None:
    request = Generate(0, (1,), 1, wanted=Wanted.LOGITS)
    right = Logits(1, np.zeros(V, np.float32))
    taken(request, right, Done(Reason.LOGITS))
    for said in ([right, right], [Tokens(1, (1,))], [Logits(1, right.values[1:])], [Done(Reason.LOGITS)]):
        with pytest.raises(MessageError):
            taken(request, *said)


def test_only_a_cancelled_request_ends_as_cancelled() -> None:
    taken(REQUEST, Tokens(2, (1,)), Done(Reason.CANCELLED), cancelled=True)
    taken(REQUEST, Tokens(2, (STOP,)), Done(Reason.END), cancelled=True)
    with pytest.raises(MessageError, match='wanted one by "end"'):
        taken(REQUEST, Tokens(2, (STOP,)), Done(Reason.CANCELLED), cancelled=True)
    with pytest.raises(MessageError, match='wanted one by "cancelled"'):
        taken(REQUEST, Tokens(2, (1,)), Done(Reason.RESET), cancelled=True)


def test_a_refusal_takes_the_place_of_the_end() -> None:
    with pytest.raises(RequestRefused, match="later"):
        taken(REQUEST, Refusal(0, "busy", "later"))


def test_an_answer_of_a_later_stage_is_held_to_the_same_values() -> None:
    assert flaw(Tokens(2, (1,), (-0.5,)), SMALL, 0) is None
    assert flaw(Tokens(2, (V,)), SMALL, 0)
    assert flaw(Tokens(2, (1,), (0.5,)), SMALL, 0)
    assert flaw(Tokens(2, (1,), (), (SPAN,) * 256), SMALL, 1)


@pytest.mark.parametrize("kind", [Refusal, Failure])
def test_a_peers_words_reach_a_terminal_or_a_log_as_one_line_without_escapes(kind: type) -> None:
    text = "gone\nWARNING all is well\x1b[2J\u202e\x9b"
    read = messages.shown(kind(1, "a\x1bb", text))
    assert (read.reason, read.text) == (r"a\x1bb", r"gone\nWARNING all is well\x1b[2J\u202e\x9b")
    assert messages.shown(kind(1, "é 日本 😀", "“…” don't \\ ")) == kind(1, "é 日本 😀", "“…” don't \\ ")
    report = messages.Report((messages.StageReport(1, text, text, evidence="{\n}"),))
    told = messages.shown(report)
    assert isinstance(told, messages.Report)
    (one,) = told.stages
    assert (one.error.isprintable(), one.reason.isprintable(), one.evidence) == (True, True, "{\n}")


def test_timings_are_not_negative() -> None:
    with pytest.raises(MessageError, match="at least 0"):
        messages.decode(messages.encode(Tokens(1, (1,), (), (SPAN._replace(wait=-1.0),))))


def test_generated_text_cannot_steer_a_terminal_and_is_written_to_a_file_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "one\n\ttwo\x1b[2J\r\x9b\u00a0é"
    for terminal, shown in ((True, "one\n\ttwo\\x1b[2J\\r\\x9b\u00a0é"), (False, text)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert visible(text) == shown
