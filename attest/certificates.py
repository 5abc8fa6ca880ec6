"""Endorsements as they lie about: in the table that an SNP host hands to its guests; and in files under any names, in a
folder or delivered.

table      entry, ..., 24 zeros, certificates                                                         little-endian
entry      GUID 16, in the order of its text | u32 offset of a certificate, from the table's begin | u32 length
delivery   u8 how many files, 1 to 16 | for each: u32 length, at most 65536 | file                    big-endian
"""

import binascii
import os
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence

from attest import MAX_ENDORSEMENTS, AttestationError, EvidenceError
from attest.der import SEQUENCE, Reader
from attest.document import read_file

MAX_TABLE = 16 * 1024  # bytes; what the kernel takes from a host
MAX_FILE = 64 * 1024  # bytes; of a revocation list at most
MAX_FILES = 32  # in a folder
MAX_DELIVERY = 1 + MAX_ENDORSEMENTS * (4 + MAX_FILE)  # bytes

Files = Callable[[], Mapping[str, bytes]]  # what an operator has put somewhere, by its places. Raises AttestationError

_LENGTH = struct.Struct(">I")
_ENTRY = 24
_GUIDS = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes: "VCEK",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1").bytes: "VLEK",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782").bytes: "ASK",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae").bytes: "ARK",
}
_BEGIN, _END = "-----BEGIN ", "-----END "


def in_table(table: bytes) -> list[bytes]:
    """The certificates of a table, in DER; those of an unknown GUID are left out. None if it is empty, or all zeros.

    Raises EvidenceError for what is not such a table.
    """
    if len(table) > MAX_TABLE:
        raise EvidenceError(f"table of certificates: got {len(table)} bytes, wanted at most {MAX_TABLE}")
    places: dict[bytes, tuple[int, int]] = {}
    at = 0
    while table:
        entry = table[at : at + _ENTRY]
        at += _ENTRY
        if len(entry) != _ENTRY:
            raise EvidenceError("table of certificates: got one without an end")
        if not any(entry):
            break
        if entry[:16] in places:
            raise EvidenceError("table of certificates: got one kind twice")
        offset, length = (int.from_bytes(entry[i : i + 4], "little") for i in (16, 20))
        places[entry[:16]] = offset, offset + length
    end = at
    for begin, finish in sorted(places.values()):
        if begin < end or finish == begin or finish > len(table):
            raise EvidenceError("table of certificates: got one that is empty, overlaps another, or lies outside")
        end = finish
    return [item for guid, (begin, finish) in places.items() if guid in _GUIDS for item in decode(table[begin:finish])]


def in_files(found: Mapping[str, bytes]) -> list[bytes]:
    """All that files hold, in DER: certificates and revocation lists, in DER or PEM.

    Raises AttestationError, which names the file that holds anything else.
    """
    return [item for place, data in found.items() for item in in_file(place, data)]


def files(folder: str) -> dict[str, bytes]:
    """The files of a folder by their paths, but hidden ones. Raises AttestationError, also if they are too many or
    too long."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        if len(names) > MAX_FILES:
            raise AttestationError(f"{folder}: got {len(names)} files, wanted at most {MAX_FILES} endorsements")
        found = {f"{folder}/{name}": read_file(os.path.join(folder, name), MAX_FILE) for name in names}
    except OSError as error:
        raise AttestationError(f"{error.filename}: {error.strerror}: wanted a folder of endorsements") from None
    for place, data in found.items():
        if len(data) > MAX_FILE:
            raise AttestationError(f"{place}: got more than {MAX_FILE} bytes, wanted endorsements")
    return found


def delivery(found: Sequence[bytes]) -> bytes:
    """Files, to be delivered. Raises AttestationError if they are more or longer than that allows."""
    data = bytes([min(len(found), 255)]) + b"".join(_LENGTH.pack(len(item)) + item for item in found)
    delivered(data)  # what would be refused there is refused here
    return data


def delivered(data: bytes) -> list[bytes]:
    """The files of a delivery. Raises EvidenceError."""
    count = data[0] if data else 0
    if not 1 <= count <= MAX_ENDORSEMENTS:
        raise EvidenceError(f"delivery: got {count} files, wanted 1 to {MAX_ENDORSEMENTS}")
    found, at = [], 1
    for _ in range(count):
        begin = at + _LENGTH.size
        length = int.from_bytes(data[at:begin], "big")
        at = begin + length
        if length > MAX_FILE:
            raise EvidenceError(f"delivery: got a file of {length} bytes, wanted at most {MAX_FILE}")
        if at > len(data):
            raise EvidenceError("delivery: got one that ends inside a file")
        found.append(data[begin:at])
    if at != len(data):
        raise EvidenceError("delivery: got bytes behind its end")
    return found


def in_file(place: str, data: bytes) -> list[bytes]:
    """What a file holds, in DER. Raises AttestationError, which names the file."""
    try:
        found = decode(data)
        for item in found:
            whole = Reader(item)
            whole.content(SEQUENCE)
            whole.end()
    except EvidenceError as error:
        raise AttestationError(f"{place}: {error}: wanted endorsements in DER or PEM") from None
    return found


def is_list(data: bytes) -> bool:
    """Whether this is a revocation list rather than a certificate, which begins with its version, tagged."""
    return not Reader(data).inside(SEQUENCE).inside(SEQUENCE).next_is(0xA0)


def decode(data: bytes) -> list[bytes]:
    """What is encoded in PEM, block by block; anything else as it is."""
    text = data.decode("ascii", "replace")
    if not text.lstrip().startswith(_BEGIN):
        return [data]
    found = []
    for block in text.split(_BEGIN)[1:]:
        lines = block.split(_END)[0].split("\n")[1:]
        try:
            found.append(binascii.a2b_base64("".join(line.strip() for line in lines), strict_mode=True))
        except ValueError:
            raise EvidenceError("endorsements: got PEM that is not base64") from None
    return found
