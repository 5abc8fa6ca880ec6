"""Checkpoints made on the spot: seeded random tensors of any config, written as any kind of safetensors folder."""

import hashlib
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from minigpt.engine.config import Config, tensor_shapes
from minigpt.engine.model import GPT2

SMALL = Config(vocab_size=97, n_positions=320, n_embd=48, n_layer=4, n_head=4, n_inner=192, eos_token_id=(96,))

# Each turns on something that the plain model does not use.
ODD: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu, narrow": {"activation_function": "relu", "n_inner": 40},
    "own head": {"tie_word_embeddings": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False, "n_head": 12},  # small heads, or the softmax is so sharp that it is noise
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "coarse norm": {"layer_norm_epsilon": 0.01},
    "one head, one layer": {"n_head": 1, "n_layer": 1},
    "heads of 3": {"n_head": 16, "n_positions": 11},
}


def odd(name: str) -> Config:
    """SMALL with one of the oddities."""
    return Config.from_json(SMALL.to_json() | ODD[name])


def random_tensors(config: Config, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """All tensors of a model, of magnitudes that keep every layer's part in the result felt."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config, range(config.n_layer)).items():
        if len(shape) == 1:
            spread = 0.2
        elif name in ("wte.weight", "wpe.weight", "lm_head.weight"):
            spread = 2 * config.n_embd**-0.5
        else:
            spread = shape[0] ** -0.5
        tensor = rng.standard_normal(shape, np.float32)
        tensor *= np.float32(spread)
        if "ln_" in name and name.endswith("weight"):
            tensor += np.float32(1)
        tensors[name] = tensor
    return tensors


def whole(config: Config = SMALL, seed: int = 0) -> GPT2:
    """A model with all layers."""
    return GPT2(config, range(config.n_layer), random_tensors(config, seed))


def cut(model_config: Config, tensors: dict[str, NDArray[np.float32]], *bounds: int) -> list[GPT2]:
    """A model cut into stages at these layers."""
    edges = (0, *bounds, model_config.n_layer)
    return [GPT2(model_config, range(a, b), tensors) for a, b in itertools.pairwise(edges)]


def write(
    folder: Path,
    config: Config,
    tensors: dict[str, NDArray[np.float32]],
    *,
    prefix: str = "transformer.",
    shards: int = 0,
    dtype: type = np.float32,
    extra: dict[str, NDArray] | None = None,
) -> Path:
    """Write a folder as transformers would, in `shards` files and an index, or in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    stored = {
        name if name == "lm_head.weight" else prefix + name: tensor.astype(dtype) for name, tensor in tensors.items()
    } | (extra or {})
    if not shards:
        save_file(stored, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = sorted(stored)[i::shards]
        save_file({name: stored[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def expected_digest(dtype: bytes, stored: dict[str, NDArray]) -> bytes:
    """The digest of weights, written from its definition and not from the code."""
    digest = hashlib.sha256(b"minigpt-weights-v1\0")
    for name in sorted(stored):
        tensor = stored[name]
        digest.update(struct.pack(">H", len(name)) + name.encode() + struct.pack(">B", len(dtype)) + dtype)
        digest.update(struct.pack(f">B{tensor.ndim}Q", tensor.ndim, *tensor.shape))
        digest.update(hashlib.sha256(tensor.tobytes()).digest())
    return digest.digest()


# Golden file -> its model: the odd configurations that take another path through the arithmetic, and GPT-2 small.
GOLDEN = {
    "plain": SMALL,
    "gelu": odd("gelu"),
    "relu": odd("relu, narrow"),
    "own_head": odd("own head"),
    "scaled_by_layer": odd("scaled by layer"),
    "unscaled": odd("unscaled"),
    "coarse_norm": odd("coarse norm"),
    "gpt2_small": Config(),
}
