"""The command line of `minigpt`: its commands and their options.

Text goes to standard output, everything else to standard error.
"""

import argparse
from functools import partial
from typing import Any

import minigpt
from attest.arguments import Parser
from minigpt.cli.values import (
    answers,
    bias,
    counts,
    days,
    escaped,
    few,
    integer,
    located,
    natural,
    number,
    one_of,
    option,
    patience,
    picture,
    port,
    positive,
    seconds,
    variable,
)


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="minigpt",
        description="GPT-2 in NumPy, cut into stages that talk over encrypted, attested links.",
        epilog="exit codes: 0 done, 1 failed or refused by a stage, 2 usage, 3 manifest or evidence refused, 4 a stage "
        "cannot be reached or failed, 5 weights are not the manifest's, 130 interrupted, 141 nobody reads the output",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"minigpt {minigpt.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = _command(commands, "generate", "continue a prompt")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT|-", help="the text to continue (- reads it from "
                          "standard input; without it, a terminal is asked for one after the other); for a checkpoint "
                          "without a tokenizer, token ids")  # fmt: skip
    _model(generate)
    _stages(generate)
    _manifest(generate, required=False)
    option(generate, "--max-tokens", "20", "N", integer, "how many tokens at most")
    option(generate, "--temperature", "0", "F", number, "0 takes the most likely token, 1 draws as the model would")
    option(generate, "--top-k", "0", "K", integer, "draw among the K most likely tokens; 0 for all")
    option(generate, "--top-p", "1", "P", number, "draw among the most likely tokens of total probability P; 1 for all")
    option(generate, "--min-p", "0", "P", number, "draw among tokens at least P times as likely as the most likely; 0 "
           "for all, 0.02 to 0.1 is usual")  # fmt: skip
    option(generate, "--repetition-penalty", "1", "X", number, "of tokens in the prompt or generated, a number above 0:"
           " 1.1 to 1.3 is usual, 1 is none")  # fmt: skip
    option(generate, "--presence-penalty", "0", "X", number, "taken from the logit of a token once generated: -2 to 2"
           " is usual, 0 is none")  # fmt: skip
    option(generate, "--frequency-penalty", "0", "X", number, "the same, as often as it was generated; -2 to 2 usual,"
           " 0 is none")  # fmt: skip
    generate.add_argument("--logit-bias", action="append", default=[], type=bias, metavar="ID=BIAS", help="add this to "
                          "a token's logit: -100 never takes it, 100 always; repeatable")  # fmt: skip
    option(generate, "--n", "1", "N", answers, "answers, one after the other; each after the first has a seed that "
           "follows from the first one's")  # fmt: skip
    option(generate, "--seed", None, "S", integer, "of the draws (default: a new one, which is reported)")
    generate.add_argument("--stop", action="append", default=[], type=escaped, metavar="TEXT", help=r"end before this "
                          r"text; \n, \t and \\ are a new line, a tab, a backslash; repeatable")  # fmt: skip
    option(generate, "--threads", None, "N", few, "BLAS threads of each local stage, pinned")
    option(generate, "--draft", None, "N", integer, "guess up to N tokens ahead where the text repeats itself: the "
            "same text, sooner; 0 for none; greedy decoding only (default: 8 if stage 0 has AVX-512)")  # fmt: skip
    _retry(generate)
    _switch(generate, "--logprobs", "each token's log-probability, in --json and --json-lines")
    option(generate, "--top-logprobs", "0", "N", integer, "log-probabilities of the N most likely tokens at each place,"
           " 0 to 20, in --json")  # fmt: skip
    form = generate.add_mutually_exclusive_group()
    _switch(form, "--json", "one object instead of text")
    _switch(form, "--json-lines", "an object on a line for each token as it comes, and one at the end of each answer")

    score = _command(commands, "score", "tell how likely the model finds each token of a text")
    score.add_argument("file", metavar="FILE|-", help="the text, in UTF-8 (- reads it from standard input); for a "
                       "checkpoint without a tokenizer, token ids")  # fmt: skip
    _model(score)
    _stages(score)
    _manifest(score, required=False)
    option(score, "--threads", None, "N", few, "BLAS threads of each local stage, pinned")
    _retry(score)
    option(score, "--top-logprobs", "0", "N", integer, "log-probabilities of the N most likely tokens at each place,"
           " 0 to 20, in --json")  # fmt: skip
    _switch(score, "--json", "one object instead of a line for each token")

    plan = _command(commands, "plan", "write a pipeline's manifest, and its places beside it")
    _model(plan)
    _stages(plan)
    _repeated(plan, "--address", "ADDR", "a stage's address, tcp://host:port or vsock://cid:port, for each stage "
              "(default: tcp://127.0.0.1:5001 and the ports after it)")  # fmt: skip
    option(plan, "--root-key", None, "HEX", str, "the mock's root, as `python -m attest keygen` prints it")
    _repeated(plan, "--measurement", "HEX", "an acceptable measurement; repeatable (default: this code's own)")
    for flag, text in (
        ("--pcrs", "pin a Nitro image instead of the mock: its description, as scripts/image/build.py or nitro-cli "
                   "prints it; repeat for each stage"),
        ("--snp", "pin an SEV-SNP guest: JSON as `python -m attest show --pins` prints it; one for each stage, in "
                  "order, beside --pcrs and mock"),
        ("--tdx", "pin a TDX guest: JSON as `python -m attest show --pins` prints it; one for each stage, in order, "
                  "beside --pcrs and mock"),
    ):  # fmt: skip
        plan.add_argument(flag, dest="images", action="append", default=[], type=partial(_image, flag),
                          metavar="FILE|mock", help=text)  # fmt: skip
    plan.add_argument("--test-root", metavar="HEX", help="for tests: a root that is believed in place of the images' "
                      "vendor's, by its certificate's SHA-256; both ends then need --allow-test-root")  # fmt: skip
    _repeated(plan, "--client", "HEX", "admit only clients with this key, as `minigpt keygen` prints it; repeatable")
    _repeated(plan, "--operator", "HEX", "admit the client with this key too, and let it see the load of all clients "
              "in status and metrics; repeatable")  # fmt: skip
    plan.add_argument("--suite", action="append", default=[], type=integer, choices=(1, 2), metavar="N",
                      help="of the link protocol, accepted on every link: 2 (the default) is post-quantum, 1 is plain "
                      "Noise_XX; repeatable, the first is proposed")  # fmt: skip
    option(plan, "--days", "30", "N", days, "how long it is valid")
    plan.add_argument("-o", "--output", required=True, metavar="FILE.json", help="where to write the "
                      "manifest, a new file; the stages' addresses are written to FILE.places.json")  # fmt: skip

    up = _command(commands, "up", "start a pipeline's stages, write its manifest and places, and stay until Ctrl-C")
    option(up, "--on", "local", "local|ray", one_of("local", "ray"), "where the stages run: processes of this machine; "
           "or the nodes of a Ray cluster (the extra `ray`)")  # fmt: skip
    option(up, "--address", None, "auto|HOST:PORT", str, "of the Ray cluster's head (default: auto, the cluster that "
           "this machine belongs to)")  # fmt: skip
    _switch(up, "--insecure-ray", "take a cluster that asks nobody for a token")
    _model(up)
    _stages(up)
    option(up, "--threads", None, "N", few, "BLAS threads of each stage, pinned")
    up.add_argument("-o", "--output", default="pipeline.json", metavar="FILE.json", help="where to write the "
                    "manifest, once all stages serve; their addresses are written to FILE.places.json (default: "
                    "pipeline.json)")  # fmt: skip

    status = _command(commands, "status", "report the state of every stage of a pipeline")
    _manifest(status, required=True)
    status.add_argument(
        "--save-evidence", metavar="DIR", help="write each stage's evidence there, for `python -m attest`"
    )
    status.add_argument("--watch", nargs="?", const=2.0, type=seconds, metavar="S",
                        help="look again every S seconds (2 if none is given) until Ctrl-C")  # fmt: skip
    _switch(status, "--json", "one object instead of a table; with --watch one a line, for each look")

    bench = _command(commands, "bench", "measure latency with local stages, and print tables")
    _model(bench)
    option(bench, "--stages", "1,2", "N,N", counts, "numbers of stages to compare; the first is the baseline")
    option(bench, "--clients", None, "N,N", counts, "measure so many generations at once instead, and compare with the "
           "first number")  # fmt: skip
    option(bench, "--runs", "5", "N", positive, "runs of each, interleaved")
    option(bench, "--max-tokens", "20", "N", positive, "tokens in a run")
    option(bench, "--prompt", "The capital of France is", "TEXT", str, "what to continue; for a checkpoint without a "
           "tokenizer, token ids (then by default any five)")  # fmt: skip
    option(bench, "--threads", None, "N", few, "BLAS threads of each stage, pinned")
    option(bench, "--format", "md", "md|json", one_of("md", "json"), "Markdown tables, or JSON with every latency")
    option(bench, "--plot", None, "FILE.svg|FILE.png", picture, "also draw the latencies, with the extra `plot`")

    serve = _command(commands, "serve", "serve OpenAI's HTTP interface, and a page, on this machine (the extra serve)")
    _model(serve)
    _stages(serve)
    _manifest(serve, required=False)
    option(serve, "--threads", None, "N", few, "BLAS threads of each local stage, pinned")
    option(serve, "--host", "127.0.0.1", "HOST", str, "where to listen; for any other host than loopback, with a key")
    option(serve, "--port", "8000", "PORT", port, "and at which port; 0 for any that is free")
    option(
        serve, "--api-key-file", None, "FILE", str, "clients must send what this file holds, which only you may read"
    )
    _repeated(serve, "--hostname", "NAME", "another name by which clients call this server; repeatable")
    option(serve, "--model-name", None, "NAME", str, "the model's name for clients (default: the manifest's)")
    option(serve, "--chat-template", None, "plain", one_of("plain"), "make prompts of chats from lines of role: text, "
           "for a model that has no template of its own")  # fmt: skip
    option(serve, "--connections", "32", "N", positive, "answers at a time: no more than stage 0 has sequences")
    option(serve, "--queue", "64", "N", natural, "requests that may wait for their turn; others are refused")
    _retry(serve)
    option(serve, "--log-format", "text", "text|json", one_of("text", "json"), "of the log, on standard error")

    keygen = _command(commands, "keygen", "make a client's key, for a manifest that lists its clients")
    keygen.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write it: a new file")

    relay = _command(commands, "relay", "pass connections on to another address, also between tcp and vsock; blind")
    relay.add_argument("listen", metavar="LISTEN", help="where to listen, tcp://host:port or vsock://cid:port; "
                       "the context id 4294967295 stands for any")  # fmt: skip
    relay.add_argument("target", metavar="TARGET", help="where to pass them on to")
    option(relay, "--connections", "256", "N", positive, "how many at once; each takes two sockets and two threads")

    endorsements = _command(commands, "endorsements", "have a folder of endorsements for stages that ask for them")
    endorsements.add_argument("listen", metavar="LISTEN", help="where to listen, tcp://host:port or vsock://cid:port")
    endorsements.add_argument("folder", metavar="DIR", help="their files, read again each time")
    return top


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    made.add_argument("--version", action="version", version=f"minigpt {minigpt.__version__}")
    made.set_defaults(from_environment=[])
    return made


