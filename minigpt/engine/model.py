"""GPT-2's forward pass over any range of its layers, in NumPy.

    x = wte[ids] + wpe[positions]        before the first layer
    x = x + attn(ln_1(x))                each layer: attention over the positions so far,
    x = x + mlp(ln_2(x))                             then two matrices with a GELU between them
    logits = ln_f(x) @ wte.T             after the last layer

"Language Models are Unsupervised Multitask Learners" (Radford et al., 2019); the names are the checkpoint's. One
formula serves a prompt, a chunk of it and a single token: T new positions attend to S, the cached ones and themselves.
The model is frozen and serves any number of threads; all that changes is in a `KVCache`, one for each sequence.

Letters: R rows (of all the sequences in a step), T new positions of one sequence, S cached + new positions, C n_embd,
H heads, D = C / H, L layers of this range, V vocabulary. Every array is float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.engine import blas, threads
from minigpt.engine.config import Config, tensor_shapes
from minigpt.engine.errstate import numpy_defaults
from minigpt.engine.linalg import ACTIVATIONS, Array, dot_products, layer_norm, product, softmax_numerators
from minigpt.errors import CheckpointError

# Queries computed at a time. This bounds the scores of a long prompt to H × 128 × S numbers (6 MB for GPT-2 small at
# 1024 positions; all at once would take 50), and skips most of what the causal mask would discard.
QUERY_BLOCK = 128

# Positions of several sequences together from which threads share the sequences. 32 of 128 positions then take 0.65
# times as long. With few positions each, threads mostly wait for each other to leave Python: 32 of 32 would take 1.15.
MANY_POSITIONS = 4096

CACHE_STEP = 64  # positions of the smallest cache: 4.5 MiB for GPT-2 small


def _capacity(positions: int, most: int) -> int:
    """Positions that a cache has room for if so many are needed; ValueError if the model has fewer."""
    if positions > most:
        raise ValueError(f"cache: {positions} positions, the model has {most}")
    return min(math.ceil((positions + positions // 4) / CACHE_STEP) * CACHE_STEP, most)


class KVCache:
    """Keys and values of one sequence's positions so far, for the layers of one range. Not thread-safe.

    It grows to a quarter more than is needed. So a new position is written in place, where concatenating would copy the
    whole cache for every token; the first token after a prompt does not wait for a larger cache; and a short sequence
    does not pay for n_positions.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, n_positions: int) -> None:
        self.length = 0
        self._n_positions = n_positions
        self._kv = np.empty((layers, 2, heads, 0, head_dim), np.float32)  # keys and values: (L, 2, H, capacity, D)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whether filled or not."""
        return self._kv.nbytes

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on; ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cache: cannot rewind to {length}, wanted 0 to {self.length}")
        self.length = length

    def reserve(self, positions: int) -> None:
        """Make room for this many positions in all; ValueError if the model has fewer."""
        if positions > self._kv.shape[3]:
            old, capacity = self._kv, _capacity(positions, self._n_positions)
            self._kv = np.empty((*old.shape[:3], capacity, old.shape[4]), np.float32)
            self._kv[:, :, :, : self.length] = old[:, :, :, : self.length]

    def put(self, layer: int, kv: Array) -> Array:  # (2, H, T, D) -> (2, H, S, D)
        """Write the new positions of a layer, and return all of them so far; they count once `length` includes them."""
        end = self.length + kv.shape[2]
        self._kv[layer, :, :, self.length : end] = kv
        return self._kv[layer, :, :, :end]


Segments = Sequence[tuple[KVCache, int]]  # each sequence's cache, and its number of rows


def attention(q: Array, k: Array, v: Array) -> Array:  # (H, T, D), (H, S, D), (H, S, D) -> (H, T, D)
    """softmax(q kᵀ) v under the causal mask: query t is position S - T + t, and sees no key after itself."""
    new = q.shape[1]
    scores = dot_products(q, k)  # (H, T, S)
    if new > 1:
        scores[:, :, -new:] += np.triu(np.full((new, new), -np.inf, np.float32), 1)
    softmax_numerators(scores)
    out: Array = scores @ v
    out /= np.add.reduce(scores, axis=-1, keepdims=True)
    return out


