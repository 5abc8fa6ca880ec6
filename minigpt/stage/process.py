"""From a stage's options to a stage that serves. Imported once the number of BLAS threads is set."""

import argparse
import logging
import time
from collections.abc import Callable
from typing import IO, TypeVar

from attest import AttestationError, Attester, Binding, EvidenceError, PolicyError
from attest.document import DocumentError, read_file, read_private
from attest.measure import own
from attest.providers.mock import ENDORSEMENT_SIZE, MockKey, NewKey
from minigpt.checkpoint import sources, weights
from minigpt.cli.terminal import progress
from minigpt.engine import cgroups, threads
from minigpt.engine.model import GPT2
from minigpt.errors import ManifestError, UsageError, WeightsMismatch
from minigpt.protocol import addresses
from minigpt.protocol.addresses import MAX_PLACES, Addresses
from minigpt.protocol.manifest import MAX_MANIFEST, SLOW_HANDSHAKE, Manifest, StageEntry, endorsement_warnings
from minigpt.stage import endorsements, streams
from minigpt.stage.ending import Ending
from minigpt.stage.evidence import SHARE, EvidenceQueue
from minigpt.stage.newcomers import WAITING
from minigpt.stage.readiness import Readiness
from minigpt.stage.server import Server
from minigpt.stage.stage import VISITORS, Limits, Stage
from transport.channel import Address, Deadlines, Listener, receive_all
from transport.errors import TimedOut, TransportError, Unreachable

log = logging.getLogger("minigpt.stage")

MAX_KEY = 2**16  # bytes of a key's file; a mock key's has 500
PROVISION = 3600.0  # seconds that a manifest, places or a key may take to come to an address: it may be sent by hand
HANDSHAKE = 10.0  # seconds that a handshake may take where no platform is asked
SENDER = 10.0  # seconds that one who connects there may take to send it

# What a file or a descriptor of each kind should be.
_WANTED = {
    "manifest": "the file that `minigpt plan` or `minigpt up` wrote",
    "places": "the file that `minigpt plan` wrote beside the manifest",
    "mock key": "the file that `python -m attest keygen --root ROOT --stage I -o FILE` makes",
    "endorsement": "the root's endorsement of the key that this stage printed",
}

T = TypeVar("T")
Load = Callable[[str | int, int], bytes]


def run(options: argparse.Namespace, exposed: str, ending: Ending) -> None:
    """Loads what the options name, and serves.

    Args:
        exposed: what could not be locked down, for `status`.
        ending: is told when there is something to end in order.
    """
    blas = threads.native()
    sockets = options.max_channels + options.max_handshakes + WAITING + VISITORS.start
    what = f"--max-channels {options.max_channels}"
    visitors = VISITORS.start + streams.make_room(sockets, what, ", or lower it", more=len(VISITORS))
    readiness = Readiness(options.ready)
    own()  # now: while a stage waits for its manifest, its files may be changed
    manifest = _receive("manifest", options.manifest, MAX_MANIFEST, Manifest.parse)
    entry = _entry(manifest, options)
    where = _addresses(manifest, entry, options)
    attester = _attester(manifest, entry, options, readiness)
    listener = _listener(options.listen, where, entry.index)
    model = _model(manifest, entry, options.model, readiness)
    handshake = options.handshake_timeout or (SLOW_HANDSHAKE if manifest.slow else HANDSHAKE)
    evidence = EvidenceQueue(attester, SHARE * handshake)
    _check_own_evidence(manifest, entry.index, evidence)
    cores = None
    if options.turns is not None:
        cores = _opened(options.turns)
        threads.spread(blas)
    limits = Limits(
        channels=options.max_channels,
        sequences=options.max_sequences,
        cache_bytes=options.cache_bytes or cgroups.memory() // (2 if cores is None else 2 * len(manifest.stages)),
        queue=options.queue,
        batch=options.max_batch,
        handshakes=options.max_handshakes,
        answer=options.answer_timeout,
        idle=options.idle_timeout,
        visitors=visitors,
        deadlines=Deadlines(handshake=handshake, message=options.message_timeout),
    )
    least = model.cache_bytes(1)
    if limits.cache_bytes < least:
        by = "" if options.cache_bytes else ", of the memory that is free"
        raise UsageError(
            f"--cache-bytes: got {limits.cache_bytes}{by}, wanted at least {least}, the smallest cache here"
        )
    stage = Stage(manifest, where, entry.index, model, evidence, limits, cores)
    server = Server(stage, exposed)
    layers = f"layers {entry.layers.start}-{entry.layers.stop - 1} of {manifest.config.n_layer}"
    ending.serving(listener.close)  # and `serve` returns
    try:
        line = f"stage {entry.index} ready: {layers}, {listener.address}"
        readiness.serves(line)
        size, kind = model.nbytes / 1e6, entry.platform.name
        log.info("manifest sha256 %s", manifest.digest.hex())
        log.info("ready: %s, %.1f MB of weights, %s, %s evidence", layers, size, listener.address, kind)
        stage.open_ahead()
        server.serve(listener)
        readiness.ends()
        server.drain(options.drain, ending.now)
    finally:
        ending.begin()
        listener.close()
        server.stop()
        log.info("ended")


