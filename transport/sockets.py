"""Sockets: the only file that opens, closes and waits for them, and that maps the system's errors to this package's.

They are non-blocking underneath. Every wait is a poll with a deadline, in terms of `time.monotonic`, or `math.inf`.
"""

import contextlib
import errno
import math
import os
import select
import selectors
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from typing import Any, Generic, Self, TypeVar

from transport.address import Address
from transport.errors import (
    Abandoned,
    AddressError,
    LimitError,
    TimedOut,
    TransportError,
    Truncated,
    Unreachable,
)
from transport.fork import identity, own

_RDHUP = getattr(select, "POLLRDHUP", 0)  # macOS has none
_INTERNET = (socket.AF_INET, socket.AF_INET6)
_NOTICE = {  # when the system gives up a connection whose other machine, or the way to it, is gone
    "SO_KEEPALIVE": 1,
    "TCP_KEEPIDLE": 10,  # seconds without a byte until the first probe
    "TCP_KEEPALIVE": 10,  # the same on macOS
    "TCP_KEEPINTVL": 5,  # seconds between probes
    "TCP_KEEPCNT": 2,  # probes, where there is no TCP_USER_TIMEOUT
    "TCP_USER_TIMEOUT": 15_000,  # milliseconds without an answer to bytes or probes, or without taking any bytes
}
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL | _RDHUP
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: reset the connection instead of sending what is left
_LONGEST_POLL = 3600.0  # seconds; poll counts milliseconds in an int
_LOOK = 0.5  # seconds between two looks at a peer, where no poll tells that it has left
_STAGGER = 0.25  # seconds until the next address of a name is tried beside the ones before it: RFC 8305, section 5
_DRIP = 1024  # bytes; less at a time than any network carries
_DRIPS = 16  # so many such reads are free
_GATHER = 0.001  # seconds
_LISTENING = {  # what to do where a socket cannot be bound
    errno.EADDRINUSE: ": end what listens there, or choose another port",
    errno.EADDRNOTAVAIL: ": this machine has no such address, wanted one of its own, or 0.0.0.0 for all of them",
    errno.EACCES: ": choose a port from 1024 on, or run as root",
}
_AT_THE_DOOR = 3.0  # seconds; the opening is one packet, which is sent with the connection
_AT_ONCE = 32  # connections that are accepted before those that are there are heard
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Wire:
    """A connected stream socket. One thread may read while another writes."""

    def __init__(self, sock: socket.socket) -> None:
        """The wire owns the socket from here on."""
        self._sock = sock
        self._process = identity()
        self.bytes_sent = 0
        self.bytes_received = 0
        sock.setblocking(False)
        if sock.family in _INTERNET:
            with contextlib.suppress(OSError):  # if it is dead already, the first read will say so
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for name, value in _NOTICE.items():
                    if (option := getattr(socket, name, None)) is not None:
                        level = socket.SOL_SOCKET if name[:2] == "SO" else socket.IPPROTO_TCP
                        sock.setsockopt(level, option, value)
        self._rdhup = _RDHUP if hasattr(select, "poll") else 0
        self._readable, self._writable = _poller(sock, select.POLLIN), _poller(sock, select.POLLOUT)
        own(self)

    def disown(self) -> None:
        """In the child of a fork: close(2) and nothing else, which the parent's connection does not notice."""
        self.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def write(self, data: bytes, deadline: float) -> None:
        """Sends all of `data`. Raises TimedOut, Truncated."""
        view = memoryview(data)
        while True:
            sent, late = 0, False
            try:
                sent = self._sock.send(view)
            except BlockingIOError:
                late = not _wait(self._writable, deadline)
            except OSError as error:
                raise _lost(error) from None
            self.bytes_sent += sent
            if sent == len(view):
                return
            view = view[sent:]
            if late or time.monotonic() > deadline:
                raise TimedOut("the peer did not take what was sent to it in time")

    def wait(self, deadline: float, asker: "Wire | None" = None) -> bool:
        """Waits until there is something to read, or the connection ends; False if the deadline passes first.

        Raises Abandoned if the peer of `asker` leaves first.
        """
        if asker is None:
            return _wait(self._readable, deadline)
        poller, own = _poller(self._sock, select.POLLIN), self._sock.fileno()
        if asker.fileno() < 0:
            raise Abandoned("the channel that asked for this is closed")
        poller.register(asker.fileno(), self._rdhup)
        while True:
            left = min(deadline - time.monotonic(), _LONGEST_POLL if self._rdhup else _LOOK)
            events = poller.poll(math.ceil(1000 * max(left, 0.0)))
            if any(fd == own for fd, _ in events):
                return True
            if events or asker.gone():
                raise Abandoned("the peer that asked for this has left")
            if time.monotonic() > deadline:
                return False

    def read(self, count: int) -> bytes | None:
        """What has arrived, at most `count` bytes: b"" at the end of the connection, None if there is nothing.

        Raises Truncated if the connection is dead.
        """
        try:
            data = self._sock.recv(count)
        except BlockingIOError:  # poll may be wrong
            return None
        except OSError as error:
            raise _lost(error) from None
        self.bytes_received += len(data)
        return data

    def read_exactly(self, count: int, deadline: float) -> bytes:
        """Raises TimedOut, Truncated."""
        data = self.read_at_most(count, deadline, "the peer did not finish the handshake in time")
        if len(data) < count:
            raise Truncated("the peer hung up inside the handshake")
        return data

    def read_at_most(self, count: int, deadline: float, late: str) -> bytes:
        """`count` bytes, or fewer if the connection ends before. Raises TimedOut, which says `late`, and Truncated."""
        data, reads = bytearray(), 0
        while len(data) < count:
            if not self.wait(deadline) or time.monotonic() > deadline:  # a drip is always readable
                raise TimedOut(late)
            part = self.read(count - len(data))
            if part == b"":
                break
            data += part or b""
            if len(data) < count:
                reads = gathered(part or b"", reads)
        return bytes(data)

    def readable(self) -> bool:
        """Whether there is something to read, or the peer is gone. Never blocks."""
        return self._events() != 0

    def writable(self) -> bool:
        """Whether something can be written at once. False for a connection that is dead. Never blocks."""
        return self._events(select.POLLOUT) == select.POLLOUT

    def gone(self) -> bool:
        """Whether the peer has shut down its side or the connection is dead, even if bytes are unread. Never blocks."""
        events = self._events()
        if events & _GONE or not events or self._rdhup:
            return events & _GONE != 0
        try:
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def deafen(self) -> None:
        """Stops receiving, which wakes any thread that waits for the peer. Writing still works."""
        self._shutdown(socket.SHUT_RD)

    def finish(self) -> None:
        """Stops sending: the peer gets what was written, and then the end. Receiving still works."""
        self._shutdown(socket.SHUT_WR)

    def shut(self) -> None:
        """Ends both directions, and wakes any thread that waits for either."""
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        if self._process == identity():  # in a forked child, it would end the parent's connection
            with contextlib.suppress(OSError):  # if it is dead already, the next read will say so
                self._sock.shutdown(how)

    def close(self) -> None:
        """Sends what is left, and closes. No thread may be waiting."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def abort(self) -> None:
        """Closes at once. No thread may be waiting."""
        if self._sock.family in _INTERNET and self._process == identity():  # vsock cannot discard unsent data
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.close()

    def _events(self, wanted: int = select.POLLIN) -> int:
        try:
            found = _poller(self._sock, wanted | self._rdhup).poll(0)  # a new one: two threads cannot share it
        except (OSError, ValueError):  # it is closed
            return select.POLLNVAL
        return found[0][1] if found else 0


def gathered(data: bytes, drips: int) -> int:
    """Called with each read of something unfinished, and the drips so far; returns those with this one.

    After some, it lets bytes gather for a moment: a peer that sends one at a time must not cost a wakeup for each.
    """
    if len(data) >= _DRIP:
        return drips
    if drips >= _DRIPS:
        time.sleep(_GATHER)
    return drips + 1


class Listener:
    """A listening socket: `place` is an address to bind, or the descriptor of one that a parent handed down.

    Raises:
        Unreachable: the address cannot be bound.
        AddressError: the descriptor is not a listening stream socket of tcp or vsock.
    """

    def __init__(self, place: Address | int, backlog: int = 128) -> None:
        self._sock = _bind(place, backlog) if isinstance(place, Address) else _adopt(place)
        self._sock.setblocking(False)
        self._family = self._sock.family
        self._bell, self._ring = socket.socketpair()  # wakes a thread in `accept`: no poll notices a close
        self._poller = _poller(self._sock, select.POLLIN)
        self._poller.register(self._bell, select.POLLIN)
        self._closed = False
        self._accepting = threading.RLock()
        own(self)
        self.address = _address(self._sock.family, self._sock.getsockname())

    def accept(self, deadline: float = math.inf) -> tuple[socket.socket, str] | None:
        """The next connection and the peer's address, for logging; None once the listener is closed.

        Raises TimedOut.
        """
        with self._accepting:
            while not self._closed:
                if _wait(self._poller, deadline) and (accepted := self._take()) is not None:
                    return accepted
                if time.monotonic() > deadline:
                    raise TimedOut(f"nobody connected to {self.address} in time")
        return None

    def _take(self) -> tuple[socket.socket, str] | None:
        """A connection, if there is one. For whoever has `_accepting`."""
        if self._closed:
            return None
        try:
            sock, peer = self._sock.accept()
            return sock, str(_address(self._family, peer))
        except BlockingIOError:
            return None
        except OSError as error:  # usually a connection that is gone already
            if error.errno in _NO_ROOM:
                time.sleep(0.05)  # it stays readable: do not spin until something is closed
            elif error.errno in (errno.EBADF, errno.ENOTSOCK) and not self._closed:
                raise Unreachable(f"cannot accept on {self.address}: {error.strerror}") from None
            return None

    def close(self) -> None:
        """Stops listening, and wakes a thread in `accept`.

        A socket that was handed down goes on listening for the process that has it too: the next one may be started
        for what is still in its queue, as socket activation does.
        """
        self._closed = True
        with contextlib.suppress(OSError):  # it was closed before
            self._ring.send(b"\0")
        with self._accepting:
            self._close()

    def disown(self) -> None:
        """In the child of a fork: closes the descriptor. The parent listens on."""
        self._closed = True
        self._close()

    def _close(self) -> None:
        for sock in (self._sock, self._bell, self._ring):
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


T = TypeVar("T")


class _Visitor(Generic[T]):
    """A connection whose opening is not complete."""

    __slots__ = ("data", "low", "peer", "sock", "steps", "until", "wanted")

    def __init__(self, sock: socket.socket, peer: str, steps: Generator[int, bytes | None, T]) -> None:
        self.sock = sock
        self.peer = peer
        self.steps = steps
        self.until = time.monotonic() + _AT_THE_DOOR
        self.wanted = next(steps)  # bytes
        self.data = b""  # of them
        self.low = 1  # bytes without which the poller is not told

    def tell_at(self, count: int) -> None:
        """Lets the poller wait for so many bytes, or the end: who sends them one by one costs no more than others."""
        if self.low != count:
            self.low = count
            with contextlib.suppress(OSError):  # some kinds of sockets do not have it
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


class Door(Generic[T]):
    """Where connections of a listener wait until each has sent its opening: one poller for all, and no thread for any.

    Args:
        listener: stays the caller's to close.
        opening: receives an opening: yields how many bytes it needs, is sent them, and returns what to make of them;
            or raises a TransportError. It must cost next to nothing.
        refused: is told the peer's address and that error. The connection is closed without a word.
        most: how many connections may wait. One more ends another.
    """

    def __init__(
        self,
        listener: Listener,
        opening: Callable[[], Generator[int, bytes | None, T]],
        refused: Callable[[str, TransportError], None],
        most: int,
    ) -> None:
        self._most = most
        self._listener = listener
        self._opening = opening
        self._refused = refused
        self._waiting: dict[int, _Visitor[T]] = {}  # by descriptor, the oldest first
        self._sources: defaultdict[str, dict[int, _Visitor[T]]] = defaultdict(dict)  # the same, by address without port
        self._open: deque[tuple[socket.socket, str, T]] = deque()
        self._selector = selectors.DefaultSelector()  # whose cost does not grow with those who say nothing
        self._selector.register(listener._sock, selectors.EVENT_READ)
        self._selector.register(listener._bell, selectors.EVENT_READ)

    def accept(self, deadline: float = math.inf) -> tuple[socket.socket, str, T] | None:
        """The next connection whose opening is complete, the peer's address, and what `opening` returned.

        None once the listener is closed. Raises TimedOut.
        """
        listener = self._listener
        with listener._accepting:
            while not listener._closed:
                if self._open:
                    return self._open.popleft()
                left = min(deadline, self._dismiss_late()) - time.monotonic()
                for key, _ in self._selector.select(min(max(left, 0.0), _LONGEST_POLL)):
                    if key.data is not None:
                        self._hear(key.data)
                    elif key.fileobj is listener._sock:
                        self._welcome()
                if not self._open and time.monotonic() > deadline:
                    raise TimedOut(f"nobody opened a link to {listener.address} in time")
        return None

    def close(self) -> None:
        """Hangs up on all who wait."""
        for visitor in list(self._waiting.values()):
            self._dismiss(visitor)
        for sock, _, _ in self._open:
            sock.close()
        self._selector.close()

    def _dismiss_late(self) -> float:
        """Hangs up on those whose time is over. When that of the next is."""
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            if oldest.until > time.monotonic():
                return oldest.until
            self._dismiss(oldest)
        return math.inf

    def _welcome(self) -> None:
        """Accepts those who are there; with too many, the oldest of the address with the most has to go."""
        visitors: list[_Visitor[T]] = []
        while len(visitors) < _AT_ONCE and (taken := self._listener._take()) is not None:
            taken[0].setblocking(False)
            visitors.append(_Visitor(*taken, self._opening()))
        for visitor in visitors:
            if self._complete(visitor):  # it came with the connection
                continue
            if len(self._waiting) >= self._most:
                most = max(self._sources.values(), key=len)
                self._dismiss(next(iter(most.values())))
            fd = visitor.sock.fileno()
            self._waiting[fd] = self._of(visitor)[fd] = visitor
            self._selector.register(visitor.sock, selectors.EVENT_READ, visitor)

    def _of(self, visitor: _Visitor[T]) -> dict[int, _Visitor[T]]:
        return self._sources[visitor.peer.rpartition(":")[0]]

    def _hear(self, visitor: _Visitor[T]) -> None:
        fd = visitor.sock.fileno()
        if fd >= 0 and self._complete(visitor):  # else it was dismissed meanwhile
            self._forget(visitor, fd)

    def _dismiss(self, visitor: _Visitor[T]) -> None:
        self._forget(visitor, visitor.sock.fileno())
        visitor.sock.close()

    def _forget(self, visitor: _Visitor[T], fd: int) -> None:
        self._selector.unregister(fd)
        del self._waiting[fd]
        of = self._of(visitor)
        del of[fd]
        if not of:
            del self._sources[visitor.peer.rpartition(":")[0]]

    def _complete(self, visitor: _Visitor[T]) -> bool:
        """Reads what has come. Whether nothing more is to come: the opening is complete, or was refused, or is cut."""
        sock = visitor.sock
        try:
            while True:
                part = sock.recv(visitor.wanted - len(visitor.data))
                if not part:
                    sock.close()
                    return True
                visitor.data += part
                if len(visitor.data) == visitor.wanted:
                    visitor.wanted, visitor.data = visitor.steps.send(visitor.data), b""
        except BlockingIOError:
            if visitor.data or visitor.low > 1:  # most need no second look
                visitor.tell_at(visitor.wanted - len(visitor.data))
            return False
        except StopIteration as complete:
            visitor.tell_at(1)
            self._open.append((sock, visitor.peer, complete.value))
        except TransportError as error:
            sock.close()
            self._refused(visitor.peer, error)
        except OSError:
            sock.close()
        return True


def hang_up(sock: socket.socket) -> None:
    """Ends a connection that another thread uses, and wakes that thread, which must still close the socket."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def has_left(sock: socket.socket) -> bool:
    """Whether the peer has closed the connection, perhaps with bytes left to read. False where no poll tells."""
    return bool(_poller(sock, _RDHUP).poll(0))


