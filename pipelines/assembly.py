"""From finished shards to a manifest: quarantine, tombstones, files, content id, and the accounts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refrag.pipelines.plan import Plan
from refrag.pipelines.receipts import Rejected
from refrag.schemas import arrow
from refrag_core.digests import digest_json
from refrag_core.errors import AccountingError, CorpusError
from refrag_core.manifest import (
    NOTHING,
    Counts,
    LiveDocument,
    Manifest,
    QuarantineInfo,
    Shard,
    TombstoneInfo,
    content_id,
    live_documents,
    read_tombstones,
)
from refrag_core.storage import FileRecord, Store
from refrag_core.tables import iterate_rows, write_table

Removed = Mapping[str, Sequence[tuple[int, int, int]]]
"""Per shard: `(document row, first passage row, number of passages)` of removed documents."""

STAGE_REASONS = frozenset({"tokenize_failed", "encode_failed", "embed_failed", "score_failed"})
FILTERED = "filtered"
_ORDER = [(name, "ascending") for name in ("source", "position", "reason", "document_id")]


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


def held_digests(store: Store, manifest: Manifest) -> dict[str, bytes]:
    """Source digest of each document that a stage had to quarantine: not tried again until it changes."""
    rows = _quarantined(store, manifest)
    return {row["document_id"]: row["source_digest"] for row in rows if row["reason"] in STAGE_REASONS}


def held_rows(store: Store, manifest: Manifest | None, plan: Plan) -> list[dict[str, Any]]:
    """The quarantine rows that the plan carries over from the parent."""
    held = {row["document_id"] for row in plan.held}
    if manifest is None or not held:
        return []
    rows = _quarantined(store, manifest)
    return [row for row in rows if row["document_id"] in held and row["reason"] in STAGE_REASONS]


def _quarantined(store: Store, manifest: Manifest) -> Iterable[dict[str, Any]]:
    return iterate_rows(store.path(manifest.quarantine.file)) if manifest.quarantine.file else ()


def publish_quarantine(
    store: Store, rows: Sequence[Mapping[str, Any]], tables: Sequence[str]
) -> tuple[QuarantineInfo, FileRecord | None, Counter[str]]:
    """Write down every record that is not in the index; returns the info, its file, and counts by disposition.

    Args:
        rows: duplicates and the stages' rejects.
        tables: paths of the scan's Parquet files of rejects.
    """
    parts = [pa.Table.from_pylist(list(rows), schema=arrow.QUARANTINE)]
    parts += [pq.read_table(path).cast(arrow.QUARANTINE) for path in tables]
    table = pa.concat_tables(parts).sort_by(_ORDER)
    if table.num_rows == 0:
        return QuarantineInfo(None, {}), None, Counter()
    reasons = Counter(table.column("reason").to_pylist())
    identity = table.select(["document_id", "reason", "source", "position", "source_digest"]).to_pylist()
    key = digest_json([[str(value) for value in row.values()] for row in identity])[:32]
    record = store.publish(f"quarantine/{key}.parquet", lambda path: write_table(path, table))
    dispositions = Counter(table.column("disposition").to_pylist())
    return QuarantineInfo(record.name, dict(sorted(reasons.items()))), record, dispositions


# --- tombstones -------------------------------------------------------------------------------------


def removed_documents(store: Store, parent: Manifest | None, retired: Iterable[LiveDocument]) -> Removed:
    """The parent's tombstones and the documents that leave with this generation, by shard."""
    removed = {} if parent is None else read_tombstones(store, parent)
    for live in retired:
        removed.setdefault(live.shard, []).append((live.row, live.first_passage, live.num_passages))
    return {name: sorted(rows) for name, rows in sorted(removed.items())}


def surviving(shards: Iterable[Shard], removed: Removed) -> list[Shard]:
    """Shards with a live document left, ordered by their first document."""
    alive = [shard for shard in shards if len(removed.get(shard.name, ())) < shard.documents]
    return sorted(alive, key=lambda shard: (shard.first_document.encode(), shard.name))


def publish_tombstones(store: Store, removed: Removed) -> tuple[TombstoneInfo | None, FileRecord | None]:
    """Write down the removed documents of the shards that stay."""
    rows = [
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


# --- identity and accounts --------------------------------------------------------------------------


def identified(store: Store, draft: Manifest) -> Manifest:
    """The draft with its content id and the counts of what is live, in one pass over the documents."""
    counts = NOTHING

    def digests() -> Iterable[tuple[str, bytes]]:
        nonlocal counts
        for live in live_documents(store, draft):
            counts += Counts(1, live.num_passages, live.num_chunks, live.num_tokens)
            yield live.document_id, live.content_digest

    identity = content_id(digests(), draft.components, draft.parameters)
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
