"""A peer that is gone without a word is noticed: a network that drops everything, a process that is stopped."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ends import background, make, tcp_pair
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, eventually

from minigpt.client.pipeline import Pipeline
from minigpt.protocol import links, messages
from minigpt.protocol.links import StageLink
from minigpt.protocol.messages import CHUNK, Done, Failure, Reason, Reset
from transport.sockets import Wire


def test_a_tcp_connection_is_given_up_by_the_system_within_20_s() -> None:
    one, two = tcp_pair()
    for sock in (one, two):
        wire = Wire(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}
        for name, value in (wanted | {"TCP_USER_TIMEOUT": 15_000}).items():
            if hasattr(socket, name):
                assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value, name
        wire.close()


def test_a_socket_that_is_no_tcp_socket_has_no_such_options() -> None:
    one, two = socket.socketpair()
    wire = Wire(one)
    two.sendall(b"x")
    assert wire.read(1) == b"x"
    wire.close()
    two.close()


# Two machines, as far as the network is concerned: network namespaces, and a cable between them. Then each takes the
# other's address for that of a card that is not there: everything is sent, and nothing arrives.
FAR = """
import subprocess, sys, threading, time
from ends import STAGE_END
from transport.address import Address
from transport.channel import Channel, Listener

def ip(words):
    subprocess.run(["ip", *words.split()], check=True)

print("here", flush=True)
sys.stdin.readline()
ip("addr add 10.9.0.2/24 dev far")
ip("link set far up")
with Listener(Address.parse("tcp://10.9.0.2:0")) as listener:
    print(listener.address, flush=True)
    channels = [Channel.accept(listener.accept()[0], STAGE_END) for _ in range(2)]
sys.stdin.readline()
ip("neigh replace 10.9.0.1 lladdr 02:00:00:00:00:99 dev far nud permanent")
print("cut", flush=True)
sys.stdin.readline()
"""
NEAR = """
import subprocess, sys, threading, time
from ends import CLIENT_END
from transport.address import Address
from transport.channel import Channel
from transport.errors import TransportError

def ip(words):
    subprocess.run(["ip", *words.split()], check=True)

def noticed(channel, name):
    start = time.monotonic()
    try:
        channel.receive(120.0)
    except TransportError as error:
        print(name, type(error).__name__, round(time.monotonic() - start, 1), flush=True)

far = subprocess.Popen(["unshare", "--net", sys.executable, "-c", sys.argv[1]],
                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
try:
    assert far.stdout.readline() == "here\\n"
    ip("link add near type veth peer name far")
    ip(f"link set far netns {far.pid}")
    ip("addr add 10.9.0.1/24 dev near")
    ip("link set near up")
    print("", file=far.stdin, flush=True)
    address = Address.parse(far.stdout.readline().strip())
    channels = [Channel.connect(address, CLIENT_END) for _ in range(2)]
    print("", file=far.stdin, flush=True)
    assert far.stdout.readline() == "cut\\n"
    ip("neigh replace 10.9.0.2 lladdr 02:00:00:00:00:99 dev near nud permanent")
    channels[1].send({"n": 1})
    waiting = [threading.Thread(target=noticed, args=pair) for pair in zip(channels, ("idle", "unanswered"))]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
finally:
    far.kill()
    far.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for networks of its own")
@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("ip")), reason="needs unshare(1) and ip(8)")
def test_a_connection_that_is_dropped_in_silence_is_noticed() -> None:
    made = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "near", "type", "veth", "peer", "name", "far"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no network namespaces, or no virtual cable between them: {made.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", NEAR, FAR],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sorted((name, kind) for name, kind, _ in lines) == [("idle", "Truncated"), ("unanswered", "Truncated")], (
        done.stdout + done.stderr
    )
    assert all(8 < float(seconds) < 40 for *_, seconds in lines), done.stdout  # 15 and 15 to 20, on a machine with time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(SMALL, n_positions=2048)
    return write(tmp_path_factory.mktemp("model") / "small", config, random_tensors(config))


@pytest.fixture
def stages(folder: Path, tmp_path: Path) -> Iterator[Stages]:
    with Stages(folder, "2+2", tmp_path) as made:
        yield made