def connect(address: Address, timeout: float) -> socket.socket:
    """A connected socket. Raises Unreachable, TimedOut; the deadline does not cover the resolution of host names.

    The places that a name resolves to are tried in turn, each a moment after the one before it and beside it: one that
    is dead delays the others and costs them nothing else (RFC 8305, "Happy Eyeballs").
    """
    deadline = time.monotonic() + timeout
    places = _places(address)
    stagger = min(_STAGGER, timeout / (len(places) + 1))  # a short timeout is shared among all
    following = -math.inf  # when the next is tried, even if those before it may still answer
    last: OSError | None = None
    trying: dict[int, socket.socket] = {}
    try:
        while places or trying:
            if places and (not trying or time.monotonic() >= following):
                try:
                    sock = _connecting(*places.pop(0))
                except OSError as error:  # without vsock in the kernel, or without free descriptors
                    last = error
                    continue
                trying[sock.fileno()] = sock
                following = time.monotonic() + stagger
            first, *others = trying
            poller = _poller(first, select.POLLOUT)
            for other in others:
                poller.register(other, select.POLLOUT)
            _wait(poller, min(deadline, following) if places else deadline)
            for fd, _ in poller.poll(0):
                code = trying[fd].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                sock = trying.pop(fd)
                if not code:
                    sock.settimeout(timeout)
                    return sock
                sock.close()
                last = OSError(code, os.strerror(code))
            if trying and time.monotonic() >= deadline:
                raise TimedOut(f"{address} did not answer in {timeout} s")
    finally:
        for sock in trying.values():
            sock.close()
    raise Unreachable(f"{address}: {'the name has no address' if last is None else _reason(last)}")


