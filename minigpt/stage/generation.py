"""The one loop that turns a prompt into tokens: it feeds the prompt in chunks, then the tokens back, until it ends.

`generation` is a coroutine. It yields each step that it wants computed, is sent the step's answer, and tells tokens on
the way; `Schedule` computes the steps of many such loops together. It runs in the first stage of a pipeline, or in
process.

Letters: T new positions.
"""

from collections.abc import Callable, Generator
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.engine import drafting
from minigpt.engine.config import Config
from minigpt.engine.drafting import Lookup
from minigpt.errors import RequestRefused
from minigpt.protocol.batches import NONE_GIVEN, Given
from minigpt.protocol.messages import CHUNK, SHARED_CHUNK, Answer, Generate, Logits, Reason, Scores, Tokens, Wanted
from minigpt.protocol.request import ending

# If more positions than this were computed in a batch, they are recomputed one by one as soon as nothing is guessed. A
# wrong guess leaves one or two; without this, a near tie much later would go back to all of them.
FEW = 2


class Step(NamedTuple):
    """New positions of a sequence, and what is wanted of them."""

    start: int  # position of the first row; a smaller one than the sequence's length rewinds it
    ids: NDArray[np.int64]  # (T,)
    wanted: Wanted
    given: Given = NONE_GIVEN  # what the last stage needs to answer it


Steps = Generator[Step, Answer | None, Reason]


def check(request: Generate, known: int, config: Config) -> None:
    """Raises RequestRefused for no ids, a gap after the `known` positions, too many of them, an unknown id, or what
    needs ids that are not there."""
    start, ids = request.start, request.ids
    end, most = start + len(ids), config.n_positions
    if not ids:
        raise _refused("bad-request", "no token ids: a sequence needs at least one to go on from")
    if start > known:
        raise _refused("gap", f"start is {start}, but {known} positions are known: send those between first")
    if end > most:
        raise _refused("too-long", f"{end} positions, and the model has {most}: shorten the prompt")
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise _refused("bad-token", f"a token id is outside the vocabulary, 0 to {config.vocab_size - 1}")
    if request.sampling.logit_bias and request.sampling.logit_bias[-1][0] >= config.vocab_size:  # they rise
        raise _refused("bad-token", f"logit_bias has an id outside the vocabulary, 0 to {config.vocab_size - 1}")
    if request.wanted is Wanted.SCORES and len(ids) == 1:
        raise _refused("bad-request", "one token id: scores need two, because the first has none")
    if request.sampling.repetition_penalty != 1 and start:
        raise _refused("bad-request", f"start is {start}: a repetition_penalty needs the whole prompt, from 0 on")


def _refused(reason: str, text: str) -> RequestRefused:
    return RequestRefused(text, reason=reason, stage=0)


def generation(
    request: Generate, config: Config, tell: Callable[[Answer], None], alone: Callable[[], bool] = lambda: True
) -> Steps:
    """The steps of a request that `check` has passed. Returns why it ended.

    Args:
        tell: is given each answer of one token, or of several that were drafted.
        alone: whether no other sequence waits for tokens now.
    """
    if request.wanted is Wanted.SCORES:
        return (yield from _scoring(request, tell, alone))
    start, ids = request.start, np.asarray(request.ids, np.int64)
    fed = start + len(ids)
    while len(ids) > (size := CHUNK if alone() else SHARED_CHUNK):
        yield Step(start, ids[:size], Wanted.NOTHING)
        start, ids = start + size, ids[size:]
    answer = yield Step(start, ids, request.wanted, given(request, request.ids))
    assert answer is not None, "a step that wants an answer has one"
    tell(answer)
    if isinstance(answer, Logits):
        return Reason.LOGITS
    assert isinstance(answer, Tokens), "a step that wants a token is answered with one"
    produced, reason = 1, ending(request, config.n_positions, 1, answer.ids[0])
    decoding = Decoding(request, answer.ids[0], alone)
    while reason is None:
        last = fed + produced - 1  # position of the last token
        answer = yield from decoding.step(min(request.max_tokens - produced, config.n_positions - last))
        for told, token in enumerate(answer.ids, 1):
            reason = ending(request, config.n_positions, produced + told, token)
            if reason is not None:
                answer = first(answer, told)  # there is nothing after the end, whatever was drafted
                break
        produced += len(answer.ids)
        tell(answer)
    return reason


