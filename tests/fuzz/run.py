"""Fuzzes every parser that sees bytes from outside. Only the parser's own errors may come out, soon, in little memory.

    python tests/fuzz/run.py --list
    python tests/fuzz/run.py all --seconds 3600                 an hour, divided among the targets of targets.py
    python tests/fuzz/run.py manifest --seconds 60
    python tests/fuzz/run.py manifest findings/manifest-…       one input again, with the traceback

Where atheris is installed (the extra `fuzz`) it guides the mutations by the code that they reach, and what reached new
code is kept in a corpus of one's own (--keep). Otherwise mutations are blind. Either begins with the kept inputs of
tests/fuzz/corpus. Findings are written to --findings, one for each place in the code; exit code 1 if there are any.

    python tests/fuzz/run.py all --seeds                        writes the inputs that the targets' own code makes
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["MINIGPT_THREADS"] = "1"

try:
    import atheris  # type: ignore[import-untyped]
except ImportError:
    atheris = None
GUIDED = atheris is not None and __name__ == "__main__"
with atheris.instrument_imports(include=["attest", "minigpt", "transport"]) if GUIDED else contextlib.nullcontext():
    import minigpt  # noqa: F401 — before NumPy, whose threads it sets
    from attest import EvidenceError, cbor, der
    from fuzz.targets import TARGETS
import enclaves  # noqa: E402
import msgpack  # type: ignore[import-untyped]  # noqa: E402

if TYPE_CHECKING:
    from fuzz.targets import Target

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
LONGEST = 8192  # bytes of an input: what is larger is refused by length, which the tests hold
SLOW = 3.0  # seconds of the processor that one input may take, with what the kit makes for the first
MEMORY = 1024  # MiB that a fuzzing process may take
# What a parser might stumble over, in place of any value of a tree.
AWKWARD: list[Any] = [
    None, True, False, 0, 1, -1, 255, 65535, 65536, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63),
    10**30, 0.0, -0.0, 1e-5, 1.5, 1e308, float("nan"), float("inf"), "", "0", "a" * 300, "\ud800", "\0", "../x", "é",
    "F64", "BF16", "00" * 32, "11" * 32, b"", b"\0" * 8, [], {}, [[]], {"": {}}, [0, 0], [1, 2, 3],
]  # fmt: skip
AWKWARD_DER: list[list[Any]] = [  # as `_elements` has them
    [tag, b"", bytes.fromhex(content)]
    for tag, content in (
        (1, "ff"), (1, "00"), (2, "00"), (2, "ff"), (2, ""), (2, "7f" * 21), (4, ""), (5, ""), (6, "2a"), (6, "80"),
        (12, "c3a9"), (19, "2a"), (22, "1b5b324a"), (0x30, ""), (0x31, ""), (0xA0, ""), (0xA3, ""),
        (23, b"500101000000Z".hex()), (24, b"20500101000000Z".hex()), (24, b"99991231235959Z".hex()),
    )
]  # fmt: skip
KINDS = b"\0\1\2\3\4\5\6\7"  # the first byte of an input, before its tree, where a target has several


class Finding(Exception):
    """An input that does what none may. The text says what, and where in the code."""


def attempt(target: Target, data: bytes) -> None:
    """Runs one input. Raises Finding."""
    began = time.process_time()
    try:
        target.run(data)
    except target.errors:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # not Exception: what native code panics with is none
        frames = [(Path(frame.filename).name, frame) for frame in traceback.extract_tb(error.__traceback__)]
        places = [f"{file}:{frame.lineno} {frame.name}" for file, frame in reversed(frames) if file != "fuzz.py"]
        raise Finding(f"{type(error).__name__} at {' < '.join(places[:3])}: {str(error)[:200]!r}") from error
    if time.process_time() - began > SLOW:
        raise Finding(f"more than {SLOW} s for one input")


def kept(corpus: Path, name: str) -> list[bytes]:
    """The inputs of a target in a corpus, in the order of their names."""
    return [path.read_bytes() for path in sorted((corpus / name).glob("*"))]


def mutated(data: bytes, target: Target, chance: random.Random, others: list[bytes]) -> bytes:
    """An input a little different from `data`: now and then another tree, else other bytes."""
    if target.tree and chance.random() < 0.7:
        with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError, RecursionError, EvidenceError,
                                 msgpack.UnpackException):  # fmt: skip
            kind, tree = (data[:1], data[1:]) if target.tree != "msgpack" and data[0] in KINDS else (b"", data)
            other = _other_der(tree, chance) if target.tree == "der" else _other_tree(tree, target.tree, chance)
            return (kind + other)[:LONGEST]
    return _other_bytes(data, chance, others)


def _other_bytes(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 32))
        match chance.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at : at + 1] = bytes([chance.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, chance.randrange(256)))])
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[at : at + size]
            case 4:
                number = chance.choice((0, 1, 2**15, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)))
                changed[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, chance.choice(("big", "little")))
            case 5:
                del changed[at:]
            case _:
                other = chance.choice(others) if others else data
                start = chance.randrange(len(other) + 1)
                changed[at : at + size] = other[start : start + size]
    return bytes(changed[:LONGEST])


def _other_tree(data: bytes, kind: str, chance: random.Random) -> bytes:
    """`data` with one or two of its values replaced, doubled, moved, renamed or left out."""
    read = {"json": json.loads, "cbor": cbor.read, "msgpack": functools.partial(msgpack.unpackb, strict_map_key=False)}
    top = [read[kind](data)]
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(top))
        parent, key = chance.choice(places)
        match chance.randrange(7):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[chance.choice(("", "x", "format", "__metadata__", key + "s", "rope"))] = parent.pop(key)
            case 2 if isinstance(parent, list):
                parent[key:key] = [copy.deepcopy(parent[key])] * chance.choice((1, 2, 40))
            case 3:
                other, place = chance.choice(places)
                parent[key] = copy.deepcopy(other[place])
            case 4 if type(parent[key]) in (int, float):
                parent[key] += chance.choice((-1, 1, 2**16, 2**32, -(2**64), 0.5))
            case 5 if type(parent[key]) is str and parent[key]:
                text, at = parent[key], chance.randrange(len(parent[key]))
                parent[key] = text[:at] + chance.choice(("", "0", "A", "\0", "/", "é", "\udc80")) + text[at + 1 :]
            case 6 if type(parent[key]) is bytes:
                change = _other_der if parent[key][:1] == b"\x30" else functools.partial(_other_bytes, others=[])
                parent[key] = change(parent[key], chance=chance)
            case _:
                parent[key] = copy.deepcopy(chance.choice(AWKWARD))
        if not top:
            top = [None]
    if kind == "json":
        space = chance.choice((None, None, None, 1))
        return json.dumps(top[0], default=lambda value: value.hex(), indent=space).encode()
    packed: bytes = enclaves.cbor(top[0]) if kind == "cbor" else msgpack.packb(top[0], unicode_errors="surrogatepass")
    return packed


def _other_der(data: bytes, chance: random.Random) -> bytes:
    """`data` with one or two of its elements changed, doubled, moved or left out. The lengths around them fit again."""
    top = _elements(data)
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_element_places(top))
        if not places:
            break
        parent, i = chance.choice(places)
        match chance.randrange(7):
            case 0:
                del parent[i]
            case 1:
                parent[i:i] = [copy.deepcopy(parent[i])] * chance.choice((1, 2, 40))
            case 2:
                other, place = chance.choice(places)
                parent[i] = copy.deepcopy(other[place])
            case 3:
                parent[i][0] = chance.choice((1, 2, 3, 4, 5, 6, 12, 19, 22, 23, 24, 0x30, 0x31, 0x80, 0xA0, 0xA3, 0x1F))
            case 4:
                parent[i] = copy.deepcopy(chance.choice(AWKWARD_DER))
            case _ if type(parent[i][2]) is bytes:
                parent[i][2] = _other_bytes(parent[i][2], chance, [])
            case _:
                parent[i][2].append(copy.deepcopy(chance.choice(AWKWARD_DER)))
    return _der(top)


def _elements(data: bytes) -> list[list[Any]]:
    """DER taken apart: of each element its tag, a byte that is before what it holds, and that: elements or bytes."""
    reader, found = der.Reader(data), []
    while reader.more:
        tag = data[reader.at]
        content = reader.content(tag)
        before = content[:1] if tag == der.BITS else b""
        held: Any = content[len(before) :]
        if tag & 0x20 or tag in (der.BITS, der.OCTETS):
            with contextlib.suppress(EvidenceError):
                held = _elements(held)
        found.append([tag, before, held])
    return found


def _element_places(elements: list[list[Any]]) -> Iterator[tuple[list[list[Any]], int]]:
    for i, (_, _, held) in enumerate(elements):
        yield elements, i
        if type(held) is list:
            yield from _element_places(held)


def _der(elements: list[list[Any]]) -> bytes:
    return b"".join(
        enclaves.tlv(tag, before, held if type(held) is bytes else _der(held)) for tag, before, held in elements
    )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, as its container and its key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


class Findings:
    """Writes what was found into a folder, once for each place in the code."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self.seen: set[str] = set()

    def note(self, finding: Finding, data: bytes) -> None:
        place = str(finding).split(": ")[0]
        if place in self.seen:
            return
        self.seen.add(place)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._name}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"FOUND {self._name}: {finding}\n      {path}", flush=True)


