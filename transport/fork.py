"""What a process does not share with its forked children: sockets, sessions and their counters, processes it started.

A child of fork(2) gets a copy of all of them. If both went on, two messages would be sealed with one key and one nonce,
and whoever knows one of them could read the other off the wire. So the child closes its descriptors, which the parent
does not notice, forgets the keys, and sends nothing.
"""

import contextlib
import functools
import mmap
import os
import threading
import weakref
from typing import Protocol

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of madvise(2), Linux 4.14

# While a thread holds it, no other one forks: what is not owned yet would stay open in the child for ever. Reentrant,
# because a signal's handler may fork.
UNFORKED = threading.RLock()


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
        os.register_at_fork(
            before=UNFORKED.acquire, after_in_parent=UNFORKED.release, after_in_child=lambda: _disown(owned)
        )
    return owned


def _disown(owned: "weakref.WeakSet[Owned]") -> None:
    UNFORKED.release()
    things = list(owned)
    owned.clear()
    for thing in things:
        with contextlib.suppress(Exception):  # one that fails must not keep the others
            thing.disown()


def identity() -> bytes:
    """What this process is, and no forked child of it, whoever calls fork(2) and how: 8 bytes.

    Linux wipes them in a child. Elsewhere they are the process id, which only a child in another namespace can share.
    """
    page = _page()
    if page is None:
        return os.getpid().to_bytes(8, "big")
    if page[:8] == bytes(8):
        page[:8] = os.urandom(8)
    return page[:8]


@functools.cache
def _page() -> mmap.mmap | None:
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_WIPE_ON_FORK)
    except (OSError, ValueError, AttributeError):  # another system, or a sandbox
        return None
    return page
