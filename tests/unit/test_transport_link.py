"""The handshake of a link: what the host between two ends may do to it, and an independent implementation."""

import hashlib
import hmac
import json
import struct

import pytest
from ends import LENGTHS, MAC_KEY, OPENING, Side, client, meet, sessions, stage, told
from hypothesis import given, settings
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from attest import (
    NO_CLAIMS,
    Binding,
    Provider,
)
from transport import link, noise
from transport.errors import (
    Closed,
    HandshakeError,
    TimedOut,
    TransportError,
    Truncated,
    Unanswered,
    Unauthentic,
)
from transport.link import CLIENT, initiate, respond
from transport.noise import KeyPair


def test_both_ends_meet_and_know_each_other():
    a, b = sessions()
    assert a.handshake_hash == b.handshake_hash
    assert a.peer.provider == Provider.MOCK
    assert b.peer.provider == Provider.NONE
    assert a.peer_binding.role == "R"
    assert b.peer_binding.role == "I"
    assert a.peer_binding.static_key == a.peer_static_key
    assert a.peer_evidence.evidence == a.peer_binding.digest
    assert told(b, a.seal(b"question")) == b"question"
    assert told(a, b.seal(b"answer")) == b"answer"


def test_the_handshake_one_byte_at_a_time():
    one, two = meet(client(), stage(), step=1)
    assert told(two.session, one.session.seal(b"x")) == b"x"


def test_the_known_answers_of_version_1_hold_for_the_handshake_inside(vectors, monkeypatch):
    """Noise, B and its evidence are what they were; only the prologue is another now, so here it is theirs."""
    answers = json.loads((vectors / "noise" / "link_v1_kat.json").read_text())
    of = {name: bytes.fromhex(value) for name, value in answers.items() if isinstance(value, str) and name[:1] != "n"
          and set(value) <= set("0123456789abcdef")}  # fmt: skip
    fresh = iter([KeyPair.from_private(of[f"{end}_ephemeral_priv"]) for end in ("init", "resp")])
    monkeypatch.setattr(KeyPair, "generate", classmethod(lambda cls: next(fresh)))
    statics = [KeyPair.from_private(of[f"{end}_static_priv"]) for end in ("init", "resp")]
    i, r = (
        noise.handshake(answers["protocol"].encode(), noise.XX, initiator=first, prologue=of["prologue"], s=s)
        for first, s in zip((True, False), statics, strict=True)
    )
    assert next(i) == of["msg1"]
    next(r)
    assert r.send(of["msg1"]) == of["msg2"]
    i.send(None)
    assert i.send(of["msg2"]) == of["msg3"]
    r.send(None)
    ends = []
    for steps, last in ((i, None), (r, of["msg3"])):
        with pytest.raises(StopIteration) as finished:
            steps.send(last)
        ends.append(finished.value.value)
    assert ends[0].h == ends[1].h == of["handshake_hash"]
    assert ends[0].sending.k == ends[1].receiving.k == of["k_i2r"]
    for role, provider, own in (("R", Provider.MOCK, statics[1]), ("I", Provider.NONE, statics[0])):
        name = "binding_R_mock" if role == "R" else "binding_I_none"
        assert Binding(role, provider, ends[0].h, own.public, of["claims"]).digest == of[name]
    plain = {record["n"]: bytes.fromhex(record["plaintext"]) for record in answers["records_i2r"]}
    recorded = {record["n"]: record["record"] for record in answers["records_i2r"]}
    sending = ends[0].sending
    for n in range(max(plain) + 1):
        if n and n % 1024 == 0:
            sending.rekey()
        if n not in plain:
            sending.n += 1
            continue
        record = sending.encrypt_with_ad(b"", plain[n])
        assert (struct.pack(">H", len(record)) + record).hex() == recorded[n]


@pytest.mark.parametrize(("suite", "stride"), [(1, 1), (2, 11)])
def test_a_flip_of_every_byte_of_the_handshake_is_silent_death(suite, stride):
    first, second = OPENING[suite], 2 + LENGTHS[suite][1]
    places = [("I", at) for at in range(first) if at < 11 or at % stride == 0 or at >= first - 16]
    places += [("R", at) for at in range(second) if at < 3 or at % stride == 0]
    for who, at in places:
        seen = {"I": 0, "R": 0}

        def flip(name, data, who=who, at=at, seen=seen):
            start = seen[name]
            seen[name] += len(data)
            if name == who and start <= at < start + len(data):
                data = bytearray(data)
                data[at - start] ^= 1
            return bytes(data)

        i, r = client(suites=(suite,)), stage(suites=(suite,))
        one, two = meet(i, r, flip)
        assert one.session is None
        assert two.session is None
        assert r.attester.made == 0
        assert isinstance(one.error if who == "R" else two.error, HandshakeError)
        assert len(one.sent) == first  # nothing after message 1
        assert len(two.sent) == (0 if who == "I" else second)  # the mac covers all that comes before it


