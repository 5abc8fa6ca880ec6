"""Attacks 1 to 4, 7, 8, 12 and 13: on the bytes of a handshake. None may get a record out of either end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import msgpack

from attacks import Seen, attack, require
from attacks.arena import FLAGS, TOKENS, Arena, eventually, together
from attacks.ends import Independent, as_client, as_stage_before, generate_map
from attacks.identity import framed, meet_fake
from attacks.proxy import Frame, Rule, Tap
from attacks.rogue import ATTEST, MESSAGE, Rogue
from transport.link import MACLEN, SUITES, load_attest

DEAD = "dead, no record from either end"
VICTIM = {"message 1": "R", "message 2": "I", "message 3": "R"}  # who must notice


def flip(kind: str, offset: int, bit: int, index: int = 0) -> Rule:
    """A rule that turns one bit of one frame over. Offsets count from the frame's first byte, its length included."""

    def rule(frame: Frame, _tap: Tap) -> Iterable[bytes]:
        data = bytearray(frame.data)
        if frame.kind == kind and frame.number == index:
            data[offset] ^= 1 << bit
        return (bytes(data),)

    return rule


def replace(kind: str, *data: bytes) -> Rule:
    """A rule that puts other bytes in the place of a frame."""

    def rule(frame: Frame, _tap: Tap) -> Iterable[bytes]:
        return data if frame.kind == kind else (frame.data,)

    return rule


@attack(1, "flip every byte of handshake messages 1, 2, 3, of their lengths and of the mac", DEAD, slow=True)
def flip_handshake(arena: Arena) -> Seen:
    seen = []
    for link in (0, 1):
        for number, length in enumerate(SUITES[arena.suite].lengths, 1):
            kind = f"message {number}"
            for offset in arena.some(range(2 + length), 4):
                rule = flip(kind, offset, offset % 8)
                first = VICTIM[kind] if offset > 1 else ""
                control = not arena.thorough or offset % 16 == 0
                seen.append(arena.assault(rule, link=link, first=first, silent=True, count=2, control=control))
        for offset in arena.some(range(MACLEN), 2):
            rule = flip("mac", offset, offset % 8)
            seen.append(arena.assault(rule, link=link, first="R", silent=True, count=2, control=False))
        # the bit that X25519 ignores
        seen.append(arena.assault(flip("message 1", 33, 7), link=link, first="R", silent=True))
    return together(seen)


@attack(2, "replay a recorded message 2", "the initiator fails, and has sent nothing after message 1")
def replay_message_2(arena: Arena) -> Seen:
    seen = []
    for link in (0, 1):
        arena.control()
        (recorded,) = arena.stages.proxies[link].taps[0].sent("R", "message 2")
        rule = replace("message 2", recorded.data)
        seen.append(arena.assault(rule, link=link, first="I", silent=True, control=False))
        sent = arena.stages.proxies[link].taps[0].sent("I")
        require([frame.kind for frame in sent] == ["preamble", "message 1", "mac"], f"the initiator went on: {sent}")
    arena.control()
    return together(seen)


@attack(3, "replay a client's whole flow to a fresh stage", "it dies at message 3, and nothing is computed")
def replay_flow(arena: Arena) -> Seen:
    arena.control()
    flow = b"".join(frame.data for frame in arena.stages.proxies[0].taps[0].sent("I"))
    seen = []
    for fresh in (False, True):
        if fresh:
            arena.stages.kill(0)
            arena.stages.start(0, *FLAGS)
        before = arena.steps()
        arena.mark()
        with as_client(arena.stages) as replayer:
            replayer.write(flow)
            answer, _ = replayer.wait_end()
        wanted = 2 + SUITES[arena.suite].lengths[1]
        require(len(answer) == wanted, f"the stage answered {len(answer)} bytes, wanted message 2 only")
        seen.append(Seen("message 2, then closed", arena.verdict(0)))
        require(arena.steps() == before, "the stage computed what was replayed")
    arena.control()
    return together(seen)


@attack(4, "echo the initiator's own bytes back", "the initiator fails")
def echo(arena: Arena) -> Seen:
    first, second, _ = SUITES[arena.suite].lengths

    def plain(rogue: Rogue) -> bytes:
        rogue.write(rogue.exactly(8 + 2 + first + MACLEN))
        return rogue.wait_end()[0]

    def as_message_2(rogue: Rogue) -> bytes:  # of the right length, so that it gets to the keys
        said = rogue.exactly(8 + 2 + first + MACLEN)
        rogue.write(framed((3 * said[10:])[:second]))
        return rogue.wait_end()[0]

    seen = []
    for link in (0, 1):
        for play in (plain, as_message_2):
            seen.append(meet_fake(arena, link, play))
    return together(seen)


