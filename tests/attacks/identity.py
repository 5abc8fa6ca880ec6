"""Attacks 5, 6 and 9 to 11: on who is at the other end of a handshake."""

from __future__ import annotations

import socket
import threading

from attacks import Seen, attack, require
from attacks.arena import PATIENCE, TOKENS, Arena, Pipes, eventually, together
from attacks.ends import FakeStage, as_client, as_stage_before, genuine
from attacks.rogue import ATTEST, Rogue
from transport import noise
from transport.link import CLIENT, SUITES, dump_attest, load_attest
from transport.noise import KeyPair

# The points of low order of Curve25519 and of its twist (https://cr.yp.to/ecdh.html), each also with its unused highest
# bit set. One form of each pair is not reduced.
_P = 2**255 - 19
_LOW = (
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    _P - 1,
    _P,
    _P + 1,
)
LOW_ORDER = tuple((point | high << 255).to_bytes(32, "little") for point in _LOW for high in (0, 1))


def meet_fake(arena: Arena, link: int, play: object, static: KeyPair | None = None, **options: object) -> Seen:
    """The initiator of a link meets a malicious responder, which returns what the initiator said in the end."""
    with FakeStage(arena.stages, link, play, static) as fake:  # type: ignore[arg-type]
        answer = arena.run(**options)  # type: ignore[arg-type]
        require(answer["tokens"] in ([], [[]]), "the client was given tokens by a malicious stage")
        seen = arena.grade(answer, [arena.prompt()], TOKENS)
        require(eventually(lambda: bool(fake.results), PATIENCE), "the initiator does not hang up")
        said = fake.results[0]
    if isinstance(said, bytes):
        require(not said, f"the initiator said {len(said)} bytes more, wanted none")
    arena.control()
    return Seen(f"{seen}: {reason(answer)}" if "reason" in options else seen, "kept from it" if link == 0 else "")


def reason(answer: dict[str, object]) -> str:
    error = answer["error"]
    return str(error[1]).rpartition(": ")[2] if isinstance(error, list) else ""


@attack(5, "a stage dials itself; the same static key at both ends", "refused")
def same_key(arena: Arena) -> Seen:
    seen = []
    proxy, genuine_port = arena.stages.proxies[1], arena.stages.proxies[1].upstream
    try:
        proxy.upstream = arena.stages.proxies[0].upstream  # stage 0's own
        arena.mark()
        answer = arena.run()
        seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), arena.verdict(0)))
        require(not proxy.taps[0].sent("I", "record"), "a stage that dialled itself sent a record")
    finally:
        proxy.upstream = genuine_port
    both = KeyPair.generate()

    def mirror(rogue: Rogue) -> bytes:  # all genuine but for the key, which is the client's own
        preamble = rogue.preamble()
        answer = message_2(rogue, preamble, rogue.hear_opening(), both, KeyPair.generate())
        rogue.write(answer)
        return rogue.wait_end()[0]

    seen.append(meet_fake(arena, 0, mirror, both, client_key=both.private.hex()))
    other = KeyPair.generate()  # control: with a key of its own the same responder gets message 3

    def honest(rogue: Rogue) -> bool:
        return bool(rogue.shake().h)

    with FakeStage(arena.stages, 0, honest, other) as fake:
        arena.run(client_key=both.private.hex())
        require(eventually(lambda: fake.results[:1] == [True]), "control: a handshake with another key failed")
    arena.control()
    return together(seen)


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


def message_2(rogue: Rogue, preamble: bytes, message_1: bytes, s: KeyPair, e: KeyPair) -> bytes:
    """Message 2, framed, with any keys: what an attacker writes who may choose them."""
    suite = SUITES[rogue.suite]
    symmetric = noise.SymmetricState(suite.protocol_name)
    symmetric.mix_hash(rogue.prologue(preamble))
    state = noise._State(symmetric, False, s)
    for token in suite.pattern[0]:
        message_1 = state.read(token, message_1)
    symmetric.decrypt_and_hash(message_1)
    parts = []
    for token in suite.pattern[1]:
        if token == "e":
            state.own["e"] = e
            symmetric.mix_hash(e.public)
            parts.append(e.public)
        else:
            parts.append(state.write(token))
    return framed(b"".join((*parts, symmetric.encrypt_and_hash(b""))))


