"""The meter of passes, with a clock that a test moves."""

import sys
import threading

import pytest

from minigpt.stage.meter import PERIOD, WINDOW, Meter


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_nothing_was_noted() -> None:
    meter = Meter(Clock())
    assert (meter.rate(1000.0), meter.batch(1000.0), meter.tokens, meter.passes) == (0.0, 0.0, 0, 0)


@pytest.mark.parametrize("phase", [0.0, 0.2, 0.49])
def test_a_steady_rate_is_found_whenever_one_looks(phase: float) -> None:
    clock = Clock()
    meter = Meter(clock)
    while clock.now < 1020 + phase:
        meter.note(4, 3)
        clock.now += 1 / 64
    assert meter.rate(clock.now) == pytest.approx(3 * 64, rel=0.02)
    assert meter.batch(clock.now) == 4


def test_only_the_last_ten_seconds_count_and_totals_keep_everything() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.note(16, 100)
    clock.now += WINDOW - PERIOD
    meter.note(2, 5)
    meter.note(3, 0)  # a chunk of a prompt, for example
    assert meter.rate(clock.now) == pytest.approx(105 / (WINDOW - PERIOD))
    assert meter.batch(clock.now) == pytest.approx(21 / 3)
    clock.now += PERIOD
    assert meter.rate(clock.now) == pytest.approx(5 / (WINDOW - PERIOD))
    assert meter.batch(clock.now) == pytest.approx(5 / 2)
    clock.now += 3600
    assert (meter.rate(clock.now), meter.batch(clock.now)) == (0.0, 0.0)
    assert (meter.passes, meter.sequences, meter.tokens) == (3, 21, 105)


def test_a_place_in_the_ring_forgets_what_was_there_before() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.note(1, 50)
    clock.now += 7 * WINDOW
    meter.note(1, 1)
    assert meter.rate(clock.now) == pytest.approx(1 / (WINDOW - PERIOD))


def test_many_threads_lose_no_pass() -> None:
    meter = Meter()
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [meter.note(2, 1) for _ in range(2000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(switching)
    assert (meter.passes, meter.sequences, meter.tokens) == (8000, 16000, 8000)
