"""A pipeline of real processes: what it gives, what it refuses, and how it ends."""

import asyncio
import contextlib
import dataclasses
import fcntl
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made import SMALL, cut, random_tensors, write
from processes import ROOT, Stages, alive, eventually

import minigpt
from attest.providers.mock import MockRoot
from minigpt.client.pipeline import Pipeline
from minigpt.engine.model import CACHE_STEP
from minigpt.engine.sampling import Sampling
from minigpt.errors import ManifestError, RequestRefused, StageError, UnreachableStage, UntrustedStage, UsageError
from minigpt.protocol import batches, links
from minigpt.protocol.batches import Batch, Result, Segment, Terms
from minigpt.protocol.batchlink import BatchLink
from minigpt.protocol.links import StageLink
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import (
    CHUNK,
    Cancel,
    Done,
    Generate,
    Reason,
    Reset,
    StageReport,
    Tokens,
    Wanted,
    for_any_client,
)
from minigpt.protocol.request import Ask, Keywords, Options
from minigpt.stage.layers import Layers, Part
from minigpt.stage.schedule import Schedule
from minigpt.stage.sequence import Sequence as MadeSequence
from transport import codec
from transport.channel import Deadlines
from transport.noise import CipherState
from transport.records import Sealer, Type

IDS = tuple(np.random.default_rng(3).integers(0, SMALL.vocab_size - 1, SMALL.n_positions).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


@pytest.fixture(scope="module")
def model(folder: Path) -> minigpt.Model:
    return minigpt.load(str(folder))


@pytest.fixture(scope="module")
def stages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Three stages that no test ends."""
    with Stages(folder, "1+2+1", tmp_path_factory.mktemp("stages")) as made:
        yield made.start_all()


@pytest.fixture
def pipeline(stages: Stages) -> Iterator[Pipeline]:
    with Pipeline.connect(stages.path, allow_mock=True) as made:
        yield made


@pytest.fixture
def link(stages: Stages) -> Iterator[StageLink]:
    """The bare link to stage 0, for a client that does not behave."""
    made = dial(stages)
    yield made
    made.channel.close()


def dial(stages: Stages) -> StageLink:
    end = links.calling_end(stages.manifest, 0, None)
    return StageLink(links.dial(stages.manifest, stages.addresses, 0, end, Deadlines()), stages.manifest, 0, 20.0)


def ids(generation: minigpt.Generation) -> list[int]:
    return [token.id for token in generation]


# What it gives


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_k": 9, "seed": 1}])
@pytest.mark.parametrize("length", [1, 30, CHUNK + 9])
def test_its_tokens_and_log_probabilities_are_those_of_one_process(
    pipeline: Pipeline, model: minigpt.Model, length: int, options: dict[str, Any]
) -> None:
    def run(source: Pipeline | minigpt.Model) -> list[tuple[int, float | None]]:
        made = source.generate(IDS[:length], max_tokens=15, logprobs=True, **options)
        return [(token.id, token.logprob) for token in made]

    assert run(pipeline) == run(model)


def test_its_logits_are_those_of_one_process(pipeline: Pipeline, model: minigpt.Model) -> None:
    logits = pipeline.logits(IDS[:40])
    assert logits.dtype == np.float32
    assert np.abs(logits - model.logits(IDS[:40])[-1]).max() < 1e-5


def test_ids_have_no_text_without_a_tokenizer(pipeline: Pipeline) -> None:
    assert [token.text for token in pipeline.generate([1, 2], max_tokens=3)] == [None] * 3
    with pytest.raises(UsageError, match="token ids"):
        pipeline.generate("text")


def test_it_says_why_it_ended(pipeline: Pipeline) -> None:
    whole = pipeline.generate(IDS[:-2], max_tokens=50)
    assert len(ids(whole)) == 3
    assert whole.reason == "context"
    short = pipeline.generate(IDS[:5], max_tokens=2)
    assert len(ids(short)) == 2
    assert short.reason == "length"


def test_times_and_spans_are_told_for_every_token(pipeline: Pipeline) -> None:
    made = pipeline.generate(IDS[:5], max_tokens=4, spans=True)
    ids(made)
    assert made.times == sorted(made.times)
    assert [len(spans) for spans in made.spans] == [4] * 4  # the client and three stages
    assert all(span.bytes > 0 for spans in made.spans for span in spans[1:3])
    assert sum(spans[0].bytes for spans in made.spans) > 0  # an answer may have come in one piece with the one before


def test_requests_of_one_pipeline_go_on_beside_each_other(pipeline: Pipeline, model: minigpt.Model) -> None:
    running = [pipeline.generate(IDS[:n], max_tokens=9) for n in (4, 5, 6)]
    rounds = [[next(generation).id for generation in running] for _ in range(9)]
    for number, n in enumerate((4, 5, 6)):
        assert [found[number] for found in rounds] == ids(model.generate(IDS[:n], max_tokens=9))


@pytest.mark.parametrize("ended", ["dropped", "broken out of", "closed", "refused"])
def test_a_generation_that_ends_in_any_way_gives_its_connection_back(stages: Stages, ended: str) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, connections=1, timeout=60) as made:
        made.status()
        link = made._pool._idle[0]
        generation = made.generate(IDS[:5], max_tokens=100, draft=0)
        if ended == "broken out of":
            for _ in generation:
                break
            del _
        elif ended == "refused":
            for _ in range(3):
                with pytest.raises(RequestRefused):
                    list(made._answers(Generate(0, (10**6,), 3), [], threading.Event()))
        else:
            next(generation)
        if ended == "closed":
            generation.close()
        del generation
        assert made._pool._idle == [link]
        assert len(ids(made.generate(IDS[:5], max_tokens=3))) == 3


def test_a_call_waits_for_a_connection_and_not_for_ever(stages: Stages) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, connections=2, timeout=1) as made:
        running = [made.generate(IDS[:5], max_tokens=100, draft=0) for _ in range(2)]
        for generation in running:
            next(generation)
        began = time.monotonic()
        with pytest.raises(RequestRefused, match="all 2 connections of this pipeline are in use") as refused:
            next(made.generate(IDS[:5]))
        assert refused.value.reason == "busy"
        assert time.monotonic() - began >= 1
        timer = threading.Timer(0.2, running[0].close)
        timer.start()
        assert len(ids(made.generate(IDS[:5], max_tokens=3))) == 3
        timer.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket that Python closes itself
def test_an_interrupt_at_any_moment_takes_no_connection_away(stages: Stages) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, connections=2, timeout=30) as made:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for number in range(1000):
                with suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + number % 30 * 1e-4)
                    ids(made.generate(IDS[:3], max_tokens=2))
                with suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # an alarm may be left, if the one before it came late
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        running = [made.generate(IDS[:5], max_tokens=9, draft=0) for _ in range(2)]
        assert [len(ids(generation)) for generation in running] == [9, 9]


def test_closing_a_pipeline_ends_calls_that_wait_and_calls_that_run(stages: Stages) -> None:
    made = Pipeline.connect(stages.path, allow_mock=True, connections=1)
    running = made.generate(IDS[:5], max_tokens=500, draft=0)
    next(running)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            next(made.generate(IDS[:5]))
        except UsageError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)
    made.close()
    waiting.join(60)
    assert "closed" in str(errors[0])
    with pytest.raises(StageError):
        ids(running)


def test_many_threads_share_one_pipeline(pipeline: Pipeline, model: minigpt.Model) -> None:
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = ids(pipeline.generate(IDS[: 3 + number % 5], max_tokens=6))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {n: ids(model.generate(IDS[: 3 + n % 5], max_tokens=6)) for n in range(24)}


def test_tokens_come_by_async_for_beside_each_other(pipeline: Pipeline, model: minigpt.Model) -> None:
    async def one(n: int) -> list[int]:
        return [token.id async for token in pipeline.agenerate(IDS[:n], max_tokens=6)]

    async def run() -> list[list[int]]:
        return await asyncio.gather(*(one(n) for n in range(3, 15)))

    assert asyncio.run(run()) == [ids(model.generate(IDS[:n], max_tokens=6)) for n in range(3, 15)]


def test_an_async_generation_that_is_cancelled_gives_its_connection_back(stages: Stages) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, connections=1, timeout=60) as made:

        async def endless() -> None:
            async for _ in made.agenerate(IDS[:5], max_tokens=500, draft=0):
                pass

        async def run() -> int:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(endless(), 0.1)
            generation = made.agenerate(IDS[:5], max_tokens=500)
            await anext(generation)
            await generation.aclose()
            with pytest.raises(UsageError):
                await anext(made.agenerate([]))
            return len([token async for token in made.agenerate(IDS[:5], max_tokens=3)])

        assert asyncio.run(run()) == 3
        assert len(made._pool._idle) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "top_logprobs": 20, "logprobs": True},
        {"temperature": 1.0, "seed": 7, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": -0.5},
        {"logit_bias": {3: 5.0, 9: -100.0}, "draft": 8, "top_logprobs": 1},
    ],
)
@pytest.mark.parametrize("length", [1, CHUNK + 9])
def test_penalties_bias_and_likely_tokens_through_stages_are_those_of_one_process(
    pipeline: Pipeline, model: minigpt.Model, length: int, options: dict[str, Any]
) -> None:
    wanted = list(model.generate(IDS[:length], max_tokens=25, **options))
    assert list(pipeline.generate(IDS[:length], max_tokens=25, **options)) == wanted
    assert {len(token.top) for token in wanted} == {options.get("top_logprobs", 0)}


@pytest.mark.parametrize("length", [1, 2, 97, CHUNK + 2, SMALL.n_positions])
def test_scores_through_stages_are_those_of_one_process(pipeline: Pipeline, model: minigpt.Model, length: int) -> None:
    assert pipeline.score(IDS[:length], top=5) == model.score(IDS[:length], top=5)
    assert ids(pipeline.generate(IDS[:9], max_tokens=3)) == ids(model.generate(IDS[:9], max_tokens=3))


def test_the_keywords_of_generate_are_written_alike_everywhere() -> None:
    names = list(inspect.signature(Pipeline.generate).parameters)[2:]
    assert names == [field.name for field in dataclasses.fields(Options)] == list(Keywords.__annotations__)


def test_several_clients_are_served_at_once_each_with_its_own_cache(stages: Stages, model: minigpt.Model) -> None:
    prompts = [IDS[:4], IDS[10:60], IDS[5:9]]
    pipelines = [Pipeline.connect(stages.path, allow_mock=True) for _ in prompts]
    try:
        running = [made.generate(prompt, max_tokens=12) for made, prompt in zip(pipelines, prompts, strict=True)]
        rounds = [[next(made).id for made in running] for _ in range(12)]
        for number, prompt in enumerate(prompts):
            assert [found[number] for found in rounds] == ids(model.generate(prompt, max_tokens=12))
    finally:
        for made in pipelines:
            made.close()


def test_several_generations_of_one_pipeline_go_on_at_once_in_one_thread(
    pipeline: Pipeline, model: minigpt.Model
) -> None:
    prompts = [IDS[:4], IDS[10:60], IDS[5:9]]
    for made in (pipeline, model):
        rounds = list(zip(*(made.generate(prompt, max_tokens=12) for prompt in prompts), strict=True))
        for prompt, tokens in zip(prompts, zip(*rounds, strict=True), strict=True):
            assert [token.id for token in tokens] == ids(model.generate(prompt, max_tokens=12))


def test_many_threads_get_what_one_gets(stages: Stages, model: minigpt.Model) -> None:
    found: dict[int, list[int]] = {}

    def run(number: int) -> None:
        with Pipeline.connect(stages.path, allow_mock=True) as made:
            found[number] = ids(made.generate(IDS[number : number + 20], max_tokens=10))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: ids(model.generate(IDS[number : number + 20], max_tokens=10)) for number in range(6)}


def test_status_tells_of_every_stage(pipeline: Pipeline, stages: Stages) -> None:
    ids(pipeline.generate(IDS[:5], max_tokens=2))
    reports = pipeline.status()
    assert [report.stage for report in reports] == [0, 1, 2]
    assert all(not report.error and report.evidence and report.steps > 0 for report in reports)
    assert all(report.sequences >= 1 and report.cache_bytes > 0 for report in reports)


def test_any_number_of_clients_ask_for_status_over_one_link_between_stages(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start_all()
        with Pipeline.connect(stages.path, allow_mock=True) as made, ThreadPoolExecutor(8) as pool:
            for reports in pool.map(lambda _: made.status(), range(64)):
                assert [report.error for report in reports] == ["", ""]
        assert stages.log(0).count("link to stage 1: evidence accepted") == 2  # the other is for batches


def test_status_counts_in_every_stage_the_tokens_drawn_for_its_passes(pipeline: Pipeline) -> None:
    before = [report.tokens for report in pipeline.status()]
    ids(pipeline.generate(IDS[: CHUNK + 5], max_tokens=9))  # two passes for the prompt, of which one draws
    pipeline.logits(IDS[:5])  # draws none
    reports = pipeline.status()
    assert [report.tokens - count for report, count in zip(reports, before, strict=True)] == [9, 9, 9]
    assert all(report.rate > 0 for report in reports)
    assert all(report.batch >= 1 for report in reports)


# What it refuses


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Generate(5, IDS[:3], 5), "gap"),
        (Generate(0, (), 5), "bad-request"),
        (Generate(0, (0, SMALL.vocab_size), 5), "bad-token"),
        (Generate(0, (2**32 - 1,), 5), "bad-token"),
        (Generate(0, (*IDS, 1), 5), "too-long"),
    ],
    ids=["gap", "empty", "id", "-1", "long"],
)
def test_a_request_that_does_not_fit_is_refused_in_words_and_the_channel_lives(
    link: StageLink, model: minigpt.Model, request_: Generate, reason: str
) -> None:
    for _ in range(2):
        with pytest.raises(RequestRefused) as caught:
            link.ask(request_)
        assert caught.value.reason == reason
    assert tokens(link, Generate(0, IDS[:4], 3)) == ids(model.generate(IDS[:4], max_tokens=3))


def tokens(link: StageLink, request: Generate) -> list[int]:
    link.send(request)
    found = []
    while isinstance(message := link.receive(), Tokens):
        found += message.ids
    assert isinstance(message, Done)
    return found


def test_a_smaller_start_rewinds(link: StageLink, model: minigpt.Model) -> None:
    tokens(link, Generate(0, IDS[:20], 5))
    assert tokens(link, Generate(10, IDS[10:30], 5)) == ids(model.generate(IDS[:30], max_tokens=5))


def test_a_reset_forgets_the_sequence(link: StageLink) -> None:
    tokens(link, Generate(0, IDS[:20], 5))
    assert link.ask(Reset()) == Done(Reason.RESET)
    with pytest.raises(RequestRefused) as caught:
        link.ask(Generate(10, IDS[10:12], 5))
    assert caught.value.reason == "gap"


def test_a_message_that_is_not_for_this_stage_ends_the_channel(link: StageLink) -> None:
    with pytest.raises(StageError, match="is not for stage 0"):
        link.ask(Done(Reason.END))
    assert eventually(link.channel.gone)


def test_a_batch_is_not_for_the_first_stage(link: StageLink) -> None:
    batch = Batch((Segment(0, 0, 1, Wanted.TOKEN),), np.zeros((1, SMALL.n_embd), np.float32))
    link.channel.send(batches.encode(batch))
    with pytest.raises(StageError, match="got list, wanted a map"):
        link.receive()
    assert eventually(link.channel.gone)


def test_a_request_while_one_runs_ends_the_channel(link: StageLink) -> None:
    link.send(Generate(0, IDS[:5], 150))
    link.send(Generate(0, IDS[:5], 150))
    with pytest.raises(StageError, match="while a request is running"):
        list(iter(link.receive, None))


def test_what_is_no_message_ends_the_channel_and_the_stage_lives(stages: Stages, pipeline: Pipeline) -> None:
    for value in ({"type": "generate"}, {"type": "x"}, {}, {"type": "generate", "ids": b"abc"}):
        broken = dial(stages)
        broken.channel.send(value)
        with pytest.raises(StageError, match="wanted"):
            broken.receive()
        broken.channel.abort()
    assert len(ids(pipeline.generate(IDS[:5], max_tokens=2))) == 2


def test_a_cancel_ends_a_request_and_one_too_late_is_nothing(link: StageLink) -> None:
    link.send(Generate(0, IDS[:5], 150))
    link.receive()
    link.send(Cancel())
    found = 1
    while isinstance(message := link.receive(), Tokens):
        found += 1
    assert message == Done(Reason.CANCELLED)
    assert found < 150
    link.send(Cancel())
    assert len(tokens(link, Generate(0, IDS[:5], 3))) == 3


def reports(stages: Stages) -> tuple[StageReport, ...]:
    with Pipeline.connect(stages.path, allow_mock=True) as asking:
        return asking.status()


def sequences(stages: Stages) -> list[int]:
    return [report.sequences for report in reports(stages)]


@pytest.mark.parametrize("how", ["cancel", "close", "abort"])
def test_a_client_that_leaves_takes_its_sequence_along_in_every_stage(folder: Path, tmp_path: Path, how: str) -> None:
    with Stages(folder, "1+2+1", tmp_path) as stages:
        stages.start_all()
        made = dial(stages)
        made.send(Generate(0, IDS[:5], 150))
        made.receive()
        if how == "cancel":
            made.send(Cancel())
            while made.receive() != Done(Reason.CANCELLED):
                pass
            assert made.ask(Reset()) == Done(Reason.RESET)
        elif how == "close":
            made.channel.close()
        else:
            made.channel.abort()
        assert eventually(lambda: sequences(stages) == [0, 0, 0])
        made.channel.close()


def as_stage_0(stages: Stages) -> BatchLink:
    """A link to stage 1, from one who has the key of a stage 0."""
    attester = stages.manifest.attester(0, stages.key(0).read_bytes())
    channel = links.dial(
        stages.manifest, stages.addresses, 1, links.calling_end(stages.manifest, 1, attester), Deadlines()
    )
    return BatchLink(channel, stages.manifest, 1, 20.0)


@contextlib.contextmanager
def held_turn(path: Path) -> Iterator[None]:
    """Keeps the cores from the stages that were started with `--turns path`."""
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def test_a_full_queue_says_busy_and_those_in_it_are_served_in_turn(folder: Path, tmp_path: Path) -> None:
    turns = tmp_path / "turns"
    turns.touch()
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0, "--max-sequences", "1", "--queue", "1", "--turns", str(turns))
        wanted = [Generate(0, IDS[:length], 5) for length in (5, 6, 7)]
        first, second, third = (dial(stages) for _ in wanted)
        with held_turn(turns):
            first.send(wanted[0])
            assert eventually(lambda: reports(stages)[0].sequences == 1)
            second.send(wanted[1])
            assert eventually(lambda: reports(stages)[0].queue == 1)
            with pytest.raises(
                RequestRefused, match=r"busy with 1 sequences, and 1 wait: try again in \d+ s"
            ) as caught:
                third.ask(wanted[2])
            assert (caught.value.reason, caught.value.stage) == ("busy", 0)
        for link_ in (first, second):
            assert [type(link_.receive()) for _ in range(6)] == [Tokens] * 5 + [Done]
        assert len(tokens(third, wanted[2])) == 5
        for link_ in (first, second, third):
            link_.channel.close()
        assert eventually(lambda: sequences(stages) == [0])


def test_whoever_leaves_the_queue_by_cancel_or_for_good_frees_its_place(folder: Path, tmp_path: Path) -> None:
    turns = tmp_path / "turns"
    turns.touch()
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0, "--max-sequences", "1", "--turns", str(turns))
        first, second, third = (dial(stages) for _ in range(3))
        with held_turn(turns):
            first.send(Generate(0, IDS[:5], 5))
            assert eventually(lambda: reports(stages)[0].sequences == 1)
            second.send(Generate(0, IDS[:5], 5))
            third.send(Generate(0, IDS[:5], 5))
            assert eventually(lambda: reports(stages)[0].queue == 2)
            second.send(Cancel())
            assert second.receive() == Done(Reason.CANCELLED)
            third.channel.abort()
            assert eventually(lambda: reports(stages)[0].queue == 0)
        assert len(tokens(second, Generate(0, IDS[:5], 5))) == 5
        first.channel.close()
        second.channel.close()


def test_a_request_that_a_later_stage_has_no_place_for_waits_once_and_is_then_refused(
    folder: Path, tmp_path: Path
) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start(1, "--max-sequences", "1")
        stages.start(0)
        with Pipeline.connect(stages.path, allow_mock=True) as made:
            wanted = ids(made.generate(IDS[:5], max_tokens=3))
            stranger = as_stage_0(stages)
            rows, terms = np.zeros((1, SMALL.n_embd), np.float32), Terms(9, Sampling())
            ask = Ask(Wanted.TOKEN, Sampling())
            segment = Segment(stranger.open(), 0, 1, Wanted.TOKEN)
            made._pool.close()  # its sequence rests no longer
            assert eventually(lambda: sequences(stages) == [0, 0])
            stranger.send_batch(Batch((segment,), rows, ((0, terms),)), [ask])
            assert isinstance(stranger.receive_answers()[0], Tokens)
            with Pipeline.connect(stages.path, allow_mock=True) as other:
                with pytest.raises(RequestRefused, match="stage 1 is busy") as caught:
                    ids(other.generate(IDS[:5], max_tokens=3))
                assert caught.value.stage == 1
                stranger.close()
                assert eventually(lambda: sequences(stages)[1] == 0)
                assert ids(other.generate(IDS[:5], max_tokens=3)) == wanted


def test_a_sequence_that_rests_makes_room_in_every_stage(folder: Path, tmp_path: Path) -> None:
    for full in (0, 1):
        with Stages(folder, "2+2", tmp_path) as stages:
            stages.start(1, *(["--max-sequences", "1"] if full == 1 else []))
            stages.start(0, *(["--max-sequences", "1"] if full == 0 else []))
            with (
                Pipeline.connect(stages.path, allow_mock=True) as first,
                Pipeline.connect(stages.path, allow_mock=True) as second,
            ):
                for length in (5, 9, CHUNK + 5):
                    found = [ids(made.generate(IDS[:length], max_tokens=3)) for made in (first, second, first)]
                    assert found[0] == found[1] == found[2]


def test_a_request_larger_than_a_stages_caches_is_refused_by_that_stage(folder: Path, tmp_path: Path) -> None:
    least = 4 * 2 * 2 * SMALL.n_embd * CACHE_STEP  # bytes of the smallest cache of two layers
    for small in (0, 1):
        with Stages(folder, "2+2", tmp_path) as stages:
            for index in (1, 0):
                stages.start(index, *(["--cache-bytes", str(least)] if index == small else []))
            with Pipeline.connect(stages.path, allow_mock=True) as made:
                assert len(ids(made.generate(IDS[:5], max_tokens=3))) == 3
                with pytest.raises(RequestRefused, match=f"stage {small} has {least} in all") as caught:
                    ids(made.generate(IDS[:CACHE_STEP], max_tokens=3))
                assert caught.value.stage == small
            assert eventually(lambda stages=stages: sum(sequences(stages)) == 0)  # type: ignore[misc]


def test_many_clients_get_the_text_that_each_gets_alone(stages: Stages, model: minigpt.Model) -> None:
    prompts = [IDS[at : at + length] for at, length in enumerate([1, 5, 9, 40, CHUNK + 3, 2, 3, 60] * 3)]
    alone = [ids(model.generate(prompt, max_tokens=12)) for prompt in prompts]
    with Pipeline.connect(stages.path, allow_mock=True) as made, ThreadPoolExecutor(len(prompts)) as pool:
        before = [report.steps for report in made.status()]
        assert list(pool.map(lambda prompt: ids(made.generate(prompt, max_tokens=12)), prompts)) == alone
        steps = [report.steps - then for report, then in zip(made.status(), before, strict=True)]
    assert max(steps) < 12 * len(prompts) / 2  # they shared passes
    assert eventually(lambda: sequences(stages) == [0, 0, 0])


def test_stages_may_start_in_any_order_and_the_first_request_finds_the_links_made(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "1+1+2", tmp_path) as stages:
        for index in (0, 2, 1):
            stages.start(index)
        for index in (0, 1):
            assert eventually(lambda index=index: "evidence accepted" in stages.log(index))  # type: ignore[misc]
        with Pipeline.connect(stages.path, allow_mock=True) as made:
            assert len(ids(made.generate(IDS[:5], max_tokens=3))) == 3
        for index in (0, 1):
            assert stages.log(index).count("evidence accepted") == 1


def test_more_channels_than_allowed_are_told_so(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "4", tmp_path) as stages:
        stages.start(0, "--max-channels", "1")
        with Pipeline.connect(stages.path, allow_mock=True) as first:

            def turned_away() -> bool:
                ids(first.generate([1, 2], max_tokens=1))  # whoever has done nothing for a second makes room
                with Pipeline.connect(stages.path, allow_mock=True, retry_for=0) as second:
                    try:
                        second.status()
                    except StageError as error:
                        assert "stage 0 has no channel for one more: 1 are open" in str(error)
                        return True
                return False

            assert eventually(turned_away)
        assert eventually(lambda: len(connect_and_count(stages)) == 1)


def connect_and_count(stages: Stages) -> list[int]:
    try:
        with Pipeline.connect(stages.path, allow_mock=True) as made:
            return [report.stage for report in made.status()]
    except StageError:
        return []


# Whom it trusts


def test_the_client_checks_the_whole_manifest_before_it_connects(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:  # none of them runs: a connection would be a StageError
        with pytest.raises(ManifestError, match="proves nothing about hardware"):
            Pipeline.connect(stages.path)
        with pytest.raises(ManifestError, match="sha256"):
            Pipeline.connect(stages.path, allow_mock=True, manifest_sha256="00" * 32)
        with pytest.raises(StageError, match="stage 0 cannot be reached"):
            Pipeline.connect(stages.path, allow_mock=True, manifest_sha256=stages.manifest.digest.hex().upper())
    with (
        Stages(folder, "2+2", tmp_path, clients=[b"\x09" * 32]) as stages,
        pytest.raises(ManifestError, match="listed"),
    ):
        Pipeline.connect(stages.path, allow_mock=True)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("what", ["root", "stage", "measurement"])
def test_a_stage_with_other_evidence_is_refused_by_whoever_meets_it(
    folder: Path, tmp_path: Path, what: str, index: int
) -> None:
    changes = {"measurement": b"\x05" * 48} if what == "measurement" else {}
    with Stages(folder, "2+2", tmp_path, **changes) as stages:
        other = stages.key(index)
        if what == "stage":
            other.write_text(stages.key(1 - index).read_text())
        elif what == "root":
            mine, stages.root = stages.root, MockRoot.generate()
            other = stages.key(index)
            stages.root = mine
        kept = tmp_path / "other.key"
        other.rename(kept)
        for number in (1, 0):
            stages.start(number, key=kept if number == index and what != "measurement" else None)
        with pytest.raises(UntrustedStage) as caught, Pipeline.connect(stages.path, allow_mock=True) as made:
            ids(made.generate([1, 2], max_tokens=2))
        assert caught.value.stage == (0 if what == "measurement" else index)


def test_a_stage_with_another_manifest_completes_no_handshake(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "4", tmp_path) as stages:
        other = stages.bytes.replace(b'"id": "small"', b'"id": "smalL"')
        stages.start(0)
        own = Manifest.parse(other).digest.hex()
        said = (
            f"stage 0 hung up in the handshake: most likely it has another manifest; ours has the sha256 {own}: compare"
        )
        with pytest.raises(UnreachableStage, match=said):
            Pipeline.connect(other, places=stages.places, allow_mock=True)
        assert eventually(lambda: "the mac is wrong: the peer has another manifest" in stages.log(0))
        suites = stages.bytes.replace(b'"suites": [\n    2\n', b'"suites": [\n    1\n')
        own = Manifest.parse(suites).digest.hex()
        said = (
            f"stage 0 hung up in the handshake: most likely it has another manifest; ours has the sha256 {own}: compare"
        )
        with pytest.raises(UnreachableStage, match=said):
            Pipeline.connect(suites, places=stages.places, allow_mock=True)
        assert f"manifest sha256 {stages.manifest.digest.hex()}\n" in stages.log(0)  # what to compare with
        assert eventually(lambda: "suite 1, wanted one of (2,): the peer has another manifest" in stages.log(0))


def test_a_stage_makes_no_link_once_its_manifest_has_expired(folder: Path, tmp_path: Path) -> None:
    for seconds in (4, 16, 64):  # as many as it takes to start a stage here
        where = tmp_path / str(seconds)
        where.mkdir()
        with Stages(folder, "4", where, days=seconds / 86400) as stages:
            try:
                stages.start(0)
                dial(stages).channel.close()
            except (AssertionError, ManifestError, StageError):
                assert time.time() > stages.manifest.expires.timestamp()
                continue
            assert eventually(lambda stages=stages: time.time() > stages.manifest.expires.timestamp(), 2.0 * seconds)
            with pytest.raises(StageError):
                dial(stages)
            with pytest.raises(ManifestError, match="expired"):
                Pipeline.connect(stages.path, allow_mock=True)
            return
    raise AssertionError("a stage takes more than a minute to start")


def test_a_listed_client_is_admitted_and_no_other(folder: Path, tmp_path: Path) -> None:
    from transport.noise import generate_keypair

    private, public = generate_keypair()
    with Stages(folder, "2+2", tmp_path, clients=[public]) as stages:
        stages.start_all()
        with Pipeline.connect(stages.path, allow_mock=True, client_key=private) as made:
            assert len(ids(made.generate([1, 2], max_tokens=2))) == 2
        with pytest.raises(UntrustedStage, match=r"the manifest lists its clients, and this one's key .* is not among"):
            Pipeline.connect(stages.path, allow_mock=True, client_key=generate_keypair()[0])


def test_only_an_operator_is_told_what_the_others_cause(folder: Path, tmp_path: Path) -> None:
    from transport.noise import generate_keypair

    (mine, client), (theirs, operator) = generate_keypair(), generate_keypair()
    with Stages(folder, "2+2", tmp_path, clients=[client], operators=[operator]) as stages:
        stages.start_all()
        with (
            Pipeline.connect(stages.path, allow_mock=True, client_key=theirs) as knowing,
            Pipeline.connect(stages.path, allow_mock=True, client_key=mine) as other,
        ):
            for count in (3, 5):
                ids(knowing.generate([1, 2], max_tokens=count))
                for report in other.status():
                    assert report.evidence
                    assert report.weights_bytes
                    assert report == for_any_client(report)
            assert [report.tokens for report in knowing.status()] == [8, 8]
            assert all(report.channels and report.cache_limit for report in knowing.status())


def test_a_stage_refuses_to_start_with_other_weights(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        changed = tmp_path / "changed"
        changed.mkdir()
        for file in folder.iterdir():
            (changed / file.name).write_bytes(file.read_bytes())
        data = bytearray((changed / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (changed / "model.safetensors").write_bytes(data)
        codes = []
        for index in (0, 1):
            process = stages.spawn(index, "--model", str(changed))
            codes.append(process.wait(60))
        assert sorted(codes) != [0, 0]
        assert 5 in codes  # the last byte belongs to one of the two
        assert "weights sha256" in stages.log(codes.index(5))


# How it ends


def test_stages_that_share_a_machine_compute_in_turns(folder: Path, tmp_path: Path) -> None:
    turns, found = tmp_path / "turns", []
    turns.touch()
    with Stages(folder, "2+2", tmp_path) as stages:
        for index in (1, 0):
            stages.start(index, "--turns", str(turns))
        with Pipeline.connect(stages.path, allow_mock=True) as made, turns.open("r+b") as held:
            wanted = ids(made.generate(IDS[:5], max_tokens=5))
            fcntl.lockf(held, fcntl.LOCK_EX)
            running = made.generate(IDS[:5], max_tokens=5)
            asking = threading.Thread(target=lambda: found.extend(token.id for token in running))
            asking.start()
            asking.join(0.5)
            assert asking.is_alive()
            assert found == []
            fcntl.lockf(held, fcntl.LOCK_UN)
            asking.join(60)
            assert found == wanted
        stages.kill(0)
        process = stages.spawn(0, "--turns", str(tmp_path / "none" / "such"))
        assert process.wait(60) == 2
        assert "none/such: No such file or directory" in stages.log(0)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stage_that_dies_at_any_token_is_named_at_once(folder: Path, tmp_path: Path, victim: int) -> None:
    with Stages(folder, "1+2+1", tmp_path) as stages:
        stages.start_all()
        with Pipeline.connect(stages.path, allow_mock=True, retry_for=0) as made:
            wanted = ids(made.generate(IDS[:5], max_tokens=150, draft=0))  # so many that none of them is the last
            for token in range(5):
                running = made.generate(IDS[:5], max_tokens=150, draft=0)
                found = [next(running).id for _ in range(token)]
                stages.kill(victim)
                began = time.monotonic()
                with pytest.raises(StageError, match=f"stage {victim}") as caught:
                    found += ids(running)
                assert time.monotonic() - began < 10  # and not after the 150 s that a client waits
                assert caught.value.stage == victim
                assert found == wanted[: len(found)]
                with pytest.raises(StageError, match=f"stage {victim}"):
                    ids(made.generate(IDS[:5], max_tokens=6))
                stages.start(victim)
                assert ids(made.generate(IDS[:5], max_tokens=6)) == wanted[:6]


@pytest.mark.parametrize("victim", [1, 2])
def test_a_stage_that_was_away_while_its_client_was_idle_is_found_again(
    folder: Path, tmp_path: Path, victim: int
) -> None:
    with Stages(folder, "1+2+1", tmp_path) as stages:
        stages.start_all()
        with Pipeline.connect(stages.path, allow_mock=True) as made:
            wanted = ids(made.generate(IDS[:5], max_tokens=6))
            stages.kill(victim)
            stages.start(victim)
            assert ids(made.generate(IDS[:5], max_tokens=6)) == wanted
            stages.kill(victim)
            assert [bool(report.error) for report in made.status()] == [index == victim for index in range(victim + 1)]
            stages.start(victim)
            assert [report.error for report in made.status()] == ["", "", ""]
            assert ids(made.generate(IDS[:5], max_tokens=6)) == wanted


def test_a_stage_that_hangs_is_named_by_the_one_before_it(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "1+2+1", tmp_path) as stages:
        for index in (2, 1, 0):
            stages.start(index, "--answer-timeout", "3")
        with Pipeline.connect(stages.path, allow_mock=True, retry_for=0) as made:
            running = made.generate(IDS[:5], max_tokens=150, draft=0)
            next(running)
            stages.processes[2].send_signal(signal.SIGSTOP)
            with pytest.raises(StageError, match="stage 2 did not answer in time") as caught:
                ids(running)
            assert caught.value.stage == 2


def test_a_sequence_is_dropped_though_the_next_stage_hangs(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start_all("--max-sequences", "1")
        leaving = dial(stages)
        leaving.send(Generate(0, IDS[:5], 150))
        leaving.receive()
        stages.processes[1].send_signal(signal.SIGSTOP)
        time.sleep(0.3)  # so that stage 0 waits for stage 1 when its client leaves
        leaving.channel.abort()
        assert eventually(lambda: "channel 1 (" in stages.log(0).partition("open")[2])
        stages.processes[1].send_signal(signal.SIGCONT)
        with Pipeline.connect(stages.path, allow_mock=True) as made:
            assert len(ids(made.generate(IDS[:5], max_tokens=3))) == 3


def test_an_old_generation_does_not_end_a_new_one(stages: Stages) -> None:
    with Pipeline.connect(stages.path, allow_mock=True) as made:
        old = made.generate(IDS[:5], max_tokens=9)
        next(old)
        new = made.generate(IDS[:5], max_tokens=9)
        next(new)
        old.close()
        assert len(ids(new)) == 8
    with pytest.raises(UsageError, match="closed"):
        ids(made.generate(IDS[:5], max_tokens=9))


def test_prompts_of_any_length_have_few_sequences_of_lengths() -> None:
    class Counted:
        """A channel that seals for real, and says how much."""

        def __init__(self) -> None:
            self.sealer = Sealer(CipherState(bytes(32)))
            self.lengths: list[int] = []
            self.seal_seconds = self.open_seconds = 0.0
            self.bytes_sent = self.bytes_received = 0
            self.wanted = 0

        def send(self, message: list[bytes], least: int = 0) -> None:
            self.lengths.append(len(self.sealer.seal(Type.MESSAGE, codec.encode(message), least)))
            self.wanted = message[0][12]

        def receive(self, _timeout: float, *, asker: object, silence: float) -> list[bytes]:
            return batches.encode_answers([Tokens(0, (1,)) if self.wanted else None])

    config = dataclasses.replace(SMALL, n_positions=1100)

    class Nothing(Layers):
        """Layers that compute nothing."""

        def compute(self, parts: Sequence[Part]) -> tuple[np.ndarray, list[Result], float]:
            return np.zeros((len(parts[0].rows), config.n_embd), np.float32), [], 0.0

    pipe, seen = SimpleNamespace(config=config, stages=(0, 1)), set()
    first = cut(config, random_tensors(config), 1)[0]
    for length in range(1, 1025):
        channel = Counted()
        link = BatchLink(channel, pipe, 1, 1.0)  # type: ignore[arg-type]
        schedule = Schedule(Nothing(first), lambda link=link: link)
        sequence = MadeSequence(first.new_cache(), Terms(1, Sampling()))
        assert len(list(schedule.run(sequence, Generate(0, (1,) * length, 1)))) == 1
        seen.add(tuple(channel.lengths))
    assert len(seen) < 200


@pytest.mark.parametrize("delay", [0.02 * n for n in range(20)])
def test_sigterm_at_any_moment_ends_a_stage_without_a_word(folder: Path, tmp_path: Path, delay: float) -> None:
    with Stages(folder, "4", tmp_path) as stages:
        process = stages.spawn(0)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)  # the latter before Python has got to the handler
        assert "Traceback" not in stages.log(0)


def test_a_stage_ends_cleanly_on_sigterm_and_its_client_is_told(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start_all("--drain", "0.001")  # test_drain.py has the other ends
        with Pipeline.connect(stages.path, allow_mock=True, retry_for=0) as made:
            running = made.generate(IDS[:5], max_tokens=150, draft=0)
            next(running)
            assert stages.kill(1, signal.SIGTERM) == 0
            with pytest.raises(StageError, match="stage 1"):
                ids(running)
            assert stages.kill(0, signal.SIGTERM) == 0


def test_a_stage_logs_neither_prompt_nor_tokens(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start_all()
        with Pipeline.connect(stages.path, allow_mock=True) as made:
            prompt = [73, 74, 75, 76, 77]
            found = ids(made.generate(prompt, max_tokens=8))
        assert eventually(lambda: "closed" in stages.log(0))
        for index in (0, 1):
            log = stages.log(index)
            assert "open" in log
            for run in (prompt, found[:3], found[-3:]):
                for glue in (", ", " ", ","):
                    assert glue.join(map(str, run)) not in log


ORPHAN = """
import os, sys, time
import minigpt
pipeline = minigpt.Pipeline.local(sys.argv[1], stages=2)
print(*pipeline.pids, flush=True)
for token in pipeline.generate([1, 2], max_tokens=150, draft=0):
    pass
time.sleep(60)
"""


def test_no_stage_outlives_a_parent_that_is_killed(folder: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait(60)
        assert parent.stdout is not None
        parent.stdout.close()
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def test_a_local_pipeline_leaves_no_process_behind(folder: Path, model: minigpt.Model) -> None:
    with minigpt.Pipeline.local(str(folder), split="3+1") as made:
        pids = made.pids
        assert ids(made.generate(IDS[:5], max_tokens=4)) == ids(model.generate(IDS[:5], max_tokens=4))
        assert all(alive(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids)


def test_a_local_stage_that_dies_is_named(folder: Path) -> None:
    with minigpt.Pipeline.local(str(folder), stages=2, retry_for=0) as made:
        running = made.generate(IDS[:5], max_tokens=150, draft=0)
        next(running)
        os.kill(made.pids[1], signal.SIGKILL)
        with pytest.raises(StageError, match="stage 1"):
            ids(running)


def test_a_stage_keeps_idle_links_and_never_one_with_an_answer_due(stages: Stages, model: minigpt.Model) -> None:
    for _ in range(3):
        made = dial(stages)
        made.send(Generate(0, IDS[: CHUNK + 20], 5))
        made.channel.abort()  # with chunks of the prompt under way
    assert eventually(lambda: sequences(stages) == [0, 0, 0])
    before = stages.log(0).count("link to stage 1: evidence accepted")
    for _ in range(3):
        with Pipeline.connect(stages.path, allow_mock=True) as good:
            assert ids(good.generate(IDS[:7], max_tokens=5)) == ids(model.generate(IDS[:7], max_tokens=5))
        assert eventually(lambda: sequences(stages) == [0, 0, 0])
    assert stages.log(0).count("link to stage 1: evidence accepted") <= before + 1
