"""EIF, the image format of AWS Nitro Enclaves, version 4: write, read, and describe what it measures to.

    header    548 bytes: ".eif" | u16 version | u16 flags (bit 0: aarch64) | u64 memory | u64 CPUs | u16 0
              | u16 number of sections | 32 x u64 offset of a section's header | 32 x u64 size of its data
              | u32 0 | u32 CRC
    section   u16 type | u16 flags 0 | u64 size | data            kernel, command line, metadata, ramdisks, signature

Integers are big-endian, and nothing is padded. The CRC-32 is over all bytes but its own. What a Nitro host measures:

    PCRn = SHA-384(48 zeros | SHA-384(data))    of PCR0  kernel | command line | all ramdisks
                                                   PCR1  kernel | command line | the first ramdisk
                                                   PCR2  the other ramdisks
                                                   PCR8  the certificate (DER) of whoever signed the image

So metadata and signature are in none of the first three. Source: github.com/aws/aws-nitro-enclaves-image-format,
src/defs/mod.rs and src/utils. It was not yet compared with an image made by the vendor's tool: see docs/deployment.md.

    python scripts/image/eif.py describe IMAGE            as JSON, with the names that nitro-cli describe-eif has
    python scripts/image/eif.py extract IMAGE FOLDER      kernel, cmdline, initrd (all ramdisks), metadata.json
"""

import argparse
import enum
import hashlib
import json
import ssl
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

from attest.document import write_file

MAGIC = b".eif"
VERSION = 4
ARM64 = 1  # the one flag
MAX_SECTIONS = 32
MAX_IMAGE = 16 * 2**30  # bytes; the largest we would read: GPT-2 XL in float32 is 6.2 GB
DEFAULT_MEMORY = 2**30  # bytes
DEFAULT_CPUS = 2

_HEADER = struct.Struct(">4sHHQQHH32Q32QII")
_CRC_AT = _HEADER.size - 4
_SECTION = struct.Struct(">HHQ")


class EifError(Exception):
    """This is no sound EIF image."""


