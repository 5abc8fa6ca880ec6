"""The wheel holds every package: it is built, installed elsewhere, and does the main job from another folder."""

import configparser
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from processes import ROOT

PACKAGES = ("attest", "minigpt", "transport")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    where = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, where / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, where / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(where), str(where / "source")]
    subprocess.run(command, check=True, timeout=300)
    (built,) = where.glob("*.whl")
    return built


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as opened:
        assert {name for name in opened.namelist() if ".dist-info/" not in name} == sources


def test_it_does_the_main_job_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import minigpt; print(minigpt.__file__)"]
    assert subprocess.check_output(where, cwd=elsewhere, env=environment, text=True).startswith(str(site))
    done = subprocess.run(
        [sys.executable, "-m", "minigpt", "generate", "The capital of France is"],
        cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris")
    assert "stage 1" in done.stderr


@pytest.mark.slow
def test_it_does_the_main_job_with_the_lowest_versions_that_it_allows(wheel: Path, tmp_path: Path) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    options = config["options"]
    if sys.version_info[:2] != (lowest := tuple(map(int, options["python_requires"].strip(">=").split(".")))):
        pytest.skip(f"the lowest versions are built for the lowest Python, {lowest}")
    wanted = [line.partition(",")[0].replace(">=", "==") for line in options["install_requires"].split("\n") if line]
    assert all("==" in requirement for requirement in wanted)
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", str(wheel), *wanted]
    subprocess.run(install, check=True, timeout=600, env=environment)
    for command in (
        ["generate", "The capital of France is"],
        ["generate", "The capital of France is", "--stages", "1"],
    ):
        done = subprocess.run(
            [python, "-m", "minigpt", *command],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(" Paris")
