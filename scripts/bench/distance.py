"""Tokens per second of two stages that are 10 ms apart, next to two side by side: `python scripts/bench/distance.py`.

    client ── stage 0 ──(a relay that delays every byte, each way)── stage 1

GPT-2 small's shape with seeded random weights, or the embedded model (`--tiny`). Each stage has a core of its own and
one thread, as on machines of their own; the relay and the clients use what the stages leave of the cores. So many
clients ask at once, each for so many tokens after a prompt of 5, which is part of the time.

How many batches are under way between two stages is no option: it is two where stages have cores of their own, and one
where they take turns at shared ones. Where one is wanted here, stage 0 takes turns with nobody (`--turns`, a file of
its own), which leaves all else as it is. A second batch is sent only if eight rows or more are left for it.

Each round runs all of them, in an order that alternates. Medians, with their 95 % confidence intervals (from order
statistics: none from fewer than 6 rounds); ratios are of the same round.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import queue
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import minigpt  # noqa: E402 — before NumPy, whose threads it sets
from minigpt.cli.clients import run_together  # noqa: E402
from minigpt.protocol import addresses  # noqa: E402
from scripts.bench.contestants import make_checkpoint  # noqa: E402
from scripts.bench.kills import run  # noqa: E402
from scripts.bench.peers import interval, machine, ratio  # noqa: E402

BATCHES = (1, 2)
PROMPT = [13, 21, 5, 8, 3]
SPLIT = "6+6"
PIECE = 1 << 16  # bytes
# A stage on one core from its start: the threads that it makes inherit it.
PINNED = "import os, runpy; os.sched_setaffinity(0, {%d}); runpy.run_module('minigpt.stage', run_name='__main__')"
Key = tuple[bool, int, int]  # whether there is a distance, batches under way, clients


def delay(source: socket.socket, target: socket.socket, seconds: float) -> None:
    """Passes on what comes, each piece so many seconds after it came: later ones do not wait for those before."""
    pieces: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def read() -> None:
        data = b"the first"
        while data:
            data = source.recv(PIECE)
            pieces.put((time.monotonic() + seconds, data))

    threading.Thread(target=read, daemon=True).start()
    while True:
        due, data = pieces.get()
        time.sleep(max(0.0, due - time.monotonic()))
        if not data:
            target.shutdown(socket.SHUT_WR)
            return
        target.sendall(data)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def relay(listener: socket.socket, port: int, seconds: float) -> None:
    """Carries each connection to this port, with a delay each way, as long as the process that wants it lives."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", port))
        for source, target in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=delay, args=(source, target, seconds), daemon=True).start()


