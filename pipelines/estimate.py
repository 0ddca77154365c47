"""`refrag index plan`: what a build would do, make and take, before it does anything."""

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from refrag.pipelines.build import BuildOptions, differences, plan_options
from refrag.pipelines.cluster_plan import ClusterOptions, ClusterPlan, Work, plan_cluster
from refrag.pipelines.components import Models, resolve_models
from refrag.pipelines.engines import Engine
from refrag.pipelines.id_ranges import make_plan
from refrag.pipelines.indexing import GATE_QUERIES, middle_sentence
from refrag.pipelines.measured_rates import gpu_rates, index_cost
from refrag.pipelines.plan import Plan, Row, cut_shards, read_specified
from refrag.pipelines.scan import scan_corpus
from refrag.pipelines.stages import run_device_stages
from refrag_core import lance_tables
from refrag_core.corpus.readers import read_documents
from refrag_core.devices import available_cores
from refrag_core.lance_tables import LiveRows
from refrag_core.manifest import Shard, latest_manifest
from refrag_core.storage import FolderStore, Store, open_store
from refrag_core.work_folder import WorkFolder

SAMPLE_BYTES = 96 << 10
"""Text that the stages are timed on."""

_SMALL_SAMPLE = 4
"""A sample of so many times less text tells what a shard costs by itself."""

_TIMED_QUERIES = 32
_DEVICE_STEPS = frozenset({"embeddings", "vectors", "scores"})


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
    """Estimated seconds of work by step on this machine; tokenizing overlaps with the device's stages. `scan` and
    `plan` are what they took now."""
    total_seconds: float
    """Of a whole local build, loading its models included."""
    device: str
    cluster: ClusterPlan | None = None
    """What it would take on the cluster that was asked about."""
    sample_documents: int
    differences: tuple[str, ...]
    """Why the build would need --rebuild."""


def estimate_build(
    options: BuildOptions, engine: Engine, *, workers: int = 1, cluster: ClusterOptions | None = None
) -> PlanReport:
    """Scan the corpus, join it with the index, and time the stages on a sample. Writes nothing to the index.

    Args:
        workers: tokenizing processes of the local build that is planned.
        cluster: a cluster to plan for as well.

    Raises ConfigError for a GPU without measured rates.
    """
    if cluster is not None and cluster.gpu is not None:
        gpu_rates(cluster.gpu)  # before the work, not after it
    with tempfile.TemporaryDirectory(prefix="refrag-plan-") as temporary:
        work = Path(temporary)
        models = resolve_models(FolderStore(work / "store"), options.models)
        store = open_store(options.output)
        latest = latest_manifest(store)
        changes = tuple(differences(latest, models)) if latest else ()
        clock = _Clock()
        with clock.timing("scan"):
            scan = scan_corpus(
                options.corpus,
                WorkFolder(str(work / "scan")),
                chunk_sizes=models.chunk_sizes,
                default_chunk_size=models.parameters.chunk_size,
                map_units=engine.map,
                on_unit=lambda receipt: clock.add("scan work", receipt.seconds),
            )
        with clock.timing("plan"):
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
        sample = _measure_sample(plan, models, work, clock, score=options.score, with_lance=with_lance)
        report = _report(plan, sample, models, clock, workers, scan.documents_in, rejected, changes)
        if cluster is None:
            return report
        return replace(report, cluster=plan_cluster(cluster, _work_of(report, clock), models))


class _Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that somebody else has measured."""
        self.seconds[name] += seconds

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the seconds of the block."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Sample:
    documents: int
    shards: int
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


def _measure_sample(
    plan: Plan, models: Models, work: Path, clock: _Clock, *, score: bool, with_lance: bool
) -> _Sample | None:
    """Run the real stages over samples in temporary folders; the seconds are those of all that is to be built.

    A first round over the small sample loads the models and warms them up: it counts only as loading. What a shard
    takes by itself, however little is in it, shows in the difference between the small sample and the large one.
    """
    if not plan.shards:
        return None
    run = partial(_run_sample, models=models, work=work, score=score, with_lance=with_lance)
    small, large = (_sample_rows(plan, size) for size in (SAMPLE_BYTES // _SMALL_SAMPLE, SAMPLE_BYTES))
    with clock.timing("load"):
        run(small, "warm-up")
    fast, slow = run(small, "small"), run(large, "large")
    clock.seconds["load"] = max(0.0, clock.seconds["load"] - sum(fast.seconds.values()))
    clock.add("queries", _query_seconds(models, large))
    shards, text_bytes = len(plan.shards), sum(spec.num_bytes for spec in plan.shards)
    return replace(
        slow, seconds={stage: _extrapolated(stage, fast, slow, shards, text_bytes) for stage in slow.seconds}
    )


def _extrapolated(stage: str, small: _Sample, large: _Sample, shards: int, text_bytes: int) -> float:
    """Seconds of a stage over all shards: so much a shard, so much a byte, as two samples of one shard each show."""
    if large.text_bytes >= text_bytes and shards <= large.shards:
        return large.seconds[stage]  # all there is was run
    more_bytes = large.text_bytes - small.text_bytes
    a_byte = large.seconds[stage] / max(1, large.text_bytes)
    if more_bytes > 0:  # two short runs are noisy: at least half of what was seen counts as the text's
        slope = (large.seconds[stage] - small.seconds.get(stage, 0.0)) / more_bytes
        a_byte = min(a_byte, max(a_byte / 2, slope))
    a_shard = (large.seconds[stage] - a_byte * large.text_bytes) / max(1, large.shards)
    return a_shard * shards + a_byte * text_bytes


def _query_seconds(models: Models, rows: list[Row]) -> float:
    """Seconds that embedding the recall gate's queries takes, from some sentences of the sample."""
    texts = (document.text for document in read_documents(rows[:_TIMED_QUERIES]))
    sentences = [sentence for text in texts if (sentence := middle_sentence(text))]
    retriever = models.embed_stage().load()
    started = time.perf_counter()
    retriever.embed_queries(sentences or ["?"])
    return (time.perf_counter() - started) / max(1, len(sentences)) * GATE_QUERIES


