"""Attacks 64 to 71: on what many clients share, which is the batches, the link between two stages, places and the
queue. Those on that link are by ends with genuine evidence."""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks import Seen, attack, require
from attacks.application import outcome, sequences, some_rows
from attacks.arena import FLAGS, PATIENCE, TOKENS, Arena, Pipes, eventually, together
from attacks.ends import (
    LOGITS,
    NOTHING,
    TOKEN,
    FakeStage,
    Segment,
    admitted_client,
    admitted_stage,
    answers,
    batch,
    generate_map,
    genuine,
    results,
    segments,
    terms,
)
from attacks.ends import TOKENS as EACH
from attacks.load import MB, MOST_MEMORY, Stream, newcomer
from attacks.rogue import MESSAGE, ROOM, Rogue
from minigpt.protocol.messages import CHUNK, MAX_DRAFT

PLACES = 32  # sequences of a stage, by default


def told(rogue: Rogue, message: list[Any]) -> list[Any]:
    """The answers to a batch."""
    rogue.say_message(message)
    answer = rogue.hear_message()
    require(type(answer) is list, f"a stage answered a batch with {answer}")
    return list(answer)


def rows_of(arena: Arena, lane: int, count: int) -> NDArray[np.float32]:
    """Rows of a lane, unlike those of any other."""
    return np.random.default_rng(lane).standard_normal((count, arena.config.n_embd), np.float32)


@attack(
    64,
    "a lane of another link, one that was never opened, one that has ended, one opened twice or out of order",
    "refused, or dead; no other lane's tokens change",
)
def lanes(arena: Arena) -> Seen:
    first, more = rows_of(arena, 0, 2), rows_of(arena, 1, 1)
    begin, go_on = batch(first, Segment(rows=2), terms=terms()), batch(more, Segment(start=2))
    with admitted_stage(arena.stages) as alone:  # control: the same without anybody else
        wanted = [told(alone, begin)[1], told(alone, go_on)[1]]
    second = arena.start_client()
    arena.begin(count=200, client=second)  # an honest client, on the link of the genuine stage 0
    seen = []
    with admitted_stage(arena.stages) as owner, admitted_stage(arena.stages) as other:
        require(told(owner, begin)[1] == wanted[0], "a lane's first token is another")
        tried = {
            "another link's lane": (go_on, "lane"),
            "its first rows": (batch(more, Segment()), "lane"),
            "a lane that nobody opened": (batch(more, Segment(7)), "lane"),
            "lane 2^32 - 1": (batch(more, Segment(2**32 - 1)), "lane"),
            "its own lane of the same number": (batch(more, Segment(start=2), terms=terms()), "gap"),
            "the end of another link's lane": (batch(more, Segment(start=2), ended=(0, 1, 2, 3)), "lane"),
            "one that has ended": (batch(more, Segment()), "lane"),
            "one that has ended, opened again": (batch(more, Segment(), terms=terms()), "lane"),
            "the next lane, ended in the batch that opens it": (
                batch(more, Segment(1), terms=terms(1), ended=(1,)),
                "",
            ),
        }
        for name, (message, reason) in tried.items():
            (result,) = results(told(other, message))
            require(result == (f"refusal: {reason}" if reason else "token"), f"{name}: {result}")
            seen.append(Seen(result, "in words"))
        twice = batch(rows_of(arena, 2, 1), Segment(2), terms=terms(2) + terms(2, 3) + terms(2, 9))
        require(results(told(other, twice)) == ["token"], "terms that are replaced at once were not taken")
        last = batch(rows_of(arena, 2, 3), Segment(2, 1, 9), terms=b"")
        require(outcome_of(other, [*last[:5], bytes(4 * 9 * arena.config.n_embd)]) == "refusal: too-long", "terms")
        require(told(owner, go_on)[1] == wanted[1], "a lane's tokens were changed from another link")
        require(outcome_of(owner, batch(more, Segment(5), terms=terms(5))) == "dead", "a lane was opened out of order")
    answer = second.answer()
    require(answer["tokens"] == [arena.expected(arena.prompt(), 200)], "an honest client got other tokens")
    second.close()
    require(eventually(lambda: sequences(arena) == [0, 0], PATIENCE), "a lane outlives its link")
    arena.control()
    return together(seen)


