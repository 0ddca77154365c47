"""Captures and Python's garbage collector, with a capture that only looks whether it is off."""

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.encoder_shapes import shaped_encoder_module, shaped_retriever
from refrag_core.captured import CapturedCalls, collector_off, recorded_into
from refrag_core.decoder import Decoder
from refrag_core.encoder import ChunkEncoder
from refrag_core.slot_decoder import SlotDecoder
from tests.tiny_models import decoder, decoder_tokenizer

_GRAPH: Any = object()


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    gc.enable()
    yield
    assert gc.isenabled()


class _Cycle:
    """Nothing but the collector destroys it, as an object that holds a former model's graphs."""

    def __init__(self) -> None:
        self.itself = self


class _Captures:
    """In place of `torch.cuda.graph`: what it is called with, and whether `garbage` is there when it begins."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.garbage: weakref.ref[_Cycle] | None = None

    @contextlib.contextmanager
    def __call__(self, graph: Any, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert not gc.isenabled()
        assert self.garbage is None or self.garbage() is None
        self.seen.append((graph, pool, capture_error_mode))
        yield
        assert not gc.isenabled()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> _Captures:
    fake = _Captures()
    monkeypatch.setattr(torch.cuda, "graph", fake)
    return fake


def test_garbage_is_collected_before_a_capture_and_the_collector_off_during_it(captures: _Captures) -> None:
    gc.disable()  # nothing else collects it
    captures.garbage = weakref.ref(_Cycle())
    assert captures.garbage() is not None
    gc.enable()
    with recorded_into(_GRAPH, "pool"):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert captures.seen == [(_GRAPH, "pool", "thread_local")]


def test_the_collector_is_on_again_after_a_capture_that_fails(captures: _Captures) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), recorded_into(_GRAPH, None):
        raise RuntimeError("out of memory")
    assert gc.isenabled()
    assert len(captures.seen) == 1


def test_a_collector_that_was_off_stays_off(captures: _Captures) -> None:
    gc.disable()
    with recorded_into(_GRAPH, None):
        pass
    was_on = gc.isenabled()
    gc.enable()
    assert not was_on
    assert len(captures.seen) == 1


def test_only_the_outermost_collects(captures: _Captures) -> None:
    with collector_off():
        within = weakref.ref(_Cycle())
        with recorded_into(_GRAPH, None):
            assert within() is not None
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.collect()
    assert within() is None
    assert len(captures.seen) == 1


def test_the_last_of_several_threads_turns_the_collector_on() -> None:
    first, second = threading.Event(), threading.Event()
    off = []

    def hold(until: threading.Event, entered: threading.Barrier) -> None:
        with collector_off():
            entered.wait(10)
            until.wait(10)
            off.append(not gc.isenabled())

    both = threading.Barrier(3)
    threads = [threading.Thread(target=hold, args=(until, both)) for until in (first, second)]
    for thread in threads:
        thread.start()
    both.wait(10)
    for until, thread in zip((first, second), threads, strict=True):
        assert not gc.isenabled()
        until.set()
        thread.join(10)
    assert off == [True, True]
    assert gc.isenabled()


def test_captures_of_several_threads_follow_one_another(captures: _Captures) -> None:
    under_way, most = [0], []

    def capture() -> None:
        for _ in range(2):
            with recorded_into(_GRAPH, None):
                under_way[0] += 1
                most.append(under_way[0])
                threading.Event().wait(0.001)
                under_way[0] -= 1

    threads = [threading.Thread(target=capture) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 6
    assert len(captures.seen) == 6
    assert gc.isenabled()


def _slot_decoder() -> tuple[Any, CapturedCalls]:
    made = SlotDecoder(Decoder(decoder("llama"), decoder_tokenizer(), eos_ids=()), slots=1, max_positions=64)
    made.warm([8])
    return made, made._rows._calls  # type: ignore[attr-defined]


def _encoder() -> tuple[Any, CapturedCalls]:
    made = ChunkEncoder(shaped_encoder_module("minilm", 100), fingerprint="", packed=True)
    return made, made._calls


def _retriever() -> tuple[Any, CapturedCalls]:
    made = shaped_retriever("minilm", "cpu")
    return made, made._calls


@pytest.mark.parametrize("make", [_slot_decoder, _encoder, _retriever])
def test_graphs_go_with_the_last_reference_to_their_model(make: Any) -> None:
    owner, calls = make()
    gc.collect()
    gc.disable()
    try:
        left = weakref.ref(calls)
        del calls
        assert left() is not None
        del owner
        assert left() is None
    finally:
        gc.enable()
