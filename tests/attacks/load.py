"""Attacks 39, 45, 58, 59, 86 and 87: much at once, by which a host wants memory, sockets, threads or the processor.

What is measured is told in notes: memory above the quiet state, and an honest client's tokens a second before and
meanwhile. The attackers go past the proxies, so that these cost nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from attacks import Seen, attack, require
from attacks.arena import FLAGS, Arena, Pipes, eventually
from attacks.ends import Segment, admitted_client, admitted_stage, as_client, batch, generate_map, results
from attacks.proxy import Tap
from attacks.rogue import ALERT, ATTEST, MESSAGE, ROOM
from transport.link import SUITES, VERSION

MB = 1 << 20
MOST_MEMORY = 200 * MB  # above the quiet state


class Crowd:
    """Many connections to one port, each of which sends `first`, and then waits, or drips, until it is closed.

    Args:
        count: of connections at a time.
        renew: whether one that the stage has closed is made again at once: a flood.
        drip: whether it sends a byte each second after that.
        sources: the addresses to connect from, in turn.
    """

    def __init__(
        self,
        port: int,
        count: int,
        first: bytes,
        *,
        drip: bool = False,
        renew: bool = False,
        sources: Sequence[str] = ("127.0.0.1",),
    ) -> None:
        self.made = self.closed = self.received = 0
        self._port, self._count, self._first, self._drip, self._renew = port, count, first, drip, renew
        self._sources = itertools.cycle(sources)
        self._selector = selectors.DefaultSelector()
        self._open: set[socket.socket] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def open(self) -> int:
        return len(self._open)

    def adopt(self, sock: socket.socket) -> None:
        """Drips on a connection that was made elsewhere."""
        sock.setblocking(False)
        self._open.add(sock)
        self._selector.register(sock, selectors.EVENT_READ)

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for sock in list(self._open):
            self._forget(sock)
        self._selector.close()

    def _run(self) -> None:
        dripped = time.monotonic()
        while not self._stop.is_set():
            while self.open < self._count and (self._renew or self.made < self._count) and not self._stop.is_set():
                if not self._connect():
                    break
            for key, _ in self._selector.select(0.05):
                assert isinstance(key.fileobj, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    data = _read(key.fileobj)
                    self.received += len(data)
                    if not data:
                        self._forget(key.fileobj)
                        self.closed += 1
            if self._drip and time.monotonic() - dripped > 1:
                dripped = time.monotonic()
                for sock in list(self._open):
                    with contextlib.suppress(OSError):
                        sock.send(b"\0")

    def _connect(self) -> bool:
        try:
            sock = socket.create_connection(
                ("127.0.0.1", self._port), timeout=2, source_address=(next(self._sources), 0)
            )
        except OSError:
            return False
        try:
            sock.sendall(self._first)
        except OSError:  # the stage has closed it already
            sock.close()
            return False
        self.made += 1
        self.adopt(sock)
        return True

    def _forget(self, sock: socket.socket) -> None:
        self._open.discard(sock)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)
        sock.close()


def _read(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except BlockingIOError:
        raise
    except OSError:
        return b""


def greeting(pipes: Pipes) -> bytes:
    """Preamble, message 1 and mac of a client that will not go on."""
    with as_client(pipes, direct=True) as rogue:
        return b"mGPT" + bytes([VERSION, rogue.suite, 0, 0]) + rogue.opening(rogue.first_message())


def sockets_of(pid: int) -> int:
    """Open sockets of a process."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(entry).startswith("socket:")
    return found


class Stream:
    """An honest client that generates all the while, and how fast its tokens come."""

    def __init__(self, arena: Arena, pipes: Pipes) -> None:
        self._pipes = pipes
        self._client = arena.start_client()
        arena.begin(count=100, stages=pipes, client=self._client, timeout=60, repeat=100_000)  # it has no end
        require(
            eventually(lambda: bool(pipes.proxies[0].taps) and self.tokens > 5, 30), "the honest client has no tokens"
        )

    @property
    def tap(self) -> Tap:
        return self._pipes.proxies[0].taps[0]

    @property
    def tokens(self) -> int:
        return len(self.tap.sent("R", "record"))

    def rate(self, seconds: float) -> float:
        """Tokens a second, over so many seconds."""
        tokens, began = self.tokens, time.monotonic()
        time.sleep(seconds)
        return (self.tokens - tokens) / (time.monotonic() - began)

    def close(self) -> None:
        self._client.close()


