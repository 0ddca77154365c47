"""Batches that shrink when the device runs out of memory, and a memory of the size that was safe."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

MIN_BATCH = 1


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
    """

    def __init__(self, key: str, initial: int, memory: Path | None = None) -> None:
        self._key = key
        self._memory = memory
        self.rows = min(initial, self._remembered().get(key, initial))

    def _remembered(self) -> dict[str, int]:
        if self._memory is None or not self._memory.exists():
            return {}
        try:
            return dict(json.loads(self._memory.read_text()))
        except (OSError, ValueError):
            return {}  # a torn or foreign file costs one more halving, never a failed build

    def halve(self) -> None:
        """Take half the rows from now on, and remember it."""
        self.rows = max(MIN_BATCH, self.rows // 2)
        if self._memory is None:
            return
        sizes = self._remembered() | {self._key: self.rows}
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._memory.with_name(f"{self._memory.name}.{os.getpid()}")
        temporary.write_text(json.dumps(sizes, sort_keys=True))
        temporary.replace(self._memory)


def map_batches(
    run: Callable[[int, int], Result], num_rows: int, size: SafeBatchSize, release: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, int, Result]]:
    """Yield `(start, stop, run(start, stop))` over `[0, num_rows)`, halving the batch on out-of-memory.

    `release` is called after a failure, before the retry (to empty a device's allocator cache).
    Raises the out-of-memory error itself when a single row does not fit.
    """
    start = 0
    while start < num_rows:
        stop = min(start + size.rows, num_rows)
        try:
            result = run(start, stop)
        except Exception as error:
            if not is_out_of_memory(error) or stop - start <= MIN_BATCH:
                raise
            size.halve()
            release()
            continue
        yield start, stop, result
        start = stop


def map_batches_on(
    device: str, run: Callable[[int, int], Result], num_rows: int, size: SafeBatchSize
) -> Iterator[tuple[int, int, Result]]:
    """`map_batches` as suits a device type: "cuda" one batch after the other, else side by side on the cores."""
    import torch

    if device == "cuda":
        return map_batches(run, num_rows, size, torch.cuda.empty_cache)
    return _map_batches_on_cores(run, num_rows, size, torch.get_num_threads(), torch.set_num_threads)


def _map_batches_on_cores(
    run: Callable[[int, int], Result],
    num_rows: int,
    size: SafeBatchSize,
    threads: int,
    set_threads: Callable[[int], None],
) -> Iterator[tuple[int, int, Result]]:
    """As many batches at a time as there are threads, each on one thread; a single batch gets all threads.

    On two cores a third faster than batch after batch with both cores on each small matrix product.
    """
    rows = size.rows
    if threads == 1 or num_rows <= rows:
        yield from map_batches(run, num_rows, size)
        return

    def batch(start: int) -> list[tuple[int, int, Result]]:
        made = map_batches(lambda a, b: run(start + a, start + b), min(rows, num_rows - start), size)
        return [(start + a, start + b, result) for a, b, result in made]

    try:
        with ThreadPoolExecutor(threads, initializer=set_threads, initargs=(1,)) as pool:
            for results in pool.map(batch, range(0, num_rows, rows)):
                yield from results
    finally:
        set_threads(threads)  # threads that other code starts later take over what was set last
