"""What each command does. `minigpt.cli.parser` declares the options."""

import argparse
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from attest import MAX_FILE, dump_file, open_file
from attest.document import (
    CLIENT_KEY,
    DocumentError,
    read_private,
    show,
    write_file,
    write_private,
)
from minigpt.checkpoint import sources
from minigpt.cli import bench as benchmark
from minigpt.cli import clients, pins
from minigpt.cli import status as reporting
from minigpt.cli.terminal import Board, progress, say, shaded, visible
from minigpt.cli.values import Variable, positive
from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Generation, Token, ids_in, perplexity
from minigpt.errors import RequestRefused, StageError, UntrustedStage, UsageError
from minigpt.launch import plan as planning
from minigpt.launch.launcher import Launcher
from minigpt.protocol import addresses, manifest
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.messages import StageReport
from minigpt.protocol.request import Options, check_top, seed_of
from minigpt.stage import endorsements as deliveries
from minigpt.stage import streams
from transport.address import Address
from transport.noise import KeyPair
from transport.relay import Relay
from transport.sockets import Listener

OPTIONS = {field.name for field in fields(Options)}  # of a generation; the command line has the same names
LOOK = 0.5  # seconds between two looks of `minigpt up` at whether a stage was given up
WATCH = 5.0  # seconds that the stages may take to report to `minigpt serve`
MOCK_NOTICE = "mock evidence: the signatures are valid, but they prove nothing about hardware"


def generate(options: argparse.Namespace) -> int:
    """`minigpt generate`: text as it arrives, then a summary; or all of it as one object; or a loop of prompts."""
    prompt = options.prompt
    chosen = {name: value for name, value in vars(options).items() if name in OPTIONS}
    chosen["logit_bias"] = _biases(options.logit_bias)
    chosen["logprobs"] |= chosen["top_logprobs"] > 0  # the token itself may not be among the most likely
    _warn_of_idle(options)
    if prompt is None:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise UsageError("PROMPT is missing, and asked for only on a terminal: give it, or - for standard input")
        if options.json or options.json_lines:
            flag = "--json" if options.json else "--json-lines"
            raise UsageError(f"{flag} needs a PROMPT: a prompt loop prints text")
        return _prompt_loop(options, chosen)
    if prompt == "-":
        prompt = _text(sys.stdin.buffer.read(), "standard input")
    with _pipeline(options) as pipeline:
        if options.json:
            answers = [
                _answer(generation, pipeline) for generation in _generations(pipeline, prompt, chosen, options.n)
            ]
            told = answers[0] if options.n == 1 else {"answers": answers}
            show(json.dumps({**told, "stages": _stage_states(pipeline)}) + "\n")
        elif options.json_lines:
            for generation in _generations(pipeline, prompt, chosen, options.n):
                for token in generation:
                    show(json.dumps(_listed(token)) + "\n")
                show(json.dumps(_figures(generation)) + "\n")
        else:
            paces = []
            for generation in _generations(pipeline, prompt, chosen, options.n):
                _print(generation)
                paces.append((_figures(generation), generation))
            _say_stages(_stage_states(pipeline))
            for figures, generation in paces:
                _say_pace(figures, pipeline)
                _say_interruptions(generation)
    return 0


def _warn_of_idle(options: argparse.Namespace) -> None:
    """Warns of the sampling options that this generation makes no use of."""
    if not options.temperature:
        why = "at temperature 0 the most likely token is taken each time: give --temperature 1 to draw"
        _idle(options, why, seed=None, top_k=0, top_p=1.0, min_p=0.0)
    shaped = options.logit_bias or any(
        getattr(options, name) != off
        for name, off in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0))
    )
    if options.temperature or shaped:
        _idle(
            options,
            "nothing is drafted at a temperature above 0, or with a bias or penalties: leave one of them out",
            draft=0,
        )
    if not (options.json or options.json_lines):
        _idle(options, "only --json shows it: add --json", logprobs=False, top_logprobs=0)


