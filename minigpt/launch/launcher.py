"""What starts stages: the protocol that every launcher follows, `local` and `on_ray`."""

from typing import Protocol

from minigpt.errors import StageError
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.manifest import Manifest


class Launcher(Protocol):
    """The stages of one pipeline, wherever they run.

    They serve once it is made. A stage that ends is started again with a new key, unless it cannot live.

    Attributes:
        manifest: of the pipeline that it runs.
        document: the manifest's bytes.
    """

    manifest: Manifest
    document: bytes

    @property
    def addresses(self) -> Addresses:
        """Where the stages serve now."""

    @property
    def places(self) -> bytes:
        """The same, as the bytes of a places file."""

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

    def stop(self) -> None:
        """Ends the stages, and waits for them. May be called twice."""
