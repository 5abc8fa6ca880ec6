"""The command line, as real processes: what it prints where, and its exit codes."""

import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made import SMALL, random_tensors, write
from processes import ROOT, Stages, alive, eventually

import minigpt
from attest.providers.mock import MockRoot
from minigpt.protocol.manifest import Manifest
from minigpt.protocol.request import seed_of

PROMPT = "The capital of France is"


def run(*arguments: str, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """Runs minigpt; its exit code must be this one, and nothing in it a traceback."""
    command = [sys.executable, "-m", "minigpt", *arguments]
    environment = {**os.environ, **more}
    nobody = subprocess.DEVNULL  # and no terminal
    done = subprocess.run(command, stdin=nobody, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    """Two running stages of the embedded model."""
    where = tmp_path_factory.mktemp("tiny")
    folder = Path(minigpt.__file__).parent / "data"
    with Stages(folder, "6+6", where, model="tiny") as stages:
        yield stages.start_all()


def test_the_main_job() -> None:
    done = run("generate", PROMPT)
    assert done.stdout.startswith(" Paris")
    for words in ("stage 0  layers 0-5", "stage 1  layers 6-11", "evidence accepted", "nothing about hardware",
                  "20 tokens", "ms/token", "bytes/token"):  # fmt: skip
        assert words in done.stderr


def test_json_is_one_object_and_tells_all() -> None:
    done = run("generate", PROMPT, "--json", "--logprobs", "--stages", "3", "--max-tokens", "5", "--temperature", "1")
    told = json.loads(done.stdout)
    assert done.stderr == ""
    assert len(told["tokens"]) == len(told["latencies_ms"]) == 5
    assert told["text"] == "".join(token["text"] for token in told["tokens"])
    assert all(token["logprob"] <= 0 for token in told["tokens"])
    assert (told["reason"], len(told["stages"])) == ("length", 3)
    again = json.loads(run("generate", PROMPT, "--json", "--max-tokens", "5", "--temperature", "1",
                           "--seed", str(told["seed"])).stdout)  # fmt: skip
    assert again["text"] == told["text"]


def test_json_lines_are_an_object_for_each_token_as_it_comes(tiny: Stages) -> None:
    running = ("--manifest", str(tiny.path), "--allow-mock", "--max-tokens", "4", "--connect-timeout", "60")
    command = [sys.executable, "-m", "minigpt", "generate", PROMPT, "--json-lines", "--logprobs", "--n", "2", *running]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    whole = json.loads(run("generate", PROMPT, "--json", "--logprobs", *running).stdout)
    assert len(lines) == 10
    for answer in (lines[:5], lines[5:]):
        assert [line["id"] for line in answer[:4]] == [token["id"] for token in whole["tokens"]]
        assert "".join(line["text"] for line in answer[:4]) == whole["text"]
        assert all(line["logprob"] < 0 for line in answer[:4])
        assert (answer[4]["reason"], len(answer[4]["latencies_ms"])) == ("length", 4)
    assert "not allowed with" in run("generate", PROMPT, "--json", "--json-lines", code=2).stderr
    assert "connect_timeout" in run("generate", PROMPT, "--connect-timeout", "0", code=2).stderr.replace("-", "_")


def test_several_answers_have_seeds_of_their_own_and_their_alternatives() -> None:
    flags = ("--max-tokens", "4", "--temperature", "1.5", "--json")
    told = json.loads(run("generate", PROMPT, "--n", "3", "--seed", "7", "--top-logprobs", "2", *flags).stdout)
    assert [answer["seed"] for answer in told["answers"]] == [seed_of(7, index) for index in range(3)]
    assert len(told["stages"]) == 2
    for answer in told["answers"]:
        assert [len(token["top"]) for token in answer["tokens"]] == [2] * 4
        for token in answer["tokens"]:
            assert token["top"][0]["logprob"] >= token["top"][1]["logprob"]
            assert token["logprob"] <= token["top"][0]["logprob"]
        again = json.loads(run("generate", PROMPT, "--seed", str(answer["seed"]), *flags).stdout)
        assert again["text"] == answer["text"]
    drawn = run("generate", PROMPT, "--n", "2", *flags[:-1])
    assert drawn.stderr.count("; seed ") == 2
    assert drawn.stdout.count("\n") >= 2


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (("--repetition-penalty", "3"), {"repetition_penalty": 3.0}),
        (("--presence-penalty", "-1.5", "--frequency-penalty", "9"),
         {"presence_penalty": -1.5, "frequency_penalty": 9.0}),
        (("--logit-bias", "1534=-100", "--logit-bias", "854=-1e2"), {"logit_bias": {1534: -100.0, 854: -100.0}}),
        (("--min-p", "0.2", "--temperature", "2", "--seed", "1"), {"min_p": 0.2, "temperature": 2.0, "seed": 1}),
    ],
)  # fmt: skip
def test_the_sampling_is_that_of_generate(tiny: Stages, flags: tuple[str, ...], options: dict[str, Any]) -> None:
    plain = ("generate", PROMPT, "--manifest", str(tiny.path), "--allow-mock", "--max-tokens", "80")
    done = run(*plain, *flags)
    tokens = minigpt.load("tiny").generate(PROMPT, max_tokens=80, **options)
    assert done.stdout == "".join(token.text or "" for token in tokens) + "\n"
    assert done.stdout != run(*plain).stdout


