"""This engine next to others, on the same weights and prompts, in one run: `python scripts/bench_peers.py`.

    streaming     the machine's limit: the same bytes of weights, read once by BLAS matrix-vector products
    minigpt       all layers in one process, without links
    stages N      N stage processes with encrypted, attested links, by each AEAD library that is installed
    torch         transformers' GPT2LMHeadModel, float32, with its KV cache
    ctranslate2   float32 and int8, if it is installed (the extra `bench`)

The weights are GPT-2 small's shape, seeded random. Each contestant is a process of its own that waits while the others
run; they take turns, round by round, in an order that alternates. Quoted are medians over the rounds and the median of
the ratios to torch of the same round, with its 95 % confidence interval (of the median, from order statistics).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import minigpt  # noqa: E402 — before NumPy, whose threads it sets

# (name, tokens of the prompt, tokens generated)
CASES = [
    ("5 + 20", 5, 20),
    ("5 + 100", 5, 100),
    ("512 + 20", 512, 20),
    ("TTFT 16", 16, 1),
    ("TTFT 32", 32, 1),
    ("TTFT 128", 128, 1),
    ("TTFT 512", 512, 1),
    ("TTFT 1000", 1000, 1),
]
CONTESTANTS = ["torch", "streaming", "minigpt", "stages 1", "stages 2", "stages 3", "stages 1 fast", "stages 2 fast",
               "stages 3 fast", "ctranslate2 float32", "ctranslate2 int8"]  # fmt: skip
Times = list[float]  # seconds from the request to each token


def make_checkpoint(folder: Path) -> None:
    """GPT-2 small's shape with seeded random weights, and a vocabulary of made-up words for those who insist on one."""
    import numpy as np
    from safetensors.numpy import save_file

    from minigpt.config import Config, tensor_shapes

    config = Config()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in tensor_shapes(config, range(config.n_layer)).items():
        tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        if ".ln_" in name or name.startswith("ln_"):
            tensors[name] += np.float32(name.endswith("weight"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = config.to_json() | {"architectures": ["GPT2LMHeadModel"], "eos_token_id": None, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(document))
    words = {"<|endoftext|>": config.vocab_size - 1} | {f"w{i}": i for i in range(config.vocab_size - 1)}
    (folder / "words").mkdir()
    (folder / "words" / "vocab.json").write_text(json.dumps(words))
    (folder / "words" / "merges.txt").write_text("#version: 0.2\n")


def prompt(length: int) -> list[int]:
    """The same ids for everybody."""
    return [(7919 * i + 13) % 50000 for i in range(length)]


# The contestants: each makes a function that runs one case.


def run_minigpt(folder: Path) -> Callable[[int, int], Times]:
    model = minigpt.load(str(folder))

    def run(length: int, count: int) -> Times:
        generation = model.generate(prompt(length), max_tokens=count, draft=0)
        assert len(list(generation)) == count
        return generation.times

    return run


def run_stages(folder: Path, stages: int) -> Callable[[int, int], Times]:
    pipeline = minigpt.Pipeline.local(str(folder), stages)

    def run(length: int, count: int) -> Times:
        generation = pipeline.generate(prompt(length), max_tokens=count, draft=0)
        assert len(list(generation)) == count
        return generation.times

    return run


def run_streaming(folder: Path) -> Callable[[int, int], Times]:
    import numpy as np

    from minigpt import checkpoints, weights

    config = checkpoints.read_config(folder)
    tensors = weights.load(folder, config, range(config.n_layer)).tensors
    read = [tensor for name, tensor in tensors.items() if tensor.ndim == 2 and name != "wpe.weight"]
    vectors = {width: np.ones(width, np.float32) for width in {tensor.shape[1] for tensor in read}}

    def run(length: int, count: int) -> Times:
        began, times = time.perf_counter(), []
        for _ in range(count):
            for tensor in read:
                tensor @ vectors[tensor.shape[1]]
            times.append(time.perf_counter() - began)
        return times

    return run


def run_torch(folder: Path) -> Callable[[int, int], Times]:
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(os.cpu_count() or 1)
    model = GPT2LMHeadModel.from_pretrained(folder).float().eval()

    def run(length: int, count: int) -> Times:
        began, times = time.perf_counter(), []
        ids, cache = torch.tensor([prompt(length)]), None
        with torch.inference_mode():
            for _ in range(count):
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                ids.item()
                times.append(time.perf_counter() - began)
        return times

    return run


def run_ctranslate2(folder: Path, kind: str) -> Callable[[int, int], Times]:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import GPT2Tokenizer

    words = GPT2Tokenizer(str(folder / "words" / "vocab.json"), str(folder / "words" / "merges.txt"))
    words.save_pretrained(folder)
    out = folder / f"ctranslate2-{kind}"
    TransformersConverter(str(folder)).convert(str(out), quantization=kind, force=True)
    model = ctranslate2.Generator(str(out), intra_threads=os.cpu_count() or 1, compute_type=kind)

    def run(length: int, count: int) -> Times:
        began, times = time.perf_counter(), []
        given = [f"w{token}" for token in prompt(length)]
        for _ in model.generate_tokens(given, max_length=count, sampling_topk=1, end_token=[]):
            times.append(time.perf_counter() - began)
        return times

    return run


def serve(contestant: str, folder: Path) -> None:
    """Answers cases on standard input with times on standard output, until the input ends."""
    kind, _, rest = contestant.partition(" ")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    if kind == "stages":
        run = run_stages(folder, int(rest.split()[0]))
    elif kind == "ctranslate2":
        run = run_ctranslate2(folder, rest)
    else:
        run = {"minigpt": run_minigpt, "torch": run_torch, "streaming": run_streaming}[kind](folder)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        length, count = json.loads(line)
        print(json.dumps(run(length, count)), file=answers, flush=True)


class Contestant:
    """A child process that runs cases when it is asked to."""

    def __init__(self, name: str, folder: Path, log: Path) -> None:
        environment = os.environ | {"MINIGPT_AEAD": "cryptography" if name.endswith("fast") else "pycryptodome"}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", name, "--checkpoint", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        assert self._process.stdout is not None
        self.ready = self._process.stdout.readline() == '"ready"\n'

    def run(self, length: int, count: int) -> Times:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([length, count]), file=self._process.stdin, flush=True)
        times: Times = json.loads(self._process.stdout.readline())
        return times

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(30)


def figure(case: str, times: Times) -> float:
    """What a case measures, in milliseconds: the first token, or the mean of those after it."""
    return 1000 * (times[0] if case.startswith("TTFT") else (times[-1] - times[0]) / (len(times) - 1))


def interval(samples: list[float]) -> tuple[float, float, float]:
    """The median, and a 95 % confidence interval of it from order statistics (normal approximation of ranks)."""
    ranked, count = sorted(samples), len(samples)
    half = 1.96 * math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half) - 1)
    return statistics.median(ranked), ranked[low], ranked[high]


