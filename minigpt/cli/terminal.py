"""What is printed for people."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line


GROUNDS = (None, 230, 229, 222, 215, 209)  # of the 256 colours of a terminal: none, and pale yellow to red


def say(line: str) -> None:
    """Prints a line for people, to standard error."""
    print(f"{line}\n", end="", file=sys.stderr)  # in one piece, whatever other threads say


def visible(text: str) -> str:
    """Generated text as a terminal may have it: a stage that is malicious chooses ids that write escape sequences."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text) if sys.stdout.isatty() else text


def shaded(text: str, share: float) -> str:
    """Text on a ground that is the stronger, the greater this share of 1 is; plain if it is not for a terminal."""
    ground = GROUNDS[min(int(share * len(GROUNDS)), len(GROUNDS) - 1)]
    if ground is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[30;48;5;{ground}m{text}\033[0m"


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
