"""What is printed for people."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line


def say(line: str) -> None:
    """Prints a line for people, to standard error."""
    print(f"{line}\n", end="", file=sys.stderr)  # in one piece, whatever other threads say


def visible(text: str) -> str:
    """Generated text as a terminal may have it: a stage that is malicious chooses ids that write escape sequences."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text) if sys.stdout.isatty() else text


@contextmanager
def progress(later: Callable[[str], None] = say) -> Iterator[Callable[[str], None]]:
    """Prints lines of which each replaces the one before, and none is left in the end; only on a terminal. What there
    is to tell after that goes to `later`."""
    shown, ended = "", False

    def tell(line: str) -> None:
        nonlocal shown
        if ended:
            later(line)
        elif line != shown and sys.stderr.isatty():
            shown = line
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        tell("")
        ended = True
