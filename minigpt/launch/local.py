"""A pipeline of child processes on this machine, for a demonstration, a test or a measurement.

The keys are made here and never touch a disk: each stage gets the manifest and its mock key through a pipe. The
listening sockets are bound here and handed down, so that the manifest can name their ports; so is a file by which the
stages take turns at the cores. The children live as long as a pipe to each of them: if this process dies, even by kill
-9, they end too.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from attest.measure import measure
from attest.providers.mock import MockKey, MockPins, MockRoot
from minigpt.checkpoint import sources
from minigpt.checkpoint.sources import Checkpoint
from minigpt.errors import CheckpointError, ManifestError, StageError, UsageError, WeightsMismatch
from minigpt.launch.plan import plan, split_layers
from minigpt.protocol.manifest import Manifest

READY = 300.0  # seconds that a stage may take to load
PATIENCE = 5.0  # seconds that it may take to end


class LocalStages:
    """Child processes, one for each stage, and the manifest that describes them."""

    def __init__(self, checkpoint: Checkpoint, split: str | int, *, threads: int | None = None) -> None:
        count = len(split_layers(sources.read_config(checkpoint.folder).n_layer, split))
        root = MockRoot.generate()
        self._processes: list[subprocess.Popen[str]] = []
        self._logs: list[IO[bytes]] = []
        with contextlib.ExitStack() as sockets:
            listeners = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
            data = plan(
                checkpoint,
                split,
                pins=[MockPins(root.public, frozenset([measure()]))],
                addresses=[f"tcp://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners],
                days=1.0,
            )
            self.manifest = Manifest.parse(data)
            expires = int(self.manifest.expires.timestamp() * 1000)
            self._turns = tempfile.TemporaryFile()  # noqa: SIM115 — closed in `close`
            try:
                for index, listener in enumerate(listeners):
                    key = MockKey.generate(root, index, expires).to_json().encode()
                    self._start(index, listener, checkpoint.folder, data, key, threads)
                for index in range(count):
                    self._wait(index)
            except BaseException:
                self.close()
                raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the stages, in order."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """Ends the stages, and waits for them."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()  # they end with their standard input
        until = time.monotonic() + PATIENCE
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for file in (*self._logs, self._turns):
            file.close()
        self._processes, self._logs = [], []

    def _start(
        self, index: int, listener: socket.socket, folder: Path, manifest: bytes, key: bytes, threads: int | None
    ) -> None:
        log = tempfile.TemporaryFile()  # noqa: SIM115 — closed in `close`
        self._logs.append(log)
        with contextlib.ExitStack() as ends:
            pipes = [_pipe(ends) for _ in (manifest, key)]
            sources = [reading for reading, _ in pipes]
            command = [
                sys.executable, "-P", "-m", "minigpt.stage", "--index", str(index), "--model", str(folder),
                "--manifest", f"/dev/fd/{sources[0]}", "--mock-key", f"/dev/fd/{sources[1]}", "--allow-mock",
                "--listen", f"fd:{listener.fileno()}", "--turns", f"/dev/fd/{self._turns.fileno()}", "--until-eof",
            ]  # fmt: skip
            if threads is not None:
                command += ["--threads", str(threads)]
            home = str(Path(__file__).resolve().parents[1])  # the child runs the code that this process runs
            paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                pass_fds=[listener.fileno(), self._turns.fileno(), *sources],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
            )
        self._processes.append(process)
        for (_, writer), data in zip(
            pipes, (manifest, key), strict=True
        ):  # a child that is dead already says why itself
            with contextlib.suppress(BrokenPipeError), writer:
                writer.write(data)

    def _wait(self, index: int) -> None:
        """Waits for the line that says that a stage is ready."""
        process = self._processes[index]
        if process.stdout is None:
            raise AssertionError("standard output is a pipe")
        readable, _, _ = select.select([process.stdout], [], [], READY)
        if not readable:
            raise StageError(f"stage {index} was not ready in {READY:.0f} s", stage=index)
        line = process.stdout.readline()  # empty when the child has ended
        if line.startswith(f"stage {index} ready"):
            return
        code = process.wait()
        self._logs[index].seek(0)
        words = self._logs[index].read().decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-code}, perhaps for want of memory" if code < 0 else f"ended with code {code}"
        message = f"stage {index} {how} before it was ready: {words[-1] if words else 'it said nothing'}"
        raise _KINDS.get(code, StageError)(message)


# By a stage's exit code, what its end means to us.
_KINDS = {kind.exit_code: kind for kind in (CheckpointError, UsageError, ManifestError, WeightsMismatch)}


def _pipe(ends: contextlib.ExitStack) -> tuple[int, IO[bytes]]:
    """A pipe: the descriptor to read from, which is closed with `ends`, and a file to write to."""
    reading, writing = os.pipe()
    ends.callback(os.close, reading)
    return reading, open(writing, "wb")
