"""Computing in parts: every part once, errors raised, and the same bits on any number of threads."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made import whole
from processes import ROOT

from minigpt.engine import linalg, threads


@pytest.fixture(params=[1, 2, 3, 7])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(threads, "THREADS", request.param)
    return int(request.param)


@pytest.mark.parametrize("parts", [0, 1, 2, 5, 100])
def test_every_part_is_computed_once_and_on_several_threads(count: int, parts: int) -> None:
    seen, who = [0] * parts, set()
    meet = threading.Barrier(max(1, min(count, parts)))

    def work(part: slice) -> None:
        meet.wait(60)  # all are under way at once
        who.add(threading.get_ident())
        for index in range(parts)[part]:
            seen[index] += 1

    threads.in_parts(work, parts)
    assert seen == [1] * parts
    assert len(who) == max(1, min(count, parts))


def test_what_a_part_raises_is_raised_and_the_threads_live_on(count: int) -> None:
    for bad in range(7):

        def work(part: slice, bad: int = bad) -> None:
            if bad in range(7)[part]:
                raise FloatingPointError(str(bad))

        with pytest.raises(FloatingPointError, match=str(bad)):
            threads.in_parts(work, 7)
    test_every_part_is_computed_once_and_on_several_threads(count, 7)


def test_who_finds_the_threads_in_use_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "THREADS", 2)
    inner: list[slice] = []
    threads.in_parts(lambda _part: threads.in_parts(inner.append, 4), 2)
    assert inner == [slice(0, 4)] * 2


@pytest.mark.parametrize(("set_to", "wanted"), [("3", 3), ("0", None), ("many", None), ("", None)])
def test_there_are_as_many_threads_as_blas_has(
    set_to: str, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", set_to)
    assert threads.available() == wanted or (wanted is None and threads.available() >= 1)


@pytest.mark.parametrize(
    ("kind", "group", "root", "limits", "wanted"),
    [
        ("cgroup2 none rw", "0::/", "/", {"": "150000 100000"}, 1.5),
        ("cgroup2 none rw", "0::/a/b", "/", {"a": "200000 100000", "a/b": "max 100000"}, 2.0),
        ("cgroup2 none rw", "0::/a/b", "/", {"": "50000 100000", "a/b": "400000 100000"}, 0.5),
        ("cgroup2 none rw", "0::/docker/a", "/docker/a", {"": "100000 50000"}, 2.0),  # without a namespace of its own
        ("cgroup2 none rw", "0::/../other", "/", {"": "100000 50000"}, 2.0),  # moved out of what it sees
        ("cgroup2 none rw", "0::/", "/", {}, math.inf),
        ("cgroup2 none rw", "0::/", "/", {"": "nonsense"}, math.inf),
        ("cgroup none rw,cpu,cpuacct", "4:cpu,cpuacct:/a\n0::/b", "/", {"a": "150000 100000"}, 1.5),
        ("cgroup none rw,cpu", "4:cpu:/a", "/", {"a": "-1 100000"}, math.inf),
        ("cgroup none rw,cpuset", "4:cpuset:/a", "/", {"a": "100000 100000"}, math.inf),
        ("tmpfs none rw", "", "/", {}, math.inf),
    ],
)
def test_the_quota_is_the_least_of_those_of_the_groups_above(
    kind: str, group: str, root: str, limits: dict[str, str], wanted: float, tmp_path: Path
) -> None:
    point = tmp_path / "mounted"
    for where, text in limits.items():
        (point / where).mkdir(parents=True, exist_ok=True)
        if kind.startswith("cgroup2"):
            (point / where / "cpu.max").write_text(text + "\n")
        else:
            for name, number in zip(("quota", "period"), text.split(), strict=True):
                (point / where / f"cpu.cfs_{name}_us").write_text(number + "\n")
    (tmp_path / "cgroup").write_text(group + "\n")
    others = "22 1 0:3 / /odd\\040name rw - tmpfs  rw\n"  # whose source has no name
    (tmp_path / "mountinfo").write_text(f"{others}31 23 0:28 {root} {point} rw,relatime shared:4 - {kind}\n")
    assert threads.quota(tmp_path) == wanted


def test_without_proc_there_is_no_quota(tmp_path: Path) -> None:
    assert threads.quota(tmp_path / "missing") == math.inf


QUOTA = """
import os, sys
from pathlib import Path
(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
for name in ("MINIGPT_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.pop(name, None)
import minigpt
from minigpt.engine import blas, threads
model = minigpt.load("tiny")
print(threads.THREADS, blas.control().get())
"""


@pytest.mark.parametrize(("processors", "wanted"), [(0.5, 1), (1.0, 1), (1.4, 1), (1.5, 2)])
def test_a_process_under_a_quota_has_as_many_threads_as_it_may_keep_busy(
    processors: float, wanted: int, cgroup: Callable[[str], Path]
) -> None:
    group = cgroup("cpu")
    (group / "cpu.cfs_period_us").write_text("100000")
    (group / "cpu.cfs_quota_us").write_text(str(int(processors * 100_000)))
    command = [sys.executable, "-c", QUOTA, str(group)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    wanted = min(wanted, len(threads.processors()))
    assert done.stdout == f"{wanted} {wanted}\n", done.stderr


SPREAD = """
import minigpt, os, numpy
from minigpt.engine import threads
workers = threads.native()
threads.spread(workers)
places = [sorted(os.sched_getaffinity(thread)) for thread in (0, *workers)]
threads.in_parts(lambda part: places.append(sorted(os.sched_getaffinity(0))) if part.start else None, threads.THREADS)
tids = [0, *workers, *(helper.native_id for helper in threads._pool().helpers)]
found = [places]
for number in (threads.THREADS - 1, threads.THREADS):
    threads.place(number)
    found.append([sorted(os.sched_getaffinity(thread)) for thread in tids])
print(found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's threads, and where they may run")
@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_threads_are_spread_where_they_are_as_many_as_the_processors(count: int) -> None:
    processors = sorted(os.sched_getaffinity(0))
    environment = os.environ | {"MINIGPT_THREADS": str(count)}
    done = subprocess.run([sys.executable, "-c", SPREAD], capture_output=True, text=True, cwd=ROOT, env=environment)
    places, fewer, again = json.loads(done.stdout)
    if count == len(processors):
        assert places[:count] == [[one] for one in processors]  # the caller's, and those of BLAS
        assert sorted(places[count:]) == [[one] for one in processors[1:]]  # our own beside the caller's
        assert fewer == [processors] * len(places)  # whoever computes alone goes where there is room
        assert again == places
    else:  # BLAS may have taken fewer
        assert all(place == processors for place in places)


# What is computed in parts


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 16, 33, 64, 65])
@pytest.mark.parametrize("shape", [(1, 1), (48, 144), (768, 1000), (3072, 13), (70_000, 3), (768, 1500)])
@pytest.mark.parametrize("blocked", [False, True])
def test_a_product_is_its_definition_whatever_its_way(
    rows: int, shape: tuple[int, int], blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "BLOCKED", blocked)
    monkeypatch.setattr(linalg, "FEW_ROWS", 64 if blocked else 3)
    monkeypatch.setattr(linalg, "EVEN_ROWS", 1 if blocked else 8)
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((rows, shape[0]), np.float32), rng.standard_normal(shape, np.float32)
    exact = x.astype(float) @ matrix.astype(float)
    bits = []
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "THREADS", count)
        found = [linalg.product(x, matrix), linalg.product(x, np.asfortranarray(matrix))]
        assert all(np.abs(y - exact).max() < 2e-6 * shape[0] for y in found)
        bits.append([y.tobytes() for y in found])
    assert bits[0] == bits[1] == bits[2]


