"""The files that make a GPT-2's tokenizer, and the encoder that transformers makes of them.

    tokenizer.json, or else vocab.json and merges.txt                      the vocabulary and its merges
    added_tokens.json, special_tokens_map.json, tokenizer_config.json      if they are there: more tokens, and BOS

Ids must be those that the model was trained with. So `build` does step by step what `AutoTokenizer.from_pretrained` of
transformers 5 does, and refuses by name whatever might change ids and is not known here.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from attest.document import DocumentError, parse_json, read_file
from minigpt.checkpoint.sources import dangling, disguise
from minigpt.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
ADDED, SPECIAL, SETTINGS = "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"
CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"
MORE = (ADDED, SPECIAL, SETTINGS)
_OTHERS = ("tokenizer.model", "tekken.json", "tiktoken.model")
MAX_FILE = 16 * 2**20  # bytes; GPT-2's tokenizer.json has 1.3 MB, and JSON of 16 MiB may become 400 MB of objects

# GPT2Tokenizer takes the vocabulary, the merges, the post-processor and the added tokens of a tokenizer.json, and makes
# the rest itself; it is what a GPT-2 has unless a file says otherwise. The others take all of a tokenizer.json.
_OWN = ("GPT2Tokenizer", "GPT2TokenizerFast")
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")  # one thing; the first is its old name
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SETTINGS = ("tokenizer_class", "added_tokens_decoder", "add_prefix_space", "add_bos_token", *_NAMED, *_LISTS)
# Fields of tokenizer_config.json that change no id, or only when a caller asks for more than ids.
_INERT = (
    "backend", "chat_control_tokens", "chat_template", "clean_up_tokenization_spaces", "errors",
    "full_tokenizer_file", "is_local", "local_files_only", "max_len", "max_length", "merges_file",
    "model_input_names", "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id",
    "padding_side", "processor_class", "response_schema", "response_template", "special_tokens_map_file", "stride",
    "tokenizer_file", "trim_offsets", "truncation_side", "truncation_strategy", "use_fast", "vocab_file",
)  # fmt: skip
# The components that a tokenizer.json may have: none of them can drop text, or take more than linear time.
_COMPONENTS: dict[str, tuple[str | None, ...]] = {
    "normalizer": (None, "NFC", "NFD", "NFKC", "NFKD"),
    "pre_tokenizer": (None, "ByteLevel", "Digits"),
    "post_processor": (None, "ByteLevel", "TemplateProcessing"),
    "decoder": ("ByteLevel",),
}
_PARTS_OF_SEQUENCE = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
    "decoder": "decoders",
}  # fmt: skip
_MODEL = (
    "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges", "vocab", "merges",
)  # fmt: skip


class OtherTokenizer(CheckpointError):
    """A tokenizer of another kind than this package reads, and not a damaged one: token ids still work."""


def read(folder: Path) -> dict[str, bytes]:
    """The contents of a folder's tokenizer files by name, in the order of the digest; none if there is no vocabulary.

    Raises:
        CheckpointError: a file cannot be read, is too large, or is of another kind of tokenizer. The message begins
            with the file's name.
    """
    names = next((names for names in ((WHOLE,), (VOCAB, MERGES)) if all(_there(folder / n) for n in names)), ())
    other = next((name for name in _OTHERS if WHOLE not in names and (folder / name).exists()), None)
    if names and other:
        _other(other, f"not supported, and transformers reads it rather than {VOCAB}")
    more = [name for name in MORE if names and os.path.lexists(folder / name)]  # a dangling link is not nothing
    files = {name: _content(folder / name) for name in (*names, *more)}
    if names and (folder / CONFIG).exists():
        _check_config(_object({CONFIG: _content(folder / CONFIG)}, CONFIG), _object(files, SETTINGS))
    return files


def _there(path: Path) -> bool:
    return path.is_file() or dangling(path) is not None  # which is refused, and not taken for nothing


def _check_config(config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """A config.json may name the tokenizer's class too, but no digest of a tokenizer covers it."""
    kind = config.get("tokenizer_class")
    if settings.get("tokenizer_class") is None and kind not in (None, *_OWN):
        _refuse(CONFIG, f"tokenizer_class is {kind!r:.80}: say so in {SETTINGS} instead")


