"""Text to token ids and back, with GPT-2's byte-level BPE from the `tokenizers` package.

A token is a string of bytes, not of characters: "é" may be split over two tokens, and an emoji over four. So a stream
of tokens is decoded to bytes first, and incomplete characters are held back.

The package is imported on first use: stages never need it.
"""

import codecs
import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minigpt.checkpoint import tokenizer_files
from minigpt.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers


def _byte_characters() -> dict[str, int]:
    """The character with which GPT-2 writes each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


log = logging.getLogger("minigpt")

LONG = 2**14  # characters from which other threads may run while a text is encoded: 1 MiB takes half a second
_BYTES = _byte_characters()


class ChatTemplate(NamedTuple):
    """What a checkpoint says about how messages become a prompt: a jinja template, and two tokens that it may name."""

    template: str
    bos_token: str
    eos_token: str


class Tokenizer:
    """A byte-level BPE.

    Attributes:
        chat: the checkpoint's chat template, None if it ships none.
        digest: SHA-256 over the files of `tokenizer_files.read`, of each: u16 length of the name, the name, u64 length
            of the content, the content; big-endian.
    """

    def __init__(self, encoder: "tokenizers.Tokenizer", digest: bytes, chat: ChatTemplate | None = None) -> None:
        encoder.no_truncation()  # a tokenizer.json may ask for either, which would silently change a prompt
        encoder.no_padding()
        self.digest = digest
        self.chat = chat
        self._encoder = encoder
        # Of a token that was declared twice, the flag shown is not always the one that counts: so the package is asked.
        added = encoder.get_added_tokens_decoder()
        self._special = {token for token in added if not encoder.decode([token], skip_special_tokens=True)}

    def encode(self, text: str) -> list[int]:
        """The text's token ids; names of special tokens in the text, such as <|endoftext|>, become those tokens.

        Raises:
            CheckpointError: the tokenizer is damaged in a way that shows only now. The message never quotes the text.
        """
        with _refused("the checkpoint's tokenizer fails on this text", quote=False):
            if len(text) < LONG:
                ids: list[int] = self._encoder.encode(text).ids
            else:  # not for short ones: its threads make the package warn of every later fork
                ids = self._encoder.encode_batch_fast([text])[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD, and special tokens nothing."""
        return b"".join(map(self.bytes, ids)).decode(errors="replace")

    def stream(self) -> "Stream":
        """A decoder for tokens as they arrive."""
        return Stream(self)

    def bytes(self, token: int) -> bytes:
        """The bytes of a token; none for a special one, or for an id outside the vocabulary."""
        text = "" if token in self._special else self._encoder.id_to_token(token) or ""
        if all(letter in _BYTES for letter in text):
            return bytes(_BYTES[letter] for letter in text)
        return text.encode()  # an added token, which stands for itself

    def name(self, token: int) -> str:
        r"""What OpenAI's API calls a token: its text, or a special token's name, or its bytes if they are no text.

        For example " Paris", "<|endoftext|>", or r"bytes:\xe2\x80".
        """
        data = self.bytes(token) or (self._encoder.id_to_token(token) or "").encode()
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


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
        CheckpointError: it is damaged, not a byte-level BPE, or has what is not supported and might change ids.
    """
    try:
        files = tokenizer_files.read(folder)
        if not files:
            return None
        with _refused(f"{next(iter(files))}: not a byte-level BPE that can be loaded"):
            encoder = tokenizer_files.build(files)
        chat = tokenizer_files.chat(folder, files)
    except CheckpointError as error:
        raise type(error)(f"{folder}/{error}") from None
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(len(name).to_bytes(2, "big") + name.encode() + len(content).to_bytes(8, "big") + content)
    return Tokenizer(encoder, digest.digest(), ChatTemplate(*chat) if chat else None)


def load_for_text(folder: Path) -> Tokenizer | None:
    """As `load`, for whoever can do without text: of a tokenizer of another kind, it warns, and returns None."""
    try:
        return load(folder)
    except tokenizer_files.OtherTokenizer as error:
        log.warning("%s: text cannot be used with this model, token ids can", error)
        return None


@contextlib.contextmanager
def _refused(what: str, *, quote: bool = True) -> Iterator[None]:
    """Turns any error of the package into a CheckpointError. It raises plain Exception, and where its Rust panics a
    PanicException, which is a BaseException and cannot be imported."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, CheckpointError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {str(error)!r:.200}" if quote else what) from None