def _entry(manifest: Manifest, options: argparse.Namespace) -> StageEntry:
    """This stage's part of the manifest, if it may be served at all."""
    manifest.check_time(time.time())
    index: int = options.index
    if index >= len(manifest.stages):
        raise UsageError(f"--index {index}, but the manifest has {len(manifest.stages)} stages, from 0 on")
    manifest.check_switches(allow_mock=options.allow_mock, allow_test_root=options.allow_test_root)
    for warning in manifest.warnings(time.time()):
        log.warning("%s", warning)
    return manifest.stages[index]


def _addresses(manifest: Manifest, entry: StageEntry, options: argparse.Namespace) -> Addresses:
    """Where the stages are. A file is read again for each link."""
    count, source = len(manifest.stages), options.places
    if source is not None and (isinstance(source, int) or "://" in source):
        received = _receive("places", source, MAX_PLACES, lambda data: addresses.read(data, count))
        return Addresses(count, None, dict(enumerate(received)))
    if source is None and isinstance(options.manifest, str) and "://" not in options.manifest:
        source = addresses.beside(options.manifest)
    where = Addresses(count, source)
    if entry.index + 1 < count:
        where.of(entry.index + 1)  # what is wrong with it is said now
    return where


def _attester(manifest: Manifest, entry: StageEntry, options: argparse.Namespace, readiness: Readiness) -> Attester:
    """Makes this stage's evidence: the mock's with a key, a platform's with its device."""
    name = entry.platform.name
    if options.evidence not in ("auto", name):
        raise UsageError(f"--evidence {options.evidence}, but the manifest wants {name} of stage {entry.index}")
    if not entry.platform.simulated:
        return manifest.attester(entry.index, b"", endorsements.source(options.endorsements))
    if options.endorsement is not None:
        return manifest.attester(entry.index, _own_key(entry.index, options, readiness).to_json().encode())
    if options.mock_key is None:
        raise UsageError("the manifest wants mock evidence: give --mock-key, made by `python -m attest keygen`")
    key = options.mock_key
    return _receive("mock key", key, MAX_KEY, lambda data: manifest.attester(entry.index, data), read_private)


def _own_key(index: int, options: argparse.Namespace, readiness: Readiness) -> MockKey:
    """A key made here, of which only the public half leaves this process, once the root has endorsed it."""
    if options.mock_key is not None:
        raise UsageError("--endorsement is for a key that this stage makes itself: leave out --mock-key")
    key = NewKey.generate()
    readiness.key(f"stage {index} key {key.public.hex()}")

    def load(source: str | int, size: int) -> bytes:
        return read_file(source, size - 1)  # so many bytes, and not until a pipe ends

    return _receive("endorsement", options.endorsement, ENDORSEMENT_SIZE, key.endorsed, load)


def _model(manifest: Manifest, entry: StageEntry, model: str | None, readiness: Readiness) -> GPT2:
    """The stage's layers, if they are those that the manifest pins."""
    folder = sources.local(model or manifest.model)
    with progress() as tell:

        def told(line: str) -> None:
            tell(line)
            readiness.loads(f"stage {entry.index} {line}")

        loaded = weights.load(folder, manifest.config, entry.layers, told)
    if loaded.digest != entry.weights_sha256:
        found = f"weights sha256 {loaded.digest.hex()}, the manifest wants {entry.weights_sha256.hex()}"
        raise WeightsMismatch(f"{found}: {folder} is another checkpoint, or damaged")
    return GPT2(manifest.config, entry.layers, loaded.tensors)


