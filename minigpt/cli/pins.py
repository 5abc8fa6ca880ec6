"""What `minigpt plan` pins of each stage: an image, by a file of its flag, or the mock."""

import argparse

from attest.document import DocumentError, check_kind, load, public_key, read_file
from attest.measure import measure
from attest.providers import Pins, Rooted
from attest.providers.mock import MockPins
from attest.providers.nitro import CODE, REGISTERS, NitroPins
from attest.providers.snp import SnpPins
from attest.providers.tdx import TdxPins
from minigpt.cli.terminal import say
from minigpt.errors import UsageError

MAX_DESCRIPTION = 2**20  # bytes of an image's description; ours are 1 KB
_FLAGS = "--pcrs, --snp or --tdx"


def read(options: argparse.Namespace) -> list[Pins]:
    """The pins of `minigpt plan`: for each stage an image, or the mock; or the mock for all of them."""
    images: list[tuple[str, str]] = options.images
    if options.test_root is not None and all(path == "mock" for _, path in images):
        raise UsageError("--test-root is for images: the mock's root is its --root-key")
    if images and not any(path == "mock" for _, path in images):
        if options.root_key is not None or options.measurement:
            raise UsageError(f"{_FLAGS} pins images, not the mock: leave out --root-key and --measurement")
        return [_image(options, flag, path) for flag, path in images]
    if options.root_key is None:
        raise UsageError(
            "--root-key is missing: give the public key that `python -m attest keygen -o root.key` prints; or, for "
            f"images, {_FLAGS} once for each stage"
        )
    measurements = [_hex("--measurement", text, 48) for text in options.measurement] or [measure()]
    mock = MockPins(public("--root-key", options.root_key), frozenset(measurements))
    return [mock if path == "mock" else _image(options, flag, path) for flag, path in images or [("", "mock")]]


def _image(options: argparse.Namespace, flag: str, path: str) -> Pins:
    """The pins of one image, under the vendor's root unless another is named."""
    pins = _nitro(path) if flag == "--pcrs" else _guest(flag, path)
    return pins if options.test_root is None else Rooted(pins, _hex("--test-root", options.test_root, 32))


def _guest(flag: str, path: str) -> Pins:
    try:
        data = read_file(path, MAX_DESCRIPTION)
        check_kind(path, data, "pins", "as `python -m attest show --pins` prints them")
        place = load(path, data, MAX_DESCRIPTION)  # a manifest's `evidence`, by itself
        if flag == "--snp":
            return SnpPins.read(place)
        pins = TdxPins.read(place)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    except DocumentError as error:
        raise UsageError(f"{flag} {error}") from None
    for warning in pins.warnings:
        say(f"warning: {flag} {path}: {warning}")
    return pins


def _nitro(path: str) -> NitroPins:
    """All registers that an image's description has: PCR0, PCR1 and PCR2, and if it is signed, PCR8."""
    try:
        data = read_file(path, MAX_DESCRIPTION)
        check_kind(path, data, "an image's description", "as scripts/image/build.py or nitro-cli prints it")
        found = load(path, data, MAX_DESCRIPTION).value["Measurements"]
        texts = {index: found[f"PCR{index}"] for index in range(REGISTERS) if index in CODE or f"PCR{index}" in found}
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError
    except OSError as error:
        raise UsageError(f"--pcrs {path}: {error.strerror}") from None
    except DocumentError as error:
        raise UsageError(f"--pcrs {error}") from None
    except (KeyError, TypeError):
        raise UsageError(f"--pcrs {path}: wanted JSON with Measurements and PCR0, PCR1, PCR2 in it") from None
    return NitroPins({index: _hex(f"--pcrs {path}", text, 48) for index, text in texts.items()})


def public(flag: str, text: str) -> bytes:
    try:
        return public_key(text)
    except DocumentError as error:
        raise UsageError(f"{flag}: {error}") from None


def _hex(flag: str, text: str, length: int) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != length:
        origin = ", as `python -m attest measure` prints them" if flag == "--measurement" else ""
        raise UsageError(f"{flag}: got {text[:120]!r}, wanted {2 * length} hex digits{origin}")
    return value
