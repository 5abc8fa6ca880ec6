"""Drafted greedy decoding: the text of plain decoding to the letter, in fewer steps where it repeats itself."""

import json
import typing
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from chains import Chain, Rest, told
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ODD, SMALL, cut, odd, random_tensors, whole, write
from processes import Stages

import minigpt
from minigpt.__main__ import main
from minigpt.checkpoint import sources, weights
from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Generation, make_request
from minigpt.engine import drafting
from minigpt.engine.drafting import LONGEST, ROUNDING, SHORTEST, Lookup, settled
from minigpt.engine.model import GPT2
from minigpt.engine.sampling import Sampling
from minigpt.errors import MessageError, RequestRefused, StageError, UsageError
from minigpt.protocol import messages
from minigpt.protocol.batches import Batch, Result
from minigpt.protocol.links import StageLink
from minigpt.protocol.messages import CHUNK, MAX_DRAFT, Answer, Generate, Logits, Reason, Span, Tokens, Wanted
from minigpt.protocol.request import Ask, Options
from transport import codec

DRAFTS = (1, 4, 8, 30)
PROMPT = tuple(np.random.default_rng(4).integers(0, SMALL.vocab_size - 1, 12).tolist())


def run(models: list[GPT2], request: Generate) -> tuple[list[int], Reason, list[int]]:
    """The tokens, why they ended, and how many came at a time."""
    return follow(Chain(models), request)


def follow(chain: Chain, request: Generate) -> tuple[list[int], Reason, list[int]]:
    answers, reason = told(chain.run(request))
    ids: list[int] = []
    bursts = []
    for answer in answers:
        assert isinstance(answer, Tokens)
        assert answer.position == len(request.ids) + len(ids)
        assert len(answer.logprobs) == (len(answer.ids) if request.logprobs else 0)
        ids += answer.ids
        bursts.append(len(answer.ids))
    return ids, reason, bursts


class Script:
    """The rest of a model that says the same text whatever it is told."""

    dead: StageError | None = None
    traffic = (0.0, 0.0, 0.0)

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.asked: list[tuple[int, int, Wanted]] = []

    def open(self) -> int:
        return 0

    def send_batch(self, batch: Batch, asks: Sequence[Ask], missing: int = 0) -> None:
        ((_, start, rows, wanted, _),) = batch.segments
        self.asked.append((start, rows, wanted))

    def receive_answers(self) -> tuple[Result, ...]:
        start, rows, wanted = self.asked[-1]
        if wanted is Wanted.NOTHING:
            return (None,)
        after = start + rows
        first = start + 1 if wanted is Wanted.TOKENS else after
        return (Tokens(first, tuple(self.text[first : after + 1])),)

    def end(self, lanes: Sequence[int]) -> None:
        pass

    def usable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def script(text: list[int], length: int, **options: Any) -> tuple[list[int], Reason, list[int]]:
    """As `run`, where the model says this text and the prompt is its beginning."""
    return follow(scripted(Script(text)), Generate(0, tuple(text[:length]), len(text) - length, **options))


def scripted(said: Script) -> Chain:
    """A first stage before a script."""
    return Chain(cut(SMALL, tensors("plain", 0), 1)[:1], said)


@cache
def tensors(kind: str, seed: int) -> dict[str, np.ndarray]:
    """Random weights, of one of these kinds or of the odd architectures.

    - twins: tokens in pairs of equal embeddings, so that every step is a tie; or a quarter of them; or unequal in the
      last bits only.
    - wandering: positions weigh more than tokens, so that the text hardly repeats itself and guesses are wrong.
    """
    made = random_tensors(odd(kind) if kind in ODD else SMALL, seed)
    wte = made["wte.weight"]
    if "twins" in kind:
        pairs = 12 if kind == "some twins" else 48
        wte[1 : 2 * pairs : 2] = wte[0 : 2 * pairs : 2]
        if kind == "near twins":
            wte[1:96:2] *= 1 + np.random.default_rng(seed).uniform(-3e-7, 3e-7, (48, 1)).astype(np.float32)
    elif kind == "wandering":
        made["wpe.weight"] *= np.float32(4)
    return made


