"""A client that shares no code with ours: noiseprotocol, msgpack, hashlib and a socket, written from the page.

It completes the handshake with a real stage, checks the stage's evidence with its own arithmetic, and gets the tokens.
"""

import hashlib
import socket
import struct
from pathlib import Path

import msgpack
import pytest
from Crypto.Signature import eddsa
from made import SMALL, random_tensors, write
from noise.connection import Keypair, NoiseConnection
from processes import Stages

import minigpt


class Stranger:
    """Link protocol, version 1, suite 1, from the initiator's end."""

    def __init__(self, port: int, manifest: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        preamble = b"mGPT\x01\x01\0\0"
        self.noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
        self.noise.set_as_initiator()
        self.noise.set_prologue(
            b"MGPT-LINK-v1" + preamble + hashlib.sha256(manifest).digest() + struct.pack(">HH", 0xFFFF, 0)
        )
        self.noise.set_keypair_from_private_bytes(Keypair.STATIC, hashlib.sha256(b"a client").digest())
        self.noise.start_handshake()
        self.socket.sendall(preamble)
        self._frame(self.noise.write_message())
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
        sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
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
