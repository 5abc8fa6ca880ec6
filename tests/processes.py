"""Real stage processes for tests: started, killed and started again on the same port, and always ended."""

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from attest.measure import measure
from attest.providers.mock import MockKey, MockPins, MockRoot
from minigpt.checkpoint import sources, tokenizer, weights
from minigpt.launch.plan import split_layers, write
from minigpt.protocol import addresses
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.manifest import Manifest

HOUR = 3600 * 1000  # milliseconds
ROOT = Path(__file__).resolve().parents[1]


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether something comes to hold in time."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def out_of_threads(pid: int, more: int = 0) -> Iterator[None]:
    """The system gives this process `more` threads, and then none. Skips the test where that cannot be had."""
    if os.geteuid() != 0 and more:
        pytest.skip("a limit counts all threads of the user")
    if os.geteuid() != 0:  # root has no limit
        usual = resource.prlimit(pid, resource.RLIMIT_NPROC, (1, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
        yield
        resource.prlimit(pid, resource.RLIMIT_NPROC, usual)
        return
    roots = [root for root in map(Path, ("/sys/fs/cgroup/pids", "/sys/fs/cgroup")) if (root / "cgroup.procs").exists()]
    try:
        group = Path(tempfile.mkdtemp(dir=roots[0]))
        (group / "cgroup.procs").write_text(str(pid))
        limit = group / "pids.max"
        limit.write_text(str(int((group / "pids.current").read_text()) + more))
    except (OSError, IndexError):
        pytest.skip("no control group for the number of threads")
    try:
        yield
        limit.write_text("max")
    finally:
        (roots[0] / "cgroup.procs").write_text(str(pid))
        assert eventually(lambda: not group.exists() or _removed(group))


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):  # the process has not moved yet
        group.rmdir()
    return not group.exists()


class Stages:
    """The stages of one pipeline, each a process that can be killed and started again."""

    def __init__(
        self, folder: Path, split: str, where: Path, *, measurement: bytes | None = None, **changes: Any
    ) -> None:
        self.folder = folder
        self.where = where
        self.root = MockRoot.generate()
        config = sources.read_config(folder)
        layers = split_layers(config.n_layer, split)
        # A bound socket that does not listen keeps the port ours, while connections to it are refused.
        self._ports = [self._socket() for _ in layers]
        self.ports = [port.getsockname()[1] for port in self._ports]
        found = tokenizer.load(folder)
        fields: dict[str, Any] = {
            "config": config,
            "model": folder.name,
            "revision": None,
            "tokenizer_sha256": found.digest if found else None,
            "layers": layers,
            "weights_sha256": [weights.load(folder, config, part).digest for part in layers],
            "pins": [MockPins(self.root.public, frozenset([measurement or measure(ROOT)]))],
            "operators": None,
        }
        served = changes.pop("places", [f"tcp://127.0.0.1:{port}" for port in self.ports])
        self.bytes = write(**fields | changes)
        self.manifest = Manifest.parse(self.bytes)
        self.path = where / "pipeline.json"
        self.path.write_bytes(self.bytes)
        self.places = Path(addresses.beside(self.path))
        self.places.write_bytes(addresses.write(served, len(layers)))
        self.addresses = Addresses(len(layers), self.places)
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self._logs = [tempfile.TemporaryFile() for _ in layers]  # noqa: SIM115 — closed in `close`

    @staticmethod
    def _socket(port: int = 0) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(("127.0.0.1", port))
        return made

    def key(self, index: int) -> Path:
        """A fresh mock key's file."""
        path = self.where / f"stage{index}.key"
        path.touch(0o600)
        path.write_text(MockKey.generate(self.root, index, int(time.time() * 1000) + HOUR).to_json())
        return path

    def start(self, index: int, *flags: str, python: tuple[str, ...] = ("-m", "minigpt.stage"), **more: Any) -> None:
        """Starts a stage and waits until it is ready."""
        process = self.spawn(index, *flags, python=python, **more)
        readable, _, _ = select.select([process.stdout], [], [], 60)
        line = process.stdout.readline() if readable and process.stdout else ""
        assert line.startswith(f"stage {index} ready"), self.log(index)

    def spawn(
        self, index: int, *flags: str, python: tuple[str, ...] = ("-m", "minigpt.stage"), **more: Any
    ) -> subprocess.Popen[str]:
        """Starts a stage."""
        with self._socket(self.ports[index]) as listener:
            listener.listen()
            options: dict[str, Any] = {"--manifest": self.path, "--places": self.places, "--model": self.folder}
            if self.manifest.stages[index].platform.simulated:
                options["--mock-key"] = more.get("key") or self.key(index)
            options |= {"--listen": f"fd:{listener.fileno()}", "--threads": 1, "--index": index}
            command = [sys.executable, *python, *(str(word) for pair in options.items() for word in pair)]
            process = subprocess.Popen(
                [*command, *(["--allow-mock"] if self.manifest.simulated else []), "--until-eof", *flags],
                cwd=more.get("cwd", ROOT),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._logs[index],
                text=True,
                pass_fds=[listener.fileno(), *more.get("pass_fds", [])],
            )
        self.processes[index] = process
        return process

    def start_all(self, *flags: str) -> Self:
        for index in reversed(range(len(self.ports))):
            self.start(index, *flags)
        return self

    def log(self, index: int) -> str:
        """What a stage has logged."""
        return os.pread(self._logs[index].fileno(), 2**20, 0).decode()  # the child shares the file's position

    def kill(self, index: int, how: signal.Signals = signal.SIGKILL) -> int:
        """Ends a stage; returns its exit code."""
        process = self.processes.pop(index)
        process.send_signal(how)
        code = process.wait(60)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return code

    def close(self) -> None:
        for index in list(self.processes):
            with contextlib.suppress(ProcessLookupError):
                self.kill(index)
        for port in self._ports:
            port.close()
        for log in self._logs:
            log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
