"""Builds on a Ray cluster under injected faults, each against the same build left in peace.

Each fault is a function of a `Scene` (a cluster of three nodes, a corpus, the ids that a calm local build gives) that
ends in a finished build. `tests/faults/test_ray_faults.py` runs them one by one, `benchmarks/engine_faults.py` all.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from refrag.pipelines.build import BuildReport, build_index
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.engines.ray import RayEngine, RayOptions
from refrag_core.errors import StageError
from refrag_core.inspection import inspect_quarantine
from tests import command_line, tiny_models
from tests.faults.kill_builds import build_arguments, ids_of, problems_of
from tests.ray_cluster import RayCluster, ray_cluster, wait_for, wait_until_gone, worker_processes
from tests.sabotage import POISON, Change, LoseNode, RefusePoison, RefuseToken, Sabotage, Sabotaged, faulty
from tests.small_index import SmallIndex, documents

FOX = "🦊"
SHARD_BYTES = 12_000
RECORDS = documents(200, sentences=6)


@dataclass(slots=True)
class Scene:
    """Where a fault is played."""

    root: Path
    cluster: RayCluster
    notes: list[str] = field(default_factory=list)
    """What the engine told of the last build."""
    calm: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Ids of the local engine's builds, by the number of records."""

    def start(self, step: str, total: int | None, unit: str) -> None:
        """See Progress: nothing is kept."""

    def advance(self, amount: int) -> None:
        """See Progress: nothing is kept."""

    def finish(self) -> None:
        """See Progress: nothing is kept."""

    def note(self, message: str) -> None:
        """See Progress."""
        self.notes.append(message)

    def index(self, name: str, records: list[dict[str, object]] = RECORDS) -> SmallIndex:
        """An index of its own, without anything in it."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return SmallIndex(folder, records, shard_bytes=SHARD_BYTES)

    def sabotage(self, stage: str, fault: str, times: int = 1) -> Change:
        """A fault that strikes so often."""
        folder = self.root / f"struck-{stage}-{fault}-{times}"
        shutil.rmtree(folder, ignore_errors=True)
        return faulty(Sabotage(str(folder), stage, fault, times))  # type: ignore[arg-type]

    def build(self, index: SmallIndex, change: Change, *, copies: int = 1, timeout: float = 600.0) -> BuildReport:
        """Build on the cluster with changed stages."""
        self.notes.clear()
        with RayEngine(
            RayOptions(address=self.cluster.address, workers=2, device_workers=(2, 2), shard_timeout=timeout), self
        ) as engine:
            return build_index(index.options, Sabotaged(engine, change, copies), self)


@dataclass(frozen=True, slots=True)
class Ending:
    """What a build under a fault came to."""

    ids: tuple[str, str]
    expected: tuple[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def unharmed(self) -> bool:
        """Whether it is the calm build, byte for byte."""
        return self.ids == self.expected and not self.problems


@contextlib.contextmanager
def scene(root: Path) -> Iterator[Scene]:
    """Three nodes of two CPUs."""
    with ray_cluster(2, 2, 2) as cluster:
        yield Scene(root, cluster)


def calm(at: Scene, records: list[dict[str, object]] = RECORDS) -> tuple[str, str]:
    """Ids of the local engine's build."""
    if len(records) not in at.calm:
        report = at.index("calm", records).build(workers=1)
        at.calm[len(records)] = report.content_id, report.build_id
    return at.calm[len(records)]


def _ending(at: Scene, index: SmallIndex, expected: tuple[str, str]) -> Ending:
    return Ending(ids_of(index.path), expected, tuple(problems_of(index.path)), tuple(at.notes))


def _struck(at: Scene, stage: str, fault: str, timeout: float = 600.0) -> Ending:
    index = at.index(f"{stage}-{fault}")
    at.build(index, at.sabotage(stage, fault), timeout=timeout)
    assert any("is run again" in note for note in at.notes), "the fault did not strike"
    return _ending(at, index, calm(at))


def encode_actor_killed(at: Scene) -> Ending:
    """SIGKILL of an actor at work on the device stages."""
    return _struck(at, "device", "kill")


def worker_process_killed(at: Scene) -> Ending:
    """SIGKILL of a worker at work on the tokenize stage."""
    return _struck(at, "tokenize", "kill")


def unexpected_error(at: Scene) -> Ending:
    """A stage that raises what nobody expects, once."""
    return _struck(at, "device", "error")


def batch_out_of_memory(at: Scene) -> Ending:
    """A stage that asks for more memory than there is, once."""
    return _struck(at, "device", "memory")


def stage_hangs(at: Scene) -> Ending:
    """A stage that never ends, once; the time limit leaves room for loading models on a busy machine."""
    return _struck(at, "device", "hang", timeout=60.0)


def shard_executed_twice(at: Scene) -> Ending:
    """Three executions of every shard at once."""
    index = at.index("copies")
    at.build(index, lambda stages: stages, copies=3)
    return _ending(at, index, calm(at))


def node_lost(at: Scene) -> Ending:
    """A node goes with its actors, one of them at work."""
    import ray

    index, folder = at.index("node"), at.root / "node-lost"
    shutil.rmtree(folder, ignore_errors=True)
    head = at.cluster.cluster.head_node.node_id

    def take_away() -> None:
        struck = folder / "node"
        wait_for(lambda: struck.exists() and struck.read_text(), 300)
        lost = next(node for node in at.cluster.nodes if node.node_id == struck.read_text())
        at.cluster.remove_node(lost)

    thief = threading.Thread(target=take_away)
    thief.start()
    at.build(index, faulty(LoseNode(str(folder), head)))
    thief.join()
    assert not ray.is_initialized()
    assert any("is run again: node lost" in note for note in at.notes), at.notes
    at.cluster.add_node()
    return _ending(at, index, calm(at))


