"""The loop: cut anywhere, chunked or rewound, it gives the same tokens; what does not fit is refused in words."""

import itertools

import numpy as np
import pytest
from chains import Chain, Rest, told
from hypothesis import given, settings
from hypothesis import strategies as st
from made import SMALL, cut, random_tensors

from minigpt.engine.sampling import Sampling
from minigpt.errors import RequestRefused
from minigpt.protocol.batches import Batch, Segment, Terms
from minigpt.protocol.messages import CHUNK, Generate, Logits, Reason, Refusal, Span, Tokens, Wanted
from minigpt.protocol.request import Ask
from minigpt.stage.layers import Layers

TENSORS = random_tensors(SMALL)
IDS = tuple(np.random.default_rng(2).integers(0, SMALL.vocab_size - 1, SMALL.n_positions).tolist())


def chain(*bounds: int) -> Chain:
    """The parts of the model, one after another."""
    return Chain(cut(SMALL, TENSORS, *bounds))


def run(chain: Chain, request: Generate) -> tuple[list[int], Reason]:
    answers, reason = told(chain.run(request))
    ids: list[int] = []
    for answer in answers:
        assert isinstance(answer, Tokens)
        ids += answer.ids
    return ids, reason


@pytest.mark.parametrize("bounds", [(1,), (3,), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("length", [1, 7, CHUNK + 5])
def test_a_cut_is_invisible_to_the_bit(bounds: tuple[int, ...], length: int) -> None:
    def logits(chain: Chain) -> np.ndarray:
        (answer,) = chain.run(Generate(0, IDS[:length], 1, wanted=Wanted.LOGITS))
        assert isinstance(answer, Logits)
        return answer.values

    assert np.array_equal(logits(chain(*bounds)), logits(chain()))
    request = Generate(0, IDS[:length], 20, sampling=Sampling(1.0, seed=5), logprobs=True)
    assert run(chain(*bounds), request) == run(chain(), request)


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(0, 60))
def test_a_smaller_start_rewinds_to_the_tokens_of_a_fresh_run(length: int, start: int) -> None:
    start = min(start, length - 1)
    made = chain(2)
    run(made, Generate(0, IDS[:length], 9))
    again = run(made, Generate(start, IDS[start : length + 3], 9))
    assert again == run(chain(2), Generate(0, IDS[: length + 3], 9))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Generate(1, IDS[:3], 5), "gap"),
        (Generate(0, (), 5), "bad-request"),
        (Generate(0, (0, SMALL.vocab_size), 5), "bad-token"),
        (Generate(0, (0, -1), 5), "bad-token"),
        (Generate(0, (0, 2**32 - 1), 5), "bad-token"),
        (Generate(0, (*IDS, 0), 5), "too-long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(request_: Generate, reason: str) -> None:
    made = chain(2)
    with pytest.raises(RequestRefused) as caught:
        run(made, request_)
    assert (caught.value.reason, caught.value.stage) == (reason, 0)
    assert made.sequence.cache.length == 0
    assert run(made, Generate(0, IDS[:3], 5)) == run(chain(), Generate(0, IDS[:3], 5))


@pytest.mark.parametrize(
    ("start", "rows", "positions", "reason"),
    [(1, 1, 9, "gap"), (0, 10, 9, "too-long"), (0, SMALL.n_positions, SMALL.n_positions - 1, "too-long")],
)
def test_a_later_stage_refuses_hidden_states_that_do_not_fit(
    start: int, rows: int, positions: int, reason: str
) -> None:
    last = Rest(Layers(cut(SMALL, TENSORS, 2)[1], 1), None, 2)
    hidden, terms = np.zeros((rows, SMALL.n_embd), np.float32), Terms(positions, Sampling())
    ask = Ask(Wanted.TOKEN, Sampling())
    last.send_batch(Batch((Segment(0, start, rows, Wanted.TOKEN),), hidden, ((0, terms),)), [ask])
    (answer,) = last.receive_answers()
    assert isinstance(answer, Refusal)
    assert (answer.stage, answer.reason) == (1, reason)


def test_it_ends_at_max_tokens_a_stop_id_or_the_last_position_and_says_which() -> None:
    ids, reason = run(chain(2), Generate(0, IDS[:4], 6))
    assert (len(ids), reason) == (6, Reason.LENGTH)
    stopped, reason = run(chain(2), Generate(0, IDS[:4], 6, stop_ids=(ids[3],)))
    assert (stopped, reason) == (ids[: ids.index(ids[3]) + 1], Reason.END)
    near = SMALL.n_positions - 3
    ids, reason = run(chain(2), Generate(0, IDS[:near], 50))
    assert (len(ids), reason) == (4, Reason.CONTEXT)  # the last is drawn after the last position, and not fed back
    ids, reason = run(chain(2), Generate(0, IDS, 50))
    assert (len(ids), reason) == (1, Reason.CONTEXT)


def test_the_caller_is_asked_before_each_step_whether_to_go_on() -> None:
    asked = itertools.count()

    def check() -> None:
        if next(asked) == 3:
            raise KeyboardInterrupt

    tokens: list[object] = []
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(chain(2).run(Generate(0, IDS[:CHUNK] + IDS[:5], 9), check=check))
    assert len(tokens) == 2  # two chunks of the prompt with the first token, then one more


def test_spans_are_of_every_stage_in_order() -> None:
    (unasked,) = chain(1, 2).run(Generate(0, IDS[:4], 1))
    assert unasked.spans == ()
    (answer,) = chain(1, 2).run(Generate(0, IDS[:4], 1, spans=True))
    assert len(answer.spans) == 3
    assert all(isinstance(span, Span) and span.compute > 0 for span in answer.spans)
    assert answer.spans[0].wait >= answer.spans[1].compute


def test_log_probabilities_are_those_of_the_logits() -> None:
    (answer,) = chain(2).run(Generate(0, IDS[:9], 1, logprobs=True))
    (asked,) = chain(2).run(Generate(0, IDS[:9], 1, wanted=Wanted.LOGITS))
    assert isinstance(answer, Tokens)
    assert isinstance(asked, Logits)
    values = asked.values.astype(np.float64)
    assert answer.logprobs[0] == pytest.approx(values[answer.ids[0]] - np.log(np.exp(values).sum()), abs=1e-9)