def outcome_of(rogue: Rogue, message: list[Any]) -> str:
    rogue.say_message(message)
    return outcome(rogue)


@attack(
    65,
    "a batch that names a lane twice or is too large; more lanes than places; batches without end, answers unread",
    "dead, refused or held up; bounded memory; others' lanes live, and every place comes back",
)
def large(arena: Arena) -> Seen:
    one, width = some_rows(arena, 1), arena.config.n_embd
    bad = {
        "a lane twice": batch(some_rows(arena, 2), Segment(), Segment(start=1), terms=terms()),
        "1025 terms": batch(one, Segment(), terms=b"".join(terms(lane) for lane in range(1025))),
        "1025 lanes that end": batch(b"", ended=range(1025)),
        "more rows than a draft has": batch(some_rows(arena, 66), Segment(0, 0, MAX_DRAFT + 2, EACH), terms=terms()),
        "a larger message than any": batch(bytes(4 * width * arena.config.n_positions + 70_000), Segment()),
    }
    seen = []
    before = arena.memory(1)
    with admitted_stage(arena.stages) as neighbour:
        wanted = told(neighbour, batch(one, Segment(), terms=terms()))[1]
        for name, message in bad.items():
            arena.mark()
            with admitted_stage(arena.stages, direct=True) as rogue:
                verdict = outcome_of(rogue, message)
            require(verdict == "dead", f"{name}: stage 1 answered {verdict}")
            seen.append(Seen("dead", arena.verdict(1)))
        with admitted_stage(arena.stages, direct=True) as rogue:
            said = []
            for lane in range(2 * PLACES):
                said += results(told(rogue, batch(one, Segment(lane), terms=terms(lane))))
            require(said == ["token"] * (PLACES - 1) + ["refusal: busy"] * (PLACES + 1), f"places: {said}")
            require(results(told(rogue, batch(one, Segment(start=1)))) == ["token"], "an open lane was lost")
            require(results(told(rogue, batch(one, Segment(2 * PLACES - 1)))) == ["refusal: lane"], "a refused lane")
            require(told(neighbour, batch(one, Segment()))[1] == wanted, "a neighbour's lane was lost")
        with admitted_stage(arena.stages, direct=True) as rogue:
            rogue.say_message(batch(one, Segment(), terms=terms()))
            probe = b"\x96" + b"\xc4\x00" * 6
            flood, sent = rogue.seal_message(probe), 0
            rogue.sock.settimeout(3.0)
            with contextlib.suppress(OSError):
                while sent < 64 * MB:
                    rogue.sock.sendall(flood)
                    sent += len(flood)
                    flood = b"".join(rogue.seal_message(probe) for _ in range(500))
            grown = arena.memory(1) - before
            require(told(neighbour, batch(one, Segment()))[1] == wanted, "a neighbour's lane was held up")
            arena.notes.append(
                f"65: {sent / MB:.1f} MB of batches were sent, unread; stage 1 grew by {grown / MB:.0f} MB"
            )
            require(grown < 64 * MB, f"stage 1 grew by {grown >> 20} MB")
            seen.append(Seen("held up", "its answers wait"))
    require(eventually(lambda: sequences(arena) == [0, 0], PATIENCE), "a place was not given back")
    arena.control()
    return together(seen)


