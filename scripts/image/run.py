"""Runs the image of a stage, hands it the manifest, the places and its mock key, and forwards the link.

    python scripts/image/run.py stage-0.eif --backend uml --manifest pipeline.json --mock-key stage0.json --port 5001

It boots the sections of the image itself: kernel (qemu, nitro), command line and ramdisks. It prints a line with
`serving` once the stage is ready, passes the guest's console on to standard error, and runs until a signal comes; the
guest then ends too.

    uml      a user-mode Linux: a kernel as an ordinary process, without root. It has a kernel of its own, so the
             image's is not run. Its packages are fetched by the lock file.
    qemu     qemu-system-x86_64 without KVM, with the image's own kernel: takes some times as long.
    nitro    an AWS Nitro Enclave, by nitro-cli on a parent instance. Not tried yet by the authors.

The first two isolate nothing and attest nothing. Places for them say tcp://127.0.0.1:PORT for a client's stage, and
tcp://10.0.2.2:PORT for a stage that another guest calls: that is this machine's loopback as a guest sees it.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

from attest import MAX_FILE
from attest.document import DocumentError, read_file, read_private
from minigpt.errors import ManifestError, UsageError
from minigpt.protocol import addresses
from minigpt.protocol.manifest import Manifest
from scripts.image import eif, packages
from scripts.image.build import LINK_PORT, MANIFEST_PORT, MOCK_KEY_PORT, PLACES_PORT
from scripts.image.packages import PackageError
from scripts.image.slirp import Network, SlirpError

LOOPBACK = "127.0.0.1"
READY = re.compile(rb"stage \d+ ready")
LAST_WORDS = re.compile(rb"stage \d+: ERROR .*|minigpt image: .*|Kernel panic.*")
REFUSED = re.compile(rb"did not send the [a-z ]+, still waiting: (.*)")
MIB = 2**20
QEMU = ["qemu-system-x86_64", "-M", "q35", "-cpu", "max", "-accel", "tcg", "-no-reboot", "-nodefaults", "-display",
        "none", "-serial", "stdio", "-device", "virtio-net-pci,netdev=net,romfile="]  # fmt: skip


class RunError(Exception):
    """The image cannot be run, or its stage does not serve; the message says why."""


class Guest:
    """An image that runs in a child process, with its console, on a user-mode network.

    Attributes:
        booted: seconds from the start until the stage served; None before.
    """

    def __init__(
        self, image: eif.Image, *, port: int, lock: packages.Lock, outbound: bool = False, memory: int = 0
    ) -> None:
        """Args:
        port: of this machine's loopback, that is forwarded to the stage.
        lock: where user-mode Linux and its libraries are locked.
        outbound: let the guest make connections, as a stage must that has another behind it.
        memory: bytes; by default what the image asks for.
        """
        self.booted: float | None = None
        self._lock = lock
        self._ports = {LINK_PORT: port} | {each: free_port() for each in (MANIFEST_PORT, PLACES_PORT, MOCK_KEY_PORT)}
        self._exit = contextlib.ExitStack()
        self._started = time.monotonic()
        self._news = threading.Event()  # the console said something that decides
        self._last_words: list[str] = []
        self._refused = ""  # why the stage does not take what it was sent; it waits for somebody else's
        try:
            folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="minigpt-image-")))
            eif.extract(image, folder)
            self._process = self._start(image, folder, outbound, (memory or image.memory) // MIB)
        except BaseException:
            self._exit.close()
            raise
        self._console = threading.Thread(target=self._read_console, name="console", daemon=True)
        self._console.start()

    def _start(self, image: eif.Image, folder: Path, outbound: bool, memory: int) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _spawn(self, command: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],  # the guest dies with us, however we die
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, which is ended as a whole
                **more,
            )
        except OSError as error:
            raise RunError(f"{command[0]}: {error.strerror}: install it, or choose another backend") from None

    def _read_console(self) -> None:
        for line in self._process.stdout or ():
            sys.stderr.buffer.write(b"guest: " + line)
            sys.stderr.flush()
            if READY.search(line):
                self.booted = time.monotonic() - self._started
                self._news.set()
            elif words := REFUSED.search(line):
                self._refused = words[1].decode(errors="replace").strip()
                self._news.set()
            elif words := LAST_WORDS.search(line):
                self._last_words.append(words[0].decode(errors="replace").strip())
        self._news.set()

    def provision(self, manifest: bytes, places: bytes, mock_key: bytes | None, timeout: float) -> None:
        """Hands the stage what it receives once at boot, and waits until it serves. Raises RunError.

        The network accepts connections for the guest before the guest listens. So what the stage may have missed is
        sent again, until the console says that it is ready.
        """
        until = time.monotonic() + timeout
        while not self._news.is_set():
            if time.monotonic() > until:
                raise RunError(f"the stage does not serve after {timeout:.0f} s; its console is above")
            send(self._ports[MANIFEST_PORT], manifest)
            send(self._ports[PLACES_PORT], places)
            if mock_key is not None:
                send(self._ports[MOCK_KEY_PORT], mock_key)
            self._news.wait(0.2)
        if self._refused:
            raise RunError(f"the stage does not take what it was sent: {self._refused}")
        if self.booted is None:
            self._process.wait()
            said = "; ".join(self._last_words) or f"exit code {self._process.returncode}"
            raise RunError(f"the guest ended before its stage served: {said}")

    def wait(self) -> None:
        """Until the guest ends by itself."""
        self._process.wait()

    def close(self) -> None:
        """Ends the guest."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._console.join()
        if self._process.stdout:
            self._process.stdout.close()
        self._exit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cpu_too_new_for_uml() -> bool:
    """Whether this CPU has AMX: user-mode Linux 6.1 has no room for its registers, and its process 1 dies at once."""
    try:
        return " amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class UserMode(Guest):
    """User-mode Linux: its own kernel, the image's command line and ramdisks."""

    def _start(self, image: eif.Image, folder: Path, outbound: bool, memory: int) -> subprocess.Popen[bytes]:
        if cpu_too_new_for_uml():
            raise RunError("user-mode Linux does not run on a CPU with AMX, as this one: give --backend qemu")
        tools = packages.unpacked(self._lock, packages.UML, packages.cache_folder())
        forwards = [(host, guest) for guest, host in self._ports.items()]
        network = Network(tools, forwards, restrict=not outbound)
        self._exit.callback(network.close)
        frames = network.guest_end.fileno()
        return self._spawn(
            [str(tools / "usr/bin/linux.uml"), f"mem={memory}M", f"initrd={folder / 'initrd'}", f"uml_dir={folder}/",
             f"vec0:transport=fd,fd={frames},vec=0", "con=null", "con0=fd:0,fd:1", *image.cmdline.decode().split(),
             "console=tty0"],
            pass_fds=[frames], env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip


class Emulated(Guest):
    """qemu: a whole machine, emulated; kernel, command line and ramdisks are the image's."""

    def _start(self, image: eif.Image, folder: Path, outbound: bool, memory: int) -> subprocess.Popen[bytes]:
        forwards = [f"hostfwd=tcp:{LOOPBACK}:{host}-:{guest}" for guest, host in self._ports.items()]
        network = ",".join(["user,id=net", f"restrict={'off' if outbound else 'on'}", *forwards])
        return self._spawn(
            [*QEMU, "-m", f"{memory}M", "-netdev", network, "-kernel", str(folder / "kernel"),
             "-initrd", str(folder / "initrd"), "-append", image.cmdline.decode()],
        )  # fmt: skip


BACKENDS = {"uml": (UserMode, 120.0), "qemu": (Emulated, 300.0)}  # and the seconds that a boot may take


class Enclave:
    """An AWS Nitro Enclave, started by nitro-cli on its parent instance. Its link is vsock, with a relay before it."""

    def __init__(self, path: Path, *, port: int, memory: int, cpus: int) -> None:
        """Args:
        path: the image.
        port: of the parent's loopback, that is relayed to the stage.
        memory: bytes.
        cpus: how many; nitro-cli wants them set aside by its allocator.
        """
        started = self._cli(
            "run-enclave", "--eif-path", str(path), "--memory", str(memory // MIB), "--cpu-count", str(cpus)
        )
        try:
            self._id, self._cid = str(started["EnclaveID"]), int(started["EnclaveCID"])
        except (KeyError, TypeError, ValueError):
            raise RunError(
                f"nitro-cli run-enclave said {started!r:.200}, wanted an EnclaveID and an EnclaveCID"
            ) from None
        target = f"vsock://{self._cid}:{LINK_PORT}"
        self._relay = subprocess.Popen(
            [sys.executable, "-m", "minigpt", "relay", f"tcp://{LOOPBACK}:{port}", target], stdin=subprocess.DEVNULL
        )

    @staticmethod
    def _cli(*words: str) -> Any:
        try:
            done = subprocess.run(["nitro-cli", *words], check=False, capture_output=True, text=True)
        except OSError as error:
            raise RunError(f"nitro-cli: {error.strerror}: this backend runs on a parent instance") from None
        if done.returncode:
            raise RunError(f"nitro-cli {words[0]}: {done.stderr.strip()[-500:]}")
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise RunError(f"nitro-cli {words[0]} said {done.stdout[:200]!r}, wanted JSON") from None

    def provision(self, manifest: bytes, places: bytes, mock_key: bytes | None, timeout: float) -> None:
        """Hands the stage what it receives once at boot, and waits until it serves. Raises RunError.

        An enclave has no console, but connections to it are refused until the stage listens: so each is tried again.
        """
        until = time.monotonic() + timeout
        sent = {MANIFEST_PORT: manifest, PLACES_PORT: places, MOCK_KEY_PORT: mock_key, LINK_PORT: b""}
        for port, data in sent.items():  # in the order in which the stage waits for them
            while data is not None:
                try:
                    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
                        sock.settimeout(5)
                        sock.connect((self._cid, port))
                        sock.sendall(data)
                    break
                except OSError as error:
                    if time.monotonic() > until:
                        raise RunError(
                            f"vsock port {port} of the enclave: {error.strerror} for {timeout:.0f} s"
                        ) from None
                    time.sleep(0.2)

    def wait(self) -> None:
        """Until the relay ends."""
        self._relay.wait()

    def close(self) -> None:
        """Ends the enclave and its relay."""
        self._relay.terminate()
        self._relay.wait()
        self._cli("terminate-enclave", "--enclave-id", self._id)


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        port: int = sock.getsockname()[1]
        return port


def send(port: int, data: bytes) -> None:
    """One attempt to hand something over; returns when the other end has read it, or is not there."""
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 2) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)


