"""The Noise layer against other implementations: their vectors, and one of them at the other end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from transport import aead, noise
from transport.errors import HandshakeError, LimitError, RecordError, TransportError
from transport.noise import XX, CipherState, KeyPair

NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"

# The points of low order and their other encodings (RFC 7748, section 6.1; cr.yp.to/ecdh.html), without the top bit.
P = 2**255 - 19
LOW_ORDER = [
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
]
LOW_ORDER = [(point | high << 255).to_bytes(32, "little") for point in LOW_ORDER for high in (0, 1)]


def pair(private):
    return KeyPair.from_private(bytes.fromhex(private))


def start(initiator, s=None, prologue=b"", payloads=()):
    return noise.handshake(
        NAME, XX, initiator=initiator, prologue=prologue, s=s or KeyPair.generate(), payloads=payloads
    )


def finish(steps, message=None):
    try:
        steps.send(message)
    except StopIteration as end:
        return end.value
    raise AssertionError("the handshake has not ended")


def shake(initiator, responder, change=lambda number, message: message):
    """Both ends' results; `change` is what lies between them."""
    next(responder)
    message1 = change(1, next(initiator))
    assert initiator.send(None) is None
    message2 = change(2, responder.send(message1))
    message3 = change(3, initiator.send(message2))
    responder.send(None)
    return finish(initiator), finish(responder, message3)


@pytest.fixture
def ephemerals(monkeypatch):
    """Fixes the ephemeral keys, in the order in which they are made: the product has no way to."""

    def fix(*privates):
        pairs = iter([pair(private) for private in privates])
        monkeypatch.setattr(KeyPair, "generate", classmethod(lambda cls: next(pairs)))

    return fix


@pytest.mark.parametrize("source", ["cacophony", "snow"])
def test_the_vectors_of_other_implementations_with_payloads(vectors, ephemerals, source):
    data = json.loads((vectors / "noise" / f"{source}_25519_ChaChaPoly_SHA256.json").read_text())
    (vector,) = [v for v in data["vectors"] if v["protocol_name"] == NAME.decode()]
    said = [(bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in vector["messages"]]
    prologue = bytes.fromhex(vector["init_prologue"])
    ephemerals(vector["init_ephemeral"], vector["resp_ephemeral"])
    seen = []
    one, two = shake(
        start(True, pair(vector["init_static"]), prologue, [said[0][0], said[2][0]]),
        start(False, pair(vector["resp_static"]), prologue, [said[1][0]]),
        lambda _, message: seen.append(message) or message,
    )
    assert seen == [ciphertext for _, ciphertext in said[:3]]
    assert two.payloads == (said[0][0], said[2][0])
    assert one.payloads == (said[1][0],)
    assert one.h == two.h
    assert "handshake_hash" not in vector or one.h.hex() == vector["handshake_hash"]
    assert (one.rs, two.rs) == (pair(vector["resp_static"]).public, pair(vector["init_static"]).public)
    for number, (payload, ciphertext) in enumerate(said[3:]):
        sender, receiver = (one, two) if number % 2 else (two, one)
        assert sender.sending.encrypt_with_ad(b"", payload) == ciphertext
        assert receiver.receiving.decrypt_with_ad(b"", ciphertext) == payload


@pytest.mark.parametrize("initiator", [True, False])
def test_noiseprotocol_at_the_other_end_in_both_roles_and_directions_across_rekeys(initiator):
    other = NoiseConnection.from_name(NAME)
    (other.set_as_responder if initiator else other.set_as_initiator)()
    other.set_prologue(b"prologue")
    static = KeyPair.generate()
    other.set_keypair_from_private_bytes(Keypair.STATIC, static.private)
    other.start_handshake()
    ours = start(initiator, prologue=b"prologue")
    if initiator:
        other.read_message(next(ours))
        ours.send(None)
        other.read_message(ours.send(bytes(other.write_message())))
        split = finish(ours)
    else:
        next(ours)
        other.read_message(ours.send(bytes(other.write_message())))
        ours.send(None)
        split = finish(ours, bytes(other.write_message()))
    assert split.h == other.get_handshake_hash()
    assert split.rs == static.public
    for number in range(5):
        assert split.receiving.decrypt_with_ad(b"", other.encrypt(b"to us %d" % number)) == b"to us %d" % number
        assert other.decrypt(split.sending.encrypt_with_ad(b"", b"from us %d" % number)) == b"from us %d" % number
        split.receiving.rekey()
        split.sending.rekey()
        other.rekey_outbound_cipher()
        other.rekey_inbound_cipher()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_flip_of_any_byte_kills_the_handshake(number):
    length = {1: 32, 2: 96, 3: 64}[number]
    one, two = KeyPair.generate(), KeyPair.generate()
    for at in range(length):

        def flip(n, message, at=at):
            return message if n != number else message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]

        with pytest.raises(HandshakeError):
            shake(start(True, one), start(False, two), flip)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_wrong_lengths_die_before_any_cryptography(number, monkeypatch):
    def cut(n, message):
        if n != number:
            return message
        monkeypatch.setattr(KeyPair, "dh", None)
        monkeypatch.setattr(aead.Cipher, "decrypt", None)
        return message[:-1]

    with pytest.raises(HandshakeError, match=f"message {number}: .* wanted"):
        shake(start(True), start(False), cut)


