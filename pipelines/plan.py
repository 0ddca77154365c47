"""What a build has to do: the scanned corpus joined with the parent generation, cut into shards.

Both sides are streams ordered by document id, so that no step holds all ids. Documents that are new or
changed go into shards; a shard ends where a document's id says so (content-defined boundaries), so that
the same documents give the same shards whatever order, worker count or file layout they came in.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refrag.schemas import arrow
from refrag_core.manifest import LiveDocument, document_key
from refrag_core.work_folder import WorkFolder, open_location

MIN_SHARD_BYTES = 256 << 10
MAX_SHARD_BYTES = 64 << 20
_SHARDS_AIMED_AT = 128
_ROWS_A_BATCH = 4096

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """The unit of work and retry: which documents, and the name that follows from their content."""

    name: str
    """32 hexadecimal characters: digest of the chunk size and the documents' ids and digests."""
    documents: str
    """Location (path or URI) of the Parquet list of documents (schemas.arrow.SCAN_RUN)."""
    chunk_size: int
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents' text."""


@dataclass(slots=True)
class Plan:
    """A build's work, and what becomes of the parent's documents."""

    shards: list[ShardSpec] = field(default_factory=list)
    tombstones: list[str] = field(default_factory=list)
    """Locations of files (schemas.arrow.TOMBSTONES) of the parent's documents that this generation no longer has."""
    new: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    """Documents of the parent that are no longer in the corpus and leave the index."""
    missing: int = 0
    """Documents of the parent that are no longer in the corpus and stay in the index."""
    held: list[str] = field(default_factory=list)
    """Locations of files (schemas.arrow.QUARANTINE) of scanned documents that stay quarantined: they failed in a
    stage before and have not changed."""
    duplicates: list[str] = field(default_factory=list)
    """Locations of files (schemas.arrow.QUARANTINE) of the records whose id an earlier one has, ordered by id."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Duplicates by reason."""


