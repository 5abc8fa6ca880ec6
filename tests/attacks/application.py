"""Attacks 40 to 44, 54, 57 and 85: by ends that are authentic and malicious."""

from __future__ import annotations

import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from attacks import Seen, attack, require
from attacks.arena import PATIENCE, TOKENS, Arena, Pipes, eventually, together
from attacks.ends import (
    FakeStage,
    Segment,
    admitted_client,
    admitted_stage,
    answers,
    batch,
    generate_map,
    genuine,
    results,
    terms,
    token_map,
)
from attacks.proxy import Frame, Tap, honest
from attacks.rogue import ALERT, CLOSE, MESSAGE, ROOM, Rogue
from minigpt.errors import RequestRefused
from minigpt.protocol import messages
from minigpt.protocol.messages import CHUNK, MAX_DRAFT, Done, Failure, Generate, Reason, Refusal, Tokens
from transport.noise import KeyPair

MB = 1 << 20
CAP = 16 * MB  # bytes of one message


def some_rows(arena: Arena, count: int = 2) -> NDArray[np.float32]:
    """Rows that stage 1 takes."""
    return np.full((count, arena.config.n_embd), 0.25, np.float32)


def good_batch(
    arena: Arena, segment: Segment | None = None, rows: bytes | None = None, opened: bytes | None = None
) -> list[Any]:
    """A batch of two rows for stage 1, whose one lane it opens, with parts that may be changed to anything."""
    data = some_rows(arena) if rows is None else rows
    return batch(data, segment or Segment(rows=2), terms=terms() if opened is None else opened)


def outcome(rogue: Rogue) -> str:
    """What a stage makes of what it was just sent: the type of its answer, or those of its answers to a batch,
    "refusal: reason", or "dead"."""
    record = rogue.hear()
    if record.kind in (ALERT, CLOSE) or record.ended:
        return "dead"
    answer = msgpack.unpackb(record.body)
    if type(answer) is list:
        return ", ".join(results(answer))
    if answer["type"] == "failure":  # in words, and the channel ends with it
        require(rogue.hear().kind in (0, CLOSE), "a stage said Failure, and kept the channel")
        return "dead"
    return f"refusal: {answer['reason']}" if answer["type"] == "refusal" else str(answer["type"])


@attack(40, "endless fragments", "cut at the cap; memory comes back")
def endless(arena: Arena) -> Seen:
    seen = []
    for link, admit in ((0, admitted_client), (1, admitted_stage)):
        for size in (ROOM, 1):
            before, peak, sent, taken = arena.memory(link), 0, 0, 0
            arena.mark()
            with admit(arena.stages, direct=True) as rogue:
                piece = bytes(size)
                while sent < 2 * CAP:
                    try:
                        rogue.sock.sendall(b"".join(rogue.seal(MESSAGE, piece, flags=0) for _ in range(16)))
                        sent += 16 * size
                        taken = max(taken, sent - unread(rogue.sock))
                    except OSError:
                        break
                    peak = max(peak, arena.memory(link) - before)
                require(taken < CAP + 8 * MB, f"stage {link} took {taken >> 20} MB of one message")
                require(sent < 2 * CAP or size > 1, f"stage {link} took {sent} records of one byte")
                rogue.last_words()
            seen.append(Seen("cut", arena.verdict(link)))
            require(peak < 3 * CAP, f"stage {link} grew by {peak >> 20} MB")
            arena.notes.append(
                f"40: stage {link}, fragments of {size} bytes: {taken / MB:.2f} MB taken, memory +{peak / MB:.1f} MB"
            )
    arena.control()
    return together(seen)


def unread(sock: socket.socket) -> int:
    """Bytes that the system holds for the other end, which has not read them: some systems hold 32 MB."""
    ends = f":{sock.getpeername()[1]:04X}", f":{sock.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines():
        _, local, remote, _, queues, *_ = line.split()
        if (local[-5:], remote[-5:]) == ends:
            return int(queues.rpartition(":")[2], 16)
    return 0


