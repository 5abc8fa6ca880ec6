"""Where the stages of a pipeline are: its places file, beside its manifest, with the address of each stage.

The manifest pins, and the places locate. Nobody needs to trust them: the handshake binds the manifest and both ends'
numbers, so at a wrong place it fails. They may change while a pipeline runs, so the file is read again for each link.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from attest import document
from attest.document import DocumentError
from minigpt.errors import UsageError
from transport.address import MAX_TEXT, Address
from transport.errors import AddressError

MAX_PLACES = 2**17  # bytes; the longest addresses of 256 stages are 80 KB


class Addresses:
    """Where each stage is, as far as this end knows.

    Args:
        count: how many stages the manifest has.
        source: the places file; None if there is none.
        over: addresses of single stages, which go before those of the file.

    Raises:
        UsageError: `over` names a stage that is not there, or something that is not an address.
    """

    def __init__(self, count: int, source: str | Path | None, over: Mapping[int, str] | None = None) -> None:
        self._count = count
        self._source = source
        self._over = {index: _address(f"place {index}", text) for index, text in (over or {}).items()}
        for index in self._over:
            if not 0 <= index < count:
                raise UsageError(f"place {index}: got stage {index}, wanted one of the manifest's, 0 to {count - 1}")

    def of(self, index: int) -> Address:
        """The address of stage `index`. Raises UsageError if it is not known, or the file is not acceptable."""
        if index in self._over:
            return self._over[index]
        if self._source is None:
            raise UsageError(f"the place of stage {index} is not known: give the places file with --places (places=)")
        try:
            data = document.read_file(self._source, MAX_PLACES)
        except OSError as error:
            raise UsageError(
                f"places {self._source}: {error.strerror}; wanted the file that `minigpt plan` wrote beside the "
                "manifest: name it with --places (places=)"
            ) from None
        except ValueError:  # of a name with a zero in it
            raise UsageError(f"places {str(self._source)!r:.120}: not a file's name") from None
        return _read(f"places {self._source}", data, self._count)[index]

    def shown(self, index: int) -> str | None:
        """For people: the address of stage `index`; None if it is not known."""
        try:
            return str(self.of(index))
        except UsageError:
            return None


def beside(manifest: str | Path) -> str:
    """The places file of a manifest's file.

    >>> beside("pipeline.json")
    'pipeline.places.json'
    """
    return str(manifest).removesuffix(".json") + ".places.json"


def read(data: bytes, count: int) -> list[str]:
    """The addresses in a places file of so many stages. Raises UsageError, with the place and the reason."""
    return [str(address) for address in _read("places", data, count)]


def write(addresses: Sequence[str], count: int) -> bytes:
    """The bytes of a places file. Raises UsageError if an address is none, or there is not one for each stage."""
    if len(addresses) != count:
        raise UsageError(
            f"got {len(addresses)} address{'es' if len(addresses) > 1 else ''} for {count} "
            f"stage{'s' if count > 1 else ''}: give --address once for each"
        )
    data = (json.dumps({str(index): address for index, address in enumerate(addresses)}, indent=2) + "\n").encode()
    read(data, count)
    return data


def _read(name: str, data: bytes, count: int) -> list[Address]:
    try:
        document.check_kind(name, data, document.PLACES, "the file that `minigpt plan` wrote beside the manifest")
        top = document.load(name, data, MAX_PLACES)
        if type(top.value) is not dict:
            top.refuse("an object with the address of each stage by its number")
        wanted = [str(index) for index in range(count)]
        for key in top.value:
            if key not in wanted:
                raise UsageError(f"{name}: got stage {key[:60]!r}, wanted the manifest's stages, 0 to {count - 1}")
        for key in wanted:
            if key not in top.value:
                raise UsageError(
                    f"{name}: the address of stage {key} is missing, wanted one for each stage, 0 to {count - 1}"
                )
        return [_address(f"{name}: stage {key}", top.get(key).text(MAX_TEXT)) for key in wanted]
    except DocumentError as error:
        raise UsageError(str(error)) from None


def _address(name: str, text: str) -> Address:
    try:
        address = Address.parse(text)
    except AddressError as error:
        raise UsageError(f"{name}: {error}") from None
    if address.port == 0:
        raise UsageError(f"{name}: address {text!r}: got port 0, wanted the one where the stage serves")
    return address
