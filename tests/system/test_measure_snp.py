"""The launch digest of SEV-SNP: it is the published tool's, and every part of the image is in it.

The firmware is made here: the tables that the tool reads, and no code. It boots nowhere.
"""

import struct
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.image import eif, measure_snp

pytest.importorskip("sevsnpmeasure", reason="sev-snp-measure is not installed: it is the extra snp")

IMAGE = eif.Image(b"kernel" * 9, b"console=ttyS0", (b"boot" * 5, b"application" * 7))
HASH_TABLE, HASH_TABLE_SIZE = 0x810C00, 0x400  # where the firmware keeps the hashes of kernel, initrd, command line


def entry(guid: str, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le


def firmware(*, measures_kernel: bool = True) -> bytes:
    """As OvmfPkg/ResetVector lays it out: tables from the end of the file, found by their GUIDs."""
    sections = [(0x800000, 0x9000, 1), (0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3)]
    sections += [(HASH_TABLE & ~0xFFF, 0x1000, 0x10)] if measures_kernel else []
    described = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sections), 1, len(sections))
    described += b"".join(struct.pack("<III", *section) for section in sections)
    table = entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", struct.pack("<I", 0x80B004))  # where processors start
    if measures_kernel:
        table += entry("7255371f-3a3b-4b04-927b-1da6efa8d454", struct.pack("<II", HASH_TABLE, HASH_TABLE_SIZE))
    table += entry("dc886566-984a-4798-a75e-5585a7bf67cc", struct.pack("<I", 1024))
    table += struct.pack("<H", len(table) + 18) + uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    data = bytearray(0x2000)
    data[-1024 : -1024 + len(described)] = described
    data[-32 - len(table) : -32] = table
    return bytes(data)


@pytest.fixture
def ovmf(tmp_path: Path) -> Path:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(firmware())
    return path


def test_the_digest_is_the_published_tools(ovmf: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    eif.extract(IMAGE, parts)
    command = [
        "--mode",
        "snp",
        "--vcpus",
        "3",
        "--vcpu-type",
        "EPYC-Milan",
        "--ovmf",
        ovmf,
        "--kernel",
        parts / "kernel",
    ]
    command += ["--initrd", parts / "initrd", "--append", "console=ttyS0"]
    run = [sys.executable, "-c", "from sevsnpmeasure.cli import main; main()", *map(str, command)]
    told = subprocess.check_output(run, text=True).strip()
    assert measure_snp.launch_digest(IMAGE, ovmf, 3, "EPYC-Milan").hex() == told


def test_every_part_and_the_processors_are_in_it(ovmf: Path) -> None:
    def digest(image: eif.Image = IMAGE, vcpus: int = 2, kind: str = "EPYC-Milan") -> bytes:
        return measure_snp.launch_digest(image, ovmf, vcpus, kind)

    assert digest() == digest()
    others = [
        digest(replace(IMAGE, kernel=b"other")),
        digest(replace(IMAGE, cmdline=b"other")),
        digest(replace(IMAGE, ramdisks=(b"boot" * 5, b"other"))),
        digest(vcpus=1),
        digest(kind="EPYC-Genoa"),
    ]
    assert len({digest(), *others}) == 6


@pytest.mark.parametrize("data", [b"", bytes(100), bytes(0x2000), firmware(measures_kernel=False), firmware()[:-1]])
def test_an_unfit_firmware_is_refused(ovmf: Path, data: bytes) -> None:
    ovmf.write_bytes(data)
    with pytest.raises(measure_snp.SnpError, match="AmdSev"):
        measure_snp.launch_digest(IMAGE, ovmf, 1, "EPYC-Milan")


def test_what_no_machine_has_is_refused(ovmf: Path) -> None:
    with pytest.raises(measure_snp.SnpError, match="EPYC-Milan"):
        measure_snp.launch_digest(IMAGE, ovmf, 1, "Pentium")
    with pytest.raises(measure_snp.SnpError, match="at least 1"):
        measure_snp.launch_digest(IMAGE, ovmf, 0, "EPYC-Milan")


def test_the_tool_says_all_that_the_digest_depends_on(ovmf: Path, tmp_path: Path) -> None:
    (tmp_path / "image.eif").write_bytes(eif.write(IMAGE))
    command = [sys.executable, measure_snp.__file__, tmp_path / "image.eif", "--ovmf", ovmf]
    done = subprocess.run(
        [*map(str, command), "--vcpus", "2", "--vcpu-type", "EPYC-Milan"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for told in (measure_snp.launch_digest(IMAGE, ovmf, 2, "EPYC-Milan").hex(), "EPYC-Milan", '"vcpus": 2'):
        assert told in done.stdout