def prompts(seed: int) -> Iterator[tuple[int, ...]]:
    """A prompt, one that repeats itself, and one that does not."""
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(0, 96, 5).tolist())
    yield from (ids, ids * 4, tuple(rng.integers(0, 96, CHUNK + 2).tolist()))


KINDS = [name for name in ODD if odd(name).n_positions == SMALL.n_positions]
TWINS = ["twins", "some twins", "near twins"]


@pytest.mark.parametrize("kind", [*KINDS, *TWINS, "wandering"])
def test_the_text_is_that_of_plain_decoding(kind: str) -> None:
    config = odd(kind) if kind in ODD else SMALL
    cuts = [(), (2,), (1, 3)] if config.n_layer > 1 else [()]
    for seed, draft in enumerate(DRAFTS):
        models = cut(config, tensors(kind, seed), *cuts[seed % len(cuts)])
        for prompt in prompts(seed):
            plain, reason, bursts = run(models, Generate(0, prompt, 60))
            assert set(bursts) == {1}
            drafted = run(models, Generate(0, prompt, 60, draft=draft))
            assert drafted[:2] == (plain, reason), (seed, draft, len(prompt))
            assert max(drafted[2]) <= 1 + draft


def test_the_text_of_the_embedded_model_is_that_of_plain_decoding() -> None:
    model = minigpt.load("tiny")
    for prompt in ("The capital of France is", "Once", "Paris, Paris, Paris, Paris, Paris,", "a b c d " * 9):
        plain, drafted = (model.generate(prompt, max_tokens=60, draft=draft) for draft in (0, 8))
        assert [(token.id, token.text) for token in drafted] == [(token.id, token.text) for token in plain]
        assert drafted.reason == plain.reason


@cache
def circling() -> tuple[list[GPT2], list[int]]:
    """A model whose text soon goes round in circles, after PROMPT, and 140 tokens of that text."""
    for seed in range(20):
        models = cut(SMALL, tensors("plain", seed), 2)
        plain, _, _ = run(models, Generate(0, PROMPT, 140))
        if len(set(plain)) > 2 and len(run(models, Generate(0, PROMPT, 140, draft=8))[2]) < 50:
            return models, plain
    raise AssertionError("no random model repeats itself")


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_text_that_repeats_itself_takes_fewer_steps(draft: int) -> None:
    models, plain = circling()
    ids, _, bursts = run(models, Generate(0, PROMPT, 140, draft=draft))
    assert ids == plain
    assert max(bursts) == draft + 1
    assert len(bursts) < len(ids) * (0.75 if draft == 1 else 0.5)


def test_guesses_depend_on_the_sequence_alone() -> None:
    bounds = [(), (2,), (1, 2, 3)]
    runs = [run(cut(SMALL, tensors("some twins", 1), *cuts), Generate(0, PROMPT, 100, draft=6)) for cuts in bounds]
    assert runs[0] == runs[1] == runs[2]


def test_a_near_tie_is_decided_by_plain_steps_and_no_position_is_computed_so_twice() -> None:
    models = cut(SMALL, tensors("some twins", 0), 2)
    again = 0
    for seed in range(8):
        for prompt in prompts(seed):
            chain = Chain(models)
            follow(chain, Generate(0, prompt, 140, draft=8))
            asked = [step for step in typing.cast("Rest", chain.rest).asked if step[0] >= len(prompt)]
            plain = [start for start, _, wanted in asked if wanted is not Wanted.TOKENS]
            assert plain == sorted(set(plain))
            again += sum(wanted is Wanted.NOTHING for _, _, wanted in asked)
    assert again > 10


@pytest.mark.parametrize("letters", [2, 3, 4, 12])
def test_a_text_full_of_runs_that_mean_nothing_takes_hardly_more_steps(letters: int) -> None:
    for seed in range(5):
        text = np.random.default_rng(seed).integers(0, letters, 150).tolist()
        said = Script(text)
        assert follow(scripted(said), Generate(0, tuple(text[:20]), 130, draft=8))[0] == text[20:]
        assert len(said.asked) <= 134
        assert sum(rows > 1 for start, rows, _ in said.asked if start > 0) <= 5


