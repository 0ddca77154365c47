"""What answers at the moment: a generation of the index and the engine of its decoder, replaced together.

A request takes both at once and keeps them to its end. After a reload with the same decoder the engine goes on; with
another one the old engine is closed when its last request has ended.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refrag_core.decoder_engine import DecoderEngine
from refrag_core.runtime import Runtime

EngineMaker = Callable[[Runtime], DecoderEngine]


class Served:
    """One generation with its engine, for as long as it is asked."""

    def __init__(self, runtime: Runtime, engine: "_SharedEngine") -> None:
        self.runtime = runtime
        self._engine = engine

    @property
    def engine(self) -> DecoderEngine:
        """Decodes for this generation."""
        return self._engine.engine

    @contextmanager
    def held(self) -> Iterator["Served"]:
        """Keep the engine open meanwhile."""
        self._engine.acquire()
        try:
            yield self
        finally:
            self._engine.release()


class _SharedEngine:
    """An engine that is closed when its last holder lets go."""

    def __init__(self, engine: DecoderEngine) -> None:
        self.engine = engine
        self._holders = 1
        self._lock = threading.Lock()

    def acquire(self) -> None:
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:  # closing joins the decoder's thread: nobody is to wait for it
            threading.Thread(target=self.engine.close, name="close-decoder", daemon=True).start()


class Generations:
    """The generation that new requests are answered from.

    Args:
        runtime: opened; reloads go through it.
        make_engine: the engine for a runtime's decoder.
    """

    def __init__(self, runtime: Runtime, make_engine: EngineMaker) -> None:
        self._runtime = runtime
        self._make_engine = make_engine
        self._reloading = threading.Lock()
        self._swapping = threading.Lock()
        pinned = runtime.pinned()
        self._shared = _SharedEngine(make_engine(pinned))
        self._current = Served(pinned, self._shared)
        self.reloads = 0
        """Generations that were taken up since the start."""

    @property
    def current(self) -> Served:
        """To look at; requests `hold` it."""
        return self._current

    @contextmanager
    def hold(self) -> Iterator[Served]:
        """The current generation and its engine, to the end of one request."""
        with self._swapping:
            held = self._current.held()
            served = held.__enter__()
        try:
            yield served
        finally:
            held.__exit__(None, None, None)

    def reload(self, version: int | None = None) -> int:
        """Answer new requests from generation `version`, by default the newest; returns its number.

        What is under way ends on the generation that it began with. An error leaves everything as it is.
        """
        with self._reloading:
            before = self._current.runtime
            self._runtime.reload(version)
            pinned = self._runtime.pinned()
            if pinned.reader is not before.reader:
                self._swap(pinned, same_decoder=pinned.decoder is before.decoder)
            return pinned.version

    def _swap(self, pinned: Runtime, *, same_decoder: bool) -> None:
        shared = self._shared if same_decoder else _SharedEngine(self._make_engine(pinned))
        with self._swapping:
            old, self._shared = self._shared, shared
            self._current = Served(pinned, shared)
            self.reloads += 1
        if old is not shared:
            old.release()

    def close(self) -> None:
        """Finish what was submitted and let go of the decoder."""
        self._shared.engine.close()
