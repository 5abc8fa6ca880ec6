"""A short fuzzing run: the kept inputs of tests/fuzz/corpus, and the same few hundred mutations of them every time.

`tests/fuzz/run.py` is the long one, guided by coverage. What it found is kept as inputs here, and as tests of their own
where the parser's tests are.
"""

import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from attest import EvidenceError
from fuzz import run as fuzz
from fuzz.targets import TARGETS

MUTATIONS = 300  # of the inputs of each target; of handshakes, which cost 7 ms each, fewer
HANDSHAKES = 50
MEMORY = 24 * 2**20  # bytes that one input of at most 8 KB may make Python hold; a reader reserves up to 16 MiB


def examine(name: str, data: bytes) -> None:
    """One input: only the parser's own errors, soon, in little memory."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        fuzz.attempt(TARGETS[name], data)
    except fuzz.Finding as finding:
        pytest.fail(f"{finding}; the input: {data!r}")
    assert tracemalloc.get_traced_memory()[1] - before < MEMORY, f"too much memory for {data!r}"


@pytest.mark.parametrize("name", TARGETS)
def test_only_a_parsers_own_errors_come_out(name: str) -> None:
    inputs = fuzz.kept(fuzz.CORPUS, name)
    assert inputs, "no kept inputs"
    chance, target = random.Random(name), TARGETS[name]
    tracemalloc.start()
    try:
        for data in inputs:
            examine(name, data)
        for _ in range(HANDSHAKES if name.startswith(("respond", "initiate")) else MUTATIONS):
            examine(name, fuzz.mutated(chance.choice(inputs), target, chance, inputs))
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_accepts_what_our_own_code_writes(name: str) -> None:
    """A parser that refuses everything would pass any fuzzing."""
    if not name.endswith("records"):  # a session's stream ends in an error of its own: Closed, Truncated
        assert any(accepted(name, data) for data in TARGETS[name].seeds())


def accepted(name: str, data: bytes) -> bool:
    try:
        TARGETS[name].run(data)
    except TARGETS[name].errors:
        return False
    return True


@pytest.mark.parametrize("name", ["der", "x509", "crl", "snp", "tdx", "tdx-parts"])
def test_a_mutation_of_der_still_has_lengths_that_fit(name: str) -> None:
    """Otherwise nearly all mutations would be refused at their first element."""
    chance, trees = random.Random(name), 0
    for data in TARGETS[name].seeds():
        tree = data[1:] if data[0] in fuzz.KINDS else data
        try:
            assert fuzz._der(fuzz._elements(tree)) == tree
        except EvidenceError:
            continue  # a report, a quote or text
        trees += 1
        changed = [fuzz._other_der(tree, chance) for _ in range(50)]
        assert sum(fuzz._der(fuzz._elements(one)) == one for one in changed if one != tree) > 30
    assert trees


def test_a_finding_is_told_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a parser that lets another error out is found."""
    careless = TARGETS["address"].__class__(lambda data: data.decode("ascii"), (), lambda: [b"abc"])
    monkeypatch.setitem(TARGETS, "address", careless)
    findings = fuzz.Findings("address", tmp_path / "findings")
    fuzz.blind("address", 5.0, tmp_path, findings, most=200)
    (seen,) = findings.seen
    assert seen.startswith("UnicodeDecodeError at")
    (path,) = (tmp_path / "findings").iterdir()
    with pytest.raises(fuzz.Finding, match="UnicodeDecodeError"):
        fuzz.attempt(careless, path.read_bytes())


def test_the_command_lists_its_targets() -> None:
    command = [sys.executable, fuzz.__file__, "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert listed.split() == list(TARGETS)
