"""A stage process: `python -m minigpt.stage --manifest FILE --index I`.

It reads the manifest, loads its own layers, checks their digest, and serves until SIGTERM. It prints one line on
standard output when it is ready, and logs to standard error what an operator needs: never a prompt, a token or a key.

This module imports no NumPy before `main` has read --threads, because the BLAS library counts its threads at import.
"""

import argparse
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import minigpt
from minigpt.cli.values import natural, positive, seconds

log = logging.getLogger("minigpt.stage")


def parser() -> argparse.ArgumentParser:
    """The command line of a stage."""
    options = argparse.ArgumentParser(
        prog="python -m minigpt.stage", description="Serves one stage of a pipeline.", allow_abbrev=False
    )

    def add(flag: str, metavar: str, text: str, kind: Callable[[str], object] = str, default: object = None) -> None:
        shown = "" if default is None else f" (default: {default})"
        required = flag in ("--manifest", "--index")
        options.add_argument(flag, type=kind, metavar=metavar, help=text + shown, default=default, required=required)

    def switch(flag: str, text: str) -> None:
        options.add_argument(flag, action="store_true", help=text)

    options.add_argument("--version", action="version", version=f"minigpt {minigpt.__version__}")
    add("--manifest", "FILE|ADDR", "the pipeline's manifest, or where to receive it, once")
    add("--index", "I", "which stage this is, from 0", natural)
    add("--model", "DIR", "the checkpoint's folder, or tiny (default: the manifest's model)")
    add("--listen", "ADDR|fd:N", "where to serve; fd:N is a socket handed down (default: the manifest's address)")
    add(
        "--threads",
        "N",
        "BLAS threads, pinned (default: MINIGPT_THREADS, or one for each core and fewer beside busy neighbours)",
        positive,
    )
    add("--mock-key", "FILE|ADDR", "this stage's mock key, from `python -m attest keygen`, or where to receive it")
    switch("--allow-mock", "accept mock evidence, which proves nothing about hardware, where the manifest pins it")
    add("--max-channels", "N", "connections at once; each takes a thread", positive, 64)
    add("--max-sequences", "N", "sequences at once; each has a cache in memory", positive, 8)
    add("--max-handshakes", "N", "handshakes at once; one more ends the oldest", positive, 32)
    add("--answer-timeout", "S", "seconds that the next stage may take for a step", seconds, 120.0)
    add("--handshake-timeout", "S", "seconds that a handshake may take", seconds, 10.0)
    add("--message-timeout", "S", "seconds that a message may take once it has begun", seconds, 60.0)
    add("--idle-timeout", "S", "seconds that a channel may be silent", seconds, 3600.0)
    add("--turns", "FILE", "take turns at computing with the stages that name the same file: they share the cores")
    switch("--until-eof", "end when standard input does, so that a parent that dies takes its stages along")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a stage; returns its exit code."""
    options = parser().parse_args(argv)
    lock_down()
    logging.basicConfig(level=logging.INFO, format=f"stage {options.index}: %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda _signal, _frame: os._exit(0))  # until there is something to end in order
    minigpt.set_threads(options.threads)

    from attest import AttestationError
    from minigpt.errors import MiniGPTError
    from minigpt.stage.process import run
    from transport.errors import TransportError

    try:
        if options.until_eof:
            threading.Thread(target=_end_with_stdin, name="standard input", daemon=True).start()
        run(options)
    except KeyboardInterrupt:
        return 130
    except (MiniGPTError, AttestationError, TransportError) as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def lock_down() -> None:
    """Keeps weights, prompts and keys in this process: no core dumps, and on Linux no other process of this user may
    attach to it or read its memory. Root still can."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pr_set_dumpable = 4  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)


def _end_with_stdin() -> None:
    with suppress(OSError):  # it is closed
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
