"""Text on the client's side: stop strings, whole characters, and arguments that make no request."""

from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import SMALL

from minigpt.client.text import Generation, StopStrings, make_request
from minigpt.errors import UsageError
from minigpt.protocol.messages import Answer, Generate, Reason, Tokens
from minigpt.protocol.request import Options

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
    ],
    ids=str,
)
def test_arguments_that_make_no_request_are_refused_in_words(prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_request(prompt, None, SMALL, Options(**options))


def test_a_seed_is_drawn_when_it_is_needed_and_told() -> None:
    assert make_request([1], None, SMALL, Options(temperature=1.0, seed=5)).sampling.seed == 5
    drawn = {make_request([1], None, SMALL, Options(temperature=1.0)).sampling.seed for _ in range(8)}
    assert len(drawn) == 8
