"""A pipeline of child processes on this machine, for a demonstration, a test or a measurement.

The keys are made here and never touch a disk: each stage gets its mock key through a pipe. The ports are bound here, so
that the manifest can name them, and listening sockets are handed down; so is a file by which the stages take turns at
the cores. The children live as long as a pipe to each of them: if this process dies, even by kill -9, or forgets its
`LocalStages`, they end too. A fork of this process has nothing to do with them.
"""

import contextlib
import fcntl
import io
import os
import selectors
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable
from typing import IO, NamedTuple

from attest.measure import measure
from attest.providers.mock import MockKey, MockPins, MockRoot
from minigpt.checkpoint import sources
from minigpt.checkpoint.sources import Checkpoint
from minigpt.errors import CheckpointError, ManifestError, StageError, UsageError, WeightsMismatch
from minigpt.launch import isolated
from minigpt.launch.plan import plan, split_layers
from minigpt.protocol.manifest import Manifest
from transport.fork import identity, own

READY = 300.0  # seconds that a stage may take to load
PATIENCE = 5.0  # seconds that it may take to end
LIFETIME = 36_500.0  # days: stages that end with this process must not expire before it

# By a stage's exit code, what its end means to us.
_KINDS = {kind.exit_code: kind for kind in (CheckpointError, UsageError, ManifestError, WeightsMismatch)}


class _Child(NamedTuple):
    """A stage's process, the pipe by which it says that it serves, and the file that takes all else that it says."""

    process: subprocess.Popen[bytes]
    ready: io.FileIO
    log: IO[bytes]


class LocalStages:
    """Child processes, one for each stage: a `Launcher`. They serve when this returns.

    Args:
        checkpoint: of the model.
        split: the layers of each stage, as "6+6", or a number of stages.
        threads: BLAS threads of each stage.
        progress: is told what is waited for, in a line for people.

    Raises:
        UsageError, CheckpointError, ManifestError, StageError: a stage cannot be planned or started.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        split: str | int,
        *,
        threads: int | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        count = len(split_layers(sources.read_config(checkpoint.folder).n_layer, split))
        self._folder = checkpoint.folder
        self._threads = threads
        self._root = MockRoot.generate()
        self._children: dict[int, _Child] = {}
        self._open = contextlib.ExitStack()  # what every stage shares
        self._finish = weakref.finalize(self, _finish, identity(), self._children, self._open)
        own(self)
        try:
            self._ports = [self._open.enter_context(_bound()) for _ in range(count)]
            self._turns = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._manifest = plan(
                checkpoint,
                split,
                pins=[MockPins(self._root.public, frozenset([measure()]))],
                addresses=self.addresses,
                days=LIFETIME,
                progress=progress,
            )
            self.manifest = Manifest.parse(self._manifest)
            for index in range(count):
                self.start(index)
            for index in range(count):
                progress(f"stage {index} of {count} loads its layers")
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
            manifest = handed.enter_context(tempfile.TemporaryFile())
            manifest.write(self._manifest)
            manifest.seek(0)
            secret, keyhole = os.pipe()
            handed.callback(os.close, secret)
            with open(keyhole, "wb") as writer:  # a key fits into a pipe, whether or not anybody reads it
                writer.write(key)
            ready, serving = os.pipe()
            handed.callback(os.close, serving)
            descriptors = {
                flag: _above_standard(handed, fd)
                for flag, fd in {
                    "--manifest": manifest.fileno(),
                    "--mock-key": secret,
                    "--listen": listener.fileno(),
                    "--turns": self._turns.fileno(),
                    "--ready": serving,
                }.items()
            }
            options = ["--index", str(index), "--model", str(self._folder), "--allow-mock", "--until-eof"]
            for flag, descriptor in descriptors.items():
                options += [flag, f"fd:{descriptor}"]
            if self._threads is not None:
                options += ["--threads", str(self._threads)]
            try:
                process = subprocess.Popen(
                    isolated.command("minigpt.stage", *options),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=descriptors.values(),
                    start_new_session=True,  # Ctrl-C is for this process, which ends them in order
                )
            except OSError as error:
                os.close(ready)
                log.close()
                raise StageError(f"stage {index} cannot be started: {error}", stage=index) from error
            self._children[index] = _Child(process, io.FileIO(ready), log)

    def wait(self, index: int) -> None:
        """Waits for the line by which stage `index` says that it serves."""
        process, ready, log = self._children[index]
        until = time.monotonic() + READY
        line = b""
        with selectors.DefaultSelector() as waiting:
            waiting.register(ready, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not waiting.select(max(0.0, until - time.monotonic())):
                    raise StageError(f"stage {index} was not ready in {READY:.0f} s", stage=index)
                part = ready.read(4096)
                if not part:  # the child has ended
                    break
                line += part
        if line.startswith(b"stage %d ready" % index):
            return
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise StageError(f"stage {index} runs, but will never say that it serves", stage=index) from None
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
        self._finish()

    def disown(self) -> None:
        """In the child of a fork: closes what leads to the stages, which are the parent's and go on."""
        self._finish.detach()
        for process, ready, log in self._children.values():
            process.returncode = 0  # it is not this process's to wait for
            if process.stdin is not None:
                process.stdin.close()
            ready.close()
            log.close()
        self._children.clear()
        self._open.close()


def _finish(home: bytes, children: dict[int, _Child], shared: contextlib.ExitStack) -> None:
    """Ends all stages. Not a method: it also runs once nothing refers to their `LocalStages` any more."""
    if home != identity():  # a fork that Python was not told of
        return
    _end(list(children.values()))
    children.clear()
    shared.close()


def _end(children: list[_Child]) -> None:
    """Ends processes together: politely, then by force."""
    for process, _, _ in children:
        if process.stdin is not None:
            process.stdin.close()  # they end with their standard input
        process.terminate()  # or so, if somebody else holds that pipe open
    until = time.monotonic() + PATIENCE
    for process, ready, log in children:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        ready.close()
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
