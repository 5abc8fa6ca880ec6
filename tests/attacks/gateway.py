"""Attacks 60 to 63: on `minigpt serve`, by web pages, other users of the machine, or whoever reaches its port.

The server is a client of the arena's pipeline. While it is attacked, an honest client asks it, and must get the right
tokens; before and after, the pipeline's steps and the server's memory are looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from serving import Serving

from attacks import Seen, attack, require
from attacks.arena import Arena, eventually, resident
from attacks.load import Crowd, sockets_of

MB = 1 << 20
MOST_MEMORY = 100 * MB  # above the quiet state
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


class Honest:
    """An honest client, which asks all the while: each time it must be given the right tokens."""

    def __init__(self, arena: Arena, server: Serving) -> None:
        self._body = {"prompt": list(arena.prompt()), "max_tokens": 5, "temperature": 0}
        self._wanted = "".join(f"{token} " for token in arena.expected(arena.prompt()))
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.served = 0
        self.slowest = 0.0
        self.wrong = ""

    def ask(self) -> None:
        """Raises Survived unless it is served."""
        answer = self._server.post("/v1/completions", self._body)
        require(answer.status_code == 200, f"an honest client was told {answer.status_code}: {answer.text[:200]}")
        require(answer.json()["choices"][0]["text"] == self._wanted, "an honest client was given other tokens")

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            began = time.monotonic()
            try:
                self.ask()
            except Exception as error:
                self.wrong = f"{type(error).__name__}: {error}"
                return
            self.served += 1
            self.slowest = max(self.slowest, time.monotonic() - began)

    def __enter__(self) -> Honest:
        self.ask()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            more = self.served + 3
            eventually(lambda: self.wrong != "" or self.served >= more, 60)
        self._stop.set()
        self._thread.join(70)
        if kind is None:
            require(not self.wrong, f"meanwhile an honest client failed: {self.wrong}")
            require(self.served >= 3, "an honest client was not served meanwhile")


@contextlib.contextmanager
def serving(arena: Arena) -> Iterator[tuple[Serving, Honest]]:
    """A server, and an honest client of it; afterwards the server must have lived, and kept little."""
    arena.calm()
    with Serving("--manifest", str(arena.stages.path), "--allow-mock") as server:
        honest = Honest(arena, server)
        honest.ask()
        before = resident(server.process.pid)
        with honest:
            yield server, honest
        grown = resident(server.process.pid) - before
        arena.notes.append(
            f"the server's memory +{grown / MB:.1f} MB; an honest client was served {honest.served} times, after "
            f"{honest.slowest:.2f} s at most"
        )
        require(grown < MOST_MEMORY, f"the server's memory is {grown / MB:.0f} MB above the quiet state")
        require(server.process.poll() is None, "the server is dead")
        require("Traceback" not in server.log, "the server fell over")
        require("failed:" not in server.log, "the server has a bug, and says so in its log")


def say(server: Serving, data: bytes, seconds: float = 30.0) -> bytes:
    """What the server answers to these bytes, up to its end."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), seconds) as sock:
        with contextlib.suppress(OSError):  # it may have closed already
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while part := sock.recv(2**16):
                answer += part
    return answer


@attack(
    60,
    "a web page asks the local server: with its own Origin, under its own name (DNS rebinding), with forms",
    "refused before anything is computed; nothing that lets a page read an answer",
)
def pages(arena: Arena) -> Seen:
    with serving(arena) as (server, _):
        body = {"prompt": [1, 2, 3], "max_tokens": 64}
        own = f"127.0.0.1:{server.port}"
        tokens = server.metric("minigpt_prompt_tokens_total") % 9  # the honest client's prompts have 9
        said = []
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://{own}.evil.example"},
            {"Host": "evil.example"},
            {"Host": f"evil.example:{server.port}", "Origin": f"http://evil.example:{server.port}"},
            {"Host": "127.0.0.1.nip.io"},
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
        ):
            answer = server.post("/v1/completions", body, **headers)
            require(answer.status_code in (403, 415), f"{headers} was told {answer.status_code}")
            allowed = [name for name in answer.headers if name.startswith("access-control")]
            require(not allowed, f"an answer has {allowed}")
            said.append(str(answer.status_code))
        preflight = say(
            server,
            f"OPTIONS /v1/completions HTTP/1.1\r\nHost: {own}\r\nOrigin: https://evil.example\r\n"
            "Access-Control-Request-Method: POST\r\n\r\n".encode(),
        )
        require(b" 403 " in preflight[:40], "a page's question beforehand was not refused")
        require(b"access-control" not in preflight.lower(), "a page's question beforehand was allowed something")
        require(server.metric("minigpt_prompt_tokens_total") % 9 == tokens, "a page's prompt was computed")
    return Seen("honest client served", f"told {', '.join(dict.fromkeys(said))}; no step computed for it")


