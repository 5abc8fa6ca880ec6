"""What the command line says of what is wrong: what failed, what it got, what it wanted, and what to do next."""

import io
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made import SMALL, random_tensors, write

from attest.__main__ import main as attest
from attest.providers.mock import MockKey, MockPins, MockRoot
from minigpt.__main__ import main as minigpt
from minigpt.checkpoint import sources, weights
from minigpt.client.pipeline import Pipeline
from minigpt.errors import CheckpointError, UsageError
from minigpt.launch import local, plan
from minigpt.protocol.request import Options
from minigpt.stage import process
from minigpt.stage.__main__ import _main as stage
from transport.noise import KeyPair

Tell = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tell:
    """What a command line of minigpt says: one line, and its exit code must be this one."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))

    def run(*arguments: str | Path, code: int = 2, main: Callable[[list[str]], int] = minigpt) -> str:
        assert main(list(map(str, arguments))) == code
        output, errors = capsys.readouterr()
        assert output == ""
        lines = [line for line in errors.splitlines() if "chmod 600" not in line]
        assert len(lines) == 1, errors
        return str(lines[0])

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "The", "capital", "of"), "got 2 words after PROMPT|-: what has spaces needs quotes, as in "
         "minigpt generate 'one two'"),
        (("score", "a", "b"), "got 1 word after FILE|-"),
        (("up", "now"), "got 1 word, wanted options only: see minigpt up --help"),
        (("generate", "x", "--max-token", "5"), "--max-token: there is no such option: did you mean --max-tokens?"),
        (("generate", "x", "--temprature=1"), "--temprature: there is no such option: did you mean --temperature?"),
        (("generate", "x", "-max-tokens", "5"), "did you mean --max-tokens?"),
        (("status", "--manfest", "x"), "--manfest: there is no such option: did you mean --manifest?"),
        (("--verson",), "did you mean --version?"),
        (("generate", "x", "--zzz"), "--zzz: there is no such option: see minigpt generate --help"),
        (("generat",), "got 'generat': did you mean generate?"),
        (("zzz",), "got 'zzz': wanted generate, score, plan"),
        ((), "COMMAND missing: see minigpt --help"),
        (("status",), "--manifest missing: see minigpt status --help"),
        (("generate", "x", "--json", "--json-lines"), "--json-lines: not allowed with --json"),
        (("bench", "--stages", "x"), "--stages: got 'x', wanted whole numbers of at least 1 with commas between them, "
         "as in 1,2"),
        (("generate",), "PROMPT is missing: give it in quotes, or - to read it from standard input"),
        (("generate", ""), "PROMPT is empty, wanted text to continue"),
        (("generate", "-"), "standard input is empty, wanted text to continue"),
        (("score", "-"), "standard input is empty, wanted text to score"),
        (("plan", "-o", "x"), "--root-key is missing: give the public key that `python -m attest keygen -o root.key` "
         "prints"),
        # By the names that they have on the command line.
        (("generate", "x", "--max-tokens", "0"), "--max-tokens is 0, wanted at least 1"),
        (("generate", "x", "--seed", "-1"), "--seed is -1, wanted"),
        (("generate", "x", "--top-p", "2"), "--top-p is 2.0, wanted"),  # and no warning that it has no effect
        (("generate", "x", "--draft", "65"), "--draft is 65, wanted"),
        (("generate", "x", "--split", "6x6"), "--split is '6x6', wanted numbers of layers joined by +, such as 6+6"),
        (("generate", "x", "--split", "6+7"), "--split is 6+7, 13 layers in all, but the model has 12"),
        (("generate", "x", "--temperature", "hot"), "--temperature: got 'hot', wanted a number"),
        (("generate", "x", "--top-logprobs", "21"), "--top-logprobs is 21, wanted"),
        (("serve", "--hostname", "a b"), "--hostname: got 'a b', wanted a host's name or IP address, without a port"),
        (("serve", "--hostname", "a:8000"), "--hostname: got 'a:8000', wanted"),
        (("serve", "--model-name", ""), "--model-name: got '', wanted a name"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_gets_one_sentence_that_says_what_to_do(
    said: Tell, arguments: tuple[str, ...], words: str
) -> None:
    line = said(*arguments)
    assert line.startswith("minigpt: ")
    assert words in line


def test_every_program_says_it_in_the_same_way(said: Tell) -> None:
    assert said("verif", main=attest) == "attest: COMMAND: got 'verif': did you mean verify?"
    assert said("show", "x", "--pin", main=attest) == "attest: --pin: there is no such option: did you mean --pins?"
    assert said("keygen", main=attest) == "attest: -o/--output missing: see python -m attest keygen --help"
    line = said("--manifst", "x", main=stage)
    assert line == "minigpt.stage: --manifst: there is no such option: did you mean --manifest?"


def test_a_value_that_looks_like_an_option_is_one_only_where_argparse_has_it_so(said: Tell) -> None:
    for words in (
        ("-5 degrees",),
        ("--", "--hello"),
        ("-3.5",),
        ("x", "--stop", "-"),
        ("x", "--presence-penalty=-1e1"),
    ):
        assert "--stages is for local stages" in said("generate", "--manifest", "m", "--stages", "1", *words)


def test_what_cannot_be_written_is_said_before_anything_is_started(said: Tell, tmp_path: Path) -> None:
    root = ("--root-key", MockRoot.generate().public.hex())
    for command in (("plan", *root), ("up",)):
        assert f"--output {tmp_path}: is a folder, wanted a new file" in said(*command, "-o", tmp_path)
        nowhere = tmp_path / "none/p.json"
        assert said(*command, "-o", nowhere).endswith(f"--output {nowhere}: there is no such folder: make it first")
    assert said("keygen", "-o", tmp_path / "none/key").endswith("there is no such folder: make it first")


def test_what_may_be_a_prompt_or_a_key_is_not_quoted(said: Tell) -> None:
    assert "secret" not in said("generate", "one", "secret")
    assert "secret" not in said("generate", "x", "--client-kye=secret")


def manifest() -> bytes:
    return plan.write(
        config=SMALL, model="small", revision=None, tokenizer_sha256=None, layers=[range(3), range(3, 4)],
        weights_sha256=[b"\1" * 32, b"\2" * 32], pins=[MockPins(MockRoot.generate().public, frozenset([b"\3" * 48]))],
    )  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """One file of each kind, by its name."""
    pair, root = KeyPair.generate(), MockRoot.generate()
    assert minigpt(["keygen", "-o", str(tmp_path / "client.key")]) == 0
    (tmp_path / "root.key").write_text(root.to_json())
    (tmp_path / "stage.key").write_text(MockKey.generate(root, 0, 2**40).to_json())
    (tmp_path / "public").write_text(pair.public.hex() + "\n")
    (tmp_path / "pipeline.json").write_bytes(manifest())
    (tmp_path / "pipeline.places.json").write_text('{"0": "tcp://127.0.0.1:1", "1": "tcp://127.0.0.1:2"}')
    (tmp_path / "page.html").write_text("<!DOCTYPE html>")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


KINDS = {
    "client.key": "got a client's private key, wanted",
    "root.key": "got the mock's private root key, wanted",
    "stage.key": "got a stage's private mock key, wanted",
    "public": "got 64 hex digits, as a public key is written, wanted",
    "pipeline.json": "got a manifest, wanted",
    "pipeline.places.json": "got a places file, wanted",
    "page.html": "got a page of HTML or XML, as a download that failed leaves, wanted",
    "empty": "got an empty file, wanted",
    "folder": "Is a directory",
    "nothing": "No such file or directory",
}
HERE = {"folder", "nothing"}  # cannot be read at all


@pytest.mark.parametrize("name", KINDS)
def test_a_file_given_for_another_is_named_with_what_it_really_is(
    files: Path, said: Tell, capsys: pytest.CaptureFixture[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.chdir(files)
    good, usual = ("--manifest", "pipeline.json", "--allow-mock"), 2 if name in HERE else 3
    tries: list[tuple[tuple[str, ...], int, Callable[[list[str]], int], str]] = [
        (("generate", "x", "--manifest", name), usual, minigpt, "pipeline.json"),
        (("status", "--manifest", name), usual, minigpt, "pipeline.json"),
        (("generate", "x", *good, "--places", name), 2, minigpt, "pipeline.places.json"),
        (("generate", "x", *good, "--client-key", name), 2, minigpt, "client.key"),
        (("plan", "-o", "new.json", "--pcrs", name), 2, minigpt, ""),
        (("plan", "-o", "new.json", "--snp", name), 2, minigpt, ""),
        (("plan", "-o", "new.json", "--tdx", name), 2, minigpt, ""),
        (("keygen", "-o", "new.key", "--root", name, "--stage", "0"), 1 if name in HERE else 3, attest, "root.key"),
        (("show", name), 1 if name in HERE else 3, attest, ""),
    ]
    for words, code, main, own in tries:
        if name != own:
            line = said(*words, code=code, main=main)
            assert f"{name}: {KINDS[name]}" in line, line
            assert 'private"' not in line


def test_a_file_that_is_not_there_is_not_called_malformed(tmp_path: Path, said: Tell) -> None:
    assert "nothing: No such file" in said("serve", "--api-key-file", tmp_path / "nothing")
    assert "nothing: No such file" in said("score", tmp_path / "nothing")
    assert "nothing: No such file" in said("plan", "-o", "x", "--pcrs", tmp_path / "nothing")


def test_a_manifest_from_a_file_is_refused_by_the_files_name(files: Path, said: Tell) -> None:
    path = files / "pipeline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suites": [7]}))
    assert said("status", "--manifest", path, code=3).startswith(f"minigpt: {path}: manifest.suites: got [7], wanted")
    assert "(allow_mock=True)" not in said("status", "--manifest", path.with_name("pipeline.json"), code=3)


def test_no_keyword_of_python_is_told_on_a_terminal(files: Path, said: Tell) -> None:
    line = said("generate", "x", "--manifest", files / "pipeline.json", code=3)
    assert line.endswith("refused without --allow-mock")
    line = said("generate", "x", "--manifest", files / "pipeline.json", "--allow-mock", "--places", files / "nothing")
    assert line.endswith("name it with --places")


def test_what_is_missing_is_named_with_the_file_that_is_wanted(files: Path, said: Tell) -> None:
    path = files / "pipeline.json"
    (files / "other.json").write_text("{}")
    line = said("status", "--manifest", files / "other.json", code=3)
    assert "other.json: format is missing, wanted a manifest, the file that `minigpt plan` or `up` wrote" in line
    line = said("show", files / "other.json", code=3, main=attest)
    assert "format is missing, wanted an evidence file, as `minigpt status --save-evidence` writes it" in line
    line = said("show", files / "nothing", code=1, main=attest)
    assert line.endswith("; wanted an evidence file, as `minigpt status --save-evidence` writes it")
    (files / "other.json").write_text('{"a": "b')
    line = said("status", "--manifest", files / "other.json", code=3)
    assert line.endswith("not JSON: Unterminated string starting at line 1, column 7")
    (files / "pipeline.places.json").write_text('{"1": "tcp://127.0.0.1:2"}')
    line = said("generate", "x", "--manifest", path, "--allow-mock")
    assert "the address of stage 0 is missing, wanted one for each stage, 0 to 1" in line
    plain = json.loads(path.read_text())
    config = plain["model"]["config"]
    for changed, words in (
        ({name: config[name] for name in config if name != "n_inner"}, "config: n_inner missing, wanted every field"),
        (config | {"dropout": 0}, "config: got an unknown field 'dropout', wanted model_type, vocab_size"),
        (config | {"n_inner": None}, f"config.n_inner: got None, wanted {4 * SMALL.n_embd}, as `minigpt plan` writes"),
    ):
        path.write_text(json.dumps(plain | {"model": plain["model"] | {"config": changed}}))
        assert words in said("status", "--manifest", path, code=3)


def test_what_a_stage_cannot_read_is_named_as_on_its_command_line_with_what_it_should_be(tmp_path: Path) -> None:
    def told(what: str, source: str | int) -> str:
        with pytest.raises(UsageError) as caught:
            process._receive(what, source, 1, lambda data: data)
        return str(caught.value)

    number = 9_999_999  # of no descriptor
    wanted = "wanted a descriptor that whoever starts the stage opened for reading, on the file that `minigpt plan`"
    assert told("manifest", number).startswith(f"--manifest fd:{number}: Bad file descriptor; {wanted}")
    assert told("mock key", str(tmp_path / "nope")) == (
        f"--mock-key {tmp_path}/nope: No such file or directory; wanted the file that `python -m attest keygen "
        "--root ROOT --stage I -o FILE` makes"
    )


def test_a_measurement_is_asked_for_by_the_command_that_prints_it(said: Tell) -> None:
    words = "got 'ab', wanted 96 hex digits"
    line = said("plan", "-o", "x", "--root-key", MockRoot.generate().public.hex(), "--measurement", "ab")
    assert line == f"minigpt: --measurement: {words}, as `python -m attest measure` prints them"
    line = said("verify", "x", "--measurement", "ab", main=attest)
    assert line == f"attest: --measurement: {words}, not all zero, as `python -m attest measure` prints them"


def test_a_verdict_names_no_time_where_the_evidence_has_none(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "evidence").write_text("{}")
    words = ["verify", str(files / "evidence"), "--manifest", str(files / "pipeline.json"), "--stage", "0"]
    capsys.readouterr()
    assert attest(words) == 3
    assert capsys.readouterr().out.endswith("verdict: refused\n")


def test_a_hub_that_cannot_be_reached_leaves_something_to_do() -> None:
    assert sources._why_not(None, True).endswith("look at the network, or give the folder of a checkpoint that is here")


def test_the_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        minigpt(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for code in ("0 done", "1 failed", "2 usage", "3 manifest", "4 a stage", "5 weights", "130 interrupted"):
        assert code in told


def test_evidence_is_saved_in_a_folder_or_nothing_is_asked(files: Path, said: Tell) -> None:
    line = said("status", "--manifest", files / "pipeline.json", "--save-evidence", files / "empty")
    assert line.endswith("empty: is a file, wanted a folder, which is made if it is missing")


def test_help_names_no_default_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "score", "plan", "up", "status", "bench", "serve", "keygen", "relay", "endorsements"):
        with pytest.raises(SystemExit):
            minigpt([command, "--help"])
        for option in capsys.readouterr().out.split("\n  -"):
            assert " ".join(option.split()).count("default:") < 2


# Checkpoints.


def safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize("cut", [0.2, 0.999])
def test_weights_that_are_cut_off_are_called_so(tmp_path: Path, cut: float) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(size * cut))
    with pytest.raises(
        CheckpointError, match=f"it has {int(size * cut)} bytes, and its header announces {size}: cut off"
    ):
        weights.load(folder, SMALL, range(SMALL.n_layer))


def test_a_header_that_is_cut_off_is_called_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    os.truncate(folder / "model.safetensors", 20)
    with pytest.raises(CheckpointError, match=r"it has 20 bytes, and its header announces .*: cut off; fetch it again"):
        weights.load(folder, SMALL, range(SMALL.n_layer))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_weights_that_are_a_folder_are_called_so(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    (folder / "model.safetensors").unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is a folder, wanted a file"):
        weights.load(folder, SMALL, range(SMALL.n_layer))


def test_what_this_user_may_not_read_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything: the system's answer to others is made here."""
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError, match=r"model.safetensors: this user may not read it: .*chmod"):
            weights.load(folder, SMALL, range(SMALL.n_layer))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_file", refuse)
        with pytest.raises(CheckpointError, match=r"small: this user may not read it"):
            weights.load(folder, SMALL, range(SMALL.n_layer))
    with monkeypatch.context() as patched:
        patched.setattr(sources, "read_file", refuse)
        with pytest.raises(CheckpointError, match=r"config.json: this user may not read it: .*chmod"):
            sources.read_config(folder)


