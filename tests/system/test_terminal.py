"""What a person at a terminal sees: prompts asked for one after the other, and how far a checkpoint has been loaded."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages

import minigpt
from minigpt.cli.terminal import Board

PROMPT = "The capital of France is"
UP, BACKSPACE, CTRL_C, CTRL_D = b"\x1b[A", b"\x7f", b"\x03", b"\x04"
LOADING = "reading weights: "
# Makes the terminal that of the session, so that Ctrl-C in it is a signal.
CONTROLLED = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A program that runs in a terminal of its own, and whoever sits there."""

    def __init__(self, *command: str, home: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, sys.executable, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env=os.environ | {"HOME": str(home), "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def read(self, until: str = "> ") -> str:
        """What comes up to and with these words."""
        said, end = b"", time.monotonic() + 60
        while until.encode() not in said:
            assert select.select([self._ours], [], [], end - time.monotonic())[0], f"no {until!r} came: {said!r}"
            try:
                said += os.read(self._ours, 1)
            except OSError:  # nobody holds the other end any more
                raise AssertionError(f"it ended without {until!r}: {said!r}") from None
        return said.decode()

    def ask(self, prompt: str) -> str:
        """What follows a prompt that was typed, up to the next."""
        self.type(prompt.encode() + b"\n")
        self.read(prompt + "\r\n")
        return self.read()

    def interrupt(self) -> None:
        """Presses Ctrl-C until there is a prompt: what reads a line misses one that comes before it waits."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            self.type(CTRL_C)
            if select.select([self._ours], [], [], 2.0)[0]:
                self.read()
                return
        raise AssertionError("Ctrl-C was not heard")

    def end(self) -> tuple[int, str]:
        """The exit code, and the last words."""
        said = b""
        try:
            while part := os.read(self._ours, 4096):
                said += part
        except OSError:
            pass
        return self.process.wait(60), said.decode()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Stages]:
    """Two stages of a small model, which continues token ids."""
    with Stages(write(tmp_path / "small", SMALL, random_tensors(SMALL)), "2+2", tmp_path) as made:
        yield made.start_all()


def loop(stages: Stages, tmp_path: Path, *flags: str) -> Terminal:
    manifest = ("--manifest", str(stages.path), "--allow-mock")
    return Terminal("-m", "minigpt", "generate", *manifest, "--max-tokens", "5", *flags, home=tmp_path)


def answer(stages: Stages, *prompt: int) -> str:
    tokens = minigpt.load(stages.folder).generate(prompt, max_tokens=5)
    return "".join(f"{token.id} " for token in tokens) + "\r\n"


def test_prompts_are_asked_for_until_ctrl_d_and_remembered_in_memory_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with Terminal("-m", "minigpt", "generate", home=home) as terminal:
        opening = terminal.read()
        assert "stage 1  layers 6-11" in opening
        assert "nothing about hardware" in opening
        first = terminal.ask(PROMPT)
        assert first.startswith(" Paris")
        assert "20 tokens, ended by --max-tokens" in first
        terminal.type(UP + len("France is") * BACKSPACE)
        assert terminal.ask("Japan is").startswith(" Tokyo")
        terminal.type(b"never mind")
        terminal.read("never mind")
        terminal.interrupt()
        terminal.type(b"\n")  # an empty line is no prompt
        assert terminal.read() == "\r\n> "
        terminal.type(CTRL_D)
        assert terminal.end() == (0, "\r\n")
    assert not list(home.rglob("*"))


def test_ctrl_c_cancels_an_answer_and_the_next_prompt_is_answered(tmp_path: Path, stages: Stages) -> None:
    with loop(stages, tmp_path) as terminal:
        terminal.read()
        stages.processes[1].send_signal(signal.SIGSTOP)  # no answer will come
        said, until = "", time.monotonic() + 60
        while "cancelled" not in said:  # Ctrl-C may come before the prompt has been taken, and then gives that up
            assert time.monotonic() < until, said
            terminal.type(b"1 2 3\n")
            terminal.read("1 2 3\r\n")
            time.sleep(0.1)
            terminal.type(CTRL_C)
            said = terminal.read()
        stages.processes[1].send_signal(signal.SIGCONT)
        assert terminal.ask("4 5 6").startswith(answer(stages, 4, 5, 6))
        terminal.type(CTRL_D)
        assert terminal.end()[0] == 0


def test_a_prompt_that_fails_is_followed_by_the_next(tmp_path: Path, stages: Stages) -> None:
    with loop(stages, tmp_path, "--retry-for", "0") as terminal:
        terminal.read()
        assert "must be token ids" in terminal.ask("words")
        assert "outside the vocabulary" in terminal.ask("97")
        stages.kill(1)
        assert "minigpt: stage 1" in terminal.ask("1 2 3")
        stages.start(1)
        assert terminal.ask("1 2 3").startswith(answer(stages, 1, 2, 3))
        terminal.type(CTRL_D)
        assert terminal.end()[0] == 0


def test_what_no_prompt_can_make_good_ends_the_loop_before_it_asks(tmp_path: Path, stages: Stages) -> None:
    for flags, words in ((("--temperature", "1e7"), "temperature"), (("--json",), "needs a PROMPT")):
        with loop(stages, tmp_path, *flags) as terminal:
            code, said = terminal.end()
        assert code == 2
        assert words in said
        assert "> " not in said


def test_the_output_must_be_a_terminal_too_for_prompts_to_be_asked_for(tmp_path: Path) -> None:
    command = "[sys.executable, '-m', 'minigpt', 'generate']"
    code = f"import subprocess, sys; sys.exit(subprocess.run({command}, stdout=subprocess.DEVNULL).returncode)"
    with Terminal("-c", code, home=tmp_path) as terminal:
        ended, said = terminal.end()
    assert ended == 2
    assert "PROMPT is missing" in said


def test_a_terminal_is_told_how_far_a_checkpoint_has_been_loaded(tmp_path: Path, stages: Stages) -> None:
    root = stages.root.public.hex()
    plan = ("plan", "--model", str(stages.folder), "--root-key", root, "-o", str(tmp_path / "plan.json"))
    generate = ("generate", "1 2", "--model", str(stages.folder), "--max-tokens", "2")
    bench = ("bench", "--model", str(stages.folder), "--prompt", "1 2", "--runs", "1", "--max-tokens", "2")
    for command in (plan, generate, bench):
        with Terminal("-m", "minigpt", *command, home=tmp_path) as terminal:
            code, said = terminal.end()
        assert code == 0, said
        assert LOADING in said
        assert LOADING not in screen(said)


def test_up_shows_a_line_for_each_stage_which_changes_in_place(tmp_path: Path, stages: Stages) -> None:
    command = ("up", "--model", str(stages.folder), "--stages", "3", "-o", str(tmp_path / "up.json"))
    with Terminal("-m", "minigpt", *command, home=tmp_path) as terminal:
        said = terminal.read("Ctrl-C ends the stages")
        for index in range(3):
            for words in (f"stage {index} of 3 loads its layers", f"stage {index} {LOADING}100 %"):
                assert words in said
        shown = drawn(said)
        assert [line.partition(" at ")[0] for line in shown[:3]] == [f"stage {index} serves" for index in range(3)]
        assert shown[3].startswith("minigpt generate")
        terminal.type(CTRL_C)
        assert terminal.end()[0] == 130


def test_news_of_no_stage_stays_above_the_lines_of_the_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    with Board() as board:
        board.progress("reading weights: 1 %")
        board.progress("reading weights: 2 %")
        assert drawn(board_said := capsys.readouterr().err) == ["reading weights: 2 %"]
        board.news("stage 1 waits for a node with a free CPU")
        board.news("stage 0 placed")
        board.news("warning: long, and all of it is to be read")
        board.progress("stage 1 reading weights: 3 %")
    board.news("stage 1 is lost: its node has died; it is started again")
    board.progress("stage 1 reading weights: 4 %")
    assert drawn(board_said + capsys.readouterr().err) == [
        "warning: long, and all of it is to be read",
        "stage 0 placed",
        "stage 1 reading weights: 3 %",
        "stage 1 is lost: its node has died; it is started again",
    ]


def test_a_stage_started_in_a_terminal_tells_it_too(tmp_path: Path, stages: Stages) -> None:
    stages.kill(1)
    options = ("--manifest", str(stages.path), "--index", "1", "--model", str(stages.folder))
    more = ("--mock-key", str(stages.key(1)), "--allow-mock", "--listen", "tcp://127.0.0.1:0")
    with Terminal("-m", "minigpt.stage", *options, *more, home=tmp_path) as terminal:
        said = terminal.read("stage 1 ready")
        assert LOADING in said
        assert LOADING not in screen(said)


def test_a_watch_on_a_terminal_draws_over_what_it_showed_and_ends_with_ctrl_c(tmp_path: Path, stages: Stages) -> None:
    command = ("-m", "minigpt", "status", "--manifest", str(stages.path), "--allow-mock", "--watch", "0.1")
    with Terminal(*command, home=tmp_path) as terminal:
        for _ in range(3):
            assert terminal.read("\x1b[H\x1b[J").count("tokens/s") <= 1
        assert "nothing about hardware" in terminal.read("\x1b[H\x1b[J")
        terminal.type(CTRL_C)
        code, said = terminal.end()
        assert code == 130
        assert "Traceback" not in said


def test_a_file_is_told_nothing_of_it(stages: Stages) -> None:
    command = [sys.executable, "-m", "minigpt", "generate", "1 2", "--model", str(stages.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["prompt_tokens"] == 2
    assert LOADING not in stages.log(0)


def screen(said: str) -> str:
    """What is left of each line once it was cleared."""
    return "\n".join(line.rpartition("\r\x1b[K")[2] for line in said.split("\r\n"))


def drawn(said: str) -> list[str]:
    """The lines that a terminal shows after it was told this."""
    lines, row = [""], 0
    for words in re.findall(r"\r|\n|\x1b\[[0-9]*[A-Z]|[^\r\n\x1b]+", said):
        if words == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif words.endswith("F"):
            row -= int(words[2:-1])
        elif words == "\x1b[J":
            lines[row:] = [""]
        elif words == "\x1b[K":
            lines[row] = ""
        elif words != "\r":
            lines[row] += words
    return lines[:-1] if not lines[-1] else lines


def test_scored_tokens_are_shaded_by_their_surprise(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The capital of France is Tokyo")
    with Terminal("-m", "minigpt", "score", str(tmp_path / "text"), home=tmp_path) as terminal:
        code, said = terminal.end()
    lines = [line for line in said.splitlines() if '"' in line]
    assert code == 0
    assert ["\x1b[30;48;5;" in line for line in lines] == ["Tokyo" in line or "France" in line for line in lines]
    assert lines[-1].endswith('m" Tokyo"\x1b[0m')


def test_several_answers_come_one_after_the_other(tmp_path: Path, stages: Stages) -> None:
    with loop(stages, tmp_path, "--n", "2") as terminal:
        terminal.read()
        said = terminal.ask("4 5 6")
        assert said.count(answer(stages, 4, 5, 6)) == said.count("5 tokens, ended by") == 2
        terminal.type(CTRL_D)
        assert terminal.end()[0] == 0


def test_no_control_character_of_a_text_reaches_the_terminal_raw(tmp_path: Path) -> None:
    tokenizer = minigpt.load("tiny").tokenizer
    assert tokenizer is not None
    (escape,) = tokenizer.encode("\x1b")
    generate = ("generate", "The", "--logit-bias", f"{escape}=100", "--max-tokens", "3")
    (tmp_path / "text").write_text("a\x7f\x1b[31m")
    for command, wanted in ((generate, r"\x1b\x1b\x1b"), (("score", str(tmp_path / "text")), r"\x7f")):
        with Terminal("-m", "minigpt", *command, home=tmp_path) as terminal:
            code, said = terminal.end()
        assert (code, wanted in said) == (0, True)
        shown = re.sub(r"\r\x1b\[K|\x1b\[[0-9;]*m", "", said)  # our own: of progress, and of shades
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown)