def test_the_end_is_the_same_wherever_it_comes() -> None:
    models, plain = circling()
    for most in range(1, 40):
        drafted = run(models, Generate(0, PROMPT, most, draft=8))
        assert drafted[:2] == (plain[:most], Reason.LENGTH)
    for token in set(plain):
        drafted = run(models, Generate(0, PROMPT, 140, stop_ids=(token,), draft=8))
        assert drafted[:2] == (plain[: plain.index(token) + 1], Reason.END)
    for draft in DRAFTS:
        ids, reason, _ = run(models, Generate(0, PROMPT, 10**6, draft=draft))
        assert (ids[:140], len(ids), reason) == (plain, SMALL.n_positions - len(PROMPT) + 1, Reason.CONTEXT)


def test_a_stop_id_among_right_guesses_ends_there() -> None:
    text = [place % 7 for place in range(100)]
    for stop in range(7):
        for length in range(21, 28):
            ids, reason, bursts = script(text, length, stop_ids=(stop,), draft=8)
            assert (ids, reason) == script(text, length, stop_ids=(stop,))[:2]
            assert len(bursts) == min(2, len(ids))


def test_a_later_request_cannot_go_on_from_positions_that_were_drafted_past_the_end() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8] * 4
    for stop in range(1, 9):
        chain = scripted(Script(text))
        ids, _, _ = follow(chain, Generate(0, tuple(text[:16]), 16, stop_ids=(stop,), draft=8))
        assert chain.sequence.cache.length <= 16 + len(ids) - 1
        with pytest.raises(RequestRefused, match="positions are known"):
            next(chain.run(Generate(16 + len(ids), (1,), 1)))


def test_drawn_tokens_are_never_guessed() -> None:
    models, _ = circling()
    request = Generate(0, PROMPT, 60, sampling=Sampling(1.0, seed=3))
    drafted = Generate(0, PROMPT, 60, sampling=Sampling(1.0, seed=3), draft=8)
    assert run(models, drafted) == run(models, request)


def test_log_probabilities_are_those_of_plain_decoding_but_for_the_last_bits() -> None:
    models, _ = circling()
    found = []
    for draft in (0, 8):
        answers = Chain(models).run(Generate(0, PROMPT, 60, logprobs=True, draft=draft))
        found.append([value for answer in answers if isinstance(answer, Tokens) for value in answer.logprobs])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


# The bound


@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
@pytest.mark.parametrize("rows", [2, 5, 9])
def test_rows_computed_together_differ_by_far_less_than_the_bound(kind: str, rows: int) -> None:
    if kind == "tiny":
        folder = sources.find("tiny").folder
        config = sources.read_config(folder)
        models = [GPT2(config, range(config.n_layer), weights.load(folder, config, range(config.n_layer)).tensors)]
    else:
        config = odd(kind)
        models = cut(config, tensors(kind, 0))
    model = models[0]
    ids = np.random.default_rng(rows).integers(0, config.vocab_size, 5 + 12 * rows)
    together, alone = model.new_cache(), model.new_cache()
    for cache_ in (together, alone):
        model.forward(model.embed(ids[:5], 0), [(cache_, 5)])
    for start in range(5, len(ids), rows):
        ours = model.logits(model.forward(model.embed(ids[start : start + rows], start), [(together, rows)]))
        for row, position in enumerate(range(start, start + rows)):
            plain = model.logits(model.forward(model.embed(ids[position : position + 1], position), [(alone, 1)]))[0]
            assert np.abs(ours[row] - plain).max() < ROUNDING / 3 * np.abs(plain).max()


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6), st.data())
def test_what_is_settled_is_the_likeliest_however_the_rounding_falls(values: list[float], data: st.DataObject) -> None:
    logits = np.array(values, np.float32)
    token = int(logits.argmax())
    off = float(np.abs(logits).max()) * ROUNDING * 0.999
    moved = (
        logits
        + off
        * np.array(data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=len(values), max_size=6)))[: len(values)]
    )
    if settled(logits, token):
        assert int(moved.argmax()) == token


def test_a_tie_is_never_settled() -> None:
    assert not settled(np.zeros(3, np.float32), 0)
    assert not settled(np.array([1, 5, 2, 5], np.float32), 1)
    assert not settled(np.array([-1e5, 5, 5.5], np.float32), 2)  # of logits so large, half is a matter of rounding
    assert settled(np.array([1, 5, 2, 4.9], np.float32), 1)


# The guesses


