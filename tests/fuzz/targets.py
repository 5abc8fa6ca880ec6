"""What `fuzz.py` attacks: every parser of bytes from outside, each with the errors that are its own.

"No other error" is not all: what is accepted must have been read as it is defined. So most targets compare with another
reading (written again, the stream that was sent, a file taken apart by hand) and fail by an AssertionError.

    link        respond-1, respond-2, initiate-1, initiate-2    one end's handshake, against three kinds of peer
                records                                         an established session, altered on the way
                authentic-records, first-records                the same and the first flight, by a peer with the keys
    evidence    attest, evidence, claims, evidence-file, keys, cbor, der, x509, crl, ecdsa, nitro, snp, table,
                delivery, tdx, tdx-collateral, tdx-parts, tdx-files
    messages    codec, messages, parts, batch, answers
    files       manifest, places, address, config, safetensors, header, index, tokenizer, tokenizer-parts,
                tokenizer-more
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import domains
import enclaves
import guests
import msgpack
import numpy as np
import oracles
from Crypto.Hash import SHA256, SHA384
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from numpy.typing import NDArray
from safetensors.numpy import save

import attest
from attest import (
    AttestationError,
    Binding,
    Evidence,
    EvidenceError,
    Provider,
    cbor,
    certificates,
    der,
    ecdsa,
    policy,
    x509,
)
from attest.providers import ANY_CODE, mock, nitro, snp, tdx, tdx_collateral, tdx_quote
from fuzz import handshake, records
from fuzz.handshake import ATTESTER, CLAIMS, KEY, MEASUREMENT, ROOT, VERIFIER
from minigpt.checkpoint import sources, tokenizer, weights
from minigpt.engine.config import Config, tensor_shapes
from minigpt.engine.sampling import Sampling
from minigpt.errors import CheckpointError, ConfigError, ManifestError, MessageError, UsageError
from minigpt.launch import plan
from minigpt.protocol import addresses, batches, manifest, messages
from minigpt.protocol.batches import Batch, Due, Given, Segment, Terms
from minigpt.protocol.messages import Generate, Logits, Refusal, Report, Span, StageReport, Tokens, Wanted
from transport import codec, link
from transport.address import Address
from transport.errors import AddressError, DecodeError, TransportError

TINY = Config(vocab_size=3, n_positions=2, n_embd=2, n_layer=1, n_head=1, n_inner=2, eos_token_id=(2,))


@dataclass(frozen=True)
class Target:
    """A parser under attack.

    Args:
        run: gives it one input, and asserts what must be true of what it accepts.
        errors: what may come out of `run`.
        seeds: inputs that it accepts, or nearly: where mutation begins.
        tree: "json", "msgpack", "cbor" or "der" where an input is a tree, so that a mutation can keep it one; but
            for msgpack, a byte below 8 may be before it.
    """

    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    tree: str | None = None


# Evidence. Keys and time are fixed.
BINDING = Binding("R", Provider.MOCK, hashlib.sha256(b"h").digest(), hashlib.sha256(b"s").digest(), CLAIMS)
EVIDENCE = ATTESTER.attest(BINDING)
SIGNATURE = 64  # bytes
_CLIENT = attest.Unattested().attest(Binding("I", Provider.NONE, bytes(32), bytes(32), attest.NO_CLAIMS))


def _attest(data: bytes) -> None:
    evidence = link.load_attest(data)
    assert link.dump_attest(evidence) == data, "two ATTESTs say the same"
    VERIFIER.verify(evidence, replace(BINDING, provider=evidence.provider, claims=evidence.claims))


def _evidence(data: bytes) -> None:
    """u8: who signs | u16 length | evidence without its signature | the same of the endorsement | claims."""
    by, parts, rest = data[:1], [], data[1:]
    for key, bit in ((KEY, 1), (ROOT, 2)):
        size = int.from_bytes(rest[:2], "big")
        part, rest = rest[2 : 2 + size], rest[2 + size :]
        signed = bool(by and by[0] & bit)
        parts.append(part + (mock._sign(key.private, part) if signed else bytes(SIGNATURE)))
    binding = Binding("R", Provider.MOCK, BINDING.handshake_hash, BINDING.static_key, rest)
    VERIFIER.verify(Evidence(Provider.MOCK, rest, parts[0], (parts[1],)), binding)
    assert by[0] & 3 == 3, "evidence was accepted that nobody signed"
    assert MEASUREMENT in parts[0], "other code was accepted"
    assert rest == CLAIMS, "other claims were accepted"


def _evidence_seeds() -> list[bytes]:
    bare = [part[:-SIGNATURE] for part in (EVIDENCE.evidence, EVIDENCE.endorsements[0])]
    sized = b"".join(struct.pack(">H", len(part)) + part for part in bare)
    return [bytes([by]) + sized + CLAIMS for by in range(4)] + [b"\3" + sized + codec.encode({"stage": 1, "x": "y"})]


def _claims(data: bytes) -> None:
    fields = policy.decode_claims(data)
    if fields is not None:
        assert msgpack.packb(fields) == data, "claims that are not canonical"
        for value in fields.values():
            policy.show_scalar(value).encode("ascii")


def _evidence_file(data: bytes) -> None:
    evidence, binding = attest.load_evidence(data)
    assert attest.load_evidence(attest.dump_evidence(evidence, binding)) == (evidence, binding)


def _keys(data: bytes) -> None:
    kind = mock.MockRoot if b"minigpt-mock-root" in data else mock.MockKey
    assert kind.from_json(kind.from_json(data).to_json()) == kind.from_json(data)


def _cbor(data: bytes) -> None:
    oracles.cbor_agrees(data, cbor.read(data))


def _cbor_seeds() -> list[bytes]:
    document = enclaves.document(user_data=b"u", nonce=b"", public_key=None)
    values: list[object] = [None, True, -1, 2**64 - 1, "text", b"bytes", [], {}, {"a": [{1: b"c"}]}, list(range(30))]
    return [*map(enclaves.cbor, values), b"\xbf\x01\x9f\x02\xff\xff", document, cbor.read(document)[2]]


def _der(data: bytes) -> None:
    """Sequences, sets and explicit tags all the way down; what is accepted has no other encoding."""
    assert _again(der.Reader(data), 0) == data, "two encodings of one value"


def _again(reader: der.Reader, depth: int) -> bytes:
    parts = []
    readers = {der.BOOLEAN: "boolean", der.INTEGER: "integer", der.OID: "oid", der.BITS: "named_bits",
               der.UTC_TIME: "time", der.GENERALIZED_TIME: "time", **dict.fromkeys(der._STRINGS, "text")}  # fmt: skip
    while reader.more:
        tag = reader.data[reader.at]
        if tag & 0x20 and depth < 20:
            parts.append(enclaves.tlv(tag, _again(reader.inside(tag), depth + 1)))
            continue
        if tag in readers:
            getattr(der.Reader(reader.data[reader.at :]), readers[tag])()
        parts.append(enclaves.tlv(tag, reader.content(tag)))
    reader.end()
    return b"".join(parts)


def _x509(data: bytes) -> None:
    certificate = x509.Certificate.read(data)
    oracles.certificate_agrees(data, certificate)
    certificate.is_signed_by(certificate.key)


def _certificates() -> list[bytes]:
    return [*(holder.der for holder in enclaves.CHAIN), enclaves.amd()]


def _crl(data: bytes) -> None:
    oracles.list_agrees(data, x509.Crl.read(data))


_CURVES: dict[int, tuple[str, int, int, ec.EllipticCurve, Any, Any]] = {  # name, prime, order; both sides' names
    1: ("P-256", 2**256 - 2**224 + 2**192 + 2**96 - 1, ecdsa._ORDER["NIST P-256"], ec.SECP256R1(), SHA256,
        hashes.SHA256()),
    2: ("P-384", 2**384 - 2**128 - 2**96 + 2**32 - 1, ecdsa._ORDER["NIST P-384"], ec.SECP384R1(), SHA384,
        hashes.SHA384()),
}  # fmt: skip


def _ecdsa(data: bytes) -> None:
    """u8 curve | u8 for each of x, y, r, s: 0, or which awkward number it is | x | y | r | s | message."""
    if len(data) < 5 or data[0] not in _CURVES:
        raise EvidenceError("no such curve")
    name, prime, order, theirs, hasher, their_hasher = _CURVES[data[0]]
    size = ecdsa.SIZE[name]
    parts = [data[5 + i * size : 5 + (i + 1) * size] for i in range(4)]
    numbers = [int.from_bytes(part, "big") for part in parts]
    for i, which in enumerate(data[1:5]):
        given = numbers[i]
        awkward = (given, 0, 1, order - 1, order, order + 1, prime - 1, prime, given + order, given + prime,
                   abs(order - given), abs(prime - given), 256**size - 1, numbers[(i + 1) % 4])  # fmt: skip
        numbers[i] = awkward[which % len(awkward)]
    (x, y, r, s), message = numbers, data[5 + 4 * size :]
    try:
        public = ec.EllipticCurvePublicNumbers(x, y, theirs).public_key()
    except ValueError:
        public = None
    if max(x, y) >= 256**size:
        raise EvidenceError("too large to be written")
    try:
        key = ecdsa.public_key(name, x.to_bytes(size, "big") + y.to_bytes(size, "big"))
    except EvidenceError:
        assert public is None, "others take this key"
        raise
    assert public is not None, "others refuse this key"
    signed = ecdsa.is_signed(key, hasher, message, r, s)
    try:
        public.verify(encode_dss_signature(r, s), message, ec.ECDSA(their_hasher))
    except InvalidSignature:
        assert not signed, "others refuse this signature"
    else:
        assert signed, "others take this signature"


def _ecdsa_seeds() -> list[bytes]:
    made = []
    for kind, (name, _, order, _, _, hasher) in _CURVES.items():
        key = enclaves.CHAIN[0].key if name == "P-384" else domains.KEYS["root"]
        size, point = ecdsa.SIZE[name], key.public_key().public_numbers()
        r, s = decode_dss_signature(key.sign(b"message", ec.ECDSA(hasher, deterministic_signing=True)))
        for numbers in ((point.x, point.y, r, s), (point.x, point.y, r, order - s)):
            made.append(bytes([kind]) + bytes(4) + b"".join(n.to_bytes(size, "big") for n in numbers) + b"message")
    return made


def _nitro(data: bytes) -> None:
    """u8: whether it is signed | a payload; or a document."""
    if data[:1] == b"\1":
        data = enclaves.sign(data[1:], enclaves.CHAIN[-1].key)
    statement = nitro.authenticate(data, (), [enclaves.ROOT], enclaves.NOW)
    nitro.failures(statement, {"pcr0": "00" * 48})
    assert len(data) <= nitro.MAX_DOCUMENT
    assert all(0 <= index < 32 and len(value) == 48 for index, value in statement.pcrs.items())


def _nitro_seeds() -> list[bytes]:
    payload = enclaves.cbor(enclaves.fields(nonce=b"n", user_data=b"", public_key=b"k" * 32))
    return [enclaves.document(nonce=b"n"), b"\1" + payload]


def _items(data: bytes) -> list[bytes]:
    """The elements that DER is a row of."""
    reader, found = der.Reader(data), []
    while reader.more:
        found.append(reader.whole(data[reader.at]))
    return found


def _snp(data: bytes) -> None:
    """u8 0: a report; 1: what is signed of one; 2: its endorsements; 3: what is signed of a revocation list."""
    kind, data = data[:1], data[1:]
    ends, shown = guests.chain(), guests.plain()
    root = guests.root(ends)
    if kind == b"\1":
        shown = guests.report(edits={0: data[: snp.SIGNED]})
    elif kind == b"\2":
        ends = _items(data)
    elif kind == b"\3":
        scheme = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
        signed = guests.rsa_key(0).sign(data, scheme, hashes.SHA384())
        ends.append(enclaves.tlv(0x30, data, guests.PSS, enclaves.tlv(3, b"\0", signed)))
    else:
        shown = data
    statement, _ = snp.examine(shown, ends, [root], enclaves.NOW)
    snp.failures(statement, {"measurements": ["00" * 48], "min_tcb": {"snp": 1}})
    json.dumps(snp.pinned(statement).to_json())
    assert (statement.report_data, statement.measurement) == (shown[0x50:0x90], shown[0x90:0xC0])
    assert statement.chip_id == shown[0x1A0:0x1E0]
    assert len(shown) == 1184


def _snp_seeds() -> list[bytes]:
    shown = guests.report()
    chains = [guests.chain(), guests.chain(vlek=True), [*guests.chain("Turin"), guests.revocations(7)]]
    listed = der.Reader(guests.revocations(7)).inside(der.SEQUENCE).whole(der.SEQUENCE)
    rest = [b"\2" + b"".join(chain) for chain in chains]
    return [b"\0" + shown, b"\1" + shown[: snp.SIGNED], *rest, b"\3" + listed]


def _table(data: bytes) -> None:
    found = certificates.in_table(data)
    assert sum(map(len, found)) <= len(data), "more than there is"


def _table_seeds() -> list[bytes]:
    return [
        guests.full_table([b"one", b"two", b"three"]),
        guests.table(vlek=b"-----BEGIN X-----\nAAAA\n-----END X-----\n"),
    ]


def _delivery(data: bytes) -> None:
    assert certificates.delivery(certificates.delivered(data)) == data


def _tdx(data: bytes) -> None:
    """u8: 1 a PCK certificate's extension, 2 three certificates, 3 their PEM, each within a quote; or a quote."""
    if data[:1] == b"\1":
        made = domains.holders({"pck": {"extensions": (enclaves.extension(domains.SGX, data[1:], critical=False),)}})
        data = domains.quote(made)
    elif data[:1] == b"\2":
        data = domains.quote(text=domains.pem(*_items(data[1:])))
    elif data[:1] == b"\3":
        data = domains.quote(text=data[1:])
    pck = tdx.parse(data).pck
    tdx.examine(data, _collateral(), [domains.ROOT], enclaves.NOW)
    statement = tdx.authenticate(data, (), [domains.ROOT], enclaves.NOW)
    assert [name for name, _ in tdx.failures(statement, ANY_CODE)][-1] == "collateral-required"
    assert all(len(getattr(statement, name)) == size for name, size in tdx_quote.BODY[:-2])
    assert len(data) <= tdx.MAX_QUOTE
    assert pck is not None
    assert (len(pck.ppid), len(pck.fmspc), len(pck.pceid), len(pck.components)) == (16, 6, 2, 16)


