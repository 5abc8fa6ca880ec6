"""Attacks 89 to 91: by those who have shown as much as an honest client, and want more than their share.

Each first has a control: the honest client alone, of the same stages.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator

from attacks import Seen, attack, require
from attacks.arena import FLAGS, Arena, Pipes, eventually
from attacks.ends import admitted_client, generate_map
from attacks.load import Crowd, greeting
from attacks.rogue import ATTEST, Rogue
from transport.link import CLIENT
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


def slow_clients(pipes: Pipes, count: int, pause: float) -> tuple[int, int]:
    """How many of these honest clients, each of an address of its own, are given evidence after message 3, and a
    channel after theirs. Their way is long: so many seconds pass before they have verified it, and sent theirs."""
    given, served = itertools.count(), itertools.count()

    def run(number: int) -> None:
        address = ("127.0.0.1", pipes.ports[0])
        sock = socket.create_connection(address, timeout=60, source_address=(f"127.0.2.{number + 1}", 0))
        with contextlib.suppress(OSError), sock:
            rogue = Rogue(sock, "I", pipes.manifest, CLIENT, 0, suite=pipes.manifest.suites[0]).shake()
            if rogue.hear().kind != ATTEST:
                return
            next(given)
            time.sleep(pause)
            rogue.attest()
            rogue.say_message({"type": "status"})
            if (rogue.hear_message() or {}).get("type") == "report":
                next(served)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return _read(given), _read(served)


@attack(
    91,
    "a flood of handshakes without message 3, each from another address",
    "they end each other: whoever has sent message 3 is let finish, however long that takes",
)
def addresses(arena: Arena) -> Seen:
    handshakes, count = (32, 12) if arena.thorough else (16, 6)
    pause = 2.0  # seconds
    pipes = arena.start("--max-handshakes", str(handshakes))
    try:
        alone = slow_clients(pipes, count, pause)
        require(alone == (count, count), f"alone, {alone[1]} of {count} honest clients were served")
        sources = [f"127.0.1.{number}" for number in range(1, 200)]
        with Crowd(pipes.ports[0], 60, greeting(pipes), renew=True, sources=sources) as crowd:
            require(eventually(lambda: crowd.closed > 20, 60), "no flood")
            given, served = slow_clients(pipes, count, pause)
        arena.notes.append(
            f"91: honest clients that take {pause:.0f} s: {alone[1]} of {count} served alone; meanwhile "
            f"{given} of {count} came to message 3, and {served} were served; {crowd.made} connections of the flood"
        )
        require(given > 0, f"none of {count} honest clients came to message 3")
        require(served == given, f"{served} of {given} honest clients were served")
    finally:
        pipes.close()
    return Seen("served", "strangers make room for each other")
