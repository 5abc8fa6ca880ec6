"""Who may have a sequence in this stage: places, of a number and of a size in bytes, and the queue for them.

A sequence reserves its whole cache before it begins, so none fails halfway for lack of memory. Whoever does not fit
waits, first come, first served; while others wait, one identity has at most half of the places and of the bytes. A
sequence whose request has ended keeps its place, for a request that goes on from it, until somebody else needs it.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from minigpt.errors import RequestRefused
from minigpt.stage.sequence import Sequence

LOOK = 0.25  # seconds between two looks at a client that waits


class Place:
    """Room for one sequence."""

    def __init__(self, places: "Places", who: str, size: int) -> None:
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

    def __init__(self, who: str, size: int) -> None:
        self.who = who
        self.size = size
        self.place: Place | None = None
        self.admitted = threading.Event()


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
        self._waiting: list[_Waiting] = []
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

    def take(self, who: str, size: int, check: Callable[[], None]) -> Place:
        """A place, once there is one.

        Args:
            who: an identity.
            size: bytes.
            check: called every `LOOK` seconds; what it raises ends the wait.

        Raises RequestRefused if the queue is full, the size is more than all places have, or the process drains.
        """
        self._possible(size)
        mine = _Waiting(who, size)
        with self._lock:
            self.refuse_if_draining()
            self._waiting.append(mine)
            dropped, admitted = self._admit()
            refused = None
            if mine.place is None and len(self._waiting) > self._queue:
                self._waiting.remove(mine)
                refused = self._busy()
        try:
            _end(dropped, admitted)
            if refused is not None:
                raise refused
            while not mine.admitted.wait(LOOK):
                check()
            if mine.place is None:
                self.refuse_if_draining()
        except BaseException:
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                dropped, admitted = self._admit()  # those that it stood before
            _end(dropped, admitted)
            if mine.place is not None:
                mine.place.give_back()
            raise
        assert mine.place is not None, "whoever is admitted has a place"
        return mine.place

    def admit(self, size: int) -> Place:
        """A place at once, for a sequence that has one in the stage before. Raises RequestRefused."""
        self._possible(size)
        with self._lock:
            self.refuse_if_draining()
            if len(self._held) >= self._sequences or self._bytes() + size > self.total:
                raise self._busy()
            return self._new("", size)

    def drain(self) -> None:
        """Gives no place to anybody any more: whoever waits is refused, and so is whoever asks."""
        with self._lock:
            self.draining = True
            waiting, self._waiting = self._waiting, []
        for mine in waiting:
            mine.admitted.set()

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

    def _new(self, who: str, size: int) -> Place:
        place = Place(self, who, size)
        self._held.add(place)
        return place

    def _admit(self) -> tuple[list[Sequence], list[_Waiting]]:
        """Gives places to those who wait. Returns the sequences that were dropped for them, and who is to be told. The
        lock is held."""
        dropped: list[Sequence] = []
        admitted: list[_Waiting] = []
        for mine in list(self._waiting):
            others = any(other.who != mine.who for other in self._waiting)
            if others and self._greedy(mine):
                continue
            while self._resting and not self._room(mine.size):
                dropped += self._drop(next(iter(self._resting)))
            if not self._room(mine.size):
                break  # those behind it do not overtake it, even if they are smaller
            self._waiting.remove(mine)
            mine.place = self._new(mine.who, mine.size)
            admitted.append(mine)
        return dropped, admitted

    def _greedy(self, mine: _Waiting) -> bool:
        own = [place.size for place in self._held if place.who == mine.who and place not in self._resting]
        return bool(own) and (2 * (len(own) + 1) > self._sequences or 2 * (sum(own) + mine.size) > self.total)

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


def _end(sequences: list[Sequence], admitted: list[_Waiting]) -> None:
    """Ends sequences, and then lets those begin that have their room: a later stage must hear of it in this order."""
    try:
        for sequence in sequences:
            sequence.end()
    finally:
        for mine in admitted:
            mine.admitted.set()
