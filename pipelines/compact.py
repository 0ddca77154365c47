"""`refrag index compact`: small shards become larger ones, tombstoned rows go, nothing is encoded.

The live documents of the shards concerned are one stream ordered by id, cut again where documents' ids say so;
their rows are copied from table to table. A new shard's files have the names that building it from its documents
would give them, and the content id stays what it was: only where rows lie has changed.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refrag.pipelines import assembly
from refrag.pipelines.build import lock_and_clear, store_for
from refrag.pipelines.duplicates import NO_DUPLICATES, duplicate_passages
from refrag.pipelines.engines import Engine
from refrag.pipelines.indexing import regroup
from refrag.pipelines.plan import ShardName, ShardSpec, default_shard_bytes, ends_shard
from refrag.pipelines.progress import Progress, Silent
from refrag.pipelines.receipts import Receipt, find_receipt, forget_receipt, write_receipt
from refrag.pipelines.stages import (
    DeviceStage,
    EmbedStage,
    EncodeStage,
    ScoreStage,
    TokenizeStage,
    shard_of,
    table_name,
    table_writer,
)
from refrag_core import lance_tables
from refrag_core.errors import AccountingError
from refrag_core.manifest import (
    Change,
    LiveDocument,
    Manifest,
    ParentInfo,
    Shard,
    commit,
    finish_commit,
    live_documents,
    read_manifest,
    read_tombstones,
)
from refrag_core.storage import FileRecord, IndexLocation, Store
from refrag_core.tables import open_table

BYTES_A_TOKEN = 4
"""Text bytes are not in the tables; so many a token stand for them, to measure shards by."""

_SMALL = 4
_ROWS_A_BATCH = 2048
_PASSAGE_TABLES = ("passages", "vectors")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactOptions:
    """What `refrag index compact` can be told."""

    index: IndexLocation
    shard_bytes: int | None = None
    """Text bytes a shard; None follows the size of the index. Shards under a quarter of it are merged."""
    min_dead_fraction: float = 0.0
    """Share of tombstoned documents from which a shard is written anew; 0 leaves no tombstone behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport:
    """What a compaction did."""

    version: int
    committed: bool
    """False when there was nothing to compact."""
    content_id: str
    build_id: str
    shards_before: int
    shards_after: int
    segments_before: int
    segments_after: int
    dropped_documents: int
    dropped_passages: int
    copied_chunks: int
    """Chunks whose rows were copied into new shards."""
    bytes_before: int
    bytes_after: int
    new_bytes: int
    """Of the files that the generation before does not have."""
    seconds: float


class Run(NamedTuple):
    """Consecutive live documents of one shard: rows `[start, stop)` of each kind of table."""

    shard: str
    documents: tuple[int, int]
    passages: tuple[int, int]
    chunks: tuple[int, int]

    def rows(self, table: str) -> tuple[int, int]:
        """The rows of these documents in `table`."""
        if table == "documents":
            return self.documents
        return self.passages if table in _PASSAGE_TABLES else self.chunks


@dataclass(frozen=True, slots=True)
class MergedShard:
    """A shard to be written: which rows of which shards it takes over, in order."""

    shard: Shard
    """Still without tables."""
    runs: Sequence[Run]


def compact_index(options: CompactOptions, engine: Engine, progress: Progress | None = None) -> CompactReport:
    """Commit a generation of the same content in fewer shards and segments, without tombstoned rows.

    Killed, it leaves the generation before as it was; run again, it takes over the shards that are done. Old files
    stay for the generations that name them: `gc` removes those.

    Raises IndexNotFoundError, IndexLockedError, CommitConflictError, and CorruptIndexError for a damaged table.
    """
    started = time.perf_counter()
    store = store_for(engine, options.index)
    read_manifest(store)
    with lock_and_clear(store):
        parent = read_manifest(store)
        manifest, copied = _compacted(store, parent, options, engine, progress or Silent())
        committed = manifest.files.keys() != parent.files.keys()
        if committed:
            commit(store, manifest)
        else:
            finish_commit(store, parent)
        for shard in manifest.shards:  # the receipts of a build that was interrupted are its own
            forget_receipt(store, "compact", shard.name)
    return _report(parent, manifest if committed else parent, committed, copied, time.perf_counter() - started)


