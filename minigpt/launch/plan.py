"""The plan of a pipeline: a checkpoint, cut into stages, becomes a manifest."""

import datetime
import json
from collections.abc import Callable, Sequence

from attest.providers import Pins
from minigpt.checkpoint import sources, tokenizer, weights
from minigpt.checkpoint.sources import Checkpoint
from minigpt.engine.config import Config
from minigpt.errors import UsageError
from minigpt.protocol.manifest import FORMAT, Manifest, format_time
from minigpt.protocol.messages import SCHEMA


def plan(
    checkpoint: Checkpoint,
    split: str | int,
    *,
    pins: Sequence[Pins],
    suites: Sequence[int] = (2,),
    clients: Sequence[bytes] | None = None,
    operators: Sequence[bytes] | None = (),
    days: float = 30.0,
    progress: Callable[[str], None] = lambda line: None,
) -> bytes:
    """The manifest of a pipeline of this checkpoint. Reads all of its weights, for their digests.

    Args:
        split: the layers of each stage, as "6+6", or a number of stages.
        pins: which evidence is acceptable, of each stage; or one for all.
        suites: of the link protocol, accepted on every link; the first is proposed.
        clients: static keys of the clients admitted; None admits anyone.
        operators: static keys of the clients, admitted too, who are told the load of all; None for every client.
        progress: is told how far the reading has come, in a line for people.

    Raises:
        UsageError: the split does not fit the model, or there are more or fewer pins than stages.
        CheckpointError: the checkpoint is damaged, or not a GPT-2 that this engine runs.
        ManifestError: a suite or a pin is not acceptable.
    """
    config = sources.read_config(checkpoint.folder)
    layers = split_layers(config.n_layer, split)
    if len(pins) not in (1, len(layers)):
        raise UsageError(f"got pins for {len(pins)} stages, wanted {len(layers)}: give them once for each")
    found = tokenizer.load_for_text(checkpoint.folder)
    return write(
        config=config,
        model=checkpoint.name,
        revision=checkpoint.revision,
        tokenizer_sha256=found.digest if found else None,
        layers=layers,
        weights_sha256=[weights.digest(checkpoint.folder, config, part, progress) for part in layers],
        pins=pins,
        suites=suites,
        clients=clients,
        operators=operators,
        days=days,
    )


def write(
    *,
    config: Config,
    model: str,
    revision: str | None,
    tokenizer_sha256: bytes | None,
    layers: Sequence[range],
    weights_sha256: Sequence[bytes],
    pins: Sequence[Pins],
    suites: Sequence[int] = (2,),
    clients: Sequence[bytes] | None = None,
    operators: Sequence[bytes] | None = (),
    days: float = 30.0,
    now: datetime.datetime | None = None,
) -> bytes:
    """The bytes of a manifest, checked by parsing them. Raises ManifestError.

    Args:
        pins: which evidence is acceptable, of each stage; or one for all.
        clients, operators: static keys; None for anyone.
    """
    issued = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    fields = {
        "format": FORMAT,
        "messages": SCHEMA,
        "issued": format_time(issued),
        "expires": format_time(issued + datetime.timedelta(days=days)),
        "model": {
            "id": model,
            "revision": revision,
            "tokenizer_sha256": tokenizer_sha256.hex() if tokenizer_sha256 else None,
            "config": config.to_json(),
        },
        "suites": list(suites),
        "clients": _keys(clients),
        "operators": _keys(operators),
        "stages": [
            {
                "layers": [part.start, part.stop],
                "weights_sha256": digest.hex(),
                "evidence": pin.to_json(),
            }
            for part, digest, pin in zip(
                layers, weights_sha256, pins if len(pins) != 1 else [*pins] * len(layers), strict=True
            )
        ],
    }
    data = (json.dumps(fields, indent=2) + "\n").encode()
    Manifest.parse(data)
    return data


def _keys(keys: Sequence[bytes] | None) -> str | list[str]:
    return "any" if keys is None else sorted(key.hex() for key in keys)


def split_layers(n_layer: int, split: str | int) -> list[range]:
    """Layer ranges for a split such as "6+6", or for a number of stages of about equal size.

    >>> split_layers(12, "4+8")
    [range(0, 4), range(4, 12)]
    >>> split_layers(12, 5)
    [range(0, 3), range(3, 6), range(6, 8), range(8, 10), range(10, 12)]

    Raises:
        UsageError: a part is not a positive number, or they do not add up to n_layer.
    """
    if isinstance(split, int):
        if not 1 <= split <= n_layer:
            raise UsageError(f"{split} stages for {n_layer} layers: wanted from 1 to {n_layer} stages")
        sizes = [n_layer // split + (i < n_layer % split) for i in range(split)]
    else:
        parts = split.split("+")
        if not all(part.isascii() and part.isdecimal() and len(part) < 7 and int(part) for part in parts):
            raise UsageError(f"split is {split!r}, wanted numbers of layers joined by +, such as 6+6")
        sizes = [int(part) for part in parts]
        if sum(sizes) != n_layer:
            raise UsageError(f"split is {split}, {sum(sizes)} layers in all, but the model has {n_layer}")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
