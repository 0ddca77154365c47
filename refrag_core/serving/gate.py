"""What every request passes before anything reads it: host, key, size and pace of its body; and it is counted."""

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refrag_core.serving.problems import problem, problem_response
from refrag_core.serving.settings import ServeSettings

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Probes show nothing of the index, and those who probe have no key."""

_BASIC = {"www-authenticate": 'Bearer, Basic realm="refrag", charset="UTF-8"'}
_CLOSE = {"connection": "close"}

Refusal = tuple[str, int, str, Mapping[str, str]]


class Gate:
    """Lets requests through to `app`, or answers them itself.

    Args:
        count: is told path and status of every request.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, count: Callable[[str, int], object]) -> None:
        self._app = app
        self._settings = settings
        self._count = count
        self._key = None if settings.api_key is None else _digest(settings.api_key.strip().encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = self._counting(scope, send)
        headers = Headers(scope=scope)
        refusal = self._refuse_host(headers) or self._refuse_key(scope, headers)
        if refusal is None:
            body = await self._read(headers, receive)
            if isinstance(body, bytes):
                await self._app(scope, _replay(body, receive), counted)
                return
            refusal = body
        message, status, code, more = refusal
        await problem_response(problem(message, status, code=code), status, more)(scope, receive, counted)

    def _counting(self, scope: Scope, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope["path"], message["status"])
            await send(message)

        return counted

    def _refuse_host(self, headers: Headers) -> Refusal | None:
        """A page elsewhere can point a name of its own to this machine; its requests then carry that name."""
        allowed, host = self._settings.allowed_hosts, headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not allowed or name in allowed:
            return None
        return "the Host header names another machine; expected this one: see --allowed-host", 403, "unknown_host", {}

    def _refuse_key(self, scope: Scope, headers: Headers) -> Refusal | None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return None
        shown = _shown_key(headers.get("authorization", ""))
        if shown is not None and hmac.compare_digest(_digest(shown), self._key):
            return None
        message = "the API key is missing or wrong; expected it as `Authorization: Bearer KEY`"
        return message, 401, "invalid_api_key", _BASIC

    async def _read(self, headers: Headers, receive: Receive) -> bytes | Refusal:
        """The whole body, or why it is not read."""
        limit = self._settings.body_bytes
        too_large = (f"the body is larger than {limit} bytes: send less", 413, "body_too_large", _CLOSE)
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            return too_large
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                body = await _whole(receive, limit)
        except TimeoutError:
            return f"the body did not arrive within {self._settings.body_seconds:g} s", 408, "body_timeout", _CLOSE
        return too_large if body is None else body


def _digest(key: bytes) -> bytes:
    """Of equal length for every key, so that comparing tells nothing of it."""
    return hashlib.sha256(key).digest()


def _shown_key(authorization: str) -> bytes | None:
    """The key of a Bearer header, or the password of a Basic one, which is what browsers send."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None


async def _whole(receive: Receive, limit: int) -> bytes | None:
    """A body of at most `limit` bytes, else None; what came until then where the client leaves."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what the server gives: the client's leaving."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return parts.pop() if parts else await receive()

    return replayed
