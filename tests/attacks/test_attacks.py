"""The attacks of a hostile host, in their short form, on real processes; and that the kit notices when one succeeds."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from made import random_tensors, write

from attacks import ATTACKS, Seen, Survived, everything, require
from attacks.arena import PLAIN_STAGE, TOKENS, Arena
from attacks.proxy import Frame, Tap, honest
from attacks.records import at
from minigpt.engine.config import Config

everything()

# Small, and yet wide enough that a chunk of a prompt takes two records.
MODEL = Config(vocab_size=301, n_positions=640, n_embd=68, n_layer=4, n_head=4, n_inner=200, eos_token_id=(300,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "wide", MODEL, random_tensors(MODEL))


@pytest.fixture(scope="module")
def arena(folder: Path) -> Iterator[Arena]:
    with Arena(folder, thorough=False) as made:
        made.control()
        yield made


@pytest.mark.parametrize("number", sorted(ATTACKS))
def test_the_attack_comes_to_nothing(arena: Arena, number: int) -> None:
    arena.calm()
    seen = ATTACKS[number].run(arena)
    assert isinstance(seen, Seen)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 12])
def test_the_attack_on_the_handshake_of_suite_1_comes_to_nothing(suite_1: Arena, number: int) -> None:
    suite_1.calm()
    assert isinstance(ATTACKS[number].run(suite_1), Seen)


@pytest.fixture(scope="module")
def suite_1(folder: Path) -> Iterator[Arena]:
    with Arena(folder, thorough=False, suite=1) as made:
        yield made


def test_every_attack_of_the_list_is_there() -> None:
    assert set(ATTACKS) == {*range(1, 92)}


# Does the kit notice?


def test_an_attack_that_does_nothing_has_survived(arena: Arena) -> None:
    arena.calm()
    with pytest.raises(Survived, match="a whole answer"):
        arena.assault(honest)


def test_a_cut_that_is_passed_off_as_whole_has_survived(arena: Arena) -> None:
    whole = {"tokens": [arena.expected(arena.prompt())[:2]], "whole": True, "error": None}
    with pytest.raises(Survived, match="a whole answer"):
        arena.grade(whole, [arena.prompt()], TOKENS)


def test_a_token_that_is_changed_has_survived(arena: Arena) -> None:
    """Against a pipeline without encryption the same attack succeeds, and is seen to."""
    weak = arena.start(python=("-c", PLAIN_STAGE))
    client = arena.start_client("--plain")
    first = arena.expected(arena.prompt())[0]
    before, after = (b"\xa3ids\xc4\x04" + number.to_bytes(4, "little") for number in (first, (first + 1) % 300))

    def change(frame: Frame, _tap: Tap) -> Iterable[bytes]:
        require(before in frame.data, "the token is not where the test looks for it")
        return (frame.data.replace(before, after),)

    answer = arena.run({0: at("R", 1, change)}, stages=weak, client=client)
    with pytest.raises(Survived, match="other tokens"):
        arena.grade(answer, [arena.prompt()], TOKENS)
    client.close()
    weak.close()


def test_a_stage_that_serves_nobody_any_more_has_not_withstood(arena: Arena) -> None:
    dead = arena.start(run=False)
    with pytest.raises(Survived, match="an honest client failed"):
        arena.control(dead)
    dead.close()
