"""Files and JSON from outside, read strictly: bounded, no key twice, and every refusal says where.

manifest.stages[1].layers: got 7, wanted a list of 1 to 2
"""

import codecs
import datetime
import json
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger("attest")

EVIDENCE, MANIFEST, PLACES = "an evidence file", "a manifest", "a places file"
CLIENT_KEY, MOCK_ROOT, MOCK_KEY = "minigpt-client-key", "minigpt-mock-root", "minigpt-mock-key"
PRIVATE = {  # what a private file says that it is, and what that is
    CLIENT_KEY: "a client's private key",
    MOCK_ROOT: "the mock's private root key",
    MOCK_KEY: "a stage's private mock key",
}
_MAX_PRIVATE = 2**16  # bytes of a private file; they have 500
_HEX = set("0123456789abcdef")
_KEY = re.compile(r"\s*[0-9a-fA-F]{64}\s*", re.ASCII)
_LABEL = re.compile(r'"format":\s*"(minigpt-[a-z-]+)[0-9]*"')
_PLACES = re.compile(r'\s*\{\s*"[0-9]+":\s*"[a-z]+://')
_BEGINNINGS = {
    "<": "a page of HTML or XML, as a download that failed leaves",
    "-----BEGIN ": "PEM, as certificates and keys of other programs are",
    "ssh-": "a public key of SSH",
}  # by the first characters of a file


class DocumentError(ValueError):
    """A document is too long, not JSON, or a value in it is not what its place wants."""


def read_file(path: str | Path | int, limit: int) -> bytes:
    """At most `limit` bytes of a file or a descriptor, and one more if it has more. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(limit + 1)


def private_in(text: str) -> str | None:
    """Which private file a text is, or holds the words of; None if none."""
    kinds = [PRIVATE[kind] for kind in _LABEL.findall(text) if kind in PRIVATE]
    return kinds[0] if kinds else None


def really(data: bytes) -> str | None:
    """What a file is that is not what was wanted, if that is easily told. Quotes nothing of it."""
    text = data.decode(errors="replace")
    if not text.strip():
        return "an empty file"
    if is_key(text[:100]):
        return "64 hex digits, as a public key is written"
    labels = {**PRIVATE, "minigpt-evidence": EVIDENCE, "minigpt-pipeline-": MANIFEST}
    found = next((labels[label] for label in _LABEL.findall(text) if label in labels), None)
    if found is None and _PLACES.match(text):
        found = PLACES
    return found or next((what for start, what in _BEGINNINGS.items() if text.lstrip().startswith(start)), None)


def check_kind(name: str, data: bytes, wanted: str, origin: str) -> None:
    """Raises DocumentError if a file is plainly of another kind than it was given for."""
    found = really(data)
    if found is not None and found != wanted:
        raise DocumentError(f"{name}: got {found}, wanted {wanted}, {origin}")


def refuse_private(arguments: Iterable[str]) -> None:
    """Raises DocumentError if a private file's text is on the command line, in however many words, or in a variable.

    An error about an unknown argument, or about a file of that name, would quote it.
    """
    places = {f"in {name}": value for name, value in os.environ.items() if name.startswith("MINIGPT_")}
    for where, text in {"on the command line": " ".join(arguments), **places}.items():
        found = private_in(text)
        if found:
            wanted = "wanted a public key or a file's name"
            raise DocumentError(f"got {found} {where}, {wanted}; if others may have seen it, make a new one")


def is_key(text: str) -> bool:
    """Whether a text is a key as keygen prints it, 64 hex digits; a private one looks the same."""
    return _KEY.fullmatch(text) is not None


def public_key(text: str) -> bytes:
    """A public key, from 64 hex digits. Raises DocumentError, which quotes nothing: the text may be a private key."""
    if is_key(text) and any(bytes.fromhex(text)):
        return bytes.fromhex(text)
    got = private_in(text) or f"{len(text)} characters"
    if os.path.isfile(text):
        with suppress(OSError):
            held = private_in(read_file(text, _MAX_PRIVATE).decode(errors="replace"))
            got = f"the name of a file, which holds {held}" if held else "the name of a file"
    raise DocumentError(f"got {got}, wanted a public key: the 64 hex digits, not all zero, that keygen printed")


def read_private(path: str | Path | int, limit: int) -> bytes:
    """As `read_file`, of a private file. Warns if others may read or change it.

    Raises OSError, and DocumentError if `path` is no name but a key, or the text of one: no error quotes it then.
    """
    found = private_in(str(path)) or ("a key (64 hex digits)" if is_key(str(path)) else None)
    if found:
        raise DocumentError(f"got {found}, wanted the name of a private key's file")
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        if stat.S_ISREG(about.st_mode) and about.st_mode & 0o066:
            mode = stat.S_IMODE(about.st_mode)
            log.warning("%s: others may read or change this private key (mode %04o): chmod 600 it", path, mode)
        return file.read(limit + 1)


def write_private(path: str | Path, text: str) -> None:
    """Writes a new file that only its owner may read, or leaves none.

    Raises OSError, which names the file: FileExistsError if there is one, because nothing is ever overwritten.
    """
    try:
        _create(path, text.encode("ascii"), 0o600)
    except OSError as error:
        raise _about(path, error) from None


def write_file(path: str | Path, data: bytes | str) -> None:
    """Writes a file whole, or leaves what was there: it is written beside its place, and renamed.

    A link stays a link. What is there and is not a file, such as /dev/stdout, is written into. Raises OSError, which
    names the file.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb", buffering=0) as file:
                _write_all(file.fileno(), data)
        else:
            _replace(os.path.realpath(path), data)
    except OSError as error:
        raise _about(path, error) from None