def _connecting(family: int, sockaddr: Any) -> socket.socket:
    """A socket that is about to be connected. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(sockaddr)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def receive_all(sock: socket.socket, limit: int, timeout: float) -> bytes:
    """What a connection sends, up to its end; closes it. It is not authenticated: verify it.

    The timeout is in seconds. Raises TimedOut, Truncated; LimitError if it is more than `limit` bytes.
    """
    wire = Wire(sock)
    try:
        late = f"the sender did not finish in {timeout:g} s"
        data = wire.read_at_most(limit + 1, time.monotonic() + timeout, late)
    finally:
        wire.close()
    if len(data) > limit:
        raise LimitError(f"more than {limit} bytes")
    return data


class _Selecting:
    """`select.poll` by means of `selectors`, where it is missing: eventlet's monkey patch takes it away.

    It cannot tell that a peer has shut down its side.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: "socket.socket | int", events: int) -> None:
        wanted = (selectors.EVENT_READ if events & select.POLLIN else 0) | (
            selectors.EVENT_WRITE if events & select.POLLOUT else 0
        )
        if wanted:
            self._selector.register(fd, wanted)

    def poll(self, milliseconds: float | None = None) -> list[tuple[int, int]]:
        try:
            found = self._selector.select(None if milliseconds is None else milliseconds / 1000)
        except (OSError, ValueError):  # one is closed
            return [(key.fd, select.POLLNVAL) for key in self._selector.get_map().values()]
        return [(key.fd, select.POLLIN if events & selectors.EVENT_READ else select.POLLOUT) for key, events in found]


