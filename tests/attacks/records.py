"""Attacks 28 to 38: on the records of a session. The output never silently differs from an untouched run."""

from __future__ import annotations

import random
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterable

from attacks import Seen, attack, require
from attacks.arena import PATIENCE, TOKENS, Arena, eventually, together
from attacks.ends import FakeStage, admitted_client, admitted_stage, genuine
from attacks.handshake import flip
from attacks.proxy import Frame, Rule, Tap
from attacks.rogue import ALERT, CLOSE, FIN, MESSAGE, PING, ROOM, Rogue
from minigpt.protocol.messages import CHUNK
from transport.noise import CipherState
from transport.records import padded_size

DEAD = "dead; the output is never silently another"
SHORT = 1.5  # seconds that the client waits, where it waits for what never comes
PLACES = [(0, "I", 1), (0, "R", 2), (1, "I", 2), (1, "R", 2)]  # link, sender, record: all in the midst of a generation


def other(end: str) -> str:
    return "R" if end == "I" else "I"


def at(sender: str, index: int, act: Callable[[Frame, Tap], Iterable[bytes]]) -> Rule:
    """A rule for one record."""

    def rule(frame: Frame, tap: Tap) -> Iterable[bytes]:
        if (frame.sender, frame.kind, frame.number) == (sender, "record", index):
            return act(frame, tap)
        return (frame.data,)

    return rule


def flip_record(sender: str, index: int, offset: int, bit: int) -> Rule:
    return at(sender, index, flip("record", offset, bit, index))


def swap(sender: str, index: int) -> Rule:
    """A rule that lets record `index` come after the one that follows it."""
    held: list[bytes] = []

    def rule(frame: Frame, _tap: Tap) -> Iterable[bytes]:
        if (frame.sender, frame.kind) == (sender, "record"):
            if frame.number == index:
                held.append(frame.data)
                return ()
            if frame.number == index + 1 and held:
                return (frame.data, held.pop())
        return (frame.data,)

    return rule


def long_prompt(arena: Arena) -> list[tuple[int, ...]]:
    """A prompt of two or three chunks: stage 0 sends stage 1 one after another without waiting for an answer."""
    return [arena.prompt(min(2 * CHUNK + 9, arena.config.n_positions - TOKENS))]