@pytest.mark.parametrize("suite", LENGTHS)
def test_a_flip_of_every_byte_of_message_3_and_its_length_is_silent_death(suite):
    for at in range(2 + 64):

        def flip(name, data, at=at):
            return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if name == "I" and len(data) == 66 else data

        r = stage(suites=(suite,))
        _, two = meet(client(suites=(suite,)), r, flip)
        assert isinstance(two.error, HandshakeError)
        assert len(two.sent) == 2 + LENGTHS[suite][1]
        assert r.attester.made == 0


ANOTHER = hashlib.sha256(b"MGPT-LINK-v2 mac1" + b"manifesT").digest()


class Costs:
    """Counts what costs more than microseconds, or is of use to nobody else meanwhile."""

    def __init__(self, monkeypatch):
        self.calls = []
        for where, name in ((KeyPair, "dh"), (KeyPair, "generate"), (KeyPair, "from_private"), (noise, "KemKey"),
                            (noise, "encapsulate"), (noise, "SymmetricState")):  # fmt: skip
            monkeypatch.setattr(where, name, self._counted(name, getattr(where, name)))

    def _counted(self, name, real):
        def call(*args):
            self.calls.append(name)
            return real(*args)

        return call


def opening(i):
    """All that an end says before it waits for an answer."""
    return Side(initiate(i)).run()


@pytest.mark.parametrize("suite", LENGTHS)
@pytest.mark.parametrize("what", ["right", "wrong", "of another manifest", "of other ids", "missing", "version 1"])
def test_a_stranger_without_the_manifest_costs_no_key_exchange_and_hears_nothing(what, suite, monkeypatch):
    changes = (
        {"mac_key": ANOTHER} if what == "of another manifest" else {"peer_id": 1} if what == "of other ids" else {}
    )
    said = bytearray(opening(client(suites=(suite,), **changes)))
    if what == "wrong":
        said[-1] ^= 1
    elif what == "missing":
        said[-16:] = bytes(16)
    elif what == "version 1":
        said[4] = 1
    r = stage(suites=(suite,))
    side, costs = Side(respond(r)), Costs(monkeypatch)
    side.inbox += said
    answer = side.run()
    if what == "right":  # control
        assert len(answer) == 2 + LENGTHS[suite][1]
        assert {"dh", "generate", "SymmetricState"} <= set(costs.calls)
        assert ("encapsulate" in costs.calls) == (suite == 2)
        return
    assert answer == b""
    assert costs.calls == []
    assert isinstance(side.error, HandshakeError)
    assert r.attester.made == 0


def test_without_a_mac_a_stage_waits_and_says_nothing(monkeypatch):
    side, costs = Side(respond(stage())), Costs(monkeypatch)
    side.inbox += opening(client())[:-1]
    costs.calls.clear()
    assert side.run() == b""
    assert side.error is None
    assert costs.calls == []
    with pytest.raises(Truncated):
        side.steps.throw(Truncated("the connection ended"))


@pytest.mark.parametrize(
    ("error", "kind"), [(Truncated("the connection ended"), Unanswered), (TimedOut("nothing came"), TimedOut)]
)
def test_a_client_tells_a_stage_that_hung_up_after_its_first_message_from_one_that_is_silent(error, kind):
    side = Side(initiate(client()))
    side.run()
    with pytest.raises(kind, match=str(error)):
        side.steps.throw(error)


@pytest.mark.parametrize(
    ("i", "r"),
    [
        ({"manifest_sha256": hashlib.sha256(b"manifesT").digest(), "mac_key": ANOTHER}, {}),
        ({"manifest_sha256": hashlib.sha256(b"manifesT").digest()}, {}),
        ({"mac_key": ANOTHER}, {}),
        ({"peer_id": 1}, {}),
        ({"own_id": 3}, {}),
        ({}, {"own_id": 1}),
        ({}, {"peer_id": 2}),
    ],
)
def test_another_manifest_or_wiring_fails_before_message_2(i, r):
    one, two = meet(client(**i), stage(**r))
    assert isinstance(two.error, HandshakeError)
    assert one.session is None
    assert len(one.sent) == OPENING[2]
    assert len(two.sent) == 0


