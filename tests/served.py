"""A server in this process: real sockets, a real event loop in a thread of its own, tiny models."""

import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from refrag_core.runtime import Runtime
from refrag_core.serving.answering import Answering
from refrag_core.serving.generations import EngineMaker, Generations
from refrag_core.serving.scheduler import EmbeddedEngine, embedded_engine
from refrag_core.serving.server import Server, address, listen
from refrag_core.serving.settings import ServeSettings
from refrag_core.slot_decoder import SlotDecoder

MODEL = "tiny"


class Running:
    """A server that answers at `url`."""

    def __init__(self, server: Server, answering: Answering, bound: socket.socket) -> None:
        self.server = server
        self.answering = answering
        self.url = address(bound)
        self.port = int(bound.getsockname()[1])

    @property
    def engine(self) -> Any:
        """Of the current generation."""
        return self.answering.generations.current.engine

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def until(self, condition: Any) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it never came about"
            time.sleep(0.005)


@contextmanager
def served(runtime: Runtime, *, make_engine: EngineMaker | None = None, **settings: Any) -> Iterator[Running]:
    """A server over `runtime` until the end of the block."""
    chosen = ServeSettings(**{"model_name": MODEL, "slots": 4, "max_positions": 1024, "drain_seconds": 10, **settings})
    maker = make_engine or (
        lambda of: embedded_engine(of.decoder, slots=chosen.slots, max_positions=chosen.max_positions)
    )
    answering = Answering(Generations(runtime, maker), chosen)
    bound = listen("127.0.0.1", 0)
    server = Server(answering)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="server")
    thread.start()
    running = Running(server, answering, bound)
    running.until(lambda: server.started)
    try:
        yield running
    finally:
        server.drain()
        thread.join(30)
        with suppress(OSError):
            bound.close()
        answering.close()
        assert not thread.is_alive()


class Brake:
    """Rows of a decoder whose steps wait while it is on, all of them or those of few answers."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self._changed = threading.Condition()
        self._fewest = 0.0
        self._passing = 0
        self.steps = 0
        self.released: list[int] = []
        self.largest_batch = 0
        self.keeps_prefixes = rows.keeps_prefixes

    def on(self, *, below: float = math.inf) -> None:
        """No step of fewer than `below` answers begins from now on."""
        with self._changed:
            self._fewest = below
            self._changed.notify_all()

    def off(self) -> None:
        """Steps go on."""
        self.on(below=0)

    def let_one_pass(self) -> None:
        """One step begins nevertheless."""
        with self._changed:
            self._passing += 1
            self._changed.notify_all()

    def prefill(self, slots: Any, inputs_embeds: Any, *, start: Any = None) -> Any:
        """See Slots."""
        return self._rows.prefill(slots, inputs_embeds, start=start)

    def step(self, slots: Any, token_ids: Any) -> Any:
        """See Slots."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(slots) >= self._fewest or self._passing, 60)
            self._passing -= len(slots) < self._fewest
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(slots))
        return self._rows.step(slots, token_ids)

    def release(self, slot: int) -> None:
        """See Slots."""
        self.released.append(slot)
        self._rows.release(slot)


@contextmanager
def served_with_brakes(
    runtime: Runtime, brakes: list[Brake], *, slots: int, max_positions: int, **settings: Any
) -> Iterator[Running]:
    """A server over `runtime`; the brake of each engine that it makes is added to `brakes`."""

    def engine(of: Runtime) -> EmbeddedEngine:
        brakes.append(Brake(SlotDecoder(of.decoder, slots=slots, max_positions=max_positions)))
        return EmbeddedEngine(brakes[-1], slots=slots, max_positions=max_positions, eos_ids=of.decoder.eos_ids)

    with served(runtime, make_engine=engine, max_positions=max_positions, **settings) as running:
        yield running
