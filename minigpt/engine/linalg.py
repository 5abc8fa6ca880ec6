"""The arithmetic of the forward pass, float32 throughout: each trick under a name, with its reason and its gain.

The gains quoted were measured for GPT-2 small on two cores of an AMD Zen 3 or Zen 4, with OpenBLAS 0.3.31; ratios
travel between machines, milliseconds do not.

Letters: R rows, C n_embd, N any width, M matrix outputs, H heads, T new positions, S cached + new ones, D = C / H.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.threads import THREADS, in_parts

Array: TypeAlias = NDArray[np.float32]

# Elementwise work runs over pieces of this many numbers, so that its temporaries stay in the second-level cache and
# need little memory. From FEW_PIECES on, threads share the pieces.
PIECE = 32 * 1024
FEW_PIECES = 8


def _small_blocks_pay() -> bool:
    """Whether BLAS multiplies small matrices without repacking them: OpenBLAS does, with AVX-512."""
    # It leaves out what is empty: there is no "found" on a CPU that has none of its features.
    config: Any = np.show_config(mode="dicts")
    simd = [name for kind in ("found", "baseline") for name in config.get("SIMD Extensions", {}).get(kind, [])]
    blas = config.get("Build Dependencies", {}).get("blas", {}).get("name", "")
    return "openblas" in blas and not {"X86_V4", "AVX512_SKX"}.isdisjoint(simd)


# Chosen once per machine and by shape, never by load: a text must not depend on who else is served. (On who else runs
# it may, in the last bits and unless the number of threads is set: see crew.py.)
BLOCKED = _small_blocks_pay()
FEW_ROWS = 64 if BLOCKED else 3  # more rows are left to BLAS
EVEN_ROWS = 1 if BLOCKED else 4 * THREADS  # and are then filled up to a multiple of this

# What OpenBLAS treats as small: multiplications for a block, and numbers in its result if it is made of dot products.
_BLOCK_WORK = 1_000_000
_BLOCK_RESULT = 1200
_DOT_ROWS = 8  # at most so many rows are dot products
_COLUMNS = 6  # that its kernel for sums takes together: with fewer in a block it is slow
_STEP = 8  # blocks computed at a time where their results must be turned: these then lie in the second-level cache
_LARGE = 2**20  # numbers in a matrix: a smaller one has been read before another thread starts


def by_columns(inputs: int, outputs: int) -> bool:
    """Whether a matrix (inputs, outputs) should lie column by column in memory, or else row by row.

    With AVX-512 always, because of products of a few rows: see `product`. Otherwise the longer side is contiguous: BLAS
    reads runs of 3072 numbers at 31 GB/s, and runs of 768 at 25. The MLP's second matrix then takes 3.7 ms per token
    instead of 4.7, and the head 5.0 instead of 6.1.
    """
    return BLOCKED or inputs > outputs


def product(x: Array, matrix: Array) -> Array:  # (R, N), (N, M) -> (R, M)
    """x @ matrix.

    One row is a matrix-vector product (sgemv), which OpenBLAS splits over its threads and runs at the speed of memory.
    With two or more rows OpenBLAS first repacks the matrix, at 2 to 2.9 times the cost of one row. So a few rows
    (drafted tokens, a batch, a short prompt) take another way:

    - with AVX-512, in blocks of the matrix's columns, too small to be repacked: 2, 4 and 8 rows take 1.1, 1.2 and 1.5
      times as long as one. This needs contiguous columns, which cost a single row 16 % on one thread, nothing on two.
    - otherwise row by row: 2 and 3 rows take 1.7 and 2.1 times as long as one, because all but the first find the
      matrix in the third-level cache. More rows are filled up with zeros, to four per thread: OpenBLAS is slow where
      one thread gets another number of rows. On two threads, 5, 6 and 7 rows then take 2.1 times as long as one, like
      8 rows; by themselves they take 3.2, 3.8 and 3.0 times as long.
    """
    rows, width = x.shape
    if rows == 1:
        return x @ matrix
    if rows <= FEW_ROWS:
        return _block_by_block(x, matrix.T) if BLOCKED else (x[:, np.newaxis] @ matrix)[:, 0]
    if lacking := -rows % EVEN_ROWS:
        x = np.concatenate((x, np.zeros((lacking, width), np.float32)))
    y: Array = x @ matrix
    return y[:rows]


def _block_by_block(x: Array, columns: Array) -> Array:  # (R, N), (M, N) -> (R, M)
    """x @ columns.T, in blocks of B columns; the last block may be smaller.

    Up to eight rows as dot products along N. More as sums over N of columns times rows, for which x is turned first and
    the result afterwards: vectors then run along the rows, and 16 fill one. So all of GPT-2 small's products take 16
    rows 0.81 times as long as dot products would, and 32 rows 0.86 times.
    """
    rows, width = x.shape
    outputs = len(columns)
    most = min(_BLOCK_WORK // (rows * width), outputs)
    if rows <= _DOT_ROWS:
        most = min(most, _BLOCK_RESULT // rows)
        turned, size = x.T, -(-outputs // -(-outputs // most)) if most else 0
    else:
        turned, size = np.ascontiguousarray(x.T), most - most % _COLUMNS
    if size == 0:
        return x @ columns.T
    blocks = outputs // size
    even = blocks * size
    y = np.empty((rows, outputs), np.float32)
    matrices = columns[:even].reshape(blocks, size, width)  # (blocks, B, N)
    results = y[:, :even].reshape(rows, blocks, size).transpose(1, 2, 0)  # (blocks, B, R)

    def dots(part: slice) -> None:
        np.matmul(x, matrices[part].transpose(0, 2, 1), out=results[part].transpose(0, 2, 1))

    def sums(part: slice) -> None:
        for start in range(part.start, part.stop, _STEP):
            step = slice(start, min(start + _STEP, part.stop))
            results[step] = matrices[step] @ turned

    work = dots if rows <= _DOT_ROWS else sums
    if columns.size >= _LARGE:
        in_parts(work, blocks)
    else:
        work(slice(0, blocks))
    if even < outputs:
        y[:, even:] = (columns[even:] @ turned).T
    return y


def dot_products(q: Array, k: Array) -> Array:  # (H, T, D), (H, S, D) -> (H, T, S)
    """q kᵀ.

    Of a few queries and many keys OpenBLAS makes dot products too, until it repacks the keys. From there on, with
    AVX-512, sums over D as in `_block_by_block`: 4 queries and 512 keys take 55 µs instead of 223, 9 take 137, not 283.
    """
    (_, new, width), seen = q.shape, k.shape[1]
    if BLOCKED and new > 1 and new * seen > _BLOCK_RESULT and new * seen * width <= _BLOCK_WORK:
        return np.ascontiguousarray((k @ np.ascontiguousarray(q.transpose(0, 2, 1))).transpose(0, 2, 1))
    return q @ k.transpose(0, 2, 1)


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:  # (R, C), (C,), (C,) -> (R, C)
    """Layer normalisation over the last axis, variance without Bessel's correction (arXiv:1607.06450).

    A ufunc and a dot product make the sums: 9 µs per row, against 26 with `mean` and `var`, which are Python inside.
    """
    inverse = np.float32(1 / x.shape[-1])
    mean: Array = np.add.reduce(x, axis=-1, keepdims=True) * inverse
    y: Array = x - mean
    variance = np.vecdot(y, y)
    variance *= inverse
    variance += np.float32(epsilon)
    y /= np.sqrt(variance)[:, np.newaxis]
    y *= weight
    y += bias
    return y


def in_pieces(work: Callable[[Array], None]) -> Callable[[Array], Array]:
    """Makes of work that overwrites an array a function that does it piece by piece, and returns the array.

    Pieces are views of a contiguous array: whole rows of its last axis, about PIECE numbers each. For a prompt of 512
    tokens, the softmax took 39 ms on one thread and 26 on two, the GELUs 26 and 22.
    """

    @functools.wraps(work)
    def run(x: Array) -> Array:
        if x.size <= PIECE:
            work(x)
            return x
        rows = x.reshape(-1, x.shape[-1])
        step = max(1, PIECE // rows.shape[1])
        count = -(-len(rows) // step)

        def pieces(part: slice) -> None:
            for index in range(part.start, part.stop):
                work(rows[index * step : (index + 1) * step])

        if count < FEW_PIECES:
            pieces(slice(0, count))
        else:
            in_parts(pieces, count)
        return x

    return run


# sqrt(2 / π) (x + 0.044715 x³) is x (_LINEAR + _CUBIC x²). Made once: for a single row each ufunc takes 1 to 2 µs, and
# making a number takes a good part of that.
_LINEAR = np.float32(math.sqrt(2 / math.pi))
_CUBIC = np.float32(0.044715 * math.sqrt(2 / math.pi))
_ONE, _HALF = np.float32(1), np.float32(0.5)


@in_pieces
def softmax_numerators(scores: Array) -> None:  # (H, T, S), overwritten
    """exp(scores - their maximum). Dividing by the sum comes after the product with the values, which is smaller."""
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)


@in_pieces
def gelu_tanh(x: Array) -> None:  # (R, N), overwritten
    """GELU in its tanh approximation (arXiv:1606.08415, section 2): "gelu_new" and "gelu_pytorch_tanh".

    x³ is a product, because `x**3` calls pow for each number and takes at least ten times as long.
    """
    u = x * x
    u *= _CUBIC
    u += _LINEAR
    u *= x
    np.tanh(u, out=u)
    u += _ONE
    u *= _HALF
    x *= u


@in_pieces
def gelu_erf(x: Array) -> None:  # (R, N), overwritten
    """GELU as defined, x Φ(x) (arXiv:1606.08415); "gelu" in a config."""
    u = erf(x * np.float32(math.sqrt(0.5)))
    u += _ONE
    u *= _HALF
    x *= u


def relu(x: Array) -> Array:  # (R, N) -> the same array, overwritten
    """max(x, 0)."""
    return np.maximum(x, np.float32(0), out=x)


# Coefficients of z**0, z**1, … where z = x² and x is clamped to ±4, beyond which erf is ±1 in float32.
_ERF_P = (-1.60960333262415e-02, -2.95459980854025e-03, -7.34990630326855e-04, -5.69250639462346e-05,
          -2.10102402082508e-06, 2.77068142495902e-08, -2.72614225801306e-10)  # fmt: skip
_ERF_Q = (-1.42647390514189e-02, -7.37332916720468e-03, -1.68282697438203e-03, -2.13374055278905e-04,
          -1.45660718464996e-05)  # fmt: skip


def erf(x: Array) -> Array:  # any shape -> a new array
    """The error function, which NumPy lacks: x P(x²) / Q(x²), within 5e-7 of the true value.

    The rational minimax approximation for float32 of Eigen (`generic_fast_erf_float` of its release 3.3) and of XLA.
    """
    x = np.clip(x, np.float32(-4), np.float32(4))
    z = x * x
    x *= _polynomial(z, _ERF_P)
    x /= _polynomial(z, _ERF_Q)
    return x


def _polynomial(z: Array, coefficients: tuple[float, ...]) -> Array:
    """Horner's rule; coefficients[i] belongs to z**i."""
    value = np.full_like(z, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value *= z
        value += np.float32(coefficient)
    return value


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu_erf,
    "relu": relu,
}
