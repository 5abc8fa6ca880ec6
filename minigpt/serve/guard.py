"""Every request passes here first: who may ask, from where, how much, for how long. Here its line of the log is made.

Browsers are the danger of a server on loopback: any page may send requests to it. So a foreign Origin is refused, and a
Host that is none of ours, by which a page could pass for us (DNS rebinding); and a body must be JSON, which a form's
never is.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Callable, Container, Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt.serve.metrics import Metrics
from minigpt.serve.schema import Problem, problem

MAX_BODY = 2**20  # bytes; 128 prompts of 1024 ids are 900 KB
BODY = 10.0  # seconds that a body may take
_HOST = re.compile(r"((?P<name>[a-z0-9._-]+)|\[(?P<address>[0-9a-f:.]+)\])(:[0-9]{1,5})?")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    # The page's own files, and nothing else: no inline script, no other host, no frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """The application, guarded.

    Args:
        names: of this server: what a Host may say, beside loopback.
        numbers: whether it may also be any IP address: by such a one no page can pass for us.
        key: what clients must know, None for nothing.
        routes: of the application, by which the log names even what does not get there.
        log: writes the line of a request, which says nothing of its content.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        names: Iterable[str],
        numbers: bool,
        key: str | None,
        routes: Container[str],
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._names = LOOPBACK | {name.lower() for name in names}
        self._numbers = numbers
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()
        self._routes = routes
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan: there is nothing else
            await self._app(scope, receive, send)
            return
        began, status, whole = time.perf_counter(), 0, False

        async def answer(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            else:
                whole = not message.get("more_body", False)
            await send(message)

        try:
            self._admit(scope["method"], scope["path"], Headers(scope=scope))
            body = await _body(receive, Headers(scope=scope))
            if not await _until_gone(self._app, scope, body, receive, answer) and not whole:
                status = 499  # as nginx logs it: the client has left
        except Problem as error:
            headers = {"Connection": "close"}  # what is left of a body is not read
            if error.status == 401:
                headers["WWW-Authenticate"] = 'Basic realm="minigpt: any name, and the key", charset="UTF-8"'
            await JSONResponse(error.body, error.status, headers)(scope, receive, answer)
        except Exception as error:  # a bug; if the application has told the client, its response is whole
            if not whole:
                told = problem(error)
                if status:
                    raise ConnectionAbortedError from None  # uvicorn closes the connection
                await JSONResponse(told.body, told.status)(scope, receive, answer)
        finally:
            self._tell(scope, status, time.perf_counter() - began)

    def _admit(self, method: str, path: str, headers: Headers) -> None:
        """Raises Problem unless this client may ask this."""
        host = headers.get("host", "")
        if not self._known(host):
            text = f"Host is {host[:80]!r}, wanted a name of this server: start it with --hostname to add one"
            raise Problem(403, text, code="unknown_host")
        origins = headers.getlist("origin")
        if origins not in ([], [f"http://{host}"], [f"https://{host}"]):
            told = ", ".join(origins)[:80]
            raise Problem(403, f"Origin is {told!r}: pages of other hosts may not ask", code="foreign_origin")
        if "content-length" in headers and "transfer-encoding" in headers:  # a proxy might see other requests in it
            raise Problem(400, "there are Content-Length and Transfer-Encoding, wanted one of them")
        if self._key is not None and path != "/health" and not self._knows_key(headers.get("authorization", "")):
            text = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise Problem(401, text, code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise Problem(415, f"Content-Type is {kind[:80]!r}, wanted application/json")

    def _known(self, host: str) -> bool:
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match["address"] or match["name"]
        return name in self._names or (self._numbers and is_address(name))

    def _knows_key(self, given: str) -> bool:
        """Whether an Authorization has the key: as a token, or as the password that a browser asks for."""
        scheme, _, value = given.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        elif scheme.lower() != "bearer":
            return False
        assert self._key is not None
        return hmac.compare_digest(hashlib.sha256(value.strip().encode()).digest(), self._key)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        # The route and not the path: what a client writes there may be anything.
        known = scope["path"] if scope["path"] in self._routes else "other"
        route = getattr(scope.get("route"), "path", known)
        self._metrics.requests.labels(route, scope["state"].get("outcome", status)).inc()
        fields = {
            "method": scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other",
            "path": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
        }
        for name in ("outcome", "prompt_tokens", "completion_tokens"):
            if name in scope["state"]:
                fields[name] = scope["state"][name]
        self._log(fields)


def is_address(host: str) -> bool:
    """Whether a host is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


async def _body(receive: Receive, headers: Headers) -> bytes:
    """The body, within its bounds. Raises Problem."""
    too_long = Problem(413, f"the body is longer than {MAX_BODY} bytes")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Problem(400, "the body is not whole")
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {BODY:.0f} s") from None


async def _until_gone(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
    """Runs the application; cancels it when the client leaves, and is False then."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:  # that the client has left is noticed here, and not by the application
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    ended = False

    async def run() -> None:
        nonlocal ended
        await app(scope, replay, send)
        ended = True

    running, leaving = asyncio.ensure_future(run()), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            running.cancel()
        await asyncio.wait({running})
        if not running.cancelled():
            running.result()  # raises its error
        return ended
    finally:
        leaving.cancel()
        running.cancel()


def lines(fmt: str, show: Callable[[str], None]) -> Callable[[dict[str, Any]], None]:
    """What writes the log: "text" for people, or "json", one object a line."""

    def write(fields: dict[str, Any]) -> None:
        if fmt == "json":
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            show(json.dumps({"time": now, **fields}))
        else:
            words = [str(fields.pop(name)) for name in ("message", "method", "path", "status") if name in fields]
            show(" ".join([*words, *(f"{name}={value}" for name, value in fields.items())]))

    return write
