"""Checkpoints: a folder, the embedded one, or the hub: the real client, downloading from a hub served here."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, Hub
from made import SMALL, random_tensors, write
from unit.test_tokenizer import ENCODER

import minigpt
from attest.providers.mock import MockPins
from minigpt.checkpoint import sources, tokenizer, weights
from minigpt.client.text import encode_prompt
from minigpt.errors import CheckpointError, ConfigError, UsageError
from minigpt.launch.plan import plan
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.manifest import Manifest
from minigpt.stage import process
from transport import sockets
from transport.errors import Unreachable

NAME = "someone/small-gpt2"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write(tmp_path / "repository", SMALL, random_tensors(SMALL), shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    more = dict.fromkeys((*sources.TOKENIZER_FILES, "generation_config.json"), b"{}") | {
        "pytorch_model.bin": b"pickle",
        "onnx/model.safetensors": b"other",
    }
    with Hub(NAME, files | more).serving() as hub:
        yield hub


PROGRAM = """
import json, sys
from minigpt.checkpoint import sources, weights
from minigpt.errors import CheckpointError
try:
    checkpoint = sources.find(sys.argv[1], *sys.argv[2:])
    config = sources.read_config(checkpoint.folder)
    digest = weights.load(checkpoint.folder, config, range(config.n_layer)).digest.hex()
    print(json.dumps([str(checkpoint.folder), checkpoint.name, checkpoint.revision, digest]))
except CheckpointError as error:
    print(json.dumps(str(error)))
"""


def find_in_child(hub: Hub, home: Path, *arguments: str, **environment: str) -> list[str] | str:
    """What `sources.find` says in a process of its own, since the client reads its environment when imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_the_hub_client_downloads_what_is_needed_and_tells_the_commit(hub: Hub, tmp_path: Path) -> None:
    folder, name, revision, digest = find_in_child(hub, tmp_path / "home", NAME, HF_TOKEN="hf_secret")
    assert (name, revision) == (NAME, COMMIT)
    assert Path(folder).is_relative_to(tmp_path / "home")
    assert {path.name for path in Path(folder).iterdir()} == {n for n in hub.files if n in sources.FILES} | {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    }  # fmt: skip
    assert digest == weights.load(tmp_path / "repository", SMALL, range(4)).digest.hex()
    assert not any("pytorch_model" in path or "onnx" in path for path in hub.asked)
    assert "Bearer hf_secret" in hub.tokens

    hub.asked.clear()  # again, without a network: from the cache
    offline = find_in_child(hub, tmp_path / "home", NAME, HF_HUB_OFFLINE="1")
    assert offline == [folder, name, revision, digest]
    assert hub.asked == []
    assert find_in_child(hub, tmp_path / "home", NAME, COMMIT) == offline


def test_what_the_hub_does_not_have_is_said(hub: Hub, tmp_path: Path) -> None:
    assert "no such model on the hub" in find_in_child(hub, tmp_path, "someone/else")
    assert "not this revision" in find_in_child(hub, tmp_path, NAME, "v9")
    offline = find_in_child(hub, tmp_path, NAME, HF_HUB_OFFLINE="1")
    assert "was not downloaded before, and HF_HUB_OFFLINE forbids to ask the hub: unset it" in offline


def test_what_the_hub_refuses_is_said_without_the_token(hub: Hub, tmp_path: Path) -> None:
    for status, words in ((403, "accept its terms"), (401, "private: set HF_TOKEN"), (429, "(HTTP 429): try again"),
                          (500, "the hub fails (HTTP 500)")):  # fmt: skip
        hub.status = status
        said = find_in_child(hub, tmp_path, NAME, HF_TOKEN="hf_secret")
        assert words in said
        assert "hf_secret" not in said


def test_a_hub_that_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    said = find_in_child(hub, tmp_path, NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert re.search("cannot be reached|cannot be downloaded", str(said))


# Folders


def test_a_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny", SMALL, random_tensors(SMALL))
    found = sources.find("tiny")
    assert (found.folder, found.name, found.revision) == ((tmp_path / "tiny").resolve(), "tiny", None)
    assert sources.local("tiny") == found.folder
    assert f"model tiny is the folder {found.folder} here, not the model of that name: ./tiny says so" in caplog.text
    caplog.clear()
    assert sources.find("./tiny").folder == found.folder
    assert caplog.text == ""
    with pytest.raises(CheckpointError, match=r"is a file, wanted the folder that it is in, with config.json"):
        sources.find("tiny/config.json")
    with pytest.raises(CheckpointError, match="is a file, wanted the folder that it is in"):
        sources.local("tiny/config.json")
    with pytest.raises(CheckpointError, match="A stage downloads nothing: `hf download openai-community/gpt2` prints"):
        sources.local("openai-community/gpt2")
    assert sources.read_config(found.folder) == SMALL


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "a/b/c", "", "../x", "a b", "x\n", "~/model"])
def test_what_is_neither_folder_nor_hub_id_is_refused_without_asking_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        sources.find(model)
    with pytest.raises(CheckpointError, match="no such folder"):
        sources.local(model)