def newcomer(arena: Arena, pipes: Pipes, patience: float = 30.0) -> tuple[int, float]:
    """An honest client that comes meanwhile: how often it tried until it was served, and the seconds that took."""
    began, tries = time.monotonic(), 0
    order = {"manifest": str(pipes.path), "allow_mock": True, "timeout": 20.0}
    while time.monotonic() - began < patience:
        tries += 1
        arena.client.order(ids=[list(arena.prompt())], max_tokens=5, **order)
        answer = arena.client.answer()
        if answer["whole"]:
            require(answer["tokens"] == [arena.expected(arena.prompt())], "it was given other tokens")
            return tries, time.monotonic() - began
        time.sleep(0.2)
    require(False, f"no honest client was served in {patience:.0f} s and {tries} tries: {answer['error']}")
    raise AssertionError


def measured(
    arena: Arena, name: str, pipes: Pipes, crowd: Crowd, stream: Stream, quiet: tuple[int, float], seconds: float
) -> None:
    """What a crowd costs while it is there: memory, sockets, an honest client's tokens, a newcomer's patience."""
    memory, rate = quiet
    peak = during = 0.0
    sockets = 0
    rates = []
    for _ in range(3):
        rates.append(stream.rate(seconds / 3))
        peak = max(peak, arena.memory(0, pipes) - memory)
        sockets = max(sockets, sockets_of(pipes.processes[0].pid))
    during = sum(rates) / len(rates)
    require(not stream.tap.dead, f"{name}: the honest client lost its connection")
    tries, took = newcomer(arena, pipes)
    arena.notes.append(
        f"{name}: {crowd.made} connections made, {crowd.open} open, {sockets} sockets in the stage; "
        f"memory +{peak / MB:.1f} MB; an honest client's tokens: {rate:.0f}/s before, {during:.0f}/s meanwhile; "
        f"a newcomer served at try {tries}, after {took:.2f} s"
    )
    require(peak < MOST_MEMORY, f"{name}: memory {peak / MB:.0f} MB above the quiet state")
    require(sockets < 400, f"{name}: the stage holds {sockets} sockets")  # 200 may be at the door, for 3 s
    if arena.thorough:
        require(during >= rate / 2, f"{name}: an honest client's tokens fell from {rate:.0f} to {during:.0f} a second")
    else:
        require(during > 0, f"{name}: an honest client got no more tokens")


@attack(
    39,
    "records of 64 KiB declared, a drip of 1 B/s, 200 connections; silent ones; garbage",
    "timed out, memory bounded, honest clients served",
    slow=True,
)
def drip(arena: Arena) -> Seen:
    pipes = arena.start(*FLAGS)
    stream = Stream(arena, pipes)
    port, seconds = pipes.ports[0], 6.0 if arena.thorough else 1.5
    try:
        quiet = arena.memory(0, pipes), stream.rate(seconds)
        crowds = {"silent": b"", "drip inside the handshake": greeting(pipes)[:20]}
        for name, first in crowds.items():
            with Crowd(port, 200, first, drip=bool(first), renew=arena.thorough) as crowd:
                measured(arena, f"39, 200 × {name}", pipes, crowd, stream, quiet, seconds)
                require(eventually(lambda crowd=crowd: crowd.closed > 0, 20), f"{name}: nobody was ever closed")
        with Crowd(port, 0, b"", drip=True) as crowd:  # strangers that are admitted, as anybody may be, and then drip
            for _ in range(200 if arena.thorough else 80):
                rogue = as_client(pipes, direct=True)
                try:
                    rogue.shake().hear_attest()
                    rogue.attest()
                    rogue.write(b"\xff\xff" + bytes(1000))
                except ConnectionError:  # turned away: the stage has no room, and nobody there is idle yet
                    rogue.sock.close()
                else:
                    crowd.adopt(rogue.sock)
                    crowd.made += 1
            measured(arena, "39, a drip in records of 64 KiB", pipes, crowd, stream, quiet, seconds)
            if arena.thorough:
                require(eventually(lambda: crowd.open == 0, 90), f"{crowd.open} of them were never timed out")
        if arena.thorough:
            garbage(arena, pipes, stream, quiet)
    finally:
        stream.close()
        pipes.close()
    return Seen("honest clients served", "memory, sockets and time bounded")


