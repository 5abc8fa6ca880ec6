"""How many threads compute a token, on a machine whose times are made up: nothing here depends on the real one's."""

import random
import subprocess
import sys

import pytest
from processes import ROOT

from minigpt.engine import threads
from minigpt.engine.crew import LAST, WINDOW, Crew

# Milliseconds of a token and its switches, by threads: GPT-2 small on two cores of a Zen 4, beside so many busy loops.
TIMES = {0: {1: 32.0, 2: 18.5}, 1: {1: 40.0, 2: 75.0}, 2: {1: 80.0, 2: 95.0}}
SWITCHES = {0: {1: 0, 2: 2}, 1: {1: 2, 2: 75}, 2: {1: 10, 2: 85}}


class Simulated:
    """A machine with two cores, on which tokens take the times above, give or take a quarter."""

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        self.loops, self.scale = 0, scale
        self.clock, self.switched = 100.0, 0
        self.placed: list[int] = []
        self._random = random.Random(seed)

    def place(self, count: int) -> None:
        self.placed.append(count)

    def now(self) -> float:
        return self.clock

    def switches(self) -> int:
        return self.switched

    def tokens(self, crew: Crew, count: int) -> float:
        """Seconds that so many take."""
        began = self.clock
        for _ in range(count):
            crew.begin()
            self.clock += TIMES[self.loops][crew.count] / 1000 * self.scale * self._random.uniform(0.75, 1.25)
            self.switched += round(SWITCHES[self.loops][crew.count] * self._random.uniform(0, 2))
            crew.end()
        return self.clock - began

    def best(self, count: int) -> float:
        return count * min(TIMES[self.loops].values()) / 1000 * self.scale


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])  # of the model
@pytest.mark.parametrize("loops", [0, 1, 2])
def test_a_token_takes_hardly_longer_than_on_the_better_number_of_threads(loops: int, scale: float, seed: int) -> None:
    machine = Simulated(scale, seed)
    crew = Crew(2, machine)
    machine.loops = loops
    machine.tokens(crew, 3 * WINDOW)  # it finds out
    assert machine.tokens(crew, 1000) < 1.15 * machine.best(1000)


@pytest.mark.parametrize("seed", range(20))
def test_pauses_do_not_make_trials_dearer(seed: int) -> None:
    machine = Simulated(seed=seed)
    crew = Crew(2, machine)
    machine.loops = 1
    machine.tokens(crew, 3 * WINDOW)
    seconds = 0.0
    for _ in range(100):
        machine.clock += 30
        seconds += machine.tokens(crew, 10)
    assert seconds < 1.15 * machine.best(1000)


def test_a_quiet_machine_is_left_alone() -> None:
    machine = Simulated()
    machine.tokens(Crew(2, machine), 1000)
    assert machine.placed == []


@pytest.mark.parametrize("seed", range(20))
def test_all_threads_compute_again_soon_after_a_neighbour_has_left(seed: int) -> None:
    machine = Simulated(seed=seed)
    crew = Crew(2, machine)
    for _ in range(3):
        machine.loops = 1
        machine.tokens(crew, 1000)
        if crew.count == 2:  # in the midst of a trial
            machine.tokens(crew, WINDOW)
        assert crew.count == 1
        machine.loops, left = 0, machine.clock
        while crew.count == 1:
            machine.tokens(crew, 1)
        assert machine.clock - left < LAST + 1


def test_of_many_threads_no_more_are_given_up_than_helps() -> None:
    class Eight(Simulated):
        def tokens(self, crew: Crew, count: int) -> float:
            for _ in range(count):
                crew.begin()
                self.clock += {8: 0.060, 4: 0.012, 2: 0.018, 1: 0.032}[crew.count]  # beside one loop on eight cores
                self.switched += {8: 70}.get(crew.count, 1)
                crew.end()
            return 0.0

    machine = Eight()
    crew = Crew(8, machine)
    machine.tokens(crew, 2000)
    assert set(machine.placed) == {4, 8}
    assert machine.placed[0] == 4


USED = """
import minigpt, numpy as np
from minigpt.engine import blas, crew, threads
control = blas.control()
seen = [threads.SET, control.get()]
model = minigpt.load("tiny")
crew._own().crew.count = 1
for rows in (1, 2):
    with crew.fitted(rows):
        seen.append(control.get())
seen.append(control.get())
print(seen)
"""


@pytest.mark.parametrize(("pinned", "within"), [({}, 1), ({"MINIGPT_THREADS": "2"}, 2), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_a_token_gets_the_chosen_number_and_a_number_that_was_set_stays(pinned: dict[str, str], within: int) -> None:
    if len(threads.processors()) < 2:
        pytest.skip("this needs two processors")
    code = "import os\nos.environ.pop('MINIGPT_THREADS', 0)\nos.environ.pop('OPENBLAS_NUM_THREADS', 0)\n"
    code += f"os.environ.update({pinned})\n" + USED
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    usual = 2 if pinned else len(threads.processors())
    assert done.stdout == f"{[bool(pinned), usual, within, usual, usual]}\n", done.stderr
