"""The command line: `minigpt` and `python -m minigpt` are this.

Exit codes: 0 done, 1 failed or request refused, 2 usage, 3 attestation or policy refused, 4 peer unreachable or timed
out, 5 weights do not match their digest, 130 interrupted, 141 nobody reads the output.
"""

import io
import os
import sys
from collections.abc import Sequence

from minigpt.errors import MiniGPTError, UsageError, shortage  # the rest is imported where Ctrl-C is caught


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # a closed descriptor would be taken by the next socket, and printed into
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to end
    options = None
    try:
        from attest import AttestationError
        from attest.document import DocumentError, refuse_private, show
        from minigpt.cli.parser import parser
        from minigpt.cli.values import told
        from transport.errors import TransportError

        try:
            refuse_private(sys.argv[1:] if argv is None else argv)
            options = parser().parse_args(argv)
        except DocumentError as error:
            raise UsageError(str(error)) from None
        except SystemExit:  # argparse has printed a help or a version
            show("")
            raise
        from minigpt.cli.commands import COMMANDS

        code = COMMANDS[options.command](options)
    except KeyboardInterrupt:  # first, because it may come before the names below are imported
        return 130
    except (MemoryError, ImportError, RuntimeError, SystemError) as error:
        print(f"minigpt: {shortage(error)}", file=sys.stderr)
        return 1
    except (MiniGPTError, AttestationError, TransportError) as error:
        message = str(error) if options is None else told(error, options)
        print("\n  ".join([f"minigpt: {message}", *getattr(error, "checks", ())]), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 141
    except OSError as error:
        print(f"minigpt: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return 1
    return code


def console() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    console()
