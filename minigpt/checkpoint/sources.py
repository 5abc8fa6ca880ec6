"""Where checkpoints come from: a folder, the embedded one, or the Hugging Face hub.

The hub client is imported only when needed. It honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, and shows a
progress bar on a terminal.
"""

import importlib.resources
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attest.document import DocumentError, parse_json, read_file
from minigpt.engine.config import Config
from minigpt.errors import CheckpointError, ConfigError

log = logging.getLogger("minigpt")

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
# What the first bytes of a file tell that is not what its name says.
_DISGUISES = {
    b"version https://git-lfs": "a pointer of git-lfs, not the file: run `git lfs pull` in its repository",
    b"<": "a page of HTML or XML, as a download that failed leaves: fetch the file again",
    b"PK\x03\x04": "an archive, perhaps a pickle of torch's, which can run code: convert it with save_pretrained",
    b"\x80": "a pickle, which can run code: convert it with transformers' save_pretrained",
    b"\x89HDF": "HDF5, as TensorFlow writes: convert it with transformers' save_pretrained",
    b"GGUF": "GGUF: get the checkpoint as transformers has it",
    b"\x1f\x8b": "compressed: unpack it",
}
# Models that a folder of the same name would be taken for.
_WELL_KNOWN = re.compile(r"tiny|((openai-community/)?gpt2(-medium|-large|-xl)?)")
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
        if os.path.isdir(model) and isinstance(model, str) and _WELL_KNOWN.fullmatch(model):
            log.warning("model %s is the folder %s here, not the model of that name: ./%s says so", model,
                        os.path.abspath(model), model)  # fmt: skip
        if revision is not None:
            raise CheckpointError(f"revision {revision}: {str(model)!r} is not on the hub, and has no revisions")
        folder = local(model)
        return Checkpoint(folder, TINY if folder == _embedded() else folder.name)
    if os.path.isfile(model):
        raise CheckpointError(_a_file(model))
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
    if os.path.isfile(model):
        raise CheckpointError(_a_file(model))
    if model != TINY:
        hub = isinstance(model, str) and _HUB_ID.fullmatch(model)
        hint = f". A stage downloads nothing: `hf download {model}` prints a folder to name with --model" if hub else ""
        raise CheckpointError(f"model {str(model)!r}: there is no such folder{hint}")
    folder = _embedded()
    if folder is None or not (folder / "config.json").is_file():
        raise CheckpointError("the embedded checkpoint is missing: reinstall the package, unzipped")
    return folder


def _a_file(model: str | Path) -> str:
    return f"model {str(model)!r} is a file, wanted the folder that it is in, with {CONFIG} beside it"


def disguise(data: bytes) -> str | None:
    """What a file that cannot be read really is, by its first bytes, and what to do; None if they do not tell."""
    if not data:
        return "the file is empty: fetch it again"
    words = (f"this is {words}" for start, words in _DISGUISES.items() if data.lstrip().startswith(start))
    return next(words, None)


def unreadable(error: Exception) -> str | None:
    """What to say of a file of a checkpoint that this user may not read; None if that is not what happened."""
    if not isinstance(error, PermissionError):
        return None
    return "this user may not read it: let them (chmod a+rX, for its folders too), or run as another"


def dangling(path: Path) -> str | None:
    """What to say of a link to nothing, as is left where the hub's cache was pruned; None if it is none."""
    if not path.is_symlink() or path.exists():
        return None
    return f"not a file, but a link to {os.readlink(path)}, where nothing is: it was moved or removed; fetch it again"


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
        hint = ""
        if isinstance(error, FileNotFoundError) and path.name == CONFIG:
            hint = f": a checkpoint's folder has a {CONFIG}"
        reason = dangling(path) or unreadable(error) or f"{error.strerror}{hint}"
    except DocumentError as error:
        reason = disguise(text) or f"not JSON: {error}"
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
    except hub.LocalEntryNotFoundError as error:
        reason = (
            f"there is no such folder here, it was not downloaded before, and {_why_not(error.__cause__, download)}"
        )
    except hub.HFValidationError as error:
        reason = f"not a hub id: {error}"
    except (OSError, ValueError) as error:  # the hub, the network or the disk; their root is OSError
        reason = f"cannot be downloaded: {type(error).__name__}: {error}"
    else:
        return Checkpoint(folder, model, folder.name)  # the cache names a snapshot by its commit
    raise CheckpointError(f"{wanted}: {reason}")


def _why_not(cause: BaseException | None, download: bool) -> str:
    """Why the hub was of no use, by the error that its client met."""
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status == 429:
        return "the hub refuses so many requests (HTTP 429): try again later, or set HF_TOKEN"
    if status is not None:
        return f"the hub fails (HTTP {status}): try again later"
    if type(cause).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE forbids to ask the hub: unset it"
    if not download:
        return "the hub was not asked"
    return "the hub cannot be reached: look at the network, or give the folder of a checkpoint that is here"
