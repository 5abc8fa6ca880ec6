"""The SEV guest's device, `/dev/sev-guest`: the way to SNP reports before Linux 6.7.

ioctl     0xC0205302 with 32 bytes: u8 version 1, pad 7, u64 address of the request, of the response, and the error
request   report_data 64, u32 VMPL, zeros 28, u64 address of a table of certificates, u32 its length, pad 4
response  4000: u32 status, u32 size, zeros 24, report
"""

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable

from attest import AttestationError
from attest.certificates import MAX_TABLE

DEVICE = "/dev/sev-guest"
_IOCTL = 0xC0205302  # _IOWR('S', 2, 32 bytes): a report with certificates
_MESSAGE = struct.Struct("=B7x3Q")
_REQUEST = struct.Struct("=64sI28xQI4x")
_RESPONSE = 4000  # bytes
_HEAD = struct.Struct("<II24x")

Ioctl = Callable[[int, int, bytearray], object]


def report(data: bytes, *, device: str = DEVICE, ioctl: Ioctl = fcntl.ioctl) -> tuple[bytes, bytes]:
    """A report about `data`, 64 bytes, and the host's table of certificates. Raises AttestationError."""
    table, answer = ctypes.create_string_buffer(MAX_TABLE), ctypes.create_string_buffer(_RESPONSE)
    request = _REQUEST.pack(data, 0, ctypes.addressof(table), MAX_TABLE)
    asked = ctypes.create_string_buffer(request, len(request))
    message = bytearray(_MESSAGE.pack(1, ctypes.addressof(asked), ctypes.addressof(answer), 0))
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            ioctl(descriptor, _IOCTL, message)
        finally:
            os.close(descriptor)
    except OSError as error:
        code = _MESSAGE.unpack(message)[3]
        advice = f"the firmware's or host's error is {code:#x}" if code else "wanted the device of an SNP guest"
        raise AttestationError(f"{device}: {error.strerror}: {advice}") from None
    status, size = _HEAD.unpack(answer.raw[: _HEAD.size])
    if status or size > _RESPONSE - _HEAD.size:
        raise AttestationError(f"{device}: got the status {status} and {size} bytes, wanted a report")
    return answer.raw[_HEAD.size : _HEAD.size + size], table.raw
