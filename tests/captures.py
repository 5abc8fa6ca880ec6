"""What crosses the loopback interface, as a host sees it. For root on Linux."""

import contextlib
import socket
import threading
from collections import defaultdict

IPV4, FORCED_BUFFER = 0x0800, 33  # of linux/if_ether.h and asm-generic/socket.h
ROOM = 256 << 20  # bytes that may wait to be read
TCP = 6
Flow = tuple[bytes, bytes, int, int]  # addresses and ports, from and to


class Capture:
    """Every TCP stream over loopback while the block runs, in both directions. OSError for who may not capture."""

    def __init__(self) -> None:
        self._pieces: dict[Flow, list[bytes]] = defaultdict(list)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(IPV4))
        self._socket.setsockopt(socket.SOL_SOCKET, FORCED_BUFFER, ROOM)
        self._socket.bind(("lo", IPV4))
        self._socket.settimeout(0.1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def streams(self, *ports: int) -> bytes:
        """What was sent to or from these ports, or all of it; a stream after the other."""
        flows = [flow for flow in self._pieces if not ports or {*flow[2:]} & {*ports}]
        return b"\n".join(b"".join(self._pieces[flow]) for flow in flows)

    def _read(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                packet = self._socket.recv(1 << 17)
                start = 4 * (packet[0] & 15)
                if packet[9] == TCP:
                    ports = [int.from_bytes(packet[at : at + 2], "big") for at in (start, start + 2)]
                    data = packet[start + 4 * (packet[start + 12] >> 4) : int.from_bytes(packet[2:4], "big")]
                    if data:
                        self._pieces[packet[12:16], packet[16:20], ports[0], ports[1]].append(data)

    def __enter__(self) -> "Capture":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()
