"""What the text of a command-line option means. A bad value ends with a message and exit code 2."""

import argparse
from collections.abc import Callable


def integer(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number") from None


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _at_least(1, text)


def threads(text: str) -> int:
    """A number of threads: 256 is more than any machine has use for, and each takes memory."""
    value = positive(text)
    if value > 256:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at most 256")
    return value


def seconds(text: str) -> float:
    """A number of seconds, more than 0."""
    return _between(0, 1e9, text, "a number of seconds")


def days(text: str) -> float:
    """A number of days, more than 0 and at most a hundred years."""
    return _between(0, 36_525, text, "a number of days")


def counts(text: str) -> list[int]:
    """Different integers of at least 1, separated by commas."""
    values = [positive(part) for part in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted different numbers")
    return values


def one_of(*words: str) -> Callable[[str], str]:
    """One of these words. Unlike `choices`, this also checks a value from the environment."""

    def check(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {' or '.join(words)}")
        return text

    return check


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