def garbage(arena: Arena, pipes: Pipes, stream: Stream, quiet: tuple[int, float]) -> None:
    """10 000 connections that send nonsense."""
    began, before = time.monotonic(), stream.tokens
    for i in range(10_000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", pipes.ports[0]), timeout=5) as sock:
            sock.sendall(os.urandom(1 + i % 100))
    took = time.monotonic() - began
    require(not stream.tap.dead, "the honest client lost its connection to garbage")
    grown = arena.memory(0, pipes) - quiet[0]
    rate = (stream.tokens - before) / took
    arena.notes.append(
        f"39, 10 000 × garbage in {took:.0f} s: memory +{grown / MB:.1f} MB; "
        f"an honest client's tokens: {quiet[1]:.0f}/s before, {rate:.0f}/s meanwhile"
    )
    require(grown < MOST_MEMORY, f"memory {grown / MB:.0f} MB above the quiet state after garbage")
    newcomer(arena, pipes)


@attack(
    45, "a flood of handshakes without message 3", "bounded evidence, bounded sockets; honest clients served", slow=True
)
def flood(arena: Arena) -> Seen:
    pipes = arena.start(*FLAGS)
    stream = Stream(arena, pipes)
    seconds = 6.0 if arena.thorough else 1.5
    try:
        quiet = arena.memory(0, pipes), stream.rate(seconds)
        with Crowd(pipes.ports[0], 200, greeting(pipes), renew=True) as crowd:
            measured(arena, "45, message 3 never comes", pipes, crowd, stream, quiet, seconds)
            most = crowd.made * (2 + SUITES[arena.suite].lengths[1])
            require(0 < crowd.received <= most, f"the flood was given {crowd.received} bytes: more than messages 2")
    finally:
        stream.close()
        pipes.close()
    return Seen("honest clients served", "no evidence made, sockets bounded")


@attack(
    58,
    "60 idle clients, each with one refused request of 2^20 ids; stages so; maps of keys that nobody knows",
    "nothing of a request outlives its answer; sequences and memory are left for others",
)
def idle(arena: Arena) -> Seen:
    ids = np.arange(2**20, dtype="<u4").tobytes()
    rows = np.zeros((arena.config.n_positions + 1, arena.config.n_embd), np.float32)
    for link, admit, asked in (
        (0, admitted_client, generate_map(ids)),
        (1, admitted_stage, batch(rows, Segment(rows=len(rows)))),  # of a lane that was never opened
    ):
        before = arena.memory(link)
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                rogue = stack.enter_context(admit(arena.stages, direct=True))
                rogue.say_message(asked)
                answer: Any = rogue.hear_message() or {}
                refused = results(answer) == ["refusal: lane"] if link else answer.get("reason") == "too-long"
                require(refused, f"stage {link} answered {answer}")
            grown = arena.memory(link) - before
            arena.notes.append(f"58: idle links that were refused hold {grown / MB:.0f} MB in stage {link}")
            require(grown < 100 * MB, f"stage {link} holds {grown >> 20} MB for them")
            arena.control()  # while they are there: they hold no sequence
    before = arena.memory(0)
    for i in range(40):
        with admitted_client(arena.stages, direct=True) as rogue:
            rogue.say_message({f"{i} {n} {'x' * 4000}": n for n in range(1000)})
            require(rogue.hear().kind == ALERT, "keys that nobody knows were taken")
    grown = arena.memory(0) - before
    arena.notes.append(f"58: 40 000 keys that nobody knows leave {grown / MB:.0f} MB")
    require(grown < 100 * MB, f"keys that nobody knows hold {grown >> 20} MB")
    arena.control()
    return Seen("refused in words", "memory and sequences bounded")


@attack(
    59,
    "evidence in records of one byte; evidence, and a message, in packets of one byte",
    "a little of the processor, and newcomers served at once",
)
def tiny_pieces(arena: Arena) -> Seen:
    pid = arena.stages.processes[0].pid
    for name in ("records of one byte", "evidence in packets of one byte", "a message in packets of one byte"):
        before, slowest = processor(pid), 0.0
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                if name.startswith("a message"):
                    rogue = stack.enter_context(admitted_client(arena.stages, direct=True))
                    kind = MESSAGE
                else:
                    rogue = stack.enter_context(as_client(arena.stages, direct=True).shake())
                    rogue.hear_attest()
                    kind = ATTEST
                with contextlib.suppress(OSError):  # the stage may hang up meanwhile
                    if name.startswith("records"):
                        rogue.sock.sendall(b"".join(rogue.seal(kind, b"x", flags=0) for _ in range(90_000)))
                    else:
                        for byte in b"".join(rogue.seal(kind, bytes(ROOM), flags=0) for _ in range(3)):
                            rogue.sock.send(bytes([byte]))
                    rogue.sock.shutdown(socket.SHUT_WR)
                rogue.last_words()
            slowest = max(slowest, newcomer(arena, arena.stages)[1])
        spent = (processor(pid) - before) / 3
        arena.notes.append(f"59: {name}: {1000 * spent:.0f} ms of the processor, a newcomer served in {slowest:.2f} s")
        require(spent < 0.25, f"{name}: a connection costs {spent:.2f} s of the processor")
    return Seen("served at once", "cut, or let gather")


def processor(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


class Flood:
    """Admitted clients that each send the same messages again and again, and read what is answered.

    Their messages are sealed before, so that the attackers' own work costs the stage nothing.

    Args:
        every: seconds from one time to the next of each; None for as often as the stage takes them.
    """

    def __init__(
        self, pipes: Pipes, count: int, messages: Sequence[dict[str, Any]], copies: int, every: float | None = None
    ) -> None:
        bodies = [msgpack.packb(message) for message in messages] * copies
        self._rogues = [admitted_client(pipes, direct=True) for _ in range(count)]
        self._left = [memoryview(b"".join(map(one.seal_message, bodies))) for one in self._rogues]
        self.received = 0  # bytes
        self._piece, self._every = (1 << 16, 0.02) if every is None else (len(self._left[0]) // copies, every)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """They leave, whatever is under way."""
        self._stop.set()
        self._thread.join(30)
        for rogue in self._rogues:
            rogue.close()

    def _run(self) -> None:
        for rogue in self._rogues:
            rogue.sock.setblocking(False)
        while not self._stop.wait(self._every):
            for number, rogue in enumerate(self._rogues):
                with contextlib.suppress(OSError):  # the stage takes no more now, or has hung up
                    while data := _read(rogue.sock):
                        self.received += len(data)
                with contextlib.suppress(OSError):
                    self._left[number] = self._left[number][rogue.sock.send(self._left[number][: self._piece]) :]


CANCEL = {"type": "cancel"}
ANSWER = 278  # bytes of a record, at least
PACED = 5000  # answers a second: a tenth of a core, at 20 µs each; unpaced there are six times as many


@attack(
    86,
    "16 channels flood Cancel, Status, Reset, refused requests and requests that they cancel, and leave",
    "paced: an honest client keeps its tokens; nothing is done for who has left",
)
def nothing_useful(arena: Arena) -> Seen:
    pipes = arena.start()
    stream = Stream(arena, pipes)
    pid, seconds = pipes.processes[0].pid, 6.0 if arena.thorough else 1.0
    try:
        for name, messages in {
            "Cancel": [CANCEL],
            "Status": [{"type": "status"}],
            "Reset": [{"type": "reset"}],
            "refused requests": [generate_map((arena.config.vocab_size,))],
            "requests that are cancelled": [generate_map(arena.prompt(), arena.config.n_positions - 20), CANCEL],
        }.items():
            rate = stream.rate(seconds)
            flood = Flood(pipes, 16, messages, 4000)
            with flood:
                time.sleep(1)  # each has a second's worth of them free
                answered, during = flood.received, stream.rate(seconds)
                answered = round((flood.received - answered) / ANSWER / seconds)
            left = time.monotonic()
            gone = eventually(lambda: sockets_of(pid) <= 6, 60)
            took = time.monotonic() - left
            rate = (rate + stream.rate(seconds)) / 2
            arena.notes.append(
                f"86, {name}: an honest client's tokens: {rate:.0f}/s without, {during:.0f}/s meanwhile, "
                f"{during / rate:.2f} times; {answered} answers/s to the others; rid of them after {took:.1f} s"
            )
            require(not stream.tap.dead, f"{name}: the honest client lost its connection")
            require(gone and took < 10, f"{name}: the stage works for {took:.0f} s for clients that have gone")
            require(answered < PACED, f"{name}: {answered} answers a second to who does nothing useful")
            least = rate / 2 if arena.thorough else 0
            require(during > least, f"{name}: tokens fell from {rate:.0f}/s to {during:.0f}/s")
        newcomer(arena, pipes)
    finally:
        stream.close()
        pipes.close()
    return Seen("an honest client keeps its tokens", "paced, and dropped once gone")


@attack(
    87,
    "as many clients as there are channels, that each send a Cancel every 0.5 s, or 900 Status at once",
    "they make room for an honest newcomer",
)
def restless(arena: Arena) -> Seen:
    pipes = arena.start("--max-channels", "24")
    try:
        alone = newcomer(arena, pipes)[1]  # the control: while nobody keeps channels
        for name, copies, every in (("cancel", 200, 0.5), ("status", 900, None)):
            with Flood(pipes, 24, [{"type": name}], copies, every):
                time.sleep(1.5)  # nobody is young any more
                tries, took = newcomer(arena, pipes)
            arena.notes.append(
                f"87, {name}: a newcomer served at try {tries}, after {took:.2f} s; {alone:.2f} s before"
            )
    finally:
        pipes.close()
    return Seen("served", "whoever does nothing useful makes room")
