"""Attacks 20, 46, 51 to 53 and 55: what only the host can do. It starts stages with other code, weights and settings,
kills them, changes files under them, and hands out manifests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from processes import alive

from attacks import Seen, attack, require
from attacks.arena import FLAGS, PATIENCE, ROOT, Arena, Pipes, eventually, together
from attacks.ends import as_client
from attacks.rogue import Rogue
from minigpt.protocol.manifest import Manifest


def refused_before(arena: Arena, **options: Any) -> Seen:
    """A client that must refuse the manifest before it connects to anything."""
    answer = arena.run(**options)
    require(not any(proxy.taps for proxy in arena.stages.proxies), "the client connected before it refused")
    require(answer["error"] and answer["error"][2] == 3, f"wanted exit 3, got {answer}")
    return Seen(f"{answer['error'][0]} (exit 3), no connection", "met nobody")


def exit_code(arena: Arena, index: int, *, without: str = "", model: Path | None = None) -> int:
    """What a stage's process ends with; one that gets ready is ended at once, and gives 0."""
    pipes = arena.stages
    command = [
        sys.executable, "-m", "minigpt.stage", "--manifest", str(pipes.path), "--index", str(index),
        "--model", str(model or arena.folder), "--mock-key", str(pipes.key(index)), "--listen", "tcp://127.0.0.1:0",
        "--allow-mock",
    ]  # fmt: skip
    command = [word for word in command if word != without]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        if process.stdout.readline():  # the line that says that it is ready; or the end
            process.send_signal(signal.SIGTERM)
        return process.wait(30)


