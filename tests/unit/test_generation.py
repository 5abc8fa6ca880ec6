"""The loop: cut anywhere, chunked or rewound, it gives the same tokens; what does not fit is refused in words."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import SMALL, cut, random_tensors

from minigpt.engine.sampling import Sampling
from minigpt.errors import RequestRefused
from minigpt.protocol.messages import CHUNK, Generate, Logits, Reason, Span, Tokens, Wanted
from minigpt.protocol.request import Ask
from minigpt.stage.generation import StageSequence, generate
from minigpt.stage.schedule import Schedule

TENSORS = random_tensors(SMALL)
IDS = tuple(np.random.default_rng(2).integers(0, SMALL.vocab_size - 1, SMALL.n_positions).tolist())


class Link:
    """What a link to the next stage is to a sequence, without the link."""

    traffic = (0.0, 0.0, 0.0)

    def __init__(self, sequence: StageSequence) -> None:
        self.step = sequence.step


def chain(*bounds: int) -> StageSequence:
    """The first of a chain of sequences, one for each part of the model."""
    sequence: StageSequence | None = None
    for index, model in reversed(list(enumerate(cut(SMALL, TENSORS, *bounds)))):
        sequence = StageSequence(Schedule(model), Link(sequence) if sequence else None, stage=index)
    assert sequence is not None
    return sequence


def run(sequence: StageSequence, request: Generate) -> tuple[list[int], Reason]:
    steps, ids = generate(sequence, request), []
    while True:
        try:
            answer = next(steps)
        except StopIteration as end:
            return ids, end.value
        assert isinstance(answer, Tokens)
        ids += answer.ids


@pytest.mark.parametrize("bounds", [(1,), (3,), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("length", [1, 7, CHUNK + 5])
def test_a_cut_is_invisible_to_the_bit(bounds: tuple[int, ...], length: int) -> None:
    def logits(sequence: StageSequence) -> np.ndarray:
        (answer,) = generate(sequence, Generate(0, IDS[:length], 1, wanted=Wanted.LOGITS))
        assert isinstance(answer, Logits)
        return answer.values

    assert np.array_equal(logits(chain(*bounds)), logits(chain()))
    request = Generate(0, IDS[:length], 20, sampling=Sampling(1.0, seed=5), logprobs=True)
    assert run(chain(*bounds), request) == run(chain(), request)


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(0, 60))
def test_a_smaller_start_rewinds_to_the_tokens_of_a_fresh_run(length: int, start: int) -> None:
    start = min(start, length - 1)
    sequence = chain(2)
    run(sequence, Generate(0, IDS[:length], 9))
    again = run(sequence, Generate(start, IDS[start : length + 3], 9))
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
    sequence = chain(2)
    with pytest.raises(RequestRefused) as caught:
        run(sequence, request_)
    assert (caught.value.reason, caught.value.stage) == (reason, 0)
    assert sequence.cache.length == 0
    assert run(sequence, Generate(0, IDS[:3], 5)) == run(chain(), Generate(0, IDS[:3], 5))


def test_a_later_stage_refuses_hidden_states_that_do_not_fit() -> None:
    last = StageSequence(Schedule(cut(SMALL, TENSORS, 2)[1]), stage=1)
    ask = Ask(Wanted.TOKEN, Sampling())
    for start, shape in (
        (1, (1, SMALL.n_embd)),
        (0, (SMALL.n_positions + 1, SMALL.n_embd)),
        (0, (1, SMALL.n_embd - 1)),
    ):
        with pytest.raises(RequestRefused):
            last.step(start, np.zeros(shape, np.float32), ask)
    assert last.cache.length == 0


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

    tokens = []
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(generate(chain(2), Generate(0, IDS[:CHUNK] + IDS[:5], 9), check))
    assert len(tokens) == 2  # two chunks of the prompt with the first token, then one more


def test_spans_are_of_every_stage_in_order() -> None:
    (unasked,) = generate(chain(1, 2), Generate(0, IDS[:4], 1))
    assert unasked.spans == ()
    (answer,) = generate(chain(1, 2), Generate(0, IDS[:4], 1, spans=True))
    assert len(answer.spans) == 3
    assert all(isinstance(span, Span) and span.compute > 0 for span in answer.spans)
    assert answer.spans[0].wait >= answer.spans[1].compute


def test_log_probabilities_are_those_of_the_logits() -> None:
    (answer,) = generate(chain(2), Generate(0, IDS[:9], 1, logprobs=True))
    (asked,) = generate(chain(2), Generate(0, IDS[:9], 1, wanted=Wanted.LOGITS))
    assert isinstance(answer, Tokens)
    assert isinstance(asked, Logits)
    values = asked.values.astype(np.float64)
    assert answer.logprobs[0] == pytest.approx(values[answer.ids[0]] - np.log(np.exp(values).sum()), abs=1e-9)
