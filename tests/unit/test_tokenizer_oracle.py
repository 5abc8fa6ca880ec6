"""Token ids and text against an independent oracle: transformers' AutoTokenizer, over folders made of its files."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from minigpt.checkpoint import tokenizer
from minigpt.errors import CheckpointError
from unit.test_tokenizer import ENCODER, TEXT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="the oracle needs transformers: pip install the extra `reference`"
)

SIZE = ENCODER.get_vocab_size()
TOKENS = ["<|endoftext|>", "<pad>", "<x>", "[SEP]", "é★", "Lima", "capital of", "<|im start|>", "the", " France",
          "Ġthe", "<s>"]  # fmt: skip
CLASSES = ["GPT2Tokenizer", "GPT2TokenizerFast"]
GENERIC = ["PreTrainedTokenizerFast", "TokenizersBackend"]
NAMES = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"]
BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}


class Maker:
    """Writes a folder whose files and fields are drawn."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.put("config.json", {"model_type": "gpt2"})
        whole = self.often(0.5)
        if whole:
            self.put("tokenizer.json", self.document())
        if not whole or self.often(0.3):
            self.parts()
        if self.often(0.7):
            self.put("tokenizer_config.json", self.settings(CLASSES + GENERIC * whole))
        if self.often(0.5):
            self.put("special_tokens_map.json", self.special())
        if self.often(0.5):
            self.put("added_tokens.json", {token: place for place, token in self.placed()})

    def put(self, name: str, value: object) -> None:
        (self.folder / name).write_text(json.dumps(value))

    def often(self, part: float) -> bool:
        return self.draw.random() < part

    def flags(self) -> dict[str, bool]:
        return {name: self.often(0.4) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}

    def placed(self) -> list[tuple[int, str]]:
        some = self.draw.sample(TOKENS, self.draw.randint(0, 4))
        return [
            (SIZE + i if self.often(0.8) else self.draw.randint(0, SIZE + 9), token) for i, token in enumerate(some)
        ]

    def token(self, **more: str) -> Any:
        token = self.draw.choice(TOKENS)
        return token if self.often(0.5) else {"content": token, **self.flags(), **more}

    def several(self) -> list[Any]:
        return [self.token(__type="AddedToken") for _ in range(self.draw.randint(0, 3))]

    def document(self) -> dict[str, Any]:
        document = json.loads(ENCODER.to_str())
        if self.often(0.3):
            document["added_tokens"] = []
        for token in self.draw.sample(TOKENS[1:], self.draw.randint(0, 3)):
            following = max([SIZE - 1, *(added["id"] for added in document["added_tokens"])]) + 1
            place = document["model"]["vocab"].get(token, following)
            document["added_tokens"].append({"id": place, "content": token, **self.flags()})
        if self.often(0.3):
            document["normalizer"] = {"type": self.draw.choice(["NFC", "NFKC"])}
        document["pre_tokenizer"]["add_prefix_space"] = self.often(0.3)
        if self.often(0.2):
            digits = {"type": "Digits", "individual_digits": True}
            document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
        if self.often(0.2):
            document["decoder"] = {"type": "Sequence", "decoders": [document["decoder"]]}
        document["model"]["ignore_merges"] = self.often(0.2)
        document["post_processor"] = self.draw.choice([None, document["post_processor"], BOS_FIRST])
        return document

    def parts(self) -> None:
        ENCODER.model.save(str(self.folder))
        vocab, merges = self.folder / "vocab.json", self.folder / "merges.txt"
        if self.often(0.3):
            self.put("vocab.json", {token: i for token, i in json.loads(vocab.read_text()).items() if i})
        if self.often(0.4):
            merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))

    def settings(self, classes: list[str]) -> dict[str, Any]:
        settings: dict[str, Any] = {"model_max_length": 1024, "clean_up_tokenization_spaces": self.often(0.5)}
        if self.often(0.5):
            settings["tokenizer_class"] = self.draw.choice(classes)
        settings |= {name: self.often(0.7) for name in ("add_prefix_space", "add_bos_token") if self.often(0.5)}
        for name in NAMES:
            if self.often(0.3):
                settings[name] = None if self.often(0.15) else self.token(__type="AddedToken")
        if self.often(0.3):
            settings["added_tokens_decoder"] = {
                str(place): {"content": token, **self.flags()} for place, token in self.placed()
            }
        return settings | {
            name: self.several() for name in ("additional_special_tokens", "extra_special_tokens") if self.often(0.25)
        }

    def special(self) -> dict[str, Any]:
        special = {name: self.token() for name in NAMES if self.often(0.4)}
        if self.often(0.3):
            special["additional_special_tokens"] = [self.draw.choice(TOKENS) for _ in range(self.draw.randint(0, 3))]
        if self.often(0.2):
            special["extra_special_tokens"] = [self.draw.choice(TOKENS) for _ in range(self.draw.randint(0, 3))]
        return special

    def texts(self) -> list[str]:
        pieces = [*TOKENS, " ", "  ", "\n", "\t", "é", "🙂", "a", "The capital of France", " Paris", "x"]
        drawn = ["".join(self.draw.choices(pieces, k=self.draw.randint(1, 12))) for _ in range(8)]
        fixed = ["", " ", "Lima", *TEXT[1:], "e\u0301 ﬁ 12345 don't", "a <|endoftext|> b", "  <x>  <pad>\n[SEP] the"]
        return fixed + drawn


@pytest.mark.parametrize("block", range(10))
def test_ids_and_text_are_those_of_transformers_whatever_files_a_folder_has(tmp_path: Path, block: int) -> None:
    loaded = 0
    for seed in range(20 * block, 20 * block + 20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = Maker(folder, seed)
        try:
            oracle = transformers.AutoTokenizer.from_pretrained(folder)
        except Exception:  # then it is for nobody
            with pytest.raises(CheckpointError):
                tokenizer.load(folder)
            continue
        ours = tokenizer.load(folder)
        assert ours is not None
        for text in made.texts():
            ids = oracle(text)["input_ids"]
            assert ours.encode(text) == ids, f"seed {seed}: {text!r}"
            ids += [made.draw.randint(0, len(oracle) + 2) for _ in range(10)]
            wanted = oracle.decode(ids, skip_special_tokens=True)
            stream = ours.stream()
            assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids) == wanted, (
                f"seed {seed}: {ids}"
            )
        loaded += 1
    assert loaded > 15


@pytest.mark.parametrize("generic", [False, True])
def test_what_transformers_saves_is_loaded(tmp_path: Path, generic: bool) -> None:
    if generic:
        saved = transformers.PreTrainedTokenizerFast(tokenizer_object=ENCODER, bos_token="<|endoftext|>")
    else:
        ENCODER.model.save(str(tmp_path))
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, add_prefix_space=True)
    saved.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]})
    saved.add_tokens(["zz"])
    saved.chat_template = "{{ messages }}"
    saved.save_pretrained(tmp_path / "saved")
    ours, text = tokenizer.load(tmp_path / "saved"), "Lima <pad> <a>zz <b> <|endoftext|> x"
    assert ours is not None
    assert ours.encode(text) == saved(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == saved.decode(ours.encode(text), skip_special_tokens=True)
