"""The tokenizer: text survives, streams never break a character, and the package's own decoder agrees."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minigpt.checkpoint import tokenizer, tokenizer_files
from minigpt.errors import CheckpointError

TEXT = [
    "The capital of France is Paris, and that of Peru is Lima. " * 3,
    "Çà et là, où l'été naît, l'élève s'éveille; naïve façade, cœur de Noël.",
    "Привет, мир! 东京是日本的首都。 こんにちは世界。 العربية 🙂🙃👩‍👩‍👧‍👦",
]


def trained(vocabulary: int = 400) -> tokenizers.Tokenizer:
    """A byte-level BPE as GPT-2's, small, with merges that cut through characters."""
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    encoder.train_from_iterator(TEXT, trainer)
    return encoder


ENCODER = trained()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ENCODER.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tokenizer.Tokenizer:
    found = tokenizer.load(folder)
    assert found is not None
    return found


def streamed(loaded: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
    stream = loaded.stream()
    return [stream.push(token) for token in ids] + [stream.flush()]


@given(st.text())
def test_any_text_survives(loaded: tokenizer.Tokenizer, text: str) -> None:
    ids = loaded.encode(text)
    assert ids == ENCODER.encode(text).ids
    if "<|endoftext|>" not in text:
        assert loaded.decode(ids) == text
        assert "".join(streamed(loaded, ids)) == text


@settings(max_examples=300)
@given(st.lists(st.integers(0, ENCODER.get_vocab_size() - 1)))
def test_any_tokens_decode_as_the_package_decodes_them(loaded: tokenizer.Tokenizer, ids: list[int]) -> None:
    expected = ENCODER.decode(ids, skip_special_tokens=True)
    assert loaded.decode(ids) == expected
    assert "".join(streamed(loaded, ids)) == expected


def letter_ids() -> dict[int, Any]:
    return {byte: ENCODER.token_to_id(letter) for letter, byte in tokenizer._byte_characters().items()}


@given(st.text(min_size=1).map(str.encode))
def test_a_stream_gives_each_character_whole_and_as_soon_as_it_is(loaded: tokenizer.Tokenizer, text: bytes) -> None:
    letters: dict[int, Any] = {
        byte: ENCODER.token_to_id(letter) for letter, byte in tokenizer._byte_characters().items()
    }
    stream, so_far = loaded.stream(), b""
    for byte in text:
        pushed = stream.push(letters[byte])
        so_far += bytes([byte])
        assert "\ufffd" not in pushed or "\ufffd".encode() in so_far
        assert so_far.decode(errors="ignore").endswith(pushed)
    assert stream.flush() == ""


def test_a_character_cut_off_at_the_end_is_shown_as_such(loaded: tokenizer.Tokenizer) -> None:
    letters: dict[int, Any] = {
        byte: ENCODER.token_to_id(letter) for letter, byte in tokenizer._byte_characters().items()
    }
    assert streamed(loaded, [letters[byte] for byte in "é🙂".encode()[:-1]]) == ["", "é", "", "", "", "\ufffd"]


def test_special_tokens_and_unknown_ids_have_no_text(loaded: tokenizer.Tokenizer) -> None:
    end = ENCODER.token_to_id("<|endoftext|>")
    assert loaded.encode("Lima<|endoftext|>")[-1] == end
    assert loaded.decode([end, 10**6]) == ""


def test_two_files_are_the_same_tokenizer_as_one(folder: Path, tmp_path: Path, loaded: tokenizer.Tokenizer) -> None:
    ENCODER.model.save(str(tmp_path))
    parts = tokenizer.load(tmp_path)
    assert parts is not None
    for text in [*TEXT, "  spaces\n\n and\ttabs ", "a<|endoftext|>b"]:
        assert parts.encode(text) == loaded.encode(text)
        assert parts.decode(parts.encode(text)) == loaded.decode(loaded.encode(text))
    assert parts.digest != loaded.digest
    digest = hashlib.sha256()
    for name in ("vocab.json", "merges.txt"):
        content = (tmp_path / name).read_bytes()
        digest.update(len(name).to_bytes(2, "big") + name.encode() + len(content).to_bytes(8, "big") + content)
    assert parts.digest == digest.digest()


def test_a_long_text_has_the_ids_of_its_parts(loaded: tokenizer.Tokenizer) -> None:
    """It goes another way through the package."""
    part = " The capital of Peru<|endoftext|> naïve 東京"
    times = tokenizer.LONG // len(part) + 1
    assert loaded.encode(part * times) == loaded.encode(part) * times


def test_truncation_and_padding_that_a_file_asks_for_are_off(tmp_path: Path, loaded: tokenizer.Tokenizer) -> None:
    encoder = trained()
    encoder.enable_truncation(2)
    encoder.enable_padding(length=9)
    encoder.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer.load(tmp_path)
    assert found is not None
    assert found.encode(TEXT[0]) == loaded.encode(TEXT[0])
    assert found.encode("L") == loaded.encode("L")


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert tokenizer.load(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "merges"), [("[]", ""), ("{", ""), ('{"a": 0}', "a b"), ('{"a": 0}', "a"), ('{"a": "x"}', "")]
)
def test_damaged_parts_are_refused(tmp_path: Path, vocab: str, merges: str) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        tokenizer.load(tmp_path)


