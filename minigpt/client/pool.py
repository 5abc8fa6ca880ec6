"""A client's links to stage 0: made when they are needed, kept for the next request, and never more than a number."""

import threading
import time
import weakref
from collections.abc import Callable

from minigpt.errors import RequestRefused, UsageError
from minigpt.protocol.links import StageLink
from transport.fork import own

_LOOK = 0.5  # seconds between two looks at whether a link was lost without a word


class _Place:
    """Of a link that is being made."""


class Pool:
    """Hands out links; each carries one request at a time. For any number of threads.

    Args:
        make: makes a link; raises StageError.
        size: how many links at most.
        timeout: seconds that `take` waits while all of them are in use.
    """

    def __init__(self, make: Callable[[], StageLink], size: int, timeout: float) -> None:
        self._make = make
        self._size = size
        self._timeout = timeout
        self._closed = False
        self.proven = False  # whether a link was ever made
        self.disown()
        own(self)

    def disown(self) -> None:
        """In the child of a fork, whose links are the parent's: starts afresh."""
        self._idle: list[StageLink] = []
        # Weak, so that what is lost, by Ctrl-C between two lines for example, takes no place.
        self._used: weakref.WeakSet[StageLink] = weakref.WeakSet()
        self._places: weakref.WeakSet[_Place] = weakref.WeakSet()
        # Reentrant: a generation that nobody refers to gives its link back whenever Python notices, here for example.
        self._changed = threading.Condition(threading.RLock())

    def take(self, lost: StageLink | None = None) -> StageLink:
        """A link that works, to be given back; `lost` itself if it works still, or one in its place, which is kept if
        there is none.

        Raises StageError, UsageError if the pool is closed, and RequestRefused if all links are in use for too long.
        """
        until = time.monotonic() + self._timeout
        with self._changed:
            if lost is not None:
                self._used.discard(lost)
            while not self._closed and not self._idle and len(self._used) + len(self._places) >= self._size:
                self._changed.wait(min(max(0.0, until - time.monotonic()), _LOOK))
                if time.monotonic() >= until:
                    raise RequestRefused(
                        f"all {self._size} connections of this pipeline are in use: close a generation, or connect "
                        "with more connections",
                        reason="busy",
                        stage=0,
                    )
            if self._closed:
                raise UsageError("this pipeline is closed: connect again")
            link = lost or (self._idle.pop() if self._idle else None)
            place = _Place()
            self._places.add(place)
        try:
            if link is not None and ((lost_openly := link.stale) or not link.usable()):
                link.channel.abort()
                link = None
                if not lost_openly:
                    self.flush()
            if link is None:
                link = self._make()
                self.proven = True
            with self._changed:
                if self._closed:
                    link.channel.abort()
                    raise UsageError("this pipeline is closed: connect again")
                self._used.add(link)
            return link
        except BaseException:
            if lost is not None:
                with self._changed:
                    self._used.add(lost)
            raise
        finally:
            with self._changed:
                self._places.discard(place)
                self._changed.notify_all()

    def give(self, link: StageLink, *, whole: bool) -> None:
        """Takes a link back, for the next request if its last one has come to its end."""
        with self._changed:
            ours = link in self._used
            self._used.discard(link)
            if ours and whole and not self._closed:
                self._idle.append(link)
            else:
                link.channel.abort()
            self._changed.notify_all()

    def flush(self) -> None:
        """Ends all idle links, after one was found dead that had not said so: what made the network forget that one, or
        stopped the stage, was true of them as well, and each would cost the same wait."""
        with self._changed:
            links, self._idle = self._idle, []
        for link in links:
            link.channel.abort()

    def may_replace(self, link: StageLink | None) -> bool:
        """Whether another link may take the place of one that was lost: not before there ever was one, not once the
        pool is closed, and not in the child of a fork, as the parent goes on."""
        return self.proven and not self._closed and (link is None or link in self._used)

    def rest(self, seconds: float) -> bool:
        """Waits so long; False as soon as the pool is closed."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._closed and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return not self._closed

    def close(self) -> None:
        """Closes all links. Requests under way fail."""
        with self._changed:
            self._closed = True
            links, self._idle = [*self._idle, *self._used], []
            self._changed.notify_all()
        for link in links:
            link.channel.close()
