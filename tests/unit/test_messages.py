"""Messages: what is sent is what is read, and nothing else is read."""

import dataclasses
import math
import struct
import tracemalloc
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.engine.sampling import Sampling
from minigpt.errors import MessageError, RequestRefused
from minigpt.protocol import messages
from minigpt.protocol.messages import Done, Generate, Logits, Reason, Report, Scores, Span, StageReport, Tokens
from transport import codec

EXAMPLES: list[messages.Message] = [
    Generate(3, (1, 2, 2**32 - 1), 20, (50256,), Sampling(0.7, 40, 0.9, 2**64 - 1), True),
    Tokens(9, (7,), (-0.5,), (Span(0.1, 0.2, 0.3, 0.4, 5.0), Span(1.0, 0.0, 0.0, 0.0, 0.0))),
    Logits(4, np.linspace(-1, 1, 7, dtype=np.float32)),
    Scores(1, (-0.5, 0.0)),
    Done(Reason.CONTEXT),
    messages.Refusal(1, "busy", "try again"),
    messages.Failure(2, "failed", "gone"),
    messages.Cancel(),
    messages.Reset(),
    messages.Status(),
    Report(
        (
            StageReport(
                0, uptime=1.5, steps=3, tokens=2, rate=0.5, batch=1.25, queue=4, cache_limit=2**40, evidence="{}"
            ),
            StageReport(1, uptime=60.0, weights_bytes=9, evidence="{}", exposed="core dumps"),  # to no operator
            StageReport(2, "unreachable", "failed"),
        )
    ),
]

BIAS = ((0, -100.0), (7, 2.5))
MORE: list[messages.Message] = [  # with fields that may be left out
    Generate(0, (1, 2), 9, sampling=Sampling(1.0, 0, 1.0, 5, 0.1, 1.2, -0.5, 0.25, BIAS), top=20, delivered=1),
    Generate(0, (1, 2), 1, wanted=messages.Wanted.SCORES, top=1),
    Tokens(9, (7, 8), (), (), ((7, -0.5), (3, -0.5), (8, -0.25), (2**32 - 1, -9.5))),
    Scores(1, (-0.5, 0.0), (), ((7, -0.5), (8, 0.0))),
]


def test_what_any_client_is_told_of_a_stage_does_not_depend_on_other_clients() -> None:
    quiet = StageReport(1, "", "", 119.9, 9, 1, 0, 0, 0, 0, 0.0, 0.0, 0, 0, 2**30, "{}", "core dumps")
    busy = dataclasses.replace(
        quiet, uptime=60.5, channels=7, sequences=4, cache_bytes=5, steps=8, tokens=9, rate=1.5, batch=2.5, queue=3,
        resumed=1, cache_limit=2**29,
    )  # fmt: skip
    told = StageReport(1, uptime=60.0, weights_bytes=9, evidence="{}", exposed="core dumps")
    assert messages.for_any_client(quiet) == messages.for_any_client(busy) == told


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return a == b


def carried(message: messages.Message) -> dict[str, typing.Any]:
    """The plain map that arrives at the other end."""
    value = codec.decode(codec.encode(messages.encode(message)), messages.KEYS)
    assert isinstance(value, dict)
    return value


def test_there_is_an_example_of_every_message() -> None:
    assert {type(example) for example in EXAMPLES} == set(typing.get_args(messages.Message))


@pytest.mark.parametrize("message", EXAMPLES + MORE, ids=lambda message: type(message).__name__)
def test_what_is_sent_is_what_is_read(message: messages.Message) -> None:
    assert same(messages.decode(carried(message)), message)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(PLAIN)
def test_anything_else_is_a_message_error(value: object) -> None:
    with pytest.raises(MessageError):
        messages.decode(value)


@given(st.sampled_from(EXAMPLES + MORE), st.data())
def test_a_field_of_another_value_is_read_or_refused_and_never_anything_else(
    message: messages.Message, data: st.DataObject
) -> None:
    value = carried(message)
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(PLAIN)
    try:
        messages.decode(value)
    except MessageError as error:
        assert len(str(error)) < 500


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_field_too_many_or_too_few_is_refused(message: messages.Message) -> None:
    value = carried(message)
    with pytest.raises(MessageError, match="wanted exactly"):
        messages.decode(value | {"extra": 1})
    for name in value.keys() - {"type"}:
        with pytest.raises(MessageError, match="wanted exactly"):
            messages.decode({key: value[key] for key in value if key != name})