def _compacted(
    store: Store, parent: Manifest, options: CompactOptions, engine: Engine, progress: Progress
) -> tuple[Manifest, int]:
    """The generation that follows, and the number of chunks copied for it."""
    tokens = sum(shard.tokens for shard in parent.shards)
    target = options.shard_bytes or default_shard_bytes(BYTES_A_TOKEN * tokens)
    removed: assembly.Removed = read_tombstones(store, parent)
    chosen = _chosen(parent.shards, removed, target, options.min_dead_fraction)
    receipts = list(_merge(store, parent, chosen, target, progress))
    staying = [shard for shard in parent.shards if shard not in chosen]
    shards = assembly.surviving([*staying, *(shard_of(receipt, [receipt]) for receipt in receipts)], {})
    progress.start("index", None, "segments")
    segments, records = regroup(store, engine, parent, shards)
    progress.finish()
    tombstones, tombstone_file = assembly.publish_tombstones(store, assembly.within(removed, staying))
    hidden = duplicate_passages(store, shards, assembly.within(removed, staying)) if _dedups(parent) else NO_DUPLICATES
    duplicates, duplicate_file = assembly.publish_duplicates(store, hidden)
    known = dict(parent.files) | {record.name: record for receipt in receipts for record in receipt.files.values()}
    kept = [parent.files[segment.file] for segment in segments if segment.file in parent.files]
    draft = replace(
        parent,
        version=parent.version + 1,
        parent=ParentInfo(parent.version, parent.build_id),
        shards=shards,
        segments=segments,
        tombstones=tombstones,
        duplicates=duplicates,
        files=assembly.collect_files(
            known, shards, [*_other_files(parent), *kept, *records, tombstone_file, duplicate_file]
        ),
        change=Change("compact"),
        lance=None,
    )
    manifest = _same_content(store, draft, parent)
    if parent.lance is not None:
        manifest = lance_tables.with_lance(store, manifest, parent)
    return manifest, sum(receipt.facts["copied"] for receipt in receipts)


def _dedups(manifest: Manifest) -> bool:
    return manifest.parameters.dedup_passages


def _chosen(shards: Iterable[Shard], removed: assembly.Removed, target: int, min_dead_fraction: float) -> list[Shard]:
    """Shards with tombstoned documents enough, and the small ones."""

    def dead(shard: Shard) -> float:
        return len(removed.get(shard.name, ())) / max(1, shard.documents)

    small = target / _SMALL
    return [s for s in shards if (dead(s) and dead(s) >= min_dead_fraction) or BYTES_A_TOKEN * s.tokens < small]


def _other_files(parent: Manifest) -> list[FileRecord]:
    """Records of what compaction leaves as it is: checkpoint, quantizer, quarantine."""
    moved = {name for shard in parent.shards for name in shard.tables.values()}
    moved |= {segment.file for segment in parent.segments}
    moved |= {info.file for info in (parent.tombstones, parent.duplicates) if info}
    folders = tuple(f"{table.folder}/" for table in parent.lance.tables.values()) if parent.lance else ()
    return [record for name, record in parent.files.items() if name not in moved and not name.startswith(folders)]


def _same_content(store: Store, draft: Manifest, parent: Manifest) -> Manifest:
    manifest = assembly.identified(store, draft)
    if (manifest.content_id, manifest.counts) != (parent.content_id, parent.counts):
        raise AccountingError(
            f"the compacted shards hold {manifest.counts} with content id {manifest.content_id[:16]}, expected "
            f"{parent.counts} and {parent.content_id[:16]} as before: nothing was committed; please report this"
        )
    return manifest


# --- which rows go where ----------------------------------------------------------------------------


def merged_shards(
    store: Store, manifest: Manifest, chosen: Sequence[Shard], target_shard_bytes: int
) -> Iterator[MergedShard]:
    """The live documents of `chosen`, cut into shards of about `target_shard_bytes`; one stream a chunk size."""
    for chunk_size in sorted({shard.chunk_size for shard in chosen}):
        shards = [shard for shard in chosen if shard.chunk_size == chunk_size]
        group: list[LiveDocument] = []
        filled = 0
        for document in live_documents(store, replace(manifest, shards=shards)):
            group.append(document)
            size = BYTES_A_TOKEN * document.num_tokens
            filled += size
            if ends_shard(document.document_id, size, filled, target_shard_bytes):
                yield _merged(manifest, chunk_size, group)
                group, filled = [], 0
        if group:
            yield _merged(manifest, chunk_size, group)


