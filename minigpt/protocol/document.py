"""A JSON document whose every refusal says where: `manifest.stages[1].layers: got 7, wanted a list of 1 to 2`."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from minigpt.errors import ManifestError


def load(name: str, data: bytes, limit: int) -> Place:
    """The whole of a document of at most `limit` bytes. Raises ManifestError, and nothing else."""
    if len(data) > limit:
        raise ManifestError(f"{name}: {len(data)} bytes, wanted at most {limit}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ManifestError(f"{name}: nested too deeply") from None
    except ValueError as error:  # JSON's and UTF-8's errors, and ours from the hooks
        raise ManifestError(f"{name}: not JSON: {error}") from None
    return Place(name, value)


@dataclass(frozen=True)
class Place:
    """A value in the document, and the way to it for messages."""

    name: str
    value: Any

    def refuse(self, wanted: str) -> NoReturn:
        got = repr(self.value)[:100] if not isinstance(self.value, dict | list) else type(self.value).__name__
        raise ManifestError(f"{self.name}: got {got}, wanted {wanted}")

    def get(self, key: str) -> Place:
        if type(self.value) is not dict:
            self.refuse("an object")
        if key not in self.value:
            raise ManifestError(f"{self.name}: {key} is missing")
        return Place(f"{self.name}.{key}", self.value[key])

    def only(self, *keys: str) -> None:
        unknown = [key for key in self.value if key not in keys]
        if unknown:
            raise ManifestError(f"{self.name}: got an unknown field {unknown[0][:60]!r}, wanted {', '.join(keys)}")

    def items(self, limit: int) -> list[Place]:
        if type(self.value) is not list or not 1 <= len(self.value) <= limit:
            self.refuse(f"a list of 1 to {limit}")
        return [Place(f"{self.name}[{i}]", item) for i, item in enumerate(self.value)]

    def integer(self, low: int, high: int) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            self.refuse(f"an integer from {low} to {high}")
        return int(self.value)

    def text(self, limit: int) -> str:
        if type(self.value) is not str or not 1 <= len(self.value) <= limit:
            self.refuse(f"a string of 1 to {limit} characters")
        return str(self.value)

    def bytes(self, length: int) -> bytes:
        text = self.value
        if type(text) is not str or len(text) != 2 * length or set(text) - set("0123456789abcdef"):
            self.refuse(f"{2 * length} lower-case hex digits")
        if text == "0" * (2 * length):
            self.refuse("something else than zeros, which pin nothing")
        return bytes.fromhex(text)

    def time(self) -> datetime.datetime:
        try:
            return datetime.datetime.strptime(self.text(20), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)
        except ValueError:
            self.refuse("a time in UTC, as 2026-01-31T12:00:00Z")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key appears twice in one object")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