class LowOrder(KeyPair):
    """A "key" of low order: whoever uses it computes zero, and so does its owner."""

    def dh(self, public: bytes) -> bytes:
        return bytes(32)


@attack(6, "keys of low order, 7 points in 2 forms, as ephemerals and as statics", "dead, at either end")
def low_order(arena: Arena) -> Seen:
    seen = []
    for point in arena.some(LOW_ORDER, 3):
        weak = LowOrder(bytes(32), point)
        for s, e in ((KeyPair.generate(), weak), (weak, KeyPair.generate())):

            def respond(rogue: Rogue, s: KeyPair = s, e: KeyPair = e) -> bytes:
                rogue.write(message_2(rogue, rogue.preamble(), rogue.hear_opening(), s, e))
                return rogue.wait_end()[0]

            with FakeStage(arena.stages, 0, respond) as fake:
                answer = arena.run()
                seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "(not reached)"))
                require("low order" in reason(answer), f"the client gave another reason: {answer['error']}")
                require(eventually(lambda fake=fake: fake.results[:1] == [b""]), "the client went on after message 2")
        for link in (0, 1):
            arena.mark()
            with as_client(arena.stages) if link == 0 else as_stage_before(arena.stages) as rogue:
                rogue.preamble()
                rogue.write(rogue.opening(point + rogue.first_message()[32:]))
                require(not rogue.wait_end()[0], f"stage {link} answered an ephemeral of low order")
                seen.append(Seen("no answer", arena.verdict(link)))
            arena.mark()
            with (
                as_client(arena.stages, static=weak)
                if link == 0
                else as_stage_before(arena.stages, static=weak) as rogue
            ):
                rogue.shake()
                require(not rogue.wait_end()[0], f"stage {link} answered a static key of low order")
                seen.append(Seen("no answer", arena.verdict(link)))
    arena.control()
    return together(seen)


@attack(9, "a link wired to another stage of the same image", "it fails at message 1")
def wired_wrong(arena: Arena) -> Seen:
    n = arena.config.n_layer
    pipes: Pipes = arena.start(split=f"1+1+{n - 2}")
    try:
        arena.control(pipes)
        seen = []
        ports = [proxy.upstream for proxy in pipes.proxies]
        for link, target in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 1), (2, 0)):
            pipes.proxies[link].upstream = ports[target]
            answer = arena.run(stages=pipes)
            pipes.proxies[link].upstream = ports[link]
            sent = [frame.kind for frame in pipes.proxies[link].taps[0].sent("I")]
            require(sent == ["preamble", "message 1", "mac"], f"link {link} to stage {target}: it sent {sent}")
            require(not pipes.proxies[link].taps[0].sent("R"), f"link {link}: stage {target} answered")
            seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), "the wrong stage does not answer"))
            arena.control(pipes)
    finally:
        pipes.close()
    return together(seen)


def relay(arena: Arena, link: int, static: KeyPair | None, upstream: KeyPair | None = None) -> tuple[str, object]:
    """A man in the middle with keys of his own on both sides, who forwards the genuine evidence: what the initiator
    saw, and what it said to him after the evidence."""

    def play(rogue: Rogue) -> list[int]:
        rogue.shake()
        with as_client(arena.stages) if link == 0 else as_stage_before(arena.stages) as other:
            other.sock.close()
            port = arena.stages.ports[link]  # the genuine stage, past the proxy that leads to us
            other.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            other.static = upstream or other.static
            evidence = other.shake().hear_attest()
            require(evidence, "control: the genuine stage gave no evidence to the man in the middle")
        rogue.say(ATTEST, evidence)
        return [record.kind for record in rogue.last_words()]

    with FakeStage(arena.stages, link, play, static) as fake:
        answer = arena.run()
        seen = arena.grade(answer, [arena.prompt()], TOKENS)
        require(answer["error"][2] == 3, f"refused for another reason than evidence: {answer['error']}")
        require(eventually(lambda: bool(fake.results)), "the initiator does not hang up")
        return seen, fake.results[0]