def test_activations_and_softmax_have_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((12, 128, 300), np.float32)  # 14 pieces
    for function in (*linalg.ACTIVATIONS.values(), linalg.softmax_numerators):
        monkeypatch.setattr(threads, "THREADS", 1)
        alone = function(x.copy())
        monkeypatch.setattr(threads, "THREADS", 3)
        assert np.array_equal(function(x.copy()), alone)
        assert np.array_equal(np.concatenate([function(head.copy()[np.newaxis]) for head in x]), alone)


def test_models_may_run_in_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "THREADS", 2)
    model = whole()
    ids = list(range(20))

    def run() -> bytes:
        cache = model.new_cache()
        return model.logits(model.forward(model.embed(ids, 0), [(cache, len(ids))])).tobytes()

    alone, found = run(), []
    workers = [threading.Thread(target=lambda: found.extend(run() for _ in range(20))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found == [alone] * 80


def test_an_interrupt_while_the_helpers_compute_leaves_none_of_them_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "THREADS", 2)
    threads.in_parts(lambda _part: None, 2)
    before = threads._pool().helpers[0]
    go_on = threading.Event()

    def end(_helper: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threads._Helper, "end", end)
        with pytest.raises(KeyboardInterrupt):
            threads.in_parts(lambda part: part.start == 0 or go_on.wait(60), 2)
    seen: list[int] = []
    threads.in_parts(lambda part: seen.append(part.start), 2)
    go_on.set()
    assert sorted(seen) == [0, 1]
    assert before not in threads._pool().helpers


def test_a_forked_process_has_helpers_of_its_own() -> None:
    work = "threads.in_parts(lambda part: time.sleep(0.01), 3)"
    code = f"import os, time, minigpt\nfrom minigpt.engine import threads\nthreads.THREADS = 3\n{work}\n"
    code += f"if os.fork() == 0:\n    {work}\n    os._exit(7)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("7\n", 0)


def test_the_helpers_do_not_keep_a_process_from_ending() -> None:
    work = "threads.in_parts(lambda part: time.sleep(0.01), 3)"
    code = f"import time, minigpt\nfrom minigpt.engine import threads\nthreads.THREADS = 3\n{work}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_thread_that_died_is_not_waited_for_and_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "THREADS", 2)
    threads._pool().helpers.clear()
    with monkeypatch.context() as patch:
        patch.setattr(threads._Helper, "_run", lambda _helper: time.sleep(0.1))  # it ends before its part begins
        with pytest.raises(RuntimeError, match="a thread ended before its part"):
            threads.in_parts(lambda _part: None, 2)
    seen: list[int] = []
    threads.in_parts(lambda part: seen.append(part.start), 2)
    assert sorted(seen) == [0, 1]


def test_where_no_thread_can_be_started_one_computes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "THREADS", 3)
    threads._pool().helpers.clear()
    monkeypatch.setattr(threading.Thread, "start", start)
    seen: list[slice] = []
    threads.in_parts(seen.append, 6)
    assert seen == [slice(0, 6)]