@attack(
    66,
    "in one batch with others: rows with NaN or infinity, a gap, a lane that is not open, more than its terms say",
    "refused alone; the others' answers have the same bits as without it",
)
def harmless(arena: Arena) -> Seen:
    width, most = arena.config.n_embd, min(40, arena.config.n_positions)
    nan = np.full((1, width), math.nan, np.float32)
    infinite = rows_of(arena, 5, 1)
    infinite[0, 3] = -math.inf
    cases = {
        "NaN": (nan, Segment(1, 2, 1, LOGITS), "not-finite"),
        "infinity in a chunk": (np.repeat(infinite, 9, axis=0), Segment(1, 2, 9, NOTHING), "not-finite"),
        "numbers that overflow inside": (np.full((1, width), 3e38, np.float32), Segment(1, 2, 1, LOGITS), None),
        "a gap": (rows_of(arena, 6, 1), Segment(1, 3, 1, LOGITS), "gap"),
        "a lane that is not open": (rows_of(arena, 6, 1), Segment(9, 0, 1, LOGITS), "lane"),
        "more than its terms": (rows_of(arena, 6, most), Segment(1, 2, most, TOKEN), "too-long"),
    }
    seen = []
    for name, (rows, segment, reason) in cases.items():
        found = {}
        for present in (False, True):
            with admitted_stage(arena.stages, direct=True) as rogue:
                opening = np.concatenate([rows_of(arena, lane, 2) for lane in range(3)])
                every = b"".join(terms(lane, most) for lane in range(3))
                told(rogue, batch(opening, *(Segment(lane, 0, 2) for lane in range(3)), terms=every))
                parts = [
                    (rows_of(arena, 10, 1), Segment(0, 2, 1, LOGITS)),
                    (rows_of(arena, 12, 1), Segment(2, 2, 1, LOGITS)),
                ]
                if present:
                    parts.insert(1, (rows, segment))
                told_now = told(rogue, batch(np.concatenate([part for part, _ in parts]), *(s for _, s in parts)))
                if present:
                    what = results(told_now)[1]
                    if reason is not None:
                        require(what == f"refusal: {reason}", f"{name}: {what}")
                        require(results(told_now)[::2] == ["logits", "logits"], f"{name}: {results(told_now)}")
                    seen.append(Seen(what, "the others: the same bits" if reason else "the others: the same tokens"))
                logits = told_now[5]
                if present and reason is None:  # it was computed with them: then bits may differ, as in any batch
                    size = 4 * arena.config.vocab_size
                    logits = logits[:size] + logits[-size:]
                after = np.concatenate([rows_of(arena, lane, 1) for lane in (20, 22)])
                told_after = told(rogue, batch(after, Segment(0, 3, 1, LOGITS), Segment(2, 3, 1, LOGITS)))
                found[present] = (logits, told_after[5])
        for without, beside in zip(found[False], found[True], strict=True):
            require(len(without) == 8 * arena.config.vocab_size == len(beside), f"{name}: an answer is missing")
            if reason is not None:
                require(without == beside, f"{name}: a neighbour's logits have other bits")
            one, other = (np.frombuffer(logits, "<f4") for logits in (without, beside))
            require(np.allclose(one, other, rtol=1e-3, atol=1e-3), f"{name}: a neighbour's logits are others")
    arena.control()
    return together(seen)


def attested(rogue: Rogue, pipes: Pipes, index: int = 1) -> None:
    """A later stage's side of a link, up to its first batch."""
    rogue.shake().attest(genuine(pipes, index))
    rogue.hear_attest()


def heard(rogue: Rogue) -> Iterator[list[Segment]]:
    """The segments of each batch that has some, until the link ends. A probe, which has nothing in it, is answered."""
    while type(message := rogue.hear_message()) is list:
        if segments(message):
            yield segments(message)
        elif not message[4]:
            rogue.say_message(honest_answer([]))


def honest_answer(asked: list[Segment], token: int = 0) -> list[Any]:
    """A result for each segment, a token for those that want one."""
    kinds = [(0, 0) if segment.wanted == NOTHING else (1, 1) for segment in asked]
    return answers(*kinds, ids=token.to_bytes(4, "little") * sum(count for _, count in kinds))


