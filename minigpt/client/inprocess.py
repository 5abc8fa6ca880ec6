"""A whole model in this process: `minigpt.load`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import sources, tokenizer, weights
from minigpt.client.text import Generation, Prompt, encode_prompt, make_request
from minigpt.engine.model import GPT2
from minigpt.protocol.messages import CHUNK
from minigpt.stage.generation import Sequence as ModelSequence
from minigpt.stage.generation import generate


class Model:
    """All layers of a checkpoint, without stages: what a pipeline's answers are compared with.

    Attributes:
        config: the checkpoint's.
        tokenizer: None where the checkpoint has none.
    """

    def __init__(self, checkpoint: sources.Checkpoint) -> None:
        self.config = sources.read_config(checkpoint.folder)
        self.tokenizer = tokenizer.load(checkpoint.folder)
        layers = range(self.config.n_layer)
        self._model = GPT2(self.config, layers, weights.load(checkpoint.folder, self.config, layers).tensors)

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """The logits after each token of the prompt, float32 (T, n_vocab)."""
        ids = np.asarray(encode_prompt(prompt, self.tokenizer, self.config))
        cache = self._model.new_cache()
        rows = []
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            hidden = self._model.forward(self._model.embed(chunk, start), [(cache, len(chunk))])
            rows.append(self._model.logits(hidden))
        return np.concatenate(rows)

    def generate(self, prompt: Prompt, *, stop: Sequence[str] = (), **options: Any) -> Generation:
        """Generates tokens; the arguments and the result are those of `minigpt.Pipeline.generate`."""
        request = make_request(prompt, self.tokenizer, self.config, stop=stop, **options)
        answers = generate(ModelSequence(self._model), request)
        return Generation(answers, request, self.config, self.tokenizer, stop)


def load(model: str, revision: str | None = None) -> Model:
    """Loads a checkpoint into this process.

    Args:
        model: a folder, "tiny" (the embedded checkpoint), or a hub id; tried in this order.
        revision: of a hub id: a branch, a tag or a commit.

    Raises:
        CheckpointError: it cannot be found or read, or is not a GPT-2 that this engine runs.
    """
    return Model(sources.find(model, revision))