def test_a_text_is_scored_token_by_token(tiny: Stages, tmp_path: Path) -> None:
    text = "The capital of France is Paris. Zürich\nliegt."
    file = tmp_path / "text"
    file.write_text(text + "\n")
    wanted = minigpt.load("tiny").score(text, 2)
    scored = [token.logprob for token in wanted if token.logprob is not None]
    perplexity = math.exp(-sum(scored) / len(scored))
    flags = ("--manifest", str(tiny.path), "--allow-mock")
    told = json.loads(run("score", str(file), *flags, "--json", "--top-logprobs", "2").stdout)
    assert "".join(token["text"] for token in told["tokens"]) == text
    assert told["tokens"][0]["logprob"] is None
    assert [token["logprob"] for token in told["tokens"][1:]] == pytest.approx(scored, abs=1e-4)
    assert [[each["id"] for each in token["top"]] for token in told["tokens"]] == [
        [each.id for each in token.top] for token in wanted
    ]
    assert told["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert len(told["stages"]) == 2
    for where in (flags, ("--stages", "1")):
        done = run("score", str(file), *where)
        lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
        assert (lines[0], len(lines)) == (["-", '"The"'], len(wanted))
        assert [float(number) for number, _ in lines[1:]] == pytest.approx(scored, abs=2e-4)
        assert '"\\n"' in done.stdout
        assert "\x1b" not in done.stdout
        assert f"{len(wanted)} tokens, perplexity {perplexity:.3f}" in done.stderr
    command = [sys.executable, "-m", "minigpt", "score", "-", *flags]
    piped = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert piped.stdout == run("score", str(file), *flags).stdout
    file.write_text("The")
    assert json.loads(run("score", str(file), *flags, "--json").stdout)["perplexity"] is None
    assert "1 token, which has none before it" in run("score", str(file), *flags).stderr


def test_a_text_that_cannot_be_scored_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "text"
    assert "No such file" in run("score", str(file), code=2).stderr
    file.write_bytes(b"\xff")
    assert "is not UTF-8 text" in run("score", str(file), code=2).stderr
    file.write_text("")
    assert "empty" in run("score", str(file), code=2).stderr
    file.write_text("The capital of France. " * 200)
    assert "512 positions" in run("score", str(file), code=2).stderr
    file.write_text("5 6 7")
    assert "wanted 0 (none) to 20; 5 is usual" in run("score", str(file), "--top-logprobs", "21", code=2).stderr
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    assert len(run("score", str(file), "--model", str(folder)).stdout.splitlines()) == 3


def test_a_flag_that_has_no_effect_is_warned_of(tiny: Stages) -> None:
    def warnings(*flags: str, **more: Any) -> list[str]:
        done = run("generate", PROMPT, "--max-tokens", "1", *flags, **more)
        return [line for line in done.stderr.splitlines() if line.startswith("warning: ")]

    running = ("--manifest", str(tiny.path), "--allow-mock")
    draws = ("--seed", "1", "--top-k", "5", "--top-p", "0.5", "--min-p", "0.1")
    (greedy,) = warnings(*draws, *running)
    assert greedy.startswith("warning: --seed and --top-k and --top-p and --min-p have no effect: at temperature 0")
    assert greedy.endswith("give --temperature 1 to draw")
    assert warnings(*draws, "--temperature", "1", *running) == []
    assert "--draft has no effect" in warnings("--draft", "4", "--temperature", "1", *running)[0]
    assert "--draft has no effect" in warnings("--draft", "4", "--logit-bias", "5=1", *running)[0]
    told = warnings("--threads", "1", "--revision", "main", "--logprobs", *running)
    for words in (
        "--threads has no effect: the stages of --manifest run already",
        "--revision has no effect: the manifest pins",
        "--logprobs has no effect: only --json and --json-lines show it: add one of them",
    ):
        assert sum(words in line for line in told) == 1
    off = ("--draft", "0", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--top-logprobs", "0", "--temperature", "0")
    assert warnings(*off, *running) == []
    assert warnings(*running, MINIGPT_SEED="4", MINIGPT_TOP_K="3") == []
    assert "--handshake-timeout has no effect: it is for --manifest" in warnings("--handshake-timeout", "9")[0]


def test_a_stop_string_ends_the_text_before_it() -> None:
    assert run("generate", PROMPT, "--stop", "ris").stdout == " Pa\n"


def test_a_stop_string_may_be_a_new_line(tiny: Stages) -> None:
    running = ("--manifest", str(tiny.path), "--allow-mock", "--max-tokens", "60")
    whole = run("generate", "List:\n-", *running).stdout
    before, found, _ = whole.removesuffix("\n").partition("\n")
    assert found
    assert run("generate", "List:\n-", *running, "--stop", r"\n").stdout == before + "\n"


def test_the_prompt_may_come_from_standard_input(tiny: Stages) -> None:
    command = [sys.executable, "-m", "minigpt", "generate", "-", "--manifest", str(tiny.path), "--allow-mock"]
    for prompt in (PROMPT, PROMPT + "\n"):
        done = subprocess.run(command, input=prompt, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.stdout.startswith(" Paris")
    broken = subprocess.run(command, input=b"\xff\xfe", capture_output=True, cwd=ROOT, timeout=60)
    assert broken.returncode == 2
    assert broken.stderr == b"minigpt: standard input is not UTF-8 text\n"


def test_a_prompt_written_on_windows_is_the_same_as_one_written_on_linux(tiny: Stages) -> None:
    command = [sys.executable, "-m", "minigpt", "generate", "-", "--manifest", str(tiny.path), "--allow-mock", "--json"]
    told = []
    for prompt in ("Chile.\nThe capital of Peru is\n", "\ufeffChile.\r\nThe capital of Peru is\r\n"):
        done = subprocess.run(command, input=prompt.encode(), capture_output=True, cwd=ROOT, timeout=60)
        told.append(json.loads(done.stdout))
    assert told[0]["prompt_tokens"] == told[1]["prompt_tokens"]
    assert told[0]["tokens"] == told[1]["tokens"]


def test_a_prompt_that_is_no_text_is_refused_in_words() -> None:
    command = [sys.executable.encode(), b"-m", b"minigpt", b"generate", b"\xff"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"minigpt: the prompt is not UTF-8 text\n")


def test_closed_standard_streams_do_no_harm(tiny: Stages) -> None:
    command = f'{sys.executable} -m minigpt generate "{PROMPT}" --manifest {tiny.path} --allow-mock'
    for closed in ("<&-", ">&-", "2>&-"):
        done = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, cwd=ROOT, timeout=60)
        assert done.returncode == 0, done.stderr


def test_a_flag_beats_the_environment_of_its_alternative() -> None:
    told = json.loads(run("generate", PROMPT, "--json", "--stages", "1", MINIGPT_SPLIT="6+6").stdout)
    assert len(told["stages"]) == 1


def test_an_option_comes_from_its_flag_else_the_environment_else_its_default(tiny: Stages) -> None:
    def count(*flags: str, **environment: str) -> int:
        arguments = ("generate", PROMPT, "--manifest", str(tiny.path), "--allow-mock", "--json", *flags)
        more: dict[str, Any] = dict(environment)
        return len(json.loads(run(*arguments, **more).stdout)["tokens"])

    assert count() == 20
    assert count(MINIGPT_MAX_TOKENS="3") == 3
    assert count("--max-tokens", "4", MINIGPT_MAX_TOKENS="3") == 4


def test_a_checkpoint_without_a_tokenizer_works_with_ids(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    done = run("generate", "5 6 7", "--model", str(folder), "--max-tokens", "4")
    wanted = [token.id for token in minigpt.load(str(folder)).generate([5, 6, 7], max_tokens=4)]
    assert [int(word) for word in done.stdout.split()] == wanted
    assert "token ids" in run("generate", "words", "--model", str(folder), code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("generate",), 2, "PROMPT"),
        (("generate", PROMPT, "--max-tokens", "many"), 2, "--max-tokens"),
        (("generate", PROMPT, "--stages", "2", "--split", "6+6"), 2, "not allowed with"),
        (("generate", PROMPT, "--max-tokens", "0"), 2, "at least 1"),
        (("generate", PROMPT, "--split", "6+5"), 2, "11 layers in all"),
        (("generate", PROMPT, "--stages", "13"), 2, "from 1 to 12"),
        (("generate", PROMPT, "--threads", "0"), 2, "at least 1"),
        (("generate", PROMPT, "--timeout", "nan"), 2, "seconds"),
        (("generate", PROMPT, "--temperature", "1e7"), 2, "temperature"),
        (("generate", PROMPT, "--top-p", "nan"), 2, "--top-p is nan"),
        (("generate", PROMPT, "--seed", "-1"), 2, "seed"),
        (
            ("generate", PROMPT, "--repetition-penalty", "0"),
            2,
            "is 0.0, wanted any number above 0; 1 is none, 1.1 to 1.3",
        ),
        (("generate", PROMPT, "--presence-penalty", "nan"), 2, "is nan, wanted any finite number; 0 is none, -2 to 2"),
        (("generate", PROMPT, "--frequency-penalty", "x"), 2, "--frequency-penalty: got 'x', wanted a number"),
        (("generate", PROMPT, "--min-p", "1.5"), 2, "is 1.5, wanted 0 (all) to 1; 0.02 to 0.1 is usual"),
        (("generate", PROMPT, "--logit-bias", "5"), 2, "got '5', wanted a token's id, = and a number"),
        (("generate", PROMPT, "--logit-bias", "a=1"), 2, "-100 (never) to 100 (always) is usual"),
        (("generate", PROMPT, "--logit-bias", "5=nan"), 2, "-100 (never) to 100 (always) is usual"),
        (("generate", PROMPT, "--logit-bias", "5=1", "--logit-bias", "5=2"), 2, "an id twice, wanted each once"),
        (("generate", PROMPT, "--logit-bias", "2048=1"), 2, "wanted one of the model's, 0 to 2047"),
        (("generate", PROMPT, "--top-logprobs", "21"), 2, "is 21, wanted 0 (none) to 20; 5 is usual"),
        (("generate", PROMPT, "--n", "0"), 2, "got 0, wanted 1 (as usual) to 128"),
        (("score",), 2, "FILE"),
        (("generate", PROMPT, "--manifest", "x", "--stages", "2"), 2, "local stages"),
        (("plan", "-o", "x", "--root-key", "ab" * 32, "--address", "nowhere"), 2, "address"),
        (("plan", "-o", "x", "--root-key", "ab" * 32, "--days", "nan"), 2, "days"),
        (("bench", "--runs", "0"), 2, "at least 1"),
        (("bench", "--stages", "1,x"), 2, "whole number"),
        (("bench", "--format", "xml"), 2, "md or json"),
        (("bench", "--plot", "latencies.pdf"), 2, ".svg or .png"),
        (("bench", "--plot", "/nowhere/latencies.svg"), 2, "no folder that exists"),
        (("generate", PROMPT, "--model", "/nowhere/at all"), 1, "no such folder"),
        (("generate", PROMPT, "--manifest", "/nowhere"), 2, "No such file"),
        (("generate", PROMPT, "--manifest-sha256", "00"), 2, "needs --manifest"),
        (("generate", ""), 2, "empty"),
        (("status",), 2, "--manifest"),
        (("plan", "-o", "x"), 2, "--root-key"),
        (("plan", "-o", "x", "--root-key", "12"), 2, "64 hex digits"),
        (("bench", "--stages", "0"), 2, "--stages"),
        (("nothing",), 2, "nothing"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments: tuple[str, ...], code: int, words: str) -> None:
    done = run(*arguments, code=code)
    assert words in done.stderr
    assert done.stdout == ""


def test_plan_pins_platforms_in_the_order_of_the_stages(tmp_path: Path) -> None:
    pins = {"provider": "snp", "covers": "image", "product": "Milan", "measurements": ["07" * 48], "policy": 0x30000,
            "min_tcb": {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 217}, "vmpl": 0}  # fmt: skip
    (tmp_path / "snp.json").write_text(json.dumps(pins))
    registers = {f"PCR{index}": f"0{index + 1}" * 48 for index in range(3)}
    (tmp_path / "nitro.json").write_text(json.dumps({"Measurements": registers}))
    snp, nitro, plan = (str(tmp_path / name) for name in ("snp.json", "nitro.json", "plan.json"))
    root = ("--root-key", MockRoot.generate().public.hex())
    planned: list[tuple[tuple[str, ...], list[str]]] = [
        (("--snp", snp, "--pcrs", nitro), ["snp", "nitro"]),
        (("--pcrs", nitro, "--snp", snp), ["nitro", "snp"]),
        (("--snp", snp, "--pcrs", "mock", *root), ["snp", "mock"]),
        (("--snp", "mock", "--snp", snp, *root), ["mock", "snp"]),
    ]
    for words, kinds in planned:
        run("plan", "--stages", "2", "-o", plan, *words)
        stages = json.loads(Path(plan).read_text())["stages"]
        assert [stage["evidence"]["provider"] for stage in stages] == kinds
        assert stages[kinds.index("snp")]["evidence"] == pins
        Path(plan).unlink()
    refused: list[tuple[tuple[str, ...], str]] = [
        (("--snp", snp, *root), "leave out"), (("--snp", "mock"), "--root-key"), (("--snp", nitro), "min_tcb"),
        (("--snp", "/nowhere"), "No such file"),
    ]  # fmt: skip
    for words, told in refused:
        assert told in run("plan", "--stages", "1", "-o", plan, *words, code=2).stderr
    run("plan", "--stages", "2", "-o", plan, "--snp", snp)  # one for all
    stage = subprocess.run([sys.executable, "-m", "minigpt.stage", "--manifest", plan, "--index", "1"],
                           cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert stage.returncode == 3
    assert "is this an SNP guest?" in stage.stderr


def test_plan_pins_trust_domains_in_order_and_warns_of_weak_ones(tmp_path: Path) -> None:
    pins = {
        "provider": "tdx", "covers": "image", "mrtd": "01" * 48, **{f"rtmr{i}": f"1{i}" * 48 for i in range(4)},
        "td_attributes": "0000001000000000", "xfam": "e702060000000000", "min_tcb_evaluation": 17,
    }  # fmt: skip
    weak = pins | {"td_attributes": "00" * 8, "rtmr1": "00" * 48, "rtmr2": "00" * 48}
    described = {"Measurements": {f"PCR{i}": f"0{i + 1}" * 48 for i in range(3)}}
    files = {"good": pins, "weak": weak, "image": described, "bad": pins | {"mrtd": "00" * 48}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    plan, root = tmp_path / "pipeline.json", ("--root-key", MockRoot.generate().public.hex())
    done = run("plan", "--split", "4+4+4", "--tdx", str(tmp_path / "good"), "--pcrs", str(tmp_path / "image"),
               "--tdx", str(tmp_path / "weak"), "-o", str(plan))  # fmt: skip
    assert [stage.platform.name for stage in Manifest.parse(plan.read_bytes()).stages] == ["tdx", "nitro", "tdx"]
    plan.unlink()
    warned = [line for line in done.stderr.splitlines() if "warning" in line]
    assert ["SEPT_VE_DISABLE" in warned[0], "rtmr1 and rtmr2 zero" in warned[1], len(warned)] == [True, True, 2]
    assert all(f"--tdx {tmp_path / 'weak'}" in line for line in warned)
    run("plan", "--split", "4+8", "--pcrs", "mock", "--tdx", str(tmp_path / "good"), *root, "-o", str(plan))
    assert [stage.platform.name for stage in Manifest.parse(plan.read_bytes()).stages] == ["mock", "tdx"]
    for words, said in (
        (("--tdx", str(tmp_path / "bad")), "mrtd"), (("--tdx", str(tmp_path / "none")), "No such file"),
        (("--tdx", str(tmp_path / "image")), "--tdx"), (("--tdx", str(tmp_path / "good"), *root), "--root-key"),
        (("--pcrs", "mock", "--tdx", str(tmp_path / "good")), "--root-key"),
    ):  # fmt: skip
        assert said in run("plan", "--stages", "1", *words, "-o", str(tmp_path / "no.json"), code=2).stderr
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (
            "tcp://0.0.0.0:5001",
            "tcp://a:5002",
            "wanted the address at which stage 0 is reached; where it listens is its",
        ),
        ("tcp://a:5001", "tcp://[::]:5001", "wanted the address at which stage 1 is reached"),
        ("tcp://a:0", "tcp://a:1", "got port 0, wanted the one where the stage serves"),
        ("tcp://a:5001", "tcp://a:5001", "given for stages 0 and 1, wanted one for each"),
    ],
)
def test_plan_refuses_addresses_at_which_stages_cannot_be(tmp_path: Path, one: str, other: str, told: str) -> None:
    options = ("--stages", "2", "--root-key", MockRoot.generate().public.hex(), "-o", str(tmp_path / "pipeline.json"))
    assert told in run("plan", *options, "--address", one, "--address", other, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_plan_takes_one_address_behind_two_hosts(tmp_path: Path) -> None:
    options = ("--stages", "2", "--root-key", MockRoot.generate().public.hex(), "-o", str(tmp_path / "pipeline.json"))
    run("plan", *options, "--address", "vsock://3:5102", "--address", "vsock://3:5102")


def test_plan_names_a_test_root_of_images_and_warns_of_it(tmp_path: Path) -> None:
    file, plan, digest = tmp_path / "image.json", str(tmp_path / "plan.json"), "7a" * 32
    file.write_text(json.dumps({"Measurements": {f"PCR{i}": f"0{i + 1}" * 48 for i in range(3)}}))
    image = ("--pcrs", str(file))
    mock = ("--pcrs", "mock", "--root-key", MockRoot.generate().public.hex())
    done = run("plan", "--stages", "2", "-o", plan, *image, *mock, "--test-root", digest)
    roots = [stage.test_root for stage in Manifest.parse(Path(plan).read_bytes()).stages]
    assert roots == [bytes.fromhex(digest), None]
    assert f"warning: stage 0 is believed under a test's root, {digest}, which proves nothing" in done.stderr
    stage = subprocess.run([sys.executable, "-m", "minigpt.stage", "--manifest", plan, "--index", "0", "--allow-mock"],
                           cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert "refused without --allow-test-root" in stage.stderr
    for words, root, code, told in (
        (mock[2:], digest, 2, "--test-root is for images"), (mock, digest, 2, "--test-root is for images"),
        (image, "12", 2, "64 hex digits"), (image, "00" * 32, 3, "not all zeros"),
    ):  # fmt: skip
        options = ("--stages", "1", "-o", str(tmp_path / "no.json"), "--test-root", root)
        assert told in run("plan", *options, *words, code=code).stderr
    assert not (tmp_path / "no.json").exists()
    other = tmp_path / "other.json"
    run("plan", "--stages", "1", "-o", str(other), *image, MINIGPT_TEST_ROOT=digest)
    assert Manifest.parse(other.read_bytes()).stages[0].test_root is None  # never by the environment


def test_plan_keygen_stage_status_and_verify_by_hand(tmp_path: Path, tiny: Stages) -> None:
    root = MockRoot.generate()
    plan = tmp_path / "pipeline.json"
    key = run("keygen", "-o", str(tmp_path / "client.key"))
    assert "exists" in run("keygen", "-o", str(tmp_path / "client.key"), code=2).stderr
    done = run("plan", "--split", "4+8", "--root-key", root.public.hex(), "--client", key.stdout.strip(),
               "--operator", "5a" * 32, "--address", "tcp://127.0.0.1:1", "--address", "tcp://127.0.0.1:2", "-o",
               str(plan))  # fmt: skip
    digest = done.stdout.strip()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    before = plan.read_bytes()
    assert Manifest.parse(before).operators == frozenset([b"\x5a" * 32])
    wrong = run("plan", "--root-key", root.public.hex(), "--operator", "5a", "-o", f"{plan}2", code=2).stderr
    assert "--operator" in wrong
    refused = run("plan", "--root-key", root.public.hex(), "-o", str(plan), code=2).stderr
    assert f"{plan}: exists, and a pipeline may run by it: choose another name, or remove it first" in refused
    assert plan.read_bytes() == before
    flags = ("--manifest", str(plan), "--allow-mock", "--client-key", str(tmp_path / "client.key"))
    dead = run("status", *flags, "--manifest-sha256", digest, code=4).stdout.splitlines()
    assert ["cannot be reached" in dead[0], "not asked" in dead[1]] == [True, True]
    for stage in json.loads(run("status", *flags, "--json", code=4).stdout)["stages"]:
        assert stage["error"]
        unknown = {name for name, value in stage.items() if value is None}  # not 0
        assert unknown >= {"uptime_s", "weights_bytes", "channels", "sequences", "queue", "rate", "tokens", "resumed"}
    assert "sha256" in run("status", *flags, "--manifest-sha256", "0" * 64, code=3).stderr

    status = ("status", "--manifest", str(tiny.path), "--allow-mock")
    assert "hardware" in run(*status[:3], code=3).stderr
    shown = run(*status, "--save-evidence", str(tmp_path / "evidence"))
    places, load = shown.stdout.split("\n\n")
    assert [line[:7] for line in places.splitlines()] == ["stage 0", "stage 1"]
    assert [line.split()[0] for line in load.splitlines()] == ["stage", "0", "1"]
    told = json.loads(run(*status, "--json").stdout)
    assert [(stage["evidence"], stage["error"]) for stage in told["stages"]] == [("accepted", None)] * 2
    measurement = next(iter(tiny.manifest.stages[0].pins.measurements)).hex()
    for index in (0, 1):
        file = str(tmp_path / "evidence" / f"stage-{index}.json")
        command = [
            sys.executable,
            "-m",
            "attest",
            "verify",
            file,
            "--root",
            tiny.root.public.hex(),
            "--stage",
            str(index),
        ]
        for pinned, code in ((measurement, 0), ("05" * 48, 3)):
            verdict = subprocess.run([*command, "--measurement", pinned], capture_output=True, text=True, cwd=ROOT)
            assert verdict.returncode == code, verdict.stderr


def test_a_dead_stage_is_named_by_status_and_by_generate(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "1+2+1", tmp_path) as stages:
        stages.start_all()
        stages.kill(1)
        status = run("status", "--manifest", str(stages.path), "--allow-mock", code=4)
        assert "stage 1 cannot be reached" in status.stdout
        assert "not asked" in status.stdout.splitlines()[2]
        done = run("generate", "1 2 3", "--manifest", str(stages.path), "--allow-mock", "--retry-for", "0", code=4)
        assert "stage 1 cannot be reached" in done.stderr


def test_status_watches_a_stage_die_and_come_back_over_one_link(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    with Stages(folder, "2+2", tmp_path) as stages:
        stages.start_all()
        command = ["status", "--manifest", str(stages.path), "--allow-mock", "--watch", "0.05", "--json"]
        process = subprocess.Popen(
            [sys.executable, "-m", "minigpt", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        assert process.stdout is not None

        def errors() -> list[str | None]:
            """Of both stages, at the next look."""
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 60)[0]
            return [stage["error"] for stage in json.loads(process.stdout.readline())["stages"]]

        try:
            for _ in range(5):
                assert errors() == [None, None]
            assert stages.log(0).count(": open") == 1
            stages.kill(1)
            assert eventually(lambda: "stage 1 cannot be reached" in (errors()[1] or ""))
            stages.start(1)
            assert eventually(lambda: errors() == [None, None])
            stages.kill(0)
            assert eventually(lambda: "stage 0 cannot be reached" in (errors()[0] or ""))
            assert "not asked" in (errors()[1] or "")
            stages.start(0)
            assert eventually(lambda: errors() == [None, None])
            process.send_signal(signal.SIGINT)
            assert (process.wait(60), process.stderr.read()) == (130, b"")  # type: ignore[union-attr]
        finally:
            process.kill()
            process.communicate()


def test_a_watch_into_a_file_prints_one_table_after_the_other(tiny: Stages) -> None:
    command = [sys.executable, "-m", "minigpt", "status", "--manifest", str(tiny.path), "--allow-mock", "--watch=0.01"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        table = [process.stdout.readline() for _ in range(7)]
        assert table[6] == "\n"
        assert [process.stdout.readline()[:7] for _ in range(5)] == [line[:7] for line in table[:5]]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors.count("\n") == 1  # that it is the mock, once
        assert "\033" not in "".join(table)
    finally:
        process.kill()
        process.communicate()


def test_a_stage_says_in_a_sentence_why_it_does_not_start(tmp_path: Path, tiny: Stages) -> None:
    def stage(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "minigpt.stage", "--manifest", str(tiny.path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)

    key = ("--mock-key", str(tiny.key(1)), "--listen", "tcp://127.0.0.1:0")
    for arguments, code, words in (
        ((), 2, "--index"),
        (("--index", "7", "--allow-mock", *key), 2, "from 0 on"),
        (("--index", "1", *key), 3, "--allow-mock"),
        (("--index", "1", "--allow-mock"), 2, "--mock-key"),
        (("--index", "1", "--allow-mock", *key, "--model", str(tmp_path)), 1, "safetensors"),
        (("--index", "1", "--allow-mock", *key, "--listen", "fd:999"), 2, "descriptor 999"),
        (("--index", "1", "--allow-mock", *key, "--listen", "nowhere"), 2, "nowhere"),
        (("--index", "1", "--allow-mock", "--mock-key", str(tiny.path)), 3, "mock"),
    ):
        done = stage(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_bench_prints_tables_or_every_latency(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    flags = (
        "bench",
        "--model",
        str(folder),
        "--prompt",
        "1 2 3",
        "--runs",
        "2",
        "--max-tokens",
        "4",
        "--stages",
        "1,2",
    )
    latencies, sentence, breakdown = (part.splitlines() for part in run(*flags).stdout.split("\n\n"))
    assert (len(latencies), len(breakdown)) == (4, 7)
    assert "`wire`" in " ".join(sentence)
    for rows in (latencies, breakdown):
        assert all(row.count("|") == rows[0].count("|") for row in rows)
    told = json.loads(run(*flags, "--format", "json").stdout)
    assert [(each["stages"], each["run"], len(each["between_ms"])) for each in told["latencies"]] == [
        (1, 0, 3), (1, 1, 3), (2, 0, 3), (2, 1, 3)]  # fmt: skip
    assert [row["p99_ms"] for row in told["summary"]] == [None, None]  # of six samples there is no p99
    assert [(row["stages"], row["party"]) for row in told["breakdown"]] == [
        (1, "client"), (1, "stage 0"), (2, "client"), (2, "stage 0"), (2, "stage 1")]  # fmt: skip
    assert [row["wire_ms"] is None for row in told["breakdown"]] == [False, True, False, False, True]


@pytest.mark.parametrize("clients", [(), ("--clients", "1")])
def test_bench_needs_no_prompt_where_there_is_no_tokenizer(tmp_path: Path, clients: tuple[str, ...]) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    flags = ("--model", str(folder), "--runs", "1", "--max-tokens", "2", "--stages", "1")
    assert "| 1 |" in run("bench", *flags, *clients).stdout.replace("  ", " ")


def test_versions() -> None:
    assert run("--version").stdout == f"minigpt {minigpt.__version__}\n"


def test_a_closed_pipe_ends_quietly(tiny: Stages) -> None:
    command = f'{sys.executable} -m minigpt generate "{PROMPT}" --manifest {tiny.path} --allow-mock'
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "141\n"
    assert "Error" not in done.stderr


def test_ctrl_c_ends_everything() -> None:
    command = [sys.executable, "-m", "minigpt", "generate", PROMPT, "--max-tokens", "400", "--temperature", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.read(1) == " "
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert eventually(lambda: not any(alive(int(pid)) for pid in children))
    finally:
        process.kill()
        process.wait()


AT_IMPORT = """
import os, signal, sys
command, at = sys.argv.pop(1), sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, *_):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from importlib import import_module
sys.exit(import_module(command).main())
"""


@pytest.mark.parametrize(
    ("command", "module"),
    [
        *[("minigpt.__main__", name) for name in ("argparse", "attest", "transport.errors", "minigpt.cli.commands")],
        ("minigpt.__main__", "numpy"),
        ("minigpt.stage.__main__", "attest"),
        ("minigpt.stage.__main__", "numpy"),
        ("attest.__main__", "argparse"),
        ("attest.__main__", "Crypto"),
    ],
)
def test_ctrl_c_is_quiet_also_while_it_starts(command: str, module: str, tiny: Stages) -> None:
    arguments = {
        "minigpt.__main__": ["generate", PROMPT],
        "minigpt.stage.__main__": ["--manifest", str(tiny.path), "--index", "0"],
        "attest.__main__": ["measure"],
    }
    run = [sys.executable, "-c", AT_IMPORT, command, module, *arguments[command]]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=60)
    said = [line for line in done.stderr.splitlines() if "WARNING not isolated" not in line]
    assert (done.returncode, done.stdout, said) == (130, "", [])


@pytest.mark.parametrize("megabytes", [32, 64, 128, 160])
def test_too_little_memory_is_said_in_a_sentence(megabytes: int) -> None:
    command = f'ulimit -v {1024 * megabytes} && exec "{sys.executable}" -m minigpt generate "{PROMPT}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") < 5, done.stderr  # OpenBLAS may have its own words


BAD = {
    "STAGES": "two", "SPLIT": "6+5", "MAX_TOKENS": "many", "TEMPERATURE": "x", "TOP_K": "-1", "TOP_P": "nan",
    "SEED": "-1", "THREADS": "0", "DRAFT": "x", "TIMEOUT": "0", "MANIFEST": "/nowhere", "AEAD": "openssl",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_of_the_environment_is_refused_by_the_variables_name(name: str) -> None:
    bad: dict[str, Any] = {f"MINIGPT_{name}": BAD[name]}
    done = run("generate", PROMPT, code=2, **bad)
    assert f"MINIGPT_{name}" in done.stderr
    assert done.stdout == ""


def test_an_empty_variable_counts_as_unset() -> None:
    names = (*BAD, "CLIENT_KEY", "MANIFEST_SHA256", "MODEL", "REVISION")
    empty: dict[str, Any] = {f"MINIGPT_{name}": "" for name in names}
    done = run("generate", PROMPT, "--json", **empty)
    told = json.loads(done.stdout)
    assert (len(told["tokens"]), len(told["stages"])) == (20, 2)


def test_variables_for_a_running_pipeline_leave_a_local_one_alone(tmp_path: Path) -> None:
    pins: dict[str, Any] = {"MINIGPT_CLIENT_KEY": str(tmp_path / "no key"), "MINIGPT_MANIFEST_SHA256": "00"}
    assert run("generate", PROMPT, **pins).stdout.startswith(" Paris")
    more = pins | {"MINIGPT_MANIFEST": str(tmp_path / "no manifest")}
    assert run("generate", PROMPT, "--stages", "1", **more).stdout.startswith(" Paris")
    assert "needs --manifest" in run("generate", PROMPT, "--client-key", "x", code=2).stderr


def test_bench_takes_its_stages_from_the_environment(tmp_path: Path) -> None:
    folder = write(tmp_path / "small", SMALL, random_tensors(SMALL))
    flags = ("bench", "--model", str(folder), "--prompt", "1 2", "--runs", "1", "--max-tokens", "2", "--format", "json")
    rows = json.loads(run(*flags, MINIGPT_STAGES="2,1").stdout)["summary"]
    assert [row["stages"] for row in rows] == [2, 1]
    assert "MINIGPT_STAGES" in run(*flags, code=2, MINIGPT_STAGES="2,x").stderr


def test_a_stage_takes_its_options_from_the_environment(tiny: Stages) -> None:
    def stage(*flags: str, **more: str) -> str:
        command = [sys.executable, "-m", "minigpt.stage", *flags]
        environment = os.environ | {f"MINIGPT_{name}": value for name, value in more.items()}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        return done.stderr

    manifest = str(tiny.path)
    assert "from 0 on" in stage("--allow-mock", MANIFEST=manifest, INDEX="7")
    assert "--mock-key" in stage("--allow-mock", "--index", "1", MANIFEST=manifest, INDEX="7")
    assert "MINIGPT_INDEX" in stage("--allow-mock", MANIFEST=manifest, INDEX="x")
    assert "MINIGPT_IDLE_TIMEOUT" in stage("--index", "1", "--manifest", manifest, IDLE_TIMEOUT="0")
    assert "MINIGPT_AEAD" in stage("--index", "1", "--manifest", manifest, AEAD="openssl")
    assert "--manifest" in stage(MANIFEST="", INDEX="")
