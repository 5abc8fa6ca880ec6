"""A client and a stage whose links share no code with ours: noiseprotocol, msgpack, hashlib and a socket, written from
the page.

The client completes the handshake with a real stage, checks its evidence with its own arithmetic, and gets the tokens.
The stage, the first of two, makes evidence of its own and asks the real second one with batches.
"""

import hashlib
import hmac
import json
import math
import socket
import struct
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from made import SMALL, cut, random_tensors, write
from noise.connection import Keypair, NoiseConnection
from processes import Stages

import minigpt


class Stranger:
    """Link protocol, version 2, suite 1, from the initiator's end, to the stage `peer`."""

    def __init__(self, port: int, manifest: bytes, own: int = 0xFFFF, peer: int = 0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        preamble = b"mGPT\x02\x01\0\0"
        self.noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
        self.noise.set_as_initiator()
        prologue = b"MGPT-LINK-v2" + preamble + hashlib.sha256(manifest).digest() + struct.pack(">HH", own, peer)
        self.noise.set_prologue(prologue)
        self.noise.set_keypair_from_private_bytes(Keypair.STATIC, hashlib.sha256(b"a stranger").digest())
        self.key = self.noise.noise_protocol.keypairs["s"].public_bytes
        self.noise.start_handshake()
        self.socket.sendall(preamble)
        first = bytes(self.noise.write_message())
        self._frame(first)
        key = hashlib.sha256(b"MGPT-LINK-v2 mac1" + manifest).digest()
        signed = prologue + struct.pack(">H", len(first)) + first
        self.socket.sendall(hmac.new(key, signed, hashlib.sha256).digest()[:16])
        self.noise.read_message(self._read_frame())
        self.stage_key = self.noise.noise_protocol.handshake_state.rs.public_bytes
        self._frame(self.noise.write_message())
        self.h = self.noise.get_handshake_hash()

    def _frame(self, data: bytes) -> None:
        self.socket.sendall(struct.pack(">H", len(data)) + data)

    def _read_frame(self) -> bytes:
        def exactly(count: int) -> bytes:
            data = b""
            while len(data) < count:
                part = self.socket.recv(count - len(data))
                assert part
                data += part
            return data

        return exactly(struct.unpack(">H", exactly(2))[0])

    def send(self, kind: int, body: bytes) -> None:
        padding = bytes(max(0, 256 - len(body)))
        self._frame(self.noise.encrypt(struct.pack(">BBH", kind, 1, len(padding)) + body + padding))

    def receive(self) -> tuple[int, bytes]:
        body, flags, kind = b"", 0, 0
        while not flags:
            plaintext = self.noise.decrypt(self._read_frame())
            kind, flags, padding = struct.unpack(">BBH", plaintext[:4])
            body += plaintext[4 : len(plaintext) - padding]
        return kind, body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "small", SMALL, random_tensors(SMALL))


