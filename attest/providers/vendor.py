"""What the vendors' platforms share: in which order their parts are asked, and a reader of AMD's and Intel's layouts.

    evidence ──► examine: what does it say, and who vouches for it? ──► bound: was it made for this handshake?
             ──► failures: is it as pinned? ──► differences: are its claims?

All are asked before anything is refused, so that an error has all failures.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol, Self, TypeVar

from attest import AttestationResult, Binding, Evidence, EvidenceError, Failure, PolicyError, Provider, provider_name
from attest.policy import differences
from attest.providers import AnyCode, Pins

S = TypeVar("S")
Bound = Sequence[tuple[str, bytes | None, bytes]]  # a field that a platform signed, its value, and what it has to be
Pinned = Mapping[str, Any] | AnyCode  # the fields of a manifest's `evidence` object to be compared; or ANY_CODE


class Reader:
    """Takes bytes from the front, little-endian. Raises EvidenceError where there are not as many."""

    def __init__(self, what: str, data: bytes) -> None:
        self.what, self.data, self.at = what, data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise EvidenceError(f"{self.what}: wanted {count} bytes at {self.at:#x}, got {len(self.data) - self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def zeros(self, count: int) -> None:
        at = self.at
        if any(self.take(count)):
            raise EvidenceError(f"{self.what}: got something in the {count} bytes at {at:#x}, wanted zeros")


def believed(examined: tuple[S, Sequence[Failure]]) -> S:
    """The statement, if there is no reason not to believe it. Raises EvidenceError with all there are."""
    statement, wrong = examined
    if wrong:
        raise EvidenceError.of(wrong)
    return statement


def accept(differing: Sequence[Failure]) -> None:
    """Raises PolicyError with all that differs, if anything does."""
    if differing:
        raise PolicyError(*(sentence for _, sentence in differing))


@dataclass(frozen=True)
class FieldPins:
    """Pins as the manifest has them, which a provider's `read` has checked."""

    fields: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(self.fields)


class Signed(Protocol):
    """What a platform signed, taken apart."""

    def bound(self, binding: Binding) -> Bound:
        """Its fields that hold parts of a binding."""


def unbound(signed: Signed, evidence: Evidence, binding: Binding) -> list[Failure]:
    """What of evidence is not of this handshake and end."""
    around = [
        ("provider", bytes([evidence.provider]), bytes([binding.provider])),
        ("claims", evidence.claims, binding.claims),
    ]
    wrong = []
    for name, got, wanted in (*around, *signed.bound(binding)):
        if got != wanted:
            advice = "it was made for another handshake, role, static key or claims"
            if name == "report_data":
                advice += "; or a paravisor, as Azure's, fills it"
            shown = got.hex() if got else "none"
            wrong.append(("binding", f"binding: got {name} {shown}, wanted {wanted.hex()}; {advice}"))
    return wrong


@dataclass(frozen=True)
class VendorVerifier:
    """Judges evidence: authentic, made for this handshake by an end with these claims, and as pinned."""

    provider: ClassVar[Provider]
    examine: ClassVar[Callable[..., tuple[Any, list[Failure]]]]  # a provider's function, as is the next
    failures: ClassVar[Callable[..., list[Failure]]]

    pins: Pins
    claims: bytes  # exactly what the stage has to claim
    _: KW_ONLY
    roots: Collection[bytes] = frozenset()  # SHA-256 digests of the certificates that may be its root: a vendor's
    clock: Callable[[], float] = time.time  # seconds since the epoch

    @classmethod
    def of_stage(cls, pins: Pins, claims: bytes, stage: int, clock: Callable[[], float]) -> Self:
        return cls(pins, claims, clock=clock)  # the stage's index is among the claims

    def verify(self, evidence: Evidence, binding: Binding) -> AttestationResult:
        """The result, once authenticated and accepted; see `attest.Verifier`. An error has all failures."""
        if evidence.provider != self.provider:
            wanted = f"wanted {self.provider.name.lower()} ({self.provider:d})"
            raise EvidenceError(f"provider: got {provider_name(evidence.provider)}, {wanted}", "provider")
        now = datetime.fromtimestamp(self.clock(), UTC)
        statement, wrong = self.examine(evidence.evidence, evidence.endorsements, self.roots, now)
        wrong += unbound(statement, evidence, binding)
        differing = self.failures(statement, self.pins.to_json())
        refused = PolicyError(*(text for _, text in differing), *differences(evidence.claims, self.claims))
        if wrong:
            raise EvidenceError.of([*wrong, *refused.failures])
        if refused.failures:
            raise refused
        return statement.result(evidence.claims)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class VendorAttester(ABC):
    """Asks a platform for evidence, anew for each handshake."""

    provider: ClassVar[Provider]

    claims: bytes  # what the stage claims about itself; never a peer's choice

    @abstractmethod
    def ask_for(self, binding: Binding) -> tuple[bytes, Signed, tuple[bytes, ...]]:
        """What the platform signs about a binding, the same taken apart, and its endorsements.

        Raises AttestationError.
        """

    def attest(self, binding: Binding) -> Evidence:
        """Evidence for `binding`; ValueError if its provider or claims are not the attester's own.

        Raises AttestationError if the platform fails, says anything else, or endorsements are missing.
        """
        if (binding.provider, binding.claims) != (self.provider, self.claims):
            raise ValueError("binding: its provider or claims are not this attester's own")
        data, signed, endorsements = self.ask_for(binding)
        evidence = Evidence(self.provider, self.claims, data, endorsements)
        return believed((evidence, unbound(signed, evidence, binding)))
