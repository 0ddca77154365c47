"""Peak memory and time of planning a corpus of millions of records, on the driver and in its workers.

    python -m benchmarks.plan_memory --records 3000000 [--workers 2] [--one-pass] [--output FILE]

Synthetic sorted runs stand for the scan (ids in random order, a tenth of them twice), so that nothing but the plan
is measured: merging, duplicates, the join with no parent, cutting shards. `--one-pass` plans all of it as one range in
this process, as a plan without ranges does.
"""

import argparse
import random
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measurement import add_output, finish, say
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.id_ranges import RANGE_ROWS, PlanOptions, make_plan
from refrag.pipelines.plan import default_shard_bytes
from refrag.pipelines.scan import RUN_ROWS, SortedRun, write_run
from refrag_core.storage import FolderStore
from refrag_core.work_folder import WorkFolder

TEXT_BYTES = 2000


def _row(number: int, order: int) -> dict[str, Any]:
    scattered = number * 2654435761 % (1 << 32)
    return {
        "document_id": f"document/{scattered:010x}/{number}",
        "source_digest": number.to_bytes(32, "big"),
        "chunk_size": 16,
        "num_bytes": TEXT_BYTES,
        "order": order,
        "source": f"part-{order >> 16:05d}.jsonl",
        "path": f"s3://bucket/corpus/part-{order >> 16:05d}.jsonl",
        "format": "jsonl",
        "offset": order * TEXT_BYTES,
        "length": TEXT_BYTES,
    }


def _write_run(start: int, *, work: WorkFolder, records: int) -> SortedRun:
    generator, orders = random.Random(start), range(start, min(records, start + RUN_ROWS))
    rows = [_row(generator.randrange(max(1, o)) if o % 10 == 9 else o, o) for o in orders]
    rows.sort(key=lambda row: (row["document_id"], row["order"]))
    return write_run(rows, work, f"unit-{start:010d}")


def write_runs(engine: LocalEngine, work: WorkFolder, records: int) -> list[SortedRun]:
    """Sorted runs as a scan writes them."""
    work.make()
    write = partial(_write_run, work=work, records=records)
    return list(engine.map(write, range(0, records, RUN_ROWS)))


def _peak_mib(who: int) -> float:
    return round(resource.getrusage(who).ru_maxrss / 1024, 1)


def measure(records: int, workers: int, *, one_pass: bool) -> dict[str, Any]:
    """Plan, and what it took."""
    with tempfile.TemporaryDirectory(prefix="refrag-plan-memory-") as folder:
        work = WorkFolder(folder)
        with LocalEngine(workers) as engine:
            runs = write_runs(engine, work.below("scan"), records)
        say(f"{len(runs)} runs written")
        options = PlanOptions(target_shard_bytes=default_shard_bytes(records * TEXT_BYTES), keep_duplicates=False)
        before, started = _peak_mib(resource.RUSAGE_SELF), time.perf_counter()
        with LocalEngine(0 if one_pass else workers) as engine:
            plan = make_plan(
                runs,
                store=FolderStore(Path(folder, "index")),
                parent=None,
                options=options,
                work=work.below("plan"),
                map_ranges=engine.map,
                range_rows=1 << 62 if one_pass else RANGE_ROWS,
            )
        seconds = time.perf_counter() - started
    return {
        "ranges": 1 if one_pass else -(-records // RANGE_ROWS),
        "runs": len(runs),
        "documents": plan.new,
        "duplicates": plan.reasons.total(),
        "shards": len(plan.shards),
        "seconds": round(seconds, 1),
        "records_a_second": round(records / seconds),
        "driver_peak_mib_before": before,
        "driver_peak_mib": _peak_mib(resource.RUSAGE_SELF),
        "worker_peak_mib": _peak_mib(resource.RUSAGE_CHILDREN),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one-pass", action="store_true")
    add_output(parser)
    given = parser.parse_args()
    found = measure(given.records, given.workers, one_pass=given.one_pass)
    shown = {"records": given.records, "workers": given.workers, "one_pass": given.one_pass}
    finish("plan_memory", shown, found, given.output)


if __name__ == "__main__":
    main()
