"""Records and messages: what is sealed is opened, whatever the pieces; anything else is a dead link."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import records
from transport.errors import Closed, LimitError, RecordError, TransportError
from transport.noise import CipherState
from transport.records import FIN, Budget, Message, Opener, Sealer, Type, padded_size

ROOM = 65515  # bytes of body and padding in a full record
KEY = bytes(range(32))
LIMITS: dict[int, int] = {Type.MESSAGE: records.MAX_MESSAGE, Type.ATTEST: 1000, Type.PING: 0}


def sealer(n=0):
    cipher = CipherState(KEY)
    cipher.n = n
    return Sealer(cipher)


def opener(n=0, limits=LIMITS, budget=None):
    cipher = CipherState(KEY)
    cipher.n = n
    return Opener(cipher, limits, budget or Budget(1 << 26))


def drain(reader):
    messages = []
    while (message := reader.next()) is not None:
        messages.append(message)
    return messages


def opened(reader, data):
    reader.feed(data)
    return drain(reader)


def record(plaintext, n=0):
    """A record of any plaintext: what a peer who has the key, and breaks the rules, can send."""
    cipher = CipherState(KEY)
    cipher.n = n
    ciphertext = cipher.encrypt_with_ad(b"", plaintext)
    return len(ciphertext).to_bytes(2, "big") + ciphertext


def plain(kind, flags, body=b"", padding=0):
    return bytes([kind, flags]) + padding.to_bytes(2, "big") + body + bytes(padding)


def split(data):
    """The records in `data`."""
    found = []
    while data:
        end = 2 + int.from_bytes(data[:2], "big")
        found.append(data[:end])
        data = data[end:]
    return found


def test_the_known_answers_across_the_rekey(vectors):
    answers = json.loads((vectors / "noise" / "link_v1_kat.json").read_text())
    cipher = CipherState(bytes.fromhex(answers["k_i2r"]))
    reader = Opener(CipherState(bytes.fromhex(answers["k_i2r"])), LIMITS, Budget(1 << 20))
    wanted = {item["n"]: item for item in answers["records_i2r"]}
    for n in range(max(wanted) + 1):
        made = b"".join(records._record(cipher, Type.MESSAGE, FIN, n.to_bytes(4, "big"), 0))
        if n in wanted:
            assert made.hex() == wanted[n]["record"]
        assert opened(reader, made) == [Message(Type.MESSAGE, n.to_bytes(4, "big"))]


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 3072, 65514, 65515, 65516, 200_000, 3 << 20])
def test_what_is_sealed_is_opened(size):
    body = random.Random(size).randbytes(size)
    data = sealer().seal(Type.MESSAGE, body)
    assert opened(opener(), data) == [Message(Type.MESSAGE, body)]
    assert sum(len(r) - 22 for r in split(data)) == padded_size(size)
    assert all(len(r) <= 65537 for r in split(data))


def test_padme_adds_at_most_12_percent_and_leaves_few_lengths():
    sizes = [padded_size(n) for n in range(70_000)]
    assert all(n <= size <= max(256, n * 1.12) for n, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert all(padded_size(size) == size for size in set(sizes))
    assert padded_size(9) == 256
    assert padded_size(16 << 20) == 16 << 20
    assert len(set(sizes)) < 140


def test_prompts_in_one_bucket_have_one_sequence_of_record_lengths():
    def shape(size):
        return tuple(map(len, split(sealer().seal(Type.MESSAGE, bytes(size)))))

    sizes = [4 * 768 * tokens for tokens in (*range(1, 40), 100, 101, 250, 256)]
    shapes = {}
    for size in sizes:
        assert shapes.setdefault(padded_size(size), shape(size)) == shape(size)
    assert len(shapes) < len(sizes)


def test_every_short_message_has_one_length_whatever_its_type():
    assert {len(sealer().seal(kind, bytes(8))) for kind in Type} == {2 + 4 + 256 + 16}


@given(st.lists(st.integers(0, 150_000), max_size=4), st.data())
@settings(max_examples=30)
def test_pieces_make_no_difference(sizes, data):
    writer, reader = sealer(), opener()
    stream = b"".join(writer.seal(Type.MESSAGE, bytes([i]) * size) for i, size in enumerate(sizes))
    got = []
    while stream:
        cut = data.draw(st.integers(1, 70_000))
        got += opened(reader, stream[:cut])
        stream = stream[cut:]
    assert [message.body for message in got] == [bytes([i]) * size for i, size in enumerate(sizes)]
    assert not reader.partial


def test_one_byte_at_a_time():
    writer, reader, got = sealer(), opener(), []
    for byte in writer.seal(Type.MESSAGE, b"one") + writer.seal(Type.PING) + writer.seal(Type.MESSAGE, bytes(600)):
        got += opened(reader, bytes([byte]))
    assert got == [Message(Type.MESSAGE, b"one"), Message(Type.PING, b""), Message(Type.MESSAGE, bytes(600))]


@pytest.mark.parametrize("first", [0, 1022])  # the second is around the rekey
def test_a_flip_of_any_byte_delivers_nothing_more(first):
    data = sealer(first).seal(Type.MESSAGE, b"text")
    for at in range(len(data)):
        reader = opener(first)
        reader.feed(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] + bytes(70_000))
        with pytest.raises(RecordError):
            reader.next()
        with pytest.raises(RecordError, match="dead"):
            reader.next()


@pytest.mark.parametrize("first", [0, 1021])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("replayed", lambda r: [r[0], r[1], r[1], r[2], r[3]]),
        ("swapped", lambda r: [r[0], r[2], r[1], r[3]]),
        ("deleted", lambda r: [r[0], r[2], r[3]]),
        ("reflected", lambda r: [r[0], Sealer(CipherState(bytes(32))).seal(Type.MESSAGE, b"1"), *r[1:]]),
        ("duplicated from the start", lambda r: [r[0], r[0], *r[1:]]),
    ],
)
def test_what_was_moved_ends_in_a_true_prefix_and_an_error(name, change, first):
    writer = sealer(first)
    sent = [writer.seal(Type.MESSAGE, b"%d" % i) for i in range(4)]
    reader, got = opener(first), []
    reader.feed(b"".join(change(sent)))

    def deliver():
        while True:
            got.append(reader.next().body)

    with pytest.raises(RecordError):
        deliver()
    assert got == [b"%d" % i for i in range(len(got))]
    assert len(got) < 4


@pytest.mark.parametrize("size", [1, 65515, 65516, 262_144])
def test_evidence_of_any_size_takes_five_records_at_most(size):
    data = sealer().seal(Type.ATTEST, bytes(size))
    assert len(split(data)) == 1 + (padded_size(size) - 1) // ROOM <= 5
    reader = opener(limits={Type.ATTEST: 262_144})
    assert opened(reader, data) == [Message(Type.ATTEST, bytes(size))]
    for _ in range(4):
        assert opened(reader, record(plain(Type.ATTEST, 0, b"", ROOM), reader.records)) == []
    with pytest.raises(LimitError):
        opened(reader, record(plain(Type.ATTEST, 0, b"", ROOM), reader.records))


def test_a_whole_tensor_can_not_be_deleted():
    writer = sealer()
    parts = [writer.seal(Type.MESSAGE, bytes(size)) for size in (10, 100_000, 10)]
    with pytest.raises(RecordError):
        opened(opener(), parts[0] + parts[2])


def test_both_ends_rekey_together_and_a_key_is_not_used_twice():
    writer, reader, keys = sealer(), opener(), set()
    for n in range(3 * 1024 + 2):
        assert opened(reader, writer.seal(Type.MESSAGE, b"%d" % n)) == [Message(Type.MESSAGE, b"%d" % n)]
        keys.add((writer._cipher.k, n // 1024))
    assert len(keys) == 4
    assert writer.records == reader.records == writer.messages == 3 * 1024 + 2


def test_a_record_under_the_key_before_the_rekey_is_refused():
    with pytest.raises(RecordError):
        opened(opener(1024), record(plain(Type.MESSAGE, FIN, b"x"), 1024))


@pytest.mark.parametrize(
    ("plaintext", "why"),
    [
        (plain(0, FIN), "type 0"),
        (plain(6, FIN), "type 6"),
        (plain(Type.ALERT, FIN, b"\x01"), "type 3 is not allowed here"),
        (plain(Type.MESSAGE, 3), "flags"),
        (plain(Type.MESSAGE, 0x80), "flags"),
        (b"\x02\x01\x00\x01", "padding of 1"),
        (b"\x02\x01\xff\xff" + bytes(10), "padding of 65535"),
        (b"\x02\x01\x00\x03a\x00\x01\x00", "not zero"),
        (b"\x02\x01\x00\x03a\x01\x00\x00", "not zero"),
        (plain(Type.MESSAGE, 0), "nothing in it"),
        (plain(Type.MESSAGE, 0, b"a"), "1 in it, wanted 65515 bytes: it is not the last"),
        (plain(Type.MESSAGE, 0, bytes(60_000), 5514), "65514 in it"),
        (plain(Type.PING, FIN, b"x"), "more than 0 bytes"),
        (plain(Type.ATTEST, FIN, bytes(1001)), "more than 1000 bytes"),
    ],
)
def test_an_authentic_record_that_breaks_a_rule_is_refused(plaintext, why):
    with pytest.raises((RecordError, LimitError), match=why):
        opened(opener(), record(plaintext))


@pytest.mark.parametrize("length", [0, 1, 19])
def test_a_record_shorter_than_an_empty_one_is_refused_from_its_length_alone(length):
    with pytest.raises(RecordError, match="wanted 20"):
        opened(opener(), length.to_bytes(2, "big"))


def test_nothing_comes_between_the_records_of_a_message():
    for kind in (Type.PING, Type.ATTEST):
        reader = opener()
        with pytest.raises(RecordError, match="inside a message"):
            opened(reader, record(plain(Type.MESSAGE, 0, bytes(ROOM))) + record(plain(kind, FIN), 1))


def test_a_record_may_be_all_padding():
    parts = [
        plain(Type.MESSAGE, 0, b"ab", ROOM - 2), plain(Type.MESSAGE, 0, b"", ROOM), plain(Type.MESSAGE, FIN, b"", 0),
    ]  # fmt: skip
    data = b"".join(record(part, n) for n, part in enumerate(parts))
    assert opened(opener(), data) == [Message(Type.MESSAGE, b"ab")]


@pytest.mark.parametrize(("body", "padding"), [(bytes(ROOM), 0), (b"x", ROOM - 1), (b"", ROOM)])
def test_endless_fragments_are_cut_at_the_cap(body, padding):
    reader, budget = opener(limits={Type.MESSAGE: 300_000}), Budget(1 << 20)
    reader._budget = budget

    def flood():
        for n in range(1024):
            opened(reader, record(plain(Type.MESSAGE, 0, body, padding), n))

    with pytest.raises(LimitError, match="more than"):
        flood()
    assert budget.held == 0


def test_a_budget_is_shared_checked_before_a_fragment_is_kept_and_given_back():
    budget = Budget(100_000)
    one, two = opener(budget=budget), opener(budget=budget)
    data = sealer().seal(Type.MESSAGE, bytes(90_000))
    first = split(data)[0]
    assert opened(one, first) == []
    assert budget.held == 65_515
    with pytest.raises(LimitError, match="budget of 100000"):
        opened(two, first)
    assert budget.held == 65_515
    assert opened(one, data[len(first) :]) == [Message(Type.MESSAGE, bytes(90_000))]
    assert budget.held == 0
    three = opener(budget=budget)
    opened(three, first)
    three.discard()
    assert budget.held == 0
    with pytest.raises(ValueError, match="one record"):
        Budget(10)


def test_a_whole_message_counts_until_the_next_is_asked_for():
    budget = Budget(100_000)
    one, two = opener(budget=budget), opener(budget=budget)
    data = sealer().seal(Type.MESSAGE, bytes(90_000))
    one.feed(data)
    assert one.next() == Message(Type.MESSAGE, bytes(90_000))
    assert budget.held == 90_000
    with pytest.raises(LimitError, match="budget of 100000"):
        opened(two, split(data)[0])
    assert opened(opener(budget=budget), sealer().seal(Type.MESSAGE, b"short")) == [Message(Type.MESSAGE, b"short")]
    assert one.next() is None
    assert budget.held == 0
    for end in (Opener.discard, Opener.next):
        three = opener(budget=budget)
        three.feed(data)
        three.next()
        end(three)
        assert budget.held == 0


def test_a_link_carries_2_to_the_32_records():
    last = sealer(records.MAX_RECORDS - 1)
    with pytest.raises(LimitError, match="new one"):
        last.seal(Type.MESSAGE, bytes(70_000))  # needs two: nothing is sealed
    data = last.seal(Type.MESSAGE, b"the last")
    reader = opener(records.MAX_RECORDS - 1)
    assert opened(reader, data) == [Message(Type.MESSAGE, b"the last")]
    with pytest.raises(LimitError, match="new one"):
        last.seal(Type.MESSAGE, b"one more")
    with pytest.raises(LimitError, match="new one"):
        opened(reader, record(plain(Type.MESSAGE, FIN), records.MAX_RECORDS))


def test_a_discarded_sealer_seals_nothing():
    writer = sealer()
    writer.discard()
    with pytest.raises(Closed):
        writer.seal(Type.MESSAGE, b"text")


@given(st.binary(max_size=400), st.booleans())
@settings(max_examples=200)
def test_any_bytes_give_only_transport_errors(data, authentic):
    reader = opener()
    reader.feed(record(data) if authentic else data)
    try:
        got = drain(reader)
    except TransportError:
        return
    assert authentic or not got
