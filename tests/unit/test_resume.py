"""An answer goes on over another link: what is asked again, what is not, and how the text continues over the seam.

Faults are scripted and the clock is the test's. The links of the second half are the real first stage's schedule in
this process, which dies after as many answers as a test says.
"""

import asyncio
import threading
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from made import SMALL
from processes import eventually

from attest.providers.mock import MockPins, MockRoot
from minigpt.checkpoint import sources, tokenizer, weights
from minigpt.client.pipeline import Pipeline
from minigpt.client.pool import Pool
from minigpt.client.resume import DEATHS, FIRST, LAST, Resumption
from minigpt.client.text import Token
from minigpt.engine.model import GPT2
from minigpt.engine.sampling import Sampling
from minigpt.errors import (
    LateStage,
    ManifestError,
    MessageError,
    RequestRefused,
    StageError,
    UnreachableStage,
    UntrustedStage,
)
from minigpt.launch.plan import write
from minigpt.protocol import messages
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.batches import Terms
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import Answer, Cancel, Done, Generate, Logits, Message, Reason, Refusal, Tokens, Wanted
from minigpt.serve.service import Service
from minigpt.stage.layers import Layers
from minigpt.stage.schedule import Schedule
from minigpt.stage.sequence import Sequence as MadeSequence

GONE = StageError("stage 0 is gone: the connection ended", stage=0)
AWAY = UnreachableStage("stage 0 cannot be reached: connection refused", stage=0)
DRAINING = RequestRefused("stage 0 ends: dial again", reason="draining", stage=0)
BUSY = RequestRefused("stage 0 is busy", reason="busy", stage=0)
STOP = 7
REQUEST = Generate(0, (1, 2, 3), 6, (STOP,), Sampling(0.9, seed=5), logprobs=True, draft=4, spans=True)


class Told:
    """A resumption with the test's clock, and chance that always waits longest."""

    def __init__(self, request: Generate = REQUEST, retry_for: float = 30.0) -> None:
        self.now = 100.0
        self.interruptions: list[str] = []
        self.one = Resumption(request, SMALL.n_positions, retry_for, self.interruptions, lambda: self.now, lambda: 1.0)
        self.one.rest()

    def answered(self, *ids: int) -> None:
        self.one.told(Tokens(0, ids))

    def fault(self, error: StageError | RequestRefused, *, again: bool = True) -> float | None:
        return self.one.fault(error, again=again)

    def ends(self, error: StageError | RequestRefused, *, again: bool = True) -> str:
        """What the request ends with: an error of the same kind, about the same stage."""
        with pytest.raises(type(error)) as caught:
            self.fault(error, again=again)
        assert type(caught.value) is type(error)
        assert caught.value.stage == error.stage
        return str(caught.value)


def test_what_is_asked_again_is_the_rest_and_nothing_else_changes() -> None:
    made = Told()
    made.answered(10)
    made.answered(11, 12)  # a drafted step
    assert made.fault(GONE) == FIRST
    rest = made.one.rest()
    assert (rest.ids, rest.max_tokens, rest.delivered) == ((1, 2, 3, 10, 11, 12), 3, 3)
    assert (rest.start, rest.stop_ids, rest.sampling) == (0, (STOP,), REQUEST.sampling)
    assert (rest.logprobs, rest.draft, rest.spans, rest.wanted) == (True, 4, True, Wanted.TOKEN)


@pytest.mark.parametrize("wanted", [Wanted.TOKEN, Wanted.LOGITS])
def test_what_died_in_its_prompt_is_asked_again_as_it_was(wanted: Wanted) -> None:
    request = Generate(0, (1, 2, 3), 6, wanted=wanted)
    made = Told(request)
    assert made.fault(GONE) is not None
    assert made.one.rest() is request


@pytest.mark.parametrize(
    ("ids", "reason"),
    [((1, 2, 3, 4, 5, 6), Reason.LENGTH), ((1, STOP), Reason.END), ((STOP,), Reason.END)],
)
def test_a_request_that_lost_only_its_done_is_complete(ids: Sequence[int], reason: Reason) -> None:
    made = Told()
    made.answered(*ids)
    assert made.fault(GONE) is None
    assert made.one.reason is reason
    assert made.interruptions == []


def test_a_request_that_filled_the_context_is_complete_without_its_done() -> None:
    made = Told(Generate(0, (1,) * SMALL.n_positions, 5))
    made.answered(4)
    assert (made.fault(GONE), made.one.reason) == (None, Reason.CONTEXT)


