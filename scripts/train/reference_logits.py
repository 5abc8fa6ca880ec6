"""Write the golden files of tests/test_golden.py: logits as transformers' GPT2LMHeadModel on torch computes them.

    python scripts/train/reference_logits.py            all of them
    python scripts/train/reference_logits.py tiny       only the embedded model's, after it was trained anew

Needs the extra `reference`. For each model a file tests/data/golden_NAME.npz: the ids, the places (rows and columns) at
which logits were kept, the logits there, and the digest of the weights they belong to. The weights themselves are the
seeded random ones of tests/made.py, or the embedded checkpoint's.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import minigpt  # noqa: E402, F401  before NumPy: it sets the BLAS library's environment

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from made import GOLDEN, random_tensors, write  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402

from minigpt.checkpoint import sources, weights  # noqa: E402

ROWS = 6  # positions kept of each sequence: the first ones, the last, and some between
COLUMNS = 64  # of the vocabulary


def reference(folder: Path) -> dict[str, np.ndarray]:
    """What a golden file holds, computed from a checkpoint's folder."""
    config = sources.read_config(folder)
    digest = weights.load(folder, config, range(config.n_layer)).digest
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    ids = np.random.default_rng(17).integers(0, config.vocab_size, config.n_positions)
    rows = np.unique(np.linspace(0, config.n_positions - 1, ROWS).astype(int))
    columns = np.unique(np.linspace(0, config.vocab_size - 1, COLUMNS).astype(int))
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)[None], logits_to_keep=torch.from_numpy(rows)).logits[0].numpy()
    return {
        "ids": ids.astype(np.int32),
        "rows": rows.astype(np.int32),
        "columns": columns.astype(np.int32),
        "logits": logits[:, columns],
        "weights_sha256": np.frombuffer(digest, np.uint8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*GOLDEN, "tiny"], metavar="NAME", help="default: all")
    torch.set_num_threads(2)
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if name == "tiny":
                folder = sources.local("tiny")
            else:
                write(folder, GOLDEN[name], random_tensors(GOLDEN[name]))
            target = ROOT / "tests" / "data" / f"golden_{name}.npz"
            np.savez_compressed(target, **reference(folder))  # type: ignore[arg-type]
            print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
