"""Who may have a sequence in this stage: places, of a number and of a size in bytes, and the queue for them.

A sequence reserves its whole cache before it begins, so none fails halfway for lack of memory. Whoever does not fit
waits. Places, bytes and the queue are shared by identity: whoever has least of them is next, and those who have as much
as each other take turns. A sequence whose request has ended keeps its place, for a request that goes on from it, until
somebody else needs it.
"""

import itertools
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from minigpt.errors import RequestRefused
from minigpt.stage.sequence import Sequence

LOOK = 0.25  # seconds between two looks at a client that waits


class Identity(NamedTuple):
    """Whom a share belongs to."""

    name: str  # a key, or an address without port
    known: bool = False  # the manifest lists it: whoever is not known waits, and makes room, for those who are


class Place:
    """Room for one sequence."""

    def __init__(self, places: "Places", who: Identity, size: int) -> None:
        self.who = who
        self.size = size  # bytes
        self.sequence: Sequence | None = None
        self.taken = time.monotonic()
        self._places = places

    def give_back(self) -> None:
        """Forgets the sequence, here and in the stages after this one."""
        self._places._give_back(self)

    def rest(self) -> None:
        """Keeps the sequence until somebody needs the place."""
        self._places._rest(self)

    def resume(self, size: int) -> bool:
        """Whether the sequence is still there, and may have so many bytes."""
        return self._places._resume(self, size)


class _Waiting:
    """Somebody in the queue."""

    def __init__(self, who: Identity, size: int, since: int) -> None:
        self.who = who
        self.size = size
        self.since = since  # its turn among identities with as much: of its arrival, or of its identity's last place
        self.place: Place | None = None
        self.refused: RequestRefused | None = None
        self.decided = threading.Event()


