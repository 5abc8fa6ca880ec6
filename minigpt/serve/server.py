"""uvicorn, with bounds on connections, and the words at the start."""

import argparse
import asyncio
import json
import logging
import os
import shlex
import signal
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt.client.pipeline import Pipeline
from minigpt.errors import UsageError
from minigpt.serve.app import build
from minigpt.serve.chat import Templates
from minigpt.serve.guard import Guard, is_loopback, lines
from minigpt.serve.service import Service

CONNECTIONS = 512  # at a time; a newcomer then ends one that has no request under way
BACKLOG = 128  # accepted at once, before any of them is looked at
IDLE = 15.0  # seconds that a connection may take until its next request has come, headers and all
UNREAD = 60.0  # seconds for which a client may leave what was sent to it unread
MAX_HEADERS = 16 * 1024  # bytes
PIECE = 1024  # bytes given to h11 at a time
MAX_KEY = 256  # characters
_MAKE_KEY = "make one: (umask 077; head -c 24 /dev/urandom | base64 > FILE)"
DRAIN = 30.0  # seconds that answers may still take after SIGTERM


class Connection(H11Protocol):
    """One HTTP connection that costs only so much, whatever its client does."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= CONNECTIONS and not self._make_room():
            transport.abort()
        super().connection_made(transport)
        self._since, self._answered = self.loop.time(), False
        self._unread: asyncio.TimerHandle | None = None
        self._timer = self.loop.call_later(IDLE, self._look)

    def data_received(self, data: bytes) -> None:
        # In pieces: h11 bounds only a head that is not whole yet, and asyncio reads up to 256 KiB at once.
        for start in range(0, len(data), PIECE):
            super().data_received(data[start : start + PIECE])
            if self.transport.is_closing():
                return
        # Nobody needs pipelining. And as long as such bytes wait nothing is read, so that a client could leave unseen.
        if not self.idle and self.conn.trailing_data[0]:
            self.transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request is under way: none that has come whole, and is not answered yet."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _make_room(self) -> bool:
        """Ends the connection that is idle longest: one that was never answered, if there is such a one."""
        others = [each for each in self.connections if isinstance(each, Connection) and each.idle]
        if not others:
            return False
        oldest = min(others, key=lambda each: (each._answered, each._since))
        oldest.transport.abort()
        self.connections.discard(oldest)
        return True

    def _look(self) -> None:
        """Ends a connection whose next request has not come in time. Looks again as long as there are requests."""
        now = self.loop.time()
        if not self.idle or (self.cycle is not None and self.cycle.more_body):  # a body has a deadline of its own
            self._since = now
        if now - self._since >= IDLE:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(IDLE - (now - self._since), self._look)

    def on_response_complete(self) -> None:
        self._since, self._answered = self.loop.time(), True
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets no answer."""
        self.transport.close()


class Server(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C; answers under way are finished first, unless either comes again."""

    def __init__(self, app: ASGIApp, host: str, port: int, ready: Callable[[str], None]) -> None:
        """`ready` gets the address once it is served."""
        # Nothing of uvicorn's is logged but what stops it: of a request, only our own line is.
        logger = logging.getLogger("uvicorn.error")
        logger.setLevel(logging.ERROR)
        logger.addFilter(self._is_news)
        self._refused: OSError | None = None  # why it cannot listen
        super().__init__(
            uvicorn.Config(
                app, host, port, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
                server_header=False, backlog=BACKLOG, proxy_headers=False, timeout_keep_alive=int(IDLE),
                timeout_graceful_shutdown=int(DRAIN), h11_max_incomplete_event_size=MAX_HEADERS - PIECE,
            )
        )  # fmt: skip
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            number = (
                getattr(self._refused, "errno", None) or 0
            )  # a resolver's are negative, and have words of their own
            why = (
                os.strerror(number).lower() if number > 0 else getattr(self._refused, "strerror", None) or self._refused
            )
            raise UsageError(
                f"cannot listen on {self.config.host} port {self.config.port}: {why}; choose another with "
                "--port, 0 for any that is free, or end what listens there"
            ) from None
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Answers that are cut off at the end are no failure, and worth no traceback; why it cannot listen, we say."""
        if isinstance(record.msg, OSError):
            self._refused = record.msg
            return False
        return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit  # uvicorn's own takes only Ctrl-C for an end at once
        super().handle_exit(sig, frame)

    def serve_until_told(self) -> None:
        """uvicorn raises the signal that ended it again: SIGTERM is then the usual end, and no death."""
        signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        self.run()


def read_key(options: argparse.Namespace) -> str | None:
    """What clients must know, by the options of `minigpt serve`. Raises UsageError if that is not safe."""
    key = None if options.api_key_file is None else _read_key(options.api_key_file)
    if key is None and not is_loopback(options.host):
        raise UsageError(f"--host {options.host} lets other machines in: give --api-key-file, or listen on 127.0.0.1")
    return key


def run(
    pipeline: Pipeline, watcher: Pipeline, options: argparse.Namespace, key: str | None, say: Callable[[str], None]
) -> None:
    """Serves a pipeline with the options of `minigpt serve`, until it is told to end. Raises UsageError."""
    public = not is_loopback(options.host)
    name = options.model_name or pipeline.manifest.model
    service = Service(pipeline, watcher, connections=options.connections, queue=options.queue, name=name)
    template = pipeline.tokenizer.chat if pipeline.tokenizer is not None else None
    templates = Templates(template, plain=options.chat_template == "plain")
    names = {options.host, *options.hostname}
    log = lines(options.log_format, say)
    app = build(service, templates)
    routes = {route.path for route in app.routes if isinstance(route, Route)}
    guard = Guard(app, service.metrics, names=names, numbers=public, key=key, routes=routes, log=log)

    def ready(address: str) -> None:
        say(f"serving {name} at {address}, which is also a page to look at; for example:")
        say(_curl(address, name, options.api_key_file))
        if templates.name == "plain":
            say('chats become plain "role: text" lines: this model was not trained for them')
        if public:
            say("requests and the key cross the network as they are: put a proxy with TLS in front")
        elif key is None:
            say("other users of this machine can reach it too: --api-key-file FILE keeps them out")

    Server(guard, options.host, options.port, ready).serve_until_told()


def _curl(address: str, model: str, key_file: str | None) -> str:
    """A command that works as it stands."""
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 20, "temperature": 0})
    key = "" if key_file is None else f' -H "Authorization: Bearer $(cat {shlex.quote(key_file)})"'
    return f"curl {address}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _read_key(path: str) -> str:
    """What an --api-key-file holds. Raises UsageError, which does not quote it."""
    try:
        with open(path, "rb") as file:
            open_to_others = os.fstat(file.fileno()).st_mode & 0o077
            key = file.read(MAX_KEY + 1).decode("ascii").strip()
    except OSError as error:
        raise UsageError(f"--api-key-file {path}: {error.strerror}; {_MAKE_KEY}") from None
    except ValueError:
        raise UsageError(f"--api-key-file {path}: not text in ASCII; {_MAKE_KEY}") from None
    if open_to_others:
        raise UsageError(f"--api-key-file {path}: others may read it, wanted mode 0600: chmod 600 {path}")
    if not 16 <= len(key) <= MAX_KEY or not key.isprintable() or " " in key:
        raise UsageError(
            f"--api-key-file {path}: wanted one line of 16 to {MAX_KEY} characters without spaces; {_MAKE_KEY}"
        )
    return key
