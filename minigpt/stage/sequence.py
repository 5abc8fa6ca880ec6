"""One sequence in one stage: its cache here, and its lane on the link to the next stage."""

from collections.abc import Sequence as Many
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.model import KVCache
from minigpt.errors import StageError
from minigpt.protocol.batches import NONE_GIVEN, Batch, Given, Result, Segment, Terms
from minigpt.protocol.messages import CHUNK, SHARED_CHUNK, Wanted
from minigpt.protocol.request import Ask, Traffic
from minigpt.stage.layers import Part


class Following(Protocol):
    """What comes after a stage's layers: the rest of the model, as `batchlink.BatchLink` gives it."""

    dead: StageError | None

    @property
    def traffic(self) -> Traffic: ...
    def open(self) -> int: ...
    def send_batch(self, batch: Batch, asks: Many[Ask], missing: int = 0) -> None: ...
    def receive_answers(self) -> tuple[Result, ...]: ...
    def end(self, lanes: Many[int]) -> None: ...
    def usable(self) -> bool: ...
    def close(self) -> None: ...


class Sequence:
    """Not thread-safe: it belongs to whoever computes it."""

    def __init__(self, cache: KVCache, terms: Terms) -> None:
        self.cache = cache
        self._terms = terms
        self._news = True  # whether the next stage does not know the terms
        self._link: Following | None = None
        self._lane = 0
        self._long = False  # whether the part before was a whole chunk of a prompt

    @property
    def terms(self) -> Terms:
        return self._terms

    @terms.setter
    def terms(self, terms: Terms) -> None:
        self._news = self._news or terms != self._terms
        self._terms = terms

    @property
    def dead(self) -> StageError | None:
        """Why this sequence cannot go on, if its link to the next stage has failed."""
        return None if self._link is None else self._link.dead

    def part(self, start: int, rows: NDArray[Any], wanted: Wanted, given: Given = NONE_GIVEN) -> Part:
        return Part(self.cache, start, rows, self._terms.ask(wanted), given)

    def segment(self, link: Following, part: Part, news: list[tuple[int, Terms]]) -> Segment:
        """Where a part stands in the batch for the next stage. Opens a lane there, and adds to `news`, if needed."""
        if self._link is None:
            self._link, self._lane = link, link.open()
        if self._news:
            news.append((self._lane, self._terms))
            self._news = False
        return Segment(self._lane, part.start, len(part.rows), part.ask.wanted, part.given)

    def missing(self, part: Part) -> int:
        """How many rows a part lacks: a long prompt's last chunk is padded like the others, because a size of its own
        would reveal the prompt's length."""
        rows = len(part.rows)
        whole = CHUNK if rows > SHARED_CHUNK else SHARED_CHUNK
        if part.ask.wanted is Wanted.NOTHING and rows == whole:
            self._long = True
            return 0
        long, self._long = self._long, False
        return whole - rows if long else 0

    def end(self) -> None:
        """Forgets the sequence in the stages after this one. Call it once nothing is under way."""
        if self._link is not None:
            self._link.end([self._lane])


def send_on(link: Following, sequences: Many[Sequence], parts: Many[Part], hidden: NDArray[np.float32]) -> None:
    """Sends the hidden states (R, C) of these parts to the next stage."""
    news: list[tuple[int, Terms]] = []
    segments = tuple(sequence.segment(link, part, news) for sequence, part in zip(sequences, parts, strict=True))
    missing = max(sequence.missing(part) for sequence, part in zip(sequences, parts, strict=True))
    link.send_batch(Batch(segments, hidden, tuple(news)), [part.ask for part in parts], missing)
