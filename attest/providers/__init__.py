"""One file for each kind of evidence. Each makes a `Platform`; `attest.registry` lists them."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from attest import Attester, Evidence, Provider, Verifier
from attest.document import Place


class AnyCode(enum.Enum):
    """The type of ANY_CODE."""

    ANY_CODE = "any code"


ANY_CODE = AnyCode.ANY_CODE  # in place of pins: no register is compared. For tests; no manifest can say it


class Pins(Protocol):
    """What a manifest says about the evidence of one stage: which is acceptable."""

    def to_json(self) -> dict[str, Any]:
        """The fields of the manifest's `evidence` object."""


@dataclass(frozen=True)
class Platform:
    """One kind of evidence: how it is pinned, verified, made and shown. None is what this version cannot do."""

    provider: Provider  # its code on the wire; the name in lower case is the manifest's
    read_pins: Callable[[Place], Any]  # those of a manifest's `evidence` object. Raises DocumentError
    # Judges evidence by (pins, claims, index of the stage, clock in seconds since the epoch).
    verifier: Callable[[Any, bytes, int, Callable[[], float]], Verifier]
    describe: Callable[[Evidence], dict[str, Any]]  # what it says, unverified. Raises EvidenceError
    checks: dict[str, str]  # what a verifier checks beside pins, in order: a name, and what holds if it passes
    # Makes evidence with (the bytes of a key's file, claims).
    attester: Callable[[bytes, bytes], Attester] | None = None
    needs: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # of a check: those without which it says nothing
    simulated: bool = False  # whether it proves nothing about hardware, and is accepted with --allow-mock only

    @property
    def name(self) -> str:
        return self.provider.name.lower()
