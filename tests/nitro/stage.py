"""A stage whose `/dev/nsm` is a socket: `python tests/nitro/stage.py SOCKET --manifest … --index …`.

Nothing of the stage is changed but the ioctl.
"""

import ctypes
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    from attest.certificates import Files
    from attest.providers import nitro
    from attest.registry import PLATFORMS
    from minigpt.stage.__main__ import main as serve
    from nitro.device import LENGTH, receive

    place = sys.argv.pop(1)

    def ioctl(_descriptor: int, code: int, message: bytearray) -> int:
        assert (code, len(message)) == (0xC0200A00, 32)
        request, size, response, room = struct.unpack("=4Q", message)
        with socket.socket(socket.AF_UNIX) as device:
            device.connect(place)
            device.sendall(LENGTH.pack(size) + ctypes.string_at(request, size))
            answer = receive(device)
        ctypes.memmove(response, answer, min(len(answer), room))
        message[24:] = struct.pack("=Q", len(answer))
        return 0

    def attester(_key: bytes, claims: bytes, _files: Files | None) -> nitro.NitroAttester:
        return nitro.NitroAttester(claims, device="/dev/null", ioctl=ioctl)

    PLATFORMS["nitro"] = replace(nitro.PLATFORM, attester=attester)
    serve()


if __name__ == "__main__":
    main()
