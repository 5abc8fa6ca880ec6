"""Logits to a token id: greedy, or temperature, top-k, top-p and min-p; penalties.py has what comes before.

A draw depends on nothing but the logits, the request's seed, the position and, where it penalises, the ids before it:
the generator is counter-based (Philox, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), so a replay
draws the same token, whatever ran before it. Equal scores are decided for the lowest id: top-k keeps k ids, and top-p
no more than it needs, where transformers keeps all that equal the last. Probabilities are float64.

The log-probabilities that are told are the model's own, before all of this.

Letters: V vocabulary, N ids.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.errstate import numpy_defaults

MAX_TEMPERATURE = 1e6  # at which every token is as likely as any other
MAX_TOP_K = 2**31 - 1
MAX_BIASES = 1024  # OpenAI takes 300
MAX_ID = 2**31 - 1
MAX_TOP = 20  # of the most likely tokens that are told; OpenAI's limit

RUN = 64  # ids that `_largest` looks at together
LARGEST = float(np.finfo(np.float32).max)

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How to draw a token; each is off by default. ValueError for a value out of its range.

    They apply in this order: logit_bias, repetition_penalty, frequency_ and presence_penalty (`adjusted` in
    penalties.py), then temperature, top_k, top_p, min_p (`sample`).
    """

    temperature: float = 0.0  # logits are divided by it; 0 is greedy: always the most likely token
    top_k: int = 0  # only the k most likely; 0 for all
    top_p: float = 1.0  # only the most likely that together have this probability, and at least one; 1 for all
    seed: int = 0  # 0 to 2**64 - 1
    min_p: float = 0.0  # only those at least so probable, relative to the most likely one; 0 for all
    # Of a token that stands in the prompt or was generated, a positive logit is divided by it and a negative one
    # multiplied: arXiv:1909.05858, section 4.1. 1 for none.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted from the logit of a token that was generated,
    frequency_penalty: float = 0.0  # and this as often as it was
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit), by rising id

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}, wanted 0 (greedy) to {MAX_TEMPERATURE:g}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k is {self.top_k}, wanted 0 (all) to {MAX_TOP_K}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, wanted more than 0, and 1 (all) at most")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}, wanted 0 to 2**64 - 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, wanted 0 (all) to 1; 0.02 to 0.1 is usual")
        if not 0 < self.repetition_penalty < math.inf:
            got = self.repetition_penalty
            raise ValueError(f"repetition_penalty is {got}, wanted any number above 0; 1 is none, 1.1 to 1.3 usual")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(got := getattr(self, name)):
                raise ValueError(f"{name} is {got}, wanted any finite number; 0 is none, -2 to 2 usual")
        if self.logit_bias:
            self._check_bias()

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} ids, wanted {MAX_BIASES} at most")
        before = -1
        for token, bias in self.logit_bias:
            if not before < token <= MAX_ID:
                raise ValueError(f"logit_bias has an id twice or out of order, or one outside 0 to {MAX_ID}")
            if not math.isfinite(bias):
                raise ValueError(f"logit_bias has {bias}, wanted any finite number; -100 (never) to 100 is usual")
            before = token

    @property
    def penalises(self) -> bool:
        """Whether the draw depends on the ids before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed at all, so that the model's most likely token may not be the one drawn."""
        return bool(self.logit_bias) or self.penalises

    @cached_property
    def biases(self) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The ids (N,) of logit_bias, and what is added (N,)."""
        ids, amounts = zip(*self.logit_bias, strict=True) if self.logit_bias else ((), ())
        return np.array(ids, np.intp), np.clip(amounts, -LARGEST, LARGEST).astype(np.float32)


@numpy_defaults
def sample(logits: Logits, sampling: Sampling, position: int) -> int:  # (V,) -> id
    """The token for `position`, that of the new token in its sequence, from logits that are `adjusted`.

    Raises:
        FloatingPointError: the logits hold a NaN or an infinity, so the model's arithmetic has failed.
    """
    best = most_likely(logits)
    if sampling.temperature == 0 or sampling.top_k == 1:
        return best
    ids, weights = _candidates(logits, sampling, best)
    cumulative = weights.cumsum()
    philox = np.random.Philox(key=sampling.seed, counter=position << 192)  # the position is the counter's highest word
    drawn = np.random.Generator(philox).random() * cumulative[-1]
    return int(ids[min(int(cumulative.searchsorted(drawn, side="right")), ids.size - 1)])


class Scored(NamedTuple):
    """A token's log-probability in nats, and the (id, log-probability) of the most likely ones, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@numpy_defaults