def bad_maps() -> dict[str, bytes]:
    """Messages that msgpack would decode, or choke on, and this protocol must not."""
    return {
        "depth 1000": b"\x91" * 1000 + b"\xc0",
        "depth 100 000": b"\x81\xa1a" * 100_000 + b"\xc0",
        "a million empty maps": b"\x81\xa4type\xdd" + (1_000_000).to_bytes(4, "big") + b"\x80" * 1_000_000,
        "an array of 4 billion": b"\x81\xa4type\xdd\xff\xff\xff\xff",
        "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
        "bytes of 4 billion": b"\x81\xa4type\xc6\xff\xff\xff\xff",
        "a key twice": b"\x82\xa4type\xa6status\xa4type\xa6status",
        "an ext type": b"\x81\xa4type\xd4\x01\x00",
        "a timestamp": b"\x81\xa4type\xd6\xff\x00\x00\x00\x00",
        "a key that is a number": b"\x81\x01\xa6status",
        "a key that is bytes": b"\x81\xc4\x04type\xa6status",
        "trailing bytes": b"\x81\xa4type\xa6status\xc0",
        "two messages": b"\x81\xa4type\xa6status" * 2,
        "bad UTF-8": b"\x81\xa4type\xa6\xff\xfe\xfd\xfc\xfb\xfa",
        "half a message": b"\x81\xa4type\xa6sta",
        "an integer too long": b"\x82\xa4type\xa6status\xa1x\xcd\x00\x01",
        "NaN": b"\x82\xa4type\xa6status\xa1x\xcb\x7f\xf8\0\0\0\0\0\0",
        "no map": b"\x93\x01\x02\x03",
        "nothing": b"",
        "an unknown type": b"\x81\xa4type\xa4exec",
        "a field too many": b"\x82\xa4type\xa6status\xa1x\x01",
        "a pickle": b"\x80\x04\x95",
    }


@attack(41, "msgpack: depth, a million empty maps, duplicate keys, ext types, bad UTF-8 …", "decode error, and dead")
def msgpack_bombs(arena: Arena) -> Seen:
    seen = []
    slowest = 0.0
    for link, admit in ((0, admitted_client), (1, admitted_stage)):
        before = arena.memory(link)
        for name, body in bad_maps().items():
            arena.mark()
            with admit(arena.stages) as rogue:
                data = rogue.seal_message(body)
                began = time.monotonic()
                rogue.write(data)
                verdict = outcome(rogue)
                slowest = max(slowest, time.monotonic() - began)
            require(verdict == "dead", f"{name}: stage {link} answered {verdict}")
            seen.append(Seen("closed, with a reason", arena.verdict(link)))
        require(arena.memory(link) - before < 64 * MB, f"stage {link} grew by {arena.memory(link) - before >> 20} MB")
    for name, body in bad_maps().items():

        def play(rogue: Rogue, body: bytes = body) -> list[int]:
            rogue.shake().attest(genuine(arena.stages, 0))
            rogue.hear_attest()
            rogue.hear_message()
            rogue.write(rogue.seal_message(body))
            return [record.kind for record in rogue.last_words()]

        with FakeStage(arena.stages, 0, play) as fake:
            answer = arena.run()
            require(eventually(lambda fake=fake: bool(fake.results)), f"{name}: the client does not hang up")
            seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "(played by the kit)"))
    arena.notes.append(f"41: the slowest of them was refused in {1000 * slowest:.0f} ms")
    arena.control()
    return together(seen)


