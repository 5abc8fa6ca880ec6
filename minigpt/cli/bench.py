"""The latency tables of `minigpt bench`.

Configurations are interleaved, run by run, because a shared machine drifts: what is compared is measured side by side.
A mean is over the runs, with its 95 % confidence interval (Student's t). An overhead is the mean difference between
runs made together; if its interval contains 0, no difference was seen. The breakdown says where a token's time goes,
party by party, from the spans that each stage sends with its answer.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Prompt, ids_in
from minigpt.protocol.messages import Span

PROMPT = "The capital of France is"
MIN_P99 = 100  # samples; with fewer, a 99th percentile is just the maximum

BREAKDOWN = """\
Median ms of each part of a token after the first. `wire` is a party's wait for the next one's answer, minus what the
rows below account for. The parts of one token add up to its time; their medians need not."""

# Student's t for a two-sided interval of 95 %, by degrees of freedom, from 1 (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
_T95 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]  # fmt: skip


class Run(NamedTuple):
    """One generation: seconds from the request to the first token, and from each token to the next."""

    first: float
    between: tuple[float, ...]
    spans: tuple[tuple[Span, ...], ...]
    bytes_per_token: float


class Part(NamedTuple):
    """What one party adds to a token's time, in seconds; see `parts`."""

    compute: float
    seal: float
    open: float
    wire: float  # of the link to the next party


class Estimate(NamedTuple):
    """A mean and half the width of its 95 % confidence interval; None for a single sample."""

    mean: float
    margin: float | None


def estimate(samples: Sequence[float]) -> Estimate:
    """The mean of independent samples, with its interval."""
    mean, degrees = statistics.fmean(samples), len(samples) - 1
    if degrees == 0:
        return Estimate(mean, None)
    t = _T95[degrees - 1] if degrees <= len(_T95) else 1.96
    return Estimate(mean, t * statistics.stdev(samples) / math.sqrt(len(samples)))


def percentile(samples: Sequence[float], part: float) -> float:
    """The smallest sample that at least `part` of all samples do not exceed (nearest rank)."""
    return sorted(samples)[max(0, math.ceil(part * len(samples)) - 1)]


