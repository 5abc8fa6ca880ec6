"""What the tests share: where the vectors lie, and small models made on the spot."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# An example may take as long as it likes: beside busy neighbours, any takes long.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

for _name in [name for name in os.environ if name.startswith("MINIGPT_") and name != "MINIGPT_UML"]:
    del os.environ[_name]  # options that somebody has set for the stages of their own
os.environ["MINIGPT_THREADS"] = "1"  # as the stages that tests start: bits are the same only with the same threads

# Whoever runs the tests may ignore or block signals (nohup does), and children inherit that.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
    signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])

import minigpt  # noqa: E402, F401 — before NumPy, whose threads it sets

VECTORS = Path(__file__).resolve().parents[1].parent / "shared" / "vectors"


_ENVIRONMENT = dict(os.environ)


def pytest_collection_finish() -> None:
    """No module that tests import may set options of the stages that all tests start."""
    changed = {name for name, _ in os.environ.items() ^ _ENVIRONMENT.items() if name.startswith("MINIGPT_")}
    if changed:
        raise pytest.UsageError(f"an imported module has changed {changed}")


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of published test vectors, which are other people's data and not part of a clone."""
    if not VECTORS.is_dir():
        pytest.skip("the published test vectors are not beside this checkout")
    return VECTORS


@pytest.fixture
def cgroup() -> Iterator[Callable[[str], Path]]:
    """Makes an empty control group (version 1) of a controller, "cpu" or "cpuset"; it is removed after the test."""
    made: list[Path] = []

    def make(controller: str) -> Path:
        path = Path("/sys/fs/cgroup", controller, f"minigpt-test-{os.getpid()}-{next(_groups)}")
        try:
            path.mkdir()
        except OSError as error:
            pytest.skip(f"no control group can be made: {path}: {error.strerror}")
        made.append(path)
        return path

    yield make
    for path in made:
        until = time.monotonic() + 60
        while True:  # until its last process has been reaped
            try:
                path.rmdir()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)


_groups = itertools.count()
