"""Builds the image of one stage: an EIF file with kernel, command line, boot ramdisk and application ramdisk.

    python scripts/image/build.py --manifest pipeline.json --index 0 --allow-mock -o stage-0.eif > stage-0.json
    python scripts/image/build.py --update-lock

The boot ramdisk holds process 1 and the kernel's modules; it is the same for every stage. The application ramdisk holds
the interpreter, the wheels, the three packages and the stage's own tensors, under rootfs/, and the command that starts
the stage. Of the manifest only the stage's layers, the config and the weights' digest go in, because the manifest pins
what the image measures to: it is handed in at boot, and so are the places. Standard output gets a description with the
measurements, which `minigpt plan --pcrs` reads. The same checkout, lock file and options give the same bytes.

Layouts: `plain` has Debian's kernel and our own process 1, for qemu, user-mode Linux and confidential virtual machines;
`nitro` has the kernel, command line, init and nsm.ko that AWS ships with nitro-cli (--blobs), for an enclave; `docker`
is no image but a folder with a Dockerfile, for `docker build` and `nitro-cli build-enclave`.
"""

import argparse
import datetime
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whatever is installed

import minigpt
from attest.document import write_file
from attest.measure import measure
from minigpt.checkpoint import sources, weights
from minigpt.engine.config import tensor_shapes
from minigpt.errors import CheckpointError, MiniGPTError, UsageError, WeightsMismatch
from minigpt.protocol import manifest as manifests
from minigpt.protocol.manifest import Manifest, StageEntry
from scripts.image import eif, packages, ramdisk
from scripts.image.packages import PackageError
from scripts.image.ramdisk import Entry, RamdiskError, Tree
from transport.address import Address
from transport.errors import AddressError

LINK_PORT, MANIFEST_PORT, MOCK_KEY_PORT, PLACES_PORT = range(5001, 5005)  # where the stage serves, and is provisioned
NETWORK = "10.0.2.15/24,10.0.2.2"  # what qemu's and libslirp's user-mode networks expect of a guest
MIB = 2**20
CMDLINE = "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on"
ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": "/usr/bin"}
BLOBS = ("bzImage", "cmdline", "init", "nsm.ko")  # of the folder /usr/share/nitro_enclaves/blobs


@dataclass(frozen=True)
class Plan:
    """What an image is built of.

    Args:
        manifest: of it only the stage's layers, the config and the weights' digest count.
        index: the stage.
        folder: the checkpoint.
        lock: the packages.
        allow_mock: the stage accepts mock evidence, and waits for a mock key at boot.
        link: "tcp" or "vsock", where the stage serves and is provisioned.
        network: ADDRESS/PREFIX,GATEWAY of a guest of the plain layout; "" for none.
        blobs: the vendor's folder, for the layout nitro; None for the plain layout.
        endorsements: where the stage asks for its platform's; None if its host hands them over, or it needs none.
    """

    manifest: Manifest
    index: int
    folder: Path
    lock: packages.Lock
    allow_mock: bool = False
    link: str = "tcp"
    network: str = NETWORK
    blobs: Path | None = None
    endorsements: Address | None = None


