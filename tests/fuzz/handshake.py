"""A handshake under attack, for `fuzz.py`: one end is ours, the other is the input's choice, by its first byte:

    0  a stranger, whose bytes are the rest of the input
    1  an honest peer with somebody in between: the rest is edits, each u8 kind | u16 place | u8 value
    2  an insider, who speaks Noise but chooses his public values, payloads and the plaintexts of his first records:
       the rest is chunks, each u8 which | u16 length | bytes

Ephemeral keys are fresh in every run; what is asserted does not depend on them.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import struct
from collections.abc import Generator, Iterator
from unittest.mock import patch

from attest import AcceptUnattested, AttestationError, Binding, Provider, Unattested
from attest.policy import Policy
from attest.providers import mock
from transport import link, noise
from transport.errors import TransportError, Truncated
from transport.kem import KemKey, encapsulate
from transport.link import CLIENT, SUITES, End, Session
from transport.noise import CipherState, KeyPair, Split
from transport.records import MAX_PLAINTEXT, REKEY_INTERVAL, Budget, Sealer, Type

NOW = 1_800_000_000  # seconds since 1970: the time in every target
MANIFEST_SHA256 = hashlib.sha256(b"manifest").digest()
MAC_KEY = link.mac_key(b"manifest")
CLAIMS = b"\x81\xa5stage\x00"
MEASUREMENT = hashlib.sha384(b"code").digest()
ROOT = mock.MockRoot(hashlib.sha256(b"root").digest())
_KEY = hashlib.sha256(b"key").digest()
KEY = mock.MockKey(_KEY, ROOT.endorse(mock.MockRoot(_KEY).public, 0, (NOW + 86400) * 1000))
ATTESTER = mock.MockAttester(KEY, CLAIMS, measurement=MEASUREMENT, clock=lambda: NOW)
VERIFIER = mock.MockVerifier(ROOT.public, Policy(Provider.MOCK, frozenset([MEASUREMENT]), CLAIMS, 0), clock=lambda: NOW)

Steps = Generator[bytes | int, bytes | None, Session | None]


def _end(role: str, suite: int) -> End:
    if role == "I":
        return End(Unattested(), VERIFIER, MANIFEST_SHA256, MAC_KEY, CLIENT, 0, suites=(suite,))
    return End(ATTESTER, AcceptUnattested(), MANIFEST_SHA256, MAC_KEY, 0, CLIENT, suites=(suite,))


def handshake(role: str, suite: int, data: bytes) -> None:
    """The end `role` ("I" or "R") meets the peer that `data` describes."""
    steps = {"I": link.initiate, "R": link.respond}
    theirs = "R" if role == "I" else "I"
    kind, rest = data[:1], data[1:]
    peer: Steps
    if kind == b"\1":
        peer = steps[theirs](_end(theirs, suite))
    elif kind == b"\2":
        peer = _insider(theirs, suite, list(_chunks(rest)))
    else:
        peer = stranger(rest)
    budget = Budget(2**20)
    try:
        session, given, sent = meet(
            steps[role](_end(role, suite), budget=budget), peer, edits_of(rest) if kind == b"\1" else []
        )
    finally:
        assert budget.held == 0, "what a peer made us hold outlives the handshake"
    if session is not None:
        assert kind in (b"\1", b"\2"), "a stranger has a session"
        assert sent.startswith(given), "a session in spite of what was altered"


def meet(victim: Steps, peer: Steps, edits: list[tuple[int, int, int]]) -> tuple[Session | None, bytes, bytes]:
    """Runs both against each other. Returns the victim's session, the bytes it took, and those that the peer sent.

    None for the session if the victim is left waiting; its driver is then told that the connection has ended.
    """
    alive, outbox = True, bytearray()  # of the peer; what the victim said to it
    asked = next(peer)
    inbox, given, sent = bytearray(), bytearray(), bytearray()
    try:
        wanted = next(victim)
        while True:
            if isinstance(wanted, bytes):
                outbox += wanted
                wanted = victim.send(None)
                continue
            if len(inbox) >= wanted:
                piece = bytes(inbox[:wanted])
                del inbox[:wanted]
                given += piece
                wanted = victim.send(piece)
                continue
            moved = False
            while alive and (isinstance(asked, bytes) or len(outbox) >= asked):
                moved = True
                try:
                    if isinstance(asked, bytes):
                        inbox += edited(asked, edits, len(sent))
                        sent += asked
                        asked = peer.send(None)
                    else:
                        piece = bytes(outbox[:asked])
                        del outbox[:asked]
                        asked = peer.send(piece)
                except (StopIteration, TransportError, AttestationError):
                    alive = False
            if not moved:
                victim.throw(Truncated("the connection ended"))
    except StopIteration as finished:
        return finished.value, bytes(given), bytes(sent)


def stranger(data: bytes) -> Steps:
    yield data
    return None


def _insider(role: str, suite: int, chunks: list[tuple[int, bytes]]) -> Steps:
    """A peer that follows the handshake with chosen values; see `_Insider`. Chunk 3 is a payload, 4 a record."""
    chosen = {("e", "s", "kem")[which]: value for which, value in chunks if which < 3}
    payloads = [value for which, value in chunks if which == 3]
    preamble = struct.pack(">4sBBxx", b"mGPT", link.VERSION, suite)
    if role == "I":
        yield preamble
    else:
        yield 8
    opening = True  # message 1 has a mac behind it
    ids = struct.pack(">HH", CLIENT, 0)
    s = KeyPair.from_private(hashlib.sha256(b"insider").digest())
    prologue = b"MGPT-LINK-v2" + preamble + MANIFEST_SHA256 + ids
    patterns = SUITES[suite]
    steps = noise.handshake(
        patterns.protocol_name, patterns.pattern, initiator=role == "I", prologue=prologue, s=s, payloads=payloads
    )
    with patch.object(noise, "_State", functools.partial(_Insider, chosen)):
        outgoing = next(steps)
    try:
        while True:
            if outgoing is None:
                length = yield 2
                assert length is not None
                message = yield int.from_bytes(length, "big")
                assert message is not None
                if opening:
                    yield link.MACLEN
                if b"" in (chosen.get("e"), chosen.get("s")):  # an echo of what the victim showed
                    chosen.update({name: message[:32] for name in ("e", "s") if chosen.get(name) == b""})
                outgoing = steps.send(message)
            else:
                framed = len(outgoing).to_bytes(2, "big") + outgoing
                yield framed + mac(prologue, framed) if opening else framed
                outgoing = steps.send(None)
            opening = False
    except StopIteration as finished:
        split: Split = finished.value
    for which, plaintext in chunks:
        if which == 4:
            yield record(split.sending, plaintext)
    if not any(which == 4 for which, _ in chunks):  # then he is honest about himself
        attester = _end(role, suite).attester
        binding = Binding(role, attester.provider, split.h, s.public, attester.claims)
        yield Sealer(split.sending).seal(Type.ATTEST, link.dump_attest(attester.attest(binding)))
    return None


def mac(prologue: bytes, framed: bytes) -> bytes:
    return hmac.digest(MAC_KEY, prologue + framed, "sha256")[: link.MACLEN]


class _Insider(noise._State):
    """HandshakeState whose public values are the input's, cut or filled up to their length."""

    def __init__(self, chosen: dict[str, bytes], *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.chosen = chosen

    def write(self, token: str) -> bytes:
        value = self.chosen.get("kem" if token in ("e1", "ekem1") else token)
        if value is None:
            return super().write(token)
        value = value[: noise._PUBLIC[token]].ljust(noise._PUBLIC[token], b"\0")
        if token == "e":
            self.own["e"] = KeyPair.generate()
            self.symmetric.mix_hash(value)
            return value
        if token == "e1":
            self.e1 = KemKey()
        written = self.symmetric.encrypt_and_hash(value)
        if token == "ekem1":
            self.symmetric.mix_key(encapsulate(self.public["re1"])[1])
        return written


def record(cipher: CipherState, plaintext: bytes) -> bytes:
    """A record of any plaintext: authentic, however malformed."""
    if cipher.n % REKEY_INTERVAL == 0 and cipher.n:
        cipher.rekey()
    ciphertext = cipher.encrypt_with_ad(b"", plaintext[:MAX_PLAINTEXT])
    return struct.pack(">H", len(ciphertext)) + ciphertext


def _chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        size = int.from_bytes(data[1:3], "big")
        yield data[0] % 5, data[3 : 3 + size]
        data = data[3 + size :]


def edits_of(data: bytes) -> list[tuple[int, int, int]]:
    whole = data[: len(data) // 4 * 4][:64]
    return sorted(((place, kind % 4, value) for kind, place, value in struct.iter_unpack(">BHB", whole)), reverse=True)


def edited(data: bytes, edits: list[tuple[int, int, int]], start: int) -> bytes:
    """The part `data` of a stream, from byte `start` on, with those edits that fall into it, the last place first."""
    altered = bytearray(data)
    for place, kind, value in edits:
        at = place - start
        if 0 <= at < len(altered):
            if kind == 0:
                altered[at] ^= value
            elif kind == 1:
                del altered[at : at + 1 + value]
            elif kind == 2:
                altered[at:at] = bytes([value])
            else:
                altered[at:at] = altered[at : at + 1 + value]  # a replay
    return bytes(altered)


def seeds() -> dict[str, list[bytes]]:
    """Inputs that reach far, for each target."""
    edit = struct.Struct(">BHB").pack

    def chunk(which: int, value: bytes) -> bytes:
        return bytes([which]) + struct.pack(">H", len(value)) + value

    found: dict[str, list[bytes]] = {}
    for suite in (1, 2):
        preamble = struct.pack(">4sBBxx", b"mGPT", link.VERSION, suite)
        lengths = SUITES[suite].lengths
        point = KeyPair.from_private(bytes(32)).public
        kem = KemKey().public if suite == 2 else b""
        ordinary = [b"\1", b"\1" + edit(0, 9, 1), b"\1" + edit(3, 10, 40)]
        ordinary += [b"\2", b"\2" + chunk(3, b"payload"), b"\2" + chunk(0, point), b"\2" + chunk(0, bytes(32))]
        ordinary += [b"\2" + chunk(1, bytes(32)), b"\2" + chunk(0, b""), b"\2" + chunk(1, b"")]
        ordinary += [b"\2" + chunk(2, b"\xff" * 1184), b"\2" + chunk(2, kem or bytes(16))]
        ordinary += [b"\2" + chunk(4, struct.pack(">BBH", 1, 0, 0) + b"part of an ATTEST")]
        ordinary += [b"\2" + chunk(4, struct.pack(">BBH", 3, 1, 0) + b"\2")]
        first = struct.pack(">H", lengths[0]) + (point + kem).ljust(lengths[0], b"\0")
        prologue = b"MGPT-LINK-v2" + preamble + MANIFEST_SHA256 + struct.pack(">HH", CLIENT, 0)
        first = preamble + first + mac(prologue, first)
        second = struct.pack(">H", lengths[1]) + point.ljust(lengths[1], b"\0")
        found[f"respond-{suite}"] = [b"\0" + first, b"\0" + first + struct.pack(">H", 64) + bytes(64), *ordinary]
        found[f"initiate-{suite}"] = [b"\0" + second, *ordinary]
    return found