def chat(folder: Path, files: Mapping[str, bytes]) -> tuple[str, str, str] | None:
    """The checkpoint's chat template and its BOS and EOS tokens, None if it ships none. It changes no id."""
    settings = _object(files, SETTINGS)
    template = settings.get("chat_template")
    if isinstance(template, list):  # of several, by their names
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (folder / TEMPLATE).exists():  # transformers prefers it too
        template = _text({TEMPLATE: _content(folder / TEMPLATE)}, TEMPLATE)
    if template is None:
        return None
    if not isinstance(template, str):
        _refuse(SETTINGS, f"chat_template is of type {type(template).__name__}, wanted a string")
    tokens = [settings.get(name) for name in ("bos_token", "eos_token")]
    bos, eos = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return template, str(bos or ""), str(eos or "")


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():  # opening a named pipe would wait for a writer
            _refuse(path.name, dangling(path) or "not a file")
        content = read_file(path, MAX_FILE)
    except OSError as error:
        _refuse(path.name, error.strerror or "cannot be read")
    if len(content) > MAX_FILE:
        _refuse(path.name, f"more than {MAX_FILE} bytes")
    return content


def build(files: Mapping[str, bytes]) -> "tokenizers.Tokenizer":
    """The encoder of these files.

    Raises:
        CheckpointError: a file is not what it should be, or asks for what is not supported; again with its name.
            The package's own errors pass through.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Encoder

    settings = _settings(files)
    own = settings.get("tokenizer_class") in (None, *_OWN)
    document = _document(files)
    declared, named, extra = _tokens(files, settings, document)
    if own:
        document = _as_gpt2(document, prefix_space=settings.get("add_prefix_space", False))
        for name in ("bos_token", "eos_token", "unk_token"):
            named.setdefault(name, "<|endoftext|>")
    encoder = Encoder.from_str(json.dumps(document))

    # From here on as in TokenizersBackend.__init__: the same calls, in the same order.
    tokens: list[Any] = [token for _, token in sorted(declared.items())]
    texts = {token.content for token in (*encoder.get_added_tokens_decoder().values(), *tokens)}
    more = [*(named[name] for name in _NAMED if named.get(name) is not None), *extra]
    tokens += _once(token for token in more if str(token) not in texts)
    special = {str(token) for token in named.values() if token}
    for i, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[i] = AddedToken(token, special=True)
        elif str(token) in special:
            token.special = True
    encoder.add_tokens(tokens)
    if WHOLE not in files and settings.get("add_bos_token", False) and named.get("bos_token") is not None:
        _begin_with(encoder, str(named["bos_token"]))
    return encoder


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of tokenizer_config.json, each known and of its type; none where there is no such file."""
    settings = _object(files, SETTINGS)
    for name, value in settings.items():
        if name not in (*_SETTINGS, *_INERT) and value is not None and value is not False:
            _other(SETTINGS, f"{name!r:.80} is not supported, and might change token ids: remove it if it does not")
    kind = settings.get("tokenizer_class")
    if kind not in (None, *_OWN, *_GENERIC):
        _other(SETTINGS, f"tokenizer_class is {kind!r:.80}, wanted one of {', '.join((*_OWN, *_GENERIC))}")
    if kind in _GENERIC and WHOLE not in files:
        _refuse(SETTINGS, f"tokenizer_class {kind} needs a {WHOLE}")
    for name in ("add_prefix_space", "add_bos_token"):
        if type(settings.get(name, False)) is not bool:
            _refuse(SETTINGS, f"{name} is {settings[name]!r:.80}, wanted true or false")
    return settings