def test_logits_that_arrived_are_complete_without_their_done() -> None:
    made = Told(Generate(0, (1,), 1, wanted=Wanted.LOGITS))
    made.one.told(Logits(1, None))  # type: ignore[arg-type]
    assert (made.fault(GONE), made.one.reason) == (None, Reason.LOGITS)


def test_what_is_got_over_is_told_once_answers_come_again() -> None:
    made = Told()
    made.answered(1)
    for error in (GONE, AWAY, AWAY):
        assert made.fault(error) is not None
        assert made.interruptions == []
    made.answered(2)
    assert made.interruptions == [str(GONE)]
    assert made.fault(DRAINING) == FIRST  # the waits begin again
    made.answered(3)
    made.answered(4)
    assert made.interruptions == [str(GONE), str(DRAINING)]


def test_a_request_that_saw_two_deaths_is_given_up() -> None:
    made = Told()
    made.answered(1)
    assert made.fault(GONE) is not None
    made.answered(2)
    said = made.ends(StageError("stage 1 is gone", stage=1))
    assert f"stage 1 is gone; 2 tokens had arrived; a link or stage has died {DEATHS} times" in said
    assert said.endswith(f"Before, {GONE}")


def test_a_stage_that_cannot_be_reached_has_not_died_of_the_request() -> None:
    made = Told()
    made.answered(1)
    for error in (GONE, AWAY, AWAY, DRAINING, AWAY):
        assert made.fault(error) is not None


def test_waits_double_up_to_two_seconds_and_end_with_the_time_allowed() -> None:
    made, waits = Told(retry_for=7.0), []
    made.answered(1)
    assert made.fault(GONE) == FIRST
    while made.now < 107:
        wait = made.fault(AWAY)
        assert wait is not None
        waits.append(wait)
        made.now += wait
    assert waits[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, LAST]
    assert sum(waits) == pytest.approx(7.0)  # the last was shorter
    assert made.ends(AWAY) == f"{AWAY}; 1 token had arrived; given up after 7.0 s of trying"


def test_the_time_allowed_begins_again_when_answers_have_come() -> None:
    made = Told(retry_for=7.0)
    made.fault(AWAY)
    made.now += 6
    made.answered(1)
    made.now += 1000
    assert made.fault(GONE) is not None
    made.now += 6.9
    assert made.fault(AWAY) == pytest.approx(0.1)
    made.now += 0.1
    assert "1 token had arrived; given up" in made.ends(AWAY)


@pytest.mark.parametrize(
    "error",
    [
        UntrustedStage("stage 0: evidence refused", stage=0),
        MessageError("stage 0 sent something wrong", stage=0),
        LateStage("stage 0 did not answer in time", stage=0),
        RequestRefused("too long", reason="too-long", stage=0),
        RequestRefused("damaged", reason="not-finite", stage=1),
    ],
)
@pytest.mark.parametrize("after", [None, GONE])
def test_what_another_link_would_not_change_is_never_tried_again(
    error: StageError | RequestRefused, after: StageError | None
) -> None:
    made = Told()
    made.answered(1)
    made.answered(2)
    if after is not None:
        made.fault(after)
    assert made.ends(error) == f"{error}; 2 tokens had arrived"


def test_busy_is_waited_for_only_by_whoever_had_a_place() -> None:
    assert Told().ends(BUSY) == str(BUSY)
    made = Told()
    made.fault(GONE)
    assert made.fault(BUSY) is not None


def test_draining_is_waited_for_from_the_first() -> None:
    assert Told().fault(DRAINING) == FIRST


@pytest.mark.parametrize(("retry_for", "again"), [(0.0, True), (30.0, False)])
def test_without_retries_the_first_fault_ends_it_and_says_how_far_it_got(retry_for: float, again: bool) -> None:
    made = Told(retry_for=retry_for)
    assert made.ends(GONE, again=again) == f"{GONE}; no token had arrived"
    made.answered(1, 2)
    assert made.ends(GONE, again=again) == f"{GONE}; 2 tokens had arrived"


@pytest.mark.parametrize(("delivered", "count"), [(-1, 3), (3, 3), (4, 3), (1, 1)])
def test_more_delivered_than_there_are_ids_after_the_first_is_no_message(delivered: int, count: int) -> None:
    plain = messages.encode(Generate(0, (1,) * count, 1)) | {"delivered": delivered}
    with pytest.raises(MessageError, match="delivered"):
        messages.decode(plain)


