"""GPT-2 in one sitting: the whole forward pass in plain NumPy, without a cache and without tricks.

Read this first, then `model.py`, which computes the same over any range of layers, incrementally and fast; the tests
hold it to this file. Tensors carry the checkpoint's own names. After "Language Models are Unsupervised Multitask
Learners" (Radford et al., 2019).

    T  positions    C  n_embd    H  heads    D = C / H    V  vocabulary    N, M  any width

    >>> from minigpt.checkpoint import sources, weights
    >>> folder = sources.local("tiny")
    >>> config = sources.read_config(folder)
    >>> generate(weights.load(folder, config, range(config.n_layer)).tensors, config, [464, 300], 5)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.config import Config

Array: TypeAlias = NDArray[np.float32]
TC: TypeAlias = Annotated[Array, "T C"]
TN: TypeAlias = Annotated[Array, "T N"]
TM: TypeAlias = Annotated[Array, "T M"]
TV: TypeAlias = Annotated[Array, "T V"]
HTD: TypeAlias = Annotated[Array, "H T D"]
Tensors: TypeAlias = Mapping[str, Array]


def logits(tensors: Tensors, config: Config, ids: Sequence[int]) -> TV:
    """The scores of every next token, after each of the ids."""
    x = tensors["wte.weight"][list(ids)] + tensors["wpe.weight"][: len(ids)]  # a token, and where it stands
    for layer in range(config.n_layer):
        x = block(tensors, config, layer, x)
    return layer_norm(tensors, "ln_f", config, x) @ tensors[config.head].T


def block(tensors: Tensors, config: Config, layer: int, x: TC) -> TC:
    """One layer: attend to the positions so far, then think about each position by itself."""
    name = f"h.{layer}"
    x = x + attention(tensors, config, layer, layer_norm(tensors, f"{name}.ln_1", config, x))
    return x + mlp(tensors, config, name, layer_norm(tensors, f"{name}.ln_2", config, x))


def attention(tensors: Tensors, config: Config, layer: int, x: TC) -> TC:
    """Every position takes a weighted mean of the values of the positions up to itself, in each head."""
    qkv = conv1d(tensors, f"h.{layer}.attn.c_attn", x)  # (T, 3 C)
    q, k, v = (heads(part, config.n_head) for part in np.split(qkv, 3, axis=-1))
    scores = q @ k.transpose(0, 2, 1)  # (H, T, T): how much query t wants key s
    if config.scale_attn_weights:
        scores = scores / math.sqrt(config.head_dim)
    if config.scale_attn_by_inverse_layer_idx:
        scores = scores / (layer + 1)
    future = np.triu(np.ones(scores.shape[1:], bool), 1)
    weights = softmax(np.where(future, np.float32(-np.inf), scores))
    merged = (weights @ v).transpose(1, 0, 2).reshape(x.shape)
    return conv1d(tensors, f"h.{layer}.attn.c_proj", merged)


def mlp(tensors: Tensors, config: Config, name: str, x: TC) -> TC:
    """Two matrices, with an activation between them."""
    hidden = ACTIVATIONS[config.activation_function](conv1d(tensors, f"{name}.mlp.c_fc", x))
    return conv1d(tensors, f"{name}.mlp.c_proj", hidden)


def heads(x: TC, count: int) -> HTD:
    """Each head gets D of the C columns."""
    return x.reshape(len(x), count, -1).transpose(1, 0, 2)


def conv1d(tensors: Tensors, name: str, x: TN) -> TM:
    """A matrix as GPT-2 stores it, inputs down and outputs across, and a bias."""
    return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def layer_norm(tensors: Tensors, name: str, config: Config, x: TC) -> TC:
    """Each row to mean 0 and variance 1, then scaled and shifted as learned (arXiv:1607.06450)."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    normed: TC = (x - mean) / np.sqrt(variance + np.float32(config.layer_norm_epsilon))
    return normed * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def softmax(x: Array) -> Array:
    """Scores to weights that add up to 1, along the last axis."""
    e: Array = np.exp(x - x.max(-1, keepdims=True))
    total: Array = e.sum(-1, keepdims=True)
    return e / total


def gelu(x: TN) -> TN:
    """x Φ(x) (arXiv:1606.08415)."""
    phi: TN = np.vectorize(lambda number: 0.5 * (1 + math.erf(number / math.sqrt(2))), otypes=[np.float32])(x)
    return x * phi


def gelu_new(x: TN) -> TN:
    """The same by its tanh approximation, as in the GPT-2 that was published."""
    inner: TN = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    tanh: TN = np.tanh(inner)
    return np.float32(0.5) * x * (1 + tanh)


def relu(x: TN) -> TN:
    """max(x, 0)."""
    y: TN = np.maximum(x, np.float32(0))
    return y


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_new, "gelu_pytorch_tanh": gelu_new, "gelu": gelu, "relu": relu,
}  # fmt: skip


def generate(tensors: Tensors, config: Config, ids: Sequence[int], count: int) -> list[int]:
    """The most likely next token, `count` times; each costs a whole forward pass."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(tensors, config, ids)[-1].argmax()))
    return ids[-count:]
