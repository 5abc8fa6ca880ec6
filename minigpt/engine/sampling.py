"""Logits to a token id: greedy, temperature, top-k, top-p.

A draw depends on nothing but the logits, the request's seed and the position: the generator is counter-based (Philox,
Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), so a replay draws the same token, whatever ran
before it. Equal scores are decided for the lowest id. Probabilities are float64.

Letters: V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.errstate import numpy_defaults

MAX_TEMPERATURE = 1e6  # at which every token is as likely as any other
MAX_TOP_K = 2**31 - 1

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How to draw a token; its filters apply in the order of the fields. ValueError for a value out of its range."""

    temperature: float = 0.0  # logits are divided by it; 0 is greedy: always the most likely token
    top_k: int = 0  # only the k most likely; 0 for all
    top_p: float = 1.0  # only the most likely that together have this probability, and at least one; 1 for all
    seed: int = 0  # 0 to 2**64 - 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}, wanted 0 (greedy) to {MAX_TEMPERATURE:g}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k is {self.top_k}, wanted 0 (all) to {MAX_TOP_K}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, wanted more than 0, and 1 (all) at most")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}, wanted 0 to 2**64 - 1")


@numpy_defaults
def sample(logits: Logits, sampling: Sampling, position: int) -> int:  # (V,) -> id
    """The token for `position`, that of the new token in its sequence.

    Raises:
        FloatingPointError: the logits hold a NaN or an infinity, so the model's arithmetic has failed.
    """
    best = int(logits.argmax())  # of equal ones the first, and a NaN before any
    if not np.isfinite(logits[best]):
        raise FloatingPointError(f"the largest logit is {logits[best]}: damaged weights or hidden states")
    if sampling.temperature == 0 or sampling.top_k == 1:
        return best
    ids, weights = _candidates(logits, sampling, best)
    cumulative = weights.cumsum()
    philox = np.random.Philox(key=sampling.seed, counter=position << 192)  # the position is the counter's highest word
    drawn = np.random.Generator(philox).random() * cumulative[-1]
    return int(ids[min(int(cumulative.searchsorted(drawn, side="right")), ids.size - 1)])


@numpy_defaults
def logprob(logits: Logits, token: int) -> float:  # (V,) -> nats
    """Natural logarithm of the probability the model itself gives a token, before temperature and filters."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def _candidates(logits: Logits, sampling: Sampling, best: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The ids to draw from (N,), and their probabilities (N,) up to a common factor."""
    ids, top_k = np.arange(logits.size), sampling.top_k
    if 0 < top_k < logits.size:
        kth = np.partition(logits, -top_k)[-top_k]
        ids = _descending(logits, np.flatnonzero(logits >= kth))[:top_k]
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is meant
        weights = np.exp((logits[ids].astype(np.float64) - float(logits[best])) / sampling.temperature)
    if sampling.top_p < 1:
        # Those below (1 - top_p) / N cannot be in: all together they have less than 1 - top_p. It spares a long sort.
        total = weights.sum()
        likely = _descending(weights, np.flatnonzero(weights >= (1 - sampling.top_p) / ids.size * total))
        enough = int(weights[likely].cumsum().searchsorted(sampling.top_p * total)) + 1
        ids, weights = ids[likely[:enough]], weights[likely[:enough]]
    return ids, weights


def _descending(values: NDArray[np.floating], places: NDArray[np.intp]) -> NDArray[np.intp]:
    """The ascending places, sorted by falling value; equal ones stay in order."""
    return places[np.argsort(-values[places], kind="stable")]