def _scoring(request: Generate, tell: Callable[[Answer], None], alone: Callable[[], bool]) -> Steps:
    """The steps that score all of a request's ids but the first."""
    start, targets = request.start, request.ids[1:]
    ids = np.asarray(request.ids[:-1], np.int64)
    while targets:
        size = CHUNK if alone() else SHARED_CHUNK
        answer = yield Step(start, ids[:size], Wanted.SCORES, Given(targets[:size]))
        assert isinstance(answer, Scores), "a step that wants scores is answered with them"
        tell(answer)
        start, ids, targets = start + size, ids[size:], targets[size:]
    return Reason.SCORES


def given(request: Generate, ids: Many[int]) -> Given:
    """What the last stage must know of the ids so far, the prompt and what was generated since, to draw the next."""
    sampling = request.sampling
    if not sampling.penalises or request.wanted is not Wanted.TOKEN:
        return NONE_GIVEN
    prompt = len(request.ids) - request.delivered
    others = set(ids[:prompt]).difference(ids[prompt:]) if sampling.repetition_penalty != 1 else ()
    return Given(tuple(ids[prompt:]), tuple(sorted(others)))


Answering = Generator[Step, Answer | None, Tokens]  # some steps, and what they give


class Decoding:
    """The steps after the prompt: each feeds the last token back, alone or with guesses of what follows it.

    The sequence has been fed `request.ids` in the steps of plain decoding, and `token` drawn then.

    Rows that are computed together differ in their last bits from rows computed alone, in what they give and in the
    keys and values that they leave, and so does all that is computed from those. (The length of the sequence adds
    nothing: a layer sees what the layers before it left, never its own errors.) The last stage therefore tells only
    tokens that are `settled`. What it leaves open is decided as plain decoding does, to the bit: the positions since
    the last plain one are computed again, one by one, and then the token. No position is so computed twice: a text
    costs its plain steps and its guesses at most.

    Nothing is guessed while others wait for tokens: they share the passes, and guesses would cost them time.
    """

    def __init__(self, request: Generate, token: int, alone: Callable[[], bool]) -> None:
        self._alone = alone
        self._draft = drafting.DRAFT if request.draft is None else request.draft
        if request.sampling.temperature > 0 or request.sampling.adjusts:
            self._draft = 0
        self._request = request
        self._start = request.start
        self._ids = [*request.ids, token]
        self._lookup = Lookup(self._ids) if self._draft else None
        self._plain = request.start + len(request.ids)  # the positions before it are as plain decoding leaves them
        self._open = False  # whether the next token was left open

    def step(self, most: int) -> Answering:
        """The next tokens, at least one and at most `most`."""
        position = self._start + len(self._ids) - 1  # of the last token, which is not fed yet
        if self._lookup is None:  # the common case, for as many as 32 sequences in a pass
            return (yield from self._plainly(position))
        guess = [] if self._open or not self._alone() else self._lookup.guess(min(self._draft, most - 1))
        verify = guess or (position - self._plain > FEW and not self._open)
        answer = yield from (self._verified(position, guess) if verify else self._plainly(position))
        self._lookup.extend(answer.ids)
        return answer

    def _verified(self, position: int, guess: list[int]) -> Answering:
        """The settled tokens after `position` and each right guess; the plain one if the first is not settled."""
        answer = yield Step(position, np.asarray([self._ids[-1], *guess], np.int64), Wanted.TOKENS)
        assert isinstance(answer, Tokens), "a step that wants tokens is answered with them"
        right = 0
        while right < min(len(guess), len(answer.ids)) and guess[right] == answer.ids[right]:
            right += 1
        if guess and self._lookup is not None:
            self._lookup.learn(len(guess), right)
        self._open = right == len(answer.ids)
        if not answer.ids:
            return (yield from self._plainly(position))
        answer = first(answer, right + 1)
        self._ids += answer.ids
        return answer

    def _plainly(self, position: int) -> Answering:
        """The token after `position`, as plain decoding gives it."""
        for again in range(self._plain, position):
            yield Step(again, np.asarray([self._ids[again - self._start]], np.int64), Wanted.NOTHING)
        self._plain = position + 1
        self._open = False
        needed = given(self._request, self._ids)
        answer = yield Step(position, np.asarray([self._ids[-1]], np.int64), Wanted.TOKEN, needed)
        assert isinstance(answer, Tokens), "a step that wants tokens is answered with them"
        self._ids += answer.ids
        return answer


def first(answer: Tokens, count: int) -> Tokens:
    """An answer with its first tokens only."""
    each = len(answer.top) // len(answer.ids) if answer.top else 0
    return replace(answer, ids=answer.ids[:count], logprobs=answer.logprobs[:count], top=answer.top[: count * each])
