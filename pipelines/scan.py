"""The scan: every record of the corpus read once, as sorted runs of rows and as rejects with their reasons.

A unit of the corpus becomes Parquet runs sorted by (document id, order); the runs are merged outside of
memory into one stream ordered by document id, in which records of one id are neighbours. A scan always
reads the whole corpus: whether a document has changed is decided by its content, never by file times.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from refrag.schemas import arrow
from refrag_core.chunking import chunk_size_for
from refrag_core.corpus.document import (
    Location,
    Reject,
    RejectReason,
    ScannedDocument,
    ScanRow,
    position_of,
    reject_row,
)
from refrag_core.corpus.readers import read_raw, read_unit
from refrag_core.corpus.sources import CorpusOptions, ScanUnit, scan_units
from refrag_core.corpus.spool import SpoolWriter
from refrag_core.work_folder import WorkFolder, open_location, remove_location

RUN_ROWS = 1 << 15
"""Rows that are sorted in memory; a unit with more gets several runs."""

FAN_IN = 256
"""Runs that are merged at once."""

DUPLICATE_RAW_BYTES = 64 << 20
"""Bytes of duplicates kept beside their rejects in one scan; those beyond are named by position alone."""

_MERGED_ROWS = 1 << 16
"""Rows of all merged runs together that are in memory."""

_REJECT_BYTES = 8 << 20
_REJECT_ROWS = 1024

MARK_ROWS = 1 << 12
"""Every so many rows of a run their id is noted, to cut all runs into ranges of ids."""

MapUnits = Callable[[Callable[[ScanUnit], "ScanReceipt"], Iterable[ScanUnit]], Iterable["ScanReceipt"]]


@dataclass(frozen=True, slots=True)
class IdRange:
    """Document ids from `start` on and below `stop`, by code points; None is no bound."""

    start: str | None = None
    stop: str | None = None

    def holds(self, document_id: str) -> bool:
        """Whether the id lies in this range."""
        return (self.start is None or document_id >= self.start) and (self.stop is None or document_id < self.stop)

    def meets(self, first: str, last: str) -> bool:
        """Whether any id from `first` to `last`, both included, may lie in this range."""
        return (self.start is None or last >= self.start) and (self.stop is None or first < self.stop)


EVERYTHING = IdRange()


@dataclass(frozen=True, slots=True)
class SortedRun:
    """A published Parquet file of schemas.arrow.SCAN_RUN, sorted by (document id, order)."""

    location: str
    rows: int
    marks: tuple[str, ...]
    """The id of the first row and of every 4,096th after it, and that of the last."""


@dataclass(frozen=True, slots=True)
class ScanReceipt:
    """What the scan of one unit found.

    Args:
        unit: the unit's name.
        runs: its rows, sorted; none are empty.
        rejects: location of a file of schemas.arrow.QUARANTINE in scan order; None when nothing was rejected.
        documents_in: records read, rejected ones too.
        reasons: rejected records by reason.
        text_bytes: UTF-8 bytes of the accepted records' text.
        seconds: wall clock.
    """

    unit: str
    runs: tuple[SortedRun, ...]
    rejects: str | None
    documents_in: int
    reasons: Mapping[str, int]
    text_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What the scan of the corpus found; fields as in ScanReceipt.

    Args:
        ignored: files left out, by suffix.
    """

    runs: tuple[SortedRun, ...]
    rejects: tuple[str, ...]
    documents_in: int
    reasons: Mapping[str, int]
    text_bytes: int
    ignored: Mapping[str, int]


def scan_corpus(
    options: CorpusOptions,
    work: WorkFolder,
    *,
    chunk_sizes: Sequence[int],
    default_chunk_size: int,
    map_units: MapUnits = map,
    on_unit: Callable[[ScanReceipt], None] | None = None,
) -> ScanResult:
    """Scan all units of the corpus with `map_units`, which an engine provides.

    Args:
        work: folder of this run that every worker reaches.
        chunk_sizes: what documents with a chunk size field may get, ascending.
        default_chunk_size: chunk size of the other documents.
        on_unit: called as each unit is done.

    Raises CorpusError when the corpus as a whole cannot be read.
    """
    scan = partial(
        scan_unit,
        options=options,
        work=work,
        chunk_sizes=tuple(chunk_sizes),
        default_chunk_size=default_chunk_size,
    )
    work.make()
    ignored: Counter[str] = Counter()
    receipts: list[ScanReceipt] = []
    for receipt in map_units(scan, scan_units(options, ignored=ignored)):
        receipts.append(receipt)
        if on_unit is not None:
            on_unit(receipt)
    return _total(receipts, ignored)