def start(options: argparse.Namespace, image: eif.Image, *, last: bool) -> Guest | Enclave:
    """Boots the image with the backend of the options."""
    memory = options.memory * MIB or image.memory
    if options.backend == "nitro":
        return Enclave(options.image, port=options.port, memory=memory, cpus=image.cpus)
    kind, _ = BACKENDS[options.backend]
    locked = packages.read_lock(options.lock)
    return kind(image, port=options.port, outbound=not last, memory=memory, lock=locked)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="run.py", description="Runs the image of a stage.")
    options.add_argument("image", type=Path, metavar="IMAGE", help="as build.py made it")
    options.add_argument("--backend", choices=(*BACKENDS, "nitro"), required=True)
    options.add_argument("--manifest", type=Path, required=True, metavar="FILE", help="the pipeline's, for the stage")
    options.add_argument(
        "--places", type=Path, metavar="FILE", help="where the stages are (default: X.places.json for X.json)"
    )
    options.add_argument(
        "--mock-key", type=Path, metavar="FILE", help="the stage's, for an image that accepts mock evidence"
    )
    options.add_argument("--port", type=int, required=True, metavar="N", help="of this machine, for the stage")
    options.add_argument(
        "--memory", type=int, default=0, metavar="MIB", help="of the guest (default: what the image asks for)"
    )
    options.add_argument("--lock", type=Path, default=packages.LOCK, metavar="FILE", help="of user-mode Linux")
    options.add_argument("--until-eof", action="store_true", help="end when standard input does")
    options.add_argument("--timeout", type=float, metavar="S", help="seconds until the stage must serve")
    return options


def run(options: argparse.Namespace) -> None:
    """Runs the image until a signal comes, standard input ends if that counts, or the guest ends."""
    image = eif.read_file(options.image)
    manifest = Manifest.parse(options.manifest.read_bytes())
    places = read_file(options.places or addresses.beside(options.manifest), addresses.MAX_PLACES)
    addresses.read(places, len(manifest.stages))
    index = json.loads(image.metadata or b"{}").get("CustomMetadata", {}).get("stage", 0)
    mock_key = read_private(options.mock_key, MAX_FILE) if options.mock_key else None
    guest = start(options, image, last=index == len(manifest.stages) - 1)
    try:
        timeout = options.timeout or BACKENDS.get(options.backend, (0, 120))[1]
        guest.provision(options.manifest.read_bytes(), places, mock_key, timeout)
        print(f"serving stage {index} on port {options.port}", flush=True)
        if options.until_eof:
            threading.Thread(target=_end_with_stdin, name="standard input", daemon=True).start()
        guest.wait()
    finally:
        guest.close()


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(options)
    except (RunError, SlirpError, PackageError, eif.EifError, ManifestError, UsageError, DocumentError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"run.py: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