def default_shard_bytes(corpus_bytes: int) -> int:
    """Target text bytes of a shard: a power of two, so that a growing corpus rarely moves boundaries."""
    aimed = max(MIN_SHARD_BYTES, min(MAX_SHARD_BYTES, corpus_bytes // _SHARDS_AIMED_AT))
    return 1 << (aimed.bit_length() - 1)


def ends_shard(document_id: str, num_bytes: int, filled: int, target_shard_bytes: int) -> bool:
    """Whether a shard of `filled` bytes ends with this document, decided by its id and the sizes alone.

    From half the target on, each document ends the shard with a chance of its bytes over half the target,
    drawn from its id; so cuts fall into step again soon after an insertion. Twice the target ends any shard.
    """
    half = target_shard_bytes // 2
    if filled < half:
        return False
    draw = int.from_bytes(hashlib.blake2b(document_key(document_id), digest_size=8).digest(), "big") / 2**64
    return filled >= 2 * target_shard_bytes or draw * half < num_bytes


class ShardName:
    """The name of a shard's input: a digest of its chunk size and its documents' ids and source digests, in order."""

    def __init__(self, chunk_size: int) -> None:
        self._hasher = hashlib.sha256(chunk_size.to_bytes(4, "little"))

    def add(self, document_id: str, source_digest: bytes) -> None:
        """Take in the next document."""
        key = document_key(document_id)
        self._hasher.update(len(key).to_bytes(8, "little") + key + source_digest)

    def __str__(self) -> str:
        return self._hasher.hexdigest()[:32]


class _ShardWriter:
    """Cuts one stream of rows, all of one chunk size, into shards and writes their lists of documents."""

    def __init__(self, work: WorkFolder, chunk_size: int, target_shard_bytes: int) -> None:
        self._work = work
        self._chunk_size = chunk_size
        self._target = target_shard_bytes
        self._rows: list[Row] = []
        self._opened = ExitStack()
        self._open()

    def _open(self) -> None:
        self._name = ShardName(self._chunk_size)
        self._count = self._bytes = 0
        self._path: Path | None = None
        self._writer: pq.ParquetWriter | None = None

    def _flush(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._path = self._opened.enter_context(self._work.temporary("shard"))
            writer = pq.ParquetWriter(self._path, arrow.SCAN_RUN, compression="zstd")
            self._writer = self._opened.enter_context(writer)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=arrow.SCAN_RUN))
        self._rows = []
        return self._writer

    def add(self, row: Row) -> ShardSpec | None:
        """Take one row; the finished shard when this row ends one."""
        self._name.add(row["document_id"], row["source_digest"])
        self._rows.append(row)
        self._count += 1
        self._bytes += row["num_bytes"]
        if len(self._rows) >= _ROWS_A_BATCH:
            self._flush()
        if ends_shard(row["document_id"], row["num_bytes"], self._bytes, self._target):
            return self.close()
        return None

    def close(self) -> ShardSpec | None:
        """Finish the open shard; None when it has no rows."""
        if self._count == 0:
            return None
        self._flush().close()
        assert self._path is not None
        name = str(self._name)
        location = self._work.publish(self._path, prefix=name, suffix=".parquet")
        spec = ShardSpec(name, location, self._chunk_size, self._count, self._bytes)
        self.discard()
        self._open()
        return spec

    def discard(self) -> None:
        """Remove what was not finished."""
        self._opened.close()


def cut_shards(rows: Iterable[Row], work: WorkFolder, target_shard_bytes: int) -> Iterator[ShardSpec]:
    """Shards over `rows` (ordered by document id), one stream of shards for each chunk size.

    Publishes each shard's list of documents in `work`.
    """
    writers: dict[int, _ShardWriter] = {}
    try:
        for row in rows:
            chunk_size = row["chunk_size"]
            if chunk_size not in writers:
                writers[chunk_size] = _ShardWriter(work, chunk_size, target_shard_bytes)
            if spec := writers[chunk_size].add(row):
                yield spec
        for chunk_size in sorted(writers):
            if spec := writers[chunk_size].close():
                yield spec
    finally:
        for writer in writers.values():
            writer.discard()


def _same(row: Row, live: LiveDocument) -> bool:
    return bool(row["source_digest"] == live.source_digest and row["chunk_size"] == live.chunk_size)


def _joined(rows: Iterable[Row], parent: Iterator[LiveDocument]) -> Iterator[tuple[Row | None, LiveDocument | None]]:
    """Full outer join of two streams ordered by document id."""
    live = next(parent, None)
    for row in rows:
        key = document_key(row["document_id"])
        while live is not None and document_key(live.document_id) < key:
            yield None, live
            live = next(parent, None)
        if live is not None and live.document_id == row["document_id"]:
            yield row, live
            live = next(parent, None)
        else:
            yield row, None
    while live is not None:
        yield None, live
        live = next(parent, None)


@dataclass(slots=True)
class Join:
    """The scan joined with the parent generation: what each document is, counted, and what comes of it.

    Args:
        delete_missing: whether documents that the corpus no longer has leave the index.
        held: source digest of each document that a stage has quarantined before.
        anew: take nothing over from the parent; its documents only tell which ones the corpus no longer has.
        retire: told of each document of the parent that this generation no longer has.
        hold: told of each scanned document that stays quarantined.
    """

    retire: Callable[[LiveDocument], None]
    hold: Callable[[Row], None]
    delete_missing: bool = False
    held: Mapping[str, bytes] = field(default_factory=dict)
    anew: bool = False
    new: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: int = 0
    missing: int = 0

    def to_build(self, rows: Iterable[Row], parent: Iterator[LiveDocument]) -> Iterator[Row]:
        """The new and changed documents of `rows`; both streams are unique and ordered by id."""
        for row, live in _joined(rows, parent):
            if row is None:
                assert live is not None
                self._leave(live)
            elif self.anew:
                yield row
                self.new += 1
            elif live is not None and _same(row, live):
                self.unchanged += 1
            elif self.held.get(row["document_id"]) == row["source_digest"]:
                self.hold(row)
            else:
                yield row
                self.new += live is None
                self.changed += live is not None
                if live is not None:
                    self.retire(live)

    def _leave(self, live: LiveDocument) -> None:
        if self.delete_missing:
            self.deleted += 1
            if not self.anew:
                self.retire(live)
        else:
            self.missing += 1


def without(spec: ShardSpec, document_ids: frozenset[str], work: WorkFolder) -> Iterator[ShardSpec]:
    """The same shard without some documents, under the name that follows from the rest."""
    rows = (row for row in read_specified(spec) if row["document_id"] not in document_ids)
    yield from cut_shards(rows, work, 1 << 62)


def read_specified(spec: ShardSpec) -> list[Row]:
    """The rows (schemas.arrow.SCAN_RUN) of the documents that a shard is to have, in order.

    Raises StageError where this machine does not reach the list.
    """
    with open_location(spec.documents) as file:
        return list(file.read().to_pylist())