def _merged(manifest: Manifest, chunk_size: int, documents: Sequence[LiveDocument]) -> MergedShard:
    name = ShardName(chunk_size)
    for document in documents:
        name.add(document.document_id, document.source_digest)
    spec = ShardSpec(str(name), "", chunk_size, len(documents), 0)
    components, parameters = manifest.components, manifest.parameters
    shard = Shard(
        name=TokenizeStage("", components.tokenizer.fingerprint, parameters.max_passage_tokens).key(spec),
        chunk_size=chunk_size,
        first_document=documents[0].document_id,
        last_document=documents[-1].document_id,
        documents=len(documents),
        passages=sum(document.num_passages for document in documents),
        chunks=sum(document.num_chunks for document in documents),
        tokens=sum(document.num_tokens for document in documents),
        tables={},
    )
    return MergedShard(shard, list(_runs(documents)))


def _runs(documents: Iterable[LiveDocument]) -> Iterator[Run]:
    """Documents that follow one another in one shard, taken together."""
    open_run: Run | None = None
    for d in documents:
        run = Run(
            d.shard,
            (d.row, d.row + 1),
            (d.first_passage, d.first_passage + d.num_passages),
            (d.first_chunk, d.first_chunk + d.num_chunks),
        )
        if open_run is not None and open_run.shard == run.shard and open_run.documents[1] == run.documents[0]:
            spans = zip(open_run[1:], run[1:], strict=True)
            open_run = Run(run.shard, *((before[0], after[1]) for before, after in spans))
        else:
            if open_run is not None:
                yield open_run
            open_run = run
    if open_run is not None:
        yield open_run


# --- copying ----------------------------------------------------------------------------------------