class Kind(enum.IntEnum):
    """What a section holds."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5


@dataclass(frozen=True)
class Image:
    """An image's parts.

    Attributes:
        metadata: JSON; None where there is none.
        signature: the section as it is stored; None where the image is not signed.
        memory: bytes that the enclave gets unless told otherwise.
        cpus: likewise.
        arm64: whether it is for aarch64.
    """

    kernel: bytes
    cmdline: bytes
    ramdisks: tuple[bytes, ...]
    metadata: bytes | None = None
    signature: bytes | None = None
    memory: int = DEFAULT_MEMORY
    cpus: int = DEFAULT_CPUS
    arm64: bool = False

    def sections(self) -> list[tuple[Kind, bytes]]:
        """The sections in the order in which they lie in the file."""
        found: list[tuple[Kind, bytes | None]] = [
            (Kind.KERNEL, self.kernel),
            (Kind.CMDLINE, self.cmdline),
            (Kind.METADATA, self.metadata),
            *((Kind.RAMDISK, ramdisk) for ramdisk in self.ramdisks),
            (Kind.SIGNATURE, self.signature),
        ]
        return [(kind, data) for kind, data in found if data is not None]

    def pcrs(self) -> dict[int, bytes]:
        """The measurements, 48 bytes each: PCR0, 1, 2, and 8 if the image is signed.

        Raises:
            EifError: the signature's section holds no certificate.
        """
        first, *others = self.ramdisks
        registers = {
            0: _pcr(self.kernel, self.cmdline, *self.ramdisks),
            1: _pcr(self.kernel, self.cmdline, first),
            2: _pcr(*others),
        }
        if self.signature is not None:
            registers[8] = _pcr(_certificate(self.signature))
        return registers


def _pcr(*stream: bytes) -> bytes:
    digest = hashlib.sha384()
    for data in stream:
        digest.update(data)
    return hashlib.sha384(bytes(48) + digest.digest()).digest()


def write(image: Image) -> bytes:
    """The bytes of an image. Raises EifError if it has no ramdisk, or more than fit."""
    sections = image.sections()
    if not image.ramdisks or len(sections) > MAX_SECTIONS:
        raise EifError(
            f"{len(image.ramdisks)} ramdisks, {len(sections)} sections: "
            f"wanted a ramdisk, and at most {MAX_SECTIONS} sections"
        )
    sizes = [len(data) for _, data in sections]
    offsets = [_HEADER.size + sum(sizes[:i]) + i * _SECTION.size for i in range(len(sizes))]
    empty = [0] * (MAX_SECTIONS - len(sizes))
    fields = [MAGIC, VERSION, ARM64 if image.arm64 else 0, image.memory, image.cpus, 0, len(sizes)]
    header = _HEADER.pack(*fields, *offsets, *empty, *sizes, *empty, 0, 0)
    body = b"".join(part for kind, data in sections for part in (_SECTION.pack(kind, 0, len(data)), data))
    crc = zlib.crc32(body, zlib.crc32(header[:_CRC_AT]))
    return header[:_CRC_AT] + struct.pack(">I", crc) + body


def read(data: bytes) -> Image:
    """The image that these bytes are. Raises EifError, and nothing else: any changed byte is noticed, by the CRC."""
    if len(data) < _HEADER.size:
        raise EifError(f"{len(data)} bytes, wanted at least the header's {_HEADER.size}")
    magic, version, flags, memory, cpus, reserved, count, *table, unused, crc = _HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION):
        raise EifError(f"starts with {magic!r}, version {version}; wanted {MAGIC!r}, version {VERSION}")
    if flags & ~ARM64 or reserved or unused:
        raise EifError(f"header: flags {flags:#x}, reserved {reserved}, {unused}: wanted 0 or 1, and zeros")
    if not 1 <= count <= MAX_SECTIONS:
        raise EifError(f"{count} sections, wanted 1 to {MAX_SECTIONS}")
    offsets, sizes = table[:MAX_SECTIONS], table[MAX_SECTIONS:]
    if any(offsets[count:]) or any(sizes[count:]):
        raise EifError("header: an offset or a size of a section that is not there")
    sections = []
    position = _HEADER.size
    for i in range(count):
        if offsets[i] != position or len(data) - position < _SECTION.size:
            raise EifError(f"section {i}: its offset is {offsets[i]}, wanted {position}, inside the file")
        kind, section_flags, size = _SECTION.unpack_from(data, position)
        position += _SECTION.size
        if size != sizes[i] or section_flags or size > len(data) - position:
            raise EifError(
                f"section {i}: {size} bytes, flags {section_flags}; wanted the header's {sizes[i]}, 0, inside the file"
            )
        sections.append((kind, data[position : position + size]))
        position += size
    if position != len(data):
        raise EifError(f"{len(data) - position} bytes after the last section, wanted none")
    found = zlib.crc32(memoryview(data)[_HEADER.size :], zlib.crc32(data[:_CRC_AT]))
    if found != crc:
        raise EifError(f"CRC {found:08x}, the header says {crc:08x}: the file is damaged")
    return _image(sections, memory=memory, cpus=cpus, arm64=bool(flags))


def _image(sections: Sequence[tuple[int, bytes]], **header: Any) -> Image:
    order = [Kind.KERNEL, Kind.CMDLINE, Kind.METADATA, Kind.RAMDISK, Kind.SIGNATURE]
    kinds = [kind for kind, _ in sections]
    ranks = [order.index(Kind(kind)) if kind in set(Kind) else -1 for kind in kinds]
    repeated = any(later < earlier or (later == earlier and order[later] is not Kind.RAMDISK)
                   for earlier, later in pairwise(ranks))  # fmt: skip
    if -1 in ranks or repeated or kinds[:2] != [Kind.KERNEL, Kind.CMDLINE] or Kind.RAMDISK not in kinds:
        raise EifError(f"sections of types {kinds}; wanted 1, 2, then perhaps 5, then some 3, then perhaps 4")
    single = {kind: data for kind, data in sections if kind != Kind.RAMDISK}
    return Image(
        kernel=single[Kind.KERNEL],
        cmdline=single[Kind.CMDLINE],
        ramdisks=tuple(data for kind, data in sections if kind == Kind.RAMDISK),
        metadata=single.get(Kind.METADATA),
        signature=single.get(Kind.SIGNATURE),
        **header,
    )


def read_file(path: Path) -> Image:
    """The image in a file. Raises EifError."""
    try:
        if path.stat().st_size > MAX_IMAGE:
            raise EifError(f"{path}: {path.stat().st_size} bytes, wanted at most {MAX_IMAGE}")
        return read(path.read_bytes())
    except OSError as error:
        raise EifError(f"{path}: {error.strerror}") from None
    except EifError as error:
        raise EifError(f"{path}: {error}") from None


def _certificate(signature: bytes) -> bytes:
    """The signer's certificate, DER, of a signature's section: CBOR, [{signing_certificate: PEM, signature: COSE}, …].

    Only the first entry counts, and whether the signature holds is not looked at: PCR8 is what the host would say.
    """
    try:
        entries, _ = _cbor(signature, 0)
        certificate = entries[0]["signing_certificate"]
        if not isinstance(certificate, list | bytes):
            raise TypeError
        return ssl.PEM_cert_to_DER_cert(bytes(certificate).decode("ascii").strip())
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, struct.error):
        raise EifError("the signature's section holds no certificate in PEM") from None


def _cbor(data: bytes, at: int, depth: int = 0) -> tuple[Any, int]:
    """A value of the few CBOR types of that section (RFC 8949: integer, bytes, text, array, map), and where it ends."""
    major, short = data[at] >> 5, data[at] & 31
    width = {24: 1, 25: 2, 26: 4, 27: 8}.get(short, 0)
    number = int.from_bytes(data[at + 1 : at + 1 + width], "big") if width else short
    at += 1 + width
    if short > 27 or major in (1, 6, 7) or depth > 4:
        raise ValueError
    if major == 0:
        return number, at
    if number > len(data) - at:  # bytes, or items of at least one
        raise ValueError
    if major in (2, 3):
        value = data[at : at + number]
        return value.decode() if major == 3 else value, at + number
    items = []
    for _ in range(number * (major - 3)):
        item, at = _cbor(data, at, depth + 1)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if major == 5 else items), at


def describe(image: Image) -> dict[str, Any]:
    """What an image is, with the names that the vendor's tool gives: `minigpt plan --pcrs` reads this."""
    sections = [{"Type": kind.name.lower(), "Size": len(data)} for kind, data in image.sections()]
    registers = {f"PCR{index}": value.hex() for index, value in image.pcrs().items()}
    try:
        metadata = json.loads(image.metadata or b"null")
    except (ValueError, RecursionError):
        raise EifError("the metadata's section is not JSON") from None
    return {
        "EifVersion": VERSION,
        "Measurements": {"HashAlgorithm": "Sha384 { ... }", **registers},
        "IsSigned": image.signature is not None,
        "CheckCRC": True,  # an image with another CRC is not read
        "Architecture": "aarch64" if image.arm64 else "x86_64",
        "DefaultMemory": image.memory,
        "DefaultCPUs": image.cpus,
        "CommandLine": image.cmdline.decode("ascii", "backslashreplace"),
        "Sections": sections,
        "Metadata": metadata,
    }


def extract(image: Image, folder: Path) -> None:
    """Writes an image's parts into a folder, as qemu and `sev-snp-measure` want them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"kernel": image.kernel, "cmdline": image.cmdline, "initrd": b"".join(image.ramdisks)}
    for name, data in (parts | {"metadata.json": image.metadata or b"null"}).items():
        write_file(folder / name, data)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="eif.py", description="Reads images of AWS Nitro Enclaves.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in (("describe", "print what it is and what it measures to"), ("extract", "write its parts")):
        commands.add_parser(name, help=summary).add_argument("image", type=Path, metavar="IMAGE")
    commands.choices["extract"].add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        image = read_file(options.image)
        if options.command == "describe":
            print(json.dumps(describe(image), indent=2))
        else:
            extract(image, options.folder)
    except (EifError, OSError) as error:
        print(f"eif.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