@attack(
    67,
    "a malicious stage 1 to many clients: tokens for a chunk that wanted nothing, results for some lanes, answers "
    "that nobody asked for",
    "the link ends; every client on it is told that it was stage 1; the next request is served on a new link",
)
def malicious_next_stage(arena: Arena) -> Seen:
    seen = []
    long = arena.prompt(min(2 * CHUNK + 9, arena.config.n_positions - TOKENS))

    def chunk(asked: list[Segment]) -> list[Any] | None:
        return answers((1, 1), ids=bytes(4)) if asked[0].wanted == NOTHING else None

    def fewer(asked: list[Segment]) -> list[Any] | None:
        return honest_answer(asked[:1]) if len(asked) > 1 else None

    def more(asked: list[Segment]) -> list[Any] | None:
        return honest_answer([*asked, *asked]) if len(asked) > 1 else None

    def of_others(asked: list[Segment]) -> list[Any] | None:  # the right number of results, and an id too many
        return [*honest_answer(asked)[:1], bytes(4 * 3), *[b""] * 5] if len(asked) > 1 else None

    plays: dict[str, tuple[Callable[[list[Segment]], list[Any] | None], list[tuple[int, ...]]]] = {
        "tokens for a chunk": (chunk, [long]),
        "fewer results": (fewer, [arena.prompt(), arena.prompt(9, 9)]),
        "more results": (more, [arena.prompt(), arena.prompt(9, 9)]),
        "more ids": (of_others, [arena.prompt(), arena.prompt(9, 9)]),
    }
    second = arena.start_client()
    for name, (lie, prompts) in plays.items():

        def act(rogue: Rogue, lie: Callable[[list[Segment]], list[Any] | None] = lie) -> bool:
            attested(rogue, arena.stages)
            for asked in heard(rogue):
                rogue.say_message(lie(asked) or honest_answer(asked))
                if lie(asked):
                    return bool(rogue.last_words() or True)
            return False

        with FakeStage(arena.stages, 1, act) as fake:
            clients = [arena.client, second][: len(prompts)]
            order = {"manifest": str(arena.stages.path), "allow_mock": True, "timeout": PATIENCE, "repeat": 1000}
            for client, ids in zip(clients, prompts, strict=True):
                client.order(ids=[list(ids)], max_tokens=100, **order)
            for client in clients:
                kind, text, code = client.answer()["error"] or [None, "no error", None]
                require(code == 4 and "stage 1" in text, f"{name}: a client ended by {kind}: {text}")
                seen.append(Seen(f"{kind} (exit {code})", "named as the one at fault"))
            require(eventually(lambda fake=fake: bool(fake.results)), f"{name}: the link was kept")
            require(fake.results[0] is True, f"{name}: the kit failed: {fake.results[0]!r}")
        arena.control()
    second.close()

    three = arena.start(split=f"1+1+{arena.config.n_layer - 2}")
    for pipes in (arena.stages, three):  # to the first stage, and to one in the middle
        unasked(arena, pipes, len(pipes.ports) - 1)
        seen.append(Seen("the answer to its own batch", "on a new link"))
    three.close()
    arena.control()
    return together(seen)


def unasked(arena: Arena, pipes: Pipes, index: int) -> None:
    """Stage `index` answers what was asked, and then what was not."""
    links = itertools.count()

    def act(rogue: Rogue) -> bool:
        number = next(links)
        attested(rogue, pipes, index)
        for asked in heard(rogue):
            rogue.say_message(honest_answer(asked, 10 + number))
            if number == 0:
                rogue.say_message(honest_answer(asked, 99))
                return bool(rogue.last_words() or True)
        return True

    with FakeStage(pipes, index, act) as fake:
        order = {"manifest": str(pipes.path), "allow_mock": True, "timeout": PATIENCE}
        for number in range(2):
            arena.client.order(ids=[list(arena.prompt())], max_tokens=1, **order)
            answer = arena.client.answer()
            require(answer["tokens"] == [[10 + number]], f"an answer that nobody asked for was taken: {answer}")
            if index > 1:  # the stage in the middle looks at once; the first one does before its next request
                ended = eventually(lambda: pipes.proxies[1].taps[0].first == "R", PATIENCE)
                require(ended, "the stage in the middle has kept what was said unasked to itself")
        require(eventually(lambda: fake.results[:1] == [True]), f"the link was kept: {fake.results}")
    arena.control(pipes)


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