class _Rows:
    """One table of a shard, read once from its first row to its last; runs come in the order of rows."""

    def __init__(self, store: Store, name: str) -> None:
        with open_table(store.path(name)) as file:
            self.schema = file.schema_arrow
        self._batches = self._read(store, name)
        self._start = self._stop = 0
        self._table = self.schema.empty_table()

    @staticmethod
    def _read(store: Store, name: str) -> Iterator[pa.RecordBatch]:
        with open_table(store.path(name)) as file:
            yield from file.iter_batches(batch_size=_ROWS_A_BATCH)

    def take(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows `[start, stop)` in pieces; none before an earlier call's `stop`."""
        while start < stop:
            if start >= self._stop:
                batch = next(self._batches)
                self._start, self._stop = self._stop, self._stop + batch.num_rows
                self._table = pa.Table.from_batches([batch])
                continue
            end = min(stop, self._stop)
            yield self._table.slice(start - self._start, end - start)
            start = end


class _Sources:
    """The open tables of the shards that are read, one after another or side by side."""

    def __init__(self, store: Store, shards: Iterable[Shard]) -> None:
        self._store = store
        self._shards = {shard.name: shard for shard in shards}
        self._open: dict[tuple[str, str], _Rows] = {}

    def tables(self, runs: Sequence[Run]) -> set[str]:
        """Names of the tables that all shards of these runs have."""
        return set.intersection(*(set(self._shards[run.shard].tables) for run in runs))

    def gather(self, table: str, runs: Sequence[Run]) -> pa.Table:
        """The rows of all runs in one table, contiguous."""
        pieces = [piece for run in runs for piece in self._rows(run.shard, table).take(*run.rows(table))]
        schema = self._rows(runs[0].shard, table).schema
        return pa.concat_tables([schema.empty_table(), *pieces]).combine_chunks()

    def _rows(self, shard: str, table: str) -> _Rows:
        if (shard, table) not in self._open:
            self._open[shard, table] = _Rows(self._store, self._shards[shard].tables[table])
        return self._open[shard, table]

    def close_before(self, document_id: str) -> None:
        """Let go of the shards that end before this document."""
        done = [n for n, shard in self._shards.items() if shard.last_document.encode() < document_id.encode()]
        for name, table in [key for key in self._open if key[0] in done]:
            del self._open[name, table]


def _merge(
    store: Store, parent: Manifest, chosen: Sequence[Shard], target: int, progress: Progress
) -> Iterator[Receipt]:
    """Write the merged shards that are not there yet; their receipts in order."""
    progress.start("merge", sum(shard.documents for shard in chosen), "documents")
    sources, unchanged = _Sources(store, chosen), {shard.name: shard for shard in chosen}
    for merged in merged_shards(store, parent, chosen, target):
        sources.close_before(merged.shard.first_document)
        if merged.shard.name in unchanged:
            yield _as_it_is(parent, unchanged[merged.shard.name])
        else:
            yield _merge_one(store, parent, sources, merged)
        progress.advance(merged.shard.documents)
    progress.finish()


def _as_it_is(parent: Manifest, shard: Shard) -> Receipt:
    """A shard that holds these very documents already."""
    files = {table: parent.files[name] for table, name in shard.tables.items()}
    return _receipt(shard, files, 0.0, copied=0)


def _merge_one(store: Store, parent: Manifest, sources: _Sources, merged: MergedShard) -> Receipt:
    if (receipt := find_receipt(store, "compact", merged.shard.name)) is not None:
        return receipt
    started = time.perf_counter()
    names = _table_names(parent, merged.shard.name)
    files = {}
    passages = sources.gather("passages", merged.runs)
    num_chunks = passages.column("num_chunks").to_numpy().astype(np.int64)
    for table in sorted(sources.tables(merged.runs) & names.keys()):
        rows = passages if table == "passages" else sources.gather(table, merged.runs)
        made = _counted_on(table, rows, num_chunks)
        files[table] = store.publish(names[table], table_writer(table, made))
    receipt = _receipt(merged.shard, files, time.perf_counter() - started, copied=merged.shard.chunks)
    write_receipt(store, receipt)
    return receipt


def _receipt(shard: Shard, files: Mapping[str, FileRecord], seconds: float, *, copied: int) -> Receipt:
    return Receipt(
        stage="compact",
        key=shard.name,
        shard=shard.name,
        files=files,
        rows={
            "documents": shard.documents,
            "passages": shard.passages,
            "chunks": shard.chunks,
            "tokens": shard.tokens,
        },
        seconds=seconds,
        facts={
            "chunk_size": shard.chunk_size,
            "first_document": shard.first_document,
            "last_document": shard.last_document,
            "copied": copied,
        },
    )


def _table_names(parent: Manifest, shard: str) -> dict[str, str]:
    """Names of a shard's files as its stages would give them; so `repair` can make each of them again."""
    components = parent.components
    stages: list[DeviceStage] = [
        EncodeStage("", components.encoder.fingerprint, "cpu", parent.parameters.embedding_dtype),
        EmbedStage("", components.retriever.fingerprint, "cpu"),
    ]
    names = {table: f"shards/{shard}/{table}.parquet" for table in ("documents", "passages", "chunks")}
    names |= {stage.table: table_name(shard, stage.table, stage.fingerprint) for stage in stages}
    if components.scorer is not None:
        score = ScoreStage("", components.scorer.fingerprint, "cpu")
        names["scores"] = table_name(shard, "scores", score.fingerprint)
    return names


def _counted_on(table: str, rows: pa.Table, num_chunks: npt.NDArray[np.int64]) -> pa.Table:
    """The rows with the columns that count rows of this very shard; `num_chunks` int64 `[passages]`."""
    if table == "passages":
        first = np.cumsum(num_chunks) - num_chunks
        return _with_column(rows, "first_chunk", first)
    if table == "chunks":
        return _with_column(rows, "passage", np.repeat(np.arange(len(num_chunks)), num_chunks))
    return rows


def _with_column(rows: pa.Table, name: str, values: npt.NDArray[np.int64]) -> pa.Table:
    at = rows.schema.get_field_index(name)
    field = rows.schema.field(at)
    return rows.set_column(at, field, pa.array(values, type=field.type))


# --- the report -------------------------------------------------------------------------------------


def _report(parent: Manifest, manifest: Manifest, committed: bool, copied: int, seconds: float) -> CompactReport:
    hidden, left = parent.tombstones, manifest.tombstones
    return CompactReport(
        version=manifest.version,
        committed=committed,
        content_id=manifest.content_id,
        build_id=manifest.build_id,
        shards_before=len(parent.shards),
        shards_after=len(manifest.shards),
        segments_before=len(parent.segments),
        segments_after=len(manifest.segments),
        dropped_documents=(hidden.documents if hidden else 0) - (left.documents if left else 0),
        dropped_passages=(hidden.passages if hidden else 0) - (left.passages if left else 0),
        copied_chunks=copied,
        bytes_before=sum(record.bytes for record in parent.files.values()),
        bytes_after=sum(record.bytes for record in manifest.files.values()),
        new_bytes=sum(record.bytes for name, record in manifest.files.items() if name not in parent.files),
        seconds=round(seconds, 3),
    )
