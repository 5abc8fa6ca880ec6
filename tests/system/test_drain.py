"""A stage that is told to end: it lets answers finish and refuses what is new; or it ends at once, whatever it does."""

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import Stages, eventually
from serving import Serving

from minigpt.checkpoint import sources
from minigpt.client.pipeline import Pipeline
from minigpt.client.resume import DEATHS
from minigpt.engine.config import Config
from minigpt.errors import StageError
from minigpt.protocol import links, messages
from minigpt.protocol.links import StageLink
from minigpt.protocol.messages import Done, Generate, Reason, Refusal, Tokens
from minigpt.stage.clients import ClientConversation
from minigpt.stage.places import Places
from minigpt.stage.upstream import QUIET, UpstreamConversation
from transport.channel import Deadlines
from transport.errors import Closed

# Tokens after the first wait for a file. No link of these counts as quiet, so nothing depends on how fast they are.
HELD = """
import os, time
from minigpt.engine.model import GPT2
from minigpt.stage import __main__, upstream
upstream.QUIET = 600.0
forward = GPT2.forward
def held(self, hidden, parts):
    while len(hidden) == 1 and not os.path.exists({!r}):
        time.sleep(0.01)
    return forward(self, hidden, parts)
GPT2.forward = held
__main__.main()
"""
# Tokens take half a second each until then.
PACED = HELD.replace("while len(hidden) == 1 and not", "if len(hidden) == 1 and not").replace("0.01", "0.5")
COUNT = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


class Held(Stages):
    """Stages of which one computes no token after the first until `go`."""

    def __init__(self, folder: Path, split: str, where: Path, held: int, *flags: str, code: str = HELD) -> None:
        super().__init__(folder, split, where)
        self.go = where / "go"
        self.python = ("-c", code.format(str(self.go)))
        for index in reversed(range(len(self.ports))):
            if index == held:
                self.start(index, *flags, python=self.python)
            else:
                self.start(index)

    def __enter__(self) -> "Held":
        return self

    def tell(self, index: int, how: signal.Signals = signal.SIGTERM) -> None:
        """Tells a stage to end, and waits until it drains."""
        self.processes[index].send_signal(how)
        assert eventually(lambda: "draining: " in self.log(index)), self.log(index)

    def link(self) -> StageLink:
        """A link to stage 0."""
        end = links.calling_end(self.manifest, 0, None)
        return StageLink(links.dial(self.manifest, self.addresses, 0, end, Deadlines()), self.manifest, 0, 60.0)


def ask(link: StageLink, *, count: int = COUNT) -> None:
    link.send(Generate(0, (1, 2, 3), count, draft=0))


def rest(link: StageLink) -> list[int]:
    """The tokens up to the end of the answer."""
    found: list[int] = []
    while isinstance(answer := link.receive(), Tokens):
        found += answer.ids
    assert answer == Done(Reason.LENGTH), answer
    return found


