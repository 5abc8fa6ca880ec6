"""One channel of a stage, whoever is at its other end: its states, its errors, and `status`.

    opening ──handshake──► idle ──message──► working ──answer──► idle
       └──────────────┬─────┴──────────────────┘
                      ▼ end of the channel, for whatever reason
                   ending

What is asked of the first stage is in clients.py, and what one stage asks of the next in upstream.py.
"""

import enum
import logging
import time
import traceback
from contextlib import suppress
from typing import Any, Protocol

from attest import AttestationError
from minigpt.errors import (
    INSIDE,
    ManifestError,
    MiniGPTError,
    StageError,
    UnreachableStage,
)
from minigpt.protocol import links, messages
from minigpt.protocol.messages import Message, StageReport
from minigpt.stage.evidence import Ticket
from minigpt.stage.newcomers import Pace, source_of
from minigpt.stage.places import Identity
from minigpt.stage.stage import Stage
from transport.channel import Channel, hang_up
from transport.errors import Abandoned, Closed, TransportError
from transport.link import Opening
from transport.liveness import PINGER

log = logging.getLogger("minigpt.stage")

USELESS = 0.1  # of one core, spent on messages that do no useful work; each identity that owes has as much as any other


class State(enum.Enum):
    OPENING = enum.auto()  # the handshake is under way
    IDLE = enum.auto()  # nothing is asked
    WORKING = enum.auto()  # something is
    ENDING = enum.auto()


class Host(Protocol):
    """What a conversation asks of the server that accepted it."""

    @property
    def owing(self) -> int: ...
    def accept(self, conversation: "Conversation") -> Channel: ...
    def seat(self, conversation: "Conversation", who: Identity) -> None: ...
    def forget(self, number: int) -> None: ...
    def report(self) -> StageReport: ...


class Conversation:
    """One channel of a stage. Its own thread alone changes its state.

    Attributes:
        since: time.monotonic() when its state changed; while it is idle, when it last did useful work, or was opened.
        useful: whether it ever did.
        who: its peer, once there is a channel for it; until then it is a handshake.
        pace: of messages that do no useful work; shared by all channels of `who`.
    """

    def __init__(
        self, stage: Stage, number: int, peer: str, sock: Any, host: Host, opening: Opening | None = None
    ) -> None:
        self.number = number
        self.source = source_of(peer)
        self.state, self.since = State.OPENING, time.monotonic()
        self.useful = False
        self.who: Identity | None = None
        self.pace = Pace(USELESS)
        self._stage = stage
        self._host = host
        self._name = f"channel {number} ({peer})"
        self._here = f"stage {stage.index}"
        self.sock = sock
        self.opening = opening  # what the peer has said so far
        self.ticket: Ticket | None = None  # while it shakes hands
        self._channel: Channel | None = None

    def run(self) -> None:
        """Serves the channel until either side ends it. Raises nothing: this is a thread's first function."""
        try:
            channel = self._channel = self._host.accept(self)
            log.info("%s: open", self._name)
            self._serve(channel)
        except (Closed, Abandoned):
            log.info("%s: closed", self._name)
        except (TransportError, AttestationError, MiniGPTError) as error:
            log.warning("%s: %s: %s", self._name, type(error).__name__, error)
        except Exception as error:  # of one channel: the others live on. Its text may hold what the peer sent
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: ended by %s\n%s", self._name, type(error).__name__, where)
            if self._channel is not None:
                with suppress(TransportError):
                    self._fail(self._channel, StageError(f"{self._here} {INSIDE}"))
        finally:
            self._end()

    @property
    def waits(self) -> bool:
        """Whether it has done its part of a handshake so far, and waits for this stage's evidence."""
        return self.ticket is not None and self.ticket.waits

    def _enter(self, state: State) -> None:
        self.state, self.since = state, time.monotonic()

    def _serve(self, channel: Channel) -> None:
        try:
            self._host.seat(self, self._stage.identity(channel, self.source))
            self._enter(State.IDLE)
            while not self._stage.stopping.is_set():
                if self._stage.places.draining and self._rests():
                    return
                self._turn(channel)
            raise self._stopped()
        except Abandoned:
            if self._stage.stopping.is_set():
                self._fail(channel, self._stopped())
            raise
        except TransportError:
            raise
        except StageError as error:
            log.warning("%s: %s", self._name, error)
            self._fail(channel, error)
        except ManifestError as error:  # it has expired
            self._fail(channel, StageError(f"{self._here}: {error}"))
            raise

    def _turn(self, channel: Channel) -> None:
        """Receives a message and answers it. Nothing of it is left then: a channel that is idle holds no request."""
        plain = channel.receive(self._stage.limits.idle)
        self._rested = self.since
        self._enter(State.WORKING)
        with PINGER.due(channel):
            useful = self._answer(channel, plain)
        self._rest(useful)

    def _rest(self, useful: bool) -> None:
        """It is idle again. Whoever only asks for what is no work stays as idle as before."""
        self.useful |= useful
        self.since = time.monotonic() if useful else self._rested
        self.state = State.IDLE

    def _answer(self, channel: Channel, plain: Any) -> bool:
        """Answers what the peer has sent. Whether that was useful work: something was computed, and told."""
        raise AssertionError("the two kinds of conversations say how")

    def _report(self, channel: Channel) -> None:
        """Answers a Status. A client who is no operator is told nothing that the others cause."""

        def check() -> None:
            if channel.gone():
                raise Closed("the client has left: nobody waits for its answer")

        reports = (self._host.report(), *self._stage.below.reports(check))
        if self._stage.index == 0 and not self._stage.manifest.operates(channel.peer_static_key):
            reports = tuple(map(messages.for_any_client, reports))
        self._send(channel, messages.Report(reports))

    # The end.

    def _rests(self) -> bool:
        """Whether a channel on which nothing is asked can be closed without harm to an answer."""
        return True

    def drained(self) -> bool:
        """Called by another thread, while the process drains: closes the channel if no answer needs it. Whether none
        does; a handshake that is under way needs nothing."""
        if self.state is State.IDLE and self._rests():
            assert self._channel is not None, "whoever is idle has shaken hands"
            self._channel.close()
            return True
        return self.state in (State.OPENING, State.ENDING)

    def stop(self) -> None:
        """Called by another thread: ends the channel now if it is idle, and wakes it up otherwise."""
        channel = self._channel
        if channel is None:
            hang_up(self.sock)
        elif self.state is State.IDLE:
            channel.close()
        else:
            channel.deafen()

    def turn_out(self) -> None:
        """Called by another thread: ends the channel, to make room."""
        log.warning("%s: ended for a newcomer", self._name)
        hang_up(self.sock)

    def _stopped(self) -> StageError:
        return UnreachableStage(f"{self._here} is stopping", stage=self._stage.index)

    def _fail(self, channel: Channel, error: StageError) -> None:
        """Tells the peer what failed, and in which stage; the channel ends with it."""
        self._send(channel, links.failure(error, self._stage.index))

    def _send(self, channel: Channel, message: Message) -> None:
        channel.send(messages.encode(message))

    def _forget(self) -> None:
        """Drops the channel's sequences, here and in the stages after this one."""

    def _end(self) -> None:
        self._enter(State.ENDING)
        try:
            self._forget()
        finally:
            (self._channel or self.sock).close()
            self._host.forget(self.number)
