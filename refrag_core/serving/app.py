"""The server's routes. Each is: body → question → events → response."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from refrag_core import inspector
from refrag_core.errors import DrainingError, IndexNotFoundError, RefragError, UnknownModelError, UsageError
from refrag_core.serving.answering import Answering, Finished, Started
from refrag_core.serving.event_stream import EventStream, unless_left
from refrag_core.serving.gate import Gate
from refrag_core.serving.openai_schema import (
    AnswerFields,
    ChatRequest,
    CompletionRequest,
    ReloadRequest,
    RetrieveRequest,
)
from refrag_core.serving.payload import Kind, Payload, to_json
from refrag_core.serving.problems import STATUSES, of_error, of_validation, problem, problem_response
from refrag_core.serving.question import (
    Question,
    chat_question,
    check_top_k,
    completion_question,
    retrieval_options,
)

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
        }
    },
}


def make_app(answering: Answering) -> ASGIApp:
    """The application, behind its gate."""
    app = FastAPI(title="refrag", description=__doc__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.answering = answering
    _add_errors(app)
    _add_answers(app, answering)
    _add_index(app, answering)
    _add_state(app, answering)
    _add_inspector(app)
    _describe(app)
    known = {getattr(route, "path", "") for route in app.routes}

    def count(path: str, status: int) -> None:
        route = path if path in known else "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
        answering.metrics.requests.labels(route, str(status)).inc()

    return Gate(app, answering.settings, count)


# --- routes -----------------------------------------------------------------------------------------


def _add_answers(app: FastAPI, answering: Answering) -> None:
    async def answer(
        request: Request, body: AnswerFields, kind: Kind, question: Callable[[bool], Question]
    ) -> Response:
        _check_model(body.model, answering)
        asked = question(answering.generations.current.runtime.trained)
        return await unless_left(request.receive, _respond(answering, body, kind, asked))

    @app.post(
        "/v1/chat/completions", responses=_responses(200, "The answer, or a stream of its pieces.", streamed=True)
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer the last message from the index."""
        settings = answering.settings
        return await answer(request, body, "chat", lambda trained: chat_question(body, settings, trained=trained))

    @app.post("/v1/completions", responses=_responses(200, "The answer, or a stream of its pieces.", streamed=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Answer the prompt from the index."""
        settings = answering.settings
        return await answer(
            request, body, "completion", lambda trained: completion_question(body, settings, trained=trained)
        )


async def _respond(answering: Answering, body: AnswerFields, kind: Kind, question: Question) -> Response:
    events = answering.events(question)
    try:
        started = await anext(events)
        assert isinstance(started, Started)
        payload = Payload(
            kind=kind,
            model=answering.settings.model_name,
            runtime=started.runtime,
            detailed=body.include_passages,
        )
        if body.stream:
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            seconds = 2 * answering.settings.request_seconds
            return EventStream(payload, started, events, with_usage=with_usage, seconds=seconds)
        async for event in events:
            if isinstance(event, Finished):
                return _json(payload.whole(event.answer, event.text))
        raise AssertionError("an answer without an end")
    except BaseException:
        await events.aclose()
        raise


def _check_model(name: str | None, answering: Answering) -> None:
    if name not in (None, answering.settings.model_name):
        raise UnknownModelError(f"there is no such model; expected {answering.settings.model_name!r}: see /v1/models")


def _add_index(app: FastAPI, answering: Answering) -> None:
    @app.post("/v1/retrieve", responses=_responses(200, "The best passages."))
    async def retrieve(body: RetrieveRequest, request: Request) -> Response:
        """The passages nearest to a query, without an answer."""
        top_k, options = check_top_k(body.top_k, answering.settings), retrieval_options(body)

        async def found() -> Response:
            runtime, hits = await answering.retrieve(body.query, top_k, options)
            return _json({"object": "list", "data": hits, "version": runtime.version})

        return await unless_left(request.receive, found())

    @app.get("/v1/models", responses=_responses(200, "The one model."))
    async def models() -> Response:
        """What can be asked."""
        return _json({"object": "list", "data": [_model(answering)]})

    @app.get("/v1/models/{model}", responses=_responses(200, "The model."))
    async def model(model: str) -> Response:
        """One of them."""
        _check_model(model, answering)
        return _json(_model(answering))

    @app.post("/v1/reload", responses=_responses(200, "The generation that is answered from now."))
    async def reload(body: ReloadRequest) -> Response:
        """Take up another generation; what is under way ends on the one that it began with."""
        try:
            version = await asyncio.to_thread(answering.generations.reload, body.version)
        except IndexNotFoundError as error:
            raise UsageError(f"there is no generation {body.version}; expected one that the index has") from error
        return _json({"version": version})


def _model(answering: Answering) -> dict[str, Any]:
    runtime, settings = answering.generations.current.runtime, answering.settings
    manifest = runtime.reader.manifest
    return {
        "id": settings.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "refrag",
        "refrag": {
            "version": manifest.version,
            "build_id": manifest.build_id,
            "content_id": manifest.content_id,
            "passages": manifest.counts.passages,
            "chunk_size": manifest.parameters.chunk_size,
            "trained": runtime.trained,
            "compresses": runtime.trained or settings.allow_untrained,
            "scored": all("scores" in shard.tables for shard in manifest.shards),
            "max_positions": settings.max_positions,
            "max_new_tokens": settings.max_new_tokens,
            "max_top_k": settings.max_top_k,
            "history_positions": settings.history.positions,
        },
    }


def _add_state(app: FastAPI, answering: Answering) -> None:
    @app.get("/healthz", responses=_responses(200, "The process runs."))
    async def healthz() -> Response:
        """Whether the process runs."""
        return _json({"status": "ok"})

    @app.get("/readyz", responses=_responses(200, "Requests are taken."))
    async def readyz() -> Response:
        """Whether requests are taken."""
        if answering.draining:
            raise DrainingError("this server is stopping")
        return _json({"status": "ready", "version": answering.generations.current.runtime.version})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(answering.metrics.page(), media_type=answering.metrics.content_type)


def _add_inspector(app: FastAPI) -> None:
    headers = {
        "content-security-policy": inspector.SERVED_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    def add(path: str, text: str, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(text, media_type=media_type, headers=headers)

    add("/", inspector.served_page(), "text/html")
    for name, (file, media_type) in inspector.FILES.items():
        add(f"/{name}", inspector.read(file), media_type)


def _json(value: Any) -> Response:
    return Response(to_json(value), media_type="application/json")


# --- errors and description -------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return problem_response(of_validation(error.errors()), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return problem_response(problem(str(error.detail), error.status_code), error.status_code, error.headers)

    @app.exception_handler(RefragError)
    @app.exception_handler(Exception)  # uvicorn logs what is not ours
    async def failed(request: Request, error: Exception) -> Response:
        body, status = of_error(error)
        waits = {"retry-after": str(request.app.state.answering.retry_after)} if status in (429, 503) else {}
        return problem_response(body, status, waits)


def _responses(status: int, description: str, *, streamed: bool = False) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streamed:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    problems: dict[int | str, dict[str, Any]] = {
        number: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
        for number, text in STATUSES.items()
    }
    return {status: {"description": description, "content": content}, **problems}


def _describe(app: FastAPI) -> None:
    """The OpenAPI description without FastAPI's own 422, which is a 400 here."""
    description = app.openapi()
    for path in description["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        description.get("components", {}).get("schemas", {}).pop(name, None)