def test_a_tokenizer_on_which_the_package_panics_is_refused(tmp_path: Path, folder: Path) -> None:
    """A PanicException is no Exception. The fuzzer found it: the second part of a merge is shorter than the prefix."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "a prefix longer than any token"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer.load(tmp_path)


def test_a_tokenizer_that_fails_only_on_a_text_says_so_without_the_text(tmp_path: Path, folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= {"unk_token": "no such token", "vocab": {"a": 0}, "merges": []}
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tokenizer.load(tmp_path)
    assert loaded is not None
    assert loaded.encode("aa") == [0, 0]
    for text in ("a secret", "a secret" * tokenizer.LONG):
        with pytest.raises(CheckpointError, match="fails on this text") as caught:
            loaded.encode(text)
        assert "secret" not in str(caught.value)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path, folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    for decoder in (None, {"type": "WordPiece", "prefix": "##", "cleanup": True}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"decoder": decoder}))
        with pytest.raises(CheckpointError, match="wanted ByteLevel"):
            tokenizer.load(tmp_path)


# The other files. test_tokenizer_oracle.py compares all that may be in them with transformers.


def parts(folder: Path, **files: Any) -> Path:
    """A folder with vocab.json, merges.txt and more files of JSON, given by their names without the ending."""
    ENCODER.model.save(str(folder))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def encoded(folder: Path, text: str) -> list[int]:
    found = tokenizer.load(folder)
    assert found is not None
    return found.encode(text)


SIZE = ENCODER.get_vocab_size()


def test_added_tokens_are_one_id_each_and_special_ones_have_no_text(tmp_path: Path) -> None:
    found = tokenizer.load(
        parts(tmp_path, added_tokens={"<x>": SIZE, "<y>": SIZE + 1}, special_tokens_map={"pad_token": "<y>"})
    )
    assert found is not None
    ids = found.encode("Lima<x> is<y>")
    assert ids == [*ENCODER.encode("Lima").ids, SIZE, *ENCODER.encode(" is").ids, SIZE + 1]
    assert found.decode(ids) == "Lima<x> is"


def test_bos_comes_first_where_the_settings_say_so(tmp_path: Path) -> None:
    plain = ENCODER.encode("Lima").ids
    assert encoded(parts(tmp_path, tokenizer_config={"add_bos_token": True}), "Lima") == [0, *plain]
    own = {"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False}}
    assert encoded(parts(tmp_path, tokenizer_config=own), "Lima") == [SIZE, *plain]
    assert encoded(parts(tmp_path, tokenizer_config={"add_bos_token": False}), "Lima") == plain


def test_a_prefix_space_is_added_where_the_settings_say_so(tmp_path: Path) -> None:
    assert encoded(parts(tmp_path, tokenizer_config={"add_prefix_space": True}), "Lima") == ENCODER.encode(" Lima").ids


def test_merges_may_have_the_line_ends_of_windows(tmp_path: Path) -> None:
    parts(tmp_path)
    unix = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(unix.replace(b"\n", b"\r\n"))
    assert encoded(tmp_path, TEXT[0]) == ENCODER.encode(TEXT[0]).ids


def test_merges_are_never_dropped_at_random(tmp_path: Path) -> None:
    content = json.loads(ENCODER.to_str())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for more in ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(more))
        assert all(encoded(tmp_path, TEXT[0]) == ENCODER.encode(TEXT[0]).ids for _ in range(5))


def test_the_digest_covers_every_file_that_can_change_ids(tmp_path: Path) -> None:
    digests, expected = [], hashlib.sha256()
    files = ["vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"]
    parts(tmp_path)
    for name in files:
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text("{}")
        content = (tmp_path / name).read_bytes()
        expected.update(len(name).to_bytes(2, "big") + name.encode() + len(content).to_bytes(8, "big") + content)
        found = tokenizer.load(tmp_path)
        assert found is not None
        digests.append(found.digest)
    assert digests[-1] == expected.digest()
    assert len(set(digests)) == 4  # the first two are of the same two files


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer_config", {"split_special_tokens": True}, "split_special_tokens"),
        ("tokenizer_config", {"add_eos_token": True}, "add_eos_token"),
        ("tokenizer_config", {"fast_tokenizer_files": ["tokenizer.4.json"]}, "fast_tokenizer_files"),
        ("tokenizer_config", {"image_token": "<image>"}, "image_token"),
        ("tokenizer_config", {"tokenizer_class": "LlamaTokenizer"}, "LlamaTokenizer"),
        ("tokenizer_config", {"tokenizer_class": "PreTrainedTokenizerFast"}, "needs a tokenizer.json"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "wanted true or false"),
        ("tokenizer_config", {"bos_token": {"content": "<s>"}}, "__type AddedToken"),
        ("tokenizer_config", {"bos_token": 5}, "bos_token is 5"),
        ("tokenizer_config", {"extra_special_tokens": {"x": "<x>"}}, "wanted a list"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "the id 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"400": {"content": "<x>", "lstrip": 1}}}, "'lstrip': 1"),
        ("tokenizer_config", '{"add_bos_token": false, "add_bos_token": true}', "a key appears twice"),
        ("special_tokens_map", {"image_token": "<image>"}, "image_token"),
        ("special_tokens_map", {"bos_token": ["<s>"]}, "a special token is"),
        ("special_tokens_map", "[]", "wanted a JSON object"),
        ("added_tokens", {"<x>": "400"}, "the id '400'"),
        ("added_tokens", {"<x>": -1}, "the id -1"),
        ("added_tokens", "{", "not JSON"),
        ("vocab", '{"a": 0, "a": 1}', "a key appears twice"),
        ("config", {"tokenizer_class": "PreTrainedTokenizerFast"}, "tokenizer_config.json instead"),
    ],
    ids=str,
)
def test_what_might_change_ids_and_is_not_known_is_refused_by_name(
    tmp_path: Path, file: str, content: Any, said: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{file}\.json") as caught:
        tokenizer.load(parts(tmp_path, **{file: content}))
    assert said in str(caught.value)


def test_a_sentencepiece_model_beside_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (parts(tmp_path) / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        tokenizer.load(tmp_path)


REPLACE = {"type": "Replace", "pattern": {"String": "not "}, "content": ""}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("place", "component", "said"),
    [
        ("normalizer", REPLACE, "Replace"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, REPLACE]}, "Replace"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}, "Sequence"),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}, "Strip"),
        ("normalizer", {}, "of no type"),
        ("normalizer", "NFC", "of no type"),
        ("pre_tokenizer", SPLIT, "Split"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT]}, "Split"),
        ("post_processor", {"type": "BertProcessing", "sep": ["a", 0], "cls": ["a", 0]}, "BertProcessing"),
        ("decoder", {"type": "Sequence", "decoders": []}, "Sequence"),
        ("decoder", {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]}, "Sequence"),
        ("decoder", {"type": "Sequence", "decoders": [{"type": "Fuse"}]}, "Fuse"),
    ],
    ids=str,
)
def test_unknown_components_are_refused_by_name(tmp_path: Path, place: str, component: Any, said: str) -> None:
    content = json.loads(ENCODER.to_str()) | {place: component}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for more in ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(more))
        with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {place}.*{said}"):
            tokenizer.load(tmp_path)


def test_a_file_that_cannot_be_read_is_not_the_same_as_none(tmp_path: Path) -> None:
    for name in tokenizer_files.MORE:
        (parts(tmp_path) / name).symlink_to("nowhere")
        with pytest.raises(CheckpointError, match=rf"{name}: not a file"):
            tokenizer.load(tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)  # which would wait for a writer
        with pytest.raises(CheckpointError, match=rf"{name}: not a file"):
            tokenizer.load(tmp_path)
        (tmp_path / name).unlink()
