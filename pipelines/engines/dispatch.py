"""Work handed to pools of workers, and what happens when that fails; knows no engine's library.

A pool grows with its backlog between its sizes. A worker does one piece of work at a time, so that nothing waits
behind a straggler, and the clock of a piece of work starts when it does. Whatever goes wrong with a worker (its
death, an unexpected error, time up) ends it: another one takes its place, and the work goes to another node where
there is one, a bounded number of times. Work that was lost with its node was not at fault, and is not counted so.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from refrag_core.errors import ClusterError, ObjectStoreError, RefragError, StageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how often something may go wrong."""

    attempts: int = 3
    """Deaths, unexpected errors and time-outs of one piece of work."""
    node_losses: int = 20
    """Nodes that are lost under one piece of work."""
    timeout: float = 3600.0
    """Seconds that one piece of work may run."""
    straggler_factor: float = 4.0
    """A piece of work is told of as a straggler after so many times the median."""
    straggler_seconds: float = 30.0
    """None is a straggler before."""
    waiting_seconds: float = 30.0
    """After so long without a worker it is told what is waited for."""
    starving_seconds: float = 900.0
    """After so long without a worker the run fails."""
    avoiding_seconds: float = 60.0
    """Work waits so long for a worker on a node where it has not failed."""


@dataclass(slots=True, eq=False)
class Work:
    """One call, wherever it runs."""

    pool: str
    name: str
    """For messages and dashboards: `tokenize 0a1b2c…`."""
    call: Callable[[], Any]
    """Picklable."""
    subject: Any = None
    """What the result belongs to; stays here."""
    faults: int = 0
    node_losses: int = 0
    avoided: set[str] = field(default_factory=set)
    """Nodes on which it went wrong."""
    avoided_until: float = 0.0
    """From then on it goes wherever there is room."""


# --- what workers report ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has started."""

    worker: int
    node: str


@dataclass(frozen=True, slots=True)
class Done:
    """A worker has finished its work."""

    worker: int
    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """A worker's work raised; the worker lives."""

    worker: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Died:
    """A worker is gone."""

    worker: int
    reason: str
    node_lost: bool = False


Event = Ready | Done | Raised | Died


class Fleet(Protocol):
    """What starts, feeds and ends workers: the only part that an engine's library has to provide."""

    def start(self, worker: int, pool: str) -> None:
        """Ask for a worker; `Ready` or `Died` follows, however late."""

    def submit(self, worker: int, work: Work) -> None:
        """Hand work to a ready, idle worker; `Done`, `Raised` or `Died` follows."""

    def stop(self, worker: int) -> None:
        """End a worker at once; nothing follows."""

    def poll(self, seconds: float) -> Iterable[Event]:
        """What happened, waiting up to `seconds` for something to happen."""


class Telemetry(Protocol):
    """Receives what a dispatcher does, for metrics and the log."""

    def note(self, message: str) -> None:
        """A line for the log."""

    def retried(self, pool: str, reason: str) -> None:
        """Work is run again; `reason` is one of died, node lost, timed out, raised."""

    def finished(self, pool: str, seconds: float) -> None:
        """A piece of work is done."""

    def state(self, pool: str, *, queued: int, running: int, workers: int) -> None:
        """How a pool stands now."""


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    pool: str
    node: str | None = None
    work: Work | None = None
    since: float = 0.0
    """When its work began."""
    reported: bool = False
    """Whether its work was told of as a straggler."""


@dataclass(slots=True, eq=False)
class _Pool:
    name: str
    fewest: int = 0
    most: int = 0
    queue: deque[Work] = field(default_factory=deque)
    workers: dict[int, _Worker] = field(default_factory=dict)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    """What the last pieces of work took."""
    failed_starts: int = 0
    starving_since: float | None = None
    told: bool = False

    @property
    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers.values() if worker.work is not None]

    @property
    def idle(self) -> list[_Worker]:
        return [worker for worker in self.workers.values() if worker.work is None and worker.node is not None]

    @property
    def starting(self) -> list[_Worker]:
        return [worker for worker in self.workers.values() if worker.node is None]


def _detail(error: Exception) -> str:
    """An error in words; a carrier of another error's text says that alone."""
    return str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"


