"""From finished shards to a manifest: quarantine, tombstones, files, content id, and the accounts."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refrag.pipelines.receipts import Rejected
from refrag.schemas import arrow
from refrag_core.content import content_of
from refrag_core.digests import canonical_json, digest_json
from refrag_core.errors import AccountingError, CorpusError
from refrag_core.manifest import (
    DuplicateInfo,
    Manifest,
    QuarantineInfo,
    Segment,
    Shard,
    TombstoneInfo,
    read_tombstones,
)
from refrag_core.storage import FileRecord, Store
from refrag_core.tables import iterate_rows, write_table
from refrag_core.work_folder import open_location

Removed = Mapping[str, Sequence[tuple[int, int, int]]]
"""Per shard: `(document row, first passage row, number of passages)` of removed documents."""

STAGE_REASONS = frozenset({"tokenize_failed", "encode_failed", "embed_failed", "score_failed"})
FILTERED = "filtered"
_IDENTITY = ("document_id", "reason", "disposition", "source", "position", "source_digest")
_REJECTS_A_BATCH = 256


# --- quarantine -------------------------------------------------------------------------------------


def stage_reject_row(entry: Rejected) -> dict[str, Any]:
    """A document that a stage rejected, as a row of the quarantine table."""
    return {
        "document_id": entry.document_id,
        "reason": entry.reason,
        "detail": entry.detail,
        "disposition": "quarantined",
        "source": entry.source,
        "position": 0,
        "source_digest": bytes.fromhex(entry.source_digest),
        "raw": b"",
    }


def stage_rejects(store: Store, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Quarantine rows of the documents that a stage had to set aside, ordered by id."""
    if manifest.quarantine.file is not None:
        rows = iterate_rows(store.path(manifest.quarantine.file), batch_rows=_REJECTS_A_BATCH)
        yield from (row for row in rows if row["reason"] in STAGE_REASONS)


def late_rejects(rejected: Iterable[Rejected], held: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Quarantine rows of what stages rejected now and before, ordered by id.

    Args:
        held: locations of quarantine rows that the plan carries over from the parent, ordered by id as a whole.
    """

    def document_key(row: Mapping[str, Any]) -> bytes:
        return str(row["document_id"]).encode()

    rows = sorted((stage_reject_row(entry) for entry in rejected), key=document_key)
    return heapq.merge(rows, reject_rows(held), key=document_key)


def publish_quarantine(store: Store, parts: Sequence[str]) -> tuple[QuarantineInfo, FileRecord | None, Counter[str]]:
    """Write down every record that is not in the index; returns the info, its file, and counts by disposition.

    Args:
        parts: locations of Parquet files of rejects, copied one after another; one batch is in memory.
    """
    reasons: Counter[str] = Counter()
    dispositions: Counter[str] = Counter()
    hasher = hashlib.sha256()
    for row in reject_rows(parts, _IDENTITY):
        hasher.update(canonical_json([str(value) for value in row.values()]))
        reasons[row["reason"]] += 1
        dispositions[row["disposition"]] += 1
    if not reasons:
        return QuarantineInfo(None, {}), None, dispositions
    name = f"quarantine/{hasher.hexdigest()[:32]}.parquet"
    record = store.publish(name, lambda path: _concatenate(parts, path))
    return QuarantineInfo(record.name, dict(sorted(reasons.items()))), record, dispositions


def reject_rows(parts: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of several files of rejects, one after another."""
    for batch in _reject_batches(parts, columns):
        yield from batch.to_pylist()


def _reject_batches(parts: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    for part in parts:
        with open_location(part) as file:
            yield from file.iter_batches(batch_size=_REJECTS_A_BATCH, columns=columns)


def _concatenate(parts: Sequence[str], path: Path) -> None:
    """One file of all rows, whose bytes do not depend on how they were divided among the parts."""
    waiting = arrow.QUARANTINE.empty_table()
    with pq.ParquetWriter(path, arrow.QUARANTINE, compression="zstd") as writer:
        for batch in _reject_batches(parts):
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch.cast(arrow.QUARANTINE)])])
            if waiting.num_rows >= _REJECTS_A_BATCH:
                writer.write_table(waiting.slice(0, _REJECTS_A_BATCH).combine_chunks())
                waiting = waiting.slice(_REJECTS_A_BATCH)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks())


# --- tombstones -------------------------------------------------------------------------------------


