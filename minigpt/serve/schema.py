"""What a request may say, as OpenAI's clients say it, and how errors are told.

Fields are read strictly: no number is parsed from a string. null means the default. Unknown fields are ignored, but for
those that would change the text. Every list fails fast: an error for each of a body's 500 000 items takes seconds.
"""

import logging
import re
import sys
import traceback
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from minigpt.errors import MiniGPTError, RequestRefused, UsageError

MAX_CHOICES = 128  # answers to one request, as in OpenAI's API
MAX_TOP = 20  # of the most likely tokens that are told, and
MAX_BIASES = 1024  # ids in logit_bias, as everywhere here
MAX_TOLD = 2**19  # log-probabilities in one answer's JSON, which is some 80 MB while it is made
MAX_PARTS = 1024  # messages in a chat, and parts in a message
_LOG = logging.getLogger("minigpt.serve")

# What a bad value of these is told to be instead.
_WANTED = {
    "presence_penalty": "any finite number; 0 is none, -2 to 2 usual",
    "frequency_penalty": "any finite number; 0 is none, -2 to 2 usual",
    "repetition_penalty": "any finite number above 0; 1 is none, 1.1 to 1.3 usual",
    "min_p": "0 (all) to 1; 0.02 to 0.1 is usual",
    "logprobs": f"0 (each token's own) to {MAX_TOP}; 5 is usual",
    "top_logprobs": f"0 (none) to {MAX_TOP}; 5 is usual",
    "logit_bias": f"at most {MAX_BIASES} ids of tokens, each once, and for each any finite number; -100 (never) to 100 "
    "(always) is usual",
}
# What pydantic calls the variants of a union, within the place of an error.
_VARIANT = re.compile(r"constrained-\w+|str|int|float|bool|list\[.*|[A-Z]\w*|function-.*|literal\[.*")
# Fields that change the text, by the values with which they do not: others are refused, never ignored.
_NEVER: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "prompt_embeds": (), "use_beam_search": (False,), "length_penalty": (1,), "min_tokens": (0,),
    "stop_token_ids": ([],), "ignore_eos": (False,), "bad_words": ([],), "allowed_token_ids": (),
    "truncate_prompt_tokens": (), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "skip_special_tokens": (True,), "include_stop_str_in_output": (False,),
}  # fmt: skip


class Problem(Exception):
    """A request that gets an error instead of an answer: a status, and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, stage: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.stage = stage  # that failed, if one did
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def problem(error: Exception) -> Problem:
    """What to tell of an error of the pipeline. None of them quotes a prompt."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestRefused):
        if error.reason == "busy":
            return Problem(429, str(error), code="busy")
        if error.reason == "draining":
            return Problem(503, str(error), code="pipeline_unavailable", stage=error.stage)
        return Problem(400, str(error), code=error.reason)
    if isinstance(error, UsageError):
        return Problem(400, str(error))
    if isinstance(error, MiniGPTError):
        stage = getattr(error, "stage", None)
        return Problem(503, str(error), code="pipeline_unavailable", stage=stage)
    place = traceback.extract_tb(error.__traceback__)[-1]  # a bug. Its message might quote a request
    _LOG.error("failed: %s at %s:%s", type(error).__name__, place.filename, place.lineno)
    return Problem(500, "the server failed, and says where in its log", code="internal_error")


