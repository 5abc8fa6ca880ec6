"""GPT-2 in NumPy, cut into stages that talk over encrypted, attested links.

    minigpt.load(model)                  a whole model in this process
    minigpt.Pipeline.local(model)        stages as child processes on this machine
    minigpt.Pipeline.connect(manifest)   stages that run elsewhere

Importing this package imports nothing heavy. It sets two variables of the environment, which the BLAS library behind
NumPy reads when NumPy is first imported: so import minigpt before numpy.
"""

import importlib

from minigpt.engine.blas import set_threads

TYPE_CHECKING = False  # as typing's, whose import takes the time in which an early Ctrl-C shows a traceback
if TYPE_CHECKING:
    from typing import Any

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

set_threads()


def __getattr__(name: str) -> "Any":
    if name not in _HOME:
        raise AttributeError(f"module 'minigpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
