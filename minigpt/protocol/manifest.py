"""The manifest: one JSON file that says what a pipeline is and whom its ends trust.

The SHA-256 of its exact bytes is part of every handshake, so two ends with different manifests cannot talk. For each
stage it pins the layers, the weights' digest and the acceptable evidence; where the stages are is in a file of its own
(`addresses`). A client must get it over a channel that it trusts. A stage need not trust whoever hands it over, because
the stage's own evidence says which manifest it runs.
"""

import datetime
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from attest import (
    AttestationResult,
    Attester,
    EvidenceError,
    Failure,
    PolicyError,
    Verifier,
    document,
    load_evidence,
)
from attest.certificates import Files
from attest.document import DocumentError, Place
from attest.providers import TEST_ROOT_WARNING, Check, Platform
from attest.registry import PLATFORMS
from minigpt.engine.config import Config
from minigpt.errors import ConfigError, ManifestError, UsageError
from minigpt.protocol.messages import SCHEMA
from transport import codec
from transport.link import mac_key

FORMAT = "minigpt-pipeline-3"
WITH_ADDRESSES = "minigpt-pipeline-2"  # the format before
MAX_MANIFEST = 2**20  # bytes; one of 256 stages is about 150 KB
MAX_STAGES = 256
MAX_PINS = 64  # measurements or clients in one list
MAX_LIFE = datetime.timedelta(days=30)  # of one that pins a platform
DAYS_LEFT = 3.0  # below which `warnings` has a word about it
SLOW_HANDSHAKE = 60.0  # seconds that one may take where a platform is asked: a TDX quote may take 30
SUITES = (1, 2)  # of the link protocol; 2 is 1 with forward secrecy against quantum computers

_MOVED = (
    "it contains addresses, which are now in a places file beside it; make both again: "
    "minigpt plan -o pipeline.json --address ADDR … (and the options of the first time)"
)


