"""The local engine maps in order, a little ahead, and survives its workers; its workers do not survive it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from refrag.pipelines.engines.local import LocalEngine, default_workers, run_by_turns, threads_for
from refrag_core.errors import StageError

WORKERS = 2
WAIT_SECONDS = 30.0


def slower_first(item: int) -> tuple[int, int]:
    """Later items overtake earlier ones in the workers."""
    time.sleep(0.02 * (item % 3 == 0))
    return item * item, os.getpid()


def die_once(folder: Path, item: int) -> int:
    """Killed in the middle of items 3 and 7 the first time that they are tried."""
    tries = folder / f"{item}-{len(list(folder.glob(f'{item}-*')))}"
    tries.touch()
    if item in (3, 7) and tries.name.endswith("-0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def die_always(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def fail_at_two(item: int) -> int:
    if item == 2:
        raise StageError("shard 2 cannot be read, expected it to be: look at it")
    return item


def one_and_its_pid(item: int) -> int:
    return os.getpid()


def children() -> list[psutil.Process]:
    """This process's own workers (the resource tracker of multiprocessing lives on)."""
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=WAIT_SECONDS)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_without_workers_everything_runs_here() -> None:
    with LocalEngine(0) as engine:
        assert list(engine.map(slower_first, range(4))) == [(i * i, os.getpid()) for i in range(4)]


def test_results_come_in_the_order_of_the_items() -> None:
    with LocalEngine(WORKERS) as engine:
        made = list(engine.map(slower_first, range(12)))
    assert [square for square, _ in made] == [i * i for i in range(12)]
    assert os.getpid() not in {pid for _, pid in made}
    assert children() == []


def started_with(name: str) -> str | None:
    """A variable of the environment that this process had before its first line ran."""
    return psutil.Process().environ().get(name)


