"""How the BLAS library behind NumPy behaves. It reads its settings once, when NumPy is first imported.

So `import minigpt` sets them, and this module imports nothing heavy. Only the number of threads can
be changed later, and only of OpenBLAS: `control`.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from minigpt.errors import UsageError

# An idle OpenBLAS thread spins for 2 ** this many cycles before it sleeps. Its default, 2 ** 26 (about 29 ms), keeps a
# core busy that another stage on this machine needs: two stages then take twice as long as one.
_IDLE_SPIN = "20"

_late = False  # whether a setting came after NumPy's import
_beside: set[str] = set()  # what this process has, and whether it was warned of that


def set_threads(threads: int | None = None) -> None:
    """Sets the number of BLAS threads: `threads`, or MINIGPT_THREADS, or what the environment says already.

    It has its whole effect only before NumPy is first imported: later, OpenBLAS still takes the number, when the first
    model is made. Raises UsageError for what is no number of threads.
    """
    global _late  # noqa: PLW0603
    if threads is not None and (type(threads) is not int or threads < 1):
        raise UsageError(f"threads is {threads!r:.80}, wanted a whole number of at least 1")
    wanted = {"OPENBLAS_THREAD_TIMEOUT": os.environ.get("OPENBLAS_THREAD_TIMEOUT", _IDLE_SPIN)}
    count = str(threads) if threads is not None else os.environ.get("MINIGPT_THREADS")
    if count:
        wanted["OPENBLAS_NUM_THREADS"] = count
    changed = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    _late = _late or bool(changed and "numpy" in sys.modules)
    os.environ.update(changed)


def late() -> bool:
    """Whether NumPy's BLAS was loaded before it could be told anything."""
    return _late


def computes_beside(what: str) -> None:
    """Told of a "model" and of "stages" that this process has, each whenever it begins. Warns once of what it costs
    that NumPy was imported before minigpt, which is something only where the two share the cores."""
    _beside.add(what)
    if _late and _beside == {"model", "stages"}:
        _beside.add("warned")
        import logging  # 8 ms, in which an early Ctrl-C would show a traceback

        logging.getLogger("minigpt").warning(
            "NumPy was imported before minigpt, so for 29 ms after each product its idle threads keep the cores busy: "
            "beside a model that computes in this process, its local stages may take twice as long for a token. "
            "Import minigpt before numpy"
        )


class Control(NamedTuple):
    """The number of BLAS's threads, for all of the process's next computations."""

    get: Callable[[], int]
    set: Callable[[int], object]


@functools.cache
def control() -> Control | None:
    """None where NumPy's BLAS is not OpenBLAS. NumPy must have been imported."""
    try:
        library = ctypes.CDLL(sys.modules["numpy.linalg._umath_linalg"].__file__)  # finds the names of those it needs
    except OSError:
        return None
    for prefix in ("scipy_", ""):  # of NumPy's wheels, and of everybody else
        for suffix in ("64_", ""):
            names = [f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set")]
            if all(hasattr(library, name) for name in names):
                return Control(*(getattr(library, name) for name in names))
    return None
