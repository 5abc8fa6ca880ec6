"""The manifest: one JSON file that says what a pipeline is, and whom its ends trust.

The SHA-256 of its exact bytes is mixed into every handshake, so two ends with different manifests cannot talk. For
each stage it pins the layers, the address, the weights' digest, and the evidence that is acceptable. It comes to a
client by a way that the client trusts; a stage need not trust whoever hands it over, because the stage's own evidence
says which manifest it runs.

`data/manifest.schema.json` describes the format; `Manifest.parse` is what decides.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attest import Provider, Verifier
from attest.mock import MockVerifier
from attest.policy import Policy
from minigpt.engine.config import Config
from minigpt.errors import ConfigError, ManifestError, UsageError
from minigpt.protocol import document
from minigpt.protocol.document import Place
from transport import codec
from transport.address import Address
from transport.errors import AddressError

FORMAT = "minigpt-pipeline-1"
MAX_MANIFEST = 2**20  # bytes; one of 256 stages is about 150 KB
MAX_STAGES = 256
MAX_PINS = 64  # measurements or clients in one list
SUITES = (1, 2)  # of the link protocol, that this code speaks; 2 is 1 with forward secrecy against quantum computers


@dataclass(frozen=True)
class StageEntry:
    """What the manifest says of one stage."""

    index: int
    layers: range
    address: Address
    weights_sha256: bytes
    provider: Provider
    root_key: bytes = b""  # 32 bytes; the mock's Ed25519 root
    measurements: frozenset[bytes] = frozenset()  # mock: 48 bytes each; any of them is acceptable
    pcrs: tuple[bytes, ...] = ()  # nitro: PCR0, PCR1 and PCR2 of the stage's image, 48 bytes each


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest. `digest` is the SHA-256 of the bytes it was parsed from."""

    digest: bytes
    issued: datetime.datetime
    expires: datetime.datetime
    model: str
    revision: str | None
    tokenizer_sha256: bytes | None
    config: Config
    suites: tuple[int, ...]
    clients: frozenset[bytes] | None  # static keys of the clients admitted; None admits anyone
    stages: tuple[StageEntry, ...]

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Reads a manifest. Raises ManifestError, and nothing else, with the place and the reason."""
        top = document.load("manifest", data, MAX_MANIFEST)
        if top.get("format").value != FORMAT:
            top.get("format").refuse(f'"{FORMAT}"')
        model = top.get("model")
        config = _config(model.get("config"))
        tokenizer = model.get("tokenizer_sha256")
        revision = model.get("revision")
        model.only("id", "revision", "tokenizer_sha256", "config")
        suites = top.get("suites").items(len(SUITES))
        clients = top.get("clients")
        manifest = cls(
            digest=hashlib.sha256(data).digest(),
            issued=top.get("issued").time(),
            expires=top.get("expires").time(),
            model=model.get("id").text(256),
            revision=None if revision.value is None else revision.text(256),
            tokenizer_sha256=None if tokenizer.value is None else tokenizer.bytes(32),
            config=config,
            suites=tuple(suite.integer(1, 255) for suite in suites),
            clients=None
            if clients.value == "any"
            else frozenset(client.bytes(32) for client in clients.items(MAX_PINS)),
            stages=tuple(_stage(i, place) for i, place in enumerate(top.get("stages").items(MAX_STAGES))),
        )
        top.only("format", "issued", "expires", "model", "suites", "clients", "stages")
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.expires <= self.issued:
            raise ManifestError(
                f"manifest: expires {_time(self.expires)}, wanted later than issued {_time(self.issued)}"
            )
        unknown = set(self.suites) - set(SUITES)
        if unknown or len(set(self.suites)) != len(self.suites):
            raise ManifestError(f"manifest.suites: got {list(self.suites)}, wanted some of {list(SUITES)}, each once")
        begin = 0
        for stage in self.stages:
            if stage.layers.start != begin:
                raise ManifestError(
                    f"manifest.stages[{stage.index}].layers: begin at {stage.layers.start}, wanted {begin}: "
                    "the ranges must be contiguous"
                )
            begin = stage.layers.stop
        if begin != self.config.n_layer:
            raise ManifestError(
                f"manifest.stages: the ranges end at {begin}, but the model has {self.config.n_layer} layers"
            )

        for stage in self.stages:
            try:
                if stage.provider is Provider.MOCK:
                    self.verifier(stage.index)
            except ValueError as error:
                raise ManifestError(f"manifest.stages[{stage.index}].evidence: {error}") from None

    def check_time(self, now: float) -> None:
        """Raises ManifestError if the manifest has expired at `now`, in seconds since 1970. A clock behind `issued` is
        taken to stand at `issued`."""
        if now >= self.expires.timestamp():
            raise ManifestError(f"the manifest expired on {_time(self.expires)}: ask its issuer for a new one")

    def check_verifiable(self) -> None:
        """Raises ManifestError if some stage's evidence is of a kind that this version can pin, but not verify."""
        for stage in self.stages:
            if stage.provider is not Provider.MOCK:
                raise ManifestError(
                    f"stage {stage.index}: the manifest wants evidence of {stage.provider.name.lower()}, which this "
                    "version cannot verify yet, and without it nobody knows what runs there: refused"
                )

    def claims(self, index: int) -> bytes:
        """What stage `index` must claim about itself: canonical msgpack of a map with fixed keys."""
        stage = self.stages[index]
        return codec.encode(
            {
                "end": stage.layers.stop,
                "first": stage.layers.start,
                "manifest": self.digest,
                "stage": index,
                "weights": stage.weights_sha256,
            }
        )

    def verifier(self, index: int) -> Verifier:
        """Judges the evidence of stage `index`. Raises ManifestError as `check_verifiable`."""
        self.check_verifiable()
        stage = self.stages[index]
        policy = Policy(stage.provider, stage.measurements, self.claims(index), index)
        return MockVerifier(stage.root_key, policy, clock=lambda: max(time.time(), self.issued.timestamp()))