def scored(logits: Logits, token: int, top: int) -> Scored:  # (V,)
    """What the model itself says of a token and of the `top` most likely ones, before bias, penalties and filters.

    Raises:
        ValueError: `top` is not 0 to MAX_TOP.
        FloatingPointError: as `sample`.
    """
    if not 0 <= top <= MAX_TOP:
        raise ValueError(f"top is {top}, wanted 0 (none) to {MAX_TOP}; 5 is usual")
    most_likely(logits)
    shifted, log_sum = _normalised(logits)
    likely = _largest(logits, top) if top else ()
    return Scored(float(shifted[token] - log_sum), tuple((int(i), float(shifted[i] - log_sum)) for i in likely))


@numpy_defaults
def logprob(logits: Logits, token: int) -> float:  # (V,) -> nats
    """Natural logarithm of the probability the model itself gives a token, before bias, penalties and filters."""
    shifted, log_sum = _normalised(logits)
    return float(shifted[token] - log_sum)


def _normalised(logits: Logits) -> tuple[NDArray[np.float64], np.float64]:
    """Logits (V,) of which the largest is 0, and the logarithm of their exponentials' sum."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted, np.log(np.exp(shifted).sum())


def _candidates(logits: Logits, sampling: Sampling, best: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The ids to draw from (N,), and their probabilities (N,) up to a common factor."""
    ids, top_k = np.arange(logits.size), sampling.top_k
    if 0 < top_k < logits.size:
        ids = _largest(logits, top_k)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, which is meant
        weights = np.exp((logits[ids].astype(np.float64) - float(logits[best])) / sampling.temperature)
    if sampling.top_p < 1:
        # Those below (1 - top_p) / N cannot be in: all together they have less than 1 - top_p. It spares a long sort.
        total = weights.sum()
        likely = _descending(weights, np.flatnonzero(weights >= (1 - sampling.top_p) / ids.size * total))
        enough = int(weights[likely].cumsum().searchsorted(sampling.top_p * total)) + 1
        ids, weights = ids[likely[:enough]], weights[likely[:enough]]
    if sampling.min_p > 0:
        likely = np.flatnonzero(weights >= sampling.min_p)  # the best one's weight is 1
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def most_likely(logits: Logits) -> int:  # (V,) -> id
    """The first of the most likely tokens. Raises FloatingPointError as `sample`."""
    best = int(logits.argmax())  # of equal ones the first, and a NaN before any
    if not np.isfinite(logits[best]):
        raise FloatingPointError(f"the largest logit is {logits[best]}: damaged weights or hidden states")
    return best


def _largest(logits: Logits, count: int) -> NDArray[np.intp]:  # (V,) -> (N,)
    """The ids of the largest `count`, at least 1, in falling order; of equal ones the lower ids."""
    if count >= logits.size:
        return _descending(logits, np.arange(logits.size))
    values = logits
    if count < logits.size // RUN:
        # The largest `count` are at least the count-th of the runs' maxima, which leaves few: a third of the time.
        maxima = logits[: logits.size // RUN * RUN].reshape(-1, RUN).max(axis=1)
        values = logits[logits >= np.partition(maxima, -count)[-count]]
    least = np.partition(values, -count)[-count]
    return _descending(logits, np.flatnonzero(logits >= least))[:count]


def _descending(values: NDArray[np.floating], places: NDArray[np.intp]) -> NDArray[np.intp]:
    """The ascending places, sorted by falling value; equal ones stay in order."""
    return places[np.argsort(-values[places], kind="stable")]
