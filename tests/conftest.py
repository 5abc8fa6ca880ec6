"""What the tests share: where the vectors lie, and small models made on the spot."""

import os
from pathlib import Path

import pytest

os.environ["MINIGPT_THREADS"] = "1"  # as the stages that tests start: bits are the same only with the same threads

import minigpt  # noqa: F401 — before NumPy, whose threads it sets

VECTORS = Path(__file__).resolve().parents[1].parent / "shared" / "vectors"


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of published test vectors, which are other people's data and not part of a clone."""
    if not VECTORS.is_dir():
        pytest.skip("the published test vectors are not beside this checkout")
    return VECTORS
