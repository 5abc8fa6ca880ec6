"""Starts one stage on the machine where this object is, for a launcher that is elsewhere (`on_ray`).

What the stage says and needs passes through here: the public half of its key, the root's endorsement, manifest and
places. No prompt, token, weight or private key does.
"""

import os
import re
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

from attest.document import write_file
from minigpt.checkpoint import sources
from minigpt.launch import isolated
from minigpt.launch.local import bound, last_words
from minigpt.protocol.messages import printable

READY = 600.0  # seconds that a stage may take to load, a download of its checkpoint included
PATIENCE = 5.0  # seconds that it may take to end


class Agent:
    """One stage's process, and its files in a temporary folder. Both end with the process of this object.

    Args:
        index: of the stage.
        model, revision: the checkpoint, as `sources.find` takes it.
        threads: BLAS threads of the stage; None for its own choice.
    """

    def __init__(self, index: int, model: str, revision: str | None, threads: int | None) -> None:
        self._index = index
        self._checkpoint = (model, revision)
        self._threads = threads
        self._folder = tempfile.mkdtemp(prefix="minigpt-stage-")
        # However this process ends, its end of the pipe is closed then. The broom is not its child: Ray kills those.
        broom, self._broom = os.pipe()
        subprocess.run(
            ["sh", "-c", 'exec 3<&0; { cat <&3; rm -rf "$1"; } &', "sh", self._folder],
            stdin=broom, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, check=True,
        )  # fmt: skip
        os.close(broom)
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None  # bound, so that nobody else takes it while the stage starts again
        self._ready = self._endorse = -1  # descriptors
        self._said = b""
        self._loading = ""

    def bind(self, host: str) -> str:
        """The stage's address from now on, by that of this machine. Raises OSError."""
        if self._port is None:
            self._port = bound(host=host)
        return "tcp://{}:{}".format(*self._port.getsockname()[:2])

    def begin(self, document: bytes, places: bytes) -> str:
        """Starts the process, at the address of `bind`. Returns the public half of its mock key, in hex.

        Args:
            document: the manifest.
            places: where the stages are.

        Raises RuntimeError.
        """
        assert self._port is not None
        self.end()
        folder = sources.find(*self._checkpoint).folder
        manifest, log = self._path("pipeline.json"), self._path("log")
        write_file(manifest, document)
        self.locate(places)
        host, port = self._port.getsockname()[:2]
        listener = bound(port, host)
        listener.listen()
        endorsed, self._endorse = os.pipe()
        self._ready, serving = os.pipe()
        options = ["--index", str(self._index), "--model", str(folder), "--manifest", str(manifest)]
        options += ["--places", str(self._path("places.json")), "--allow-mock"]
        options += [
            "--listen",
            f"fd:{listener.fileno()}",
            "--endorsement",
            f"fd:{endorsed}",
            "--ready",
            f"fd:{serving}",
            "--until-eof",
        ]
        if self._threads is not None:
            options += ["--threads", str(self._threads)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        try:
            with open(log, "wb") as said:
                self._process = subprocess.Popen(
                    isolated.command("minigpt.stage", *options),
                    stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment,
                    pass_fds=[listener.fileno(), endorsed, serving],
                    start_new_session=True,
                )  # fmt: skip
        finally:
            listener.close()
            os.close(endorsed)
            os.close(serving)
        return self._hear(rb"stage %d key ([0-9a-f]{64})\n" % self._index, "made its key")

    def serve(self, endorsement: bytes) -> None:
        """Hands the stage the endorsement of its key, and waits until it serves. Raises RuntimeError."""
        os.write(self._endorse, endorsement)
        self._hear(rb"stage %d (ready): .*\n" % self._index, "served")

    def loading(self) -> str:
        """How far the stage said last that it is; "" before that."""
        return self._loading

    def locate(self, places: bytes) -> None:
        """Writes where the stages are. The stage reads it again for each link."""
        write_file(self._path("places.json"), places)

    def ended(self) -> str:
        """Waits until the process has ended, and says how."""
        process = self._process
        if process is None:
            return "it does not run"
        code = process.wait()
        with self._path("log").open("rb") as log:
            return last_words(code, log)

    def end(self) -> None:
        """Ends the process, if there is one, and waits for it."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()  # it ends with its standard input
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for fd in (self._ready, self._endorse):
            if fd >= 0:
                os.close(fd)
        self._ready = self._endorse = -1
        self._said, self._loading = b"", ""

    def _hear(self, pattern: bytes, what: str) -> str:
        """Waits for a line of the stage; returns its group. Raises RuntimeError if it ends before, or never says it."""
        until = time.monotonic() + READY
        with DefaultSelector() as waiting:
            waiting.register(self._ready, EVENT_READ)
            while (found := re.match(pattern, self._said)) is None:
                line, end, rest = self._said.partition(b"\n")
                if end:  # how far it is
                    self._loading, self._said = printable(line.decode(errors="replace")), rest
                    continue
                if not waiting.select(max(0.0, until - time.monotonic())):
                    raise RuntimeError(f"had not {what} in {READY:.0f} s")
                data = os.read(self._ready, 4096)
                if not data:
                    raise RuntimeError(f"{self.ended()}: before it had {what}")
                self._said += data
        self._said = self._said[found.end() :]
        return found[1].decode()

    def _path(self, name: str) -> Path:
        return Path(self._folder, name)