def removed_documents(store: Store, parent: Manifest | None, retired: Iterable[str]) -> Removed:
    """The parent's tombstones and the documents that leave with this generation, by shard.

    Args:
        retired: locations of files of schemas.arrow.TOMBSTONES.
    """
    removed = {} if parent is None else read_tombstones(store, parent)
    for location in retired:
        with open_location(location) as file:
            rows = file.read().to_pylist()
        for row in rows:
            place = (row["document"], row["first_passage"], row["num_passages"])
            removed.setdefault(row["shard"], []).append(place)
    return {name: sorted(rows) for name, rows in sorted(removed.items())}


def surviving(shards: Iterable[Shard], removed: Removed, segments: Iterable[Segment] = ()) -> list[Shard]:
    """Shards with a live document left, ordered by their first document.

    Args:
        segments: those of the parent: a dead shard stays as long as its segment covers one that is not, since a
            segment's rows are those of all of its shards. Compaction drops it.
    """
    known = list(shards)
    alive = {shard.name for shard in known if len(removed.get(shard.name, ())) < shard.documents}
    covered = {name for segment in segments if not alive.isdisjoint(segment.shards) for name in segment.shards}
    staying = [shard for shard in known if shard.name in alive | covered]
    return sorted(staying, key=lambda shard: (shard.first_document.encode(), shard.name))


def within(removed: Removed, shards: Iterable[Shard]) -> Removed:
    """The removed documents of these shards."""
    names = {shard.name for shard in shards}
    return {name: rows for name, rows in removed.items() if name in names}


def covered_by(segments: Iterable[Segment], shards: Iterable[Shard]) -> list[Shard]:
    """The shards that a segment has; training anew leaves the dead ones out."""
    covered = {name for segment in segments for name in segment.shards}
    return [shard for shard in shards if shard.name in covered]


def publish_tombstones(store: Store, removed: Removed) -> tuple[TombstoneInfo | None, FileRecord | None]:
    """Write down the removed documents of the shards that stay."""
    rows: list[dict[str, Any]] = [
        {"shard": name, "document": document, "first_passage": first, "num_passages": count}
        for name, entries in removed.items()
        for document, first, count in entries
    ]
    if not rows:
        return None, None
    table = pa.Table.from_pylist(rows, schema=arrow.TOMBSTONES)
    key = digest_json([[row["shard"], row["document"]] for row in rows])[:32]
    record = store.publish(f"tombstones/{key}.parquet", lambda path: write_table(path, table))
    return TombstoneInfo(record.name, len(rows), sum(row["num_passages"] for row in rows)), record


def publish_duplicates(store: Store, duplicates: pa.Table) -> tuple[DuplicateInfo | None, FileRecord | None]:
    """Write down the passages (`arrow.DUPLICATES`) that stay out of search because an earlier one says the same."""
    if not duplicates.num_rows:
        return None, None
    key = digest_json([list(row.values()) for row in duplicates.to_pylist()])[:32]
    record = store.publish(f"duplicates/{key}.parquet", lambda path: write_table(path, duplicates))
    return DuplicateInfo(record.name, duplicates.num_rows), record


# --- identity and accounts --------------------------------------------------------------------------


def identified(store: Store, draft: Manifest) -> Manifest:
    """The draft with its content id and the counts of what is live, in one pass over the documents."""
    identity, counts = content_of(store, draft)
    return replace(draft, content_id=identity, counts=counts)


def collect_files(
    known: Mapping[str, FileRecord], shards: Sequence[Shard], others: Iterable[FileRecord | None]
) -> dict[str, FileRecord]:
    """Records of all files that a generation names, ordered by name."""
    records = [known[name] for shard in shards for name in shard.tables.values()]
    records += [record for record in others if record is not None]
    return {record.name: record for record in sorted(records, key=lambda record: record.name)}


def check_not_empty(shards: Sequence[Shard], documents_in: int, reasons: Mapping[str, int]) -> None:
    """Raise CorpusError when there is nothing to index."""
    if not shards:
        raise CorpusError(
            f"none of {documents_in} documents can be indexed ({dict(reasons)}), expected at least one: nothing was "
            "committed; check the corpus, --id-field and --text-field"
        )


def check_accounts(*, documents_in: int, indexed: int, rejected: int, missing: int, held_in_index: int) -> None:
    """Every document that came in is indexed, filtered or quarantined; raise AccountingError otherwise."""
    if documents_in != indexed + rejected:
        raise AccountingError(
            f"{documents_in} documents came in; {indexed} indexed + {rejected} filtered or quarantined are "
            "accounted for, expected equal numbers: nothing was committed; please report this"
        )
    if held_in_index != indexed + missing:
        raise AccountingError(
            f"the generation holds {held_in_index} documents, expected {indexed} of the corpus + {missing} kept: "
            "nothing was committed; please report this"
        )
