"""Malicious ends in their places: who they pretend to be, and whom they meet.

They know the manifest, and have whatever keys the attack says that they have.

    as_client …     a Rogue that has connected to a stage; `admitted_…` if the stage has accepted it
    FakeStage       listens where a stage should, and lets a function play each connection's responder
    Independent     the same handshake by PyPI's noiseprotocol, which shares no code with this project
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
from noise.connection import Keypair, NoiseConnection
from numpy.typing import NDArray

from attacks.arena import Pipes
from attacks.rogue import FIN, PATIENCE, Record, Rogue
from attest.providers.mock import MockAttester, MockKey
from minigpt.protocol import messages
from minigpt.protocol.messages import Generate, Tokens
from transport.link import CLIENT, SUITES
from transport.noise import KeyPair

HOUR = 3600 * 1000  # milliseconds


def as_client(pipes: Pipes, *, direct: bool = False, **more: Any) -> Rogue:
    """A malicious client at stage 0: through its proxy, or past it, at the stage's own port."""
    options = {"suite": pipes.manifest.suites[0]} | more
    return Rogue(connect(pipes, 0, direct=direct), "I", pipes.manifest, CLIENT, 0, **options)


def as_stage_before(pipes: Pipes, index: int = 1, *, direct: bool = False, **more: Any) -> Rogue:
    """A malicious stage index - 1 at stage `index`, likewise."""
    options = {"suite": pipes.manifest.suites[0]} | more
    return Rogue(connect(pipes, index, direct=direct), "I", pipes.manifest, index - 1, index, **options)


def admitted_client(pipes: Pipes, **more: Any) -> Rogue:
    """A malicious client that stage 0 has accepted."""
    made = as_client(pipes, **more).shake()
    made.hear_attest()
    made.attest()
    return made


def admitted_stage(pipes: Pipes, **more: Any) -> Rogue:
    """A malicious stage 0, with stage 0's genuine key, that stage 1 has accepted."""
    made = as_stage_before(pipes, **more).shake()
    made.hear_attest()
    made.attest(genuine(pipes, 0))
    return made


def connect(pipes: Pipes, index: int, *, direct: bool = False) -> socket.socket:
    port = pipes.ports[index] if direct else pipes.proxies[index].port
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def genuine(pipes: Pipes, index: int, **more: Any) -> MockAttester:
    """What a stage that runs the pinned code says of itself; `more` are options of MockAttester."""
    key = more.pop("key", None) or key_of(pipes, index)
    claims = more.pop("claims", pipes.manifest.claims(index))
    (pinned,) = pipes.manifest.stages[index].pins.measurements
    return MockAttester(key, claims, **{"measurement": pinned} | more)


def key_of(pipes: Pipes, index: int, lives: int = HOUR) -> MockKey:
    """A key that the pipeline's root endorses for a stage, for so many milliseconds."""
    return MockKey.generate(pipes.root, index, int(time.time() * 1000) + lives)


def generate_map(ids: Sequence[int] | bytes, most: int = 3, **changes: Any) -> dict[str, Any]:
    """A Generate as it travels, with fields that may be changed to anything."""
    made = dict(messages.encode(Generate(0, tuple(ids) if not isinstance(ids, bytes) else (0,), most)))
    return made | ({"ids": ids} if isinstance(ids, bytes) else {}) | changes


NOTHING, TOKEN, TOKENS, LOGITS, SCORES = range(5)  # wanted of a segment


class Segment(NamedTuple):
    """Rows of a lane in a batch, as they travel: any numbers of 32 bits."""

    lane: int = 0
    start: int = 0
    rows: int = 1
    wanted: int = TOKEN


def terms(
    lane: int = 0,
    positions: int = 16,
    top_k: int = 0,
    flags: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top: int = 0,
    biases: int = 0,
    min_p: float = 0.0,
    repetition: float = 1.0,
    others: Sequence[float] = (0.0, 0.0),
) -> bytes:
    """The terms of a lane as they travel."""
    penalties = (min_p, repetition, *others)
    return struct.pack("<IIIBBHQ6d", lane, positions, top_k, flags, top, biases, 0, temperature, top_p, *penalties)


def batch(
    rows: NDArray[np.float32] | bytes,
    *segments: Segment,
    terms: bytes = b"",
    ended: Sequence[int] = (),
    given: Sequence[int] = (),
    biases: bytes = b"",
) -> list[Any]:
    """A batch as it travels, whether its parts add up or not."""
    return [
        b"".join(struct.pack("<4I", *segment) for segment in segments),
        struct.pack(f"<{len(given)}I", *given),
        terms,
        biases,
        struct.pack(f"<{len(ended)}I", *ended),
        rows if isinstance(rows, bytes) else rows.astype("<f4").tobytes(),
    ]


