"""The manifest: a good one is read, a bad one is refused with the place and the reason."""

import copy
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import SMALL

from attest import AttestationError
from attest.providers.mock import MockPins, MockRoot, MockVerifier
from attest.providers.nitro import NitroPins, NitroVerifier
from attest.providers.snp import SnpPins, SnpVerifier
from attest.providers.tdx import TdxPins, TdxVerifier
from minigpt.client.pipeline import Pipeline, _tokenizer, check
from minigpt.errors import CheckpointError, ManifestError, UsageError
from minigpt.launch.plan import split_layers, write
from minigpt.protocol import manifest
from minigpt.protocol.manifest import Manifest

ROOT = MockRoot(bytes(range(32)))
ISSUED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def written(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "config": SMALL,
        "model": "small",
        "revision": None,
        "tokenizer_sha256": b"\x07" * 32,
        "layers": [range(3), range(3, 4)],
        "weights_sha256": [b"\x01" * 32, b"\x02" * 32],
        "pins": [MockPins(ROOT.public, frozenset([b"\x03" * 48]))],
        "now": ISSUED,
    }
    return write(**fields | changes)


GOOD = json.loads(written())


def edited(*path: str | int, to: object) -> bytes:
    document = copy.deepcopy(GOOD)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return json.dumps(document).encode()


def test_what_is_written_is_read() -> None:
    data = written(clients=[b"\x09" * 32], revision="0123abc")
    read = Manifest.parse(data)
    assert read.digest == hashlib.sha256(data).digest()
    assert (read.config, read.model, read.revision, read.tokenizer_sha256) == (SMALL, "small", "0123abc", b"\x07" * 32)
    assert (read.issued, read.expires - read.issued) == (ISSUED, datetime.timedelta(days=30))
    assert [stage.layers for stage in read.stages] == [range(3), range(3, 4)]
    assert [stage.weights_sha256 for stage in read.stages] == [b"\x01" * 32, b"\x02" * 32]
    assert read.stages[1].pins.measurements == {b"\x03" * 48}
    assert read.clients == frozenset([b"\x09" * 32])
    assert Manifest.parse(written()).clients is None


def test_nobody_is_an_operator_unless_listed_and_operators_are_admitted() -> None:
    key, operator = b"\x09" * 32, b"\x0a" * 32
    assert Manifest.parse(written()).operators == frozenset()
    listed = Manifest.parse(written(clients=[key], operators=[operator]))
    assert listed.clients == frozenset([key, operator])
    assert [listed.operates(one) for one in (key, operator)] == [False, True]
    open_to_all = Manifest.parse(written(operators=[operator]))
    assert open_to_all.clients is None
    assert [open_to_all.operates(one) for one in (key, operator)] == [False, True]
    own = Manifest.parse(written(clients=[key], operators=None))
    assert own.clients == frozenset([key])
    assert own.operates(key)


PCRS = [{i: bytes([16 * stage + i + 1]) * 48 for i in range(3)} for stage in range(2)]
NITRO = {"provider": "nitro", "covers": "image", "pcr0": "01" * 48, "pcr1": "02" * 48, "pcr2": "03" * 48}


TDX = {
    "provider": "tdx", "covers": "image", "mrtd": "01" * 48, **{f"rtmr{i}": f"1{i}" * 48 for i in range(4)},
    "td_attributes": "0000001000000000", "xfam": "e702060000000000", "min_tcb_evaluation": 17,
}  # fmt: skip


def test_images_are_pinned_one_by_one_beside_the_mock_too() -> None:
    read = Manifest.parse(written(pins=list(map(NitroPins, PCRS))))
    assert [stage.pins.pcrs for stage in read.stages] == PCRS
    assert not read.simulated
    check(read, allow_mock=False, now=ISSUED.timestamp())
    mixed = Manifest.parse(edited("stages", 1, "evidence", to=NITRO | {"pcr16": "00" * 48}))
    assert [stage.platform.name for stage in mixed.stages] == ["mock", "nitro"]
    assert [type(mixed.verifier(index)) for index in range(2)] == [MockVerifier, NitroVerifier]
    assert mixed.simulated
    with pytest.raises(ManifestError, match="allow_mock"):
        check(mixed, allow_mock=False, now=ISSUED.timestamp())


SNP: dict[str, Any] = {
    "provider": "snp", "covers": "image", "product": "Milan", "measurements": ["07" * 48], "policy": 0x30000,
    "min_tcb": {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 217},
}  # fmt: skip


