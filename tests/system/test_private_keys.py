"""A private key stays private: where a public one belongs it is recognised, and no error quotes it."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import ROOT, Stages, eventually

import minigpt

KINDS = {
    "client": "a client's private key",
    "root": "the mock's private root key",
    "stage": "a stage's private mock key",
}


@dataclass
class Keys:
    """The three kinds of private files, by name, and what keygen printed for each."""

    files: dict[str, Path]
    public: dict[str, str]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    files = {name: folder / f"{name}.json" for name in KINDS}
    more = {
        "client": ["minigpt", "keygen"],
        "root": ["attest", "keygen"],
        "stage": ["attest", "keygen", "--root", str(files["root"]), "--stage", "0"],
    }
    public = {}
    for name, words in more.items():
        command = [sys.executable, "-m", *words, "-o", str(files[name])]
        public[name] = subprocess.check_output(command, text=True, cwd=ROOT, stderr=subprocess.DEVNULL).strip()
    return Keys(files, public)


def refused(keys: Keys, command: str, code: int = 2, **environment: str) -> str:
    """What a command of the shell says; {client}, {root} and {stage} are files, {P} is Python. It quotes no key."""
    files = {name: shlex.quote(str(path)) for name, path in keys.files.items()}
    done = subprocess.run(
        ["bash", "-c", command.format(P=f"{shlex.quote(sys.executable)} -m", **files)],
        capture_output=True, text=True, cwd=ROOT, timeout=60, env=os.environ | environment,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    for path in keys.files.values():
        assert json.loads(path.read_text())["private"][:16] not in said
    return said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "command",
    [
        "{P} minigpt plan -o /dev/null --root-key {root_key} --client %s",
        "{P} minigpt plan -o /dev/null --root-key {root_key} --operator %s",
        "{P} minigpt plan -o /dev/null --root-key %s",
        "{P} attest verify /dev/null --measurement {measurement} --root %s",
        "{P} attest keygen --stage 0 -o /nowhere/key --root %s",
        "{P} minigpt generate hi --manifest /dev/null --client-key %s",
        "{P} minigpt.stage --index 0 --manifest /dev/null --mock-key %s",
    ],
)
def test_a_private_files_text_on_the_command_line_is_named_and_not_quoted(keys: Keys, kind: str, command: str) -> None:
    command = command.replace("{root_key}", keys.public["root"]).replace("{measurement}", "05" * 48)
    for quoted in (f"$(cat {{{kind}}})", f'"$(cat {{{kind}}})"'):
        assert f"got {KINDS[kind]}" in refused(keys, command % quoted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_files_name_where_a_public_key_belongs_is_named(keys: Keys, kind: str) -> None:
    plan = f"{{P}} minigpt plan -o /dev/null --root-key {keys.public['root']} --client {{{kind}}}"
    for command in (
        plan,
        f"{{P}} minigpt plan -o /dev/null --root-key {{{kind}}}",
        f"{{P}} attest verify /dev/null --measurement {'05' * 48} --root {{{kind}}}",
    ):
        assert f"which holds {KINDS[kind]}, wanted a public key" in refused(keys, command)


def test_a_private_key_in_the_environment_is_named_and_not_quoted(keys: Keys) -> None:
    client, root = (keys.files[name].read_text() for name in ("client", "root"))
    generate = "{P} minigpt generate hi --manifest /dev/null"
    assert f"got {KINDS['client']}" in refused(keys, generate, MINIGPT_CLIENT_KEY=client)
    assert f"got {KINDS['root']}" in refused(keys, "{P} minigpt plan -o /dev/null", MINIGPT_ROOT_KEY=root)
    assert f"got {KINDS['root']} in MINIGPT_MANIFEST" in refused(keys, "{P} minigpt generate hi", MINIGPT_MANIFEST=root)
    stage = "{P} minigpt.stage --index 0 --manifest /dev/null"
    assert f"got {KINDS['client']} in MINIGPT_MOCK_KEY" in refused(keys, stage, MINIGPT_MOCK_KEY=client)


def test_a_public_key_where_a_private_file_belongs_is_named(keys: Keys, tmp_path: Path) -> None:
    public = tmp_path / "public"
    public.write_text(keys.public["client"] + "\n")
    generate = "{P} minigpt generate hi --manifest /dev/null --client-key "
    keygen = "{P} attest keygen --stage 0 -o /nowhere/key --root "
    for command, kind, code in ((generate, "client", 2), (keygen, "root", 3)):
        assert f"as a public key is written, wanted {KINDS[kind]}" in refused(keys, command + str(public), code)
        said = refused(keys, command + keys.public["client"])
        assert "got a key (64 hex digits), wanted the name of a private key's file" in said
        assert keys.public["client"] not in said  # a private one would look the same


def test_a_private_file_of_another_kind_is_named(keys: Keys) -> None:
    generate = "{P} minigpt generate hi --manifest /dev/null --client-key "
    keygen = "{P} attest keygen --stage 0 -o /nowhere/key --root "
    for command, own, code in ((generate, "client", 2), (keygen, "root", 3)):
        for kind in set(KINDS) - {own}:
            assert f"got {KINDS[kind]}, wanted {KINDS[own]}" in refused(keys, f"{command}{{{kind}}}", code)


def test_a_stage_names_what_is_no_mock_key(keys: Keys, tmp_path: Path) -> None:
    with Stages(Path(minigpt.__file__).parent / "data", "12", tmp_path, model="tiny") as stages:
        stage = f"{{P}} minigpt.stage --manifest {stages.path} --index 0 --allow-mock --mock-key "
        for kind in ("client", "root"):
            assert f"got {KINDS[kind]}, wanted {KINDS['stage']}" in refused(keys, f"{stage}{{{kind}}}", 3)
        (tmp_path / "public").write_text(keys.public["stage"])
        assert f"wanted {KINDS['stage']}" in refused(keys, f"{stage}{tmp_path / 'public'}", 3)


def test_a_private_file_that_others_may_read_is_warned_of(keys: Keys, tmp_path: Path) -> None:
    commands = {
        "client": "{P} minigpt generate hi --manifest /dev/null --client-key ",
        "root": f"{{P}} attest keygen --stage 0 -o {tmp_path}/no/folder --root ",
    }
    for kind, command in commands.items():
        copy = tmp_path / kind
        copy.write_bytes(keys.files[kind].read_bytes())
        for mode, warned in ((0o644, True), (0o640, True), (0o620, True), (0o600, False), (0o400, False)):
            copy.chmod(mode)
            said = refused(keys, command + str(copy), 3 if kind == "client" else 1)
            assert (f"{copy}: others may read or change this private key (mode {mode:04o})" in said) == warned


def test_a_stage_warns_of_a_mock_key_that_others_may_read(tmp_path: Path) -> None:
    with Stages(Path(minigpt.__file__).parent / "data", "12", tmp_path, model="tiny") as stages:
        stages.start(0)
        assert "others may read" not in stages.log(0)
        stages.kill(0)
        key = stages.key(0)
        key.chmod(0o644)
        stages.start(0, key=key)
        assert eventually(lambda: "others may read or change this private key (mode 0644)" in stages.log(0))
