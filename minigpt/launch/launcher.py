"""What starts stages: the protocol that every launcher follows. `local` is the first."""

from typing import Protocol

from minigpt.protocol.manifest import Manifest


class Launcher(Protocol):
    """The stages of one pipeline, wherever they run.

    A launcher chooses the addresses, so it also makes the manifest; its `start` is part of making it.

    Attributes:
        manifest: of the pipeline that it runs.
    """

    manifest: Manifest

    @property
    def addresses(self) -> list[str]:
        """Where the stages serve, in order."""

    @property
    def pids(self) -> list[int]:
        """Process ids of the stages, in order; empty where they are not processes of this machine."""

    def start(self, index: int) -> None:
        """Starts stage `index`, and does not wait. Raises StageError."""

    def wait(self, index: int) -> None:
        """Waits until stage `index` serves. Raises the error that it ended with: StageError, CheckpointError, …"""

    def restart(self, index: int) -> None:
        """Ends stage `index` if it runs, and starts it again at the same address, with a new key; waits for it."""

    def stop(self) -> None:
        """Ends the stages, and waits for them. May be called twice."""