def test_a_client_of_other_code_completes_the_handshake_and_gets_the_tokens(folder: Path, tmp_path: Path) -> None:
    with Stages(folder, "2+2", tmp_path, suites=[1]) as stages:
        stages.start_all()
        client = Stranger(stages.ports[0], stages.bytes)

        kind, body = client.receive()
        version, provider, length = struct.unpack(">BBH", body[:4])
        claims, rest = body[4 : 4 + length], body[4 + length :]
        evidence, rest = rest[4 : 4 + 226], rest[4 + 226 :]
        endorsement = rest[5:]
        assert (kind, version, provider, len(endorsement)) == (1, 1, 1, 117)
        digest = hashlib.sha512(
            b"minigpt attestation binding v1\0R\x01" + client.h + client.stage_key + hashlib.sha256(claims).digest()
        ).digest()
        assert evidence[65:129] == digest
        eddsa.new(eddsa.import_public_key(stages.root.public), "rfc8032").verify(endorsement[:-64], endorsement[-64:])
        assert endorsement[11:43] == evidence[130:162]
        eddsa.new(eddsa.import_public_key(endorsement[11:43]), "rfc8032").verify(evidence[:-64], evidence[-64:])
        assert msgpack.unpackb(claims)["manifest"] == hashlib.sha256(stages.bytes).digest()

        client.send(1, b"\x01\x00\x00\x01\x80" + bytes(4) + b"\0")  # no evidence, and the claims of a client without
        sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "repetition_penalty": 1.0}
        prompt = [5, 6, 7]
        request = {"type": "generate", "start": 0, "ids": struct.pack("<3I", *prompt), "max_tokens": 6, "stop_ids": b"",
                   "sampling": sampling, "logprobs": False, "wanted": "token", "draft": 0}  # fmt: skip
        client.send(2, msgpack.packb(request))
        found = []
        while (message := msgpack.unpackb(client.receive()[1]))["type"] == "token":
            found += struct.unpack("<I", message["ids"])
        assert message == {"type": "done", "reason": "length"}
        assert found == [token.id for token in minigpt.load(str(folder)).generate(prompt, max_tokens=6)]
        client.send(4, struct.pack(">Q", 1))
        client.socket.close()


def signed(key: Any, data: bytes) -> bytes:
    return data + eddsa.new(key, "rfc8032").sign(data)


def attest(stranger: Stranger, stages: Stages) -> bytes:
    """The body of ATTEST of stage 0, with a key that the root endorses."""
    manifest = json.loads(stages.bytes)
    entry = manifest["stages"][0]
    claims = msgpack.packb(
        {
            "end": entry["layers"][1],
            "first": entry["layers"][0],
            "manifest": hashlib.sha256(stages.bytes).digest(),
            "stage": 0,
            "weights": bytes.fromhex(entry["weights_sha256"]),
        }
    )
    binding = hashlib.sha512(
        b"minigpt attestation binding v1\0I\x01" + stranger.h + stranger.key + hashlib.sha256(claims).digest()
    ).digest()
    key = ECC.construct(curve="Ed25519", seed=hashlib.sha256(b"the key of stage 0").digest())
    public = key.public_key().export_key(format="raw")
    now = int(time.time() * 1000)
    measurement = bytes.fromhex(entry["evidence"]["measurements"][0])
    evidence = signed(key, b"MGPTMOCK\x01" + struct.pack(">Q", now) + measurement + binding + b"\0" + public)
    root = ECC.construct(curve="Ed25519", seed=stages.root.private)
    endorsement = signed(root, b"MGPTMOCKCA\x01" + public + struct.pack(">HQ", 0, now + 3_600_000))
    assert (len(evidence), len(endorsement)) == (226, 117)
    return b"".join(
        [
            struct.pack(">BBH", 1, 1, len(claims)) + claims,
            struct.pack(">I", len(evidence)) + evidence,
            struct.pack(">BI", 1, len(endorsement)) + endorsement,
        ]
    )


NOTHING, TOKEN, TOKENS, LOGITS = range(4)