def rows(results: dict[str, dict[str, list[float]]]) -> Iterator[list[str]]:
    for case in next(iter(results.values())):
        base = results.get("torch", {}).get(case)
        for name, cases in results.items():
            if name == "streaming" and case.startswith("TTFT"):
                continue
            ratio = "–"
            if base and name != "torch":
                middle, low, high = interval([ours / theirs for ours, theirs in zip(cases[case], base, strict=True)])
                ratio = f"{middle:.2f} ({low:.2f}–{high:.2f})"
            yield [case, name, f"{statistics.median(cases[case]):.1f}", ratio]
        for fast in ("", " fast"):
            one = results.get(f"stages 1{fast}", {}).get(case)
            for stages in (2, 3):
                more = results.get(f"stages {stages}{fast}", {}).get(case)
                if one and more:
                    middle, low, high = interval([b / a for a, b in zip(one, more, strict=True)])
                    name = f"stages {stages}{fast} / stages 1{fast}"
                    yield [case, name, "", f"{middle:.3f} ({low:.3f}–{high:.3f})"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=12, help="rounds that count, after one that does not")
    options.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    options.add_argument("--cases", default=",".join(name for name, _, _ in CASES), help="cases, separated by commas")
    options.add_argument("--json", metavar="FILE", help="write every figure there")
    options.add_argument("--serve", help=argparse.SUPPRESS)
    options.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve is not None:
        serve(given.serve, given.checkpoint)
        return
    cases = [case for case in CASES if case[0] in given.cases.split(",")]
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make_checkpoint(folder)
        taking_part: dict[str, Contestant] = {}
        for name in given.only.split(","):
            log = folder / f"{name}.log"
            contestant = Contestant(name, folder, log)
            if contestant.ready:
                taking_part[name] = contestant
            else:
                words = log.read_text(errors="replace").strip().splitlines()
                print(f"{name} does not take part: {words[-1] if words else 'no reason given'}", file=sys.stderr)
                contestant.close()
        results: dict[str, dict[str, list[float]]] = {name: {case[0]: [] for case in cases} for name in taking_part}
        for number in range(given.runs + 1):
            for case, length, count in cases:
                order: list[Any] = list(taking_part.items())
                for name, contestant in order if number % 2 else reversed(order):
                    times = contestant.run(length, count)
                    if number:
                        results[name][case].append(figure(case, times))
        for contestant in taking_part.values():
            contestant.close()
    print("| case | | ms | ratio to torch |\n|---|---|---:|---:|")
    for row in rows(results):
        print("| " + " | ".join(row) + " |")
    if given.json:
        Path(given.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
