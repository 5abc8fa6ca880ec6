"""The schedule: many requests together give what each gives alone, and none harms another."""

import gc
import itertools
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chains import Chain, Rest, told
from made import SMALL, cut, random_tensors

from minigpt.engine.sampling import Sampling
from minigpt.errors import RequestRefused, StageError
from minigpt.protocol.messages import CHUNK, Generate, Reason, Tokens
from minigpt.stage.layers import Layers
from minigpt.stage.schedule import HALF, SHORT

TENSORS = random_tensors(SMALL)
RNG = np.random.default_rng(3)


def request(length: int, count: int = 20, seed: int | None = None) -> Generate:
    ids = tuple(RNG.integers(0, SMALL.vocab_size - 1, length).tolist())
    sampling = Sampling() if seed is None else Sampling(1.0, seed=seed)
    return Generate(0, ids, count, sampling=sampling, logprobs=True)


REQUESTS = [request(length, 5 + length % 7, seed) for length, seed in zip(range(1, 40), [None, 1, 2] * 13, strict=True)]
REQUESTS += [request(CHUNK + 30, 10), request(CHUNK + 50, 10, 7)]


def ids(answers: list[object]) -> list[int]:
    return [token for answer in answers if isinstance(answer, Tokens) for token in answer.ids]


def alone(request: Generate) -> tuple[list[int], Reason]:
    answers, reason = told(Chain(cut(SMALL, TENSORS)).run(request))
    return ids(list(answers)), reason


@pytest.mark.parametrize("bounds", [(), (2,), (1, 2, 3)])
@pytest.mark.parametrize(("most", "overlap"), [(32, False), (32, True), (3, False), (1, False)])
def test_requests_that_share_passes_get_the_text_that_each_gets_alone(
    bounds: tuple[int, ...], most: int, overlap: bool
) -> None:
    chain = Chain(cut(SMALL, TENSORS, *bounds), most=most, overlap=overlap)
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        found = list(pool.map(lambda one: told(chain.schedule.run(chain.new(), one)), REQUESTS))
    for (answers, reason), one in zip(found, REQUESTS, strict=True):
        assert (ids(list(answers)), reason) == alone(one)
    assert chain.schedule.running == 0
    tokens = sum(len(ids(list(answers))) for answers, _ in found)
    if most > 1:
        assert chain.schedule.layers.steps < tokens / 2


def test_a_pass_has_one_long_chunk_at_most_and_the_next_has_none_while_others_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = Chain(cut(SMALL, TENSORS))
    passes: list[list[int]] = []
    compute = chain.schedule.layers.compute
    gate = threading.Event()

    def noted(parts):  # type: ignore[no-untyped-def]
        passes.append(sorted(len(part.rows) for part in parts))
        gate.wait(60)
        return compute(parts)

    monkeypatch.setattr(chain.schedule.layers, "compute", noted)
    requests = [request(4, 30) for _ in range(4)] + [request(CHUNK + 7, 5) for _ in range(2)]
    with ThreadPoolExecutor(len(requests)) as pool:
        found = [pool.submit(lambda one=one: told(chain.schedule.run(chain.new(), one))) for one in requests]
        until = time.monotonic() + 60
        while chain.schedule.running < len(requests) and time.monotonic() < until:
            time.sleep(0.01)
        gate.set()
        for one in found:
            one.result(60)
    assert all(sum(count for count in rows if count > 1) <= SHORT for rows in passes if len(rows) > 1)
    for rows, after in itertools.pairwise(passes):
        if rows[-1] > 1 and len(rows) > 1 and rows[0] == 1:  # with a chunk, and tokens beside it: those wait again
            assert after[0] == 1
            assert after[-1] == 1


def test_two_batches_are_under_way_where_stages_share_no_cores_and_each_is_large_enough() -> None:
    chain = Chain(cut(SMALL, TENSORS, 2), overlap=True)
    rest = chain.rest
    assert isinstance(rest, Rest)
    sent, most = [0], [0]
    send, receive = rest.send_batch, rest.receive_answers

    def counted_send(*arguments):  # type: ignore[no-untyped-def]
        sent[0] += 1
        most[0] = max(most[0], sent[0])
        send(*arguments)

    def slow_receive():  # type: ignore[no-untyped-def]
        time.sleep(0.02)
        found = receive()
        sent[0] -= 1
        return found

    rest.send_batch, rest.receive_answers = counted_send, slow_receive  # type: ignore[method-assign]
    requests = [request(4, 20) for _ in range(2 * HALF)]
    with ThreadPoolExecutor(len(requests)) as pool:
        found = list(pool.map(lambda one: told(chain.schedule.run(chain.new(), one)), requests))
    assert [(ids(list(answers)), reason) for answers, reason in found] == [alone(one) for one in requests]
    assert most[0] == 2