def _poller(sock: socket.socket | int, events: int) -> "select.poll | _Selecting":
    try:
        poller: select.poll | _Selecting = select.poll()
    except AttributeError:
        poller = _Selecting()
    poller.register(sock, events)
    return poller


def _wait(poller: "select.poll | _Selecting", deadline: float) -> bool:
    """False if the deadline passes before an event."""
    while True:
        left = deadline - time.monotonic()
        if poller.poll(None if left == math.inf else math.ceil(1000 * min(max(left, 0.0), _LONGEST_POLL))):
            return True
        if left <= 0:
            return False


def _places(address: Address) -> list[tuple[int, Any]]:
    """Family and socket address of each place that `address` resolves to."""
    if address.scheme == "vsock":
        if not hasattr(socket, "AF_VSOCK"):
            raise Unreachable(f"{address}: this system has no vsock")
        port = address.port or socket.VMADDR_PORT_ANY  # in vsock, 0 is a port like any other
        return [(socket.AF_VSOCK, (int(address.host), port))]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"{address}: {_reason(error)}") from None
    return [(family, sockaddr) for family, _, _, _, sockaddr in found]


def _bind(address: Address, backlog: int) -> socket.socket:
    places = _places(address)
    if not places:
        raise Unreachable(f"cannot listen on {address}: the name has no address")
    family, sockaddr = places[0]
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(sockaddr)
            sock.listen(backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        hint = _LISTENING.get(error.errno or 0, "")
        raise Unreachable(f"cannot listen on {address}: {_reason(error)}{hint}") from None
    return sock


def _adopt(fd: int) -> socket.socket:
    wanted = "wanted a listening stream socket of tcp or vsock"
    try:
        sock = socket.socket(fileno=fd)
    except (OSError, ValueError, OverflowError) as error:
        raise AddressError(f"descriptor {fd}: {_reason(error)}, {wanted}") from None
    kinds = (*_INTERNET, getattr(socket, "AF_VSOCK", None))
    listens = True
    with contextlib.suppress(OSError):  # macOS does not tell
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0
    if sock.family in kinds and sock.type == socket.SOCK_STREAM and listens:
        return sock
    sock.detach()  # not ours to close
    raise AddressError(f"descriptor {fd}: {wanted}")


def _address(family: int, sockaddr: Any) -> Address:
    scheme = "tcp" if family in _INTERNET else "vsock"
    return Address(scheme, str(sockaddr[0]), sockaddr[1])


def _lost(error: OSError) -> Truncated:
    return Truncated(f"the connection was lost: {_reason(error)}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