def _idle(options: argparse.Namespace, why: str, **off: object) -> None:
    """Warns of flags that do nothing here; each with its value that asks for nothing. A variable of the environment
    may be meant for other commands."""
    variables = {each.name for each in options.from_environment}
    idle = [
        f"--{name.replace('_', '-')}"
        for name, value in off.items()
        if getattr(options, name) not in (value, None) and f"MINIGPT_{name.upper()}" not in variables
    ]
    if idle:
        say(f"warning: {' and '.join(idle)} ha{'s' if len(idle) == 1 else 've'} no effect: {why}")


def _biases(pairs: Sequence[tuple[int, float]]) -> dict[int, float]:
    biases = dict(pairs)
    if len(biases) < len(pairs):
        raise UsageError("--logit-bias has an id twice, wanted each once")
    return biases


def _text(data: bytes, where: str) -> str:
    """The text in a file. Raises UsageError."""
    try:
        text = data.decode("utf-8-sig")  # a file from Windows may have a byte-order mark
    except UnicodeDecodeError:
        raise UsageError(f"{where} is not UTF-8 text") from None
    return text.replace("\r\n", "\n").removesuffix("\n")  # the newline that ends its last line


def _answer(generation: Generation, pipeline: Pipeline) -> dict[str, Any]:
    """An answer as --json tells it."""
    tokens = list(generation)
    text = None if pipeline.tokenizer is None else "".join(token.text or "" for token in tokens)
    return {"text": text, "tokens": [_listed(token) for token in tokens], **_figures(generation)}


def _listed(token: Token) -> dict[str, Any]:
    top = [each._asdict() for each in token.top]
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "top": top}


def _generations(pipeline: Pipeline, prompt: str, chosen: dict[str, Any], count: int) -> Iterator[Generation]:
    """Answers to one prompt, each to be read before the next is asked for."""
    seed = chosen["seed"]
    for index in range(count):
        own = seed if seed is None else seed_of(seed, index)
        with closing(_generation(pipeline, prompt, chosen | {"seed": own})) as generation:
            yield generation
        seed = generation.seed if index == 0 else seed


def score(options: argparse.Namespace) -> int:
    """`minigpt score`: a line for each token, then the perplexity; or all of it as one object."""
    if options.file == "-":
        text = _text(sys.stdin.buffer.read(), "standard input")
    else:
        try:
            text = _text(Path(options.file).read_bytes(), options.file)
        except OSError as error:
            raise UsageError(f"{options.file}: {error.strerror}") from None
    check_top("top_logprobs", options.top_logprobs)
    with _pipeline(options) as pipeline:
        tokens = pipeline.score(text if pipeline.tokenizer is not None else ids_in(text), options.top_logprobs)
        stages = _stage_states(pipeline)
    found = perplexity(tokens)
    if options.json:
        show(json.dumps({"tokens": [_listed(token) for token in tokens], "perplexity": found, "stages": stages}) + "\n")
        return 0
    for token in tokens:
        number = f"{'-':>9}" if token.logprob is None else f"{token.logprob:9.4f}"
        name = str(token.id) if pipeline.tokenizer is None else pipeline.tokenizer.name(token.id)
        surprise = 0.0 if token.logprob is None else 1 - math.exp(token.logprob)
        show(f"{number}  {shaded(visible(json.dumps(name, ensure_ascii=False)), surprise)}\n")
    _say_stages(stages)
    say("1 token, which has none before it" if found is None else f"{len(tokens)} tokens, perplexity {found:.4f}")
    return 0


def _generation(pipeline: Pipeline, prompt: str, chosen: dict[str, Any]) -> Generation:
    given = prompt if pipeline.tokenizer is not None else ids_in(prompt)
    return pipeline.generate(given, **chosen, spans=True)  # for the bytes of each token


def _print(generation: Generation) -> None:
    """Prints tokens as they arrive."""
    try:
        for token in generation:
            show(f"{token.id} " if token.text is None else visible(token.text))
    finally:
        if generation.times:
            show("\n")  # so that what follows, an error too, is on a line of its own