def scan_unit(
    unit: ScanUnit, options: CorpusOptions, *, work: WorkFolder, chunk_sizes: Sequence[int], default_chunk_size: int
) -> ScanReceipt:
    """Read one unit and publish its runs, rejects and spool in `work`; equal units give equal files."""
    started = time.perf_counter()
    work.check()
    with ExitStack() as stack:
        runs = stack.enter_context(_RunWriter(work, unit.name))
        rejects = stack.enter_context(RejectWriter(work, unit.name))
        for record in read_unit(unit, options):
            if isinstance(record, Reject):
                rejects.add(record)
            else:
                runs.add(record, chunk_size_for(record.importance, chunk_sizes, default_chunk_size))
        written, reject_path = runs.close(), rejects.close()
    return ScanReceipt(
        unit=unit.name,
        runs=written,
        rejects=reject_path,
        documents_in=runs.documents + rejects.reasons.total(),
        reasons=dict(sorted(rejects.reasons.items())),
        text_bytes=runs.text_bytes,
        seconds=time.perf_counter() - started,
    )


def _total(receipts: Sequence[ScanReceipt], ignored: Counter[str]) -> ScanResult:
    reasons: Counter[str] = Counter()
    for receipt in receipts:
        reasons.update(receipt.reasons)
    return ScanResult(
        runs=tuple(run for receipt in receipts for run in receipt.runs),
        rejects=tuple(receipt.rejects for receipt in receipts if receipt.rejects is not None),
        documents_in=sum(receipt.documents_in for receipt in receipts),
        reasons=dict(sorted(reasons.items())),
        text_bytes=sum(receipt.text_bytes for receipt in receipts),
        ignored=dict(sorted(ignored.items())),
    )


# --- what a unit writes -----------------------------------------------------------------------------


def _sort_key(row: ScanRow) -> tuple[str, int]:
    """Strings compare by code point, which is the order of their UTF-8 bytes."""
    return row["document_id"], row["order"]


class _RunWriter:
    """Collects rows, spools the records that cannot be sought, and publishes a sorted run when full."""

    def __init__(self, work: WorkFolder, unit: str) -> None:
        self.documents = self.text_bytes = 0
        self._work = work
        self._unit = unit
        self._rows: list[dict[str, Any]] = []
        self._runs: list[SortedRun] = []
        self._spool = SpoolWriter(work)

    def __enter__(self) -> "_RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.discard()

    def add(self, record: ScannedDocument, chunk_size: int) -> None:
        """Take one document; `path` stays empty until its spool has a name."""
        location = record.location or Location("", "spool", *self._spool.add(record.document))
        size = len(record.document.text.encode("utf-8"))
        self._rows.append(
            {
                "document_id": record.document.document_id,
                "source_digest": record.source_digest,
                "chunk_size": chunk_size,
                "num_bytes": size,
                "order": record.order,
                "source": record.document.source,
                "path": location.path,
                "format": location.format,
                "offset": location.offset,
                "length": location.length,
            }
        )
        self.documents += 1
        self.text_bytes += size
        if len(self._rows) == RUN_ROWS:
            self._publish()

    def close(self) -> tuple[SortedRun, ...]:
        """Publish what is left; all runs."""
        self._publish()
        return tuple(self._runs)

    def _publish(self) -> None:
        if not self._rows:
            return
        spool = self._spool.publish(self._unit)
        rows = [row if row["path"] else row | {"path": spool} for row in self._rows]
        self._rows = []
        self._runs.append(write_run(sorted(rows, key=_sort_key), self._work, self._unit))


def write_run(rows: Iterable[ScanRow], work: WorkFolder, prefix: str) -> SortedRun:
    """Publish rows that come sorted."""
    count, marks, last = 0, list[str](), ""
    with work.temporary("run") as temporary:
        stream = iter(rows)
        with pq.ParquetWriter(temporary, arrow.SCAN_RUN, compression="zstd") as writer:
            while batch := list(islice(stream, MARK_ROWS)):
                writer.write_table(pa.Table.from_pylist(batch, schema=arrow.SCAN_RUN))
                count, last = count + len(batch), batch[-1]["document_id"]
                marks.append(batch[0]["document_id"])
        location = work.publish(temporary, prefix=prefix, suffix=".run.parquet")
    return SortedRun(location, count, (*marks, last))


