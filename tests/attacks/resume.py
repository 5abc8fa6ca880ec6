"""Attacks 72 to 77 and 88: on clients that go on after a stage or a link has died. Nothing may be told twice or left
out, and nobody who proves less than before may take a dead stage's place.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from typing import Any

import minigpt
from attacks import Seen, attack, require
from attacks.arena import FLAGS, PATIENCE, ROOT, TOKENS, Arena, eventually, together
from attacks.host import begun
from attacks.proxy import Frame, Rule, Tap
from minigpt.errors import MiniGPTError
from minigpt.protocol.messages import CHUNK

RETRY = 20.0  # seconds that the clients of these attacks try for


def cut(at: int, times: int = 1) -> Rule:
    """Ends a link right before the responder's record number `at`; so many links, and then no more."""
    left = [times]

    def rule(frame: Frame, tap: Tap) -> Iterable[bytes]:
        if frame.sender == "R" and frame.kind == "record" and frame.number == at and left[0]:
            left[0] -= 1
            tap.finish("I")
            tap.finish("R")
            return ()
        return (frame.data,)

    return rule


@attack(72, "a link that dies at every attempt to resume", "an error after the second death; a true prefix; no hang")
def every_time(arena: Arena) -> Seen:
    seen = []
    for link in range(2):
        for at in (1, 2):  # with no token in between, and with one
            began = time.monotonic()
            answer = arena.run({link: cut(at, 1000)}, retry_for=RETRY)
            seen.append(Seen(arena.grade(answer, [arena.prompt()], TOKENS), f"link {link} was cut"))
            require("has died 2 times" in answer["error"][1], f"the error does not say why: {answer['error'][1]}")
            require(time.monotonic() - began < RETRY + PATIENCE, "the client tried for longer than it may")
    arena.control()
    return together(seen)


@attack(
    73,
    "kill -9 in the midst of an answer; the stage comes back with other code, other weights, another manifest",
    "refused, exit 3 (another manifest: 4); nothing is sent to it; with the right ones the answer goes on",
    slow=True,
)
def another_comes_back(arena: Arena) -> Seen:
    pipes = arena.start()
    home, weights = changed_code(arena), arena.where / "other weights"
    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(arena.folder, weights)
    data = bytearray((weights / "model.safetensors").read_bytes())
    for place in range(len(data) // 2, len(data), 64):  # in tensors of every stage
        data[place] ^= 1
    (weights / "model.safetensors").write_bytes(data)
    document = json.loads(pipes.bytes)
    document["expires"] = document["expires"][:3] + "9" + document["expires"][4:]  # one character of another manifest
    other = arena.where / "other.json"
    other.write_text(json.dumps(document, indent=2) + "\n")
    count = min(100, arena.config.n_positions - 20)
    cases: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "other code": ((), {"cwd": home}),
        "other weights": (("--model", str(weights)), {"cwd": home}),
        "another manifest": (("--manifest", str(other)), {}),
        "the same": ((), {}),
    }
    seen = []
    try:
        for victim in arena.some(range(len(pipes.ports)), 2):
            for name, (flags, where) in cases.items():
                retry = RETRY / 2 if name == "another manifest" else RETRY  # there, it tries for all of that
                arena.begin(count=count, stages=pipes, retry_for=retry)
                require(eventually(lambda: begun(pipes), PATIENCE), "the request did not begin")
                before = len(pipes.proxies[victim].taps)
                pipes.kill(victim)
                pipes.start(victim, *FLAGS, *flags, **where)
                answer = arena.client.answer(RETRY + PATIENCE)
                if name == "the same":
                    require(answer["tokens"] == [arena.expected(arena.prompt(), count)], f"control: {answer}")
                    continue
                verdict = arena.grade(answer, [arena.prompt()], count)
                wanted = 4 if name == "another manifest" else 3  # which does not answer, as one that is not there
                require(answer["error"][2] == wanted, f"stage {victim}, {name}, wanted {wanted}: {answer['error']}")
                if wanted == 4:
                    require("most likely it has another manifest" in answer["error"][1], f"{answer['error']}")
                said = [tap for tap in pipes.proxies[victim].taps[before:] if tap.sent("I", "record")]
                allowed = 0 if name == "another manifest" else 1  # evidence is in the first record of the responder
                for tap in said:
                    require(
                        len(tap.sent("I", "record")) <= allowed, f"stage {victim}, {name}: something was sent to it"
                    )
                seen.append(Seen(verdict, f"{name}: refused"))
                pipes.kill(victim)
                pipes.start(victim, *FLAGS)
                arena.control(pipes)
    finally:
        pipes.close()
    arena.control()
    return together(seen)


