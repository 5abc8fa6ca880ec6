"""Known answers of the link protocol: every value that docs/protocol.md quotes, from keys that anybody can write down.

    python scripts/known_answers.py        writes docs/known_answers.json

Nothing in it is random and nothing reads a clock, so the file changes only if the protocol does. The handshakes are
spelled out here step by step, on the symmetric state alone; tests/unit/test_known_answers.py holds them against the
link's own code and against another implementation.
"""

import dataclasses
import hashlib
import hmac
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from Crypto.PublicKey import MLKEM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, whatever is installed

from attest import NO_CLAIMS, Binding, Evidence
from attest.document import write_file
from attest.providers import nitro, snp, tdx
from attest.providers.mock import MockAttester, MockKey, MockRoot
from minigpt.engine.sampling import Sampling
from minigpt.protocol import batches, messages
from minigpt.protocol.batches import NO_ROWS, Batch, Given, Result, Segment, Terms
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import (
    Cancel,
    Done,
    Generate,
    Logits,
    Message,
    Reason,
    Refusal,
    Scores,
    Span,
    Status,
    Tokens,
    Wanted,
)
from transport import codec
from transport.link import CLIENT, SUITES, VERSION, dump_attest
from transport.noise import CipherState, KeyPair, SymmetricState
from transport.records import Sealer, Type, padded_size

TARGET = Path(__file__).resolve().parents[1] / "docs" / "known_answers.json"


def run(first: int, count: int = 32) -> bytes:
    """So many bytes that count up from `first`."""
    return bytes((first + i) % 256 for i in range(count))


CLIENT_STATIC = KeyPair.from_private(run(0x00))
STAGE_STATIC = KeyPair.from_private(run(0x20))
CLIENT_EPHEMERAL = KeyPair.from_private(run(0x40))
STAGE_EPHEMERAL = KeyPair.from_private(run(0x60))
ROOT = MockRoot(run(0x80))
STAGE_SIGNING = run(0xA0)
STAGE_SIGNING_PUBLIC = MockRoot(STAGE_SIGNING).public  # a root is an Ed25519 key like any other
MEASUREMENT = run(0xC0, 48)
MADE_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z, when the evidence was made
NOT_AFTER_MS = 1_798_761_600_000  # 2027-01-01T00:00:00Z
KEM_SEED = run(0x10, 64)  # d | z of FIPS 203
KEM_COINS = run(0x50)  # m of FIPS 203

# The eight points whose order divides 8: y is 1, -1, 0 twice, or one of two roots, each with both signs of x.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]

LONG = 70_000  # bytes of the body that takes two records


def manifest() -> str:
    """A manifest of two stages that accepts both suites."""
    pins = {"provider": "mock", "root_key": ROOT.public.hex(), "measurements": [MEASUREMENT.hex()]}
    config = {
        "model_type": "gpt2",
        "vocab_size": 2048,
        "n_positions": 512,
        "n_embd": 120,
        "n_layer": 12,
        "n_head": 6,
        "n_inner": 480,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "eos_token_id": [2047],
    }
    stages = [
        {
            "layers": [6 * index, 6 * index + 6],
            "weights_sha256": run(0xE0 + index).hex(),
            "evidence": pins,
        }
        for index in range(2)
    ]
    fields = {
        "format": "minigpt-pipeline-3",
        "messages": 3,
        "issued": "2026-01-01T00:00:00Z",
        "expires": "2027-01-01T00:00:00Z",
        "model": {"id": "tiny", "revision": None, "tokenizer_sha256": None, "config": config},
        "suites": [1, 2],
        "clients": "any",
        "operators": [],
        "stages": stages,
    }
    return json.dumps(fields, indent=1) + "\n"