def test_delivered_is_left_out_where_it_is_0_and_too_many_ids_are_refused_with_it_too() -> None:
    assert "delivered" not in messages.encode(Generate(0, (1, 2), 1))
    sent = Generate(0, (1, 2, 3), 1, delivered=2)
    assert messages.decode(messages.encode(sent)) == sent
    with pytest.raises(RequestRefused, match="3 positions"):
        messages.decode(messages.encode(sent), positions=2)
    with pytest.raises(MessageError, match="delivered"):
        messages.decode(messages.encode(sent) | {"delivered": 3}, positions=2)


# The pipeline over links that die.


class Dying:
    """A link to a first stage in this process, which dies after so many answers, or says something else instead."""

    traffic = (0.0, 0.0, 0.0)

    def __init__(self, model: GPT2, answers: int, last: Exception | None = GONE) -> None:
        self.channel = self
        self.asked: list[Generate] = []
        self.cancelled = False
        self._model = model
        self._left = answers
        self._last = last
        self._answers: Generator[Answer, None, Reason] | None = None
        self.ended = False

    def abort(self) -> None:
        self.ended = True

    close = abort

    @property
    def stale(self) -> bool:
        return self.ended

    def usable(self) -> bool:
        return not self.ended

    def send(self, message: Message) -> None:
        if isinstance(message, Cancel):
            self.cancelled = True
            return
        assert isinstance(message, Generate)
        self.asked.append(message)
        sequence = MadeSequence(self._model.new_cache(), Terms(1, message.sampling))
        self._answers = Schedule(Layers(self._model)).run(sequence, message)

    def receive(self) -> Message:
        if self.cancelled:
            return Done(Reason.CANCELLED)
        if self._left == 0 and self._last is not None:
            raise self._last
        self._left -= 1
        assert self._answers is not None
        try:
            return next(self._answers)
        except StopIteration as end:
            return Done(end.value)


@pytest.fixture(scope="module")
def tiny() -> GPT2:
    folder = sources.find("tiny").folder
    config = sources.read_config(folder)
    layers = range(config.n_layer)
    return GPT2(config, layers, weights.load(folder, config, layers).tensors)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    folder = sources.find("tiny").folder
    config = sources.read_config(folder)
    return Manifest.parse(
        write(
            config=config, model="tiny", revision=None, tokenizer_sha256=None, layers=[range(config.n_layer)],
            weights_sha256=[bytes(31) + b"w"],
            pins=[MockPins(MockRoot.generate().public, frozenset([bytes(47) + b"m"]))],
        )
    )  # fmt: skip


ENDLESS = -1


def pipeline(manifest: Manifest, script: Sequence[Any], **options: Any) -> Pipeline:
    """A pipeline that has had a link, and whose next are these; an exception is that of a dial."""
    made = Pipeline(
        manifest, Addresses(1, None), tokenizer.load(sources.find("tiny").folder), allow_mock=True, **options
    )
    links = iter(script)

    def dial() -> Any:
        link = next(links)
        if isinstance(link, Exception):
            raise link
        return link

    made._pool._make = dial
    made._pool.proven = True
    made._pool.rest = lambda seconds: True  # type: ignore[method-assign]
    return made


def text(tokens: Sequence[Token]) -> str:
    return "".join(token.text or "" for token in tokens)


