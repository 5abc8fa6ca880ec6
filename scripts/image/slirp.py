"""A user-mode network for a guest: libslirp, the library behind qemu's `-netdev user`, without qemu and without root.

The guest's end is a datagram socket that carries Ethernet frames, which is what user-mode Linux takes as `vec0:
transport=fd`. The guest is 10.0.2.15; ports of this machine's loopback are forwarded to it, and 10.0.2.2 is this
machine's loopback, seen from the guest. With `restrict`, the guest reaches nothing but who called it.

Source: libslirp.h of libslirp 4.7, whose structures these are (configuration version 1, callbacks of version 1).
"""

import contextlib
import ctypes
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

GUEST, HOST, NETWORK, MASK = "10.0.2.15", "10.0.2.2", "10.0.2.0", "255.255.255.0"
DHCP, DNS = "10.0.2.16", "10.0.2.3"
MAX_FRAME = 65536 + 14  # bytes
LIBRARIES = ("libpcre2-8.so.0", "libglib-2.0.so.0", "libslirp.so.0")  # each needs those before it

# libslirp's SLIRP_POLL_* bits, and poll's.
_POLL = {1: select.POLLIN, 2: select.POLLOUT, 4: select.POLLPRI, 8: select.POLLERR, 16: select.POLLHUP}

_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_SAY = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
_CLOCK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_TIMER_NEW = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_TIMER_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_TIMER_MOD = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
_ON_FD = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_NOTIFY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ADD_POLL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_GET_EVENTS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class _Address(ctypes.Structure):
    """struct in_addr; passed by value."""

    _fields_: ClassVar = [("in_network_order", ctypes.c_uint32)]

    @classmethod
    def of(cls, text: str) -> "_Address":
        return cls.from_buffer_copy(socket.inet_aton(text))


_Address6 = ctypes.c_uint32 * 4


class _Config(ctypes.Structure):
    _fields_: ClassVar = [
        ("version", ctypes.c_uint32), ("restricted", ctypes.c_int), ("in_enabled", ctypes.c_bool),
        ("network", _Address), ("mask", _Address), ("host", _Address), ("in6_enabled", ctypes.c_bool),
        ("prefix6", _Address6), ("prefix6_length", ctypes.c_uint8), ("host6", _Address6),
        ("hostname", ctypes.c_char_p), ("tftp_name", ctypes.c_char_p), ("tftp_path", ctypes.c_char_p),
        ("bootfile", ctypes.c_char_p), ("dhcp_start", _Address), ("dns", _Address), ("dns6", _Address6),
        ("search", ctypes.c_void_p), ("domain", ctypes.c_char_p), ("mtu", ctypes.c_size_t), ("mru", ctypes.c_size_t),
        ("no_host_loopback", ctypes.c_bool), ("emulate", ctypes.c_bool),
    ]  # fmt: skip


class _Callbacks(ctypes.Structure):
    _fields_: ClassVar = [
        ("send_packet", _WRITE), ("guest_error", _SAY), ("clock", _CLOCK), ("timer_new", _TIMER_NEW),
        ("timer_free", _TIMER_FREE), ("timer_mod", _TIMER_MOD), ("register_fd", _ON_FD), ("unregister_fd", _ON_FD),
        ("notify", _NOTIFY),
    ]  # fmt: skip


class SlirpError(Exception):
    """The network cannot be made."""