def write(
    *,
    config: Config,
    model: str,
    revision: str | None,
    tokenizer_sha256: bytes | None,
    layers: list[range],
    weights_sha256: list[bytes],
    addresses: list[str],
    root_key: bytes = b"",
    measurements: Sequence[bytes] = (),
    pcrs: Sequence[Sequence[bytes]] = (),
    suites: Sequence[int] = (2,),
    clients: list[bytes] | None = None,
    days: float = 30.0,
    now: datetime.datetime | None = None,
) -> bytes:
    """The bytes of a manifest, checked by parsing them. Raises ManifestError.

    Args:
        root_key, measurements: of the mock, for every stage alike.
        pcrs: PCR0, PCR1 and PCR2 of each stage's image, for Nitro; then there is no mock.
        clients: static keys; None admits anyone.
    """
    issued = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    mock: dict[str, Any] = {
        "provider": "mock",
        "root_key": root_key.hex(),
        "measurements": sorted(measurement.hex() for measurement in measurements),
    }
    nitro: list[dict[str, Any]] = [
        {"provider": "nitro"} | {f"pcr{i}": pcr.hex() for i, pcr in enumerate(image)} for image in pcrs
    ]
    fields = {
        "format": FORMAT,
        "issued": _time(issued),
        "expires": _time(issued + datetime.timedelta(days=days)),
        "model": {
            "id": model,
            "revision": revision,
            "tokenizer_sha256": tokenizer_sha256.hex() if tokenizer_sha256 else None,
            "config": config.to_json(),
        },
        "suites": list(suites),
        "clients": "any" if clients is None else sorted(client.hex() for client in clients),
        "stages": [
            {
                "layers": [part.start, part.stop],
                "address": address,
                "weights_sha256": digest.hex(),
                "evidence": evidence,
            }
            for part, address, digest, evidence in zip(
                layers, addresses, weights_sha256, nitro or [mock] * len(layers), strict=True
            )
        ],
    }
    data = (json.dumps(fields, indent=2) + "\n").encode()
    Manifest.parse(data)
    return data


def read(path: str | Path) -> bytes:
    """The bytes of a manifest file. Raises UsageError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise UsageError(f"manifest {path}: {error.strerror}") from None


def split_layers(n_layer: int, split: str | int) -> list[range]:
    """Layer ranges for a split such as "6+6", or for a number of stages as equal as can be.

    >>> split_layers(12, "4+8")
    [range(0, 4), range(4, 12)]
    >>> split_layers(12, 5)
    [range(0, 3), range(3, 6), range(6, 8), range(8, 10), range(10, 12)]

    Raises:
        UsageError: the parts are no positive numbers, or do not add up to n_layer.
    """
    if isinstance(split, int):
        if not 1 <= split <= n_layer:
            raise UsageError(f"{split} stages for {n_layer} layers: wanted from 1 to {n_layer} stages")
        sizes = [n_layer // split + (i < n_layer % split) for i in range(split)]
    else:
        parts = split.split("+")
        if not all(part.isascii() and part.isdecimal() and len(part) < 7 and int(part) for part in parts):
            raise UsageError(f"split {split!r}: wanted numbers of layers joined by +, as 6+6")
        sizes = [int(part) for part in parts]
        if sum(sizes) != n_layer:
            raise UsageError(f"split {split}: {sum(sizes)} layers in all, but the model has {n_layer}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _config(place: Place) -> Config:
    if type(place.value) is not dict:
        place.refuse("an object")
    try:
        config = Config.from_json(place.value)
    except ConfigError as error:
        raise ManifestError(f"{place.name}: {error}") from None
    if config.to_json() != place.value:
        place.refuse(f"exactly the fields {', '.join(config.to_json())}")
    return config


def _stage(index: int, place: Place) -> StageEntry:
    layers = place.get("layers").items(2)
    if len(layers) != 2:
        place.get("layers").refuse("[first, end]")
    first = layers[0].integer(0, 2**16 - 1)
    try:
        address = Address.parse(place.get("address").text(300))
    except AddressError as error:
        raise ManifestError(f"{place.name}.address: {error}") from None
    entry = StageEntry(
        index=index,
        layers=range(first, layers[1].integer(first + 1, 2**16)),
        address=address,
        weights_sha256=place.get("weights_sha256").bytes(32),
        **_evidence(place.get("evidence")),
    )
    place.only("layers", "address", "weights_sha256", "evidence")
    return entry


def _evidence(place: Place) -> dict[str, Any]:
    """The fields of a StageEntry that say whose evidence is acceptable."""
    provider = place.get("provider")
    if provider.value == "nitro":
        names = ("pcr0", "pcr1", "pcr2")
        place.only("provider", *names)
        return {"provider": Provider.NITRO, "pcrs": tuple(place.get(name).bytes(48) for name in names)}
    if provider.value != "mock":
        provider.refuse('"mock" or "nitro"')
    place.only("provider", "root_key", "measurements")
    return {
        "provider": Provider.MOCK,
        "root_key": place.get("root_key").bytes(32),
        "measurements": frozenset(pin.bytes(48) for pin in place.get("measurements").items(MAX_PINS)),
    }


def _time(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
