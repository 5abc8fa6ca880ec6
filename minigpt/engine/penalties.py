"""What a request changes of the logits before a token is drawn: a bias, and penalties for the ids so far.

In the order in which it happens, and as others compute it: logit_bias (OpenAI); repetition_penalty (CTRL,
arXiv:1909.05858, section 4.1; transformers' RepetitionPenaltyLogitsProcessor, over prompt and answer); frequency_ and
presence_penalty (OpenAI, vLLM: logit - frequency_penalty × count - presence_penalty, for each id in the answer).

Every number above 0, and every finite one, is a penalty or a bias: what leaves float32's range stays at its end.

Letters: V vocabulary, N ids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.errstate import numpy_defaults
from minigpt.engine.sampling import LARGEST, Logits, Sampling, most_likely

Ids = Sequence[int] | NDArray[np.integer[Any]]

_SMALLEST = float(np.finfo(np.float32).tiny)


@numpy_defaults
def adjusted(logits: Logits, sampling: Sampling, prompt: Ids = (), generated: Ids = ()) -> Logits:  # (V,) -> (V,)
    """What `sample` draws from: a new array, or the same one if nothing is to be changed.

    The ids are those of the prompt and, in any order, those generated since.

    Raises:
        ValueError: an id outside the vocabulary.
        FloatingPointError: as `sample`.
    """
    if not sampling.adjusts:
        return logits
    most_likely(logits)  # or a bias might hide what is damaged
    logits = logits.copy()
    with np.errstate(over="ignore"):  # `_within` is for that
        if sampling.logit_bias:
            ids, amounts = sampling.biases
            ids = _checked(ids, logits)
            logits[ids] = _within(logits[ids] + amounts)
        if sampling.repetition_penalty != 1:
            ids = np.concatenate((_checked(prompt, logits), _checked(generated, logits)))
            seen = logits[ids]  # an id that stands there twice is written twice, and penalised once
            penalty = np.float32(min(max(sampling.repetition_penalty, _SMALLEST), LARGEST))
            logits[ids] = _within(np.where(seen < 0, seen * penalty, seen / penalty))
        if sampling.frequency_penalty or sampling.presence_penalty:
            ids, counts = np.unique(_checked(generated, logits), return_counts=True)
            penalties = _within(sampling.frequency_penalty * counts + sampling.presence_penalty)
            logits[ids] = _within(logits[ids] - penalties)
    return logits


def _within(values: NDArray[Any]) -> NDArray[Any]:
    """Finite in float32."""
    clipped: NDArray[Any] = np.clip(values, -LARGEST, LARGEST)
    return clipped


def _checked(ids: Ids, logits: Logits) -> NDArray[np.intp]:
    array = np.asarray(ids, np.intp)
    if array.size and not 0 <= array.min() <= array.max() < logits.size:
        raise ValueError(f"an id is outside the vocabulary, wanted 0 to {logits.size - 1}")
    return array
