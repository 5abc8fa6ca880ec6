"""A Security Module as a process of its own: it answers at a Unix socket, and signs with the root of tests/enclaves.py.

    python tests/nitro/device.py SOCKET [--delay S] [--pcr I=BYTE] [--age S] [--foreign] [--silent] [--twice]

A request is what a stage would give to the ioctl of `/dev/nsm`, after its length; the answer likewise. Requests are
answered one after the other, as the device does. Each answer is a line on standard output.
"""

import argparse
import signal
import socket
import struct
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import enclaves
from cryptography.hazmat.primitives.asymmetric import ec

LENGTH = struct.Struct("=I")


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("socket")
    made.add_argument("--delay", type=float, default=0.0, help="seconds that an answer takes")
    made.add_argument("--pcr", action="append", default=[], help="a register of another value")
    made.add_argument("--age", type=float, default=0.0, help="seconds by which its clock is behind")
    made.add_argument("--foreign", action="store_true", help="another root, with the same names")
    made.add_argument("--silent", action="store_true", help="answers nothing")
    made.add_argument("--twice", action="store_true", help="every answer but the first is the one before it")
    return made


class Module:
    """What answers, by the options."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self._pcrs = dict(enclaves.PCRS)
        for text in chosen.pcr:
            index, value = text.split("=")
            self._pcrs[int(index)] = bytes([int(value)]) * 48
        self._last = b""

    def answer(self, request: bytes) -> bytes:
        """The answer to a request, in its time."""
        if self._chosen.silent:
            signal.pause()
        time.sleep(self._chosen.delay)
        now = datetime.now(UTC)
        stamp = int((now - timedelta(seconds=self._chosen.age)).timestamp() * 1000)
        root = {"root": {"key": ec.derive_private_key(7, ec.SECP384R1())}} if self._chosen.foreign else {}
        device = enclaves.Device(enclaves.living(now, root), pcrs=self._pcrs, timestamp=stamp)
        if not (self._last and self._chosen.twice):
            self._last = device.reply(request)
        return self._last


def main() -> None:
    chosen = options().parse_args()
    module = Module(chosen)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(chosen.socket)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            stage, _ = listener.accept()
            with stage:
                answer = module.answer(receive(stage))
                stage.sendall(LENGTH.pack(len(answer)) + answer)
            print("answered", flush=True)


def receive(sock: socket.socket) -> bytes:
    """What comes after its length."""

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = sock.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    return exactly(*LENGTH.unpack(exactly(LENGTH.size)))


if __name__ == "__main__":
    main()