@dataclass(frozen=True)
class StageEntry:
    """What the manifest says about one stage."""

    index: int
    layers: range
    weights_sha256: bytes
    platform: Platform
    pins: Any  # which evidence is acceptable, as the platform reads it
    test_root: bytes | None = None  # SHA-256 of the root that is believed in place of the vendor's


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest.

    Attributes:
        digest: the SHA-256 of the bytes it was parsed from.
        mac_key: with it, whoever connects shows that he has these bytes; 32 bytes.
    """

    digest: bytes
    mac_key: bytes = field(repr=False)
    issued: datetime.datetime
    expires: datetime.datetime
    model: str
    revision: str | None
    tokenizer_sha256: bytes | None
    config: Config
    suites: tuple[int, ...]
    clients: frozenset[bytes] | None  # static keys of the clients admitted, operators included; None admits anyone
    operators: frozenset[bytes] | None  # those of clients who are told what all others cause; None for every client
    stages: tuple[StageEntry, ...]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a manifest. Raises ManifestError, and nothing else, with the place and the reason."""
        try:
            return cls._read(data)
        except DocumentError as error:
            raise ManifestError(str(error)) from None

    @classmethod
    def _read(cls, data: bytes) -> Self:
        if b"\r" in data:  # whoever compared digests would not find out why they differ
            raise ManifestError(
                "manifest: got lines that end in CR LF, wanted LF, as `minigpt plan` writes them: something changed "
                "them on the way, and the digest with them; copy the file again, as it is"
            )
        origin = "the file that `minigpt plan` or `up` wrote"
        document.check_kind("manifest", data, document.MANIFEST, origin)
        top = document.load("manifest", data, MAX_MANIFEST)
        if type(top.value) is dict and "format" not in top.value:
            raise ManifestError(f"manifest: format is missing, wanted {document.MANIFEST}, {origin}")
        if top.get("format").value == WITH_ADDRESSES:
            raise ManifestError(f"manifest: {_MOVED}")
        if top.get("format").value != FORMAT:
            top.get("format").refuse(f'"{FORMAT}"')
        model = top.get("model")
        config = _config(model.get("config"))
        tokenizer = model.get("tokenizer_sha256")
        revision = model.get("revision")
        model.only("id", "revision", "tokenizer_sha256", "config")
        spoken = top.get("messages").integer(1, 2**31 - 1)
        if spoken != SCHEMA:
            raise ManifestError(
                f"manifest.messages: got schema {spoken}, and this version of minigpt speaks schema {SCHEMA}: use the "
                "version that planned this pipeline, or plan again with this one"
            )
        suites = top.get("suites").items(1, len(SUITES))
        clients = _keys(top.get("clients"), 1)
        operators = _keys(top.get("operators"), 0)
        manifest = cls(
            digest=hashlib.sha256(data).digest(),
            mac_key=mac_key(data),
            issued=top.get("issued").time(),
            expires=top.get("expires").time(),
            model=model.get("id").text(256),
            revision=None if revision.value is None else revision.text(256),
            tokenizer_sha256=None if tokenizer.value is None else tokenizer.pin(32),
            config=config,
            suites=tuple(suite.integer(1, 255) for suite in suites),
            clients=None if clients is None else clients | (operators or frozenset()),
            operators=operators,
            stages=tuple(_stage(i, place) for i, place in enumerate(top.get("stages").items(1, MAX_STAGES))),
        )
        top.only("format", "messages", "issued", "expires", "model", "suites", "clients", "operators", "stages")
        manifest._check()
        return manifest

    def _check(self) -> None:
        if self.expires <= self.issued:
            raise ManifestError(
                f"manifest: expires {format_time(self.expires)}, wanted later than issued {format_time(self.issued)}"
            )
        if self.slow and self.expires - self.issued > MAX_LIFE:
            raise ManifestError(
                f"manifest: expires {format_time(self.expires)}, wanted at most {MAX_LIFE.days} days after it was "
                "issued: it pins a platform, whose clock its host can set back so far"
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

    def operates(self, key: bytes) -> bool:
        """Whether the client with this static key is told what the others cause."""
        return self.operators is None or key in self.operators

    def check_time(self, now: float) -> None:
        """Raises ManifestError if the manifest has expired at `now`, in seconds since 1970."""
        if now >= self.expires.timestamp():
            raise ManifestError(f"the manifest expired on {format_time(self.expires)}: ask its issuer for a new one")

    def check_switches(self, *, allow_mock: bool, allow_test_root: bool) -> None:
        """Raises ManifestError if it accepts evidence that proves nothing about hardware, and nobody has allowed it."""
        if self.simulated and not allow_mock:
            raise ManifestError(
                "the manifest accepts mock evidence, which proves nothing about hardware: "
                "refused without --allow-mock (allow_mock=True)"
            )
        for word in [] if allow_test_root else self._test_roots():
            raise ManifestError(f"the manifest: {word}: refused without --allow-test-root (allow_test_root=True)")

    def days_left(self, now: float) -> float:
        """Days from `now`, in seconds since 1970, until it expires."""
        return (self.expires.timestamp() - now) / 86_400

    def warnings(self, now: float) -> list[str]:
        """What whoever uses it should be told at each start."""
        days = self.days_left(now)
        rotate = [f"the manifest expires in {days:.1f} days: put a new one in its place"] if days < DAYS_LEFT else []
        return [*self._test_roots(), *rotate]

    def _test_roots(self) -> list[str]:
        return [
            TEST_ROOT_WARNING.format(stage=stage.index, root=stage.test_root.hex())
            for stage in self.stages
            if stage.test_root is not None
        ]

    @property
    def slow(self) -> bool:
        """Whether some handshake waits for a platform."""
        return not all(stage.platform.simulated for stage in self.stages)

    def claims(self, index: int) -> bytes:
        """What stage `index` must claim about itself: canonical msgpack, a map with these keys in this order."""
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

    @property
    def simulated(self) -> bool:
        """Whether some stage's evidence proves nothing about hardware."""
        return any(stage.platform.simulated for stage in self.stages)

    def attester(self, index: int, key: bytes, endorsements: Files | None = None) -> Attester:
        """Makes the evidence of stage `index`: the mock's with a key's file, SNP's and TDX's with files of
        endorsements.

        Raises EvidenceError if it is no such file, AttestationError if this machine is of another platform.
        """
        return self.stages[index].platform.attester(key, self.claims(index), endorsements)

    def verifier(self, index: int) -> Verifier:
        """Judges the evidence of stage `index`."""
        return self.verifier_at(index, lambda: max(time.time(), self.issued.timestamp()))

    def verifier_at(self, index: int, clock: Callable[[], float]) -> Verifier:
        """Judges it by another clock, in seconds since 1970."""
        stage = self.stages[index]
        return stage.platform.judge(stage.pins, stage.test_root, self.claims(index), index, clock)

    def judge(self, index: int, text: str) -> tuple[AttestationResult | None, Sequence[Failure]]:
        """What an evidence file establishes about stage `index`, or what failed: as of when it was made, if it says."""
        entry = self.stages[index]
        try:
            evidence, binding = load_evidence(text)
            made = entry.platform.describe(evidence).get("made")  # SNP's and TDX's do not say
            at = datetime.datetime.fromisoformat(made).timestamp() if made else time.time()  # ValueError after 9999
            return self.verifier_at(index, lambda: at).verify(evidence, binding), ()
        except (EvidenceError, PolicyError) as error:
            return None, error.failures
        except ValueError:
            return None, [("stale", "stale: got a time after the year 9999, wanted one of this calendar")]

    def endorsed_days(self, index: int, text: str) -> float | None:
        """Days until the first endorsement of an evidence file ends; 0 where we do not accept the file, or do not any
        more. None if it has no endorsements that somebody has to renew, or there is no file."""
        if self.stages[index].platform.simulated or not text:
            return None
        result, failures = self.judge(index, text)
        if failures or result is None:
            return 0.0
        return days_until(result.valid_until)

    def checks(self, index: int, failures: Sequence[Failure]) -> list[Check]:
        """All checks of the evidence of stage `index`, of which these failed."""
        stage = self.stages[index]
        return stage.platform.lines(stage.pins, failures)


def days_until(end: datetime.datetime | None) -> float | None:
    return None if end is None else (end.timestamp() - time.time()) / 86_400


def endorsement_warnings(index: int, end: datetime.datetime | None) -> list[str]:
    """What to tell of a stage whose first endorsement ends then."""
    days = days_until(end)
    if days is None or days >= DAYS_LEFT:
        return []
    return [f"endorsements of stage {index} end in {days:.1f} days: renew those in the folder of its --endorsements"]


def load(path: str | Path) -> tuple[bytes, Manifest]:
    """The bytes of a manifest file, and what they say. Raises UsageError if it cannot be read, and ManifestError."""
    try:
        data = document.read_file(path, MAX_MANIFEST)
    except OSError as error:
        wanted = "wanted the file that `minigpt plan` or `minigpt up` wrote"
        raise UsageError(f"manifest {path}: {error.strerror}; {wanted}") from None
    except ValueError:  # of a name with a zero in it
        raise UsageError(f"manifest {str(path)!r:.120}: not a file's name") from None
    try:
        return data, Manifest.parse(data)
    except ManifestError as error:
        raise ManifestError(f"{path}: {str(error).removeprefix('manifest: ')}") from None


def _keys(place: Place, least: int) -> frozenset[bytes] | None:
    """Clients' static keys; None for "any"."""
    return None if place.value == "any" else frozenset(key.pin(32) for key in place.items(least, MAX_PINS))


def _config(place: Place) -> Config:
    if type(place.value) is not dict:
        place.refuse("an object")
    try:
        config = Config.from_json(place.value)
    except ConfigError as error:
        raise ManifestError(f"{place.name}: {error}") from None
    wanted = config.to_json()
    if missing := [name for name in wanted if name not in place.value]:
        raise ManifestError(
            f"{place.name}: {', '.join(missing)} missing, wanted every field, as `minigpt plan` writes it"
        )
    place.only(*wanted)
    for name, value in wanted.items():
        if place.value[name] != value:
            place.get(name).refuse(f"{value!r}, as `minigpt plan` writes it")
    return config


def _stage(index: int, place: Place) -> StageEntry:
    layers = place.get("layers").items(1, 2)
    if len(layers) != 2:
        place.get("layers").refuse("[first, end]")
    first = layers[0].integer(0, 2**16 - 1)
    if "address" in place.value:
        raise ManifestError(f"{place.name}: {_MOVED}")
    evidence = place.get("evidence")
    provider = evidence.get("provider")
    platform = PLATFORMS.get(provider.value) if type(provider.value) is str else None
    if platform is None:
        provider.refuse(" or ".join(f'"{name}"' for name in PLATFORMS))
    pins, test_root = platform.read(evidence)
    entry = StageEntry(
        index=index,
        layers=range(first, layers[1].integer(first + 1, 2**16)),
        weights_sha256=place.get("weights_sha256").pin(32),
        platform=platform,
        pins=pins,
        test_root=test_root,
    )
    place.only("layers", "weights_sha256", "evidence")
    return entry


def format_time(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