PROMPTS: dict[str, tuple[str, Any]] = {
    "greedy": ("The capital of France is", {"max_tokens": 12}),
    "seeded": ("The capital of France is", {"max_tokens": 12, "temperature": 0.9, "top_k": 50, "seed": 11}),
    "drafted": ("The capital of France is Paris. " * 2 + "The capital of France is", {"max_tokens": 24, "draft": 6}),
    "with log-probabilities": ("Once upon a time", {"max_tokens": 8, "logprobs": True}),
    "with likely ids": ("Once upon a time", {"max_tokens": 8, "top_logprobs": 3}),
    "penalised": ("The capital of France is Paris. The capital of", {"max_tokens": 12, "repetition_penalty": 1.3}),
    "penalised and seeded": (
        "The capital of France is",
        {
            "max_tokens": 12,
            "temperature": 0.9,
            "seed": 11,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.1,
            "min_p": 0.01,
            "logit_bias": {5: 3.0},
        },
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_text_goes_on_over_a_death_after_any_answer_as_if_there_had_been_none(
    tiny: GPT2, manifest: Manifest, name: str
) -> None:
    prompt, options = PROMPTS[name]
    once = pipeline(manifest, [Dying(tiny, ENDLESS)]).generate(prompt, **options)
    whole, answers = list(once), 0
    assert (len(set(once.times)) < len(whole)) == (name == "drafted")
    while True:
        first, second = Dying(tiny, answers), Dying(tiny, ENDLESS)
        made = pipeline(manifest, [first, AWAY, second])
        generation = made.generate(prompt, **options, spans=True)
        found = list(generation)
        assert [token.id for token in found] == [token.id for token in whole]
        assert [token.text for token in found] == [token.text for token in whole]
        for token, other in zip(found, whole, strict=True):
            assert (token.logprob is None) == (other.logprob is None)
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [one.id for one in token.top] == [one.id for one in other.top]
        assert generation.reason is once.reason
        assert len(generation.times) == len(generation.spans) == len(whole)
        assert first.ended
        if not second.asked:  # the first had told all
            assert generation.interruptions == []
            break
        assert generation.interruptions == [str(GONE)]
        assert second.asked[0].delivered + second.asked[0].max_tokens == options["max_tokens"]
        answers += 1
    assert answers > 2


class Saying(Dying):
    """A link whose answers are these tokens, one by one, from the first that was not delivered."""

    def __init__(self, model: GPT2, answers: int, ids: Sequence[int]) -> None:
        super().__init__(model, answers)
        self._ids = ids

    def send(self, message: Message) -> None:
        assert isinstance(message, Generate)
        self._answers = self._say(message)

    def _say(self, request: Generate) -> Generator[Answer, None, Reason]:
        for place, token in enumerate(self._ids[request.delivered :]):
            yield Tokens(len(request.ids) + place, (token,))
        return Reason.LENGTH


def test_a_character_of_several_tokens_is_whole_over_the_seam(tiny: GPT2, manifest: Manifest) -> None:
    words = "naïve 日本 €"
    found = tokenizer.load(sources.find("tiny").folder)
    assert found is not None
    ids = found.encode(words)
    assert len(ids) > len(words)
    for answers in range(len(ids) + 1):
        links = [Saying(tiny, answers, ids), Saying(tiny, ENDLESS, ids)]
        generation = pipeline(manifest, links).generate([1, 2], max_tokens=len(ids))
        assert text(list(generation)) == words
        assert len(generation.interruptions) == (answers < len(ids))


def test_a_stop_string_is_found_over_the_seam(tiny: GPT2, manifest: Manifest) -> None:
    prompt = "The capital of France is"
    whole = list(pipeline(manifest, [Dying(tiny, ENDLESS)]).generate(prompt, max_tokens=12))
    joined = text(whole)
    stop = joined[len(whole[0].text or "") - 1 : len(whole[0].text or "") + 2]  # from one token into the next
    wanted = list(pipeline(manifest, [Dying(tiny, ENDLESS)]).generate(prompt, max_tokens=12, stop=[stop]))
    for answers in range(len(wanted)):
        links = [Dying(tiny, answers), Dying(tiny, ENDLESS)]
        generation = pipeline(manifest, links).generate(prompt, max_tokens=12, stop=[stop])
        assert list(generation) == wanted
        assert generation.reason is Reason.STOP
        assert links[1].cancelled


def test_logits_are_asked_for_again(tiny: GPT2, manifest: Manifest) -> None:
    wanted = pipeline(manifest, [Dying(tiny, ENDLESS)]).logits([1, 2, 3])
    assert (pipeline(manifest, [Dying(tiny, 0), Dying(tiny, ENDLESS)]).logits([1, 2, 3]) == wanted).all()
    assert (pipeline(manifest, [Dying(tiny, 1)]).logits([1, 2, 3]) == wanted).all()  # only its Done was lost


@pytest.mark.parametrize("count", [2, 257, 300, 512])
def test_scores_are_asked_for_again(tiny: GPT2, manifest: Manifest, count: int) -> None:
    ids = [(7 * place) % 500 for place in range(count)]
    wanted = pipeline(manifest, [Dying(tiny, ENDLESS)]).score(ids, top=2)
    assert [token.id for token in wanted] == ids
    for answers in range(-(-(count - 1) // 256) + 1):  # after all of them, only the Done was lost
        links = [Dying(tiny, answers), Dying(tiny, ENDLESS)]
        assert pipeline(manifest, links).score(ids, top=2) == wanted
        assert len(links[1].asked) == (answers * 256 < count - 1)


def test_a_second_death_ends_the_request_and_the_next_one_has_a_link(tiny: GPT2, manifest: Manifest) -> None:
    made = pipeline(manifest, [Dying(tiny, 2), Dying(tiny, 1), Dying(tiny, ENDLESS)], connections=1)
    generation = made.generate([1, 2], max_tokens=6)
    with pytest.raises(StageError, match="3 tokens had arrived; a link or stage has died 2 times"):
        list(generation)
    assert len(generation.times) == 3
    assert len(generation.interruptions) == 1
    assert len(list(made.generate([1, 2], max_tokens=6))) == 6


@pytest.mark.parametrize(
    ("refused", "kind"),
    [
        (UntrustedStage("stage 0: evidence refused", stage=0), UntrustedStage),
        (ManifestError("the manifest has expired"), ManifestError),
    ],
)
def test_evidence_or_a_manifest_that_is_refused_ends_it_at_once(
    tiny: GPT2, manifest: Manifest, refused: Exception, kind: type[Exception]
) -> None:
    made = pipeline(manifest, [Dying(tiny, 2), refused])
    with pytest.raises(kind) as caught:
        list(made.generate([1, 2], max_tokens=6))
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]
    assert isinstance(refused, ManifestError) or str(caught.value).endswith("2 tokens had arrived")


def test_a_request_that_is_refused_as_draining_goes_to_another_link(tiny: GPT2, manifest: Manifest) -> None:
    first, second = Dying(tiny, 0, DRAINING), Dying(tiny, ENDLESS)
    generation = pipeline(manifest, [first, second]).generate([1, 2], max_tokens=3)
    assert len(list(generation)) == 3
    assert generation.interruptions == [str(DRAINING)]
    assert first.ended


def test_a_request_finds_the_first_stage_away_and_waits_for_it(tiny: GPT2, manifest: Manifest) -> None:
    generation = pipeline(manifest, [AWAY, AWAY, Dying(tiny, ENDLESS)]).generate([1, 2], max_tokens=3)
    assert len(list(generation)) == 3
    assert generation.interruptions == [str(AWAY)]


def test_nothing_is_tried_again_before_a_first_link_was_accepted(manifest: Manifest) -> None:
    made = pipeline(manifest, [AWAY])
    made._pool.proven = False
    with pytest.raises(UnreachableStage) as caught:
        list(made.generate([1, 2], max_tokens=3))
    assert str(caught.value) == str(AWAY)


def test_retry_for_0_fails_at_once(tiny: GPT2, manifest: Manifest) -> None:
    made = pipeline(manifest, [Dying(tiny, 2)], retry_for=0)
    with pytest.raises(StageError, match="2 tokens had arrived"):
        list(made.generate([1, 2], max_tokens=6))


def waiting(tiny: GPT2, manifest: Manifest, tokens: int) -> tuple[Pipeline, list[int]]:
    """A pipeline whose link dies after so many tokens, and whose next one never comes; and its attempts to have one."""
    made = pipeline(manifest, [], retry_for=1e6)
    script: Iterator[Any] = iter([Dying(tiny, tokens)])
    tried: list[int] = []

    def dial() -> Any:
        link = next(script, None)
        if link is None:
            tried.append(1)
            raise AWAY
        return link

    made._pool._make = dial
    made._pool.rest = partial(Pool.rest, made._pool)  # type: ignore[method-assign]
    return made, tried


def test_a_wait_ends_when_the_pipeline_is_closed(tiny: GPT2, manifest: Manifest) -> None:
    made, tried = waiting(tiny, manifest, 2)
    generation = made.generate([1, 2], max_tokens=6)
    found: list[Exception] = []

    def ask() -> None:
        try:
            list(generation)
        except StageError as error:
            found.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert eventually(lambda: len(tried) >= 2)
    made.close()
    asking.join(60)
    assert not asking.is_alive()
    assert str(found[0]) == f"{AWAY}; 2 tokens had arrived; the pipeline was closed meanwhile"


def test_a_request_keeps_its_place_among_the_connections_while_it_waits(tiny: GPT2, manifest: Manifest) -> None:
    made = pipeline(manifest, [Dying(tiny, 1), AWAY, AWAY, Dying(tiny, ENDLESS)], connections=1, timeout=0.05)
    refused: list[str] = []

    def rest(seconds: float) -> bool:
        with pytest.raises(RequestRefused) as caught:
            made._pool.take()
        refused.append(caught.value.reason)
        return True

    made._pool.rest = rest  # type: ignore[method-assign]
    assert len(list(made.generate([1, 2], max_tokens=3))) == 3
    assert refused == ["busy"] * 3
    assert len(made._pool._idle) == 1


def test_a_generation_that_is_cancelled_while_it_waits_for_a_stage_ends_soon(tiny: GPT2, manifest: Manifest) -> None:
    made, tried = waiting(tiny, manifest, 2)
    generation = made.generate([1, 2], max_tokens=6)
    found: list[Token] = []
    asking = threading.Thread(target=lambda: found.extend(generation))
    asking.start()
    assert eventually(lambda: len(tried) >= 2)
    generation.cancel()
    asking.join(60)
    assert not asking.is_alive()
    assert len(found) == 2
    assert generation.reason is Reason.CANCELLED
    assert not made._pool._used


def test_a_task_that_is_cancelled_while_its_stage_is_away_ends_soon(tiny: GPT2, manifest: Manifest) -> None:
    made, tried = waiting(tiny, manifest, 2)

    async def run() -> None:
        async def ask() -> None:
            async for _ in made.agenerate([1, 2], max_tokens=6):
                pass

        asking = asyncio.create_task(ask())
        while len(tried) < 2:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asking, 60)

    asyncio.run(run())


def test_a_servers_turn_is_free_soon_after_its_client_has_left(tiny: GPT2, manifest: Manifest) -> None:
    made, tried = waiting(tiny, manifest, 0)

    async def run() -> None:
        service = Service(made, made, connections=1, queue=1, name="tiny")

        async def ask() -> None:
            async for _ in service.generate([1, 2], {"max_tokens": 6}):
                pass

        asking = asyncio.create_task(ask())
        while len(tried) < 2:
            await asyncio.sleep(0.01)
        assert service.running == 1
        asking.cancel()
        await asyncio.wait([asking])
        async with asyncio.timeout(60):
            while service.running:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_cancelled_generation_gives_no_more_tokens_and_frees_its_link(tiny: GPT2, manifest: Manifest) -> None:
    link = Dying(tiny, ENDLESS)
    made = pipeline(manifest, [link])
    generation = made.generate([1, 2], max_tokens=6)
    next(generation)
    generation.cancel()
    assert list(generation) == []
    assert (generation.reason, link.cancelled) == (Reason.CANCELLED, True)
    assert not made._pool._used
    assert len(made._pool._idle) == 1


def test_a_stage_that_is_given_up_meanwhile_ends_the_request_and_says_how_far_it_got(
    tiny: GPT2, manifest: Manifest
) -> None:
    made, given_up = pipeline(manifest, [Dying(tiny, 2)]), StageError("stage 1 is not started again", stage=1)
    stages = SimpleNamespace(failure=None, stop=lambda: None)
    made._stages = stages  # type: ignore[assignment]
    generation = made.generate([1, 2], max_tokens=6)
    next(generation), next(generation)
    stages.failure = given_up
    with pytest.raises(StageError, match=f"^{given_up}; 2 tokens had arrived$"):
        next(generation)


class Refusing(Dying):
    """A link whose stage refuses so many requests, because a later stage drains, and then answers."""

    def __init__(self, model: GPT2, times: int) -> None:
        super().__init__(model, ENDLESS)
        self._times = times

    def receive(self) -> Message:
        if len(self.asked) <= self._times:
            return Refusal(1, "draining", "stage 1 is shutting down")
        return super().receive()


def test_a_link_on_which_a_request_was_refused_is_used_again(tiny: GPT2, manifest: Manifest) -> None:
    link = Refusing(tiny, 5)  # handshakes cost a stage more than requests that it refuses
    made = pipeline(manifest, [link], connections=1)
    assert len(list(made.generate([1, 2], max_tokens=3))) == 3
    assert len(link.asked) == 6
    assert not link.ended


def test_a_link_that_ended_after_a_refusal_is_replaced(tiny: GPT2, manifest: Manifest) -> None:
    first, second = Refusing(tiny, 1), Dying(tiny, ENDLESS)
    made = pipeline(manifest, [first, second], connections=1)

    def rest(seconds: float) -> bool:
        first.abort()
        return True

    made._pool.rest = rest  # type: ignore[method-assign]
    assert len(list(made.generate([1, 2], max_tokens=3))) == 3
    assert (len(first.asked), len(second.asked)) == (1, 1)