def _prompt_loop(options: argparse.Namespace, chosen: dict[str, Any]) -> int:
    """Answers prompts from the terminal until Ctrl-D."""
    with suppress(ImportError):  # some Pythons are built without: lines can then be typed, but not edited
        import readline  # noqa: F401 — makes `input` edit lines and remember them, in memory only
    with _pipeline(options) as pipeline:
        pipeline.generate([0], **chosen)  # sent only if iterated: refuses options now, and not at every prompt
        _say_stages(_stage_states(pipeline))
        say("Enter continues your text, Ctrl-C cancels an answer, Ctrl-D ends")
        while (prompt := _ask()) is not None:
            try:
                for generation in _generations(pipeline, prompt, chosen, options.n) if prompt else ():
                    _print(generation)
                    _say_pace(_figures(generation), pipeline)
                    _say_interruptions(generation)
            except KeyboardInterrupt:
                say("\ncancelled")
            except UntrustedStage:  # the others may not happen to the next prompt
                raise
            except (UsageError, RequestRefused, StageError) as error:
                say(f"minigpt: {error}")
    return 0


def _ask() -> str | None:
    """A prompt: "" for one given up with Ctrl-C, None at the end of the input, Ctrl-D."""
    try:
        return input("> ")
    except KeyboardInterrupt:
        show("\n")
        return ""
    except EOFError:
        show("\n")
        return None
    except UnicodeDecodeError:
        say("minigpt: the prompt is not UTF-8 text")
        return ""


def _pipeline(options: argparse.Namespace, told: Callable[[str], None] = say, **more: Any) -> Pipeline:
    """The pipeline that the options name: a running one, or child processes of our own. Of those that end, and are
    started again, `told` is told."""
    local = [flag for flag in ("stages", "split") if getattr(options, flag) is not None]
    if options.manifest is not None and not (local and isinstance(options.manifest, Variable)):
        if local:
            raise UsageError(f"--{local[0]} is for local stages: the manifest says what its pipeline is")
        _idle(options, "the stages of --manifest run already: leave it out", threads=None)
        _idle(options, "the manifest pins a commit: leave it out", revision=None)
        return _connect(
            options, options.manifest, places=options.places, model=options.model, retry_for=options.retry_for, **more
        )
    for flag in ("manifest_sha256", "places", "place", "client_key"):
        if not isinstance(getattr(options, flag) or None, Variable | None):
            raise UsageError(f"--{flag.replace('_', '-')} needs --manifest")
    _idle(options, "it is for --manifest, and local stages have no platform to wait for", handshake_timeout=None)
    split, model = _split(options), options.model or "tiny"
    shape: dict[str, Any] = more | ({"split": split} if isinstance(split, str) else {"stages": split})
    shape |= {
        name: getattr(options, name) for name in ("revision", "threads", "timeout", "connect_timeout", "retry_for")
    }
    with progress(told) as tell:
        return Pipeline.local(model, **shape, progress=tell)


def _connect(options: argparse.Namespace, manifest: str | bytes, **more: Any) -> Pipeline:
    key = None if options.client_key is None else _read_key(options.client_key)
    same = {
        name: getattr(options, name)
        for name in (
            "manifest_sha256",
            "allow_mock",
            "allow_test_root",
            "timeout",
            "connect_timeout",
            "handshake_timeout",
        )
    }
    return Pipeline.connect(manifest, place=_located(options), client_key=key, **same, **more)


def _located(options: argparse.Namespace) -> dict[int, str]:
    places = dict(options.place)
    if len(places) < len(options.place):
        raise UsageError("--place has a stage twice, wanted each once")
    return places


def _split(options: argparse.Namespace) -> str | int:
    """How the layers are split: by a flag, else by the environment, else in two."""
    split: str | int | None = options.split or options.stages
    if split is not None:
        return split
    given = options.split_default or options.stages_default
    if isinstance(given, Variable):
        options.from_environment.append(given)
    try:
        return str(given) if options.split_default else positive(given)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"stages: {error}") from None