def _run_sample(rows: list[Row], name: str, *, models: Models, work: Path, score: bool, with_lance: bool) -> _Sample:
    # A store of its own: what another round made would be taken over.
    store, stages = FolderStore(work / f"store-{name}"), models.stages(score=score)
    clock = _Clock()
    totals: dict[str, int] = {"documents": 0, "passages": 0, "chunks": 0, "tokens": 0, "disk": 0}
    specs = list(cut_shards(rows, WorkFolder(str(work / name)), 1 << 62))
    for spec in specs:
        with clock.timing("tokenize"):
            tokenized = stages.tokenize(store, spec)
        result = run_device_stages(store, stages.device, spec, tokenized)
        for receipt in result.receipts[1:]:
            clock.add(receipt.stage, receipt.seconds)
        for key, value in tokenized.rows.items():
            totals[key] += value
        totals["disk"] += sum(record.bytes for receipt in result.receipts for record in receipt.files.values())
        if with_lance and result.shard is not None:
            with clock.timing("lance"):
                totals["disk"] += _lance_bytes(store, models, result.shard)
    return _Sample(
        documents=len(rows),
        shards=len(specs),
        text_bytes=sum(int(row["num_bytes"]) for row in rows),
        tokens=totals["tokens"],
        passages=totals["passages"],
        chunks=totals["chunks"],
        disk_bytes=totals["disk"],
        seconds=clock.seconds,
    )


def _lance_bytes(store: Store, models: Models, shard: Shard) -> int:
    """Bytes that a shard's rows take as LanceDB tables; their versions' own files, which do not grow, left out."""
    _, names = lance_tables.write_tables(store, LiveRows([shard], models.parameters, {}), shard.name, None)
    return sum(store.path(name).stat().st_size for name in names if "/data/" in name)


def _report(
    plan: Plan,
    sample: _Sample | None,
    models: Models,
    clock: _Clock,
    workers: int,
    documents_in: int,
    rejected: Mapping[str, int],
    changes: tuple[str, ...],
) -> PlanReport:
    text_bytes = sum(spec.num_bytes for spec in plan.shards)
    scale = text_bytes / sample.text_bytes if sample and sample.text_bytes else 0.0
    measured = asdict(sample) if sample else {}

    def scaled(name: str) -> int:
        return round(int(measured.get(name, 0)) * scale)

    seconds = _step_seconds(sample, clock, scaled("passages"), models.parameters.vector_dim)
    return PlanReport(
        documents_in=documents_in,
        new=plan.new,
        changed=plan.changed,
        unchanged=plan.unchanged,
        deleted=plan.deleted,
        missing=plan.missing,
        rejected=dict(sorted(rejected.items())),
        shards=len(plan.shards),
        text_bytes=text_bytes,
        tokens=scaled("tokens"),
        passages=scaled("passages"),
        chunks=scaled("chunks"),
        disk_bytes=scaled("disk_bytes"),
        seconds={step: round(value, 2) for step, value in seconds.items()},
        total_seconds=round(_total_seconds(seconds, models.device, workers), 2),
        device=models.device,
        sample_documents=sample.documents if sample else 0,
        differences=changes,
    )


def _step_seconds(sample: _Sample | None, clock: _Clock, passages: int, vector_dim: int) -> dict[str, float]:
    steps = {name: clock.seconds[name] for name in ("scan", "plan")}
    if sample is None:
        return steps
    cost = index_cost(passages, vector_dim)
    index = clock.seconds["queries"] + (cost.train + cost.segments) / available_cores()
    return steps | {"load": clock.seconds["load"]} | dict(sample.seconds) | {"index": index}


def _total_seconds(seconds: Mapping[str, float], device: str, workers: int) -> float:
    """Of a local build: tokenizing runs beside the device's stages, but on a CPU it takes its cores from them."""
    beside = seconds.get("tokenize", 0.0)
    alone = sum(value for step, value in seconds.items() if step in _DEVICE_STEPS)
    rest = sum(value for step, value in seconds.items() if step != "tokenize" and step not in _DEVICE_STEPS)
    shared = beside / available_cores() if device == "cpu" else 0.0
    return rest + max(beside / max(1, workers), alone + shared)


def _work_of(report: PlanReport, clock: _Clock) -> Work:
    scan = clock.seconds["scan work"]
    return Work(
        documents=report.documents_in,
        shards=report.shards,
        text_bytes=report.text_bytes,
        chunks=report.chunks,
        passages=report.passages,
        disk_bytes=report.disk_bytes,
        core_seconds={**report.seconds, "scan": scan},
        device=report.device,
        device_cores=available_cores() if report.device == "cpu" else 1,
    )