@contextlib.contextmanager
def crowd(count: int, run: Callable[[int, threading.Event], None]) -> Iterator[list[Exception]]:
    """So many threads that run until the event is set; what they ended with."""
    stop, errors = threading.Event(), []

    def one(number: int) -> None:
        try:
            run(number, stop)
        except Exception as error:  # the stage may hang up on it
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE + 10)


def share(arena: Arena, name: str, pipes: Pipes, stream: Stream, quiet: float, least: float) -> None:
    """An honest client's tokens while there is a crowd, against those before."""
    rates = [stream.rate(2.0 if arena.thorough else 0.7) for _ in range(3)]
    require(not stream.tap.dead, f"{name}: the honest client lost its connection")
    arena.notes.append(
        f"{name}: an honest client's tokens: {quiet:.0f}/s before, {sum(rates) / 3:.0f}/s meanwhile; stage 0 has "
        f"{threads_of(pipes.processes[0].pid)} threads"
    )
    least = least * quiet if arena.thorough else 0.0
    require(max(rates) > least, f"{name}: an honest client's tokens fell from {quiet:.0f} to {max(rates):.0f} a second")


@attack(
    68,
    "16 clients that read nothing, while others generate: of answers, of reports, with a tiny receive buffer",
    "they wait for themselves; an honest client's tokens come",
    slow=True,
)
def deaf(arena: Arena) -> Seen:
    pipes = arena.start(*FLAGS, "--message-timeout", "6")
    stream = Stream(arena, pipes)
    status = b"\x81\xa4type\xa6status"
    try:
        quiet, memory = stream.rate(2.0 if arena.thorough else 0.7), arena.memory(0, pipes)

        def run(number: int, stop: threading.Event) -> None:
            with admitted_client(pipes, direct=True) as rogue:
                rogue.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
                reports = 100 * number  # so that some are stuck in a report, and some in the midst of an answer
                rogue.write(b"".join(rogue.seal_message(status) for _ in range(reports)))
                rogue.say_message(generate_map(arena.prompt(3), 2**20))
                stop.wait(60)

        with crowd(16, run) as errors:
            share(arena, "68, 16 clients that read nothing", pipes, stream, quiet, 0.3)
            newcomer(arena, pipes)
            require(not errors, f"the kit failed: {errors}")
        grown = arena.memory(0, pipes) - memory
        require(grown < MOST_MEMORY, f"stage 0 grew by {grown >> 20} MB")
        require(eventually(lambda: sequences(arena, pipes) == [1, 1], 30), f"places: {sequences(arena, pipes)}")
        after = stream.rate(2.0 if arena.thorough else 0.7)
        arena.notes.append(f"68: {after:.0f}/s after them; memory +{grown / MB:.1f} MB")
    finally:
        stream.close()
        pipes.close()
    return Seen("an honest client is served", "memory bounded; every place given back")


