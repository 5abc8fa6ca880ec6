"""What the memory of a process grows by, as the system counts it."""

import subprocess
import sys
from pathlib import Path

import pytest
from made import random_tensors, write
from processes import ROOT

from minigpt.engine.config import Config

SCORE = """
import sys
from pathlib import Path
import minigpt

def resident(field):
    return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

model = minigpt.load(sys.argv[1])
ids = [7919 * i % model.config.vocab_size for i in range(model.config.n_positions)]
model.score(ids[:2])  # the weights are resident from now on
Path("/proc/self/clear_refs").write_text("5")  # and the peak is what is resident
before = resident("VmRSS")
model.score(ids)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak since a moment")
def test_scores_of_1024_positions_with_gpt2_small_take_60_mb_at_most(tmp_path: Path) -> None:
    config = Config()
    folder = write(tmp_path / "small", config, random_tensors(config))
    grown = int(subprocess.check_output([sys.executable, "-c", SCORE, str(folder)], cwd=ROOT, timeout=600))
    print(f"{grown / 1e6:.1f} MB")
    assert grown <= 60e6
