"""How likely the model finds tokens that are given, for perplexity and evaluations.

Letters: R rows, C n_embd, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.linalg import Array
from minigpt.engine.model import GPT2
from minigpt.engine.sampling import Scored, scored
from minigpt.engine.threads import in_parts

# Rows whose logits exist at a time: 13 MB for GPT-2. For 1024 rows of GPT-2 small all at once would take 206.
BLOCK = 64


def scores(model: GPT2, x: Array, targets: Sequence[int] | NDArray[np.integer[Any]], top: int = 0) -> list[Scored]:
    """What a last stage's model says of each row's target, and of the `top` tokens that it finds most likely there.

    Args:
        x: hidden states (R, C), as `GPT2.forward` returns them.
        targets: for each row the id (R,) that follows it.
        top: 0 to `MAX_TOP`.

    Raises:
        ValueError: another number of targets, one outside the vocabulary, or another `top`.
        FloatingPointError: logits are not finite: damaged weights or hidden states.
    """
    ids, vocabulary = np.asarray(targets, np.intp), model.config.vocab_size
    if ids.shape != (len(x),):
        raise ValueError(f"targets: got {ids.shape}, wanted one for each of {len(x)} rows")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"a target is outside the vocabulary, wanted 0 to {vocabulary - 1}")
    told: list[Scored] = []
    for start in range(0, len(x), BLOCK):
        told += _block(model.logits(x[start : start + BLOCK]), ids[start : start + BLOCK].tolist(), top)
    return told


def _block(logits: Array, targets: list[int], top: int) -> list[Scored]:  # (R, V), (R,)
    if not np.isfinite(logits).all():
        raise FloatingPointError("logits are not finite: damaged weights or hidden states")
    told: dict[int, Scored] = {}

    def work(part: slice) -> None:
        for row in range(part.start, part.stop):
            told[row] = scored(logits[row], targets[row], top)

    in_parts(work, len(targets))
    return [told[row] for row in range(len(targets))]
