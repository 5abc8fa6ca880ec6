"""`minigpt serve` for tests: a real process, and the clients that people use."""

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
from processes import ROOT


class Serving:
    """A server's process, which serves when this returns. Its log is `log`."""

    def __init__(self, *flags: str, python: Sequence[str] = ("-m", "minigpt"), **environment: str) -> None:
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115 — closed in `close`
        command = [sys.executable, *python, "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=self._log, env=os.environ | {"MINIGPT_THREADS": "1"} | environment
        )
        self.address = ""
        until = time.monotonic() + 120
        while not self.address:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            for line in self.log.splitlines():
                if line.startswith("serving ") and line.endswith("for example:"):
                    self.address = line.split(" at ")[1].split(",")[0]
            time.sleep(0.02)
        self.port = int(self.address.rpartition(":")[2])

    @property
    def log(self) -> str:
        """All that it has said."""
        return Path(self._log.name).read_text()

    def openai(self, key: str = "none", timeout: float = 60.0) -> openai.OpenAI:
        """The client of PyPI, which would try again of its own accord otherwise."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=timeout)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.address + path, headers=headers, timeout=60, trust_env=False)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.address + path, json=body, headers=headers, timeout=60, trust_env=False)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def readable(descriptor: Any, seconds: float) -> bool:
    """Whether something can be read in time."""
    return bool(select.select([descriptor], [], [], seconds)[0])
