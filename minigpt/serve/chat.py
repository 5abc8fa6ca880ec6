"""Messages become a prompt: by the checkpoint's own template, or by the plain one, if the user asked for it."""

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt.checkpoint.tokenizer import ChatTemplate
from minigpt.serve.schema import Message, Problem

_RENDERER = Path(__file__).with_name("template.py")
_RENDERERS = 4  # at a time: each takes a core, and Python's and jinja2's memory
_TIMEOUT = 10.0  # seconds; it has two of the processor
_MAX_TEXT = 2**22  # characters of rendered JSON


class Templates:
    """How this server makes prompts of messages.

    Args:
        plain: "role: text" lines, instead of the checkpoint's template.
        template: the checkpoint's, None if it ships none.
    """

    def __init__(self, template: ChatTemplate | None, *, plain: bool) -> None:
        self._template = None if plain else template
        self._renderers = asyncio.Semaphore(_RENDERERS)
        self.name = "plain" if plain else "checkpoint" if template is not None else None
        self.stop = ["\nuser:"] if plain else []  # where the model would go on with the user's part

    async def prompt(self, messages: list[Message]) -> str:
        """The text to continue. Raises Problem."""
        if self.name is None:
            text = "this model has no chat template: use /v1/completions, or start with --chat-template plain"
            raise Problem(400, text, param="messages", code="no_chat_template")
        plain = [{"role": message.role, "content": message.content} for message in messages]
        if self._template is None:
            return "".join(f"{message['role']}: {message['content']}\n" for message in plain) + "assistant:"
        async with self._renderers:
            return await _render({**self._template._asdict(), "messages": plain})


async def _render(given: dict[str, Any]) -> str:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(_RENDERER), stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_TIMEOUT):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(given).encode())
            process.stdin.write_eof()
            said = bytearray()
            while len(said) <= _MAX_TEXT and (part := await process.stdout.read(2**16)):
                said += part
        answer = json.loads(said)
    except (TimeoutError, OSError, ValueError):
        answer = {"error": "it took too much time or memory, or wrote too much"}
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if "error" in answer:
        text = f"the checkpoint's chat template fails on these messages: {answer['error']}"
        raise Problem(400, text, param="messages", code="chat_template_failed")
    return str(answer["text"])
