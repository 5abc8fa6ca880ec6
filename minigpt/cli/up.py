"""What `minigpt up` does: the stages of a pipeline, its manifest and its places."""

import argparse
import os
import shlex
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from attest.document import (
    show,
    write_file,
)
from minigpt.checkpoint import sources
from minigpt.cli import pipelines
from minigpt.cli.plan import check_output
from minigpt.cli.status import MOCK_NOTICE
from minigpt.cli.terminal import Board, say
from minigpt.errors import UsageError
from minigpt.launch.launcher import Launcher
from minigpt.protocol import addresses

LOOK = 0.5  # seconds between two looks of `minigpt up` at whether a stage was given up


def up(options: argparse.Namespace) -> int:
    """`minigpt up`: starts stages, writes the manifest and the places, and stays until it is told to end. Both files go
    with the stages."""
    beside = addresses.beside(options.output)
    check_output(options.output)
    ended = threading.Event()
    checkpoint, split = sources.find(options.model or "tiny", options.revision), pipelines.split_of(options)
    with Board() as board:
        stages = _launch(options, checkpoint, split, progress=board.progress, news=board.news)
    try:
        for ending in (signal.SIGTERM, signal.SIGHUP):  # the latter when its terminal is closed, unless under nohup
            if signal.getsignal(ending) is not signal.SIG_IGN:
                signal.signal(ending, lambda _signal, _frame: ended.set())
        check_output(options.output)  # of another one, which was sooner
        write_file(beside, stages.places)
        write_file(options.output, stages.document)  # last: whoever waits for it can connect
        model = f" --model {shlex.quote(options.model)}" if options.model else ""
        flags = f"--manifest {shlex.quote(options.output)}{model} --allow-mock"
        show(f"minigpt generate {shlex.quote('The capital of France is')} {flags}\nminigpt serve {flags}\n")
        say(f"{MOCK_NOTICE}. Ctrl-C ends the stages")
        places = stages.places
        while not ended.wait(LOOK):
            if stages.places != places:  # a stage has moved
                places = stages.places
                write_file(beside, places)
            if (failure := stages.failure) is not None:
                raise failure
    finally:
        stages.stop()
        with suppress(OSError):
            if Path(options.output).read_bytes() == stages.document:
                os.unlink(options.output)
                os.unlink(beside)
    return 0


def _launch(options: argparse.Namespace, checkpoint: sources.Checkpoint, split: str | int, **told: Any) -> Launcher:
    """Starts the stages where --on says."""
    if options.on == "local":
        from minigpt.launch.local import LocalStages

        if options.address is not None or options.insecure_ray:
            raise UsageError("--address and --insecure-ray are for --on ray")
        return LocalStages(checkpoint, split, threads=options.threads, **told)
    try:
        from minigpt.launch.on_ray import RayStages
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError("--on ray needs Ray: pip install '.[ray]' in the project's folder") from None
    insecure, address = options.insecure_ray, options.address or "auto"
    return RayStages(checkpoint, split, address=address, insecure=insecure, threads=options.threads, **told)
