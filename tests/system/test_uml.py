"""The tests of vsock, in a kernel that has it: a user-mode Linux, because few kernels have vsock's loopback."""

import re
import sys
from pathlib import Path

import pytest

from system.uml import guest

TESTS = Path(__file__).resolve().parents[1]
FILES = ["system/test_vsock.py", "unit/test_transport_channel.py", "system/test_relay.py"]
OPTIONS = ["-q", "--color=no", "-p", "no:cacheprovider", "-k", "vsock"]


def test_links_pipelines_and_relays_hold_over_vsock() -> None:
    files = [str(TESTS / name) for name in FILES]
    try:
        result = guest.run([sys.executable, "-m", "pytest", *OPTIONS, *files], timeout=400)
    except guest.NoGuest as error:
        pytest.skip(str(error))
    assert result.code == 0, result.output
    summary = re.search(r"^(\d+) passed, \d+ deselected in", result.output, re.MULTILINE)  # and none skipped
    assert summary, result.output
    assert int(summary[1]) >= 40