@pytest.mark.parametrize("exported", [None, "2"])
def test_a_worker_multiplies_on_one_core_whatever_is_exported(
    monkeypatch: pytest.MonkeyPatch, exported: str | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if exported:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", exported)
    with LocalEngine(1) as engine:
        assert list(engine.map(started_with, ["OPENBLAS_NUM_THREADS"])) == ["1"]
    assert os.environ.get("OPENBLAS_NUM_THREADS") == exported


def test_it_looks_ahead_but_never_far() -> None:
    """A corpus of a million shards must not become a million futures."""
    pulled = consumed = furthest = 0

    def items() -> Iterator[int]:
        nonlocal pulled, furthest
        for item in range(30):
            pulled += 1
            furthest = max(furthest, pulled - consumed)
            yield item

    with LocalEngine(WORKERS) as engine:
        for _ in engine.map(slower_first, items()):
            consumed += 1
    assert (pulled, consumed) == (30, 30)
    assert WORKERS < furthest <= 2 * WORKERS + 1


def test_the_work_of_a_killed_worker_is_run_again(tmp_path: Path) -> None:
    with LocalEngine(WORKERS) as engine:
        assert list(engine.map(partial(die_once, tmp_path), range(12))) == list(range(12))
    assert {path.name for path in tmp_path.glob("[37]-*")} >= {"3-0", "3-1", "7-0", "7-1"}


def test_a_worker_killed_while_nobody_waits_for_it(tmp_path: Path) -> None:
    """The usual case: the device stages are at work here when the kernel's out-of-memory killer strikes there."""
    with LocalEngine(WORKERS) as engine:
        results = engine.map(slower_first, range(20))
        made = [next(results)]
        for _ in range(2):
            for worker in children():
                worker.kill()
            time.sleep(0.3)  # long enough for the pool to notice before more work is handed to it
            made.append(next(results))
        made += results
    assert [square for square, _ in made] == [i * i for i in range(20)]
    assert children() == []


def test_a_pool_that_died_after_one_map_serves_the_next() -> None:
    with LocalEngine(WORKERS) as engine:
        first = set(engine.map(one_and_its_pid, range(3)))
        for worker in children():
            worker.kill()
        time.sleep(0.3)
        assert first.isdisjoint(engine.map(one_and_its_pid, range(3)))


def test_work_that_always_kills_its_worker_fails_the_run() -> None:
    message = r"a worker process died 3 times on the same work \(out of memory\?\), expected it to finish: use fewer"
    with LocalEngine(WORKERS) as engine, pytest.raises(StageError, match=message):
        list(engine.map(die_always, range(6)))
    assert_gone(children())


def test_an_exception_comes_through_as_it_is_and_ends_the_workers() -> None:
    with pytest.raises(StageError) as raised, LocalEngine(WORKERS) as engine:  # noqa: PT012
        results = engine.map(fail_at_two, range(50))
        assert [next(results), next(results)] == [0, 1]
        workers = children()
        assert workers
        next(results)
    assert str(raised.value) == "shard 2 cannot be read, expected it to be: look at it"
    assert_gone(workers)


def hang_once(folder: Path, item: int) -> int:
    """Item 3 never ends the first time that it is tried."""
    tries = folder / f"{item}-{len(list(folder.glob(f'{item}-*')))}"
    tries.touch()
    if tries.name == "3-0":
        sleep_forever(item)
    return item


def hang_always(item: int) -> int:
    if item == 1:
        sleep_forever(item)
    return item


def test_work_that_hangs_is_given_to_another_worker(tmp_path: Path) -> None:

    class Patient(LocalEngine):
        """Gives new workers all the time that a busy machine needs to start them."""

        def _kill_workers(self) -> None:
            super()._kill_workers()
            self.shard_timeout = None

    with Patient(WORKERS) as engine:
        assert list(engine.map(one_and_its_pid, range(4)))  # the workers have started
        engine.shard_timeout = 2
        assert list(engine.map(partial(hang_once, tmp_path), range(8))) == list(range(8))
    assert (tmp_path / "3-1").exists()
    assert_gone(children())


def test_work_that_always_hangs_fails_the_run() -> None:
    message = r"the same work did not end within 1 s in 3 attempts, expected it to: look for a document that its"
    with LocalEngine(WORKERS, shard_timeout=1) as engine, pytest.raises(StageError, match=message):
        list(engine.map(hang_always, range(4)))
    assert_gone(children())


PARENT = """
import sys, time
from tests.pipelines.test_local_engine import sleep_forever
from refrag.pipelines.engines.local import LocalEngine
if __name__ == "__main__":
    with LocalEngine(2) as engine:
        list(engine.map(sleep_forever, range(4)))
"""


def sleep_forever(item: int) -> None:
    """Works on, as a tokenizer that nobody tells that the driver is gone."""
    while True:
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent_however_it_goes(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        workers: list[psutil.Process] = []
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            workers = [p for p in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
        parent.send_signal(number)
        parent.wait(timeout=WAIT_SECONDS)
        assert_gone(workers)
    finally:
        if parent.poll() is None:
            parent.kill()


def test_default_workers_leave_a_cpu_for_the_device_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, workers in ((1, 1), (2, 1), (8, 7), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cpus: set(range(n)))
        assert default_workers() == workers


def test_turns_keep_the_order_and_an_error_stops_them() -> None:
    begun: list[int] = []

    def slowly(number: int) -> int:
        begun.append(number)
        time.sleep(0.02 * (number % 2 == 0))
        if number == 7:
            raise ValueError("seven")
        return number * number

    assert list(run_by_turns(slowly, range(7), threads=2)) == [n * n for n in range(7)]
    with pytest.raises(ValueError, match="seven"):
        list(run_by_turns(slowly, range(20), threads=2))
    assert max(begun) < 12


@pytest.mark.parametrize(
    ("devices", "threads"), [(["cpu"], 1), (["cuda"], 3), (["cpu", "cuda:1"], 3), (["cpu", "cpu"], 1)]
)
def test_threads_of_the_device_stages(devices: list[str], threads: int) -> None:
    assert threads_for(devices) == threads
