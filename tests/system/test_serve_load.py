"""`minigpt serve` under load, and when clients or stages fail: everybody else is served all the same."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import ROOT, Stages, eventually
from serving import Serving

import minigpt

PROMPT = "The capital of France is"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TINY = ROOT / "minigpt" / "data"


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    with Stages(TINY, "6+6", tmp_path_factory.mktemp("stages")) as made:
        yield made.start_all("--max-sequences", "32")  # some tests have a server of their own


@pytest.fixture(scope="module")
def server(stages: Stages) -> Iterator[Serving]:
    flags = ("--manifest", str(stages.path), "--model", "tiny", "--allow-mock", "--model-name", "tiny")
    with Serving(*flags, "--retry-for", "0") as made:
        yield made


def text_of(prompt: str, **options: Any) -> str:
    return "".join(token.text or "" for token in minigpt.load("tiny").generate(prompt, **options))


def request(server: Serving, body: dict[str, Any]) -> socket.socket:
    """A bare connection, with a request sent."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    data = json.dumps({"prompt": PROMPT, "temperature": 0} | body).encode()
    sock.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def test_64_streams_at_once_each_get_their_own_text(server: Serving) -> None:
    with server.openai(timeout=300) as client:

        def stream(seed: int) -> str:
            options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": seed}
            events = client.completions.create(model="tiny", prompt=PROMPT, stream=True, **options)
            return "".join(event.choices[0].text for event in events)

        with ThreadPoolExecutor(64) as threads:
            texts = list(threads.map(stream, range(64)))
    model = minigpt.load("tiny")
    for seed, text in enumerate(texts):
        tokens = model.generate(PROMPT, max_tokens=20, temperature=1.0, seed=seed)
        assert text == "".join(token.text or "" for token in tokens)


def test_a_full_queue_is_told_when_to_come_again(stages: Stages) -> None:
    flags = ("--manifest", str(stages.path), "--model", "tiny", "--allow-mock", "--connections", "1", "--queue", "1")
    with Serving(*flags) as server, contextlib.ExitStack() as stack:
        long = {"max_tokens": 500, "n": 100, "stream": True}
        running = stack.enter_context(request(server, long))
        assert running.recv(1)
        waiting = stack.enter_context(request(server, long))
        assert eventually(lambda: server.metric("minigpt_requests_waiting") == 1)
        answer = server.post("/v1/completions", {"prompt": PROMPT})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        waiting.close()  # who leaves the queue makes room in it, and is not computed for
        assert eventually(lambda: server.metric("minigpt_requests_waiting") == 0)
        running.close()
        assert eventually(lambda: server.metric("minigpt_answers_running") == 0)
        assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_costs_one_more_token(server: Serving, stream: bool) -> None:
    before = server.metric("minigpt_generated_tokens_total")
    vanishing = request(server, {"max_tokens": 500, "n": 100, "stream": stream})
    assert eventually(lambda: server.metric("minigpt_generated_tokens_total") > before)
    vanishing.close()
    assert eventually(lambda: server.metric("minigpt_answers_running") == 0)
    tokens = server.metric("minigpt_generated_tokens_total")
    assert tokens - before < 40_000
    time.sleep(0.5)
    assert server.metric("minigpt_generated_tokens_total") == tokens
    assert eventually(lambda: " 499 " in server.log)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_sends_on_while_it_is_answered_is_ended(server: Serving, at_once: bool) -> None:
    """Or its leaving would not be noticed: while a second request waits, nothing is read."""
    data = json.dumps({"prompt": PROMPT, "max_tokens": 500, "n": 100, "temperature": 0}).encode()
    first = HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    second = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(first + second if at_once else first)
        if not at_once:
            assert eventually(lambda: server.metric("minigpt_answers_running") > 0)
            sock.sendall(second)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1000) == b""
        assert eventually(lambda: server.metric("minigpt_answers_running") == 0)


def test_a_reader_that_stops_keeps_no_connection_of_the_pipeline(server: Serving) -> None:
    """Eight of them, as many as the pipeline has connections: their answers end, read or not."""
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.connect(("127.0.0.1", server.port))
            body = json.dumps(
                {"prompt": PROMPT, "max_tokens": 500, "stream": True, "minigpt": {"spans": True}}
            ).encode()
            slow.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: server.metric("minigpt_answers_running") > 0)
        assert eventually(lambda: server.metric("minigpt_answers_running") == 0)
        began = time.monotonic()
        assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1}).status_code == 200
        assert time.monotonic() - began < 30


