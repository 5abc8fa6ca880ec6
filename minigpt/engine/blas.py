"""How the BLAS library behind NumPy behaves. It reads its settings once, when NumPy is first imported.

So `import minigpt` sets them, and this module imports nothing but the standard library. Only the number of threads can
be changed later, and only of OpenBLAS: `control`.
"""

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

# An idle OpenBLAS thread spins for 2 ** this many cycles before it sleeps. Its default, 2 ** 26 (about 29 ms), keeps a
# core busy that another stage on this machine needs: two stages then take twice as long as one.
_IDLE_SPIN = "20"

_late = False  # whether a setting came after NumPy's import


def set_threads(threads: int | None = None) -> None:
    """Sets the number of BLAS threads: `threads`, or MINIGPT_THREADS, or what the environment says already.

    It has an effect only before NumPy is first imported.
    """
    global _late  # noqa: PLW0603
    wanted = {"OPENBLAS_THREAD_TIMEOUT": os.environ.get("OPENBLAS_THREAD_TIMEOUT", _IDLE_SPIN)}
    count = str(threads) if threads is not None else os.environ.get("MINIGPT_THREADS")
    if count is not None:
        wanted["OPENBLAS_NUM_THREADS"] = count
    changed = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    _late = _late or bool(changed and "numpy" in sys.modules)
    os.environ.update(changed)


def warn_if_late() -> None:
    """Warns once, when a model is made, if NumPy was imported before minigpt."""
    if _late:
        warnings.warn(
            "NumPy was imported before minigpt, so its idle threads keep spinning for 29 ms: whatever else runs on "
            "these cores, another stage for example, takes up to twice as long. Import minigpt before numpy",
            RuntimeWarning,
            stacklevel=3,
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
