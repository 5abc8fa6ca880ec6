"""`minigpt serve` with other people's clients, of the extra `clients`: litellm, llm, and schemathesis, which sends
whatever the OpenAPI document allows, and more."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Serving

import minigpt

PROMPT = "The capital of France is"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving("--chat-template", "plain") as made:
        yield made


def run(name: str, *command: str, where: Path, **environment: str) -> str:
    """What a client's process prints."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install '.[clients]'")
    done = subprocess.run(
        [sys.executable, *command], cwd=where, capture_output=True, text=True, timeout=900,
        env=os.environ | {"NO_PROXY": "*", "HOME": str(where)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


LITELLM = """
import litellm
options = {"api_base": ADDRESS + "/v1", "api_key": "none", "max_tokens": 12, "temperature": 0}
text = {"model": "text-completion-openai/tiny", "prompt": PROMPT, **options}
print(litellm.text_completion(**text).choices[0].text)
print("".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**text, stream=True)))
chat = {"model": "openai/tiny", "messages": [{"role": "user", "content": PROMPT}], **options}
print(repr(litellm.completion(**chat).choices[0].message.content))
print(repr("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, stream=True))))
try:
    litellm.text_completion(**text, suffix="x")
except litellm.BadRequestError as error:
    print("suffix" in str(error))
"""


def test_litellm(server: Serving, tmp_path: Path) -> None:
    code = LITELLM.replace("ADDRESS", repr(server.address)).replace("PROMPT", repr(PROMPT))
    lines = run("litellm", "-c", code, where=tmp_path, LITELLM_LOCAL_MODEL_COST_MAP="True").splitlines()
    wanted = "".join(token.text or "" for token in minigpt.load("tiny").generate(PROMPT, max_tokens=12))
    assert lines[:2] == [wanted, wanted]
    assert lines[2] == lines[3]
    assert "True" in lines[4:]


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_llm(server: Serving, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: tiny\n  api_base: {server.address}/v1\n  completion: true\n"
    )
    command = ["-m", "llm", "-m", "ours", PROMPT, "-o", "max_tokens", "12", "-o", "temperature", "0", *flags]
    said = run("llm", *command, where=tmp_path, LLM_USER_PATH=str(tmp_path), OPENAI_API_KEY="none")
    wanted = "".join(token.text or "" for token in minigpt.load("tiny").generate(PROMPT, max_tokens=12))
    assert said.strip() == wanted.strip()


def test_nothing_that_the_document_allows_is_an_error_of_the_server(server: Serving, tmp_path: Path) -> None:
    command = ["-m", "schemathesis.cli", "run", f"{server.address}/openapi.json", "--checks", "not_a_server_error"]
    run("schemathesis", *command, "--max-examples", "50", "--request-timeout", "120", where=tmp_path)
    assert "failed:" not in server.log
    assert "Traceback" not in server.log