def segments(message: Any) -> list[Segment]:
    """Those of a batch that stage 0 sent; none if it is something else."""
    return [Segment(*fields) for fields in struct.iter_unpack("<4I", message[0])] if type(message) is list else []


def answers(
    *kinds: tuple[int, int], ids: bytes = b"", rest: Sequence[bytes] = (b"", b"", b"", b""), top: bytes = b""
) -> list[Any]:
    """Answers to a batch as they travel: kinds of results with their counts; ids, and log-probabilities, spans,
    logits and refusals."""
    return [b"".join(map(bytes, kinds)), ids, rest[0], top, *rest[1:]]


def results(message: list[Any]) -> list[str]:
    """What each of the answers to a batch is: "nothing", "token", "logits", or "refusal: reason"."""
    told = iter(msgpack.unpackb(message[6]) if message[6] else ())
    names = ("nothing", "token", "logits")
    return [
        names[kind] if kind < len(names) else f"refusal: {next(told)[1]}"
        for kind, _ in struct.iter_unpack("BB", message[0])
    ]


def token_map(position: int) -> dict[str, Any]:
    """A Tokens as it travels, for a position that may be anything."""
    return dict(messages.encode(Tokens(0, (0,)))) | {"position": position}


class FakeStage:
    """Listens in the place of a stage, and lets `play` be the responder of each connection.

    Attributes:
        results: what `play` returned, or the error that it ended with.
    """

    def __init__(self, pipes: Pipes, index: int, play: Callable[[Rogue], Any], static: KeyPair | None = None) -> None:
        self._pipes, self._index, self._play, self._static = pipes, index, play, static
        self.results: list[Any] = []
        self._upstream = pipes.proxies[index].upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeStage:
        for proxy in self._pipes.proxies:
            proxy.reset()
        self._pipes.proxies[self._index].upstream = self._listener.getsockname()[1]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipes.proxies[self._index].upstream = self._upstream
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._pipes.proxies[self._index].reset()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        caller = CLIENT if self._index == 0 else self._index - 1
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            manifest = self._pipes.manifest
            rogue = Rogue(sock, "R", manifest, self._index, caller, suite=manifest.suites[0], static=self._static)
            with rogue:
                try:
                    self.results.append(self._play(rogue))
                except Exception as error:  # what ended it is what the other end did
                    self.results.append(error)


class Independent:
    """A client whose handshake and records are PyPI's noiseprotocol's, which knows suite 1 only."""

    def __init__(self, pipes: Pipes) -> None:
        self._sock = connect(pipes, 0)
        preamble = b"mGPT\x02\x01\x00\x00"
        prologue = b"MGPT-LINK-v2" + preamble + hashlib.sha256(pipes.bytes).digest() + b"\xff\xff\x00\x00"
        key = hashlib.sha256(b"MGPT-LINK-v2 mac1" + pipes.bytes).digest()
        self._noise = NoiseConnection.from_name(SUITES[1].protocol_name)
        self._noise.set_as_initiator()
        self._noise.set_prologue(prologue)
        self._noise.set_keypair_from_private_bytes(Keypair.STATIC, KeyPair.generate().private)
        self._noise.start_handshake()
        self._plain = Rogue(self._sock, "I", pipes.manifest, CLIENT, 0, suite=1)  # for its bytes only
        self._sent = self._received = 0
        first = self._framed(self._noise.write_message())
        self._plain.write(preamble + first + hmac.new(key, prologue + first, hashlib.sha256).digest()[:16])
        self._noise.read_message(self._plain.frame())
        self._plain.write(self._framed(self._noise.write_message()))

    @staticmethod
    def _framed(data: bytes | bytearray) -> bytes:
        return len(data).to_bytes(2, "big") + bytes(data)

    def say(self, kind: int, body: bytes) -> None:
        if self._sent and self._sent % 1024 == 0:
            self._noise.rekey_outbound_cipher()
        self._sent += 1
        padding = max(0, 256 - len(body))
        head = bytes([kind, FIN]) + padding.to_bytes(2, "big")
        self._plain.write(self._framed(self._noise.encrypt(head + body + bytes(padding))))

    def hear(self) -> Record:
        if self._received and self._received % 1024 == 0:
            self._noise.rekey_inbound_cipher()
        self._received += 1
        plaintext = bytes(self._noise.decrypt(self._plain.frame()))
        padding = int.from_bytes(plaintext[2:4], "big")
        return Record(plaintext[0], plaintext[1], plaintext[4 : len(plaintext) - padding])

    def close(self) -> None:
        self._sock.close()
