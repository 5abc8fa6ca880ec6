"""Options of the command line, and what their text means. A bad value ends with a message and exit code 2.

An option's value comes from its flag, else from the environment variable MINIGPT_NAME, else from its default. An empty
variable counts as unset.
"""

import argparse
import ipaddress
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_PYTHONS = re.compile(r" \(\w+=(True)?\)")  # what a message says beside an option, to whoever has no options


class Variable(str):
    """Text from the environment, in place of an option's default."""

    __slots__ = ("name",)
    name: str


def variable(flag: str) -> Variable | None:
    """What the environment says of an option, if anything."""
    name = "MINIGPT_" + flag.removeprefix("--").replace("-", "_").upper()
    value = Variable(os.environ.get(name, ""))
    value.name = name
    return value or None


def option(
    to: Any, flag: str, default: object, metavar: str, kind: Callable[[str], Any], text: str, *, required: bool = False
) -> None:
    """An option whose default may come from the environment.

    The default `from_environment` of its parser is a list; the variables that were read are added to it.
    """

    def read(given: str) -> Any:
        if not isinstance(given, Variable):
            return kind(given)
        to.get_default("from_environment").append(given)
        try:
            return given if kind is str else kind(given)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{given.name} in the environment: {error}") from None

    read.__name__ = getattr(kind, "__name__", "value")  # argparse shows it
    shown = f" (default: {default})" if default is not None else ""
    found = variable(flag)
    needed = required and found is None
    to.add_argument(flag, type=read, default=found or default, metavar=metavar, help=text + shown, required=needed)


def without_keywords(message: str) -> str:
    """A message as it is for a terminal: without the keywords of Python that it names beside options.

    >>> without_keywords("name it with --places (places=)")
    'name it with --places'
    """
    return _PYTHONS.sub("", message)


def told(error: Exception, options: argparse.Namespace) -> str:
    """An error's message for the terminal, where a keyword of Python is an option, and any may come from the
    environment."""
    message = without_keywords(str(error))
    name, space, rest = message.partition(" ")
    if name in vars(options) and rest.startswith(("is ", "has ")):
        message = f"--{name.replace('_', '-')}{space}{rest}"
    return blame(message, options.from_environment) if getattr(error, "exit_code", 1) <= 2 else message


def blame(message: str, variables: list[Variable]) -> str:
    """The message of a refusal, and the variables that it is about: it names their option, or quotes a path."""
    words = message.replace("-", "_")
    about = [
        each.name
        for each in variables
        if each.name.removeprefix("MINIGPT_").lower() in words or (os.sep in each and each in message)
    ]
    return f"{message} (from the environment: {', '.join(about)})" if about else message


def integer(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, wanted a number") from None


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(0, text)


def answers(text: str) -> int:
    """How many answers to one prompt."""
    value = integer(text)
    if not 1 <= value <= 128:
        raise argparse.ArgumentTypeError(f"got {value}, wanted 1 (as usual) to 128")
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _at_least(1, text)


def port(text: str) -> int:
    """A port of TCP; 0 is any that is free."""
    value = natural(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at most 65535")
    return value


def hostname(text: str) -> str:
    """A name or IP address as a client's Host has it, without a port."""
    try:
        if re.fullmatch(r"[A-Za-z0-9._-]+", text) is None:
            ipaddress.IPv6Address(text)
    except ValueError:
        wanted = "a host's name or IP address, without a port"
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, wanted {wanted}") from None
    return text


def name(text: str) -> str:
    """A name that people can read."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, wanted a name")
    return text


def few(text: str) -> int:
    """A number of threads or of sequences: 256 is more than any machine has use for, and each takes memory."""
    value = positive(text)
    if value > 256:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at most 256")
    return value


def seconds(text: str) -> float:
    """A number of seconds, more than 0."""
    return _between(0, 1e9, text, "a number of seconds")


def patience(text: str) -> float:
    """A number of seconds; 0 for none."""
    with suppress(ValueError):
        if float(text) == 0:
            return 0.0
    try:
        return seconds(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or 0 for none") from None


def days(text: str) -> float:
    """A number of days, more than 0 and at most a hundred years."""
    return _between(0, 36_525, text, "a number of days")


def counts(text: str) -> list[int]:
    """Different integers of at least 1, separated by commas."""
    try:
        values = [positive(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        wanted = "whole numbers of at least 1 with commas between them, as in 1,2"
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}") from None
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted different numbers")
    return values


def bias(text: str) -> tuple[int, float]:
    """A token's id and what is added to its logit, written as ID=BIAS."""
    token, _, amount = text.partition("=")
    try:
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise ValueError
        if not math.isfinite(found := float(amount)):
            raise ValueError
        return int(token), found
    except ValueError:
        wanted = "a token's id, = and a number, as 464=-100; -100 (never) to 100 (always) is usual"
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, wanted {wanted}") from None


def escaped(text: str) -> str:
    r"""Text as it is typed in a shell, where a new line is hard to type.

    >>> escaped(r"one\n\ttwo \\n C:\dir")
    'one\n\ttwo \\n C:\\dir'
    """
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


def one_of(*words: str) -> Callable[[str], str]:
    """One of these words. Unlike `choices`, this also checks a value from the environment."""

    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {' or '.join(words)}")
        return text

    return check


def picture(text: str) -> str:
    """A file to draw into: its name says how."""
    if not text.lower().endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a file's name that ends in .svg or .png")
    if not os.path.isdir(os.path.dirname(text) or "."):
        raise argparse.ArgumentTypeError(f"got {text!r}, which is in no folder that exists")
    return text


def place(text: str) -> str | int:
    """The number of an open descriptor, written as fd:N; or else a file or an address."""
    if not text.startswith("fd:"):
        return text
    number = text.removeprefix("fd:")
    if not (number.isascii() and number.isdecimal() and len(number) < 8):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted fd: and the number of an open descriptor")
    return int(number)


def located(text: str) -> tuple[int, str]:
    """A stage's number and its address, written as I=ADDRESS."""
    index, _, address = text.partition("=")
    if not (index.isascii() and index.isdecimal() and len(index) <= 3):
        wanted = "a stage's number, = and an address, as 0=tcp://127.0.0.1:9000"
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, wanted {wanted}")
    return int(index), address


def _at_least(least: int, text: str) -> int:
    value = integer(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at least {least}")
    return value


def _between(low: float, high: float, text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = low
    if not low < value <= high:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted {what}, more than {low} and at most {high:g}")
    return value