class Asking:
    """The sender of batches on a link."""

    def __init__(self, link: Stranger) -> None:
        self.link = link

    def send(
        self,
        segments: list[tuple[int, int, int, int]],
        hidden: Any = (),
        terms: list[tuple[int, int, int]] | None = None,
        ended: tuple[int, ...] = (),
    ) -> None:
        parts = [
            b"".join(struct.pack("<4I", *segment) for segment in segments),
            b"",  # no segment here needs ids
            b"".join(
                struct.pack("<3I2BHQ6d", lane, positions, 0, flags, 0, 0, 0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
                for lane, positions, flags in terms or []
            ),
            b"",
            struct.pack(f"<{len(ended)}I", *ended),
            np.asarray(hidden, "<f4").tobytes(),
        ]
        self.link.send(2, msgpack.packb(parts))

    def answers(self) -> list[bytes]:
        kind, body = self.link.receive()
        assert kind == 2
        found = msgpack.unpackb(body)
        assert type(found) is list, found
        return found


def test_a_stage_of_other_code_asks_the_next_one_with_batches(folder: Path, tmp_path: Path) -> None:
    first, last = cut(SMALL, random_tensors(SMALL), 2)
    prompt, other = [5, 6, 7], [11, 12, 13, 14]
    plain = [token.id for token in minigpt.load(str(folder)).generate(prompt, max_tokens=2)]
    caches = first.new_cache(), first.new_cache()

    def rows(which: int, ids: list[int]) -> Any:
        return first.forward(first.embed(ids, caches[which].length), [(caches[which], len(ids))])

    with Stages(folder, "2+2", tmp_path, suites=[1]) as stages:
        stages.start(1)
        link = Stranger(stages.ports[1], stages.bytes, own=0, peer=1)
        assert link.receive()[0] == 1
        link.send(1, attest(link, stages))
        ask = Asking(link)
        ask.send([])
        assert ask.answers() == [b""] * 7

        # Lane 0 wants a token, lane 1 begins, and lane 7 was never opened.
        mine, theirs = rows(0, prompt), rows(1, other[:2])
        ask.send(
            [(0, 0, 3, TOKEN), (7, 0, 1, TOKEN), (1, 0, 2, NOTHING)],
            np.concatenate([mine, mine[:1], theirs]),
            [(0, 8, 3), (1, 8, 0)],
        )
        results, ids, logprobs, top, spans, logits, refusals = ask.answers()
        assert results == bytes([1, 1, 3, 0, 0, 0])
        assert struct.unpack("<I", ids) == (plain[0],)
        cache = last.new_cache()
        scores = last.logits(last.forward(mine, [(cache, 3)]))[-1].astype(np.float64)
        expected = scores[plain[0]] - scores.max() - math.log(np.exp(scores - scores.max()).sum())
        assert struct.unpack("<d", logprobs)[0] == pytest.approx(expected, abs=1e-4)
        seconds = struct.unpack("<5d", spans)
        assert seconds[0] > 0
        assert seconds[1:] == (0.0, 0.0, 0.0, 0.0)
        assert (top, logits) == (b"", b"")
        ((stage, reason, _),) = msgpack.unpackb(refusals)
        assert (stage, reason) == (1, "lane")

        # Two batches at once: the answers come in their order. Lane 0 goes on and ends, lane 1 wants its logits.
        mine, theirs = rows(0, [plain[0]]), rows(1, other[2:])
        ask.send([(0, 3, 1, TOKEN)], mine)
        ask.send([(1, 2, 2, LOGITS)], theirs, ended=(0,))
        results, ids, *_ = ask.answers()
        assert (results, struct.unpack("<I", ids)) == (b"\x01\x01", (plain[1],))
        results, _, _, _, _, logits, _ = ask.answers()
        assert (results, len(logits)) == (b"\x02\x00", 4 * 97)
        whole = minigpt.load(str(folder)).logits(other)[-1]
        np.testing.assert_allclose(np.frombuffer(logits, "<f4"), whole, atol=1e-4)

        # Nothing answers a batch that only ends lanes; a lane's number is not used again.
        ask.send([], ended=(1,))
        ask.send([(1, 0, 1, TOKEN)], mine, [(1, 8, 0)])
        results, *_, refusals = ask.answers()
        assert (results, msgpack.unpackb(refusals)[0][1]) == (b"\x03\x00", "lane")

        # A lane that is not the next one ends the link, and so would any other broken batch.
        ask.send([(9, 0, 1, TOKEN)], mine, [(9, 8, 0)])
        failure = msgpack.unpackb(link.receive()[1])
        assert (failure["type"], failure["stage"], failure["reason"]) == ("failure", 1, "failed")
        assert link.receive()[0] == 4
        link.socket.close()