def _stage_states(pipeline: Pipeline) -> list[dict[str, Any]]:
    manifest, where = pipeline.manifest, pipeline.addresses
    return [reporting.state(manifest, report, where.shown(report.stage)) for report in pipeline.status()]


def _figures(generation: Generation) -> dict[str, Any]:
    times, count = generation.times, len(generation.times)
    return {
        "reason": str(generation.reason),
        "seed": generation.seed,
        "prompt_tokens": generation.prompt_tokens,
        "ttft_ms": 1000 * times[0],
        "ms_per_token": 1000 * (times[-1] - times[0]) / (count - 1) if count > 1 else None,
        "steps": len(set(times)),  # fewer than tokens where several were drafted together
        "latencies_ms": [1000 * (later - earlier) for earlier, later in zip([0.0, *times], times, strict=False)],
        "bytes_per_token": benchmark.bytes_per_token(generation.spans),
        "interruptions": list(generation.interruptions),
    }


def _say_stages(stages: list[dict[str, Any]]) -> None:
    for stage in stages:
        say(reporting.place(stage) + (f"  {stage['error']}" if stage["error"] else ""))
    _say_if_mock(stages)


def _say_if_mock(stages: list[dict[str, Any]]) -> None:
    if any(stage["provider"] == "mock" and stage["evidence"] == "accepted" for stage in stages):
        say(MOCK_NOTICE)


def _say_pace(summary: dict[str, Any], pipeline: Pipeline) -> None:
    pace, count, steps = summary["ms_per_token"], len(summary["latencies_ms"]), summary["steps"]
    say(
        f"{count} tokens"
        + (f" in {steps} steps" if steps < count else "")
        + f", ended by {summary['reason']}; first after {summary['ttft_ms']:.1f} ms"
        + (f", then {pace:.2f} ms/token" if pace else "")
        + f"; {summary['bytes_per_token']:.0f} bytes/token on {len(pipeline.manifest.stages)} encrypted links"
        + (f"; seed {summary['seed']}" if summary["seed"] is not None else "")
    )


def _say_interruptions(generation: Generation) -> None:
    if generation.interruptions:
        times = "once" if len(generation.interruptions) == 1 else f"{len(generation.interruptions)} times"
        say(f"resumed {times}: " + "; then ".join(generation.interruptions))


def plan(options: argparse.Namespace) -> int:
    """`minigpt plan`: writes a manifest and its places, and prints the manifest's digest."""
    _check_addresses([Address.parse(text) for text in options.address])
    pinned = pins.read(options)
    _refuse_existing(options.output)  # before the weights are read
    checkpoint, split = sources.find(options.model or "tiny", options.revision), _split(options)
    layers = planning.split_layers(sources.read_config(checkpoint.folder).n_layer, split)
    served = options.address or [f"tcp://127.0.0.1:{5001 + index}" for index in range(len(layers))]
    places = addresses.write(served, len(layers))
    with progress() as tell:
        data = planning.plan(
            checkpoint,
            split,
            pins=pinned,
            suites=options.suite or [2],
            clients=[pins.public("--client", text) for text in options.client] or None,
            days=options.days,
            progress=tell,
        )
    if not os.path.exists(options.output) or os.path.isfile(options.output):  # there is no beside /dev/stdout
        write_file(addresses.beside(options.output), places)
    write_file(options.output, data)  # last: whoever waits for it can use both
    show(hashlib.sha256(data).hexdigest() + "\n")
    for warning in manifest.Manifest.parse(data).warnings(time.time()):
        say(f"warning: {warning}")
    for index, (part, address) in enumerate(zip(layers, served, strict=True)):
        say(f"stage {index}  layers {part.start}-{part.stop - 1}  {address}")
    say(f"wrote {options.output}; its sha256 is what a client can pin with --manifest-sha256")
    return 0


