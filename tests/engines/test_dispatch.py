"""Retries, time limits, other nodes and bounds of a dispatcher, with workers and a clock that do as they are told."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from refrag.pipelines.engines.dispatch import Died, Dispatcher, Done, Event, Limits, Raised, Ready, Work
from refrag_core.errors import ClusterError, ObjectStoreError, StageError

NODES = ("north", "south")


class FakeFleet:
    """Workers on two nodes in turn. `answer` says what becomes of work: an event, or None for nothing yet."""

    def __init__(self, answer: Callable[[int, Work], Event | None] | None = None) -> None:
        self.answer = answer or (lambda worker, work: Done(worker, work.subject))
        self.events: deque[Event] = deque()
        self.alive: dict[int, str] = {}
        self.submitted: list[tuple[int, Any]] = []
        self.stopped: list[int] = []
        self.starts = True

    def start(self, worker: int, pool: str) -> None:
        self.alive[worker] = NODES[worker % 2]
        if self.starts:
            self.events.append(Ready(worker, self.alive[worker]))

    def submit(self, worker: int, work: Work) -> None:
        self.submitted.append((worker, work.subject))
        if event := self.answer(worker, work):
            self.events.append(event)

    def stop(self, worker: int) -> None:
        self.stopped.append(worker)
        del self.alive[worker]

    def poll(self, seconds: float) -> Iterable[Event]:
        found, self.events = list(self.events), deque()
        return found


class Log:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.retries: list[tuple[str, str]] = []
        self.states: list[tuple[int, int, int]] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def retried(self, pool: str, reason: str) -> None:
        self.retries.append((pool, reason))

    def finished(self, pool: str, seconds: float) -> None:
        pass

    def state(self, pool: str, *, queued: int, running: int, workers: int) -> None:
        self.states.append((queued, running, workers))


class Bench:
    """A dispatcher of one pool with all that it talks to."""

    def __init__(self, fleet: FakeFleet, most: int = 2, fewest: int = 0, **limits: Any) -> None:
        self.fleet, self.log, self.now = fleet, Log(), 0.0
        self.dispatcher = Dispatcher(
            fleet, self.log, Limits(**limits), clock=lambda: self.now, room=lambda: "1 CPU, 0 free"
        )
        self.dispatcher.resize("cpu", fewest, most)

    def put(self, count: int) -> None:
        for number in range(count):
            self.dispatcher.put(Work("cpu", f"work {number}", lambda: None, number))

    def run(self, steps: int = 50) -> list[Any]:
        return [value for _ in range(steps) for _, value in self.dispatcher.step()]


def test_work_is_spread_over_as_many_workers_as_there_may_be() -> None:
    bench = Bench(FakeFleet(), most=3)
    bench.put(10)
    assert sorted(bench.run()) == list(range(10))
    assert {worker for worker, _ in bench.fleet.submitted} == {1, 2, 3}
    assert max(running for _, running, _ in bench.log.states) == 3
    assert bench.dispatcher.outstanding("cpu") == 0


def test_a_pool_grows_with_its_backlog_alone() -> None:
    bench = Bench(FakeFleet(), most=8, fewest=1)
    bench.run(2)
    assert len(bench.fleet.alive) == 1
    bench.put(3)
    bench.run(2)
    assert len(bench.fleet.alive) == 3


def test_a_smaller_pool_ends_idle_workers_at_once_and_busy_ones_when_they_are_done() -> None:
    held = FakeFleet(lambda worker, work: None if work.subject == 0 else Done(worker, work.subject))
    bench = Bench(held, most=3)
    bench.put(3)
    assert sorted(bench.run()) == [1, 2]
    bench.dispatcher.resize("cpu", 0, 0)
    (busy,) = held.alive
    held.events.append(Done(busy, 0))
    assert bench.run(1) == [0]
    assert held.alive == {}


@pytest.mark.parametrize(("event", "reason"), [(Died, "died"), (Raised, "raised")])
def test_failed_work_goes_to_another_node(event: Any, reason: str) -> None:
    def answer(worker: int, work: Work) -> Event | None:
        detail = "killed" if event is Died else ValueError("bad")
        return Done(worker, worker) if work.faults else event(worker, detail)

    fleet = FakeFleet(answer)
    bench = Bench(fleet, most=2)
    bench.put(1)
    bench.dispatcher.resize("cpu", 2, 2)
    (worker,) = bench.run()
    assert NODES[fleet.submitted[0][0] % 2] != NODES[worker % 2]
    assert fleet.submitted[0][0] in fleet.stopped
    assert bench.log.retries == [("cpu", reason)]
    assert bench.log.notes[0].startswith(f"work 0 is run again: {reason} (")


def test_where_no_other_node_comes_it_is_tried_there_again() -> None:
    fleet = FakeFleet(lambda worker, work: Done(worker, 7) if work.faults else Died(worker, "killed"))
    bench = Bench(fleet, most=1)
    bench.put(1)
    bench.run(3)
    for worker in fleet.alive:
        fleet.alive[worker] = "south"
    fleet.events = deque(Ready(worker, "south") for worker in fleet.alive)
    assert bench.run() == [7]


def test_other_work_passes_what_waits_for_another_node() -> None:
    fleet = FakeFleet(lambda worker, work: None)
    bench = Bench(fleet, most=2, fewest=2)
    bench.run(1)
    north = next(number for number, node in fleet.alive.items() if node == "north")
    failed = Work("cpu", "failed", lambda: None, "failed", avoided={"north"}, avoided_until=60.0)
    long = Work("cpu", "long", lambda: None, "long", avoided={"north"}, avoided_until=60.0)
    for work in (long, failed, Work("cpu", "other", lambda: None, "other")):
        bench.dispatcher.put(work)
    bench.run(1)
    assert (north, "other") in fleet.submitted
    assert "failed" not in {subject for _, subject in fleet.submitted}
    fleet.events.append(Done(north, "other"))
    bench.run(1)
    bench.now = 61.0
    bench.run(1)
    assert fleet.submitted[-1] == (north, "failed")


MESSAGES = {
    "died": (
        "work 0: its worker died 3 times (its process ended; out of memory?), expected it to finish: use a smaller "
        "--shard-bytes, fewer workers a node or nodes with more memory, and run the command again; what is finished "
        "is kept"
    ),
    "raised": (
        "work 0 failed 3 times (ValueError: bad), expected it to finish: look at the workers' logs, and run the "
        "command again; what is finished is kept"
    ),
    "memory": (
        "work 0: its worker died 3 times (MemoryError: 9 GB; out of memory?), expected it to finish: use a smaller "
        "--shard-bytes, fewer workers a node or nodes with more memory, and run the command again; what is finished "
        "is kept"
    ),
}


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        ("died", lambda worker: Died(worker, "its process ended")),
        ("raised", lambda worker: Raised(worker, ValueError("bad"))),
        ("memory", lambda worker: Raised(worker, MemoryError("9 GB"))),
    ],
)
def test_after_three_faults_one_error_says_so(kind: str, event: Callable[[int], Event]) -> None:
    bench = Bench(FakeFleet(lambda worker, work: event(worker)))
    bench.put(1)
    with pytest.raises(StageError) as raised:
        bench.run()
    assert str(raised.value) == MESSAGES[kind]
    assert len(bench.fleet.submitted) == 3


def test_a_refrag_error_comes_at_once_and_as_it_is() -> None:
    error = StageError("shard 2 cannot be read, expected it to be: look at it")
    bench = Bench(FakeFleet(lambda worker, work: Raised(worker, error)))
    bench.put(1)
    with pytest.raises(StageError) as raised:
        bench.run()
    assert raised.value is error
    assert len(bench.fleet.submitted) == 1


@pytest.mark.parametrize("error", [ObjectStoreError("it is down"), OSError(28, "No space left on device")])
def test_what_may_pass_is_tried_again_and_then_comes_as_it_is(error: Exception) -> None:
    bench = Bench(FakeFleet(lambda worker, work: Raised(worker, error)))
    bench.put(1)
    with pytest.raises(type(error)) as raised:
        bench.run()
    assert raised.value is error
    assert len(bench.fleet.submitted) == 3


def test_nodes_that_are_lost_do_not_count_against_their_work() -> None:
    def answer(worker: int, work: Work) -> Event:
        if work.node_losses < 7:
            return Died(worker, "its node is gone", node_lost=True)
        return Done(worker, work.faults)

    bench = Bench(FakeFleet(answer))
    bench.put(1)
    assert bench.run() == [0]
    assert bench.log.retries == [("cpu", "node lost")] * 7


def test_a_straggler_is_told_of_then_ended_and_run_again() -> None:
    fleet = FakeFleet(lambda worker, work: None if work.subject == 5 and not work.faults else Done(worker, "done"))
    bench = Bench(fleet, timeout=100.0)
    bench.put(6)
    assert len(bench.run()) == 5
    hanging = fleet.submitted[-1][0]
    bench.now = 40.0
    bench.run(3)
    assert [note for note in bench.log.notes if note.startswith("straggler")] == [
        f"straggler: work 5 has run for 40 s on {NODES[hanging % 2]}, the median is 0.0 s; it is ended after 100 s"
    ]
    bench.now = 100.0
    assert bench.run() == ["done"]
    assert hanging in fleet.stopped
    assert bench.log.retries == [("cpu", "timed out")]


def test_work_that_always_hangs_fails_the_run() -> None:
    bench = Bench(FakeFleet(lambda worker, work: None), timeout=10.0, avoiding_seconds=0.0)
    bench.put(1)
    message = r"work 0 was ended 3 times \(after 10 s on \w+\), expected it to finish: raise --shard-timeout"
    with pytest.raises(StageError, match=message):  # noqa: PT012
        for _ in range(20):
            bench.now += 11.0
            bench.run(1)


def test_workers_that_cannot_start_are_an_error_and_no_endless_loop() -> None:
    class Broken(FakeFleet):
        def start(self, worker: int, pool: str) -> None:
            self.alive[worker] = "north"
            self.events.append(Died(worker, "no module named torch"))

    bench = Bench(Broken(), most=1)
    bench.put(1)
    message = r"3 workers for cpu died while they started \(no module named torch\), expected them to run"
    with pytest.raises(ClusterError, match=message):
        bench.run()


def test_waiting_for_room_is_told_and_bounded() -> None:
    fleet = FakeFleet()
    fleet.starts = False
    bench = Bench(fleet)
    bench.put(1)
    bench.run(1)
    bench.now = 31.0
    bench.run(2)
    assert bench.log.notes == ["waiting for room for a cpu worker: 1 CPU, 0 free"]
    bench.now = 901.0
    with pytest.raises(ClusterError, match=r"no worker for cpu has started within 901 s \(1 CPU, 0 free\)"):
        bench.run(1)


def test_cleared_work_is_ended_and_its_late_answer_ignored() -> None:
    fleet = FakeFleet(lambda worker, work: None)
    bench = Bench(fleet)
    bench.put(3)
    bench.run(2)
    busy = [worker for worker, _ in fleet.submitted]
    bench.dispatcher.clear()
    fleet.events.append(Done(busy[0], "late"))
    assert bench.run() == []
    assert set(busy) <= set(fleet.stopped)
    bench.dispatcher.close()
    assert fleet.alive == {}