@attack(
    20, "one byte of a real stage's source changed; one byte of its weights", "refused; exit 5; and refused", slow=True
)
def other_code(arena: Arena) -> Seen:
    home = arena.where / "code"
    shutil.rmtree(home, ignore_errors=True)
    for package in ("attest", "minigpt", "transport"):
        shutil.copytree(ROOT / package, home / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    weights = arena.where / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(arena.folder, weights)
    data = bytearray((weights / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (weights / "model.safetensors").write_bytes(data)
    seen = []
    codes = [exit_code(arena, index, model=weights) for index in (0, 1)]
    require(5 in codes, f"stages with a changed byte of weights ended with {codes}, wanted one 5")
    victim = codes.index(5)
    seen.append(Seen("(no stage)", "not started: exit 5"))

    arena.stages.kill(victim)
    arena.stages.start(victim, *FLAGS, cwd=home)  # the copy, unchanged: it measures the same
    arena.control()
    source = home / "minigpt" / "engine" / "model.py"
    text = source.read_bytes()
    source.write_bytes(text.replace(b"The", b"the", 1))  # one bit of a comment or a docstring
    require(source.read_bytes() != text, "the kit found nothing to change")
    seen.append(started_with(arena, victim, home, arena.folder))
    source.write_bytes(text)
    source = home / "minigpt" / "stage" / "process.py"
    check, without = b"if loaded.digest != entry.weights_sha256:", b"if False:"
    require(check in source.read_bytes(), f"the kit does not find the check in {source}")
    source.write_bytes(source.read_bytes().replace(check, without))
    seen.append(started_with(arena, victim, home, weights))
    arena.stages.kill(victim)
    arena.stages.start(victim, *FLAGS)
    arena.control()
    return together(seen)


def started_with(arena: Arena, index: int, home: Path, weights: Path) -> Seen:
    """A stage that started with other code or weights: nobody must accept it."""
    arena.stages.kill(index)
    arena.stages.start(index, *FLAGS, "--model", str(weights), cwd=home)
    answer = arena.run()
    require(not any(answer["tokens"]), "a changed stage served tokens")
    require(answer["error"] and answer["error"][2] == 3, f"wanted a refusal of evidence, got {answer}")
    require("measurement" in answer["error"][1], f"refused for another reason: {answer['error'][1]}")
    return Seen(f"{answer['error'][0]} (exit 3)", "started, and was refused")


def begun(pipes: Pipes) -> bool:
    """Whether some tokens have passed the client's proxy."""
    return sum(len(tap.sent("R", "record")) for tap in pipes.proxies[0].taps[:1]) > 2


@attack(46, "kill -9 of each stage in the midst of a request", "an error within a second; no zombie, no orphan")
def killed(arena: Arena) -> Seen:
    pipes: Pipes = arena.start()
    seen, slowest = [], 0.0
    pids = [process.pid for process in pipes.processes.values()]
    count = min(100, arena.config.n_positions - 20)
    try:
        for victim in range(len(pipes.ports)):
            arena.control(pipes)
            arena.begin(count=count, stages=pipes)
            taps = pipes.proxies[0].taps
            require(eventually(lambda: begun(pipes), PATIENCE), "the request did not begin")
            began = time.monotonic()
            pipes.kill(victim)
            answer = arena.client.answer()
            slowest = max(slowest, time.monotonic() - began)
            seen.append(Seen(arena.grade(answer, [arena.prompt()], count), "killed"))
            require(f"stage {victim}" in answer["error"][1], f"the error names another stage: {answer['error'][1]}")
            require(eventually(lambda taps=taps: all(tap.dead for tap in taps)), "a connection is still open")
            pipes.start(victim, *FLAGS)
            pids.append(pipes.processes[victim].pid)
            arena.control(pipes)
    finally:
        pipes.close()
    require(eventually(lambda: not any(map(alive, pids))), "a process was left behind")
    require(slowest < 1 or not arena.thorough, f"the error took {slowest:.2f} s, wanted less than 1")
    require(slowest < 5, f"the error took {slowest:.2f} s")
    arena.notes.append(f"46: the client had its error at most {1000 * slowest:.0f} ms after the kill")
    return together(seen)


def changed(arena: Arena, name: str, **changes: object) -> str:
    """The path of the pipeline's manifest with other fields."""
    document = json.loads(arena.stages.bytes) | changes
    path = arena.where / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    return str(path)


def by_command_line(arena: Arena, path: str, *flags: str) -> Seen:
    """The real program with that manifest: exit code 3, and no connection."""
    for proxy in arena.stages.proxies:
        proxy.reset()
    command = [sys.executable, "-m", "minigpt", "generate", "x", "--manifest", path, "--allow-mock", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    require(run.returncode == 3, f"the command line ended with {run.returncode}: {run.stderr[-200:]}")
    require(not arena.stages.proxies[0].taps, "the command line connected")
    return Seen("exit 3, no connection", "met nobody")


@attack(
    51,
    "a manifest with an honest stage 0 and an unpinned, or another provider's, stage 1",
    "refused before it connects",
)
def weak_stage(arena: Arena) -> Seen:
    stages = json.loads(arena.stages.bytes)["stages"]
    pinned = stages[1]["evidence"]
    seen = []
    for evidence in (
        {"provider": "none"},
        {"provider": "any"},
        {"provider": "nitro", "measurements": pinned["measurements"]},
        pinned | {"measurements": []},
        pinned | {"measurements": ["0" * 96]},
        {name: value for name, value in pinned.items() if name != "root_key"},
        pinned | {"root_key": "0" * 64},
        pinned | {"allow_debug": True},
    ):
        path = changed(arena, "weak", stages=[stages[0], stages[1] | {"evidence": evidence}])
        seen.append(refused_before(arena, manifest=path))
    seen.append(by_command_line(arena, path))
    # Mock beside honest stages is acceptable to nobody who did not say so.
    seen.append(refused_before(arena, allow_mock=False))
    arena.control()
    return together(seen)


@attack(52, "an expired manifest; another manifest's digest", "refused")
def expired(arena: Arena) -> Seen:
    past = changed(arena, "expired", issued="2020-01-01T00:00:00Z", expires="2020-02-01T00:00:00Z")
    seen = [refused_before(arena, manifest=past), by_command_line(arena, past)]
    digest = arena.stages.manifest.digest.hex()
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    seen.append(refused_before(arena, manifest_sha256=other))
    seen.append(by_command_line(arena, str(arena.stages.path), "--manifest-sha256", other))
    pipes = arena.start(run=False)  # a stage does not start with it either
    try:
        pipes.path.write_bytes(Path(past).read_bytes())
        process = pipes.spawn(0)
        code = process.wait(60)
        require(code == 3, f"a stage with an expired manifest ended with {code}, wanted 3")
        seen.append(Seen("(no stage)", "not started: exit 3"))
    finally:
        pipes.close()
    answer = arena.run(manifest_sha256=digest)  # control
    require(answer["whole"], f"control: the right digest was refused: {answer['error']}")
    arena.control()
    return together(seen)


@attack(53, "stages started with weaker settings than the manifest says", "no effect, or they do not start")
def weaker(arena: Arena) -> Seen:
    seen = []
    arena.control()
    lengths = record_lengths(arena)
    for flags in (["--suite", "1"], ["--suites", "1,2"], ["--no-padding"], ["--allow-debug"], ["--insecure"]):
        command = [sys.executable, "-m", "minigpt.stage", "--manifest", str(arena.stages.path), "--index", "0", *flags]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        require(run.returncode == 2, f"{flags}: the stage ended with {run.returncode}, wanted 2")
        seen.append(Seen("(no stage)", "no such option: exit 2"))
    names = (
        "SUITE",
        "SUITES",
        "PADDING",
        "NO_PADDING",
        "ALLOW_DEBUG",
        "ALLOW_ANY",
        "MANIFEST_SHA256",
        "CLIENTS",
        "ROOT_KEY",
    )
    values = dict.fromkeys((f"MINIGPT_{name}" for name in names), "1")
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        arena.stages.kill(0)
        arena.stages.start(0, *FLAGS)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    arena.control()
    now = record_lengths(arena)
    require(now == lengths, f"the lengths of records are others: {now}, were {lengths}")
    seen.append(Seen("the same tokens, the same record lengths", "started as ever"))
    for suite in sorted({0, 1, 2, 3, 255} - set(Manifest.parse(arena.stages.bytes).suites)):
        arena.mark()
        with as_client(arena.stages) as rogue:
            rogue.suite = suite
            refuse_suite(rogue)
        seen.append(Seen(f"suite {suite}: no answer", arena.verdict(0)))
    arena.control()
    return together(seen)


def record_lengths(arena: Arena) -> list[list[int]]:
    """Of the run that was the last, on the client's link, both ways, once it is over."""
    tap = arena.stages.proxies[0].taps[0]
    require(eventually(lambda: tap.dead, PATIENCE), "the client's connection is still open")
    return [[len(frame.data) for frame in tap.sent(end, "record")] for end in "IR"]


def refuse_suite(rogue: Rogue) -> None:
    rogue.preamble()
    rogue.write((32).to_bytes(2, "big") + bytes(range(32)))
    require(not rogue.wait_end()[0], f"the stage answered suite {rogue.suite}, which the manifest does not list")


@attack(55, "the checkpoint's file is changed after its digest was taken", "the answers are unchanged")
def changed_file(arena: Arena) -> Seen:
    copy = arena.where / "changed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(arena.folder, copy)
    pipes = arena.start(folder=copy)
    try:
        arena.control(pipes)
        file = copy / "model.safetensors"
        size = file.stat().st_size
        with file.open("r+b") as opened:  # in place: whoever had mapped it would see it
            opened.seek(size // 8)
            opened.write(b"\x3f" * (size - size // 8))
        arena.control(pipes)
        with file.open("r+b") as opened:
            opened.truncate(16)
        arena.control(pipes)
        file.unlink()
        arena.control(pipes)
        pipes.kill(0, signal.SIGTERM)
        require(Path(copy).exists(), "the kit lost its folder")
    finally:
        pipes.close()
    return Seen("3 × the same tokens: overwritten, cut short, deleted", "computes with what it digested")
