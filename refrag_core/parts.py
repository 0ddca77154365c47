"""Where the seconds of a piece of work go: counters that cost nothing unless somebody collects them.

with collected() as seconds:      # by the one who wants to know
    with part("read"): …          # anywhere below, in the same thread
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class _Parts:
    """Seconds by part, and those that are already counted for parts within the open ones."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within = [0.0]

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - started
            self.seconds[name] += whole - self._within.pop()
            self._within[-1] += whole


_PARTS: ContextVar[_Parts | None] = ContextVar("parts", default=None)


@contextmanager
def collected() -> Iterator[dict[str, float]]:
    """Seconds by part of what is done inside, in this thread."""
    parts = _Parts()
    token = _PARTS.set(parts)
    try:
        yield parts.seconds
    finally:
        _PARTS.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the time inside as `name`; a part within a part counts for itself alone."""
    parts = _PARTS.get()
    if parts is None:
        yield
        return
    with parts.time(name):
        yield
