"""The man in the middle of a link: it knows the framing and has no key.

    initiator → responder    preamble (8) | u16 length, message 1 | mac (16) | u16 length, message 3 | records …
    responder → initiator                   u16 length, message 2 | records …
    record                   u16 length, ciphertext

A rule decides what goes on in the place of each frame; `honest` passes everything. What was captured is what the ends
sent, not what the rule made of it. How long the messages of a handshake are is a matter of the suite, and of no
interest here: every other frame announces its own length.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

KINDS = {"I": ("preamble", "message 1", "mac", "message 3"), "R": ("message 2",)}  # the frames before the records
FIXED = {("I", 0): 8, ("I", 2): 16}  # bytes of preamble and mac


class Frame(NamedTuple):
    """What one end sent: `data` with its length, as on the wire. `number` counts the records of that end from 0."""

    sender: str  # "I" or "R"
    kind: str  # "preamble", "message 1", "mac", …, "record"
    number: int
    data: bytes


Rule = Callable[[Frame, "Tap"], Iterable[bytes]]


def honest(frame: Frame, _tap: Tap) -> Iterable[bytes]:
    """The rule that passes everything: the control of every attack."""
    return (frame.data,)


class Tap:
    """One connection through a proxy.

    Attributes:
        frames: what both ends sent, in the order of its arrival.
        ended: the ends that have closed their direction, in that order, with the time.
    """

    def __init__(self, near: socket.socket, far: socket.socket, rule: Rule) -> None:
        self.frames: list[Frame] = []
        self.ended: list[tuple[str, float]] = []
        self.rule = rule
        self._sockets = {"I": near, "R": far}
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._pump, args=(end,), daemon=True) for end in "IR"]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def sent(self, sender: str, kind: str | None = None) -> list[Frame]:
        """The frames of one end."""
        with self._lock:
            return [frame for frame in self.frames if frame.sender == sender and kind in (None, frame.kind)]

    def give(self, end: str, data: bytes) -> None:
        """Sends bytes to one end; it is no matter if it is gone."""
        with contextlib.suppress(OSError):
            self._sockets[end].sendall(data)

    def finish(self, end: str) -> None:
        """Sends one end a FIN."""
        with contextlib.suppress(OSError):
            self._sockets[end].shutdown(socket.SHUT_WR)

    @property
    def dead(self) -> bool:
        """Whether both ends have closed."""
        return len(self.ended) == 2

    @property
    def first(self) -> str:
        """The end that closed first: "I" or "R", "" while none has."""
        return self.ended[0][0] if self.ended else ""

    def close(self) -> None:
        """Ends the connection to both sides."""
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(5)
        for sock in self._sockets.values():
            sock.close()

    def _pump(self, sender: str) -> None:
        source, receiver = self._sockets[sender], "R" if sender == "I" else "I"
        buffer, number = bytearray(), 0
        while data := _read(source):
            buffer += data
            honestly = self.rule is honest
            while (size := _frame_size(buffer, FIXED.get((sender, number)))) is not None:
                frame = _name(sender, number, bytes(buffer[:size]))
                del buffer[:size]
                number += 1
                with self._lock:
                    self.frames.append(frame)
                if not honestly:
                    for part in self.rule(frame, self):
                        self.give(receiver, part)
            if honestly:  # whether it is a frame or not; after it was noted, because the end may answer at once
                self.give(receiver, data)
        if buffer and self.rule is not honest:
            self.give(receiver, bytes(buffer))
        with self._lock:
            self.ended.append((sender, time.monotonic()))
        self.finish(receiver)


def _read(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 16)
    except OSError:
        return b""


def _frame_size(buffer: bytearray, fixed: int | None) -> int | None:
    """The bytes of the frame that `buffer` begins with, or None if it is not whole."""
    if fixed is None and len(buffer) < 2:
        return None
    size = fixed or 2 + int.from_bytes(buffer[:2], "big")
    return size if len(buffer) >= size else None


def _name(sender: str, number: int, data: bytes) -> Frame:
    kinds = KINDS[sender]
    if number < len(kinds):
        return Frame(sender, kinds[number], 0, data)
    return Frame(sender, "record", number - len(kinds), data)


class Proxy:
    """Listens on a port of its own, and carries every connection to `upstream`.

    Attributes:
        port: its own.
        upstream: the port that it carries to. May be changed: later connections go there.
        rule: for later connections.
        taps: connections so far, since the last `reset`.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.upstream = 0
        self.rule: Rule = honest
        self.taps: list[Tap] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self, rule: Rule = honest) -> None:
        """Ends the connections there are, forgets them, and sets the rule for those to come."""
        self.rule = rule
        taps, self.taps = self.taps, []
        for tap in taps:
            tap.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self.reset()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.upstream), timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tap = Tap(near, far, self.rule)
            self.taps.append(tap)  # first: an end may be done with the connection before this thread goes on
            tap.start()