def begun(stages: Held) -> StageLink:
    """The link of an answer that is held after its first token."""
    link = stages.link()
    ask(link)
    assert isinstance(link.receive(), Tokens)
    return link


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The answer."""
    with Held(folder, "4", tmp_path_factory.mktemp("whole"), -1) as stages:
        link = stages.link()
        ask(link)
        found = rest(link)
        link.channel.close()
    assert len(found) == COUNT
    return found


def test_the_first_stage_lets_an_answer_finish_and_frees_its_port_at_once(
    folder: Path, tmp_path: Path, whole: list[int]
) -> None:
    with Held(folder, "4", tmp_path, 0) as stages:
        link, idle = begun(stages), stages.link()
        stages.tell(0)
        assert "draining: answers under way: 1" in stages.log(0)
        with pytest.raises(Closed):
            idle.channel.receive(60.0)
        assert eventually(lambda: refused(stages))
        old = stages.processes.pop(0)
        stages.start(0)  # at the same port, while the other has an answer to finish
        other = stages.link()
        ask(other)
        assert rest(other) == whole
        assert old.poll() is None
        stages.go.touch()
        assert rest(link) == whole[1:]
        with pytest.raises(Closed):
            link.channel.receive(60.0)
        assert old.wait(60) == 0
        assert "drained" in stages.log(0)
        for pipe in (old.stdin, old.stdout):
            assert pipe is not None
            pipe.close()
        for one in (link, idle, other):
            one.channel.close()


def refused(stages: Held) -> bool:
    try:
        stages.link().channel.close()
    except StageError as error:
        return "cannot be reached" in str(error)
    return False


def test_a_request_that_waits_for_a_place_is_refused(folder: Path, tmp_path: Path, whole: list[int]) -> None:
    with Held(folder, "4", tmp_path, 0, "--max-sequences", "1") as stages:
        link, second, looking = begun(stages), stages.link(), stages.link()
        ask(second)
        assert eventually(lambda: looking.status()[0].queue == 1)
        stages.tell(0)
        told = second.receive()
        assert isinstance(told, Refusal)
        assert (told.reason, told.stage) == ("draining", 0)
        assert "connect again" in told.text
        with pytest.raises(Closed):
            second.channel.receive(60.0)
        stages.go.touch()
        assert rest(link) == whole[1:]
        assert stages.processes[0].wait(60) == 0
        for one in (link, second, looking):
            one.channel.close()


def test_a_later_stage_finishes_its_lanes_refuses_new_ones_and_its_successor_is_found(
    folder: Path, tmp_path: Path, whole: list[int]
) -> None:
    with Held(folder, "2+2", tmp_path, 1) as stages:
        link, second, looking = begun(stages), stages.link(), stages.link()
        stages.tell(1)
        assert "draining: links in use: 1" in stages.log(1)
        ask(second)
        assert eventually(lambda: looking.status()[0].sequences == 2)
        stages.go.touch()
        told = second.receive()
        assert isinstance(told, Refusal)
        assert (told.reason, told.stage) == ("draining", 1)
        assert rest(link) == whole[1:]
        link.channel.close()  # and so its lane ends
        assert stages.processes[1].wait(60) == 0
        assert "drained" in stages.log(1)
        stages.kill(1)
        stages.start(1)
        ask(second)
        assert rest(second) == whole
        for one in (second, looking):
            one.channel.close()


@pytest.mark.parametrize("how", ["SIGTERM", "end of standard input", "SIGINT"])
def test_who_is_told_to_end_at_once_waits_for_no_answer(folder: Path, tmp_path: Path, how: str) -> None:
    with Held(folder, "4", tmp_path, 0) as stages:
        link = begun(stages)
        stages.tell(0)
        process = stages.processes[0]
        if how == "end of standard input":
            assert process.stdin is not None
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[how])
        assert process.wait(25) == (130 if how == "SIGINT" else 0)  # --drain is 30
        if how != "SIGINT":
            assert "cut off after" in stages.log(0)
            assert "answers under way: 1" in stages.log(0)
        with pytest.raises(StageError, match="stage 0"):
            rest(link)
        link.channel.close()


def test_the_end_of_standard_input_is_the_end_at_once(folder: Path, tmp_path: Path) -> None:
    with Held(folder, "4", tmp_path, 0) as stages:
        link, process = begun(stages), stages.processes[0]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(25) == 0
        assert "draining" not in stages.log(0)
        link.channel.close()


SLOW = """
import time
from minigpt.engine.model import GPT2
from minigpt.stage import __main__
forward = GPT2.forward
def slow(*args):
    time.sleep(0.2)
    return forward(*args)
GPT2.forward = slow
__main__.main()
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_an_answer_survives_any_number_of_stages_that_are_ended_in_order(
    folder: Path, tmp_path: Path, whole: list[int], victim: int
) -> None:
    with (
        Held(folder, "2+2", tmp_path, 1, code=PACED) as stages,
        Pipeline.connect(stages.path, allow_mock=True, retry_for=120) as made,
    ):
        running = made.generate([1, 2, 3], max_tokens=COUNT, draft=0)
        found = [next(running).id]
        for times in range(DEATHS + 1):
            stages.kill(victim, signal.SIGINT)
            stages.start(victim, python=stages.python)
            while len(running.interruptions) <= times:
                found.append(next(running).id)
        stages.go.touch()
        found += [token.id for token in running]
        assert found == whole
        assert len(running.interruptions) == DEATHS + 1


def test_a_client_whose_answer_takes_longer_than_the_drain_is_told(folder: Path, tmp_path: Path) -> None:
    with Held(folder, "4", tmp_path, 0) as stages:
        stages.kill(0)
        stages.start(0, "--drain", "0.5", python=("-c", SLOW))
        link = stages.link()
        ask(link, count=300)  # they would take a minute
        assert isinstance(link.receive(), Tokens)
        stages.tell(0)
        with pytest.raises(StageError, match=r"stage 0 (is stopping|is gone)") as told:
            rest(link)
        assert told.value.stage == 0
        assert stages.processes[0].wait(60) == 0
        assert "cut off after" in stages.log(0)
        link.channel.close()


# `minigpt serve`, which is where the answers come from: it drains too.


def streamed(server: Serving, count: int) -> http.client.HTTPConnection:
    """A connection on which an answer is asked for."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": "The capital of France is", "max_tokens": count, "temperature": 0, "stream": True}
    link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return link


def closed(server: Serving) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), 60).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_at_once(tmp_path: Path, how: signal.Signals) -> None:
    with (
        Held(sources.find("tiny").folder, "12", tmp_path, 0) as stages,
        Serving("--manifest", str(stages.path), "--model", "tiny", "--allow-mock") as server,
        contextlib.closing(streamed(server, 20)) as link,
        link.getresponse() as answer,
    ):
        assert answer.readline()
        server.process.send_signal(how)
        assert eventually(lambda: closed(server))
        assert server.process.poll() is None  # the answer is held
        server.process.send_signal(how)
        assert server.process.wait(25) == (0 if how is signal.SIGTERM else 130)  # it would wait for 30 s
        assert "Traceback" not in server.log


def test_an_answer_is_whole_though_a_servers_local_stages_are_told_to_end_with_it() -> None:
    """As a supervisor does that sends SIGTERM to every process of a service."""
    with Serving() as server:
        link = streamed(server, 200)
        answer = link.getresponse()
        first = answer.readline()
        tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
        children = [int(word) for task in tasks for word in task.read_text().split()]
        stages = [pid for pid in children if b"minigpt.stage" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert stages
        for pid in (*stages, server.process.pid):
            os.kill(pid, signal.SIGTERM)
        told = (first + answer.read()).decode()
        assert told.rstrip().endswith("data: [DONE]"), told[-500:]
        assert "error" not in told
        answer.close()
        link.close()
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log


# Inside one stage.


class Sent:
    """In the place of a channel."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def send(self, plain: Any) -> None:
        self.told.append(messages.decode(plain, messages.ANSWERS, "a test"))


