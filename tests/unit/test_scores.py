"""Scores, likely ids, penalties and bias through stages: what one process computes, whoever shares the passes."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from chains import Chain, Rest, told
from made import SMALL, cut, random_tensors

from minigpt.engine.model import GPT2
from minigpt.engine.penalties import adjusted
from minigpt.engine.sampling import Sampling, sample, scored
from minigpt.engine.scoring import scores
from minigpt.errors import RequestRefused
from minigpt.protocol.batches import NO_ROWS, Batch, Given, Segment, Terms
from minigpt.protocol.messages import CHUNK, Answer, Generate, Reason, Refusal, Scores, Tokens, Wanted
from minigpt.protocol.request import Ask, Replies
from minigpt.stage.layers import Layers

TENSORS = random_tensors(SMALL)
V = SMALL.vocab_size
IDS = tuple(np.random.default_rng(2).integers(0, V - 1, SMALL.n_positions).tolist())
BOUNDS: list[tuple[int, ...]] = [(), (2,), (1, 3)]
OPTIONS = [
    Sampling(repetition_penalty=1.3),
    Sampling(presence_penalty=1.5),
    Sampling(frequency_penalty=0.75),
    Sampling(logit_bias=((3, 4.0), (17, -100.0), (60, 2.5))),
    Sampling(1.0, seed=3, min_p=0.1),
    Sampling(0.9, 40, 0.95, 5, 0.02, 1.2, 0.5, -0.5, ((3, 2.0),)),
    Sampling(1.0, seed=9),
    Sampling(),
]


def chain(*bounds: int) -> Chain:
    return Chain(cut(SMALL, TENSORS, *bounds))


def checked(request: Generate, answers: Sequence[Answer], reason: Reason) -> None:
    """Takes the answers as a client would: none is refused."""
    replies = Replies(request, SMALL, 1)
    for answer in answers:
        replies.take(answer)
    assert replies._reason is reason


def drawn(answers: Sequence[Answer]) -> list[int]:
    return [token for answer in answers if isinstance(answer, Tokens) for token in answer.ids]


def expected(sampling: Sampling, prompt: tuple[int, ...], count: int, generated: Sequence[int] = ()) -> list[int]:
    """The tokens of a plain loop over the whole model."""
    model = GPT2(SMALL, range(SMALL.n_layer), TENSORS)
    cache, answer = model.new_cache(), list(generated)
    fed = [*prompt, *answer]
    for _ in range(count):
        x = model.forward(model.embed(fed, cache.length), [(cache, len(fed))])
        logits = adjusted(model.logits(x[-1:])[0], sampling, prompt, answer)
        fed = [sample(logits, sampling, cache.length)]
        answer += fed
    return answer[len(generated) :]


@pytest.mark.parametrize("sampling", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_the_tokens_are_those_of_a_plain_loop(bounds: tuple[int, ...], sampling: Sampling) -> None:
    request = Generate(0, IDS[:9], 30, sampling=sampling, logprobs=True, top=5, draft=8)
    answers, reason = told(chain(*bounds).run(request))
    checked(request, answers, reason)
    assert drawn(answers) == expected(sampling, IDS[:9], 30)
    if sampling.adjusts:
        assert {len(answer.ids) for answer in answers if isinstance(answer, Tokens)} == {1}


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_log_probabilities_are_the_models_own_whatever_is_adjusted(bounds: tuple[int, ...]) -> None:
    plain, _ = told(chain(*bounds).run(Generate(0, IDS[:9], 1, top=20, logprobs=True)))
    biased, _ = told(
        chain(*bounds).run(Generate(0, IDS[:9], 1, sampling=Sampling(logit_bias=((5, 1e9),)), top=20, logprobs=True))
    )
    assert isinstance(plain[0], Tokens)
    assert isinstance(biased[0], Tokens)
    assert biased[0].ids == (5,)
    assert biased[0].top == plain[0].top
    assert plain[0].top[0] == (plain[0].ids[0], plain[0].logprobs[0])
    assert biased[0].logprobs[0] < plain[0].logprobs[0]


@pytest.mark.parametrize("sampling", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("seam", [1, 7, 29])
def test_delivered_tokens_count_as_generated(sampling: Sampling, seam: int) -> None:
    prompt, whole = IDS[:9], expected(sampling, IDS[:9], 30)
    rest = Generate(0, (*prompt, *whole[:seam]), 30 - seam, sampling=sampling, delivered=seam)
    assert drawn(told(chain(2).run(rest))[0]) == whole[seam:]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("length", [2, 3, CHUNK, CHUNK + 1, CHUNK + 2, SMALL.n_positions])
def test_scores_are_those_of_the_whole_model_for_texts_of_any_length(bounds: tuple[int, ...], length: int) -> None:
    request = Generate(0, IDS[:length], 1, wanted=Wanted.SCORES, top=3)
    made = chain(*bounds)
    answers, reason = told(made.run(request))
    checked(request, answers, reason)
    model = GPT2(SMALL, range(SMALL.n_layer), TENSORS)
    x = model.forward(model.embed(IDS[: length - 1], 0), [(model.new_cache(), length - 1)])
    wanted = scores(model, x, IDS[1:length], 3)
    got = [logprob for answer in answers if isinstance(answer, Scores) for logprob in answer.logprobs]
    assert got == pytest.approx([one.logprob for one in wanted], abs=1e-4)
    top = [pair for answer in answers if isinstance(answer, Scores) for pair in answer.top]
    assert [logprob for _, logprob in top] == pytest.approx([p for one in wanted for _, p in one.top], abs=1e-4)
    assert reason is Reason.SCORES
    assert len(answers) == -(-(length - 1) // CHUNK)
    again, _ = told(made.run(Generate(length - 1, IDS[length - 1 : length], 3)))  # goes on from what was scored
    assert drawn(again) == drawn(told(chain().run(Generate(0, IDS[:length], 3)))[0])


def test_scores_to_the_bit_wherever_it_is_cut() -> None:
    request = Generate(0, IDS, 1, wanted=Wanted.SCORES, top=20)
    assert told(chain(1, 3).run(request)) == told(chain(2).run(request)) == told(chain().run(request))


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_others_in_the_same_passes_change_nothing(bounds: tuple[int, ...]) -> None:
    made = chain(*bounds)
    requests = [
        Generate(0, IDS[n : n + 9], 20, sampling=one, logprobs=n % 2 > 0, top=n) for n, one in enumerate(OPTIONS)
    ]
    requests += [Generate(0, IDS[n : n + 230], 1, wanted=Wanted.SCORES, top=n) for n in range(3)]
    found: dict[int, tuple[list[Answer], Reason]] = {}
    together = threading.Barrier(len(requests), timeout=60)

    def run(number: int) -> None:
        sequence = made.new()
        together.wait()
        found[number] = told(made.schedule.run(sequence, requests[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, request in enumerate(requests):
        answers, reason = found[number]
        checked(request, answers, reason)
        if request.wanted is Wanted.TOKEN:
            assert drawn(answers) == expected(request.sampling, request.ids, 20)
        else:
            alone = [one for answer in told(chain().run(request))[0] for one in answer.logprobs]  # type: ignore[union-attr]
            together_ = [one for answer in answers for one in answer.logprobs]  # type: ignore[union-attr]
            assert together_ == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Generate(0, IDS[:1], 1, wanted=Wanted.SCORES), "bad-request"),
        (Generate(0, (), 1, wanted=Wanted.SCORES), "bad-request"),
        (Generate(0, (1, V), 1, wanted=Wanted.SCORES), "bad-token"),
        (Generate(0, (*IDS, 1), 1, wanted=Wanted.SCORES), "too-long"),
        (Generate(0, IDS[:3], 1, sampling=Sampling(logit_bias=((1, 1.0), (V, 1.0)))), "bad-token"),
        (Generate(3, IDS[:3], 1, sampling=Sampling(repetition_penalty=1.2)), "bad-request"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_before_anything_is_computed(request_: Generate, reason: str) -> None:
    made = chain(2)
    told(made.run(Generate(0, IDS[:3], 1)))
    with pytest.raises(RequestRefused) as caught:
        told(made.run(request_))
    assert (caught.value.reason, caught.value.stage) == (reason, 0)


def last() -> Rest:
    return Rest(Layers(cut(SMALL, TENSORS, 2)[1], 1), None, 2)


REPETITION, PRESENCE = Sampling(repetition_penalty=1.2), Sampling(presence_penalty=1.0)
TOKEN, SCORED = Wanted.TOKEN, Wanted.SCORES


@pytest.mark.parametrize(
    ("sampling", "wanted", "rows", "given", "reason"),
    [
        (REPETITION, TOKEN, 4, Given((1,), (2, 3)), None),
        (REPETITION, TOKEN, 4, Given((1, 1, 1, 1), ()), None),
        (PRESENCE, TOKEN, 4, Given(), None),
        (PRESENCE, TOKEN, 4, Given((1,), ()), None),
        (Sampling(), SCORED, 2, Given((1, 1)), None),
        (REPETITION, TOKEN, 4, Given(), "bad-request"),
        (REPETITION, TOKEN, 4, Given((1,), (3, 2)), "bad-request"),
        (REPETITION, TOKEN, 4, Given((1,), (2, 2)), "bad-request"),
        (REPETITION, TOKEN, 4, Given((2,), (1, 2)), "bad-request"),
        (REPETITION, TOKEN, 4, Given((1, 1), (2, 3, 4)), "bad-request"),
        (REPETITION, TOKEN, 4, Given((V,), ()), "bad-token"),
        (REPETITION, TOKEN, 4, Given((), (2**32 - 1,)), "bad-token"),
        (REPETITION, Wanted.NOTHING, 4, Given((1,)), "bad-request"),
        (REPETITION, Wanted.LOGITS, 4, Given((1,)), "bad-request"),
        (REPETITION, Wanted.TOKENS, 4, Given(), "bad-request"),
        (PRESENCE, Wanted.TOKENS, 4, Given(), "bad-request"),
        (Sampling(logit_bias=((1, 1.0),)), Wanted.TOKENS, 4, Given(), "bad-request"),
        (PRESENCE, TOKEN, 4, Given((1,), (2,)), "bad-request"),
        (Sampling(), TOKEN, 4, Given((1,)), "bad-request"),
        (Sampling(logit_bias=((1, 1.0),)), TOKEN, 4, Given((1,)), "bad-request"),
        (Sampling(logit_bias=((V, 1.0),)), TOKEN, 4, Given(), "bad-token"),
        (Sampling(), SCORED, 2, Given(), "bad-request"),
        (Sampling(), SCORED, 2, Given((1,)), "bad-request"),
        (Sampling(), SCORED, 2, Given((1, 2, 3)), "bad-request"),
        (Sampling(), SCORED, 2, Given((1, V)), "bad-token"),
        (Sampling(), SCORED, 2, Given((1, 2), (3,)), "bad-request"),
    ],
    ids=str,
)
def test_a_later_stage_refuses_a_lane_with_ids_that_are_not_those_it_needs_and_computes_the_others(
    sampling: Sampling, wanted: Wanted, rows: int, given: Given, reason: str | None
) -> None:
    stage = last()
    hidden = np.random.default_rng(1).standard_normal((rows + 2, SMALL.n_embd), np.float32)
    segments = (Segment(0, 0, rows, wanted, given), Segment(1, 0, 2, TOKEN))
    terms = ((0, Terms(9, sampling)), (1, Terms(9, Sampling())))
    stage.send_batch(Batch(segments, hidden, terms), [Ask(wanted, sampling), Ask(TOKEN, Sampling())])
    one, other = stage.receive_answers()
    assert isinstance(other, Tokens)
    if reason is None:
        assert isinstance(one, Tokens | Scores)
    else:
        assert isinstance(one, Refusal)
        assert (one.stage, one.reason) == (1, reason)


def test_a_bias_outside_the_vocabulary_opens_no_lane_and_ends_one_that_is_open() -> None:
    stage, hidden = last(), np.zeros((1, SMALL.n_embd), np.float32)

    def said(lane: int, start: int, *terms: Terms) -> str:
        batch = Batch((Segment(lane, start, 1, TOKEN),), hidden, tuple((lane, one) for one in terms))
        stage.send_batch(batch, [Ask(TOKEN, Sampling())])
        (answer,) = stage.receive_answers()
        return answer.reason if isinstance(answer, Refusal) else "token"

    bad = Terms(9, Sampling(logit_bias=((V, 1.0),)))
    assert said(0, 0, bad) == "bad-token"
    assert said(0, 0) == "lane"
    assert said(1, 0, Terms(9, Sampling())) == "token"
    assert said(1, 1, bad) == "bad-token"
    assert said(1, 1) == "lane"
    assert len(stage.lanes) == 0
    stage.send_batch(Batch((), NO_ROWS), [])
    assert stage.receive_answers() == ()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_what_is_damaged_is_refused_and_the_others_of_the_pass_are_not() -> None:
    layers = Layers(GPT2(SMALL, range(2, 4), TENSORS), 1)
    stage = Rest(layers, None, 2)
    hidden = np.zeros((4, SMALL.n_embd), np.float32)
    hidden[0] = 3e38  # finite, and not what follows from it
    segments = (
        Segment(0, 0, 2, SCORED, Given((1, 2))), Segment(1, 0, 1, TOKEN, Given((), (1,))), Segment(2, 0, 1, TOKEN),
    )  # fmt: skip
    terms = ((0, Terms(9, Sampling())), (1, Terms(9, REPETITION)), (2, Terms(9, Sampling())))
    asks = [Ask(SCORED, Sampling()), Ask(TOKEN, REPETITION), Ask(TOKEN, Sampling())]
    stage.send_batch(Batch(segments, hidden, terms), asks)
    first, *others = stage.receive_answers()
    assert isinstance(first, Refusal)
    assert first.reason == "not-finite"
    assert all(isinstance(other, Tokens) for other in others)


def test_drafted_tokens_have_their_own_likely_ids() -> None:
    prompt = IDS[:6] * 8
    request = Generate(0, prompt, 24, logprobs=True, top=3, draft=8)
    answers, reason = told(chain(2).run(request))
    checked(request, answers, reason)
    model = GPT2(SMALL, range(SMALL.n_layer), TENSORS)
    ids = [*prompt, *drawn(answers)]
    x = model.forward(model.embed(ids[:-1], 0), [(model.new_cache(), len(ids) - 1)])
    wanted = [
        scored(row, token, 3) for row, token in zip(model.logits(x)[len(prompt) - 1 :], drawn(answers), strict=True)
    ]
    top = [pair for answer in answers if isinstance(answer, Tokens) for pair in answer.top]
    assert [logprob for _, logprob in top] == pytest.approx([p for one in wanted for _, p in one.top], abs=1e-4)