@pytest.mark.parametrize(
    ("i", "r"),
    [({"manifest_sha256": hashlib.sha256(b"manifesT").digest()}, {}), ({"peer_id": 1}, {}), ({"own_id": 3}, {})],
)
def test_another_manifest_or_wiring_fails_at_message_2_whatever_the_mac(i, r, monkeypatch):
    """The mac is a doorkeeper: what the ends agree on is the handshake's affair."""
    monkeypatch.setattr(link, "_mac", lambda *_: bytes(16))
    one, two = meet(client(**i), stage(**r))
    assert isinstance(one.error, Unauthentic)
    assert two.session is None
    assert len(one.sent) == OPENING[2]
    assert len(two.sent) == 2 + LENGTHS[2][1]


@pytest.mark.parametrize(
    ("suites", "preamble"),
    [
        ((1,), b"mGPT\x01\x01\0\0"),
        ((1,), b"mGPT\x02\x02\0\0"),
        ((2,), b"mGPT\x02\x01\0\0"),
        ((1, 2), b"mGPT\x02\x00\0\0"),
        ((1, 2), b"mGPT\x02\x03\0\0"),
        ((1,), b"mGPT\x02\x01\0\1"),
        ((1,), b"mGPT\x02\x01\1\0"),
        ((1,), b"HTTP/1.1"),
    ],
)
def test_another_preamble_is_silent_death_without_fallback(suites, preamble):
    side = Side(respond(stage(suites=suites)))
    side.inbox += preamble + b"\0\x20" + bytes(32 + 16)
    assert side.run() == b""
    assert isinstance(side.error, HandshakeError)


def test_a_downgrade_on_the_way_fails_even_where_both_ends_accept_both_suites():
    def downgrade(name, data):
        return data.replace(b"mGPT\x02\x02", b"mGPT\x02\x01", 1) if name == "I" else data

    one, two = meet(client(suites=(2, 1)), stage(suites=(1, 2)), downgrade)
    assert one.session is None
    assert two.session is None
    assert isinstance(two.error, HandshakeError)  # the length of message 1 is that of the other suite


def test_an_echo_and_a_stage_that_dials_itself_are_refused():
    echo = Side(initiate(client()))
    echo.inbox += echo.run()
    echo.run()
    assert isinstance(echo.error, HandshakeError)
    same = KeyPair.generate().private
    one, _ = meet(client(static_private=same), stage(static_private=same))
    assert isinstance(one.error, HandshakeError)
    assert "our own" in str(one.error)


def test_a_recorded_client_cannot_be_replayed():
    one, _ = meet(client(), stage())
    fresh = Side(respond(stage()))
    fresh.inbox += one.sent
    fresh.run()
    assert isinstance(fresh.error, HandshakeError)
    assert fresh.steps.gi_frame is None


@given(st.lists(st.binary(max_size=120), max_size=4), st.booleans())
@settings(max_examples=60)
def test_any_bytes_end_a_handshake_with_a_transport_error_or_leave_it_waiting(pieces, initiator):
    side = Side(initiate(client(suites=(1,))) if initiator else respond(stage(suites=(1,))))
    start = b"\0\x60" if initiator else b"mGPT\x02\x01\0\0\0\x20"
    for piece in (start, *pieces):
        side.inbox += piece
        side.run()
    assert side.session is None
    assert side.error is None or isinstance(side.error, TransportError)


