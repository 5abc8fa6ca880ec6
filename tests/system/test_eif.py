"""EIF images: as the format says, byte for byte, by a second computation; and any damage is noticed."""

import base64
import contextlib
import hashlib
import json
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.image import eif

METADATA = json.dumps({"ImageName": "small", "BuildMetadata": {"BuildTool": "a test"}}).encode()
SMALL = eif.Image(b"kernel" * 9, b"console=ttyS0", (b"boot" * 5, b"application" * 7), metadata=METADATA)


def cbor_text(text: bytes) -> bytes:
    return bytes([0x60 | len(text)]) + text


def signature_section(certificate: bytes, *, as_bytes: bool) -> bytes:
    """As the vendor's library writes it, whose byte vectors are arrays of integers; or as byte strings."""
    encoded = []
    for value in (base64_pem(certificate), b"\xd2\x84"):
        length = struct.pack(">H", len(value))
        integers = b"".join(bytes([octet]) if octet < 24 else bytes([24, octet]) for octet in value)
        encoded.append(b"\x59" + length + value if as_bytes else b"\x99" + length + integers)
    return b"\x81\xa2" + cbor_text(b"signing_certificate") + encoded[0] + cbor_text(b"signature") + encoded[1]


def base64_pem(certificate: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(certificate) + b"-----END CERTIFICATE-----\n"


CERTIFICATE = bytes(range(256)) * 2
SIGNED = replace(SMALL, signature=signature_section(CERTIFICATE, as_bytes=False), arm64=True, memory=2**31, cpus=4)


def by_hand(image: eif.Image) -> bytes:
    """An image's bytes, written from the format's description and not from the code."""
    parts = [(1, image.kernel), (2, image.cmdline)]
    parts += [(5, image.metadata)] if image.metadata is not None else []
    parts += [(3, ramdisk) for ramdisk in image.ramdisks]
    parts += [(4, image.signature)] if image.signature is not None else []
    body, offsets = b"", []
    for kind, data in parts:
        offsets.append(548 + len(body))
        body += kind.to_bytes(2, "big") + b"\0\0" + len(data).to_bytes(8, "big") + data
    header = b".eif" + (4).to_bytes(2, "big") + int(image.arm64).to_bytes(2, "big")
    header += image.memory.to_bytes(8, "big") + image.cpus.to_bytes(8, "big") + b"\0\0" + len(parts).to_bytes(2, "big")
    for column in (offsets, [len(data) for _, data in parts]):
        header += b"".join(value.to_bytes(8, "big") for value in column).ljust(256, b"\0")
    header += bytes(4)
    return header + zlib.crc32(header + body).to_bytes(4, "big") + body


def extended(stream: bytes) -> str:
    return hashlib.sha384(b"\0" * 48 + hashlib.sha384(stream).digest()).hexdigest()


@pytest.mark.parametrize("image", [SMALL, SIGNED, replace(SMALL, metadata=None, ramdisks=(b"one",))])
def test_what_is_written_is_what_the_format_says(image: eif.Image) -> None:
    assert eif.write(image) == by_hand(image)
    assert eif.read(eif.write(image)) == image


def test_registers_are_what_a_second_computation_says() -> None:
    found = {index: value.hex() for index, value in SIGNED.pcrs().items()}
    start = b"kernel" * 9 + b"console=ttyS0" + b"boot" * 5
    assert found == {
        0: extended(start + b"application" * 7),
        1: extended(start),
        2: extended(b"application" * 7),
        8: extended(CERTIFICATE),
    }
    assert 8 not in SMALL.pcrs()


def test_each_register_measures_its_own_parts_and_metadata_none() -> None:
    def changed(**parts: Any) -> set[int]:
        other = replace(SIGNED, **parts).pcrs()
        return {index for index, value in SIGNED.pcrs().items() if other[index] != value}

    assert changed(kernel=b"other") == {0, 1}
    assert changed(cmdline=b"other") == {0, 1}
    assert changed(ramdisks=(b"other", SIGNED.ramdisks[1])) == {0, 1}
    assert changed(ramdisks=(SIGNED.ramdisks[0], b"other")) == {0, 2}
    assert changed(signature=signature_section(b"other", as_bytes=True)) == {8}
    assert changed(metadata=b"{}", memory=1, cpus=1, arm64=False) == set()


@pytest.mark.parametrize("image", [SMALL, SIGNED], ids=["plain", "signed"])
def test_a_change_of_any_byte_is_noticed(image: eif.Image) -> None:
    data = bytearray(eif.write(image))
    for position in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            data[position] ^= change
            with pytest.raises(eif.EifError):
                eif.read(bytes(data))
            data[position] ^= change
    assert eif.read(bytes(data)) == image


def test_every_cut_and_every_addition_is_noticed() -> None:
    data = eif.write(SMALL)
    for cut in [data[:length] for length in range(len(data))] + [data + b"\0"]:
        with pytest.raises(eif.EifError):
            eif.read(cut)


def sealed(sections: list[tuple[int, bytes]]) -> bytes:
    """Sections in any order, with a right header: what only the order makes unsound."""
    offsets, sizes, body = [0] * 32, [0] * 32, b""
    for i, (kind, data) in enumerate(sections):
        offsets[i], sizes[i] = 548 + len(body), len(data)
        body += struct.pack(">HHQ", kind, 0, len(data)) + data
    header = struct.pack(">4sHHQQHH32Q32QI", b".eif", 4, 0, 2**30, 2, 0, len(sections), *offsets, *sizes, 0)
    return header + struct.pack(">I", zlib.crc32(header + body)) + body


@pytest.mark.parametrize(
    "kinds",
    [[], [1, 2], [1, 3], [2, 1, 3], [1, 2, 3, 5], [1, 2, 5, 5, 3], [1, 2, 4, 3], [1, 1, 2, 3], [1, 2, 3, 6]],
)  # fmt: skip
def test_sections_in_another_order_or_number_are_refused(kinds: list[int]) -> None:
    with pytest.raises(eif.EifError):
        eif.read(sealed([(kind, b"data") for kind in kinds]))
    assert eif.read(sealed([(1, b"k"), (2, b"c"), (3, b"r")])) == eif.Image(b"k", b"c", (b"r",))


@given(st.binary(max_size=2000), st.integers(0, 600))
def test_any_bytes_are_refused_and_nothing_else(noise: bytes, at: int) -> None:
    data = eif.write(SIGNED)
    for damaged in (noise, data[:at] + noise, data[:at] + noise + data[at + len(noise) :]):
        with contextlib.suppress(eif.EifError):
            assert eif.read(damaged) == SIGNED


@given(st.binary(max_size=100))
def test_any_signature_has_a_certificate_or_is_refused(noise: bytes) -> None:
    whole = signature_section(CERTIFICATE, as_bytes=False)
    huge = whole.replace(b"\x99", b"\x1b\x7f" + bytes(7), 1)  # an integer where the certificate was
    for section in (huge, noise, whole[: len(noise)], whole[:50] + noise):
        with contextlib.suppress(eif.EifError):
            replace(SMALL, signature=section).pcrs()


def test_an_image_needs_a_ramdisk_and_no_more_than_fit() -> None:
    for count in (0, 30):
        with pytest.raises(eif.EifError):
            eif.write(replace(SMALL, ramdisks=(b"",) * count))
    assert len(eif.read(eif.write(replace(SMALL, ramdisks=(b"",) * 29))).ramdisks) == 29


def tool(*words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, eif.__file__, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_tool_describes_and_extracts(tmp_path: Path) -> None:
    path = tmp_path / "image.eif"
    path.write_bytes(eif.write(SIGNED))
    told = json.loads(tool("describe", path).stdout)
    assert told["Measurements"] == {"HashAlgorithm": "Sha384 { ... }"} | {
        f"PCR{index}": value.hex() for index, value in SIGNED.pcrs().items()
    }
    assert told["Metadata"]["ImageName"] == "small"
    assert [section["Type"] for section in told["Sections"]] == [
        "kernel", "cmdline", "metadata", "ramdisk", "ramdisk", "signature",
    ]  # fmt: skip
    assert tool("extract", path, tmp_path / "parts").returncode == 0
    assert (tmp_path / "parts" / "initrd").read_bytes() == b"boot" * 5 + b"application" * 7
    path.write_bytes(eif.write(SIGNED)[:-1])
    refused = tool("describe", path)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
