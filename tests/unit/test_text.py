"""Text on the client's side: stop strings, whole characters, and arguments that make no request."""

import hashlib
import math
import re
from array import array
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import SMALL, random_tensors, write

import minigpt
from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Generation, StopStrings, Token, make_request, perplexity
from minigpt.engine.sampling import Sampling
from minigpt.errors import CheckpointError, UsageError
from minigpt.protocol.messages import Answer, Generate, Reason, Tokens
from minigpt.protocol.request import Options, seed_of

PIECES = st.lists(st.text("ab\n", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_the_text_ends_before_the_stop_string_that_is_whole_first_however_it_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    wanted = whole[: min(ends)[1]] if ends else whole
    filtered, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += filtered.push(piece)
        assert wanted.startswith(shown)
        if filtered.found:
            break
    if not filtered.found:
        shown += filtered.flush()
    assert (shown, filtered.found) == (wanted, bool(ends))


@given(PIECES)
def test_without_stop_strings_nothing_is_held_back(pieces: list[str]) -> None:
    filtered = StopStrings([])
    assert [filtered.push(piece) for piece in pieces] == pieces


class Letters:
    """A tokenizer of bytes, for which two ids make one character."""

    digest = bytes(32)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def stream(self) -> "Letters":
        self.held = b""
        return self

    def push(self, token: int) -> str:
        self.held += bytes([token])
        try:
            shown, self.held = self.held.decode(), b""
        except UnicodeDecodeError:
            return ""
        return shown

    def flush(self) -> str:
        shown, self.held = self.held.decode(errors="replace"), b""
        return shown


def answers(ids: bytes, reason: Reason, closed: list[bool]) -> Generator[Answer, None, Reason]:
    try:
        for position, token in enumerate(ids, 1):
            yield Tokens(position, (token,))
    except GeneratorExit:
        closed.append(True)
        raise
    return reason


def generation(ids: bytes, *, max_tokens: int, stop: tuple[str, ...] = ()) -> tuple[Generation, list[bool]]:
    closed: list[bool] = []
    tokenizer: Any = Letters()
    request = Generate(0, (1,), max_tokens)
    return Generation(answers(ids, Reason.LENGTH, closed), request, SMALL, tokenizer, stop), closed


def test_a_character_is_shown_when_it_is_whole() -> None:
    made, _ = generation("é!".encode(), max_tokens=3)
    assert [token.text for token in made] == ["", "é", "!"]
    assert made.reason is Reason.LENGTH


def test_the_last_token_tells_what_was_held_back() -> None:
    made, _ = generation(b"one\n", max_tokens=4, stop=("\n\n",))
    assert [token.text for token in made] == ["o", "n", "e", "\n"]
    made, _ = generation("a\u00e9".encode()[:2], max_tokens=2)
    assert [token.text for token in made] == ["a", "\ufffd"]


def test_a_stop_string_ends_the_request_itself() -> None:
    made, closed = generation(b"ab cd", max_tokens=5, stop=("b c",))
    assert "".join(token.text or "" for token in made) == "a"
    assert (made.reason, closed, len(made.times)) == (Reason.STOP, [True], 4)


def test_closing_it_cancels_the_request() -> None:
    made, closed = generation(b"abcd", max_tokens=4)
    next(made)
    made.close()
    assert (made.reason, closed, list(made)) == (Reason.CANCELLED, [True], [])


PENALTIES = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        ([SMALL.vocab_size], {}),
        ([-1], {}),
        ("text without a tokenizer", {}),
        ([1] * (SMALL.n_positions + 1), {}),
        ([1], {"max_tokens": 0}),
        ([1], {"temperature": -1.0}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_p": 1.5}),
        ([1], {"top_k": -1}),
        ([1], {"seed": -1}),
        ([1], {"stop": ["x"]}),
        ([1], {"stop": "x"}),
        (b"hi", {}),
        (bytearray(b"hi"), {}),
        (memoryview(b"hi"), {}),
        ([1.0, 2.0], {}),
        (["5", "6"], {}),
        ([True], {}),
        ([[1, 2]], {}),
        ([None], {}),
        (None, {}),
        (5, {}),
        ({1: 2}, {}),
        ({1, 2}, {}),
        (Path("prompt"), {}),
        (np.array([1.0]), {}),
        (np.array([True]), {}),
        (np.array([[1, 2]]), {}),
        (np.array(1), {}),
        *(([1], {name: value}) for name in ("max_tokens", "top_k", "seed", "draft") for value in ("5", 5.0, True, [5])),
        *(([1], {name: value}) for name in ("temperature", "top_p") for value in ("1", True, None, [1.0], 10**400)),
        *(([1], {name: value}) for name in ("logprobs", "spans") for value in (1, "yes", None)),
        *(([1], {"stop": value}) for value in (None, 5, b"x", [5], [b"x"], [None], {"x": 1})),
        ([1], {"max_tokens": None}),
        ([1], {"temperature": float("nan")}),
        ([1], {"top_p": float("nan")}),
        *(([1], {name: value}) for name in PENALTIES for value in ("1", True, None, [1.0], 10**400, float("nan"))),
        *(([1], {name: float("inf")}) for name in PENALTIES),
        *(([1], {"min_p": value}) for value in (-0.1, 1.1)),
        *(([1], {"repetition_penalty": value}) for value in (0, 0.0, -1)),
        *(([1], {"top_logprobs": value}) for value in (-1, 21, 5.0, True, "5", None)),
        *(
            ([1], {"logit_bias": value})
            for value in (5, "x", [(1, 2.0)], {"1": 2.0}, {True: 2.0}, {1.0: 2.0}, {-1: 2.0})
        ),
        *(([1], {"logit_bias": {1: value}}) for value in ("2", None, True, float("nan"), float("inf"), 10**400)),
        ([1], {"logit_bias": {SMALL.vocab_size: 1.0}}),
    ],
    ids=str,
)
def test_arguments_that_make_no_request_are_refused_in_words(prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_request(prompt, None, SMALL, Options(**options))


@pytest.mark.parametrize(
    "prompt",
    [(5, 6), range(5, 7), np.array([5, 6]), np.array([5, 6], np.uint16), [np.int32(5), 6], array("H", [5, 6])],
    ids=str,
)
def test_token_ids_may_be_any_sequence_or_array_of_integers(prompt: Any) -> None:
    request = make_request(prompt, None, SMALL, Options(temperature=1, top_p=1))
    assert request.ids == (5, 6)
    assert {type(token) for token in request.ids} == {int}
    assert (type(request.sampling.temperature), type(request.sampling.top_p)) == (float, float)


@pytest.mark.parametrize(
    ("interface", "arguments"),
    [
        *((minigpt.load, {"model": value}) for value in (None, 5, b"tiny", ["tiny"])),
        (minigpt.load, {"model": "tiny", "revision": 5}),
        *((Pipeline.local, {"model": value}) for value in (None, 5, b"tiny")),
        *((Pipeline.local, {"stages": value}) for value in (None, "2", 2.0, True, 0, -1, 10**30)),
        *((Pipeline.local, {"split": value}) for value in (6, ["6", "6"], b"6+6", "6+x")),
        *((Pipeline.local, {"threads": value}) for value in ("1", 1.0, True, 0, -1)),
        *((Pipeline.local, {"timeout": value}) for value in (None, "1", True, 0, -1.0, float("nan"), float("inf"))),
        *((minigpt.set_threads, {"threads": value}) for value in ("2", 2.0, True, 0)),
        (Pipeline.local, {"connect_timeout": "1"}),
        *((Pipeline.local, {"retry_for": value}) for value in (None, "1", True, -1.0, float("nan"), float("inf"))),
        (Pipeline.connect, {"manifest": b"{}", "retry_for": -1}),
        (Pipeline.local, {"revision": 5}),
        *((Pipeline.connect, {"manifest": value}) for value in (None, 5, ["x"], "no\0name", "nowhere.json")),
        *((Pipeline.connect, {"manifest": b"{}", name: 5}) for name in (
            "manifest_sha256", "model", "text", "allow_mock", "client_key")),
        (Pipeline.connect, {"manifest": b"{}", "timeout": 0}),
        (Pipeline.connect, {"manifest": b"{}", "client_key": "00" * 32}),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)  # fmt: skip
def test_the_python_interface_refuses_wrong_arguments_in_words(interface: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        interface(**arguments)
    assert "00" * 32 not in str(caught.value)


def test_a_path_is_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", SMALL, random_tensors(SMALL))
    assert minigpt.load(folder).config == SMALL
    for interface in (minigpt.load, Pipeline.local):
        with pytest.raises(CheckpointError, match="no such folder"):
            interface(Path("someone/model"))


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"min_p": 2}, "min_p is 2.0, wanted 0 (all) to 1; 0.02 to 0.1 is usual"),
        (
            {"repetition_penalty": 0},
            "repetition_penalty is 0.0, wanted any number above 0; 1 is none, 1.1 to 1.3 usual",
        ),
        ({"presence_penalty": math.inf}, "presence_penalty is inf, wanted any finite number; 0 is none, -2 to 2 usual"),
        ({"logit_bias": {97: 1}}, "logit_bias has the id 97, wanted one of the model's, 0 to 96"),
        ({"top_logprobs": 21}, "top_logprobs is 21, wanted 0 (none) to 20; 5 is usual"),
    ],
    ids=str,
)
def test_an_error_says_what_was_given_what_is_wanted_and_what_is_usual(option: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        make_request([1], None, SMALL, Options(**option))


def test_biases_are_sent_by_rising_id() -> None:
    assert make_request([1], None, SMALL, Options(logit_bias={7: 1, 2: -100})).sampling.logit_bias == (
        (2, -100.0),
        (7, 1.0),
    )
    assert make_request([1], None, SMALL, Options(logit_bias={})).sampling == Sampling()


def test_the_seeds_of_several_answers_follow_from_the_first() -> None:
    assert seed_of(5, 0) == 5
    assert seed_of(5, 1) == int.from_bytes(hashlib.sha256(bytes(7) + b"\5" + bytes(7) + b"\1").digest()[:8], "big")
    assert len({seed_of(5, index) for index in range(100)}) == 100


def test_scores_have_the_text_of_their_tokens_and_the_first_has_no_probability() -> None:
    model = minigpt.load("tiny")
    text = "The capital of France is Paris."
    told = model.score(text, top=3)
    assert "".join(token.text or "" for token in told) == text
    assert (told[0].logprob, told[0].top) == (None, ())
    assert model.tokenizer is not None
    for token in told[1:]:
        assert token.logprob is not None
        assert len(token.top) == 3
        assert max(token.logprob, *(one.logprob for one in token.top)) == token.top[0].logprob <= 0
        assert [one.text for one in token.top] == [model.tokenizer.decode([one.id]) for one in token.top]
    assert told[-1].id in [one.id for one in told[-1].top]
    plain = model.score([token.id for token in told])
    assert [(token.id, token.logprob) for token in plain] == [(token.id, token.logprob) for token in told]
    assert {token.top for token in plain} == {()}
    (only,) = model.score([5])
    assert (only.id, only.logprob) == (5, None)
    greedy = list(model.generate([told[0].id], max_tokens=1, top_logprobs=2))
    assert greedy[0].top[0].id == greedy[0].id
    assert greedy[0].logprob is None


def test_perplexity_is_e_to_the_mean_surprise_of_what_has_one() -> None:
    def tokens(*logprobs: float | None) -> list[Token]:
        return [Token(1, None, logprob) for logprob in logprobs]

    assert perplexity(tokens(None, -1.0, -2.0)) == pytest.approx(math.exp(1.5))
    assert perplexity(tokens(None, 0.0)) == 1.0
    assert perplexity(tokens(None)) is perplexity([]) is None
    assert math.isfinite(perplexity(tokens(None, -1e30)) or math.inf)


@pytest.mark.parametrize("top", [-1, 21, 5.0, True, "5", None])
def test_no_more_likely_tokens_are_scored_than_are_told(top: Any) -> None:
    with pytest.raises(UsageError, match=r"^top is "):
        minigpt.load("tiny").score([1, 2], top=top)


def test_a_seed_is_drawn_when_it_is_needed_and_told() -> None:
    assert make_request([1], None, SMALL, Options(temperature=1.0, seed=5)).sampling.seed == 5
    drawn = {make_request([1], None, SMALL, Options(temperature=1.0)).sampling.seed for _ in range(8)}
    assert len(drawn) == 8
