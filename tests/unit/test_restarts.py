"""When a stage is started again: decisions, by a clock that stands still."""

from minigpt.launch.restarts import DELAYS, EARLY, TRIES, Restarts


def test_a_stage_that_served_for_long_is_started_again_at_once_however_often() -> None:
    restarts, now = Restarts(0.0), 0.0
    for _ in range(20):
        now += EARLY
        assert restarts.ended(now) == 0.0
        restarts.ready(now)


def test_a_stage_that_always_ends_early_is_given_up_at_the_third_end() -> None:
    restarts = Restarts(0.0)
    waits = []
    for now in (9.9, 20.0, 30.0):
        waits.append(restarts.ended(now))
        restarts.ready(now + 5)
    assert waits == [0.0, 0.5, None]


def test_an_end_before_it_serves_is_early_however_long_it_took() -> None:
    restarts = Restarts(0.0)
    assert [restarts.ended(now) for now in (1e3, 2e3, 3e3, 4e3)] == [0.0, 0.5, 1.0, None]


def test_a_stage_that_serves_for_long_has_its_tries_again() -> None:
    restarts = Restarts(0.0)
    for now in (100.0, 200.0, 300.0):
        assert [restarts.ended(now + wait) for wait in (1, 2)] == [0.0, 0.5]
        restarts.ready(now + 3)
    assert restarts.ended(300.0 + 3 + EARLY) == 0.0


def test_there_is_a_delay_for_every_restart_in_a_row() -> None:
    """One after it served for long, and one after each early end but the last."""
    assert len(DELAYS) == TRIES
