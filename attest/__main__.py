"""`python -m attest` is `attest.commands`, imported where Ctrl-C is caught."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Only a help and a version leave by SystemExit (argparse)."""
    try:
        from attest import commands

        return commands.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (MemoryError, ImportError, OSError) as error:  # a library that does not load may lack memory too
        print(f"attest: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
