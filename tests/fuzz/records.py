"""Records under attack, for `fuzz.py`: altered on the way, or sealed by a peer with the keys who breaks the rules."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator

from attest import NO_CLAIMS, AcceptUnattested, Binding, Evidence, Provider
from fuzz.handshake import ATTESTER, CLAIMS, VERIFIER, edited, edits_of, meet, record, stranger
from transport import link, noise
from transport.errors import Closed
from transport.link import SUITES, Session
from transport.noise import CipherState, KeyPair, Split
from transport.records import Budget, Opener, Sealer, Type

MAX_MESSAGE = 4096  # bytes; small, so that an input can exceed it


@functools.cache
def _split() -> Split:
    """What I has after one real handshake; R sends with the key that I receives with."""
    name, pattern = SUITES[2].protocol_name, SUITES[2].pattern
    one, two = (
        noise.handshake(name, pattern, initiator=initiator, prologue=b"", s=KeyPair.generate())
        for initiator in (True, False)
    )
    first = next(one)
    next(two)
    second = two.send(first)
    one.send(None)
    third = one.send(second)
    two.send(None)
    with contextlib.suppress(StopIteration):
        two.send(third)
    try:
        one.send(None)
    except StopIteration as finished:
        split: Split = finished.value
        return split
    raise AssertionError("the handshake has three messages")


def _cipher(start: int = 0) -> CipherState:
    """The direction from R to I, before record number `start`."""
    cipher = CipherState(_split().receiving.k)
    cipher.n = start
    return cipher


def _session(cipher: CipherState, budget: Budget) -> Session:
    """I's session."""
    evidence = Evidence(Provider.NONE, NO_CLAIMS, b"", ())
    binding = Binding("R", Provider.NONE, _split().h, _split().rs, NO_CLAIMS)
    result = AcceptUnattested().verify(evidence, binding)
    opener = Opener(cipher, {}, budget)
    sealer = Sealer(CipherState(_split().sending.k))
    return Session(sealer, opener, result, evidence, binding, max_message=MAX_MESSAGE, clock=lambda: 0.0)


def records(data: bytes) -> None:
    """Honest records, altered on the way: u8 near the rekey or not | u8 bytes fed at once | u8 messages | u16 length of
    each | edits. What is delivered must be a beginning of what was sent, and the end must be noticed."""
    near, piece, count = (*data[:3], 0, 0, 0)[:3]
    count = min(count % 4, len(data[3:]) // 2)
    sizes = [size % (MAX_MESSAGE + 1) for size in struct.unpack_from(f">{count}H", data, 3)] if count else []
    sealer = Sealer(_cipher(1023 if near & 1 else 0))
    sent = [bytes([number]) * size for number, size in enumerate(sizes, 1)]
    parts = [sealer.seal(Type.MESSAGE, message) for message in sent]
    stream = b"".join([*parts, sealer.seal(Type.CLOSE, struct.pack(">Q", sealer.messages))])
    came = edited(stream, edits_of(data[3 + 2 * count :]), 0)
    budget, delivered, whole = Budget(2**20), [], False
    session = _session(_cipher(1023 if near & 1 else 0), budget)
    try:
        for start in range(0, len(came), piece + 1):
            session.feed(came[start : start + piece + 1])
            while (message := session.next_message()) is not None:
                delivered.append(message)
        session.eof()
    except Closed:
        whole = True
        raise
    finally:
        session.discard()
        assert budget.held == 0, "memory is held for a dead session"
        assert delivered == sent[: len(delivered)], "something else was delivered than was sent"
        assert not whole or came.startswith(stream), "the end of an altered stream was taken for the end"
        assert whole or came != stream, "an honest stream was refused"


def authentic_records(data: bytes) -> None:
    """What a peer with the keys sends in a session: each u16 length | plaintext of a record."""
    budget, cipher = Budget(8 * MAX_MESSAGE + 65536), _cipher()
    session = _session(_cipher(), budget)
    try:
        for plaintext in _plaintexts(data):
            session.feed(record(cipher, plaintext))
            while (message := session.next_message()) is not None:
                assert len(message) <= MAX_MESSAGE, "a message above the limit"
        session.eof()
    finally:
        session.discard()
        assert budget.held == 0, "memory is held for a dead session"


def first_records(data: bytes) -> None:
    """What a peer with the keys sends before its evidence is accepted."""
    budget, cipher = Budget(2**20), _cipher()
    split = Split(CipherState(_split().sending.k), _cipher(), _split().h, _split().rs, ())
    unknown = link._Stranger(split, bytes(32), "I", budget)
    stream = b"".join(record(cipher, plaintext) for plaintext in _plaintexts(data))
    try:
        session, _, _ = meet(unknown.verify(VERIFIER, MAX_MESSAGE), stranger(stream), [])
    finally:
        assert budget.held == 0, "what a peer made us hold outlives it"
    assert session is None, "evidence for another handshake was accepted"


def _plaintexts(data: bytes) -> Iterator[bytes]:
    while data:
        (size,) = struct.unpack(">H", data[:2].ljust(2, b"\0"))
        yield data[2 : 2 + size]
        data = data[2 + size :]


def seeds() -> dict[str, list[bytes]]:
    """Inputs that reach far, for each target."""
    edit = struct.Struct(">BHB").pack
    found: dict[str, list[bytes]] = {}
    found["records"] = [
        struct.pack(">BBB", near, piece, len(sizes)) + struct.pack(f">{len(sizes)}H", *sizes) + edits
        for near, piece, sizes, edits in (
            (0, 255, (), b""), (1, 255, (0, 300, 4096), b""), (0, 6, (5,), b""), (1, 200, (9,), edit(0, 300, 2)),
            (0, 255, (1, 2), edit(3, 0, 255)), (0, 255, (1, 2), edit(1, 274, 255)),
        )
    ]  # fmt: skip
    plain = [
        (2, 1, 3, b"body\0\0\0"), (5, 1, 0, b""), (4, 1, 0, struct.pack(">Q", 1)), (3, 1, 0, b"\1"), (2, 0, 0, b"part"),
        (2, 1, 0, bytes(MAX_MESSAGE)), (2, 0, 9, bytes(9)), (1, 1, 0, b"late"), (4, 1, 0, bytes(8)),
    ]  # fmt: skip
    ruled = [struct.pack(">BBH", *head) + body for *head, body in plain]
    sized = [struct.pack(">H", len(one)) + one for one in ruled]
    found["authentic-records"] = [*sized, sized[0] + sized[2], sized[4] * 3 + sized[0], sized[1] * 3]
    binding = Binding("R", Provider.MOCK, _split().h, _split().rs, CLAIMS)
    body = link.dump_attest(ATTESTER.attest(binding))
    attests = [(1, 1, 0, body), (1, 0, 0, body), (3, 1, 0, b"\3"), (2, 1, 0, b"early"), (1, 0, 5, bytes(5))]
    firsts = [struct.pack(">BBH", *head) + body for *head, body in attests]
    found["first-records"] = [struct.pack(">H", len(one)) + one for one in firsts]
    return found
