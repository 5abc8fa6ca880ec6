"""A hub with one repository, served on loopback: the real hub client downloads from it."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a3f0c1d2e4b5968778695a4b3c2d1e0f12345678"


@dataclass
class Hub:
    """A hub with one repository: its address, its files, and what it was asked."""

    name: str
    files: dict[str, bytes]
    status: int = 200
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    address: str = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                hub.tokens.add(self.headers["Authorization"])
                status, headers, body = hub.answer(self.path.partition("?")[0])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                """Quiet."""

        return Handler

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path of the hub's interface."""
        if self.status != 200:
            code = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}.get(self.status, "Other")
            return self.status, {"X-Error-Code": code, "X-Error-Message": "no"}, b"{}"
        what, _, rest = path.removeprefix("/api/models/").removeprefix("/").removeprefix(self.name + "/").partition("/")
        revision, _, file = rest.partition("/")
        if self.name not in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if what == "revision":
            siblings = [{"rfilename": name} for name in self.files]
            info = {
                "id": self.name,
                "modelId": self.name,
                "sha": COMMIT,
                "private": False,
                "siblings": siblings,
                "tags": [],
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if what == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if what == "resolve" and file in self.files:
            etag = hashlib.sha1(self.files[file]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, self.files[file]
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}"

    @contextlib.contextmanager
    def serving(self) -> "Iterator[Hub]":
        """Serves on loopback until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
