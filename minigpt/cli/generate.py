"""What `minigpt generate` and `minigpt score` do."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from attest.document import show
from minigpt.cli import bench as benchmark
from minigpt.cli import pipelines
from minigpt.cli import status as reporting
from minigpt.cli.status import say_if_mock
from minigpt.cli.terminal import say, shaded, visible
from minigpt.cli.values import told
from minigpt.client.pipeline import Pipeline
from minigpt.client.text import Generation, Token, ids_in, perplexity
from minigpt.errors import RequestRefused, StageError, UntrustedStage, UsageError
from minigpt.protocol.messages import Reason
from minigpt.protocol.request import Options, check_top, seed_of

OPTIONS = {field.name for field in fields(Options)}  # of a generation; the command line has the same names


_ENDS = {
    Reason.LENGTH: "--max-tokens",
    Reason.END: "the model's end of text",
    Reason.STOP: "--stop",
    Reason.CONTEXT: "the model's last position",
    Reason.CANCELLED: "Ctrl-C",
}  # what ended an answer, for people


def generate(options: argparse.Namespace) -> int:
    """`minigpt generate`: text as it arrives, then a summary; or all of it as one object; or a loop of prompts."""
    prompt = options.prompt
    chosen = {name: value for name, value in vars(options).items() if name in OPTIONS}
    chosen["logit_bias"] = _biases(options.logit_bias)
    chosen["logprobs"] |= chosen["top_logprobs"] > 0  # the token itself may not be among the most likely
    Options(**chosen).check()  # before anything is started, or warned of
    _warn_of_idle(options)
    if prompt is None:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise UsageError("PROMPT is missing: give it in quotes, or - to read it from standard input")
        if options.json or options.json_lines:
            flag = "--json" if options.json else "--json-lines"
            raise UsageError(f"{flag} needs a PROMPT: a prompt loop prints text")
        return _prompt_loop(options, chosen)
    if prompt == "-":
        prompt = _text(sys.stdin.buffer.read(), "standard input")
    if not prompt:
        raise UsageError(f"{'standard input' if options.prompt == '-' else 'PROMPT'} is empty, wanted text to continue")
    with pipelines.opened(options) as pipeline:
        if options.json:
            answers = [
                _answer(generation, pipeline) for generation in _generations(pipeline, prompt, chosen, options.n)
            ]
            told = answers[0] if options.n == 1 else {"answers": answers}
            show(json.dumps({**told, "stages": pipelines.stage_states(pipeline)}) + "\n")
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
            _say_stages(pipelines.stage_states(pipeline))
            for figures, generation in paces:
                _say_pace(figures, pipeline)
                _say_interruptions(generation)
    return 0


def _warn_of_idle(options: argparse.Namespace) -> None:
    """Warns of the sampling options that this generation makes no use of."""
    if not options.temperature:
        why = "at temperature 0 the most likely token is taken each time: give --temperature 1 to draw"
        pipelines.warn_idle(options, why, seed=None, top_k=0, top_p=1.0, min_p=0.0)
    shaped = options.logit_bias or any(
        getattr(options, name) != off
        for name, off in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0))
    )
    if options.temperature or shaped:
        pipelines.warn_idle(
            options,
            "nothing is drafted at a temperature above 0, or with a bias or penalties: leave one of them out",
            draft=0,
        )
    if not (options.json or options.json_lines):
        why = "only --json and --json-lines show it: add one of them"
        pipelines.warn_idle(options, why, logprobs=False, top_logprobs=0)


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
            raise UsageError(
                f"{options.file}: {error.strerror}; wanted a file of text, or - for standard input"
            ) from None
    if not text:
        raise UsageError(f"{'standard input' if options.file == '-' else options.file} is empty, wanted text to score")
    check_top("top_logprobs", options.top_logprobs)
    with pipelines.opened(options) as pipeline:
        tokens = pipeline.score(text if pipeline.tokenizer is not None else ids_in(text), options.top_logprobs)
        stages = pipelines.stage_states(pipeline)
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
    with pipelines.opened(options) as pipeline:
        pipeline.generate([0], **chosen)  # sent only if iterated: refuses options now, and not at every prompt
        _say_stages(pipelines.stage_states(pipeline))
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
                say(f"minigpt: {told(error, options)}")
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
    say_if_mock(stages)


def _say_pace(summary: dict[str, Any], pipeline: Pipeline) -> None:
    pace, count, steps = summary["ms_per_token"], len(summary["latencies_ms"]), summary["steps"]
    say(
        f"{count} token{'s' if count > 1 else ''}"
        + (f" in {steps} steps" if steps < count else "")
        + f", ended by {_ENDS[summary['reason']]}; first after {summary['ttft_ms']:.1f} ms"
        + (f", then {pace:.2f} ms/token" if pace else "")
        + f"; {summary['bytes_per_token']:.0f} bytes/token on {len(pipeline.manifest.stages)} encrypted links"
        + (f"; seed {summary['seed']}" if summary["seed"] is not None else "")
    )


def _say_interruptions(generation: Generation) -> None:
    if generation.interruptions:
        times = "once" if len(generation.interruptions) == 1 else f"{len(generation.interruptions)} times"
        say(f"resumed {times}: " + "; then ".join(generation.interruptions))
