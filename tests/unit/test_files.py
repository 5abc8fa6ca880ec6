"""Files are written whole or not at all, and errors name them."""

import errno
import os
import stat
from pathlib import Path

import pytest

from attest.document import write_file, write_private


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes some bytes, and then is full."""
    real, written = os.write, []

    def write(descriptor: int, data: bytes) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(data)
        return real(descriptor, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", write)


def test_what_is_written_replaces_what_was_there_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"first")
    path.chmod(0o640)
    write_file(path, "second")
    assert path.read_text() == "second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("first")
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "second"


def test_what_is_not_a_file_is_written_into() -> None:
    reading, writing = os.pipe()
    try:
        write_file(f"/dev/fd/{writing}", "words")
        assert os.read(reading, 100) == b"words"
    finally:
        os.close(reading)
        os.close(writing)
    write_file(os.devnull, "words")
    assert not Path(os.devnull).is_file()


@pytest.mark.usefixtures("full")
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    before = path.stat().st_ino
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(path, b"second")
    assert caught.value.filename == str(path)
    assert (path.stat().st_ino, os.listdir(tmp_path)) == (before, ["file"])


@pytest.mark.usefixtures("full")
def test_a_full_disk_leaves_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write_private(tmp_path / "key", "private")
    assert caught.value.filename == str(tmp_path / "key")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_found_full_at_the_end_is_full_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    path = tmp_path / "file"
    path.write_text("first")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="quota"):
        write_file(path, "second")
    assert (path.read_text(), os.listdir(tmp_path)) == ("first", ["file"])


def test_a_private_file_is_new_and_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_private(path, "private")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_private(path, "other")
    assert path.read_text() == "private"


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(OSError, match="directory") as caught:
            write_file(path, "words")
        assert caught.value.filename == str(path)
