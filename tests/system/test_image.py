"""Images of stages: the same bytes at every build, only what the stage needs, and they boot and serve.

The packages are locked afresh for these tests, so that the way to a new lock file does not rot.
"""

import contextlib
import json
import lzma
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import guests
import pytest
from made import SMALL, random_tensors, write
from processes import HOUR, ROOT
from tsm import driver
from tsm import pipeline as platforms

import minigpt
from attest import AttestationError
from attest.measure import measure
from attest.providers.mock import MockKey, MockPins, MockRoot
from minigpt.checkpoint import weights
from minigpt.engine.config import tensor_shapes
from minigpt.errors import StageError, UsageError, WeightsMismatch
from minigpt.launch.plan import split_layers
from minigpt.launch.plan import write as write_manifest
from minigpt.protocol import addresses
from minigpt.protocol.manifest import Manifest
from scripts.image import build as build_image
from scripts.image import eif, packages, ramdisk
from scripts.image import run as run_image
from scripts.image.ramdisk import Entry
from transport.address import Address

SCRIPTS = ROOT / "scripts" / "image"
SITE = "rootfs/usr/lib/python3/dist-packages/"
PROMPT, COUNT = [5, 6, 7], 8


@pytest.fixture(scope="session")
def lock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lock file of today's versions."""
    path = tmp_path_factory.mktemp("lock") / "image.lock"
    try:
        packages.update(path, packages.cache_folder())
    except packages.PackageError as error:
        pytest.skip(f"the packages of an image are not to be had here: {error}")
    return path


class Planned:
    """A pipeline of a small random model: its checkpoint, manifest, keys and images."""

    def __init__(self, where: Path, lock: Path, split: str, *, outside: str = "127.0.0.1") -> None:
        self.where, self.lock = where, lock
        self.folder = write(where / "small", SMALL, random_tensors(SMALL))
        self.layers = split_layers(SMALL.n_layer, split)
        self.root = MockRoot.generate()
        self.ports = [run_image.free_port() for _ in self.layers]
        self.served = [f"tcp://{outside if i else '127.0.0.1'}:{port}" for i, port in enumerate(self.ports)]
        self.bytes = self.manifest(measure(ROOT))
        self.places = addresses.write(self.served, len(self.ports))

    def manifest(self, measurement: bytes) -> bytes:
        return write_manifest(
            config=SMALL, model="small", revision=None, tokenizer_sha256=None, layers=self.layers,
            weights_sha256=[weights.load(self.folder, SMALL, part).digest for part in self.layers],
            pins=[MockPins(self.root.public, frozenset([measurement]))],
        )  # fmt: skip

    def plan(self, index: int, **more: Any) -> build_image.Plan:
        locked = packages.read_lock(self.lock)
        return build_image.Plan(Manifest.parse(self.bytes), index, self.folder, locked, allow_mock=True, **more)

    def build(self, index: int, **more: Any) -> eif.Image:
        return build_image.build(self.plan(index, **more), packages.cache_folder())

    def key(self, index: int) -> bytes:
        return MockKey.generate(self.root, index, int(time.time() * 1000) + HOUR).to_json().encode()

    def guest(self, backend: str, index: int) -> run_image.Guest:
        kind, seconds = run_image.BACKENDS[backend]
        last = index == len(self.layers) - 1
        image = self.build(index)
        locked = packages.read_lock(self.lock)
        guest = kind(image, port=self.ports[index], lock=locked, outbound=not last, memory=512 * 2**20)
        try:
            guest.provision(self.bytes, self.places, self.key(index), seconds)
        except BaseException:
            guest.close()
            raise
        return guest

    def answers(self) -> None:
        """The client accepts the evidence, and gets the tokens of the model in one piece."""
        expected = [token.id for token in minigpt.load(str(self.folder)).generate(PROMPT, max_tokens=COUNT)]
        with minigpt.Pipeline.connect(self.bytes, place={0: self.served[0]}, allow_mock=True) as pipeline:
            reports = pipeline.status()
            assert [report.error for report in reports] == [""] * len(self.layers)
            told = [bytes.fromhex(json.loads(report.evidence)["evidence"])[17:65] for report in reports]
            assert told == [measure(ROOT)] * len(self.layers)  # measured by the guest, of the code in the image
            assert [token.id for token in pipeline.generate(PROMPT, max_tokens=COUNT)] == expected


