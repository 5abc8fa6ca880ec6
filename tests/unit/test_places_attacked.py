"""Places under attack: whoever leaves, comes back or asks for too much takes nothing from others."""

import threading
import time
from types import SimpleNamespace

import pytest

from minigpt.errors import RequestRefused
from minigpt.stage.places import Identity, Place, Places


class Ended:
    """In the place of a sequence: whether it was ended in the stages after this one too."""

    def __init__(self) -> None:
        self.ended = False

    def end(self) -> None:
        self.ended = True


def taken(places: Places, size: int = 1, who: str = "a") -> tuple[Place, Ended]:
    place, sequence = places.take(Identity(who), size, lambda: None), Ended()
    place.sequence = sequence  # type: ignore[assignment]
    return place, sequence


def test_a_sequence_that_was_dropped_cannot_be_laid_to_rest_again() -> None:
    """Its client asks for what is refused, after others needed the room."""
    places = Places(0, 1, 10, 4)
    dropped, sequence = taken(places)
    dropped.rest()
    other, _ = taken(places, who="b")
    assert sequence.ended
    dropped.rest()
    other.rest()
    third, _ = taken(places, who="c")
    third.give_back()
    assert (places.sequences, places.waiting) == (0, 0)


def test_a_place_without_a_sequence_can_rest_and_be_dropped() -> None:
    """There was no memory for its cache."""
    places = Places(0, 1, 10, 4)
    places.take(Identity("a"), 1, lambda: None).rest()
    taken(places, who="b")
    assert places.sequences == 1


def test_what_is_dropped_for_a_request_that_is_refused_ends_in_later_stages_too() -> None:
    places = Places(0, 4, 10, 0)
    taken(places, 6)
    resting, sequence = taken(places, 3)
    resting.rest()
    with pytest.raises(RequestRefused, match="busy"):
        places.take(Identity("b"), 5, lambda: None)
    assert (sequence.ended, places.sequences) == (True, 1)


def test_those_behind_a_request_that_leaves_the_queue_are_admitted_at_once() -> None:
    places = Places(0, 4, 10, 4)
    taken(places, 6)
    gone, admitted = threading.Event(), threading.Event()

    def leave() -> None:
        if gone.is_set():
            raise ConnectionError

    def large() -> None:
        with pytest.raises(ConnectionError):
            places.take(Identity("b"), 10, leave)

    def small() -> None:
        places.take(Identity("c"), 1, lambda: None)
        admitted.set()

    threads = []
    for number, run in enumerate((large, small), 1):
        threads.append(threading.Thread(target=run))
        threads[-1].start()
        while places.waiting < number:
            pass
    assert not admitted.wait(0.1)
    gone.set()
    assert admitted.wait(60)
    for thread in threads:
        thread.join(60)
    assert (places.sequences, places.waiting) == (2, 0)


@pytest.mark.parametrize("way", ["give_back", "rest"])
def test_whoever_is_admitted_begins_after_the_sequence_that_made_room_has_ended_in_later_stages(way: str) -> None:
    """Otherwise a later stage, which is as full, refuses it as busy."""
    places = Places(0, 1, 10, 4)
    place, first = taken(places)
    begun = threading.Event()
    early: list[bool] = []

    def slow_end() -> None:
        early.append(begun.wait(0.3))

    first.end = slow_end  # type: ignore[method-assign]
    other = threading.Thread(target=lambda: (taken(places, who="b"), begun.set()))
    other.start()
    until = time.monotonic() + 60
    while not places.waiting and time.monotonic() < until:
        time.sleep(0.005)
    getattr(place, way)()
    other.join(60)
    assert begun.is_set()
    assert early == [False]


def test_a_place_is_free_once_its_sequence_has_ended_in_later_stages() -> None:
    places = Places(0, 1, 10, 0)
    place, first = taken(places)
    refused: list[str] = []

    def end() -> None:
        with pytest.raises(RequestRefused) as error:
            places.take(Identity("b"), 1, lambda: None)
        refused.append(error.value.reason)

    first.end = end  # type: ignore[method-assign]
    place.give_back()
    assert refused == ["busy"]
    taken(places, who="b")


def test_a_request_that_fails_while_room_is_made_for_it_leaves_no_place_behind() -> None:
    places = Places(0, 1, 10, 4)
    resting, sequence = taken(places)
    resting.rest()

    def end() -> None:
        raise MemoryError

    sequence.end = end  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        places.take(Identity("b"), 1, lambda: None)
    assert (places.sequences, places.waiting) == (0, 0)


def test_how_long_a_place_rested_does_not_count_in_when_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("minigpt.stage.places.time", SimpleNamespace(monotonic=lambda: now[0]))
    places = Places(0, 1, 10, 0)
    for _ in range(20):
        place, _ = taken(places)
        now[0] += 1.0  # the request takes a second
        place.rest()
        now[0] += 3600.0
        place.rest()  # a request was refused before it began
        place.give_back()
    taken(places)
    with pytest.raises(RequestRefused, match="try again in 1 s"):
        places.take(Identity("b"), 1, lambda: None)
