"""Tokens become OpenAI's JSON: whole, or as server-sent events."""

import codecs
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.datastructures import State

from minigpt.client.text import Token, tokens_of
from minigpt.protocol.messages import Reason
from minigpt.protocol.request import Keywords, seed_of
from minigpt.serve.schema import MAX_TOLD, Chat, Completion, Problem, problem
from minigpt.serve.service import Piece, Service

_FINISH = {Reason.LENGTH: "length", Reason.CONTEXT: "length", Reason.END: "stop", Reason.STOP: "stop"}


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the answer with this index: one token, or the end."""

    index: int
    text: str = ""
    logprobs: dict[str, Any] | None = None
    finish: str | None = None
    resumed: int = 0  # how often, with the end
    spans: list[dict[str, float]] | None = None


class Answer:
    """All answers to one request, one after the other.

    Args:
        prompts: their ids.
        stop: where to end, beside what the body says.
        state: of the HTTP request; tokens are counted there for the log.
    """

    def __init__(
        self,
        service: Service,
        body: Completion | Chat,
        prompts: list[tuple[int, ...]],
        state: State,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        self.service = service
        self.body = body
        self.chat = isinstance(body, Chat)
        self._prompts = prompts
        self._began = time.perf_counter()
        self._state = state
        state.prompt_tokens, state.completion_tokens = sum(map(len, prompts)), 0
        service.metrics.prompt_tokens.inc(state.prompt_tokens)
        self._options: Keywords = {
            "max_tokens": max_tokens, "temperature": body.temperature, "top_p": body.top_p, "top_k": max(0, body.top_k),
            "stop": [*body.stops, *stop], "logprobs": body.logprobs is not None and body.logprobs is not False,
            "min_p": body.min_p, "repetition_penalty": body.repetition_penalty, "logit_bias": body.logit_bias,
            "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
            "top_logprobs": body.top,
        }  # fmt: skip
        self._echo = isinstance(body, Completion) and body.echo
        self._check(max_tokens)
        kind = ("chatcmpl", "chat.completion") if self.chat else ("cmpl", "text_completion")
        self._id, self._object = f"{kind[0]}-{secrets.token_hex(12)}", kind[1]
        self._created = int(time.time())
        self.seeds: list[int] = []

    def _check(self, max_tokens: int) -> None:
        """Raises Problem for what the pipeline would refuse later, perhaps after a first part, and for too long an
        answer."""
        biased = max(self.body.logit_bias, default=0)
        if biased >= (size := self.service.config.vocab_size):
            text = f"logit_bias has the id {biased}, wanted one of the model's, 0 to {size - 1}"
            raise Problem(400, text, param="logit_bias")
        if not self._options["logprobs"]:
            return
        most = min(max_tokens, self.service.config.n_positions)
        tokens = sum((len(ids) if self._echo else 0) + most for ids in self._prompts) * self.body.n
        if (told := tokens * (1 + self.body.top)) > MAX_TOLD:
            text = f"logprobs: got {told} numbers to tell, wanted at most {MAX_TOLD} in an answer: ask for fewer tokens"
            raise Problem(400, text, param="logprobs")

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self._state.prompt_tokens, self._state.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def parts(self) -> AsyncGenerator[Part]:
        """What comes, token by token. Closing this cancels the rest."""
        for place, ids in enumerate(self._prompts):
            seed = secrets.randbits(32) if self.body.seed is None else self.body.seed % 2**64
            scored: list[Token] = []
            for n in range(self.body.n):
                self.seeds.append(seed_of(seed, n))
                index = place * self.body.n + n
                names = _Names(self.service, self.body)
                if self._echo:
                    scored = scored or await self._scored(ids)
                    yield await self._echoed(index, scored, names)
                if self._options["max_tokens"] == 0:
                    yield Part(index, logprobs=names.none(), finish="length")
                    continue
                options: Keywords = {**self._options, "seed": self.seeds[-1]}
                async with aclosing(self.service.generate(ids, options)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Piece):
                            yield self._part(index, piece, names)
                        else:
                            finish = _FINISH[piece.reason]
                            yield Part(index, logprobs=names.none(), finish=finish, resumed=piece.resumed)

    async def _scored(self, ids: tuple[int, ...]) -> list[Token]:
        """A prompt's tokens; with what the model makes of them, if that is asked for."""
        if self._options["logprobs"]:
            return await self.service.score(ids, self.body.top)
        return await self.service.work(partial(tokens_of, ids, self.service.tokenizer))

    async def _echoed(self, index: int, tokens: Sequence[Token], names: "_Names") -> Part:
        """A prompt as the beginning of its answer."""
        text = "".join(_text(token) for token in tokens)
        logprobs = await self.service.work(partial(names.logprobs, tokens)) if self._options["logprobs"] else None
        names.end()
        return Part(index, text, logprobs)

    def _part(self, index: int, piece: Piece, names: "_Names") -> Part:
        now, metrics = time.perf_counter(), self.service.metrics
        (metrics.first if self._state.completion_tokens == 0 else metrics.between).observe(now - self._began)
        self._began = now
        self._state.completion_tokens += 1
        metrics.tokens.inc()
        token = piece.token
        return Part(
            index,
            _text(token),
            names.logprobs([token]) if token.logprob is not None else None,
            spans=[span._asdict() for span in piece.spans],
        )

    async def whole(self) -> dict[str, Any]:
        """The one object of an answer that is not streamed."""
        texts: dict[int, list[str]] = {}
        logprobs: dict[int, dict[str, Any] | None] = {}
        finish: dict[int, str | None] = {}
        resumed: dict[int, int] = {}
        async with aclosing(self.parts()) as parts:
            async for part in parts:
                texts.setdefault(part.index, []).append(part.text)
                logprobs[part.index] = _joined(logprobs.get(part.index), part.logprobs)
                finish[part.index] = part.finish
                resumed[part.index] = part.resumed
        choices = [self._choice(i, "".join(text), logprobs[i], finish[i]) for i, text in texts.items()]
        if self.body.minigpt is not None:
            choices = [
                choice | {"minigpt": {"seed": self.seeds[choice["index"]], "resumed": resumed[choice["index"]]}}
                for choice in choices
            ]
        return self._around(choices) | {"usage": self.usage}

    async def events(self, parts: AsyncIterator[Part], first: Part) -> AsyncGenerator[str]:
        """Server-sent events, of a first part and the others. An error after the first is the last event."""
        usage = self.body.stream_options.include_usage
        begun: set[int] = set()
        try:
            async for part in _chain(first, parts):
                more = {"minigpt": self._extension(part)} if self.body.minigpt is not None else {}
                if not (part.text or part.finish or part.logprobs or more):
                    continue
                if self.chat and part.index not in begun:
                    yield self._event([self._choice(part.index, "", None, None, role="assistant")], usage)
                begun.add(part.index)
                choice = self._choice(part.index, part.text, part.logprobs, part.finish, streamed=True)
                yield self._event([choice], usage, **more)
            if usage:
                yield _event(self._around([], streamed=True) | {"usage": self.usage})
        except Exception as error:
            told = problem(error)
            self._state.outcome = told.status
            yield _event(told.body)
        yield "data: [DONE]\n\n"

    def _extension(self, part: Part) -> dict[str, Any]:
        assert self.body.minigpt is not None
        if part.finish is not None:
            return {"seed": self.seeds[-1], "resumed": part.resumed}
        return {"spans": [part.spans]} if self.body.minigpt.spans else {}

    def _event(self, choices: list[dict[str, Any]], usage: bool, **more: Any) -> str:
        return _event(self._around(choices, streamed=True) | ({"usage": None} if usage else {}) | more)

    def _around(self, choices: list[dict[str, Any]], *, streamed: bool = False) -> dict[str, Any]:
        kind = self._object + (".chunk" if self.chat and streamed else "")
        model = self.service.name
        return {"id": self._id, "object": kind, "created": self._created, "model": model, "choices": choices}

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish: str | None,
        *,
        streamed: bool = False,
        role: str | None = None,
    ) -> dict[str, Any]:
        around = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        if not self.chat:
            return {"text": text, **around}
        if role is not None:
            return {"delta": {"role": role, "content": text}, **around}
        if streamed:
            return {"delta": {"content": text} if finish is None else {}, **around}
        return {"message": {"role": "assistant", "content": text, "refusal": None}, **around}