def test_a_request_that_comes_while_the_stage_drains_is_refused() -> None:
    stage = SimpleNamespace(index=0, places=Places(0, 1, 100, 1), schedule=SimpleNamespace(run=None))
    stage.places.drain()
    channel = Sent()
    conversation = ClientConversation(stage, 1, "tcp://192.0.2.1:1", None, None)  # type: ignore[arg-type]
    conversation._generate(channel, Generate(0, (1,), 1))  # type: ignore[arg-type]
    (told,) = channel.told
    assert (told.reason, told.stage) == ("draining", 0)


def test_a_link_with_lanes_rests_once_no_step_has_come_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = SimpleNamespace(index=1, places=Places(1, 4, 100, 0), layers=None)
    conversation = UpstreamConversation(stage, 1, "tcp://192.0.2.1:1", None, None)  # type: ignore[arg-type]
    assert conversation._rests()  # it has no lanes
    conversation._worked = now = time.monotonic()
    conversation._lanes._open[0] = (None, None)  # type: ignore[assignment]
    monkeypatch.setattr(time, "monotonic", lambda: now + QUIET / 2)
    assert not conversation._rests()
    monkeypatch.setattr(time, "monotonic", lambda: now + QUIET * 2)
    assert conversation._rests()
    conversation._sent.append(None)  # type: ignore[arg-type]
    assert not conversation._rests()  # a batch is under way


# Stopping means stopping.

LIMIT = 15.0  # seconds; 2 on a machine with time


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pass of it takes a second or more."""
    config = Config(vocab_size=8000, n_positions=1024, n_embd=1280, n_layer=4, n_head=20, n_inner=5120, eos_token_id=())
    return write(tmp_path_factory.mktemp("model") / "large", config, random_tensors(config))


@pytest.fixture
def computing(large: Path, tmp_path: Path) -> Iterator[Held]:
    """A stage that computes long prompts of three clients, with two threads."""
    with Held(large, "4", tmp_path, -1) as stages:
        stages.kill(0)
        stages.start(0, "--threads", "2")
        asking = [stages.link() for _ in range(3)]
        for link in asking:
            link.send(Generate(0, tuple(range(1, 1001)), 20))
        yield stages
        for link in asking:
            link.channel.abort()


MOMENTS = [0.0, 0.7] + [pytest.param(0.15 * n, marks=pytest.mark.slow) for n in range(1, 15)]


@pytest.mark.parametrize("how", ["twice", "end of standard input", "SIGINT"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stage_that_computes_ends_in_time(computing: Held, moment: float, how: str) -> None:
    process = computing.processes[0]
    time.sleep(moment)
    start = time.monotonic()
    if how == "twice":
        computing.tell(0)
        process.send_signal(signal.SIGTERM)
    elif how == "SIGINT":
        process.send_signal(signal.SIGINT)
    else:
        assert process.stdin is not None
        process.stdin.close()
    assert process.wait(LIMIT) == (130 if how == "SIGINT" else 0)
    print(f"{how} after {moment:.2f} s: {time.monotonic() - start:.2f} s")


# The main thread is in the BLAS library, for a minute, where Python runs no handler of a signal.
INSIDE = """
import sys
import numpy as np
from minigpt.checkpoint import weights
from minigpt.stage import __main__
def load(*_):
    matrix = np.ones((8000, 8000))
    print("computes", file=sys.stderr, flush=True)
    matrix @ matrix
    print("has computed", file=sys.stderr, flush=True)
    sys.exit(9)
weights.load = load
sys.argv += ["--threads", "1"]
__main__.main()
"""


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "end of standard input"])
def test_a_stage_that_is_inside_a_library_while_it_loads_ends_in_time(folder: Path, tmp_path: Path, how: str) -> None:
    with Stages(folder, "4", tmp_path) as stages:
        process = stages.spawn(0, python=("-c", INSIDE))
        assert eventually(lambda: "computes" in stages.log(0)), stages.log(0)
        if how == "end of standard input":
            assert process.stdin is not None
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[how])
        assert process.wait(60) == (130 if how == "SIGINT" else 0)
        assert "has computed" not in stages.log(0)
