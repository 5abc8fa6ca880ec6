"""Text to token ids and back, with GPT-2's byte-level BPE from the `tokenizers` package.

A token is a string of bytes, not of characters: "é" may be split over two tokens, and an emoji over four. So a stream
of tokens is decoded to bytes first, and incomplete characters are held back.

The package is imported on first use: stages never need it.
"""

import codecs
import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attest.document import read_file
from minigpt.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

WHOLE = ("tokenizer.json",)
PARTS = ("vocab.json", "merges.txt")
MAX_FILE = 16 * 2**20  # bytes; GPT-2's tokenizer.json has 1.3 MB, and JSON of 16 MiB may become 400 MB of objects


def _byte_characters() -> dict[str, int]:
    """The character with which GPT-2 writes each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()


class Tokenizer:
    """A byte-level BPE.

    Attributes:
        digest: SHA-256 over tokenizer.json, or else vocab.json and merges.txt, of each: u16 length of the name, the
            name, u64 length of the content, the content; big-endian.
    """

    def __init__(self, encoder: "tokenizers.Tokenizer", digest: bytes) -> None:
        encoder.no_truncation()  # a tokenizer.json may ask for either, which would silently change a prompt
        encoder.no_padding()
        self.digest = digest
        self._encoder = encoder
        self._added = encoder.get_added_tokens_decoder()

    def encode(self, text: str) -> list[int]:
        """The text's token ids; names of special tokens in the text, such as <|endoftext|>, become those tokens.

        Raises:
            CheckpointError: the tokenizer is damaged in a way that shows only now. The message never quotes the text.
        """
        with _refused("the checkpoint's tokenizer fails on this text", quote=False):
            ids: list[int] = self._encoder.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD, and special tokens nothing."""
        return b"".join(map(self.bytes, ids)).decode(errors="replace")

    def stream(self) -> "Stream":
        """A decoder for tokens as they arrive."""
        return Stream(self)

    def bytes(self, token: int) -> bytes:
        """The bytes of a token; none for a special one, or for an id outside the vocabulary."""
        if token in self._added:
            return b"" if self._added[token].special else self._added[token].content.encode()
        text = self._encoder.id_to_token(token) or ""
        return b"".join(bytes([_BYTES[letter]]) if letter in _BYTES else letter.encode() for letter in text)


class Stream:
    """Decodes token by token. All that `push` and `flush` return, joined, is `decode` of the tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes: none, one or many."""
        return self._decoder.decode(self._tokenizer.bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


def load(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder, None if it has none.

    Raises:
        CheckpointError: it is damaged, or not a byte-level BPE.
    """
    names = next((names for names in (WHOLE, PARTS) if all((folder / name).is_file() for name in names)), None)
    if names is None:
        return None
    contents = [_content(folder / name) for name in names]
    digest = hashlib.sha256()
    for name, content in zip(names, contents, strict=True):
        digest.update(len(name).to_bytes(2, "big") + name.encode() + len(content).to_bytes(8, "big") + content)
    with _refused(f"{folder / names[0]}: not a byte-level BPE that can be loaded"):
        encoder = _whole(contents[0]) if names == WHOLE else _from_parts(*contents)
    return Tokenizer(encoder, digest.digest())


@contextlib.contextmanager
def _refused(what: str, *, quote: bool = True) -> Iterator[None]:
    """Turns any error of the package into a CheckpointError. It raises plain Exception, and where its Rust panics a
    PanicException, which is a BaseException and cannot be imported."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {str(error)!r:.200}" if quote else what) from None


def _content(path: Path) -> bytes:
    try:
        content = read_file(path, MAX_FILE)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_FILE:
        raise CheckpointError(f"{path}: more than {MAX_FILE} bytes")
    return content


def _whole(content: bytes) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Encoder
    from tokenizers import decoders

    encoder = Encoder.from_str(content.decode())
    if not isinstance(encoder.decoder, decoders.ByteLevel):
        raise ValueError(f"its decoder is {type(encoder.decoder).__name__}, wanted ByteLevel")
    return encoder


def _from_parts(vocab: bytes, merges: bytes) -> "tokenizers.Tokenizer":
    """GPT-2's own two files; a merge is a line of two tokens, and a first line may tell the version."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Encoder

    ids = json.loads(vocab)
    lines = [line for line in merges.decode().split("\n") if line.strip() and not line.startswith("#version")]
    pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
    encoder = Encoder(models.BPE(vocab=ids, merges=pairs))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    if "<|endoftext|>" in ids:
        encoder.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return encoder
