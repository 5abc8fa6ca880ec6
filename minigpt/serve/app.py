"""The routes."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from attest import AttestationError
from minigpt import __version__
from minigpt.errors import MiniGPTError
from minigpt.serve.answers import Answer, Part
from minigpt.serve.chat import Templates
from minigpt.serve.schema import Chat, Completion, Detokenize, Problem, Tokenize, invalid, problem
from minigpt.serve.service import Service

_PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def build(service: Service, chat: Templates) -> FastAPI:
    """The application: every route of the server."""
    app = FastAPI(title="minigpt serve", version=__version__, docs_url=None, redoc_url=None)
    _errors(app)
    _page(app)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, chat)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(service, model)
        return _model(service, chat)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: Completion, request: Request) -> Response:
        _check_model(service, body.model)
        service.admit()  # before work is done for it
        prompts = await service.encode(body.prompts, "prompt")
        return await _answer(Answer(service, body, prompts, request.state, max_tokens=body.max_tokens))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: Chat, request: Request) -> Response:
        _check_model(service, body.model)
        service.admit()
        with service.preparing():
            text = await chat.prompt(body.messages)
        prompts = await service.encode([text], "messages")
        rest = service.config.n_positions - len(prompts[0]) + 1
        most = body.max_completion_tokens or body.max_tokens or rest
        return await _answer(Answer(service, body, prompts, request.state, max_tokens=most, stop=chat.stop))

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        _check_model(service, body.model)
        (ids,) = await service.encode([body.prompt], "prompt", whole=False)
        names = await service.token_names(ids) if body.return_token_strs else None
        length = service.config.n_positions
        return {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": names}

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, str]:
        _check_model(service, body.model)
        return {"prompt": await service.decode(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        ends = service.config.eos_token_id
        eos = service.token_name(ends[0]) if ends else None
        return {"tokenizer_class": "GPT2Tokenizer", "eos_token": eos, "bos_token": None, "pad_token": None}

    @app.get("/health")
    async def health() -> dict[str, str]:
        service.check_stages()
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        try:
            await service.check()
        except Problem as error:
            return JSONResponse({"ready": False, "stage": error.stage, **error.body}, error.status)
        return JSONResponse({"ready": True})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(await service.figures(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/attestation")
    async def attestation() -> dict[str, Any]:
        return await service.attestation()

    return app


def _model(service: Service, chat: Templates) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": int(service.pipeline.manifest.issued.timestamp()),
        "owned_by": "minigpt",
        "max_model_len": service.config.n_positions,
        "chat_template": chat.name,
    }


def _check_model(service: Service, asked: str) -> None:
    """A request may name the model that is served. It never loads another."""
    if asked not in ("", service.name):
        text = f"there is no model {asked[:80]!r} here, only {service.name!r}"
        raise Problem(404, text, param="model", code="model_not_found")


async def _answer(answer: Answer) -> Response:
    """The response to a request. Before its first token an error is a status, and after it an event."""
    answer.service.admit()
    if not answer.body.stream:
        return JSONResponse(await answer.whole())
    parts = answer.parts()
    try:
        first = await anext(parts)
    except BaseException:
        await parts.aclose()
        raise
    return StreamingResponse(_events(answer, parts, first), media_type="text/event-stream")


async def _events(answer: Answer, parts: AsyncGenerator[Part], first: Part) -> AsyncGenerator[str]:
    async with aclosing(parts), aclosing(answer.events(parts, first)) as events:
        async for event in events:
            yield event


def _page(app: FastAPI) -> None:
    """The page: whatever files lie beside this one, and no others."""
    files = {path.name: path for path in _PAGE.iterdir() if path.suffix in _TYPES}

    def serve(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name].read_bytes(), media_type=_TYPES[files[name].suffix])

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return serve("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    def file(name: str) -> Response:
        return serve(name)


def _errors(app: FastAPI) -> None:
    """Every error is OpenAI's object."""

    def tell(told: Problem, headers: Any = None) -> Response:
        retry = {"Retry-After": "1"} if told.status in (429, 503) else {}
        return JSONResponse(told.body, told.status, headers={**(headers or {}), **retry})

    async def invalid_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return tell(invalid(error.errors()))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):
            text = "there is nothing here, or not for this method: text is at POST /v1/completions"
            return tell(Problem(error.status_code, text, code="not_found"), error.headers)
        text = "the body is not JSON in UTF-8" if error.status_code == 400 else str(error.detail)  # FastAPI's own
        return tell(Problem(error.status_code, text), error.headers)

    async def refused(_: Request, error: Exception) -> Response:
        return tell(problem(error))

    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, http)
    for kind in (Problem, MiniGPTError, AttestationError, Exception):
        app.add_exception_handler(kind, refused)