@attack(
    69,
    "cancel storms: 16 clients that start and cancel at once, again and again",
    "an honest client keeps a share; memory, threads and places stay",
    slow=True,
)
def storms(arena: Arena) -> Seen:
    pipes = arena.start(*FLAGS)
    stream = Stream(arena, pipes)
    cancelled = itertools.count()
    try:
        quiet, memory = stream.rate(2.0 if arena.thorough else 0.7), arena.memory(0, pipes)

        def run(number: int, stop: threading.Event) -> None:
            with admitted_client(pipes, direct=True) as rogue:
                while not stop.is_set():
                    rogue.say_message(generate_map(arena.prompt(3 + number), 500))
                    rogue.say_message({"type": "cancel"})
                    while (answer := rogue.hear_message() or {}).get("type") == "token":
                        pass
                    require(answer.get("type") == "done", f"cancelled, and told {answer}")
                    next(cancelled)

        threads = threads_of(pipes.processes[0].pid)
        with crowd(16, run) as errors:
            require(eventually(lambda: _count(cancelled) > 32, 30), f"no storm: {errors}")
            share(arena, "69, 16 clients that start and cancel", pipes, stream, quiet, 0.05)
            newcomer(arena, pipes)
            require(not errors, f"a client of the storm was told {errors}")
            more = threads_of(pipes.processes[0].pid) - threads
        require(more < 16 + 4, f"stage 0 has {more} threads more, for 16 clients")
        grown = arena.memory(0, pipes) - memory
        arena.notes.append(f"69: {_count(cancelled)} requests cancelled; memory +{grown / MB:.1f} MB")
        require(grown < MOST_MEMORY, f"stage 0 grew by {grown >> 20} MB")
        require(eventually(lambda: sequences(arena, pipes) == [1, 1], 30), f"places: {sequences(arena, pipes)}")
    finally:
        stream.close()
        pipes.close()
    return Seen("an honest client is served", "memory, threads and places stay")


def _count(counter: itertools.count[int]) -> int:
    return int(repr(counter)[6:-1])


@attack(
    70,
    "more requests than places and queue, each for the most positions; half of their clients leave while they wait",
    "refused in words when the queue is full; an honest client is served; every place comes back",
    slow=True,
)
def queue_flood(arena: Arena) -> Seen:
    pipes = arena.start(*FLAGS, "--max-sequences", "2", "--queue", "4")
    told_busy, left = itertools.count(), itertools.count()
    most = arena.config.n_positions
    try:

        def run(number: int, stop: threading.Event) -> None:
            while not stop.is_set():
                with admitted_client(pipes, direct=True) as rogue:
                    rogue.say_message(generate_map(arena.prompt(3), most - 3 if number % 3 else 2**20))
                    if number % 2:
                        stop.wait(0.03 * number)
                        next(left)
                        continue
                    while (answer := rogue.hear_message() or {}).get("type") == "token" and not stop.is_set():
                        pass
                    if answer.get("reason") == "busy":
                        require("try again in" in answer["text"], f"refused: {answer}")
                        next(told_busy)
                        stop.wait(0.3)  # it is idle meanwhile

        with crowd(12, run):
            require(eventually(lambda: _count(told_busy) > 3 and _count(left) > 10, 60), "the queue was never full")
            tries, took = newcomer(arena, pipes, 120.0)
        arena.notes.append(
            f"70: {_count(told_busy)} refused, {_count(left)} left; a newcomer served at try {tries}, in {took:.1f} s"
        )
        require(eventually(lambda: sequences(arena, pipes) == [0, 0], 30), f"places: {sequences(arena, pipes)}")
        arena.control(pipes)
    finally:
        pipes.close()
    return Seen("refused in words, or served in turn", "every place given back")