class RejectWriter:
    """Writes rejects as they come, and publishes them together; a context manager that removes what is unfinished."""

    def __init__(self, work: WorkFolder, unit: str) -> None:
        self.reasons: Counter[str] = Counter()
        self.raw_bytes = 0
        self._work = work
        self._unit = unit
        self._rows: list[Mapping[str, Any]] = []
        self._bytes = 0
        self._opened = ExitStack()
        self._temporary: Path | None = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "RejectWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(self, reject: Reject) -> None:
        """Take one reject."""
        self.add_row(reject_row(reject))

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Take one reject as a row of schemas.arrow.QUARANTINE."""
        self.reasons[row["reason"]] += 1
        self._rows.append(row)
        self._bytes += len(row["raw"])
        self.raw_bytes += len(row["raw"])
        if len(self._rows) >= _REJECT_ROWS or self._bytes >= _REJECT_BYTES:
            self._flush()

    def close(self) -> str | None:
        """Publish the rejects; their location, None when there are none."""
        self._flush()
        if self._writer is None or self._temporary is None:
            return None
        self._writer.close()
        return self._work.publish(self._temporary, prefix=self._unit, suffix=".rejects.parquet")

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._temporary = self._opened.enter_context(self._work.temporary("rejects"))
            writer = pq.ParquetWriter(self._temporary, arrow.QUARANTINE, compression="zstd")
            self._writer = self._opened.enter_context(writer)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=arrow.QUARANTINE))
        self._rows, self._bytes = [], 0


# --- one stream from all runs -----------------------------------------------------------------------


def merge_runs(
    runs: Sequence[SortedRun], *, work: WorkFolder, ids: IdRange = EVERYTHING, fan_in: int = FAN_IN
) -> Iterator[ScanRow]:
    """Rows of all runs within `ids` by (document id, order), holding some 65,536 rows of at most `fan_in` runs.

    More runs than `fan_in` are first merged into fewer in `work`; what is made on the way is removed.
    """
    waiting, made = [run for run in runs if ids.meets(run.marks[0], run.marks[-1])], set[SortedRun]()
    while len(waiting) > fan_in:
        group, waiting = waiting[:fan_in], waiting[fan_in:]
        merged = write_run(_merged(group, ids), work, "merged")
        for run in made.intersection(group):
            remove_location(run.location)
        made = made.difference(group) | {merged}
        waiting += [merged] if merged.rows else []
    yield from _merged(waiting, ids)
    for run in made:
        remove_location(run.location)


def _merged(runs: Sequence[SortedRun], ids: IdRange) -> Iterator[ScanRow]:
    rows_a_run = min(1024, max(64, _MERGED_ROWS // max(1, len(runs))))
    return heapq.merge(*(run_rows(run.location, ids, rows_a_run) for run in runs), key=_sort_key)


def run_rows(location: str, ids: IdRange = EVERYTHING, batch_rows: int = 1024) -> Iterator[ScanRow]:
    """The rows of one run within `ids`, in order; of the file only the row groups that may hold any are read."""
    with open_location(location) as run:
        groups = [number for number in range(run.num_row_groups) if _may_hold(run, number, ids)]
        for batch in run.iter_batches(batch_size=batch_rows, row_groups=groups, use_threads=False):
            yield from _within(batch, ids).to_pylist()


def _may_hold(run: pq.ParquetFile, group: int, ids: IdRange) -> bool:
    statistics = run.metadata.row_group(group).column(0).statistics
    known = statistics is not None and statistics.has_min_max  # very long ids have none
    return ids.meets(statistics.min, statistics.max) if known else True


def _within(batch: pa.RecordBatch, ids: IdRange) -> pa.RecordBatch:
    column = batch.column("document_id")
    if ids.start is not None:
        batch = batch.filter(pc.greater_equal(column, ids.start))
    if ids.stop is not None:
        batch = batch.filter(pc.less(batch.column("document_id"), ids.stop))
    return batch


def resolve_duplicates(
    rows: Iterable[ScanRow], reject: Callable[[Reject], None], read: Callable[[ScanRow], bytes] = read_raw
) -> Iterator[ScanRow]:
    """The first record of each id in scan order; its later ones go to `reject`.

    Args:
        rows: ordered by (document id, order).
        read: the bytes of a record with other content, kept with its reject up to 64 MiB in all.
    """
    left = DUPLICATE_RAW_BYTES
    for _, group in groupby(rows, key=lambda row: row["document_id"]):
        records = iter(group)
        first = next(records)
        for row in records:
            same = row["source_digest"] == first["source_digest"]
            raw = b"" if same or left <= 0 else read(row)
            left -= len(raw)
            reject(_duplicate(first, row, raw))
        yield first


def _duplicate(first: ScanRow, row: ScanRow, raw: bytes) -> Reject:
    same = row["source_digest"] == first["source_digest"]
    place = f"{first['source']} at {position_of(first['order'])}"
    return Reject(
        reason=RejectReason.DUPLICATE if same else RejectReason.DUPLICATE_ID,
        detail=f"{'the same document is in' if same else 'another document of this id is in'} {place}",
        source=row["source"],
        position=position_of(row["order"]),
        raw=raw,
        document_id=row["document_id"],
        source_digest=row["source_digest"],
    )
