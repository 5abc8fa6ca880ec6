"""GPT-2's config.json: the fields that results depend on, each checked, and the tensors that they imply."""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from minigpt.errors import ConfigError

_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxlevel = 80, 2
_short = _REPR.repr  # shows a value in a message, however long or deep it is

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu")


@dataclass(frozen=True)
class Config:
    """The fields of GPT-2's config.json that its results depend on, with transformers' defaults.

    `reorder_and_upcast_attn` asks for scores in float32, which they always are here.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    eos_token_id: tuple[int, ...] = (50256,)  # none, one or several; ids outside the vocabulary are dropped

    @property
    def head(self) -> str:
        """The name of the tensor (V, C) that scores tokens."""
        return "wte.weight" if self.tie_word_embeddings else "lm_head.weight"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Config":
        """Reads a parsed config.json. ConfigError names the field that is malformed or not supported.

        Fields that transformers' GPT-2 ignores are ignored here too, unless they announce another architecture.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"config: got {type(data).__name__}, wanted a JSON object")
        _refuse_other_models(data)
        given = {name: value for name, value in data.items() if value is not None}
        for alias, name in _ALIASES.items():
            if alias in given:
                value = _checked(name, given[alias], int)
                if _checked(name, given.setdefault(name, value), int) != value:
                    raise ConfigError(f"config: {alias} is {value}, {name} is {given[name]}: they are one field")
        n_ctx = _checked("n_ctx", given.get("n_ctx", cls.n_positions), int)
        given.setdefault("n_positions", n_ctx)  # n_ctx is the old name; transformers uses n_positions
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in given and field.name != "eos_token_id":
                values[field.name] = _checked(field.name, given[field.name], type(field.default))
        values.setdefault("n_inner", 4 * values.get("n_embd", cls.n_embd))
        ends = _token_ids(data.get("eos_token_id", cls.eos_token_id))
        values["eos_token_id"] = tuple(token for token in ends if token < values.get("vocab_size", cls.vocab_size))
        config = cls(**values)
        if config.n_embd % config.n_head:
            raise ConfigError(f"config: n_embd {config.n_embd} does not divide into n_head {config.n_head} heads")
        return config

    def to_json(self) -> dict[str, Any]:
        """A dict for `from_json`, holding every field."""
        return {"model_type": "gpt2", **asdict(self), "eos_token_id": list(self.eos_token_id)}

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.n_embd // self.n_head


_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# How words in the names of fields begin by which variants of GPT-2 say that they compute something else.
_FOREIGN = re.compile(
    r"(?<![a-z])(?:auto_map|cross_attention|encoder_decoder|pruned_heads|quantization|rope|rotary|alibi|expert|moe|multi_?query"
    r"|attention_head_type|key_value_heads|kv_head|sliding|parallel_residual|adapter|softcap|position_embedding_type)"
)
_LARGEST = 2**24  # of any count in a config: a hundred times GPT-2 XL's, and far from overflowing an index
_LARGEST_DEPTH = 1024  # of n_layer: twenty times GPT-2 XL's; each layer is a dozen names, before there is any tensor
_ABSENT: tuple[object, ...] = (None, False, "absolute", 0)


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    """Raises ConfigError if the config describes anything but a plain GPT-2."""
    got = data.get("model_type")
    unnamed = got is None and "n_embd" in data  # as in the first checkpoints
    if got != "gpt2" and not unnamed:
        raise ConfigError(f"config: model_type is {_short(got)}, wanted 'gpt2', the only one this engine computes")
    architectures = data.get("architectures") or []
    known = ("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel")
    if not isinstance(architectures, list) or any(name not in known for name in architectures):
        raise ConfigError(f"config: architectures is {_short(architectures)}, wanted one of {', '.join(known)}")
    for name, value in data.items():
        if _FOREIGN.search(str(name)) and not _absent(value):
            field = f"{_short(name)} is {_short(value)}"
            raise ConfigError(f"config: {field}, which this engine does not support: wanted it absent")


def _absent(value: object) -> bool:
    """Whether a field's value says that there is no such thing, as a block of empty blocks does."""
    if isinstance(value, dict):
        return all(map(_absent, value.values()))
    return value in _ABSENT or value == []


def _checked(name: str, value: object, wanted: type) -> object:
    """One field's value, checked for type and range."""
    if wanted is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
            return float(value)
        raise ConfigError(f"config: {name} is {_short(value)}, wanted a number between 0 and 1")
    if type(value) is not wanted:
        raise ConfigError(f"config: {name} is {_short(value)}, wanted {wanted.__name__}")
    largest = _LARGEST_DEPTH if name == "n_layer" else _LARGEST
    if isinstance(value, int) and wanted is int and not 1 <= value <= largest:
        raise ConfigError(f"config: {name} is {_short(value)}, wanted 1 to {largest}")
    if name == "activation_function" and value not in ACTIVATIONS:
        raise ConfigError(f"config: {name} is {_short(value)}, wanted one of {', '.join(ACTIVATIONS)}")
    return value


def _token_ids(value: object) -> tuple[int, ...]:
    """eos_token_id may be one id, several, or none."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(type(token) is int and 0 <= token <= _LARGEST for token in ids):
        raise ConfigError(f"config: eos_token_id is {_short(value)}, wanted a token id, a list of them, or null")
    return ids


def tensor_shapes(config: Config, layers: range) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a stage with these layers needs, by the checkpoint's names without prefix.

    The tied embedding is needed at both ends: to embed before the first layer, to score after the last. Raises
    ValueError unless `layers` is a contiguous, non-empty range within the model.
    """
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= config.n_layer:
        raise ValueError(f"layers {layers.start}..{layers.stop}: wanted a range within 0..{config.n_layer}")
    c, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {}
    if layers.start == 0:
        shapes |= {"wte.weight": (config.vocab_size, c), "wpe.weight": (config.n_positions, c)}
    for i in layers:
        shapes |= {
            f"h.{i}.ln_1.weight": (c,),
            f"h.{i}.ln_1.bias": (c,),
            f"h.{i}.attn.c_attn.weight": (c, 3 * c),
            f"h.{i}.attn.c_attn.bias": (3 * c,),
            f"h.{i}.attn.c_proj.weight": (c, c),
            f"h.{i}.attn.c_proj.bias": (c,),
            f"h.{i}.ln_2.weight": (c,),
            f"h.{i}.ln_2.bias": (c,),
            f"h.{i}.mlp.c_fc.weight": (c, inner),
            f"h.{i}.mlp.c_fc.bias": (inner,),
            f"h.{i}.mlp.c_proj.weight": (inner, c),
            f"h.{i}.mlp.c_proj.bias": (c,),
        }
    if layers.stop == config.n_layer:
        shapes |= {"ln_f.weight": (c,), "ln_f.bias": (c,), config.head: (config.vocab_size, c)}
    return shapes