def attend_alone(qkv: Array, layer: int, cache: KVCache) -> Array:  # (3, H, T, D) -> (T, H, D)
    """A sequence's rows attend to its positions, which its cache holds afterwards."""
    q, blocks = qkv[0], []
    k, v = cache.put(layer, qkv[1:])
    for start in range(0, q.shape[1], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[1])
        seen = cache.length + stop
        blocks.append(attention(q[:, start:stop], k[:, :seen], v[:, :seen]).transpose(1, 0, 2))
    return np.concatenate(blocks) if len(blocks) > 1 else blocks[0]


def attend(qkv: Array, layer: int, segments: Segments) -> Array:  # (3, H, R, D) -> (R, H, D)
    """Each sequence's rows attend to that sequence's positions, and to no others."""
    if len(segments) == 1:
        return attend_alone(qkv, layer, segments[0][0])
    _, heads, count, head_dim = qkv.shape
    out = np.empty((count, heads, head_dim), np.float32)
    starts = list(accumulate((rows for _, rows in segments), initial=0))

    def work(part: slice) -> None:
        for (cache, rows), start in zip(segments[part], starts[part], strict=True):
            out[start : start + rows] = attend_alone(qkv[:, :, start : start + rows], layer, cache)

    if sum(cache.length + rows for cache, rows in segments) >= MANY_POSITIONS:
        threads.in_parts(work, len(segments))
    else:
        work(slice(0, len(segments)))
    return out


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """The checkpoint's `ln_1`, `ln_2`, `ln_f`."""

    weight: Array  # (C,)
    bias: Array  # (C,)
    epsilon: float

    def __call__(self, x: Array) -> Array:  # (R, C) -> (R, C)
        return layer_norm(x, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True, slots=True)
class Conv1D:
    """The checkpoint's matrices, inputs down and outputs across."""

    weight: Array  # (N, M)
    bias: Array  # (M,)

    def __call__(self, x: Array) -> Array:  # (R, N) -> (R, M)
        y = product(x, self.weight)
        y += self.bias
        return y


@dataclass(frozen=True, slots=True)
class Block:
    """One layer."""

    ln_1: LayerNorm
    c_attn: Conv1D
    attn_c_proj: Conv1D
    ln_2: LayerNorm
    c_fc: Conv1D
    mlp_c_proj: Conv1D
    config: Config
    scale: np.float32  # of q · k

    def __call__(self, x: Array, layer: int, segments: Segments) -> Array:  # (R, C) -> (R, C)
        x = x + self.attn(self.ln_1(x), layer, segments)
        return x + self.mlp(self.ln_2(x))

    def attn(self, x: Array, layer: int, segments: Segments) -> Array:  # (R, C) -> (R, C)
        """Each sequence's rows attend to that sequence's positions; the matrices take all rows at once."""
        heads, head_dim = self.config.n_head, self.config.head_dim
        qkv = self.c_attn(x).reshape(-1, 3, heads, head_dim).transpose(1, 2, 0, 3)  # (3, H, R, D)
        qkv[0] *= self.scale
        out = attend(qkv, layer, segments)
        return self.attn_c_proj(out.reshape(x.shape))

    def mlp(self, x: Array) -> Array:  # (R, C) -> (R, C)
        return self.mlp_c_proj(ACTIVATIONS[self.config.activation_function](self.c_fc(x)))


