"""GPT-2 in NumPy, cut into stages that talk over encrypted, attested links.

    minigpt.load(model)                  a whole model in this process
    minigpt.Pipeline.local(model)        stages as child processes on this machine
    minigpt.Pipeline.connect(manifest)   stages that run elsewhere

Importing this package imports nothing heavy. It sets two variables of the environment, which the BLAS library behind
NumPy reads when NumPy is first imported: so import minigpt before numpy.

The errors of `minigpt.errors` are here too.
"""

import importlib
import os
import sys
from importlib.machinery import PathFinder

from minigpt.engine.blas import set_threads

TYPE_CHECKING = False  # as typing's, whose import takes the time in which an early Ctrl-C shows a traceback
if TYPE_CHECKING:
    from typing import Any

    from minigpt.client.inprocess import Model, load
    from minigpt.client.pipeline import Pipeline
    from minigpt.client.text import Generation, Token
    from minigpt.errors import (
        CheckpointError,
        ConfigError,
        LateStage,
        ManifestError,
        MessageError,
        MiniGPTError,
        RequestRefused,
        StageError,
        UnreachableStage,
        UntrustedStage,
        UsageError,
        WeightsMismatch,
    )

__version__ = "0.1.0"
__all__ = [
    "CheckpointError", "ConfigError", "Generation", "LateStage", "ManifestError", "MessageError", "MiniGPTError",
    "Model", "Pipeline", "RequestRefused", "StageError", "Token", "UnreachableStage", "UntrustedStage", "UsageError",
    "WeightsMismatch", "__version__", "load", "set_threads",
]  # fmt: skip

_HOME = {
    "Generation": "minigpt.client.text",
    "Model": "minigpt.client.inprocess",
    "Pipeline": "minigpt.client.pipeline",
    "Token": "minigpt.client.text",
    "load": "minigpt.client.inprocess",
}


def _check_own() -> None:
    """Refuses files of the user's that have the names of our other packages, and come before them in sys.path."""
    for name, part in (("attest", "measure.py"), ("transport", "noise.py")):
        found = PathFinder.find_spec(name)
        place = "" if found is None else found.origin or next(iter(found.submodule_search_locations or ()), "")
        folder, file = os.path.split(place)
        if not place or (file == "__init__.py" and os.path.exists(os.path.join(folder, part))):
            continue  # where there is none, the import error says so
        text = f"{place} hides minigpt's own package {name}: rename it, or start Python in another folder"
        if sys.argv[:1] == ["-m"]:  # a command: `python -m` looks for it right now
            sys.exit(f"minigpt: {text}")
        raise ImportError(text)


_check_own()
set_threads()


def __getattr__(name: str) -> "Any":
    if name not in __all__:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "minigpt.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
