"""Standard input, output and error of what serves: full, closed, or read by nobody, it serves."""

import fcntl
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from places import anywhere
from processes import ROOT, Stages, eventually

from minigpt.client.pipeline import Pipeline
from minigpt.errors import StageError, UsageError
from minigpt.stage import streams
from transport.address import Address
from transport.errors import Unreachable
from transport.sockets import Listener, connect

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, or uses /dev/full or small pipes")


class Stage:
    """A stage, started by a shell that redirects its descriptors; serving on a socket that this process keeps."""

    def __init__(self, where: Path, redirected: str, *flags: str, **more: object) -> None:
        folder = write(where / "small", SMALL, random_tensors(SMALL))
        self.socket = socket.create_server(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{self.socket.getsockname()[1]}"
        self.files = Stages(folder, "4", where, places=[address])
        fd = self.socket.fileno()
        words = [
            "bash",
            "-c",
            f'exec "$0" "$@" {redirected.format(fd=fd)}',
            sys.executable,
            "-m",
            "minigpt.stage",
            "--index",
            "0",
        ]
        words += ["--manifest", str(self.files.path), "--model", str(folder), "--mock-key", str(self.files.key(0))]
        words += ["--allow-mock", "--threads", "1"]
        if "--listen" not in flags:
            words += ["--listen", f"fd:{fd}"]
        self.process = subprocess.Popen([*words, *flags], cwd=ROOT, pass_fds=[fd], **more)  # type: ignore[call-overload]

    def answers(self) -> bool:
        """Whether it serves, however long it takes to start."""

        def served() -> bool:
            try:
                with Pipeline.connect(self.files.path, allow_mock=True) as pipeline:
                    return len(list(pipeline.generate([1, 2], max_tokens=3))) == 3
            except StageError:
                return False

        return eventually(served)

    def descriptor(self, number: int) -> str:
        return os.readlink(f"/proc/{self.process.pid}/fd/{number}")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code: int = self.process.wait(60)
        return code

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        self.socket.close()
        self.files.close()


def narrow_pipe() -> tuple[int, int]:
    """A pipe that holds 4 KB, and so about 60 lines of a log."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return reading, writing


def read_all(fd: int) -> str:
    with open(fd, "rb") as file:
        return file.read().decode()


@LINUX
def test_a_stage_whose_log_nobody_reads_serves_and_ends(tmp_path: Path) -> None:
    reading, writing = narrow_pipe()
    with Stage(tmp_path, "", stdout=subprocess.DEVNULL, stderr=writing) as stage:
        os.close(writing)
        for _ in range(300):  # each of them says something wrong, which is logged
            with connect(Address("tcp", "127.0.0.1", stage.socket.getsockname()[1]), 60.0) as sock:
                sock.settimeout(60)
                sock.sendall(bytes(8))
                assert sock.recv(1) == b""
        assert stage.answers()
        assert stage.end() == 0
    log = read_all(reading)
    assert len(log) > 3500  # it is full: a line goes in whole or not at all
    assert "ready" in log


@LINUX
def test_a_relay_whose_log_nobody_reads_serves_and_ends() -> None:
    reading, writing = narrow_pipe()
    with Listener(anywhere("tcp")) as target:
        words = [sys.executable, "-m", "minigpt", "relay", "tcp://127.0.0.1:0", str(target.address)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, text=True)
        os.close(writing)
        try:
            assert process.stdout is not None
            address = Address.parse(process.stdout.readline().split()[2])
            for number in range(300):
                with connect(address, 60.0) as sock:
                    accepted = target.accept()
                    assert accepted is not None
                    with accepted[0] as served:
                        sock.sendall(number.to_bytes(2))
                        served.settimeout(60)
                        assert served.recv(2) == number.to_bytes(2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.communicate()
    assert len(read_all(reading)) > 3500


@LINUX
@pytest.mark.parametrize("redirected", [">/dev/full", ">&-", ">/dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_stage_with_a_full_or_closed_output_serves(redirected: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file, Stage(tmp_path, redirected, stderr=file) as stage:
        assert stage.answers()
        for number in range(3):
            assert not stage.descriptor(number).startswith("socket:")
        assert stage.end() == 0
    if redirected == ">/dev/full":
        assert "standard output: No space left on device" in log.read_text()
    assert "Traceback" not in log.read_text()


@LINUX
def test_a_stage_with_an_output_that_nobody_reads_serves(tmp_path: Path) -> None:
    reading, writing = narrow_pipe()
    os.write(writing, bytes(4096))
    with Stage(tmp_path, "", stdout=writing, stderr=subprocess.DEVNULL) as stage:
        os.close(writing)
        assert stage.answers()
        assert stage.end() == 0
    os.close(reading)


@LINUX
def test_a_relay_with_a_full_output_serves(tmp_path: Path) -> None:
    with Listener(anywhere("tcp")) as target, Listener(anywhere("tcp")) as free, (tmp_path / "log").open("wb") as file:
        address = free.address
        free.close()
        words = [sys.executable, "-m", "minigpt", "relay", str(address), str(target.address)]
        with open("/dev/full", "wb") as full:
            process = subprocess.Popen(words, cwd=ROOT, stdout=full, stderr=file)
        try:
            assert eventually(lambda: reaches(address))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


def reaches(address: Address) -> bool:
    try:
        connect(address, 60.0).close()
    except Unreachable:
        return False
    return True


@LINUX
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_socket_handed_down_as_a_standard_descriptor_is_served_and_gets_no_log(number: int, tmp_path: Path) -> None:
    """As inetd and systemd's StandardInput=socket do."""
    with Stage(tmp_path, f"{number}<&{{fd}}", "--listen", f"fd:{number}") as stage:
        assert stage.answers()
        assert stage.descriptor(number) == "/dev/null"
        assert stage.end() == 0


def test_a_stage_that_is_to_end_with_a_closed_input_says_so(tmp_path: Path) -> None:
    with Stage(tmp_path, "<&-", "--until-eof", stderr=subprocess.PIPE) as stage:
        _, words = stage.process.communicate(timeout=60)
        assert stage.process.returncode == 2
        assert b"--until-eof: standard input is closed" in words


def test_a_daemon_without_descriptors_has_a_local_pipeline(tmp_path: Path) -> None:
    code = f"""
        import os, sys
        for closed in {{closed}}:
            os.close(closed)
        import minigpt
        with minigpt.Pipeline.local("tiny", stages=2, threads=1) as pipeline:
            count = len(list(pipeline.generate("The capital of France is", max_tokens=8)))
        open({str(tmp_path / "found")!r}, "w").write(str(count))
    """
    for closed in ((0, 1), (0,), (0, 1, 2)):
        words = [sys.executable, "-c", textwrap.dedent(code).replace("{closed}", repr(closed))]
        with (tmp_path / "log").open("w+b") as log:
            assert subprocess.run(words, cwd=ROOT, stderr=log, timeout=300).returncode == 0
        assert (tmp_path / "found").read_text() == "8"
        (tmp_path / "found").unlink()


def test_more_threads_than_any_machine_needs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got 1000000, wanted at most 256"):
        Pipeline.local("tiny", stages=1, threads=1_000_000)
    for words in (
        ["minigpt.stage", "--manifest", "x", "--index", "0"],
        ["minigpt", "generate", "x"],
        ["minigpt", "bench"],
    ):
        command = [sys.executable, "-m", *words, "--threads", "1000000"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, "got 1000000, wanted at most 256" in done.stderr) == (2, True)


@pytest.fixture
def pipe() -> Iterator[tuple[int, streams.Stream]]:
    reading, writing = narrow_pipe()
    yield reading, streams.Stream(writing)
    os.close(reading)  # and the thread, if it waits, gets an error


@LINUX
def test_what_nobody_reads_is_dropped_and_counted(
    pipe: tuple[int, streams.Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HELD", 10_000)
    monkeypatch.setattr(streams, "_PATIENCE", 0.1)
    reading, stream = pipe
    for number in range(1000):
        print(f"line {number:03}, of 26 letters.", file=stream)
    stream.drain()
    found, number, dropped = b"", 0, 0
    while number < 1000:  # each line is there, or among those that the notice in its place counts
        found += os.read(reading, 4096)
        stream.drain()
        *lines, found = found.split(b"\n")
        for line in lines:
            if match := re.match(rb"(\d+) lines were dropped here", line):
                number += int(match[1])
                dropped += int(match[1])
            else:
                assert line == b"line %03d, of 26 letters." % number
                number += 1
    assert dropped > 0


@LINUX
def test_lines_come_at_a_bounded_rate(pipe: tuple[int, streams.Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, stream = pipe
    stream._allowed = 5.0
    monkeypatch.setattr(streams, "RATE", 0.0)
    for number in range(20):
        print(number, file=stream)
    monkeypatch.setattr(streams, "RATE", 1e9)
    print("later", file=stream)
    monkeypatch.setattr(streams, "_PATIENCE", 60.0)
    stream.drain()
    found = os.read(reading, 4096).decode()
    assert found == "0\n1\n2\n3\n4\n15 lines were dropped here: too many, or nobody read them\nlater\n"


@pytest.mark.parametrize(
    "command",
    [("minigpt.stage", "--manifest", "x", "--index", "0", "--max-channels", "300"),
     ("minigpt", "relay", "tcp://127.0.0.1:0", "tcp://127.0.0.1:1", "--connections", "300")],
)  # fmt: skip
def test_what_serves_has_room_for_all_of_its_connections_or_says_so_at_once(command: tuple[str, ...]) -> None:
    limited = ["sh", "-c", 'ulimit -n 100 && exec "$0" -m "$@"', sys.executable, *command]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == UsageError.exit_code
    assert re.search(r"300 may need \d+ open files, and this process may have 100: raise .* or lower it", done.stderr)


def test_a_limit_that_may_be_raised_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _what, limits: made.append(limits))
    streams.make_room(300, "this")
    assert made == [(300 + streams.SPARE, 4096)]
    streams.make_room(100, "this")
    assert len(made) == 1


@pytest.mark.parametrize(("hard", "fitting"), [(resource.RLIM_INFINITY, 1000), (4096, 1000), (500, 200), (300, 0)])
def test_what_is_wished_for_beyond_that_is_had_as_far_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, hard: int, fitting: int
) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _what, limits: made.append(limits))
    assert streams.make_room(300 - streams.SPARE, "this", more=1000) == fitting
    assert made == [(300 + fitting, hard)]


def test_a_system_that_forbids_to_raise_a_limit_leaves_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_what: int, _limits: tuple[int, int]) -> None:
        raise OSError

    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", forbidden)
    assert streams.make_room(200 - streams.SPARE, "this", more=1000) == 56
    with pytest.raises(UsageError, match="this may need 300 open files, and this process may have 4096"):
        streams.make_room(300 - streams.SPARE, "this", more=1000)
