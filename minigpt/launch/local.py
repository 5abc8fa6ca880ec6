"""A pipeline of child processes on this machine, for a demonstration, a test or a measurement.

The keys are made here and never touch a disk: each stage gets the manifest and its mock key through a pipe. The ports
are bound here, so that the manifest can name them, and listening sockets are handed down; so is a file by which the
stages take turns at the cores. The children live as long as a pipe to each of them: if this process dies, even by kill
-9, they end too.
"""

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

from attest.measure import measure
from attest.providers.mock import MockKey, MockPins, MockRoot
from minigpt.checkpoint import sources
from minigpt.checkpoint.sources import Checkpoint
from minigpt.errors import CheckpointError, ManifestError, StageError, UsageError, WeightsMismatch
from minigpt.launch.plan import plan, split_layers
from minigpt.protocol.manifest import Manifest

READY = 300.0  # seconds that a stage may take to load
PATIENCE = 5.0  # seconds that it may take to end

# By a stage's exit code, what its end means to us.
_KINDS = {kind.exit_code: kind for kind in (CheckpointError, UsageError, ManifestError, WeightsMismatch)}


class _Child(NamedTuple):
    """A stage's process, and the file that it logs to."""

    process: subprocess.Popen[str]
    log: IO[bytes]


class LocalStages:
    """Child processes, one for each stage: a `Launcher`. They serve when this returns.

    Args:
        checkpoint: of the model.
        split: the layers of each stage, as "6+6", or a number of stages.
        threads: BLAS threads of each stage.

    Raises:
        UsageError, CheckpointError, ManifestError, StageError: a stage cannot be planned or started.
    """

    def __init__(self, checkpoint: Checkpoint, split: str | int, *, threads: int | None = None) -> None:
        count = len(split_layers(sources.read_config(checkpoint.folder).n_layer, split))
        self._folder = checkpoint.folder
        self._threads = threads
        self._root = MockRoot.generate()
        self._children: dict[int, _Child] = {}
        self._open = contextlib.ExitStack()  # what every stage shares
        try:
            self._ports = [self._open.enter_context(_bound()) for _ in range(count)]
            self._turns = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._manifest = plan(
                checkpoint,
                split,
                pins=[MockPins(self._root.public, frozenset([measure()]))],
                addresses=self.addresses,
                days=1.0,
            )
            self.manifest = Manifest.parse(self._manifest)
            for index in range(count):
                self.start(index)
            for index in range(count):
                self.wait(index)
        except BaseException:
            self.stop()
            raise

    @property
    def addresses(self) -> list[str]:
        """Where the stages serve, in order."""
        return [f"tcp://127.0.0.1:{port.getsockname()[1]}" for port in self._ports]

    @property
    def pids(self) -> list[int]:
        """Process ids of the stages, in order."""
        return [child.process.pid for _, child in sorted(self._children.items())]

    def start(self, index: int) -> None:
        """Starts stage `index`, and does not wait."""
        key = MockKey.generate(self._root, index, int(self.manifest.expires.timestamp() * 1000)).to_json().encode()
        log = tempfile.TemporaryFile()  # noqa: SIM115 — closed in `_end`
        with contextlib.ExitStack() as handed:
            listener = handed.enter_context(_bound(self._ports[index].getsockname()[1]))
            listener.listen()
            pipes = [_pipe(handed) for _ in range(2)]
            inherited = [listener.fileno(), self._turns.fileno(), *(reading for reading, _ in pipes)]
            listening, turns, *readers = [_above_standard(handed, fd) for fd in inherited]
            command = [
                sys.executable, "-P", "-m", "minigpt.stage", "--index", str(index), "--model", str(self._folder),
                "--manifest", f"/dev/fd/{readers[0]}", "--mock-key", f"/dev/fd/{readers[1]}", "--allow-mock",
                "--listen", f"fd:{listening}", "--turns", f"/dev/fd/{turns}", "--until-eof",
            ]  # fmt: skip
            if self._threads is not None:
                command += ["--threads", str(self._threads)]
            home = str(Path(__file__).resolve().parents[2])  # the child runs the code that this process runs
            paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                pass_fds=[listening, turns, *readers],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
            )
            self._children[index] = _Child(process, log)
            for (_, writer), data in zip(pipes, (self._manifest, key), strict=True):
                with contextlib.suppress(BrokenPipeError), writer:  # a child that is dead already says why itself
                    writer.write(data)

    def wait(self, index: int) -> None:
        """Waits for the line by which stage `index` says that it serves."""
        process, log = self._children[index]
        if process.stdout is None:
            raise AssertionError("standard output is a pipe")
        readable, _, _ = select.select([process.stdout], [], [], READY)
        if not readable:
            raise StageError(f"stage {index} was not ready in {READY:.0f} s", stage=index)
        line = process.stdout.readline()  # empty when the child has ended
        if line.startswith(f"stage {index} ready"):
            return
        code = process.wait()
        log.seek(0)
        words = log.read().decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-code}, perhaps for lack of memory" if code < 0 else f"ended with code {code}"
        message = f"stage {index} {how} before it was ready: {words[-1] if words else 'it said nothing'}"
        raise _KINDS.get(code, StageError)(message)

    def restart(self, index: int) -> None:
        """Ends stage `index` if it runs, and starts it again at the same address, with a new key; waits for it."""
        _end([self._children.pop(index)])
        self.start(index)
        self.wait(index)

    def stop(self) -> None:
        """Ends the stages, and waits for them."""
        children, self._children = self._children, {}
        _end(list(children.values()))
        self._open.close()


def _end(children: list[_Child]) -> None:
    """Ends processes together: politely, then by force."""
    for child in children:
        if child.process.stdin is not None:
            child.process.stdin.close()  # they end with their standard input
    until = time.monotonic() + PATIENCE
    for process, log in children:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        log.close()


def _bound(port: int = 0) -> socket.socket:
    """A socket bound on loopback. As long as it does not listen, it keeps the port ours and refuses connections."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # for the listening one beside it
        made.bind(("127.0.0.1", port))
    except BaseException:
        made.close()
        raise
    return made


def _above_standard(ends: contextlib.ExitStack, fd: int) -> int:
    """A copy of a descriptor, which is closed with `ends`. In a daemon the descriptor itself may be 0, 1 or 2, which
    mean something else in a child."""
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    ends.callback(os.close, copy)
    return copy


def _pipe(ends: contextlib.ExitStack) -> tuple[int, IO[bytes]]:
    """A pipe: the descriptor to read from, which is closed with `ends`, and a file to write to."""
    reading, writing = os.pipe()
    ends.callback(os.close, reading)
    return reading, open(writing, "wb")
