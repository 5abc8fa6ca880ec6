"""A blind relay: it connects each connection at one address to another address, and passes bytes both ways.

An enclave can reach only its parent's vsock, so on such a host every link passes a relay. It has no keys and needs no
trust: it sees ciphertext, its lengths and its times, and can stop it. The ends notice anything else it does, including
an end without a CLOSE.

Two threads carry a connection, one in each direction, and hold at most one piece each: a slow reader slows its sender
down. The end of one direction is passed on, and the other continues.

A connection may be silent for as long as its ends like, once both have spoken. Before that, after one of them has
ended, and while one does not read, there is a deadline; and a newcomer that finds the relay full takes the place of a
connection of the first two kinds.
"""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from socket import socket

from transport.address import Address
from transport.errors import LimitError, TimedOut, TransportError
from transport.sockets import Listener, Wire, connect

log = logging.getLogger("transport.relay")

CONNECTIONS = 256  # at once: two sockets and two threads each, and 1024 descriptors are usual
_PIECE = 1 << 16  # bytes; a record of a link is not longer
_CONNECT = 10.0  # seconds that the target may take
_FIRST = 30.0  # seconds until the first byte, from either end; whoever connects to a stage speaks at once
_STALL = 120.0  # seconds that an end may read nothing, or say nothing after the other has ended; stages allow less


class Relay:
    """Takes what connects to `listen` on to `target`, at most `connections` at once.

    Raises Unreachable if `listen` cannot be bound.
    """

    def __init__(self, listen: Address, target: Address, connections: int = CONNECTIONS) -> None:
        self._target = target
        self._limit = connections
        self._open: dict[int, _Connection] = {}
        self._lock = threading.Lock()
        self._listener = Listener(listen)
        self.address = self._listener.address  # with the port that the system chose if it was 0

    def serve(self) -> None:
        """Carries connections until `close` is called."""
        for number in itertools.count(1):
            accepted = self._listener.accept()
            if accepted is None:
                return
            sock, peer = accepted
            connection = _Connection(sock)
            with self._lock:
                unwanted = self._made_room()
                full = len(self._open) >= self._limit
                if not full:
                    self._open[number] = connection
            if unwanted is not None:
                unwanted.cut("ended for a newcomer")
            if full:
                log.warning("%s: turned away, %d connections are open", peer, self._limit)
                sock.close()
                continue
            log.info("connection %d: open from %s", number, peer)
            try:
                _start(f"connection {number}", self._carry, number, connection)
            except LimitError as error:
                log.warning("connection %d: %s", number, error)
                self._forget(number)
                sock.close()

    def _made_room(self) -> "_Connection | None":
        """The connection to end for a newcomer, taken out: of those that are not in use, the one silent longest.

        None if there is room, or if all are in use.
        """
        if len(self._open) < self._limit:
            return None
        unused = [number for number, one in self._open.items() if not one.in_use]
        number = min(unused, key=lambda number: self._open[number].heard, default=None)
        return None if number is None else self._open.pop(number)

    def close(self) -> None:
        """Stops accepting. A signal handler may call this. Connections continue until `stop`."""
        self._listener.close()

    def stop(self, patience: float = 5.0) -> None:
        """Ends every connection, and waits at most `patience` seconds until they have ended."""
        self.close()
        with self._lock:
            connections = list(self._open.values())
        for connection in connections:
            connection.cut()
        until = time.monotonic() + patience
        while self._open and time.monotonic() < until:
            time.sleep(0.01)

    def _carry(self, number: int, connection: "_Connection") -> None:
        try:
            there, back = connection.run(self._target)
            log.info("connection %d: closed, %d bytes there, %d back", number, there, back)
        except TransportError as error:
            log.warning("connection %d: %s", number, error)
        finally:
            self._forget(number)

    def _forget(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)


class _Connection:
    """One connection through the relay: a wire to the peer, and one to the target."""

    def __init__(self, sock: socket) -> None:
        self._near = Wire(sock)
        self._far: Wire | None = None
        self._cut = threading.Event()
        self._why = ""  # it was cut
        self._there, self._back = threading.Event(), threading.Event()  # set when that direction has ended
        self.heard = time.monotonic()  # when a byte was last read from either end

    @property
    def in_use(self) -> bool:
        """Whether both ends have spoken and neither has ended; or it is not known yet whether the target is there."""
        if self._far is None:
            return True  # a thread that connects cannot be woken
        spoken = self._near.bytes_received and self._far.bytes_received
        return bool(spoken) and not self._there.is_set() and not self._back.is_set()

    def run(self, target: Address) -> tuple[int, int]:
        """Carries bytes to `target` and back until both directions have ended, or one is broken; returns how many.

        Raises:
            Unreachable, TimedOut: the target is not there; who came has been cut off.
            TimedOut: an end was silent or did not read, or a newcomer took the place; both have been cut off.
            LimitError: the system gives no second thread; both have been cut off.
        """
        try:
            far = self._far = Wire(connect(target, _CONNECT))
        except TransportError:
            self._near.abort()
            raise
        self.heard = time.monotonic()
        if self._cut.is_set():  # before there was anything to wake
            far.shut()
        name = f"{threading.current_thread().name}, back"
        try:
            back = _start(name, self._pass, far, self._near, self._back, self._there)
        except LimitError:
            self._near.abort()
            far.abort()
            raise
        self._pass(self._near, far, self._there, self._back)
        back.join()
        for wire in (self._near, far):
            if self._cut.is_set():
                wire.abort()
            else:
                wire.close()
        if self._why:
            raise TimedOut(self._why)
        return far.bytes_sent, self._near.bytes_sent

    def cut(self, why: str = "") -> None:
        """Ends both directions, and wakes any thread that waits for either. `run` raises what the first caller says."""
        if not self._cut.is_set():
            self._why = why
        self._cut.set()
        for wire in (self._near, self._far):
            if wire is not None:
                wire.shut()

    def _pass(self, source: Wire, sink: Wire, ended: threading.Event, other: threading.Event) -> None:
        """Carries one direction to its end, and sees to it that the other then does not last for ever.

        If one breaks, so does the other.
        """
        try:
            self._copy(source, sink)
            ended.set()
            while not other.wait(left := self.heard + _STALL - time.monotonic()):
                if left <= 0:
                    raise TimedOut(f"one end has ended, and the other was silent for {_STALL:.0f} s")
        except TimedOut as error:
            self.cut(str(error))
        except TransportError:
            self.cut()
        finally:
            ended.set()

    def _copy(self, source: Wire, sink: Wire) -> None:
        """Carries one direction to its end. Raises TimedOut, Truncated."""
        deadline = self.heard + _FIRST
        while True:
            if not source.wait(deadline):
                if not source.bytes_received and not sink.bytes_received:
                    raise TimedOut(f"neither end said anything in {_FIRST:.0f} s")
                deadline = math.inf
                continue
            data = source.read(_PIECE)
            if data == b"":
                sink.finish()
                return
            if data is not None:
                self.heard = time.monotonic()
                sink.write(data, self.heard + _STALL)


def _start(name: str, work: Callable[..., None], *args: object) -> threading.Thread:
    """A new thread. Raises LimitError if the system gives none."""
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise LimitError("the system gives no more threads") from None
    return thread