def build(plan: Plan, cache: Path) -> eif.Image:
    """The image. Raises PackageError, CheckpointError, WeightsMismatch, RamdiskError."""
    application = ramdisk.application(rootfs(plan, cache), command(plan), ENVIRONMENT)
    kernel, cmdline, boot = _plain(plan, cache) if plan.blobs is None else _vendor(plan.blobs)
    size = len(kernel) + len(boot) + len(application)
    memory = max(eif.DEFAULT_MEMORY, -(-4 * size // MIB) * MIB)  # it is in memory packed and unpacked, before it runs
    return eif.Image(kernel, cmdline, (boot, application), metadata=_metadata(plan), memory=memory)


def rootfs(plan: Plan, cache: Path) -> Tree:
    """What a stage consists of, whatever starts it."""
    return own_tensors(plan) | ramdisk.system(plan.lock, cache) | ramdisk.code()


def write_container(plan: Plan, cache: Path, folder: Path) -> None:
    """Writes a folder for `docker build`: the same files as in the other layouts, on top of nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "rootfs.tar", ramdisk.tar(rootfs(plan, cache)))
    settings = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    lines = ["FROM scratch", "ADD rootfs.tar /", f"ENV {settings}", f"CMD {json.dumps(command(plan))}"]
    write_file(folder / "Dockerfile", "".join(f"{line}\n" for line in lines))


def command(plan: Plan) -> list[str]:
    """The image's command: the stage with its index, fixed. What varies, it receives at boot."""
    host = "0.0.0.0" if plan.link == "tcp" else str(2**32 - 1)  # every one that the guest has
    flags = {"--index": plan.index, "--model": f"/{ramdisk.MODEL}"}
    ports = {"--listen": LINK_PORT, "--manifest": MANIFEST_PORT, "--places": PLACES_PORT} | (
        {"--mock-key": MOCK_KEY_PORT} if plan.allow_mock else {}
    )
    flags |= {flag: f"{plan.link}://{host}:{port}" for flag, port in ports.items()}
    flags |= {"--endorsements": plan.endorsements} if plan.endorsements else {}
    words = [str(word) for pair in flags.items() for word in pair]
    return [f"/{ramdisk.PYTHON}", "-IBS", f"/{ramdisk.START}", *words, *(["--allow-mock"] if plan.allow_mock else [])]


def _plain(plan: Plan, cache: Path) -> tuple[bytes, bytes, bytes]:
    (package,) = plan.lock[packages.KERNEL]
    files = {file.path: file.data for file in packages.deb_files(packages.fetch(packages.KERNEL, package, cache))}
    (kernel,) = [data for path, data in files.items() if path.startswith("boot/vmlinuz-")]
    cmdline = f"{CMDLINE} minigpt.network={plan.network}" if plan.network else CMDLINE
    return kernel, cmdline.encode(), ramdisk.boot(files)


def _vendor(blobs: Path) -> tuple[bytes, bytes, bytes]:
    kernel, cmdline, init, nsm = ((blobs / name).read_bytes() for name in BLOBS)
    tree = {"dev": ramdisk.FOLDER, "init": Entry.file(init, executable=True), "nsm.ko": Entry.file(nsm)}
    return kernel, cmdline.strip(), ramdisk.cpio(tree)


def _metadata(plan: Plan) -> bytes:
    """Outside every PCR, for people. No clock of this machine: the same build has the same bytes."""
    (kernel,) = plan.lock[packages.KERNEL]
    lock = json.dumps(
        {group: [vars(package) for package in found] for group, found in plan.lock.items()}, sort_keys=True
    )
    stage = plan.manifest.stages[plan.index]
    epoch = datetime.datetime.fromtimestamp(0, datetime.UTC)
    document = {
        "ImageName": f"minigpt-stage-{plan.index}",
        "ImageVersion": minigpt.__version__,
        "BuildMetadata": {
            "BuildTime": epoch.isoformat(),
            "BuildTool": "minigpt build_image",
            "BuildToolVersion": minigpt.__version__,
            "OperatingSystem": "Debian",
            "KernelVersion": "the vendor's" if plan.blobs else f"{kernel.name} {kernel.version}",
        },
        "DockerInfo": {},
        "CustomMetadata": {
            "model": plan.manifest.model,
            "stage": plan.index,
            "layers": [stage.layers.start, stage.layers.stop],
            "weights_sha256": stage.weights_sha256.hex(),
            "code": measure(ramdisk.ROOT).hex(),
            "lock_sha256": hashlib.sha256(lock.encode()).hexdigest(),
        },
    }
    return json.dumps(document, indent=1).encode()


def own_tensors(plan: Plan) -> Tree:
    """A checkpoint with the stage's own tensors only, their bytes as they are stored.

    Raises:
        CheckpointError: it cannot be read.
        WeightsMismatch: the tensors are not those that the manifest names.
    """
    config, stage = plan.manifest.config, plan.manifest.stages[plan.index]
    stored = {
        name: place for path in sorted(plan.folder.glob("*.safetensors")) for name, place in _tensors(path).items()
    }
    wanted = set(tensor_shapes(config, stage.layers))
    chosen = [name for name in sorted(stored) if name.removeprefix("transformer.") in wanted]
    if not any(name.endswith("wte.weight") for name in chosen) and "wte.weight" in wanted:
        chosen.append("lm_head.weight")  # of tied tensors a writer may keep either
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    for name in chosen:
        path, offset, fields, size = stored[name]
        begin = sum(map(len, parts))
        header[name] = fields | {"data_offsets": [begin, begin + size]}
        with path.open("rb") as file:
            file.seek(offset)
            parts.append(file.read(size))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join([len(text).to_bytes(8, "little"), text, *parts])
    with tempfile.TemporaryDirectory() as made:
        write_file(Path(made, weights.SINGLE), data)
        loaded = weights.load(Path(made), config, stage.layers)
    _check_digest(loaded.digest, stage, plan.folder)
    return {f"{ramdisk.MODEL}/{weights.SINGLE}": Entry.file(data)}


def _tensors(path: Path) -> dict[str, tuple[Path, int, dict[str, Any], int]]:
    """Where each tensor of a safetensors file lies: file, offset, its fields in a header, size. Bytes.

    What it says is not checked here: the chosen tensors are read again with `weights.load`, and their digest compared.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100 * 2**20)))
        header.pop("__metadata__", None)
        return {
            name: (path, 8 + length + entry["data_offsets"][0], {"dtype": entry["dtype"], "shape": entry["shape"]},
                   entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a sound safetensors file ({type(error).__name__})") from None


def _check_digest(digest: bytes, stage: StageEntry, folder: Path) -> None:
    if digest != stage.weights_sha256:
        raise WeightsMismatch(
            f"weights sha256 {digest.hex()}, the manifest wants {stage.weights_sha256.hex()}: "
            f"{folder} is another checkpoint, or damaged"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(prog="build.py", description="Builds the image of one stage.")
    options.add_argument("--manifest", metavar="FILE", help="the pipeline's: layers, config and weights' digest count")
    options.add_argument("--index", type=int, default=0, metavar="I", help="which stage, from 0")
    options.add_argument("--model", metavar="DIR|tiny|HUB_ID", help="the checkpoint (default: the manifest's)")
    options.add_argument("-o", "--output", metavar="FILE", help="where to write the image; a folder for docker")
    options.add_argument(
        "--layout", choices=("plain", "nitro", "docker"), default="plain", help="whose kernel and init (default: plain)"
    )
    options.add_argument("--blobs", type=Path, metavar="DIR", help="of layout nitro: the vendor's folder with "
                         "bzImage, cmdline, init and nsm.ko (/usr/share/nitro_enclaves/blobs)")  # fmt: skip
    options.add_argument(
        "--link", choices=("tcp", "vsock"), help="where it serves (default: tcp in the plain layout, else vsock)"
    )
    options.add_argument("--network", default=NETWORK, metavar="ADDRESS/PREFIX,GATEWAY",
                         help=f"of a guest of the plain layout (default: {NETWORK})")  # fmt: skip
    options.add_argument("--allow-mock", action="store_true", help="make an image that accepts mock evidence, which "
                         "proves nothing about hardware, and receives a mock key at boot")  # fmt: skip
    options.add_argument("--endorsements", metavar="ADDR", help="where the stage asks for its platform's endorsements, "
                         "as `minigpt endorsements` has them (default: the host hands them over)")  # fmt: skip
    options.add_argument("--lock", type=Path, default=packages.LOCK, metavar="FILE", help="the lock file")
    options.add_argument(
        "--cache", type=Path, default=packages.cache_folder(), metavar="DIR", help="of fetched packages"
    )
    options.add_argument("--update-lock", action="store_true", help="first lock what the archives have today")
    return options


def run(options: argparse.Namespace) -> None:
    """Does what the options say."""
    if options.update_lock:
        packages.update(options.lock, options.cache)
        print(f"locked anew: {options.lock}; images will measure to something else", file=sys.stderr)
    if options.manifest is None and options.update_lock:
        return
    if options.manifest is None or options.output is None:
        raise UsageError("give --manifest and --output, or --update-lock")
    if (options.layout == "nitro") != (options.blobs is not None):
        raise UsageError("--layout nitro and --blobs belong together: the kernel and init come with nitro-cli")
    _, manifest = manifests.load(options.manifest)
    if not 0 <= options.index < len(manifest.stages):
        raise UsageError(f"--index {options.index}, but the manifest has {len(manifest.stages)} stages, from 0 on")
    checkpoint = sources.find(options.model or manifest.model, None if options.model else manifest.revision)
    plan = Plan(
        manifest=manifest,
        index=options.index,
        folder=checkpoint.folder,
        lock=packages.read_lock(options.lock),
        allow_mock=options.allow_mock,
        link=options.link or ("tcp" if options.layout == "plain" else "vsock"),
        network=options.network,
        blobs=options.blobs,
        endorsements=Address.parse(options.endorsements) if options.endorsements else None,
    )
    if options.layout == "docker":
        write_container(plan, options.cache, Path(options.output))
        print(f"wrote {options.output}/Dockerfile and rootfs.tar", file=sys.stderr)
        return
    image = build(plan, options.cache)
    data = eif.write(image)
    write_file(options.output, data)
    print(json.dumps(eif.describe(image), indent=2))
    print(f"wrote {options.output}, {len(data) / 1e6:.1f} MB", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(argv)
    try:
        run(options)
    except (PackageError, RamdiskError, eif.EifError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    except (MiniGPTError, AddressError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"build.py: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
