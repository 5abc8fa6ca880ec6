"""Sweeps the system's limits on stages, value by value: `python scripts/bench/limits.py`.

    descriptors  RLIMIT_NOFILE
    processes    RLIMIT_NPROC, which counts a user's threads; for root, whom that does not bind, a group's pids.max
    memory       RLIMIT_AS, in MiB of address space

For each value, the two stages of a pipeline start under the limit; then clients, which have none, ask all at once, and
after them one alone. Under any limit, stages serve, or refuse, or end with an error that says why. A line for each
value says which:

    serves   everybody got their text
    refuses  some got an error that says why, and the one alone got its text
    full     the one alone got an error that says why
    ends     a stage ended with an exit code of its own and said why in a line; or OpenBLAS did both
    WRONG    anything else: nothing for a minute, another text, a traceback, a death by a signal

It exits with code 1 if a line is WRONG. Values with which Python itself does not start are passed over.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

import attest
import minigpt
import transport.errors
from scripts.bench.kills import PROMPT, ROOT, plan

LIMITS = {
    "descriptors": (resource.RLIMIT_NOFILE, 1, range(4, 400, 12)),
    "processes": (resource.RLIMIT_NPROC, 1, range(1, 60, 2)),
    "memory": (resource.RLIMIT_AS, 2**20, range(32, 1024, 16)),
}
STAGES = 2
TOKENS = 20
PATIENCE = 60.0  # seconds for a start or an answer, which takes one
CLEAR = (minigpt.MiniGPTError, attest.AttestationError, transport.errors.TransportError)
GROUPS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
CODES = range(1, 6)  # of minigpt/errors.py
UNDER = """
import os, resource, sys
limit, value, group = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if group:
    open(group + "/cgroup.procs", "w").write(str(os.getpid()))
else:
    resource.setrlimit(limit, (value, value))
os.execv(sys.executable, [sys.executable, *sys.argv[4:]])
"""


class Wrong(Exception):
    """What must never be seen."""


@contextlib.contextmanager
def limited(kind: str, value: int) -> Iterator[list[str]]:
    """The words with which Python starts under a limit."""
    limit, unit, _ = LIMITS[kind]
    with contextlib.ExitStack() as made:
        group = ""
        if kind == "processes" and os.geteuid() == 0:
            group = tempfile.mkdtemp(
                prefix="limits-", dir=next(root for root in GROUPS if (root / "cgroup.procs").exists())
            )
            made.callback(os.rmdir, group)
            Path(group, "pids.max").write_text(str(value))
        yield [sys.executable, "-c", UNDER, str(limit), str(value * unit), group]


class Stages:
    """The stages of a plan, each under a limit."""

    def __init__(self, where: Path, kind: str, value: int) -> None:
        self._limits = contextlib.ExitStack()
        self.logs = [where / f"stage{index}.log" for index in range(STAGES)]
        self.processes = []
        for index, log in enumerate(self.logs):
            words = ["--manifest", str(where / "pipeline.json"), "--mock-key", str(where / f"stage{index}.json")]
            line = [*self._limits.enter_context(limited(kind, value)), "-m", "minigpt.stage", *words]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*line, "--index", str(index), "--allow-mock"],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                )
            self.processes.append(process)

    def wait(self) -> None:
        """Until all of them serve, or one has ended."""
        until = time.monotonic() + PATIENCE
        while not all(b" ready: " in log.read_bytes() for log in self.logs) and not self.ended():
            if time.monotonic() > until:
                raise Wrong(f"no stage serves or ends: {self.said()}")
            time.sleep(0.02)

    def ended(self) -> str:
        """What one that has ended said last; "" if all are there. Raises Wrong if it did not end as it should."""
        for process, log in zip(self.processes, self.logs, strict=True):
            if process.poll() is None:
                continue
            text = log.read_text(errors="replace").strip()
            if "Traceback" in text or (process.returncode not in CODES and "OpenBLAS" not in text):
                raise Wrong(f"a stage ended with {process.returncode}: {text[-1000:]}")
            return text.splitlines()[-1]
        return ""

    def said(self) -> str:
        return " / ".join(log.read_text(errors="replace")[-300:] for log in self.logs)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._limits.close()


def ask(manifest: Path) -> str:
    """A client's text, over a link of its own; or, after "error: ", why there is none."""
    try:
        with minigpt.Pipeline.connect(manifest, allow_mock=True, retry_for=0, timeout=PATIENCE) as pipeline:
            return "".join(token.text or "" for token in pipeline.generate(PROMPT, max_tokens=TOKENS))
    except CLEAR as error:
        return f"error: {error}"


def asked(manifest: Path, clients: int) -> list[str]:
    """The texts of so many clients at once. Raises Wrong if one waits for ever."""
    found: list[str] = []

    def one() -> None:
        try:
            found.append(ask(manifest))
        except Exception as error:
            found.append(f"WRONG: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=one, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 2 * PATIENCE
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if len(found) < clients:
        raise Wrong(f"{clients - len(found)} of {clients} clients wait for ever")
    return found


def look(where: Path, kind: str, value: int, clients: int, wanted: str) -> tuple[str, str]:
    """What comes of one value: a word, and what was said."""
    stages = Stages(where, kind, value)
    try:
        stages.wait()
        if words := stages.ended():
            return "ends", words
        many = asked(where / "pipeline.json", clients)
        [alone] = asked(where / "pipeline.json", 1)
        for text in (*many, alone):
            if text != wanted and not text.startswith("error: "):
                raise Wrong(f"another text: {text}")
        errors = [text for text in many if text != wanted]
        said = Counter(errors).most_common(1)[0][0] if errors else ""
        if words := stages.ended():
            return "ends", words
        if alone != wanted:
            return "full", alone
        return ("refuses", f"{len(errors)} of {clients}, {said}") if errors else ("serves", "")
    except Wrong as error:
        return "WRONG", f"{error}; {stages.said()}"
    finally:
        stages.stop()


def starts(kind: str, value: int) -> bool:
    """Whether Python does, with what a stage imports that is not ours."""
    with limited(kind, value) as line:
        words = [*line, "-c", "import ctypes, logging, numpy, selectors, socket, threading"]
        return subprocess.run(words, check=False, capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--values", type=int, nargs="+", help="these only")
    parser.add_argument("--clients", type=int, default=16, help="at once (16)")
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        plan("tiny", STAGES, where)
        wanted = "".join(token.text or "" for token in minigpt.load("tiny").generate(PROMPT, max_tokens=TOKENS))
        for kind in options.kind:
            for value in options.values or LIMITS[kind][2]:
                if not starts(kind, value):
                    print(f"{kind} {value}: Python does not start", flush=True)
                    continue
                began = time.monotonic()
                word, said = look(where, kind, value, options.clients, wanted)
                seen[word] += 1
                print(f"{kind} {value}: {word} ({time.monotonic() - began:.1f} s) {said}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in seen.most_common()))
    return 1 if seen["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
