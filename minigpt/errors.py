"""What can go wrong in minigpt, grouped by what the caller does about it.

    MiniGPTError                 the root; `exit_code` is what the command line ends with
    ├── UsageError          2    the call is wrong: change the arguments
    ├── CheckpointError     1    the checkpoint is missing, damaged or not a GPT-2: get another
    │   ├── ConfigError     1    its config.json is malformed or not supported
    │   └── WeightsMismatch 5    its tensors are not those that the manifest pins
    ├── ManifestError       3    the manifest is malformed, expired or not acceptable: do not use it
    ├── RequestRefused      1    a stage refused this request, and says why; the pipeline still serves
    └── StageError          4    a stage cannot be reached, timed out, or died: look at that stage
        ├── MessageError    4    what it sent is not a message of this protocol
        ├── LateStage       4    its answer did not come within the caller's timeout: allow more, or look at that stage
        ├── UnreachableStage 4   it is not there, was told to end, or has another manifest: the request is not to blame
        └── UntrustedStage  3    its evidence was refused: compare what runs there with the manifest

Errors of the link are `transport.TransportError` (exit code 4) and of evidence `attest.AttestationError` (3).
"""

import resource
from collections.abc import Sequence

INSIDE = "failed inside: its log says where"  # what a stage tells of itself when an error is a bug


class MiniGPTError(Exception):
    """Root of the package's errors."""

    exit_code = 1


class UsageError(MiniGPTError, ValueError):
    """The call's arguments are wrong."""

    exit_code = 2


class CheckpointError(MiniGPTError):
    """A checkpoint is missing, damaged, or not one this engine can run."""


class ConfigError(CheckpointError):
    """A checkpoint's config.json is malformed or not supported."""


class WeightsMismatch(CheckpointError):
    """The tensors' digest is not the one that the manifest pins."""

    exit_code = 5


class ManifestError(MiniGPTError):
    """A manifest is malformed, expired, or not acceptable."""

    exit_code = 3


class RequestRefused(MiniGPTError):
    """A stage refused the request and says why; the channel lives on.

    Attributes:
        reason: a short machine-readable word: "busy", "draining", "too-long", "bad-token", "gap", "bad-request".
        stage: index of the stage that refused.
    """

    def __init__(self, message: str, *, reason: str, stage: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.stage = stage


class StageError(MiniGPTError):
    """A stage cannot be reached, did not answer in time, or died.

    Attributes:
        stage: index of the stage that failed, None where it is not known.
    """

    exit_code = 4

    def __init__(self, message: str, *, stage: int | None = None) -> None:
        super().__init__(message)
        self.stage = stage


class MessageError(StageError):
    """A peer's message is malformed: an unknown type, a missing field, a value out of its range."""


class LateStage(StageError):
    """A stage did not answer within the caller's own timeout."""


class UnreachableStage(StageError):
    """A stage is not there, for us or for the stage before it, or was told to end, or has another manifest.

    The request is not to blame.
    """


class UntrustedStage(StageError):
    """A stage's evidence was refused, by us or by the stage before it.

    Attributes:
        failures: the checks that failed here, each its name and a sentence: what was got and wanted, and what to do;
            none if another end refused it.
        checks: all checks made here, a line for each: "PASS chain: …", "FAIL pcr0: got …".
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        stage: int | None = None,
        failures: Sequence[tuple[str, str]] = (),
        checks: Sequence[str] = (),
    ) -> None:
        super().__init__(message, stage=stage)
        self.failures = tuple(failures)
        self.checks = tuple(checks)


def shortage(error: Exception) -> str:
    """What to say of an error by which Python, or a library that does not load, says that it lacks memory or threads.

    Raises the error again if it says something else: it is a bug then.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limited = limit != resource.RLIM_INFINITY
    empty = isinstance(error, MemoryError) or (limited and isinstance(error, SystemError))  # "returned NULL without..."
    if not (empty or isinstance(error, ImportError) or str(error) == "can't start new thread"):
        raise error
    reason = "out of memory" if empty else str(error.__cause__ or error)
    return reason + (f"; ulimit -v allows {limit // 1024} kB of memory, perhaps too little" if limited else "")