def pairs(*told: tuple[int, float]) -> bytes:
    return b"".join(struct.pack("<Id", *pair) for pair in told)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 0),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 1),
        ("presence_penalty", math.inf),
        ("presence_penalty", "1"),
        ("frequency_penalty", -math.inf),
        ("frequency_penalty", math.nan),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", bytes(11)),
        ("logit_bias", pairs((1, 2.0), (1, 3.0))),
        ("logit_bias", pairs((2, 2.0), (1, 3.0))),
        ("logit_bias", pairs((1, math.nan))),
        ("logit_bias", pairs((1, math.inf))),
        ("logit_bias", pairs((2**31, 1.0))),
        ("logit_bias", pairs(*((token, 1.0) for token in range(1025)))),
    ],
)
def test_what_no_draw_can_have_is_refused(name: str, bad: object) -> None:
    value = carried(MORE[0])
    messages.decode(value)
    with pytest.raises(MessageError, match=name):
        messages.decode(value | {"sampling": value["sampling"] | {name: bad}})


@pytest.mark.parametrize("top", [-1, 21, 1.0, True, "1"])
def test_no_more_likely_ids_can_be_asked_for_than_are_told(top: object) -> None:
    with pytest.raises(MessageError, match="top"):
        messages.decode(carried(MORE[0]) | {"top": top})


@given(st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5), st.lists(st.floats(-99, 0), min_size=1, max_size=1))
def test_a_messages_length_tells_nothing_of_ids_or_probabilities(ids: list[int], logprobs: list[float]) -> None:
    def lengths(ids: tuple[int, ...], logprobs: tuple[float, ...]) -> tuple[int, int]:
        prompt, token = Generate(0, ids, 20), Tokens(7, ids[:1], logprobs)
        return len(codec.encode(messages.encode(prompt))), len(codec.encode(messages.encode(token)))

    assert lengths(tuple(ids), tuple(logprobs)) == lengths((0,) * 5, (0.0,))


def test_an_error_does_not_show_what_may_be_a_prompt() -> None:
    for value in ("my secret", b"my secret", ["my secret"], {"my secret": "my secret"}):
        with pytest.raises(MessageError) as caught:
            messages.decode(carried(EXAMPLES[0]) | {"ids": value})
        assert "secret" not in str(caught.value)


def test_a_refusal_is_an_error_at_the_other_end() -> None:
    error = RequestRefused("busy here", reason="busy", stage=2)
    told = messages.refused(messages.refusal(error))
    assert (str(told), told.reason, told.stage) == ("busy here", "busy", 2)


def test_a_message_for_another_end_is_refused_before_its_fields_are_read() -> None:
    for value in (carried(EXAMPLES[1]), {"type": "token", "ids": "nonsense"}):
        with pytest.raises(MessageError, match=r"^Token is not for stage 0$"):
            messages.decode(value, {Generate}, "stage 0")


def test_ids_beyond_the_models_positions_are_refused_without_being_unpacked() -> None:
    value = carried(Generate(3, (1,), 1)) | {"ids": np.arange(2**20, dtype="<u4").tobytes()}
    tracemalloc.start()
    with pytest.raises(RequestRefused, match="1048579 positions, and the model has 64") as caught:
        messages.decode(value, {Generate}, "stage 0", 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == "too-long"
    assert peak < 2**18
    for malformed in ({"wanted": "x"}, {"ids": bytes(4 * 2**20 + 4)}, {"ids": bytes(401)}):
        with pytest.raises(MessageError):
            messages.decode(value | malformed, {Generate}, "stage 0", 64)
    assert messages.decode(carried(Generate(0, (1,) * 64, 1)), {Generate}, "stage 0", 64) == Generate(0, (1,) * 64, 1)


def test_an_answer_has_as_many_tokens_as_a_draft_at_most() -> None:
    most = 1 + messages.MAX_DRAFT
    assert same(messages.decode(carried(Tokens(1, (1,) * most))), Tokens(1, (1,) * most))
    with pytest.raises(MessageError, match=r"Tokens\.ids"):
        messages.decode(carried(Tokens(1, (1,) * (most + 1))))
