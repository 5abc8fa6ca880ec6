"""Attacks a running pipeline as a hostile host would, and prints what came of each attack at both ends.

    python scripts/hostile_host.py                  every attack, thoroughly: some minutes
    python scripts/hostile_host.py --quick          the short form of each
    python scripts/hostile_host.py --only 1,2,28-33
    python scripts/hostile_host.py --list

It starts the stages of the embedded model (or of --model, a folder) as processes, a client as another, and a proxy on
every link. A new attack is one function in tests/attacks. Exit code 1 if one attack did what it must not.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import time
from pathlib import Path

os.environ["MINIGPT_THREADS"] = "1"  # of every process: the same bits everywhere
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from attacks import ATTACKS, Survived, everything  # noqa: E402
from attacks.arena import Arena  # noqa: E402

from minigpt.checkpoint import sources  # noqa: E402

COLUMNS = (3, 44, 40, 48, 48, 8)  # characters


def main() -> int:
    """Runs the attacks; returns the exit code."""
    options = parse()
    everything()
    chosen = [ATTACKS[number] for number in sorted(ATTACKS) if options.only is None or number in options.only]
    if not chosen:
        print("no such attack: see --list", file=sys.stderr)
        return 2
    if options.list:
        for attack in chosen:
            print(f"{attack.number:3}  {attack.title}\n     → {attack.expected}")
        return 0
    failed = []
    print(row("", "attack", "expected", "seen at the client", "seen at the stage", "verdict"))
    with Arena(sources.find(options.model).folder, thorough=not options.quick, suite=options.suite) as arena:
        arena.control()
        for attack in chosen:
            began = time.monotonic()
            try:
                arena.calm()
                client, stage = attack.run(arena)
                verdict = "ok"
            except Survived as error:
                client, stage, verdict = str(error), "", "FAILED"
            except Exception as error:
                client, stage, verdict = f"the kit failed: {type(error).__name__}: {error}", "", "FAILED"
                if options.trace:
                    raise
            if verdict != "ok":
                failed.append(attack.number)
            seconds = f"{verdict} {time.monotonic() - began:.0f} s"
            print(row(str(attack.number), attack.title, attack.expected, client, stage, seconds), flush=True)
            for note in arena.notes:
                print(f"     measured: {note}", flush=True)
            arena.notes.clear()
    print(f"{len(chosen) - len(failed)} of {len(chosen)} attacks came to nothing; the others: {failed or 'none'}")
    return 1 if failed else 0


def row(*cells: str) -> str:
    """A row of the table, each cell broken into lines of its column."""
    columns = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, COLUMNS, strict=True)]
    height = max(map(len, columns))
    padded = [[*lines, *[""] * (height - len(lines))] for lines in columns]
    return "\n".join(
        "  ".join(line.ljust(width) for line, width in zip(lines, COLUMNS, strict=True)).rstrip()
        for lines in zip(*padded, strict=True)
    )


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", type=numbers, metavar="1,2,28-33", help="these attacks")
    options.add_argument("--list", action="store_true", help="list them")
    options.add_argument("--quick", action="store_true", help="the short form of each")
    options.add_argument("--model", default="tiny", metavar="DIR", help="the model (default: the embedded one)")
    options.add_argument("--suite", type=int, default=2, choices=(1, 2), help="of the link protocol (default: 2)")
    options.add_argument("--trace", action="store_true", help="end at an error of the kit itself, with its traceback")
    return options.parse_args()


def numbers(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


if __name__ == "__main__":
    sys.exit(main())
