"""Tests of vsock, and of a real `/dev/nsm`, in a user-mode Linux: few kernels have vsock's loopback, and only root
makes devices."""

import re
import sys
from pathlib import Path

import pytest

from system.uml import guest

TESTS = Path(__file__).resolve().parents[1]
FILES = ["system/test_vsock.py", "unit/test_transport_channel.py", "system/test_relay.py"]
OPTIONS = ["-q", "--color=no", "-p", "no:cacheprovider"]


def run(*words: str) -> str:
    """What pytest says in a guest, in which it has to succeed."""
    try:
        result = guest.run([sys.executable, "-m", "pytest", *OPTIONS, *words], timeout=400)
    except guest.NoGuest as error:
        pytest.skip(str(error))
    assert result.code == 0, result.output
    return result.output


def test_links_pipelines_and_relays_hold_over_vsock() -> None:
    told = run("-k", "vsock", *(str(TESTS / name) for name in FILES))
    summary = re.search(r"^(\d+) passed, \d+ deselected in", told, re.MULTILINE)  # and none skipped
    assert summary, told
    assert int(summary[1]) >= 40


def test_pipelines_take_their_evidence_from_a_real_device() -> None:
    told = run(str(TESTS / "system/test_nsm.py"))
    assert re.search(r"^5 passed in", told, re.MULTILINE), told
