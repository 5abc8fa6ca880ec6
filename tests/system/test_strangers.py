"""What a stranger at a terminal is told when something else is at an address, or nothing."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages
from serving import Serving


def run(*arguments: str | Path, code: int) -> subprocess.CompletedProcess[str]:
    """Runs minigpt, which must end with this code and without a traceback."""
    command = [sys.executable, "-m", "minigpt", *map(str, arguments)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


@pytest.fixture(scope="module")
def stages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    with Stages(folder, "1+2+1", tmp_path_factory.mktemp("stages")) as running:
        yield running.start_all()


@contextlib.contextmanager
def saying(words: bytes) -> Iterator[str]:
    """The address of a server that says this to whoever connects, and waits until they hang up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    with sock, contextlib.suppress(OSError):
                        sock.sendall(words)
                        while sock.recv(4096):
                            pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(60)


@pytest.mark.parametrize(
    "words", [b"<!DOCTYPE HTML>\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"]
)
def test_what_is_no_stage_is_called_so(stages: Stages, words: bytes) -> None:
    pipeline = ("--manifest", stages.path, "--allow-mock")
    with saying(words) as address:
        done = run("generate", "1 2", *pipeline, "--place", f"0={address}", code=4)
        assert f"what listens at {address} is most likely no stage of this version of minigpt" in done.stderr
        assert "correct the place of stage 0, or see what runs there" in done.stderr
        assert "most likely no stage" in run("status", *pipeline, "--place", f"0={address}", code=4).stdout


def test_what_says_nothing_may_be_no_stage_either(stages: Stages) -> None:
    with saying(b"") as address:
        done = run("generate", "1 2", "--manifest", stages.path, "--allow-mock", "--place", f"0={address}",
                   "--handshake-timeout", "0.5", code=4)  # fmt: skip
    assert f"allow it more with --handshake-timeout, or see what listens at {address}" in done.stderr


def test_a_stage_that_is_late_is_given_more_by_an_option(stages: Stages) -> None:
    done = run("generate", "1 2", "--manifest", stages.path, "--allow-mock", "--timeout", "1e-9", code=4)
    assert "stage 0 did not answer in time, 1e-09 s: allow it more with --timeout, or see what it is" in done.stderr


def test_where_nothing_listens_the_next_step_is_said(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "places.json").write_text(
        json.dumps({str(index): f"tcp://127.0.0.1:{index + 1}" for index in range(3)})
    )
    done = run(
        "generate", "1 2", "--manifest", stages.path, "--allow-mock", "--places", tmp_path / "places.json", code=4
    )
    assert "tcp://127.0.0.1:1: Connection refused: start it, or correct its place" in done.stderr


def test_status_shows_the_stages_behind_one_that_is_gone(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "1+1+1+1", tmp_path) as stages:
        stages.start_all()
        stages.kill(1)
        stages.kill(3)
        status = ("status", "--manifest", stages.path, "--allow-mock")
        lines = run(*status, code=4).stdout.splitlines()
        assert "evidence accepted" in lines[0]
        assert "stage 1 cannot be reached" in lines[1]
        assert "Connection refused: start it, or correct its place" in lines[1]
        found = f"not asked, because stage 1 before it failed; something listens at tcp://127.0.0.1:{stages.ports[2]}"
        assert lines[2].endswith(found)
        assert "it cannot be reached from here either: tcp://127.0.0.1" in lines[3]
        told = json.loads(run(*status, "--json", code=4).stdout)["stages"]
        assert [stage["evidence"] for stage in told] == ["accepted", "unknown", "unknown", "unknown"]
        stages.kill(0)
        lines = run(*status, code=4).stdout.splitlines()
        assert "stage 0 cannot be reached" in lines[0]
        assert "something listens at" in lines[2]


def test_what_has_no_effect_on_a_running_pipeline_is_warned_of(stages: Stages, tmp_path: Path) -> None:
    run("keygen", "-o", tmp_path / "key", code=0)
    flags = ("--manifest", stages.path, "--allow-mock", "--client-key", tmp_path / "key", "--place", "2=tcp://a:1")
    for command in (("generate", "1 2", "--max-tokens", "1"), ("status",)):
        done = run(*command, *flags, code=0)
        assert "warning: --client-key has no effect: the manifest lists no clients, and admits anyone" in done.stderr
        assert "warning: --place 2=ADDR has no effect: stage 1 goes there, by its own places file" in done.stderr


def test_a_port_in_use_is_said_with_the_option_that_chooses_another(stages: Stages) -> None:
    with saying(b"") as address:
        port = address.rpartition(":")[2]
        done = run("serve", "--manifest", stages.path, "--allow-mock", "--port", port, code=2)
        assert done.stderr.count("\n") == 1
        assert "address already in use; choose another with --port, 0 for any that is free" in done.stderr
        assert "Errno" not in done.stderr
        done = run("relay", address, "tcp://127.0.0.1:1", code=4)
        assert "Address already in use: end what listens there, or choose another port" in done.stderr
    done = run("relay", "tcp://192.0.2.1:5", "tcp://127.0.0.1:1", code=4)
    assert "this machine has no such address, wanted one of its own, or 0.0.0.0 for all of them" in done.stderr


def test_a_body_that_is_not_utf_8_is_an_invalid_request(stages: Stages) -> None:
    with Serving("--manifest", str(stages.path), "--allow-mock") as server:
        headers = {"Content-Type": "application/json"}
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = httpx.post(server.address + path, content=b'{"prompt": "\xff"}', headers=headers, trust_env=False)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", None)
            assert error["message"] == "the body is not JSON in UTF-8"
        assert server.get("/nowhere").json()["error"]["code"] == "not_found"