class GPT2:
    """A contiguous range of GPT-2's layers: with the embedding if it holds the first, with the head if the last.

    Args:
        layers: half open, `range(0, 6)`.
        tensors: those that `tensor_shapes(config, layers)` names, float32; they become read-only and are not copied.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or type.
    """

    def __init__(self, config: Config, layers: range, tensors: Mapping[str, Array]) -> None:
        blas.computes_beside("model")
        threads.settle()
        shapes = tensor_shapes(config, layers)
        for name, shape in shapes.items():
            if name not in tensors:
                raise CheckpointError(f"tensor {name} is missing: layers {layers.start}..{layers.stop} need it")
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != np.float32 or not tensor.flags.forc:
                raise CheckpointError(f"tensor {name}: got {tensor.dtype} {tensor.shape}, wanted float32 {shape}")
            tensor.setflags(write=False)
        self.config = config
        self.layers = layers
        self.nbytes = sum(4 * math.prod(shape) for shape in shapes.values())
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.n_layer
        self.h = tuple(_block(config, i, tensors) for i in layers)
        if self.is_first:
            self.wte, self.wpe = tensors["wte.weight"], tensors["wpe.weight"]
        if self.is_last:
            self.ln_f = LayerNorm(tensors["ln_f.weight"], tensors["ln_f.bias"], config.layer_norm_epsilon)
            self.lm_head = tensors[config.head]

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence through these layers."""
        return KVCache(len(self.layers), self.config.n_head, self.config.head_dim, self.config.n_positions)

    def cache_bytes(self, positions: int) -> int:
        """The `nbytes` of a new cache once it has reserved so many positions; ValueError if the model has fewer."""
        return 4 * 2 * len(self.layers) * self.config.n_embd * _capacity(positions, self.config.n_positions)

    @numpy_defaults
    def embed(self, ids: Sequence[int] | NDArray[np.integer[Any]], start: int) -> Array:  # (T,) -> (T, C)
        """Token and position embeddings of ids at positions start, start + 1, …

        Raises:
            ValueError: an id or a position that the model does not have.
        """
        tokens, positions = np.asarray(ids), self.config.n_positions
        if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
            raise ValueError(f"token ids: got {tokens.dtype} {tokens.shape}, wanted a list of integers")
        if start < 0 or start + len(tokens) > positions:
            raise ValueError(f"{len(tokens)} tokens from position {start}: the model has {positions} positions")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()}: wanted 0 to {self.config.vocab_size - 1}")
        x: Array = self.wte[tokens] + self.wpe[start : start + len(tokens)]
        return x

    @numpy_defaults
    def forward(self, x: Array, segments: Segments) -> Array:  # (R, C) -> (R, C)
        """Run the layers over the rows of one or more sequences, one after another, and extend their caches.

        Each of `segments` is a sequence's cache and the number of its rows in x; the caches must differ. If this
        raises, they count no new positions.
        """
        if x.shape != (sum(rows for _, rows in segments), self.config.n_embd) or x.dtype != np.float32:
            raise ValueError(f"forward: got {x.dtype} {x.shape} for segments of {[rows for _, rows in segments]} rows")
        if len({id(cache) for cache, _ in segments}) != len(segments):
            raise ValueError("forward: a cache appears twice; give its rows as one segment")
        for cache, rows in segments:
            cache.reserve(cache.length + rows)
        for layer, block in enumerate(self.h):
            x = block(x, layer, segments)
        for cache, rows in segments:
            cache.length += rows
        return x

    @numpy_defaults
    def forward_whole(self, x: Array, step: int) -> Array:  # (T, C) -> (T, C), overwritten
        """As `forward` in steps of so many rows, to the bit, for a sequence that nothing follows.

        It goes layer by layer, so one layer's keys and values exist at a time: of 1024 positions of GPT-2 small 6 MB,
        not 75.
        """
        cache = KVCache(1, self.config.n_head, self.config.head_dim, self.config.n_positions)
        cache.reserve(len(x))
        for block in self.h:
            cache.truncate(0)
            for start in range(0, len(x), step):
                rows = x[start : start + step]
                rows[:] = block(rows, 0, [(cache, len(rows))])
                cache.length += len(rows)
        return x

    @numpy_defaults
    def logits(self, x: Array) -> Array:  # (R, C) -> (R, V)
        """The scores of every next token, not normalised."""
        return product(self.ln_f(x), self.lm_head.T)


def _block(config: Config, i: int, tensors: Mapping[str, Array]) -> Block:
    def norm(name: str) -> LayerNorm:
        return LayerNorm(tensors[f"h.{i}.{name}.weight"], tensors[f"h.{i}.{name}.bias"], config.layer_norm_epsilon)

    def matrix(name: str) -> Conv1D:
        return Conv1D(tensors[f"h.{i}.{name}.weight"], tensors[f"h.{i}.{name}.bias"])

    scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= i + 1
    return Block(
        norm("ln_1"), matrix("attn.c_attn"), matrix("attn.c_proj"),
        norm("ln_2"), matrix("mlp.c_fc"), matrix("mlp.c_proj"),
        config, np.float32(scale),
    )  # fmt: skip
