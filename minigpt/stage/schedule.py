"""The schedule of the first stage: what the next forward pass computes, for all clients together.

A pass has one row for each sequence that waits for a token, and one chunk of one prompt, or a few short ones; a pass
with a chunk is followed by one without while others wait for tokens. There is no thread for it: whoever waits for an
answer leads, if nobody does, and computes a pass for all that wait. So for a single sequence the path is as short as
can be, because the thread that waits is the one that computes.

    pending ──pass──► (sent to the next stage ──answers──►) advanced: told tokens, and pending again or ended
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import NamedTuple

from minigpt.errors import StageError
from minigpt.protocol import messages
from minigpt.protocol.batches import Result, Terms
from minigpt.protocol.messages import SHARED_CHUNK, Answer, Generate, Reason, Refusal, Span, Tokens, Wanted
from minigpt.protocol.request import Traffic, span, with_span
from minigpt.stage import generation
from minigpt.stage.generation import Step, Steps
from minigpt.stage.layers import Layers, Part
from minigpt.stage.sequence import Following, Sequence, send_on
from transport.fork import own

log = logging.getLogger("minigpt.stage")

LOOK = 0.25  # seconds between two looks at a client whose sequence waits
SHORT = 2 * SHARED_CHUNK  # rows of short prompts in one pass
HALF = 8  # rows that make a batch of their own worth while: two batches of four rows cost more than one of eight


class Run:
    """A request under way on a sequence. All but `told` is the schedule's, under its lock."""

    def __init__(self, sequence: Sequence, request: Generate, steps: Callable[["Run"], Steps]) -> None:
        self.sequence = sequence
        self.told: deque[Answer] = deque()  # what the client is still to be told
        self.outcome: Reason | Exception | None = None
        self.step: Step  # to be computed next; `_advance` says which
        self.produced = 0  # tokens so far
        self.fed = request.start + len(request.ids)  # positions of the prompt
        self.thread = threading.get_ident()  # whose request it is
        self.steps = steps(self)
        self.rest()

    def rest(self) -> None:
        """Nothing of it is under way, and nobody has woken its thread."""
        self.flying = 0
        self.woken = threading.Lock()
        self.woken.acquire()

    def tell(self, answer: Answer) -> None:
        self.told.append(answer)
        if isinstance(answer, Tokens):
            self.produced += len(answer.ids)


class _Sent(NamedTuple):
    """A batch whose answers are awaited."""

    link: Following
    runs: list[Run]
    parts: list[Part]
    ahead: list[bool]  # whether a run went on without its answer: it wanted none
    computed: float  # seconds
    sent: float  # time.perf_counter()
    traffic: Traffic  # before it


