"""Answers that wait for an engine which has a thread of its own: any thread puts them in, that one takes them out."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from refrag_core.decoder_engine import TokenStream, closed_error
from refrag_core.errors import EngineError


class Asked(Protocol):
    """A prompt with what an engine needs to know of it."""

    stream: TokenStream


AskedT = TypeVar("AskedT", bound=Asked)


class AnswerQueue(Generic[AskedT]):
    """First come, first served; with the engine's thread, from `start` to `close`."""

    def __init__(self) -> None:
        self._waiting: deque[AskedT] = deque()
        self._changed = threading.Condition()
        self._refusal: EngineError | None = None
        self._thread: threading.Thread | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken in."""
        return self._refusal is not None

    def start(self, name: str, run: Callable[[], None]) -> None:
        """Have `run` called in the engine's thread. It returns once `wait` gives False."""
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def put(self, asked: AskedT) -> None:
        """One more. Raises EngineError after `close` or `fail`."""
        with self._changed:
            if self._refusal is not None:
                raise EngineError(str(self._refusal))  # one object for all would keep every caller's frames
            self._waiting.append(asked)
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing more in, and wait until the engine's thread has done what is there."""
        with self._changed:
            self._refusal = self._refusal or closed_error()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # --- the engine's thread

    def wait(self, *, busy: bool) -> bool:
        """Until there is work; False when there will never be any.

        Args:
            busy: whether the engine has answers that it took out before.
        """
        with self._changed:
            self._changed.wait_for(lambda: busy or self._waiting or self._refusal is not None)
            return busy or bool(self._waiting)

    def first(self) -> AskedT | None:
        """The one that is next, left where it is; cancelled ones before it end. None when nothing waits."""
        with self._changed:
            while self._waiting and self._waiting[0].stream.cancelled:
                self._waiting.popleft().stream.end()
            return self._waiting[0] if self._waiting else None

    def take(self) -> AskedT:
        """Take out the one that `first` gave."""
        with self._changed:
            return self._waiting.popleft()

    def fail(self, error: EngineError) -> list[AskedT]:
        """Take nothing more in, and tell so with the words of `error`; all that waited, for their streams to end."""
        with self._changed:
            self._refusal = error
            left = list(self._waiting)
            self._waiting.clear()
        return left
