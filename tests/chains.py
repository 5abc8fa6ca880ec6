"""A pipeline in one process: the stages' own code, without links between them."""

from collections import deque
from collections.abc import Generator
from collections.abc import Sequence as Many

from minigpt.engine.model import GPT2
from minigpt.errors import StageError
from minigpt.protocol import batches
from minigpt.protocol.batches import Batch, Due, Result, Terms
from minigpt.protocol.messages import Answer, Generate, Reason, Span, Wanted
from minigpt.protocol.request import Ask, Traffic, span
from minigpt.stage.lanes import Lanes
from minigpt.stage.layers import Layers
from minigpt.stage.places import Places
from minigpt.stage.schedule import Schedule
from minigpt.stage.sequence import Following, Sequence, send_on
from minigpt.stage.upstream import with_spans


class Rest:
    """What follows a stage: the next ones, in this process. Batches and answers are encoded and decoded as on a link.

    `asked` has the start, the rows and what is wanted of each segment so far.
    """

    dead: StageError | None = None
    stale = False
    traffic: Traffic = (0.0, 0.0, 0.0)

    def __init__(self, layers: Layers, rest: Following | None, stages: int) -> None:
        self.asked: list[tuple[int, int, Wanted]] = []
        self.lanes = Lanes(layers, Places(layers.index, 64, 2**30, 0))
        self._layers = layers
        self._rest = rest
        self._behind = range(layers.index, stages)
        self._opened = 0
        self._answers: deque[tuple[Result, ...]] = deque()

    def open(self) -> int:
        self._opened += 1
        return self._opened - 1

    def send_batch(self, batch: Batch, asks: Many[Ask], missing: int = 0) -> None:
        config = self._layers.model.config
        sent = batches.decode([bytes(part) for part in batches.encode(batch)], config.n_embd)
        self.asked += [(segment.start, segment.rows, segment.wanted) for segment in sent.segments]
        taken = self.lanes.take(sent)
        hidden, results, seconds = self._layers.compute(taken.parts) if taken.parts else (sent.hidden, [], 0.0)
        own = Span(seconds, 0.0, 0.0, 0.0, 0.0)
        if self._rest is not None and taken.parts:
            send_on(self._rest, taken.sequences, taken.parts, hidden)
            results = list(self._rest.receive_answers())
            own = span(seconds, 0.0, self.traffic, self.traffic)
        plain = batches.encode_answers(taken.merge(with_spans(taken, results, own)))
        due = list(map(Due, batch.segments, asks))
        self._answers.append(batches.decode_answers(plain, due, config, self._behind))

    def receive_answers(self) -> tuple[Result, ...]:
        return self._answers.popleft()

    def end(self, lanes: Many[int]) -> None:
        self.lanes.end(lanes)

    def close(self) -> None:
        self.dead = StageError("closed")


class Chain:
    """The first stage of a pipeline, with one sequence. `rest` may be given instead of the other stages."""

    def __init__(self, models: Many[GPT2], rest: Following | None = None, **options: int | bool) -> None:
        for index in reversed(range(1, len(models))):
            rest = Rest(Layers(models[index], index), rest, len(models))
        self.rest = rest
        following = rest
        connect = None if following is None else lambda: following
        self.schedule = Schedule(Layers(models[0]), connect, **options)  # type: ignore[arg-type]
        self.sequence = self.new()

    def new(self) -> Sequence:
        """Another sequence."""
        return Sequence(self.schedule.layers.model.new_cache(), Terms(1, Generate(0, (0,), 1).sampling))

    def run(self, request: Generate, **options: object) -> Generator[Answer, None, Reason]:
        """The answers to a request on the one sequence."""
        return self.schedule.run(self.sequence, request, **options)  # type: ignore[arg-type]


def told(answers: Generator[Answer, None, Reason]) -> tuple[list[Answer], Reason]:
    """All answers, and why they ended."""
    found: list[Answer] = []
    while True:
        try:
            found.append(next(answers))
        except StopIteration as end:
            return found, end.value