class _Inside:
    """The threads that are in the schedule's own code: they may have its lock, or lead."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __enter__(self) -> None:
        self.threads.add(threading.get_ident())

    def __exit__(self, *error: object) -> None:
        self.threads.discard(threading.get_ident())


class Schedule:
    """Runs requests. Any number of threads may.

    Args:
        layers: of the first stage.
        connect: gives the link to the next stage; raises StageError. None in a stage that is the last.
        most: sequences in one pass.
        overlap: whether a batch may be computed here while the next stage computes another: if they share no cores.
    """

    def __init__(
        self,
        layers: Layers,
        connect: Callable[[], Following] | None = None,
        *,
        most: int = 32,
        overlap: bool = False,
    ) -> None:
        if (connect is None) != layers.model.is_last:
            raise ValueError("a stage that is not the last has another after it, and the last has none")
        self.layers = layers
        self._connect = connect
        self._link: Following | None = None
        self._most = most
        self._batches = 2 if overlap else 1  # under way at once
        self._runs: set[Run] = set()
        self._chunked = False  # whether the last pass had a chunk of a prompt
        self.disown()
        own(self)

    def disown(self) -> None:
        """In the child of a fork, which has one thread: only that thread's requests go on."""
        self._lock, self._collecting = threading.Lock(), threading.Lock()
        self._runs = {run for run in self._runs if run.thread == threading.get_ident()}
        for run in self._runs:
            run.rest()
        self._pending: list[Run] = [run for run in self._runs if run.outcome is None]
        self._asleep: dict[Run, None] = {}  # whose threads wait to be woken, in order
        self._leading = False  # whether a thread computes a pass
        self._inside = _Inside()
        self._lost: deque[Run] = deque()  # left by a thread that was inside
        self._sent: deque[_Sent] = deque()
        self.layers.disown()

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._runs)

    def run(
        self,
        sequence: Sequence,
        request: Generate,
        check: Callable[[], None] = lambda: None,
    ) -> Generator[Answer, None, Reason]:
        """Yields answers of one token, or of several that were drafted, and returns why the request ended.

        Args:
            sequence: no other request may be under way on it.
            check: called before each pass, and each `LOOK` seconds; what it raises ends the request there.

        Raises:
            RequestRefused: by this stage before anything is computed, or by a later one.
            StageError: a stage has failed.
        """
        config = self.layers.model.config
        generation.check(request, sequence.cache.length, config)
        positions = min(request.start + len(request.ids) + request.max_tokens, config.n_positions)
        sequence.cache.reserve(positions)  # at once: piece by piece it would be copied each time
        sequence.terms = Terms(positions, request.sampling, request.logprobs, request.spans, request.top)
        run = Run(sequence, request, lambda run: generation.generation(request, config, run.tell, self._alone))
        with self._inside, self._lock:
            self._runs.add(run)
            self._advance(run, None)
        try:
            while True:
                check()
                with self._inside:
                    self._wait(run)
                while run.told:
                    yield run.told.popleft()
                if run.outcome is not None:
                    break
            if isinstance(run.outcome, Reason):
                # What was drafted past the end is unknown to the client: a later request must not go on from it.
                known = run.fed + max(run.produced - 1, 0)
                sequence.cache.truncate(min(sequence.cache.length, known))
                return run.outcome
            raise run.outcome
        finally:
            if threading.get_ident() in self._inside.threads:
                # Nobody refers to this generator, and Python collects it in the middle of our own code, where this
                # thread would wait for itself.
                self._lost.append(run)
            else:
                with self._inside:
                    self._leave(run)

    def look_at_link(self) -> None:
        """Gives up a link to the next stage that was lost, or on which something unasked came, while nobody used it:
        then its sequences are lost too, and the next request begins on a new one."""
        with self._inside, self._lock:
            idle = not self._runs and not self._sent
            if idle and self._link is not None and not self._link.usable():
                self._link.close()

    def _alone(self) -> bool:
        return len(self._runs) == 1 or self._most == 1

    def _wait(self, run: Run) -> None:
        """Leads if nobody does. Otherwise returns when there is something to tell, after `LOOK` seconds at most."""
        with self._lock:
            while self._lost:
                self._drop(self._lost.popleft())
            runs = self._form() if self._may_lead() else []
            if runs:
                self._leading = True
                for one in runs:
                    one.flying += 1
            elif run.told or run.outcome is not None:
                return
            else:
                self._asleep[run] = None
        if runs:
            self._lead(runs)
        elif not run.woken.acquire(timeout=LOOK):
            with self._lock:
                missed = run not in self._asleep
                self._asleep.pop(run, None)
            if missed:  # it was woken at the last moment
                run.woken.acquire()

    def _may_lead(self) -> bool:
        if self._leading or not self._pending or len(self._sent) >= self._batches:
            return False
        if not self._sent:
            return True
        rows = [len(run.step.ids) for run in self._pending]
        return len(rows) >= HALF or max(rows) >= HALF

    def _form(self) -> list[Run]:
        """The runs of the next pass, taken out of those pending."""
        if self._most == 1:
            return [self._pending.pop(0)]
        tokens: list[Run] = []
        chunks: list[Run] = []
        for run in self._pending:
            (tokens if len(run.step.ids) == 1 else chunks).append(run)
        chosen: list[Run] = []
        rows = 0
        for run in [] if self._chunked and tokens else chunks[: self._most]:
            rows += len(run.step.ids)
            if chosen and (rows > SHORT or run.step.wanted is Wanted.NOTHING):
                break
            chosen.append(run)
        self._chunked = bool(chosen)
        most = self._most - len(chosen)
        if self._batches > 1 and len(tokens) >= 2 * HALF:  # half of them now, the others while the next stage computes
            most = min(most, -(-len(tokens) // 2))
        chosen += tokens[:most]
        taken = set(chosen)
        self._pending = [run for run in self._pending if run not in taken]
        return chosen

    def _lead(self, runs: list[Run]) -> None:
        """Computes one pass, and hands its answers out."""
        sent = False
        try:
            sent = self._compute(runs)
        except Exception as error:
            self._failed(runs, error)
        except BaseException:  # Ctrl-C: it is meant for this thread, and the others of the pass must hear of it
            self._failed(runs, StageError("the thread that computed for this request was interrupted: try again"))
            raise
        finally:
            with self._lock:
                self._leading = False
                self._wake()
        if sent:
            self._collect()

    def _compute(self, runs: list[Run]) -> bool:
        """Computes a pass, and hands its answers out; or sends it to the next stage, and returns that it did."""
        link = None if self._connect is None else self._linked(runs)
        if not runs:
            return False
        parts = [run.sequence.part(*run.step) for run in runs]
        hidden, results, seconds = self.layers.compute(parts)
        if link is None:
            with self._lock:
                for run, part, result in zip(runs, parts, results, strict=True):
                    run.flying -= 1
                    if part.ask.spans and isinstance(result, Answer):
                        result = with_span(result, Span(seconds, 0.0, 0.0, 0.0, 0.0))
                    self._advance(run, result)
                self._wake()
            self.layers.count(results)
            return False
        began, traffic = time.perf_counter(), link.traffic
        send_on(link, [run.sequence for run in runs], parts, hidden)
        ahead = [part.ask.wanted is Wanted.NOTHING for part in parts]
        sent = _Sent(link, runs, parts, ahead, seconds, began, traffic)
        with self._lock:
            self._sent.append(sent)
            for run, early in zip(runs, ahead, strict=True):
                if early:
                    self._advance(run, None)
        return True

    def _linked(self, runs: list[Run]) -> Following:
        """The link to the next stage. Takes out the runs whose own link has failed. Raises StageError."""
        for run in list(runs):
            if (error := run.sequence.dead) is not None:
                runs.remove(run)
                self._failed([run], error)
        assert self._connect is not None, "the last stage has no link"
        if self._link is None or self._link.dead is not None:
            self._link = self._connect()
        return self._link

    def _collect(self) -> None:
        """Takes the answers to the batch that was sent first, and hands them out."""
        with self._collecting:
            sent = self._sent[0]
            try:
                results = sent.link.receive_answers()
            except Exception as error:
                with self._lock:
                    self._sent.popleft()
                self._failed(sent.runs, error)
                return
            elapsed, traffic = time.perf_counter() - sent.sent, sent.link.traffic
            with self._lock:
                self._sent.popleft()
                for run, part, ahead, result in zip(sent.runs, sent.parts, sent.ahead, results, strict=True):
                    run.flying -= 1
                    if part.ask.spans and isinstance(result, Answer):
                        result = with_span(result, span(sent.computed, elapsed, sent.traffic, traffic))
                    if not ahead or isinstance(result, Refusal):
                        self._advance(run, result)
                self._wake()
            self.layers.count(results)

    def _advance(self, run: Run, result: Result) -> None:
        """Gives a run the answer to its step. The lock is held."""
        if run.outcome is not None:
            return
        if isinstance(result, Refusal):
            if run in self._pending:
                self._pending.remove(run)
            run.outcome = messages.refused(result)
            return
        try:
            run.step = run.steps.send(result)
            self._pending.append(run)
        except StopIteration as end:
            run.outcome = Reason(end.value)
        except Exception as error:  # a bug; the others of the pass go on
            run.outcome = error

    def _failed(self, runs: list[Run], error: Exception) -> None:
        """Ends runs of a pass or a batch."""
        with self._lock:
            for run in runs:
                run.flying -= 1
                if run in self._pending:
                    self._pending.remove(run)
                if run.outcome is None:
                    run.outcome = error
            self._wake()

    def _wake(self) -> None:
        """Wakes all that have something to tell, and one to lead if nobody does. The lock is held."""
        for run in [run for run in self._asleep if run.told or run.outcome is not None]:
            self._rouse(run)
        if self._asleep and self._may_lead():
            self._rouse(next(iter(self._asleep)))

    def _rouse(self, run: Run) -> None:
        del self._asleep[run]
        run.woken.release()

    def _drop(self, run: Run) -> None:
        """Computes nothing more for a run. The lock is held."""
        self._runs.discard(run)
        if run in self._pending:
            self._pending.remove(run)
        if run.outcome is None:
            run.outcome = Reason.CANCELLED

    def _leave(self, run: Run) -> None:
        """Ends a run for good: nothing of it is under way afterwards."""
        with self._lock:
            while self._lost:
                self._drop(self._lost.popleft())
            self._drop(run)
            self._asleep.pop(run, None)  # after an interrupt it may be asleep, or woken
            run.woken.acquire(blocking=False)
            self._wake()
        while True:
            with self._lock:
                if not run.flying:
                    run.steps.close()  # or it and the run, and so the cache, would wait for Python to look for cycles
                    return
                self._asleep[run] = None
            if not run.woken.acquire(timeout=LOOK):
                with self._lock:
                    missed = run not in self._asleep
                    self._asleep.pop(run, None)
                if missed:
                    run.woken.acquire()
