"""The whole job on one page: scan → plan → tokenize, encode, embed, score → index → commit."""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from refrag.pipelines import assembly
from refrag.pipelines.components import ModelOptions, Models, resolve_models
from refrag.pipelines.duplicates import NO_DUPLICATES, duplicate_passages, rows_by_shard
from refrag.pipelines.engines import Engine
from refrag.pipelines.id_ranges import PlanOptions, make_plan
from refrag.pipelines.indexing import BuiltIndex, build_vector_index, live_passages
from refrag.pipelines.plan import Plan, ShardSpec, default_shard_bytes, without
from refrag.pipelines.progress import Progress, Silent
from refrag.pipelines.receipts import Receipt, Rejected
from refrag.pipelines.scan import RejectWriter, ScanResult, scan_corpus
from refrag.pipelines.stages import ShardResult, add_table
from refrag_core import lance_tables
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.devices import available_cores
from refrag_core.digests import digest_json
from refrag_core.errors import ConfigError, FingerprintMismatchError, UsageError
from refrag_core.manifest import (
    NOTHING,
    Change,
    Manifest,
    ParentInfo,
    Shard,
    commit,
    finish_commit,
    latest_manifest,
    refuse_bundle,
)
from refrag_core.parts import collected
from refrag_core.processes import process_name
from refrag_core.run_record import RunRecord, StageRecord, write_run_record
from refrag_core.storage import RUNS, IndexLocation, Store, absolute, open_store
from refrag_core.tables import TableFormat
from refrag_core.work_folder import WorkFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Everything that `refrag index build` can be told, but the engine."""

    corpus: CorpusOptions
    output: IndexLocation
    models: ModelOptions = field(default_factory=ModelOptions)
    score: bool = False
    """Add the per-chunk perplexity column."""
    tables: TableFormat | None = None
    """`lance` writes LanceDB tables beside the Parquet shards; None does what the index has, Parquet alone for a new
    one."""
    min_recall: float = 0.95
    """Recall@10 of the vector index under which nothing is published."""
    index_memory_bytes: int | None = None
    """Bytes that the vector index may take on a serving host; above them vectors are kept as 8-bit codes."""
    shard_bytes: int | None = None
    """Text bytes a shard; None follows the size of the corpus."""
    rebuild: bool = False
    """Make everything anew when the index was built with other models or settings."""
    delete_missing: bool = False
    """Remove documents that the corpus no longer has."""
    dedup_passages: bool | None = None
    """Let a search return equal passages once; None leaves it as the index has it. Encodes nothing anew."""
    retry_quarantined: bool = False
    """Try documents again that a stage has quarantined before."""
    work: str | None = None
    """Folder or URI for a run's intermediate files; None keeps them with the index, or on this machine where an index
    on an object store is built by this machine alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a build did; the JSON result of `refrag index build`."""

    documents_in: int
    indexed: int
    filtered: int
    quarantined: int
    passages: int
    chunks: int
    tokens: int
    encoded_chunks: int
    content_id: str
    build_id: str
    version: int
    committed: bool
    """False when the index already had exactly this content."""
    trained: bool
    """Whether its checkpoint was trained: without, chunk embeddings mean nothing to the decoder."""
    new: int
    changed: int
    unchanged: int
    deleted: int
    missing: int
    """Documents that the corpus no longer has and the index keeps."""
    reasons: Mapping[str, int]
    """Filtered and quarantined documents by reason."""
    ignored: Mapping[str, int]
    """Files of unknown formats, by suffix."""
    duplicate_passages: int
    """Live passages that stay out of search, since an earlier one is equal; 0 without --dedup-passages."""
    truncated_passages: int
    """Passages longer than the retriever's positions."""
    recall_at_10: float
    seconds: float
    steps: Mapping[str, float]
    """Seconds of work in each step, waiting for the device left out; tokenizing runs beside the others, and on a GPU
    the device stages of several shards beside each other."""
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of a step's seconds, those of its parts where they are counted: `read`, `load` and `capture` (models and graphs,
    once a run), `tokenize`, `wait` (for the device), `model`, `check`, `write`. Of the index: `queries`, `train`,
    `segments` and `recall`; there `model` and the like are of the queries' embedding."""


