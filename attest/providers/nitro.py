"""AWS Nitro Enclaves: an image is pinned by PCR0 to PCR2. Such evidence cannot be verified yet, and is refused."""

from dataclasses import dataclass
from typing import Any

from attest import Provider
from attest.document import Place
from attest.providers import Platform

REGISTERS = ("pcr0", "pcr1", "pcr2")
SIZE = 48  # bytes of a register


@dataclass(frozen=True)
class NitroPins:
    """PCR0, PCR1 and PCR2 of a stage's image, 48 bytes each."""

    pcrs: tuple[bytes, ...]

    @classmethod
    def read(cls, place: Place) -> "NitroPins":
        place.only("provider", *REGISTERS)
        return cls(tuple(place.get(name).pin(SIZE) for name in REGISTERS))

    def to_json(self) -> dict[str, Any]:
        return {"provider": "nitro"} | {name: value.hex() for name, value in zip(REGISTERS, self.pcrs, strict=True)}


PLATFORM = Platform(Provider.NITRO, NitroPins.read)