def _document(files: Mapping[str, bytes]) -> dict[str, Any]:
    """A tokenizer.json as it is, with known components only, or the one that vocab.json and merges.txt amount to."""
    if WHOLE not in files:
        # A merge is a line of two tokens, and a first line may tell the version.
        lines = [line.removesuffix("\r") for line in _text(files, MERGES).split("\n")]
        merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        return {"model": {"vocab": _object(files, VOCAB), "merges": merges}}
    document = _object(files, WHOLE)
    for place in _COMPONENTS:
        _check_component(place, document.get(place))
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        _other(WHOLE, "its model is not a BPE")
    for name, value in model.items():
        affix = name in ("continuing_subword_prefix", "end_of_word_suffix")
        if name not in _MODEL or (affix and value not in (None, "")):
            _other(WHOLE, f"model: {name!r:.80} is not supported")
    added = document.setdefault("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        _refuse(WHOLE, "added_tokens is not a list of objects")
    model["dropout"] = None  # it drops merges at random, to train with
    return document


def _check_component(place: str, component: object) -> None:
    kind = None if component is None else "of no type"
    if isinstance(component, dict) and isinstance(component.get("type"), str):
        kind = component["type"]
    if kind == "Sequence" and place in _PARTS_OF_SEQUENCE:
        assert isinstance(component, dict)
        parts = component.get(_PARTS_OF_SEQUENCE[place])
        if not isinstance(parts, list) or any(not isinstance(part, dict) or part.get("type") == kind for part in parts):
            _refuse(WHOLE, f"{place}: a Sequence without its list of parts, or in another")
        if place == "decoder" and len(parts) != 1:  # a token's bytes are decoded once
            _refuse(WHOLE, f"decoder: a Sequence of {len(parts)} parts, wanted ByteLevel alone")
        for part in parts:
            _check_component(place, part)
    elif kind not in _COMPONENTS[place]:
        known = ", ".join(name or "none" for name in _COMPONENTS[place])
        _other(WHOLE, f"{place} is {kind!s:.80}, wanted {known}")


def _as_gpt2(document: Mapping[str, Any], *, prefix_space: bool) -> dict[str, Any]:
    """What GPT2Tokenizer makes of a tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": True}
    given = document["model"]
    model = {"type": "BPE", "vocab": given.get("vocab"), "merges": given.get("merges")}
    if isinstance(model["vocab"], dict) and given.get("unk_token") not in model["vocab"]:
        model["unk_token"] = given.get("unk_token")  # then the package fails on a text for which it lacks letters
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": document.get("post_processor"),
        "decoder": byte_level,
        "model": model,
    }


def _tokens(
    files: Mapping[str, bytes], settings: Mapping[str, Any], document: Mapping[str, Any]
) -> tuple[dict[int, Any], dict[str, Any], list[Any]]:
    """The added tokens by id, bos_token and its like by name, and more special tokens. Names that are null are kept.

    transformers reads special_tokens_map.json and added_tokens.json only where tokenizer_config.json has no
    added_tokens_decoder. The ids decide nothing but the order: a token that is not in the vocabulary gets the next id.
    """
    named = {name: settings[name] for name in _NAMED if name in settings}
    extra = {name: _listed(SETTINGS, name, settings[name]) for name in _LISTS if name in settings}
    old, new = _LISTS
    if old in extra and not extra.get(new):
        extra[new] = extra.pop(old)
    declared: dict[int, Any] = {}
    by_text: dict[str, Any] = {}

    def declare(token_id: object, fields: object, file: str) -> None:
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            _refuse(file, f"an added token has the id {token_id!r:.80}, wanted an integer from 0 to 2**32 - 1")
        declared[token_id] = _token(file, fields)
        by_text[declared[token_id].content] = declared[token_id]

    if settings.get("added_tokens_decoder") is not None:
        for text, fields in _mapping(SETTINGS, settings["added_tokens_decoder"]).items():
            declare(int(text) if text.isascii() and text.isdecimal() and len(text) < 11 else text, fields, SETTINGS)
    else:
        for name, value in _object(files, SPECIAL).items():
            if name in _NAMED:
                named[name] = _special(value)
            elif name == old:
                extra[old] = _listed(SPECIAL, name, value)
            elif name == new:
                extra[new] = [*extra.get(new, [])]
                extra[new] += [
                    token for token in map(_special, _listed(SPECIAL, name, value)) if token not in extra[new]
                ]
            elif value is not None:
                _refuse(SPECIAL, f"{name!r:.80} is not supported")
        special = {str(token) for token in (*named.values(), *extra.get(new, [])) if token}  # no object of SETTINGS
        for text, token_id in _object(files, ADDED).items():
            flags = {"normalized": text not in special, "special": text in special}
            declare(token_id, {"content": text, **flags}, ADDED)
        for fields in document.get("added_tokens", []):
            declare(fields.get("id"), {name: value for name, value in fields.items() if name != "id"}, WHOLE)
    for name, value in named.items():
        token = _given(name, value)
        named[name] = token and by_text.get(str(token), token)
    return declared, named, [_given(new, token) for token in extra.get(new, extra.get(old, []))]


def _once(tokens: Iterable[Any]) -> list[Any]:
    """Each of the tokens once: equal strings, or AddedTokens with the same text and flags."""
    return list({(type(token), repr(token)): token for token in tokens}.values())


def _special(value: Any) -> Any:
    """A value of special_tokens_map.json, in which an object is a special token."""
    if value is None or (isinstance(value, str) and value):
        return value
    if not isinstance(value, dict):
        _refuse(SPECIAL, f"a special token is {value!r:.80}, wanted a string, an object or null")
    return _token(SPECIAL, {name: flag for name, flag in value.items() if name != "special"}, special=True)


def _given(name: str, value: Any) -> Any:
    """A special token as a string, None or an AddedToken, which in tokenizer_config.json is an object that says so."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _token(SETTINGS, {key: flag for key, flag in value.items() if key != "__type"})
    if value == "" or isinstance(value, bool | int | float | list | dict):
        _refuse(SETTINGS, f"{name} is {value!r:.80}, wanted a string, an object of __type AddedToken, or null")
    return value


def _listed(file: str, name: str, value: object) -> list[Any]:
    if value is not None and (not isinstance(value, list) or None in value):
        _refuse(file, f"{name} is {value!r:.80}, wanted a list of special tokens")
    return value or []


def _token(file: str, fields: object, **more: bool) -> "tokenizers.AddedToken":
    from tokenizers import AddedToken

    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        _refuse(file, f"an added token is {fields!r:.80}, wanted an object with its content")
    for name, value in fields.items():
        if name != "content" and (name not in _FLAGS or type(value) is not bool):
            _refuse(file, f"an added token has {name!r:.40}: {value!r:.40}, wanted {', '.join(_FLAGS)}: true or false")
    return AddedToken(**fields | more)


def _begin_with(encoder: "tokenizers.Tokenizer", bos: str) -> None:
    """Puts the token before every text."""
    from tokenizers import processors

    encoder.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, encoder.token_to_id(bos))]
    )


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        _refuse(name, f"not UTF-8 at byte {error.start}")


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A file's JSON object; an empty one if there is no such file."""
    try:
        return _mapping(name, parse_json(files[name])) if name in files else {}
    except DocumentError as error:
        _refuse(name, disguise(files[name]) or f"not JSON: {error}")


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(name, f"got {type(value).__name__}, wanted a JSON object")
    return value


def _refuse(name: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{name}: {reason}")


def _other(name: str, reason: str) -> NoReturn:
    raise OtherTokenizer(f"{name}: {reason}")