def test_a_sequence_whose_rows_are_not_finite_fails_alone() -> None:
    chain = Chain(cut(SMALL, TENSORS, 2))
    rest = chain.rest
    assert isinstance(rest, Rest)
    send = rest.send_batch
    victim = 5

    def spoiled(batch, asks, missing=0):  # type: ignore[no-untyped-def]
        row = 0
        hidden = batch.hidden.copy()
        for segment in batch.segments:
            if segment.lane == victim and segment.start > 10:
                hidden[row] = np.nan
            row += segment.rows
        send(batch.__class__(batch.segments, hidden, batch.terms, batch.ended), asks, missing)

    rest.send_batch = spoiled  # type: ignore[method-assign]
    requests = [request(6, 20) for _ in range(8)]
    refused = []
    with ThreadPoolExecutor(len(requests)) as pool:
        found = [pool.submit(lambda one=one: told(chain.schedule.run(chain.new(), one))) for one in requests]
        for one, made in zip(requests, found, strict=True):
            try:
                answers, reason = made.result(60)
            except RequestRefused as error:
                refused.append((error.reason, error.stage))
            else:
                assert (ids(list(answers)), reason) == alone(one)
    assert refused == [("not-finite", 1)]


def test_weights_that_give_no_finite_logits_refuse_the_request_and_say_why() -> None:
    tensors = dict(TENSORS) | {"ln_f.bias": np.full_like(TENSORS["ln_f.bias"], np.nan)}
    with pytest.raises(RequestRefused, match="not finite"):
        told(Chain(cut(SMALL, tensors)).run(request(3)))


@pytest.mark.parametrize("where", ["send_batch", "receive_answers"])
def test_when_the_next_stage_fails_all_that_share_the_link_fail_and_a_new_link_serves(where: str) -> None:
    models = cut(SMALL, TENSORS, 2)
    chain = Chain(models)
    rest = chain.rest
    assert isinstance(rest, Rest)
    work, calls = getattr(rest, where), [0]

    def failing(*arguments):  # type: ignore[no-untyped-def]
        calls[0] += 1
        if calls[0] > 4:
            rest.dead = rest.dead or StageError("stage 1 is gone", stage=1)
            raise rest.dead
        return work(*arguments)

    setattr(rest, where, failing)
    requests = [request(4, 20) for _ in range(5)]
    with ThreadPoolExecutor(len(requests)) as pool:
        found = [pool.submit(lambda one=one: told(chain.schedule.run(chain.new(), one))) for one in requests]
        for made in found:
            with pytest.raises(StageError, match="stage 1 is gone"):
                made.result(60)
    assert chain.schedule.running == 0
    fresh = Rest(Layers(models[1], 1), None, 2)
    chain.schedule._connect = lambda: fresh
    answers, reason = told(chain.schedule.run(chain.new(), requests[0]))
    assert (ids(list(answers)), reason) == alone(requests[0])


def test_an_interrupt_in_a_pass_is_raised_where_it_came_and_told_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = Chain(cut(SMALL, TENSORS))
    compute = chain.schedule.layers.compute
    entered = threading.Event()

    def interrupted(parts):  # type: ignore[no-untyped-def]
        if len(parts) > 1:
            entered.set()
            raise KeyboardInterrupt
        time.sleep(0.001)
        return compute(parts)

    monkeypatch.setattr(chain.schedule.layers, "compute", interrupted)
    requests = [request(4, 300) for _ in range(3)]
    kinds = []
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(lambda one=one: told(chain.schedule.run(chain.new(), one))) for one in requests]
        for made in found:
            error = made.exception(60)
            kinds.append(type(error))
    assert entered.is_set()
    assert KeyboardInterrupt in kinds
    assert StageError in kinds
    assert chain.schedule.running == 0
    monkeypatch.undo()
    answers, reason = told(chain.schedule.run(chain.new(), REQUESTS[0]))
    assert (ids(list(answers)), reason) == alone(REQUESTS[0])


@pytest.mark.parametrize("bounds", [(), (2,)])
@pytest.mark.parametrize("overlap", [False, True])
def test_requests_that_are_left_at_any_time_harm_no_other(bounds: tuple[int, ...], overlap: bool) -> None:
    chain = Chain(cut(SMALL, TENSORS, *bounds), overlap=overlap)
    rng = np.random.default_rng(5)
    counts = rng.integers(0, 12, len(REQUESTS)).tolist()

    class Left(Exception):
        pass

    def run(one: Generate, count: int) -> list[int] | None:
        left = [count]

        def check() -> None:
            if count % 2 and left[0] <= 0:
                raise Left

        answers = chain.schedule.run(chain.new(), one, check)
        found: list[object] = []
        try:
            for answer in answers:
                found.append(answer)
                left[0] -= 1
                if not count % 3 and left[0] <= 0:
                    answers.close()
                    return None
        except Left:
            return None
        return ids(found)

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        found = list(pool.map(run, REQUESTS, counts))
    for one, tokens in zip(REQUESTS, found, strict=True):
        assert tokens is None or tokens == alone(one)[0]
    assert chain.schedule.running == 0
    answers, reason = told(chain.schedule.run(chain.new(), REQUESTS[0]))
    assert (ids(list(answers)), reason) == alone(REQUESTS[0])