def _repeated(to: argparse.ArgumentParser, flag: str, metavar: str, text: str) -> None:
    to.add_argument(flag, action="append", default=[], metavar=metavar, help=text)


def _image(flag: str, path: str) -> tuple[str, str]:
    """What is pinned for a stage: by which flag, and the file. All flags share one list, in order of the stages."""
    return flag, path


def _switch(to: Any, flag: str, text: str) -> None:
    to.add_argument(flag, action="store_true", help=text)


def _model(to: argparse.ArgumentParser) -> None:
    option(to, "--model", None, "DIR|tiny|HUB_ID", str, "the checkpoint (default: tiny, which is embedded)")
    option(to, "--revision", None, "R", str, "of a hub id: a branch, tag or commit")


def _stages(to: argparse.ArgumentParser) -> None:
    """Two flags for one thing: if either is given, it overrides the environment of both."""
    group = to.add_mutually_exclusive_group()
    group.add_argument("--stages", type=positive, metavar="N", help="how many stages, of about equal size (default: 2)")
    group.add_argument("--split", metavar="6+6", help="or the layers of each")
    to.set_defaults(split_default=variable("--split"), stages_default=variable("--stages") or "2")


def _retry(to: argparse.ArgumentParser) -> None:
    text = "seconds to go on trying for when a stage has died; 0 to fail at once"
    option(to, "--retry-for", "30", "S", patience, text)


def _manifest(to: argparse.ArgumentParser, *, required: bool) -> None:
    option(to, "--manifest", None, "FILE", str, "the manifest of a running pipeline", required=required)
    option(to, "--manifest-sha256", None, "HEX", str, "refuse a manifest with any other digest")
    option(to, "--places", None, "FILE", str, "where its stages are (default: X.places.json for a manifest X.json)")
    to.add_argument("--place", action="append", default=[], type=located, metavar="I=ADDR", help="where stage I is, "
                    "whatever the places say: a relay before stage 0, for example; repeatable")  # fmt: skip
    option(to, "--client-key", None, "FILE", str, "this client's private key, where the manifest lists it")
    option(to, "--timeout", "150", "S", seconds, "seconds to wait for an answer")
    option(to, "--connect-timeout", "10", "S", seconds, "seconds that a connection may take")
    option(to, "--handshake-timeout", None, "S", seconds, "seconds that a handshake may take (default: 10, or 60 where "
            "the manifest pins a platform)")  # fmt: skip
    _switch(to, "--allow-mock", "accept mock evidence, which proves nothing about hardware")
    _switch(to, "--allow-test-root", "accept roots that are not the vendor's, where the manifest names them: for tests")
