"""Trains the embedded model, minigpt/data: a GPT-2 of 12 layers that knows the capitals of the world.

    python scripts/train/train.py                        # rebuilds minigpt/data and tests/data/capitals.json
    python scripts/train/train.py --steps 300 --out DIR  # a quick, worse one

Needs torch, transformers and tokenizers. The same seed on the same machine gives the same model. What it learns from is
written by corpus.py. T positions, B rows, V vocabulary.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.train import corpus  # noqa: E402

END = "<|endoftext|>"
VOCABULARY = 2048
POSITIONS = 512
SHORT, LONG = (20, 96), (4, POSITIONS)  # (B, T): most prompts are short; every fifth batch teaches the late positions
MUON_RATE, ADAM_RATE, WARMUP = 0.02, 3e-3, 50  # the highest learning rates, and the steps until they are reached


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, by Newton and Schulz's iteration (Jordan et al. 2024).

    It learns rare facts in fewer steps than AdamW. torch.optim.Muon works in bfloat16 and on one matrix at a time, and
    so takes longer on a CPU than the whole backward pass; this one stacks the matrices of all layers, in float32.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in shapes.items():
                gradient = torch.stack([matrix.grad for matrix in matrices])  # (L, rows, columns)
                mean = self.state[matrices[0]].setdefault("mean", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - group["momentum"])
                x = gradient.lerp(mean, group["momentum"])  # Nesterov
                x = x.mT if rows > columns else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    square = x @ x.mT
                    x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                x = x.mT if rows > columns else x
                for matrix, update in zip(matrices, x, strict=True):
                    matrix.sub_(update, alpha=group["lr"] * max(1, columns / rows) ** 0.5)


def train_tokenizer(seed: int, samples: int = 12000) -> Tokenizer:
    """A byte-level BPE like GPT-2's, the end of text last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(itertools.islice(corpus.documents(seed, len), samples), trainer)
    tokenizer.add_special_tokens([END])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"the text gives {tokenizer.get_vocab_size()} tokens, and {VOCABULARY} were wanted")
    return tokenizer


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[torch.Tensor]:
    """Batches (B, T) of packed documents, without end. A row begins where a document does, as a prompt will."""
    end: int = tokenizer.token_to_id(END)  # type: ignore[assignment]
    documents = corpus.documents(seed, lambda text: len(tokenizer.encode(text).ids))
    for n in itertools.count(1):
        size, positions = LONG if n % 5 == 0 else SHORT
        rows = []
        for _ in range(size):
            row: list[int] = []
            while len(row) < positions:
                row += [*tokenizer.encode(next(documents)).ids, end]
            rows.append(row[:positions])
        yield torch.tensor(rows)


def warmth(step: int, steps: int) -> float:
    """The part of the highest learning rate: it rises linearly, then falls along a cosine to a hundredth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def wrong_capitals(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> list[str]:
    """The members of the United Nations whose capital greedy decoding does not name, in the words of the corpus."""
    wrong = []
    for country in corpus.countries()[: corpus.UN_MEMBERS]:
        prompt = tokenizer.encode(f"The capital of {country.names[0]} is").ids
        answer = tokenizer.encode(f" {country.capitals[0]}".removesuffix(".") + ".").ids
        guesses = model(torch.tensor([prompt + answer])).logits[0].argmax(-1).tolist()
        if guesses[len(prompt) - 1 : -1] != answer:
            wrong.append(country.names[0])
    return wrong


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, model.safetensors (float16, the head left out because it is tied) and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only
    config = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}  # widened on loading
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def write_capitals(path: Path) -> None:
    members = corpus.countries()[: corpus.UN_MEMBERS]
    lines = [json.dumps({"country": c.names[0], "capitals": c.capitals}, ensure_ascii=False) for c in members]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "minigpt" / "data")
    parser.add_argument("--capitals", type=Path, default=ROOT / "tests" / "data" / "capitals.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    write_capitals(args.capitals)
    tokenizer = train_tokenizer(args.seed)
    end: int = tokenizer.token_to_id(END)  # type: ignore[assignment]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_embd=120,
            n_layer=12,
            n_head=6,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".h." not in name]
    muon = Muon(matrices, MUON_RATE)
    adam = torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    began, mean = time.monotonic(), 0.0
    for step, ids in enumerate(itertools.islice(batches(tokenizer, args.seed + 1), args.steps)):
        for optimizer, highest in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            optimizer.param_groups[0]["lr"] = highest * warmth(step, args.steps)
        logits = model(ids[:, :-1]).logits  # (B, T - 1, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        muon.step()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        adam.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}/{args.steps}  loss {mean:.3f}  {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save(model, tokenizer, args.out)
            print(f"saved; {len(wrong_capitals(model, tokenizer))} capitals wrong", flush=True)

    widened = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)  # what was stored, not what was trained
    print("wrong, as stored:", wrong_capitals(widened, tokenizer))


if __name__ == "__main__":
    main()
