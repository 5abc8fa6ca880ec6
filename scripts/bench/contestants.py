"""The contestants of `peers.py`, each in a process of its own: `python scripts/bench/contestants.py NAME FOLDER`.

FOLDER holds the checkpoint that `make_checkpoint` wrote. Requests come in on standard input, one a line, and for each
the seconds from the request to each token go out on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import minigpt  # noqa: E402 — before NumPy, whose threads it sets
from minigpt.cli.clients import run_together  # noqa: E402

MOST = 16  # sequences at once
SMALL, TINY = "small", "tiny"  # GPT-2 small's shape with random weights; the embedded model
CORES = os.cpu_count() or 1


class Request(NamedTuple):
    prompt: list[int] | str
    tokens: int  # to generate
    draft: int = 0  # ids to guess ahead at most
    model: str = SMALL
    batch: int = 0  # so many sequences at once, with this prompt each; 0: one, timed token by token


Times = list[float]  # seconds from the request to each token; or, of a batch, its seconds for each token of all
Run = Callable[[Request], Times]


def make_checkpoint(folder: Path) -> None:
    """GPT-2 small's shape with seeded random weights, and a vocabulary of made-up words for those who insist on one."""
    import numpy as np
    from safetensors.numpy import save_file

    from minigpt.engine.config import Config, tensor_shapes

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


def per_token(request: Request, seconds: float, found: int) -> Times:
    """What a batch took for each token. Ends the process if it has not as many as were asked for."""
    if found != request.batch * request.tokens:
        raise SystemExit(f"{found} tokens, wanted {request.batch} × {request.tokens}")
    return [seconds / found]


def run_own(folder: Path, stages: int | None) -> Run:
    """This engine: in this process, or as so many stages."""

    @cache
    def opened(model: str) -> Any:
        name = TINY if model == TINY else str(folder)
        return minigpt.load(name) if stages is None else minigpt.Pipeline.local(name, stages, connections=MOST)

    def run(request: Request) -> Times:
        if request.batch:
            crowd = run_together(opened(request.model), request.prompt, request.tokens, request.batch)
            return per_token(request, crowd.seconds, crowd.tokens)
        generation = opened(request.model).generate(request.prompt, max_tokens=request.tokens, draft=request.draft)
        if (found := len(list(generation))) != request.tokens:
            raise SystemExit(f"{found} tokens, wanted {request.tokens}")
        times: Times = generation.times
        return times

    opened(SMALL)
    return run


def run_streaming(folder: Path) -> Run:
    import numpy as np

    from minigpt.checkpoint import sources, weights

    config = sources.read_config(folder)
    tensors = weights.load(folder, config, range(config.n_layer)).tensors
    read = [tensor for name, tensor in tensors.items() if tensor.ndim == 2 and name != "wpe.weight"]
    vectors = {width: np.ones(width, np.float32) for width in {tensor.shape[1] for tensor in read}}

    def run(request: Request) -> Times:
        began, times = time.perf_counter(), []
        for _ in range(request.tokens):
            for tensor in read:
                tensor @ vectors[tensor.shape[1]]
            times.append(time.perf_counter() - began)
        return times

    return run


def torch_model(folder: Path) -> Any:
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(CORES)
    return GPT2LMHeadModel.from_pretrained(folder).float().eval()


def decode_torch(model: Any, request: Request) -> tuple[list[int], Times]:
    import torch
    from transformers.cache_utils import DynamicCache

    began, times = time.perf_counter(), []
    ids, cache, found = torch.tensor([request.prompt]), DynamicCache(config=model.config), []
    with torch.inference_mode():
        for _ in range(request.tokens):
            ids = model(ids, cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(ids.item()))
            times.append(time.perf_counter() - began)
    return found, times


def batch_torch(model: Any, request: Request) -> Times:
    import torch

    began = time.perf_counter()
    ids = torch.tensor([request.prompt] * request.batch)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.tokens, do_sample=False, pad_token_id=0
    )
    return per_token(request, time.perf_counter() - began, made.numel() - ids.numel())


def run_torch(folder: Path) -> Run:
    model = torch_model(folder)
    return lambda request: batch_torch(model, request) if request.batch else decode_torch(model, request)[1]


