"""Responses that watch their client: one that has left gets nothing more, and what it asked for is given up."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from refrag_core.serving.answering import Event, Finished, Piece, Started
from refrag_core.serving.payload import Payload, to_json
from refrag_core.serving.problems import of_error

KEEP_ALIVE_SECONDS = 10.0
"""After so long without an event a comment is sent, so that nothing between server and client hangs up."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_log = logging.getLogger(__name__)


class EventStream(Response):
    """Server-sent events of one answer.

    Args:
        started: the first event, which has come already: what could be refused has been by now.
        events: the rest.
        seconds: after which a client that does not read is hung up on.
    """

    def __init__(
        self,
        payload: Payload,
        started: Started,
        events: AsyncGenerator[Event, None],
        *,
        with_usage: bool,
        seconds: float,
    ) -> None:
        super().__init__()
        self._payload = payload
        self._started = started
        self._events = events
        self._with_usage = with_usage
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI)
        """Send all of it, or what the client stays for."""
        async with aclosing(self._events):
            writing = asyncio.ensure_future(self._write(send))
            await first_of(writing, receive, self._seconds)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await _data(send, to_json(self._payload.first(self._started.passages)))
        try:
            await self._write_events(send)
        except Exception as error:  # the status is sent: all that is left is to say it in the stream
            await _data(send, to_json(of_error(error)[0]))
        await _data(send, b"[DONE]", more=False)

    async def _write_events(self, send: Send) -> None:
        while (event := await self._next(send)) is not None:
            if isinstance(event, Piece):
                await _data(send, to_json(self._payload.piece(event.text)))
            elif isinstance(event, Finished):
                await _data(send, to_json(self._payload.last(event.answer)))
                if self._with_usage:
                    await _data(send, to_json(self._payload.usage(event.answer)))

    async def _next(self, send: Send) -> Event | None:
        """The next event, None after the last; meanwhile comments."""
        coming = asyncio.ensure_future(anext(self._events, None))
        try:
            while not (await asyncio.wait({coming}, timeout=KEEP_ALIVE_SECONDS))[0]:
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
        finally:
            await _ended(coming)
        return coming.result()


async def _data(send: Send, data: bytes, *, more: bool = True) -> None:
    message: Message = {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more}
    await send(message)


async def first_of(work: "asyncio.Future[Any]", receive: Receive, seconds: float | None = None) -> bool:
    """Wait for `work`, unless the client leaves or time is up before; whether it was done. Raises what it raised."""
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({work, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        done = work.done()
    finally:
        await _ended(leaving)
        await _ended(work)
    if done:
        work.result()
    return done


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes; given up when the client leaves."""
    task = asyncio.ensure_future(work)
    return task.result() if await first_of(task, receive) else Response(status_code=499)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(task: "asyncio.Future[Any]") -> None:
    """Cancel a task, if need be, and wait for its end."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