class Script:
    """A handshake between a client and stage 0, one operation after the other; `steps` has the state after each."""

    def __init__(self, suite: int, digest: bytes) -> None:
        self.preamble = b"mGPT" + bytes([VERSION, suite, 0, 0])
        self.prologue = b"MGPT-LINK-v2" + self.preamble + digest + CLIENT.to_bytes(2, "big") + bytes(2)
        self.state = SymmetricState(SUITES[suite].protocol_name)
        self.steps: list[dict[str, Any]] = []
        self.message: list[bytes] = []
        self.messages: list[bytes] = []
        self._note("InitializeSymmetric(protocol name)")
        self.state.mix_hash(self.prologue)
        self._note("MixHash(prologue)")

    def clear(self, name: str, data: bytes) -> None:
        self.state.mix_hash(data)
        self.message.append(data)
        self._note(f"MixHash({name})")

    def sealed(self, name: str, data: bytes) -> None:
        written = self.state.encrypt_and_hash(data)
        self.message.append(written)
        self._note(f"EncryptAndHash({name})", output=written.hex())

    def secret(self, name: str, data: bytes) -> None:
        self.state.mix_key(data)
        self._note(f"MixKey({name})", input=data.hex())

    def payload(self) -> None:
        self.sealed("empty payload", b"")
        self.messages.append(b"".join(self.message))
        self.message.clear()

    def _note(self, what: str, **more: str) -> None:
        state = self.state
        key = {} if state.cipher.k is None else {"k": state.cipher.k.hex(), "n": state.cipher.n}
        self.steps.append({"step": what, **more, "h": state.h.hex(), "ck": state.ck.hex(), **key})


def handshake(suite: int, digest: bytes) -> Script:
    script = Script(suite, digest)
    kem = MLKEM.construct(param_set=MLKEM.ML_KEM_768, seed=KEM_SEED)
    script.clear("e of the client", CLIENT_EPHEMERAL.public)
    if suite == 2:
        script.sealed("e1", bytes(kem.ek))
    script.payload()
    script.clear("e of the stage", STAGE_EPHEMERAL.public)
    script.secret("ee", CLIENT_EPHEMERAL.dh(STAGE_EPHEMERAL.public))
    if suite == 2:
        shared, ciphertext = kem._encaps(KEM_COINS)
        script.sealed("ekem1", bytes(ciphertext))
        script.secret("shared secret of ekem1", bytes(shared))
    script.sealed("s of the stage", STAGE_STATIC.public)
    script.secret("es", CLIENT_EPHEMERAL.dh(STAGE_STATIC.public))
    script.payload()
    script.sealed("s of the client", CLIENT_STATIC.public)
    script.secret("se", CLIENT_STATIC.dh(STAGE_EPHEMERAL.public))
    script.payload()
    return script


def told(script: Script, mac_key: bytes) -> dict[str, Any]:
    message = script.messages[0]
    mac = hmac.digest(mac_key, script.prologue + len(message).to_bytes(2, "big") + message, "sha256")[:16]
    first, second = script.state.split()
    assert first.k is not None
    assert second.k is not None
    return {
        "protocol_name": SUITES[script.preamble[5]].protocol_name.decode(),
        "preamble": script.preamble.hex(),
        "prologue": script.prologue.hex(),
        "steps": script.steps,
        "messages": [message.hex() for message in script.messages],
        "mac": mac.hex(),
        "h": script.state.h.hex(),
        "k_i2r": first.k.hex(),
        "k_r2i": second.k.hex(),
    }


def evidence(h: bytes, claims: bytes) -> dict[str, Any]:
    """What both ends say about themselves."""
    key = MockKey(STAGE_SIGNING, ROOT.endorse(STAGE_SIGNING_PUBLIC, 0, NOT_AFTER_MS))
    binding = Binding("R", 1, h, STAGE_STATIC.public, claims)
    made = MockAttester(key, claims, measurement=MEASUREMENT, clock=lambda: MADE_MS / 1000).attest(binding)
    own = Binding("I", 0, h, CLIENT_STATIC.public, NO_CLAIMS)
    return {
        "claims": claims.hex(),
        "binding_r": binding.digest.hex(),
        "evidence": made.evidence.hex(),
        "endorsement": made.endorsements[0].hex(),
        "attest_r": dump_attest(made).hex(),
        "binding_i": own.digest.hex(),
        "attest_i": dump_attest(Evidence(0, NO_CLAIMS, b"", ())).hex(),
    }


