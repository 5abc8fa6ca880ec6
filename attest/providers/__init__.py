"""One file for each kind of evidence. Each makes a `Platform`; `attest.registry` lists them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from attest import Attester, Evidence, Provider, Verifier
from attest.document import Place


class Pins(Protocol):
    """What a manifest says about the evidence of one stage: which is acceptable."""

    def to_json(self) -> dict[str, Any]:
        """The fields of the manifest's `evidence` object."""


@dataclass(frozen=True)
class Platform:
    """One kind of evidence: how it is pinned, verified, made and shown.

    Args:
        provider: its code on the wire; the name in lower case is the manifest's.
        read_pins: the pins of a manifest's `evidence` object. Raises DocumentError.
        verifier: judges evidence by (pins, claims, index of the stage, clock in seconds since the epoch). None where
            this version can pin such evidence, but not verify it.
        attester: makes evidence with (the bytes of a key's file, claims). None where this version cannot.
        describe: what evidence says, for a person, unverified. Raises EvidenceError.
        simulated: whether it proves nothing about hardware, and is accepted with --allow-mock only.
    """

    provider: Provider
    read_pins: Callable[[Place], Any]
    verifier: Callable[[Any, bytes, int, Callable[[], float]], Verifier] | None = None
    attester: Callable[[bytes, bytes], Attester] | None = None
    describe: Callable[[Evidence], dict[str, Any]] | None = None
    simulated: bool = False

    @property
    def name(self) -> str:
        return self.provider.name.lower()
