"""The channel of a client, in the first stage: one request at a time, and the sequence that it is about."""

import time
from typing import Any

from minigpt.errors import RequestRefused, StageError
from minigpt.protocol import messages
from minigpt.protocol.batches import Terms
from minigpt.protocol.messages import Cancel, Done, Generate, Message, Reason
from minigpt.stage import generation
from minigpt.stage.conversation import Conversation, State
from minigpt.stage.places import Place
from minigpt.stage.sequence import Sequence
from transport.channel import Channel
from transport.errors import Closed, TimedOut

PATIENCE = 5.0  # seconds to wait for a place in a later stage that has refused one
MOST = 0.01  # seconds that one of them counts for at most: its thread may have computed a pass for others
LOOK = 0.25  # seconds between two looks at a client that waits for its turn


class _Cancelled(Exception):
    """The client does not want the rest."""


class ClientConversation(Conversation):
    """Its sequence is dropped, here and in the stages after this one, as soon as the client is gone.

    A message is useful if something is computed for it, and told. The others are paced: each identity pays for its own.
    """

    _asked = frozenset({Generate, messages.Status, messages.Reset, Cancel})
    _place: Place | None = None  # of the sequence, if there is one
    _told = False  # whether the request under way was told anything

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._charged = 0.0  # time.thread_time() up to which everything is charged, or was useful

    def _serve(self, channel: Channel) -> None:
        self._charged = time.thread_time()  # its handshake was charged to its source
        super()._serve(channel)

    def _answer(self, channel: Channel, plain: Any) -> bool:
        if channel.gone():
            raise Closed("the client has left: nobody waits for what else it has sent")
        useful = self._answered(channel, plain)
        now = time.thread_time()
        if not useful:
            self.pace.spend(min(now - self._charged, MOST) * max(1, self._host.owing))
        self._charged = now
        return useful

    def _answered(self, channel: Channel, plain: Any) -> bool:
        """Answers a message. Whether that was useful work."""
        try:
            message = messages.decode(plain, self._asked, self._here, self._stage.model.config.n_positions)
        except RequestRefused as error:
            self._pause(channel)
            self._send(channel, messages.refusal(error))
            return False
        if isinstance(message, Generate):
            return self._generate(channel, message)
        self._pause(channel)
        match message:
            case messages.Status():
                self._report(channel)
            case messages.Reset():
                self._forget()
                self._send(channel, Done(Reason.RESET))
            case Cancel():
                pass  # It crossed with the end of the request it cancels.
        return False

    def _pause(self, channel: Channel) -> None:
        """Waits until this channel has its share for one more message that does nothing useful. Meanwhile it is idle:
        it may have to make room for others. Raises Closed if the client leaves."""
        if self.pace.delay() <= 0:
            return
        self._rest(useful=False)
        while (delay := self.pace.delay()) > 0 and not self._stage.stopping.wait(min(delay, LOOK)):
            if channel.gone():
                raise Closed("the client has left: nobody waits for its answer")
        self.state = State.WORKING

    def _generate(self, channel: Channel, request: Generate) -> bool:
        """Runs a request. Whether anything was told of it."""
        self._told = False
        reply: Message
        try:
            reply = Done(self._run(channel, request))
        except _Cancelled:
            reply = Done(Reason.CANCELLED)
        except RequestRefused as error:
            if error.stage != self._stage.index:
                self._forget()  # this stage has computed what a later one refused
                if error.reason == "draining":  # nothing can go on from what that stage has
                    self._stage.places.clear(0.0, lambda: None)
            reply = messages.refusal(error)
        except StageError:
            self._forget()
            raise
        finally:
            if self._place is not None:
                self._place.rest()
        self._send(channel, reply)
        if not self._told:
            self._pause(channel)
        return self._told

    def _run(self, channel: Channel, request: Generate, *, again: bool = False) -> Reason:
        """Runs a request to its end. One that a later stage has no place for waits once more. Raises _Cancelled."""
        stage = self._stage
        answers = stage.schedule.run(self._begun(channel, request), request, lambda: self._check_client(channel))
        if request.delivered and not again:
            stage.layers.meter.note_resumed()
        try:
            while True:
                answer = next(answers)
                self._told = True
                self._send(channel, answer)
        except StopIteration as end:
            return Reason(end.value)
        except RequestRefused as error:
            if error.reason != "busy" or again or self._told or request.start:
                raise
            self._forget()
        finally:
            answers.close()
        stage.places.clear(PATIENCE, lambda: self._check_client(channel))
        return self._run(channel, request, again=True)

    def _begun(self, channel: Channel, request: Generate) -> Sequence:
        """The channel's sequence, if the request can go on from it; otherwise a new one.

        Raises RequestRefused if it fits nowhere or asks for what cannot be had, _Cancelled if the client leaves the
        queue.
        """
        self._stage.places.refuse_if_draining()
        self._stage.schedule.look_at_link()
        model = self._stage.model
        known = self._place.sequence if self._place is not None else None
        generation.check(request, 0 if known is None or known.dead else known.cache.length, model.config)
        positions = min(request.start + len(request.ids) + request.max_tokens, model.config.n_positions)
        size = model.cache_bytes(positions)
        if self._place is not None:
            if self._place.resume(size) and known is not None and known.dead is None:
                return known
            self._forget()
            if request.start:
                text = "the positions before it were dropped meanwhile: others needed the room. Send all of them"
                raise RequestRefused(text, reason="gap", stage=0)
        assert self.who is not None, "whoever asks has a channel"
        self._place = self._stage.places.take(self.who, size, lambda: self._check_client(channel))
        sequence = Sequence(model.new_cache(), Terms(positions, request.sampling))
        self._place.sequence = sequence
        return sequence

    def _check_client(self, channel: Channel) -> None:
        """Is the client still there, and does it want to go on?"""
        if self._stage.stopping.is_set():
            raise self._stopped()
        if not channel.poll():
            return
        try:
            plain = channel.receive(0)
        except TimedOut:
            return  # what waits is not a whole message: a PING, or the beginning of one
        messages.decode(plain, {Cancel}, f"{self._here} while a request is running: wait for its end, or Cancel")
        raise _Cancelled

    def _forget(self) -> None:
        if self._place is not None:
            place, self._place = self._place, None
            place.give_back()
