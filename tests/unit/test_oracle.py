"""Logits against an independent oracle: transformers' GPT2LMHeadModel on torch, in the same process.

test_golden.py holds the same comparisons with stored answers, for where torch is not.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import Chain, told
from made import ODD, SMALL, cut, odd, random_tensors, write

import minigpt
from minigpt.checkpoint import sources, weights
from minigpt.client.text import Token, perplexity
from minigpt.engine.config import Config
from minigpt.engine.model import GPT2
from minigpt.engine.sampling import Sampling
from minigpt.errors import CheckpointError
from minigpt.protocol.messages import CHUNK, Generate, Scores, Tokens, Wanted

torch = pytest.importorskip("torch", reason="the oracle needs torch: pip install the extra `reference`")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers: pip install the extra `reference`"
)

TOLERANCE = 1e-4  # of a logit, float32


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def oracle_of(folder: Path) -> Any:
    """The oracle's own reading of a checkpoint's folder."""
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def ours_of(folder: Path) -> GPT2:
    config = sources.read_config(folder)
    layers = range(config.n_layer)
    return GPT2(config, layers, weights.load(folder, config, layers).tensors)


def expected(oracle: Any, ids: list[int], chunks: list[int] | None = None) -> np.ndarray:
    """The oracle's logits after every id, fed in chunks of these sizes with its own cache."""
    rows, start, cache = [], 0, transformers.DynamicCache(config=oracle.config)
    with torch.inference_mode():
        for size in chunks or [len(ids)]:
            rows.append(oracle(torch.tensor([ids[start : start + size]]), cache, use_cache=True).logits[0].numpy())
            start += size
    return np.concatenate(rows)


def logits(model: GPT2, ids: list[int], chunks: list[int] | None = None) -> np.ndarray:
    cache, rows, start = model.new_cache(), [], 0
    for size in chunks or [len(ids)]:
        x = model.forward(model.embed(ids[start : start + size], start), [(cache, size)])
        rows.append(model.logits(x))
        start += size
    return np.concatenate(rows)


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    apart = np.abs(got - wanted).max()
    assert apart < TOLERANCE, f"at most {apart:.2e} apart"