def test_all_platforms_may_be_mixed() -> None:
    read = Manifest.parse(written(pins=[SnpPins(SNP), NitroPins(PCRS[0])]))
    assert [stage.platform.name for stage in read.stages] == ["snp", "nitro"]
    assert [type(read.verifier(index)) for index in range(2)] == [SnpVerifier, NitroVerifier]
    assert not read.simulated
    check(read, allow_mock=False, now=ISSUED.timestamp())
    mixed = Manifest.parse(edited("stages", 0, "evidence", to=SNP | {"vmpl": 0, "chip_ids": ["11" * 64]}))
    assert [stage.platform.name for stage in mixed.stages] == ["snp", "mock"]
    assert mixed.stages[0].pins.to_json() == SNP | {"vmpl": 0, "chip_ids": ["11" * 64]}
    with pytest.raises(ManifestError, match="allow_mock"):
        check(mixed, allow_mock=False, now=ISSUED.timestamp())


def test_platforms_mix() -> None:
    mixed = Manifest.parse(written(pins=[NitroPins(PCRS[0]), TdxPins(TDX)]))
    assert [stage.platform.name for stage in mixed.stages] == ["nitro", "tdx"]
    assert [type(mixed.verifier(index)) for index in range(2)] == [NitroVerifier, TdxVerifier]
    assert mixed.stages[1].pins.to_json() == TDX
    with pytest.raises(AttestationError, match="is this a TDX guest"):
        mixed.attester(1, b"")
    assert not mixed.simulated
    beside = Manifest.parse(edited("stages", 0, "evidence", to=TDX | {"rtmr1": "00" * 48, "statuses": ["OutOfDate"]}))
    assert [type(beside.verifier(index)) for index in range(2)] == [TdxVerifier, MockVerifier]
    assert beside.simulated
    with pytest.raises(ManifestError, match="at most 30 days"):
        written(pins=[TdxPins(TDX)], days=31)


def test_a_manifest_that_pins_a_platform_lives_at_most_30_days() -> None:
    written(pins=[NitroPins(PCRS[0])], days=30)
    written(days=31)
    simulated = MockPins(ROOT.public, frozenset([b"\x03" * 48]))
    for pins in ([NitroPins(PCRS[0])], [simulated, NitroPins(PCRS[0])], [SnpPins(SNP), simulated]):
        with pytest.raises(ManifestError, match="at most 30 days"):
            written(pins=pins, days=31)


def test_a_root_in_place_of_the_vendors_is_believed_alone_and_only_if_allowed() -> None:
    read = Manifest.parse(edited("stages", 1, "evidence", to=NITRO | {"test_root": "77" * 32}))
    assert [stage.test_root for stage in read.stages] == [None, b"\x77" * 32]
    verifier = read.verifier(1)
    assert isinstance(verifier, NitroVerifier)
    assert verifier.roots == {b"\x77" * 32}
    now = ISSUED.timestamp()
    check(read, allow_mock=True, allow_test_root=True, now=now)
    with pytest.raises(ManifestError, match=r"stage 1 is believed under a test's root, 77.* without --allow-test-root"):
        check(read, allow_mock=True, now=now)
    assert read.warnings(now) == [
        f"stage 1 is believed under a test's root, {'77' * 32}, which proves nothing about hardware"
    ]
    for wrong in ("00" * 32, "77" * 31, "77" * 48, None, ["77" * 32]):
        with pytest.raises(ManifestError, match=r"evidence.test_root: got"):
            Manifest.parse(edited("stages", 1, "evidence", to=NITRO | {"test_root": wrong}))
    with pytest.raises(ManifestError, match="unknown field 'test_root'"):  # the mock's root is its root_key
        Manifest.parse(edited("stages", 0, "evidence", "test_root", to="77" * 32))


def test_whoever_starts_is_warned_below_three_days() -> None:
    read = Manifest.parse(written())
    expires = read.expires.timestamp()
    assert read.warnings(expires - 3.1 * 86_400) == []
    assert read.warnings(expires - 2.5 * 86_400) == ["the manifest expires in 2.5 days: put a new one in its place"]