class Alone(Planned):
    """A pipeline of one stage."""

    def __init__(self, where: Path, lock: Path) -> None:
        super().__init__(where, lock, "4")
        self.image = self.build(0)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, lock: Path) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"), lock)


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory, lock: Path) -> Planned:
    return Planned(tmp_path_factory.mktemp("planned"), lock, "1+3")


@pytest.fixture(scope="session")
def image(planned: Planned) -> eif.Image:
    return planned.build(1)


def unpacked(archive: bytes) -> dict[str, tuple[int, int, bytes]]:
    """The files of a ramdisk (newc), read by hand: name -> mode, modification time, content."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        begin = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        assert fields[2:4] == [0, 0]  # root's
        assert name not in found
        found[name] = (fields[1], fields[5], archive[begin : begin + fields[6]])
        at = (begin + fields[6] + 3) // 4 * 4


@pytest.fixture(scope="session")
def application(image: eif.Image) -> dict[str, tuple[int, int, bytes]]:
    return unpacked(image.ramdisks[1])


def build(planned: Planned, output: Path, *flags: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    pipeline = output.parent / "pipeline.json"
    pipeline.write_bytes(planned.manifest(b"\x05" * 48))
    command = [sys.executable, SCRIPTS / "build.py", "--manifest", pipeline, "--index", 1, "--output", output]
    command += ["--model", planned.folder, "--lock", planned.lock, *flags]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=output.parent, env=os.environ | environment
    )


def test_two_builds_are_the_same_bytes_whatever_the_manifest_pins(
    planned: Planned, image: eif.Image, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        done = build(planned, tmp_path / "second.eif", "--allow-mock", PYTHONHASHSEED="7", TZ="Asia/Tokyo", LC_ALL="C")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "second.eif").read_bytes() == eif.write(image)
    (tmp_path / "second.eif").unlink()  # 100 MB, which pytest would keep
    told = json.loads(done.stdout)["Measurements"]
    assert [told[f"PCR{i}"] for i in range(3)] == [image.pcrs()[i].hex() for i in range(3)]


def test_another_stage_has_the_same_boot_ramdisk_and_another_application(image: eif.Image, alone: "Alone") -> None:
    assert alone.image.pcrs()[1] == image.pcrs()[1]
    assert alone.image.pcrs()[2] != image.pcrs()[2]


def test_an_images_modules_are_its_kernels_and_each_comes_after_those_it_needs(image: eif.Image) -> None:
    at = 0x200 + int.from_bytes(image.kernel[0x20E:0x210], "little")  # kernel documentation, x86/boot: kernel_version
    release = image.kernel[at : image.kernel.index(b" ", at)].decode()
    loaded: list[str] = []
    modules = {name: data for name, (_, _, data) in unpacked(image.ramdisks[0]).items() if name.endswith(".ko")}
    for name in sorted(modules):
        assert name.startswith(f"modules/{release}/{len(loaded):02}-")
        assert f"\0vermagic={release} ".encode() in modules[name]
        needed = re.findall(rb"\0depends=([^\0]*)", modules[name])[0].decode()
        assert set(needed.split(",")) <= {*loaded, ""}
        loaded.append(Path(name).stem.partition("-")[2])
    assert {"virtio_net", "vmw_vsock_virtio_transport", "configfs", "tsm", "sev-guest", "tdx-guest"} <= set(loaded)


def test_an_image_measures_as_its_code(application: dict[str, tuple[int, int, bytes]], tmp_path: Path) -> None:
    for name, (mode, _, data) in application.items():
        if name.startswith(SITE) and mode == 0o100644:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    assert measure(tmp_path / SITE) == measure(ROOT)


def test_an_image_holds_the_stages_own_tensors_only(application: dict[str, tuple[int, int, bytes]]) -> None:
    stored = application["rootfs/model/model.safetensors"][2]
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    names = {name.removeprefix("transformer.") for name in header}
    assert names == set(tensor_shapes(SMALL, range(1, 4)))
    assert not any(name.startswith("h.0.") for name in names)


def test_an_image_is_small_and_holds_nothing_that_varies(
    image: eif.Image, application: dict[str, tuple[int, int, bytes]]
) -> None:
    assert len(eif.write(image)) < 100e6
    assert not [name for name in application if "__pycache__" in name or name.endswith((".pyc", ".key"))]
    assert {time for _, time, _ in application.values()} == {0}
    everything = b"".join(image.ramdisks)
    assert str(ROOT).encode() not in everything


def test_the_stages_index_is_fixed_and_the_mock_only_on_request(
    planned: Planned, application: dict[str, tuple[int, int, bytes]]
) -> None:
    words = application["cmd"][2].decode().splitlines()
    assert words[words.index("--index") + 1] == "1"
    assert "--allow-mock" in words
    plan = build_image.Plan(Manifest.parse(planned.bytes), 1, planned.folder, {}, link="vsock")
    strict = build_image.command(plan)
    assert not {"--allow-mock", "--mock-key", "--endorsements"} & set(strict)
    assert strict[strict.index("--listen") + 1] == "vsock://4294967295:5001"
    assert strict[strict.index("--places") + 1] == "vsock://4294967295:5004"
    endorsed = build_image.command(replace(plan, endorsements=Address.parse("vsock://3:5005")))
    assert [word for word in endorsed if word not in strict] == ["--endorsements", "vsock://3:5005"]


def minigpt_command(*words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "minigpt", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_plan_pins_images_by_their_descriptions_and_nothing_but_an_enclave_serves_them(
    planned: Planned, image: eif.Image, tmp_path: Path
) -> None:
    told = tmp_path / "image.json"
    told.write_text(json.dumps(eif.describe(image)))
    ports = ("--address", "tcp://127.0.0.1:1", "--address", "tcp://127.0.0.1:2")
    plan = ["plan", "--model", planned.folder, "--split", "1+3", *ports, "-o", tmp_path / "nitro.json"]
    assert minigpt_command(*plan, "--pcrs", told, "--pcrs", told).returncode == 0
    pinned = Manifest.parse((tmp_path / "nitro.json").read_bytes())
    assert [stage.pins.pcrs for stage in pinned.stages] == [image.pcrs()] * 2
    client = minigpt_command("generate", "1 2", "--manifest", tmp_path / "nitro.json")  # no --allow-mock is needed
    assert client.returncode != 0
    assert "127.0.0.1:1" in client.stderr  # it is not refused, only not there
    stage = subprocess.run(
        [sys.executable, "-m", "minigpt.stage", "--manifest", tmp_path / "nitro.json", "--index", "0"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert stage.returncode == AttestationError.exit_code
    assert "/dev/nsm" in stage.stderr
    (tmp_path / "nitro.json").unlink()
    mixed = ["--pcrs", "mock", "--pcrs", told, "--root-key", MockRoot.generate().public.hex()]
    assert minigpt_command(*plan, *mixed).returncode == 0
    kinds = [stage.platform.name for stage in Manifest.parse((tmp_path / "nitro.json").read_bytes()).stages]
    assert kinds == ["mock", "nitro"]
    for words in (["--pcrs", "mock", "--pcrs", told], ["--pcrs", told, "--pcrs", told, *mixed[4:]]):
        assert minigpt_command(*plan, *words).returncode == UsageError.exit_code


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"Measurements": {"PCR0": 1}}', '{"Measurements": {"PCR0": "ab"}}', None]
)
def test_a_description_without_registers_is_refused(planned: Planned, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "image.json").write_text(text)
    plan = [
        "plan",
        "--model",
        planned.folder,
        "--stages",
        "1",
        "-o",
        tmp_path / "no.json",
        "--pcrs",
        tmp_path / "image.json",
    ]
    refused = minigpt_command(*plan)
    assert refused.returncode == UsageError.exit_code
    assert "--pcrs" in refused.stderr
    assert not (tmp_path / "no.json").exists()


def test_other_weights_are_refused(planned: Planned, tmp_path: Path) -> None:
    other = write(tmp_path / "other", SMALL, random_tensors(SMALL, seed=1))
    refused = build(planned, tmp_path / "no.eif", "--model", other)
    assert refused.returncode == WeightsMismatch.exit_code
    assert "another checkpoint" in refused.stderr
    assert not (tmp_path / "no.eif").exists()


@pytest.mark.parametrize(("shards", "prefix"), [(0, ""), (3, "transformer.")])
def test_a_checkpoint_in_any_files_gives_the_same_digest(
    planned: Planned, tmp_path: Path, shards: int, prefix: str
) -> None:
    folder = write(tmp_path / "other", SMALL, random_tensors(SMALL), shards=shards, prefix=prefix)
    plan = build_image.Plan(Manifest.parse(planned.bytes), 1, folder, {})
    assert "model/model.safetensors" in build_image.own_tensors(plan)


def test_a_version_that_is_gone_says_what_to_do(lock: Path, tmp_path: Path) -> None:
    gone = packages.Package("libffi8", "0.0.1-none", "ab" * 32)
    with pytest.raises(packages.PackageError, match="--update-lock"):
        packages.fetch("interpreter", gone, tmp_path)
    with pytest.raises(packages.PackageError, match="--update-lock"):
        packages.fetch(packages.WHEELS, packages.Package("msgpack", "0.0.0.1", "ab" * 32), tmp_path)


def test_a_package_with_another_hash_is_refused(lock: Path, tmp_path: Path) -> None:
    (locked,) = [package for package in packages.read_lock(lock)["interpreter"] if package.name == "libffi8"]
    other = packages.Package(locked.name, locked.version, "ab" * 32)
    with pytest.raises(packages.PackageError, match="the lock file wants abab"):
        packages.fetch("interpreter", other, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lock_file_names_no_host_and_what_is_needed() -> None:
    text = packages.LOCK.read_text()
    assert "://" not in text
    locked = packages.read_lock()
    assert set(locked) == set(packages.GROUPS)
    for group, names in packages.GROUPS.items():
        assert len(locked[group]) == len(names)
        assert group == packages.KERNEL or [package.name for package in locked[group]] == names


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "minigpt-image-lock-1", "kernel": [{"name": 1}]}'])
def test_what_is_no_lock_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with pytest.raises(packages.PackageError, match="--update-lock"):
        packages.read_lock(tmp_path / "lock")


def test_the_nitro_layout_is_the_vendors(planned: Planned, image: eif.Image, tmp_path: Path) -> None:
    vendor = {"bzImage": b"a kernel", "cmdline": b"reboot=k panic=30\n", "init": b"an init", "nsm.ko": b"a module"}
    for name, data in vendor.items():
        (tmp_path / name).write_bytes(data)
    made = planned.build(1, blobs=tmp_path, link="vsock")
    assert (made.kernel, made.cmdline) == (b"a kernel", b"reboot=k panic=30")
    boot = {name: (mode, data) for name, (mode, _, data) in unpacked(made.ramdisks[0]).items()}
    assert boot == {"dev": (0o40755, b""), "init": (0o100755, b"an init"), "nsm.ko": (0o100644, b"a module")}
    names = {name.split("/")[0] for name in unpacked(made.ramdisks[1])}
    assert names == {"cmd", "env", "rootfs"}


@contextlib.contextmanager
def running(alone: Alone, backend: str) -> Iterator["subprocess.Popen[str]"]:
    """An image run by the tool, until the block ends."""
    paths = {name: alone.where / name for name in ("image.eif", "pipeline.json", "pipeline.places.json", "key.json")}
    files = (eif.write(alone.image), alone.bytes, alone.places, alone.key(0))
    for path, data in zip(paths.values(), files, strict=True):
        path.write_bytes(data)
    command = [sys.executable, SCRIPTS / "run.py", paths["image.eif"], "--backend", backend, "--lock", alone.lock]
    command += ["--manifest", paths["pipeline.json"], "--mock-key", paths["key.json"], "--port", alone.ports[0]]
    with (
        (alone.where / "console").open("w+") as console,
        subprocess.Popen(
            [*map(str, command), "--memory", "512", "--until-eof"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=console, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            assert said.startswith("serving stage 0"), (alone.where / "console").read_text()
            yield process
        finally:
            process.stdin.close()
            assert process.wait(30) == 0
            paths["image.eif"].unlink()


needs_uml = pytest.mark.skipif(
    run_image.cpu_too_new_for_uml(), reason="user-mode Linux does not run on this CPU: it has AMX"
)


@needs_uml
def test_an_image_boots_in_user_mode_linux_and_answers_an_attested_client(alone: Alone) -> None:
    with running(alone, "uml"):
        alone.answers()
    with pytest.raises(StageError, match="cannot be reached"):  # the guest has ended with the tool
        minigpt.Pipeline.connect(alone.bytes, place={0: alone.served[0]}, allow_mock=True)


@needs_uml
def test_a_stage_that_refuses_to_start_is_told_from_outside(alone: Alone) -> None:
    kind, seconds = run_image.BACKENDS["uml"]
    locked = packages.read_lock(alone.lock)
    guest = kind(alone.image, port=run_image.free_port(), lock=locked, memory=512 * 2**20)
    with guest, pytest.raises(run_image.RunError, match=r"does not take what it was sent: .*format is missing"):
        guest.provision(b"{}", alone.places, alone.key(0), seconds)


LOOK = """
import json, os, sys
from pathlib import Path
status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
places = [Path(folder, name) for top in ("/dev", "/sys") for folder, _, names in os.walk(top) for name in names]
seen = {
    "rights": [status[name].split() for name in ("Uid", "Groups", "CapEff", "CapBnd", "NoNewPrivs")],
    "mounts": [line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines()],
    "writable": [str(place) for place in places if os.access(place, os.W_OK)],
    "readable": [str(place) for place in places if os.access(place, os.R_OK)],
    "sys": [str(place) for place in Path("/sys").rglob("*")],
    "locked": Path("/proc/sys/kernel/modules_disabled").read_text(),
}
if seen["sys"]:
    sys.path.insert(0, "/usr/lib/python3/dist-packages")
    from attest import tsm
    seen["answers"] = [data.hex() for data in tsm.report(bytes(range(64)), "sev_guest")]
