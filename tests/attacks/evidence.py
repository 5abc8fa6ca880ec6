"""Attacks 14 to 19, 22, 26 and 27: on mock evidence. 20 in host.py, 21, 23, 25 in platforms.py, 24 in machines.py."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable

from attacks import Seen, attack, require
from attacks.arena import PATIENCE, TOKENS, Arena, eventually, together
from attacks.ends import (
    FakeStage,
    admitted_client,
    as_client,
    as_stage_before,
    generate_map,
    genuine,
    key_of,
    token_map,
)
from attacks.host import exit_code, refused_before
from attacks.rogue import ATTEST, FIN, MESSAGE, ROOM, Rogue
from attest import Attester, Evidence
from attest.providers.mock import MockKey, MockRoot
from transport.link import dump_attest, load_attest

REFUSED = "refused (exit 3), and told so by one ALERT"
Maker = Callable[[Rogue, Attester], bytes]  # the body of an ATTEST


def honest_body(rogue: Rogue, attester: Attester) -> bytes:
    return dump_attest(attester.attest(rogue.binding(attester)))


def altered(change: Callable[[Evidence], Evidence]) -> Maker:
    """Genuine evidence for the right handshake, changed afterwards."""

    def make(rogue: Rogue, attester: Attester) -> bytes:
        return dump_attest(change(attester.attest(rogue.binding(attester))))

    return make


def show_client(
    arena: Arena, make: Maker, attester: Attester | None = None, *, accepted: bool = False, reason: str = ""
) -> Seen:
    """A fake stage 0 with a finished handshake shows evidence to the real client, whose error says the `reason`."""

    def play(rogue: Rogue) -> list[int]:
        rogue.shake()
        rogue.say(ATTEST, make(rogue, attester or genuine(arena.stages, 0)))
        return [rogue.hear().kind, rogue.hear().kind] if accepted else [one.kind for one in rogue.last_words()]

    with FakeStage(arena.stages, 0, play) as fake:
        answer = arena.run()
        require(eventually(lambda: bool(fake.results), PATIENCE), "the client does not hang up")
        said = fake.results[0]
    if accepted:
        require(said == [ATTEST, MESSAGE], f"control: genuine evidence was refused: {said}")
        return Seen("accepted", "")
    require(said == [3], f"the client said records of types {said}, wanted one ALERT")
    seen = arena.grade(answer, [arena.prompt()], TOKENS)
    require(answer["error"][2] == 3, f"refused for another reason than evidence: {answer['error']}")
    require(says(answer["error"][1], reason), f"refused for another reason than {reason}: {answer['error'][1]}")
    return Seen(seen, "(played by the kit)")


def show_stage(
    arena: Arena, make: Maker, attester: Attester | None = None, *, accepted: bool = False, reason: str = ""
) -> Seen:
    """A fake stage 0 with a finished handshake shows evidence to the real stage 1, whose log says the `reason`."""
    arena.mark()
    with as_stage_before(arena.stages) as rogue:
        require(rogue.shake().hear_attest(), "control: stage 1 gave no evidence")
        rogue.say(ATTEST, make(rogue, attester or genuine(arena.stages, 0)))
        if accepted:
            rogue.say_message({"type": "status"})
            require((rogue.hear_message() or {}).get("type") == "report", "control: genuine evidence was refused")
            return Seen("accepted", "")
        said = [record.kind for record in rogue.last_words()]
        require(said == [3], f"stage 1 said records of types {said}, wanted one ALERT")
    verdict = arena.verdict(1)
    require(verdict in ("EvidenceError", "PolicyError"), f"stage 1 ended the link for {verdict}")
    require(says(arena.said(1), reason), f"refused for another reason than {reason}: {arena.said(1)[-300:]}")
    return Seen("alert", verdict)


def says(text: str, reason: str) -> bool:
    """Whether a refusal names this check, whole: "tcb" is not "min_tcb"."""
    return re.search(rf"(?<![\w-]){reason}", text) is not None


def show_both(arena: Arena, make: Maker, attester: Callable[[int], Attester] | None = None) -> list[Seen]:
    made = attester(0) if attester else None
    return [show_client(arena, make, made), show_stage(arena, make, made)]


def with_controls(arena: Arena, seen: list[Seen]) -> Seen:
    """The same fake stage with unchanged evidence is accepted at both places; and an honest client is served."""
    show_client(arena, honest_body, accepted=True)
    show_stage(arena, honest_body, accepted=True)
    arena.control()
    return together(seen)


@attack(14, "evidence of session A in session B", REFUSED)
def other_session(arena: Arena) -> Seen:
    with as_client(arena.stages) as before:
        client_saw = before.shake().hear_attest()
    with as_stage_before(arena.stages) as before:
        before.shake()
        stage_0 = honest_body(before, genuine(arena.stages, 0))
    return with_controls(arena, [show_client(arena, lambda *_: client_saw), show_stage(arena, lambda *_: stage_0)])


@attack(15, "the responder's evidence sent back as the initiator's", REFUSED)
def reflected(arena: Arena) -> Seen:
    arena.mark()
    with as_stage_before(arena.stages) as rogue:
        evidence = rogue.shake().hear_attest()
        rogue.say(ATTEST, evidence)
        said = [record.kind for record in rogue.last_words()]
        require(said == [3], f"stage 1 said {said}, wanted one ALERT")
    seen = [Seen("alert", arena.verdict(1))]
    arena.mark()
    with as_client(arena.stages) as rogue:  # stage 0 expects no evidence of a client
        evidence = rogue.shake().hear_attest()
        rogue.say(ATTEST, evidence)
        said = [record.kind for record in rogue.last_words()]
        require(said == [3], f"stage 0 said {said}, wanted one ALERT")
    seen.append(Seen("alert", arena.verdict(0)))
    # The role alone: the right handshake and the right key, but signed as the other role.
    attester = genuine(arena.stages, 0)

    def other_role(rogue: Rogue, made: Attester) -> bytes:
        role = "I" if rogue.role == "R" else "R"
        return dump_attest(made.attest(rogue.binding(made, role=role)))

    seen += show_both(arena, other_role, lambda _: attester)
    return with_controls(arena, seen)


@attack(16, "claims altered under the same evidence", REFUSED)
def other_claims(arena: Arena) -> Seen:
    claims = arena.stages.manifest.claims(0)
    seen = []
    for place in arena.some(range(len(claims)), 3):
        changed = bytearray(claims)
        changed[place] ^= 1
        seen += show_both(arena, altered(lambda e, c=bytes(changed): dataclasses.replace(e, claims=c)))  # type: ignore[misc]
        # and the same claims properly signed: authentic, and not what the manifest says
        seen += show_both(arena, honest_body, lambda _, c=bytes(changed): genuine(arena.stages, 0, claims=c))  # type: ignore[misc]
    return with_controls(arena, seen)


@attack(17, "another provider; mock without the explicit switch", "refused (exit 3)")
def providers(arena: Arena) -> Seen:
    seen = []
    for code in arena.some([0, 2, 3, 4, 255], 2):
        seen += show_both(arena, altered(lambda e, code=code: dataclasses.replace(e, provider=code)))  # type: ignore[misc]
    registers = {f"pcr{i}": f"{i + 1}" * 96 for i in range(3)}
    for index in (0, 1):  # a manifest that wants something else: whoever has mock evidence is nobody then
        document = json.loads(arena.stages.bytes)
        document["stages"][index]["evidence"] = {"provider": "nitro", "covers": "image"} | registers
        path = arena.where / "nitro.json"
        path.write_text(json.dumps(document))
        answer = arena.run(manifest=str(path))
        error = answer["error"]  # the stages run by another manifest, so the handshake fails before any evidence
        require(error and error[2] in (3, 4) and not answer["tokens"], f"wanted exit 3 or 4, got {answer}")
        seen.append(Seen(f"{error[0]} (exit {error[2]})", "served nobody"))
    seen.append(refused_before(arena, allow_mock=False))  # stages that are valid in all else
    code = exit_code(arena, 0, without="--allow-mock")
    require(code == 3, f"a stage without --allow-mock ended with {code}, wanted 3")
    seen.append(Seen("(no stage)", "not started: exit 3"))
    return with_controls(arena, seen)


@attack(18, "mock evidence unsigned, of another root, self-pinned key, debug flag", REFUSED)
def forged(arena: Arena) -> Seen:
    later = int(time.time() * 1000) + 3600 * 1000
    own_root = MockRoot.generate()
    foreign = MockKey.generate(own_root, 0, later)  # properly endorsed, by the attacker's own root
    mixed = key_of(arena.stages, 0)
    stolen_endorsement = dataclasses.replace(genuine_evidence(arena), endorsements=(mixed.endorsement,))
    seen = show_both(arena, altered(lambda e: dataclasses.replace(e, evidence=e.evidence[:-64] + bytes(64))))
    seen += show_both(arena, altered(lambda e: dataclasses.replace(e, endorsements=())))
    seen += show_both(arena, altered(lambda e: dataclasses.replace(e, endorsements=e.endorsements * 2)))
    seen += show_both(arena, altered(lambda e: dataclasses.replace(e, endorsements=(foreign.endorsement,))))
    seen += show_both(arena, honest_body, lambda _: genuine(arena.stages, 0, key=foreign))
    seen += show_both(arena, altered(lambda _: stolen_endorsement))
    seen += show_both(arena, honest_body, lambda _: genuine(arena.stages, 0, debug=True))
    seen += show_both(arena, honest_body, lambda _: genuine(arena.stages, 0, key=key_of(arena.stages, 1)))  # stage 1's
    for place in arena.some(range(226), 3):
        seen += show_both(arena, altered(lambda e, at=place: dataclasses.replace(e, evidence=flipped(e.evidence, at))))  # type: ignore[misc]
    for place in arena.some(range(117), 2):
        seen += show_both(
            arena,
            altered(lambda e, at=place: dataclasses.replace(e, endorsements=(flipped(e.endorsements[0], at),))),  # type: ignore[misc]
        )
    return with_controls(arena, seen)


def genuine_evidence(arena: Arena) -> Evidence:
    with as_client(arena.stages) as rogue:
        return load_attest(rogue.shake().hear_attest())


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@attack(19, "a measurement off by one bit; a pin missing; no pins", "refused")
def measurements(arena: Arena) -> Seen:
    (pinned,) = arena.stages.manifest.stages[0].pins.measurements
    seen = []
    for bit in arena.some(range(8 * len(pinned)), 2):
        changed = flipped(pinned, bit // 8) if bit % 8 == 0 else bytearray(pinned)
        if bit % 8:
            changed[bit // 8] ^= 1 << bit % 8  # type: ignore[index]
        seen += show_both(arena, honest_body, lambda _, m=bytes(changed): genuine(arena.stages, 0, measurement=m))  # type: ignore[misc]
    for change in ({"measurements": []}, {"measurements": ["00" * 48]}, {"measurements": None}, {"root_key": None},
                   {"root_key": "00" * 32}, {"measurements": [pinned.hex()[:-2]]}):  # fmt: skip
        document = json.loads(arena.stages.bytes)
        evidence = document["stages"][1]["evidence"]
        evidence.update(change)
        document["stages"][1]["evidence"] = {name: value for name, value in evidence.items() if value is not None}
        path = arena.where / "unpinned.json"
        path.write_text(json.dumps(document))
        seen.append(refused_before(arena, manifest=str(path)))
    return with_controls(arena, seen)


@attack(22, "evidence stale, from the future, not yet valid, expired", "refused (exit 3)")
def clocks(arena: Arena) -> Seen:
    seen = []
    for offset in (-3600.0, -301.0, 301.0, 3600.0):
        seen += show_both(
            arena, honest_body, lambda _, o=offset: genuine(arena.stages, 0, clock=lambda: time.time() + o)
        )  # type: ignore[misc]
    expired = key_of(arena.stages, 0, lives=-1000)
    seen += show_both(arena, honest_body, lambda _: genuine(arena.stages, 0, key=expired))
    return with_controls(arena, seen)


@attack(26, "no ATTEST first, a message before it, two of them", "dead; the message is never executed")
def order(arena: Arena) -> Seen:
    before = arena.steps()
    seen = []
    generate = generate_map(arena.prompt(3))

    def message_first(rogue: Rogue) -> None:
        rogue.say_message(generate)
        rogue.attest()

    def twice(rogue: Rogue) -> None:
        rogue.attest()
        rogue.attest()
        rogue.say_message(generate)

    def inside(rogue: Rogue) -> None:  # a message between the fragments of ATTEST
        rogue.say(ATTEST, b"\x01\x00", flags=0)
        rogue.say_message(generate)

    for play in (message_first, twice, inside):
        arena.mark()
        with as_client(arena.stages) as rogue:
            rogue.shake().hear_attest()
            play(rogue)
            said = [record.kind for record in rogue.last_words()]
            require(MESSAGE not in said, "the stage answered a message of an end that it had not accepted")
        seen.append(Seen(f"records of types {said}", arena.verdict(0)))
    require(arena.steps() == before, "a message was executed")

    def token_first(rogue: Rogue) -> list[int]:
        rogue.shake()
        rogue.say_message(token_map(len(arena.prompt())))
        rogue.attest(genuine(arena.stages, 0))
        return [record.kind for record in rogue.last_words()]

    def attest_twice(rogue: Rogue) -> list[int]:
        rogue.shake().attest(genuine(arena.stages, 0))
        rogue.attest(genuine(arena.stages, 0))
        return [record.kind for record in rogue.last_words()]

    for fake_play in (token_first, attest_twice):
        with FakeStage(arena.stages, 0, fake_play) as fake:
            answer = arena.run()
            require(eventually(lambda fake=fake: bool(fake.results)), "the client does not hang up")
            seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "(played by the kit)"))
            require(not any(answer["tokens"]), "the client was given tokens")
    arena.control()
    return together(seen)


def bombs() -> dict[str, tuple[bytes, int]]:
    """Bodies of ATTEST that announce or hold too much, and the flags of their first record."""
    head = b"\x01\x01"
    return {
        "evidence of 64 Ki + 1": (head + b"\0\1\x80" + (65537).to_bytes(4, "big") + bytes(65537) + b"\0", FIN),
        "evidence of 4 GiB announced": (head + b"\0\1\x80" + b"\xff" * 4, FIN),
        "claims beyond the message": (head + b"\x0f\xff", FIN),
        "claims of 4097": (head + b"\x10\x01" + bytes(4097), FIN),
        "17 endorsements": (head + b"\0\1\x80" + bytes(4) + b"\x11" + bytes(4) * 17, FIN),
        "an endorsement beyond the message": (head + b"\0\1\x80" + bytes(4) + b"\1" + b"\xff" * 4, FIN),
        "trailing bytes": (head + b"\0\1\x80" + bytes(4) + b"\0" + b"\0", FIN),
        "256 Ki + 1": (bytes(262145), FIN),
        "no end": (bytes(10 * ROOM), 0),
        "nothing": (b"", FIN),
    }


@attack(27, "evidence bombs", "refused in 100 ms and in bounded memory")
def evidence_bombs(arena: Arena) -> Seen:
    seen, slowest = [], 0.0
    before = arena.memory(0)
    for name, (body, flags) in bombs().items():
        best = 1e9
        for _ in range(3):  # the best of some: the machine may have other things to do
            arena.mark()
            with as_client(arena.stages) as rogue:
                rogue.shake().hear_attest()
                pieces = [body[i : i + ROOM] for i in range(0, len(body), ROOM)] or [b""]
                records = [
                    rogue.seal(ATTEST, piece, flags=flags if i == len(pieces) - 1 else 0)
                    for i, piece in enumerate(pieces)
                ]
                began = time.monotonic()
                rogue.write(b"".join(records))
                said = rogue.last_words()
                best = min(best, time.monotonic() - began)
                require([one.kind for one in said] in ([3], []), f"{name}: the stage said {said}")
            if best < 0.1:
                break
        require(best < 0.1, f"{name}: it took {1000 * best:.0f} ms, wanted less than 100")
        slowest = max(slowest, best)
        seen.append(Seen("closed" if not said else "alert", arena.verdict(0)))
    grown = arena.memory(0) - before
    require(grown < 20 << 20, f"the stage has grown by {grown >> 20} MB")
    arena.notes.append(
        f"27: the slowest bomb was refused in {1000 * slowest:.1f} ms; the stage grew by {grown / 1e6:.1f} MB"
    )
    with admitted_client(arena.stages) as rogue:  # control: the same end with evidence as it should be
        rogue.say_message({"type": "status"})
        require((rogue.hear_message() or {}).get("type") == "report", "control: proper evidence was refused")
    arena.control()
    return together(seen)
