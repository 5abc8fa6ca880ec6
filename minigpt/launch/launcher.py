"""What starts stages: the protocol that every launcher follows. `local` is the first."""

from typing import Protocol

from minigpt.errors import StageError
from minigpt.protocol.manifest import Manifest


class Launcher(Protocol):
    """The stages of one pipeline, wherever they run.

    A launcher chooses the addresses, so it also makes the manifest; its `start` is part of making it. Once all of them
    serve, a stage that ends is started again, at the same address and with a new key, unless it cannot live.

    Attributes:
        manifest: of the pipeline that it runs.
    """

    manifest: Manifest

    @property
    def addresses(self) -> list[str]:
        """Where the stages serve, in order."""

    @property
    def pids(self) -> list[int]:
        """Process ids of the stages, in order; empty where they are not processes of this machine. One that has ended
        keeps its place until it is started again."""

    @property
    def restarts(self) -> list[int]:
        """How often each stage was started again."""

    @property
    def failure(self) -> StageError | None:
        """Why a stage is not started again, if that is so: the pipeline is of no more use."""

    def log_end(self, index: int) -> str:
        """The last lines of the log of stage `index`, where nobody else can read it; else ""."""

    def start(self, index: int) -> None:
        """Starts stage `index`, and does not wait. Raises StageError."""

    def wait(self, index: int) -> None:
        """Waits until stage `index` serves. Raises the error that it ended with: StageError, CheckpointError, …"""

    def stop(self) -> None:
        """Ends the stages, and waits for them. May be called twice."""