class Network:
    """A guest's network, served by a thread until `close`.

    Attributes:
        guest_end: the socket for the guest's process.
    """

    def __init__(self, libraries: Path, forwards: Sequence[tuple[int, int]], *, restrict: bool) -> None:
        """Starts serving.

        Args:
            libraries: the folder that holds libslirp and what it needs.
            forwards: pairs of a port on this machine's loopback, and a port of the guest.
            restrict: the guest can call nobody.

        Raises:
            SlirpError: a library is missing, or a port is taken.
        """
        self._library = _load(libraries)
        self._end, self.guest_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (self._end, self.guest_end):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        self._config = _Config(
            version=1, restricted=restrict, in_enabled=True, network=_Address.of(NETWORK), mask=_Address.of(MASK),
            host=_Address.of(HOST), dhcp_start=_Address.of(DHCP), dns=_Address.of(DNS),
        )  # fmt: skip
        self._callbacks = _Callbacks(
            _WRITE(self._to_guest), _SAY(lambda _text, _: None), _CLOCK(lambda _: time.monotonic_ns()),
            _TIMER_NEW(lambda *_: None), _TIMER_FREE(lambda *_: None), _TIMER_MOD(lambda *_: None),  # for IPv6: off
            _ON_FD(lambda *_: None), _ON_FD(lambda *_: None), _NOTIFY(lambda _: None),
        )  # fmt: skip
        self._slirp = self._library.slirp_new(ctypes.byref(self._config), ctypes.byref(self._callbacks), None)
        if not self._slirp:
            raise SlirpError("libslirp refuses the configuration")
        self._stop, self._stopping = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="user-mode network", daemon=True)
        try:
            for port, guest_port in forwards:
                if self._library.slirp_add_hostfwd(
                    self._slirp, 0, _Address.of("127.0.0.1"), port, _Address.of(GUEST), guest_port
                ):
                    raise SlirpError(f"port {port} of this machine cannot be forwarded: it is in use")
        except SlirpError:
            self._release()
            raise
        self._thread.start()

    def _to_guest(self, frame: int, size: int, _opaque: object) -> int:
        with contextlib.suppress(OSError):  # a full queue, or a guest that has gone: as on a wire, the frame is lost
            self._end.send(ctypes.string_at(frame, size), socket.MSG_DONTWAIT)
        return size

    def _serve(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Waits for something to happen, and handles it; whether to go on."""
        watched: list[tuple[int, int]] = []

        def add(fd: int, events: int, _opaque: object) -> int:
            watched.append((fd, sum(bit for ours, bit in _POLL.items() if events & ours)))
            return len(watched) - 1

        timeout = ctypes.c_uint32(1000)  # milliseconds
        self._library.slirp_pollfds_fill(self._slirp, ctypes.byref(timeout), _ADD_POLL(add), None)
        poller = select.poll()
        merged: dict[int, int] = {self._end.fileno(): select.POLLIN, self._stopping.fileno(): select.POLLIN}
        for fd, events in watched:
            merged[fd] = merged.get(fd, 0) | events
        for fd, events in merged.items():
            poller.register(fd, events)
        happened = dict(poller.poll(timeout.value))

        def events_of(index: int, _opaque: object) -> int:
            found = happened.get(watched[index][0], 0)
            return sum(ours for ours, bit in _POLL.items() if found & bit)

        self._library.slirp_pollfds_poll(self._slirp, 0, _GET_EVENTS(events_of), None)
        if self._end.fileno() in happened:
            try:
                frame = self._end.recv(MAX_FRAME, socket.MSG_DONTWAIT)
                self._library.slirp_input(self._slirp, frame, len(frame))
            except OSError:
                return False  # the guest has gone
        return self._stopping.fileno() not in happened

    def close(self) -> None:
        """Ends the network; connections through it break."""
        self._stop.close()
        self._thread.join()
        self._release()

    def _release(self) -> None:
        self._library.slirp_cleanup(self._slirp)
        for end in (self._end, self.guest_end, self._stop, self._stopping):
            end.close()


def _load(folder: Path) -> Any:
    try:
        for name in LIBRARIES:
            library = ctypes.CDLL(str(next(folder.rglob(name))), ctypes.RTLD_GLOBAL)
    except (OSError, StopIteration) as error:
        raise SlirpError(f"{folder}: cannot load {name}: {error}") from None
    library.slirp_new.restype = ctypes.c_void_p
    library.slirp_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.slirp_cleanup.argtypes = [ctypes.c_void_p]
    library.slirp_pollfds_fill.argtypes = [ctypes.c_void_p, ctypes.c_void_p, _ADD_POLL, ctypes.c_void_p]
    library.slirp_pollfds_poll.argtypes = [ctypes.c_void_p, ctypes.c_int, _GET_EVENTS, ctypes.c_void_p]
    library.slirp_input.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    library.slirp_add_hostfwd.argtypes = [
        ctypes.c_void_p, ctypes.c_int, _Address, ctypes.c_int, _Address, ctypes.c_int,
    ]  # fmt: skip
    return library