HEX = "ab" * 32
BAD: dict[str, tuple[tuple[Any, ...], object]] = {
    "format": (("format",), "minigpt-pipeline-1"),
    "issued": (("issued",), "yesterday"),
    "expires": (("expires",), "2026-01-01T00:00:00Z"),
    "model.id": (("model", "id"), ""),
    "model.revision": (("model", "revision"), 7),
    "model.tokenizer_sha256": (("model", "tokenizer_sha256"), "ab"),
    "model.config": (("model", "config"), []),
    "model.config: cut": (("model", "config"), {"model_type": "gpt2"}),
    "model.config: llama": (("model", "config", "model_type"), "llama"),
    "model.config: bool": (("model", "config", "n_layer"), True),
    "model.config: more": (("model", "config", "add_cross_attention"), True),
    "messages: another schema": (("messages",), 1),
    "messages: no number": (("messages",), "2"),
    "suites: empty": (("suites",), []),
    "suites: unknown": (("suites",), [9]),
    "suites: twice": (("suites",), [1, 1]),
    "clients": (("clients",), "all"),
    "clients: none": (("clients",), []),
    "clients[0]": (("clients",), [HEX[:-2]]),
    "operators": (("operators",), None),
    "operators: too many": (("operators",), [HEX] * 65),
    "operators[0]": (("operators",), ["00" * 32]),
    "stages": (("stages",), []),
    "stages: gap": (("stages", 1, "layers"), [2, 4]),
    "stages[1].layers: short": (("stages", 1, "layers"), [3]),
    "stages[1].layers: empty": (("stages", 1, "layers"), [3, 3]),
    "stages: end": (("stages", 1, "layers"), [3, 5]),
    "stages[1]: contains addresses": (("stages", 1, "address"), "tcp://127.0.0.1:5001"),
    "stages[0].weights_sha256": (("stages", 0, "weights_sha256"), HEX.upper()),
    "stages[0].weights_sha256: zero": (("stages", 0, "weights_sha256"), "00" * 32),
    "stages[0].evidence.provider: none": (("stages", 0, "evidence", "provider"), "none"),
    "stages[0].evidence: nitro": (("stages", 0, "evidence", "provider"), "nitro"),
    "stages[0].evidence.pcr1: zero": (("stages", 0, "evidence"), NITRO | {"pcr1": "00" * 48}),
    "stages[0].evidence.pcr0: short": (("stages", 0, "evidence"), NITRO | {"pcr0": "01" * 32}),
    "stages[0].evidence.pcr3: null": (("stages", 0, "evidence"), NITRO | {"pcr3": None}),
    "stages[0].evidence.covers": (("stages", 0, "evidence"), NITRO | {"covers": "initdata"}),
    "stages[0].evidence: covers": (("stages", 0, "evidence"), {k: v for k, v in NITRO.items() if k != "covers"}),
    "stages[0].evidence: both": (("stages", 0, "evidence"), NITRO | {"root_key": HEX}),
    "stages[0].evidence: pcr2": (("stages", 0, "evidence"), {k: v for k, v in NITRO.items() if k != "pcr2"}),
    "stages[0].evidence: snp": (("stages", 0, "evidence", "provider"), "snp"),
    "stages[0].evidence.min_tcb": (("stages", 0, "evidence"), SNP | {"min_tcb": {"snp": 24}}),
    "stages[0].evidence.policy: debug": (("stages", 0, "evidence"), SNP | {"policy": 0xB0000}),
    "stages[0].evidence.measurements: zero": (("stages", 0, "evidence"), SNP | {"measurements": ["00" * 48]}),
    "stages[0].evidence: snp and nitro": (("stages", 0, "evidence"), SNP | {"pcr0": "01" * 48}),
    "stages[0].evidence.mrtd": (("stages", 0, "evidence"), TDX | {"mrtd": "00" * 48}),
    "stages[0].evidence: rtmr1": (("stages", 0, "evidence"), {k: v for k, v in TDX.items() if k != "rtmr1"}),
    "stages[0].evidence: evaluation": (("stages", 0, "evidence"), {k: TDX[k] for k in list(TDX)[:-1]}),
    "stages[0].evidence: mrconfigid": (("stages", 0, "evidence"), TDX | {"covers": "initdata"}),
    "stages[0].evidence.td_attributes": (("stages", 0, "evidence"), TDX | {"td_attributes": "01" + "00" * 7}),
    "stages[0].evidence.statuses": (("stages", 0, "evidence"), TDX | {"statuses": ["Revoked"]}),
    "stages[0].evidence: collateral": (("stages", 0, "evidence"), TDX | {"allow_no_collateral": True}),
    "stages[0].evidence.root_key": (("stages", 0, "evidence", "root_key"), "00" * 32),
    "stages[0].evidence: small order": (("stages", 0, "evidence", "root_key"), "01" + "00" * 31),
    "stages[0].evidence.measurements: none": (("stages", 0, "evidence", "measurements"), []),
    "stages[0].evidence.measurements[0]": (("stages", 0, "evidence", "measurements"), ["00" * 48]),
    "stages[0].evidence: more": (("stages", 0, "evidence", "allow_debug"), True),
    "more": (("more",), 1),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_one_is_refused_with_the_place(name: str) -> None:
    path, value = BAD[name]
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(edited(*path, to=value))
    assert str(caught.value).startswith(f"manifest.{name.split(':', maxsplit=1)[0]}".removesuffix(".more")) or name in (
        "expires",
        "more",
    )


def test_one_with_addresses_is_refused_with_the_command_for_a_new_one() -> None:
    for data in (edited("format", to="minigpt-pipeline-2"), edited("stages", 0, "address", to="tcp://127.0.0.1:5001")):
        with pytest.raises(ManifestError, match=r"contains addresses, .* minigpt plan -o pipeline.json --address"):
            Manifest.parse(data)


def paths(value: object, here: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [here] if here else []
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths(inner, (*here, key))
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(paths(GOOD)), JSON)
def test_any_value_at_any_place_is_read_or_refused(path: tuple[str | int, ...], value: object) -> None:
    data = edited(*path, to=value)
    try:
        Manifest.parse(data)
    except ManifestError:
        return


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(data)


@pytest.mark.parametrize("path", [path for path in paths(GOOD) if isinstance(path[-1], str)], ids=str)
def test_nothing_may_be_missing(path: tuple[str | int, ...]) -> None:
    document = copy.deepcopy(GOOD)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ManifestError):
        Manifest.parse(json.dumps(document).encode())