@dataclass(slots=True)
class _Outcome:
    """What the stages made of the plan."""

    shards: list[Shard] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def build_index(options: BuildOptions, engine: Engine, progress: Progress | None = None) -> BuildReport:
    """Bring the index at `options.output` up to the corpus; run again to resume or to update.

    Raises a RefragError: nothing is committed then, and what was finished is kept for the next run.
    """
    if options.tables == "lance":
        lance_tables.check_writable(options.output)
    store = store_for(engine, options.output)
    with lock_and_clear(store):
        latest = latest_manifest(store)
        if lance_tables.is_wanted(options.tables, latest):
            lance_tables.check_writable(options.output)
        models = resolve_models(store, options.models, elsewhere=engine.spans_machines)
        parent = _base(store, latest, models, rebuild=options.rebuild)
        return build_from(
            options, engine, progress or Silent(), store=store, models=models, latest=latest, parent=parent
        )


def build_from(
    options: BuildOptions,
    engine: Engine,
    progress: Progress,
    *,
    store: Store,
    models: Models,
    latest: Manifest | None,
    parent: Manifest | None,
) -> BuildReport:
    """The build itself, on a locked store.

    Args:
        latest: the newest generation, which the new one follows; None for the first.
        parent: the generation whose documents and shards stand; None to make everything anew.
    """
    return _Build(options, engine, progress, store).run(models, latest, parent)


def store_for(engine: Engine, location: IndexLocation) -> Store:
    """The store of an index, as the engine's workers reach it: elsewhere they have another working folder."""
    return open_store(absolute(location) if engine.spans_machines else location)


@contextlib.contextmanager
def lock_and_clear(store: Store) -> Iterator[None]:
    """Hold the index's lock, and remove what killed executions left but for their receipts.

    Raises UsageError for a bundle.
    """
    refuse_bundle(store)
    with store.lock():
        store.clear_runs()
        yield


def run_work(options: BuildOptions, engine: Engine, store: Store) -> WorkFolder:
    """Where the intermediate files of this run lie; what earlier runs left below `--work` is removed.

    Raises ConfigError for a `--work` inside of the corpus, which would become part of it.
    """
    if options.work is None:
        return WorkFolder(store.shared_run_location() if engine.spans_machines else str(store.run_folder().absolute()))
    location = absolute(options.work)
    for root in (absolute(root.split("**")[0]) for root in options.corpus.roots):
        if f"{location}/".startswith(f"{root}/"):
            raise ConfigError(
                f"--work {options.work} lies in the corpus {root}, expected a place outside of it: intermediate files "
                "would be read as documents; name another folder or URI"
            )
    of_this_index = WorkFolder(location).below(f"refrag-{digest_json(absolute(store.location))[:16]}")
    of_this_index.remove()
    return of_this_index.below(f"{RUNS}{process_name()}")


_UNITS = {
    "tokenize": ("chunks", "chunks"),
    "embeddings": ("chunks", "embeddings"),
    "vectors": ("passages", "vectors"),
    "scores": ("chunks", "scores"),
}
"""Of each stage: what its rate counts, and the table whose rows those are."""


