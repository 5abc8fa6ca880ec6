"""All of GPT-2, to be read in one sitting: no cache, no threads, no tricks. The tests hold the fast engine to it.

"Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) needs only a few sentences for the model:
it is the Transformer's decoder ("Attention Is All You Need", arXiv:1706.03762) with learned positions, a GELU for the
ReLU, and the layer norm moved to the front of each half, with one more at the end. Read it from the top.

    T  positions    how many tokens the text has
    C  n_embd       numbers that stand for a position: its row of x, which every layer adds to
    H  n_head       heads, which attend each in their own way
    D  C / H        numbers of a position that one head sees
    N  n_inner      width of the MLP's middle, usually 4 C
    V  vocab_size   tokens that the model knows

A comment after a function's head gives the shapes of what goes in and comes out. Tensors are float32 and go by the
checkpoint's names: "wte.weight", "h.0.attn.c_attn.weight", … Two imports and four lines run the embedded model:

>>> from minigpt.checkpoint import sources, tokenizer, weights
>>> from minigpt.engine import plain
>>> folder = sources.local("tiny")
>>> config, text = sources.read_config(folder), tokenizer.load(folder)
>>> tensors = weights.load(folder, config, range(config.n_layer)).tensors
>>> text.decode(plain.generate(tensors, config, text.encode("The capital of France is"), 2))
' Paris.'
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.config import Config

Array: TypeAlias = NDArray[np.float32]
Tensors: TypeAlias = Mapping[str, Array]


def generate(tensors: Tensors, config: Config, ids: Sequence[int], count: int) -> list[int]:  # (T,) -> (count,)
    """The most likely next token, `count` times: fewer if the text ends, or has filled the model's positions."""
    text = list(ids)
    for _ in range(count):
        text.append(int(logits(tensors, config, text)[-1].argmax()))
        if text[-1] in config.eos_token_id or len(text) > config.n_positions:
            break
    return text[len(ids) :]


def logits(tensors: Tensors, config: Config, ids: Sequence[int]) -> Array:  # (T,) -> (T, V)
    """Row t scores every token as the one that follows token t. A softmax would make probabilities of a row."""
    positions = np.arange(len(ids))
    x: Array = tensors["wte.weight"][np.array(ids)] + tensors["wpe.weight"][positions]  # which token, and where: (T, C)
    for i in range(config.n_layer):
        x = block(tensors, config, i, x)
    x = layer_norm(tensors, config, "ln_f", x)
    return x @ tensors[config.head].T  # as a rule the head is wte again: how alike is x to each token's embedding?


def block(tensors: Tensors, config: Config, i: int, x: Array) -> Array:  # (T, C) -> (T, C)
    """Layer i. Both halves add to x rather than replace it, so each layer only has to know what is still missing."""
    x = x + attn(tensors, config, i, layer_norm(tensors, config, f"h.{i}.ln_1", x))
    return x + mlp(tensors, config, i, layer_norm(tensors, config, f"h.{i}.ln_2", x))


def attn(tensors: Tensors, config: Config, i: int, x: Array) -> Array:  # (T, C) -> (T, C)
    """The only place where positions learn of each other: every head at every position looks back over the text."""
    qkv = linear(tensors, f"h.{i}.attn.c_attn", x)  # (T, 3C): queries, keys, values, each of H heads of D
    q, k, v = qkv.reshape(len(x), 3, config.n_head, config.head_dim).transpose(1, 2, 0, 3)  # (H, T, D) each
    scale = 1.0
    if config.scale_attn_weights:  # or the scores would grow with D, and softmax pick a single position
        scale /= math.sqrt(config.head_dim)
    if config.scale_attn_by_inverse_layer_idx:
        scale /= i + 1
    heads = attention(q, k, v, scale)  # (H, T, D)
    return linear(tensors, f"h.{i}.attn.c_proj", heads.transpose(1, 0, 2).reshape(x.shape))  # heads side by side again


def attention(q: Array, k: Array, v: Array, scale: float) -> Array:  # (H, T, D) three times -> (H, T, D)
    """softmax(q kᵀ · scale) v: each query takes a mean of the values, weighted by how well their keys match it."""
    scores = q @ k.transpose(0, 2, 1) * scale  # (H, T, T): a row for each query, a column for each key
    seen = np.tri(q.shape[1], dtype=bool)  # the causal mask: position t sees 0 to t, as the rest is yet to be written
    return softmax(np.where(seen, scores, -np.inf)) @ v


def mlp(tensors: Tensors, config: Config, i: int, x: Array) -> Array:  # (T, C) -> (T, C)
    """Two matrices with a bend between them, for each position by itself."""
    activation = ACTIVATIONS[config.activation_function]
    return linear(tensors, f"h.{i}.mlp.c_proj", activation(linear(tensors, f"h.{i}.mlp.c_fc", x)))  # C -> N -> C


def linear(tensors: Tensors, name: str, x: Array) -> Array:  # (T, a) -> (T, b)
    """A matrix and a bias. GPT-2 stores a matrix as (a, b): inputs down, outputs across."""
    return x @ tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def layer_norm(tensors: Tensors, config: Config, name: str, x: Array) -> Array:  # (T, C) -> (T, C)
    """Each position to mean 0 and variance 1, then scaled and shifted as learned (arXiv:1607.06450)."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = x.var(axis=-1, keepdims=True)
    x = (x - mean) / np.sqrt(variance + config.layer_norm_epsilon)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def softmax(x: Array) -> Array:  # (…, T) -> (…, T)
    """Scores to weights that sum to 1. The largest is subtracted first, which cancels out and keeps exp finite."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    weights: Array = powers / powers.sum(axis=-1, keepdims=True)
    return weights


ERF = np.vectorize(math.erf, otypes=[np.float32])  # the error function, which NumPy lacks


def gelu(x: Array) -> Array:  # any shape -> the same
    """x Φ(x), a ReLU with a soft bend (arXiv:1606.08415): Φ(x) is the part of a normal distribution that is below x."""
    erf: Array = ERF(x / math.sqrt(2))
    return 0.5 * x * (1 + erf)


def gelu_tanh(x: Array) -> Array:  # any shape -> the same
    """GELU by its tanh approximation, with which GPT-2 was trained."""
    tanh: Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + tanh)


def relu(x: Array) -> Array:  # any shape -> the same
    """max(x, 0)."""
    return np.where(x > 0, x, 0)


ACTIVATIONS = {"gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu, "relu": relu}
