"""What a process does not share with its forked children: sockets, sessions and their counters, processes it started.

A child of fork(2) gets a copy of all of them. If both went on, two messages would be sealed with one key and one nonce,
and whoever knows one of them could read the other off the wire. So the child closes its descriptors, which the parent
does not notice, forgets the keys, and sends nothing.
"""

import functools
import os
import weakref
from typing import Protocol


class Owned(Protocol):
    """Something that belongs to the process that made it."""

    def disown(self) -> None:
        """Called in a forked child, before anything else runs there. No other thread exists, but one that did may have
        left any lock held for ever."""


def own(thing: Owned) -> None:
    """From now on, `thing` belongs to this process."""
    _owned().add(thing)


@functools.cache
def _owned() -> "weakref.WeakSet[Owned]":
    owned: weakref.WeakSet[Owned] = weakref.WeakSet()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _disown(owned))
    return owned


def _disown(owned: "weakref.WeakSet[Owned]") -> None:
    things = list(owned)
    owned.clear()
    for thing in things:
        thing.disown()
