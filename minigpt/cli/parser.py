"""The command line of `minigpt`: its commands and their options.

Text goes to standard output, and everything about it to standard error. An option's value comes from its flag, else
from the environment variable MINIGPT_ and its name, else from its default.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import minigpt
from minigpt.cli.values import counts, days, integer, one_of, positive, seconds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="minigpt",
        description="GPT-2 in NumPy, cut into stages that talk over encrypted, attested links.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"minigpt {minigpt.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = _command(commands, "generate", "continue a prompt")
    generate.add_argument("prompt", metavar="PROMPT|-", help="the text to continue (- reads it from standard input); "
                          "for a checkpoint without a tokenizer, token ids")  # fmt: skip
    _model(generate)
    _stages(generate)
    _manifest(generate, required=False)
    _option(generate, "--max-tokens", "20", "N", integer, "how many tokens at most")
    _option(generate, "--temperature", "0", "F", float, "0 takes the likeliest token, 1 draws from the distribution")
    _option(generate, "--top-k", "0", "K", integer, "draw among the K likeliest; 0 for all")
    _option(generate, "--top-p", "1", "P", float, "draw among the likeliest that hold probability P; 1 for all")
    _option(generate, "--seed", None, "S", integer, "of the draws; a new one is told")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    _option(generate, "--threads", None, "N", positive, "BLAS threads of each local stage")
    _option(generate, "--draft", None, "N", integer, "guess up to N tokens ahead where a text repeats itself: the same "
            "text, sooner; 0 for none; greedy decoding only (default: 8 where stage 0 has AVX-512)")  # fmt: skip
    generate.add_argument("--logprobs", action="store_true", help="each token's logarithmic probability, in --json")
    generate.add_argument("--json", action="store_true", help="one object instead of text")
    generate.set_defaults(run="generate")

    plan = _command(commands, "plan", "write a pipeline's manifest")
    _model(plan)
    _stages(plan)
    plan.add_argument("--address", action="append", default=[], metavar="ADDR",
                      help="a stage's address, tcp://host:port or vsock://cid:port; repeat for each stage "
                      "(default: tcp://127.0.0.1:5001 and the ports after it)")  # fmt: skip
    _option(plan, "--root-key", None, "HEX", str, "the mock's root, as `python -m attest keygen` prints it")
    plan.add_argument("--measurement", action="append", default=[], metavar="HEX",
                      help="an acceptable measurement; repeatable (default: this code's own)")  # fmt: skip
    plan.add_argument("--pcrs", action="append", default=[], metavar="FILE",
                      help="pin a Nitro image instead of the mock: its description, as scripts/image/build.py or "
                      "nitro-cli prints it; repeat for each stage")  # fmt: skip
    plan.add_argument("--client", action="append", default=[], metavar="HEX",
                      help="admit only clients with this key, as `minigpt keygen` prints it; repeatable")  # fmt: skip
    plan.add_argument("--suite", action="append", default=[], type=int, choices=(1, 2), metavar="N",
                      help="of the link protocol, accepted on every link: 2 (the default) is post-quantum, 1 is plain "
                      "Noise_XX; repeatable, the first is proposed")  # fmt: skip
    _option(plan, "--days", "30", "N", days, "how long it is valid")
    plan.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write it")
    plan.set_defaults(run="plan")

    status = _command(commands, "status", "ask every stage of a pipeline how it is")
    _manifest(status, required=True)
    status.add_argument(
        "--save-evidence", metavar="DIR", help="write each stage's evidence there, for `python -m attest`"
    )
    status.add_argument("--json", action="store_true", help="one object instead of a table")
    status.set_defaults(run="status")

    bench = _command(commands, "bench", "measure latency with local stages, and print tables")
    _model(bench)
    bench.add_argument("--stages", type=counts, default="1,2", metavar="N,N",
                       help="numbers of stages to compare; the first is the baseline (default: 1,2)")  # fmt: skip
    _option(bench, "--runs", "5", "N", positive, "runs of each, interleaved")
    _option(bench, "--max-tokens", "20", "N", positive, "tokens in a run")
    _option(bench, "--prompt", "The capital of France is", "TEXT", str, "what to continue")
    _option(bench, "--threads", None, "N", positive, "BLAS threads of each stage")
    _option(bench, "--format", "md", "md|json", one_of("md", "json"), "Markdown tables, or JSON with every latency")
    bench.set_defaults(run="bench")

    keygen = _command(commands, "keygen", "make a client's key, for a manifest that admits only some")
    keygen.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="where to write it; never over another file"
    )
    keygen.set_defaults(run="keygen")

    relay = _command(commands, "relay", "pass connections on to another address, between tcp and vsock too; blind")
    relay.add_argument("listen", metavar="LISTEN", help="where to listen, tcp://host:port or vsock://cid:port; "
                       "the context id 4294967295 stands for any")  # fmt: skip
    relay.add_argument("target", metavar="TARGET", help="where to pass them on to")
    _option(relay, "--connections", "256", "N", positive, "how many at once; each takes two sockets and two threads")
    relay.set_defaults(run="relay")
    return top


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    made.add_argument("--version", action="version", version=f"minigpt {minigpt.__version__}")
    return made


def _option(to: Any, flag: str, default: str | None, metavar: str, kind: Any, text: str, **more: Any) -> None:
    """An option whose default may come from the environment."""
    variable = "MINIGPT_" + flag.removeprefix("--").replace("-", "_").upper()
    value = os.environ.get(variable, default)
    if value is not None:
        more.pop("required", None)
    shown = f" (default: {default})" if default is not None else ""
    to.add_argument(flag, type=kind, default=value, metavar=metavar, help=text + shown, **more)


def _model(to: argparse.ArgumentParser) -> None:
    _option(to, "--model", None, "DIR|tiny|HUB_ID", str, "the checkpoint (default: tiny, which is embedded)")
    _option(to, "--revision", None, "R", str, "of a hub id: a branch, tag or commit")


def _stages(to: argparse.ArgumentParser) -> None:
    """Two flags for one thing: whichever is given beats the environment's of both."""
    group = to.add_mutually_exclusive_group()
    group.add_argument("--stages", type=positive, metavar="N", help="how many stages, as equal as can be (default: 2)")
    group.add_argument("--split", metavar="6+6", help="or the layers of each")
    to.set_defaults(split_default=os.environ.get("MINIGPT_SPLIT"), stages_default=os.environ.get("MINIGPT_STAGES", "2"))


def _manifest(to: argparse.ArgumentParser, *, required: bool) -> None:
    _option(to, "--manifest", None, "FILE", str, "the manifest of a pipeline that runs", required=required)
    _option(to, "--manifest-sha256", None, "HEX", str, "refuse a manifest with another digest")
    _option(to, "--client-key", None, "FILE", str, "this client's key, where the manifest admits only some")
    _option(to, "--timeout", "150", "S", seconds, "seconds to wait for an answer")
    to.add_argument("--allow-mock", action="store_true",
                    help="accept mock evidence, which proves nothing about hardware")  # fmt: skip
