"""The parts of a pipeline under attack: a client's process, and stages behind proxies."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nitro.pipeline import Enclaves
from processes import Stages
from tsm.pipeline import Guests

from attacks import Survived, client
from attacks.proxy import Proxy


class Client:
    """A client's process."""

    def __init__(self, *flags: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, client.__file__, *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "MINIGPT_THREADS": "1"},
        )  # fmt: skip

    def order(self, **fields: Any) -> None:
        """Begins a run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()

    def answer(self, timeout: float = 120.0) -> dict[str, Any]:
        """What came of it. Raises Survived if the client hangs, or is dead."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], timeout)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            raise Survived(f"the client gave no answer in {timeout} s")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Pipes(Stages):
    """The stages of one pipeline behind proxies. `options` are what a client needs to connect to it."""

    options: Mapping[str, Any] = {"allow_mock": True}

    def __init__(self, folder: Path, split: str, where: Path, **changes: Any) -> None:
        self.proxies = [Proxy() for _ in split.split("+")]
        places = [f"tcp://127.0.0.1:{proxy.port}" for proxy in self.proxies]
        where.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, split, where, **{"places": places} | changes)
        for proxy, port in zip(self.proxies, self.ports, strict=True):
            proxy.upstream = port

    def log(self, index: int) -> str:
        """What a stage has logged. Read in place: the stage writes through the same descriptor's offset."""
        file = self._logs[index].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()
        super().close()


class EnclavePipes(Enclaves, Pipes):
    """The same of Nitro's stages, whose devices sign under the tests' root."""

    options: Mapping[str, Any] = {"allow_test_root": True}


class GuestPipes(Guests, Pipes):
    """The same of SNP's and TDX's stages, whose kernels' folders are FIFOs."""

    options: Mapping[str, Any] = {"allow_test_root": True}
