"""lm-eval, of the extra `evaluate`, with a small task of our own: through `minigpt serve` it finds what its hf backend
finds in the same weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import Serving

import minigpt
from minigpt.checkpoint import sources

pytestmark = pytest.mark.slow

QUESTIONS = [
    ("The capital of France is", [" Paris", " Tokyo", " the river Seine."], 0),
    ("The capital of Japan is", [" Berlin", " Tokyo. It lies on the", " Zürich"], 1),
    ("Germany has a border with", [" Japan", " France and Poland.", " 東京"], 1),
    ("Spain has a border with Portugal and", [" France.", " Chile", " Peru and Brazil."], 0),
    ("France. " * 90 + "The capital of France is", [" Paris", " called", " Rome"], 0),
]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: FILE
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
kind, arguments, folder, out = sys.argv[1:]
done = simple_evaluate(model=kind, model_args=arguments, tasks=["capitals"], log_samples=True, batch_size=2,
                       device="cpu", task_manager=TaskManager(include_path=folder, include_defaults=False))
found = [[response[0] for response in sample["resps"]] for sample in done["samples"]["capitals"]]
json.dump({"found": found, "acc": done["results"]["capitals"]["acc,none"]}, open(out, "w"))
"""


def evaluate(where: Path, kind: str, arguments: str) -> Any:
    """The accuracy, and for each choice of each question its log-likelihood and whether it is the greedy text."""
    out = where / f"{kind}.json"
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, kind, arguments, str(where), str(out)],
        capture_output=True, text=True, timeout=900, cwd=where,
        env=os.environ | {"NO_PROXY": "*", "HOME": str(where), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def test_lm_eval_finds_what_it_finds_with_its_own_backend(tmp_path: Path) -> None:
    for name in ("lm_eval", "torch", "transformers", "tenacity"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install '.[evaluate]'")
    data = tmp_path / "questions.jsonl"
    rows = [{"question": text, "choices": choices, "answer": answer} for text, choices, answer in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(TASK.replace("FILE", str(data)))
    folder = sources.local("tiny")
    theirs = evaluate(tmp_path, "hf", f"pretrained={folder},dtype=float32")
    with Serving() as server:
        address = f"model=tiny,base_url={server.address}/v1/completions,tokenizer={folder},tokenized_requests=True"
        ours = evaluate(tmp_path, "local-completions", address + ",tokenizer_backend=huggingface,max_length=512")
    tokenizer = minigpt.load("tiny").tokenizer
    assert tokenizer is not None
    flags = set()
    for (_, choices, _), mine, other in zip(QUESTIONS, ours["found"], theirs["found"], strict=True):
        for choice, (logprob, greedy), (wanted, whether) in zip(choices, mine, other, strict=True):
            assert logprob == pytest.approx(wanted, abs=1e-4 * len(tokenizer.encode(choice)))
            assert greedy == whether
            flags.add(greedy)
    assert flags == {True, False}
    assert ours["acc"] == theirs["acc"]