def measure(
    model: str,
    stages: Sequence[int],
    *,
    prompt: str,
    runs: int,
    max_tokens: int,
    revision: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[int, list[Run]]:
    """Runs each configuration `runs` times, interleaved, after one run that does not count."""
    with ExitStack() as stack:
        pipelines = {}
        for count in stages:
            progress(f"starting {count} stage{'s' if count > 1 else ''}")
            pipeline = Pipeline.local(
                model, count, revision=revision, threads=threads, progress=progress, retry_for=0
            )  # what went on after a death is no measurement
            pipelines[count] = stack.enter_context(pipeline)
        results: dict[int, list[Run]] = {count: [] for count in stages}
        for number in range(runs + 1):
            progress(f"run {number} of {runs}" if number else "warming up")
            order = list(pipelines.items())
            for count, pipeline in order if number % 2 else reversed(order):
                run = run_once(pipeline, prompt, max_tokens)
                if number:
                    results[count].append(run)
    return results


def given(pipeline: Pipeline, prompt: str) -> Prompt:
    """The prompt as the model takes it. Any five ids stand for the text that is the default."""
    if pipeline.tokenizer is not None:
        return prompt
    return [token % pipeline.config.vocab_size for token in range(5)] if prompt == PROMPT else ids_in(prompt)


def run_once(pipeline: Pipeline, prompt: str, max_tokens: int) -> Run:
    """Times one greedy generation, token by token, without drafts."""
    generation = pipeline.generate(given(pipeline, prompt), max_tokens=max_tokens, spans=True, draft=0)
    for _ in generation:
        pass
    times, spans = generation.times, tuple(generation.spans)
    between = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    return Run(times[0], between, spans, bytes_per_token(spans))


def bytes_per_token(spans: Sequence[tuple[Span, ...]]) -> float:
    """Mean ciphertext for one token on all links together, both ways; of the tokens after the first, if any."""
    tokens = spans[1:] or spans
    return statistics.fmean(sum(span.bytes for span in token) for token in tokens) if tokens else 0.0


def parts(spans: Sequence[Span]) -> list[Part]:
    """A token's time by party: the client, then each stage. The sum is the client's seal, open and wait.

    `compute` begins when the stage has its turn. `seal` and `open` are the time that whoever asks spends on sealing the
    request and opening the answer. `wire` is the wait for the answer minus the whole span of the next stage: sockets
    and wake-ups, encoding and decoding at both ends, and what the next stage does outside its span: open the request,
    wait for its turn, seal the answer.

    The client asks once, and stage 0 continues by itself. So for a token after the first the client seals nothing, and
    its `open` and `wire` are what stage 0 does between two steps (encode, seal and write an answer, look for a Cancel,
    wait for its turn), plus how much longer than the last one this answer took to arrive. A link's constant delay
    therefore shows between stages, but not between client and stage 0, where a single `wire` may even be negative.
    """
    after_spans = [span.compute + span.seal + span.open + span.wait for span in spans[1:]]
    return [
        Part(span.compute, span.seal, span.open, span.wait - after)
        for span, after in zip(spans, [*after_spans, 0.0], strict=True)
    ]


def breakdown(results: dict[int, list[Run]]) -> list[dict[str, object]]:
    """The median of each of `parts` over the tokens after the first, in milliseconds; one row for each party."""
    rows: list[dict[str, object]] = []
    for count, runs in results.items():
        tokens = [parts(spans) for run in runs for spans in run.spans[1:]]
        for place, party in enumerate(zip(*tokens, strict=True)):
            row: dict[str, object] = {"stages": count, "party": f"stage {place - 1}" if place else "client"}
            linked = place + 1 < len(tokens[0])  # the last stage has no next link: there is nothing to measure
            for name, samples in zip(Part._fields, zip(*party, strict=True), strict=True):
                row[f"{name}_ms"] = 1000 * percentile(samples, 0.50) if linked or name == "compute" else None
            rows.append(row)
    return rows


def summarise(results: dict[int, list[Run]]) -> list[dict[str, Any]]:
    """One row of figures for each configuration, in milliseconds."""
    baseline = next(iter(results.values()))
    base = [1000 * statistics.fmean(run.between) for run in baseline if run.between]
    rows = []
    for count, runs in results.items():
        between = [1000 * gap for run in runs for gap in run.between]
        means = [1000 * statistics.fmean(run.between) for run in runs if run.between]
        row: dict[str, Any] = {
            "stages": count,
            "ttft_ms": estimate([1000 * run.first for run in runs])._asdict(),
            "samples": len(between),
            "bytes_per_token": statistics.fmean(run.bytes_per_token for run in runs),
        }
        if means:
            pairs = list(zip(means, base, strict=True))
            difference = estimate([ours - theirs for ours, theirs in pairs])._asdict()
            percent = estimate([100 * (ours / theirs - 1) for ours, theirs in pairs])._asdict()
            row |= {
                "mean_ms": estimate(means)._asdict(),
                "p50_ms": percentile(between, 0.50),
                "p95_ms": percentile(between, 0.95),
                "p99_ms": percentile(between, 0.99) if len(between) >= MIN_P99 else None,
                "tokens_per_second": estimate([1000 / mean for mean in means])._asdict(),
                "overhead_ms": None if runs is baseline else difference,
                "overhead_percent": None if runs is baseline else percent,
            }
        rows.append(row)
    return rows


def figures(results: dict[int, list[Run]]) -> dict[str, object]:
    """Everything measured, for JSON: the tables, and every single latency in milliseconds."""
    latencies = [
        {"stages": count, "run": i, "ttft_ms": 1000 * run.first, "between_ms": [1000 * gap for gap in run.between]}
        for count, runs in results.items()
        for i, run in enumerate(runs)
    ]
    return {"summary": summarise(results), "breakdown": breakdown(results), "latencies": latencies}


def tables(results: dict[int, list[Run]]) -> str:
    """The table of latencies and, if any token came after a first, the breakdown, as Markdown."""
    rows = breakdown(results)
    if not rows:
        return markdown(summarise(results))
    names = ["stages", "party", *(f"{name}_ms" for name in Part._fields)]
    lines = [[str(row[name]) if name in names[:2] else shown(row[name], 3) for name in names] for row in rows]
    return f"{markdown(summarise(results))}\n\n{BREAKDOWN}\n\n{table(['stages', 'party', *Part._fields], lines)}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of latencies, as Markdown."""
    columns = {
        "TTFT ms": ("ttft_ms", 1), "mean ms/token": ("mean_ms", 2), "p50": ("p50_ms", 2), "p95": ("p95_ms", 2),
        "p99": ("p99_ms", 2), "tokens/s": ("tokens_per_second", 1), "bytes/token": ("bytes_per_token", 0),
    }  # fmt: skip
    lines = []
    for row in rows:
        overhead = "–"
        if row.get("overhead_ms"):
            percent = shown(row["overhead_percent"], 1, "+")
            overhead = f"{shown(row['overhead_ms'], 2, '+')} ms ({percent} %)"
        figures = [shown(row.get(name), digits) for name, digits in columns.values()]
        lines.append([str(row["stages"]), *figures, overhead])
    return table(["stages", *columns, "overhead"], lines)


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells as Markdown."""
    head, *rows = ["| " + " | ".join(cells) + " |" for cells in (titles, *lines)]
    return "\n".join([head, "|" + "---:|" * len(titles), *rows])


def shown(value: object, digits: int, sign: str = "") -> str:
    """A number, or an `Estimate` as a dict with its margin, in a cell."""
    if isinstance(value, dict):
        margin = f" ± {value['margin']:.{digits}f}" if value["margin"] is not None else ""
        return f"{value['mean']:{sign}.{digits}f}{margin}"
    return f"{value:{sign}.{digits}f}" if isinstance(value, int | float) else "–"