REFUSED = """
import json, minigpt, os, sys
def refuse(*_): raise OSError(22, "Invalid argument")
os.sched_setaffinity = refuse
from minigpt.engine import threads
threads._processors[:] = [0, 1]  # as `spread` leaves it
threads.spread(threads.native())
threads.THREADS = 2
seen = []
threads.in_parts(lambda part: seen.append(part.start), 2)
print(json.dumps(sorted(seen)))
"""


def test_a_refused_affinity_is_ignored() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[0, 1]\n", 0), done.stderr


FORKED = """
import os, minigpt
model = minigpt.load("tiny")
def ids(): return [token.id for token in model.generate([5 + i % 50 for i in range(400)], max_tokens=4)]
if generates_first: wanted = ids()
if os.fork() == 0:
    os._exit(7 if ids() == (wanted if generates_first else ids()) else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]), len(ids()))
"""


@pytest.mark.parametrize("first", [False, True])
def test_a_model_that_was_loaded_before_a_fork_generates_in_both_processes(first: bool) -> None:
    code = f"generates_first = {first}\n{FORKED}"
    environment = os.environ | {"MINIGPT_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stdout == "7 4\n", done.stderr


FORKED_MEANWHILE = """
import os, threading, minigpt
model = minigpt.load("tiny")
def ids(): return [token.id for token in model.generate([5 + i % 50 for i in range(100)], max_tokens=4)]
wanted, ended = ids(), threading.Event()
def keep_busy():
    while not ended.is_set(): ids()
other = threading.Thread(target=keep_busy)
other.start()
try:
    for _ in range(3):
        if os.fork() == 0:
            os._exit(7 if ids() == wanted else 1)
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
finally:
    ended.set()
other.join()
print(ids() == wanted)
"""


def test_a_fork_while_another_thread_computes_leaves_a_child_that_computes() -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FORKED_MEANWHILE],  # Python 3.12 warns of any fork beside threads
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"MINIGPT_THREADS": "2"},
    )  # fmt: skip
    try:
        found, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a child that hangs, too
    assert found == "7\n" * 3 + "True\n"


SHRUNK = """
import os, sys
from pathlib import Path
import minigpt
group = Path(sys.argv[1])
(group / "cgroup.procs").write_text(str(os.getpid()))
with minigpt.Pipeline.local("tiny", 1, timeout=60, threads=2) as pipeline:  # its threads lie on a processor each
    (group / "cpuset.cpus").write_text(sys.argv[2])
    print(len(list(pipeline.generate([5 + i % 50 for i in range(400)], max_tokens=4))))
"""


def test_a_stage_goes_on_when_its_cpuset_shrinks(cgroup: Callable[[str], Path]) -> None:
    group = cgroup("cpuset")
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) != 2:
        pytest.skip(f"threads are spread over all processors: this needs 2, and there are {len(processors)}")
    (group / "cpuset.mems").write_text((group.parent / "cpuset.mems").read_text())
    (group / "cpuset.cpus").write_text(",".join(map(str, processors)))
    command = [sys.executable, "-c", SHRUNK, str(group), str(processors[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "4\n", done.stderr
