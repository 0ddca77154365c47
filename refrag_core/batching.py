"""Batches that shrink when the device runs out of memory, and a memory of the size that was safe."""

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Result = TypeVar("Result")

MIN_BATCH = 1
_HALVING = threading.Lock()


def cache_dir() -> Path:
    """refrag's cache folder: `$REFRAG_CACHE`, else `$XDG_CACHE_HOME/refrag`, else `~/.cache/refrag`."""
    explicit = os.environ.get("REFRAG_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "refrag"


def is_out_of_memory(error: BaseException) -> bool:
    """True for a device's or the host allocator's out-of-memory error."""
    if isinstance(error, MemoryError):
        return True
    name = type(error).__name__
    return name == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "out of memory" in str(error))


class SafeBatchSize:
    """The largest batch known to fit, for one key (device + model + dtype + row shape).

    Args:
        key: what the size holds for; sizes are remembered per key across runs.
        initial: rows a batch to start with when nothing is remembered.
        memory: JSON file of remembered sizes; None keeps them in this object only.
        filled: batches are filled up to a size of few, at most `rows`: a single row may fit once that is less.
    """

    def __init__(self, key: str, initial: int, memory: Path | None = None, *, filled: bool = False) -> None:
        self._key = key
        self._memory = memory
        self.filled = filled
        self.rows = min(initial, self._remembered().get(key, initial))

    def _remembered(self) -> dict[str, int]:
        if self._memory is None or not self._memory.exists():
            return {}
        try:
            return dict(json.loads(self._memory.read_text()))
        except (OSError, ValueError):
            return {}  # a torn or foreign file costs one more halving, never a failed build

    def halve(self) -> None:
        """Take half the rows from now on, and remember it.

        Safe for threads. Of what two processes remember at the same time one may be lost: that costs one more halving.
        """
        with _HALVING:
            self.rows = max(MIN_BATCH, self.rows // 2)
            if self._memory is not None:
                _replace(self._memory, json.dumps(self._remembered() | {self._key: self.rows}, sort_keys=True))


def _replace(path: Path, text: str) -> None:
    """By a file whose name nobody else has: the folder may be shared with other machines and their process ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text)
    temporary.replace(path)


def map_batches(
    run: Callable[[int, int], Result], num_rows: int, size: SafeBatchSize, release: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, int, Result]]:
    """Yield `(start, stop, run(start, stop))` over `[0, num_rows)`, halving the batch on out-of-memory.

    `release` is called after a failure, before the retry (to empty a device's allocator cache).
    Raises the out-of-memory error itself when a single row does not fit by itself.
    """
    start = 0
    while start < num_rows:
        stop = min(start + size.rows, num_rows)
        try:
            result = run(start, stop)
        except Exception as error:
            least = size.rows if size.filled else stop - start
            if not is_out_of_memory(error) or least <= MIN_BATCH:
                raise
            size.halve()
            release()
            continue
        yield start, stop, result
        start = stop


Span = tuple[int, int, SafeBatchSize]
"""Rows `[start, stop)` of one shape, and how many of them a batch takes."""


def equal_runs(values: npt.NDArray[np.integer[Any]]) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of each run of equal neighbours in `values` `[n]`."""
    changes = np.flatnonzero(np.diff(values)) + 1
    return pairwise([0, *changes.tolist(), len(values)]) if len(values) else iter(())


def map_spans(
    device: str, run: Callable[[int, int], Result], spans: Iterable[Span]
) -> Iterator[tuple[int, int, Result]]:
    """Yield `(start, stop, run(start, stop))` over batches within `spans`, halved on out-of-memory.

    On "cuda" one batch runs after the other. On a CPU as many run at a time as PyTorch has threads, each on
    one thread (`run` is called from several); a single batch keeps all threads. That is a third faster on two
    idle cores than all threads on each small matrix product, and many times where other work, such as
    tokenizing, wants the cores too: then every product waits for its slowest thread.
    """
    import torch

    threads = 1 if device == "cuda" else torch.get_num_threads()
    batches = [
        (a, min(a + size.rows, stop), size) for start, stop, size in spans for a in range(start, stop, size.rows)
    ]
    if threads == 1 or len(batches) <= 1:
        release = torch.cuda.empty_cache if device == "cuda" else lambda: None
        for batch in batches:
            yield from _halving(run, *batch, release)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for made in pool.map(lambda batch: list(_halving(run, *batch)), batches):
                yield from made
    finally:
        torch.set_num_threads(threads)  # threads that other code starts later take over what was set last


def _halving(
    run: Callable[[int, int], Result],
    start: int,
    stop: int,
    size: SafeBatchSize,
    release: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, int, Result]]:
    for a, b, result in map_batches(lambda a, b: run(start + a, start + b), stop - start, size, release):
        yield start + a, start + b, result