def _tdx_seeds() -> list[bytes]:
    chain = [domains.HOLDERS[who].der for who in ("pck", "authority", "root")]
    extension = x509.Certificate.read(chain[0]).extensions["1.2.840.113741.1.13.1"][1]
    parts = [b"\1" + extension, b"\2" + b"".join(chain), b"\3" + domains.pem(*chain)]
    return [domains.quote(), domains.quote(version=5, kind=3), *parts]


@functools.cache
def _quote() -> bytes:
    return domains.quote()


@functools.cache
def _genuine() -> tuple[bytes, ...]:
    return tuple(domains.collateral())


def _collateral(**changes: bytes) -> list[bytes]:
    """The seven parts, with others in place of some."""
    return [changes.get(part, genuine) for part, genuine in zip(domains.PARTS, _genuine(), strict=True)]


def _tdx_collateral(data: bytes) -> None:
    """One of the two texts, signed."""
    which = "identity" if b"TD_QE" in data else "info"
    parts = _collateral(**{which: data, f"{which}_signature": domains.signature(domains.KEYS["signer"], data)})
    statement = tdx.authenticate(_quote(), parts, [domains.ROOT], enclaves.NOW)
    read = json.loads(data)
    assert statement.tcb_evaluation is not None
    assert statement.tcb_evaluation <= read["tcbEvaluationDataNumber"]
    assert read["issueDate"] <= domains.date(enclaves.NOW) <= read["nextUpdate"]
    assert statement.status in tdx_collateral.STATUSES
    assert statement.status == "UpToDate" or statement.status in data.decode()
    assert all(json.dumps(advisory)[1:-1] in json.dumps(read) for advisory in statement.advisories)
    accepted = not tdx.failures(statement, ANY_CODE)
    assert accepted == (statement.status == "UpToDate")


