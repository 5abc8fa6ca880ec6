"""The files of deploy/: each is read as the engine that it is written for reads it, and what it starts is started.

As processes, in every run; in containers where there is buildah (slow). The names of services and pods are addresses on
loopback here, one each, as each of them has an address of its own there.
"""

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, eventually

from attest.measure import measure
from minigpt.client.pipeline import Pipeline

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
PROMPT = "The capital of France is"
PACKAGES = ("attest", "minigpt", "transport")


@dataclass(eq=False)
class Service:
    """One container, as an engine would start it.

    Attributes:
        mounts: what lies where in it, besides its image; it may be read only, or a file.
        probe: the command that tells whether it is ready.
    """

    command: list[str]
    user: str = "65534:65534"
    mounts: dict[str, Path] = field(default_factory=dict)
    probe: list[str] = field(default_factory=list)


class Processes:
    """Runs services as processes of this machine: paths and names are replaced by those that stand for them here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hosts: dict[str, str] = {}
        self._packages = packages(folder / "packages")
        self._shims = folder / "bin"
        self._shims.mkdir()
        for name, module in (("python3", ""), ("minigpt", "-m minigpt")):
            (self._shims / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            (self._shims / name).chmod(0o755)
        self._roots: dict[Service, Path] = {}
        self._running: list[subprocess.Popen[str]] = []

    def meet(self, hosts: dict[str, str]) -> None:
        """The names by which the services to be started find each other, and their addresses."""
        self._hosts = hosts

    def start(self, service: Service) -> subprocess.Popen[str]:
        root = self._root(service)
        environment = {**os.environ, "PYTHONPATH": str(self._packages), "PATH": f"{self._shims}:{os.environ['PATH']}"}
        process = subprocess.Popen(
            self._here(service.command, root),
            env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._running.append(process)
        return process

    def ready(self, service: Service) -> bool:
        command = self._here(service.probe, self._root(service))
        return subprocess.run(command, check=False).returncode == 0

    def _root(self, service: Service) -> Path:
        """A folder in which lies what the service sees in its own root folder."""
        if service not in self._roots:
            root = self._roots[service] = self._folder / f"root-{len(self._roots)}"
            (root / "tmp").mkdir(parents=True)
            (root / "opt").mkdir()
            (root / "opt" / "minigpt").symlink_to(self._packages)
            for place, what in service.mounts.items():
                (root / place[1:]).parent.mkdir(exist_ok=True)
                (root / place[1:]).symlink_to(what)
        return self._roots[service]

    def _here(self, command: list[str], root: Path) -> list[str]:
        words = [re.sub(r"(?<![\w./])/(?=opt/|tmp/|pipeline/|key)", f"{root}/", word) for word in command]
        for name, address in self._hosts.items():
            words = [word.replace(name, address) for word in words]
        first = str(self._shims / words[0])
        return [first if os.path.exists(first) else words[0], *words[1:]]

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()


class Containers:
    """Runs services in containers of the Containerfile's image, without isolating networks, by buildah."""

    def __init__(self, folder: Path) -> None:
        """Makes the image."""
        self._environment = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
        self._buildah = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._hosts: list[str] = []
        self._made: dict[Service, str] = {}
        self._running: list[subprocess.Popen[str]] = []
        base = str(folder / "base")
        words = ["debootstrap", "--variant=minbase", "--include=python3,python3-pip,ca-certificates", "bookworm", base]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        scratch = self._run("from", "scratch")
        self._run("copy", "--quiet", scratch, base, "/")
        self._run("commit", "--quiet", scratch, "base")
        options = [f"--env={name}" for name in os.environ if name.startswith("PIP_")]  # as the caller's pip is set up
        if certificates := os.environ.get("PIP_CERT"):
            options.append(f"--volume={certificates}:{certificates}:ro")
        file = str(DEPLOY / "Containerfile")
        self._run("bud", "--quiet", "--build-arg=BASE=base", *options, "-t", "minigpt", "-f", file, str(ROOT))

    def meet(self, hosts: dict[str, str]) -> None:
        self._hosts = [f"--add-host={name}:{address}" for name, address in hosts.items()]

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._buildah, *words], env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _container(self, service: Service) -> str:
        if service not in self._made:
            self._made[service] = self._run("from", *self._hosts, "minigpt")
        return self._made[service]

    def _command(self, service: Service, command: list[str]) -> list[str]:
        volumes = [f"--volume={what}:{place}" for place, what in service.mounts.items()]
        options = [f"--user={service.user}", "--cap-drop=ALL", *volumes]
        return [*self._buildah, "run", *options, self._container(service), "--", *command]

    def start(self, service: Service) -> subprocess.Popen[str]:
        for what in service.mounts.values():
            os.chown(what, 65534, 65534)
        command = self._command(service, service.command)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=self._environment, start_new_session=True, **pipes)
        self._running.append(process)
        return process

    def ready(self, service: Service) -> bool:
        command = self._command(service, service.probe)
        return subprocess.run(command, env=self._environment, capture_output=True).returncode == 0

    def close(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        self._run("rm", "--all")  # what is mounted cannot be removed


Engine = Processes | Containers


def packages(folder: Path) -> Path:
    """As `pip install --target` leaves them: ours, and what they need."""
    folder.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    import numpy

    for path in Path(numpy.__file__).parents[1].iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


NEEDS_BUILDAH = pytest.mark.skipif(
    not (shutil.which("buildah") and shutil.which("debootstrap")) or os.geteuid() != 0,
    reason="needs buildah and debootstrap, and root to run them",
)


@pytest.fixture(scope="module", params=[Processes, pytest.param(Containers, marks=[pytest.mark.slow, NEEDS_BUILDAH])])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    try:
        with contextlib.closing(request.param(folder)) as made:
            yield made
    finally:
        shutil.rmtree(folder)  # an image is large


def loopback(*names: str) -> dict[str, str]:
    """An address of its own for each, at which port 5001 is free."""
    hosts = {}
    for name in names:
        while True:
            address = ".".join(str(random.randint(2, 250)) for _ in range(3))
            with socket.socket() as sock, contextlib.suppress(OSError):
                sock.bind((f"127.{address}", 5001))
                hosts[name] = f"127.{address}"
                break
    return hosts


def serves(engine: Engine, service: Service) -> None:
    process = engine.start(service)
    assert eventually(lambda: engine.ready(service) or process.poll() is not None)
    assert process.poll() is None, process.communicate()


def ends(process: subprocess.Popen[str], seconds: float = 120.0) -> str:
    """What a service says that ends by itself, in order."""
    said, log = process.communicate(timeout=seconds)
    assert process.returncode == 0, log
    return said


def composed(volumes: Path) -> dict[str, Service]:
    """The services of compose.yaml, with their volumes in this folder."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: it comes with the extra check")
    read = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = {}
    for name, told in read["services"].items():
        mounts = {}
        for volume in told["volumes"]:
            source, place, *mode = volume.split(":")
            assert source in read["volumes"]
            assert mode in ([], ["ro"])
            (volumes / source).mkdir(exist_ok=True)
            mounts[place] = volumes / source
        assert told["read_only"] is True
        assert told["cap_drop"] == ["ALL"]
        probe = told.get("healthcheck", {"test": ["CMD"]})["test"][1:]
        services[name] = Service([word.replace("$$", "$") for word in told["command"]], mounts=mounts, probe=probe)
    return services


def test_the_services_of_compose_give_a_text(engine: Engine, tmp_path: Path) -> None:
    services = composed(tmp_path)
    engine.meet(loopback("stage-0", "stage-1"))
    ends(engine.start(services["plan"]))
    ends(engine.start(services["plan"]))  # as it does each time: it keeps what there is
    for name in ("stage-0", "stage-1"):
        serves(engine, services[name])
    assert ends(engine.start(services["client"])).startswith(" Paris")


@pytest.mark.parametrize("version", ["1.33", "1.35", "1.37"])
def test_the_files_for_kubernetes_are_what_it_wants(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is in the extra check")
    listed = manifests("kustomization.yaml")[0]["resources"]
    assert sorted(listed) == sorted(path.name for path in KUBERNETES.glob("*.yaml") if path.stem != "kustomization")
    objects = [each for name in listed for each in manifests(name)]
    for each in objects:
        validate.validate(each, version, strict=True)
    objects[-1]["spec"]["sometimes"] = True
    with pytest.raises(validate.ValidationError):
        validate.validate(objects[-1], version, strict=True)


def manifests(name: str) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: it comes with the extra check")
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def pod(ordinal: int, address: str, sources: dict[str, Path]) -> Service:
    """What a kubelet makes of the StatefulSet for one of its pods.

    Args:
        sources: the files of the ConfigMap, and those of all Secrets, by name.
    """
    spec = manifests("statefulset.yaml")[0]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    name = f"minigpt-{ordinal}"
    facts = {
        "metadata.name": name,
        "metadata.labels['apps.kubernetes.io/pod-index']": str(ordinal),
        "status.podIP": address,
    }
    values = {each["name"]: facts[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in container["env"]}

    def expanded(text: str) -> str:
        return re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text)

    volumes = {each["name"]: each for each in spec["volumes"]}
    mounts = {}
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        if "emptyDir" not in volume:
            whole = sources["configmap" if "configMap" in volume else "secrets"]
            mounts[mount["mountPath"]] = whole / expanded(mount["subPathExpr"]) if "subPathExpr" in mount else whole
    user = f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
    command = [*container["command"], *map(expanded, container["args"])]
    assert container["startupProbe"]["exec"] == container["readinessProbe"]["exec"]
    return Service(command, user, mounts, container["readinessProbe"]["exec"]["command"])


def test_the_pods_of_kubernetes_give_a_text(engine: Engine, tmp_path: Path) -> None:
    hosts = loopback("minigpt-0.minigpt", "minigpt-1.minigpt")
    sources = {"configmap": tmp_path / "configmap", "secrets": tmp_path / "secrets", "client": tmp_path / "client"}
    for folder in sources.values():
        folder.mkdir()
    engine.meet(hosts)
    kept = manifests("kustomization.yaml")[0]
    files = {
        source: name for each in kept["secretGenerator"] for name, source in (file.split("=") for file in each["files"])
    }
    script = """
        root=$(python3 -m attest keygen -o /keys/root.json)
        for i in 0 1; do python3 -m attest keygen --root /keys/root.json --stage $i -o /keys/stage-$i.key; done
        minigpt plan --split 6+6 --root-key "$root" -o /pipeline/pipeline.json \\
            --address tcp://minigpt-0.minigpt:5001 --address tcp://minigpt-1.minigpt:5001"""
    keys = tmp_path / "keys"
    keys.mkdir()
    planned = Service(["sh", "-euc", script], mounts={"/pipeline": sources["configmap"], "/keys": keys})
    ends(engine.start(planned))
    for source, name in files.items():
        (keys / source).rename(sources["secrets"] / name)
    for ordinal, address in enumerate(hosts.values()):
        serves(engine, pod(ordinal, address, sources))
    words = ["minigpt", "generate", PROMPT, "--manifest", "/pipeline/pipeline.json", "--allow-mock"]
    client = Service(words, mounts={"/pipeline": sources["configmap"]})
    assert ends(engine.start(client)).startswith(" Paris")


def test_a_pod_may_write_nothing_and_has_no_rights() -> None:
    spec = manifests("statefulset.yaml")[0]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for suffix in ("service", "socket"):
        shutil.copy(DEPLOY / f"minigpt-stage@.{suffix}", tmp_path / f"minigpt-stage@0.{suffix}")
    words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
    done = subprocess.run(
        [*words, *map(str, tmp_path.iterdir())], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


class Unit:
    """The service of deploy/, started as systemd would: with its socket, its credentials, and a socket to report to."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        model = write(folder / "small", SMALL, random_tensors(SMALL))
        address = f"tcp://127.0.0.1:{self.socket.getsockname()[1]}"
        installed = packages(folder / "packages")
        self.files = Stages(model, "4", folder, places=[address], measurement=measure(installed))
        self.files.key(0).rename(folder / "stage-0.key")

        text = (DEPLOY / "minigpt-stage@.service").read_text().replace("\\\n", " ").replace("%i", "0")
        lines = [line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#")]
        settings = dict(lines)
        assert settings["Type"] == "notify"
        assert int(settings["TimeoutStopSec"]) > 30  # --drain
        credentials = folder / "credentials"
        credentials.mkdir()
        for name, path in (value.split(":") for key, value in lines if key == "LoadCredential"):
            shutil.copy(folder / Path(path).name, credentials / name)
        words = shlex.split(settings["ExecStart"].replace("${CREDENTIALS_DIRECTORY}", str(credentials)))
        paths = {"/usr/bin/python3": sys.executable, "/srv/minigpt": str(model)}
        paths["/etc/minigpt/pipeline.places.json"] = str(self.files.places)
        self._words = [paths.get(word, word.replace("/opt/minigpt", str(installed))) for word in words]
        needs = [path for path in sys.path if path.endswith("site-packages")]
        self._words[self._words.index("")] = os.pathsep.join(needs)

        self.supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.supervisor.settimeout(60)
        place = f"minigpt-test-{os.getpid()}-{random.getrandbits(64):x}"
        self.supervisor.bind(f"\0{place}")
        self._environment = os.environ | {"NOTIFY_SOCKET": f"@{place}", "LISTEN_FDS": "1"}

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """The service, until it has ended."""
        handed = self.socket.fileno()
        with subprocess.Popen(
            ["bash", "-c", f'exec 3<&{handed} < /dev/null; exec "$0" "$@"', *self._words],
            env=self._environment, pass_fds=[handed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def told(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.supervisor.recv(4096).decode().splitlines())

    def close(self) -> None:
        self.supervisor.close()
        self.socket.close()
        self.files.close()


def test_the_unit_says_when_it_serves_and_callers_wait_while_it_starts_again(tmp_path: Path) -> None:
    with contextlib.closing(Unit(tmp_path)) as unit:
        for _ in range(2):
            # A caller that comes while nothing runs waits at the socket, which stays open.
            answers: list[list[int]] = []
            asking = threading.Thread(target=lambda answers=answers: answers.append(unit_answer(unit)))
            asking.start()
            with unit.running() as process:
                told = unit.told()
                assert told["READY"] == "1"
                assert told["STATUS"].startswith("stage 0 ready")
                asking.join(60)
                assert len(answers[0]) == 3
                process.send_signal(signal.SIGTERM)
                assert unit.told() == {"STOPPING": "1"}
                assert process.wait(60) == 0, process.communicate()


def unit_answer(unit: Unit) -> list[int]:
    with Pipeline.connect(unit.files.path, allow_mock=True, connect_timeout=60, handshake_timeout=60) as pipeline:
        return [token.id for token in pipeline.generate([1, 2], max_tokens=3)]


def test_the_file_of_ready_is_there_as_long_as_the_stage_serves(tmp_path: Path) -> None:
    model = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(model, "4", tmp_path) as stages:
        ready = tmp_path / "ready"
        ready.write_text("of an earlier run, which was killed")
        process = stages.spawn(0, "--ready", str(ready), "--drain", "60")
        assert eventually(lambda: ready.exists() and ready.read_text().startswith("stage 0 ready"))
        with Pipeline.connect(stages.path, allow_mock=True) as pipeline:
            generation = pipeline.generate([1, 2], max_tokens=20)
            next(generation)
            process.send_signal(signal.SIGTERM)
            assert eventually(lambda: not ready.exists())
            list(generation)
        assert process.wait(60) == 0


def test_a_place_for_ready_that_is_none_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(model, "4", tmp_path) as stages:
        for place, told in ((tmp_path, "directory"), (tmp_path / "none" / "ready", "No such file")):
            process = stages.spawn(0, "--ready", str(place))
            assert process.wait(60) == 2
            assert f"--ready {place}: " in stages.log(0)
            assert told in stages.log(0)
            stages.kill(0)
