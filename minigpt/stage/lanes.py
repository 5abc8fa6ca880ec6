"""The sequences of a link from the stage before: its lanes, and what becomes of a batch of them.

A lane that breaks a rule fails alone: its rows are left out of the pass, and its answer is a Refusal. What breaks the
batch itself is a MessageError, and ends the link.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from minigpt.engine.sampling import Sampling
from minigpt.errors import MessageError, RequestRefused
from minigpt.protocol import messages
from minigpt.protocol.batches import Batch, Result, Segment, Terms
from minigpt.protocol.messages import Refusal, Wanted
from minigpt.stage.layers import Layers, Part
from minigpt.stage.places import Place, Places
from minigpt.stage.sequence import Sequence


@dataclass
class Taken:
    """A batch, sorted into what can be computed and what is refused."""

    parts: list[Part]
    sequences: list[Sequence]
    at: list[int]  # where these stand among the batch's segments
    results: list[Result]  # of all segments; so far the refusals

    def merge(self, found: Many[Result]) -> list[Result]:
        """The results of all segments, where those of the parts are `found`."""
        for index, result in zip(self.at, found, strict=True):
            self.results[index] = result
        return self.results


class Lanes:
    """Not thread-safe: the link's own thread has it."""

    def __init__(self, layers: Layers, places: Places) -> None:
        self._layers = layers
        self._places = places
        self._open: dict[int, tuple[Sequence, Place]] = {}
        self._next = 0  # the number of the lane that will be opened next

    def __len__(self) -> int:
        return len(self._open)

    def take(self, batch: Batch) -> Taken:
        """Ends and opens the batch's lanes, and checks its segments. Raises MessageError."""
        self.end(batch.ended)
        refused = {lane: refusal for lane, terms in batch.terms if (refusal := self._agree(lane, terms)) is not None}
        taken = Taken([], [], [], [])
        finite = bool(np.isfinite(batch.hidden).all())
        row = 0
        for index, segment in enumerate(batch.segments):
            rows = batch.hidden[row : row + segment.rows]
            row += segment.rows
            refusal = refused.get(segment.lane) or self._flaw(segment, None if finite else rows)
            taken.results.append(refusal)
            if refusal is None:
                sequence, _ = self._open[segment.lane]
                taken.sequences.append(sequence)
                taken.parts.append(sequence.part(segment.start, rows, segment.wanted, segment.given))
                taken.at.append(index)
        return taken

    def _agree(self, lane: int, terms: Terms) -> Refusal | None:
        """Opens a lane, or takes new terms for an open one. Why not, if it cannot: then the lane has ended."""
        if lane > self._next:
            raise MessageError(f"batch: got terms of lane {lane}, wanted at most {self._next}, the next")
        if terms.positions > self._layers.model.config.n_positions:
            raise MessageError(f"terms: got {terms.positions} positions, and the model has fewer")
        model = self._layers.model
        bias = terms.sampling.logit_bias
        unknown = bool(bias) and bias[-1][0] >= model.config.vocab_size  # they rise
        size = model.cache_bytes(terms.positions)
        if lane < self._next:
            if (known := self._open.get(lane)) is None:
                return None  # its segment will be refused
            sequence, place = known
            if unknown:
                self.end((lane,))
                return self._refusal("bad-token", "its logit_bias has an id outside the vocabulary")
            if not place.resume(size):
                self.end((lane,))
                return self._refusal("busy", "there is no room for more positions of this sequence")
            sequence.terms = terms
        else:
            self._next += 1
            if unknown:
                return self._refusal("bad-token", "its logit_bias has an id outside the vocabulary")
            try:
                place = self._places.admit(size)
            except RequestRefused as error:
                return messages.refusal(error)
            place.sequence = sequence = Sequence(model.new_cache(), terms)
            self._open[lane] = sequence, place
        try:
            sequence.cache.reserve(terms.positions)
        except MemoryError:  # the system has less than the places say: of this sequence, not of all on the link
            self.end((lane,))
            return self._refusal("busy", "the system has no memory for this sequence")
        return None

    def _flaw(self, segment: Segment, rows: NDArray[np.float32] | None) -> Refusal | None:
        """Why a segment is not computed; `rows` are looked at if some of the batch are not finite."""
        lane, start, count, wanted, given = segment
        if lane not in self._open:
            return self._refusal("lane", f"lane {lane} is not open: open it with its terms, and not twice")
        sequence, _ = self._open[lane]
        if start > sequence.cache.length:
            text = f"start is {start}, but {sequence.cache.length} positions are known: send those between first"
            return self._refusal("gap", text)
        if start + count > sequence.terms.positions:
            return self._refusal("too-long", f"{start + count} positions, but its terms say {sequence.terms.positions}")
        sampling = sequence.terms.sampling
        if wanted is Wanted.TOKENS and (sampling.temperature > 0 or sampling.adjusts):
            return self._refusal("bad-request", "a token for each row needs greedy decoding, without penalties or bias")
        needed = wanted is Wanted.SCORES or (wanted is Wanted.TOKEN and sampling.repetition_penalty != 1)
        if (needed or any(given)) and (wrong := self._wrong(segment, sampling)) is not None:
            return wrong
        if rows is not None and not np.isfinite(rows).all():
            return self._refusal("not-finite", "got NaN or infinity: the weights of an earlier stage are damaged")
        return None

    def _wrong(self, segment: Segment, sampling: Sampling) -> Refusal | None:
        """What is wrong with the ids that are given for a segment, which needs some or has some."""
        _, start, count, wanted, (ids, prompt) = segment
        if max((*ids, *prompt), default=0) >= self._layers.model.config.vocab_size:
            return self._refusal("bad-token", "an id that is given is outside the vocabulary")
        if wanted is Wanted.SCORES:
            fits = len(ids) == count and not prompt
        else:
            fits = wanted is Wanted.TOKEN and sampling.penalises and 1 <= len(ids) + len(prompt) <= start + count
        if prompt and fits:
            rising = all(earlier < later for earlier, later in pairwise(prompt))
            fits = rising and sampling.repetition_penalty != 1 and not set(ids).intersection(prompt)
        return None if fits else self._refusal("bad-request", "the ids that are given are not those that it needs")

    def _refusal(self, reason: str, text: str) -> Refusal:
        return Refusal(self._layers.index, reason, text)

    def end(self, lanes: Many[int]) -> None:
        """Forgets sequences, here and in the stages after this one."""
        for lane in lanes:
            if (known := self._open.pop(lane, None)) is not None:
                known[1].give_back()

    def end_all(self) -> None:
        """Forgets all of them."""
        self.end(tuple(self._open))