def _tdx_collateral_seeds() -> list[bytes]:
    levels = [domains.firmware(), domains.firmware("OutOfDate", "INTEL-SA-1", pcesvn=3)]
    needy = [domains.module("01", domains.level("SWHardeningNeeded", "INTEL-SA-2", isvsvn=2))]
    texts = [domains.info(tcbLevels=levels), domains.info(tdxModuleIdentities=needy), domains.identity()]
    return [json.dumps(text).encode() for text in texts]


_SIGNED_PARTS = {1: ("signer", "root"), 2: ("root_list", "root"), 3: ("pck_list", "authority")}


def _tdx_parts(data: bytes) -> None:
    """u8: which part of the collateral, 1 its signer, 2 and 3 a revocation list | what is signed of it."""
    if not data or data[0] not in _SIGNED_PARTS:
        raise EvidenceError("no such part")
    part, who = _SIGNED_PARTS[data[0]]
    signed = domains.KEYS[who].sign(data[1:], ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    whole = enclaves.tlv(0x30, data[1:], enclaves.SHA256_ECDSA, enclaves.tlv(3, b"\0", signed))
    parts = _collateral(**{part: whole})
    statement = tdx.authenticate(_quote(), parts, [domains.ROOT], enclaves.NOW)
    assert statement.crl_numbers is not None
    assert not tdx.failures(statement, ANY_CODE)
    if part == "signer":
        oracles.certificate_agrees(whole, x509.Certificate.read(whole))
    else:
        oracles.list_agrees(whole, x509.Crl.read(whole))


def _tdx_parts_seeds() -> list[bytes]:
    parts = dict(zip(domains.PARTS, domains.collateral(), strict=True))
    lists = {"root_list": domains.revocations(domains.HOLDERS["root"], 9, 2**150), "pck_list": parts["pck_list"]}
    signed = {name: der.Reader(part).inside(der.SEQUENCE).whole(der.SEQUENCE) for name, part in (parts | lists).items()
              if name in ("signer", "root_list", "pck_list")}  # fmt: skip
    return [bytes([kind]) + signed[name] for kind, (name, _) in _SIGNED_PARTS.items()]


_FILES = dict(enumerate(("tcbInfo", "enclaveIdentity", "signer.pem", "root.crl", "pck.crl")))


@functools.cache
def _files() -> dict[str, bytes]:
    return domains.files(domains.HOLDERS, _genuine())


@functools.cache
def _parsed() -> tdx_quote.Quote:
    return tdx.parse(_quote())


def _tdx_files(data: bytes) -> None:
    """u8 which file of a stage's folder | its content; or a file more than those that are wanted."""
    folder = _folder("tdx-files")
    kind, content = (_FILES[data[0]], data[1:]) if data[:1] and data[0] in _FILES else ("more", data)
    (folder / "more").unlink(missing_ok=True)
    for name, file in (_files() | {kind: content}).items():
        (folder / name).write_bytes(file)
    parts = tdx.endorsements(_parsed(), certificates.files(str(folder)))
    for name, part in zip(("tcbInfo", "enclaveIdentity"), parts[::2], strict=False):
        assert any(json.loads(part) == json.loads(file.read_bytes()).get(name)
                   for file in folder.iterdir() if name.encode() in file.read_bytes())  # fmt: skip
        assert any(part in file.read_bytes() for file in folder.iterdir()), "not the bytes of a file"
    assert len(parts) == tdx_collateral.PARTS


def _tdx_files_seeds() -> list[bytes]:
    return [bytes([kind]) + _files()[name] for kind, name in _FILES.items()]


# Messages.


def _codec(data: bytes) -> None:
    value = codec.decode(data)
    assert codec.decode(codec.encode(value)) == value, "not what was read"


def _messages(data: bytes) -> None:
    value = codec.decode(data)
    assert codec.decode(codec.encode(messages.encode(messages.decode(value)))) == value, "not what was said"


def _message_seeds() -> list[bytes]:
    drawn = Sampling(0.7, 40, 0.9, 2**64 - 1)
    penalised = Sampling(0.7, 40, 0.9, 3, 0.05, 1.2, -0.5, 0.25, ((0, -100.0), (7, 2.5)))
    spans = (messages.Span(0.1, 0.2, 0.3, 0.4, 5.0),)
    said: list[messages.Message] = [
        Generate(0, (1, 2, 3), 5, (2,), drawn, True), Generate(3, (), 1, wanted=Wanted.LOGITS),
        Generate(0, (1, 2, 3), 5, sampling=penalised, top=2, delivered=1),
        Generate(0, (1, 2, 3), 1, wanted=Wanted.SCORES, top=20),
        Tokens(5, (1, 2), (), (), ((1, -0.5), (2, -0.1))), messages.Scores(1, (-0.5,), spans, ((1, -0.5), (2, -0.7))),
        Tokens(5, (1, 2), (-0.1, -0.2), spans), messages.Logits(1, np.ones(3, np.float32)),
        messages.Done(messages.Reason.END), messages.Refusal(0, "busy", "later"), messages.Failure(1, "failed", "x"),
        messages.Cancel(), messages.Reset(), messages.Status(), Report((StageReport(0, evidence="{}"), StageReport(1))),
    ]  # fmt: skip
    return [codec.encode(messages.encode(message)) for message in said]


def _array(data: bytes) -> list[bytes]:
    """As a channel reads a message that is an array."""
    if not codec.is_parts(data):
        raise DecodeError("no array")
    parts = codec.decode_parts(data)
    assert parts == msgpack.unpackb(data), "not what msgpack reads"
    return parts


def _array_seeds() -> list[bytes]:
    sizes = (0, 1, 255, 256, 5000)
    wide = b"\x92\xc5\x00\x01a\xc6\x00\x00\x00\x02bc"  # lengths in more bytes than they need
    return [codec.encode([bytes([size % 251]) * size for size in sizes[:count]]) for count in range(6)] + [wide]


WIDTH = 2  # of the rows of a batch


def _batch(data: bytes) -> None:
    """What is accepted says the same when it is sent on."""
    parts = _array(data)
    read = batches.decode(parts, WIDTH)
    assert read.hidden.shape == (sum(segment.rows for segment in read.segments), WIDTH)
    sent = list(map(bytes, batches.encode(read)))
    assert sent == parts, "two batches say the same"


def _batch_seeds() -> list[bytes]:
    drawn = Terms(9, Sampling(0.7, 40, 0.9, 2**64 - 1), logprobs=True, spans=True)
    penalised = Terms(9, Sampling(0.7, 40, 0.9, 3, 0.05, 1.2, -0.5, 0.25, ((0, -100.0), (7, 2.5))), top=20)
    given = (
        Segment(0, 3, 1, Wanted.TOKEN, Given((5, 5), (1, 2))),
        Segment(7, 3, 1, Wanted.TOKEN),
        Segment(1, 0, 2, Wanted.SCORES, Given((3, 4))),
    )
    segments = (
        Segment(0, 0, 2, Wanted.NOTHING),
        Segment(7, 3, 1, Wanted.TOKEN),
        Segment(2**32 - 1, 9, 1, Wanted.TOKENS),
    )
    rows = np.arange(8, dtype=np.float32).reshape(4, WIDTH)
    made = [
        Batch(segments, rows, ((0, drawn), (7, Terms(2**20, messages.GREEDY))), (1, 2, 3)),
        Batch(given, rows, ((0, penalised), (7, drawn), (1, penalised))),
        Batch((Segment(1, 5, 4, Wanted.LOGITS),), rows), Batch((), batches.NO_ROWS),
        Batch((), batches.NO_ROWS, (), (4,)),
    ]  # fmt: skip
    return [codec.encode(list(map(bytes, batches.encode(batch)))) for batch in made]


# What the answers answer: of everything that can be wanted one or two.
DUE = [
    Due(Segment(lane, 4, rows, wanted), Terms(9, messages.GREEDY, logprobs, spans, top).ask(wanted))
    for lane, (rows, wanted, logprobs, spans, top) in enumerate(
        [
            (1, Wanted.TOKEN, False, False, 0),
            (1, Wanted.TOKEN, True, True, 2),
            (3, Wanted.TOKENS, True, False, 1),
            (2, Wanted.NOTHING, False, False, 0),
            (2, Wanted.LOGITS, False, True, 0),
            (2, Wanted.SCORES, False, True, 2),
        ]
    )
]
BEHIND = range(1, 3)


def _answers(data: bytes) -> None:
    """What is accepted is what was asked for, and says the same when it is passed on."""
    parts = _array(data)
    results = batches.decode_answers(parts, DUE, TINY, BEHIND)
    assert len(results) == len(DUE)
    for (segment, ask), result in zip(DUE, results, strict=True):
        if isinstance(result, Refusal):
            assert result.stage in BEHIND
            assert (result.reason + result.text).isprintable()
        elif ask.wanted is Wanted.NOTHING:
            assert result is None
        elif ask.wanted is Wanted.LOGITS:
            assert isinstance(result, Logits)
            assert len(result.values) == TINY.vocab_size
        elif ask.wanted is Wanted.SCORES:
            assert isinstance(result, messages.Scores)
            assert (result.position, len(result.logprobs)) == (segment.start + 1, segment.rows)
            assert all(logprob <= 0 for logprob in result.logprobs)
        else:
            assert isinstance(result, Tokens)
            assert result.position == segment.start + (1 if ask.wanted is Wanted.TOKENS else segment.rows)
            assert len(result.ids) <= segment.rows
            assert len(result.ids) == 1 or ask.wanted is Wanted.TOKENS
            assert all(token < TINY.vocab_size for token in result.ids)
            assert len(result.logprobs) == (len(result.ids) if ask.logprobs else 0)
            assert all(logprob <= 0 for logprob in result.logprobs)
        if isinstance(result, Tokens | messages.Scores):
            count = len(result.ids if isinstance(result, Tokens) else result.logprobs)
            assert len(result.top) == count * ask.top
            assert all(token < TINY.vocab_size and logprob <= 0 for token, logprob in result.top)
        if isinstance(result, messages.Answer):
            assert len(result.spans) == (len(BEHIND) if ask.spans else 0)
    again = batches.encode_answers(results)
    assert again[0][::2] == parts[0][::2], "other kinds of results"
    assert again[1:6] == parts[1:6], "not what was told"
    assert _told(batches.decode_answers(again, DUE, TINY, BEHIND)) == _told(results), "not what was said"


def _told(results: tuple[batches.Result, ...]) -> list[object]:
    return [
        (result.position, result.values.tobytes(), result.spans)
        if isinstance(result, Logits)
        else "refused"
        if isinstance(result, Refusal)  # in words that were made printable, and may be cut
        else result
        for result in results
    ]


def _answers_seeds() -> list[bytes]:
    spans = (Span(0.1, 0.2, 0.3, 0.4, 5.0), Span(1.0, 0.0, 0.0, 0.0, 0.0))
    logits = Logits(6, np.arange(TINY.vocab_size, dtype=np.float32), spans)
    refused = Refusal(2, "lane", "lane 3 is not open")
    drawn = Tokens(5, (2,), (-0.5,), spans, ((1, -0.25), (2, -0.5)))
    scored = messages.Scores(5, (-0.5, -0.1), spans, ((1, -0.25), (2, -0.5), (0, -0.25), (1, -0.5)))
    drafted = Tokens(5, (0, 1), (-0.1, -0.2), (), ((0, -0.1), (1, -0.2)))
    made: list[list[batches.Result]] = [
        [Tokens(5, (1,)), drawn, drafted, None, logits, scored],
        [refused, drawn, Tokens(5, ()), refused, refused, scored],
        [refused] * 6,
    ]
    return [codec.encode(batches.encode_answers(results)) for results in made]


def _codec_seeds() -> list[bytes]:
    values: list[object] = [
        None,
        True,
        -1,
        2**63,
        1.5,
        "text",
        b"bytes",
        [],
        {},
        list(range(20)),
        {"a": {"b": [b"c", {"d": -129}]}},
    ]
    return [codec.encode(value) for value in [*values, [[[[[[[[]]]]]]]], {str(i): i for i in range(20)}]]


# Files.


def _manifest(data: bytes) -> None:
    read = manifest.Manifest.parse(data)
    for stage in read.stages:
        read.verifier(stage.index)
    assert [layer for stage in read.stages for layer in stage.layers] == list(range(read.config.n_layer))


def _manifest_seeds() -> list[bytes]:
    simulated = mock.MockPins(ROOT.public, frozenset([MEASUREMENT]))
    image = nitro.NitroPins(dict.fromkeys((0, 1, 2, 31), b"\1" * 48))
    statement = snp.authenticate(guests.report(), guests.chain(), [guests.root(guests.chain())], enclaves.NOW)
    guest = tdx.pinned(tdx.authenticate(_quote(), domains.collateral(), [domains.ROOT], enclaves.NOW))
    made: list[tuple[tuple[int, ...], Any, list[Any]]] = [
        ((2,), None, [simulated]), ((2, 1), [b"\3" * 32], [simulated, image]), ((2,), None, [snp.pinned(statement)]),
        ((2,), None, [image, guest]),
    ]  # fmt: skip
    two = Config.from_json(TINY.to_json() | {"n_layer": 2})
    return [
        plan.write(
            config=two, model="tiny", revision=None, tokenizer_sha256=None, layers=[range(1), range(1, 2)],
            weights_sha256=[b"\1" * 32, b"\2" * 32],
            pins=pins, suites=suites, clients=clients,
        )
        for suites, clients, pins in made
    ]  # fmt: skip


def _places(data: bytes) -> None:
    found = addresses.read(data, 2)
    assert addresses.read(addresses.write(found, 2), 2) == found


def _address(data: bytes) -> None:
    address = Address.parse(data.decode(errors="replace"))
    assert Address.parse(str(address)) == address


@functools.cache
def _folder(name: str) -> Path:
    """An empty folder for a target's files; it lasts as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-")
    _FOLDERS.append(folder)
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _config(data: bytes) -> None:
    folder = _folder("config")
    (folder / "config.json").write_bytes(data)
    config = sources.read_config(folder)
    assert Config.from_json(config.to_json()) == config
    assert all(size > 0 for shape in tensor_shapes(config, range(config.n_layer)).values() for size in shape)


def _tensors() -> dict[str, NDArray[Any]]:
    shapes = tensor_shapes(TINY, range(1))
    dtypes = {"h.0.ln_1.bias": np.float16, "ln_f.bias": np.float16}
    numbers = np.random.default_rng(0)
    return {name: numbers.standard_normal(shape).astype(dtypes.get(name, np.float32)) for name, shape in shapes.items()}


def _safetensors(data: bytes) -> None:
    """One file. What is loaded is compared with the file taken apart by hand."""
    folder = _folder("safetensors")
    (folder / weights.SINGLE).write_bytes(data)
    loaded = weights.load(folder, TINY, range(1)).tensors
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    for name, tensor in loaded.items():
        stored = header.get(name) or header.get("transformer." + name) or header["lm_head.weight"]
        first, last = stored["data_offsets"]
        raw = np.frombuffer(data[end + first : end + last], kinds[stored["dtype"]]).reshape(stored["shape"])
        wide = (raw.astype(np.uint32) << 16).view(np.float32) if stored["dtype"] == "BF16" else raw.astype(np.float32)
        assert tensor.tobytes() == wide.tobytes(), f"{name} is not what the file holds"


def _header(data: bytes) -> None:
    """The header alone: its length before it and zeros after it are right, unless it says otherwise itself."""
    _safetensors(struct.pack("<Q", len(data)) + data + bytes(sum(tensor.nbytes for tensor in _tensors().values())))


def _safetensors_seeds() -> list[bytes]:
    tensors = _tensors()
    prefixed = {"transformer." + name: tensor for name, tensor in tensors.items()}
    return [save(tensors), save(prefixed, {"format": "np"}), save(tensors | {"mask": np.ones((0, 2), np.uint8)})]


def _header_seeds() -> list[bytes]:
    return [file[8 : 8 + int.from_bytes(file[:8], "little")] for file in _safetensors_seeds()]


@functools.cache
def _shards() -> tuple[Path, bytes]:
    """A checkpoint in two files, beside a folder with a third; and its digest."""
    folder, tensors = _folder("index") / "checkpoint", _tensors()
    folder.mkdir()
    (folder.parent / "outside.safetensors").write_bytes(save(tensors))
    names = sorted(tensors)
    for i, file in enumerate(("one.safetensors", "two.safetensors")):
        (folder / file).write_bytes(save({name: tensors[name] for name in names[i::2]}))
    (folder / weights.INDEX).write_bytes(_index_seeds()[0])
    return folder, weights.load(folder, TINY, range(1)).digest


def _index(data: bytes) -> None:
    folder, digest = _shards()
    (folder / weights.INDEX).write_bytes(data)
    assert weights.load(folder, TINY, range(1)).digest == digest, "the index changed what is loaded"


def _index_seeds() -> list[bytes]:
    files = ("one.safetensors", "two.safetensors")
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(_tensors()))}
    outside = weight_map | {"ln_f.bias": "../outside.safetensors"}
    return [json.dumps({"metadata": {}, "weight_map": entries}).encode() for entries in (weight_map, outside)]


def _tokenizer(data: bytes) -> None:
    folder = _folder("tokenizer")
    (folder / "tokenizer.json").write_bytes(data)
    _use(folder)


def _parts(data: bytes) -> None:
    """vocab.json | a zero | merges.txt."""
    folder = _folder("tokenizer-parts")
    vocab, _, merges = data.partition(b"\0")
    (folder / "vocab.json").write_bytes(vocab)
    (folder / "merges.txt").write_bytes(merges)
    _use(folder)


def _more(data: bytes) -> None:
    """tokenizer_config.json | a zero | special_tokens_map.json | a zero | added_tokens.json."""
    folder = _folder("tokenizer-more")
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    (folder / "tokenizer.json").write_bytes(_tokenizer_seeds()[0])
    for name, content in zip(names, [*data.split(b"\0", 2), b"{}", b"{}"], strict=False):
        (folder / name).write_bytes(content)
    _use(folder)


def _use(folder: Path) -> None:
    loaded = tokenizer.load(folder)
    assert loaded is not None
    ids = [*loaded.encode("the café, <|endoftext|> \U0001f600"), 0, 5, 2**32 - 1]
    stream = loaded.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == loaded.decode(ids)


@functools.cache
def _tokenizer_seeds() -> list[bytes]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=40, special_tokens=["<|endoftext|>"], initial_alphabet=list("the caf"), show_progress=False
    )
    encoder.train_from_iterator(["the cat, the café, the hat"] * 3, trainer)
    return [encoder.to_str().encode()]


def _parts_seeds() -> list[bytes]:
    model = json.loads(_tokenizer_seeds()[0])["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    return [json.dumps(model["vocab"]).encode() + b"\0" + merges.encode()]


def _more_seeds() -> list[bytes]:
    token = {"content": "<x>", "lstrip": True, "normalized": False}
    settings = {
        "add_prefix_space": True,
        "bos_token": {"__type": "AddedToken"} | token,
        "extra_special_tokens": ["<y>"],
    }
    listed = settings | {"added_tokens_decoder": {"40": token}, "tokenizer_class": "PreTrainedTokenizerFast"}
    rest = [json.dumps(part).encode() for part in ({"eos_token": token, "pad_token": "<p>"}, {"<x>": 40, "<z>": 41})]
    return [b"\0".join([json.dumps(first).encode(), *rest]) for first in (settings, listed)]


_LINK = (TransportError, AttestationError)


@functools.cache
def _link_seeds() -> dict[str, list[bytes]]:
    return handshake.seeds() | records.seeds()


def _of_link(name: str, run: Callable[[bytes], object]) -> Target:
    return Target(run, _LINK, lambda: _link_seeds()[name])


TARGETS: dict[str, Target] = {
    f"{verb}-{suite}": _of_link(f"{verb}-{suite}", functools.partial(handshake.handshake, role, suite))
    for suite in (1, 2)
    for verb, role in (("respond", "R"), ("initiate", "I"))
} | {
    "records": _of_link("records", records.records),
    "authentic-records": _of_link("authentic-records", records.authentic_records),
    "first-records": _of_link("first-records", records.first_records),
    "attest": Target(_attest, _LINK, lambda: [link.dump_attest(EVIDENCE), link.dump_attest(_CLIENT)]),
    "evidence": Target(_evidence, (AttestationError,), _evidence_seeds),
    "claims": Target(_claims, (), lambda: [CLAIMS, b"\x80", codec.encode({"a": 1, "b": b"2"})], "msgpack"),
    "evidence-file": Target(
        _evidence_file, (EvidenceError,), lambda: [attest.dump_evidence(EVIDENCE, BINDING).encode()], "json"
    ),
    "keys": Target(_keys, (EvidenceError,), lambda: [KEY.to_json().encode(), ROOT.to_json().encode()], "json"),
    "cbor": Target(_cbor, (EvidenceError,), _cbor_seeds, "cbor"),
    "der": Target(_der, (EvidenceError,), _certificates, "der"),
    "x509": Target(_x509, (EvidenceError,), _certificates, "der"),
    "crl": Target(_crl, (EvidenceError,), lambda: [enclaves.revocations(), enclaves.revocations(7, 2**150)], "der"),
    "ecdsa": Target(_ecdsa, (EvidenceError,), _ecdsa_seeds),
    "nitro": Target(_nitro, (EvidenceError,), _nitro_seeds, "cbor"),
    "snp": Target(_snp, (EvidenceError,), _snp_seeds, "der"),
    "table": Target(_table, (EvidenceError,), _table_seeds),
    "delivery": Target(_delivery, (EvidenceError,), lambda: [certificates.delivery([b"one", b"", b"three"])]),
    "tdx": Target(_tdx, (EvidenceError,), _tdx_seeds, "der"),
    "tdx-collateral": Target(_tdx_collateral, (EvidenceError,), _tdx_collateral_seeds, "json"),
    "tdx-parts": Target(_tdx_parts, (EvidenceError,), _tdx_parts_seeds, "der"),
    "tdx-files": Target(_tdx_files, (AttestationError,), _tdx_files_seeds, "json"),
    "codec": Target(_codec, (DecodeError,), _codec_seeds, "msgpack"),
    "messages": Target(_messages, (DecodeError, MessageError), _message_seeds, "msgpack"),
    "parts": Target(_array, (DecodeError,), _array_seeds, "msgpack"),
    "batch": Target(_batch, (DecodeError, MessageError), _batch_seeds, "msgpack"),
    "answers": Target(_answers, (DecodeError, MessageError), _answers_seeds, "msgpack"),
    "manifest": Target(_manifest, (ManifestError,), _manifest_seeds, "json"),
    "places": Target(
        _places,
        (UsageError,),
        lambda: [addresses.write(each, 2) for each in (["tcp://a.b:1", "vsock://16:5000"], ["tcp://[::1]:5000"] * 2)],
    ),
    "address": Target(_address, (AddressError,), lambda: [b"tcp://a.b:1", b"tcp://[::1]:5000", b"vsock://16:5000"]),
    "config": Target(_config, (ConfigError,), lambda: [json.dumps(TINY.to_json()).encode()], "json"),
    "safetensors": Target(_safetensors, (CheckpointError,), _safetensors_seeds),
    "header": Target(_header, (CheckpointError,), _header_seeds, "json"),
    "index": Target(_index, (CheckpointError,), _index_seeds, "json"),
    "tokenizer": Target(_tokenizer, (CheckpointError,), _tokenizer_seeds, "json"),
    "tokenizer-parts": Target(_parts, (CheckpointError,), _parts_seeds),
    "tokenizer-more": Target(_more, (CheckpointError,), _more_seeds),
}
