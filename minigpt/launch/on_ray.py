"""A pipeline whose stages run on the nodes of a Ray cluster.

    this process                                     a node
    RayStages, the root's key, the manifest  ─Ray─►  an actor: Agent ─pipes─► python -m minigpt.stage
             ◄──────────── public half of the stage's key, its address

Ray places an actor for each stage, on different nodes if it can, and places it again when its node has died. A thread
here for each stage takes it from its key to where it serves, and starts it again when it has ended. Manifest, places,
public keys and endorsements pass through Ray, and what stages say of their ends: nothing that is secret. Whoever
connects to a cluster unpickles what it sends, so this belongs to an operator's machine, without client keys, and the
cluster must ask for a token.

Actors are neither detached nor named: they end with this process, and their stages with them.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from attest.measure import measure
from attest.providers.mock import MockPins, MockRoot
from minigpt.checkpoint.sources import Checkpoint
from minigpt.errors import StageError, UsageError
from minigpt.launch.agent import READY, Agent
from minigpt.launch.plan import plan
from minigpt.launch.restarts import TRIES, Restarts
from minigpt.protocol import addresses
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.manifest import Manifest

LIFETIME = 36_500.0  # days: stages that end with this process must not expire before it
LOOK = 0.5  # seconds between two looks at whether this is to end
AGAIN = 1.0  # seconds until an actor is asked again that Ray is about to start on another node
PATIENCE = 10.0  # seconds that stages may take to end
CLOSED = "this pipeline was closed"
PROBE = 60.0  # seconds that it may take to find out whether a cluster asks for a token


class RayStages:
    """Stages on a Ray cluster: a `Launcher`. They serve when this returns.

    Args:
        checkpoint: of the model; every node finds it at the same path, or gets it from the hub.
        split: the layers of each stage, as "6+6", or a number of stages.
        address: of the cluster's head, HOST:PORT; "auto" for the one that this machine belongs to.
        insecure: take a cluster that asks nobody for a token.
        threads: BLAS threads of each stage.
        progress: is told what is waited for, in a line for people, and how far it is.
        news: is told of each stage what it does, and later, from a thread, that it ended.

    Attributes:
        document, places: the bytes of the manifest and of its places file; the latter change when a stage moves.

    Raises:
        UsageError, CheckpointError, ManifestError, StageError: a stage cannot be planned or started.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        split: str | int,
        *,
        address: str = "auto",
        insecure: bool = False,
        threads: int | None = None,
        progress: Callable[[str], None] = lambda line: None,
        news: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not insecure:
            _check_token(address)
        self._news = news
        self._progress = progress
        self._root = MockRoot.generate()
        pins = [MockPins(self._root.public, frozenset([measure()]))]
        self.document = plan(checkpoint, split, pins=pins, operators=None, days=LIFETIME, progress=progress)
        self.manifest = Manifest.parse(self.document)
        count = len(self.manifest.stages)
        self._places: dict[int, str] = {}  # where each stage is
        self._nodes: dict[int, str] = {}
        self._serve: set[int] = set()  # those that have served
        self._counts = [-1] * count  # the first start is none again
        self._failure: tuple[str, int] | None = None
        self._changed = threading.Condition()  # of all of these
        self._halted = threading.Event()
        self._actor: Callable[[int], Any]  # makes a stage's
        self._actors: list[Any] = []
        self._threads: list[threading.Thread] = []
        try:
            ray.init(address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"no Ray cluster at {address}: {error}") from None
        try:
            named = checkpoint.revision is not None or checkpoint.name == "tiny"
            where = checkpoint.name if named else str(checkpoint.folder)
            # SPREAD: on different nodes as far as there are some with room, also when one has died.
            actor = ray.remote(_Actor).options(
                num_cpus=threads or 1, max_restarts=-1, max_concurrency=4, scheduling_strategy="SPREAD"
            )
            self._actor = lambda index: actor.remote(index, where, checkpoint.revision, threads)
            self._actors += map(self._actor, range(count))
            self._threads += [
                threading.Thread(target=self._keep, args=(index,), name=f"stage {index}", daemon=True)
                for index in range(count)
            ]
            for thread in self._threads:
                thread.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        nodes = len(set(self._nodes.values()))
        if nodes < count:
            news(f"warning: {count} stages are on {nodes} of the cluster's nodes, so some share cores, and their fate")

    @property
    def places(self) -> bytes:
        with self._changed:
            return addresses.write([place for _, place in sorted(self._places.items())], len(self._counts))

    @property
    def addresses(self) -> Addresses:
        """Where the stages are now."""
        with self._changed:
            return Addresses(len(self._counts), None, self._places)

    @property
    def pids(self) -> list[int]:
        """None: they are no processes of this machine."""
        return []

    @property
    def restarts(self) -> list[int]:
        """How often each stage was started again."""
        return [max(0, count) for count in self._counts]

    @property
    def failure(self) -> StageError | None:
        """Why a stage is not started again, if that is so: a new error each time, for whoever raises it."""
        failed = self._failure
        return None if failed is None else StageError(failed[0], stage=failed[1])

    def log_end(self, index: int) -> str:
        """Nothing: the log is on the stage's node."""
        return ""

    def wait(self) -> None:
        """Waits until every stage serves. Raises StageError if one does not."""
        with self._changed:
            count = len(self._counts)
            if not self._changed.wait_for(lambda: self._failure or len(self._serve) == count, READY):
                late = min(set(range(count)) - self._serve)
                raise StageError(
                    f"stage {late} was not ready in {READY:.0f} s: has the cluster a free CPU?", stage=late
                )
        if (failure := self.failure) is not None:
            raise failure

    def stop(self) -> None:
        """Ends the stages, and waits for them. May be called twice."""
        self._halted.set()
        if ray.is_initialized():
            with suppress(ray.exceptions.RayError):  # an actor that is gone has taken its stage along
                ray.get([actor.end.remote() for actor in self._actors], timeout=PATIENCE)
            ray.shutdown()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _keep(self, index: int) -> None:
        """A stage's thread: starts it, and starts it again when it has ended."""
        restarts = Restarts(time.monotonic())
        while not self._halted.is_set():
            how = self._live(index, restarts)
            if self._halted.is_set():
                return
            wait = restarts.ended(time.monotonic())
            if wait is None:
                with self._changed:
                    self._failure = (
                        f"stage {index} {how}; it ended early {TRIES} times in a row and is not started again",
                        index,
                    )
                    self._changed.notify_all()
                return
            self._news(f"stage {index} {how}; it is started again")
            self._halted.wait(wait)

    def _live(self, index: int, restarts: Restarts) -> str:
        """One life of a stage, from its start to its end. Returns how it ended."""
        try:
            places = self._placed(index)
            actor = self._actors[index]
            self._news(f"stage {index} placed at {self._places[index]}, loading")
            public = self._get(actor.begin.remote(self.document, places))
            until = int(self.manifest.expires.timestamp() * 1000)
            serving = actor.serve.remote(self._root.endorse(bytes.fromhex(public), index, until))
            self._get(serving, lambda: self._progress(self._get(actor.loading.remote())))
            with self._changed:
                self._serve.add(index)
                self._counts[index] += 1
                self._changed.notify_all()
            restarts.ready(time.monotonic())
            self._news(f"stage {index} ready at {self._places[index]}")
            return str(self._get(actor.ended.remote()))
        except ray.exceptions.RayActorError:
            return "is lost: its actor or its node has died"
        except ray.exceptions.RayTaskError as error:
            return str(error.cause)
        except ray.exceptions.RayError as error:
            return f"is lost: {error}"

    def _placed(self, index: int) -> bytes:
        """Waits until this stage's actor has a node, and then until all have: where they are. If it has moved, all of
        them are told."""
        waiting = False
        while True:
            try:
                node, address = self._get(self._actors[index].where.remote())
                break
            except ray.exceptions.RayActorError as error:
                if isinstance(error, ray.exceptions.ActorDiedError):  # for good; else Ray is about to start it again
                    self._actors[index] = self._actor(index)
                if not waiting:
                    self._news(f"stage {index} waits for a node with a free CPU")
                waiting = True
                self._halted.wait(AGAIN)
        count = len(self._counts)
        with self._changed:
            moved = self._places.get(index, address) != address
            self._places[index], self._nodes[index] = address, node
            self._changed.notify_all()
            while len(self._places) < count:
                if self._halted.is_set():
                    raise ray.exceptions.RayError(CLOSED)
                self._changed.wait(LOOK)
            places = self.places
        if moved:
            for actor in self._actors:
                actor.locate.remote(places)
        return places

    def _get(self, reference: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """What an actor answers. Raises RayError, also when this is to end."""
        while not ray.wait([reference], timeout=LOOK)[0]:
            if self._halted.is_set():
                raise ray.exceptions.RayError(CLOSED)
            meanwhile()
        return ray.get(reference)


class _Actor(Agent):
    """An agent in a process of Ray's."""

    def where(self) -> tuple[str, str]:
        """The id of its node, and the stage's address there."""
        return ray.get_runtime_context().get_node_id(), self.bind(ray.util.get_node_ip_address())


def _check_token(address: str) -> None:
    """Refuses a cluster that also answers those who show no token. Raises UsageError."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    if not _answers(address, dict(os.environ)):
        raise UsageError(f"no Ray cluster at {address} answers, or it wants another token than ours (RAY_AUTH_TOKEN…)")
    if _answers(address, bare | {"RAY_AUTH_MODE": "disabled"}):
        raise UsageError(
            f"the Ray cluster at {address} asks nobody for a token: whoever reaches its ports can run code on its "
            "nodes and here. Start it with RAY_AUTH_MODE=token, and this too; or give --insecure-ray"
        )


def _answers(address: str, environment: dict[str, str]) -> bool:
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    words += [] if address == "auto" else ["--address", address]
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(words, env=environment, capture_output=True, timeout=PROBE, check=False)
        return done.returncode == 0
    return False
