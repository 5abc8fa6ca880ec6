"""Attacks 47 to 50 and 56: what a host that only watches can learn. What still leaks is told in notes, with numbers."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attacks import Seen, attack, require
from attacks.arena import PLAIN_STAGE, Arena, Pipes, eventually
from attacks.ends import as_stage_before, genuine, key_of
from attacks.evidence import Maker, altered, honest_body
from attacks.rogue import ATTEST, Rogue
from attest.providers.mock import MockRoot
from minigpt.checkpoint.weights import load
from minigpt.engine.model import GPT2
from transport.aead import Cipher
from transport.link import dump_attest

RUN = 12  # bytes: three token ids, or three numbers; shorter ones are found in any noise


def captured(pipes: Pipes) -> bytes:
    """All that crossed every link, each direction as one stream: what was cut by a record's edge is found too."""
    streams = []
    for proxy in pipes.proxies:
        for tap in proxy.taps:
            for end in "IR":
                streams.append(b"".join(frame.data for frame in tap.sent(end)))
    return b"\n".join(streams)


def secrets_of(
    arena: Arena, pipes: Pipes, ids: Sequence[int], tokens: Sequence[int], text: bytes
) -> dict[str, list[bytes]]:
    """What must not be in a capture, in the forms in which it could be there."""
    half = arena.config.n_layer // 2
    tensors = load(arena.folder, arena.config, range(half)).tensors
    first = GPT2(arena.config, range(half), tensors)
    hidden = first.forward(first.embed(np.array(ids), 0), [(first.new_cache(), len(ids))])
    weights = np.concatenate([tensor.reshape(-1)[:3000] for tensor in tensors.values()])

    def numbers(values: np.ndarray) -> list[bytes]:  # type: ignore[type-arg]
        flat = values.reshape(-1)
        step = max(1, len(flat) // 200) | 1
        runs = [flat[i : i + 6] for i in range(0, len(flat) - 6, step)]
        runs = [run for run in runs if len(set(run.tolist())) > 3]
        wide = [run[:3].astype("<f4").tobytes() for run in runs] + [run[:3].astype(">f4").tobytes() for run in runs]
        return wide + [run.astype("<f2").tobytes() for run in runs]

    def words(values: Sequence[int]) -> list[bytes]:
        three = [tuple(values[i : i + 3]) for i in range(len(values) - 2)]
        return [struct.pack(form, *run) for run in three for form in ("<3I", ">3I", "<3Q", "<3H")]

    manifest = pipes.bytes
    return {
        "prompt": words(ids) + [text],
        "tokens": [struct.pack("<I", token) + b"\xa8logprobs" for token in tokens],
        "hidden states": numbers(hidden),
        "weights": numbers(weights),
        "manifest": [manifest[i : i + 40] for i in range(0, len(manifest) - 40, 7)] + [pipes.manifest.digest],
        "evidence": [b"MGPTMOCK", pipes.root.public, *(pipes.manifest.claims(i)[:24] for i in (0, 1))],
        "field names": [b"\xa4type", b"max_tokens", b"sampling", b"hidden"],
    }


def search(capture: bytes, wanted: dict[str, list[bytes]]) -> dict[str, int]:
    """How many of the forms of each secret are in the capture."""
    return {name: sum(form in capture for form in forms) for name, forms in wanted.items()}


@attack(
    47,
    "capture every link: prompt, tokens, states, weights, manifest, evidence",
    "nothing; and all of it in a plaintext run",
    slow=True,
)
def capture(arena: Arena) -> Seen:
    ids = arena.prompt(40)
    text = b"the prompt in words, which no stage ever sees"
    answer = arena.run(ids=[ids], count=8)
    require(answer["whole"], f"the run failed: {answer['error']}")
    wanted = secrets_of(arena, arena.stages, ids, answer["tokens"][0], text)
    sealed = captured(arena.stages)
    found = search(sealed, wanted)
    plain = arena.start(python=("-c", PLAIN_STAGE))
    speaker = arena.start_client("--plain")
    try:
        again = arena.run(ids=[ids], count=8, stages=plain, client=speaker)
        require(again["tokens"] == answer["tokens"], f"the plaintext run gave {again}")
        readable = captured(plain)
        shown = search(readable, secrets_of(arena, plain, ids, answer["tokens"][0], text))
    finally:
        speaker.close()
        plain.close()
    # Weights and the manifest never cross a link, not even a plaintext one; of it only the digest, in the claims.
    for name in ("prompt", "tokens", "hidden states", "manifest", "evidence", "field names"):
        require(shown[name], f"positive control: the search does not find the {name} in plaintext")
    stored = search((arena.folder / "model.safetensors").read_bytes(), {"weights": wanted["weights"]})
    require(stored["weights"], "positive control: the search does not find the weights in the checkpoint")
    require(not any(found.values()), f"found in {len(sealed)} captured bytes: {found}")
    arena.notes.append(
        f"47: in {len(sealed)} bytes of ciphertext: {found}; in {len(readable)} bytes of a plaintext run: {shown}"
    )
    return Seen(
        f"0 of {sum(map(len, wanted.values()))} forms in {len(sealed)} bytes", f"{sum(shown.values())} in plaintext"
    )


def shape(arena: Arena, ids: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """The record lengths that an observer sees of one run, for each link and direction."""
    answer = arena.run(ids=[ids], count=count)
    require(answer["whole"] and len(answer["tokens"][0]) == count, f"the run failed: {answer['error']}")
    ends = [(proxy, end) for proxy in arena.stages.proxies for end in "IR"]
    closed = lambda: all(proxy.taps[0].dead for proxy in arena.stages.proxies[:1])  # noqa: E731
    eventually(closed)
    return tuple(
        tuple(len(frame.data) for frame in proxy.taps[0].sent(end, "record") if frame.number <= count)
        for proxy, end in ends
    )


@attack(48, "two prompts in one padding bucket", "identical sequences of record lengths")
def lengths(arena: Arena) -> Seen:
    one, other = arena.prompt(9), arena.prompt(9, 40)
    require(
        shape(arena, one, 4) == shape(arena, other, 4), "two prompts of one length are told apart by record lengths"
    )
    # Which lengths of prompts are told apart at all, and where.
    seen: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    step = 1 if arena.thorough else 16
    longest = min(arena.config.n_positions - 1, 256 if arena.thorough else 64)
    tried = range(1, longest + 1, step)
    for length in tried:
        seen.setdefault(shape(arena, arena.prompt(length), 1), []).append(length)
    buckets = list(seen.values())
    require(all(bucket == [n for n in tried if bucket[0] <= n <= bucket[-1]] for bucket in buckets), "odd buckets")
    client = len({found[0] for found in seen})
    widest = max(buckets, key=len)
    arena.notes.append(
        f"48: prompts of 1 to {longest} tokens (every {step}.) show {len(buckets)} sequences of record lengths "
        f"on both links together, {client} on the client's; the widest bucket is {widest[0]}..{widest[-1]}"
    )
    return Seen(f"{len(tried)} lengths in {len(buckets)} buckets", "the same lengths for other words")


@attack(
    49,
    "the error replies for a wrong measurement, signature and binding",
    "the same length; the same time but for noise",
)
def replies(arena: Arena) -> Seen:
    own = MockRoot.generate()
    (pinned,) = arena.stages.manifest.stages[0].pins.measurements
    off = bytes([pinned[0] ^ 1]) + pinned[1:]
    foreign = type(key_of(arena.stages, 0)).generate(own, 0, int(time.time() * 1000) + 10**7)
    wrong = bytes(32)

    def other_binding(rogue: Rogue, attester: object) -> bytes:
        made = genuine(arena.stages, 0)
        return dump_attest(made.attest(rogue.binding(made, h=wrong)))

    def unsigned(evidence: object) -> object:
        import dataclasses

        return dataclasses.replace(evidence, evidence=evidence.evidence[:-64] + bytes(64))  # type: ignore[attr-defined, type-var]

    kinds: dict[str, tuple[Maker, object]] = {
        "measurement": (honest_body, genuine(arena.stages, 0, measurement=off)),
        "signature": (altered(unsigned), genuine(arena.stages, 0)),  # type: ignore[arg-type]
        "root": (honest_body, genuine(arena.stages, 0, key=foreign)),
        "binding": (other_binding, genuine(arena.stages, 0)),
    }
    rounds = 60 if arena.thorough else 12
    sizes: dict[str, set[int]] = {name: set() for name in kinds}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (make, attester) in kinds.items():  # in turn, so that whatever else happens hits all of them
            with as_stage_before(arena.stages, direct=True) as rogue:
                rogue.shake().hear_attest()
                record = rogue.seal(ATTEST, make(rogue, attester))  # type: ignore[arg-type]
                began = time.perf_counter()
                rogue.write(record)
                first = rogue.sock.recv(1 << 16)
                times[name].append(time.perf_counter() - began)
                sizes[name].add(len(first) + len(rogue.wait_end()[0]))
    require(len(set().union(*sizes.values())) == 1, f"the replies differ in length: {sizes}")
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    spread = max(statistics.quantiles(taken, n=4)[2] - statistics.quantiles(taken, n=4)[0] for taken in times.values())
    gap = max(middle.values()) - min(middle.values())
    arena.notes.append(
        "49: median ms to the reply: "
        + ", ".join(f"{name} {1000 * taken:.2f}" for name, taken in middle.items())
        + f"; they differ by {1000 * gap:.2f}, the quartiles of one by up to {1000 * spread:.2f}; {rounds} of each"
    )
    require(gap < max(2 * spread, 0.001), f"they differ by {1000 * gap:.2f} ms, more than noise of {1000 * spread:.2f}")
    arena.control()
    return Seen("(malicious)", f"{len(kinds)} kinds, one length: {sizes['root'].pop()} bytes")


@attack(50, "logs; a core after SIGSEGV; the memory of a live process", "no key, prompt or token in a log; no core")
def logs(arena: Arena) -> Seen:
    ids = tuple(int(i) for i in arena.ids[20:44])
    pipes = arena.start()
    key_files = [Path(pipes.where / f"stage{i}.key").read_text() for i in (0, 1)]
    try:
        answer = arena.run(ids=[ids], count=12, stages=pipes)
        require(answer["whole"], f"the run failed: {answer['error']}")
        arena.begin(ids=[ids], count=200, stages=pipes)  # and one that fails, for what an error says
        require(
            eventually(lambda: bool(pipes.proxies[0].taps and pipes.proxies[0].taps[0].sent("R", "record"))), "no run"
        )
        pipes.kill(1)
        failed = arena.client.answer()
        require(failed["error"], "a stage was killed and the client saw no error")
        needles = [
            words(run, glue) for run in (ids[:3], ids[-3:], answer["tokens"][0][:3]) for glue in (", ", " ", ",")
        ]
        needles += [
            bytes(struct.pack("<3I", *ids[:3])).hex(),
            *(key.split('"private": "')[1][:64] for key in key_files),
        ]
        for index in (0, 1):
            log = pipes.log(index)
            require("open" in log, "positive control: the log has nothing in it")
            for needle in needles:
                require(needle not in log, f"stage {index} has logged a secret")
        for needle in needles:
            require(needle not in failed["error"][1], "an error holds a secret")
        memory = remembered(pipes, ids)
        pipes.start(1)
        arena.control(pipes)
        left = set(Path(pipes.where).rglob("core*")) | set(Path.cwd().glob("core*"))
        process = pipes.processes[0]
        limit = Path(f"/proc/{process.pid}/limits").read_text()
        core = next(line for line in limit.splitlines() if line.startswith("Max core file size")).split()[4:6]
        require(core == ["0", "0"], f"cores are allowed: {core}")
        os.kill(process.pid, signal.SIGSEGV)
        _, status = os.waitpid(process.pid, 0)
        process.returncode = -signal.SIGSEGV
        require(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, "SIGSEGV did not end it")
        require(not os.WCOREDUMP(status), "the system says that it wrote a core")
        require(set(Path(pipes.where).rglob("core*")) | set(Path.cwd().glob("core*")) == left, "there is a core file")
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        del pipes.processes[0]
    finally:
        pipes.close()
    arena.notes.append(f"50: in stage 0's memory after the channel was closed: {memory}")
    return Seen("no secret in an error", "no secret in a log, no core")


def words(values: Sequence[int], glue: str) -> str:
    return glue.join(map(str, values))


def remembered(pipes: Pipes, ids: Sequence[int]) -> str:
    """How often a search of stage 0's memory, by whoever may read it, finds the prompt of a channel that is closed."""
    pid = pipes.processes[0].pid
    forms = {"u32": struct.pack("<6I", *ids[:6]), "i64": struct.pack("<6q", *ids[:6])}
    counts = dict.fromkeys(forms, 0)
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in maps:
                where, rights, *_ = line.split()
                if "rw" not in rights:
                    continue
                begin, end = (int(part, 16) for part in where.split("-"))
                try:
                    memory.seek(begin)
                    data = memory.read(end - begin)
                except (OSError, ValueError, OverflowError):
                    continue
                for name, form in forms.items():
                    counts[name] += data.count(form)
    except PermissionError:
        return "this process may not read it"
    return f"{counts} copies of the prompt's first ids"


def same_key_stream(one: bytes, other: bytes) -> bool:
    """Whether two ciphertexts look as if sealed with one key and one nonce: their XOR is then that of the plaintexts,
    which are alike where headers, field names and padding are. Of different key streams, one byte in 256 is zero."""
    length = min(len(one), len(other))
    return sum(a == b for a, b in zip(one[:length], other[:length], strict=True)) > length / 8


@attack(56, "a client forks, and both processes ask on the link they share", "no two records under one key and nonce")
def fork(arena: Arena) -> Seen:
    cipher = Cipher(bytes(32))
    texts = [b"\x02\x01\x00\x64" + name + bytes(200) for name in (b"the prompt of one", b"and of the other")]
    twice = [cipher.encrypt(7, b"", text) for text in texts]
    require(same_key_stream(*twice), "positive control: the search does not find two texts under one key and nonce")

    asked = [arena.prompt(), arena.prompt(9, 20)]
    for requests in (1, 3):  # of the parent: one before the fork, and the others after it
        own = [arena.prompt(9, 9 * number) for number in range(requests)]
        answer = arena.run(ids=own, fork=[list(ids) for ids in asked])
        taps = arena.stages.proxies[0].taps
        sealed = [frame.data[2:] for tap in taps for frame in tap.sent("I", "record")]
        pairs = list(itertools.combinations(sealed, 2))
        require(not any(same_key_stream(*pair) for pair in pairs), "two records were sealed with one key and nonce")
        require(len(taps) == 2, f"{len(taps)} connections, wanted the parent's and the child's own")
        require(answer["error"] is None, f"the parent failed: {answer['error']}")
        wanted = [arena.expected(ids) for ids in (*asked, *own)]
        require(answer["tokens"] == wanted, "the parent or its child was given other tokens, or none")
    arena.control()
    return Seen(f"{len(pairs)} pairs of records compared", "both processes were given the right tokens")