@pytest.mark.parametrize(
    "data",
    [
        written().replace(b'"format"', b'"format": "minigpt-pipeline-2", "format"', 1),
        written().replace(b'"suites": [', b'"suites": [NaN, ', 1),
        b"[" * 100_000,
        b'"' + b"a" * manifest.MAX_MANIFEST + b'"',
        b"\xff" + written(),
        b"1" * 10_000,
    ],
    ids=["a key twice", "NaN", "deep", "long", "not UTF-8", "a long number"],
)
def test_what_is_not_plain_json_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(data)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (written().replace(b"\n", b"\r\n"), "lines that end in CR LF, wanted LF, .* copy the file again"),
        (b"\xef\xbb\xbf" + written(), "begins with a byte-order mark, wanted UTF-8 without one"),
        (written().decode().encode("utf-16"), "begins with a byte-order mark, wanted UTF-8 without one"),
    ],
)
def test_what_an_editor_did_to_one_is_named(data: bytes, found: str) -> None:
    with pytest.raises(ManifestError, match=found):
        Manifest.parse(data)


def test_its_digest_may_be_a_line_of_sha256sums() -> None:
    data = written(now=None)
    digest = hashlib.sha256(data).hexdigest()
    for good in (digest, digest.upper(), f"{digest}  pipeline.json\n", f"{digest} *pipeline.json"):
        with pytest.raises(ManifestError, match="mock evidence"):  # the next thing that is checked
            Pipeline.connect(data, text=False, manifest_sha256=good)
    for bad in (digest[:-1], f"{digest}0", "pipeline.json", ""):
        with pytest.raises(UsageError, match="wanted 64 hex digits, or a line that sha256sum prints"):
            Pipeline.connect(data, text=False, manifest_sha256=bad)
    with pytest.raises(ManifestError, match=f"sha256 is {digest}, wanted {'0' * 64}"):
        Pipeline.connect(data, text=False, manifest_sha256=f"{'0' * 64}  pipeline.json")


def test_an_expired_one_is_refused_and_a_clock_behind_its_issue_counts_as_its_issue() -> None:
    read = Manifest.parse(written())
    read.check_time(ISSUED.timestamp() - 1e6)
    read.check_time(read.expires.timestamp() - 1)
    with pytest.raises(ManifestError, match="expired"):
        read.check_time(read.expires.timestamp())


def test_claims_are_canonical_and_hold_what_the_manifest_says() -> None:
    read = Manifest.parse(written())
    assert msgpack.unpackb(read.claims(1)) == {
        "end": 4, "first": 3, "manifest": read.digest, "stage": 1, "weights": b"\x02" * 32,
    }  # fmt: skip
    assert read.claims(0) != read.claims(1)
    assert read.claims(0) != Manifest.parse(written(model="other")).claims(0)


@given(st.integers(1, 48), st.data())
def test_a_split_covers_every_layer_once(n_layer: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, n_layer))
    parts = split_layers(n_layer, stages)
    assert [layer for part in parts for layer in part] == list(range(n_layer))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert split_layers(n_layer, "+".join(str(len(part)) for part in parts)) == parts


@pytest.mark.parametrize("split", ["", "6", "6+", "6+5", "6+7", "0+12", "-1+13", "a+b", "6 + 6", "²+10", 0, 13, -1])
def test_a_split_that_is_none_is_refused(split: str | int) -> None:
    with pytest.raises(UsageError):
        split_layers(12, split)


def test_a_damaged_tokenizer_of_the_manifests_model_is_not_the_same_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = written(now=None)
    assert _tokenizer(Manifest.parse(data), None) is None
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"small/tokenizer\.json"):
        Pipeline.connect(data, allow_mock=True)
