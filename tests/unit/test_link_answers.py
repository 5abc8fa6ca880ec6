"""Known answers of a whole link, in both directions: tests/second.py computed them, and ours gives every byte again."""

import hashlib
import json
from typing import Any

import pytest
import second
from Crypto.PublicKey import MLKEM
from ends import Side

from attest import Provider
from attest.policy import Policy
from attest.providers.mock import MockAttester, MockKey, MockRoot, MockVerifier
from transport import kem, noise
from transport.errors import Closed
from transport.link import End, initiate, mac_key, respond
from transport.noise import KeyPair

ANSWERS: dict[str, Any] = json.loads(second.TARGET.read_text())
ROOT = MockRoot(second.secret("root"))


def test_the_second_computation_writes_this_file() -> None:
    assert second.answers() == ANSWERS


def end(stage: int, suite: int) -> End:
    """Stage 0 or 1, at its end of link 1."""
    at, key = second.MADE_MS / 1000, second.secret(f"signs for stage {stage}")
    endorsed = MockKey(key, ROOT.endorse(MockRoot(key).public, stage, second.NOT_AFTER_MS))
    policy = Policy(Provider.MOCK, frozenset([second.MEASUREMENT]), second.claims(1 - stage), 1 - stage)
    return End(
        MockAttester(endorsed, second.claims(stage), measurement=second.MEASUREMENT, clock=lambda: at),
        MockVerifier(ROOT.public, policy, clock=lambda: at),
        hashlib.sha256(second.MANIFEST).digest(),
        mac_key(second.MANIFEST),
        stage,
        1 - stage,
        static_private=second.secret("s of R" if stage else "s of I"),
        suites=(suite,),
    )


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fresh otherwise: the ephemeral keys, and the coins of an encapsulation."""
    pairs = iter([KeyPair.from_private(second.secret(name)) for name in ("e of I", "e of R")])
    monkeypatch.setattr(KeyPair, "generate", classmethod(lambda cls: next(pairs)))

    class Fixed(kem.KemKey):
        def __init__(self) -> None:
            seed = second.secret("d") + second.secret("z")
            self._key = MLKEM.construct(param_set=MLKEM.ML_KEM_768, seed=seed)
            self.public = bytes(self._key.ek)

    def encapsulate(public: bytes) -> tuple[bytes, bytes]:
        shared, ciphertext = MLKEM.construct(param_set=MLKEM.ML_KEM_768, ek=public)._encaps(second.secret("m"))
        return bytes(ciphertext), bytes(shared)

    monkeypatch.setattr(noise, "KemKey", Fixed)
    monkeypatch.setattr(noise, "encapsulate", encapsulate)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("suite", second.NAMES)
def test_ours_says_the_same_in_both_directions(suite: int) -> None:
    wanted = ANSWERS[str(suite)]
    first, reply, last = (second.framed(bytes.fromhex(message)) for message in wanted["messages"])
    preamble, mac = bytes.fromhex(wanted["preamble"]), bytes.fromhex(wanted["mac"])
    assert mac_key(second.MANIFEST).hex() == wanted["mac_key"]
    assert end(0, suite).prologue(preamble, "I") == end(1, suite).prologue(preamble, "R")
    assert end(0, suite).prologue(preamble, "I").hex() == wanted["prologue"]

    i, r = Side(initiate(end(0, suite))), Side(respond(end(1, suite)))
    flights = []
    for sender, receiver in ((i, r), (r, i), (i, r), (r, i), (i, r)):
        flights.append(sender.run())
        receiver.inbox += flights[-1]
    r.run()
    assert (i.error, r.error) == (None, None)
    attested = [bytes.fromhex(wanted[role]["records"]["0"]) for role in "RI"]
    assert flights == [preamble + first + mac, reply, last, *attested]

    for role, ours, theirs in (("I", i.session, r.session), ("R", r.session, i.session)):
        answers = wanted[role]
        assert ours.handshake_hash.hex() == wanted["h"]
        shown, binding = theirs.peer_evidence, theirs.peer_binding
        assert (shown.evidence.hex(), shown.claims.hex()) == (answers["evidence"], answers["claims"])
        assert (shown.endorsements[0].hex(), binding.digest.hex()) == (answers["endorsement"], answers["binding"])
        sent = bytes.fromhex(answers["records"]["0"])
        for n in range(second.MESSAGES):
            body = second.body_of(role, n)
            records = ours.seal(body)
            assert answers["records"].get(str(n + 2), records.hex()) == records.hex() or n == 0
            sent += records
            theirs.feed(records)
            assert theirs.next_message() == body
        close = ours.close()
        assert close.hex() == answers["records"][str(answers["count"] - 1)]
        assert hashlib.sha256(sent + close).hexdigest() == answers["sha256"]
        theirs.feed(close)
        with pytest.raises(Closed):
            theirs.next_message()
