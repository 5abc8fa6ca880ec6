"""The hostile host: a kit that attacks a running pipeline from outside, and grades both ends of what it attacks.

    proxy.py        the man in the middle: knows the framing, has no key, does what a rule says
    pipeline.py     real stages behind proxies; client.py is the client's process
    arena.py        the pipeline under attack, and the grading of both ends
    rogue.py        a malicious end: it has keys of its own, or stolen ones, and says what it likes
    ends.py         such ends in their places
    handshake.py    attacks 1 to 4, 7, 8, 12, 13: on the handshake's bytes
    identity.py     attacks 5, 6, 9 to 11: on who is at the other end
    evidence.py     attacks 14 to 19, 22, 26, 27: on the evidence
    platforms.py    attacks 21, 23, 25, 78: on the evidence of platforms
    machines.py     attacks 24, 79 to 84: on the evidence of SNP and TDX
    records.py      attacks 28 to 38: on the records
    application.py  attacks 40 to 44, 54, 57: by ends that are authentic
    load.py         attacks 39, 45, 58, 59: by their number
    secrecy.py      attacks 47 to 50: by looking
    host.py         attacks 20, 46, 51 to 53, 55: what only the host can do
    gateway.py      attacks 60 to 63: on `minigpt serve`
    batches.py      attacks 64 to 71: on what many clients share
    resume.py       attacks 72 to 77: on clients that go on after a death
    shares.py       attacks 89 to 91: on what identities share

An attack is one function with the decorator `attack`. It returns what was `Seen` at both ends, or raises `Survived`:
the attack did what it must not. "Dead" means: the connection is closed, what was delivered is at most a true prefix
followed by an error, and the stage still serves a new client.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from attacks.arena import Arena


class Survived(Exception):
    """The attack did what it must not."""


class Seen(NamedTuple):
    """What an attack looked like at both ends."""

    client: str
    stage: str


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        number: in the list of attacks.
        title: what is done.
        expected: what must come of it.
        run: does it.
        slow: more than a few seconds even in its short form.
    """

    number: int
    title: str
    expected: str
    run: Callable[[Arena], Seen]
    slow: bool


ATTACKS: dict[int, Attack] = {}


def attack(
    number: int, title: str, expected: str, *, slow: bool = False
) -> Callable[[Callable[[Arena], Seen]], Callable[[Arena], Seen]]:
    """Registers an attack."""

    def register(run: Callable[[Arena], Seen]) -> Callable[[Arena], Seen]:
        if number in ATTACKS:
            raise ValueError(f"attack {number} is there already")
        ATTACKS[number] = Attack(number, title, expected, run, slow)
        return run

    return register


def require(holds: object, what: str) -> None:
    """Raises Survived with `what` was seen, unless it holds."""
    if not holds:
        raise Survived(what)


def everything() -> None:
    """Imports every module with attacks, so that all are registered."""
    for name in (
        "handshake", "identity", "evidence", "records", "application", "load", "secrecy", "host", "gateway", "batches",
        "resume", "platforms", "machines", "shares",
    ):  # fmt: skip
        importlib.import_module(f"attacks.{name}")
