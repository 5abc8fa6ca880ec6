"""One pass of several sequences, a row each, next to one of a single row: `python scripts/bench/batches.py`.

GPT-2 small's shape with seeded random weights, in process and without links: embedding, layers and head. Rounds take
the sizes in turns, in an order that alternates, so that what is compared was measured side by side. Medians, with their
95 % confidence intervals (from order statistics: none from fewer than 6 rounds).

A pass is split by who is timed inside it: attention (without its matrices), the matrices, and the rest: norms, GELUs,
sums, Python.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

from minigpt.checkpoint import sources, weights
from minigpt.engine import model as engine
from scripts.bench.contestants import make_checkpoint
from scripts.bench.peers import interval, machine, ratio

SIZES = [1, 2, 4, 8, 16, 32]
PARTS = {"matrices": "product", "attention": "attend"}  # and the function of the engine that computes each
PASSES = 3  # of each size in a round


def timed(spent: dict[str, float], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which now adds the seconds that it takes to those spent."""

    def run(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments)
        spent[part] += time.perf_counter() - began
        return result

    return run


def random_model() -> engine.GPT2:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make_checkpoint(folder)
        config = sources.read_config(folder)
        layers = range(config.n_layer)
        return engine.GPT2(config, layers, weights.load(folder, config, layers).tensors)


def measure(model: engine.GPT2, contexts: list[int], rounds: int) -> dict[int, list[dict[str, float]]]:
    """Milliseconds of a pass and its parts, by size and round. Before each, sequence i has contexts[i] positions."""
    import numpy as np  # after minigpt, which sets its threads

    caches = [model.new_cache() for _ in contexts]
    for cache, context in zip(caches, contexts, strict=True):
        cache.reserve(context + 1)
        for start in range(0, context, engine.QUERY_BLOCK):
            count = min(engine.QUERY_BLOCK, context - start)
            model.forward(model.embed(np.arange(count) * 7919 % 50000, start), [(cache, count)])

    def one_pass(size: int) -> None:
        x = np.concatenate([model.embed([size], context) for context in contexts[:size]])
        model.logits(model.forward(x, [(cache, 1) for cache in caches[:size]]))
        for cache, context in zip(caches[:size], contexts, strict=False):
            cache.truncate(context)

    spent = dict.fromkeys(PARTS, 0.0)
    for part, name in PARTS.items():
        setattr(engine, name, timed(spent, part, getattr(engine, name)))
    sizes = [size for size in SIZES if size <= len(contexts)]
    results: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for number in range(rounds + 1):
        for size in sizes if number % 2 else reversed(sizes):
            one_pass(size)  # the caches hold what a pass of this size leaves there
            spent.update(dict.fromkeys(PARTS, 0.0))
            began = time.perf_counter()
            for _ in range(PASSES):
                one_pass(size)
            parts = {"pass": time.perf_counter() - began, **spent}
            parts["rest"] = parts["pass"] - sum(spent.values())
            if number:
                results[size].append({part: 1000 * seconds / PASSES for part, seconds in parts.items()})
    return results


def cell(samples: list[float]) -> str:
    ends = interval(samples)
    return f"{statistics.median(samples):.1f}" + (f" ({ends[0]:.1f}–{ends[1]:.1f})" if ends else "")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--context", type=int, default=32, help="positions of each sequence before the pass")
    options.add_argument("--mixed", action="store_true", help="every second sequence has a quarter of it, or less")
    options.add_argument("--rounds", type=int, default=20, help="rounds that count, after one that does not")
    given = options.parse_args()
    if given.context < 1 or given.rounds < 1:
        options.error("--context and --rounds are 1 or more")
    contexts = [given.context] * max(SIZES)
    if given.mixed:
        contexts = [max(1, given.context // (1 + i % 2 * (3 + i))) for i in range(max(SIZES))]
    results = measure(random_model(), contexts, given.rounds)
    print(f"{machine()}: `python {shlex.join(['scripts/bench/batches.py', *sys.argv[1:]])}`\n")
    one = [round_["pass"] for round_ in results[1]]
    for row in (["rows", "ms", "tokens/s / one row's", *PARTS, "rest"], ["---:"] * (4 + len(PARTS))):
        print("| " + " | ".join(row) + " |")
    for size, rounds in results.items():
        taken = {part: [round_[part] for round_ in rounds] for part in rounds[0]}
        tokens = ratio([size * ms for ms in one], taken["pass"])
        print("| " + " | ".join([str(size), cell(taken["pass"]), tokens, *map(cell, list(taken.values())[1:])]) + " |")


if __name__ == "__main__":
    main()
