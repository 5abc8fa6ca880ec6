"""A blind relay: it connects each connection at one address to another address, and passes bytes both ways.

An enclave can reach only its parent's vsock, so on such a host every link passes a relay. It has no keys and needs no
trust: it sees ciphertext, its lengths and its times, and can stop it. The ends notice anything else it does, including
an end without a CLOSE.

Two threads carry a connection, one in each direction, and hold at most one piece each: a slow reader slows its sender
down. The end of one direction is passed on, and the other continues.
"""

import itertools
import logging
import math
import threading
import time
from socket import socket

from transport.address import Address
from transport.errors import TransportError
from transport.sockets import Listener, Wire, connect

log = logging.getLogger("transport.relay")

CONNECTIONS = 256  # at once: two sockets and two threads each, and 1024 descriptors are usual
_PIECE = 1 << 16  # bytes; a record of a link is not longer
_CONNECT = 10.0  # seconds that the target may take


class Relay:
    """Carries what connects to `listen` on to `target`. Any more than `connections` at once are closed.

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
            if len(self._open) >= self._limit:  # others only remove
                log.warning("%s: turned away, %d connections are open", peer, self._limit)
                sock.close()
                continue
            connection = _Connection(sock)
            with self._lock:
                self._open[number] = connection
            log.info("connection %d: open from %s", number, peer)
            name = f"connection {number}"
            threading.Thread(target=self._carry, args=(number, connection), name=name, daemon=True).start()

    def close(self) -> None:
        """Stops accepting. A signal handler may call this. Connections continue until `stop`."""
        self._listener.close()

    def stop(self, patience: float = 2.0) -> None:
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
            with self._lock:
                del self._open[number]


class _Connection:
    """One connection through the relay: a wire to the peer, and one to the target."""

    def __init__(self, sock: socket) -> None:
        self._near = Wire(sock)
        self._far: Wire | None = None
        self._cut = threading.Event()

    def run(self, target: Address) -> tuple[int, int]:
        """Carries bytes to `target` and back until both directions have ended, or one is broken; returns how many.

        Raises Unreachable or TimedOut if the target is not there; who came has been cut off.
        """
        try:
            far = self._far = Wire(connect(target, _CONNECT))
        except TransportError:
            self._near.abort()
            raise
        if self._cut.is_set():  # before there was anything to wake
            far.shut()
        back = threading.Thread(target=self._pass, args=(far, self._near), daemon=True)
        back.start()
        self._pass(self._near, far)
        back.join()
        for wire in (self._near, far):
            if self._cut.is_set():
                wire.abort()
            else:
                wire.close()
        return far.bytes_sent, self._near.bytes_sent

    def cut(self) -> None:
        """Ends both directions, and wakes any thread that waits for either."""
        self._cut.set()
        for wire in (self._near, self._far):
            if wire is not None:
                wire.shut()

    def _pass(self, source: Wire, sink: Wire) -> None:
        """Carries one direction to its end. If it breaks, so does the other."""
        try:
            while True:
                source.wait(math.inf)
                data = source.read(_PIECE)
                if data == b"":
                    sink.finish()
                    return
                if data is not None:
                    sink.write(data, math.inf)
        except TransportError:
            self.cut()
