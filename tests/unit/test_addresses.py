"""Places files: read strictly, again for each link, and nothing else is believed of them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.errors import UsageError
from minigpt.protocol import addresses
from minigpt.protocol.addresses import Addresses

TWO = ["tcp://127.0.0.1:5001", "vsock://16:5002"]


def test_what_is_written_is_read() -> None:
    assert json.loads(addresses.write(TWO, 2)) == {"0": TWO[0], "1": TWO[1]}
    assert addresses.read(addresses.write(TWO, 2), 2) == TWO


def test_a_places_file_lies_beside_its_manifest() -> None:
    assert addresses.beside(Path("some/pipeline.json")) == "some/pipeline.places.json"
    assert addresses.beside("manifest") == "manifest.places.json"


def test_the_longest_places_fit() -> None:
    longest = f"tcp://{'.'.join(['a' * 63] * 3)}.{'b' * 61}:65535"
    assert addresses.read(addresses.write([longest] * 256, 256), 256) == [longest] * 256


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "places: got an empty file, wanted a places file"),
        (b"[]", "places: got list, wanted an object with the address of each stage"),
        (b'{"0": "tcp://a:1"}', "places: the address of stage 1 is missing, wanted one for each stage, 0"),
        (b'{"0": "tcp://a:1", "1": "tcp://a:2", "2": "tcp://a:3"}', "got stage '2', wanted the manifest's stages, 0"),
        (b'{"0": "tcp://a:1", "01": "tcp://a:2"}', "got stage '01'"),
        (b'{"0": "tcp://a:1", "0": "tcp://a:2", "1": "tcp://a:1"}', "a key appears twice"),
        (b'{"0": "tcp://a:1", "1": 5001}', "places.1: got 5001, wanted a string"),
        (b'{"0": "tcp://a:1", "1": "http://a:1"}', "stage 1: address 'http://a:1': wanted tcp://"),
        (b'{"0": "tcp://a:1", "1": "tcp://a:65536"}', "stage 1: address 'tcp://a:65536'"),
        (b'{"0": "tcp://a:0", "1": "tcp://a:1"}', "stage 0: address 'tcp://a:0': got port 0"),
        (b'{"0": "tcp://a:1", "1": "tcp://a:1"}' + b" " * 2**17, "more than 131072 bytes"),
    ],
)  # fmt: skip
def test_a_bad_one_is_refused_with_the_place(data: bytes, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        addresses.read(data, 2)
    assert told in str(caught.value)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        addresses.read(data, 2)


def test_addresses_and_stages_must_be_as_many() -> None:
    with pytest.raises(UsageError, match="got 1 address for 2 stages: give --address once for each"):
        addresses.write(TWO[:1], 2)


def test_the_file_is_read_again_each_time(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.places.json"
    path.write_bytes(addresses.write(TWO, 2))
    where = Addresses(2, path)
    assert str(where.of(1)) == TWO[1]
    path.write_bytes(addresses.write(["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"], 2))
    assert str(where.of(1)) == "tcp://127.0.0.1:2"
    path.unlink()
    with pytest.raises(UsageError, match="No such file or directory; wanted the file that `minigpt plan` wrote"):
        where.of(1)
    assert where.shown(1) is None


def test_one_place_can_be_overridden_and_needs_no_file(tmp_path: Path) -> None:
    where = Addresses(2, tmp_path / "missing", {0: "tcp://127.0.0.1:9000"})
    assert str(where.of(0)) == "tcp://127.0.0.1:9000"
    assert (where.shown(0), where.shown(1)) == ("tcp://127.0.0.1:9000", None)
    with pytest.raises(UsageError, match=r"stage 1 is not known: give the places file with --places \(places="):
        Addresses(2, None, {0: "tcp://127.0.0.1:9000"}).of(1)


@pytest.mark.parametrize(
    ("over", "told"),
    [({2: TWO[0]}, "got stage 2, wanted one of the manifest's, 0 to 1"), ({-1: TWO[0]}, "got stage -1"),
     ({0: "nowhere"}, "place 0: address 'nowhere'"), ({0: "tcp://a:0"}, "got port 0")],
)  # fmt: skip
def test_a_bad_override_is_refused(over: dict[int, str], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Addresses(2, None, over)
    assert told in str(caught.value)
