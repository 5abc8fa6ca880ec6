"""Evidence at both ends of a link: sealed to the handshake, exchanged in order, refused without a detail."""

import contextlib
import hmac
import struct
import time

import pytest
from ends import LENGTHS, MAC_KEY, MANIFEST, OPENING, Bound, Refuses, Sealed, Side, client, meet, sessions, stage, told
from hypothesis import given
from hypothesis import strategies as st

from attest import (
    NO_CLAIMS,
    AttestationError,
    Evidence,
    EvidenceError,
    Provider,
)
from attest.policy import Policy
from attest.providers.mock import MockAttester, MockKey, MockRoot, MockVerifier
from transport import link, noise
from transport.errors import (
    Alert,
    DecodeError,
    HandshakeError,
    LimitError,
    PeerAlert,
    RecordError,
    TransportError,
    Truncated,
)
from transport.link import End, dump_attest, initiate, load_attest, respond
from transport.noise import KeyPair
from transport.records import Budget, Type


def alert_of(one, data):
    with pytest.raises(PeerAlert) as caught:
        told(one, data)
    return caught.value.code


def test_real_mock_evidence_of_both_ends():
    root = MockRoot.generate()
    ends = {}
    for index, claims in ((0, b"\x81\xa1a\x00"), (1, b"\x81\xa1a\x01")):
        later = int((time.time() + 3600) * 1000)
        attester = MockAttester(MockKey.generate(root, index, later), claims, measurement=bytes([index + 1]) * 48)
        policy = Policy(Provider.MOCK, frozenset({bytes([index + 1]) * 48}), claims, index)
        ends[index] = attester, MockVerifier(root.public, policy)
    i = End(ends[0][0], ends[1][1], MANIFEST, MAC_KEY, 0, 1)
    r = End(ends[1][0], ends[0][1], MANIFEST, MAC_KEY, 1, 0)
    a, b = sessions(i, r)
    assert (a.peer.stage, b.peer.stage) == (1, 0)
    one, two = meet(End(ends[0][0], ends[0][1], MANIFEST, MAC_KEY, 0, 1), r)
    assert isinstance(one.error, AttestationError)
    assert isinstance(two.error, PeerAlert)


def test_a_flip_of_every_byte_of_either_attest_delivers_nothing():
    for who in "IR":
        for at in range(0, 2 + 4 + 256 + 16):

            def flip(name, data, who=who, at=at):
                if name == who and len(data) == 278:
                    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                return data

            one, two = meet(client(), stage(), flip)
            victim = two if who == "I" else one
            assert victim.session is None
            assert victim.error is None or isinstance(victim.error, RecordError)


def test_the_client_refuses_with_one_alert_before_it_says_who_it_is():
    i = client(verifier=Refuses())
    one, two = meet(i, stage())
    assert isinstance(one.error, EvidenceError)
    assert isinstance(two.error, PeerAlert)
    assert two.error.code == Alert.ATTESTATION
    assert two.error.exit_code == 3
    assert len(one.sent) == OPENING[2] + 66 + 278


def test_the_stage_refuses_after_its_own_evidence_and_the_client_is_told():
    one, two = meet(client(), stage(verifier=Refuses()))
    assert isinstance(two.error, EvidenceError)
    assert two.session is None
    assert one.error is None  # it may have sent a MESSAGE already, which was never delivered
    assert alert_of(one.session, bytes(one.inbox)) == Alert.ATTESTATION


def test_refusals_have_one_length_whatever_the_reason():
    class Fails(Sealed):
        def attest(self, binding):
            raise OSError("the platform is away")

    class Odd(Sealed):
        def attest(self, binding):
            return Evidence(self.provider, self.claims, b"x" * 7, ())

    lengths = set()
    for r in (stage(attester=Fails()), stage(admit=frozenset({bytes(32)})), stage(verifier=Refuses())):
        _, two = meet(client(), r)
        assert two.error is not None
        lengths.add(
            len(two.sent) - 2 - LENGTHS[2][1] - (278 if r.attester.__class__ is Sealed and r.admit is None else 0)
        )
    for r in (stage(attester=Odd()), stage(attester=Sealed())):
        one, _ = meet(client(verifier=Bound() if isinstance(r.attester, Odd) else Refuses()), r)
        lengths.add(len(one.sent) - OPENING[2] - 66)
    assert lengths == {278}


def test_a_client_that_is_not_listed_gets_no_evidence():
    listed = KeyPair.generate()
    r = stage(admit=frozenset({listed.public}))
    one, two = meet(client(), r)
    assert isinstance(two.error, HandshakeError)
    assert r.attester.made == 0
    assert isinstance(one.error, PeerAlert)
    a, b = sessions(client(static_private=listed.private), r)
    assert b.peer_static_key == listed.public
    assert a.peer.provider == Provider.MOCK


def test_evidence_of_another_session_or_of_the_other_role_is_refused():
    class Replays(Sealed):
        kept = None

        def attest(self, binding):
            Replays.kept = Replays.kept or super().attest(binding)
            return Replays.kept

    r = stage(attester=Replays())
    sessions(client(), r)
    one, _ = meet(client(), r)
    assert isinstance(one.error, EvidenceError)
    both = {"attester": Replays(), "verifier": Bound()}
    Replays.kept = None
    one, two = meet(client(**both), stage(**both))  # the client sends back what the stage has just sent
    assert one.error is None
    assert isinstance(two.error, EvidenceError)


