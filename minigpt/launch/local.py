"""A pipeline of child processes on this machine, for a demonstration, a test or a measurement.

Each stage makes its own mock key, of which only the public half leaves it; the root that endorses it is here, and never
touches a disk. The ports are bound here, so that nobody else can take one while its stage is started again, and
listening sockets are handed down; so is a file by which the stages take turns at the cores. The children live as long
as a pipe to each of them: if this process dies, even by kill -9, or forgets its `LocalStages`, they end too. A fork of
this process has nothing to do with them.

A stage that ends although nobody asked for it is started again, by one thread. It knows by the pipe through which a
stage says that it serves: the process has a second copy of that end, which only its own end closes.
"""

import contextlib
import enum
import fcntl
import io
import os
import selectors
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from typing import IO, NamedTuple

from attest.measure import measure
from attest.providers.mock import MockPins, MockRoot
from minigpt.checkpoint import sources
from minigpt.checkpoint.sources import Checkpoint
from minigpt.errors import CheckpointError, ManifestError, StageError, UsageError, WeightsMismatch
from minigpt.launch import isolated
from minigpt.launch.plan import plan, split_layers
from minigpt.launch.restarts import TRIES, Restarts
from minigpt.protocol import addresses
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import printable
from transport.fork import UNFORKED, identity, own

READY = 300.0  # seconds that a stage may take to load, from its start or since another one was ready
LAST = 4096  # bytes: the end of a log, where its last lines are looked for
LINES = 20  # of a log, in an error: a traceback of nine functions
PATIENCE = 5.0  # seconds that it may take to end
LIFETIME = 36_500.0  # days: stages that end with this process must not expire before it

# By a stage's exit code, what its end means to us.
_KINDS = {kind.exit_code: kind for kind in (CheckpointError, UsageError, ManifestError, WeightsMismatch)}


class _Child(NamedTuple):
    """A stage's process, the pipe by which it says that it serves, and the file that takes all else that it says."""

    process: subprocess.Popen[bytes]
    ready: io.FileIO  # ends when the process does
    endorse: io.FileIO  # takes the endorsement of its key
    log: IO[bytes]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()  # a stage ends with its standard input
        self.ready.close()
        self.endorse.close()
        self.log.close()


class _Said(enum.Enum):
    """What a stage says by the pipe that ends with it."""

    NOTHING = enum.auto()
    STARTS = enum.auto()  # its key, or how far it is
    SERVES = enum.auto()


