"""The client's end of a pipeline: `Pipeline.connect`, `generate`, `logits`, `status`.

The client is the driver, and the only party that sees the text. Its root of trust is the manifest, which is checked
whole before anything is sent: every stage's evidence must be pinned, because the client itself meets only stage 0; the
other stages are met by measured code that enforces the same manifest.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from minigpt.checkpoint import sources
from minigpt.checkpoint import tokenizer as tokenizers
from minigpt.checkpoint.tokenizer import Tokenizer
from minigpt.client.pool import Pool
from minigpt.client.resume import RETRY_FOR, Fault, Resumption
from minigpt.client.text import Prompt, TextModel, encode_prompt
from minigpt.engine import blas
from minigpt.errors import INSIDE, CheckpointError, ManifestError, RequestRefused, StageError, UsageError
from minigpt.launch.launcher import Launcher
from minigpt.protocol import addresses, links, messages
from minigpt.protocol import manifest as manifests
from minigpt.protocol.addresses import Addresses
from minigpt.protocol.links import StageLink
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.messages import Answer, Done, Generate, Logits, Reason, StageReport
from minigpt.protocol.request import Replies, check_type, span, with_span
from transport.channel import Deadlines
from transport.errors import Silent

log = logging.getLogger("minigpt")

TIMEOUT = 150.0  # seconds; more than a stage waits for the next, so that it is the stage which is named
CONNECT_TIMEOUT = 10.0  # seconds
CONNECTIONS = 32  # as many as a stage has sequences, by default
MAX_TIMEOUT = 1e9  # seconds, thirty years; as on the command line

_NONE = type(None)
_DIGEST = re.compile(r"\s*([0-9a-fA-F]{64})(\s.*)?", re.DOTALL)


class Pipeline(TextModel):
    """A pipeline, seen by its client. Any number of threads may use it: each request has a connection of its own.

    Use `connect` or `local`, and `with`, or `close` when done.

    Attributes:
        manifest: what the pipeline is.
        addresses: where its stages are, as far as this end knows.
        config: the model's.
        tokenizer: None where the client has none for this model; prompts are then token ids.
    """

    def __init__(
        self,
        manifest: Manifest,
        addresses: Addresses,
        tokenizer: Tokenizer | None = None,
        allow_mock: bool = False,
        timeout: float = TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        client_key: bytes | None = None,
        connections: int = CONNECTIONS,
        retry_for: float = RETRY_FOR,
        allow_test_root: bool = False,
        handshake_timeout: float | None = None,
    ) -> None:
        check(manifest, allow_mock=allow_mock, allow_test_root=allow_test_root, client_key=client_key)
        if tokenizer is not None and manifest.tokenizer_sha256 not in (None, tokenizer.digest):
            raise ManifestError("the tokenizer is not the one that the manifest pins: use the model's own")
        self.manifest = manifest
        self.addresses = addresses
        self.config = manifest.config
        self.tokenizer = tokenizer
        self._timeout = timeout
        self._retry_for = retry_for
        handshake = handshake_timeout or (
            max(connect_timeout, manifests.SLOW_HANDSHAKE) if manifest.slow else connect_timeout
        )
        deadlines = Deadlines(connect=connect_timeout, handshake=handshake)
        self._pool = Pool(partial(_dial, manifest, addresses, client_key, deadlines, timeout), connections, timeout)
        self._stages: Launcher | None = None

    @classmethod
    def connect(
        cls,
        manifest: str | Path | bytes,
        *,
        manifest_sha256: str | None = None,
        places: str | Path | None = None,
        place: dict[int, str] | None = None,
        model: str | Path | None = None,
        text: bool = True,
        allow_mock: bool = False,
        allow_test_root: bool = False,
        timeout: float = TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        handshake_timeout: float | None = None,
        client_key: bytes | None = None,
        connections: int = CONNECTIONS,
        retry_for: float = RETRY_FOR,
    ) -> Self:
        """Connects to the pipeline that a manifest describes, and verifies stage 0.

        Args:
            manifest: its file, or its bytes. It is your root of trust: get it over a channel that you trust, or
            manifest_sha256: pin its digest, in hex, or as a line that sha256sum prints.
            places: the file that says where the stages are; by default X.places.json beside a manifest's file X.json.
                It is read again for each link, and need not be trusted: at a wrong place the handshake fails.
            place: addresses of single stages, by their numbers, which go before those of the file: of a relay before
                stage 0, for example. This end needs stage 0's only.
            model: where to find the tokenizer: a folder, "tiny" or a hub id; by default what the manifest names, if it
                is on this machine. Its digest must be the manifest's.
            text: False for token ids only: no tokenizer is looked for.
            allow_mock: accept mock evidence, where the manifest says so. It proves nothing about hardware.
            allow_test_root: accept roots that are not the vendor's, where the manifest names them. They prove nothing
                about hardware either, and each is logged.
            timeout: seconds to wait for an answer.
            connect_timeout: seconds for the connection.
            handshake_timeout: and for its handshake; by default as many, and 60 where the manifest pins a platform: it
                makes evidence for each handshake, slowly.
            client_key: a static private key (X25519, 32 bytes), where the manifest lists its clients.
            connections: how many at most, made when needed: a request takes one, and waits (up to `timeout`) for it.
            retry_for: seconds to go on trying for, when a link or a stage has died or cannot be reached: over a new
                link, from the token after those that have arrived. Counted until answers come again; an attempt under
                way then is brought to its end, which takes up to twice `connect_timeout`. 0 fails at once. Evidence
                that is refused is never tried again, nor is the first connection.

        Raises:
            UsageError: an argument is of a wrong type or out of its range, or the places are not acceptable.
            ManifestError: the manifest is malformed, expired, or not acceptable. Nothing was connected.
            UntrustedStage: the evidence of stage 0 was refused.
            StageError: stage 0 cannot be reached.
        """
        check_type("manifest", manifest, str, Path, bytes)
        check_type("manifest_sha256", manifest_sha256, str, _NONE)
        check_type("places", places, str, Path, _NONE)
        check_type("place", place, dict, _NONE)
        for index, address in (place or {}).items():
            check_type("a stage's number in place", index, int)
            check_type("an address in place", address, str)
        check_type("model", model, str, Path, _NONE)
        check_type("text", text, bool)
        check_type("allow_mock", allow_mock, bool)
        check_type("allow_test_root", allow_test_root, bool)
        check_type("client_key", client_key, bytes, _NONE)
        if client_key is not None and len(client_key) != 32:
            wanted = "the 32 of a private key: in hex, `private` in the file that `minigpt keygen` writes"
            raise UsageError(f"client_key has {len(client_key)} bytes, wanted {wanted}")
        _check_seconds(timeout=timeout, connect_timeout=connect_timeout)
        if handshake_timeout is not None:
            _check_seconds(handshake_timeout=handshake_timeout)
        _check_retry_for(retry_for)
        parsed = Manifest.parse(manifest) if isinstance(manifest, bytes) else manifests.load(manifest)[1]
        if manifest_sha256 is not None and _digest(manifest_sha256) != parsed.digest.hex():
            raise ManifestError(f"the manifest's sha256 is {parsed.digest.hex()}, wanted {_digest(manifest_sha256)}")
        if places is None and not isinstance(manifest, bytes):
            places = addresses.beside(manifest)
        where = Addresses(len(parsed.stages), places, place)
        tokenizer = _tokenizer(parsed, model) if text else None
        pipeline = cls(
            parsed, where, tokenizer, allow_mock, timeout, connect_timeout, client_key, connections, retry_for,
            allow_test_root, handshake_timeout,
        )  # fmt: skip
        for warning in parsed.warnings(time.time()):
            log.warning("%s", warning)
        where.of(0)  # what is wrong with the places is said now
        pipeline._verify()
        return pipeline

    @classmethod
    def local(
        cls,
        model: str | Path = "tiny",
        stages: int = 2,
        *,
        split: str | None = None,
        revision: str | None = None,
        threads: int | None = None,
        timeout: float = TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        connections: int = CONNECTIONS,
        retry_for: float = RETRY_FOR,
        progress: Callable[[str], None] = lambda line: None,
    ) -> Self:
        """Starts stages as child processes on this machine, with fresh mock keys, and connects to them.

        Args:
            model: a folder, "tiny" or a hub id.
            stages: how many, of about as many layers each.
            split: or the layers of each, as "6+6".
            revision: of a hub id.
            threads: BLAS threads of each stage.
            timeout, connect_timeout, connections, retry_for: as in `connect`.
            progress: is told what is waited for, in a line for people; later, from another thread, of each stage that
                ended and is started again.
        """
        from minigpt.launch.local import LocalStages

        check_type("model", model, str, Path)
        check_type("stages", stages, int)
        check_type("split", split, str, _NONE)
        check_type("revision", revision, str, _NONE)
        check_type("threads", threads, int, _NONE)
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}, wanted at least 1")
        _check_seconds(timeout=timeout, connect_timeout=connect_timeout)
        _check_retry_for(retry_for)
        checkpoint = sources.find(model, revision)
        blas.computes_beside("stages")
        processes = LocalStages(checkpoint, split or stages, threads=threads, progress=progress)
        try:
            tokenizer = tokenizers.load(checkpoint.folder) if processes.manifest.tokenizer_sha256 else None
            pipeline = cls(
                processes.manifest, processes.addresses, tokenizer, True, timeout, connect_timeout, None, connections,
                retry_for,
            )  # fmt: skip
            pipeline._stages = processes
            pipeline._verify()
        except BaseException:
            processes.stop()
            raise
        return pipeline

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """The logits after the prompt's last token, float32 (n_vocab,). Raises as `generate`."""
        ids = encode_prompt(prompt, self.tokenizer, self.config)
        request = Generate(start=0, ids=ids, max_tokens=1, wanted=messages.Wanted.LOGITS)
        answers = self._answers(request, [], threading.Event())
        (values,) = [answer.values for answer in answers if isinstance(answer, Logits)]
        return values

    def status(self) -> tuple[StageReport, ...]:
        """Each stage's state; one that cannot be reached says so in its `error`. Raises StageError for stage 0."""
        self._check_stages()
        link, whole = self._pool.take(), False
        try:
            reports = link.status()
            whole = True
            return reports
        except RequestRefused:
            whole = True
            raise
        finally:
            self._pool.give(link, whole=whole)

    @property
    def pids(self) -> list[int]:
        """Process ids of a local pipeline's stages, in order. One that has ended keeps its place until it is started
        again."""
        return [] if self._stages is None else self._stages.pids

    @property
    def restarts(self) -> list[int]:
        """How often each stage of a local pipeline was started again."""
        return [] if self._stages is None else self._stages.restarts

    @property
    def failure(self) -> StageError | None:
        """Why a stage of a local pipeline is not started again, if that is so: every request then raises this."""
        return None if self._stages is None else self._stages.failure

    def _check_stages(self) -> None:
        """Raises StageError if a stage was given up: no link can help then."""
        if (failure := self.failure) is not None:
            raise failure

    def _explained(self, error: Fault) -> Fault:
        """The error, with the end of a local stage's log where it says to look there: that file has no name."""
        if self._stages is not None and isinstance(error, StageError) and error.stage is not None:
            where, _, rest = str(error).partition(INSIDE)
            if INSIDE in str(error) and (end := self._stages.log_end(error.stage)):
                return type(error)(f"{where}failed inside{rest}; the end of its log:\n{end}\n", stage=error.stage)
        return error

    def close(self) -> None:
        """Ends the connections; and the stages, if they are ours."""
        self._pool.close()
        if self._stages is not None:
            self._stages.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _verify(self) -> None:
        """Makes the first link, and so verifies stage 0."""
        self._pool.give(self._pool.take(), whole=True)

    def _answers(
        self, request: Generate, interruptions: list[str], cancelled: threading.Event
    ) -> Generator[Answer, None, Reason]:
        resumption = Resumption(request, self.config.n_positions, self._retry_for, interruptions)
        link: StageLink | None = None
        replies: Replies | None = None
        try:
            while not cancelled.is_set():
                if (failure := self.failure) is not None:
                    raise resumption.end(failure)
                try:
                    link = self._pool.take(link)
                    rest = resumption.rest()
                    replies = Replies(rest, self.config, len(self.manifest.stages))
                    return (yield from self._ask(link, rest, replies, resumption))
                except (StageError, RequestRefused) as fault:
                    if isinstance(fault.__cause__, Silent):
                        self._pool.flush()
                    error = self._explained(fault)
                    wait = resumption.fault(error, again=self._pool.may_replace(link))
                    if wait is None and resumption.reason is not None:
                        return resumption.reason
                    if link is not None and (replies is None or not replies.over):
                        link.channel.abort()  # but its place is kept
                    replies = None
                    if not self._pool.rest(wait or 0.0):
                        raise resumption.end(error, "the pipeline was closed meanwhile") from error
            return Reason.CANCELLED
        finally:
            if link is not None:
                self._pool.give(link, whole=replies is not None and replies.over)

    def _ask(
        self, link: StageLink, request: Generate, replies: Replies, resumption: Resumption
    ) -> Generator[Answer, None, Reason]:
        """Yields the answers of stage 0 on one link, and returns why they ended. Closing this cancels the request."""
        try:
            began, before = time.perf_counter(), link.traffic
            link.send(request)
            while True:
                message = link.receive()
                replies.take(message)
                if isinstance(message, Done):
                    return message.reason
                assert isinstance(message, Answer), "nothing else is a reply"
                resumption.told(message)
                if request.spans:
                    now, after = time.perf_counter(), link.traffic
                    message = with_span(message, span(0.0, now - began, before, after))
                    began, before = now, after
                yield message
        except GeneratorExit:
            with suppress(StageError, RequestRefused):
                self._cancel(link, replies)
            raise

    def _cancel(self, link: StageLink, replies: Replies) -> None:
        """Cancels the running request and reads to its end, if that comes in time."""
        link.send(messages.Cancel())
        replies.cancelled = True
        until = time.monotonic() + self._timeout
        while not replies.over and time.monotonic() < until:
            replies.take(link.receive())