def test_a_stage_that_is_killed_is_named_and_served_again_once_it_is_back(stages: Stages, server: Serving) -> None:
    wanted = text_of(PROMPT, max_tokens=20)
    failures: list[openai.APIError] = []
    stop = threading.Event()

    def load() -> None:
        with server.openai() as client:
            while not stop.is_set():
                try:
                    events = client.completions.create(
                        model="tiny", prompt=PROMPT, max_tokens=200, temperature=0, stream=True
                    )
                    text = "".join(event.choices[0].text for event in events)
                    assert text.startswith(wanted)
                except openai.APIError as error:
                    failures.append(error)
                    time.sleep(0.05)

    with ThreadPoolExecutor(4) as threads, server.openai() as client:
        try:
            running = [threads.submit(load) for _ in range(4)]
            assert eventually(lambda: server.metric("minigpt_answers_running") == 4)
            for index in (1, 0):
                failures.clear()
                stages.kill(index)
                assert eventually(lambda: len(failures) > 8)
                said = [str(failure) for failure in failures]
                assert all(f"stage {index}" in message for message in said), said
                # Who had no token yet gets a status, and whoever had some an event with the same object.
                assert any(isinstance(failure, openai.InternalServerError) for failure in failures)
                answer = server.get("/ready")
                assert (answer.status_code, answer.json()["ready"], answer.json()["stage"]) == (503, False, index)
                assert f"stage {index}" in answer.json()["error"]["message"]
                told = server.get("/v1/attestation").json()["stages"][index]
                assert told["verdict"] == "UNKNOWN"
                assert told["evidence"] is None
                stages.start(index, "--max-sequences", "32")
                back = time.monotonic()
                assert eventually(lambda: server.get("/ready").status_code == 200)
                served = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
                assert served.choices[0].text == wanted
                took = time.monotonic() - back
                print(f"served {took:.2f} s after stage {index} was back")
                assert took < 10
        finally:
            stop.set()
        for each in running:
            each.result(60)


def test_an_error_after_the_first_token_is_an_event_and_then_the_end(stages: Stages, server: Serving) -> None:
    with request(server, {"max_tokens": 500, "n": 100, "stream": True}) as sock:
        data = sock.recv(2000)
        assert b"200 OK" in data
        stages.kill(1)
        try:
            while b"[DONE]" not in data[-40:] and (part := sock.recv(2**16)):
                data = data[-4000:] + part
        finally:
            stages.start(1, "--max-sequences", "32")
    last, done = [block for block in data.split(b"\n") if block.startswith(b"data: ")][-2:]
    assert done == b"data: [DONE]"
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "pipeline_unavailable")
    assert "stage 1" in error["message"]
    assert eventually(lambda: "outcome=503" in server.log)


def test_a_stage_that_other_code_runs_in_is_refused_and_named(tmp_path: Path) -> None:
    with Stages(TINY, "6+6", tmp_path) as stages:
        stages.start_all()
        with Serving("--manifest", str(stages.path), "--model", "tiny", "--allow-mock") as server:
            assert server.get("/ready").status_code == 200
            (tmp_path / "other").mkdir()
            other = Stages(TINY, "6+6", tmp_path / "other")  # its keys are endorsed by another root
            try:
                key = other.key(1)
            finally:
                other.close()
            stages.kill(1)
            stages.start(1, key=key)
            answer = server.get("/ready")
            assert eventually(lambda: server.get("/ready").json().get("stage") == 1)
            answer = server.get("/ready")
            assert answer.status_code == 503
            told = server.get("/v1/attestation").json()["stages"][1]
            assert told["verdict"] == "FAIL"
            assert "wanted" in " ".join(told["checks"])
            error = server.post("/v1/completions", {"prompt": PROMPT}).json()["error"]
            assert "evidence refused" in error["message"]


def test_a_pipeline_that_hangs_is_not_ready(stages: Stages) -> None:
    flags = ("--manifest", str(stages.path), "--model", "tiny", "--allow-mock")
    with Serving(*flags) as server:
        assert server.get("/ready").status_code == 200
        process = stages.processes[0]
        process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(1.1)  # for which a report is fresh
            answer = server.get("/ready")
            assert (answer.status_code, answer.json()["stage"]) == (503, 0)
            assert server.get("/health").status_code == 200
        finally:
            process.send_signal(signal.SIGCONT)
        assert eventually(lambda: server.get("/ready").status_code == 200)


