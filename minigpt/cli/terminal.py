"""What is printed for people."""

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line


STAGE = re.compile(r"stage (\d+) ")  # how a line begins that is of one stage
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


class Board:
    """What stages do, for `minigpt up`: on a terminal, until the block ends, one line for each, which its next one
    replaces. Elsewhere, and after that, news is one line after the other, and progress is not told.

    Lines come from any thread.
    """

    def __init__(self) -> None:
        self._lines: dict[int, str] = {}  # of each stage; of what is no stage's at -1
        self._lock = threading.Lock()
        self._shows = False

    def __enter__(self) -> "Board":
        self._shows = sys.stderr.isatty()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._shows:
                self._draw("", -1, "")
            self._shows = False

    def progress(self, line: str) -> None:
        """How far something is."""
        with self._lock:
            found = STAGE.match(line)
            if self._shows and line:
                self._draw("", int(found[1]) if found else -1, line)

    def news(self, line: str) -> None:
        """What has changed."""
        with self._lock:
            if not self._shows:
                say(line)
            elif found := STAGE.match(line):
                self._draw("", int(found[1]), line)
            else:
                self._draw(f"{line}\n", -1, "")

    def _draw(self, above: str, place: int, line: str) -> None:
        """Draws all lines anew, below what is `above`. The cursor is at the beginning of the line after them."""
        back = f"\033[{len(self._lines)}F" if self._lines else ""
        self._lines.pop(-1, None)  # what it told of has been done
        if line:
            self._lines[place] = line
        width = shutil.get_terminal_size().columns - 1  # a line that goes on in the next one would not be replaced
        shown = "".join(f"{line[:width]}\n" for _, line in sorted(self._lines.items()))
        print(f"{back}\r\033[J{above}{shown}", end="", file=sys.stderr, flush=True)
