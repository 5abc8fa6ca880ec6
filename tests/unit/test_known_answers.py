"""docs/known_answers.json: our own code computes every answer again, and another implementation those of the handshake.

The page beside it quotes some of them, and has an example that is held against its own description.
"""

import hashlib
import hmac
import json
import re
import struct
from typing import Any

import msgpack
import pytest
from Crypto.PublicKey import MLKEM
from Crypto.Signature import eddsa
from ends import Side
from noise.connection import Keypair, NoiseConnection
from processes import ROOT

from attest import AcceptUnattested, Binding, Provider, Unattested
from attest.policy import Policy
from attest.providers import mock
from attest.providers.mock import MockAttester, MockKey, MockVerifier
from minigpt.engine.config import Config
from minigpt.engine.sampling import Sampling
from minigpt.protocol import batches, messages
from minigpt.protocol.batches import Due, Terms
from minigpt.protocol.manifest import Manifest
from scripts import known_answers
from transport import codec, noise
from transport.errors import Closed, PeerAlert
from transport.link import CLIENT, End, initiate, load_attest, respond
from transport.noise import KeyPair
from transport.records import PROCESS_BUDGET, Opener, Sealer, Type, padded_size

PAGE = (ROOT / "docs" / "protocol.md").read_text()
ANSWERS: dict[str, Any] = json.loads((ROOT / "docs" / "known_answers.json").read_text())
ONE = ANSWERS["suite_1"]


def of(*path: str) -> bytes:
    """The bytes of one answer."""
    value: Any = ANSWERS
    for name in path:
        value = value[name]
    return bytes.fromhex(value)


def manifest() -> Manifest:
    return Manifest.parse(ANSWERS["manifest"].encode())