class Stages:
    """The two stages of a pipeline, so many seconds apart. They end with the block.

    Args:
        model: as `minigpt plan` takes it.
        where: an empty folder.
        alone: whether stage 0 takes turns, with nobody: then one batch is under way.
        room: sequences at once.
    """

    def __init__(self, model: str, where: Path, seconds: float, room: int, *, alone: bool) -> None:
        self.manifest, places = where / "pipeline.json", where / "pipeline.places.json"
        (where / "turns").touch()
        root = run("attest", "keygen", "-o", str(where / "root.json")).strip()
        run("minigpt", "plan", "--model", model, "--split", SPLIT, "--root-key", root, "-o", str(self.manifest))
        self._processes: list[subprocess.Popen[str]] = []
        self._relay: multiprocessing.Process | None = None
        self.place = ""  # of the stage that was started last
        for index in (1, 0):
            key = str(where / f"stage{index}.json")
            run("attest", "keygen", "--root", str(where / "root.json"), "--stage", str(index), "-o", key)
            words = ["--manifest", str(self.manifest), "--model", model, "--mock-key", key, "--index", str(index)]
            words += ["--allow-mock", "--until-eof", "--threads", "1", "--max-sequences", str(room)]
            words += ["--listen", "tcp://127.0.0.1:0"]
            words += ["--turns", str(where / "turns")] if alone and index == 0 else []
            process = subprocess.Popen(
                [sys.executable, "-c", PINNED % index, *words],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._processes.append(process)
            assert process.stdout is not None
            self.place = process.stdout.readline().split()[-1]  # "stage 1 ready: layers 6-11 of 12, tcp://…"
            if index == 1:
                behind = self._apart(int(self.place.rpartition(":")[2]), seconds) if seconds else self.place
                places.write_bytes(addresses.write(["tcp://127.0.0.1:1", behind], 2))  # stage 0 looks for the other's

    def _apart(self, port: int, seconds: float) -> str:
        """The address of a relay to this port: in a process of its own, so that clients' threads do not delay it."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._relay = multiprocessing.Process(target=relay, args=(listener, port, seconds), daemon=True)
            self._relay.start()
            return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    def close(self) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.join()
        for process in self._processes:
            process.kill()
            process.communicate()


def measure(clients: list[int], seconds: float, tokens: int, rounds: int, *, tiny: bool) -> dict[Key, list[float]]:
    """Tokens per second, by configuration and round."""
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not tiny:
            make_checkpoint(where)
        model, room = "tiny" if tiny else str(where), max(clients)
        pipelines = {}
        for distant, batches in itertools.product((False, True), BATCHES):
            folder = where / f"{distant}{batches}"
            folder.mkdir()
            made = stack.enter_context(closing(Stages(model, folder, distant * seconds, room, alone=batches == 1)))
            pipeline = minigpt.Pipeline.connect(
                made.manifest, place={0: made.place}, allow_mock=True, text=False, connections=room, retry_for=0
            )
            pipelines[distant, batches] = stack.enter_context(pipeline)
        results: dict[Key, list[float]] = {
            (distant, batches, many): []
            for many, distant, batches in itertools.product(clients, (False, True), BATCHES)
        }
        for number in range(rounds + 1):
            for distant, batches, many in results if number % 2 else reversed(results):
                crowd = run_together(pipelines[distant, batches], PROMPT, tokens, many)
                if number:
                    results[distant, batches, many].append(crowd.tokens / crowd.seconds)
        return results


def cell(samples: list[float]) -> str:
    ends = interval(samples)
    return f"{statistics.median(samples):.1f}" + (f" ({ends[0]:.1f}–{ends[1]:.1f})" if ends else "")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", default="1,8,32", metavar="N,N", help="numbers of clients")
    options.add_argument("--ms", type=float, default=10.0, help="each way between the stages")
    options.add_argument("--tokens", type=int, default=32, help="for each client")
    options.add_argument("--tiny", action="store_true", help="take the embedded model")
    options.add_argument("--rounds", type=int, default=12, help="rounds that count, after one that does not")
    given = options.parse_args()
    clients = [int(count) for count in given.clients.split(",")]
    if min(given.tokens, given.rounds, *clients) < 1 or given.ms < 0:
        options.error("--clients, --tokens and --rounds are 1 or more, and --ms is not negative")
    if not {0, 1} <= os.sched_getaffinity(0):
        options.error("two cores are wanted, 0 and 1: one for each stage")
    before = os.getloadavg()[0]
    results = measure(clients, given.ms / 1000, given.tokens, given.rounds, tiny=given.tiny)
    load = f"load {before:.1f} before and {os.getloadavg()[0]:.1f} after, of which this is some two"
    print(f"{machine()}; {load}: `python {shlex.join(['scripts/bench/distance.py', *sys.argv[1:]])}`\n")
    titles = ["clients", "batches", "side by side", f"{given.ms:g} ms apart", "ratio", "to one batch, beside", "apart"]
    for row in (titles, ["---:"] * len(titles)):
        print("| " + " | ".join(row) + " |")
    for many, batches in itertools.product(clients, BATCHES):
        near, far = (results[distant, batches, many] for distant in (False, True))
        row = [str(many), str(batches), cell(near), cell(far), ratio(far, near)]
        row += (
            ["–", "–"] if batches == 1 else [ratio(near, results[False, 1, many]), ratio(far, results[True, 1, many])]
        )
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
