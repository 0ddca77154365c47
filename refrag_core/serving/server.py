"""The server's process: its socket, its signals, its end.

SIGTERM and SIGINT let running answers end and take nothing new; a second one ends at once. SIGHUP takes up the newest
generation.
"""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from refrag_core.errors import RefragError, UsageError
from refrag_core.serving.answering import Answering
from refrag_core.serving.app import make_app

HEADER_BYTES = 32 << 10
IDLE_SECONDS = 15
"""For a connection's next request."""

_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn, with a drain that says so to those who ask, and reloads by SIGHUP."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        super().__init__(
            uvicorn.Config(
                make_app(answering),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=max(1, round(answering.settings.drain_seconds)),
                h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )

    def drain(self) -> None:
        """Take nothing more, and end when everything that was let in is answered."""
        self._answering.draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's)
        """A signal to stop: the first drains, the second ends at once."""
        self.force_exit = self.should_exit
        self.drain()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn, which would raise the signals again at the end: a drained server ends well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        chosen = {signal.SIGTERM: self.handle_exit, signal.SIGINT: self.handle_exit, signal.SIGHUP: self._hang_up}
        before = {number: signal.signal(number, handler) for number, handler in chosen.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hang_up(self, *_: Any) -> None:
        threading.Thread(target=reload_newest, args=(self._answering,), name="reload", daemon=True).start()


def reload_newest(answering: Answering) -> None:
    """Take up the newest generation; a failure is logged and leaves the one that there is."""
    before = answering.generations.current.runtime.version
    try:
        version = answering.generations.reload()
    except (RefragError, OSError) as error:
        _log.error("still answering from generation %d: %s", before, error)
        return
    if version != before:
        _log.info("answering from generation %d (before: %d)", version, before)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at host and port. Raises UsageError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen at {host} port {port}: {reason}; expected a free port: choose another with --port"
        ) from error


def address(bound: socket.socket) -> str:
    """URL of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    answering: Answering,
    bound: socket.socket,
    *,
    reload_seconds: float = 0.0,
    on_ready: Callable[[], object] = lambda: None,
) -> None:
    """Serve until a signal says to stop; then close the engine.

    Args:
        reload_seconds: look for a newer generation so often; 0 never.
        on_ready: called when requests are taken.
    """
    over = threading.Event()
    if reload_seconds:
        threading.Thread(target=_watch, args=(answering, reload_seconds, over), name="watch", daemon=True).start()
    server = Server(answering)
    try:
        on_ready()
        server.run(sockets=[bound])
    finally:
        over.set()
        answering.close()


def _watch(answering: Answering, seconds: float, over: threading.Event) -> None:
    while not over.wait(seconds):
        reload_newest(answering)