def _refuse_existing(output: str) -> None:
    """Refuses to write a manifest over a file. Raises UsageError."""
    if Path(output).is_file():
        raise UsageError(
            f"--output {output}: exists, and a pipeline may run by it: choose another name, or remove it first"
        )


def _check_addresses(given: Sequence[Address]) -> None:
    """Refuses what nobody can connect to, and one address for two stages. Raises UsageError."""
    for index, address in enumerate(given):
        if address.scheme == "tcp" and not address.host.strip("0.:"):
            raise UsageError(
                f"--address {address}: wanted the address at which stage {index} is reached; where it listens is its "
                "own --listen"
            )
        if address.scheme == "tcp" and address in given[:index]:  # two enclaves behind two hosts may have the same
            raise UsageError(
                f"--address {address}: given for stages {given.index(address)} and {index}, wanted one for each"
            )


def up(options: argparse.Namespace) -> int:
    """`minigpt up`: starts stages, writes the manifest and the places, and stays until SIGTERM or Ctrl-C. Both files go
    with the stages."""
    beside = addresses.beside(options.output)
    _refuse_existing(options.output)
    if not os.path.isdir(os.path.dirname(options.output) or "."):
        raise UsageError(f"--output {options.output}: there is no such folder: make it first")
    ended = threading.Event()
    checkpoint, split = sources.find(options.model or "tiny", options.revision), _split(options)
    with Board() as board:
        stages = _launch(options, checkpoint, split, progress=board.progress, news=board.news)
    try:
        signal.signal(signal.SIGTERM, lambda _signal, _frame: ended.set())
        _refuse_existing(options.output)  # of another one, which was sooner
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
        raise UsageError("--on ray needs Ray: pip install 'minigpt-stages[ray]'") from None
    insecure, address = options.insecure_ray, options.address or "auto"
    return RayStages(checkpoint, split, address=address, insecure=insecure, threads=options.threads, **told)


def status(options: argparse.Namespace) -> int:
    """`minigpt status`: the state that every stage reports, and whether its evidence was accepted; with --watch again
    and again, until Ctrl-C."""
    data = manifest.read(options.manifest)
    parsed = manifest.Manifest.parse(data)
    entries = parsed.stages
    places = options.places or addresses.beside(options.manifest)
    where = Addresses(len(entries), places, _located(options))
    connect = partial(_connect, options, data, places=places, text=False, connections=1)
    redraw = options.watch is not None and sys.stdout.isatty()
    with reporting.Looker(connect, entries) as looker:
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
                    _say_if_mock(stages)
                    if parsed.slow:
                        say(f"the manifest expires in {days:.1f} days")
            if options.watch is None:
                break
            time.sleep(options.watch)
    return reporting.exit_code(reports)


def _save_evidence(folder: Path, reports: Sequence[StageReport]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
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
    client_key = None if options.client_key is None else _read_key(options.client_key)
    log = lines(options.log_format, say)
    with (
        _pipeline(options, lambda line: log({"message": line}), connections=options.connections) as pipeline,
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
    show(pair.public.hex() + "\n")
    say(f"wrote the private key to {options.output}; give the line above to `minigpt plan --client`")
    return 0


def relay(options: argparse.Namespace) -> int:
    """`minigpt relay`: passes connections on until SIGTERM or Ctrl-C, and logs peers and bytes."""
    streams.set_up("relay")
    streams.make_room(2 * options.connections, f"--connections {options.connections}", ", or lower it")
    target = Address.parse(options.target)
    passing = Relay(Address.parse(options.listen), target, options.connections)
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


def _read_key(path: str) -> bytes:
    try:
        file = open_file(read_private(path, MAX_FILE), CLIENT_KEY, ("private", "public"))
        pair = KeyPair.from_private(file.get("private").bytes(32))
        if pair.public != file.get("public").bytes(32):
            raise DocumentError("its public key does not belong to its private key; it is damaged")
    except OSError as error:
        raise UsageError(f"--client-key {path}: {error.strerror}") from None
    except DocumentError as error:
        raise UsageError(f"--client-key: {error}") from None
    return pair.private
