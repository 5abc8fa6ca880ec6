"""Where checkpoints come from: a folder, the embedded one, or the Hugging Face hub.

The hub client is imported only when needed. It honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, and shows a
progress bar on a terminal.
"""

import importlib.resources
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attest.document import DocumentError, parse_json, read_file
from minigpt.engine.config import Config
from minigpt.errors import CheckpointError, ConfigError

TINY = "tiny"  # the embedded checkpoint's name
CONFIG, GENERATION = "config.json", "generation_config.json"
MAX_CONFIG = 2**20  # bytes; GPT-2's is 665

TOKENIZER_FILES = [  # what a client needs
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
# What a pipeline needs from a repository; the rest (pickles, other frameworks' weights, pictures) is not fetched.
FILES = [
    CONFIG,
    GENERATION,
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    *TOKENIZER_FILES,
]
_HUB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    folder: Path  # has config.json, the weights, and perhaps a tokenizer
    name: str  # the folder's own name, "tiny", or the hub id
    revision: str | None = None  # the hub's commit; None where it did not come from the hub


def find(
    model: str | Path, revision: str | None = None, *, files: list[str] = FILES, download: bool = True
) -> Checkpoint:
    """The checkpoint that `model` names: a folder, else "tiny", else a hub id, which is downloaded if necessary.

    Args:
        model: a pathlib.Path is never a hub id.
        revision: of a hub id: a branch, a tag or a commit; the main branch by default.
        files: patterns of the files to fetch from a hub's repository.
        download: False to use only what was downloaded before, without asking the hub.

    Raises:
        CheckpointError: it does not exist, or the hub cannot be reached, or refuses; the message says which.
    """
    if os.path.isdir(model) or model == TINY:
        if revision is not None:
            raise CheckpointError(f"revision {revision}: {str(model)!r} is not on the hub, and has no revisions")
        folder = local(model)
        return Checkpoint(folder, TINY if folder == _embedded() else folder.name)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"model {str(model)!r}: no such folder, and not a hub id such as openai-community/gpt2")
    return _download(model, revision, files, download)


def local(model: str | Path) -> Path:
    """The folder of a checkpoint that is on this machine: a folder, or "tiny". Never asks the hub.

    Raises:
        CheckpointError: it is neither.
    """
    if os.path.isdir(model):
        return Path(model).resolve()
    if model != TINY:
        raise CheckpointError(f"model {str(model)!r}: there is no such folder")
    folder = _embedded()
    if folder is None or not (folder / "config.json").is_file():
        raise CheckpointError("the embedded checkpoint is missing: reinstall the package, unzipped")
    return folder


def _embedded() -> Path | None:
    folder = importlib.resources.files("minigpt") / "data"
    return folder if isinstance(folder, Path) else None


def read_config(folder: Path) -> Config:
    """The folder's config.json, with the stop ids of its generation_config.json if there is one.

    As in transformers, the latter then decides alone which ids end a generation: without `eos_token_id`, none does.

    Raises:
        ConfigError: config.json is missing, malformed, or asks for what is not supported, or the other is malformed.
    """
    config = _read(folder / CONFIG, Config.from_json)
    if not os.path.lexists(folder / GENERATION):
        return config
    fields = config.to_json()
    return _read(
        folder / GENERATION, lambda data: Config.from_json(fields | {"eos_token_id": data.get("eos_token_id")})
    )


def _read(path: Path, parse: Callable[[dict[str, Any]], Config]) -> Config:
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for a writer
            raise ConfigError("not a file")
        text = read_file(path, MAX_CONFIG)
        if len(text) > MAX_CONFIG:
            raise ConfigError(f"more than {MAX_CONFIG} bytes")
        data = parse_json(text)
        if not isinstance(data, dict):
            raise ConfigError(f"got {type(data).__name__}, wanted a JSON object")
        return parse(data)
    except OSError as error:
        reason = f"{error.strerror}" + (f": a checkpoint's folder has a {CONFIG}" if path.name == CONFIG else "")
    except DocumentError as error:
        reason = f"not JSON: {error}"
    except ConfigError as error:
        reason = str(error)
    raise ConfigError(f"{path}: {reason}")


def _download(model: str, revision: str | None, files: list[str], download: bool) -> Checkpoint:
    """Fetches what is not in the hub's cache yet. Without a network, the cache must have it."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    wanted = f"model {model!r}" + (f" at revision {revision!r}" if revision is not None else "")
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=files, local_files_only=not download))
    except hub.GatedRepoError:
        reason = "the hub wants you to accept its terms first, and HF_TOKEN set"
    except hub.RepositoryNotFoundError:
        reason = "there is no such folder here, and no such model on the hub (or it is private: set HF_TOKEN)"
    except hub.RevisionNotFoundError:
        reason = "the hub has the model, but not this revision"
    except hub.LocalEntryNotFoundError:
        reason = "there is no such folder here, it was not downloaded before, and the hub cannot be reached"
    except hub.HFValidationError as error:
        reason = f"not a hub id: {error}"
    except (OSError, ValueError) as error:  # the hub, the network or the disk; their root is OSError
        reason = f"cannot be downloaded: {type(error).__name__}: {error}"
    else:
        return Checkpoint(folder, model, folder.name)  # the cache names a snapshot by its commit
    raise CheckpointError(f"{wanted}: {reason}")