def _check_own_evidence(manifest: Manifest, index: int, evidence: EvidenceQueue) -> None:
    """Warns of a stage that no peer will accept: better here than at each of their attempts.

    Raises AttestationError if there is no evidence to be had: such a stage can serve nobody.
    """
    attester = evidence.ticket(first=True)
    binding = Binding("R", attester.provider, bytes(32), bytes(32), attester.claims)
    began = time.monotonic()
    made = attester.attest(binding)
    log.info("own evidence made in %.2f s", time.monotonic() - began)
    try:
        result = manifest.verifier(index).verify(made, binding)
        for warning in endorsement_warnings(index, result.valid_until):
            log.warning("%s", warning)
    except (EvidenceError, PolicyError) as error:
        log.warning("peers will refuse this stage's evidence:")
        for check in manifest.checks(index, error.failures):
            if check.result == "FAIL":
                log.warning("%s", check)
        if any(name == "key" for name, _ in error.failures):
            log.warning("start it with the --mock-key of stage %d, %s", index, _WANTED["mock key"])


def _opened(place: str | int) -> IO[bytes]:
    """The file of --turns, open for locking."""
    try:
        return open(place, "r+b", buffering=0)
    except OSError as error:
        wanted = "wanted a file that can be read and written"
        raise UsageError(f"--turns {_named(place)}: {error.strerror}; {wanted}") from None


def _named(source: str | int) -> str:
    """A file or a descriptor, as it is written on the command line."""
    return source if isinstance(source, str) else f"fd:{source}"


def _listener(place: str | int | None, where: Addresses, index: int) -> Listener:
    if place is None:
        own = where.of(index)
        try:
            listener = Listener(own)
        except Unreachable as error:
            hint = "if this stage's own address is another than its place, give it with --listen"
            raise Unreachable(f"{error}: {hint}") from None
        if listener.address.host.startswith("127.") and own.host not in (listener.address.host, "localhost"):
            log.warning(
                "%s is %s here, which no other machine reaches: correct /etc/hosts, or give --listen tcp://0.0.0.0:%d",
                own.host, listener.address.host, listener.address.port,
            )  # fmt: skip
        return listener
    return Listener(Address.parse(place) if isinstance(place, str) else streams.moved_up(place))


def _receive(what: str, source: str | int, limit: int, read: Callable[[bytes], T], load: Load = read_file) -> T:
    """What `read` makes of the bytes of a file; or of what is sent to an address: an enclave has no files at run time.

    Anybody may connect there, as a port scan does: what `read` refuses is logged, and the next one is awaited.
    """
    if isinstance(source, int) or "://" not in source:
        try:
            data = load(source, limit)
        except OSError as error:
            if isinstance(source, int):
                wanted = f"a descriptor that whoever starts the stage opened for reading, on {_WANTED[what]}"
            else:
                wanted = _WANTED[what]
            raise UsageError(
                f"--{what.replace(' ', '-')} {_named(source)}: {error.strerror}; wanted {wanted}"
            ) from None
        except DocumentError as error:
            raise UsageError(f"--mock-key: {error}") from None
        try:
            return read(data)
        except (ManifestError, AttestationError) as error:
            where = f"{source}: " if isinstance(source, str) else ""
            raise type(error)(where + str(error).removeprefix("file: ").removeprefix("manifest: ")) from None
    with Listener(Address.parse(source)) as listener:
        log.info("waiting for the %s at %s", what, listener.address)
        until = time.monotonic() + PROVISION
        while True:
            try:
                accepted = listener.accept(until)
            except TimedOut:
                raise TimedOut(f"{source}: no {what} came in {PROVISION:.0f} s") from None
            if accepted is None:
                raise AssertionError("nobody else has the listener")
            sock, peer = accepted
            try:
                return read(receive_all(sock, limit, SENDER))
            except (TransportError, ManifestError, UsageError, AttestationError) as error:
                log.warning("%s did not send the %s, still waiting: %s", peer, what, ascii(str(error)[:200]))