@pytest.mark.parametrize("kind", [Type.MESSAGE, Type.CLOSE, Type.PING])
def test_nothing_may_come_before_attest(kind, monkeypatch):
    real = link._Stranger.attest

    def other_first(self, attester):
        if self.role == "I":
            yield self.sealer.seal(kind, b"")
        yield from real(self, attester)

    monkeypatch.setattr(link._Stranger, "attest", other_first)
    _, two = meet(client(), stage())
    assert isinstance(two.error, RecordError)
    assert "not allowed here" in str(two.error)
    assert two.session is None


def test_attest_may_not_come_twice():
    a, b = sessions()
    again = a._sealer.seal(Type.ATTEST, dump_attest(Evidence(0, NO_CLAIMS, b"", ())))
    with pytest.raises(RecordError, match="type 1 is not allowed"):
        told(b, again)


def test_a_message_may_follow_attest_in_the_same_flight():
    one, two = Side(initiate(client())), Side(respond(stage()))
    while one.session is None:
        two.inbox += one.run()
        if one.session is not None:
            break
        one.inbox += two.run()
    two.inbox += one.session.seal(b"at once")
    two.run()
    assert told(two.session, bytes(two.inbox)) == b"at once"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", DecodeError),
        (b"\x02\x00\x00\x00" + bytes(5), DecodeError),
        (b"\x01\x01\x10\x01" + bytes(4097) + bytes(5), LimitError),
        (b"\x01\x01\x00\x05abc", DecodeError),
        (b"\x01\x01\x00\x00" + (65537).to_bytes(4, "big") + bytes(65537) + b"\0", LimitError),
        (b"\x01\x01\x00\x00\xff\xff\xff\xff", LimitError),
        (b"\x01\x01\x00\x00\0\0\0\0\x11" + bytes(17 * 4), LimitError),
        (b"\x01\x01\x00\x00\0\0\0\0\x01\xff\xff\xff\xff", LimitError),
        (b"\x01\x01\x00\x00\0\0\0\0\x01\0\0\0\x09abc", DecodeError),
        (b"\x01\x01\x00\x00\0\0\0\0\x00x", DecodeError),
        (bytes(256 * 1024 + 1), LimitError),
    ],
)
def test_evidence_bombs_are_refused_before_a_verifier_sees_them(body, error, monkeypatch):
    with pytest.raises(error):
        load_attest(body)
    monkeypatch.setattr(link, "dump_attest", lambda evidence: body)
    one, two = meet(client(), stage())
    assert isinstance(one.error, error)
    assert isinstance(two.error, PeerAlert)
    assert two.error.code == (Alert.DECODE if error is DecodeError else Alert.LIMIT)


evidences = st.builds(
    Evidence, st.integers(0, 255), st.binary(max_size=100), st.binary(max_size=100),
    st.lists(st.binary(max_size=50), max_size=16).map(tuple),
)  # fmt: skip


@given(evidences)
def test_evidence_survives_the_wire(evidence):
    assert load_attest(dump_attest(evidence)) == evidence


@given(st.binary(max_size=100))
def test_any_bytes_are_evidence_or_a_transport_error(body):
    with contextlib.suppress(TransportError):
        assert dump_attest(load_attest(b"\x01" + body)) == b"\x01" + body


def test_evidence_that_cannot_be_sent_is_refused_at_its_source():
    with pytest.raises(ValueError, match="endorsements"):
        dump_attest(Evidence(1, b"", b"", (b"",) * 17))


def test_a_budget_bounds_what_strangers_make_us_hold():
    budget = Budget(70_000)
    one, two = Side(initiate(client(), budget=budget)), Side(respond(stage()))

    class Large(Sealed):
        def attest(self, binding):
            return Evidence(1, NO_CLAIMS, b"", (bytes(100_000),) * 2)

    two = Side(respond(stage(attester=Large())))
    meet(one, two)
    assert isinstance(one.error, LimitError)
    assert budget.held == 0
    assert isinstance(two.error, PeerAlert)


@pytest.mark.parametrize("how", ["the connection ends", "the driver gives up"])
def test_what_a_stranger_made_us_hold_goes_with_him(how):
    """A part of an ATTEST, and then nothing more: else a thousand such connections would use up the budget."""
    budget, s = Budget(2**20), KeyPair.generate()
    suite = link.SUITES[2]
    preamble = b"mGPT\2\2\0\0"
    prologue = b"MGPT-LINK-v2" + preamble + MANIFEST + b"\xff\xff\0\0"
    stranger = noise.handshake(suite.protocol_name, suite.pattern, initiator=True, prologue=prologue, s=s)
    victim = Side(respond(stage(), budget=budget))
    first = next(stranger)
    assert first is not None
    framed = len(first).to_bytes(2, "big") + first
    victim.inbox += preamble + framed + hmac.digest(MAC_KEY, prologue + framed, "sha256")[:16]
    second = victim.run()
    stranger.send(None)
    third = stranger.send(second[2:])
    assert third is not None
    with pytest.raises(StopIteration) as finished:
        stranger.send(None)
    part = finished.value.value.sending.encrypt_with_ad(b"", struct.pack(">BBH", Type.ATTEST, 0, 0) + bytes(65_515))
    victim.inbox += len(third).to_bytes(2, "big") + third + len(part).to_bytes(2, "big") + part
    victim.run()
    assert budget.held == 65_515
    if how == "the connection ends":
        with pytest.raises(Truncated):
            victim.steps.throw(Truncated("the connection ended"))
    else:
        victim.steps.close()
    assert budget.held == 0