def test_a_client_that_takes_nothing_holds_up_nobody() -> None:
    chain = Chain(cut(SMALL, TENSORS, 2))
    slow = chain.schedule.run(chain.new(), request(4, 40))
    next(slow)  # and no more
    others = [request(5, 20) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda one: told(chain.schedule.run(chain.new(), one)), others))
    assert [ids(list(answers)) for answers, _ in found] == [alone(one)[0] for one in others]
    slow.close()


def test_a_sequence_that_a_later_stage_has_no_memory_for_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    models = cut(SMALL, TENSORS, 2)
    chain = Chain(models)
    rest = chain.rest
    assert isinstance(rest, Rest)
    first = chain.schedule.run(chain.new(), REQUESTS[4])
    begun = next(first)
    new_cache = models[1].new_cache

    def without_memory():  # type: ignore[no-untyped-def]
        cache = new_cache()

        def reserve(positions: int) -> None:
            raise MemoryError

        cache.reserve = reserve  # type: ignore[method-assign]
        return cache

    with monkeypatch.context() as patch:
        patch.setattr(models[1], "new_cache", without_memory)
        with pytest.raises(RequestRefused) as error:
            told(chain.schedule.run(chain.new(), REQUESTS[5]))
    assert (error.value.reason, error.value.stage) == ("busy", 1)
    assert rest.lanes._places.sequences == 1
    answers, reason = told(first)
    assert (ids([begun, *answers]), reason) == alone(REQUESTS[4])


@pytest.mark.parametrize("where", ["compute", "_form", "_advance"])
def test_a_generation_that_python_collects_in_the_middle_of_a_pass_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    chain = Chain(cut(SMALL, TENSORS))
    lost = chain.schedule.run(chain.new(), request(4, 300))
    next(lost)
    cycle: list[object] = [lost]
    cycle.append(cycle)
    owner = chain.schedule.layers if where == "compute" else chain.schedule
    work = getattr(owner, where)

    def collecting(*arguments):  # type: ignore[no-untyped-def]
        gc.collect()
        return work(*arguments)

    found: list[list[int]] = []
    other = threading.Thread(
        target=lambda: found.append(ids(list(told(chain.schedule.run(chain.new(), REQUESTS[0]))[0]))), daemon=True
    )
    monkeypatch.setattr(owner, where, collecting)
    del lost, cycle
    other.start()
    other.join(60)
    assert found == [alone(REQUESTS[0])[0]]
    assert chain.schedule.running == 0


def test_an_interrupt_while_another_leads_leaves_no_wake_up_behind_that_breaks_its_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = Chain(cut(SMALL, TENSORS))
    schedule = chain.schedule
    compute = schedule.layers.compute
    gate, shared = threading.Event(), threading.Event()

    class Woken:
        """In the place of the lock that the interrupted thread sleeps on."""

        def __init__(self) -> None:
            self.lock, self.calls = threading.Lock(), 0
            self.lock.acquire()

        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
            self.calls += blocking
            if self.calls == 1 and blocking:
                assert shared.wait(60)
                raise KeyboardInterrupt
            if self.calls == 2 and blocking:  # the pass ends just before the thread sleeps again
                gate.set()
                time.sleep(0.2)
            return self.lock.acquire(blocking, timeout)

        def release(self) -> None:
            self.lock.release()

    def gated(parts):  # type: ignore[no-untyped-def]
        if len(parts) > 1:
            shared.set()
            gate.wait(60)
        else:
            time.sleep(0.001)
        return compute(parts)

    first = schedule.run(chain.new(), request(4, 300))
    next(first)
    (run,) = schedule._runs
    run.woken = Woken()  # type: ignore[assignment]
    monkeypatch.setattr(schedule.layers, "compute", gated)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(lambda: told(schedule.run(chain.new(), REQUESTS[0])))
        assert shared.wait(60)
        interrupted = pool.submit(lambda: list(first))
        assert isinstance(interrupted.exception(60), KeyboardInterrupt)
        answers, reason = other.result(60)
    assert (ids(list(answers)), reason) == alone(REQUESTS[0])
    assert schedule.running == 0


def test_the_cache_of_a_request_that_was_left_is_free_at_once() -> None:
    chain = Chain(cut(SMALL, TENSORS))
    gc.disable()
    try:
        sequence = chain.new()
        cache = weakref.ref(sequence.cache)
        answers = chain.schedule.run(sequence, request(4, 20))
        next(answers)
        answers.close()
        del answers, sequence
        assert cache() is None
    finally:
        gc.enable()
