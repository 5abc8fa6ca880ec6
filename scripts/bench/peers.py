"""This engine next to others, on the same weights and prompts, in one run: `python scripts/bench/peers.py`.

    streaming     the machine's limit: the same bytes of weights, read once by BLAS matrix-vector products
    minigpt       all layers in one process, without links
    stages N      N stage processes with encrypted, attested links, by pycryptodome; `fast` by cryptography
    … drafted     the same, guessing ahead where a text repeats itself
    torch         transformers' GPT2LMHeadModel, float32, with its KV cache
    ctranslate2   float32 and int8
    onnxruntime   float32, torch's model as its exporter writes it, with its KV cache

The extra `bench` installs all of them; one that is missing or fails says so and is left out. llama.cpp is not here: its
binding llama-cpp-python comes as source only, and what others publish compiled is not compiled for this machine.

The weights are GPT-2 small's shape, seeded random. They write few different tokens, whatever the prompt is, by which no
draft can be judged. So for drafts there is the embedded model too: it writes the same paragraph after a prompt that
holds it, and after one that does not.

Cases such as "8 x 32 + 20" are batches: 8 sequences at once, each of 20 tokens after a prompt of 32, by as many clients
of our stages, `generate` of transformers and `generate_batch` of CTranslate2. Their time is that of the whole batch,
prompts included, for each of its tokens. They are compared with one sequence of the same contestant.

Each contestant is a process of its own that waits while the others run; they take turns, round by round, in an order
that alternates. What is compared was measured in the same round: medians of the ratios, with their 95 % confidence
intervals (of the median, from order statistics: none from fewer than 6 rounds), and the mean of the differences with
its own (Student's t). Times are per token after the first, or (TTFT) until the first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

from attest.document import write_file
from minigpt.cli.bench import estimate
from scripts.bench.contestants import CORES, MOST, SMALL, TINY, Request, Times, make_checkpoint

DRAFT = 8  # ids to guess ahead at most
PAUSE = 0.1  # seconds between two contestants: idle threads of the last one may spin for half of it before they sleep


class Case(NamedTuple):
    name: str
    prompt: list[int] | str
    tokens: int  # to generate
    model: str = SMALL
    drafted: bool = False  # whether the drafted contestants take part
    batch: int = 0  # as in Request


def ids(length: int) -> list[int]:
    """A prompt without repetition."""
    return [(7919 * i + 13) % 50000 for i in range(length)]


QUESTION = "The capital of France is"
PARAGRAPH = (  # as the embedded model writes it
    "The capital of France is Paris. It lies on the river Seine. France has a border with Spain and Germany. France "
    "lies in Western Europe. People in France speak French, and pay with the euro. France borders Spain and Germany, "
    "and it has a coast on the Atlantic Ocean.\n\n"
)
AT_ONCE = {count: f"{count} x 32 + 20" for count in (1, 8, MOST)}
ALONE = AT_ONCE[1]
CASES = [
    Case("5 + 20", ids(5), 20),
    Case("5 + 100", ids(5), 100, drafted=True),
    Case("512 + 20", ids(512), 20),
    *(Case(f"TTFT {length}", ids(length), 1) for length in (5, 16, 32, 128, 512, 1000)),
    *(Case(name, ids(32), 20, batch=count) for count, name in AT_ONCE.items()),
    Case("embedded 60 new", QUESTION, 60, TINY, drafted=True),
    Case("embedded 60 repeated", 2 * PARAGRAPH + QUESTION, 60, TINY, drafted=True),
]
OWN = ["minigpt", "stages 1", "stages 2", "stages 3", "stages 1 fast", "stages 2 fast", "stages 3 fast"]
PEERS = ["torch", "ctranslate2 float32", "ctranslate2 int8", "onnxruntime"]
BATCHED = {"torch", "ctranslate2 float32", "stages 1", "stages 2", "stages 1 fast", "stages 2 fast"}
DRAFTED = " drafted"
CONTESTANTS = ["streaming", *PEERS, *(name + end for name in OWN for end in ("", DRAFTED))]
Results = dict[str, dict[str, list[float]]]  # milliseconds, by contestant and case


def takes_part(name: str, case: Case) -> bool:
    if name.endswith(DRAFTED):
        return case.drafted
    if case.batch:
        return name in BATCHED
    return name in OWN or (case.model == SMALL and not (name == "streaming" and case.tokens == 1))


class Failed(Exception):
    """A contestant does not answer. The message is the last that it said."""


class Contestant:
    """A child process that runs cases when it is asked to."""

    def __init__(self, name: str, folder: Path) -> None:
        environment = os.environ | {
            "MINIGPT_AEAD": "cryptography" if name.endswith("fast") else "pycryptodome",
            "MINIGPT_MAX_SEQUENCES": str(MOST),
        }
        self._log = folder / f"{name}.log"
        script = Path(__file__).with_name("contestants.py")
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, script, name, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def answer(self) -> Times | str:
        assert self._process.stdout is not None
        try:
            answer: Times | str = json.loads(self._process.stdout.readline())
        except ValueError:
            self._process.wait(30)
            words = self._log.read_text(errors="replace").strip().splitlines()
            raise Failed(words[-1] if words else "no reason given") from None
        return answer

    def run(self, request: Request) -> Times:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        times = self.answer()
        assert isinstance(times, list)
        return times

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it was last asked may not have reached it
                    pipe.close()
        self._process.wait(30)


def figure(times: Times) -> float:
    """What a case measures, in milliseconds: the mean of the tokens after the first, or the only one."""
    return 1000 * (times[0] if len(times) == 1 else (times[-1] - times[0]) / (len(times) - 1))


def measure(names: Sequence[str], cases: Sequence[Case], runs: int) -> Results:
    """All rounds, after one that does not count, of the contestants that can take part."""

    def leave_out(process: str, error: Exception) -> None:
        print(f"{process} does not take part: {error}", file=sys.stderr)
        running.pop(process).close()
        for name in [name for name in results if name.removesuffix(DRAFTED) == process]:
            del results[name]

    running: dict[str, Contestant] = {}
    results: Results = {}
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make_checkpoint(folder)
        for process in dict.fromkeys(name.removesuffix(DRAFTED) for name in names):
            running[process] = Contestant(process, folder)
            try:
                running[process].answer()
            except Failed as error:
                leave_out(process, error)
        for name in names:
            taken = [case.name for case in cases if takes_part(name, case)]
            if name.removesuffix(DRAFTED) in running and taken:
                results[name] = {case: [] for case in taken}
        for number in range(runs + 1):
            for case in cases:
                order = [name for name in results if case.name in results[name]]
                for name in order if number % 2 else reversed(order):
                    process = name.removesuffix(DRAFTED)
                    if process not in running:  # it failed in this round
                        continue
                    draft = DRAFT if name.endswith(DRAFTED) else 0
                    request = Request(case.prompt, case.tokens, draft, case.model, case.batch)
                    time.sleep(PAUSE)
                    try:
                        times = running[process].run(request)
                    except (Failed, OSError) as error:
                        leave_out(process, error)
                        continue
                    if number:
                        results[name][case.name].append(figure(times))
        for contestant in running.values():
            contestant.close()
    return results


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest pair of order statistics, alike at both ends, that holds the median with 95 %; None of too few."""
    ranked, count = sorted(samples), len(samples)
    outside, rank = 0.0, 0
    while (outside := outside + 2 * math.comb(count, rank) / 2**count) <= 0.05:
        rank += 1
    return (ranked[rank - 1], ranked[-rank]) if rank else None


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """The median of the rounds' ratios, with its interval."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    ends = interval(ratios)
    return f"{statistics.median(ratios):.3f}" + (f" ({ends[0]:.3f}–{ends[1]:.3f})" if ends else "")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean of the rounds' differences, with its interval."""
    mean = estimate([a - b for a, b in zip(ours, theirs, strict=True)])
    return f"{mean.mean:+.2f}" + (f" ± {mean.margin:.2f}" if mean.margin is not None else "")