GARBAGE: dict[str, bytes] = {
    "no HTTP": b"\x16\x03\x01\x02\x00" + bytes(200),
    "no request line": b"hello\r\n\r\n",
    "the link's own preamble": b"mGPT\x02\x02\x00\x00" + bytes(1000),
    "endless headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(20_000)),
    "a header of 1 MB": b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * MB + b"\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "a length and chunks": HEAD
    + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "a length of 10 GB": HEAD + b"Content-Length: 10000000000\r\n\r\n{",
    "chunks for ever": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n%s\r\n" % (b" " * 0x8000) * 64,
    "a body cut off": HEAD + b'Content-Length: 100\r\n\r\n{"prompt": [1',
    "brackets": HEAD + b"Content-Length: 500000\r\n\r\n" + b"[" * 500_000,
    "braces": HEAD + b"Content-Length: 600000\r\n\r\n" + b'{"a":' * 120_000,
    "a number of 900 000 digits": HEAD + b"Content-Length: 900016\r\n\r\n" + b'{"max_tokens": ' + b"9" * 900_000 + b"}",
    "300 000 wrong prompts": HEAD + b"Content-Length: 900013\r\n\r\n" + b'{"prompt": [' + b"{}," * 300_000 + b"]",
    "no UTF-8": HEAD + b"Content-Length: 14\r\n\r\n" + b'{"prompt": "\xff',
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
}


@attack(
    61,
    "bytes that are no HTTP, bodies that are no request, lengths that lie, endless headers and bodies",
    "refused with an error or a closed connection; memory bounded; an honest client served",
)
def garbage(arena: Arena) -> Seen:
    told: list[str] = []
    with serving(arena) as (server, _):
        for _ in range(5 if arena.thorough else 1):
            for name, data in GARBAGE.items():
                answer = say(server, data)
                status = answer[9:12].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"
                fine = status == "closed" or status.startswith("4") or (status == "200" and name == "another protocol")
                require(fine, f"{name} was told {status}")
                told.append(status)
        for i in range(2000 if arena.thorough else 200):
            say(server, os.urandom(1 + i % 300))
            say(server, HEAD + b"Content-Length: 64\r\n\r\n" + os.urandom(64))
    return Seen("honest client served", "; ".join(f"{told.count(each)} × {each}" for each in dict.fromkeys(told)))


@attack(
    62,
    "heads and bodies of one byte a second, readers that stop, clients that leave at once",
    "deadlines for each; what nobody waits for is not computed; an honest client served",
    slow=True,
)
def slow(arena: Arena) -> Seen:
    with serving(arena) as (server, _), contextlib.ExitStack() as stack:
        stream = {
            "prompt": list(arena.prompt()),
            "max_tokens": 500,
            "n": 20,
            "stream": True,
            "minigpt": {"spans": True},
        }
        asked = json.dumps(stream).encode()
        whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(asked) + asked
        count = 100 if arena.thorough else 30
        heads = stack.enter_context(Crowd(server.port, count, b"GET / HTTP/1.1\r\nx: ", drip=True))
        bodies = stack.enter_context(Crowd(server.port, count, HEAD + b"Content-Length: 5000\r\n\r\n{", drip=True))
        for _ in range(4):  # readers that stop
            reader = stack.enter_context(socket.socket())
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", server.port))
            reader.sendall(whole)
        for _ in range(count):
            with socket.create_connection(("127.0.0.1", server.port), 30) as leaving:
                leaving.sendall(whole)
        require(eventually(lambda: heads.closed >= count, 60), f"{count - heads.closed} slow heads were never ended")
        require(eventually(lambda: bodies.closed >= count, 60), f"{count - bodies.closed} slow bodies were never ended")
        stack.close()
        gone = eventually(lambda: server.metric("minigpt_requests_waiting") < 2, 60)
        require(gone, "requests of clients that have left still wait")
    return Seen("honest client served", "slow ones ended, those of leavers cancelled")


@attack(
    63,
    "10 000 connections to the server: silent, and with half a request; and each sends a body in part",
    "sockets and memory bounded; an honest client served",
    slow=True,
)
def connections(arena: Arena) -> Seen:
    most = 0
    with serving(arena) as (server, _):
        for first in (b"", HEAD[:40], HEAD + b"Content-Length: 5000\r\n\r\n{"):
            with contextlib.ExitStack() as stack:
                for i in range(10_000 if arena.thorough else 1000):
                    sock = stack.enter_context(socket.socket())
                    sock.settimeout(10)
                    sock.connect(("127.0.0.1", server.port))
                    with contextlib.suppress(OSError):
                        sock.sendall(first)
                    if i % 500 == 0:
                        most = max(most, sockets_of(server.process.pid))
                most = max(most, sockets_of(server.process.pid))
                require(most < 1000, f"the server holds {most} sockets")
    arena.notes.append(f"63: at most {most} sockets in the server")
    return Seen("honest client served", "sockets bounded; those that say nothing are ended for newcomers")
