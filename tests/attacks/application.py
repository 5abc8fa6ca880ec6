"""Attacks 40 to 44, 54 and 57: by ends that are authentic and malicious."""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from attacks import Seen, attack, require
from attacks.arena import PATIENCE, TOKENS, Arena, eventually, together
from attacks.ends import FakeStage, admitted_client, admitted_stage, generate_map, genuine, step_map, token_map
from attacks.proxy import Frame, Tap, honest
from attacks.rogue import ALERT, CLOSE, MESSAGE, ROOM, Rogue
from minigpt.errors import RequestRefused
from minigpt.protocol import messages
from minigpt.protocol.messages import CHUNK, MAX_DRAFT, Done, Failure, Generate, Reason, Refusal, Tokens

MB = 1 << 20
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
CAP = 16 * MB  # bytes of one message


def good_step(arena: Arena, **changes: Any) -> dict[str, Any]:
    """A Step of two rows for stage 1, with fields that may be changed to anything."""
    return step_map(np.full((2, arena.config.n_embd), 0.25, np.float32), **changes)


def outcome(rogue: Rogue) -> str:
    """What a stage makes of what it was just sent: the type of its answer, "refusal: reason", or "dead"."""
    record = rogue.hear()
    if record.kind in (ALERT, CLOSE) or record.ended:
        return "dead"
    answer = msgpack.unpackb(record.body)
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
            rogue.hear_map()
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
    42, "tensors: shape and bytes disagree, negative or huge dimensions, other dtypes …", "refused; nothing computed"
)
def tensors(arena: Arena) -> Seen:
    width = arena.config.n_embd
    rows, _, data = good_step(arena)["hidden"]
    too_long = arena.config.n_positions + 1
    doubles = np.frombuffer(data, "<f4").astype("<f8").tobytes()
    cases: dict[str, list[Any]] = {
        "fewer bytes than the shape": [rows, width, data[:-4]],
        "more bytes than the shape": [rows + 1, width, data],
        "half a number": [rows, width, data[:-1]],
        "no rows": [0, width, b""],
        "negative rows": [-rows, -width, data],
        "a product that overflows": [2**32, 2**32, b""],
        "rows of 2^62": [2**62, 4, b""],
        "rows of 2^20 × 2^20": [2**20, 2**20, data],
        "another width": [rows * 2, width // 2, data],
        "wider": [1, width * 2, data],
        "float64": [rows, width, doubles],
        "float16": [rows, width, np.frombuffer(data, "<f4").astype("<f2").tobytes()],
        "a name of a dtype": [rows, width, data, "object"],
        "text for bytes": [rows, width, "x" * len(data)],
        "a list for bytes": [rows, width, [1.0, 2.0]],
        "rows as a float": [2.0, width, data],
        "rows as true": [True, width, data[: 4 * width]],
        "longer than the model": [too_long, width, np.full((too_long, width), 0.25, "<f4").tobytes()],
        "nothing": [],
    }
    return computed_nothing(arena, {name: good_step(arena, hidden=hidden) for name, hidden in cases.items()}, link=1)


def computed_nothing(arena: Arena, cases: dict[str, dict[str, Any]], link: int) -> Seen:
    """Each message is refused or ends the channel, and nothing is computed. Then the same channel's honest message."""
    admit = admitted_client if link == 0 else admitted_stage
    before = arena.steps(link)
    seen = []
    for name, message in cases.items():
        arena.mark()
        with admit(arena.stages) as rogue:
            rogue.say_map(message)
            verdict = outcome(rogue)
        require(verdict == "dead" or verdict.startswith("refusal"), f"{name}: stage {link} answered {verdict}")
        seen.append(Seen(verdict, "in words" if verdict != "dead" else arena.verdict(link)))
    require(arena.steps(link) == before, f"stage {link} has computed something")
    with admit(arena.stages) as rogue:  # control: the same end with a good message
        rogue.say_map(good_step(arena) if link else generate_map(arena.prompt(3)))
        require(outcome(rogue) == "token", "control: a good message gave no token")
    arena.control()
    return together(seen)


@attack(43, "NaN, infinity, token ids out of range", "refused before anything is computed")
def numbers(arena: Arena) -> Seen:
    width, vocabulary = arena.config.n_embd, arena.config.vocab_size
    steps = {}
    for value in (math.nan, math.inf, -math.inf):
        array = np.full((2, width), 0.25, "<f4")
        array[1, width // 2] = value
        steps[str(value)] = good_step(arena, hidden=[2, width, array.tobytes()])
    for name, bad in (("temperature", math.nan), ("temperature", -1.0), ("top_p", 2.0), ("top_k", -1), ("seed", -1)):
        steps[f"{name} {bad}"] = good_step(arena, sampling=GREEDY | {name: bad})
    seen = [computed_nothing(arena, steps, link=1)]
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
    seen = [
        computed_nothing(
            arena, {str(s): good_step(arena, start=s) for s in (1, 5, 2**20, 2**20 + 1, -1, 2**63)}, link=1
        ),
        computed_nothing(
            arena, {str(s): generate_map(bytes(8), start=s) for s in (1, 5, 2**20, 2**20 + 1, -1, 2**63)}, link=0
        ),
    ]
    # A stage that answers for another position than was asked about, to the client and to the stage before it.
    for link in (0, 1):
        for wrong in (-1, 1, 1000):

            def play(rogue: Rogue, wrong: int = wrong, link: int = link) -> bool:
                rogue.shake().attest(genuine(arena.stages, link))
                rogue.hear_attest()
                asked = rogue.hear_map() or {}
                position = len(asked["ids"]) // 4 if link == 0 else asked["hidden"][0]
                rogue.say_map(token_map(position + wrong))
                return bool(rogue.last_words() or True)

            with FakeStage(arena.stages, link, play) as fake:
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
        rogue.say_map(generate_map(secret, TOKENS))
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


def sequences(arena: Arena) -> list[int]:
    link = arena.dial()
    try:
        from minigpt.protocol.messages import Report, Status

        report = link.ask(Status())
        require(isinstance(report, Report), "no report")
        return [stage.sequences for stage in report.stages]  # type: ignore[union-attr]
    finally:
        link.channel.close()


INJECTED = "gone\nWARNING all is well\x1b[2J\u202e"
Play = Callable[[int], list[dict[str, Any]]]  # what a stage says when it is asked for the token of a position


def lies(arena: Arena, link: int, logprobs: bool) -> dict[str, Play]:
    """What a stage may not say to whoever waits for a token; with `logprobs`, about those that were asked for."""
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
        "a step": lambda p: [good_step(arena)],
        "words for stage 9": lambda p: [messages.encode(Failure(9, "failed", "stage 9 is at fault"))],
        "a refusal by stage 9": lambda p: [messages.encode(Refusal(9, "busy", "stage 9 is busy"))],
        **{f"done: {reason}": lambda p, reason=reason: [done(reason)] for reason in Reason},
    }
    if link == 0:
        made |= {
            "tokens without end": lambda p: [token(p + i) for i in range(TOKENS + 1)],
            "a token after the stop id": lambda p: [token(p, stop), token(p + 1)],
            "the stop id, and an end by length": lambda p: [token(p, stop), done("length")],
            "an end by length, too soon": lambda p: [token(p), done("length")],
        }
    return made


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
            for name, play in lies(arena, link, logprobs).items():
                answer = lied_to(arena, link, play, sampling={"logprobs": logprobs})
                kind, text, code = answer["error"] or [None, "no error", None]
                require(code == 4, f"{name}, from stage {link}: the client ended by {kind}: {text}")
                require(f"stage {link}" in text, f"{name}, from stage {link}: the client blames another: {text}")
                require(all(len(found) <= TOKENS for found in answer["tokens"]), f"{name}: too many tokens")
                seen.append(Seen(f"{kind} (exit {code})", "named as the one at fault"))
        for kind, made in (("StageError", Failure), ("RequestRefused", Refusal)):
            arena.mark()
            told = messages.encode(made(link, "failed", INJECTED))
            answer = lied_to(arena, link, lambda p, told=told: [told])
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


def lied_to(arena: Arena, link: int, play: Play, **options: Any) -> dict[str, Any]:
    """What comes of a client's run when stage `link` has genuine evidence, and says what `play` does."""

    def act(rogue: Rogue) -> bool:
        rogue.shake().attest(genuine(arena.stages, link))
        rogue.hear_attest()
        asked = rogue.hear_map() or {}
        fed = len(asked["ids"]) // 4 if "ids" in asked else asked["hidden"][0] if "hidden" in asked else 0
        for message in play(asked.get("start", 0) + fed):
            rogue.say_map(message)
        return bool(rogue.last_words() or True)

    with FakeStage(arena.stages, link, act) as fake:
        answer = arena.run(**options)
        require(eventually(lambda: bool(fake.results)), "the link was kept")
        require(fake.results[0] is True, f"the kit failed: {fake.results[0]!r}")
    return answer
