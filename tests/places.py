"""Where tests listen: on loopback, over tcp, and over vsock if this kernel has one for it.

Most have not (it is the module vsock_loopback); `tests/system/test_uml.py` runs the tests of vsock in a kernel with it.
"""

import socket

from transport.address import Address
from transport.errors import TransportError
from transport.sockets import Listener, connect

LOCAL = 1  # VMADDR_CID_LOCAL: the context id of this machine, for itself


def anywhere(scheme: str) -> Address:
    """An address on loopback whose port the system chooses."""
    return Address(scheme, "127.0.0.1" if scheme == "tcp" else str(LOCAL), 0)


def pair(scheme: str) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection."""
    with Listener(anywhere(scheme)) as listener:
        one = connect(listener.address, 5.0)
        accepted = listener.accept()
        assert accepted is not None
        return one, accepted[0]


def _works(scheme: str) -> bool:
    try:
        one, two = pair(scheme)
    except TransportError:
        return False
    one.close()
    two.close()
    return True


VSOCK = ["vsock"] if _works("vsock") else []
SCHEMES = ["tcp", *VSOCK]