@attack(
    42,
    "tensors: rows and bytes disagree, huge numbers of them, other dtypes and types …",
    "refused; nothing computed",
)
def tensors(arena: Arena) -> Seen:
    data = some_rows(arena).tobytes()
    most = arena.config.n_positions
    whole, opened = good_batch(arena), terms(positions=most)
    segment, *_ = whole
    cases: dict[str, list[Any]] = {
        "fewer bytes than the rows": good_batch(arena, rows=data[:-4]),
        "more bytes than the rows": good_batch(arena, Segment(rows=1)),
        "fewer rows than the segment says": good_batch(arena, Segment(rows=3)),
        "half a number": good_batch(arena, rows=data[:-1]),
        "no rows": good_batch(arena, Segment(rows=0), b""),
        "a number of bytes that overflows": good_batch(arena, Segment(rows=2**30), b""),
        "2^32 - 1 rows": good_batch(arena, Segment(rows=2**32 - 1)),
        "rows that add up in 32 bits": batch(data, Segment(rows=2**32 - 2), Segment(1, rows=4), terms=terms()),
        "float64": good_batch(arena, rows=some_rows(arena).astype("<f8").tobytes()),
        "float16": good_batch(arena, rows=some_rows(arena).astype("<f2").tobytes()),
        "one row that is twice as wide": good_batch(arena, Segment(rows=1), data),
        "half a segment": [segment[:-1], *whole[1:]],
        "half of the terms": good_batch(arena, opened=terms()[:-1]),
        "half of a lane that ended": [*whole[:4], b"\0\0\0", whole[5]],
        "1025 segments": batch(some_rows(arena, 1025), *(Segment(lane) for lane in range(1025)), terms=terms()),
        "a name of a dtype": [*whole, "object"],
        "a part too few": whole[:-1],
        "16 parts": [*whole, *[b""] * 10],
        "text for bytes": [*whole[:5], "x" * len(data)],
        "a list for bytes": [*whole[:5], [1.0, 2.0]],
        "nothing for bytes": [*whole[:5], None],
        "a batch in a batch": [whole],
        "longer than its terms": batch(some_rows(arena, 17), Segment(rows=17), terms=terms(positions=16)),
        "longer than the model": batch(some_rows(arena, most + 1), Segment(rows=most + 1), terms=opened),
        "terms longer than the model": good_batch(arena, opened=terms(positions=most + 1)),
        "terms without a position": good_batch(arena, opened=terms(positions=0)),
        "another thing wanted": good_batch(arena, Segment(rows=2, wanted=5)),
        "nothing": [],
    }
    return computed_nothing(arena, cases, link=1)


def computed_nothing(arena: Arena, cases: Mapping[str, dict[str, Any] | list[Any]], link: int) -> Seen:
    """Each message is refused or ends the channel, and nothing is computed. Then the same channel's honest message."""
    admit = admitted_client if link == 0 else admitted_stage
    before = arena.steps(link)
    seen = []
    for name, message in cases.items():
        arena.mark()
        with admit(arena.stages) as rogue:
            rogue.say_message(message)
            verdict = outcome(rogue)
        require(verdict == "dead" or verdict.startswith("refusal"), f"{name}: stage {link} answered {verdict}")
        seen.append(Seen(verdict, "in words" if verdict != "dead" else arena.verdict(link)))
    require(arena.steps(link) == before, f"stage {link} has computed something")
    with admit(arena.stages) as rogue:  # control: the same end with a good message
        rogue.say_message(good_batch(arena) if link else generate_map(arena.prompt(3)))
        require(outcome(rogue) == "token", "control: a good message gave no token")
    arena.control()
    return together(seen)


