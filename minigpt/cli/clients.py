"""The table of `minigpt bench --clients`: what a pipeline yields when so many clients ask at once.

As in `minigpt.cli.bench`, configurations are interleaved, run by run: what is compared was measured in the same run.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from minigpt.cli.bench import MIN_P99, estimate, given, percentile, shown, table
from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Prompt

PATIENCE = 60.0  # seconds until all clients of a run have started


class Crowd(NamedTuple):
    """One run: seconds from the first request to the last token, and of each client those that `bench.Run` has."""

    seconds: float
    firsts: tuple[float, ...]
    between: tuple[tuple[float, ...], ...]

    @property
    def tokens(self) -> int:
        return len(self.firsts) + sum(map(len, self.between))


Results = dict[tuple[int, int], list[Crowd]]  # by numbers of stages and clients


def measure(
    model: str,
    stages: Sequence[int],
    clients: Sequence[int],
    *,
    prompt: str,
    runs: int,
    max_tokens: int,
    revision: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Results:
    """Runs each configuration `runs` times, interleaved, after one run that does not count."""
    with ExitStack() as stack:
        pipelines = {}
        for count in stages:
            progress(f"starting {count} stage{'s' if count > 1 else ''}")
            pipeline = Pipeline.local(
                model,
                count,
                revision=revision,
                threads=threads,
                connections=max(clients),
                progress=progress,
                retry_for=0,  # what went on after a death is no measurement
            )
            pipelines[count] = stack.enter_context(pipeline)
        results: Results = {each: [] for each in itertools.product(stages, clients)}
        for number in range(runs + 1):
            progress(f"run {number} of {runs}" if number else "warming up")
            for count, many in results if number % 2 else reversed(results):
                pipeline = pipelines[count]
                crowd = run_together(pipeline, given(pipeline, prompt), max_tokens, many)
                if number:
                    results[count, many].append(crowd)
        return results


def run_together(pipeline: Pipeline, prompt: Prompt, max_tokens: int, clients: int) -> Crowd:
    """Times so many greedy generations at once, without drafts. Raises what the first that failed raised."""
    start = threading.Barrier(clients)
    found: list[tuple[float, list[float]]] = []  # when each began, and its times from then on
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            generation = pipeline.generate(prompt, max_tokens=max_tokens, draft=0)
            start.wait(PATIENCE)
            began = time.perf_counter()
            for _ in generation:
                pass
            found.append((began, generation.times))
        except BaseException as error:
            errors.append(error)
            start.abort()  # the others need not wait for it

    threads = [threading.Thread(target=ask, name=f"client {number}", daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    seconds = max(began + times[-1] for began, times in found) - min(began for began, _ in found)
    between = tuple(tuple(later - earlier for earlier, later in itertools.pairwise(times)) for _, times in found)
    return Crowd(seconds, tuple(times[0] for _, times in found), between)


def summarise(results: Results) -> list[dict[str, Any]]:
    """One row of figures for each configuration. A ratio is to the first number of clients of as many stages."""
    rows = []
    firsts: dict[int, list[float]] = {}
    for (stages, clients), runs in results.items():
        rates = [run.tokens / run.seconds for run in runs]
        base = firsts.setdefault(stages, rates)
        ratio = estimate([ours / theirs for ours, theirs in zip(rates, base, strict=True)])._asdict()
        ttft = [1000 * first for run in runs for first in run.firsts]
        gaps = [1000 * gap for run in runs for each in run.between for gap in each]
        rows.append(
            {
                "stages": stages,
                "clients": clients,
                "tokens_per_second": estimate(rates)._asdict(),
                "ratio": None if base is rates else ratio,
                "ttft_p50_ms": statistics.median(ttft),
                "ttft_p99_ms": _p99(ttft),
                "gap_p50_ms": statistics.median(gaps) if gaps else None,
                "gap_p99_ms": _p99(gaps),
            }
        )
    return rows


def _p99(samples: Sequence[float]) -> float | None:
    return percentile(samples, 0.99) if len(samples) >= MIN_P99 else None


def figures(results: Results) -> dict[str, object]:
    """Everything measured, for JSON: the table, and every single latency in milliseconds."""
    runs = [
        {
            "stages": stages,
            "clients": clients,
            "run": i,
            "seconds": run.seconds,
            "ttft_ms": [1000 * first for first in run.firsts],
            "between_ms": [[1000 * gap for gap in each] for each in run.between],
        }
        for (stages, clients), made in results.items()
        for i, run in enumerate(made)
    ]
    return {"summary": summarise(results), "runs": runs}


def markdown(results: Results) -> str:
    """The table, as Markdown."""
    columns = {
        "tokens/s": ("tokens_per_second", 1), "ratio": ("ratio", 2), "TTFT p50 ms": ("ttft_p50_ms", 1),
        "p99": ("ttft_p99_ms", 1), "gap p50 ms": ("gap_p50_ms", 2), "p99 ": ("gap_p99_ms", 2),
    }  # fmt: skip
    lines = [
        [str(row["stages"]), str(row["clients"]), *(shown(row[name], digits) for name, digits in columns.values())]
        for row in summarise(results)
    ]
    return table(["stages", "clients", *map(str.strip, columns)], lines)
