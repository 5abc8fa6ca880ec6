"""Attacks 89 and 90: by those who have shown as much as an honest client, and want more than their share.

Each first has a control: the honest client alone, of the same stages.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

from attacks import Seen, attack, require
from attacks.arena import FLAGS, Arena, Pipes, eventually
from attacks.ends import admitted_client, generate_map
from attacks.rogue import Rogue
from transport.noise import KeyPair


class Insistent:
    """Links with one key, each of which always has a request running or waiting: who is refused asks again at once.

    Attributes:
        answered, refused: how many requests were.
        turned_away: how many links were.
    """

    def __init__(self, pipes: Pipes, count: int, static: KeyPair, request: dict[str, object]) -> None:
        self._pipes, self._static, self._request = pipes, static, request
        self._answered, self._refused, self._turned_away = itertools.count(), itertools.count(), itertools.count()
        self._stop = threading.Event()
        self._rogues: dict[int, Rogue] = {}
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(count)]

    answered = property(lambda self: _read(self._answered))
    refused = property(lambda self: _read(self._refused))
    turned_away = property(lambda self: _read(self._turned_away))

    def __enter__(self) -> Insistent:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for rogue in list(self._rogues.values()):
            with contextlib.suppress(OSError):
                rogue.sock.shutdown(2)
        for thread in self._threads:
            thread.join(30)

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError), admitted_client(self._pipes, direct=True, static=self._static) as rogue:
                self._rogues[number] = rogue
                rogue.sock.settimeout(60)
                while not self._stop.is_set() and self._ask(rogue):
                    pass
            next(self._turned_away)
            self._stop.wait(0.5)

    def _ask(self, rogue: Rogue) -> bool:
        """One request. Whether the link lives."""
        rogue.say_message(self._request)
        while (answer := rogue.hear_message() or {}).get("type") == "token":
            pass
        if answer.get("type") == "done":
            next(self._answered)
        elif answer.get("reason") == "busy":
            next(self._refused)
            self._stop.wait(0.05)
        else:
            return False
        return True


def _read(counter: itertools.count[int]) -> int:
    return int(repr(counter)[6:-1])


def served(arena: Arena, pipes: Pipes, key: KeyPair, times: int, patience: float) -> tuple[int, int, list[float]]:
    """An honest client, each time over a new link: how often it was served, how often it had to try, and the seconds
    that each answer took, tries included."""
    tries, seconds, until = 0, [], time.monotonic() + patience
    order = {"manifest": str(pipes.path), "client_key": key.private.hex(), "allow_mock": True, "timeout": 60.0}
    wanted = [arena.expected(arena.prompt(), 5)]
    while len(seconds) < times and time.monotonic() < until:
        began, done = time.monotonic(), False
        while not done and time.monotonic() < until:
            tries += 1
            arena.client.order(ids=[list(arena.prompt())], max_tokens=5, **order)
            answer = arena.client.answer()
            if done := answer["whole"]:
                require(answer["tokens"] == wanted, "it was given other tokens")
                seconds.append(time.monotonic() - began)
            else:
                time.sleep(0.2)
    return len(seconds), tries, sorted(seconds)


@contextlib.contextmanager
def two_listed(arena: Arena, *flags: str) -> Iterator[tuple[Pipes, KeyPair, KeyPair]]:
    """A pipeline whose manifest lists two clients: an honest one, and one that is not."""
    honest, other = KeyPair.generate(), KeyPair.generate()
    pipes = arena.start(*FLAGS, *flags, clients=[honest.public, other.public])
    try:
        yield pipes, honest, other
    finally:
        pipes.close()


def beside(arena: Arena, name: str, pipes: Pipes, honest: KeyPair, flood: Insistent, full: str) -> None:
    """Measures an honest client without the flood and beside it; `full` is what the log or an answer says then."""
    times = 10 if arena.thorough else 4
    number, tries, alone = served(arena, pipes, honest, times, 60)  # the control
    require(number == tries == times, f"alone, an honest client was served {number} times in {tries} tries")
    with flood:
        require(eventually(lambda: flood.refused + flood.turned_away > 8, 90), f"no {full}")
        number, tries, seconds = served(arena, pipes, honest, times, 120)
        arena.notes.append(
            f"{name}: an honest client: {times} of {times} answers at the first try, {alone[times // 2]:.2f} s each, "
            f"alone; meanwhile {number} of {times} in {tries} tries"
            + (f", {seconds[number // 2]:.2f} s each, {seconds[-1]:.2f} at most" if seconds else "")
            + f"; the others: {flood.answered} answered, {flood.refused} refused, {flood.turned_away} turned away"
        )
        require(number == times, f"{name}: an honest client was served {number} times in {tries} tries")
        require(tries == times, f"{name}: an honest client had to try {tries} times for {times} answers")


@attack(
    89,
    "one of two listed clients keeps places and queue full, and asks again at once when it is refused",
    "the other is served at its first try: its requests take turns with all of theirs",
)
def full_queue(arena: Arena) -> Seen:
    flags, count = (("--max-sequences", "4", "--queue", "8"), 18) if not arena.thorough else ((), 100)
    with two_listed(arena, *flags) as (pipes, honest, other):
        flood = Insistent(pipes, count, other, generate_map(arena.prompt(), 60))
        beside(arena, f"89, {count} links with one key", pipes, honest, flood, "queue was full")
    return Seen("served", "whoever has most in the queue is refused")


@attack(
    90,
    "one of two listed clients wants all channels, with a request on each",
    "the other has channels of its own: it is served at its first try",
)
def all_channels(arena: Arena) -> Seen:
    channels = 128 if arena.thorough else 16
    with two_listed(arena, "--max-sequences", "4", "--max-channels", str(channels)) as (pipes, honest, other):
        flood = Insistent(pipes, channels + 4, other, generate_map(arena.prompt(), 60))
        beside(arena, f"90, {channels + 4} links with one key", pipes, honest, flood, "link was turned away")
    return Seen("served", "no identity has all channels")