def changed_code(arena: Arena) -> Any:
    """A copy of the code with one check taken out."""
    home = arena.where / "other code"
    shutil.rmtree(home, ignore_errors=True)
    for package in ("attest", "minigpt", "transport"):
        shutil.copytree(ROOT / package, home / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    source = home / "minigpt" / "stage" / "process.py"
    check, without = b"if loaded.digest != entry.weights_sha256:", b"if False:"
    require(check in source.read_bytes(), f"the kit does not find the check in {source}")
    source.write_bytes(source.read_bytes().replace(check, without))
    return home


@attack(
    74,
    "two genuine processes for one stage, at one address; one of them is killed in the midst of an answer",
    "true tokens from either; the answer goes on with the other",
)
def twins(arena: Arena) -> Seen:
    pipes = arena.start()
    seen = []
    count = min(60, arena.config.n_positions - 20)
    try:
        for victim in range(len(pipes.ports)):
            first = pipes.processes.pop(victim)
            pipes.start(victim, *FLAGS)
            second = pipes.processes[victim]
            try:
                for _ in range(4):
                    arena.control(pipes)
                arena.begin(count=count, stages=pipes, retry_for=RETRY)
                require(eventually(lambda: begun(pipes), PATIENCE), "the request did not begin")
                first.send_signal(signal.SIGKILL)  # it may be the one that computes, or not
                answer = arena.client.answer(RETRY + PATIENCE)
                require(answer["tokens"] == [arena.expected(arena.prompt(), count)], f"other tokens: {answer['error']}")
                arena.begin(count=count, stages=pipes, retry_for=RETRY)
                require(eventually(lambda: begun(pipes), PATIENCE), "the request did not begin")
                require(second.poll() is None, "the other one has died")
                pipes.kill(victim)
                pipes.start(victim, *FLAGS)
                answer = arena.client.answer(RETRY + PATIENCE)
                require(answer["tokens"] == [arena.expected(arena.prompt(), count)], f"other tokens: {answer['error']}")
                seen.append(Seen("true tokens", f"stage {victim}: one of two was killed"))
            finally:
                first.kill()
                first.wait()
                for pipe in (first.stdin, first.stdout):
                    if pipe is not None:
                        pipe.close()
    finally:
        pipes.close()
    arena.control()
    return together(seen)


@attack(
    75, "a hundred clients at once after a death", "every text is true, in bounded time; the stages stay as they are"
)
def stampede(arena: Arena) -> Seen:
    number = 100 if arena.thorough else 40
    pipes = arena.start(*FLAGS, "--queue", "128")
    count = min(20, arena.config.n_positions - 20)
    wanted = arena.expected(arena.prompt(), count)
    found: dict[int, object] = {}
    try:
        for victim in range(len(pipes.ports)):
            found.clear()
            connected = threading.Barrier(number + 1)
            answering = threading.Event()

            def ask(
                index: int, connected: threading.Barrier = connected, answering: threading.Event = answering
            ) -> None:
                try:
                    with minigpt.Pipeline.connect(
                        pipes.path, allow_mock=True, retry_for=60.0, connect_timeout=60.0, text=False
                    ) as mine:
                        connected.wait(60)
                        tokens = []
                        for token in mine.generate(list(arena.prompt()), max_tokens=count, draft=0):
                            tokens.append(token.id)
                            answering.set()
                        found[index] = tokens
                except (MiniGPTError, threading.BrokenBarrierError) as error:
                    found[index] = f"{type(error).__name__}: {error}"

            threads = [threading.Thread(target=ask, args=(index,)) for index in range(number)]
            for thread in threads:
                thread.start()
            connected.wait(60)
            require(answering.wait(60), "nobody is answered")
            pipes.kill(victim)
            pipes.start(victim, *FLAGS, "--queue", "128")
            began = time.monotonic()
            for thread in threads:
                thread.join(120)
            require(not any(thread.is_alive() for thread in threads), "a client hangs")
            other = [tokens for tokens in found.values() if tokens != wanted]
            require(not other, f"{len(other)} of {number} have other texts, or none: {other[:2]}")
            arena.notes.append(f"75: stage {victim} died: {number} texts after {time.monotonic() - began:.1f} s more")
            arena.control(pipes)
    finally:
        pipes.close()
    arena.control()
    return Seen(f"{2 * number} × true tokens", "each stage died once")


@attack(
    76,
    "the link dies, and the host plays the recorded one to the client that resumes",
    "refused at the handshake; nothing is sent, no token is taken",
)
def replayed(arena: Arena) -> Seen:
    seen = []
    for at in arena.some(range(1, TOKENS + 1), 2):
        kill = cut(at)

        def rule(frame: Frame, tap: Tap, kill: Rule = kill) -> Iterable[bytes]:
            taps = arena.stages.proxies[0].taps
            if tap is taps[0]:
                return kill(frame, tap)
            if frame.sender == "I" and frame.kind in ("message 1", "message 3"):
                kinds = ("message 2",) if frame.kind == "message 1" else ("record",)
                tap.give("I", b"".join(old.data for old in taps[0].sent("R") if old.kind in kinds))
            return ()

        answer = arena.run({0: rule}, retry_for=RETRY)
        verdict = arena.grade(answer, [arena.prompt()], TOKENS)
        require(answer["error"][2] == 3, f"wanted exit 3, got {answer['error']}")
        require(
            not any(tap.sent("I", "record") for tap in arena.stages.proxies[0].taps[1:]),
            "something was sent to a replay",
        )
        seen.append(Seen(verdict, "(not reached)"))
    arena.control()
    return together(seen)


@attack(
    77,
    "a death within a prompt's chunks, during drafts, at each token, at the last one",
    "the text of an undisturbed run: no token twice, none left out",
)
def everywhere(arena: Arena) -> Seen:
    seen = []
    long = arena.prompt(min(2 * CHUNK + 9, arena.config.n_positions - TOKENS))
    for link in range(2):
        for draft in (0, 8):
            for ids, places in ((arena.prompt(), range(1, TOKENS + 3)), (long, range(1, 4))):
                for at in arena.some(places, 3):
                    answer = arena.run(
                        {link: cut(at)}, ids=[ids], retry_for=RETRY, sampling={"draft": draft}, timeout=PATIENCE
                    )
                    what = f"link {link} was cut before record {at}"
                    require(answer["whole"], f"{what}: the answer was lost: {answer['error']}")
                    require(answer["tokens"] == [arena.expected(ids)], f"{what}: another text")
                    seen.append(Seen("the whole text", f"link {link} was cut"))
    arena.control()
    return together(seen)


@attack(
    88,
    "a network that forgets connections without a word, while three idle links wait in a client's pool",
    "noticed in 15 s, the pool is flushed, and the request goes on over a fresh link: the true text, once",
    slow=True,
)
def forgotten(arena: Arena) -> Seen:
    proxy, wanted = arena.stages.proxies[0], arena.expected(arena.prompt())
    proxy.reset()
    took = []
    with minigpt.Pipeline.connect(arena.stages.path, allow_mock=True, retry_for=RETRY) as pipeline:
        generations = [pipeline.generate(list(arena.prompt()), max_tokens=TOKENS) for _ in range(3)]
        for generation in generations:
            next(generation)
        rest = [[token.id for token in generation] for generation in generations]
        require(rest == 3 * [wanted[1:]], f"control: three requests at once were told {rest}")
        require(len(proxy.taps) == 3, f"control: {len(proxy.taps)} links, wanted three")
        for tap in proxy.taps:
            tap.rule = lambda frame, tap: ()  # nobody is told, and both ends take all of it for delivered
        for _ in range(3):
            began = time.monotonic()
            told = [token.id for token in pipeline.generate(list(arena.prompt()), max_tokens=TOKENS)]
            took.append(time.monotonic() - began)
            require(told == wanted, f"the client was told {told}")
        require(len(proxy.taps) == 4, f"{len(proxy.taps) - 3} fresh links, wanted one")
        require(eventually(lambda: all("I" in dict(tap.ended) for tap in proxy.taps[:3])), "a dead link was kept")
    shown = ", ".join(f"{one:.2f}" for one in took)
    arena.notes.append(f"88: requests after the network has forgotten three links took {shown} s")
    require(took[0] < 15 + PATIENCE and max(took[1:]) < PATIENCE, f"requests took {took} s")
    arena.control()
    return Seen("the true text, after 15 s", "dead links ended")