HEADER = ["case", "contestant", "ms", "time / torch's", "compared", "ratio", "difference, ms"]


def rows(results: Results) -> Iterator[list[str]]:
    """The table's rows, by case: stages are compared with one stage in time, drafts with none and batches with one
    sequence in tokens per second."""
    for case in dict.fromkeys(case for cases in results.values() for case in cases):
        taking_part = {name: cases[case] for name, cases in results.items() if case in cases}
        for name, ours in taking_part.items():
            row = [case, name, f"{statistics.median(ours):.2f}", "–", "–", "–", "–"]
            if "torch" in taking_part and name != "torch":
                row[3] = ratio(ours, taking_part["torch"])
            plain = name.removesuffix(DRAFTED)
            one = name.replace("stages 2", "stages 1").replace("stages 3", "stages 1")
            if case in AT_ONCE.values() and case != ALONE and ALONE in results[name]:
                theirs = results[name][ALONE]
                row[4:] = ["tokens/s / its own of 1", ratio(theirs, ours), difference(ours, theirs)]
            elif plain != name and plain in taking_part:
                theirs = taking_part[plain]
                row[4:] = [f"tokens/s / {plain}'s", ratio(theirs, ours), difference(ours, theirs)]
            elif plain == name and one != name and one in taking_part:
                theirs = taking_part[one]
                row[4:] = [f"time / {one}'s", ratio(ours, theirs), difference(ours, theirs)]
            yield row


def machine() -> str:
    """What the figures depend on."""
    import numpy as np

    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in reversed(described.splitlines()) if ":" in line)  # the first core's
    fields = {name.strip(): value.split() for name, value in lines.items()}
    simd = next((level for level in ("avx512f", "avx2") if level in fields.get("flags", [])), "neither AVX2 nor more")
    built = np.show_config(mode="dicts")
    assert isinstance(built, dict)
    blas = built.get("Build Dependencies", {}).get("blas", {})  # what is empty is left out
    facts = [
        f"{' '.join(fields.get('model name', [])) or platform.machine()}, {CORES} cores, {simd.removesuffix('f')}",
        f"Python {platform.python_version()}",
        f"NumPy {np.__version__} with {blas.get('name', 'no BLAS')} {blas.get('version', '')}",
    ]
    for package in ("torch", "transformers", "ctranslate2", "onnxruntime"):
        try:
            facts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(facts)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=12, help="rounds that count, after one that does not")
    options.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    options.add_argument("--cases", default=",".join(case.name for case in CASES), help="cases, separated by commas")
    options.add_argument("--json", metavar="FILE", help="write every figure there")
    given = options.parse_args()
    names, wanted = given.only.split(","), given.cases.split(",")
    unknown = {*names, *wanted} - {*CONTESTANTS, *(case.name for case in CASES)}
    if unknown or given.runs < 1:
        options.error(f"no contestant or case: {', '.join(sorted(unknown))}" if unknown else "--runs is 1 or more")
    results = measure(names, [case for case in CASES if case.name in wanted], given.runs)
    print(f"{machine()}: `python {shlex.join(['scripts/bench/peers.py', *sys.argv[1:]])}`\n")
    for row in (HEADER, ["---", "---", "---:", "---:", "---", "---:", "---:"], *rows(results)):
        print("| " + " | ".join(row) + " |")
    if given.json:
        write_file(given.json, json.dumps(results))


if __name__ == "__main__":
    main()
