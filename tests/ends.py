"""Two ends of a link with nothing but bytes between them, which a test may change."""

import hashlib
import socket
import threading
from typing import Any

from attest import (
    NO_CLAIMS,
    AcceptUnattested,
    AttestationResult,
    Evidence,
    EvidenceError,
    Provider,
    Unattested,
)
from transport.channel import Channel
from transport.link import CLIENT, End, initiate, respond

LENGTHS = {1: (32, 96, 64), 2: (1216, 1200, 64)}  # bytes of the handshake's messages, by suite
OPENING = {suite: 8 + 2 + first + 16 for suite, (first, _, _) in LENGTHS.items()}  # preamble, message 1, mac

MANIFEST = hashlib.sha256(b"manifest").digest()
MAC_KEY = hashlib.sha256(b"MGPT-LINK-v2 mac1" + b"manifest").digest()

# For channels, whose tests are not about evidence.
CLIENT_END = End(Unattested(), AcceptUnattested(), bytes(32), MAC_KEY, CLIENT, 0)
STAGE_END = End(Unattested(), AcceptUnattested(), bytes(32), MAC_KEY, 0, CLIENT)


class Sealed:
    """An attester whose evidence is just the binding: what a platform would sign."""

    provider = Provider.MOCK

    def __init__(self, claims=NO_CLAIMS):
        self.claims = claims
        self.made = 0

    def attest(self, binding):
        self.made += 1
        return Evidence(self.provider, self.claims, binding.digest, (b"endorsement",))


class Bound:
    """Its verifier."""

    def verify(self, evidence, binding):
        if evidence.evidence != binding.digest:
            raise EvidenceError("not bound to this handshake")
        return AttestationResult(Provider.MOCK, b"m", False, evidence.claims, None, None)


class Refuses:
    def verify(self, evidence, binding):
        raise EvidenceError("measurement: got … wanted …")


def client(**changes):
    usual: dict[str, Any] = {"attester": Unattested(), "verifier": Bound(), "own_id": CLIENT, "peer_id": 0}
    return End(**{"manifest_sha256": MANIFEST, "mac_key": MAC_KEY} | usual | changes)


def stage(**changes):
    usual: dict[str, Any] = {"attester": Sealed(), "verifier": AcceptUnattested(), "own_id": 0, "peer_id": CLIENT}
    return End(**{"manifest_sha256": MANIFEST, "mac_key": MAC_KEY} | usual | changes)


class Side:
    """Runs one end's generator over byte strings."""

    def __init__(self, steps):
        self.steps = steps
        self.inbox = bytearray()
        self.sent = bytearray()
        self.session = None
        self.error = None
        self.wanted = next(steps)

    def run(self):
        """As far as it gets; what it sends meanwhile."""
        out = bytearray()
        try:
            while True:
                if not isinstance(self.wanted, int):
                    out += self.wanted
                    self.wanted = self.steps.send(None)
                elif len(self.inbox) >= self.wanted:
                    data = bytes(self.inbox[: self.wanted])
                    del self.inbox[: self.wanted]
                    self.wanted = self.steps.send(data)
                else:
                    break
        except StopIteration as end:
            self.session, self.wanted = end.value, 1 << 60
        except Exception as error:
            self.error, self.wanted = error, 1 << 60
        self.sent += out
        return bytes(out)


def meet(i, r, change=lambda direction, data: data, step=None):
    """Runs both ends against each other; `change` may alter what passes ("I" or "R" says who sent it)."""
    one = i if isinstance(i, Side) else Side(initiate(i))
    two = r if isinstance(r, Side) else Side(respond(r))
    moved = True
    while moved:
        moved = False
        for name, sender, receiver in (("I", one, two), ("R", two, one)):
            data = sender.run()
            if data:
                moved = True
                data = change(name, data)
                for at in range(0, len(data), step or max(len(data), 1)):
                    receiver.inbox += data[at : at + (step or len(data))]
                    if step:
                        late = receiver.run()
                        if late:
                            sender.inbox += change("R" if name == "I" else "I", late)
    return one, two


def sessions(i=None, r=None):
    one, two = meet(i or client(), r or stage())
    assert one.error is None, one.error
    assert two.error is None, two.error
    return one.session, two.session


def told(reader, data):
    reader.feed(data)
    return reader.next_message()


def background(work, *args, **kwargs):
    """Runs `work` in a thread; join() returns what it returned or raises what it raised."""

    class Task(threading.Thread):
        def run(self):
            try:
                self.result, self.error = work(*args, **kwargs), None
            except BaseException as error:
                self.error = error

        def join(self, timeout=60):
            super().join(timeout)
            assert not self.is_alive(), "the thread is stuck"
            if self.error:
                raise self.error
            return self.result

    task = Task(daemon=True)
    task.start()
    return task


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


def make(sockets=None, client=None, stage=None, end=STAGE_END):
    one, two = sockets or socket.socketpair()
    other = background(Channel.accept, two, end, **(stage or {}))
    return Channel.initiate(one, CLIENT_END, **(client or {})), other.join()
