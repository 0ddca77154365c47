"""Calls of one function whose shapes repeat: on CUDA captured once a shape and replayed, elsewhere simply made.

A decoder's forward over few positions costs the host more than the device: hundreds of launches. A captured graph is
one launch. Everything a captured function reads must be in its tensors or stay where it is for good.
"""

import contextlib
import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refrag_core.parts import part

_WARM_UP_CALLS = 2
_COMPILED_VARIANTS = 64
_CAPTURING = threading.RLock()
"""One capture at a time in the process: to begin one waits for the whole device, which breaks any other."""

Key = tuple[Any, ...]
Shape = tuple[int, ...]


class _CollectorPause:
    """How many ask for Python's cyclic garbage collector to be off, and whether it was on before the first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = 0
        self._was_on = False

    def begin(self) -> None:
        """Off, after one collection; whoever comes while it is off must not collect: that may be within a capture."""
        with self._lock:
            if self._inside == 0:
                self._was_on = gc.isenabled()
                gc.collect()
                gc.disable()
            self._inside += 1

    def end(self) -> None:
        """As it was, after the last."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._was_on:
                gc.enable()


_PAUSE = _CollectorPause()


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Collect garbage, then keep the cyclic collector off, for all threads, until the last who asked for it is done.

    Around many captures it spares all but one of the collections, which take some tenths of a second each.
    """
    _PAUSE.begin()
    try:
        yield
    finally:
        _PAUSE.end()


@contextlib.contextmanager
def recorded_into(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture what the block launches on the current device into `graph`; every capture goes through here.

    Garbage is collected first, so that a former model's memory is free, and the collector is off until the end: it
    could destroy that model's graphs, which spoils a capture in the same thread. Other threads may allocate and let
    go of graphs meanwhile: in the mode `thread_local` only this thread's calls are checked.

    Args:
        pool: of `torch.cuda.graph_pool_handle`: memory that graphs share.
    """
    with _CAPTURING, collector_off(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        yield


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph, the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class CapturedCalls:
    """`function(*tensors, *constants)`, a graph for every combination of shapes, dtypes and constants on CUDA.

    Threads may share it: their calls follow one another on the device. Graphs share their memory, so that the largest
    decides how much it is.

    Args:
        function: of tensors and hashable constants to one tensor, without waiting for the device. A method is held
            weakly: its object is taken to own these calls, and graphs then go with the last reference to it.
        device: where it computes. On anything but CUDA it is called as it is.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._held: Callable[[], Callable[..., Tensor] | None] = lambda: function
        if inspect.ismethod(function):
            self._held = weakref.WeakMethod(function)
        self._device = device
        self._graphs: dict[Key, _Captured] = {}
        self._pool: Any = None
        self._aside: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def _function(self, *arguments: Any) -> Tensor:
        function = self._held()
        assert function is not None, "a method's object owns its captured calls"
        return function(*arguments)

    @torch.inference_mode()
    def __call__(self, tensors: Sequence[Tensor], *constants: Any, shapes: Sequence[Shape] | None = None) -> Tensor:
        """The function's result, in memory of its own. Tensors may be on the host; they travel without waiting.

        Args:
            shapes: of the tensors as the function gets them, at least as large as they are, with zeros behind their
                ends; None for their own.
        """
        shapes = [tensor.shape for tensor in tensors] if shapes is None else shapes
        if self._device.type != "cuda":
            return self._function(*self._padded(tensors, shapes), *constants)
        with self._lock:
            return self._replay(tensors, shapes, constants)

    def _replay(self, tensors: Sequence[Tensor], shapes: Sequence[Shape], constants: Sequence[Any]) -> Tensor:
        key = (*shapes, *(tensor.dtype for tensor in tensors), *constants)
        captured = self._graphs.get(key)
        if captured is None:
            with part("capture"):
                captured = self._graphs[key] = self._capture(self._padded(tensors, shapes), constants)
        for kept, given in zip(captured.inputs, tensors, strict=True):
            if kept.shape != given.shape:  # a NaN left behind would get into what is masked: 0 · NaN is NaN
                kept.zero_()
            _corner(kept, given.shape).copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.output.clone()

    def _padded(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The tensors on the device, with zeros behind them where the shapes are larger."""
        padded = []
        for tensor, shape in zip(tensors, shapes, strict=True):
            if tensor.shape == shape:
                padded.append(tensor.to(self._device))
                continue
            padded.append(torch.zeros(shape, dtype=tensor.dtype, device=self._device))
            _corner(padded[-1], tensor.shape).copy_(tensor)
        return padded

    def _capture(self, tensors: Sequence[Tensor], constants: Sequence[Any]) -> _Captured:
        with _CAPTURING, torch.cuda.device(self._device):
            inputs = tuple(tensor.to(self._device, copy=True) for tensor in tensors)
            self._warm_up(inputs, constants)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with recorded_into(graph, self._pool):
                output = self._function(*inputs, *constants)
        return _Captured(graph, inputs, output)

    def _warm_up(self, inputs: Sequence[Tensor], constants: Sequence[Any]) -> None:
        """Compile, choose kernels and allocate what stays, before anything is recorded."""
        if self._aside is None:  # memory stays with the stream that it was first used on: one for all shapes
            self._aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream = self._aside
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                self._function(*inputs, *constants)
        torch.cuda.current_stream(self._device).wait_stream(stream)


def _corner(padded: Tensor, shape: Shape) -> Tensor:
    """The part of a padded tensor that one of this shape fills."""
    return padded if padded.shape == shape else padded[tuple(slice(size) for size in shape)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled into one kernel, for many dtypes, widths and constants: a process may hold several models.

    The limit on variants holds for the thread that sets it alone, so that each call does.
    """
    made = torch.compile(function, dynamic=True, fullgraph=True)

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_COMPILED_VARIANTS):
            return made(*arguments)

    return call


def bucket(size: int, *, smallest: int, fine: int = 1024) -> int:
    """The padded size for `size`: multiples of `smallest` up to `fine`, from there on sixteenths of a power of two.

    Padding is less than `smallest` up to `fine` and less than a sixteenth above it, with few different shapes.
    """
    step = smallest
    if size > fine:
        step = max(smallest, 1 << ((size - 1).bit_length() - 5))
    return -(-size // step) * step


def filled_rows(rows: int, *, smallest: int, largest: int) -> int:
    """How many rows a batch of `rows` is filled up to: a power of two of at least `smallest`, but at most `largest`."""
    return min(largest, max(smallest, 1 << (rows - 1).bit_length()))
