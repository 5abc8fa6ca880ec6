"""Text on the client's side: stop strings, whole characters, and arguments that make no request."""

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
from minigpt.client.text import Generation, StopStrings, make_request
from minigpt.errors import CheckpointError, UsageError
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


def test_a_seed_is_drawn_when_it_is_needed_and_told() -> None:
    assert make_request([1], None, SMALL, Options(temperature=1.0, seed=5)).sampling.seed == 5
    drawn = {make_request([1], None, SMALL, Options(temperature=1.0)).sampling.seed for _ in range(8)}
    assert len(drawn) == 8
