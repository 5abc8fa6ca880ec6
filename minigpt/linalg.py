"""The arithmetic of the forward pass, float32 throughout: each trick under a name, with its reason and its gain.

The gains quoted were measured for GPT-2 small on two cores of an AMD Zen 3 with OpenBLAS 0.3.31; ratios travel
between machines, milliseconds do not.

Letters: R rows, C n_embd, N any width, M matrix outputs, H heads, T new positions, S cached + new ones, D = C / H.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]

# Elementwise work runs over pieces of this many numbers, so that its temporaries stay in the second-level cache and
# take no memory worth naming, however long the prompt.
PIECE = 32 * 1024


# Up to so many rows are multiplied one by one. A rule of the shape, never of load, so that results do not depend on it.
FEW_ROWS = 3


def product(x: Array, matrix: Array) -> Array:  # (R, N), (N, M) -> (R, M)
    """x @ matrix.

    One row is a matrix-vector product (sgemv), which OpenBLAS splits over its threads: it runs at the speed of memory
    whichever way the matrix lies, so matrices are used as they are stored. From two rows on OpenBLAS would repack the
    matrix first, at 2.6 to 2.9 times the cost of one row. Two or three products with vectors take 1.7 and 2.4 times
    one, since all but the first find the matrix in the third-level cache.
    """
    y: Array = (x[:, np.newaxis] @ matrix)[:, 0] if len(x) <= FEW_ROWS else x @ matrix
    return y


def linear(x: Array, weight: Array, bias: Array) -> Array:  # (R, N), (N, M), (M,) -> (R, M)
    """x @ weight + bias, the matrix as GPT-2 stores it ("Conv1D": inputs down, outputs across)."""
    y = product(x, weight)
    y += bias
    return y


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:  # (R, C), (C,), (C,) -> (R, C)
    """Layer normalisation over the last axis, variance without Bessel's correction (arXiv:1607.06450).

    The sums are dot products: 14 µs a row, against 26 with `mean` and `var`.
    """
    width = x.shape[-1]
    mean = x @ np.full(width, 1.0 / width, np.float32)
    y: Array = x - mean[:, np.newaxis]
    variance = np.vecdot(y, y)
    variance /= width
    variance += np.float32(epsilon)
    y /= np.sqrt(variance)[:, np.newaxis]
    y *= weight
    y += bias
    return y


def softmax_numerators(scores: Array) -> Array:  # (H, T, S) -> the same array, overwritten
    """exp(scores - their maximum). Dividing by the sum is left for after the product with the values: it is smaller."""
    scores -= scores.max(axis=-1, keepdims=True)
    return np.exp(scores, out=scores)


def gelu_tanh(x: Array) -> Array:  # (R, N) -> the same array, overwritten
    """GELU by its tanh approximation (arXiv:1606.08415, section 2); "gelu_new" and "gelu_pytorch_tanh" are both this.

    x³ is a product: `x**3` calls pow for each number and takes ten times as long or more.
    """
    for piece in pieces(x):
        u = piece * piece
        u *= np.float32(0.044715 * math.sqrt(2 / math.pi))
        u += np.float32(math.sqrt(2 / math.pi))
        u *= piece
        np.tanh(u, out=u)
        u += np.float32(1)
        u *= np.float32(0.5)
        piece *= u
    return x


def gelu_erf(x: Array) -> Array:  # (R, N) -> the same array, overwritten
    """GELU as defined, x Φ(x) (arXiv:1606.08415); "gelu" in a config."""
    for piece in pieces(x):
        u = erf(piece * np.float32(math.sqrt(0.5)))
        u += np.float32(1)
        u *= np.float32(0.5)
        piece *= u
    return x


def relu(x: Array) -> Array:  # (R, N) -> the same array, overwritten
    """max(x, 0)."""
    return np.maximum(x, np.float32(0), out=x)


# Coefficients of z**0, z**1, … with z = x², x clamped to ±4, beyond which erf is ±1 in float32.
_ERF_P = (-1.60960333262415e-02, -2.95459980854025e-03, -7.34990630326855e-04, -5.69250639462346e-05,
          -2.10102402082508e-06, 2.77068142495902e-08, -2.72614225801306e-10)  # fmt: skip
_ERF_Q = (-1.42647390514189e-02, -7.37332916720468e-03, -1.68282697438203e-03, -2.13374055278905e-04,
          -1.45660718464996e-05)  # fmt: skip


def erf(x: Array) -> Array:  # any shape -> a new array
    """The error function, which NumPy lacks: x P(x²) / Q(x²), at most 5e-7 from the truth.

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


def pieces(x: Array) -> Iterator[Array]:
    """Views that cover a contiguous array in order, PIECE numbers each."""
    flat = x.reshape(-1)
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": gelu_erf,
    "relu": relu,
}