def invalid(errors: Any) -> Problem:
    """The problem of a body that the models below refuse. The text of a prompt is not quoted."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body" and not _VARIANT.fullmatch(str(part))]
    param = first.get("ctx", {}).get("param") or (place[0] if place else None)
    if first["type"] == "json_invalid":
        return Problem(400, "the body is not JSON")
    if first["type"] == "refused":
        return Problem(400, first["msg"], param=param)
    if first["type"] == "string_unicode":
        return Problem(400, f"{'.'.join(place)}: not UTF-8 text", param=param)
    if param == "prompt" and first["type"] != "missing":
        text = "prompt: wanted a string, a list of strings, a list of token ids, or a list of such lists; none empty"
        return Problem(400, text, param=param)
    got = first.get("input")
    shown = str(got)[:40] if isinstance(got, bool | int | float) else type(got).__name__
    wanted = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] in ("model_type", "model_attributes_type"):
        wanted = "a JSON object"
    elif not first["type"].startswith("bool"):  # as a chat's logprobs
        wanted = _WANTED.get(param or "", wanted)
    text = "it is missing" if first["type"] == "missing" else f"got {shown}, wanted {wanted}"
    return Problem(400, f"{'.'.join(place) or 'the body'}: {text}", param=param)


def refuse(param: str, text: str) -> PydanticCustomError:
    """For validators: a field is refused, in words of our own."""
    return PydanticCustomError("refused", "{text}", {"text": text, "param": param})


class Model(BaseModel):
    """Every object in a body."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Body(Model):
    """Every body."""

    @model_validator(mode="wrap")
    @classmethod
    def _take(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Empties the given dict: the framework keeps it for as long as a request waits, unknown fields and all."""
        if isinstance(data, dict):
            taken = dict(data)
            data.clear()
            return validate(taken)
        return validate(data)


Text = Annotated[str, Field(max_length=2**20)]  # the bound makes pydantic refuse what is not UTF-8, lone surrogates
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
Stop = Annotated[str, Field(min_length=1)]


def _biases(given: object) -> dict[int, float]:
    """logit_bias, whose ids are strings in JSON. One error for all of it, of many thousands too."""
    found: dict[int, float] = {}
    fits = isinstance(given, dict) and len(given) <= MAX_BIASES
    for name, bias in given.items() if isinstance(given, dict) and fits else ():
        right = isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) <= 10
        right = (
            right and isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= sys.float_info.max
        )
        fits = fits and right and int(name) not in found
        if not fits:
            break
        found[int(name)] = float(bias)
    if not fits:
        raise refuse("logit_bias", f"logit_bias: got something else, wanted {_WANTED['logit_bias']}")
    return found


Biases = Annotated[dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float])]


class StreamOptions(Model):
    include_usage: bool = False


class Extension(Model):
    """What this server adds, for whoever asks."""

    spans: bool = False  # with stream: where each token's time went, and what crossed each link


class Sampled(Body):
    """What completions and chat completions have in common."""

    model: Text = ""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Biases = {}
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=4)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    minigpt: Extension | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_that_would_change_the_text(cls, data: Any) -> Any:
        for name, neutral in _NEVER.items():
            given = data.get(name) if isinstance(data, dict) else None
            if given is not None and given not in neutral:
                shown = f"{name} is {given}" if isinstance(given, bool | int | float) else f"{name} is given"
                raise refuse(name, f"{shown}, which is not supported and would change the answer: leave it out")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "Sampled":
        if self.best_of not in (None, self.n):
            raise refuse("best_of", f"best_of is {self.best_of}, wanted n, {self.n}: all answers are returned")
        if self.minigpt is not None and self.minigpt.spans and not self.stream:
            raise refuse("minigpt", "minigpt.spans is true, which needs stream")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Completion(Sampled):
    """The body of POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Texts
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: int = Field(16, ge=0, lt=2**31)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    @model_validator(mode="after")
    def _not_too_many(self) -> "Completion":
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "max_tokens is 0, wanted at least 1; or 0 with echo, for the prompt alone")
        if len(self.prompts) * self.n > MAX_CHOICES:
            text = f"n is {self.n} for {len(self.prompts)} prompts, wanted at most {MAX_CHOICES} answers in all"
            raise refuse("n", text)
        return self

    @property
    def top(self) -> int:
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class TextPart(Model):
    type: Literal["text"]
    text: Text


class Message(Model):
    role: Annotated[str, Field(min_length=1, max_length=32, pattern="^[a-z_]+$")]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] = ""

    @field_validator("content")
    @classmethod
    def _joined(cls, content: str | list[TextPart]) -> str:
        return content if isinstance(content, str) else "".join(part.text for part in content)


class Chat(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "Chat":
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs", f"top_logprobs is {self.top_logprobs}, which needs logprobs: true")
        return self

    @property
    def top(self) -> int:
        return self.top_logprobs


class Tokenize(Body):
    """The body of POST /tokenize."""

    model: Text = ""
    prompt: Text
    return_token_strs: bool = False


class Detokenize(Body):
    """The body of POST /detokenize."""

    model: Text = ""
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
