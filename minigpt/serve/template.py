"""Renders a checkpoint's chat template, in a process of its own: `python -I template.py`, JSON in, text out.

A template is a program that came with the checkpoint. Here it has jinja2's sandbox, and little memory and time; loops
and strings that have no end, end with this process.
"""

import json
import resource
import sys
from typing import NoReturn

MEMORY = 512 * 2**20  # bytes of address space; Python and jinja2 take about 100 MB
SECONDS = 2  # of the processor


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    given = json.load(sys.stdin)
    # As transformers makes it.
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    sandbox.globals["raise_exception"] = _raise
    try:
        text = sandbox.from_string(given.pop("template")).render(**given, add_generation_prompt=True)
    except Exception as error:
        json.dump({"error": f"{type(error).__name__}: {error}"[:400]}, sys.stdout)
    else:
        json.dump({"text": text}, sys.stdout)


if __name__ == "__main__":
    main()