class LocalStages:
    """Child processes, one for each stage: a `Launcher`. They serve when this returns.

    Args:
        checkpoint: of the model.
        split: the layers of each stage, as "6+6", or a number of stages.
        threads: BLAS threads of each stage.
        progress: is told what is waited for, in a line for people, and how far it is.
        news: is told of each stage what it does; later also, from a thread, that it ended. By default `progress`.

    Attributes:
        document, places: the bytes of the manifest and of its places file.

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
        news: Callable[[str], None] | None = None,
    ) -> None:
        count = len(split_layers(sources.read_config(checkpoint.folder).n_layer, split))
        self._folder = checkpoint.folder
        self._threads = threads
        self._root = MockRoot.generate()
        self._news = news or progress
        self._progress = progress
        self._children: dict[int, _Child] = {}
        self._restarts: list[Restarts] = []
        self._counts = [0] * count
        self._due: dict[int, float] = {}  # when to start a stage again, or to end it because it is not ready
        self._failure: tuple[str, int] | None = None
        self._open = contextlib.ExitStack()  # what every stage shares
        halted, halt = os.pipe()
        self._supervisor = _Supervisor(threading.Lock(), io.FileIO(halt, "w"), io.FileIO(halted), [])
        self._finish = weakref.finalize(self, _finish, identity(), self._children, self._supervisor, self._open)
        own(self)
        try:
            self._ports = [self._open.enter_context(bound()) for _ in range(count)]
            served = [f"tcp://127.0.0.1:{port.getsockname()[1]}" for port in self._ports]
            self.places = addresses.write(served, count)
            self.addresses = Addresses(count, None, dict(enumerate(served)))
            self._turns = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self.document = plan(
                checkpoint,
                split,
                pins=[MockPins(self._root.public, frozenset([measure()]))],
                operators=None,  # they are one user's own
                days=LIFETIME,
                progress=progress,
            )
            self.manifest = Manifest.parse(self.document)
            for index in range(count):
                self.start(index)
                self._news(f"stage {index} of {count} loads its layers")
            self.wait()
            self._progress = lambda line: None  # of a stage that is started again, news are enough
            self._restarts += [Restarts(time.monotonic()) for _ in range(count)]
            thread = threading.Thread(
                target=_supervise,
                args=(weakref.ref(self), self._children, self._supervisor.halted),
                name="stages",
                daemon=True,
            )
            thread.start()
            self._supervisor.threads.append(thread)
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the stages, in order. One that has ended keeps its place until it is started again."""
        return [child.process.pid for _, child in sorted(self._children.items())]

    @property
    def restarts(self) -> list[int]:
        """How often each stage was started again."""
        return list(self._counts)

    @property
    def failure(self) -> StageError | None:
        """Why a stage is not started again, if that is so: a new error each time, for whoever raises it."""
        failed = self._failure
        return None if failed is None else StageError(failed[0], stage=failed[1])

    def log_end(self, index: int) -> str:
        """The last lines that stage `index` has logged: the file has no name."""
        child = self._children.get(index)
        return "" if child is None or child.log.closed else "\n".join(_log_end(child.log, LINES))

    def start(self, index: int) -> None:
        """Starts stage `index`, and does not wait."""
        with self._supervisor.lock, UNFORKED:
            if self._supervisor.halt.closed:
                raise StageError(f"stage {index} is not started: its pipeline was closed", stage=index)
            self._start(index)

    def _start(self, index: int) -> None:
        log = tempfile.TemporaryFile()  # noqa: SIM115 — closed in `_end`
        with contextlib.ExitStack() as handed:
            listener = handed.enter_context(bound(self._ports[index].getsockname()[1]))
            listener.listen()
            manifest, places = (handed.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            for file, data in ((manifest, self.document), (places, self.places)):
                file.write(data)
                file.seek(0)
            endorsed, endorse = os.pipe()
            handed.callback(os.close, endorsed)
            ready, serving = os.pipe()
            handed.callback(os.close, serving)
            descriptors = {
                flag: _above_standard(handed, fd)
                for flag, fd in {
                    "--manifest": manifest.fileno(),
                    "--places": places.fileno(),
                    "--endorsement": endorsed,
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
                    pass_fds=[*descriptors.values(), _above_standard(handed, serving)],
                    start_new_session=True,  # Ctrl-C is for this process, which ends them in order
                )
            except OSError as error:
                os.close(ready)
                os.close(endorse)
                log.close()
                raise StageError(f"stage {index} cannot be started: {error}", stage=index) from error
            self._children[index] = _Child(process, io.FileIO(ready), io.FileIO(endorse, "w"), log)

    def wait(self) -> None:
        """Waits until every stage has said that it serves."""
        until = time.monotonic() + READY
        with selectors.DefaultSelector() as waiting:
            for index, child in self._children.items():
                waiting.register(child.ready, selectors.EVENT_READ, index)
            while left := waiting.get_map():
                events = waiting.select(max(0.0, until - time.monotonic()))
                if not events:
                    late = min(key.data for key in left.values())
                    raise StageError(f"stage {late} was not ready in {READY:.0f} s", stage=late)
                for key, _ in events:
                    said = self._hear(key.data)
                    if said is _Said.NOTHING:
                        raise self._end_of(key.data)
                    if said is _Said.SERVES:
                        waiting.unregister(key.fileobj)
                        until = time.monotonic() + READY  # the others had to share the disk with it
                        self._news(f"stage {key.data} serves at {self.addresses.shown(key.data)}")

    def _hear(self, index: int) -> "_Said":
        """What a stage has to say next. Its key is endorsed on the way. NOTHING if it has ended, or makes no sense."""
        child = self._children[index]
        line = child.ready.readline(LAST)  # each is written in one piece
        words = line.split()
        if words[:3] == [b"stage", b"%d" % index, b"key"] and len(words) == 4:
            until = int(self.manifest.expires.timestamp() * 1000)
            with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile, or this is no key
                os.write(child.endorse.fileno(), self._root.endorse(bytes.fromhex(words[3].decode()), index, until))
            child.endorse.close()
            return _Said.STARTS
        if words[:3] == [b"stage", b"%d" % index, b"reading"]:
            self._progress(printable(line.decode(errors="replace").strip()))
            return _Said.STARTS
        return _Said.SERVES if words[:3] == [b"stage", b"%d" % index, b"ready:"] else _Said.NOTHING

    def _end_of(self, index: int) -> Exception:
        """Why a stage ended before it served."""
        child = self._children[index]
        try:
            code = child.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return StageError(f"stage {index} runs, but will never say that it serves", stage=index)
        return _KINDS.get(code, StageError)(
            f"stage {index} {how_it_ended(code)} before it was ready: {last_line(child.log)}"
        )

    def _look(self, heard: list[int]) -> float | None:
        """What the supervisor does when these stages have said something, or ended. Returns in how many seconds there
        is more to do; None if that is not known."""
        for index in heard:
            if self._supervisor.halt.closed:
                return None
            said = self._hear(index)
            if said is _Said.SERVES:
                self._restarts[index].ready(time.monotonic())
                self._due.pop(index, None)
                self._tell(f"stage {index} serves again")
            elif said is _Said.NOTHING:
                self._buried(index)
        for index, when in list(self._due.items()):
            if self._supervisor.halt.closed:
                return None
            if when > time.monotonic():
                continue
            del self._due[index]
            if self._children[index].ready.closed:
                self._start_again(index)
            else:
                self._children[index].process.kill()  # it is not ready in time, and that it ended will be heard
        return max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None

    def _buried(self, index: int) -> None:
        """A stage has ended, or is about to."""
        child = self._children[index]
        try:
            code = child.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.process.kill()
            code = child.process.wait()
        if not self._supervisor.halt.closed:  # else it was told to
            words = last_words(code, child.log)
            child.close()
            self._decide(index, f"stage {index} {words}")

    def _start_again(self, index: int) -> None:
        try:
            self.start(index)
        except (OSError, StageError) as error:
            if not self._supervisor.halt.closed:
                self._decide(index, f"stage {index} cannot be started again: {error}")
            return
        self._counts[index] += 1
        self._due[index] = time.monotonic() + READY

    def _decide(self, index: int, what: str) -> None:
        """Starts a stage again in a while, or gives it up."""
        now = time.monotonic()
        wait = self._restarts[index].ended(now)
        if wait is None:
            words = f"{what}; it ended early {TRIES} times in a row and is not started again"
            self._failure = (words, index)
        else:
            words = f"{what}; it is started again" + (f" in {wait:g} s" if wait else "")
            self._due[index] = now + wait
        self._tell(words)

    def _tell(self, words: str) -> None:
        with contextlib.suppress(Exception):  # whoever cannot be told does not keep the stage from being started
            self._news(words)

    def stop(self) -> None:
        """Ends the stages, and waits for them."""
        self._finish()

    def disown(self) -> None:
        """In the child of a fork: closes what leads to the stages, which are the parent's and go on."""
        self._finish.detach()
        for child in self._children.values():
            child.process.returncode = 0  # it is not this process's to wait for
            child.close()
        self._children.clear()
        self._supervisor.halt.close()
        self._supervisor.halted.close()
        self._open.close()


class _Supervisor(NamedTuple):
    """What ends the thread that starts stages again. Once `halt` is closed, nothing is started any more."""

    lock: threading.Lock  # while a stage is started, or `halt` closed
    halt: io.FileIO
    halted: io.FileIO  # the other end: can be read once `halt` is closed
    threads: list[threading.Thread]  # none until all stages serve, then one


def _supervise(owner: "weakref.ref[LocalStages]", children: dict[int, _Child], halted: io.FileIO) -> None:
    """The thread that starts stages again. While it waits, it does not keep their `LocalStages` alive."""
    wait: float | None = None
    while True:
        with selectors.PollSelector() as waiting:  # it has no descriptor, which a forked child would inherit
            waiting.register(halted, selectors.EVENT_READ)
            for index, child in list(children.items()):
                if not child.ready.closed:
                    waiting.register(child.ready, selectors.EVENT_READ, index)
            heard = [key.data for key, _ in waiting.select(wait)]
        stages = owner()
        if stages is None or None in heard:
            return
        wait = stages._look(heard)
        del stages


def _finish(home: bytes, children: dict[int, _Child], supervisor: _Supervisor, shared: contextlib.ExitStack) -> None:
    """Ends all stages. Not a method: it also runs once nothing refers to their `LocalStages` any more."""
    if home != identity():  # a fork that Python was not told of
        return
    with supervisor.lock:
        supervisor.halt.close()
    _end([child.process for child in children.values()])
    for thread in supervisor.threads:
        if thread is not threading.current_thread():  # which may be where the last reference is dropped
            thread.join(PATIENCE)
    for child in children.values():
        child.close()
    children.clear()
    supervisor.halted.close()
    shared.close()


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends processes together: politely, then by force."""
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()  # they end with their standard input
        process.terminate()  # or so, if somebody else holds that pipe open
    until = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def how_it_ended(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"ended with code {code}"
    return f"was killed by signal {-code}" + (", perhaps for lack of memory" if code == -signal.SIGKILL else "")


def last_words(code: int, log: IO[bytes]) -> str:
    """How a stage that served ended. What it logged last has to do with that, unless somebody ended it."""
    how = how_it_ended(code)
    return how if code in (-signal.SIGKILL, -signal.SIGTERM) else f"{how}: {last_line(log)}"


def last_line(log: IO[bytes]) -> str:
    words = _log_end(log, 1)
    return words[0] if words else "it said nothing"


def _log_end(log: IO[bytes], count: int) -> list[str]:
    """The last lines of a log, which may still be written: the child shares the file's position."""
    size = os.fstat(log.fileno()).st_size
    words = os.pread(log.fileno(), LAST, max(0, size - LAST)).decode(errors="replace").strip().splitlines()
    return [printable(line) for line in words[-count:]]


def bound(port: int = 0, host: str = "127.0.0.1") -> socket.socket:
    """A bound socket. As long as it does not listen, it keeps the port ours and refuses connections."""
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # for the listening one beside it
        made.bind((host, port))
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