class Places:
    """The places of stage `stage`: `sequences` of them, with `total` bytes, and a queue of `queue`. Thread-safe."""

    def __init__(self, stage: int, sequences: int, total: int, queue: int) -> None:
        self.total = total
        self._stage = stage
        self._sequences = sequences
        self._queue = queue
        self._lock = threading.Lock()
        self._held: set[Place] = set()  # the resting ones included
        self._resting: OrderedDict[Place, None] = OrderedDict()  # the oldest first
        self._waiting: list[_Waiting] = []  # as they came
        self._turns = itertools.count()
        self._seconds = 1.0  # that a request has a place, on average
        self._changed = threading.Condition(self._lock)
        self.draining = False

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self._held)

    @property
    def reserved(self) -> int:
        """Bytes of all places."""
        with self._lock:
            return self._bytes()

    def take(self, who: Identity, size: int, check: Callable[[], None]) -> Place:
        """A place, once there is one.

        Args:
            who: whose share it is part of.
            size: bytes.
            check: called every `LOOK` seconds; what it raises ends the wait.

        Raises RequestRefused if the queue is full, perhaps with those of others who have fewer there, if the size is
        more than all places have, or the process drains.
        """
        self._possible(size)
        with self._lock:
            self.refuse_if_draining()
            mine = _Waiting(who, size, next(self._turns))
            self._waiting.append(mine)
            dropped, decided = self._admit()
            if len(self._waiting) > self._queue:
                decided.append(self._refuse_one())
        try:
            _end(dropped, decided)
            while not mine.decided.wait(LOOK):
                check()
            if mine.place is None:
                self.refuse_if_draining()
                assert mine.refused is not None, "whoever gets no place is told why"
                raise mine.refused
        except BaseException:
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                dropped, decided = self._admit()  # those that it stood before
            _end(dropped, decided)
            if mine.place is not None:
                mine.place.give_back()
            raise
        return mine.place

    def admit(self, size: int) -> Place:
        """A place at once, for a sequence that has one in the stage before. Raises RequestRefused."""
        self._possible(size)
        with self._lock:
            self.refuse_if_draining()
            if len(self._held) >= self._sequences or self._bytes() + size > self.total:
                raise self._busy()
            return self._new(Identity(""), size)

    def drain(self) -> None:
        """Gives no place to anybody any more: whoever waits is refused, and so is whoever asks."""
        with self._lock:
            self.draining = True
            waiting, self._waiting = self._waiting, []
        for mine in waiting:
            mine.decided.set()

    def refuse_if_draining(self) -> None:
        """Raises RequestRefused once this process takes nothing new."""
        if self.draining:
            text = f"stage {self._stage} is shutting down and takes nothing new: connect again"
            raise RequestRefused(text, reason="draining", stage=self._stage)

    def clear(self, patience: float, check: Callable[[], None]) -> None:
        """Drops all that rest. If none does, waits `patience` seconds at most until one does, or a place is free."""
        until = time.monotonic() + patience
        with self._lock:
            held = set(self._held)
        while True:
            with self._lock:
                dropped = self._drop_all()
                if not dropped and held <= self._held and time.monotonic() < until:
                    self._changed.wait(LOOK)
                    dropped = self._drop_all()
            _end(dropped, [])
            if dropped or not held <= self._held or time.monotonic() >= until:
                return
            check()

    def _possible(self, size: int) -> None:
        if size > self.total:
            text = f"the request needs {size} bytes of cache, and stage {self._stage} has {self.total} in all"
            raise RequestRefused(f"{text}: shorten it", reason="too-long", stage=self._stage)

    def _busy(self) -> RequestRefused:
        after = max(1, math.ceil(self._seconds * (1 + len(self._waiting)) / self._sequences))
        full = f"stage {self._stage} is busy with {len(self._held)} sequences, and {len(self._waiting)} wait"
        return RequestRefused(f"{full}: try again in {after} s", reason="busy", stage=self._stage)

    def _bytes(self) -> int:
        return sum(place.size for place in self._held)

    def _new(self, who: Identity, size: int) -> Place:
        place = Place(self, who, size)
        self._held.add(place)
        return place

    def _admit(self) -> tuple[list[Sequence], list[_Waiting]]:
        """Gives places to those who wait. Returns the sequences that were dropped for them, and who is to be told. The
        lock is held."""
        dropped: list[Sequence] = []
        admitted: list[_Waiting] = []
        while self._waiting:
            shares = {who: self._share(who) for who in {one.who for one in self._waiting}}
            mine = min(self._waiting, key=lambda one: (not one.who.known, shares[one.who], one.since))
            while self._resting and not self._room(mine.size):
                dropped += self._drop(next(iter(self._resting)))
            if not self._room(mine.size):
                break  # those behind it do not overtake it, even if they are smaller
            self._waiting.remove(mine)
            mine.place = self._new(mine.who, mine.size)
            admitted.append(mine)
            turn = next(self._turns)
            for other in self._waiting:
                if other.who == mine.who:
                    other.since = turn
        return dropped, admitted

    def _share(self, who: Identity) -> float:
        """What an identity has for its requests, of the places or of the bytes, whichever is more: 0 to 1."""
        own = [place.size for place in self._held if place.who == who and place not in self._resting]
        return max(len(own) / self._sequences, sum(own) / self.total)

    def _refuse_one(self) -> _Waiting:
        """The one whom the queue has no room for: the latest of those who have most there; those who come last, if
        they have as much. The lock is held."""
        number = Counter(one.who for one in self._waiting)
        unwanted = max(reversed(self._waiting), key=lambda one: (not one.who.known, number[one.who]))
        self._waiting.remove(unwanted)
        unwanted.refused = self._busy()
        return unwanted

    def _room(self, size: int) -> bool:
        return len(self._held) < self._sequences and self._bytes() + size <= self.total

    def _drop_all(self) -> list[Sequence]:
        return [sequence for place in list(self._resting) for sequence in self._drop(place)]

    def _drop(self, place: Place) -> list[Sequence]:
        del self._resting[place]
        self._held.discard(place)
        sequence, place.sequence = place.sequence, None
        return [] if sequence is None else [sequence]  # none if there was no memory for it

    def _give_back(self, place: Place) -> None:
        with self._lock:
            sequence, place.sequence = place.sequence, None
            if place in self._resting:
                del self._resting[place]
            elif place in self._held:
                self._note(place)
        try:
            _end([] if sequence is None else [sequence], [])
        finally:
            with self._lock:
                self._held.discard(place)
                dropped, admitted = self._admit()
                self._changed.notify_all()
            _end(dropped, admitted)

    def _rest(self, place: Place) -> None:
        with self._lock:
            if place not in self._held or place in self._resting:  # it was needed meanwhile, or no request began
                return
            self._note(place)
            self._resting[place] = None
            dropped, admitted = self._admit()
            self._changed.notify_all()
        _end(dropped, admitted)

    def _note(self, place: Place) -> None:
        self._seconds += (time.monotonic() - place.taken - self._seconds) / 16

    def _resume(self, place: Place, size: int) -> bool:
        with self._lock:
            if place not in self._held:
                return False
            more = max(0, size - place.size)
            if self._bytes() + more > self.total:
                return False
            self._resting.pop(place, None)
            place.size += more
            place.taken = time.monotonic()
            return True


def _end(sequences: Iterable[Sequence], decided: Iterable[_Waiting]) -> None:
    """Ends sequences, and then lets those begin that have their room: a later stage must hear of it in this order."""
    try:
        for sequence in sequences:
            sequence.end()
    finally:
        for mine in decided:
            mine.decided.set()