def test_only_the_hub_has_revisions(tmp_path: Path) -> None:
    for model in (str(tmp_path), "tiny"):
        with pytest.raises(CheckpointError, match="no revisions"):
            sources.find(model, "main")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"), (b"{", "not JSON"), (b"\xff", "not JSON"), (b"[" * 100_000, "not JSON"),
        (b"[]", "wanted a JSON object"), (b'{"model_type": "llama"}', "llama"), (b" " * 2**21, "more than"),
    ],
)  # fmt: skip
def test_a_bad_config_is_refused_with_its_path(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(tmp_path))}.*{message}"):
        sources.read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 96, 3], "temperature": 0.5}, (7, 96, 3)),
        ({"eos_token_id": [7, 97]}, (7,)),  # one is outside the vocabulary
        ({"eos_token_id": None}, ()),
        ({"max_length": 50}, ()),
    ],
)
def test_generation_config_alone_says_what_ends_a_generation(tmp_path: Path, content: Any, ids: tuple[int]) -> None:
    write(tmp_path, SMALL, random_tensors(SMALL))
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert sources.read_config(tmp_path) == replace(SMALL, eos_token_id=ids)
    root = MockPins(bytes(range(32)), frozenset([bytes([1]) * 48]))
    assert Manifest.parse(plan(sources.find(str(tmp_path)), 2, pins=[root])).config.eos_token_id == ids


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token_id": "7"}', '{"eos_token_id": 7, "eos_token_id": 8}'])
def test_a_bad_generation_config_is_refused_with_its_path(tmp_path: Path, content: str) -> None:
    write(tmp_path, SMALL, random_tensors(SMALL))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        sources.read_config(tmp_path)


# As a user meets them: a program of their own


USER = """
import json, sys, minigpt, numpy as np
from pathlib import Path
np.seterr(all="raise")
model = minigpt.load(Path(sys.argv[1]))
print(json.dumps([model.tokenizer.encode(" Lima<x>"), len(model.logits("Lima<x>")),
                  model.tokenizer.decode([400, 401]), list(model.config.eos_token_id)]))
with minigpt.Pipeline.local(Path(sys.argv[1]), 2) as pipeline:
    for pipe in (model, pipeline):
        for options in ({}, {"temperature": 1e-3, "seed": 1}):
            generation = pipe.generate("Lima<x>", max_tokens=12, logprobs=True, **options)
            print(json.dumps([[token.id for token in generation], str(generation.reason)]))
"""


def test_a_users_program_has_the_files_of_a_checkpoint_honoured_whatever_it_told_numpy(tmp_path: Path) -> None:
    config = replace(SMALL, vocab_size=402, eos_token_id=(5,), tie_word_embeddings=False)
    tensors = random_tensors(config)
    folder = write(tmp_path / "model", config, tensors)
    ENCODER.model.save(str(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 400, "<y>": 401}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "pad_token": "<y>"}))

    def told() -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", USER, folder], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    (ids, rows, text, ends), *runs = told()
    assert ids == [0, *ENCODER.encode(" Lima").ids, 400]
    assert (rows, text, ends) == (1 + len(ENCODER.encode("Lima").ids) + 1, "<x>", [5])
    assert runs[:2] == runs[2:]
    assert [len(generated) for generated, _ in runs] == [12] * 4
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [runs[0][0][3], 401]}))
    (*_, ends), *stopped = told()
    assert ends == [runs[0][0][3], 401]
    end = runs[0][0].index(ends[0]) + 1
    assert stopped[0] == stopped[2] == [runs[0][0][:end], "end"]


def test_with_a_tokenizer_of_another_kind_token_ids_still_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "model", SMALL, random_tensors(SMALL))
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": {"type": "Whitespace"}, "model": words}))
    with minigpt.Pipeline.local(folder, stages=1) as pipeline:
        (told,) = caplog.messages
        assert told.endswith("text cannot be used with this model, token ids can")
        assert "tokenizer.json: pre_tokenizer is Whitespace, wanted none, ByteLevel, Digits" in told
        model = minigpt.load(folder)
        assert caplog.messages == [told, told]
        for each in (pipeline, model):
            assert len(list(each.generate([1, 2], max_tokens=2))) == 2
            with pytest.raises(UsageError, match="no tokenizer for this model was found"):
                each.generate("a")
    (folder / "tokenizer.json").write_text("{")  # a damaged one is no other kind
    with pytest.raises(CheckpointError, match="not JSON"):
        minigpt.load(folder)


def test_a_token_that_the_model_does_not_have_is_named() -> None:
    folder = sources.local("tiny")
    config = replace(sources.read_config(folder), vocab_size=2000, eos_token_id=())
    found = tokenizer.load(folder)
    said = r"has the token '<\|endoftext\|>', id 2047, and this model's ids end at 1999: .* leave that token out"
    with pytest.raises(UsageError, match=said):
        encode_prompt("a<|endoftext|>", found, config)


def test_a_stage_that_cannot_listen_or_only_for_its_own_machine_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = ("127.0.1.1", 0)
    monkeypatch.setattr(sockets, "_places", lambda address: [(socket.AF_INET, place)])
    with process._listener(None, Addresses(1, None, {0: "tcp://here:5001"}), 0) as listener:
        port = listener.address.port
    assert "here is 127.0.1.1 here, which no other machine reaches" in caplog.text
    assert f"--listen tcp://0.0.0.0:{port}" in caplog.text
    caplog.clear()
    place = ("127.0.0.1", 0)
    for name in ("localhost", "127.0.0.1"):
        process._listener(None, Addresses(1, None, {0: f"tcp://{name}:5001"}), 0).close()
    assert caplog.text == ""
    place = ("192.0.2.1", 0)  # of nobody
    with pytest.raises(Unreachable, match=r"cannot listen on tcp://here:5001: .*give it with --listen"):
        process._listener(None, Addresses(1, None, {0: "tcp://here:5001"}), 0)
