"""A whole model in this process: `minigpt.load`."""

import threading
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import sources, tokenizer, weights
from minigpt.client.text import Prompt, TextModel, encode_prompt
from minigpt.engine.crew import fitted
from minigpt.engine.model import GPT2
from minigpt.protocol.batches import Given, Terms
from minigpt.protocol.messages import CHUNK, Answer, Generate, Reason, Refusal, Scores, Wanted, refused
from minigpt.protocol.request import Ask, check_type
from minigpt.stage.layers import Layers, Part
from minigpt.stage.schedule import Schedule
from minigpt.stage.sequence import Sequence


class Model(TextModel):
    """All layers of a checkpoint, without stages: a pipeline's answers are compared with its.

    Attributes:
        config: the checkpoint's.
        tokenizer: None where the checkpoint has none.
    """

    def __init__(self, checkpoint: sources.Checkpoint) -> None:
        self.config = sources.read_config(checkpoint.folder)
        self.tokenizer = tokenizer.load_for_text(checkpoint.folder)
        layers = range(self.config.n_layer)
        self._model = GPT2(self.config, layers, weights.load(checkpoint.folder, self.config, layers).tensors)
        self._layers = Layers(self._model)
        self._schedule = Schedule(self._layers)

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """The logits after each token of the prompt, float32 (T, n_vocab)."""
        ids = np.asarray(encode_prompt(prompt, self.tokenizer, self.config))
        cache = self._model.new_cache()
        rows = []
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            with fitted(len(chunk)):
                hidden = self._model.forward(self._model.embed(chunk, start), [(cache, len(chunk))])
                rows.append(self._model.logits(hidden))
        return np.concatenate(rows)

    def _answers(
        self, request: Generate, interruptions: list[str], cancelled: threading.Event
    ) -> Generator[Answer, None, Reason]:
        if request.wanted is Wanted.SCORES:
            return self._scores(request)
        return self._schedule.run(Sequence(self._model.new_cache(), Terms(1, request.sampling)), request)

    def _scores(self, request: Generate) -> Generator[Answer, None, Reason]:
        """All at once, without a cache. Other threads' tokens wait for it."""
        ids, ask = np.asarray(request.ids), Ask(Wanted.SCORES, request.sampling, top=request.top)
        result = self._layers.whole(Part(self._model.new_cache(), 0, ids[:-1], ask, Given(request.ids[1:])))
        if isinstance(result, Refusal):
            raise refused(result)
        assert isinstance(result, Scores), "a step that wants scores is answered with them"
        yield result
        return Reason.SCORES


def load(model: str | Path, revision: str | None = None) -> Model:
    """Loads a checkpoint into this process.

    Args:
        model: a folder, "tiny" (the embedded checkpoint), or a hub id; tried in this order.
        revision: of a hub id: a branch, a tag or a commit.

    Raises:
        UsageError: an argument is of a wrong type.
        CheckpointError: it cannot be found or read, or is not a GPT-2 that this engine runs.
    """
    check_type("model", model, str, Path)
    check_type("revision", revision, str, type(None))
    return Model(sources.find(model, revision))