def followers(ids: list[int], demanded: int) -> list[int]:
    """What followed the last place of the longest run, by the definition."""
    for length in range(len(ids) - 1, demanded - 1, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[len(ids) - length :]:
                follow = ids[end:]
                while len(follow) < length:
                    follow = follow + follow
                return follow[:length]
    return []


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_the_longest_run_that_stood_before_says_what_follows(ids: list[int], given_: int, most: int) -> None:
    lookup = Lookup(ids[:given_])
    lookup.extend(ids[given_:])
    assert lookup.guess(most) == followers(ids, SHORTEST)[:most]


def test_wrong_guesses_demand_longer_runs_and_right_ones_shorter() -> None:
    lookup = Lookup([1, 2, 3, 4, 1, 2, 3])
    lookup.learn(4, 2)
    assert lookup.guess(4) == [4, 1, 2]
    lookup.learn(4, 1)
    assert lookup.guess(4) == []
    lookup.learn(4, 4)
    assert lookup.guess(4) == [4, 1, 2]
    for _ in range(20):
        lookup.learn(4, 0)
    lookup.extend([9] * (LONGEST + 1))
    assert len(lookup.guess(5)) == 5


# What is sent


@pytest.mark.parametrize(
    ("example", "changes"),
    [
        (Generate(0, (1,), 5), {"wanted": "tokens"}),
        (Generate(0, (1,), 5), {"wanted": "nothing"}),
        (Generate(0, (1,), 5), {"draft": -1}),
        (Generate(0, (1,), 5), {"draft": MAX_DRAFT + 1}),
        (Generate(0, (1,), 5), {"draft": True}),
        (Tokens(3, (1, 2), (-0.5, -0.5)), {"ids": bytes(4)}),
        (Tokens(3, (1, 2), (-0.5, -0.5)), {"ids": b""}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Generate | Tokens) else str(value),
)
def test_a_message_that_makes_no_sense_is_refused(example: messages.Message, changes: dict[str, object]) -> None:
    value = typing.cast("dict[str, object]", codec.decode(codec.encode(messages.encode(example))))
    messages.decode(value)
    with pytest.raises(MessageError):
        messages.decode(value | changes)


def test_an_answer_must_fit_its_step() -> None:
    logits = Logits(9, np.zeros(3, np.float32))
    fitting: dict[Wanted, list[Answer]] = {
        Wanted.TOKEN: [Tokens(9, (1,))],
        Wanted.TOKENS: [Tokens(7, ()), Tokens(7, (1,)), Tokens(7, (1, 2, 3))],
        Wanted.LOGITS: [logits],
        Wanted.NOTHING: [],
    }
    others = [Tokens(9, ()), Tokens(9, (1, 2)), Tokens(8, (1,)), Tokens(7, (1, 2, 3, 4)), Tokens(9, (1,), (0.0,))]
    answers = [answer for good in fitting.values() for answer in good] + others
    for wanted, good in fitting.items():
        assert [answer for answer in answers if Ask(wanted, Sampling()).fits(answer, 6, 3)] == good
    assert Ask(Wanted.TOKENS, Sampling(), True).fits(Tokens(7, (1, 2), (-0.5, -0.5)), 6, 3)
    assert not Ask(Wanted.TOKENS, Sampling(), True).fits(Tokens(7, (1, 2)), 6, 3)


@pytest.mark.parametrize("draft", [-1, MAX_DRAFT + 1])
def test_a_draft_out_of_range_is_refused_in_words(draft: int) -> None:
    with pytest.raises(UsageError, match="draft"):
        make_request([1], None, SMALL, Options(draft=draft))
    assert make_request([1], None, SMALL, Options(draft=MAX_DRAFT)).draft == MAX_DRAFT


@pytest.mark.parametrize("default", [0, 6])
def test_where_a_request_says_nothing_the_first_stage_decides(default: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "DRAFT", default)
    request = messages.decode(messages.encode(make_request(PROMPT, None, SMALL, Options(max_tokens=100))))
    assert isinstance(request, Generate)
    assert (request.draft, request.most) == (None, 1 + MAX_DRAFT)
    model = whole()
    asked = list(Chain([model]).run(request))
    told = [answer.ids for answer in asked if isinstance(answer, Tokens)]
    assert (max(map(len, told)) > 1) == (default > 0)
    sampled = make_request(PROMPT, None, SMALL, Options(max_tokens=100, temperature=1.0))
    assert sampled.most == 1
    assert all(len(answer.ids) == 1 for answer in Chain([model]).run(sampled) if isinstance(answer, Tokens))


# The client


def test_tokens_that_came_together_have_one_time_and_equal_parts() -> None:
    def answers() -> Generator[Answer, None, Reason]:
        yield Tokens(1, (5,), (), (Span(2.0, 0.0, 0.0, 0.0, 30.0),))
        yield Tokens(2, (6, 7, 8), (-1.0, -2.0, -3.0), (Span(3.0, 0.0, 0.0, 0.0, 30.0),))
        return Reason.LENGTH

    made = Generation(answers(), Generate(0, (1,), 4), SMALL)
    assert [(token.id, token.logprob) for token in made] == [(5, None), (6, -1.0), (7, -2.0), (8, -3.0)]
    assert len(made.times) == 4
    assert len(set(made.times[1:])) == 1
    assert [spans[0].bytes for spans in made.spans] == [30.0, 10.0, 10.0, 10.0]


def test_a_stop_string_among_tokens_that_came_together_ends_there() -> None:
    model = minigpt.load("tiny")
    prompt = "one, two, one, two, one, two, one,"
    whole = "".join(token.text or "" for token in model.generate(prompt, max_tokens=40))
    for place in range(1, 40, 5):
        stop = whole[place : place + 3]
        plain, drafted = (model.generate(prompt, max_tokens=40, stop=[stop], draft=draft) for draft in (0, 8))
        assert list(plain) == list(drafted)
        assert (plain.reason, len(plain.times)) == (drafted.reason, len(drafted.times))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    seed = next(seed for seed in range(20) if tensors("plain", seed)["wte.weight"] is circling()[0][0].wte)
    folder = write(tmp_path_factory.mktemp("model") / "small", SMALL, tensors("plain", seed))
    with Stages(folder, "1+2+1", tmp_path_factory.mktemp("stages")) as made:
        yield made.start_all()


@pytest.fixture
def pipeline(stages: Stages) -> Iterator[Pipeline]:
    with Pipeline.connect(stages.path, allow_mock=True) as made:
        yield made


def test_a_pipeline_of_processes_gives_the_text_of_plain_decoding(pipeline: Pipeline) -> None:
    _, plain = circling()
    drafted = pipeline.generate(PROMPT, max_tokens=140, draft=8, logprobs=True, spans=True)
    found = list(drafted)
    assert [token.id for token in found] == plain
    assert all(token.logprob is not None for token in found)
    assert len(set(drafted.times)) < 70
    assert [len(spans) for spans in drafted.spans] == [4] * 140


def test_a_drafted_request_can_be_left_at_any_token(pipeline: Pipeline) -> None:
    _, plain = circling()
    for count in (1, 30, 60):
        left = pipeline.generate(PROMPT, max_tokens=140, draft=8)
        assert [next(left).id for _ in range(count)] == plain[:count]
        left.close()
        assert left.reason == Reason.CANCELLED
    assert [token.id for token in pipeline.generate(PROMPT, max_tokens=140, draft=8)] == plain


def test_more_tokens_at_once_than_were_asked_for_are_refused(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ids in ((), (1, 2, 3, 4)):
        monkeypatch.setattr(StageLink, "receive", lambda _, ids=ids: Tokens(len(PROMPT), ids))
        with pytest.raises(StageError, match="tokens at once"):
            next(pipeline.generate(PROMPT, draft=2))


def test_the_command_line_drafts_and_tells_how_many_steps_it_took(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain = circling()
    prompt = " ".join(map(str, PROMPT))
    command = ["generate", prompt, "--manifest", str(stages.path), "--allow-mock", "--max-tokens", "90"]
    assert main([*command, "--draft", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [token["id"] for token in told["tokens"]] == plain[:90]
    assert told["steps"] < 60
    assert main([*command, "--draft", "8"]) == 0
    assert f"90 tokens in {told['steps']} steps" in capsys.readouterr().err
    assert main([*command, "--draft", "65"]) == 2
    assert "draft is 65" in capsys.readouterr().err
