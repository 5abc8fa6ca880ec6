"""What `minigpt plan` does: a manifest, and its places beside it."""

import argparse
import hashlib
import os
import time
from collections.abc import Sequence

from attest.document import (
    show,
    write_file,
)
from minigpt.checkpoint import sources
from minigpt.cli import pins, pipelines
from minigpt.cli.terminal import progress, say
from minigpt.errors import UsageError
from minigpt.launch import plan as planning
from minigpt.protocol import addresses, manifest
from transport.address import Address


def plan(options: argparse.Namespace) -> int:
    """`minigpt plan`: writes a manifest and its places, and prints the manifest's digest."""
    _check_addresses([Address.parse(text) for text in options.address])
    pinned = pins.read(options)
    check_output(options.output)  # before the weights are read
    checkpoint, split = sources.find(options.model or "tiny", options.revision), pipelines.split_of(options)
    layers = planning.split_layers(sources.read_config(checkpoint.folder).n_layer, split)
    served = options.address or [f"tcp://127.0.0.1:{5001 + index}" for index in range(len(layers))]
    places = addresses.write(served, len(layers))
    with progress() as tell:
        data = planning.plan(
            checkpoint,
            split,
            pins=pinned,
            suites=options.suite or [2],
            clients=[pins.public("--client", text) for text in options.client] or None,
            operators=[pins.public("--operator", text) for text in options.operator],
            days=options.days,
            progress=tell,
        )
    if not os.path.exists(options.output) or os.path.isfile(options.output):  # there is no beside /dev/stdout
        write_file(addresses.beside(options.output), places)
    write_file(options.output, data)  # last: whoever waits for it can use both
    show(hashlib.sha256(data).hexdigest() + "\n")
    for warning in manifest.Manifest.parse(data).warnings(time.time()):
        say(f"warning: {warning}")
    for index, (part, address) in enumerate(zip(layers, served, strict=True)):
        say(f"stage {index}  layers {part.start}-{part.stop - 1}  {address}")
    say(f"wrote {options.output}; its sha256 is what a client can pin with --manifest-sha256")
    return 0


def _check_addresses(given: Sequence[Address]) -> None:
    """Refuses what nobody can connect to, and one address for two stages. Raises UsageError."""
    for index, address in enumerate(given):
        if address.scheme == "tcp" and not address.host.strip("0.:"):
            raise UsageError(
                f"--address {address}: wanted the address at which stage {index} is reached; where it listens is its "
                "own --listen"
            )
        if address.scheme == "tcp" and address in given[:index]:  # two enclaves behind two hosts may have the same
            raise UsageError(
                f"--address {address}: given for stages {given.index(address)} and {index}, wanted one for each"
            )


def check_output(output: str) -> None:
    """Refuses to write a manifest over a file, and where none can be. Raises UsageError."""
    if os.path.isdir(output):
        raise UsageError(f"--output {output}: is a folder, wanted a new file, as in {os.path.join(output, 'x.json')}")
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise UsageError(f"--output {output}: there is no such folder: make it first")
    if os.path.isfile(output):
        raise UsageError(
            f"--output {output}: exists, and a pipeline may run by it: choose another name, or remove it first"
        )
