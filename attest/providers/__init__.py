"""One file for each kind of evidence. Each makes a `Platform`; `attest.registry` lists them."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from attest import Attester, Evidence, Failure, Provider, Verifier
from attest.certificates import Files
from attest.document import Place

TEST_ROOT = "test_root"  # the field of a manifest's `evidence` object that names a root in place of the vendor's
TEST_ROOT_WARNING = "stage {stage} is believed under a test's root, {root}, which proves nothing about hardware"


class AnyCode(enum.Enum):
    """The type of ANY_CODE."""

    ANY_CODE = "any code"


ANY_CODE = AnyCode.ANY_CODE  # in place of pins: no register is compared. For tests; no manifest can say it


class Pins(Protocol):
    """What a manifest says about the evidence of one stage: which is acceptable."""

    def to_json(self) -> dict[str, Any]:
        """The fields of the manifest's `evidence` object."""


@dataclass(frozen=True)
class Rooted:
    """Pins of a stage that is believed under another root than the vendor's: for tests."""

    pins: Pins
    root: bytes  # SHA-256 of its certificate in DER

    def to_json(self) -> dict[str, Any]:
        return self.pins.to_json() | {TEST_ROOT: self.root.hex()}


@dataclass(frozen=True)
class Check:
    """One check of evidence, for people."""

    result: str  # PASS, FAIL or SKIP
    name: str
    text: str  # what holds; or what was got, what was wanted, and what to do

    def __str__(self) -> str:
        return f"{self.result} {self.name}: {self.text}"


@dataclass(frozen=True)
class Platform:
    """One kind of evidence: how it is pinned, verified, made and shown."""

    provider: Provider  # its code on the wire; the name in lower case is the manifest's
    read_pins: Callable[[Place], Any]  # those of a manifest's `evidence` object. Raises DocumentError
    # Judges evidence by (pins, claims, index of the stage, clock in seconds since the epoch). Unless the platform is
    # simulated, the verifier is a dataclass with a field `roots`, which holds the vendor's.
    verifier: Callable[[Any, bytes, int, Callable[[], float]], Verifier]
    describe: Callable[[Evidence], dict[str, Any]]  # what it says, unverified. Raises EvidenceError
    checks: dict[str, str]  # what a verifier checks beside pins, in order: a name, and what holds if it passes
    # Makes evidence with (the bytes of a key's file, claims, what gives the files of its endorsements, or None).
    attester: Callable[[bytes, bytes, Files | None], Attester]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a check: what it says nothing without
    simulated: bool = False  # whether it proves nothing about hardware, and is accepted with --allow-mock only

    @property
    def name(self) -> str:
        return self.provider.name.lower()

    def read(self, place: Place) -> tuple[Any, bytes | None]:
        """The pins of a manifest's `evidence` object, and the SHA-256 of the root that it names in place of the
        vendor's, if it does. Raises DocumentError."""
        if self.simulated or TEST_ROOT not in place.value:
            return self.read_pins(place), None
        root = place.get(TEST_ROOT).pin(32)
        rest = {name: value for name, value in place.value.items() if name != TEST_ROOT}
        return self.read_pins(replace(place, value=rest)), root

    def judge(
        self, pins: Any, test_root: bytes | None, claims: bytes, stage: int, clock: Callable[[], float]
    ) -> Verifier:
        """Judges the evidence of a stage: as `verifier`, under the vendor's roots, or under the one that is named."""
        made: Any = self.verifier(pins, claims, stage, clock)
        return made if test_root is None else replace(made, roots=frozenset([test_root]))  # type: ignore[no-any-return]

    def lines(self, pins: Any, failures: Sequence[Failure], skipped: Mapping[str, str] = {}) -> list[Check]:
        """All checks of a verifier, those that failed and those that did not, in their order.

        Args:
            failures: of an AttestationError; none if the evidence was accepted.
            skipped: checks that were not made, and why.
        """
        holding = dict(self.checks)
        if not self.simulated:
            compared = ((name, value) for name, value in pins.to_json().items() if name not in _NOT_COMPARED)
            holding |= {name: _pinned(name, value) for name, value in compared if name not in holding}
        names = ["claims" if name.startswith("claim ") else name for name, _ in failures]
        ended = any(name in _ENDING for name in names)
        unfounded = (
            (name, next((each for each in needed if each in names), None)) for name, needed in self.needs.items()
        )
        skipped = {**skipped, **{name: f"not checked: it says nothing without {one}" for name, one in unfounded if one}}
        found = []
        for name, holds in holding.items():
            if name in names:
                found += [
                    _failed(name, failure) for known, failure in zip(names, failures, strict=True) if known == name
                ]
            elif not ended:
                found.append(Check("SKIP", name, skipped[name]) if name in skipped else Check("PASS", name, holds))
        others = zip(names, failures, strict=True)
        return found + [_failed(name, failure) for name, failure in others if name not in holding]


_NOT_COMPARED = ("provider", "covers")
_ENDING = ("malformed", "alg", "provider")  # after these, nothing else is checked


def _pinned(name: str, value: Any) -> str:
    return f"at least {_shown(value)}" if name.startswith("min_") else f"{_shown(value)}, as pinned"


def _failed(name: str, failure: Failure) -> Check:
    return Check("FAIL", name, failure[1].removeprefix(f"{name}: "))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    return " or ".join(map(str, value)) if isinstance(value, list) else str(value)