def random_ids(config: Config, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()


@pytest.mark.parametrize("name", ODD)
def test_odd_configurations_at_every_position(name: str, tmp_path: Path) -> None:
    config = odd(name)
    write(tmp_path, config, random_tensors(config))
    oracle, model, ids = oracle_of(tmp_path), ours_of(tmp_path), random_ids(config, config.n_positions)
    wanted = expected(oracle, ids)
    assert np.abs(wanted).max() > 1
    assert_close(logits(model, ids), wanted)
    split = [4, 1, 1, config.n_positions - 6]
    assert_close(logits(model, ids, split), expected(oracle, ids, split))
    assert_close(logits(model, ids, [1] * len(ids)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", ["30KB", "1GB"])
def test_checkpoints_that_transformers_saves(tmp_path: Path, dtype: Any, size: str) -> None:
    torch.manual_seed(0)
    shape = {name: SMALL.to_json()[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    settings = transformers.GPT2Config(**shape, initializer_range=0.2)
    transformers.GPT2LMHeadModel(settings).to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / weights.INDEX).exists() == (size == "30KB")
    ids = random_ids(SMALL, 50)
    assert_close(logits(ours_of(tmp_path), ids), expected(oracle_of(tmp_path), ids))


def test_a_head_of_its_own_that_transformers_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_embd=24, n_layer=2, n_head=2, tie_word_embeddings=False, initializer_range=0.2
    )
    transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path)
    ids = list(range(20))
    assert_close(logits(ours_of(tmp_path), ids), expected(oracle_of(tmp_path), ids))


def test_the_embedded_model() -> None:
    try:
        folder = sources.local("tiny")
    except CheckpointError as error:
        pytest.skip(str(error))
    oracle, model = oracle_of(folder), ours_of(folder)
    config = model.config
    for count, chunks in ((5, None), (40, [7, 1, 32]), (config.n_positions, None), (config.n_positions, None)):
        ids = random_ids(config, count, seed=count)
        assert_close(logits(model, ids, chunks), expected(oracle, ids))
    prompt = random_ids(config, 8)
    with torch.inference_mode():
        wanted = oracle.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    ids = list(prompt)
    for _ in range(40):
        ids.append(int(logits(model, ids)[-1].argmax()))
    assert ids == wanted.tolist()


def oracle_of_tensors(tensors: dict[str, Any]) -> Any:
    """Of GPT-2 small's shape."""
    with torch.device("meta"):
        oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    copies = {f"transformer.{name}": torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    copies["lm_head.weight"] = copies["transformer.wte.weight"]
    oracle.load_state_dict(copies, assign=True)
    return oracle.eval()


def test_gpt2_small_with_random_weights() -> None:
    config = Config()
    tensors = random_tensors(config, seed=3)
    model = GPT2(config, range(config.n_layer), tensors)
    oracle = oracle_of_tensors(tensors)
    prompt = [464, 3139, 286, 4881, 318]
    cached = [5] + [1] * 10
    ids = prompt + random_ids(config, 10)
    wanted = expected(oracle, ids, cached)
    assert_close(logits(model, ids, cached), wanted)
    assert_close(logits(model, ids), wanted)

    full = random_ids(config, config.n_positions)
    cache = model.new_cache()
    for start in range(0, 1023, 341):
        model.forward(model.embed(full[start : start + 341], start), [(cache, 341)])
    last = model.logits(model.forward(model.embed(full[-1:], 1023), [(cache, 1)]))
    with torch.inference_mode():
        wanted = oracle(torch.tensor([full]), logits_to_keep=1).logits[0].numpy()
    assert_close(last, wanted)


@pytest.mark.parametrize("name", ["tiny", "small"])
@pytest.mark.parametrize("bounds", [(), (2,), (1, 3)], ids=str)
def test_scores_through_stages_are_the_oracles(name: str, bounds: tuple[int, ...], tmp_path: Path) -> None:
    try:
        folder = sources.local("tiny") if name == "tiny" else write(tmp_path, SMALL, random_tensors(SMALL))
    except CheckpointError as error:
        pytest.skip(str(error))
    oracle, config = oracle_of(folder), sources.read_config(folder)
    stages = cut(config, dict(weights.load(folder, config, range(config.n_layer)).tensors), *bounds)
    model = minigpt.load(folder)
    for count in (2, 40, CHUNK + 30, config.n_positions):
        ids = random_ids(config, count, seed=count)
        answers, _ = told(Chain(stages).run(Generate(0, tuple(ids), 1, wanted=Wanted.SCORES, top=5)))
        rows = torch.from_numpy(expected(oracle, ids[:-1])).double().log_softmax(-1)
        got = [logprob for answer in answers if isinstance(answer, Scores) for logprob in answer.logprobs]
        top = [pair for answer in answers if isinstance(answer, Scores) for pair in answer.top]
        wanted = rows[range(count - 1), ids[1:]].numpy()
        assert_close(np.array(got), wanted)
        assert_close(np.array([token.logprob for token in model.score(ids)[1:]]), wanted)
        assert_close(np.array([p for _, p in top]).reshape(-1, 5), rows.topk(5).values.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "GPT-2 small's shape"])
def test_the_perplexity_of_twenty_texts_through_stages_is_the_oracles(name: str) -> None:
    """Per token, as transformers' own loss has it; some texts are longer than a chunk."""
    tensors: dict[str, Any]
    if name == "tiny":
        try:
            folder = sources.local("tiny")
        except CheckpointError as error:
            pytest.skip(str(error))
        oracle, config = oracle_of(folder), sources.read_config(folder)
        tensors = dict(weights.load(folder, config, range(config.n_layer)).tensors)
        model = minigpt.load("tiny")
        texts = [
            [token.id for token in model.generate("The", max_tokens=20 * seed, temperature=1.5, seed=seed)]
            for seed in range(1, 20)
        ]
        texts = [ids for ids in texts if len(ids) > 1]
    else:
        config = Config()
        tensors = random_tensors(config, seed=3)
        oracle = oracle_of_tensors(tensors)
        texts = [random_ids(config, 2 + 3 * seed, seed) for seed in range(18)] + [random_ids(config, CHUNK + 9)]
    texts += [random_ids(config, config.n_positions, seed) for seed in range(20 - len(texts))]
    assert len(texts) == 20
    losses = []
    for ids in texts:
        with torch.inference_mode():
            losses.append(float(oracle(torch.tensor([ids]), labels=torch.tensor([ids])).loss))
    for bounds in ((), (4,), (2, 9)):
        stages = cut(config, tensors, *bounds)
        for ids, loss in zip(texts, losses, strict=True):
            answers, _ = told(Chain(stages).run(Generate(0, tuple(ids), 1, wanted=Wanted.SCORES)))
            scores = [score for answer in answers if isinstance(answer, Scores) for score in answer.logprobs]
            assert len(scores) == len(ids) - 1
            found = perplexity([Token(0, None, score) for score in scores])
            assert found is not None
            assert math.log(found) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("prompts", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_greedy_text_with_a_repetition_penalty_through_stages_is_the_oracles(prompts: int) -> None:
    try:
        folder = sources.local("tiny")
    except CheckpointError as error:
        pytest.skip(str(error))
    torch.set_num_threads(1)  # two would wait for each other at every token
    oracle, config = oracle_of(folder), sources.read_config(folder)
    texts: list[tuple[list[int], list[int]]] = []
    for length in range(5, 12):  # those of one length at once
        ids = [random_ids(config, length, seed) for seed in range(prompts) if 5 + seed % 7 == length]
        if ids:
            with torch.inference_mode():
                made = oracle.generate(
                    torch.tensor(ids), max_new_tokens=30, do_sample=False, repetition_penalty=1.2, eos_token_id=None
                )
            texts += zip(ids, made[:, length:].tolist(), strict=True)
    assert len(texts) == prompts
    tensors = dict(weights.load(folder, config, range(config.n_layer)).tensors)
    for bounds in ((), (4,), (2, 9)):
        stages = cut(config, tensors, *bounds)
        for prompt, wanted in texts:
            request = Generate(0, tuple(prompt), 30, sampling=Sampling(repetition_penalty=1.2))
            answers, _ = told(Chain(stages).run(request))
            assert [token for answer in answers if isinstance(answer, Tokens) for token in answer.ids] == wanted


@pytest.mark.parametrize("which", ["config", "one", "several", "none", "left out"])
def test_a_generation_ends_where_the_oracles_does(which: str, tmp_path: Path) -> None:
    config, ids = replace(odd("own head"), eos_token_id=()), random_ids(SMALL, 7)
    write(tmp_path, config, random_tensors(config))
    plain = [token.id for token in minigpt.load(str(tmp_path)).generate(ids, max_tokens=20)]
    assert len(plain) == 20
    ends = [plain[7], plain[3], plain[5]]
    written = {
        "one": {"eos_token_id": ends[0]},
        "several": {"eos_token_id": ends},
        "none": {"eos_token_id": None},
        "left out": {"temperature": 0.1},
    }
    stored = config.to_json() | {"eos_token_id": ends[0]}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    if which in written:
        (tmp_path / "generation_config.json").write_text(json.dumps(written[which]))
    oracle = oracle_of(tmp_path)
    wanted = oracle.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(ids) :]
    generated = [token.id for token in minigpt.load(str(tmp_path)).generate(ids, max_tokens=20)]
    assert generated == wanted.tolist()
    assert (len(generated) < 20) == (which in ("config", "one", "several"))
