"""The primitives that transport and attest stand on, against Wycheproof's vectors."""

import hashlib
import hmac
import json

import pytest
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa

from transport import aead, noise
from transport.errors import HandshakeError
from transport.noise import KeyPair


@pytest.fixture
def cases(vectors):
    def read(name):
        groups = json.loads((vectors / "wycheproof" / f"{name}_test.json").read_text())["testGroups"]
        return [(group, case) for group in groups for case in group["tests"]]

    return read


def unhex(case, *names):
    return [bytes.fromhex(case[name]) for name in names]


def test_x25519_agrees_or_refuses_a_point_of_low_order(cases):
    agreed = refused = 0
    for _, case in cases("x25519"):
        public, private, shared = unhex(case, "public", "private", "shared")
        try:
            assert KeyPair(private, b"").dh(public) == shared, case["tcId"]
            agreed += 1
        except HandshakeError:
            assert not any(shared) or "LowOrderPublic" in case["flags"], case["tcId"]
            refused += 1
    assert agreed > 400
    assert refused > 10


def test_no_agreement_with_a_result_that_everybody_knows(cases):
    for _, case in cases("x25519"):
        if not any(bytes.fromhex(case["shared"])):
            with pytest.raises(HandshakeError, match="low order"):
                KeyPair(bytes.fromhex(case["private"]), b"").dh(bytes.fromhex(case["public"]))


def test_chacha20_poly1305_through_our_seam(cases, monkeypatch):
    class Nonce:  # the vectors use all 12 bytes of the nonce, Noise the last 8
        pack = staticmethod(lambda iv: iv)

    monkeypatch.setattr(aead, "_NONCE", Nonce)
    seen = {"valid": 0, "invalid": 0}
    for group, case in cases("chacha20_poly1305"):
        if group["ivSize"] != 96:
            continue
        key, iv, aad, msg, ct, tag = unhex(case, "key", "iv", "aad", "msg", "ct", "tag")
        seen[case["result"]] += 1
        if case["result"] == "valid":
            assert aead.Cipher(key).encrypt(iv, aad, msg) == ct + tag, case["tcId"]
            assert aead.Cipher(key).decrypt(iv, aad, ct + tag) == msg, case["tcId"]
        else:
            with pytest.raises(ValueError, match=r"MAC|shorter"):
                aead.Cipher(key).decrypt(iv, aad, ct + tag)
    assert min(seen.values()) > 10


def test_hkdf_and_hmac_sha256(cases):
    for _, case in cases("hkdf_sha256"):
        ikm, salt, info, okm = unhex(case, "ikm", "salt", "info", "okm")
        if case["result"] == "valid":
            prk = hmac.digest(salt or bytes(32), ikm, "sha256")
            block, out = b"", b""
            for number in range(1, -(-case["size"] // 32) + 1):
                block = hmac.digest(prk, block + info + bytes([number]), "sha256")
                out += block
            assert out[: case["size"]] == okm, case["tcId"]
    for group, case in cases("hmac_sha256"):
        key, msg, tag = unhex(case, "key", "msg", "tag")
        same = hmac.compare_digest(hmac.digest(key, msg, "sha256")[: group["tagSize"] // 8], tag)
        assert same == (case["result"] == "valid"), case["tcId"]


def test_noise_hkdf_is_hkdf_of_rfc_5869():
    ck, ikm = hashlib.sha256(b"ck").digest(), b"input"
    assert b"".join(noise._hkdf(ck, ikm)) == HKDF(ikm, 64, ck, SHA256)


def test_ed25519(cases):
    for group, case in cases("ed25519"):
        key = eddsa.import_public_key(bytes.fromhex(group["publicKey"]["pk"]))
        assert isinstance(key, ECC.EccKey)
        msg, sig = unhex(case, "msg", "sig")
        try:
            eddsa.new(key, "rfc8032").verify(msg, sig)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == (case["result"] == "valid"), case["tcId"]