def _dial(manifest: Manifest, where: Addresses, key: bytes | None, deadlines: Deadlines, timeout: float) -> StageLink:
    """A new link to stage 0. No method: a pipeline that nobody refers to must end, and its pool refers to this."""
    manifest.check_time(time.time())
    channel = links.dial(manifest, where, 0, links.calling_end(manifest, 0, None, key), deadlines)
    return StageLink(channel, manifest, 0, timeout)


def check(
    manifest: Manifest,
    *,
    allow_mock: bool,
    allow_test_root: bool = False,
    client_key: bytes | None = None,
    now: float | None = None,
) -> None:
    """Checks that a manifest is acceptable to this client. One unacceptable stage rules out the whole pipeline.

    Raises:
        ManifestError: it has expired, accepts mock evidence without `allow_mock`, or a root that is not the vendor's
            without `allow_test_root`, or does not admit this client.
    """
    manifest.check_time(time.time() if now is None else now)
    manifest.check_switches(allow_mock=allow_mock, allow_test_root=allow_test_root)
    if manifest.clients is not None and client_key is None:
        raise ManifestError("the manifest admits listed clients only: give the private key of one with --client-key")


def _check_seconds(**arguments: float) -> None:
    for name, value in arguments.items():
        check_type(name, value, float)
        if not 0 < value <= MAX_TIMEOUT:
            raise UsageError(f"{name} is {value}, wanted seconds: more than 0, at most {MAX_TIMEOUT:g}")


def _digest(text: str) -> str:
    """A digest in hex, alone or as sha256sum prints it, before the file's name."""
    found = _DIGEST.fullmatch(text)
    if found is None:
        raise UsageError(f"manifest_sha256 is {text[:80]!r}, wanted 64 hex digits, or a line that sha256sum prints")
    return found[1].lower()


def _check_retry_for(value: float) -> None:
    check_type("retry_for", value, float)
    if not 0 <= value <= MAX_TIMEOUT:
        raise UsageError(f"retry_for is {value}, wanted seconds: at least 0, at most {MAX_TIMEOUT:g}")


def _tokenizer(manifest: Manifest, model: str | Path | None) -> Tokenizer | None:
    """The tokenizer of `model`, which must be there; or that of the manifest's model, if it is on this machine."""
    if model is not None:
        return tokenizers.load(sources.find(model, files=sources.TOKENIZER_FILES).folder)
    try:
        found = sources.find(manifest.model, manifest.revision, files=sources.TOKENIZER_FILES, download=False)
    except CheckpointError:
        return None
    return tokenizers.load_for_text(found.folder)  # a damaged one is not the same as none
