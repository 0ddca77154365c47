"""From `refrag serve`'s options to a running server."""

import ipaddress
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from refrag_core.decoder import lowest
from refrag_core.engine_choice import EngineOptions, open_engine
from refrag_core.errors import MissingExtraError, UsageError
from refrag_core.history import HistoryOptions
from refrag_core.runtime import Runtime
from refrag_core.serving.settings import MAX_POSITIONS, SLOTS, ServeSettings
from refrag_core.storage import IndexLocation, absolute

KEY_VARIABLE = "REFRAG_API_KEY"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCommand:
    """The options of `refrag serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    slots: int = SLOTS
    max_positions: int = MAX_POSITIONS
    max_new_tokens: int = 256
    queue_limit: int = 64
    request_seconds: float = 120.0
    body_bytes: int = 1 << 20
    drain_seconds: float = 30.0
    reload_seconds: float = 0.0
    history: HistoryOptions = field(default_factory=HistoryOptions)
    allow_untrained: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)

    def settings(self, location: IndexLocation) -> ServeSettings:
        """What the server itself needs. Raises UsageError for a key file that cannot be read."""
        return ServeSettings(
            model_name=self.model_name or absolute(location).rstrip("/").rpartition("/")[2] or "refrag",
            slots=self.slots,
            max_positions=self.max_positions,
            max_new_tokens=self.max_new_tokens,
            queue_limit=self.queue_limit,
            request_seconds=self.request_seconds,
            body_bytes=self.body_bytes,
            drain_seconds=self.drain_seconds,
            history=self.history,
            api_key=read_key(self.api_key_file),
            allow_untrained=self.allow_untrained,
            allowed_hosts=allowed_hosts(self.host, self.allowed_hosts),
        )


def _within(settings: ServeSettings, max_positions: int | None) -> ServeSettings:
    """The settings with no more positions than the engine has, so that prompts are composed to fit it."""
    return replace(settings, max_positions=lowest(settings.max_positions, max_positions))


def read_key(path: Path | None) -> str | None:
    """The key in a file, else in the environment, else None."""
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the API key cannot be read from {path} ({error}): expected a text file with it") from error


def allowed_hosts(host: str, more: tuple[str, ...]) -> tuple[str, ...]:
    """Host headers that are answered: at loopback this machine's names, elsewhere any, unless some are named."""
    if not is_loopback(host):
        return tuple(name.lower() for name in more)
    return tuple(name.lower() for name in dict.fromkeys((*_LOOPBACK_NAMES, host, *more)))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run_server(
    location: IndexLocation,
    opened: Callable[[], Runtime],
    command: ServeCommand,
    *,
    say: Callable[[str], object],
    on_ready: Callable[[str], object],
) -> None:
    """Open the index and serve it until a signal comes.

    Args:
        opened: opens the runtime, once the port is ours.
        say: is told what a person should know.
        on_ready: is told the server's URL.

    Raises MissingExtraError without the extra `serve`, UsageError for a port that is taken, and what opening index and
    engine raises.
    """
    try:
        from refrag_core.serving.answering import Answering
        from refrag_core.serving.server import address, listen, serve
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"serving needs {error.name}, which is not installed: run `pip install 'refrag[serve]'`"
        ) from error
    from refrag_core.serving.generations import Generations

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    settings = command.settings(location)
    bound = listen(command.host, command.port)
    if settings.api_key is None and not is_loopback(command.host):
        say(f"WARNING: everyone who reaches {command.host} may ask: give a key with --api-key-file or ${KEY_VARIABLE}")
    with bound:
        generations = Generations(
            opened(),
            lambda runtime: open_engine(
                runtime,
                command.engine,
                slots=settings.slots,
                max_positions=settings.max_positions,
                reuse=settings.history.reuse,
            ),
        )
        url = address(bound)
        serve(
            Answering(generations, _within(settings, generations.current.engine.max_positions)),
            bound,
            reload_seconds=command.reload_seconds,
            on_ready=lambda: on_ready(url),
        )
