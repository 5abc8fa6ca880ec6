"""A stage process: `python -m minigpt.stage --manifest FILE --index I`.

It reads the manifest, loads its own layers, checks their digest, and serves until SIGTERM. It prints one line on
standard output when it is ready, and logs to standard error what an operator needs: never a prompt, a token or a key.

This module imports no NumPy before `main` has read --threads, because the BLAS library counts its threads at import.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import minigpt
from minigpt.cli import values

if TYPE_CHECKING:
    from attest import Attester
    from minigpt.protocol.manifest import Manifest, StageEntry
    from minigpt.stage.stage import Limits
    from transport.channel import Listener

log = logging.getLogger("minigpt.stage")


def parser() -> argparse.ArgumentParser:
    """The command line of a stage."""
    options = argparse.ArgumentParser(
        prog="python -m minigpt.stage", description="Serves one stage of a pipeline.", allow_abbrev=False
    )

    def add(flag: str, metavar: str, text: str, kind: Callable[[str], object] = str, default: object = None) -> None:
        shown = "" if default is None else f" (default: {default})"
        options.add_argument(flag, type=kind, metavar=metavar, help=text + shown, default=default)

    options.add_argument("--version", action="version", version=f"minigpt {minigpt.__version__}")
    options.add_argument("--manifest", required=True, metavar="FILE|ADDR", help="the pipeline's manifest, or where to "
                         "receive it, once")  # fmt: skip
    options.add_argument("--index", required=True, type=values.natural, metavar="I", help="which stage this is, from 0")
    add("--model", "DIR", "the checkpoint's folder, or tiny (default: the manifest's model)")
    add("--listen", "ADDR|fd:N", "where to serve; fd:N is a socket handed down (default: the manifest's address)")
    add("--threads", "N", "BLAS threads (default: MINIGPT_THREADS, or as many as there are cores)", values.positive)
    add(
        "--mock-key",
        "FILE|ADDR",
        "this stage's mock key, as `python -m attest keygen` makes it, or where to receive it",
    )
    options.add_argument("--allow-mock", action="store_true", help="accept mock evidence, which proves nothing about "
                         "hardware, where the manifest says mock")  # fmt: skip
    add("--max-channels", "N", "connections at once; each takes a thread", values.positive, 64)
    add("--max-sequences", "N", "sequences at once; each has a cache in memory", values.positive, 8)
    add("--max-handshakes", "N", "handshakes at once; with one more the oldest is ended", values.positive, 32)
    add("--answer-timeout", "S", "seconds that the next stage may take for a step", values.seconds, 120.0)
    add("--handshake-timeout", "S", "seconds that a handshake may take", values.seconds, 10.0)
    add("--message-timeout", "S", "seconds that a message may take once it has begun", values.seconds, 60.0)
    add("--idle-timeout", "S", "seconds that a channel may be silent", values.seconds, 3600.0)
    add("--turns", "FILE", "compute in turns with the stages that name the same file: they share this machine's "
        "cores")  # fmt: skip
    options.add_argument("--until-eof", action="store_true", help="end when standard input does: a parent that dies "
                         "takes its stages along")  # fmt: skip
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


def run(options: argparse.Namespace) -> None:
    """Loads what the options name, and serves until a signal comes."""
    from minigpt.checkpoint import sources, weights
    from minigpt.engine import threads
    from minigpt.engine.model import GPT2
    from minigpt.errors import UsageError, WeightsMismatch
    from minigpt.protocol.manifest import MAX_MANIFEST, Manifest
    from minigpt.stage.server import Server
    from minigpt.stage.stage import Stage

    blas = threads.native()
    manifest = Manifest.parse(_receive(options.manifest, MAX_MANIFEST))
    entry = _entry(manifest, options)
    if options.mock_key is None:
        raise UsageError("the manifest wants mock evidence: give --mock-key, made by `python -m attest keygen`")
    attester = manifest.attester(entry.index, _receive(options.mock_key, 2**16))
    listener = _listener(options.listen, entry)
    folder = sources.local(options.model or manifest.model)
    loaded = weights.load(folder, manifest.config, entry.layers)
    if loaded.digest != entry.weights_sha256:
        raise WeightsMismatch(
            f"weights sha256 {loaded.digest.hex()}, the manifest wants {entry.weights_sha256.hex()}: "
            f"{folder} is another checkpoint, or damaged"
        )
    model = GPT2(manifest.config, entry.layers, loaded.tensors)
    _check_own_evidence(manifest, entry.index, attester)
    cores = _shared(options.turns)
    if cores is not None:
        threads.spread(blas)
    server = Server(Stage(manifest, entry.index, model, attester, _limits(options), cores))
    layers = f"layers {entry.layers.start}-{entry.layers.stop - 1} of {manifest.config.n_layer}"
    signal.signal(signal.SIGTERM, lambda _signal, _frame: listener.close())  # and `serve` returns
    try:
        print(f"stage {entry.index} ready: {layers}, {listener.address}", flush=True)
        log.info(
            "ready: %s, %.1f MB of weights, %s, %s evidence",
            layers,
            loaded.nbytes / 1e6,
            listener.address,
            entry.platform.name,
        )
        server.serve(listener)
    finally:
        listener.close()
        server.stop()
        log.info("ended")


def _entry(manifest: Manifest, options: argparse.Namespace) -> StageEntry:
    """What the manifest says of this stage, if it is to be served at all."""
    from minigpt.errors import ManifestError, UsageError

    manifest.check_time(time.time())
    manifest.check_verifiable()
    index: int = options.index
    if index >= len(manifest.stages):
        raise UsageError(f"--index {index}, but the manifest has {len(manifest.stages)} stages, from 0 on")
    if manifest.simulated and not options.allow_mock:
        raise ManifestError(
            "the manifest accepts mock evidence, which proves nothing about hardware: refused without --allow-mock"
        )
    return manifest.stages[index]


def _check_own_evidence(manifest: Manifest, index: int, attester: Attester) -> None:
    """Warns of a stage that no peer will accept: better said here than at each of their attempts."""
    from attest import AttestationError, Binding

    binding = Binding("R", attester.provider, bytes(32), bytes(32), attester.claims)
    try:
        manifest.verifier(index).verify(attester.attest(binding), binding)
    except AttestationError as error:
        log.warning("peers will refuse this stage's evidence: %s", error)


def _limits(options: argparse.Namespace) -> Limits:
    from minigpt.stage.stage import Limits
    from transport.channel import Deadlines

    return Limits(
        channels=options.max_channels,
        sequences=options.max_sequences,
        handshakes=options.max_handshakes,
        answer=options.answer_timeout,
        idle=options.idle_timeout,
        deadlines=Deadlines(handshake=options.handshake_timeout, message=options.message_timeout),
    )


def _shared(path: str | None) -> IO[bytes] | None:
    """The file of --turns, open as locking wants it."""
    from minigpt.errors import UsageError

    if path is None:
        return None
    try:
        return open(path, "r+b", buffering=0)
    except OSError as error:
        raise UsageError(f"--turns {path}: {error.strerror}; wanted a file that can be read and written") from None


def _listener(listen: str | None, entry: StageEntry) -> Listener:
    from minigpt.errors import UsageError
    from transport.channel import Address, Listener

    if listen is None:
        return Listener(entry.address)
    if not listen.startswith("fd:"):
        return Listener(Address.parse(listen))
    if not listen[3:].isdecimal():
        raise UsageError(f"--listen {listen}: wanted fd: and the number of an open, listening socket")
    return Listener(int(listen[3:]))


def _receive(source: str, limit: int) -> bytes:
    """The bytes of a file; or of the first connection to an address: an enclave has no files at run time."""
    from attest.document import read_file
    from minigpt.errors import UsageError
    from transport.channel import Address, receive_once

    if "://" in source:
        return receive_once(Address.parse(source), limit)
    try:
        return read_file(source, limit)
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None


def _end_with_stdin() -> None:
    with suppress(OSError):  # it is closed
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