def run_ctranslate2(folder: Path, kind: str) -> Run:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import GPT2Tokenizer

    words = GPT2Tokenizer(str(folder / "words" / "vocab.json"), str(folder / "words" / "merges.txt"))
    words.save_pretrained(folder)
    out = folder / f"ctranslate2-{kind}"
    TransformersConverter(str(folder)).convert(str(out), quantization=kind, force=True)
    model = ctranslate2.Generator(str(out), intra_threads=CORES, compute_type=kind)

    def run(request: Request) -> Times:
        began, times = time.perf_counter(), []
        given = [f"w{token}" for token in request.prompt]
        if request.batch:
            made = model.generate_batch(
                [given] * request.batch, max_length=request.tokens, sampling_topk=1, end_token=[],
                include_prompt_in_result=False,
            )  # fmt: skip
            found = sum(len(each.sequences_ids[0]) for each in made)
            return per_token(request, time.perf_counter() - began, found)
        for _ in model.generate_tokens(given, max_length=request.tokens, sampling_topk=1, end_token=[]):
            times.append(time.perf_counter() - began)
        return times

    return run


def export_onnx(model: Any, file: Path) -> tuple[list[str], list[str]]:
    """One step of greedy decoding, with the KV cache as explicit inputs and outputs; gives the names of those."""
    import torch
    from transformers.cache_utils import DynamicCache

    config = model.config
    layers = config.n_layer

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache(tuple(zip(past[:layers], past[layers:], strict=True)))
            out = self.model(ids, cache, use_cache=True, logits_to_keep=1)
            keys, values = zip(*((layer.keys, layer.values) for layer in cache.layers), strict=True)
            return out.logits[:, -1].argmax(-1, keepdim=True), *keys, *values

    before, after = ([f"{when}_{i}" for i in range(2 * layers)] for when in ("past", "present"))
    # Lengths that stand for any: of 5 and 7 nothing is fixed in the graph, as 0 and 1 would be.
    past = [torch.zeros(1, config.n_head, 7, config.n_embd // config.n_head) for _ in before]
    any_length = torch.export.Dim.AUTO
    torch.onnx.export(
        Step(),
        (torch.zeros(1, 5, dtype=torch.long), *past),
        file,
        dynamo=True,
        input_names=["ids", *before],
        output_names=["next", *after],
        dynamic_shapes=({1: any_length}, tuple({2: any_length} for _ in past)),
    )
    return before, ["next", *after]


def run_onnxruntime(folder: Path) -> Run:
    import numpy as np
    import onnxruntime

    file = folder / "step.onnx"
    model = torch_model(folder)
    asked = Request([(31 * i) % 997 for i in range(11)], 4)
    wanted = decode_torch(model, asked)[0]
    before, after = export_onnx(model, file)
    empty = np.empty((1, model.config.n_head, 0, model.config.n_embd // model.config.n_head), np.float32)
    del model
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = CORES
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy

    def decode(request: Request) -> tuple[list[int], Times]:
        began, times, found = time.perf_counter(), [], []
        feed = {name: value(empty) for name in before} | {"ids": value(np.array([request.prompt], np.int64))}
        for _ in range(request.tokens):
            ids, *present = session.run_with_ort_values(after, feed)  # the cache stays where the runtime keeps it
            found.append(int(ids.numpy()[0, 0]))
            times.append(time.perf_counter() - began)
            feed = {"ids": ids} | dict(zip(before, present, strict=True))
        return found, times

    if (found := decode(asked)[0]) != wanted:  # an exporter may freeze what depended on its example
        raise SystemExit(f"the exported model gives {found}, torch {wanted}")
    return lambda request: decode(request)[1]


def start(contestant: str, folder: Path) -> Run:
    kind, _, rest = contestant.partition(" ")
    if kind == "minigpt":
        return run_own(folder, None)
    if kind == "stages":
        return run_own(folder, int(rest.split()[0]))
    if kind == "ctranslate2":
        return run_ctranslate2(folder, rest)
    return {"torch": run_torch, "streaming": run_streaming, "onnxruntime": run_onnxruntime}[kind](folder)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    run = start(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(Request(*json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
