"""Errors as OpenAI's clients know them, with nothing of the machine in them: no path, no trace."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from refrag_core.errors import (
    DrainingError,
    EngineError,
    QueueFullError,
    RefragError,
    RequestTimeoutError,
    UnknownModelError,
    UsageError,
)
from refrag_core.serving.payload import to_json

_STATUS: tuple[tuple[type[RefragError], int, str, str], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (UsageError, 400, "invalid_request_error", "invalid_value"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (DrainingError, 503, "server_error", "draining"),
    (EngineError, 503, "server_error", "engine_failed"),
    (RequestTimeoutError, 504, "server_error", "request_timeout"),
)
_TYPES = {401: "authentication_error", 404: "invalid_request_error", 503: "server_error", 500: "server_error"}
_INTERNAL = "the server failed on this request; its log says why"
_log = logging.getLogger(__name__)

STATUSES = {
    400: "The request is malformed or asks for what cannot be done.",
    401: "The API key is missing or wrong.",
    404: "There is no such path or model.",
    408: "The request's body did not arrive in time.",
    413: "The request's body is too large.",
    429: "As many requests wait as this server takes: see Retry-After.",
    503: "The server is stopping, or its decoder failed.",
    504: "The answer took longer than this server gives a request.",
}


def problem(
    message: str, status: int, *, kind: str | None = None, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = kind or _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def problem_response(body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    """The body with its status."""
    return Response(to_json(body), status, dict(headers or {}), "application/json")


def of_error(error: Exception) -> tuple[dict[str, Any], int]:
    """Body and status for an exception; what is not the asker's to know goes to the log."""
    for kind, status, name, code in _STATUS:
        if isinstance(error, kind):
            return problem(str(error), status, kind=name, code=code), status
    _log.error("a request failed", exc_info=error)
    return problem(_INTERNAL, 500, code="internal_error"), 500


def of_validation(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Body for fields that are not as they must be: which, and what was expected; never what was sent."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    message = f"{where or 'body'}: {first['msg']}{more}".encode("utf-8", "replace").decode()
    return problem(message, 400, code=str(first["type"]), param=where or None)