@attack(
    71,
    "every way in which a request can end, with its client still there and after it has left",
    "no place is lost, in no stage; the next request is served",
)
def ends(arena: Arena) -> Seen:
    pipes = arena.start(*FLAGS, "--max-sequences", "3")
    good, vocabulary = generate_map(arena.prompt(5), 3), arena.config.vocab_size
    endless = generate_map(arena.prompt(5), 2**20)

    def until_done(rogue: Rogue, *said: dict[str, Any]) -> str:
        for message in said:
            rogue.say_message(message)
        while (answer := rogue.hear_message() or {"type": "dead"})["type"] == "token":
            pass
        return str(answer.get("reason", answer["type"]))

    def then(*said: dict[str, Any], wanted: str) -> Callable[[Rogue], None]:
        def play(rogue: Rogue) -> None:
            require(until_done(rogue, good) == "length", "a good request failed")
            found = until_done(rogue, *said)
            require(found == wanted, f"got {found}, wanted {wanted}")

        return play

    def leave(rogue: Rogue) -> None:
        rogue.say_message(endless)
        require((rogue.hear_message() or {}).get("type") == "token", "no token")
        rogue.sock.close()

    def half(rogue: Rogue) -> None:  # a message that is never finished, in the midst of an answer
        rogue.say_message(endless)
        rogue.say(MESSAGE, bytes(ROOM), flags=0)
        require((rogue.hear_message() or {}).get("type") == "token", "no token")
        rogue.sock.close()

    bad = generate_map((vocabulary).to_bytes(4, "little"), 3)
    cases: dict[str, tuple[Callable[[Rogue], None], int | None]] = {  # and the places it may keep; None: it is gone
        "its end": (then(good, wanted="length"), 1),
        "going on": (then(generate_map(arena.prompt(2), 2) | {"start": 5}, wanted="length"), 1),
        "cancelled": (then(endless, {"type": "cancel"}, wanted="cancelled"), 1),
        "cancelled twice": (then(endless, {"type": "cancel"}, {"type": "cancel"}, wanted="cancelled"), 1),
        "reset": (then({"type": "reset"}, wanted="reset"), 0),
        "a bad token": (then(bad, wanted="bad-token"), 1),
        "a gap": (then(good | {"start": 500}, wanted="gap"), 1),
        "too long": (then(generate_map(bytes(4 * (arena.config.n_positions + 1))), wanted="too-long"), 1),
        "no ids": (then(good | {"ids": b""}, wanted="bad-request"), 1),
        "another request meanwhile": (then(endless, endless, wanted="failed"), None),
        "garbage meanwhile": (then(endless, {"type": "x"}, wanted="failed"), None),
        "left in the midst": (leave, None),
        "half a message, and left": (half, None),
    }
    seen = []
    try:
        for name, (play, keeps) in cases.items():
            for _ in range(4):  # one more than there are places
                with admitted_client(pipes) as rogue:
                    try:
                        play(rogue)
                    except Exception as error:
                        require(False, f"{name}: {error}")
                    if keeps is not None:
                        held = eventually(lambda keeps=keeps: sequences(arena, pipes) == [keeps] * 2, PATIENCE)
                        require(held, f"{name}: places {sequences(arena, pipes)} with the client still there")
            held = eventually(lambda: sequences(arena, pipes) == [0, 0], PATIENCE)
            require(held, f"{name}: places {sequences(arena, pipes)} after the client has left")
            seen.append(Seen("served", "every place given back"))
        with contextlib.ExitStack() as stack:  # others need the room; then its client goes on, and is refused
            rogues = [stack.enter_context(admitted_client(pipes)) for _ in range(5)]
            for rogue in rogues:
                require(until_done(rogue, good) == "length", "a good request failed")
            for rogue in rogues[:2] * 2:
                reason = until_done(rogue, good | {"start": 5})
                require(reason == "gap", f"dropped, and told {reason}")
            for rogue in rogues * 2:
                require(until_done(rogue, good) == "length", "a good request failed")
            require(sequences(arena, pipes) == [3, 3], f"places: {sequences(arena, pipes)}")
        require(eventually(lambda: sequences(arena, pipes) == [0, 0], PATIENCE), "a place was not given back")
        with admitted_client(pipes) as rogue:
            rogue.say_message(endless)
            require((rogue.hear_message() or {}).get("type") == "token", "no token")
            pipes.kill(1)
            require(until_done(rogue) == "failed", "a stage was killed, and its client was told something else")
        pipes.start(1, *FLAGS)
        began = time.monotonic()
        require(eventually(lambda: sequences(arena, pipes) == [0, 0], PATIENCE), "a place was lost with stage 1")
        arena.notes.append(
            f"71: {len(cases) + 2} kinds of ends; after the last, free in {time.monotonic() - began:.1f} s"
        )
        arena.control(pipes)
    finally:
        pipes.close()
    return together(seen)
