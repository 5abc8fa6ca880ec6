"""The measurement covers every byte and name of the source, and nothing that could run unmeasured is let by."""

import hashlib
import os
import shutil
import struct
from pathlib import Path

import pytest

import attest
from attest.measure import PACKAGES, MeasurementError, measure

SOURCE = Path(attest.__file__).resolve().parent.parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Three small packages, with what lies about in real ones."""
    for package in PACKAGES:
        folder = tmp_path / package / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text(f'"""{package}"""\n')
        (folder.parent / "code.py").write_text("x = 1\n")
        (folder / "weights.bin").write_bytes(b"\0" * 10)
    (tmp_path / "attest" / "data" / "deep.py").write_text("")
    return tmp_path


def oracle(root: Path) -> bytes:
    """The documented bytes, built another way: all of them in one string."""
    names = {
        path.relative_to(root).as_posix().encode(): path.read_bytes()
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    stream = b"".join(
        struct.pack(">Q", len(name)) + name + struct.pack(">Q", len(names[name])) + names[name]
        for name in sorted(names)
    )
    return hashlib.sha384(stream).digest()


def test_the_measurement_is_what_is_documented(copy: Path) -> None:
    assert measure(copy) == oracle(copy)
    assert measure() == measure(SOURCE) == oracle(SOURCE)
    assert len(measure()) == 48


def test_every_byte_of_every_file_counts(copy: Path) -> None:
    genuine = measure(copy)
    for path in sorted(copy.rglob("*.py")):
        original = path.read_bytes()
        for changed in (original + b"\n", original[:-1] + b"#", b"\r" + original):
            path.write_bytes(changed)
            assert measure(copy) != genuine, path
        path.write_bytes(original)
        assert measure(copy) == genuine


def test_names_and_places_count(copy: Path) -> None:
    seen = {measure(copy)}

    def is_new() -> bool:
        value = measure(copy)
        new = value not in seen
        seen.add(value)
        return new

    (copy / "minigpt" / "code.py").rename(copy / "minigpt" / "core.py")
    assert is_new()
    (copy / "minigpt" / "core.py").rename(copy / "transport" / "core.py")
    assert is_new()
    (copy / "minigpt" / "empty.py").touch()
    assert is_new()
    (copy / "minigpt" / "empty.py").unlink()
    assert not is_new()
    (copy / "attest" / "code.py").unlink()
    assert is_new()
    shutil.rmtree(copy / "transport")
    assert is_new()


def test_bytes_cannot_move_between_names_and_contents(tmp_path: Path) -> None:
    """Without lengths, the content of one file could be made to look like the name and content of the next."""
    folder = tmp_path / "attest"
    folder.mkdir()
    (folder / "a.py").write_bytes(b"1attest/b.py2")
    whole = measure(tmp_path)
    (folder / "a.py").write_bytes(b"1")
    (folder / "b.py").write_bytes(b"2")
    assert measure(tmp_path) != whole


def test_what_is_not_code_does_not_count(copy: Path) -> None:
    genuine = measure(copy)
    (copy / "attest" / "__pycache__").mkdir()
    (copy / "attest" / "__pycache__" / "code.cpython-311.pyc").write_bytes(b"x")
    (copy / "minigpt" / "data" / "weights.bin").write_bytes(b"other")
    (copy / "minigpt" / "py.typed").touch()
    (copy / "minigpt" / "data" / "linked.bin").symlink_to("weights.bin")
    (copy / "setup.py").write_text("beside the packages")
    (copy / "tests").mkdir()
    (copy / "tests" / "test.py").write_text("beside the packages")
    assert measure(copy) == genuine


def test_the_order_of_the_folder_does_not_count(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in sorted(copy.rglob("*.py"), reverse=True):
        target = other / path.relative_to(copy)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert measure(other) == measure(copy)


def symlinked_file(root: Path) -> None:
    (root / "real.py").write_text("x = 2\n")
    (root / "attest" / "more.py").symlink_to(root / "real.py")


def dangling_link(root: Path) -> None:
    (root / "attest" / "more.py").symlink_to(root / "nowhere")


def symlinked_folder(root: Path) -> None:
    (root / "attest" / "more").symlink_to(root / "minigpt")


def circle(root: Path) -> None:
    (root / "attest" / "more").symlink_to(root / "attest")


def symlinked_package(root: Path) -> None:
    (root / "transport").rename(root / "elsewhere")
    (root / "transport").symlink_to(root / "elsewhere")


def extension_module(root: Path) -> None:
    (root / "attest" / "policy.cpython-311-x86_64-linux-gnu.so").touch()


def sourceless_module(root: Path) -> None:
    (root / "minigpt" / "data" / "more.pyc").touch()


def pipe(root: Path) -> None:
    os.mkfifo(root / "attest" / "more.py")


@pytest.mark.parametrize(
    "prepare",
    [
        symlinked_file,
        dangling_link,
        symlinked_folder,
        circle,
        symlinked_package,
        extension_module,
        sourceless_module,
        pipe,
    ],
)
def test_what_could_run_unmeasured_is_refused(copy: Path, prepare) -> None:
    measure(copy)
    prepare(copy)
    with pytest.raises(MeasurementError, match=r"got .*; wanted|got .*, wanted"):
        measure(copy)


def test_a_folder_without_the_packages_has_no_measurement(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MeasurementError, match="wanted the folder they lie in"):
            measure(folder)
