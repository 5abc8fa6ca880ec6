"""Logits against stored answers of transformers' GPT2LMHeadModel (scripts/train/reference_logits.py), without torch."""

from pathlib import Path

import numpy as np
import pytest
from made import GOLDEN, expected_digest, random_tensors

from minigpt.checkpoint import sources, weights
from minigpt.engine.model import GPT2

DATA = Path(__file__).resolve().parents[1] / "data"
TOLERANCE = 1e-4  # of a logit, float32


@pytest.mark.parametrize("name", [*GOLDEN, "tiny"])
def test_logits_are_those_of_transformers(name: str) -> None:
    if name == "tiny":
        folder = sources.local("tiny")
        config = sources.read_config(folder)
        loaded = weights.load(folder, config, range(config.n_layer))
        tensors, digest = loaded.tensors, loaded.digest
    else:
        config, tensors = GOLDEN[name], random_tensors(GOLDEN[name])
        digest = expected_digest(b"F32", tensors)
    golden = np.load(DATA / f"golden_{name}.npz", allow_pickle=False)
    assert digest == golden["weights_sha256"].tobytes(), "other weights: run scripts/train/reference_logits.py again"
    model = GPT2(config, range(config.n_layer), tensors)
    ids, rows, columns = golden["ids"], golden["rows"], golden["columns"]

    cache, hidden, start = model.new_cache(), [], 0
    for size in (5, 1, 1, 100, len(ids)):  # a prompt, two tokens, a chunk, and the rest of the context
        chunk = ids[start : start + size]
        if chunk.size:
            hidden.append(model.forward(model.embed(chunk, start), [(cache, len(chunk))]))
        start += size
    got = model.logits(np.concatenate(hidden)[rows])[:, columns]
    assert cache.length == config.n_positions == rows[-1] + 1
    assert np.abs(got - golden["logits"]).max() < TOLERANCE
