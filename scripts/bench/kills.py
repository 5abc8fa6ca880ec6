"""Kills a stage at each token of an answer, and compares the texts: `python scripts/bench/kills.py`.

For pipelines of 2 and 3 stages, greedy and seeded: an answer of 20 tokens is asked for once undisturbed, and then once
for each stage and each token, where that stage is killed (kill -9) right after that token. Every text must be that of
the undisturbed run, and every answer must say that it was interrupted once. The stages are

    supervised  started by hand, each by a loop that starts it again when it ends, as systemd would
    local       those of `Pipeline.local`, which starts them again itself

It exits with code 1, and says which, if a text differs, an answer fails, or a stage could not be killed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import minigpt  # noqa: E402 — before NumPy, whose threads it sets

PROMPT = "The capital of France is"
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"draft": 0},  # with drafts, tokens come several at once
    "drafted": {"draft": 8},
    "seeded": {"temperature": 1.0, "seed": 7},
}
READY = 60.0  # seconds that a stage may take to start


class Supervised:
    """Stages that are started by the commands of the documentation, and started again whenever they end."""

    def __init__(self, model: str, stages: int, where: Path) -> None:
        self.manifest = where / "pipeline.json"
        self._where = where
        self._stopping = threading.Event()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        plan(model, stages, where)
        self._threads = [threading.Thread(target=self._supervise, args=(index,)) for index in range(stages)]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for _, process in sorted(self._processes.items())]

    def _supervise(self, index: int) -> None:
        files = ["--manifest", str(self.manifest), "--mock-key", str(self._where / f"stage{index}.json")]
        while not self._stopping.is_set():
            with (self._where / f"stage{index}.log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "minigpt.stage", *files, "--index", str(index), "--allow-mock"],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self._processes[index] = process
            while process.poll() is None and not self._stopping.wait(0.02):
                pass
            if process.poll() is None:
                process.kill()
            process.wait()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def plan(model: str, stages: int, where: Path) -> None:
    """Makes the manifest of a pipeline, its places and its keys, by the commands of the documentation."""
    root = run("attest", "keygen", "-o", str(where / "root.json")).strip()
    for index in range(stages):
        key = str(where / f"stage{index}.json")
        run("attest", "keygen", "--root", str(where / "root.json"), "--stage", str(index), "-o", key)
    addresses = [word for port in free_ports(stages) for word in ("--address", f"tcp://127.0.0.1:{port}")]
    words = ["--model", model, "--split", even(model, stages), "--root-key", root, "-o", str(where / "pipeline.json")]
    run("minigpt", "plan", *words, *addresses)


def run(module: str, *words: str) -> str:
    """What a command prints."""
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def even(model: str, stages: int) -> str:
    """A split into so many stages, as `minigpt plan` takes it."""
    layers = minigpt.load(model).config.n_layer
    return "+".join(str(layers * (index + 1) // stages - layers * index // stages) for index in range(stages))


@contextlib.contextmanager
def started(how: str, model: str, stages: int) -> Iterator[tuple[minigpt.Pipeline, Supervised | minigpt.Pipeline]]:
    """A pipeline, and what has the process ids of its stages."""
    if how == "local":
        with minigpt.Pipeline.local(model, stages) as pipeline:
            yield pipeline, pipeline
        return
    with tempfile.TemporaryDirectory() as where:
        supervised = Supervised(model, stages, Path(where))
        try:
            until = time.monotonic() + READY
            while True:
                try:
                    pipeline = minigpt.Pipeline.connect(supervised.manifest, model=model, allow_mock=True)
                    break
                except minigpt.errors.StageError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.1)
            with pipeline:
                yield pipeline, supervised
        finally:
            supervised.stop()


class Tally:
    """What became of the answers."""

    def __init__(self) -> None:
        self.kills = 0
        self.wrong: list[str] = []
        self.delays: list[float] = []  # seconds from a kill to the next token

    def answer(
        self, pipeline: minigpt.Pipeline, pids: Sequence[int], case: str, wanted: list[tuple[int, str | None]],
        options: dict[str, Any], victim: int, last: int,
    ) -> None:  # fmt: skip
        """One answer, during which stage `victim` is killed after token number `last`. Returns once all serve again."""
        found, killed = [], 0.0
        case = f"{case}, stage {victim} killed after token {last}"
        try:
            generation = pipeline.generate(PROMPT, max_tokens=len(wanted), **options)
            for token in generation:
                if killed and len(found) == last:
                    self.delays.append(time.monotonic() - killed)
                found.append((token.id, token.text))
                if len(found) == last:
                    os.kill(pids[victim], signal.SIGKILL)
                    killed = time.monotonic()
                    self.kills += 1
        except Exception as error:  # whatever it is, it is reported
            self.wrong.append(f"{case}: {type(error).__name__}: {error}")
            return
        if found != wanted:
            self.wrong.append(f"{case}: another text, from token {same(found, wanted) + 1} on")
        settle(pipeline)  # a death that this answer did not see must not be the next one's first
        if last < len(wanted) - 1 and not generation.interruptions and not options.get("draft"):
            self.wrong.append(f"{case}: nothing was interrupted")


def settle(pipeline: minigpt.Pipeline) -> None:
    """Waits until all stages serve."""
    until = time.monotonic() + READY
    while time.monotonic() < until:
        with contextlib.suppress(minigpt.errors.StageError):
            if not any(report.error for report in pipeline.status()):
                return
        time.sleep(0.05)


def same(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items at the beginning are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the checkpoint (tiny)")
    parser.add_argument("--tokens", type=int, default=20, help="of an answer (20)")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="of the pipelines (2 3)")
    parser.add_argument("--how", nargs="+", default=["supervised", "local"], choices=["supervised", "local"])
    parser.add_argument("--every", type=int, default=1, help="kill at every so many-th token only (1)")
    options = parser.parse_args()
    tally = Tally()
    for how, stages, mode in itertools.product(options.how, options.stages, MODES):
        case, keywords, before = f"{how}, {stages} stages, {mode}", MODES[mode], tally.kills
        with contextlib.ExitStack() as running:
            pipeline, processes = running.enter_context(started(how, options.model, stages))
            tokens = pipeline.generate(PROMPT, max_tokens=options.tokens, **keywords)
            wanted = [(token.id, token.text) for token in tokens]
            for last in range(1, len(wanted) + 1, options.every):
                if how == "local":  # gives up a stage that ends early three times in a row
                    running.close()
                    pipeline, processes = running.enter_context(started(how, options.model, stages))
                for victim in range(stages):
                    tally.answer(pipeline, processes.pids, case, wanted, keywords, victim, last)
        print(f"{case}: {tally.kills - before} kills, {len(tally.wrong)} wrong so far", flush=True)
    if tally.delays:
        print(f"from a kill to the next token: median {statistics.median(tally.delays):.2f} s, ", end="")
        print(f"longest {max(tally.delays):.2f} s")
    print("\n".join(f"WRONG: {line}" for line in tally.wrong) or f"all {tally.kills} texts as they should be")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