@attack(43, "NaN, infinity, token ids out of range", "refused before anything is computed")
def numbers(arena: Arena) -> Seen:
    vocabulary = arena.config.vocab_size
    batches = {}
    for value in (math.nan, math.inf, -math.inf):
        rows = some_rows(arena)
        rows[1, rows.shape[1] // 2] = value
        batches[str(value)] = good_batch(arena, rows=rows.tobytes())
    for bad in (math.nan, -1.0, math.inf):
        batches[f"temperature {bad}"] = good_batch(arena, opened=terms(temperature=bad))
    for bad in (math.nan, 0.0, 2.0):
        batches[f"top_p {bad}"] = good_batch(arena, opened=terms(top_p=bad))
    pair = struct.pack("<Id", 1, 1.0)
    batches |= {
        "min_p 2": good_batch(arena, opened=terms(min_p=2.0)),
        "repetition_penalty 0": good_batch(arena, opened=terms(repetition=0.0)),
        "presence_penalty NaN": good_batch(arena, opened=terms(others=(math.nan, 0.0))),
        "frequency_penalty inf": good_batch(arena, opened=terms(others=(0.0, math.inf))),
        "21 likely ids": good_batch(arena, opened=terms(top=21)),
        "a bias that is not there": good_batch(arena, opened=terms(biases=1)),
        "a bias of no terms": [*good_batch(arena)[:3], pair, *good_batch(arena)[4:]],
        "65535 biases": good_batch(arena, opened=terms(biases=2**16 - 1)),
        "ids of no lane": [good_batch(arena)[0], struct.pack("<4I", 9, 0, 1, 0), *good_batch(arena)[2:]],
        "2^33 ids": [good_batch(arena)[0], struct.pack("<3I", 0, 2**32 - 1, 2**32 - 1), *good_batch(arena)[2:]],
    }
    batches["top_k -1"] = good_batch(arena, opened=terms(top_k=2**32 - 1))
    batches["unknown flags"] = good_batch(arena, opened=terms(flags=4))
    seen = [computed_nothing(arena, batches, link=1)]
    ids = {
        str(number): generate_map(struct.pack("<3I", 1, number & 0xFFFFFFFF, 2))
        for number in (vocabulary, vocabulary + 1, 2**31, -1)
    }
    ids |= {
        "signed 64": generate_map(struct.pack("<q", -1)[:7]),
        "none": generate_map(b""),
        "too long": generate_map(bytes(4 * (arena.config.n_positions + 1))),
        "max_tokens 0": generate_map(bytes(4), max_tokens=0),
        "max_tokens -1": generate_map(bytes(4), max_tokens=-1),
        "max_tokens 2^63": generate_map(bytes(4), max_tokens=2**63),
        "wanted": generate_map(bytes(4), wanted="everything"),
    }
    seen.append(computed_nothing(arena, ids, link=0))
    return together(seen)


@attack(44, "a wrong position, or a gap in `start`", "refused")
def positions(arena: Arena) -> Seen:
    starts = (1, 5, 2**20, 2**20 + 1, -1, 2**63)
    steps = {str(s): good_batch(arena, Segment(0, s % 2**32, 2)) for s in (*starts[:-1], 2**31)}
    seen = [
        computed_nothing(arena, steps, link=1),
        computed_nothing(arena, {str(s): generate_map(bytes(8), start=s) for s in starts}, link=0),
    ]
    # A stage that answers for another position than was asked about. (Between stages, answers name no position.)
    for wrong in (-1, 1, 1000):

        def play(rogue: Rogue, wrong: int = wrong) -> bool:
            rogue.shake().attest(genuine(arena.stages, 0))
            rogue.hear_attest()
            asked = rogue.hear_message() or {}
            rogue.say_message(token_map(len(asked["ids"]) // 4 + wrong))
            return bool(rogue.last_words() or True)

        with FakeStage(arena.stages, 0, play) as fake:
            answer = arena.run()
            require(not any(answer["tokens"]), "the client took a token for another position")
            seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "(played by the kit)"))
            require(eventually(lambda fake=fake: bool(fake.results)), "the link was kept")
            require(fake.results[0] is True, f"the kit failed: {fake.results[0]!r}")
    arena.control()
    return together(seen)


def unanswered(frame: Frame, tap: Tap) -> Iterable[bytes]:
    """The rule that keeps back what a stage answers to steps; the initiator's first record is its evidence."""
    return () if frame.sender == "R" and len(tap.sent("I", "record")) > 1 else (frame.data,)


@attack(
    54, "a pooled channel with an answer outstanding; another client's cache", "never used again; not to be reached"
)
def pooled(arena: Arena) -> Seen:
    proxy = arena.stages.proxies[1]
    for one in arena.stages.proxies:
        one.reset()
    proxy.rule = unanswered
    length = min(3 * CHUNK + 5, arena.config.n_positions - TOKENS)
    secret = arena.prompt(length)
    with admitted_client(arena.stages) as rogue:  # a prompt's answer is outstanding, and nobody waits for it
        rogue.say_message(generate_map(secret, TOKENS))
        require(
            eventually(lambda: bool(proxy.taps) and len(proxy.taps[0].sent("I", "record")) > 1, PATIENCE), "no step"
        )
        rogue.sock.close()
    require(eventually(lambda: proxy.taps[0].dead, PATIENCE), "a link with an answer outstanding was kept")
    proxy.rule = honest
    link = arena.dial()  # control: a link that was left in good order is used again, and its cache is gone
    try:
        link.send(Generate(0, secret[:9], TOKENS))
        tokens: list[int] = []
        while isinstance(message := link.receive(), Tokens):
            tokens += message.ids
        require(isinstance(message, Done) and tokens == arena.expected(secret[:9]), f"other tokens: {tokens}")
    finally:
        link.channel.close()
    require(eventually(lambda: sequences(arena) == [0, 0], PATIENCE), "a sequence outlives its channel")
    used = len(proxy.taps)
    seen = []
    for start in (1, 5, 9):
        link = arena.dial()
        try:
            link.ask(Generate(start, arena.prompt(2), TOKENS))
            require(False, f"a new client went on from position {start} of somebody's cache")
        except RequestRefused as error:
            seen.append(Seen(f"refused: {error.reason}", "in words"))
        finally:
            link.channel.close()
    answer = arena.run()
    require(answer["tokens"] == [arena.expected(arena.prompt())], "a later client got other tokens")
    arena.notes.append(f"54: {used} connections on link 1 for those that came before: a good one is used again")
    arena.control()
    return together(seen)


def sequences(arena: Arena, stages: Pipes | None = None) -> list[int]:
    """How many sequences each stage has a place for, by its own report."""
    link = arena.dial(stages)
    try:
        from minigpt.protocol.messages import Report, Status

        report = link.ask(Status())
        require(isinstance(report, Report), "no report")
        return [stage.sequences for stage in report.stages]  # type: ignore[union-attr]
    finally:
        link.channel.close()


INJECTED = "gone\nWARNING all is well\x1b[2J\u202e"
Said = dict[str, Any] | list[Any]
Play = Callable[[int], Sequence[Said]]  # what a stage says when it is asked for the token of a position


def lies_between_stages(arena: Arena, logprobs: bool) -> dict[str, Play]:
    """What a stage may not answer to a batch of one segment that wants a token; with `logprobs`, about those that
    were asked for."""
    vocabulary = arena.config.vocab_size

    def token(number: int = 0, probable: Sequence[float] = (), spans: bytes = b"", logits: bytes = b"") -> list[Any]:
        told = struct.pack(f"<{len(probable)}d", *probable)
        return answers((1, 1), ids=struct.pack("<I", number), rest=(told, spans, logits, b""))

    def refusal(stage: int) -> list[Any]:
        return answers((3, 0), rest=(b"", b"", b"", msgpack.packb([[stage, "busy", f"stage {stage} is busy"]])))

    if logprobs:
        said: dict[str, Said] = {
            "above 0": token(probable=[7.5]),
            "none, though asked for": token(),
            "two for one token": token(probable=[-1.0, -1.0]),
            "NaN": token(probable=[math.nan]),
            "minus infinity": token(probable=[-math.inf]),
        }
    else:
        said = {
            "60 000 tokens at once": answers((1, 255), ids=bytes(4 * 60_000)),
            "as many as a draft may have": answers((1, 1 + MAX_DRAFT), ids=bytes(4 * (1 + MAX_DRAFT))),
            "two tokens": answers((1, 2), ids=bytes(8)),
            "no token": answers((1, 0)),
            "no token, and its id": answers((1, 0), ids=bytes(4)),
            "a token without an id": answers((1, 1)),
            "an id that is none": token(vocabulary),
            "id 2^32 - 1": token(2**32 - 1),
            "a log-probability unasked": token(probable=[-1.0]),
            "256 spans unasked": token(spans=bytes(40 * 256)),
            "logits": answers((2, 0), rest=(b"", b"", bytes(4 * vocabulary), b"")),
            "logits beside the token": token(logits=bytes(4 * vocabulary)),
            "nothing": answers((0, 0)),
            "no result": answers(),
            "two results": answers((1, 1), (1, 1), ids=bytes(8)),
            "1000 results": answers(*[(1, 1)] * 1000, ids=bytes(4000)),
            "a result of an unknown kind": answers((5, 0)),
            "scores": answers((4, 0), rest=(struct.pack("<d", -1.0), b"", b"", b"")),
            "likely ids unasked": [*token()[:3], struct.pack("<Id", 0, -1.0), *token()[4:]],
            "half a result": [b"\1", *token()[1:]],
            "half an id": [token()[0], b"\0\0", *token()[2:]],
            "a part too many": [*token(), b""],
            "no parts": [],
            "a refusal by stage 9": refusal(9),
            "a refusal by the stage that asks": refusal(0),
            "a refusal without a reason": answers((3, 0)),
            "a refusal that is no list": answers((3, 0), rest=(b"", b"", b"", b"\x80")),
            "a token as a message of its own": token_map(9),
            "a report": {"type": "report", "stages": []},
            "a batch": good_batch(arena),
            "words for stage 9": messages.encode(Failure(9, "failed", "stage 9 is at fault")),
            "a refusal by stage 9, as a message": messages.encode(Refusal(9, "busy", "stage 9 is busy")),
            **{f"done: {reason}": {"type": "done", "reason": reason} for reason in Reason},
        }
    return {name: lambda p, one=one: [one] for name, one in said.items()}  # type: ignore[misc]


def lies(arena: Arena, logprobs: bool) -> dict[str, Play]:
    """What stage 0 may not say to a client that waits for a token; with `logprobs`, about those that were asked for."""
    (stop,), vocabulary = arena.config.eos_token_id, arena.config.vocab_size

    def token(position: int, number: int = 0, **changes: Any) -> dict[str, Any]:
        return token_map(position) | {"ids": struct.pack("<I", number)} | changes

    def done(reason: str) -> dict[str, Any]:
        return {"type": "done", "reason": reason}

    if logprobs:
        return {
            "above 0": lambda p: [token(p, logprobs=struct.pack("<d", 7.5))],
            "none, though asked for": lambda p: [token(p)],
            "two for one token": lambda p: [token(p, logprobs=struct.pack("<2d", -1.0, -1.0))],
        }
    made: dict[str, Play] = {
        "60 000 tokens at once": lambda p: [token(p, ids=bytes(4 * 60_000))],
        "as many as a draft may have": lambda p: [token(p, ids=bytes(4 * (1 + MAX_DRAFT)))],
        "no token": lambda p: [token(p, ids=b"")],
        "an id that is none": lambda p: [token(p, vocabulary)],
        "id 2^32 - 1": lambda p: [token(p, 2**32 - 1)],
        "a log-probability unasked": lambda p: [token(p, logprobs=struct.pack("<d", -1.0))],
        "256 spans unasked": lambda p: [token(p, spans=bytes(40 * 256))],
        "logits": lambda p: [{"type": "logits", "position": p, "values": bytes(4 * vocabulary), "spans": b""}],
        "a report": lambda p: [{"type": "report", "stages": []}],
        "a batch": lambda p: [good_batch(arena)],
        "words for stage 9": lambda p: [messages.encode(Failure(9, "failed", "stage 9 is at fault"))],
        "a refusal by stage 9": lambda p: [messages.encode(Refusal(9, "busy", "stage 9 is busy"))],
        **{f"done: {reason}": lambda p, reason=reason: [done(reason)] for reason in Reason},
    }
    return made | {
        "tokens without end": lambda p: [token(p + i) for i in range(TOKENS + 1)],
        "a token after the stop id": lambda p: [token(p, stop), token(p + 1)],
        "the stop id, and an end by length": lambda p: [token(p, stop), done("length")],
        "an end by length, too soon": lambda p: [token(p), done("length")],
    }


@attack(
    57,
    "a malicious stage: tokens without end or after it, ids that are none, log-probabilities above 0, false ends and "
    "words with escape sequences",
    "reported as that stage's fault; nothing raw in a log or a terminal",
)
def malicious_stage(arena: Arena) -> Seen:
    seen = []
    for link in (0, 1):
        for logprobs in (False, True):
            for name, play in (lies_between_stages if link else lies)(arena, logprobs).items():
                answer = lied_to(arena, link, play, sampling={"logprobs": logprobs})
                kind, text, code = answer["error"] or [None, "no error", None]
                require(code == 4, f"{name}, from stage {link}: the client ended by {kind}: {text}")
                require(f"stage {link}" in text, f"{name}, from stage {link}: the client blames another: {text}")
                require(all(len(found) <= TOKENS for found in answer["tokens"]), f"{name}: too many tokens")
                seen.append(Seen(f"{kind} (exit {code})", "named as the one at fault"))
        for kind, made in (("StageError", Failure), ("RequestRefused", Refusal)):
            arena.mark()
            told: Said = messages.encode(made(link, "failed", INJECTED))
            if link and made is Refusal:
                told = answers((3, 0), rest=(b"", b"", b"", msgpack.packb([[link, "failed", INJECTED]])))
            kept = link > 0 and made is Refusal  # of one client: the link between stages carries others' answers too
            answer = lied_to(arena, link, lambda p, told=told: [told], kept=kept)  # type: ignore[misc]
            require(answer["error"][0] == kind, f"{made.__name__}: the client ended by {answer['error']}")
            require(answer["error"][1].isprintable(), f"raw text in the client's error: {answer['error'][1]!r}")
            said = arena.said(0)
            require(not any(c in said for c in "\x1b\u202e"), "an escape sequence in stage 0's log")
            require(not any(line.startswith("WARNING") for line in said.split("\n")), "a forged line in stage 0's log")
            seen.append(Seen(f"{kind}, made printable", "made printable"))
    for name, indices in {"none": (), "out of order": (1, 0), "too many": (0, 1, 2), "not all": (0,)}.items():
        reports = tuple(messages.StageReport(index) for index in indices)
        answer = lied_to(arena, 0, lambda p, reports=reports: [messages.encode(messages.Report(reports))], asks=1)
        require(answer["error"] and answer["error"][2] == 4, f"a report of stages, {name}: {answer['error']}")
        seen.append(Seen("MessageError (exit 4)", "named as the one at fault"))
    arena.control()
    return together(seen)


def lied_to(arena: Arena, link: int, play: Play, *, kept: bool = False, **options: Any) -> dict[str, Any]:
    """What comes of a client's run when stage `link` has genuine evidence, and says what `play` does: then the link
    must end, or else be `kept` to the end of the run."""
    over = threading.Event()

    def act(rogue: Rogue) -> bool:
        rogue.shake().attest(genuine(arena.stages, link))
        rogue.hear_attest()
        asked = rogue.hear_message() or {}
        for message in play(asked["start"] + len(asked["ids"]) // 4 if "ids" in asked else 0):
            rogue.say_message(message)
        if kept:
            return over.wait(PATIENCE) and type(rogue.hear_message()) is list  # the batch that ends its lane
        return bool(rogue.last_words() or True)

    with FakeStage(arena.stages, link, act) as fake:
        answer = arena.run(**options)
        over.set()
        require(eventually(lambda: bool(fake.results)), "the link was kept")
        require(fake.results[0] is True, f"the kit failed: {fake.results[0]!r}")
    return answer


@attack(
    85,
    "a client who is no operator asks for status before and after another's answers, and while one runs",
    "no figure that another causes; an operator is told all of them",
)
def curious(arena: Arena) -> Seen:
    operator = KeyPair.generate()
    pipes = arena.start(operators=[operator.public])
    try:
        with (
            admitted_client(pipes, static=operator, direct=True) as knowing,
            admitted_client(pipes, direct=True) as curious,
        ):
            quiet, known = asked_for_status(curious), asked_for_status(knowing)
            require(known[0]["tokens"] == known[1]["tokens"] == 0, f"control: an operator was told {known}")
            require(all(one["evidence"] for one in quiet[1:]), "control: the evidence of stage 1 is missing")
            arena.control(pipes)
            with admitted_client(pipes, direct=True) as running:
                running.say_message(generate_map(arena.prompt(), arena.config.n_positions - 20))
                require(running.hear_message()["type"] == "token", "control: another's answer does not run")
                told, known = asked_for_status(curious), asked_for_status(knowing)
            require(known[0]["sequences"] > 0 and known[0]["tokens"] > TOKENS, f"control: an operator was told {known}")
        for one in (*quiet, *told):
            figures = {name: one[name] for name in known[0] if name not in TOLD_TO_ALL and one[name] is not None}
            require(not figures, f"a client who is no operator was told {figures}")
        require([one["weights_bytes"] for one in told] == [one["weights_bytes"] for one in quiet], "weights grew")
        require(all(one["uptime"] % 60 == 0 for one in (*quiet, *told)), "a client was told seconds")
        arena.control(pipes)
    finally:
        pipes.close()
    return Seen("no figure of others", "all figures to an operator")


TOLD_TO_ALL = ("stage", "error", "reason", "uptime", "weights_bytes", "evidence", "exposed")


def asked_for_status(rogue: Rogue) -> list[dict[str, Any]]:
    rogue.say_message({"type": "status"})
    found: list[dict[str, Any]] = rogue.hear_message()["stages"]
    return found