def test_trailing_bytes_are_not_taken_for_a_payload():
    for number in (2, 3):
        with pytest.raises(HandshakeError):
            shake(start(True), start(False), lambda n, m, number=number: m + b"x" if n == number else m)


def test_another_prologue_fails_at_message_2():
    seen = []
    with pytest.raises(HandshakeError, match="manifest"):
        shake(start(True, prologue=b"a"), start(False, prologue=b"b"), lambda n, m: seen.append(n) or m)
    assert seen == [1, 2]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused_as_ephemeral_of_either_end(point):
    with pytest.raises(HandshakeError, match="low order"):
        shake(start(True), start(False), lambda n, m: point if n == 1 else m)
    with pytest.raises(HandshakeError, match="low order"):
        shake(start(True), start(False), lambda n, m: point + m[32:] if n == 2 else m)


@pytest.mark.parametrize("point", LOW_ORDER[::2])
def test_points_of_low_order_are_refused_as_statics(point):
    with pytest.raises(HandshakeError, match="low order"):
        shake(start(True, KeyPair(bytes(32), point)), start(False))
    with pytest.raises(HandshakeError, match="low order"):
        shake(start(True), start(False, KeyPair(bytes(32), point)))


@pytest.mark.parametrize("top", [0, 0x80])
def test_our_own_keys_at_the_other_end_are_refused(top):
    same = KeyPair.generate()
    alias = KeyPair(same.private, same.public[:31] + bytes([same.public[31] ^ top]))
    with pytest.raises(HandshakeError, match="our own"):
        shake(start(True, same), start(False, alias))
    initiator = start(True)
    message1 = next(initiator)
    initiator.send(None)
    echoed = message1[:31] + bytes([message1[31] ^ top])
    with pytest.raises(HandshakeError, match="our own"):
        initiator.send(echoed + bytes(64))


def test_a_replayed_message_2_or_client_flow_dies():
    recorded = {}
    client, server = KeyPair.generate(), KeyPair.generate()
    shake(start(True, client), start(False, server), recorded.setdefault)
    with pytest.raises(HandshakeError):
        shake(start(True, client), start(False, server), lambda n, m: recorded[2] if n == 2 else m)
    responder = start(False, server)
    next(responder)
    responder.send(recorded[1])
    responder.send(None)
    with pytest.raises(HandshakeError):
        responder.send(recorded[3])


@given(st.lists(st.binary(max_size=150), min_size=1, max_size=3), st.booleans())
def test_any_bytes_give_a_transport_error(messages, initiator):
    steps = start(initiator)
    next(steps)
    if initiator:
        steps.send(None)

    def tell():
        for message in (*messages, b""):
            if steps.send(message) is not None:
                steps.send(None)

    with pytest.raises(TransportError):
        tell()


def test_a_cipher_state_moves_on_only_with_what_was_authentic():
    sender, receiver = CipherState(bytes(32)), CipherState(bytes(32))
    good = sender.encrypt_with_ad(b"ad", b"text")
    for bad in (good[:-1], good + b"x", b"", bytes(16), good[:3] + b"?" + good[4:]):
        with pytest.raises(RecordError, match="record 0"):
            receiver.decrypt_with_ad(b"ad", bad)
    with pytest.raises(RecordError):
        receiver.decrypt_with_ad(b"da", good)
    assert receiver.n == 0
    assert receiver.decrypt_with_ad(b"ad", good) == b"text"
    sender.n = noise.MAX_NONCE
    with pytest.raises(LimitError):
        sender.encrypt_with_ad(b"", b"")


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**64 - 1), st.binary(max_size=70), st.binary(max_size=300))
def test_the_aead_agrees_with_two_libraries(k, n, ad, plaintext):
    from Crypto.Cipher import ChaCha20_Poly1305
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = bytes(4) + n.to_bytes(8, "little")
    cipher = ChaCha20_Poly1305.new(key=k, nonce=nonce)
    cipher.update(ad)
    sealed = b"".join(cipher.encrypt_and_digest(plaintext))
    assert aead.Cipher(k).encrypt(n, ad, plaintext) == sealed == ChaCha20Poly1305(k).encrypt(nonce, plaintext, ad)
    assert aead.Cipher(k).decrypt(n, ad, bytearray(sealed)) == plaintext


def test_private_keys_are_in_no_repr():
    key = KeyPair.generate()
    one, two = shake(start(True, key), start(False))
    for thing in (key, one, two, one.sending):
        assert key.private.hex() not in repr(thing)
        assert repr(key.private) not in repr(thing)
        assert repr(one.sending.k) not in repr(thing)


def test_generated_keys_are_pairs_and_fresh():
    private, public = noise.generate_keypair()
    assert KeyPair.from_private(private).public == public
    assert noise.generate_keypair() != (private, public)
    with pytest.raises(ValueError, match="wanted 32"):
        KeyPair.from_private(b"short")