# Stages that ended.


def test_what_a_stage_logged_last_is_told_only_if_it_has_to_do_with_its_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"channel 7: open\n")
    with (tmp_path / "log").open("rb") as log:
        assert local.last_words(-9, log) == "was killed by signal 9, perhaps for lack of memory"
        assert local.last_words(-15, log) == "was killed by signal 15"
        assert local.last_words(-11, log) == "was killed by signal 11: channel 7: open"
        assert local.last_words(1, log) == "ended with code 1: channel 7: open"


def test_more_clients_than_a_stage_takes_are_refused_before_anything_starts(said: Tell) -> None:
    told = said("bench", "--clients", "1,97")
    assert told == "minigpt: --clients 97: a stage serves and lets wait at most 96 at once"


def test_a_relay_to_itself_is_refused(said: Tell) -> None:
    told = said("relay", "tcp://127.0.0.1:7000", "tcp://127.0.0.1:7000")
    assert "tcp://127.0.0.1:7000 twice: a relay to itself never ends" in told


def test_a_number_of_numpys_is_told_how_to_become_one_of_pythons() -> None:
    with pytest.raises(
        UsageError, match=r"max_tokens is int64, wanted a whole number of Python's own: give its \.item"
    ):
        Options(max_tokens=np.int64(2)).check()  # type: ignore[arg-type]


def test_a_client_key_that_is_none_is_told_where_one_is() -> None:
    with pytest.raises(UsageError, match=r"client_key has 3 bytes, wanted the 32 of a private key: in hex, `private`"):
        Pipeline.connect(b"", client_key=b"key")


def test_where_to_get_ray_is_this_project_and_no_name_on_the_index(said: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "minigpt.launch.on_ray", raising=False)
    assert said("up", "--on", "ray").endswith("--on ray needs Ray: pip install '.[ray]' in the project's folder")
