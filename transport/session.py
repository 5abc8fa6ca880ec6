"""A session: what a link is once both ends have accepted each other's evidence. Bytes in, bytes out; no I/O.

Only MESSAGE carries application data; PING, CLOSE and ALERT are handled here. A PING is a sign of life: an end that
owes an answer sends one now and then (`liveness`), and whoever waits for it takes a long silence for death.
"""

import struct
import time
from collections.abc import Callable
from typing import NoReturn

from attest import AttestationResult, Binding, Evidence
from transport.errors import Alert, Closed, LimitError, PeerAlert, RecordError, TransportError, Truncated
from transport.records import MAX_MESSAGE, MAX_RECORDS, Message, Opener, Sealer, Type

MAX_AGE = 24 * 3600.0  # seconds; then a new link is needed, with fresh evidence
PING_INTERVAL = 5.0  # seconds between two PINGs of an end that owes an answer
SILENCE = 15.0  # seconds without a sign of life, while an answer is due, after which a peer counts as dead
_CLOSEST = PING_INTERVAL / 2  # seconds between two PINGs on average, at least: clocks differ, and some waits are short
_EARLY = 2  # so many PINGs may come before that

_COUNT = struct.Struct(">Q")


class Session:
    """An established link: seals messages, opens records, and keeps the rules of order.

    Sealing and opening are independent of each other, so one thread may do each.
    """

    def __init__(
        self,
        sealer: Sealer,
        opener: Opener,
        peer: AttestationResult,
        evidence: Evidence,
        binding: Binding,
        *,
        max_message: int = MAX_MESSAGE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.peer = peer  # what the peer's evidence established
        self.peer_evidence = evidence
        self.peer_binding = binding  # what that evidence is bound to
        self.peer_static_key = binding.static_key  # 32 bytes
        self.handshake_hash = binding.handshake_hash  # 32 bytes, h
        self._sealer = sealer
        self._opener = opener
        opener.limits = {Type.MESSAGE: max_message, Type.ALERT: 1, Type.CLOSE: _COUNT.size, Type.PING: 0}
        self._max_message = max_message
        self._clock = clock
        self._made = clock()
        self._pings = 0
        self._peer_closed = False

    @property
    def records_sent(self) -> int:
        return self._sealer.records

    @property
    def records_received(self) -> int:
        return self._opener.records

    @property
    def buffered(self) -> int:
        """How many bytes were fed and not opened yet."""
        return self._opener.buffered

    @property
    def partial(self) -> bool:
        """Whether a message has begun to arrive and is not whole."""
        return self._opener.partial

    @property
    def expired(self) -> bool:
        """Whether the link is too old to begin anything on: 24 h, or nearly as many records as it may carry."""
        most = MAX_RECORDS - MAX_RECORDS // 256
        return self._clock() - self._made > MAX_AGE or max(self.records_sent, self.records_received) > most

    def seal(self, message: bytes | memoryview, least: int = 0) -> bytes:
        """All records of one MESSAGE, padded as if it had at least `least` bytes.

        Raises:
            Closed: this end has been closed.
            LimitError: the message is too large, or the link too old.
        """
        if max(len(message), least) > self._max_message:
            raise LimitError(f"message: {len(message)} bytes, wanted at most {self._max_message}")
        if self._clock() - self._made > MAX_AGE:
            raise LimitError("the link is older than 24 h: make a new one, with fresh evidence")
        return self._sealer.seal(Type.MESSAGE, message, least)

    def ping(self) -> bytes:
        """A PING. Raises as `seal`."""
        return self._sealer.seal(Type.PING)

    def alert(self, code: Alert) -> bytes:
        """An ALERT. It ends this direction."""
        return self._last(Type.ALERT, bytes([code]))

    def close(self) -> bytes:
        """A CLOSE. It ends this direction."""
        return self._last(Type.CLOSE, _COUNT.pack(self._sealer.messages))

    def _last(self, kind: Type, body: bytes) -> bytes:
        records = self._sealer.seal(kind, body)
        self.stop_sending()
        return records

    def stop_sending(self) -> None:
        """Ends this direction: something of it was lost, or its last record was sealed."""
        self._sealer.discard()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes in pieces of any size; `next_message` opens them."""
        self._opener.feed(data)

    def next_message(self) -> bytes | None:
        """The next MESSAGE, or None if it needs more bytes.

        Raises:
            Closed: the peer ended its direction properly, and everything it sent has been returned.
            PeerAlert: it gave a reason instead.
            RecordError, LimitError: a record is not authentic, or not allowed. Nothing more comes.
        """
        while not self._peer_closed:
            message = self._opener.next()
            if message is None:
                return None
            if message.type == Type.MESSAGE:
                return message.body
            try:
                self._control(message)
            except TransportError:
                self._opener.discard()
                raise
        if self._opener.buffered:
            raise RecordError("bytes after CLOSE")
        raise Closed("the peer has closed the link")

    def eof(self) -> NoReturn:
        """Raises what the end of the connection means, once everything fed has been opened: Closed or Truncated."""
        if self._peer_closed and not self._opener.buffered:
            raise Closed("the peer has closed the link")
        where = "inside a message" if self.partial else "between messages"
        raise Truncated(f"the connection ended {where}, without a CLOSE")

    def discard(self) -> None:
        """Forgets the keys and all incomplete messages."""
        self.stop_sending()
        self._opener.discard()

    def disown(self) -> None:
        """In the child of a fork: forgets everything, without a word or a lock."""
        self.stop_sending()
        self._opener.disown()

    @property
    def foreign(self) -> Closed | None:
        """What to raise where this session is another process's; None where it is ours."""
        return self._sealer.foreign

    def _control(self, message: Message) -> None:
        if message.type == Type.PING:
            self._pings += 1
            # Counted since the link was made, because a stall may bunch them up.
            if self._pings > _EARLY + (self._clock() - self._made) / _CLOSEST:
                raise RecordError(f"PING {self._pings} came too soon, wanted at most one in {_CLOSEST} s")
        elif message.type == Type.ALERT:
            raise PeerAlert.from_body(message.body)
        else:
            if message.body != _COUNT.pack(self._opener.messages):
                raise RecordError("a CLOSE whose count differs from the number of records received")
            self._peer_closed = True