class _Names:
    """The tokens of one answer as OpenAI names them, and where each begins in the text, in characters."""

    def __init__(self, service: Service, body: Completion | Chat) -> None:
        self._tokenizer, self._name = service.tokenizer, service.token_name
        self._chat = isinstance(body, Chat)
        self._told = body.logprobs is not None and body.logprobs is not False
        self._top = body.top
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def none(self) -> dict[str, Any] | None:
        """What goes with an end: no token, if tokens are told at all."""
        return self.logprobs([]) if self._told else None

    def end(self) -> None:
        """What follows is a text of its own: it completes no character of what came before."""
        self._offset += len(self._decoder.decode(b"", final=True))

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """OpenAI's logprobs object. A prompt's first token has none: null. `top_logprobs` is null without any, and has
        the token itself beside the most likely ones."""
        if self._chat:
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
        offsets, names = [], []
        for token in tokens:
            offsets.append(self._offset)
            names.append(self._name(token.id))
            data = f"{token.id} ".encode() if self._tokenizer is None else self._tokenizer.bytes(token.id)
            self._offset += len(self._decoder.decode(data))
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likely(token) for token in tokens] if self._top else None,
            "text_offset": offsets,
        }

    def _likely(self, token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        return {self._name(each.id): each.logprob for each in token.top} | {self._name(token.id): token.logprob}

    def _chat_token(self, token: Token) -> dict[str, Any]:
        likely = [self._chat_name(each.id, each.logprob) for each in token.top]
        return self._chat_name(token.id, token.logprob) | {"top_logprobs": likely}

    def _chat_name(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = None if self._tokenizer is None else list(self._tokenizer.bytes(token))
        return {"token": self._name(token), "logprob": logprob, "bytes": data}


def _text(token: Token) -> str:
    return f"{token.id} " if token.text is None else token.text


def _joined(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two logprobs objects, one after the other: their lists joined."""
    if one is None or other is None:
        return one or other
    return {name: value + other[name] if isinstance(value, list) else value for name, value in one.items()}


async def _chain(first: Part, rest: AsyncIterator[Part]) -> AsyncGenerator[Part]:
    yield first
    async for part in rest:
        yield part


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
