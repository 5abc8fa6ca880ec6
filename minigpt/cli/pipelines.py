"""The pipeline that the options name: a running one, or local stages."""

import argparse
from collections.abc import Callable
from typing import Any

from attest import MAX_FILE, open_file
from attest.document import CLIENT_KEY, DocumentError, read_private
from minigpt.cli import status as reporting
from minigpt.cli.terminal import progress, say
from minigpt.cli.values import Variable, positive
from minigpt.client.pipeline import Pipeline
from minigpt.errors import UsageError
from minigpt.protocol.manifest import Manifest
from transport.noise import KeyPair


def opened(options: argparse.Namespace, told: Callable[[str], None] = say, **more: Any) -> Pipeline:
    """The pipeline that the options name: a running one, or child processes of our own. Of those that end, and are
    started again, `told` is told."""
    local = [flag for flag in ("stages", "split") if getattr(options, flag) is not None]
    if options.manifest is not None and not (local and isinstance(options.manifest, Variable)):
        if local:
            raise UsageError(f"--{local[0]} is for local stages: the manifest says what its pipeline is")
        warn_idle(options, "the stages of --manifest run already: leave it out", threads=None)
        warn_idle(options, "the manifest pins a commit: leave it out", revision=None)
        pipeline = connect(
            options, options.manifest, places=options.places, model=options.model, retry_for=options.retry_for, **more
        )
        warn_of_idle(options, pipeline.manifest)
        return pipeline
    for flag in ("manifest_sha256", "places", "place", "client_key"):
        if not isinstance(getattr(options, flag) or None, Variable | None):
            raise UsageError(f"--{flag.replace('_', '-')} needs --manifest")
    warn_idle(options, "it is for --manifest, and local stages have no platform to wait for", handshake_timeout=None)
    split, model = split_of(options), options.model or "tiny"
    shape: dict[str, Any] = more | ({"split": split} if isinstance(split, str) else {"stages": split})
    shape |= {
        name: getattr(options, name) for name in ("revision", "threads", "timeout", "connect_timeout", "retry_for")
    }
    with progress(told) as tell:
        return Pipeline.local(model, **shape, progress=tell)


def connect(options: argparse.Namespace, manifest: str | bytes, **more: Any) -> Pipeline:
    key = None if options.client_key is None else read_key(options.client_key)
    same = {
        name: getattr(options, name)
        for name in (
            "manifest_sha256",
            "allow_mock",
            "allow_test_root",
            "timeout",
            "connect_timeout",
            "handshake_timeout",
        )
    }
    return Pipeline.connect(manifest, place=located(options), client_key=key, **same, **more)


def warn_of_idle(options: argparse.Namespace, manifest: Manifest) -> None:
    """Warns of what the manifest makes pointless."""
    if manifest.clients is None:
        warn_idle(options, "the manifest lists no clients, and admits anyone", client_key=None)
    for index, _ in options.place:
        if index > 0:
            say(f"warning: --place {index}=ADDR has no effect: stage {index - 1} goes there, by its own places file")


def located(options: argparse.Namespace) -> dict[int, str]:
    places = dict(options.place)
    if len(places) < len(options.place):
        raise UsageError("--place has a stage twice, wanted each once")
    return places


def split_of(options: argparse.Namespace) -> str | int:
    """How the layers are split: by a flag, else by the environment, else in two."""
    split: str | int | None = options.split or options.stages
    if split is not None:
        return split
    given = options.split_default or options.stages_default
    if isinstance(given, Variable):
        options.from_environment.append(given)
    try:
        return str(given) if options.split_default else positive(given)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"stages: {error}") from None


def read_key(path: str) -> bytes:
    """A client's private key. Raises UsageError, which quotes no name that may be a key itself."""
    try:
        data = read_private(path, MAX_FILE)
    except OSError as error:
        raise UsageError(f"--client-key {path}: {error.strerror}; wanted the file `minigpt keygen` wrote") from None
    except DocumentError as error:
        raise UsageError(f"--client-key: {error}") from None
    try:
        file = open_file(data, CLIENT_KEY, ("private", "public"))
        pair = KeyPair.from_private(file.get("private").bytes(32))
        if pair.public != file.get("public").bytes(32):
            raise DocumentError("its public key does not belong to its private key; it is damaged")
    except DocumentError as error:
        raise UsageError(f"--client-key {path}: {str(error).removeprefix('file: ')}") from None
    return pair.private


def stage_states(pipeline: Pipeline) -> list[dict[str, Any]]:
    manifest, where = pipeline.manifest, pipeline.addresses
    return [reporting.state(manifest, report, where.shown(report.stage)) for report in pipeline.status()]


def warn_idle(options: argparse.Namespace, why: str, **off: object) -> None:
    """Warns of flags that do nothing here; each with its value that asks for nothing. A variable of the environment
    may be meant for other commands."""
    variables = {each.name for each in options.from_environment}
    idle = [
        f"--{name.replace('_', '-')}"
        for name, value in off.items()
        if getattr(options, name) not in (value, None) and f"MINIGPT_{name.upper()}" not in variables
    ]
    if idle:
        say(f"warning: {' and '.join(idle)} ha{'s' if len(idle) == 1 else 've'} no effect: {why}")