class _Build:
    """One execution of the job."""

    def __init__(self, options: BuildOptions, engine: Engine, progress: Progress, store: Store) -> None:
        self.options = options
        self.engine = engine
        self.progress = progress
        self.store = store
        self.steps: defaultdict[str, float] = defaultdict(float)
        self.index_parts: Mapping[str, float] = {}
        # Intermediate files of this execution alone; receipts lie with the index and outlive it.
        self.work = run_work(options, engine, store)

    def run(self, models: Models, latest: Manifest | None, parent: Manifest | None) -> BuildReport:
        """The job, step by step."""
        started = time.perf_counter()
        scan = self._scan(models)
        plan = self._plan(scan, latest, parent)
        outcome = self._run_stages(models, plan, parent)
        shards, removed = self._all_shards(models, parent, plan, outcome)
        assembly.check_not_empty(shards, scan.documents_in, scan.reasons)
        hidden = duplicate_passages(self.store, shards, removed) if self._dedup(latest) else NO_DUPLICATES
        index = self._index(models, parent, shards, removed, hidden)
        shards, removed = self._covered(index, shards, removed)
        manifest, dispositions = self._assemble(models, latest, scan, plan, outcome, shards, removed, hidden, index)
        manifest = self._with_lance(manifest, latest, parent)
        committed = latest is None or (latest.content_id, latest.files) != (manifest.content_id, manifest.files)
        if committed:
            commit(self.store, manifest)
        elif latest is not None:
            finish_commit(self.store, latest)
        standing = manifest if committed or latest is None else latest
        report = self._report(standing, committed, scan, plan, outcome, dispositions, time.perf_counter() - started)
        if committed:
            write_run_record(self.store, report.version, self._record(report, models, outcome))
        self.work.remove()
        self.store.finish_work()
        return report

    def _dedup(self, latest: Manifest | None) -> bool:
        wanted = self.options.dedup_passages
        return (latest is not None and latest.parameters.dedup_passages) if wanted is None else wanted

    def _record(self, report: BuildReport, models: Models, outcome: _Outcome) -> RunRecord:
        """What this run took, to be shown by `refrag index inspect --html`."""
        started = datetime.now(UTC) - timedelta(seconds=report.seconds)
        return RunRecord(
            build_id=report.build_id,
            started=started.isoformat(timespec="seconds"),
            seconds=report.seconds,
            device=models.device,
            cores=available_cores(),
            documents_in=report.documents_in,
            new=report.new,
            changed=report.changed,
            unchanged=report.unchanged,
            deleted=report.deleted,
            missing=report.missing,
            filtered=report.filtered,
            quarantined=report.quarantined,
            truncated_passages=report.truncated_passages,
            stages=self._stage_records(report, outcome),
        )

    def _stage_records(self, report: BuildReport, outcome: _Outcome) -> dict[str, StageRecord]:
        whole = {"scan": ("documents", report.documents_in), "index": ("passages", report.passages)}
        records = {step: StageRecord(round(self.steps[step], 3), done, 0, unit) for step, (unit, done) in whole.items()}
        for receipt in outcome.receipts:
            unit, table = _UNITS[receipt.stage]
            before = records.get(receipt.stage, StageRecord(round(self.steps[receipt.stage], 3), 0, 0, unit))
            rows = receipt.rows.get(table, 0)
            done, reused = (0, rows) if receipt.reused else (rows, 0)
            records[receipt.stage] = replace(before, done=before.done + done, reused=before.reused + reused)
        return records

    def _scan(self, models: Models) -> ScanResult:
        self.progress.start("scan", None, "documents")
        started = time.perf_counter()
        scan = scan_corpus(
            self.options.corpus,
            self.work.below("scan"),
            chunk_sizes=models.chunk_sizes,
            default_chunk_size=models.parameters.chunk_size,
            map_units=self.engine.map,
            on_unit=lambda receipt: self.progress.advance(receipt.documents_in),
        )
        self.progress.finish()
        self.steps["scan"] += time.perf_counter() - started
        return scan

    def _plan(self, scan: ScanResult, latest: Manifest | None, parent: Manifest | None) -> Plan:
        self.progress.start("plan", None, "documents")
        started = time.perf_counter()
        plan = make_plan(
            scan.runs,
            store=self.store,
            parent=parent or latest,
            options=plan_options(self.options, scan.text_bytes, anew=parent is None),
            work=self.work.below("plan"),
            map_ranges=self.engine.map,
            on_range=self.progress.advance,
        )
        self.progress.finish()
        self.steps["plan"] += time.perf_counter() - started
        if parent is None:
            self._check_none_is_lost(plan)
        return plan

    def _check_none_is_lost(self, plan: Plan) -> None:
        """Nothing is deleted without being told, and what the corpus lacks cannot be encoded anew."""
        if plan.missing:
            raise UsageError(
                f"{self.store.location} holds {plan.missing:,} documents that the corpus no longer has, and --rebuild "
                "cannot encode them anew; expected all of them in the corpus: add them, or pass --delete-missing to "
                "let them go"
            )

    def _run_stages(self, models: Models, plan: Plan, parent: Manifest | None) -> _Outcome:
        stages = models.stages(score=self.options.score or _has_scores(parent))
        outcome = _Outcome()
        self.progress.start("encode", sum(spec.num_documents for spec in plan.shards), "documents")
        waiting: Sequence[ShardSpec] = plan.shards
        while waiting:
            results = self.engine.run(self.store, stages, waiting)
            waiting = [again for result in results for again in self._book(result, outcome)]
        self.progress.finish()
        return outcome

    def _book(self, result: ShardResult, outcome: _Outcome) -> Iterator[ShardSpec]:
        """Book one shard; yield it again without the documents that a device stage rejected, if any."""
        for receipt in result.receipts:
            outcome.receipts.append(receipt)
            self.steps[receipt.stage] += 0 if receipt.reused else receipt.seconds - receipt.parts.get("wait", 0.0)
        late = [entry for receipt in result.receipts[1:] for entry in receipt.rejected]
        outcome.rejected += late or result.receipts[0].rejected
        if late:
            gone = frozenset(entry.document_id for entry in late)
            yield from without(result.spec, gone, self.work.below("plan"))
            return
        self.progress.advance(result.spec.num_documents)
        if result.shard is not None:
            outcome.shards.append(result.shard)

    def _all_shards(
        self, models: Models, parent: Manifest | None, plan: Plan, outcome: _Outcome
    ) -> tuple[list[Shard], assembly.Removed]:
        """The shards of the new generation, and what is removed from them."""
        kept = list(parent.shards) if parent is not None else []
        if self.options.score:
            kept = [self._scored(models, shard, outcome) for shard in kept]
        removed = assembly.removed_documents(self.store, parent, plan.tombstones)
        # A document that comes back as it was may give a shard that is still there, all of it dead: it lives again.
        known = {shard.name for shard in kept}
        removed = {name: rows for name, rows in removed.items() if name not in {s.name for s in outcome.shards}}
        added = [shard for shard in outcome.shards if shard.name not in known]
        segments = parent.segments if parent is not None else ()
        shards = assembly.surviving([*kept, *added], removed, segments)
        return shards, assembly.within(removed, shards)

    def _covered(
        self, index: BuiltIndex, shards: Sequence[Shard], removed: assembly.Removed
    ) -> tuple[list[Shard], assembly.Removed]:
        covered = assembly.covered_by(index.segments, shards)
        return covered, assembly.within(removed, covered)

    def _scored(self, models: Models, shard: Shard, outcome: _Outcome) -> Shard:
        if "scores" in shard.tables:
            return shard
        scored, receipt = add_table(self.store, models.score_stage(), shard)
        outcome.receipts.append(receipt)
        return scored

    def _index(
        self,
        models: Models,
        parent: Manifest | None,
        shards: Sequence[Shard],
        removed: assembly.Removed,
        hidden: pa.Table,
    ) -> BuiltIndex:
        self.progress.start("index", None, "passages")
        started = time.perf_counter()
        with collected() as self.index_parts:
            index = build_vector_index(
                self.store,
                self.engine,
                shards,
                dim=models.parameters.vector_dim,
                live=live_passages(shards, removed, rows_by_shard(hidden)),
                dead=[shard.name for shard in shards if len(removed.get(shard.name, ())) == shard.documents],
                retriever=replace(models.embed_stage(), device=self._own_device(models)).load(),
                parent=parent,
                min_recall=self.options.min_recall,
                memory_budget_bytes=self.options.index_memory_bytes,
                progress=self.progress,
                work=self.work.below("index"),
            )
        self.progress.finish()
        self.steps["index"] += time.perf_counter() - started
        return index

    def _own_device(self, models: Models) -> str:
        """For the few sentences that the driver embeds itself, maybe on a machine without the workers' devices."""
        return "auto" if self.engine.spans_machines else models.device

    def _assemble(
        self,
        models: Models,
        latest: Manifest | None,
        scan: ScanResult,
        plan: Plan,
        outcome: _Outcome,
        shards: Sequence[Shard],
        removed: assembly.Removed,
        hidden: pa.Table,
        index: BuiltIndex,
    ) -> tuple[Manifest, Counter[str]]:
        quarantine, quarantine_file, dispositions = assembly.publish_quarantine(
            self.store, self._rejects(scan, plan, outcome)
        )
        tombstones, tombstone_file = assembly.publish_tombstones(self.store, removed)
        duplicates, duplicate_file = assembly.publish_duplicates(self.store, hidden)
        known = dict(latest.files) if latest else {}
        known |= {record.name: record for receipt in outcome.receipts for record in receipt.files.values()}
        others = [*index.files, *models.checkpoint_files, quarantine_file, tombstone_file, duplicate_file]
        draft = Manifest(
            version=1 if latest is None else latest.version + 1,
            parent=None if latest is None else ParentInfo(latest.version, latest.build_id),
            content_id="",
            components=models.components(scorer=all("scores" in shard.tables for shard in shards)),
            parameters=replace(models.parameters, dedup_passages=self._dedup(latest)),
            counts=NOTHING,
            shards=shards,
            segments=index.segments,
            vector_index=index.info,
            quarantine=quarantine,
            tombstones=tombstones,
            checkpoint=models.checkpoint_info(),
            files=assembly.collect_files(known, shards, others),
            change=Change("build", plan.new, plan.changed, plan.deleted),
            duplicates=duplicates,
        )
        manifest = assembly.identified(self.store, draft)
        assembly.check_accounts(
            documents_in=scan.documents_in,
            indexed=plan.unchanged + sum(shard.documents for shard in outcome.shards),
            rejected=sum(quarantine.counts.values()),
            missing=plan.missing,
            held_in_index=manifest.counts.documents,
        )
        return manifest, dispositions

    def _with_lance(self, draft: Manifest, latest: Manifest | None, parent: Manifest | None) -> Manifest:
        """The draft with its LanceDB tables, if it is to have them."""
        if not lance_tables.is_wanted(self.options.tables, latest):
            return draft
        self.progress.start("lance", None, "rows")
        started = time.perf_counter()
        manifest = lance_tables.with_lance(self.store, draft, parent)
        self.progress.finish()
        self.steps["lance"] += time.perf_counter() - started
        return manifest

    def _rejects(self, scan: ScanResult, plan: Plan, outcome: _Outcome) -> list[str]:
        """Locations of all rejects: the scan's, the duplicates', and those of the stages, then and now."""
        with RejectWriter(self.work, "stages") as rejects:
            for row in assembly.late_rejects(outcome.rejected, plan.held):
                rejects.add_row(row)
            stages = rejects.close()
        return [*scan.rejects, *plan.duplicates, *([stages] if stages else [])]

    def _report(
        self,
        manifest: Manifest,
        committed: bool,
        scan: ScanResult,
        plan: Plan,
        outcome: _Outcome,
        dispositions: Counter[str],
        seconds: float,
    ) -> BuildReport:
        encoded = [r.rows["embeddings"] for r in outcome.receipts if r.stage == "embeddings" and not r.reused]
        return BuildReport(
            documents_in=scan.documents_in,
            passages=manifest.counts.passages,
            chunks=manifest.counts.chunks,
            tokens=manifest.counts.tokens,
            indexed=scan.documents_in - sum(dispositions.values()),
            filtered=dispositions[assembly.FILTERED],
            quarantined=sum(dispositions.values()) - dispositions[assembly.FILTERED],
            encoded_chunks=sum(encoded),
            content_id=manifest.content_id,
            build_id=manifest.build_id,
            version=manifest.version,
            committed=committed,
            trained=manifest.checkpoint.trained,
            new=plan.new,
            changed=plan.changed,
            unchanged=plan.unchanged,
            deleted=plan.deleted,
            missing=plan.missing,
            reasons=manifest.quarantine.counts,
            ignored=scan.ignored,
            duplicate_passages=manifest.duplicates.passages if manifest.duplicates else 0,
            truncated_passages=sum(int(r.facts.get("truncated", 0)) for r in outcome.receipts),
            recall_at_10=manifest.vector_index.recall_at_10,
            seconds=round(seconds, 3),
            steps={step: round(value, 3) for step, value in self.steps.items()},
            parts=_parts(outcome.receipts) | {"index": _rounded(self.index_parts)},
        )