@attack(10, "a full man in the middle with own keys, forwarding the genuine evidence", "both ends refuse")
def man_in_the_middle(arena: Arena) -> Seen:
    seen = []
    for link in (0, 1):
        shown, said = relay(arena, link, None)
        require(said == [3], f"the initiator answered records of types {said}, wanted one ALERT")
        seen.append(Seen(shown, "its evidence helps nobody"))
        arena.control()
    # The other direction: stage 0's evidence, made for his handshake with stage 0, shown to stage 1.
    arena.mark()
    with as_stage_before(arena.stages) as one, as_stage_before(arena.stages) as two:
        one.shake().hear_attest()
        two.shake().hear_attest()
        attester = genuine(arena.stages, 0)
        two.say(ATTEST, dump_attest(attester.attest(one.binding(attester))))
        said = [record.kind for record in two.last_words()]
        require(said == [3], f"stage 1 answered {said}, wanted one ALERT")
    seen.append(Seen("alert", arena.verdict(1)))
    # Anybody may be a client of stage 0, unless the manifest lists them: then his key is refused before any evidence.
    listed = KeyPair.generate()
    pipes = arena.start(clients=[listed.public])
    try:
        with as_client(pipes) as rogue:
            said = [record.kind for record in rogue.shake().last_words()]
            require(said == [3], f"stage 0 answered {said} to a key that is not listed, wanted one ALERT")
        seen.append(Seen("alert", "not a listed client"))
        arena.control(pipes, client_key=listed.private.hex())
    finally:
        pipes.close()
    arena.control()
    return together(seen)


@attack(11, "the same, holding the stage's stolen static key", "the initiator refuses")
def stolen_key(arena: Arena) -> Seen:
    """The stage here is played by the kit, because real ones have a new static key for each connection."""
    stolen = KeyPair.generate()

    def stage(rogue: Rogue) -> bool:  # the genuine stage, whose static key somebody has
        rogue.shake().attest(genuine(arena.stages, 0))
        return rogue.hear_attest() != b""

    def thief(rogue: Rogue) -> list[int]:
        rogue.shake()
        ours, theirs = socket.socketpair()
        attester = genuine(arena.stages, 0)
        real = Rogue(ours, "R", rogue.manifest, 0, CLIENT, suite=rogue.suite, static=stolen)
        caller = Rogue(theirs, "I", rogue.manifest, CLIENT, 0, suite=rogue.suite)
        with real, caller:
            serving = threading.Thread(target=lambda: real.shake().attest(attester))
            serving.start()
            evidence = caller.shake().hear_attest()
            serving.join()
        require(load_attest(evidence).evidence, "control: the genuine stage gave no evidence")
        rogue.say(ATTEST, evidence)
        return [record.kind for record in rogue.last_words()]

    with FakeStage(arena.stages, 0, stage, stolen) as fake:  # control: with its own evidence the same stage is accepted
        arena.run()
        require(
            eventually(lambda: fake.results[:1] == [True]), f"control: the genuine stage was refused: {fake.results}"
        )
    with FakeStage(arena.stages, 0, thief, stolen) as fake:
        answer = arena.run()
        seen = arena.grade(answer, [arena.prompt()], TOKENS)
        require(answer["error"][2] == 3, f"refused for another reason than evidence: {answer['error']}")
        require(eventually(lambda: fake.results[:1] == [[3]]), f"the client said {fake.results}, wanted one ALERT")
    arena.control()
    return Seen(seen, "(played by the kit)")