def _replace(path: str, data: bytes) -> None:
    before = os.stat(path) if os.path.exists(path) else None
    beside = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.new")
    _create(beside, data, 0o666)
    try:
        if before is not None:
            with suppress(PermissionError):  # it may not be ours to give away
                os.chown(beside, before.st_uid, before.st_gid)
            os.chmod(beside, stat.S_IMODE(before.st_mode))
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _create(path: str | Path, data: bytes, mode: int) -> None:
    """A new file with all of `data`, on the disk, or none."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)  # follows no link
    try:
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)  # some file systems find out only now that they are full
        finally:
            os.close(descriptor)
    except BaseException:
        os.unlink(path)
        raise


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _about(path: str | Path, error: OSError) -> OSError:
    """The same error, about the file that was asked for: a write names none, and a rename two."""
    return OSError(error.errno, error.strerror, str(path))


def show(text: str) -> None:
    """Prints to standard output, and flushes. Raises OSError, which names standard output."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes, so that exit is quiet
        raise _about("standard output", error) from None


def parse_json(data: bytes | str) -> Any:
    """A JSON value. Python's own reader takes a key twice, NaN and Infinity; this one does not.

    Raises DocumentError if it is not JSON in UTF-8. The message quotes nothing of it.
    """
    if isinstance(data, bytes) and data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DocumentError("it begins with a byte-order mark, wanted UTF-8 without one: an editor may have added it")
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise DocumentError(f"{what} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise DocumentError("a number has too many digits") from None


def load(name: str, data: bytes, limit: int, *, quiet: bool = False) -> "Place":
    """The whole of a document of at most `limit` bytes. Raises DocumentError."""
    if len(data) > limit:
        raise DocumentError(f"{name}: more than {limit} bytes, wanted at most {limit}")
    try:
        return Place(name, parse_json(data), quiet)
    except DocumentError as error:
        raise DocumentError(f"{name}: not JSON: {error}") from None


@dataclass(frozen=True)
class Place:
    """A value in a document, and the path to it for messages. Its methods read it, or raise DocumentError.

    A quiet one never quotes a value: the document may hold a private key.
    """

    name: str
    value: Any
    quiet: bool = False

    def refuse(self, wanted: str) -> NoReturn:
        hidden = self.quiet or isinstance(self.value, dict | list)
        got = type(self.value).__name__ if hidden else repr(self.value)[:100]
        raise DocumentError(f"{self.name}: got {got}, wanted {wanted}")

    def get(self, key: str) -> "Place":
        if type(self.value) is not dict:
            self.refuse("an object")
        if key not in self.value:
            raise DocumentError(f"{self.name}: {key} is missing")
        return Place(f"{self.name}.{key}", self.value[key], self.quiet)

    def only(self, *keys: str) -> None:
        unknown = [key for key in self.value if key not in keys]
        if unknown:
            shown = f"{len(unknown)} unknown fields" if self.quiet else f"an unknown field {unknown[0][:60]!r}"
            raise DocumentError(f"{self.name}: got {shown}, wanted {', '.join(keys)}")

    def items(self, least: int, most: int) -> "list[Place]":
        if type(self.value) is not list or not least <= len(self.value) <= most:
            self.refuse(f"a list of {least} to {most}")
        return [Place(f"{self.name}[{i}]", item, self.quiet) for i, item in enumerate(self.value)]

    def integer(self, low: int, high: int) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            self.refuse(f"an integer from {low} to {high}")
        return int(self.value)

    def text(self, limit: int) -> str:
        if type(self.value) is not str or not 1 <= len(self.value) <= limit:
            self.refuse(f"a string of 1 to {limit} characters")
        return str(self.value)

    def pin(self, length: int) -> bytes:
        """As `bytes`, and not all zeros."""
        value = self.bytes(length)
        if not any(value):
            self.refuse("a value that is not all zeros: zeros pin nothing")
        return value

    def bytes(self, least: int, most: int | None = None) -> bytes:
        """Lower-case hex of `least` to `most` bytes; of exactly `least` if `most` is None."""
        text, most = self.value, least if most is None else most
        if type(text) is not str or len(text) % 2 or not 2 * least <= len(text) <= 2 * most or set(text) - _HEX:
            self.refuse(f"{2 * least}{f' to {2 * most}' if most > least else ''} lower-case hex digits")
        return bytes.fromhex(text)

    def time(self) -> datetime.datetime:
        text = self.text(20)
        try:
            return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)
        except ValueError:
            self.refuse("a time in UTC, such as 2026-01-31T12:00:00Z")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise DocumentError("a key appears twice in one object")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise DocumentError(f"{name} is not a JSON number")
