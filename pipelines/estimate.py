"""`refrag index plan`: what a build would do, make and take, before it does anything."""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from refrag.pipelines.build import BuildOptions, differences, plan_options
from refrag.pipelines.components import Models, resolve_models
from refrag.pipelines.engines import Engine
from refrag.pipelines.id_ranges import make_plan
from refrag.pipelines.plan import Plan, Row, cut_shards, read_specified
from refrag.pipelines.scan import scan_corpus
from refrag.pipelines.stages import run_device_stages
from refrag_core import lance_tables
from refrag_core.lance_tables import LiveRows
from refrag_core.manifest import Shard, latest_manifest
from refrag_core.storage import FolderStore, Store, open_store
from refrag_core.work_folder import WorkFolder

SAMPLE_BYTES = 96 << 10
_WARM_UP_BYTES = 4 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """The dry run's answer; counts of documents are exact, the rest is scaled up from a sample."""

    documents_in: int
    new: int
    changed: int
    unchanged: int
    deleted: int
    missing: int
    rejected: Mapping[str, int]
    shards: int
    text_bytes: int
    """UTF-8 bytes of the documents to encode."""
    tokens: int
    passages: int
    chunks: int
    disk_bytes: int
    seconds: Mapping[str, float]
    """Estimated seconds of work by stage on this machine; tokenizing overlaps with the rest."""
    total_seconds: float
    device: str
    sample_documents: int
    differences: tuple[str, ...]
    """Why the build would need --rebuild."""


def estimate_build(options: BuildOptions, engine: Engine) -> PlanReport:
    """Scan the corpus, join it with the index, and time the stages on a sample. Writes nothing to the index."""
    with tempfile.TemporaryDirectory(prefix="refrag-plan-") as temporary:
        work = Path(temporary)
        models = resolve_models(FolderStore(work / "store"), options.models)
        store = open_store(options.output)
        latest = latest_manifest(store)
        changes = tuple(differences(latest, models)) if latest else ()
        scan = scan_corpus(
            options.corpus,
            WorkFolder(str(work / "scan")),
            chunk_sizes=models.chunk_sizes,
            default_chunk_size=models.parameters.chunk_size,
            map_units=engine.map,
        )
        plan = make_plan(
            scan.runs,
            store=store,
            parent=None if changes else latest,
            options=replace(plan_options(options, scan.text_bytes, anew=False), keep_duplicates=False),
            work=WorkFolder(str(work / "plan")),
            map_ranges=engine.map,
        )
        rejected = Counter(scan.reasons) + plan.reasons
        with_lance = lance_tables.is_wanted(options.tables, latest)
        sample = _measure_sample(plan, models, work, score=options.score, with_lance=with_lance)
        return _report(plan, sample, models, scan.documents_in, dict(sorted(rejected.items())), changes)


@dataclass(frozen=True, slots=True)
class _Sample:
    documents: int
    text_bytes: int
    tokens: int
    passages: int
    chunks: int
    disk_bytes: int
    seconds: Mapping[str, float]


def _sample_rows(plan: Plan, size: int) -> list[Row]:
    """Documents of up to `size` text bytes, spread evenly over the shards, ordered by id."""
    rows: list[Row] = []
    for spec in plan.shards[:: max(1, len(plan.shards) // 8)]:
        share, taken = size // min(8, len(plan.shards)), 0
        documents = read_specified(spec)
        for row in documents[:: max(1, len(documents) // 64)]:
            if taken and taken + row["num_bytes"] > share:
                break
            taken += row["num_bytes"]
            rows.append(row)
    return sorted(rows, key=lambda row: str(row["document_id"]).encode())


def _measure_sample(plan: Plan, models: Models, work: Path, *, score: bool, with_lance: bool) -> _Sample | None:
    """Run the real stages over a sample in a temporary folder; a small first round loads the models."""
    if not plan.shards:
        return None
    _run_sample(_sample_rows(plan, _WARM_UP_BYTES), models, work, "warm-up", score=score, with_lance=with_lance)
    return _run_sample(_sample_rows(plan, SAMPLE_BYTES), models, work, "sample", score=score, with_lance=with_lance)


def _run_sample(rows: list[Row], models: Models, work: Path, name: str, *, score: bool, with_lance: bool) -> _Sample:
    store, stages = FolderStore(work / "store"), models.stages(score=score)
    seconds: dict[str, float] = {}
    totals: dict[str, int] = {"documents": 0, "passages": 0, "chunks": 0, "tokens": 0, "disk": 0}
    for spec in cut_shards(rows, WorkFolder(str(work / name)), 1 << 62):
        started = time.perf_counter()
        tokenized = stages.tokenize(store, spec)
        seconds["tokenize"] = seconds.get("tokenize", 0.0) + time.perf_counter() - started
        result = run_device_stages(store, stages.device, spec, tokenized)
        for receipt in result.receipts[1:]:
            seconds[receipt.stage] = seconds.get(receipt.stage, 0.0) + receipt.seconds
        for key, value in tokenized.rows.items():
            totals[key] += value
        totals["disk"] += sum(record.bytes for receipt in result.receipts for record in receipt.files.values())
        if with_lance and result.shard is not None:
            started = time.perf_counter()
            totals["disk"] += _lance_bytes(store, models, result.shard)
            seconds["lance"] = seconds.get("lance", 0.0) + time.perf_counter() - started
    return _Sample(
        documents=len(rows),
        text_bytes=sum(int(row["num_bytes"]) for row in rows),
        tokens=totals["tokens"],
        passages=totals["passages"],
        chunks=totals["chunks"],
        disk_bytes=totals["disk"],
        seconds=seconds,
    )


def _lance_bytes(store: Store, models: Models, shard: Shard) -> int:
    """Bytes that a shard's rows take as LanceDB tables; their versions' own files, which do not grow, left out."""
    _, names = lance_tables.write_tables(store, LiveRows([shard], models.parameters, {}), shard.name, None)
    return sum(store.path(name).stat().st_size for name in names if "/data/" in name)


def _report(
    plan: Plan,
    sample: _Sample | None,
    models: Models,
    documents_in: int,
    rejected: Mapping[str, int],
    changes: tuple[str, ...],
) -> PlanReport:
    text_bytes = sum(spec.num_bytes for spec in plan.shards)
    scale = text_bytes / sample.text_bytes if sample and sample.text_bytes else 0.0
    measured = asdict(sample) if sample else {}
    seconds = {stage: round(value * scale, 2) for stage, value in measured.get("seconds", {}).items()}
    device_seconds = sum(value for stage, value in seconds.items() if stage != "tokenize")

    def scaled(name: str) -> int:
        return round(int(measured.get(name, 0)) * scale)

    return PlanReport(
        documents_in=documents_in,
        new=plan.new,
        changed=plan.changed,
        unchanged=plan.unchanged,
        deleted=plan.deleted,
        missing=plan.missing,
        rejected=rejected,
        shards=len(plan.shards),
        text_bytes=text_bytes,
        tokens=scaled("tokens"),
        passages=scaled("passages"),
        chunks=scaled("chunks"),
        disk_bytes=scaled("disk_bytes"),
        seconds=seconds,
        total_seconds=round(max(device_seconds, seconds.get("tokenize", 0.0)), 2),
        device=models.device,
        sample_documents=sample.documents if sample else 0,
        differences=changes,
    )