EXAMPLES: dict[str, Message] = {
    "generate": Generate(0, (5, 6, 7), 6, (2047,)),
    "generate_resumed": Generate(0, (5, 6, 7, 464, 3139), 4, (2047,), delivered=2),
    "generate_penalised": Generate(
        0, (5, 6, 7), 6, (2047,), Sampling(0.7, 40, 0.95, 7, 0.05, 1.2, 0.5, 0.25, ((464, -100.0), (2047, 2.5))), top=2
    ),
    "generate_scores": Generate(0, (5, 6, 7), 1, wanted=Wanted.SCORES, top=1),
    "cancel": Cancel(),
    "status": Status(),
    "done_length": Done(Reason.LENGTH),
    "done_end": Done(Reason.END),
    "done_context": Done(Reason.CONTEXT),
    "done_cancelled": Done(Reason.CANCELLED),
    "token": Tokens(3, (464,)),
    "tokens": Tokens(3, (464, 3139), (-0.5, -1.25)),
    "token_top": Tokens(3, (464,), (-0.5,), (), ((464, -0.5), (6, -1.75))),
    "scores": Scores(1, (-2.5, -0.25), (), ((9, -0.125), (7, -0.25))),
    "done_scores": Done(Reason.SCORES),
    "refusal": Refusal(0, "busy", "stage 0 is busy with 32 sequences, and 64 wait: try again in 5 s"),
}

GREEDY = Sampling()
DRAWN = Sampling(0.7, 40, 0.95, 7)
PENALISED = Sampling(0.7, 0, 1.0, 7, 0.05, 1.2, 0.5, 0.25, ((0, -100.0), (3, 2.5)))
ROWS = np.array([[0.5, -1.0], [2.0, 0.25], [-0.125, 4.0], [1.0, 1.5]], np.float32)
# Batches from stage 0 to stage 1, the last, and the results that answer them; of a model with rows of two numbers and
# a vocabulary of four ids, for brevity.
BATCHES: dict[str, tuple[Batch, tuple[Result, ...]]] = {
    # Lanes 0 to 2 are open. Lane 0 ends, 3 and 4 open, and lane 1 breaks a rule.
    "mixed": (
        Batch(
            (
                Segment(3, 0, 1, Wanted.TOKEN),
                Segment(4, 0, 2, Wanted.NOTHING),
                Segment(1, 9, 1, Wanted.TOKEN),
            ),
            ROWS,
            ((3, Terms(8, GREEDY, logprobs=True)), (4, Terms(300, DRAWN))),
            (0,),
        ),
        (
            Tokens(1, (2,), (-0.5,)),
            None,
            Refusal(1, "gap", "start is 9, but 4 positions are known: send those between first"),
        ),
    ),
    "logits": (
        Batch((Segment(0, 0, 4, Wanted.LOGITS),), ROWS, ((0, Terms(4, GREEDY, spans=True)),)),
        (Logits(4, np.array([0.25, -2.0, 1.5, 0.0], np.float32), (Span(0.001, 0.0, 0.0, 0.0, 0.0),)),),
    ),
    # Lane 0 has a prompt of 3, 1, 1 and drew 2, 0, 2, of which the last is fed here. Lane 1 scores 1 and 3.
    "given": (
        Batch(
            (Segment(0, 5, 1, Wanted.TOKEN, Given((2, 0, 2), (1, 3))), Segment(1, 0, 2, Wanted.SCORES, Given((1, 3)))),
            ROWS[:3],
            ((0, Terms(8, PENALISED, logprobs=True, top=2)), (1, Terms(3, GREEDY, top=1))),
        ),
        (
            Tokens(6, (3,), (-1.5,), (), ((1, -0.5), (3, -1.5))),
            Scores(1, (-2.5, -0.25), (), ((0, -0.125), (3, -0.25))),
        ),
    ),
    "empty": (Batch((), NO_ROWS), ()),
}


def body(name: str) -> bytes:
    return codec.encode(messages.encode(EXAMPLES[name]))


def exchange(name: str) -> dict[str, Any]:
    """A batch, its answers, and the fields that they encode."""
    batch, results = BATCHES[name]
    fields = {
        "batch": {
            "body": codec.encode(batches.encode(batch)).hex(),
            "segments": [segment._asdict() | {"given": segment.given._asdict()} for segment in batch.segments],
            "terms": [{"lane": lane, **dataclasses.asdict(terms)} for lane, terms in batch.terms],
            "ended": batch.ended,
            "hidden": batch.hidden,
        },
        "answers": {
            "body": codec.encode(batches.encode_answers(results)).hex(),
            "results": [None if result is None else dataclasses.asdict(result) for result in results],
        },
    }
    made: dict[str, Any] = json.loads(json.dumps(fields, default=np.ndarray.tolist))  # as it is read back: no tuples
    return made