def blind(name: str, seconds: float, corpus: Path, findings: Findings, seed: int = 0, most: int = 2**63) -> int:
    """Runs the kept inputs, then mutations of them, as many as there is time for; returns how many in all."""
    target, chance, deadline = TARGETS[name], random.Random(seed), time.monotonic() + seconds
    inputs = kept(corpus, name) or target.seeds()
    count = 0
    while count < len(inputs) or (count < len(inputs) + most and time.monotonic() < deadline):
        data = inputs[count] if count < len(inputs) else mutated(chance.choice(inputs), target, chance, inputs)
        count += 1
        try:
            attempt(target, data)
        except Finding as finding:
            findings.note(finding, data)
    return count


def guided(name: str, arguments: list[str], findings: Findings) -> None:
    """Hands the process to atheris, with libFuzzer's arguments. Does not return. Needs atheris."""
    target = TARGETS[name]

    def once(data: bytes) -> None:
        try:
            attempt(target, data)
        except Finding as finding:
            findings.note(finding, data)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if target.tree and chance.random() < 0.5:
            return mutated(data, target, chance, [])[:longest]
        result: bytes = atheris.Mutate(data, longest)
        return result

    atheris.Setup([sys.argv[0], *arguments], once, custom_mutator=mutate)
    atheris.Fuzz()


