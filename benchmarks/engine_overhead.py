"""What an engine adds to work of a known length: stages that only sleep, against the ideal.

    python -m benchmarks.engine_overhead --engine local|ray|beam [--shards 1000] [--workers 2] [--seconds 0.2]
        [--work map|tokenize|device …] [--output FILE]

`--shards` shards, each of `--seconds` of sleep, on `--workers` workers take `shards · seconds / workers` at best.
The ratio to that is the engine's overhead: from the moment at which the first of them begins on a worker until all
results are here. What comes before is reported apart: `start_up_seconds` is from nothing to the results of as many
short items as there are workers, `first_start_seconds` from handing the shards over to the first one's beginning. With
workers that stay (local, Ray) that is next to nothing; Beam starts its workers anew for every pipeline. Both are
clocked by the machine's monotonic clock, which its processes share.

- `map`: `Engine.map`, as the scan and the segments of the vector index use it.
- `tokenize`: `Engine.run` with a tokenize stage that sleeps and no device stage.
- `device`: `Engine.run` with a device stage that sleeps, on as many device workers. The local engine has but one, its
  own process, and its ideal follows from that.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measurement import add_output, finish, load, say
from refrag.pipelines.engines import Engine
from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.receipts import Receipt
from refrag.pipelines.stages import Stages, TokenizedShard
from refrag_core.storage import FileRecord, FolderStore, Store

ENGINES = ("local", "ray", "beam")
WORK = ("map", "tokenize", "device")


def opened(name: str, workers: int) -> AbstractContextManager[Engine]:
    """An engine by its name, with `workers` workers for each kind of work, on this machine."""
    if name == "ray":
        from refrag.pipelines.engines.ray import RayEngine, RayOptions

        # Sleeping takes no CPU: both pools get their workers, whatever cores this machine has.
        options = RayOptions(workers=workers, device_workers=(workers, workers), local_cpus=2 * workers)
        return RayEngine(options)
    if name == "beam":
        from refrag.pipelines.engines.beam import BeamEngine

        return BeamEngine(workers=workers)
    from refrag.pipelines.engines.local import LocalEngine

    return LocalEngine(workers)


def sleep(seconds: float, item: int) -> tuple[int, float]:
    """One item of work, a picklable function: the item, and when it began."""
    began = time.monotonic()
    time.sleep(seconds)
    return item, began


@dataclass(frozen=True, slots=True)
class SleepingTokenize:
    """A tokenize stage that reads and writes nothing."""

    seconds: float
    fingerprint: str = "sleep"

    def __call__(self, store: Store, spec: ShardSpec) -> Receipt:  # noqa: ARG002
        """Sleep, and claim one passage."""
        began = time.monotonic()
        time.sleep(self.seconds)
        rows = {"documents": 1, "passages": 1, "chunks": 1, "tokens": 1}
        facts = {"chunk_size": spec.chunk_size, "first_document": "a", "last_document": "a", "began": began}
        return Receipt("tokenize", spec.name, spec.name, {}, rows, self.seconds, facts=facts)


@dataclass(frozen=True, slots=True)
class SleepingDevice:
    """A device stage that reads and writes nothing."""

    seconds: float
    device: str = "cpu"
    table: str = "embeddings"
    fingerprint: str = "sleep"

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:  # noqa: ARG002
        """Sleep, and claim one table."""
        time.sleep(self.seconds)
        files = {self.table: FileRecord(f"shards/{shard.name}", 0, "")}
        return Receipt(self.table, shard.name, shard.name, files, {self.table: 1}, self.seconds)


def specs(count: int, prefix: str = "shard") -> Iterator[ShardSpec]:
    """Shards by name alone."""
    return (ShardSpec(f"{prefix}-{number}", "", 16, 1, 1) for number in range(count))


def run_map(engine: Engine, store: Store, count: int, seconds: float) -> list[float]:  # noqa: ARG001
    """`count` items through `Engine.map`; when each began."""
    return [began for _, began in engine.map(partial(sleep, seconds), range(count))]


def run_tokenize(engine: Engine, store: Store, count: int, seconds: float) -> list[float]:
    """`count` shards whose tokenize stage sleeps; when each began."""
    return _run(engine, store, Stages(SleepingTokenize(seconds), ()), count)  # type: ignore[arg-type]


def run_device(engine: Engine, store: Store, count: int, seconds: float) -> list[float]:
    """`count` shards whose device stage sleeps; when each began."""
    stages: Any = Stages(SleepingTokenize(0.0), (SleepingDevice(seconds),))  # type: ignore[arg-type]
    return _run(engine, store, stages, count)


def _run(engine: Engine, store: Store, stages: Stages, count: int) -> list[float]:
    began = {result.spec.name: result.receipts[0].facts["began"] for result in engine.run(store, stages, specs(count))}
    return list(began.values())


RUNS: dict[str, Callable[[Engine, Store, int, float], list[float]]] = {
    "map": run_map,
    "tokenize": run_tokenize,
    "device": run_device,
}


def measure(name: str, work: str, *, shards: int, workers: int, seconds: float) -> dict[str, Any]:
    """Start an engine, warm its workers, and time `shards` shards of one kind of work."""
    run = RUNS[work]
    with tempfile.TemporaryDirectory(prefix="refrag-overhead-") as folder:
        store = FolderStore(Path(folder))
        started = time.monotonic()
        with opened(name, workers) as engine:
            run(engine, store, workers, 0.05)
            warm = time.monotonic()
            began = run(engine, store, shards, seconds)
            ended = time.monotonic()
    assert len(began) == shards, f"{len(began)} of {shards} shards came back"
    at_once = 1 if (name, work) == ("local", "device") else workers
    ideal, first = shards * seconds / at_once, min(began)
    return {
        "start_up_seconds": round(warm - started, 3),
        "first_start_seconds": round(first - warm, 3),
        "seconds": round(ended - first, 3),
        "ideal_seconds": round(ideal, 3),
        "ratio": round((ended - first) / ideal, 4),
        "workers": at_once,
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--work", choices=WORK, nargs="+", default=list(WORK))
    add_output(parser)
    options = parser.parse_args(arguments)
    found = {}
    for work in options.work:
        say(f"{options.engine}, {work}: {options.shards} shards of {options.seconds} s, {options.workers} workers")
        found[work] = measure(
            options.engine, work, shards=options.shards, workers=options.workers, seconds=options.seconds
        )
        say(f"{options.engine}, {work}: {found[work]['ratio']:.3f}x the ideal, load {load()}")
    given = {name: value for name, value in vars(options).items() if name != "output"}
    finish("engine_overhead", given, {"work": found}, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
