"""The HTTP interface: routes and errors, after OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from klfast.core.errors import InvalidInputError, KlfastError
from klfast.serving.errors import ClosedError, QueueFullError
from klfast.serving.exchange import Exchange
from klfast.serving.guard import Guard
from klfast.serving.mailbox import Mailbox
from klfast.serving.malformed import complaint
from klfast.serving.replies import Chats, Completions, Json, failure
from klfast.serving.request_log import RequestLog
from klfast.serving.requests import ChatRequest, CompletionRequest
from klfast.serving.service import Service
from klfast.serving.tool_calls import MARKS, ForcedCallReader, Reader, ToolCallReader

_USUAL_COMPLETION = 16  # tokens, OpenAI's default
_RETRY_SECONDS = "1"
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


class _UnknownModelError(KlfastError):
    """A request for a model that is not here."""


def make_app(
    service: Service,
    *,
    key: str | None = None,
    most_bytes: int = 2**20,
    origins: Sequence[str] = (),
    logs_requests: bool = False,
) -> FastAPI:
    """Return the application; when it shuts down, what was accepted is finished first.

    Args:
        service: answers the requests.
        key: the API key; None lets everybody in.
        most_bytes: of a request's body.
        origins: of web pages whose scripts may read replies ("https://example.org"); "*" for all.
        logs_requests: whether to write a line on standard error for each request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="klfast", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, key=key, most_bytes=most_bytes, paths=_PATHS, metrics=service.metrics)
    if origins:  # before the guard: browsers ask without a key whether they may send one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    if logs_requests:
        app.add_middleware(RequestLog)
    _add_errors(app)
    _add_generation(app, service)
    _add_information(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        _require_model(service, asked.model)
        prompts = [await service.encode(one) if isinstance(one, str) else one for one in asked.prompts]
        form, mailbox = Completions(service.spelling), Mailbox()
        answers = service.start(
            asked,
            prompts,
            max_tokens=asked.max_tokens,
            default=_USUAL_COMPLETION,
            top_logprobs=asked.logprobs,
            client=_client(request),
            mailbox=mailbox,
        )
        with_scores = asked.logprobs is not None
        exchange = Exchange(answers, len(prompts), mailbox, form, asked.model, with_scores=with_scores)
        return await _reply(exchange, asked, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        _require_model(service, asked.model)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise InvalidInputError("top_logprobs needs logprobs: true")
        tools, constraint = asked.callable_tools, await service.constraint(asked.schema_of_answers)
        prompt, shared = await service.encode_chat(asked.chat, asked.chat_template_kwargs or {}, tools)
        marks = [] if asked.must_call else service.tool_marks(tools)
        form, mailbox = Chats(service.spelling, _reader(asked, marks), asked.most_calls), Mailbox()
        answers = service.start(
            asked,
            [prompt],
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            default=None,
            top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            client=_client(request),
            shared=shared,
            spelled={name for mark in marks for name in (mark, MARKS[mark])},
            constraint=constraint,
            mailbox=mailbox,
        )
        exchange = Exchange(answers, 1, mailbox, form, asked.model, with_scores=bool(asked.logprobs))
        return await _reply(exchange, asked, request)


def _reader(asked: ChatRequest, marks: Sequence[str]) -> Callable[[], Reader] | None:
    """Return what makes readers of answers in which calls of tools begin with these marks."""
    if asked.must_call:
        return ForcedCallReader
    return partial(ToolCallReader, marks, asked.tool_schemas) if marks else None


def _client(request: Request) -> str:
    """Return the address that a request comes from; whatever else it says of its sender could be made up."""
    return request.client.host if request.client else ""


async def _reply(exchange: Exchange, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
    request.state.usage = exchange.usage
    if asked.stream:
        options = asked.stream_options
        return exchange.stream(with_usage=bool(options and options.include_usage))
    return await exchange.whole(request)


def _add_information(app: FastAPI, service: Service) -> None:
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "klfast"}

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Json:
        _require_model(service, name)
        return model

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    async def health() -> Response:
        return Response(status_code=200 if service.scheduler.is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _require_model(service: Service, name: str) -> None:
    if name != service.name:
        raise _UnknownModelError(f"no model {name!r} here; this server has {service.name!r}")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        message, param = complaint(error.errors()[0])
        return _error(400, message, param=param)

    @app.exception_handler(InvalidInputError)
    async def refused(_: Request, error: InvalidInputError) -> Response:
        return _error(400, str(error))

    @app.exception_handler(_UnknownModelError)
    async def unknown(_: Request, error: _UnknownModelError) -> Response:
        return _error(404, str(error), code="model_not_found", param="model")

    @app.exception_handler(QueueFullError)
    async def full(_: Request, error: QueueFullError) -> Response:
        return _error(429, str(error), "rate_limit_error", "queue_full", headers={"Retry-After": _RETRY_SECONDS})

    @app.exception_handler(ClosedError)
    async def closed(_: Request, error: ClosedError) -> Response:
        return _error(503, str(error), "server_error")

    @app.exception_handler(StarletteHTTPException)
    async def other(_: Request, error: StarletteHTTPException) -> Response:
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        return _error(error.status_code, str(error.detail), kind, headers=dict(error.headers or {}))


def _error(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    *,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    return JSONResponse(failure(message, kind, code, param), status, headers)