@attack(7, "version or suite of the preamble changed", "dead, no second attempt with less")
def preamble(arena: Arena) -> Seen:
    seen = []
    for link in (0, 1):
        for offset in arena.some(range(8), 4):
            seen.append(arena.assault(flip("preamble", offset, 0), link=link, first="R", silent=True, control=False))
            count = len(arena.stages.proxies[link].taps)
            require(count == 1, f"the initiator tried {count} times")
        others = [(0, arena.suite), (1, arena.suite), (2, 3 - arena.suite), (2, 0), (2, 3), (2, 255)]
        for version, suite in arena.some(others, 3):
            changed = b"mGPT" + bytes([version, suite, 0, 0])
            rule = replace("preamble", changed)
            seen.append(arena.assault(rule, link=link, first="R", silent=True, control=False))
    arena.control()
    return together(seen)


@attack(8, "the client's manifest differs in one byte", "the stage does not answer it")
def other_manifest(arena: Arena) -> Seen:
    data = arena.stages.bytes
    seen = []
    for place in (data.index(b'"id": "') + 7, len(data) - 1, data.index(b'"issued": "') + 29):
        changed = bytearray(data)
        changed[place] = {ord("0"): ord("1"), ord("\n"): ord(" ")}.get(changed[place], changed[place] ^ 1)
        path = arena.where / "other.json"
        path.write_bytes(changed)
        answer = arena.run(manifest=str(path))
        taps = arena.stages.proxies[0].taps
        require(len(taps) == 1, f"the client connected {len(taps)} times, wanted once: {answer['error']}")
        require([f.kind for f in taps[0].sent("I")] == ["preamble", "message 1", "mac"], "the client went on")
        require(eventually(lambda taps=taps: taps[0].dead), "not closed")
        require(not taps[0].sent("R") and taps[0].first == "R", "the stage answered, or did not close")
        require("most likely it has another manifest" in answer["error"][1], f"a cause is named: {answer['error']}")
        seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "said nothing"))
    arena.control()
    return together(seen)


@attack(12, "oversize, undersize, trailing bytes in the handshake", "dead, before any cryptography")
def sizes(arena: Arena) -> Seen:
    seen = []
    first, second, _ = SUITES[arena.suite].lengths
    for link in (0, 1):
        for length in arena.some([0, 1, first - 1, first + 1, second, 65535], 3):
            arena.mark()
            with as_client(arena.stages) if link == 0 else as_stage_before(arena.stages) as rogue:
                rogue.preamble()
                rogue.write(length.to_bytes(2, "big"))  # and nothing else: it must not wait for the rest
                said, _ = rogue.wait_end(4)
                require(not said, "the stage answered")
            seen.append(Seen("no answer", arena.verdict(link)))
        for length in arena.some([0, second - 1, second + 1, 65535], 2):

            def lie(rogue: Rogue, length: int = length) -> bytes:
                rogue.exactly(8 + 2 + first + MACLEN)
                rogue.write(length.to_bytes(2, "big"))
                return rogue.wait_end(4)[0]

            seen.append(meet_fake(arena, link, lie))
        for kind, extra in (("message 1", 1), ("message 2", 1), ("message 3", 1)):

            def longer(frame: Frame, _tap: Tap, kind: str = kind, extra: int = extra) -> Iterable[bytes]:
                if frame.kind != kind:
                    return (frame.data,)
                length = len(frame.data) - 2 + extra
                return (length.to_bytes(2, "big") + frame.data[2:] + bytes(extra),)

            seen.append(arena.assault(longer, link=link, silent=True, control=False))
    arena.control()
    return together(seen)


@attack(13, "control: a client with PyPI's noiseprotocol", "it completes and gets the right tokens")
def independent(arena: Arena) -> Seen:
    pipes = arena.stages if arena.suite == 1 else arena.start(suites=[1])
    pipes.proxies[0].reset()
    client = Independent(pipes)
    try:
        evidence = load_attest(client.hear().body)
        require(evidence.claims == pipes.manifest.claims(0), "the stage's claims are others")
        client.say(ATTEST, b"\x01\x00" + b"\x00\x01\x80" + bytes(4) + b"\x00")
        ids = arena.prompt()
        tokens: list[int] = []
        runs = 250 if arena.thorough else 2
        for _ in range(runs):  # 250 runs of 5 tokens and an end are 1500 records: past a rekey
            client.say(MESSAGE, msgpack.packb(generate_map(ids, TOKENS)))
            tokens = []
            while (answer := msgpack.unpackb(client.hear().body))["type"] == "token":
                tokens.append(int.from_bytes(answer["ids"], "little"))
            require(answer["type"] == "done", f"the stage answered {answer['type']}")
            require(tokens == arena.expected(ids), f"other tokens: {tokens}")
    finally:
        client.close()
        if pipes is not arena.stages:
            pipes.close()
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:8]
    return Seen(f"{runs} × the right {len(tokens)} tokens ({digest})", "served it")
