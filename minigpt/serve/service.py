"""The pipeline as a service: a queue before it, generations in threads, the stages' state, and whether tokens come."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from attest import AttestationError
from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Generation, Token, encode_prompt
from minigpt.errors import MiniGPTError, RequestRefused, StageError, UsageError
from minigpt.protocol.manifest import StageEntry, endorsement_warnings
from minigpt.protocol.messages import Reason, Span, StageReport
from minigpt.protocol.request import Keywords
from minigpt.serve.metrics import Metrics
from minigpt.serve.schema import Problem

WORKERS = 2  # threads that encode and decode texts
FRESH = 30.0  # seconds for which a token proves that tokens come
CANARY = 10.0  # seconds that a token may take which is to prove it
REPORT = 1.0  # seconds for which the stages' report is not asked for again
SCRAPE = 2.0  # seconds that metrics wait for it: who collects them gives up after 10, by default
BUSY = 60.0  # seconds for which a request goes on trying while stages are busy with others'
NOT_ASKED = "not asked: another stage failed"
NOT_TOLD = "no report came in time"
AGAIN = 0.25  # seconds between two tries

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an answer, and its spans: the client's, then stage by stage."""

    token: Token
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Why an answer ended, and how often it was resumed; always what comes last."""

    reason: Reason
    resumed: int


class Service:
    """What the routes ask. Everything but the threads' own work is for the event loop's thread.

    Args:
        pipeline: generates, on at most `connections` links.
        watcher: the same pipeline over a link of its own, which asks for the stages' state however busy the others are.
        connections: generations at a time.
        queue: requests that may wait for their turn.
        name: of the model, to clients.
    """

    def __init__(self, pipeline: Pipeline, watcher: Pipeline, *, connections: int, queue: int, name: str) -> None:
        self.pipeline = pipeline
        self.name = name
        self.tokenizer = pipeline.tokenizer
        self.config = pipeline.config
        self.metrics = Metrics(pipeline.manifest, lambda: (self.running, self.waiting))
        self.waiting = 0
        self.running = 0
        self._watcher = watcher
        self._threads = ThreadPoolExecutor(connections, "generation")
        self._workers = ThreadPoolExecutor(WORKERS, "text")
        self._turns = asyncio.Semaphore(connections)
        self._queue = queue
        self._preparing, self._most_prepared = 0, connections + queue
        self._token_at = -FRESH  # when the last token came, by the monotonic clock
        self._canary: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[tuple[StageReport, ...]] | None = None
        self._reports: tuple[StageReport, ...] = ()
        self._refused: Sequence[str] = ()  # all checks of the evidence that was refused last by ourselves
        self._reported_at = -REPORT

    async def encode(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], param: str, *, whole: bool = True
    ) -> list[tuple[int, ...]]:
        """The prompts' ids. Raises Problem, naming `param`, for one that the model cannot continue.

        Args:
            whole: False for a text that need not be continued: it may be empty, or longer than the model's context.
        """

        def encode() -> list[tuple[int, ...]]:
            if whole or self.tokenizer is None:
                return [encode_prompt(prompt, self.tokenizer, self.config) for prompt in prompts]
            return [tuple(self.tokenizer.encode(str(prompt))) for prompt in prompts]

        try:
            return await self.work(encode)
        except UsageError as error:
            code = "context_length_exceeded" if "positions" in str(error) else None
            raise Problem(400, f"{param}: {error}", param=param, code=code) from None

    async def decode(self, ids: Sequence[int]) -> str:
        """The ids' text. Raises Problem."""
        if self.tokenizer is None or max(ids, default=0) >= self.config.vocab_size:
            text = f"tokens: wanted ids from 0 to {self.config.vocab_size - 1}, of a model with a tokenizer"
            raise Problem(400, text, param="tokens")
        return await self.work(partial(self.tokenizer.decode, ids))

    def token_name(self, token: int) -> str:
        """A token as OpenAI's API names it."""
        return str(token) if self.tokenizer is None else self.tokenizer.name(token)

    async def token_names(self, ids: Sequence[int]) -> list[str]:
        """All of them."""
        return await self.work(lambda: [self.token_name(token) for token in ids])

    def admit(self) -> None:
        """Raises Problem if the queue is full, or no answer can come any more."""
        self.check_stages("pipeline_unavailable")
        if self._turns.locked() and self.waiting >= self._queue:
            text = f"{self.running} answers are under way and {self.waiting} requests wait: try again later"
            raise Problem(429, text, code="queue_full")

    async def work(self, work: Callable[[], T]) -> T:
        """Does it in one of a few threads. Of a request whose client leaves, only what has begun is done."""
        with self.preparing():
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """While a request's text is worked on, or waits for that. Raises Problem if too many do."""
        if self._preparing >= self._most_prepared:
            raise Problem(429, f"the texts of {self._preparing} requests wait: try again later", code="queue_full")
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def generate(self, ids: Sequence[int], options: Keywords) -> AsyncGenerator[Piece | End]:
        """An answer, when its turn comes. Closing this cancels it within one token."""
        until = time.monotonic() + BUSY
        watched: Keywords = {**options, "spans": True}  # for the bytes on each link
        while True:
            generation = self.pipeline.generate(ids, **watched)
            await self._turn()
            begun = False
            try:
                async with aclosing(self._generate(generation)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except (StageError, RequestRefused) as error:
                self._failed(error, until if not begun else 0.0)
            await asyncio.sleep(AGAIN)

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """What the model makes of a text, when its turn comes. Once begun, it is computed, whoever leaves."""
        until = time.monotonic() + BUSY
        while True:
            await self._turn()
            try:
                scored = await asyncio.shield(self._start(partial(self.pipeline.score, ids, top)))
                self._token_at = time.monotonic()
                return scored
            except (StageError, RequestRefused) as error:
                self._failed(error, until)
            await asyncio.sleep(AGAIN)

    async def _turn(self) -> None:
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1

    def _failed(self, error: StageError | RequestRefused, until: float) -> None:
        """Raises it, but for stages that are busy with others' requests: until then they are asked again."""
        if isinstance(error, StageError):
            self._token_at, self._reported_at = -FRESH, -REPORT  # what was true before it need not be now
        elif error.reason == "busy" and time.monotonic() <= until:
            return
        raise error

    def _start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Work in a thread, with a turn that is given back when it has ended."""

        def ended(done: asyncio.Future[T]) -> None:
            self.running -= 1
            self._turns.release()
            done.cancelled() or done.exception()  # noticed: whoever wanted it may have gone

        self.running += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(ended)
        return future

    async def _generate(self, generation: Generation) -> AsyncGenerator[Piece | End]:
        """One try."""
        loop = asyncio.get_running_loop()
        # Not bounded: a reader that is slow must not keep a link, and there are no more tokens than positions.
        arrived: asyncio.Queue[Piece | End | None] = asyncio.Queue()

        def put(item: Piece | End) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, item)

        def work() -> None:
            try:
                for token in generation:
                    put(Piece(token, generation.spans[-1]))
                assert generation.reason is not None
                put(End(generation.reason, len(generation.interruptions)))
            finally:
                generation.close()
                self.metrics.resumed.inc(len(generation.interruptions))

        future = self._start(work)
        future.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (item := await arrived.get()) is not None:
                if isinstance(item, Piece):
                    self._token_at = time.monotonic()
                    self.metrics.crossed(item.spans)
                yield item
            await future
        finally:
            generation.cancel()

    async def reports(self) -> tuple[StageReport, ...]:
        """The state of every stage: one that cannot be asked has an `error`. Asked for at most once a second."""
        if time.monotonic() - self._reported_at >= REPORT:
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())
            await asyncio.shield(self._asking)
        return self._reports

    async def _ask(self) -> tuple[StageReport, ...]:
        try:
            reports = await asyncio.to_thread(self._watcher.status)
        except (MiniGPTError, AttestationError) as error:
            stage = getattr(error, "stage", None) or 0
            self._refused = getattr(error, "checks", ())
            reason = "attestation" if isinstance(error, AttestationError) or error.exit_code == 3 else "failed"
            unknown = tuple(StageReport(i, NOT_ASKED, "failed") for i in range(stage))
            reports = (*unknown, StageReport(stage, str(error), reason))
        finally:
            self._asking = None
        rest = range(len(reports), len(self.pipeline.manifest.stages))
        self._reports = reports + tuple(StageReport(i, NOT_ASKED, "failed") for i in rest)
        self._reported_at = time.monotonic()
        return self._reports

    async def figures(self) -> bytes:
        """The metrics. If the stages do not report in time, none of them is said to be up."""
        try:
            async with asyncio.timeout(SCRAPE):
                reports = await self.reports()
        except TimeoutError:
            reports = tuple(StageReport(entry.index, NOT_TOLD, "failed") for entry in self.pipeline.manifest.stages)
        return await asyncio.to_thread(self.metrics.show, reports, self.pipeline.restarts)  # evidence takes time

    def check_stages(self, code: str = "not_ready") -> None:
        """Raises Problem if a stage of our own is not started again: only a new process can help then."""
        if (failure := self.pipeline.failure) is not None:
            raise Problem(503, f"{failure}: restart minigpt serve", code=code, stage=failure.stage)

    async def check(self) -> None:
        """Raises Problem unless every stage answers, with accepted evidence, and a token came within the last 30 s: for
        a request, or else for this."""
        self.check_stages()
        for report in await self.reports():
            if report.error not in ("", NOT_ASKED):
                raise Problem(503, f"stage {report.stage}: {report.error}", code="not_ready", stage=report.stage)
        if time.monotonic() - self._token_at < FRESH:
            return
        if self._canary is None:
            self._canary = asyncio.create_task(self._sing())
            self._canary.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.shield(self._canary)
        except TimeoutError:
            text = f"no token was computed for {FRESH:.0f} s, nor within {CANARY:.0f} s of asking for one"
            raise Problem(503, text, code="not_ready") from None
        except MiniGPTError as error:
            raise Problem(503, str(error), code="not_ready", stage=getattr(error, "stage", None)) from None

    async def _sing(self) -> None:
        """One token."""
        try:
            async with asyncio.timeout(CANARY), aclosing(self.generate([0], {"max_tokens": 1})) as pieces:
                async for _ in pieces:
                    pass
        finally:
            self._canary = None

    async def attestation(self) -> dict[str, Any]:
        """Each stage's evidence, what we make of it ourselves, and what the stage before it made of it."""
        manifest = self.pipeline.manifest
        reports = await self.reports()
        stages = [self._attested(entry, report) for entry, report in zip(manifest.stages, reports, strict=True)]
        warnings = manifest.warnings(time.time())
        for stage in stages:
            if stage["endorsed_until"] is not None:
                warnings += endorsement_warnings(stage["index"], datetime.fromisoformat(stage["endorsed_until"]))
        return {
            "manifest_sha256": manifest.digest.hex(),
            "model": manifest.model,
            "expires": manifest.expires.isoformat(),
            "simulated": manifest.simulated,
            "warnings": warnings,
            "stages": stages,
        }

    def _attested(self, entry: StageEntry, report: StageReport) -> dict[str, Any]:
        """One stage's. Links were accepted when they were made: here anybody can see by what, and check it again."""
        verdict, checks, until = "UNKNOWN", [report.error], None
        if report.reason == "attestation":
            verdict, checks = "FAIL", list((entry.index == 0 and self._refused) or checks)
        elif not report.error:
            manifest = self.pipeline.manifest
            result, failures = manifest.judge(entry.index, report.evidence)
            verdict = "FAIL" if failures else "PASS"
            checks = [str(check) for check in manifest.checks(entry.index, failures)]
            until = None if result is None else result.valid_until
        return {
            "index": entry.index,
            "layers": [entry.layers.start, entry.layers.stop],
            "address": self.pipeline.addresses.shown(entry.index),
            "provider": entry.platform.name,
            "simulated": entry.platform.simulated,
            "test_root": None if entry.test_root is None else entry.test_root.hex(),
            "verdict": verdict,
            "checks": checks,
            "endorsed_until": None if until is None else until.isoformat(),
            "evidence": _object(report.evidence),
        }


def _object(text: str) -> Any:
    """An evidence file's JSON; the text itself if it is none."""
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return text