def fragments(arena: Arena) -> int:
    """The records that one chunk of a prompt takes on link 1."""
    return -(-padded_size(CHUNK * arena.config.n_embd * 4 + 200) // 65515)


@attack(28, "flip each byte of a data record, and of its length", DEAD, slow=True)
def flip_data(arena: Arena) -> Seen:
    arena.control()
    sizes = {}
    for link, sender, index in PLACES:
        sizes[link, sender] = len(arena.stages.proxies[link].taps[0].sent(sender, "record")[index].data)
    seen = []
    for link, sender, index in PLACES:
        for offset in arena.some(range(2, sizes[link, sender]), 4):
            rule = flip_record(sender, index, offset, offset % 8)
            control = not arena.thorough or offset % 16 == 0
            seen.append(arena.assault(rule, link=link, control=control))
        for offset, bit in arena.some([(1, 7), (0, 7), (1, 2), (0, 0)], 1) if arena.thorough or link == 0 else ():
            rule = flip_record(sender, index, offset, bit)
            seen.append(arena.assault(rule, link=link, timeout=SHORT))
    return together(seen)


@attack(29, "replay a record", DEAD)
def replay(arena: Arena) -> Seen:
    return together(
        [
            arena.assault(at(sender, index, lambda frame, _tap: (frame.data, frame.data)), link=link)
            for link, sender, index in [*PLACES, (0, "R", 0), (1, "I", 0)]
        ]
    )


@attack(30, "swap two records", DEAD)
def swap_records(arena: Arena) -> Seen:
    seen = [arena.assault(swap("R", 1)), arena.assault(swap("I", 0))]
    seen += [arena.assault(swap("I", i), link=1, ids=long_prompt(arena)) for i in (0, 1, 2)]
    return together(seen)


@attack(31, "delete a record, or a whole tensor's worth", DEAD)
def delete(arena: Arena) -> Seen:
    seen = []
    places = [*PLACES, (0, "R", 1), (0, "R", TOKENS), (0, "R", TOKENS + 1)]  # the last is the end of the answer
    for link, sender, index in arena.some(places, 3):
        seen.append(arena.assault(at(sender, index, lambda *_: ()), link=link, timeout=SHORT))

    count = fragments(arena)

    def tensor(frame: Frame, _tap: Tap) -> Iterable[bytes]:
        gone = frame.sender == "I" and frame.kind == "record" and 1 <= frame.number <= count
        return () if gone else (frame.data,)

    seen.append(arena.assault(tensor, link=1, ids=long_prompt(arena), timeout=SHORT))
    return together(seen)


@attack(32, "insert a record from the other direction", DEAD)
def from_the_other_side(arena: Arena) -> Seen:
    seen = []
    for link, sender, index in PLACES:

        def turned(frame: Frame, tap: Tap) -> Iterable[bytes]:
            return (frame.data, tap.sent(other(frame.sender), "record")[-1].data)

        seen.append(arena.assault(at(sender, index, turned), link=link))
    return together(seen)


@attack(33, "splice in a record of a parallel session; on the one link between stages, of an earlier one", DEAD)
def splice(arena: Arena) -> Seen:
    second = arena.start_client()
    seen = []
    for link, sender, index in PLACES:
        if link == 1:
            arena.control()
            earlier = arena.stages.proxies[1].taps[0].sent(sender, "record")[index].data
            seen.append(arena.assault(at(sender, index, lambda _frame, _tap, it=earlier: (it,)), link=1))  # type: ignore[misc]
            continue
        taps = arena.stages.proxies[link].taps

        def rule(frame: Frame, tap: Tap, place: tuple[int, str, int] = (link, sender, index)) -> Iterable[bytes]:
            taps = arena.stages.proxies[place[0]].taps
            if not taps or tap is taps[0] or (frame.sender, frame.kind, frame.number) != (place[1], "record", place[2]):
                return (frame.data,)
            return (taps[0].sent(place[1], "record")[place[2]].data,)

        count = 300  # tokens: it must still run when the second session has begun, on a machine under load too
        arena.begin({link: rule}, count=count, client=second)  # it is not touched
        taps = arena.stages.proxies[link].taps
        require(
            eventually(lambda taps=taps: taps and len(taps[0].sent("R", "record")) > 3, PATIENCE), "no first session"
        )
        arena.mark()
        order = {"manifest": str(arena.stages.path), "allow_mock": True, "timeout": PATIENCE}
        arena.client.order(ids=[arena.prompt()], max_tokens=TOKENS, **order)
        answer = arena.client.answer()
        require(len(taps) > 1, "there was no second connection: the first session ended too early")
        shown = arena.grade(answer, [arena.prompt()], TOKENS)
        untouched = second.answer()
        require(
            untouched["tokens"] == [arena.expected(arena.prompt(), count)], "the session spliced from was disturbed"
        )
        require(eventually(lambda taps=taps: taps[1].dead, PATIENCE), "not closed")
        seen.append(Seen(shown, arena.verdict(link)))
        arena.control()
    second.close()
    return together(seen)


@attack(34, "the same around n = 1023/1024; a clean run across three rekeys", DEAD + "; the right tokens", slow=True)
def around_rekey(arena: Arena) -> Seen:
    count = 125
    tokens = arena.expected(arena.prompt(), count)  # each of which takes a record on either link
    ids = [arena.prompt()] * -(-1040 // len(tokens))
    for many in (len(ids), 3 * len(ids)) if arena.thorough else (len(ids),):
        answer = arena.run(ids=ids[:1] * many, count=count, timeout=60)
        require(answer["tokens"] == [tokens] * many, f"a clean run of {many} requests gave {answer}")
        for link, end in ((0, "R"), (1, "I"), (1, "R")):
            number = len(arena.stages.proxies[link].taps[0].sent(end, "record"))
            require(number > many * len(tokens), f"the run took {number} records: no rekey was crossed")
    places = [
        (link, sender, index) for index in (1022, 1023, 1024, 1025) for link, sender in ((0, "R"), (1, "I"), (1, "R"))
    ]
    seen = []
    for link, sender, index in arena.some(places, 2):
        rules = [at(sender, index, lambda frame, _tap: (frame.data, frame.data)), flip_record(sender, index, 40, 3)]
        rules.append(at(sender, index, lambda *_: ()))
        if link == 0:
            rules.append(swap(sender, index))
        for rule in arena.some(rules, 1):
            seen.append(arena.assault(rule, link=link, count=count, ids=ids, timeout=SHORT, control=False))
    arena.control()
    return together(seen)


@attack(
    35,
    "FIN without CLOSE at a record's edge, inside a record, inside a message",
    "an error, never a partial answer as whole",
)
def fin(arena: Arena) -> Seen:
    seen = []
    for link, sender, index in [*PLACES, (0, "R", TOKENS), (0, "R", 0)]:
        for part in (None, -1, 1, 2, 30) if arena.thorough else (None, 30):  # None: at the edge, after the whole record

            def cut(frame: Frame, tap: Tap, part: int | None = part) -> Iterable[bytes]:
                tap.give(other(frame.sender), frame.data[:part])
                tap.finish(other(frame.sender))
                return ()

            seen.append(arena.assault(at(sender, index, cut), link=link))
    arena.mark()
    with admitted_client(arena.stages) as rogue:  # inside a message, between two of its records
        rogue.say(MESSAGE, bytes(ROOM), flags=0)
        rogue.sock.shutdown(1)
        rogue.last_words()
    seen.append(Seen("(malicious)", arena.verdict(0)))
    count = fragments(arena)
    if count > 1:  # the same between the records of a tensor, by the host
        rule = at("I", 1 + count, lambda frame, tap: (tap.give("R", frame.data), tap.finish("R"), ())[2])
        seen.append(arena.assault(rule, link=1, ids=long_prompt(arena)))

    def halfway(rogue: Rogue) -> bool:
        rogue.shake().attest(genuine(arena.stages, 0))
        rogue.hear_attest()
        rogue.hear_message()
        rogue.say(MESSAGE, b"\x81", flags=0)
        return True

    with FakeStage(arena.stages, 0, halfway):
        seen.append(Seen(arena.grade(arena.run(), [arena.prompt()], TOKENS), "(played by the kit)"))
    arena.control()
    return together(seen)


@attack(36, "a forged CLOSE or ALERT", "dead, as an attack and not as an end")
def forged_end(arena: Arena) -> Seen:
    seen = []
    for link, sender, index in PLACES:
        for kind, body in ((CLOSE, struct.pack(">Q", index - 1)), (ALERT, b"\x06")):

            def forge(frame: Frame, _tap: Tap, kind: int = kind, body: bytes = body) -> Iterable[bytes]:
                plaintext = struct.pack(">BBH", kind, FIN, 256 - len(body)) + body + bytes(256 - len(body))
                key = CipherState(secrets.token_bytes(32))
                key.n = frame.number
                forged = key.encrypt_with_ad(b"", plaintext)
                return (len(forged).to_bytes(2, "big") + forged, frame.data)

            seen.append(arena.assault(at(sender, index, forge), link=link))
            if sender == "I":  # otherwise it is the initiator's genuine ALERT that the stage logs
                require(seen[-1].stage == "RecordError", f"a forged record was believed: {seen[-1].stage}")
    return together(seen)


def bad_records(rogue: Rogue) -> dict[str, Callable[[], bytes]]:
    """Records that an end with genuine keys must not send, sealed when they are called for."""
    seal = rogue.seal
    status = b"\x81\xa4type\xa6status"
    count = struct.pack(">Q", 0)
    return {
        "bytes after CLOSE": lambda: seal(CLOSE, count) + seal(MESSAGE, status),
        "a CLOSE with another count": lambda: seal(CLOSE, struct.pack(">Q", 7)),
        "a CLOSE of 4 bytes": lambda: seal(CLOSE, bytes(4)),
        "type 0": lambda: seal(0, status),
        "type 6": lambda: seal(6, status),
        "type 255": lambda: seal(255, status),
        "another ATTEST": lambda: seal(1, b"\x01\x00\x00\x01\x80" + bytes(5)),
        "reserved flag 2": lambda: seal(MESSAGE, status, flags=3),
        "reserved flag 128": lambda: seal(MESSAGE, status, flags=129),
        "padding that is not zero": lambda: seal(MESSAGE, status, padding=bytes(9) + b"\x01"),
        "pad_len beyond the record": lambda: seal(MESSAGE, status, pad=len(status) + 1),
        "pad_len 65535": lambda: seal(MESSAGE, status, pad=65535),
        "an empty record, more to come": lambda: seal(MESSAGE, flags=0),
        "a record of 3 bytes": lambda: rogue.seal_raw(b"\x02\x01\x00"),
        "a record of 0 bytes": lambda: rogue.seal_raw(b""),
        "another type inside a message": lambda: seal(MESSAGE, status, flags=0) + seal(PING),
        "a PING with a body": lambda: seal(PING, b"x"),
        "PINGs in a hurry": lambda: b"".join(seal(PING) for _ in range(20)),
        "an ALERT of no bytes": lambda: seal(ALERT),
    }


@attack(37, "bytes after CLOSE, unknown type, reserved flag, bad padding, wrong counts", "dead")
def bad(arena: Arena) -> Seen:
    seen = []
    with admitted_client(arena.stages) as rogue:  # control: the same record without a fault is answered
        rogue.say(MESSAGE, b"\x81\xa4type\xa6status", padding=bytes(300))
        require((rogue.hear_message() or {}).get("type") == "report", "control: a good record was refused")
        names = list(bad_records(rogue))
    for link, admit in ((0, admitted_client), (1, admitted_stage)):
        before = arena.steps()
        for name in names:
            arena.mark()
            with admit(arena.stages) as rogue:
                rogue.write(bad_records(rogue)[name]())
                said = [record.kind for record in rogue.last_words()]
                require(said in ([], [ALERT], [CLOSE]), f"{name}: stage {link} answered {said}")
            seen.append(Seen("alert" if said == [ALERT] else "closed", arena.verdict(link)))
        require(arena.steps() == before, "something was computed")
    for name in names:

        def play(rogue: Rogue, name: str = name) -> list[int]:
            rogue.shake().attest(genuine(arena.stages, 0))
            rogue.hear_attest()
            rogue.hear_message()
            rogue.write(bad_records(rogue)[name]())
            return [record.kind for record in rogue.last_words()]

        with FakeStage(arena.stages, 0, play) as fake:
            answer = arena.run(timeout=SHORT)
            require(eventually(lambda fake=fake: bool(fake.results)), f"{name}: the client does not hang up")
            seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "(played by the kit)"))
    arena.control()
    return together(seen)


@attack(38, "control: random re-chunking, writes of one byte", "the same tokens")
def rechunked(arena: Arena) -> Seen:
    draw, lock = random.Random(38), threading.Lock()

    def pieces(frame: Frame, _tap: Tap) -> Iterable[bytes]:
        left = frame.data
        while left:
            with lock:
                size = draw.choice((1, 2, 3, 17, 100, 1000, 65536))
                pause = draw.random() < 0.02
            if pause:
                time.sleep(0.001)
            yield left[:size]
            left = left[size:]

    def bytewise(frame: Frame, _tap: Tap) -> Iterable[bytes]:
        return (frame.data[i : i + 1] for i in range(len(frame.data)))

    for rule in (pieces, bytewise):
        for ids in ([arena.prompt()], long_prompt(arena)):
            answer = arena.run({0: rule, 1: rule}, ids=ids)
            require(answer["tokens"] == [arena.expected(ids[0])], f"other tokens, or none: {answer['error']}")
    return Seen("4 × the right tokens", "served it")
