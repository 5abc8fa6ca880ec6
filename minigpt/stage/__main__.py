"""A stage process: `python -m minigpt.stage --manifest FILE --index I`.

It reads the manifest, loads its own layers, checks their digest, and serves until it is told to end (`ending`). It
prints one line on standard output when it is ready, and logs to standard error what an operator needs: never a prompt,
a token or a key. Launchers start it with `minigpt.launch.isolated`, so that no code runs in it that is not measured.

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
from typing import NoReturn

import minigpt
from minigpt.cli.values import few, natural, option, place, positive, seconds, told
from minigpt.errors import MiniGPTError, shortage
from minigpt.stage import streams
from minigpt.stage.ending import Ending, leave

log = logging.getLogger("minigpt.stage")


def parser() -> argparse.ArgumentParser:
    """The command line of a stage. Parsing raises DocumentError."""
    from attest.arguments import Parser  # where Ctrl-C is caught

    options = Parser(prog="python -m minigpt.stage", description="Serves one stage of a pipeline.", allow_abbrev=False)

    options.set_defaults(from_environment=[])

    def add(flag: str, metavar: str, text: str, kind: Callable[[str], object] = str, default: object = None) -> None:
        option(options, flag, default, metavar, kind, text, required=flag in ("--manifest", "--index"))

    def switch(flag: str, text: str) -> None:
        options.add_argument(flag, action="store_true", help=text)

    options.epilog = "fd:N is a descriptor handed down by whoever starts the stage."
    options.add_argument("--version", action="version", version=f"minigpt {minigpt.__version__}")
    add("--manifest", "FILE|ADDR|fd:N", "the pipeline's manifest, or where to receive it, once", place)
    add("--index", "I", "which stage this is, from 0", natural)
    add("--model", "DIR", "the checkpoint's folder, or tiny (default: the manifest's model)")
    add("--places", "FILE|ADDR|fd:N", "where the stages are, or where to receive that, once; a file is read again for "
        "each link (default: X.places.json for a manifest X.json)", place)  # fmt: skip
    add("--listen", "ADDR|fd:N", "where to serve (default: this stage's place)", place)
    add(
        "--threads",
        "N",
        "BLAS threads, pinned (default: one for each core, and fewer beside busy neighbours)",
        few,
    )
    add("--evidence", "auto|mock|nitro|snp|tdx", "what makes this stage's evidence (default: what the manifest wants); "
        "another than the manifest's is refused", default="auto")  # fmt: skip
    add("--mock-key", "FILE|ADDR|fd:N", "this stage's mock key, from `python -m attest keygen`, or where to receive it",
        place)  # fmt: skip
    add("--endorsement", "FILE|ADDR|fd:N", "or the root's endorsement of a mock key that this stage makes itself: it "
        "first prints `stage I key HEX`, the public half, and then waits for it", place)  # fmt: skip
    add("--endorsements", "DIR|ADDR", "AMD's certificates and revocation list, where the host does not hand them to "
        "its guests; or Intel's collateral. Read again for each handshake; or asked for at an address, where `minigpt "
        "endorsements` has them")  # fmt: skip
    switch("--allow-mock", "accept mock evidence, which proves nothing about hardware, where the manifest pins it")
    switch("--allow-test-root", "believe roots that are not the vendor's, where the manifest names them: for tests")
    add("--max-channels", "N", "links at once; each takes a thread, as do handshakes", positive, 128)
    add("--max-sequences", "N", "sequences at once; each has a cache in memory", positive, 32)
    add("--cache-bytes", "N", "bytes of all caches together (default: half of the memory that is free)", positive)
    add("--queue", "N", "requests that wait for a place; one more is refused", natural, 64)
    add("--max-batch", "N", "sequences computed in one pass; 1 for one at a time", few, 32)
    add("--max-handshakes", "N", "handshakes at once; one more ends another", positive, 32)
    add("--answer-timeout", "S", "seconds that the next stage may take for a step", seconds, 120.0)
    add("--handshake-timeout", "S", "seconds that a handshake may take, evidence included (default: 10, or "
        "60 where the manifest pins a platform)", seconds)  # fmt: skip
    add("--message-timeout", "S", "seconds that a message may take once it has begun", seconds, 60.0)
    add("--idle-timeout", "S", "seconds that a channel may be silent", seconds, 3600.0)
    add("--drain", "S", "seconds that answers may still take after SIGTERM; a second one ends them", seconds, 30.0)
    add(
        "--turns",
        "FILE|fd:N",
        "take turns at computing with the stages that name the same file: they share the cores",
        place,
    )
    add("--ready", "FILE|fd:N", "where to write the line that says that it serves (default: standard output); a file "
        "is there as long as it does", place)  # fmt: skip
    switch("--until-eof", "end when standard input does, so that a parent that dies takes its stages along")
    return options


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a stage, and ends the process with its exit code: nothing that is registered to run at exit does."""
    try:
        code = _main(argv)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def _main(argv: Sequence[str] | None) -> int:
    """Runs a stage; returns its exit code."""
    closed = streams.open_standard()
    try:
        from attest.document import DocumentError, refuse_private

        try:
            refuse_private(sys.argv[1:] if argv is None else argv)
            options = parser().parse_args(argv)
            if options.until_eof and 0 in closed:
                parser().error(
                    "--until-eof: standard input is closed, wanted a pipe that whoever starts this stage keeps open"
                )
        except DocumentError as error:
            print(f"minigpt.stage: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        return 130
    exposed = lock_down()
    streams.set_up(f"stage {options.index}")
    if exposed:
        log.warning("not locked down: %s", exposed)
    if not (sys.flags.isolated and sys.flags.no_site):
        log.warning(
            "not isolated: sitecustomize, .pth files and PYTHON variables may have run code here that is not measured"
        )
    minigpt.set_threads(options.threads)

    try:
        ending = Ending(options.drain)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a parent may have blocked SIGTERM, and children inherit that
        from attest import AttestationError
        from transport.errors import TransportError

        if options.until_eof:
            threading.Thread(target=_end_with_stdin, args=(ending,), name="standard input", daemon=True).start()
        from minigpt.stage.process import run  # only now, because it may raise these errors

        run(options, exposed, ending)
    except KeyboardInterrupt:
        return 130
    except (MemoryError, ImportError, RuntimeError, SystemError) as error:
        log.error("%s", shortage(error))
        return 1
    except (MiniGPTError, AttestationError, TransportError) as error:
        log.error("%s", told(error, options))
        return error.exit_code
    return 0


def lock_down() -> str:
    """Keeps weights, prompts and keys in this process: no core dumps, and on Linux no other process of this user may
    attach to it or read its memory. Root still can. Returns what the system refused, for people; "" if nothing."""
    refused = []
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError):
        refused.append("a core dump would hold its memory")
    set_dumpable, get_dumpable = 4, 3  # PR_SET_DUMPABLE and PR_GET_DUMPABLE of linux/prctl.h
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    if prctl is None or prctl(set_dumpable, 0, 0, 0, 0) or prctl(get_dumpable, 0, 0, 0, 0):
        refused.append("other processes of its user can read its memory")
    return "; ".join(refused)


def _end_with_stdin(ending: Ending) -> None:
    with suppress(OSError):  # it is closed
        while os.read(0, 4096):
            pass
    ending.begin()


if __name__ == "__main__":
    main()
