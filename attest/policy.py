"""Which results are acceptable. A policy appraises what a verifier has already authenticated; it reads no evidence.

There is no default and no wildcard: a policy without pins cannot be made, so an absent pin never means "anything".
Claims are compared as exact bytes. Only to say *which* field differs are they decoded.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import msgpack

from attest import MAX_CLAIMS, AttestationResult, PolicyError, Provider, provider_name

MEASUREMENT_SIZE = 48  # bytes of SHA-384
MAX_MEASUREMENTS = 64  # acceptable for one stage
CLIENT_ID = 0xFFFF  # the link's id of a client, so no stage has that index

Scalar = str | int | bytes | bool | None


@dataclass(frozen=True)
class Policy:
    """What one stage has to be. ValueError if a pin is missing, all-zero or of the wrong form."""

    provider: Provider  # who has to vouch for it; only MOCK yet: the pins of other platforms are several registers each
    measurements: frozenset[bytes]  # 48 bytes each, at least one; all-zero is what unmeasured platforms report
    claims: bytes  # exactly what it has to claim
    stage: int  # the index that its key has to be endorsed for, 0..65534
    allow_debug: bool = False  # accept a platform that lets its owner look inside

    def __post_init__(self) -> None:
        if self.provider != Provider.MOCK:
            raise ValueError(
                f"provider of a policy: got {provider_name(self.provider)}, wanted mock (1); "
                "evidence of the others is not supported yet"
            )
        if not self.measurements:
            raise ValueError("measurements of a policy: got none, wanted some; `python -m attest measure` has it")
        for measurement in self.measurements:
            if len(measurement) != MEASUREMENT_SIZE or not any(measurement):
                raise ValueError(
                    f"measurement of a policy: got {measurement.hex() or 'nothing'}, "
                    f"wanted {MEASUREMENT_SIZE} bytes that are not all zero"
                )
        if len(self.claims) > MAX_CLAIMS:
            raise ValueError(f"claims of a policy: got {len(self.claims)} bytes, wanted at most {MAX_CLAIMS}")
        if not 0 <= self.stage < CLIENT_ID:
            raise ValueError(f"stage of a policy: got {self.stage}, wanted 0..{CLIENT_ID - 1}")

    def check(self, result: AttestationResult) -> None:
        """Accepts `result`, or raises PolicyError with one mismatch for each thing that differs, all at once."""
        mismatches = []
        if result.provider != self.provider:
            mismatches.append(f"provider: got {provider_name(result.provider)}, wanted {provider_name(self.provider)}")
        if result.measurement not in self.measurements:
            wanted = " or ".join(sorted(pin.hex() for pin in self.measurements))
            mismatches.append(
                f"measurement: got {result.measurement.hex() or 'none'}, wanted {wanted}; other code is "
                "running there than was pinned: compare with `python -m attest measure`"
            )
        if result.debug and not self.allow_debug:
            mismatches.append("debug: got on, wanted off; a debug environment keeps no secret from its host")
        if result.stage != self.stage:
            got = "no stage" if result.stage is None else f"stage {result.stage}"
            mismatches.append(f"key: got one endorsed for {got}, wanted stage {self.stage}; check its key file")
        mismatches += differences(result.claims, self.claims)
        if mismatches:
            raise PolicyError(*mismatches)


def decode_claims(claims: bytes) -> dict[str, Scalar] | None:
    """The fields of `claims` if they are a canonical msgpack map of plain fields, else None. For people to read."""
    if len(claims) > MAX_CLAIMS:
        return None
    try:
        fields = msgpack.unpackb(claims, strict_map_key=True)
        canonical = msgpack.packb(fields) == claims  # not so with a key twice, or a number in more bytes than needed
    except (ValueError, TypeError, OverflowError, RecursionError):  # ValueError: the root of msgpack's and of UTF-8's
        return None
    plain = isinstance(fields, dict) and all(isinstance(key, str) and isinstance(fields[key], Scalar) for key in fields)
    return fields if canonical and plain else None


def encode_claims(fields: dict[str, Scalar]) -> bytes:
    """Claims as canonical msgpack, in the order of the fields."""
    return bytes(msgpack.packb(fields))


def show_scalar(value: Scalar) -> str:
    """A field for a message or a terminal: bytes in hex, a string quoted, with its control characters escaped."""
    return value.hex() if isinstance(value, bytes) else ascii(value)


def date(milliseconds: int) -> str:
    """A time for a message or a terminal: in UTC while the calendar lasts, as a number beyond."""
    seconds, rest = divmod(milliseconds, 1000)
    if seconds > 253_402_300_799:  # the end of the year 9999, where datetime ends
        return f"{milliseconds} ms after 1970"
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03}Z"


def differences(got: bytes, wanted: bytes) -> list[str]:
    """One sentence for each claim that differs; one for all if the claims cannot be told apart field by field."""
    if got == wanted:
        return []
    ours, theirs = decode_claims(wanted), decode_claims(got)
    if ours is None or theirs is None:
        return [f"claims: got {len(got)} bytes {got.hex()}, wanted {len(wanted)} bytes {wanted.hex()}"]
    sentences = []
    for name in ours | theirs:
        found, pinned = (show_scalar(fields[name]) if name in fields else "no such claim" for fields in (theirs, ours))
        if found != pinned:
            sentences.append(f"claim {name!a}: got {found}, wanted {pinned}")
    return sentences or ["claims: got the same fields in another order, wanted them exactly as pinned"]