class Independent:
    """The other end of the link in PyPI's noiseprotocol, straight from the description of the bytes."""

    def __init__(self, initiator, own_id, peer_id):
        self.noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
        (self.noise.set_as_initiator if initiator else self.noise.set_as_responder)()
        ids = (own_id, peer_id) if initiator else (peer_id, own_id)
        self.preamble = bytes.fromhex("6d47505402010000")
        digest = hashlib.sha256(b"manifest").digest()
        self.prologue = b"MGPT-LINK-v2" + self.preamble + digest + b"".join(i.to_bytes(2, "big") for i in ids)
        self.noise.set_prologue(self.prologue)
        self.static = KeyPair.generate()
        self.noise.set_keypair_from_private_bytes(Keypair.STATIC, self.static.private)
        self.noise.start_handshake()
        self.counts = [0, 0]

    def mac(self, first):
        """Of message 1 with its length."""
        key = hashlib.sha256(b"MGPT-LINK-v2 mac1" + b"manifest").digest()
        return hmac.new(key, self.prologue + first, hashlib.sha256).digest()[:16]

    def write(self):
        message = bytes(self.noise.write_message())
        return len(message).to_bytes(2, "big") + message

    def read(self, framed):
        assert int.from_bytes(framed[:2], "big") == len(framed) - 2
        self.noise.read_message(framed[2:])

    def seal(self, kind, body):
        if self.counts[0] and self.counts[0] % 1024 == 0:
            self.noise.rekey_outbound_cipher()
        self.counts[0] += 1
        record = bytes(self.noise.encrypt(bytes([kind, 1, 0, 0]) + body))  # not padded: that is the sender's affair
        return len(record).to_bytes(2, "big") + record

    def open(self, framed):
        if self.counts[1] and self.counts[1] % 1024 == 0:
            self.noise.rekey_inbound_cipher()
        self.counts[1] += 1
        assert int.from_bytes(framed[:2], "big") == len(framed) - 2
        plain = bytes(self.noise.decrypt(framed[2:]))
        padding = int.from_bytes(plain[2:4], "big")
        assert plain[1] == 1
        assert not any(plain[len(plain) - padding :] if padding else b"")
        return plain[0], plain[4 : len(plain) - padding]

    def binding(self, role, provider):
        domain = b"minigpt attestation binding v1" + bytes(1)
        claims = hashlib.sha256(NO_CLAIMS).digest()
        key = self.static.public
        return hashlib.sha512(
            domain + role + bytes([provider]) + self.noise.get_handshake_hash() + key + claims
        ).digest()


def exchange(other, ours):
    """Messages both ways across two rekeys, and the end."""
    for n in range(2100):
        assert told(ours, other.seal(2, b"to us %d" % n)) == b"to us %d" % n
        assert other.open(ours.seal(b"from us %d" % n)) == (2, b"from us %d" % n)
    assert other.open(ours.close()) == (4, (2100).to_bytes(8, "big"))
    with pytest.raises(Closed):
        told(ours, other.seal(4, (2100).to_bytes(8, "big")))


def test_noiseprotocol_as_the_client():
    other, side = Independent(True, CLIENT, 0), Side(respond(stage(suites=(1,))))
    first = other.write()
    side.inbox += other.preamble + first + other.mac(first)
    other.read(side.run())
    side.inbox += other.write()
    kind, body = other.open(side.run())
    assert kind == 1
    assert body[:4] == b"\x01\x01\x00\x01"
    side.inbox += other.seal(1, b"\x01\x00\x00\x01\x80" + bytes(4) + b"\x00")
    assert side.run() == b""
    assert side.session.peer_static_key == other.static.public
    exchange(other, side.session)


def test_noiseprotocol_as_the_stage():
    other, side = Independent(False, 0, CLIENT), Side(initiate(client(suites=(1,))))
    flight = side.run()
    assert flight[:8] == other.preamble
    assert flight[-16:] == other.mac(flight[8:-16])
    other.read(flight[8:-16])
    side.inbox += other.write()
    other.read(side.run())
    evidence = other.binding(b"R", 1)
    side.inbox += other.seal(1, b"\x01\x01\x00\x01\x80" + len(evidence).to_bytes(4, "big") + evidence + b"\x00")
    assert other.open(side.run()) == (1, b"\x01\x00\x00\x01\x80" + bytes(4) + b"\x00")
    exchange(other, side.session)


@pytest.mark.parametrize(
    "changes",
    [
        {"manifest_sha256": b"short"},
        {"mac_key": b"short"},
        {"own_id": -1},
        {"peer_id": 65536},
        {"static_private": b"x"},
        {"suites": ()},
        {"suites": (3,)},
    ],
)
def test_an_end_is_checked_when_it_is_made(changes):
    with pytest.raises(ValueError, match="got"):
        client(**changes)


def test_a_private_key_is_in_no_repr():
    assert repr(MAC_KEY) not in repr(client())
    assert "61" * 4 not in repr(client(static_private=b"a" * 32))
    assert "aaaa" not in repr(client(static_private=b"a" * 32))
