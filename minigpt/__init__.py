"""GPT-2 in NumPy, cut into stages that talk over encrypted, attested links.

    minigpt.load(model)                  a whole model in this process
    minigpt.Pipeline.local(model)        stages as child processes on this machine
    minigpt.Pipeline.connect(manifest)   stages that run elsewhere

Importing this package imports nothing heavy, and sets how the BLAS library behind NumPy behaves, which it reads once,
when NumPy is first imported. So import minigpt before numpy.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.client.inprocess import Model, load
    from minigpt.client.pipeline import Pipeline
    from minigpt.client.text import Generation, Token

__version__ = "0.1.0"
__all__ = ["Generation", "Model", "Pipeline", "Token", "__version__", "load", "set_threads"]

_HOME = {
    "Generation": "minigpt.client.text",
    "Model": "minigpt.client.inprocess",
    "Pipeline": "minigpt.client.pipeline",
    "Token": "minigpt.client.text",
    "load": "minigpt.client.inprocess",
}

# An idle OpenBLAS worker spins for 2 ** this many cycles before it sleeps. Its default, 2 ** 26 (about 29 ms), keeps a
# core busy that another stage on this machine needs: two stages then take twice the time of one.
_IDLE_SPIN = "20"


def set_threads(threads: int | None = None) -> None:
    """Sets the number of BLAS threads: `threads`, or MINIGPT_THREADS, or what the environment says already.

    Works only before NumPy is imported, and warns if it is too late.
    """
    wanted = {"OPENBLAS_THREAD_TIMEOUT": os.environ.get("OPENBLAS_THREAD_TIMEOUT", _IDLE_SPIN)}
    count = str(threads) if threads is not None else os.environ.get("MINIGPT_THREADS")
    if count is not None:
        wanted["OPENBLAS_NUM_THREADS"] = count
    changed = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    if changed and "numpy" in sys.modules:
        warnings.warn(
            "NumPy was imported before minigpt, so its threads keep their settings and stages slow each other down: "
            "import minigpt first",
            RuntimeWarning,
            stacklevel=2,
        )
    os.environ.update(changed)


set_threads()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