def always_out_of_memory(at: Scene) -> Ending:
    """A stage that always asks for too much: one clear error, and the next run goes on."""
    index = at.index("memory")
    with pytest.raises(StageError, match=r"out of memory\?") as raised:
        at.build(index, at.sabotage("device", "memory", 99))
    notes = (*at.notes, str(raised.value))
    at.build(index, lambda stages: stages)
    return replace(_ending(at, index, calm(at)), notes=notes)


def _poisoned(at: Scene, name: str, poison: dict[str, object], rest: list[dict[str, object]], change: Change) -> Ending:
    index = at.index(name, [*rest[: len(rest) // 2], poison, *rest[len(rest) // 2 :]])
    report = at.build(index, change)
    expected = calm(at, rest)[0]
    listed = [entry["document_id"] for entry in inspect_quarantine(index.path)]
    assert (report.quarantined, listed) == (1, [poison["id"]]), listed
    # The build id differs, as it names the quarantine's file; the content id must not. The tables of a shard from
    # which a device stage has rejected a document stay behind unused, on every engine.
    problems = tuple(found for found in problems_of(index.path) if "not part of any generation" not in found)
    return Ending((report.content_id, ""), (expected, ""), problems, tuple(at.notes))


def one_record_on_the_local_engine(
    root: Path, records: list[dict[str, object]], workers: int, shard_bytes: int = SHARD_BYTES
) -> Ending:
    """The local engine's tokenize stage raises on the record in the middle, always."""
    started = time.monotonic()
    poison = records[len(records) // 2]
    rest = [record for record in records if record is not poison]
    calm = SmallIndex(root / "calm", rest, shard_bytes=shard_bytes).build(workers)
    index = SmallIndex(root / "poisoned", records, shard_bytes=shard_bytes)
    with LocalEngine(workers) as engine:
        refusal = faulty(RefusePoison(poison=str(poison["text"])))
        report = build_index(index.options, Sabotaged(engine, refusal))
    listed = [entry["document_id"] for entry in inspect_quarantine(index.path)]
    assert (report.quarantined, listed) == (1, [poison["id"]]), listed
    counts = f"{report.documents_in} documents in, {report.indexed} indexed, {report.quarantined} quarantined"
    seconds = round(time.monotonic() - started, 1)
    ids, expected = (report.content_id, ""), (calm.content_id, "")
    return Ending(ids, expected, tuple(problems_of(index.path)), (counts,), seconds)


def one_record_in_ten_thousand(at: Scene) -> Ending:
    """The tokenize stage raises on one record, always."""
    poison: dict[str, object] = {"id": "doc-poison", "text": f"A {POISON} record."}
    return _poisoned(at, "record", poison, documents(9_999, sentences=1), faulty(RefusePoison()))


def one_record_in_the_encoder(at: Scene) -> Ending:
    """The encode stage raises on one record, always: its shard is cut anew without it."""
    poison: dict[str, object] = {"id": "doc-poison", "text": f"A {FOX} record."}
    tokenizer = tiny_models.decoder_tokenizer()
    others = {token for record in RECORDS for token in tokenizer.encode(str(record["text"])).ids}
    token = next(token for token in tokenizer.encode(str(poison["text"])).ids if token not in others)
    return _poisoned(at, "encoder", poison, RECORDS, faulty(RefuseToken(token)))


def _embedded(index: Path) -> int:
    return len(list((index / "work" / "receipts").glob("embeddings-*.json")))


def _killed_driver(at: Scene, name: str, *address: str) -> Ending:
    """SIGKILL of the driver in the middle, then the same command again; with `address`, on this process's cluster."""
    index = at.index(name)
    own = build_arguments(index.root, index.path, shard_bytes=SHARD_BYTES)
    arguments = [*own, "--engine", "ray", "--device-workers", "1", *address]
    driver = command_line.start(*arguments)
    command_line.wait_until(lambda: _embedded(index.path) >= 2, driver)
    workers = worker_processes(os.getpid() if address else driver.pid)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    alive = wait_until_gone(workers, 120)
    assert workers, "there were no actors"
    assert not alive, f"actors outlived their driver: {alive}"
    done = command_line.run(*arguments)
    assert done.code == 0, done.err
    assert done.json["encoded_chunks"] < done.json["chunks"], "nothing was taken over"
    return _ending(at, index, calm(at))


def driver_killed_by_address(at: Scene) -> Ending:
    """The driver of a build on a cluster dies."""
    return _killed_driver(at, "driver", "--ray-address", at.cluster.address)


def driver_killed_with_its_own_ray(at: Scene) -> Ending:
    """The driver dies that had started Ray itself: that Ray goes with it."""
    return _killed_driver(at, "own")


FAULTS: dict[str, Callable[[Scene], Ending]] = {
    function.__name__: function
    for function in (
        encode_actor_killed,
        worker_process_killed,
        node_lost,
        driver_killed_by_address,
        driver_killed_with_its_own_ray,
        one_record_in_the_encoder,
        one_record_in_ten_thousand,
        unexpected_error,
        stage_hangs,
        batch_out_of_memory,
        always_out_of_memory,
        shard_executed_twice,
    )
}


def play(at: Scene, name: str) -> Ending:
    """One fault, timed; the calm build that it is compared with is part of the first one's time."""
    started = time.monotonic()
    at.notes.clear()
    os.environ.pop("RAY_ADDRESS", None)
    ending = FAULTS[name](at)
    return replace(ending, seconds=round(time.monotonic() - started, 1))