print("minigpt look: " + json.dumps(seen), flush=True)
"""
DEVICES = {"/dev/" + name for name in ("full", "null", "ptmx", "random", "tty", "urandom", "zero")}  # anybody's


def boot(lock: Path, instead: bytes | None = None) -> bytes:
    """The boot ramdisk, with another driver in place of SEV-SNP's."""
    (kernel,) = packages.read_lock(lock)[packages.KERNEL]
    archive = packages.fetch(packages.KERNEL, kernel, packages.cache_folder())
    files = {file.path: file.data for file in packages.deb_files(archive)}
    if instead is not None:
        (path,) = (path for path in files if path.endswith("/sev-guest.ko.xz"))
        files[path] = lzma.compress(instead)
    return ramdisk.boot(files)


def look(alone: Alone, ramdisk_: bytes, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a stage's process sees in a guest of qemu."""
    plan = alone.plan(0)
    tree = build_image.rootfs(plan, packages.cache_folder())
    tree[f"{ramdisk.SITE}/minigpt/launch/isolated.py"] = Entry.file(LOOK.encode())
    application = ramdisk.application(tree, build_image.command(plan), build_image.ENVIRONMENT)
    image = replace(alone.image, ramdisks=(ramdisk_, application))
    kind, seconds = run_image.BACKENDS["qemu"]
    guest = kind(image, port=run_image.free_port(), lock=packages.read_lock(alone.lock), memory=512 * 2**20)
    with guest, pytest.raises(run_image.RunError, match="the stage ended with code 0"):
        guest.provision(b"", alone.places, None, seconds)
    told = re.findall(r"minigpt look: (.*)", capfd.readouterr().err)
    found: dict[str, Any] = json.loads(told[0])
    return found


@pytest.fixture(scope="session")
def made_driver(lock: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    (kernel,) = packages.read_lock(lock)[packages.KERNEL]
    table, where = guests.full_table(guests.living()), tmp_path_factory.mktemp("driver")
    try:
        return driver.build(kernel, where, guests.plain(), table)
    except driver.NoDriver as error:
        pytest.skip(f"a driver for the image's kernel cannot be built here: {error}")
    finally:
        shutil.rmtree(where)  # 100 MB, which pytest would keep


def snp_image(alone: Alone, boot_ramdisk: bytes) -> tuple[eif.Image, bytes]:
    """An image that takes no mock evidence, and a manifest that pins SNP's for its stage."""
    manifest = write_manifest(
        config=SMALL, model="small", revision=None, tokenizer_sha256=None, layers=alone.layers,
        weights_sha256=[weights.load(alone.folder, SMALL, alone.layers[0]).digest],
        pins=[platforms.pins("snp", 0).pins],
    )  # fmt: skip
    image = build_image.build(replace(alone.plan(0), allow_mock=False), packages.cache_folder())
    return replace(image, ramdisks=(boot_ramdisk, image.ramdisks[1])), manifest


@pytest.fixture
def nitro_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the vendor's tool, which writes down how it was called. It starts no enclave."""
    tool, calls = tmp_path / "bin" / "nitro-cli", tmp_path / "calls"
    tool.parent.mkdir()
    started = json.dumps({"EnclaveID": "i-1-enc2", "EnclaveCID": 2**31, "State": "RUNNING"})
    tool.write_text(f"#!/bin/sh\necho \"$@\" >> '{calls}'\necho '{started}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return calls


def test_an_enclave_that_cannot_be_reached_is_ended(nitro_cli: Path) -> None:
    enclave = run_image.Enclave(Path("stage.eif"), port=run_image.free_port(), memory=2**30, cpus=2)
    with pytest.raises(run_image.RunError, match="vsock port 5002"):
        enclave.provision(b"{}", b"{}", None, timeout=0.1)
    enclave.close()
    assert nitro_cli.read_text().splitlines() == [
        "run-enclave --eif-path stage.eif --memory 1024 --cpu-count 2",
        "terminate-enclave --enclave-id i-1-enc2",
    ]


@pytest.mark.parametrize(
    ("script", "told"), [("echo nothing", "wanted JSON"), ("echo {}", "EnclaveCID"), ("echo E35 >&2; exit 1", "E35")]
)
def test_what_the_vendors_tool_refuses_is_passed_on(nitro_cli: Path, tmp_path: Path, script: str, told: str) -> None:
    (tmp_path / "bin" / "nitro-cli").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(run_image.RunError, match=told):
        run_image.Enclave(Path("stage.eif"), port=1, memory=2**30, cpus=2)


@pytest.mark.skipif(shutil.which("buildah") is None or os.geteuid() != 0, reason="needs buildah, and root to run it")
def test_a_container_by_the_dockerfile_serves(alone: Alone, tmp_path: Path) -> None:
    folder = tmp_path / "context"
    build_image.write_container(alone.plan(0), packages.cache_folder(), folder)
    told = (folder / "Dockerfile").read_text()
    words = json.loads(told.partition("CMD ")[2])
    ports = {"5001": alone.ports[0]} | {port: run_image.free_port() for port in ("5002", "5003", "5004")}
    for port, free in ports.items():  # it shares the host's network here, where the image's own ports may be taken
        words = [word.replace(f"0.0.0.0:{port}", f"127.0.0.1:{free}") for word in words]
    environment = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
    buildah = ["buildah", "--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "runroot")]
    try:
        subprocess.run([*buildah, "bud", "--quiet", "--tag", "stage", str(folder)], env=environment, check=True)
        made = subprocess.check_output([*buildah, "from", "stage"], env=environment, text=True).strip()
        with subprocess.Popen(
            [*buildah, "run", made, "--", *words, "--until-eof"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            while not select.select([process.stdout], [], [], 0.2)[0]:
                run_image.send(ports["5002"], alone.bytes)
                run_image.send(ports["5004"], alone.places)
                run_image.send(ports["5003"], alone.key(0))
            assert process.stdout.readline().startswith(b"stage 0 ready")
            alone.answers()
            process.stdin.close()
            assert process.wait(30) == 0
    finally:
        shutil.rmtree(tmp_path)


@needs_uml
def test_the_documents_commands_run(lock: Path, tmp_path: Path) -> None:
    """Those of docs/deployment.md marked `sh`, one after the other, in an empty folder."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"sh", "text"}
    script = "".join(block for kind, block in blocks if kind == "sh")
    script = re.sub(
        r'(scripts/image/(build|run)\.py")', rf'\1 --lock "{lock}"', script
    )  # of today, as in all tests here
    (tmp_path / "commands").mkdir()
    for command, module in (("minigpt", " -m minigpt"), ("python", "")):
        (tmp_path / "commands" / command).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (tmp_path / "commands" / command).chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "checkout": str(ROOT)}
    environment["PATH"] = f"{tmp_path / 'commands'}:{environment['PATH']}"
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Tokyo" in done.stdout
    finally:
        for made in tmp_path.glob("*.eif"):
            made.unlink()


needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"
)


@pytest.mark.slow
@needs_qemu
def test_an_image_boots_in_qemu_with_its_own_kernel(alone: Alone) -> None:
    with running(alone, "qemu"):
        alone.answers()


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("uml", marks=needs_uml), pytest.param("qemu", marks=needs_qemu)])
def test_two_guests_are_a_pipeline_with_the_models_own_tokens(backend: str, tmp_path: Path, lock: Path) -> None:
    pipeline = Planned(tmp_path, lock, "2+2", outside="10.0.2.2")
    with pipeline.guest(backend, 1), pipeline.guest(backend, 0):
        pipeline.answers()


@pytest.mark.parametrize(
    "backend",
    [pytest.param("uml", marks=needs_uml), pytest.param("qemu", marks=[needs_qemu, pytest.mark.slow])],
)
def test_a_stage_says_what_its_machine_lacks_for_evidence(alone: Alone, backend: str) -> None:
    image, manifest = snp_image(alone, alone.image.ramdisks[0])
    kind, seconds = run_image.BACKENDS[backend]
    locked = packages.read_lock(alone.lock)
    guest = kind(image, port=run_image.free_port(), lock=locked, memory=512 * 2**20)
    lacks = (
        "wanted /sys/kernel/config/tsm/report/minigpt, .* or /dev/sev-guest: is this an SNP guest.*ended with code 3"
    )
    with guest, pytest.raises(run_image.RunError, match=lacks):
        guest.provision(manifest, alone.places, None, seconds)


@pytest.mark.slow
@needs_qemu
def test_a_machine_that_cannot_report_gives_a_stage_no_device(
    alone: Alone, lock: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = look(alone, boot(lock), capfd)
    nobody = ["65534"] * 4
    assert seen["rights"] == [nobody, [], ["0" * 16], ["0" * 16], ["1"]]
    assert [place for place, *_ in seen["mounts"]] == ["/", "/proc", "/dev"]
    assert set(seen["writable"]) == DEVICES
    assert seen["sys"] == []
    assert seen["locked"] == "1\n"


@pytest.mark.slow
@needs_qemu
def test_a_machine_that_reports_gives_a_stage_one_file_to_ask_with(
    alone: Alone, lock: Path, made_driver: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = look(alone, boot(lock, made_driver), capfd)
    assert [place for place, *_ in seen["mounts"]] == ["/", "/proc", "/dev", "/sys/kernel/config"]
    assert seen["mounts"][-1][1:] == ["configfs", "rw,nosuid,nodev,noexec,relatime"]
    folder = "/sys/kernel/config/tsm/report/minigpt/"
    assert set(seen["writable"]) == DEVICES | {folder + "inblob"}
    assert {folder + name for name in ("provider", "generation", "outblob", "auxblob")} <= set(seen["readable"])
    report, table = map(bytes.fromhex, seen["answers"])
    assert report == guests.plain()[:0x50] + bytes(range(64)) + guests.plain()[0x90:]
    assert table == guests.full_table(guests.living())


@pytest.mark.slow
@needs_qemu
def test_a_stage_in_an_image_asks_the_kernel_for_its_report(alone: Alone, lock: Path, made_driver: bytes) -> None:
    image, manifest = snp_image(alone, boot(lock, made_driver))
    kind, seconds = run_image.BACKENDS["qemu"]
    guest = kind(image, port=run_image.free_port(), lock=packages.read_lock(lock), memory=512 * 2**20)
    unsigned = f"the VCEK of this report is missing; put https://.*/Milan/{guests.CHIP.hex()}"  # no key made it
    with guest, pytest.raises(run_image.RunError, match=unsigned):
        guest.provision(manifest, alone.places, None, seconds)