class Dispatcher:
    """Keeps pools of workers at work. Not thread-safe.

    Args:
        clock: seconds, monotonic.
        room: says what there is and what is free, for the message when no worker starts.
    """

    def __init__(
        self,
        fleet: Fleet,
        telemetry: Telemetry,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        room: Callable[[], str] = lambda: "",
    ) -> None:
        self._fleet = fleet
        self._telemetry = telemetry
        self._limits = limits
        self._clock = clock
        self._room = room
        self._pools: dict[str, _Pool] = {}
        self._started = 0

    def resize(self, pool: str, fewest: int, most: int) -> None:
        """Let a pool have between `fewest` and `most` workers; idle ones beyond are ended."""
        found = self._pools.setdefault(pool, _Pool(pool))
        found.fewest, found.most = fewest, most
        self._shrink(found)

    def put(self, work: Work) -> None:
        """Queue a piece of work."""
        self._pools[work.pool].queue.append(work)

    def outstanding(self, pool: str) -> int:
        """Pieces of work that are queued or running."""
        found = self._pools[pool]
        return len(found.queue) + len(found.busy)

    def step(self, seconds: float = 0.5) -> list[tuple[Work, Any]]:
        """Start workers, hand work out, and wait up to `seconds` for something to happen; what is finished.

        Raises the RefragError of a piece of work as it is; StageError for work that failed too often; ClusterError
        when no worker can be had.
        """
        for pool in self._pools.values():
            self._grow(pool)
            self._hand_out(pool)
            busy = len(pool.busy)
            self._telemetry.state(pool.name, queued=len(pool.queue), running=busy, workers=len(pool.workers))
        finished = [done for event in self._fleet.poll(seconds) for done in self._take(event)]
        for pool in self._pools.values():
            self._watch(pool)
        return finished

    def clear(self) -> None:
        """Forget all work, and end the workers that are at it."""
        for pool in self._pools.values():
            pool.queue.clear()
            for worker in pool.busy:
                self._end(worker)

    def close(self) -> None:
        """End all workers."""
        for pool in self._pools.values():
            pool.queue.clear()
            for worker in list(pool.workers.values()):
                self._end(worker)

    # --- workers

    def _grow(self, pool: _Pool) -> None:
        wanted = min(pool.most, max(pool.fewest, len(pool.queue) + len(pool.busy)))
        for _ in range(wanted - len(pool.workers)):
            self._started += 1
            pool.workers[self._started] = _Worker(self._started, pool.name)
            self._fleet.start(self._started, pool.name)

    def _shrink(self, pool: _Pool) -> None:
        spare = [*pool.starting, *pool.idle][: max(0, len(pool.workers) - pool.most)]
        for worker in spare:
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        self._pools[worker.pool].workers.pop(worker.number, None)
        self._fleet.stop(worker.number)

    def _hand_out(self, pool: _Pool) -> None:
        waiting = list(pool.queue)
        for work in waiting:
            idle = pool.idle
            if not idle:
                return
            worker = self._best(pool, idle, work)
            if worker is None:
                continue
            pool.queue.remove(work)
            worker.work, worker.since, worker.reported = work, self._clock(), False
            self._fleet.submit(worker.number, work)

    def _best(self, pool: _Pool, idle: list[_Worker], work: Work) -> _Worker | None:
        """An idle worker on a node where the work has not failed; None while one may yet become idle or start."""
        good = [worker for worker in idle if worker.node not in work.avoided]
        if good or self._clock() >= work.avoided_until:
            return (good or idle)[0]
        others = any(worker.node not in work.avoided for worker in (*pool.busy, *pool.starting))
        return None if others else idle[0]

    # --- events

    def _worker(self, number: int) -> _Worker | None:
        return next((pool.workers[number] for pool in self._pools.values() if number in pool.workers), None)

    def _take(self, event: Event) -> Iterator[tuple[Work, Any]]:
        worker = self._worker(event.worker)
        if worker is None:  # it was ended before it could say so
            return
        pool = self._pools[worker.pool]
        if isinstance(event, Ready):
            worker.node, pool.failed_starts = event.node, 0
        elif isinstance(event, Done):
            yield self._finish(pool, worker), event.value
        elif isinstance(event, Raised):
            self._raised(worker, event.error)
        else:
            self._died(pool, worker, event)

    def _finish(self, pool: _Pool, worker: _Worker) -> Work:
        work, seconds = worker.work, self._clock() - worker.since
        assert work is not None
        worker.work = None
        pool.seconds.append(seconds)
        self._telemetry.finished(pool.name, seconds)
        if len(pool.workers) > pool.most:
            self._end(worker)
        return work

    def _raised(self, worker: _Worker, error: Exception) -> None:
        if isinstance(error, RefragError) and not isinstance(error, ObjectStoreError):
            raise error
        self._again(worker, "raised", _detail(error), error)

    def _died(self, pool: _Pool, worker: _Worker, event: Died) -> None:
        if worker.work is not None:
            self._again(worker, "node lost" if event.node_lost else "died", event.reason)
            return
        self._end(worker)
        if worker.node is None and not event.node_lost:
            pool.failed_starts += 1
            if pool.failed_starts >= self._limits.attempts:
                raise ClusterError(
                    f"{pool.failed_starts} workers for {pool.name} died while they started ({event.reason}), expected "
                    "them to run: look at the workers' logs on the nodes, and run the command again"
                )

    def _again(self, worker: _Worker, reason: str, detail: str, error: Exception | None = None) -> None:
        """End a worker and queue its work anew, or give up."""
        work, node = worker.work, worker.node
        assert work is not None
        self._end(worker)
        if reason == "node lost":
            work.node_losses += 1
        else:
            work.faults += 1
        if node is not None:
            work.avoided.add(node)
            work.avoided_until = self._clock() + self._limits.avoiding_seconds
        if work.faults >= self._limits.attempts or work.node_losses >= self._limits.node_losses:
            raise self._given_up(work, reason, detail, error)
        self._telemetry.retried(work.pool, reason)
        self._telemetry.note(f"{work.name} is run again: {reason} ({detail})")
        self._pools[work.pool].queue.appendleft(work)

    def _given_up(self, work: Work, reason: str, detail: str, error: Exception | None) -> Exception:
        attempts = work.faults + work.node_losses
        if isinstance(error, (OSError, RefragError)):
            return error
        if reason == "timed out":
            return StageError(
                f"{work.name} was ended {attempts} times ({detail}), expected it to finish: raise --shard-timeout or "
                "use a smaller --shard-bytes, and run the command again; what is finished is kept"
            )
        if reason == "raised" and not isinstance(error, MemoryError):
            return StageError(
                f"{work.name} failed {attempts} times ({detail}), expected it to finish: look at the workers' logs, "
                "and run the command again; what is finished is kept"
            )
        return StageError(
            f"{work.name}: its worker died {attempts} times ({detail}; out of memory?), expected it to finish: use a "
            "smaller --shard-bytes, fewer workers a node or nodes with more memory, and run the command again; what "
            "is finished is kept"
        )

    # --- time

    def _watch(self, pool: _Pool) -> None:
        now = self._clock()
        for worker in pool.busy:
            assert worker.work is not None
            seconds = now - worker.since
            if seconds >= self._limits.timeout:
                self._again(worker, "timed out", f"after {self._limits.timeout:,.0f} s on {worker.node}")
            elif not worker.reported and seconds >= self._straggling(pool):
                worker.reported = True
                self._telemetry.note(
                    f"straggler: {worker.work.name} has run for {seconds:,.0f} s on {worker.node}, the median is "
                    f"{statistics.median(pool.seconds):,.1f} s; it is ended after {self._limits.timeout:,.0f} s"
                )
        self._watch_starving(pool, now)

    def _straggling(self, pool: _Pool) -> float:
        if len(pool.seconds) < 4:
            return float("inf")
        return max(self._limits.straggler_seconds, self._limits.straggler_factor * statistics.median(pool.seconds))

    def _watch_starving(self, pool: _Pool, now: float) -> None:
        """Say so while work waits and no worker of the pool has started, and give up after a long time."""
        if not pool.queue or pool.busy or pool.idle:
            pool.starving_since, pool.told = None, False
            return
        pool.starving_since = now if pool.starving_since is None else pool.starving_since
        seconds = now - pool.starving_since
        if seconds >= self._limits.starving_seconds:
            raise ClusterError(
                f"no worker for {pool.name} has started within {seconds:,.0f} s ({self._room()}), expected room for "
                "one: other jobs hold what it needs; end them or add nodes, and run the command again"
            )
        if seconds >= self._limits.waiting_seconds and not pool.told:
            pool.told = True
            self._telemetry.note(f"waiting for room for a {pool.name} worker: {self._room()}")
