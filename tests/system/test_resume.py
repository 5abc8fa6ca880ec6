"""Stages are killed in the middle of an answer and started again: the answer is the one that nobody interrupted."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, eventually
from serving import Serving

from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Generation
from minigpt.errors import StageError, UntrustedStage
from minigpt.protocol.messages import Reason

PROMPT = [3, 1, 4, 1, 5]
GREEDY: dict[str, Any] = {"max_tokens": 250, "draft": 0}
SEEDED: dict[str, Any] = {"max_tokens": 250, "temperature": 0.9, "top_k": 20, "seed": 7}
DRAFTED: dict[str, Any] = {"max_tokens": 250, "draft": 8}
TRIES = 20  # until a stage dies before it has computed the last token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


@pytest.fixture(scope="module")
def stages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Two stages; each test leaves them running."""
    with Stages(folder, "2+2", tmp_path_factory.mktemp("stages")) as made:
        yield made.start_all()


def ids(generation: Generation) -> list[int]:
    return [token.id for token in generation]


@pytest.mark.parametrize("options", [GREEDY, SEEDED, DRAFTED], ids=["greedy", "seeded", "drafted"])
@pytest.mark.parametrize("victim", [0, 1])
def test_an_answer_goes_on_when_a_stage_is_killed_and_started_again(
    stages: Stages, victim: int, options: dict[str, Any]
) -> None:
    with Pipeline.connect(stages.path, allow_mock=True) as made:
        wanted = ids(made.generate(PROMPT, **options))
        for token in (1, 9):
            for _ in range(TRIES):
                resumed = made.status()[0].resumed
                running = made.generate(PROMPT, **options, spans=True)
                found = [next(running).id for _ in range(token)]
                stages.kill(victim)
                stages.start(victim)
                found += ids(running)
                assert found == wanted
                assert running.reason is Reason.LENGTH
                assert len(running.times) == len(running.spans) == len(wanted)
                assert made.status()[0].resumed == (resumed if victim else 0) + len(running.interruptions)
                if running.interruptions:
                    break  # otherwise the whole answer was on its way already
            assert len(running.interruptions) == 1
            assert f"stage {victim}" in running.interruptions[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_client_waits_until_the_stage_is_back(stages: Stages, victim: int) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, retry_for=120) as made:
        wanted = ids(made.generate(PROMPT, **GREEDY))
        stages.kill(victim)
        running = made.generate(PROMPT, **GREEDY)
        found: list[int] = []
        asking = threading.Thread(target=lambda: found.extend(ids(running)))
        asking.start()
        asking.join(1)
        assert asking.is_alive()
        stages.start(victim)
        asking.join(60)
        assert found == wanted
        assert len(running.interruptions) == 1


def test_both_stages_may_die_at_once(stages: Stages) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, retry_for=120) as made:
        wanted = ids(made.generate(PROMPT, **SEEDED))
        for _ in range(TRIES):
            running = made.generate(PROMPT, **SEEDED)
            found = [next(running).id]
            stages.kill(0)
            stages.kill(1)
            stages.start(0)
            asking = threading.Thread(target=lambda: found.extend(ids(running)))  # noqa: B023 — it ends in this turn
            asking.start()
            asking.join(0.5)
            stages.start(1)
            asking.join(60)
            assert found == wanted
            if running.interruptions:
                break
        assert len(running.interruptions) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_without_retries_a_death_is_an_error_that_says_how_far_the_answer_got(stages: Stages, victim: int) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, retry_for=0) as made:
        running = made.generate(PROMPT, **GREEDY)
        next(running)
        stages.kill(victim)
        try:
            with pytest.raises(StageError, match=f"stage {victim}.* had arrived") as caught:
                ids(running)
            count = len(running.times)
            assert f"; {count} token{'s' if count > 1 else ''} had arrived" in str(caught.value)
        finally:
            stages.start(victim)


def test_when_the_time_is_over_the_error_says_how_long_was_tried(stages: Stages) -> None:
    with Pipeline.connect(stages.path, allow_mock=True, retry_for=0.5) as made:
        running = made.generate(PROMPT, **GREEDY)
        next(running)
        stages.kill(1)
        try:
            with pytest.raises(
                StageError, match=r"stage 1 cannot be reached.* had arrived; given up after .* s of tryi"
            ):
                ids(running)
        finally:
            stages.start(1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_that_comes_back_as_another_ends_the_answer_with_refused_evidence(
    folder: Path, tmp_path: Path, victim: int
) -> None:
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start_all()
        (tmp_path / "other").mkdir()
        with Stages(folder, "2+2", tmp_path / "other") as others:  # its keys are endorsed by another root
            key = others.key(victim)
        with Pipeline.connect(stages.path, allow_mock=True, retry_for=120) as made:
            running = made.generate(PROMPT, **GREEDY)
            next(running)
            stages.kill(victim)
            stages.start(victim, key=key)
            with pytest.raises(UntrustedStage, match=f"stage {victim}: evidence refused.* had arrived") as caught:
                ids(running)
            assert caught.value.exit_code == 3


def refusals(stages: Stages) -> int:
    """How many requests stage 0 has given up because it could not reach stage 1."""
    return len(re.findall(r"channel \d+ .*: stage 1 cannot be reached", stages.log(0)))


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_command_line_says_that_it_was_resumed(stages: Stages, more: list[str]) -> None:
    words = " ".join(map(str, PROMPT))
    command = [
        sys.executable,
        "-m",
        "minigpt",
        "generate",
        words,
        "--manifest",
        str(stages.path),
        "--allow-mock",
        *more,
    ]
    command += ["--max-tokens", "20", "--retry-for", "120"]
    wanted = subprocess.run(command, capture_output=True, check=True, text=True, cwd=ROOT)
    assert "resumed" not in wanted.stderr
    before = refusals(stages)
    stages.kill(1)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert eventually(lambda: process.poll() is not None or refusals(stages) > before)
    finally:
        stages.start(1)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    if more:
        told, usual = json.loads(out), json.loads(wanted.stdout)
        assert told["tokens"] == usual["tokens"]
        assert usual["interruptions"] == []
        assert ["stage 1 cannot be reached" in words for words in told["interruptions"]] == [True]
    else:
        assert out == wanted.stdout
        assert "\nresumed once: stage 1 cannot be reached" in err


def test_the_server_counts_and_tells_what_it_resumed(stages: Stages) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "minigpt": {}}
    with Serving("--manifest", str(stages.path), "--allow-mock", "--retry-for", "120") as server:
        wanted = server.post("/v1/completions", body).json()["choices"][0]
        assert wanted["minigpt"]["resumed"] == 0
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(server.post("/v1/completions", body).json()))
        before = refusals(stages)
        stages.kill(1)
        try:
            asking.start()
            assert eventually(lambda: refusals(stages) > before)
        finally:
            stages.start(1)
        asking.join(60)
        (choice,) = found[0]["choices"]
        assert (choice["text"], choice["minigpt"]["resumed"]) == (wanted["text"], 1)
        assert server.metric("minigpt_resumed_total") == 1
        assert "\nminigpt_stage_resumed_total{" in server.get("/metrics").text