def framed(messages: list[str]) -> list[bytes]:
    return [struct.pack(">H", len(message) // 2) + bytes.fromhex(message) for message in messages]


def test_the_script_writes_this_file() -> None:
    assert known_answers.answers() == ANSWERS


def test_the_manifest_is_one_and_its_digest_is_of_its_bytes() -> None:
    assert manifest().digest == of("manifest_sha256") == hashlib.sha256(ANSWERS["manifest"].encode()).digest()
    key = hashlib.sha256(b"MGPT-LINK-v2 mac1" + ANSWERS["manifest"].encode()).digest()
    assert manifest().mac_key == of("mac_key") == key
    for suite in ("suite_1", "suite_2"):
        signed = of(suite, "prologue") + framed(ANSWERS[suite]["messages"])[0]
        assert hmac.new(key, signed, hashlib.sha256).digest()[:16] == of(suite, "mac")
    assert manifest().claims(0) == of("suite_1", "claims")
    assert manifest().claims(1) == of("claims_of_stage_1")


class Links:
    """Both ends of the link in our own code, with the keys of the answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, suite: int) -> None:
        ephemeral = [KeyPair.from_private(of("x25519", f"{name}_ephemeral", "private")) for name in ("client", "stage")]
        fresh = iter(ephemeral)
        monkeypatch.setattr(KeyPair, "generate", classmethod(lambda _cls: next(fresh)))
        pinned, at = manifest(), known_answers.MADE_MS / 1000
        policy = Policy(Provider.MOCK, frozenset([known_answers.MEASUREMENT]), pinned.claims(0), 0)
        root = of("ed25519", "root", "public")
        key = MockKey(of("ed25519", "stage_0", "private"), of("suite_1", "endorsement"))
        attester = MockAttester(key, pinned.claims(0), measurement=known_answers.MEASUREMENT, clock=lambda: at)
        common: dict[str, Any] = {"manifest_sha256": pinned.digest, "mac_key": pinned.mac_key, "suites": (suite,)}
        client = End(Unattested(), MockVerifier(root, policy, clock=lambda: at), own_id=CLIENT, peer_id=0,
                     static_private=of("x25519", "client_static", "private"), **common)  # fmt: skip
        stage = End(attester, AcceptUnattested(), own_id=0, peer_id=CLIENT,
                    static_private=of("x25519", "stage_static", "private"), **common)  # fmt: skip
        self.client, self.stage = Side(initiate(client)), Side(respond(stage))

    def meet(self) -> list[bytes]:
        """Everything that passes until both have accepted each other: one flight after the other."""
        flights = []
        for _ in range(3):
            for sender, receiver in ((self.client, self.stage), (self.stage, self.client)):
                flights.append(sender.run())
                receiver.inbox += flights[-1]
        self.stage.run()
        assert (self.client.error, self.stage.error) == (None, None)
        return [flight for flight in flights if flight]


def test_suite_1_in_our_own_code_from_the_first_byte_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links(monkeypatch, 1)
    first, second, third = framed(ONE["messages"])
    records = ONE["records"]
    assert links.meet() == [
        of("suite_1", "preamble") + first + of("suite_1", "mac"),
        second,
        third,
        of("suite_1", "records", "r2i", "0"),
        of("suite_1", "records", "i2r", "0"),
    ]
    client, stage = links.client.session, links.stage.session
    assert client.handshake_hash == stage.handshake_hash == of("suite_1", "h")
    assert client.peer_binding.digest == of("suite_1", "binding_r")
    assert stage.peer_binding.digest == of("suite_1", "binding_i")

    status = of("messages", "status")
    for n in range(1, 1025):
        record = client.seal(status)
        assert records["i2r"].get(str(n), record.hex()) == record.hex()
        stage.feed(record)
        assert stage.next_message() == status
    assert client.close() == of("suite_1", "records", "i2r", "1025")
    stage.feed(of("suite_1", "records", "i2r", "1025"))
    with pytest.raises(Closed):
        stage.next_message()

    token = stage.seal(of("messages", "token"))
    assert token == of("suite_1", "records", "r2i", "1")
    client.feed(token + of("suite_1", "records", "r2i", "2"))
    assert client.next_message() == of("messages", "token")
    assert client.next_message() is None  # a PING says nothing


def test_the_long_message_and_both_kinds_of_end() -> None:
    records = ONE["records"]
    sealer = Sealer(noise.CipherState(of("suite_1", "k_r2i")))
    for kind in (Type.ATTEST, Type.MESSAGE, Type.PING):
        sealer.seal(kind)
    long = sealer.seal(Type.MESSAGE, bytes(records["r2i_long"]["zeros"]))
    assert hashlib.sha256(long).hexdigest() == records["r2i_long"]["sha256"]
    assert len(long) == sum(2 + length for length in records["r2i_long"]["record_lengths"])
    close = sealer.seal(Type.CLOSE, struct.pack(">Q", sealer.messages))
    assert close.hex() == records["r2i_close"]
    asks = Sealer(noise.CipherState(of("suite_1", "k_i2r")))
    asks.seal(Type.ATTEST, of("suite_1", "attest_i"))
    assert asks.seal(Type.MESSAGE, of("messages", "generate")).hex() == records["i2r_generate_instead_of_1"]
    opener = Opener(noise.CipherState(of("suite_1", "k_i2r")), {Type.ALERT: 1}, PROCESS_BUDGET)
    opener.feed(of("suite_1", "records", "i2r_alert_instead_of_0"))
    message = opener.next()
    assert message is not None
    assert PeerAlert.from_body(message.body).code == 3


def test_suite_2_in_our_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed:
        def __init__(self) -> None:
            self._key = MLKEM.construct(param_set=MLKEM.ML_KEM_768, seed=of("suite_2", "e1_seed"))
            self.public = bytes(self._key.ek)

        def decapsulate(self, ciphertext: bytes) -> bytes:
            return bytes(self._key._decaps(ciphertext))

    def encapsulate(public: bytes) -> tuple[bytes, bytes]:
        made = MLKEM.construct(param_set=MLKEM.ML_KEM_768, ek=public)._encaps(of("suite_2", "encapsulation_coins"))
        return bytes(made[1]), bytes(made[0])

    monkeypatch.setattr(noise, "KemKey", Fixed)
    monkeypatch.setattr(noise, "encapsulate", encapsulate)
    links = Links(monkeypatch, 2)
    first, second, third = framed(ANSWERS["suite_2"]["messages"])
    assert [len(first), len(second), len(third)] == [2 + 1216, 2 + 1200, 2 + 64]
    assert links.meet()[:3] == [of("suite_2", "preamble") + first + of("suite_2", "mac"), second, third]
    assert links.client.session.handshake_hash == of("suite_2", "h")


@pytest.mark.filterwarnings("ignore:One of ephemeral keypairs")  # it is right to warn, and we mean it
@pytest.mark.parametrize("initiator", [True, False])
def test_suite_1_in_another_implementation(initiator: bool) -> None:
    other = NoiseConnection.from_name(ONE["protocol_name"].encode())
    (other.set_as_initiator if initiator else other.set_as_responder)()
    other.set_prologue(of("suite_1", "prologue"))
    name = "client" if initiator else "stage"
    other.set_keypair_from_private_bytes(Keypair.STATIC, of("x25519", f"{name}_static", "private"))
    other.set_keypair_from_private_bytes(Keypair.EPHEMERAL, of("x25519", f"{name}_ephemeral", "private"))
    other.start_handshake()
    state = other.noise_protocol.handshake_state.symmetric_state
    after = [step for step in ONE["steps"] if step["step"] == "EncryptAndHash(empty payload)"]
    for number, message in enumerate(bytes.fromhex(message) for message in ONE["messages"]):
        if (number % 2 == 0) == initiator:
            assert bytes(other.write_message()) == message
        else:
            other.read_message(message)
        assert (state.h.hex(), state.ck.hex()) == (after[number]["h"], after[number]["ck"])
    assert other.get_handshake_hash() == of("suite_1", "h")

    # Records of this end's direction are sealed again, those of the other's are opened: across the rekey too.
    own, theirs = ("i2r", "r2i") if initiator else ("r2i", "i2r")
    filler = b"\x02\x01" + struct.pack(">H", 256 - len(of("messages", "status"))) + of("messages", "status")
    filler += bytes(260 - len(filler))
    if initiator:
        plain = {0: padded(1, of("suite_1", "attest_i")), 1025: padded(4, struct.pack(">Q", 1024))}
        for n in range(1026):
            if n == 1024:
                other.rekey_outbound_cipher()
            record = bytes(other.encrypt(plain.get(n, filler)))
            wanted = ONE["records"][own].get(str(n))
            assert wanted in (None, (struct.pack(">H", len(record)) + record).hex())
        kinds = [bytes(other.decrypt(of("suite_1", "records", theirs, str(n))[2:])) for n in range(3)]
        assert kinds == [padded(1, of("suite_1", "attest_r")), padded(2, of("messages", "token")), padded(5, b"")]
    else:
        plain = {0: padded(1, of("suite_1", "attest_r")), 1: padded(2, of("messages", "token")), 2: padded(5, b"")}
        for n in range(3):
            record = bytes(other.encrypt(plain[n]))
            assert (struct.pack(">H", len(record)) + record).hex() == ONE["records"][own][str(n)]
        assert bytes(other.decrypt(of("suite_1", "records", theirs, "0")[2:])) == padded(1, of("suite_1", "attest_i"))
        assert bytes(other.decrypt(of("suite_1", "records", theirs, "1")[2:])) == filler


def padded(kind: int, body: bytes) -> bytes:
    """A record's plaintext, from the page alone."""
    length = len(body)
    size = 256
    if length > size:
        exponent = length.bit_length() - 1
        step = 1 << (exponent - exponent.bit_length())
        size = -(-length // step) * step
    return struct.pack(">BBH", kind, 1, size - length) + body + bytes(size - length)


def test_the_evidence_is_signed_and_sealed_to_the_handshake_by_arithmetic_of_its_own() -> None:
    domain = b"minigpt attestation binding v1\0"
    for role, provider, claims, static, name in (
        (b"R", 1, of("suite_1", "claims"), "stage_static", "binding_r"),
        (b"I", 0, b"\x80", "client_static", "binding_i"),
    ):
        public = of("x25519", static, "public")
        data = domain + role + bytes([provider]) + of("suite_1", "h") + public + hashlib.sha256(claims).digest()
        assert len(data) == 129
        assert hashlib.sha512(data).digest() == of("suite_1", name)
    statement, endorsement = of("suite_1", "evidence"), of("suite_1", "endorsement")
    assert statement[65:129] == of("suite_1", "binding_r")
    for signed, key in ((statement, "stage_0"), (endorsement, "root")):
        signer = eddsa.import_public_key(of("ed25519", key, "public"))
        eddsa.new(signer, "rfc8032").verify(signed[:-64], signed[-64:])
    evidence = load_attest(of("suite_1", "attest_r"))
    binding = Binding("R", 1, of("suite_1", "h"), of("x25519", "stage_static", "public"), evidence.claims)
    policy = Policy(Provider.MOCK, frozenset([known_answers.MEASUREMENT]), manifest().claims(0), 0)
    root = of("ed25519", "root", "public")
    result = MockVerifier(root, policy, clock=lambda: known_answers.MADE_MS / 1000).verify(evidence, binding)
    assert result.measurement == known_answers.MEASUREMENT


def test_no_key_of_small_order_is_taken_and_these_are_all_of_them() -> None:
    keys = {bytes.fromhex(key) for key in ANSWERS["ed25519"]["small_order"]}
    assert len(keys) == 8
    for key in keys:
        point = eddsa.import_public_key(key).pointQ
        assert (point * 8).is_point_at_infinity()
        with pytest.raises(ValueError, match="small order"):
            mock._public_key(key)


def test_padding_and_messages() -> None:
    for length, size in ANSWERS["padded_size"].items():
        assert padded_size(int(length)) == size
    for name, example in known_answers.EXAMPLES.items():
        assert messages.decode(codec.decode(of("messages", name))) == example
    assert {"cancel", "status", "token", "tokens", "refusal"} < ANSWERS["messages"].keys()


def test_what_the_page_quotes_is_among_the_answers() -> None:
    answers = json.dumps(ANSWERS)
    quoted = re.findall(r"\b[0-9a-f]{16,}\b", PAGE)
    assert len(quoted) > 20
    assert [piece for piece in quoted if piece not in answers] == []


def test_the_python_on_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_example_of_a_generate_is_the_map_beside_it() -> None:
    fence = PAGE.split("<!-- generate-example -->")[1].split("```")[1]
    data = bytes.fromhex("".join(re.findall(r"^[0-9a-f]{4}  ([0-9a-f ]{2,47})(?:  |$)", fence, re.M)))
    fields = msgpack.unpackb(data)
    assert msgpack.packb(fields) == data
    assert data == of("messages", "generate")
    assert fields == {
        "type": "generate",
        "start": 0,
        "ids": struct.pack("<3I", 5, 6, 7),
        "max_tokens": 6,
        "stop_ids": struct.pack("<I", 2047),
        "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "repetition_penalty": 1.0},
        "logprobs": False,
        "wanted": "token",
        "draft": 0,
    }

    request = messages.decode(fields)
    assert isinstance(request, messages.Generate)
    assert not request.spans
    assert codec.encode(messages.encode(request)) == data


@pytest.mark.parametrize("name", ["batch", "answers"])
def test_the_examples_of_a_batch_and_its_answers_are_the_mixed_ones(name: str) -> None:
    fence = PAGE.split(f"<!-- {name}-example -->")[1].split("```")[1].removeprefix("text\n")
    body = bytes.fromhex("".join(line[:43] for line in fence.splitlines()))
    assert body == of("messages", "batches", "mixed", name, "body")


WANTED = ["nothing", "token", "tokens", "logits", "scores"]
NAMES = ["mixed", "logits", "given", "empty"]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_the_fields_beside_it_as_the_page_describes_it(name: str) -> None:
    batch = ANSWERS["messages"]["batches"][name]["batch"]
    parts = msgpack.unpackb(bytes.fromhex(batch["body"]))
    given = [number for (number,) in struct.iter_unpack("<I", parts[1])]
    biases = [list(pair) for pair in struct.iter_unpack("<Id", parts[3])]

    def ids_of(lane: int) -> dict[str, list[int]]:
        if given[:1] != [lane]:
            return {"ids": [], "prompt": []}
        _, prompt, ids = given[:3]
        found = {"prompt": given[3 : 3 + prompt], "ids": given[3 + prompt : 3 + prompt + ids]}
        del given[: 3 + prompt + ids]
        return found

    def biases_of(count: int) -> list[list[float]]:
        found = biases[:count]
        del biases[:count]
        return found

    segments = [
        {"lane": lane, "start": start, "rows": rows, "wanted": WANTED[wanted], "given": ids_of(lane)}
        for lane, start, rows, wanted in struct.iter_unpack("<4I", parts[0])
    ]
    terms = [
        {
            "lane": lane,
            "positions": positions,
            "sampling": {
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "seed": seed,
                "min_p": min_p,
                "repetition_penalty": repetition,
                "presence_penalty": presence,
                "frequency_penalty": frequency,
                "logit_bias": biases_of(count),
            },
            "logprobs": bool(flags & 1),
            "spans": bool(flags & 2),
            "top": top,
        }
        for (
            lane, positions, top_k, flags, top, count, seed, temperature, top_p, min_p, repetition, presence, frequency
        ) in struct.iter_unpack("<IIIBBHQ6d", parts[2])
    ]  # fmt: skip
    assert (segments, terms) == (batch["segments"], batch["terms"])
    assert given == biases == []
    assert [lane for (lane,) in struct.iter_unpack("<I", parts[4])] == batch["ended"]
    assert [list(row) for row in struct.iter_unpack("<2f", parts[5])] == batch["hidden"]
    assert len(batch["hidden"]) == sum(segment["rows"] for segment in segments)


@pytest.mark.parametrize("name", NAMES)
def test_answers_have_the_fields_beside_them_as_the_page_describes_them(name: str) -> None:
    batch, answers = (ANSWERS["messages"]["batches"][name][half] for half in ("batch", "answers"))
    parts = msgpack.unpackb(bytes.fromhex(answers["body"]))
    terms = {one["lane"]: one for one in batch["terms"]}
    ids, logprobs, spans, logits = (
        [number for (number,) in struct.iter_unpack(kind, part)]
        for kind, part in zip(("<I", "<d", "<d", "<f"), (*parts[1:3], *parts[4:6]), strict=True)
    )
    top = [list(pair) for pair in struct.iter_unpack("<Id", parts[3])]
    refusals = msgpack.unpackb(parts[6]) if parts[6] else []

    def take(numbers: list[Any], count: int) -> list[Any]:
        taken, numbers[:] = numbers[:count], numbers[count:]
        return taken

    results: list[Any] = []
    for segment, (kind, count) in zip(batch["segments"], struct.iter_unpack("BB", parts[0]), strict=True):
        end = segment["start"] + segment["rows"]
        asked = terms.get(segment["lane"], {})
        if kind == 0:
            results.append(None)
        elif kind == 3:
            results.append(dict(zip(("stage", "reason", "text"), refusals.pop(0), strict=True)))
        else:
            told = [take(spans, 5)] if asked["spans"] else []  # of one stage, the last
            if kind == 1:
                drawn = {"position": end, "ids": take(ids, count), "top": take(top, count * min(asked["top"], 4))}
                results.append(drawn | {"logprobs": take(logprobs, count) if asked["logprobs"] else [], "spans": told})
            elif kind == 4:
                rows = segment["rows"]
                scored = {"position": segment["start"] + 1, "logprobs": take(logprobs, rows), "spans": told}
                results.append(scored | {"top": take(top, rows * min(asked["top"], 4))})
            else:
                results.append({"position": end, "values": take(logits, 4), "spans": told})
    assert results == answers["results"]
    assert [ids, logprobs, top, spans, logits, refusals] == [[]] * 6


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_answers_in_our_own_code(name: str) -> None:
    batch, results = known_answers.BATCHES[name]
    found = batches.decode(codec.decode_parts(of("messages", "batches", name, "batch", "body")), 2)
    assert (found.segments, found.terms, found.ended) == (batch.segments, batch.terms, batch.ended)
    assert found.hidden.tolist() == batch.hidden.tolist()
    terms = dict(batch.terms)
    known = {1: Terms(16, Sampling())}  # the lane that was open before
    due = [Due(segment, (known | terms)[segment.lane].ask(segment.wanted)) for segment in batch.segments]
    config = Config(vocab_size=4, n_positions=512, n_embd=2, n_layer=2, n_head=1, n_inner=8, eos_token_id=())
    plain = codec.decode_parts(of("messages", "batches", name, "answers", "body"))
    assert list(map(repr, batches.decode_answers(plain, due, config, range(1, 2)))) == list(map(repr, results))


def test_the_page_has_lines_of_a_screen() -> None:
    assert max(map(len, PAGE.splitlines())) <= 120