def ids(pipeline: Pipeline, count: int = 3) -> list[int]:
    return [token.id for token in pipeline.generate([1, 2], max_tokens=count)]


SLOW = """
import time
from minigpt.engine.model import GPT2
from minigpt.stage import __main__
forward = GPT2.forward
def slow(*args):
    time.sleep({})
    return forward(*args)
GPT2.forward = slow
__main__.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_that_is_stopped_in_an_answer_is_dead_after_15_s(stages: Stages, victim: int) -> None:
    stages.start(1, python=("-c", SLOW.format(0.1)))
    stages.start(0)
    command = [sys.executable, "-m", "minigpt", "generate", "--manifest", str(stages.path), "--allow-mock"]
    client = subprocess.Popen(
        [*command, "1 2 3", "--max-tokens", "1000", "--retry-for", "0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert client.stdout is not None
        assert client.stdout.read(1)
        stages.processes[victim].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        _, told = client.communicate(timeout=100)
        assert 10 < time.monotonic() - start < 60  # and not 120
        assert client.returncode == 4
        assert f"stage {victim} said nothing for 15 s" in told
    finally:
        client.kill()
        stages.processes[victim].send_signal(signal.SIGCONT)
    with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
        assert len(ids(pipeline)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "prompt"),
    [(20, [1, 2]), (4, [1, 2] * (CHUNK // 2) * 5)],  # in one pass; and in passes of which none is long
)
def test_a_stage_that_computes_for_more_than_15_s_is_not_dead(stages: Stages, seconds: int, prompt: list[int]) -> None:
    stages.start(1, python=("-c", SLOW.format(seconds)))
    stages.start(0)
    with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
        start = time.monotonic()
        assert len(list(pipeline.generate(prompt, max_tokens=1))) == 1
        assert time.monotonic() - start > 15


def test_a_ping_is_no_news_on_a_link_that_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = make()
    pipe = SimpleNamespace(config=SMALL, stages=(0, 1))
    link = StageLink(near, pipe, 1, 60.0)  # type: ignore[arg-type]
    assert far.ping()
    assert eventually(near.poll)
    assert not link.stale
    assert far.ping()
    waiting = background(link.ask, Reset())
    far.receive(60.0)
    far.send(messages.encode(Done(Reason.RESET)))
    assert waiting.join() == Done(Reason.RESET)
    assert not link.stale
    far.send(messages.encode(Failure(1, "failed", "stage 1 is stopping")))
    assert eventually(near.poll)
    assert link.stale
    far.abort()
    near.abort()


def test_a_link_that_was_idle_is_asked_once_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = make()
    link = StageLink(near, SimpleNamespace(config=SMALL, stages=(0, 1)), 1, 60.0)  # type: ignore[arg-type]
    sent = near.records_sent
    assert link.usable()
    assert near.records_sent == sent
    monkeypatch.setattr(links, "PROBE_AFTER", 0.0)
    asked = background(link.usable)
    assert far.receive(60.0) == messages.encode(Reset())
    far.send(messages.encode(Done(Reason.RESET)))
    assert asked.join()
    assert not link._due
    monkeypatch.setattr(links, "PROBE", 0.1)
    assert not link.usable()  # it said nothing
    assert link._due
    for end in (near, far):
        end.abort()


PROBING = "from minigpt.protocol import links; from minigpt.stage.__main__ import main; links.PROBE_AFTER = 0.0; main()"


def test_a_stage_that_hung_while_its_link_was_idle_costs_a_new_link_and_no_request(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.start(1)
    stages.start(0, python=("-c", PROBING))
    with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
        wanted = ids(pipeline)
        assert ids(pipeline) == wanted
        monkeypatch.setattr(links, "PROBE_AFTER", 0.0)
        assert ids(pipeline) == wanted  # all links were asked, and good
        for victim, sign in ((0, ": open"), (1, "link to stage 1: evidence accepted")):
            before = stages.log(0).count(sign)
            process = stages.processes[victim]
            process.send_signal(signal.SIGSTOP)
            threading.Timer(links.PROBE + 5.0, process.send_signal, [signal.SIGCONT]).start()
            assert ids(pipeline) == wanted
            assert eventually(lambda: stages.log(0).count(sign) > before)  # noqa: B023