def _parts(receipts: Sequence[Receipt]) -> dict[str, dict[str, float]]:
    """Seconds by stage and part of the work that was done in this run."""
    found: dict[str, dict[str, float]] = {}
    for receipt in receipts:
        for name, seconds in ({} if receipt.reused else receipt.parts).items():
            parts = found.setdefault(receipt.stage, {})
            parts[name] = parts.get(name, 0.0) + seconds
    return {stage: _rounded(parts) for stage, parts in found.items()}


def _rounded(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in parts.items()}


def _base(store: Store, latest: Manifest | None, models: Models, *, rebuild: bool) -> Manifest | None:
    """The generation to build on: the latest, or None when everything is to be made anew."""
    changes = [] if latest is None else differences(latest, models)
    if changes and not rebuild:
        raise FingerprintMismatchError(
            f"{store.location} was built with other settings: {'; '.join(changes)}. Expected the same: give them "
            "again, or pass --rebuild to encode the whole corpus anew"
        )
    return None if changes else latest


def _has_scores(parent: Manifest | None) -> bool:
    return parent is not None and parent.components.scorer is not None


def plan_options(options: BuildOptions, corpus_bytes: int, *, anew: bool) -> PlanOptions:
    """What decides the plan of a build.

    Args:
        corpus_bytes: UTF-8 bytes of the scanned documents' text, which decide the size of shards.
    """
    return PlanOptions(
        target_shard_bytes=options.shard_bytes or default_shard_bytes(corpus_bytes),
        delete_missing=options.delete_missing,
        retry_quarantined=options.retry_quarantined,
        anew=anew,
    )


def differences(latest: Manifest, models: Models) -> list[str]:
    """What the index was built with and this run would not use; fingerprints count, names do not."""
    now = models.components(scorer=_has_scores(latest))
    pairs = [
        (name, getattr(latest.components, name), getattr(now, name))
        for name in ("tokenizer", "encoder", "retriever", "scorer")
    ]
    found = [
        f"{name} {old.reference} ({old.fingerprint[:12]}), now {new.reference} ({new.fingerprint[:12]})"
        for name, old, new in pairs
        if old is not None and old.fingerprint != new.fingerprint
    ]
    # Hiding duplicates is a switch of its own: it encodes nothing.
    before, after = (asdict(replace(p, dedup_passages=False)) for p in (latest.parameters, models.parameters))
    return found + [f"{name} {before[name]}, now {after[name]}" for name in before if before[name] != after[name]]
