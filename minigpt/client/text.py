"""Text, on the client's side: a prompt becomes a request, and answers become tokens with text.

Stages know ids only. Stop strings and incomplete characters are handled here, by the program that has the prompt
anyway.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint.tokenizer import Tokenizer
from minigpt.engine.config import Config
from minigpt.errors import UsageError
from minigpt.protocol.messages import Answer, Generate, Likely, Reason, Scores, Span, Tokens, Wanted
from minigpt.protocol.request import Keywords, Options, check_top, ending

Prompt = str | Sequence[int] | NDArray[np.integer[Any]]


class Alternative(NamedTuple):
    """One of the most likely tokens at a position. `text` is that of its id alone, None without a tokenizer."""

    id: int
    text: str | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token, generated or scored.

    Attributes:
        id: in the model's vocabulary.
        text: what can be shown now: whole characters, and nothing that may become part of a stop string. So it may be
            empty, or complete earlier tokens. None where the checkpoint has no tokenizer.
        logprob: natural logarithm of the probability that the model gave it (before bias, penalties, temperature and
            filters), None unless requested.
        top: the most likely tokens at its position, best first, likewise; empty unless requested.
    """

    id: int
    text: str | None
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


class Generation(Iterator[Token]):
    """The tokens of one request, as they arrive.

    Attributes:
        reason: why it ended; None while it runs.
        seed: of the random draws, None for greedy decoding.
        prompt_tokens: how many ids the prompt had.
        times: seconds from the request to each token; the same for tokens that arrived together.
        spans: for each token, where its time went: in a pipeline the client's span, then stage by stage. Tokens that
            arrived together share their step's equally. Empty unless requested.
        interruptions: the faults that it survived, in order: after each it went on over another link.
    """

    def __init__(
        self,
        answers: Generator[Answer, None, Reason],
        request: Generate,
        config: Config,
        tokenizer: Tokenizer | None = None,
        stop: Sequence[str] = (),
        interruptions: Sequence[str] = (),
        cancelled: threading.Event | None = None,
    ) -> None:
        self.interruptions = interruptions
        self.reason: Reason | None = None
        self.seed = request.sampling.seed if request.sampling.temperature > 0 else None
        self.prompt_tokens = len(request.ids)
        self.times: list[float] = []
        self.spans: list[tuple[Span, ...]] = []
        self._answers = answers
        self._cancelled = cancelled or threading.Event()
        self._request = request
        self._n_positions = config.n_positions
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream() if tokenizer is not None else None
        self._stops = StopStrings(stop)
        self._began: float | None = None
        self._arrived: deque[tuple[int, float | None, Likely, float, tuple[Span, ...]]] = deque()

    def __next__(self) -> Token:
        if self._cancelled.is_set():
            self.close()
        if self.reason is not None:
            raise StopIteration
        if not self._arrived:
            self._receive()
        token, logprob, top, arrived, spans = self._arrived.popleft()
        self.times.append(arrived)
        self.spans.append(spans)
        text = None
        if self._decoder is not None:
            final = ending(self._request, self._n_positions, len(self.times), token) is not None
            text = self._stops.push(self._decoder.push(token))
            if final and not self._stops.found:
                text += self._stops.push(self._decoder.flush()) + self._stops.flush()
            if self._stops.found:
                self._answers.close()
                self.reason = Reason.STOP
        return Token(token, text, logprob, _named(top, self._tokenizer))

    def _receive(self) -> None:
        """Waits for the next answer. Raises StopIteration at the end."""
        self._began = self._began or time.perf_counter()
        try:
            answer = next(self._answers)
        except StopIteration as end:
            self.reason = end.value
            raise StopIteration from None
        if not isinstance(answer, Tokens):
            raise TypeError("this request is not for tokens")
        arrived, count = time.perf_counter() - self._began, len(answer.ids)
        spans = tuple(Span(*(part / count for part in span)) for span in answer.spans)
        tops = _grouped(answer.top, count)
        for token, logprob, top in zip(answer.ids, answer.logprobs or [None] * count, tops, strict=True):
            self._arrived.append((token, logprob, top, arrived, spans))

    def cancel(self) -> None:
        """Makes it end at the next token, or before the next attempt to go on after a death. Any thread may call this,
        also while another waits for a token."""
        self._cancelled.set()

    def close(self) -> None:
        """Ends the generation, in every stage. Only while no thread waits for a token."""
        self._answers.close()
        if self.reason is None:
            self.reason = Reason.CANCELLED


