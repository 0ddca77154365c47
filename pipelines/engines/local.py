"""The local engine: worker processes tokenize ahead while this process runs the device stages."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.receipts import Receipt
from refrag.pipelines.stages import DeviceStage, ShardResult, Stages, run_device_stages
from refrag_core.devices import available_cores
from refrag_core.errors import StageError
from refrag_core.processes import end_with_parent
from refrag_core.storage import Store

Item = TypeVar("Item")
Made = TypeVar("Made")

_ATTEMPTS = 3
_CLOSING_SECONDS = 5.0
_GPU_THREADS = 3
_PRODUCT_THREADS = "OPENBLAS_NUM_THREADS"  # for NumPy; goes before OMP_NUM_THREADS


def default_workers() -> int:
    """Worker processes: the CPUs of this process less one for the device stages, at least 1, at most 16."""
    return max(1, min(16, available_cores() - 1))


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool is the parallelism; each worker takes one core
    end_with_parent(parent)


@contextmanager
def _one_core_each() -> Iterator[None]:
    """The environment of workers that start within: each multiplies matrices on one core, whatever is exported.

    The library's threads start when NumPy is imported, which is before a worker runs a line of ours; and as many as
    there are cores in each worker wait for one another, turn by turn, at every product.
    """
    before = os.environ.get(_PRODUCT_THREADS)
    os.environ[_PRODUCT_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PRODUCT_THREADS]
        else:
            os.environ[_PRODUCT_THREADS] = before


class _HangError(Exception):
    """A worker was at one piece of work for too long."""


def _lost(future: "Future[Any]") -> bool:
    """Whether a future of a broken pool has no outcome of its own."""
    return not future.done() or isinstance(future.exception(), BrokenProcessPool)


class LocalEngine:
    """One machine. `workers` processes for CPU stages; 0 runs everything in this process.

    Use as a context manager: leaving it ends the workers.

    Args:
        shard_timeout: seconds that this process waits for one piece of work before the workers are killed and it is
            given to new ones; None waits for ever. What runs in this process itself is not bounded.
        device_threads: that take shards through the device stages: shards are read, tokenized for the retriever and
            written while the device works on another. None is what `threads_for` says of the stages.
    """

    spans_machines = False

    def __init__(
        self, workers: int | None = None, shard_timeout: float | None = None, device_threads: int | None = None
    ) -> None:
        self.workers = default_workers() if workers is None else workers
        self.shard_timeout = shard_timeout
        self._device_threads = device_threads
        self._pool: ProcessPoolExecutor | None = None
        self._others: frozenset[int | None] = frozenset()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # An interrupted run does not wait for long work, but for what ends now it does: an interpreter that ends
            # beside its executor may find the executor's pipes just closed.
            closing = threading.Thread(target=self._pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
            closing.start()
            closing.join(None if error is None else _CLOSING_SECONDS)
            self._pool = None

    def _submit(self, function: Callable[[Item], Made], item: Item) -> "Future[Made]":
        """Hand an item to the workers; where they died since the last one, the future says so."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._others = frozenset(child.pid for child in multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(self.workers, context, _start_worker, (os.getpid(),))
        try:
            with _one_core_each():  # a pool starts its workers as work comes
                return self._pool.submit(function, item)
        except BrokenProcessPool as error:
            lost: Future[Made] = Future()
            lost.set_exception(error)
            return lost

    def map(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Results in the order of the items; at most two items a worker are under way.

        A worker that dies or hangs is replaced and its items are run again; raises StageError after three times.
        """
        if self.workers == 0:
            yield from map(function, items)
            return
        waiting: deque[tuple[Item, Future[Any]]] = deque()
        for item in items:
            waiting.append((item, self._submit(function, item)))
            if len(waiting) > 2 * self.workers:
                yield self._next(function, waiting)
        while waiting:
            yield self._next(function, waiting)

    def _next(self, function: Callable[[Item], Made], waiting: "deque[tuple[Item, Future[Any]]]") -> Made:
        hung = 0
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                result: Made = self._result(waiting[0][1])
            except (BrokenProcessPool, _HangError) as error:
                hung += isinstance(error, _HangError)
                if attempt == _ATTEMPTS:
                    raise StageError(self._given_up(hung)) from None
                self._pool = None
                for at, (item, future) in enumerate(waiting):
                    if _lost(future):
                        waiting[at] = (item, self._submit(function, item))
            else:
                waiting.popleft()
                return result
        raise AssertionError("unreachable")

    def _result(self, future: "Future[Made]") -> Made:
        """What became of the oldest work, which a worker has been at for as long as this waits at least.

        Raises _HangError once the workers are killed for it.
        """
        try:
            return future.result(self.shard_timeout)
        except TimeoutError:
            if future.done():  # an error of the work itself
                raise
            self._kill_workers()
            raise _HangError from None

    def _kill_workers(self) -> None:
        """Kill all: which one hangs nobody can tell, and the others' work is done again."""
        for child in multiprocessing.active_children():
            if child.pid not in self._others:
                child.kill()
        assert self._pool is not None
        self._pool.shutdown()

    def _given_up(self, hung: int) -> str:
        if hung:
            return (
                f"the same work did not end within {self.shard_timeout:,.0f} s in {_ATTEMPTS} attempts, expected it "
                "to: look for a document that its tokenizer cannot get through, use a smaller --shard-bytes or a "
                "longer --shard-timeout, and run the command again"
            )
        return (
            f"a worker process died {_ATTEMPTS} times on the same work (out of memory?), expected it "
            "to finish: use fewer --workers or a smaller --shard-bytes and run the command again"
        )

    def run(self, store: Store, stages: Stages, specs: Iterable[ShardSpec]) -> Iterator[ShardResult]:
        """Tokenize in the workers, a few shards ahead; encode, embed and score here, in plan order."""
        order: deque[ShardSpec] = deque()

        def noted() -> Iterator[ShardSpec]:
            for spec in specs:
                order.append(spec)
                yield spec

        work = ((order.popleft(), done) for done in self.map(partial(stages.tokenize, store), noted()))
        run = partial(_run_each, store, stages.device)
        threads = self._device_threads or threads_for(stage.device for stage in stages.device)
        yield from map(run, work) if threads == 1 else run_by_turns(run, work, threads=threads)


def threads_for(devices: Iterable[str]) -> int:
    """Threads that take shards through stages on these devices: 3 where one is a GPU, else 1.

    On a CPU the models take all cores themselves.
    """
    return _GPU_THREADS if any(device.startswith("cuda") for device in devices) else 1


def _run_each(store: Store, stages: Sequence[DeviceStage], work: tuple[ShardSpec, Receipt]) -> ShardResult:
    return run_device_stages(store, stages, *work)


def run_by_turns(run: Callable[[Item], Made], items: Iterable[Item], *, threads: int) -> Iterator[Made]:
    """`run` of each item, results in order; as many items as `threads` are under way."""
    running: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="device") as pool:
        for item in items:
            running.append(pool.submit(run, item))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