def records(k_i2r: bytes, k_r2i: bytes, attest_i: bytes, attest_r: bytes) -> dict[str, Any]:
    """Both directions of a link, from the evidence to the end; long ones as their digests."""
    cipher = CipherState(k_i2r)
    client, stage = Sealer(cipher), Sealer(CipherState(k_r2i))
    from_client = [client.seal(Type.ATTEST, attest_i)]
    from_client += [client.seal(Type.MESSAGE, body("status")) for _ in range(1024)]
    key = cipher.k
    from_client.append(client.seal(Type.CLOSE, (1024).to_bytes(8, "big")))
    other = Sealer(CipherState(k_i2r))
    other.seal(Type.ATTEST, attest_i)
    generate = other.seal(Type.MESSAGE, body("generate"))
    long = [stage.seal(Type.ATTEST, attest_r)]
    long += [stage.seal(Type.MESSAGE, body("token")), stage.seal(Type.PING)]
    fragments = stage.seal(Type.MESSAGE, bytes(LONG))
    lengths, at = [], 0
    while at < len(fragments):
        lengths.append(int.from_bytes(fragments[at : at + 2], "big"))
        at += 2 + lengths[-1]
    assert key is not None
    return {
        "i2r": {str(n): from_client[n].hex() for n in (0, 1, 1023, 1024, 1025)},
        "i2r_key_from_1024": key.hex(),
        "r2i": {str(n): record.hex() for n, record in enumerate(long)},
        "r2i_long": {"zeros": LONG, "record_lengths": lengths, "sha256": hashlib.sha256(fragments).hexdigest()},
        "r2i_close": stage.seal(Type.CLOSE, (3).to_bytes(8, "big")).hex(),
        "i2r_generate_instead_of_1": generate.hex(),
        "i2r_alert_instead_of_0": Sealer(CipherState(k_i2r)).seal(Type.ALERT, b"\x03").hex(),
    }


def answers() -> dict[str, Any]:
    """The whole of docs/known_answers.json."""
    text = manifest()
    parsed = Manifest.parse(text.encode())
    one, two = (told(handshake(suite, parsed.digest), parsed.mac_key) for suite in (1, 2))
    sealed = evidence(bytes.fromhex(one["h"]), parsed.claims(0))
    keys = [bytes.fromhex(one[name]) for name in ("k_i2r", "k_r2i")]
    ends = [bytes.fromhex(sealed[name]) for name in ("attest_i", "attest_r")]
    pairs = {
        "client_static": CLIENT_STATIC,
        "client_ephemeral": CLIENT_EPHEMERAL,
        "stage_static": STAGE_STATIC,
        "stage_ephemeral": STAGE_EPHEMERAL,
    }
    lengths = (0, 6, 256, 257, 300, 517, 1000, 4097, 65515, 70000, 16 * 2**20)
    return {
        "note": "Known answers of docs/protocol.md. Made by scripts/known_answers.py. The keys are public: use none.",
        "manifest": text,
        "manifest_sha256": parsed.digest.hex(),
        "mac_key": parsed.mac_key.hex(),
        "now_ms": MADE_MS,
        "claims_of_stage_1": parsed.claims(1).hex(),
        "x25519": {name: {"private": pair.private.hex(), "public": pair.public.hex()} for name, pair in pairs.items()},
        "ed25519": {
            "root": {"private": ROOT.private.hex(), "public": ROOT.public.hex()},
            "stage_0": {"private": STAGE_SIGNING.hex(), "public": STAGE_SIGNING_PUBLIC.hex()},
            "small_order": SMALL_ORDER,
        },
        "nitro_roots": sorted(root.hex() for root in nitro.ROOTS),
        "snp_roots": sorted(root.hex() for root in snp.ROOTS),
        "tdx_roots": sorted(root.hex() for root in tdx.ROOTS),
        "suite_1": one | sealed | {"records": records(*keys, *ends)},
        "suite_2": {"e1_seed": KEM_SEED.hex(), "encapsulation_coins": KEM_COINS.hex(), **two},
        "padded_size": {str(length): padded_size(length) for length in lengths},
        "messages": {name: body(name).hex() for name in EXAMPLES}
        | {"batches": {name: exchange(name) for name in BATCHES}},
    }


if __name__ == "__main__":
    write_file(TARGET, json.dumps(answers(), indent=1) + "\n")