def perplexity(tokens: Sequence[Token]) -> float | None:
    """Of scored tokens: how many equally likely tokens would be as hard to guess. None if no token has a score."""
    found = [token.logprob for token in tokens if token.logprob is not None]
    return math.exp(min(-math.fsum(found) / len(found), 700.0)) if found else None  # beyond that no float is as large


def _grouped(top: Likely, count: int) -> list[Likely]:
    """The most likely ids for each of so many tokens."""
    each = len(top) // count
    return [top[place * each : (place + 1) * each] for place in range(count)]


def _named(top: Likely, tokenizer: Tokenizer | None) -> tuple[Alternative, ...]:
    def text(token: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode([token])

    return tuple(Alternative(token, text(token), logprob) for token, logprob in top)


class StopStrings:
    """Cuts text before the stop string that is complete first, and holds back what may be the beginning of one.

    >>> stops = StopStrings(["\\n\\n"])
    >>> stops.push("one\\n"), stops.push("two\\n"), stops.push("\\nthree"), stops.found
    ('one', '\\ntwo', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Adds text; returns what can be shown now."""
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            _, place = min(found)
            shown, self._held = self._held[:place], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def encode_prompt(
    prompt: Prompt, tokenizer: Tokenizer | None, config: Config, name: str = "the prompt"
) -> tuple[int, ...]:
    """The prompt's token ids; errors call it by its name. Raises UsageError if it is none, empty, too long, or has an
    id outside the vocabulary."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError(f"no tokenizer for this model was found: give {name} as token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{name} is not UTF-8 text") from None
        ids = tuple(tokenizer.encode(prompt))
        beyond = next((token for token in ids if token >= config.vocab_size), None)
        if beyond is not None:
            raise UsageError(
                f"{name} has the token {tokenizer.name(beyond)!r:.80}, id {beyond}, and this model's ids end at "
                f"{config.vocab_size - 1}: its tokenizer is larger than the model; leave that token out"
            )
    else:
        ids = _given_ids(prompt)
        if any(not 0 <= token < config.vocab_size for token in ids):
            raise UsageError(f"a token id of {name} is outside the vocabulary, 0 to {config.vocab_size - 1}")
    if not ids:
        raise UsageError(f"{name} is empty: give at least one token")
    if len(ids) > config.n_positions:
        raise UsageError(f"{name} has {len(ids)} tokens, and the model {config.n_positions} positions: shorten it")
    return ids


def _given_ids(prompt: object) -> tuple[int, ...]:
    """A list, tuple or array of integers, as it is: nothing is rounded or parsed, and bytes are not taken for ids."""
    listed = prompt.tolist() if hasattr(prompt, "tolist") and not isinstance(prompt, memoryview) else prompt
    if not isinstance(listed, Sequence) or isinstance(listed, bytes | bytearray | memoryview):
        raise UsageError(f"the prompt is of type {type(prompt).__name__}, wanted a string, or a list of token ids")
    for token in listed:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise UsageError(f"a token id of the prompt is of type {type(token).__name__}, wanted a whole number")
    return tuple(map(int, listed))


def ids_in(text: str) -> list[int]:
    """The token ids written in `text`, for models without a tokenizer. Raises UsageError for anything else.

    >>> ids_in("464 3139")
    [464, 3139]
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise UsageError(
            'no tokenizer for this model was found, so the text must be token ids, such as "464 3139"; '
            "or name a folder or hub id that has one, with --model"
        )
    return [int(word) for word in words]


def tokens_of(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[Token]:
    """A text's tokens, whose texts together are its own."""
    if tokenizer is None or not ids:
        return [Token(token, None) for token in ids]
    stream = tokenizer.stream()
    *texts, last = [stream.push(token) for token in ids]
    return [Token(token, text) for token, text in zip(ids, [*texts, last + stream.flush()], strict=True)]


def make_request(prompt: Prompt, tokenizer: Tokenizer | None, config: Config, options: Options) -> Generate:
    """The request for a prompt. Raises UsageError for a prompt or an option that makes none."""
    request = options.request(encode_prompt(prompt, tokenizer, config), config)
    if options.stop and tokenizer is None:
        raise UsageError("stop strings need a tokenizer, and this checkpoint has none")
    return request


class TextModel(ABC):
    """What continues a prompt: a pipeline, or a model in this process.

    Attributes:
        config: the model's.
        tokenizer: None where there is none for this model: prompts are then token ids.
    """

    config: Config
    tokenizer: Tokenizer | None

    @abstractmethod
    def _answers(
        self, request: Generate, interruptions: list[str], cancelled: threading.Event
    ) -> Generator[Answer, None, Reason]:
        """Answers to a request, and why it ended.

        Args:
            interruptions: each fault that the request survives is added to these.
            cancelled: once it is set, nothing is asked again.
        """

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        draft: int | None = None,
        spans: bool = False,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        top_logprobs: int = 0,
    ) -> Generation:
        """Generates tokens, to be iterated over. Dropping or closing it ends it, in every stage.

        Args:
            prompt: text, or token ids. The keywords are those of `minigpt.protocol.request.Options`.

        Raises, then or while iterating:
            UsageError: the arguments make no request.
            RequestRefused: a stage refuses it, and says why.
            StageError: a stage failed, cannot be reached, or timed out.
        """
        options = Options(
            max_tokens, temperature, top_k, top_p, seed, stop, logprobs, draft, spans, min_p, repetition_penalty,
            presence_penalty, frequency_penalty, logit_bias, top_logprobs,
        )  # fmt: skip
        request = make_request(prompt, self.tokenizer, self.config, options)
        interruptions: list[str] = []
        cancelled = threading.Event()
        answers = self._answers(request, interruptions, cancelled)
        return Generation(answers, request, self.config, self.tokenizer, stop, interruptions, cancelled)

    def score(self, prompt: Prompt, top: int = 0) -> list[Token]:
        """How likely the model finds each token of a text, after those before it; the first one's `logprob` is None.

        Args:
            prompt: text, or token ids.
            top: of how many of the most likely tokens to tell the log-probabilities, 0 to 20.

        Raises as `generate`.
        """
        check_top("top", top)
        ids = encode_prompt(prompt, self.tokenizer, self.config, "the text")
        found: list[tuple[float | None, Likely]] = [(None, ())]
        if len(ids) > 1:
            request = Generate(start=0, ids=ids, max_tokens=1, wanted=Wanted.SCORES, top=top)
            for answer in self._answers(request, [], threading.Event()):
                assert isinstance(answer, Scores), "nothing else answers this"
                del found[answer.position :]  # over another link they come again
                found += zip(answer.logprobs, _grouped(answer.top, len(answer.logprobs)), strict=True)
        return [
            replace(token, logprob=logprob, top=_named(likely, self.tokenizer))
            for token, (logprob, likely) in zip(tokens_of(ids, self.tokenizer), found, strict=True)
        ]

    async def agenerate(self, prompt: Prompt, **options: Unpack[Keywords]) -> AsyncGenerator[Token]:
        """As `generate`, for `async for`: each wait for a token is in a thread of its own, and blocks no event loop."""
        import asyncio  # 40 ms, for those who use it

        generation = self.generate(prompt, **options)
        waiting: asyncio.Future[Token | None] | None = None

        async def close() -> None:
            generation.cancel()
            if waiting is not None:  # a thread may still wait for a token, and only it may touch the generation then
                await asyncio.wait([waiting])
                waiting.exception()  # noticed: whoever waited for it was told, or has gone
            await asyncio.to_thread(generation.close)

        try:
            while True:
                waiting = asyncio.ensure_future(asyncio.to_thread(next, generation, None))
                token = await asyncio.shield(waiting)
                if token is None:
                    return
                yield token
        finally:
            await asyncio.shield(close())
