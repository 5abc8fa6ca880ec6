"""A real `/dev/nsm`, made by a process: `python tests/nitro/cuse.py [the options of device.py]`, as root, with CUSE.

The kernel passes each call on `/dev/nsm` to this process through `/dev/cuse`, as a FUSE request; an ioctl comes three
times: without its argument, with the 32 bytes that it points to, and with what these point to.

    header    u32 length, u32 opcode, u64 unique, u64 nodeid, u32 uid, gid, pid, padding      answer: u32, i32, u64
    ioctl     u64 handle, u32 flags, u32 code, u64 argument, u32 in size, u32 out size        i32, u32 flags, u32, u32
"""

import os
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nitro.device import Module, options

HEADER, ANSWER = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
IOCTL, IOCTL_ANSWER, VECTOR = struct.Struct("=QIIQII"), struct.Struct("=iIII"), struct.Struct("=QQ")
INIT, OPEN, RELEASE, IOCTL_CODE, INTERRUPT = 4096, 14, 18, 39, 36
UNRESTRICTED, RETRY, ENOSYS = 1, 4, 38


def main() -> None:
    module = Module(options().parse_args(["", *sys.argv[1:]]))
    kernel = os.open("/dev/cuse", os.O_RDWR)
    while True:
        data = os.read(kernel, 1 << 20)
        _, opcode, unique, *_ = HEADER.unpack_from(data)
        body = data[HEADER.size :]
        error, answer = 0, b""
        if opcode == INIT:
            answer = body[:8] + struct.pack("=14I", 0, UNRESTRICTED, 1 << 16, 1 << 16, *[0] * 10) + bytes(8)
            answer = answer[:72] + b"DEVNAME=nsm\0"
        elif opcode == OPEN:
            answer = bytes(16)
        elif opcode == IOCTL_CODE:
            answer = ioctl(module, body)
        elif opcode == INTERRUPT:
            continue
        elif opcode != RELEASE:
            error = -ENOSYS
        os.write(kernel, ANSWER.pack(ANSWER.size + len(answer), error, unique) + answer)
        if opcode == INIT:
            print("ready", flush=True)


def ioctl(module: Module, body: bytes) -> bytes:
    """The answer to an ioctl: what else is to be fetched, or the document."""
    *_, argument, size, _ = IOCTL.unpack_from(body)
    given = body[IOCTL.size :]
    if size < 32:
        return IOCTL_ANSWER.pack(0, RETRY, 1, 0) + VECTOR.pack(argument, 32)
    request, length, response, room = struct.unpack_from("=4Q", given)
    if size == 32:
        fetch = (argument, 32), (request, length)
        put = (argument + 24, 8), (response, room)
        return IOCTL_ANSWER.pack(0, RETRY, 2, 2) + b"".join(VECTOR.pack(*vector) for vector in (*fetch, *put))
    document = module.answer(given[32:])
    print("answered", flush=True)
    return IOCTL_ANSWER.pack(0, 0, 0, 0) + struct.pack("=Q", len(document)) + document


if __name__ == "__main__":
    main()
