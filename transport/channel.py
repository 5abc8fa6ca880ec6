"""A link over a connection: messages in, messages out, with deadlines.

One thread reads a channel; any thread may meanwhile send on it, close it or abort it. A deadline covers the whole
handshake, or a whole message: a peer that drips one byte a second gains nothing over one that is silent.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import socket
from typing import Any, Self

from transport import codec, link
from transport.address import Address
from transport.errors import Abandoned, Closed, DecodeError, LimitError, ProtocolError, Silent, TimedOut, TransportError
from transport.fork import own
from transport.records import MAX_MESSAGE, PROCESS_BUDGET, Budget
from transport.sockets import Listener, Wire, connect, gathered, hang_up, receive_all

__all__ = ["PROCESS_BUDGET", "Address", "Budget", "Channel", "Deadlines", "Listener", "hang_up", "receive_all"]

_SMALL_READ = 1 << 14  # bytes; a step of one token is 3 KB, and a large buffer costs 3 µs more to allocate
_LARGE_READ = 1 << 18  # bytes; once a message is known to be large
_DEAD = "its process has stopped, or its machine or the network is down"
_PARTING = 1.0  # seconds that a CLOSE or an ALERT may take to leave; or the rest of a PING
_OVERSLEPT = 1.0  # seconds; whoever wakes up so late was stopped itself, and the peer perhaps with it


@dataclass(frozen=True)
class Deadlines:
    """Seconds that a peer may take. Raises ValueError unless all are > 0."""

    connect: float = 10.0
    handshake: float = 10.0  # for the whole of it, including evidence
    message: float = 60.0  # for a whole message once it has begun, in either direction
    idle: float | None = None  # between two messages, in either direction; None for no limit

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"deadline {name}: got {value}, wanted seconds > 0")


DEFAULT_DEADLINES = Deadlines()


class Channel:
    """An established link: sends and receives messages, which are dicts of `codec`, or lists of bytes.

    Any failure in `receive` ends the channel, except the caller's own `timeout`. When `send` fails because the peer is
    gone, what it said before can still be received.
    """

    def __init__(
        self, wire: Wire, session: link.Session, deadlines: Deadlines, keys: frozenset[bytes] | None = None
    ) -> None:
        """Not for callers: `connect`, `initiate` and `accept` make channels."""
        self.peer = session.peer  # what the peer's evidence established
        self.peer_evidence = session.peer_evidence
        self.peer_binding = session.peer_binding
        self.peer_static_key = session.peer_static_key
        self._wire = wire
        self._session = session
        self._deadlines = deadlines
        self._keys = keys
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._ended = False  # by this end
        self._why: TransportError | None = None  # which error of `receive` ended it, for a thread that sends
        self._begun: float | None = None  # when the message under way began to arrive
        self.made = self._active = self.spoke = time.monotonic()  # `spoke`: when this end last sent a record
        self.seal_seconds = 0.0  # spent on encryption of messages
        self.open_seconds = 0.0  # and on decryption
        own(self)

    def disown(self) -> None:
        """In the child of a fork: nothing can be sent or received any more. The parent's link goes on."""
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._ended = True
        self._session.disown()

    @classmethod
    def connect(
        cls,
        address: Address,
        end: link.End,
        *,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        budget: Budget = PROCESS_BUDGET,
    ) -> Self:
        """Connects to `address` and establishes a link; `budget` is for what `Budget` counts.

        Raises:
            TransportError: Unreachable, TimedOut, or the handshake failed.
            attest.AttestationError: the peer's evidence is refused.
        """
        return cls.initiate(connect(address, deadlines.connect), end, deadlines=deadlines, budget=budget)

    @classmethod
    def initiate(
        cls, sock: socket, end: link.End, *, deadlines: Deadlines = DEFAULT_DEADLINES, budget: Budget = PROCESS_BUDGET
    ) -> Self:
        """Establishes a link over a connected stream socket, as the end that connected. Raises as `connect` does."""
        return cls._establish(sock, link.initiate(end, budget=budget), deadlines, end.keys)

    @classmethod
    def accept(
        cls,
        sock: socket,
        end: link.End,
        opened: link.Opening | None = None,
        *,
        deadlines: Deadlines = DEFAULT_DEADLINES,
        budget: Budget = PROCESS_BUDGET,
        max_message: int = MAX_MESSAGE,
    ) -> Self:
        """Establishes a link over an accepted stream socket, of which a `Door` may have read the opening.

        Messages have at most `max_message` bytes. Raises as `connect`.
        """
        steps = link.respond(end, opened, max_message=max_message, budget=budget)
        return cls._establish(sock, steps, deadlines, end.keys)

    @classmethod
    def _establish(cls, sock: socket, steps: link.Steps, deadlines: Deadlines, keys: frozenset[bytes] | None) -> Self:
        """Runs a handshake. The channel owns the socket, which is closed if the handshake fails."""
        wire = Wire(sock)
        deadline = time.monotonic() + deadlines.handshake
        try:
            wanted = next(steps)
            while True:
                reply = None
                try:
                    if isinstance(wanted, int):
                        reply = wire.read_exactly(wanted, deadline)
                    else:
                        wire.write(wanted, deadline)
                except TimedOut:
                    late = TimedOut(f"the peer did not finish the handshake in {deadlines.handshake:g} s")
                    wanted = steps.throw(late)
                except TransportError as error:
                    wanted = steps.throw(error)
                else:
                    wanted = steps.send(reply)
        except StopIteration as finished:
            return cls(wire, finished.value, deadlines, keys)
        except BaseException:
            wire.close()  # not abort: an ALERT may be on its way
            raise

    @property
    def expired(self) -> bool:
        """Whether the link is too old to begin anything new on it."""
        return self._session.expired

    # Bytes on the wire, including the handshake.
    @property
    def bytes_sent(self) -> int:
        return self._wire.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._wire.bytes_received

    @property
    def records_sent(self) -> int:
        return self._session.records_sent

    @property
    def records_received(self) -> int:
        return self._session.records_received

    def send(self, message: dict[str, Any] | Sequence[bytes | memoryview], least: int = 0) -> None:
        """Sends `message` whole.

        Args:
            message: plain values, as `codec` takes them.
            least: pad it as if it had at least this many bytes.

        Raises:
            TypeError, ValueError: it cannot be encoded.
            TransportError: Closed, LimitError; Silent or Truncated, and then nothing more can be sent; what `receive`
                ended the channel for.
        """
        body = codec.encode(message)
        with self._sending:
            if self._ended:
                raise self._reason()
            start = time.perf_counter()
            records = self._session.seal(body, least)
            self.seal_seconds += time.perf_counter() - start
            self._write(records, self._deadlines.message)
        self._active = self.spoke = time.monotonic()

    def ping(self) -> bool:
        """Sends a PING, a sign of life, and returns True; False if it would have to wait, or the link has ended.

        Any thread may call this at any time. It raises nothing.
        """
        if not self._sending.acquire(blocking=False):
            return False  # what is being sent is a sign of life too
        try:
            if self._ended or not self._wire.writable():
                return False
            self._write(self._session.ping(), _PARTING)
        except TransportError:  # whoever uses the link next is told
            return False
        finally:
            self._sending.release()
        self.spoke = time.monotonic()
        return True

    def _write(self, records: bytes, seconds: float) -> None:
        try:
            self._wire.write(records, time.monotonic() + seconds)
        except BaseException as error:
            self._session.stop_sending()  # half a record may have been sent: nothing can follow it
            if self._ended and isinstance(error, TransportError):
                raise self._reason() from None
            if isinstance(error, TimedOut):
                raise Silent(f"did not take what was sent to it in {seconds:g} s: {_DEAD}") from None
            raise

    def receive(
        self, timeout: float | None = None, *, asker: "Channel | None" = None, silence: float | None = None
    ) -> Any:
        """The next message.

        Args:
            timeout: seconds; 0 takes only what has arrived. A message that has begun survives it.
            asker: the channel of whoever wants the message.
            silence: seconds without a byte, not even of a PING, after which the peer counts as dead.

        Raises:
            TimedOut: no message was complete within `timeout`. The channel lives on.
            Silent: nothing came for `silence`, or the rest of a message took too long.
            Abandoned: the peer of `asker` left first. The channel lives on.
            Closed: the peer has closed its direction and everything it sent has been received, or this end is closed.
            TransportError: anything else; the channel is dead then.
        """
        if (foreign := self._session.foreign) is not None:  # what it took would be missing in its own process
            raise foreign
        start = time.monotonic()
        until = math.inf if timeout is None else start + timeout
        try:
            with self._receiving:
                message = self._receive(until, asker._wire if asker is not None else None, silence or math.inf)
        except Abandoned:
            raise
        except BaseException as error:
            if self._ended and isinstance(error, TransportError):
                raise self._closed() from None
            if isinstance(error, TransportError):
                self._why = _bare(error)
            if isinstance(error, ProtocolError | LimitError):
                alert = error.alert
                self._part(lambda: self._session.alert(alert))
            elif not isinstance(error, Closed):  # after a CLOSE this end may still have something to say
                self.abort()
            raise
        if message is None:
            waited = time.monotonic() - start
            raise TimedOut(f"no message was complete in {waited:.3g} s: allow more time, or see what the peer is at")
        self._active = time.monotonic()
        return message

    def _receive(self, until: float, asker: Wire | None, silence: float) -> Any:
        """The next message, or None once `until` has passed."""
        session, wire, drips = self._session, self._wire, 0
        quiet = time.monotonic() + silence  # then the peer counts as dead
        while not self._ended:
            start = time.perf_counter()
            body = session.next_message()
            self.open_seconds += time.perf_counter() - start
            if body is not None:
                self._begun = None
                if codec.is_parts(body):
                    return codec.decode_parts(body)
                message = codec.decode(body, self._keys)
                if type(message) is not dict:
                    raise DecodeError("message: wanted a map, or an array of byte strings")
                return message
            partial = session.partial
            limit = self._limit(partial)
            arrived = wire.wait(min(until, limit, quiet), asker)
            now = time.monotonic()
            if not arrived and quiet < min(until, limit):
                if now < quiet + _OVERSLEPT:
                    raise Silent(f"said nothing for {silence:g} s: {_DEAD}")
                quiet = now + silence
                continue
            if not arrived or now > limit:  # a drip is always readable
                if until <= limit:
                    return None
                if partial:
                    raise Silent(f"did not finish a message in {self._deadlines.message:g} s: {_DEAD}")
                raise TimedOut("the link was idle")
            data = wire.read(_LARGE_READ if partial else _SMALL_READ)
            if data == b"":
                session.eof()
            session.feed(data or b"")
            if data:
                quiet = now + silence
            if partial:
                drips = gathered(data or b"", drips)
        raise self._closed()

    def _limit(self, partial: bool) -> float:
        """When the wait for more bytes must end."""
        if not partial:
            self._begun = None
            return math.inf if self._deadlines.idle is None else self._active + self._deadlines.idle
        if self._begun is None:
            self._begun = time.monotonic()
        return self._begun + self._deadlines.message

    @property
    def idle(self) -> float:
        """Seconds since the last message in either direction."""
        return time.monotonic() - self._active

    def poll(self) -> bool:
        """Whether there are unread bytes, perhaps less than a message, or the peer is gone. Never blocks."""
        return self._session.buffered > 0 or self._wire.readable()

    def wait(self, timeout: float) -> bool:
        """Waits until `receive` has something to look at, perhaps less than a message; False after so many seconds."""
        with self._receiving:
            return self._session.buffered > 0 or self._wire.wait(time.monotonic() + timeout)

    def gone(self) -> bool:
        """Whether the peer has shut down its direction or the connection is dead, even if there are unread bytes."""
        return self._wire.gone()

    def deafen(self) -> None:
        """Stops receiving, and wakes the thread that waits for this peer or for its sake."""
        self._wire.deafen()

    def close(self) -> None:
        """Sends CLOSE and closes the connection. It is not an error if the peer is gone, or to call this twice."""
        self._part(self._session.close)

    def abort(self) -> None:
        """Closes the connection without a CLOSE: the peer gets Truncated."""
        self._end(self._wire.abort)

    def fileno(self) -> int:
        """The descriptor of the socket, -1 once it is closed."""
        return self._wire.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _part(self, last: Callable[[], bytes]) -> None:
        """Sends one last record if that is possible soon, and ends the channel."""
        finish = self._wire.abort
        if self._sending.acquire(timeout=_PARTING):  # a blocked sender must not block us
            try:
                with contextlib.suppress(TransportError):
                    self._wire.write(last(), time.monotonic() + _PARTING)
                    finish = self._wire.close
            finally:
                self._sending.release()
        self._end(finish)

    def _end(self, finish: Callable[[], None]) -> None:
        self._ended = True
        self._wire.shut()  # wakes threads in `send` or `receive`, so that they release the locks
        with self._sending, self._receiving:
            finish()
            self._session.discard()

    def _reason(self) -> TransportError:
        """Why nothing can be sent any more."""
        return self._closed() if self._why is None else _bare(self._why)

    def _closed(self) -> Closed:
        return self._session.foreign or Closed("this end of the link is closed")


def _bare(error: TransportError) -> TransportError:
    """The same error without where it was raised: those frames hold the message that was refused, and the channel."""
    kind = type(error)
    bare = kind.__new__(kind, *error.args)
    vars(bare).update(vars(error))
    return bare
