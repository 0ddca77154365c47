"""What a server is started with."""

from dataclasses import dataclass, field

from refrag_core.errors import ConfigError
from refrag_core.history import HistoryOptions

SLOTS = 8
MAX_POSITIONS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits and defaults of a server. Raises ConfigError for those out of range."""

    model_name: str
    """Under which clients ask for it."""
    slots: int = SLOTS
    """Answers decoded at the same time."""
    max_positions: int = MAX_POSITIONS
    """Slots + new tokens of one answer at most; a row of the decoder's cache has as many."""
    queue_limit: int = 64
    """Requests that wait at most; one more is told to come back."""
    request_seconds: float = 120.0
    """From the request to the end of its answer."""
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    """For a request's body to arrive."""
    max_new_tokens: int = 256
    """Where a request names no other number."""
    max_top_k: int = 50
    history: HistoryOptions = field(default_factory=HistoryOptions)
    """What becomes of earlier messages; its positions are those of requests that name no other number."""
    api_key: str | None = field(default=None, repr=False)
    """What clients must show; None asks for nothing."""
    allow_untrained: bool = False
    """Compress with an untrained projection where a request asks for it."""
    allowed_hosts: tuple[str, ...] = ()
    """Values of the Host header that are answered; empty for any."""
    drain_seconds: float = 30.0
    """For running answers to end once the server has been told to stop."""

    def __post_init__(self) -> None:
        for name in ("slots", "max_positions", "body_bytes", "max_new_tokens", "max_top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("queue_limit", "request_seconds", "body_seconds", "drain_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number from 0 up, found {getattr(self, name)}")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty; expected some text: leave it out to ask for none")