def run(name: str, seconds: float, options: argparse.Namespace) -> None:
    """One target in this process. libFuzzer ends it."""
    findings = Findings(name, options.findings)
    if not GUIDED:
        print(f"      {name}: {blind(name, seconds, options.corpus, findings, options.seed)} inputs", flush=True)
        return
    own = options.keep / name
    own.mkdir(parents=True, exist_ok=True)
    options.findings.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-max_total_time={seconds:.0f}", f"-seed={options.seed or 1}", f"-max_len={LONGEST}", "-timeout=20",
        f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={options.findings}/{name}-", "-verbosity=1", "-reload=0",
        "-print_final_stats=1", str(own), *([str(options.corpus / name)] if (options.corpus / name).is_dir() else []),
    ]  # fmt: skip
    guided(name, arguments, findings)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=["all", *TARGETS], metavar="TARGET|all")
    parser.add_argument("inputs", nargs="*", type=Path, help="files to run again instead")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, divided among the targets")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="read only")
    parser.add_argument("--keep", type=Path, default=Path("corpus"), help="atheris' own corpus")
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seeds", action="store_true", help="write the seeds into the corpus")
    options = parser.parse_args()
    if not options.list and options.target is None:
        parser.error("which target? --list tells them")
    return options


def main() -> int:
    """Runs what was asked for; returns the exit code."""
    options = parse()
    if options.list:
        print("\n".join(TARGETS))
        return 0
    names = list(TARGETS) if options.target == "all" else [options.target]
    if options.inputs:
        for path in options.inputs:
            attempt(TARGETS[options.target], path.read_bytes())
    elif options.seeds:
        for name in names:
            (options.corpus / name).mkdir(parents=True, exist_ok=True)
            for data in TARGETS[name].seeds():
                (options.corpus / name / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    elif options.target != "all":
        run(options.target, options.seconds, options)
    else:
        ended = [each(name, options) for name in names]
        return int(not all(ended) or any(options.findings.glob("*")))
    return int(any(options.findings.glob("*")))


def each(name: str, options: argparse.Namespace) -> bool:
    """One of all targets, in a process of its own, whose temporary files go with it; whether it came to its end."""
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "--seconds": options.seconds / len(TARGETS), "--corpus": options.corpus, "--keep": options.keep,
            "--findings": options.findings, "--seed": options.seed,
        }  # fmt: skip
        command = [sys.executable, __file__, name]
        command += [str(word) for pair in given.items() for word in pair]
        ended = subprocess.run(
            command, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, check=False
        )
    runs = re.search(r"Done (\d+) runs in (\d+)", ended.stderr) or re.search(r": (\d+) inputs()", ended.stdout)
    print(f"{name:18} {runs[1] if runs else 'no end of its':>9} runs", flush=True)
    print("".join(line for line in ended.stdout.splitlines(True) if "inputs" not in line), end="", flush=True)
    if runs is None or "ERROR: libFuzzer" in ended.stderr:
        print(ended.stderr[-3000:], flush=True)
    return runs is not None


if __name__ == "__main__":
    sys.exit(main())
