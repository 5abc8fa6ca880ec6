"""Places: nobody begins without room for all of it, nobody jumps the queue, and no place is lost."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pytest

from minigpt.errors import RequestRefused
from minigpt.stage.places import Identity, Place, Places
from minigpt.stage.sequence import Sequence


class Noted:
    """Stands for a sequence: it notes its end."""

    ended = False

    def end(self) -> None:
        self.ended = True


def stay() -> None:
    pass


def took(places: Places, who: str, size: int) -> Place:
    place = places.take(Identity(who), size, stay)
    place.sequence = cast("Sequence", Noted())
    return place


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def queued(places: Places, pool: ThreadPoolExecutor, *who: str, size: int = 1) -> list[Future[Place]]:
    """These wait, in this order."""
    found = []
    for one in who:
        before = places.waiting
        found.append(pool.submit(took, places, one, size))
        until(lambda before=before: places.waiting == before + 1)  # type: ignore[misc]
    return found


def test_whoever_does_not_fit_waits_first_come_first_served() -> None:
    places = Places(0, 2, 100, 10)
    held = [took(places, "a", 1), took(places, "b", 1)]
    with ThreadPoolExecutor(4) as pool:
        waiting = queued(places, pool, "c", "d", "e")
        for index, one in enumerate(waiting):
            held.pop(0).give_back()
            held.append(one.result(60))
            assert [later.done() for later in waiting[index + 1 :]] == [False] * (2 - index)
    assert places.sequences == 2


def test_bytes_are_reserved_whole_and_a_small_request_does_not_overtake_a_large_one() -> None:
    places = Places(0, 9, 100, 10)
    held = [took(places, "a", 40), took(places, "b", 40)]
    with ThreadPoolExecutor(2) as pool:
        (large,) = queued(places, pool, "c", size=50)
        (small,) = queued(places, pool, "d", size=10)
        time.sleep(0.05)
        assert not small.done()
        held[0].give_back()
        assert large.result(60).size == 50
        assert small.result(60).size == 10
    assert places.reserved == 100


def test_a_full_queue_refuses_and_says_when_to_try_again() -> None:
    places = Places(3, 1, 100, 1)
    held = took(places, "a", 1)
    with ThreadPoolExecutor(1) as pool:
        (waiting,) = queued(places, pool, "b")
        with pytest.raises(
            RequestRefused, match=r"stage 3 is busy with 1 sequences, and 1 wait: try again in \d+ s"
        ) as e:
            places.take(Identity("c"), 1, stay)
        assert (e.value.reason, e.value.stage) == ("busy", 3)
        held.give_back()
        waiting.result(60).give_back()
    assert (places.sequences, places.reserved, places.waiting) == (0, 0, 0)


def test_what_fits_nowhere_is_refused_at_once() -> None:
    places = Places(0, 4, 100, 10)
    for ask in (lambda: places.take(Identity("a"), 101, stay), lambda: places.admit(101)):
        with pytest.raises(RequestRefused, match="101 bytes of cache, and stage 0 has 100"):
            ask()


def test_one_identity_has_half_of_the_places_while_others_wait_and_all_of_them_otherwise() -> None:
    places = Places(0, 4, 100, 10)
    held = [took(places, "a", 1) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        mine = queued(places, pool, "a", "a")
        other = queued(places, pool, "b", "b")
        held.pop().give_back()
        assert other[0].result(60).who.name == "b"
        held.pop().give_back()
        assert other[1].result(60).who.name == "b"
        assert not any(one.done() for one in mine)
        held.pop().give_back()  # nobody else waits any more
        assert mine[0].result(60).who.name == "a"
        held.pop().give_back()
        assert mine[1].result(60).who.name == "a"


def test_one_identity_has_half_of_the_bytes_while_others_wait() -> None:
    places = Places(0, 9, 100, 10)
    held = [took(places, "a", 50), took(places, "c", 50)]
    with ThreadPoolExecutor(4) as pool:
        (mine,) = queued(places, pool, "a", size=20)
        (other,) = queued(places, pool, "b", size=50)
        held[1].give_back()
        assert other.result(60).who.name == "b"
        assert not mine.done()
        held[0].give_back()
        assert mine.result(60).who.name == "a"


def test_a_sequence_that_rests_goes_when_its_place_is_needed_the_oldest_first() -> None:
    places = Places(0, 2, 100, 10)
    first, second = took(places, "a", 1), took(places, "b", 1)
    kept = [first.sequence, second.sequence]
    first.rest()
    second.rest()
    third = took(places, "c", 1)
    assert [cast("Any", one).ended for one in kept] == [True, False]
    assert first.sequence is None
    assert not first.resume(1)
    assert second.resume(1)
    first.give_back()  # it has none any more
    third.give_back()
    second.give_back()
    assert places.sequences == 0


def test_a_sequence_that_goes_on_may_grow_into_what_is_free() -> None:
    places = Places(0, 2, 100, 10)
    place = took(places, "a", 40)
    place.rest()
    assert place.resume(90)
    assert places.reserved == 90
    assert not place.resume(101)
    assert place.resume(10)
    assert places.reserved == 90  # what the cache has, it keeps


def test_whoever_leaves_the_queue_frees_the_place_there() -> None:
    places = Places(0, 1, 100, 1)
    held = took(places, "a", 1)

    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        places.take(Identity("b"), 1, leave)
    assert places.waiting == 0
    held.give_back()
    assert places.sequences == 0


def test_places_are_neither_lost_nor_given_twice() -> None:
    places = Places(0, 3, 30, 8)
    inside, most = [0], [0]
    lock = threading.Lock()

    class Gone(Exception):
        pass

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(60):
            patience = rng.randrange(4)

            def check(patience: list[int] = [patience]) -> None:  # noqa: B006
                patience[0] -= 1
                if patience[0] < 0:
                    raise Gone

            try:
                place = places.take(Identity(str(number % 4), known=number % 4 == 0), rng.randint(1, 20), check)
            except (Gone, RequestRefused):
                continue
            place.sequence = cast("Sequence", Noted())
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(rng.random() * 0.002)
            with lock:
                inside[0] -= 1
            if rng.random() < 0.5:
                place.rest()
                if place.resume(rng.randint(1, 20)):
                    place.rest()
            else:
                place.give_back()
            place.give_back()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 0 < most[0] <= 3
    assert (places.sequences, places.reserved, places.waiting) == (0, 0, 0)


# Shares.

FLOOD, OTHER, LISTED = Identity("flood"), Identity("other"), Identity("key", known=True)


def refused(waiting: Future[Place]) -> None:
    with pytest.raises(RequestRefused, match="try again in") as error:
        waiting.result(60)
    assert error.value.reason == "busy"


def wait_for(places: Places, pool: ThreadPoolExecutor, who: Identity, waiting: int, size: int = 1) -> Future[Place]:
    """One more asks, and so many wait then."""
    found = pool.submit(places.take, who, size, stay)
    until(lambda: places.waiting == waiting and (found.done() or places._waiting[-1].who == who))
    return found


def test_a_full_queue_refuses_the_latest_of_whoever_has_most_there() -> None:
    places = Places(0, 1, 100, 4)
    held = places.take(FLOOD, 1, stay)
    with ThreadPoolExecutor(8) as pool:
        flood = [wait_for(places, pool, FLOOD, number) for number in (1, 2, 3, 4)]
        other = [wait_for(places, pool, OTHER, 4) for _ in range(2)]
        refused(flood.pop())
        refused(flood.pop())
        refused(pool.submit(places.take, OTHER, 1, stay))  # it has its share
        refused(pool.submit(places.take, FLOOD, 1, stay))
        for wanted in (flood[0], other[0], flood[1], other[1]):
            held.give_back()
            held = wanted.result(60)
    assert places.waiting == 0


def test_of_those_with_as_many_in_a_full_queue_whoever_comes_is_refused() -> None:
    places = Places(0, 1, 100, 3)
    held = places.take(FLOOD, 1, stay)
    with ThreadPoolExecutor(8) as pool:
        kept = [wait_for(places, pool, Identity(str(number)), number + 1) for number in range(3)]
        refused(pool.submit(places.take, OTHER, 1, stay))
        for one in kept:
            held.give_back()
            held = one.result(60)


def test_a_stranger_makes_room_in_a_full_queue_for_a_listed_client_and_never_the_other_way() -> None:
    places = Places(0, 1, 100, 2)
    held = places.take(FLOOD, 1, stay)
    with ThreadPoolExecutor(8) as pool:
        stranger = [wait_for(places, pool, who, number) for number, who in enumerate((FLOOD, OTHER), 1)]
        known = [wait_for(places, pool, LISTED, 2) for _ in range(2)]
        for one in stranger:
            refused(one)
        refused(pool.submit(places.take, OTHER, 1, stay))
        for one in known:
            held.give_back()
            held = one.result(60)


def test_a_listed_client_is_served_before_strangers() -> None:
    places = Places(0, 1, 100, 4)
    held = places.take(LISTED, 1, stay)
    with ThreadPoolExecutor(8) as pool:
        stranger = wait_for(places, pool, OTHER, 1)
        known = wait_for(places, pool, LISTED, 2)
        held.give_back()
        known.result(60).give_back()
        stranger.result(60).give_back()


def test_identities_take_turns_and_each_ones_own_requests_stay_in_order() -> None:
    places = Places(0, 1, 100, 9)
    held = places.take(FLOOD, 1, stay)
    with ThreadPoolExecutor(8) as pool:
        flood = [wait_for(places, pool, FLOOD, number) for number in (1, 2, 3)]
        other = [wait_for(places, pool, OTHER, number) for number in (4, 5)]
        late = wait_for(places, pool, LISTED._replace(known=False), 6)
        for wanted in (flood[0], other[0], late, flood[1], other[1], flood[2]):
            held.give_back()
            held = wanted.result(60)


def test_one_that_is_always_new_does_not_keep_one_that_waits_from_its_turn() -> None:
    places = Places(0, 1, 100, 9)
    held = places.take(FLOOD, 1, stay)
    with ThreadPoolExecutor(8) as pool:
        first, second = (wait_for(places, pool, OTHER, number) for number in (1, 2))
        held.give_back()
        held = first.result(60)
        new = [wait_for(places, pool, Identity("new 0"), 2)]
        held.give_back()
        held = second.result(60)  # its turn came when its first was served: before anybody new was there
        new.append(wait_for(places, pool, Identity("new 1"), 2))
        for one in new:
            held.give_back()
            held = one.result(60)


def test_whoever_has_least_of_the_places_is_next() -> None:
    places = Places(0, 4, 100, 9)
    held = [places.take(FLOOD, 1, stay) for _ in range(3)]
    places.take(OTHER, 1, stay)
    with ThreadPoolExecutor(8) as pool:
        flood = wait_for(places, pool, FLOOD, 1)
        other = [wait_for(places, pool, OTHER, number) for number in (2, 3)]
        for one in other:  # 2 and 1, then 1 and 2
            assert not flood.done()
            held.pop().give_back()
            (one if one is other[0] else flood).result(60)
        held.pop().give_back()
        other[1].result(60)


def test_a_large_request_whose_turn_it_is_is_overtaken_by_nobody_with_as_much() -> None:
    places = Places(0, 9, 100, 9)
    held = [places.take(FLOOD, 30, stay) for _ in range(3)]
    with ThreadPoolExecutor(8) as pool:
        large = wait_for(places, pool, OTHER, 1, size=90)
        small = [wait_for(places, pool, Identity(str(number)), 2 + number) for number in range(3)]
        for place in held:
            assert not large.done()
            place.give_back()
        held = [large.result(60)]
        for one in small:
            one.result(60)
    assert places.reserved == 93
