"""The channel of a client, in the first stage: one request at a time, and the sequence that it is about."""

from typing import Any

from minigpt.errors import RequestRefused, StageError
from minigpt.protocol import messages
from minigpt.protocol.batches import Terms
from minigpt.protocol.messages import Cancel, Done, Generate, Reason
from minigpt.stage import generation
from minigpt.stage.conversation import Conversation
from minigpt.stage.places import Place
from minigpt.stage.sequence import Sequence
from transport.channel import Channel
from transport.errors import TimedOut

PATIENCE = 5.0  # seconds to wait for a place in a later stage that has refused one


class _Cancelled(Exception):
    """The client does not want the rest."""


class ClientConversation(Conversation):
    """Its sequence is dropped, here and in the stages after this one, as soon as the client is gone."""

    _asked = frozenset({Generate, messages.Status, messages.Reset, Cancel})
    _place: Place | None = None  # of the sequence, if there is one

    def _answer(self, channel: Channel, plain: Any) -> None:
        try:
            message = messages.decode(plain, self._asked, self._here, self._stage.model.config.n_positions)
        except RequestRefused as error:
            self._send(channel, messages.refusal(error))
            return
        match message:
            case Generate():
                self._generate(channel, message)
            case messages.Status():
                self._report(channel)
            case messages.Reset():
                self._forget()
                self._send(channel, Done(Reason.RESET))
            case Cancel():
                pass  # It crossed with the end of the request it cancels.

    def _generate(self, channel: Channel, request: Generate) -> None:
        try:
            reason = self._run(channel, request)
        except _Cancelled:
            reason = Reason.CANCELLED
        except RequestRefused as error:
            if error.stage != self._stage.index:
                self._forget()  # this stage has computed what a later one refused
                if error.reason == "draining":  # nothing can go on from what that stage has
                    self._stage.places.clear(0.0, lambda: None)
            self._send(channel, messages.refusal(error))
            return
        except StageError:
            self._forget()
            raise
        finally:
            if self._place is not None:
                self._place.rest()
        self._send(channel, Done(reason))

    def _run(self, channel: Channel, request: Generate, *, again: bool = False) -> Reason:
        """Runs a request to its end. One that a later stage has no place for waits once more. Raises _Cancelled."""
        stage, told = self._stage, False
        answers = stage.schedule.run(self._begun(channel, request), request, lambda: self._check_client(channel))
        if request.delivered and not again:
            stage.layers.meter.note_resumed()
        try:
            while True:
                answer = next(answers)
                told = True
                self._send(channel, answer)
        except StopIteration as end:
            return Reason(end.value)
        except RequestRefused as error:
            if error.reason != "busy" or again or told or request.start:
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
        who = self._stage.identity(channel, self.source)
        self._place = self._stage.places.take(who, size, lambda: self._check_client(channel))
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
