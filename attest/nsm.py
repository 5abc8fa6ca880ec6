"""The Nitro Security Module, `/dev/nsm`: the device that gives an enclave its attestation documents.

ioctl     0xC0200A00 with 32 bytes: u64 address and u64 length of the request, the same of the response
request   {"Attestation": {"user_data", "nonce", "public_key"}}           in CBOR
response  {"Attestation": {"document": bytes}} or {"Error": text}         its length is written into the 32 bytes
"""

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable

from attest import AttestationError, cbor

DEVICE = "/dev/nsm"
MAX_RESPONSE = 0x3000  # bytes; the driver cuts what is longer, and does not say so
_IOCTL = 0xC0200A00  # _IOWR(0x0A, 0, 32 bytes)
_MESSAGE = struct.Struct("=4Q")

Ioctl = Callable[[int, int, bytearray], object]


def document(
    user_data: bytes, nonce: bytes, public_key: bytes, *, device: str = DEVICE, ioctl: Ioctl = fcntl.ioctl
) -> bytes:
    """A document with these three, as the device gave it. Raises AttestationError if there is none to have."""
    fields = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
    pairs = b"".join(_text(name) + cbor.byte_string(value) for name, value in fields.items())
    request = cbor.head(5, 1) + _text("Attestation") + cbor.head(5, len(fields)) + pairs
    response = cbor.read(_exchange(request, device, ioctl))
    match response:
        case {"Attestation": {"document": bytes(made)}}:
            return made
        case {"Error": str(error)}:
            raise AttestationError(f"{device}: got the error {error[:100]!a}, wanted a document")
    raise AttestationError(f"{device}: got another answer than a document or an error")


def _exchange(request: bytes, device: str, ioctl: Ioctl) -> bytes:
    asked, answer = ctypes.create_string_buffer(request, len(request)), ctypes.create_string_buffer(MAX_RESPONSE)
    message = bytearray(_MESSAGE.pack(ctypes.addressof(asked), len(request), ctypes.addressof(answer), len(answer)))
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            ioctl(descriptor, _IOCTL, message)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise AttestationError(f"{device}: {error.strerror}: wanted the device of a Nitro enclave") from None
    length = _MESSAGE.unpack(message)[3]
    if length > MAX_RESPONSE:
        raise AttestationError(f"{device}: got an answer of {length} bytes, wanted at most {MAX_RESPONSE}")
    return answer.raw[:length]


def _text(name: str) -> bytes:
    return cbor.head(3, len(name)) + name.encode("ascii")
