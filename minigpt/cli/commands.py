"""The commands, and what those do that have no file of their own. `minigpt.cli.parser` declares the options."""

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attest import dump_file
from attest.document import CLIENT_KEY, show, write_file, write_private
from minigpt.cli import bench as benchmark
from minigpt.cli import clients, pipelines
from minigpt.cli import status as reporting
from minigpt.cli.generate import generate, score
from minigpt.cli.plan import plan
from minigpt.cli.status import say_if_mock
from minigpt.cli.terminal import progress, say
from minigpt.cli.up import up
from minigpt.client.pipeline import Pipeline
from minigpt.errors import UsageError
from minigpt.protocol import addresses, links, manifest
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.messages import StageReport
from minigpt.stage import endorsements as deliveries
from minigpt.stage import streams
from minigpt.stage.__main__ import parser as stage_parser
from transport.address import Address
from transport.noise import KeyPair
from transport.relay import Relay
from transport.sockets import Listener

WATCH = 5.0  # seconds that the stages may take to report to `minigpt serve`


def status(options: argparse.Namespace) -> int:
    """`minigpt status`: the state that every stage reports, and whether its evidence was accepted; with --watch again
    and again, until Ctrl-C."""
    if options.save_evidence is not None:
        _make_folder(Path(options.save_evidence))
    data, parsed = manifest.load(options.manifest)
    entries = parsed.stages
    places = options.places or addresses.beside(options.manifest)
    where = Addresses(len(entries), places, pipelines.located(options))
    pipelines.warn_of_idle(options, parsed)
    connect = partial(pipelines.connect, options, data, places=places, text=False, connections=1)
    redraw = options.watch is not None and sys.stdout.isatty()
    listens = partial(links.listens, where, timeout=options.connect_timeout)
    with reporting.Looker(connect, entries, listens) as looker:
        for number in itertools.count():
            reports = looker.look()
            if options.save_evidence is not None:
                _save_evidence(Path(options.save_evidence), reports)
            stages = [reporting.state(parsed, report, where.shown(report.stage)) for report in reports]
            days = parsed.days_left(time.time())
            if options.json:
                show(json.dumps({"stages": stages, "manifest_expires_days": days}) + "\n")
            else:
                between = "" if number == 0 else "\n"
                show((reporting.CLEAR if redraw else between) + reporting.shown(stages))
                if number == 0 or redraw:
                    say_if_mock(stages)
                    if any(one["error"] is None and one["steps"] is None for one in stages):
                        say("- is told to operators only: give the --client-key of one that the manifest lists")
                    if parsed.slow:
                        say(f"the manifest expires in {days:.1f} days")
            if options.watch is None:
                break
            time.sleep(options.watch)
    return reporting.exit_code(reports)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise UsageError(
            f"--save-evidence {folder}: {reason}, wanted a folder, which is made if it is missing"
        ) from None


def _save_evidence(folder: Path, reports: Sequence[StageReport]) -> None:
    for report in reports:
        if report.evidence:
            write_file(folder / f"stage-{report.stage}.json", report.evidence)


def bench(options: argparse.Namespace) -> int:
    """`minigpt bench`: tables, or every latency; and a plot. With --clients, a table of their own."""
    if options.plot is not None:
        if options.clients is not None:
            raise UsageError("--plot draws the latencies of one client at a time: leave out --clients, or --plot")
        from minigpt.cli import plot  # before anything is measured: matplotlib may be missing
    names = ("prompt", "runs", "max_tokens", "revision", "threads")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.clients is not None:
        defaults = stage_parser()
        most = defaults.get_default("max_sequences") + defaults.get_default("queue")
        if max(options.clients) > most:
            raise UsageError(f"--clients {max(options.clients)}: a stage serves and lets wait at most {most} at once")
        with progress() as tell:
            crowds = clients.measure(options.model or "tiny", options.stages, options.clients, **chosen, progress=tell)
        told = json.dumps(clients.figures(crowds)) if options.format == "json" else clients.markdown(crowds)
        show(told + "\n")
        return 0
    with progress() as tell:
        results = benchmark.measure(options.model or "tiny", options.stages, **chosen, progress=tell)
    text = json.dumps(benchmark.figures(results)) if options.format == "json" else benchmark.tables(results)
    show(text + "\n")
    if options.plot is not None:
        name = Path(options.model or "tiny").name
        title = f"{name}: {options.runs} interleaved runs of {options.max_tokens} tokens"
        write_file(options.plot, plot.draw(benchmark.summarise(results), title, options.plot[-3:].lower()))
    return 0


def serve(options: argparse.Namespace) -> int:
    """`minigpt serve`: OpenAI's HTTP interface, until SIGTERM or Ctrl-C."""
    try:
        from minigpt.serve.guard import lines
        from minigpt.serve.server import CONNECTIONS, read_key, run
    except ImportError as error:
        raise UsageError(
            f"the extra serve is missing ({error}): pip install '.[serve]' in the project's folder"
        ) from None
    api_key = read_key(options)
    streams.make_room(CONNECTIONS + options.connections, "minigpt serve")
    client_key = None if options.client_key is None else pipelines.read_key(options.client_key)
    log = lines(options.log_format, say)
    with (
        pipelines.opened(options, lambda line: log({"message": line}), connections=options.connections) as pipeline,
        # One more link, which never waits for a generation, asks for the stages' state.
        Pipeline(
            pipeline.manifest,
            pipeline.addresses,
            None,
            True,
            WATCH,
            client_key=client_key,
            connections=1,
            allow_test_root=True,
        ) as watcher,
    ):
        run(pipeline, watcher, options, api_key, say)
    return 0


def keygen(options: argparse.Namespace) -> int:
    """`minigpt keygen`: a file with a client's private key; prints the public one."""
    pair = KeyPair.generate()
    try:
        write_private(options.output, dump_file(CLIENT_KEY, private=pair.private, public=pair.public))
    except FileExistsError:
        raise UsageError(f"{options.output} exists, and a key file is never overwritten: choose another name") from None
    except FileNotFoundError:
        raise UsageError(f"--output {options.output}: there is no such folder: make it first") from None
    show(pair.public.hex() + "\n")
    say(f"wrote the private key to {options.output}; give the line above to `minigpt plan --client`, or --operator")
    return 0


def relay(options: argparse.Namespace) -> int:
    """`minigpt relay`: passes connections on until SIGTERM or Ctrl-C, and logs peers and bytes."""
    listen, target = Address.parse(options.listen), Address.parse(options.target)
    if listen == target:
        raise UsageError(f"got {target} twice: a relay to itself never ends; wanted the address of a stage or relay")
    streams.set_up("relay")
    streams.make_room(2 * options.connections, f"--connections {options.connections}", ", or lower it")
    passing = Relay(listen, target, options.connections)
    signal.signal(signal.SIGTERM, lambda _signal, _frame: passing.close())
    try:
        show(f"relay ready: {passing.address} to {target}\n")
        passing.serve()
    finally:
        passing.stop()
    return 0


def endorsements(options: argparse.Namespace) -> int:
    """`minigpt endorsements`: sends a folder's files to stages that ask, until SIGTERM or Ctrl-C."""
    streams.set_up("endorsements")
    deliveries.checked(options.folder)
    with Listener(Address.parse(options.listen)) as listener:
        signal.signal(signal.SIGTERM, lambda _signal, _frame: listener.close())
        show(f"endorsements ready: {listener.address}\n")
        deliveries.serve(listener, options.folder)
    return 0


COMMANDS = {
    each.__name__: each for each in (generate, score, plan, up, status, bench, serve, keygen, relay, endorsements)
}  # by its name on the command line