@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_that_hangs_does_not_hang_the_metrics_and_is_not_up(stages: Stages, index: int) -> None:
    with Serving("--manifest", str(stages.path), "--model", "tiny", "--allow-mock") as server:
        assert server.metric("minigpt_stage_up") == 2
        process = stages.processes[index]
        process.send_signal(signal.SIGSTOP)
        try:
            took, up = [], f'minigpt_stage_up{{stage="{index}"}} '
            for _ in range(4):
                time.sleep(1.1)  # for which a report is fresh
                began = time.monotonic()
                text = server.get("/metrics").text
                took.append(time.monotonic() - began)
                assert f"\n{up}0.0\n" in text
                assert f'minigpt_stage_uptime{{stage="{index}"}}' not in text
                assert "\nminigpt_generated_tokens_total " in text
            assert min(took) < 4.5, took  # a report may take 5 s, and a new link 10
        finally:
            process.send_signal(signal.SIGCONT)
        assert eventually(lambda: server.metric("minigpt_stage_up") == 2)


def test_a_slow_body_and_a_slow_head_have_deadlines(server: Serving) -> None:
    """And nobody waits for them."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    )
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60)) for _ in range(3)]
        slow[1].sendall(head)
        slow[2].sendall(head + b"\r\n{")
        assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1}).status_code == 200
        dripping = threading.Event()

        def drip() -> None:
            while not dripping.wait(1):
                for sock in slow[1:]:
                    with contextlib.suppress(OSError):
                        sock.send(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert b" 408 " in slow[2].recv(1000)
            for sock in slow[:2]:
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1000) == b""
        finally:
            dripping.set()
            thread.join()


def test_a_body_of_nothing_but_errors_is_refused_at_once(server: Serving) -> None:
    """At its first error: with one for each item, these took seconds and 1 GB, and nobody else was served meanwhile."""
    many = [{}] * 260_000
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": many}]}),
        ("/v1/chat/completions", {"messages": many}),
        ("/v1/completions", {"prompt": many}),
        ("/v1/completions", {"prompt": PROMPT, "stop": many}),
        ("/detokenize", {"tokens": many}),
    ):
        assert server.post(path, body).status_code == 400
    peak = Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]
    assert int(peak) < 500_000  # kB; it was 1.1 million


@pytest.mark.parametrize("kind", ["unknown fields", "parts of a message"])
def test_a_request_that_waits_holds_little_of_its_body(stages: Stages, kind: str) -> None:
    """1 MiB of nested lists are 24 MB of objects: they go before the request waits."""
    body: dict[str, Any] = {"max_tokens": 500, "n": 100, "temperature": 0}
    if kind == "unknown fields":
        path, body = "/v1/completions", body | {"prompt": PROMPT, "x": [[]] * 250_000}
    else:
        message = {"role": "user", "content": [{"type": "text", "text": ""}] * 950}
        path, body = "/v1/chat/completions", body | {"messages": [message] * 30}
    flags = ("--manifest", str(stages.path), "--model", "tiny", "--allow-mock", "--connections", "1")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    whole = head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    with Serving(*flags, "--chat-template", "plain") as server, contextlib.ExitStack() as stack:

        def load() -> float:
            return server.metric("minigpt_requests_waiting") + server.metric("minigpt_answers_running")

        def memory_with(count: int) -> int:
            """The server's memory in kB, with so many requests; all but one wait."""
            for had in range(int(load()), count):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60)).sendall(whole)
                assert eventually(lambda had=had: load() > had)  # type: ignore[misc]
            return int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmRSS:")[1].split()[0])

        before = memory_with(4)
        grown = memory_with(24) - before
        assert grown < 20 * 6000, f"{grown} kB for 20 requests"  # most of it the body's own bytes


GATED = """
import os, sys, time
from minigpt.__main__ import main
from minigpt.checkpoint.tokenizer import Tokenizer
encode = Tokenizer.encode
def gated(self, text):
    print("encodes", file=sys.stderr, flush=True)
    while not os.path.exists(os.environ["GATE"]):
        time.sleep(0.01)
    return encode(self, text)
Tokenizer.encode = gated
sys.exit(main(sys.argv[1:]))
"""


def test_texts_are_encoded_by_few_threads_and_not_for_clients_that_have_left(tmp_path: Path) -> None:
    data = json.dumps({"prompt": "Lima"}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data
    flags = ("--connections", "2", "--queue", "8")
    with Serving(*flags, python=("-c", GATED), GATE=str(tmp_path / "gate")) as server, contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60)).sendall(whole)
        assert eventually(lambda: server.log.count(" 429 ") == 2 and server.log.count("encodes") == 2)
        assert server.get("/health").status_code == 200
        stack.close()
        assert eventually(lambda: server.log.count(" 499 ") == 10)
        (tmp_path / "gate").touch()
        assert server.post("/tokenize", {"prompt": "Lima"}).json()["count"] > 0
        assert server.log.count("encodes") == 3


def test_idle_connections_make_room_for_newcomers(server: Serving) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(700):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60))
        for _ in range(3):
            assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1}).status_code == 200
