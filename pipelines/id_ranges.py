"""The plan in ranges of document ids, each planned by a worker, so that no process sees all documents.

A worker merges what the sorted runs hold of its range, resolves duplicates, joins with the parent's documents and
writes down what is to be built. Where shards end depends on the documents before, back to the last shard's end: so
a range's shards cannot be cut by itself. But cuts that start anywhere soon fall on the same documents as all others
(`plan.ends_shard`); each range is read until they do, which tells where its first shard starts, and the stretches
from one such start to the next are then cut independently. Names and boundaries are those of one pass over all.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refrag.pipelines import assembly
from refrag.pipelines.plan import Join, Plan, Row, ShardSpec, cut_shards, ends_shard
from refrag.pipelines.scan import (
    DUPLICATE_RAW_BYTES,
    FAN_IN,
    IdRange,
    RejectWriter,
    SortedRun,
    merge_runs,
    resolve_duplicates,
    write_run,
)
from refrag.schemas import arrow
from refrag_core.corpus.document import ScanRow
from refrag_core.corpus.readers import read_raw
from refrag_core.manifest import LiveDocument, Manifest, live_documents
from refrag_core.storage import Store
from refrag_core.work_folder import WorkFolder, open_location

RANGE_ROWS = 1 << 18
"""Scanned records a range."""

_ROWS_A_GROUP = 1 << 12

COUNTS = ("new", "changed", "unchanged", "deleted", "missing")
"""What a plan counts of its documents."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""An engine's `map`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What decides a plan, apart from the documents.

    Args:
        target_shard_bytes: text bytes a shard.
        delete_missing: whether documents that the corpus no longer has leave the index.
        retry_quarantined: try documents again that a stage has quarantined before.
        anew: take nothing over from the parent; its documents only tell which ones the corpus no longer has.
        keep_duplicates: keep the bytes of records with an id that an earlier one has, beside their rejects.
    """

    target_shard_bytes: int
    delete_missing: bool = False
    retry_quarantined: bool = False
    anew: bool = False
    keep_duplicates: bool = True


@dataclass(frozen=True, slots=True)
class RangeTask:
    """One range of ids with all that may hold documents of it.

    Args:
        number: place among the ranges; it names files.
        parent: the parent generation with only those shards.
        alone: this range is all there is.
    """

    number: int
    ids: IdRange
    runs: tuple[SortedRun, ...]
    parent: Manifest | None
    alone: bool


@dataclass(frozen=True, slots=True)
class Part:
    """The documents of one range that are to be built with one chunk size, in order.

    Args:
        open_bytes: text bytes behind the last cut, when cutting starts with the range's first document.
    """

    location: str
    rows: int
    open_bytes: int


@dataclass(frozen=True, slots=True)
class RangeReceipt:
    """What the plan of one range found; counts as in Plan. Files are locations, None where they would be empty."""

    counts: Mapping[str, int]
    reasons: Mapping[str, int]
    duplicates: str | None
    duplicate_raw_bytes: int
    held: str | None
    tombstones: str | None
    parts: Mapping[int, Part] = field(default_factory=dict)
    """By chunk size; none of a range that is alone."""
    shards: tuple[ShardSpec, ...] = ()
    """Of a range that is alone."""


def make_plan(
    runs: Sequence[SortedRun],
    *,
    store: Store,
    parent: Manifest | None,
    options: PlanOptions,
    work: WorkFolder,
    map_ranges: Map,
    range_rows: int = RANGE_ROWS,
    on_range: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Join the scan with the parent generation and cut the new and changed documents into shards.

    Args:
        runs: the scan's.
        parent: the generation to compare with; None for a first build.
        work: folder of this run that every worker reaches.
        map_ranges: an engine's `map`.
        range_rows: records a range; the plan does not depend on it.
        on_range: told of the documents that are planned, range by range.
    """
    work.make()
    ranges = split_ids(runs, max(1, -(-sum(run.rows for run in runs) // range_rows)))
    runs = _fewer_runs(runs, ranges, work, map_ranges)
    tasks = _tasks(ranges, runs, parent)
    receipts: list[RangeReceipt] = []
    for receipt in map_ranges(partial(plan_range, store=store, options=options, work=work), tasks):
        receipts.append(receipt)
        on_range(sum(receipt.counts.values()))
    plan = _total(receipts)
    plan.duplicates = _within_budget(receipts, work)
    plan.shards += [spec for receipt in receipts for spec in receipt.shards]
    for chunk_size in sorted({size for receipt in receipts for size in receipt.parts}):
        parts = [receipt.parts[chunk_size] for receipt in receipts if chunk_size in receipt.parts]
        stretches = list(_stretches(parts, options.target_shard_bytes, map_ranges))
        cut = partial(cut_stretch, work=work, target_shard_bytes=options.target_shard_bytes)
        plan.shards += [spec for specs in map_ranges(cut, stretches) for spec in specs]
    return plan


def split_ids(runs: Sequence[SortedRun], count: int) -> list[IdRange]:
    """At most `count` ranges of about as many records each, which together hold every id."""
    marks = sorted(mark for run in runs for mark in run.marks)
    chosen = sorted({marks[at * len(marks) // count] for at in range(1, count)}) if marks else []
    bounds = [None, *chosen, None]
    return [IdRange(start, stop) for start, stop in pairwise(bounds)]


def _meeting(ids: IdRange, runs: Iterable[SortedRun]) -> tuple[SortedRun, ...]:
    return tuple(_bounds(run) for run in runs if ids.meets(run.marks[0], run.marks[-1]))


def _fewer_runs(
    runs: Sequence[SortedRun], ranges: Sequence[IdRange], work: WorkFolder, map_ranges: Map
) -> Sequence[SortedRun]:
    """Merge runs by groups, in workers, until no range has to open more than are merged at once.

    Groups are as many as may be open, so that one round with all workers at it does for 65,536 runs.
    """
    while len(ranges) > 1 and _most_open(ranges, runs) > FAN_IN:
        size = min(FAN_IN, -(-len(runs) // FAN_IN))
        groups = [tuple(map(_bounds, runs[at : at + size])) for at in range(0, len(runs), size)]
        runs = list(map_ranges(partial(_merge_group, work=work), groups))
    return runs


def _most_open(ranges: Sequence[IdRange], runs: Sequence[SortedRun]) -> int:
    """How many runs meet the range that most of them meet."""
    firsts, lasts = (sorted(run.marks[at] for run in runs) for at in (0, -1))
    starting = (len(runs) if ids.stop is None else bisect_left(firsts, ids.stop) for ids in ranges)
    ended = (0 if ids.start is None else bisect_left(lasts, ids.start) for ids in ranges)
    return max(before - behind for before, behind in zip(starting, ended, strict=True))


def _bounds(run: SortedRun) -> SortedRun:
    """A run as it travels: workers need no more of its ids than the first and the last."""
    return replace(run, marks=(run.marks[0], run.marks[-1]))


def _merge_group(runs: tuple[SortedRun, ...], *, work: WorkFolder) -> SortedRun:
    work.check()
    return write_run(merge_runs(runs, work=work), work, "merged")


def _tasks(ranges: Sequence[IdRange], runs: Sequence[SortedRun], parent: Manifest | None) -> Iterator[RangeTask]:
    for number, ids in enumerate(ranges):
        yield RangeTask(number, ids, _meeting(ids, runs), _parent_within(parent, ids), len(ranges) == 1)


def _parent_within(parent: Manifest | None, ids: IdRange) -> Manifest | None:
    """The parent as far as a range looks at it: it travels to a worker."""
    if parent is None:
        return None
    shards = [shard for shard in parent.shards if ids.meets(shard.first_document, shard.last_document)]
    return replace(parent, shards=shards, segments=[], files={}, lance=None)


def _total(receipts: Sequence[RangeReceipt]) -> Plan:
    counts, reasons = Counter[str](), Counter[str]()
    for receipt in receipts:
        counts.update(receipt.counts)
        reasons.update(receipt.reasons)
    tombstones = [receipt.tombstones for receipt in receipts if receipt.tombstones]
    held = [receipt.held for receipt in receipts if receipt.held]
    plan = Plan(tombstones=tombstones, held=held, reasons=reasons)
    for name in COUNTS:
        setattr(plan, name, counts[name])
    return plan


def _within_budget(receipts: Sequence[RangeReceipt], work: WorkFolder) -> list[str]:
    """The duplicates of all ranges; where they keep more bytes than one scan may, later ones without theirs."""
    parts = [receipt.duplicates for receipt in receipts if receipt.duplicates is not None]
    if sum(receipt.duplicate_raw_bytes for receipt in receipts) <= DUPLICATE_RAW_BYTES:
        return parts
    left = DUPLICATE_RAW_BYTES
    with RejectWriter(work, "duplicates") as kept:
        for row in assembly.reject_rows(parts):
            kept.add_row(row if left > 0 else row | {"raw": b""})
            left -= len(row["raw"])
        location = kept.close()
    return [location] if location is not None else []


# --- one range --------------------------------------------------------------------------------------


class _Tombstones:
    """Collects the parent's documents that leave, and publishes their places."""

    def __init__(self, work: WorkFolder, prefix: str) -> None:
        self._work, self._prefix = work, prefix
        self._rows: list[dict[str, Any]] = []

    def add(self, live: LiveDocument) -> None:
        """Take one document."""
        place = {"first_passage": live.first_passage, "num_passages": live.num_passages}
        self._rows.append({"shard": live.shard, "document": live.row} | place)

    def close(self) -> str | None:
        """The file's location, None where there are none."""
        if not self._rows:
            return None
        with self._work.temporary("tombstones") as path:
            pq.write_table(pa.Table.from_pylist(self._rows, schema=arrow.TOMBSTONES), path, compression="zstd")
            return self._work.publish(path, prefix=self._prefix, suffix=".tombstones.parquet")


class _PartWriter:
    """Writes rows of one chunk size as they come, and keeps track of how far the last shard would be filled."""

    def __init__(self, work: WorkFolder, prefix: str, target_shard_bytes: int) -> None:
        self._work, self._prefix, self._target = work, prefix, target_shard_bytes
        self._opened = ExitStack()
        self._rows: list[Row] = []
        self._count = self._filled = 0
        self._path: Path = self._opened.enter_context(work.temporary("part"))
        self._writer = self._opened.enter_context(pq.ParquetWriter(self._path, arrow.SCAN_RUN, compression="zstd"))

    def add(self, row: Row) -> None:
        """Take the next row."""
        self._rows.append(row)
        self._count += 1
        self._filled += row["num_bytes"]
        if ends_shard(row["document_id"], row["num_bytes"], self._filled, self._target):
            self._filled = 0
        if len(self._rows) == _ROWS_A_GROUP:
            self._flush()

    def close(self) -> Part:
        """Publish."""
        self._flush()
        self._writer.close()
        location = self._work.publish(self._path, prefix=self._prefix, suffix=".part.parquet")
        return Part(location, self._count, self._filled)

    def discard(self) -> None:
        """Remove what was not published."""
        self._opened.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=arrow.SCAN_RUN))
            self._rows = []


def plan_range(task: RangeTask, *, store: Store, options: PlanOptions, work: WorkFolder) -> RangeReceipt:
    """Plan the documents of one range; equal tasks give equal files. Raises StageError where `work` is not seen."""
    work.check()
    prefix = f"range-{task.number:06d}"
    parent = _live_within(store, task.parent, task.ids)
    held = {} if options.retry_quarantined or options.anew else _held_within(store, task.parent, task.ids)
    tombstones = _Tombstones(work, prefix)
    with RejectWriter(work, prefix) as duplicates, RejectWriter(work, f"{prefix}-held") as keeping:
        join = Join(
            retire=tombstones.add,
            hold=lambda row: keeping.add_row(held[row["document_id"]]),
            delete_missing=options.delete_missing,
            held={document_id: row["source_digest"] for document_id, row in held.items()},
            anew=options.anew,
        )
        merged = merge_runs(task.runs, work=work, ids=task.ids)
        unique = resolve_duplicates(merged, duplicates.add, read_raw if options.keep_duplicates else _nothing)
        made = _write(join.to_build(unique, parent), task, work, prefix, options.target_shard_bytes)
        return RangeReceipt(
            counts={name: getattr(join, name) for name in COUNTS},
            reasons=dict(duplicates.reasons),
            duplicates=duplicates.close(),
            duplicate_raw_bytes=duplicates.raw_bytes,
            held=keeping.close(),
            tombstones=tombstones.close(),
            **made,
        )


def _nothing(_: ScanRow) -> bytes:
    return b""


def _live_within(store: Store, parent: Manifest | None, ids: IdRange) -> Iterator[LiveDocument]:
    if parent is not None:
        yield from (live for live in live_documents(store, parent) if ids.holds(live.document_id))


def _held_within(store: Store, parent: Manifest | None, ids: IdRange) -> dict[str, dict[str, Any]]:
    """Quarantine rows of the documents that a stage has quarantined before, by id."""
    rows = assembly.stage_rejects(store, parent) if parent is not None else ()
    return {row["document_id"]: row for row in rows if ids.holds(row["document_id"])}


def _write(
    rows: Iterable[Row], task: RangeTask, work: WorkFolder, prefix: str, target_shard_bytes: int
) -> dict[str, Any]:
    """The range's documents to build: shards where nothing comes before or behind, else parts to cut them from."""
    if task.alone:
        specs = cut_shards(rows, work, target_shard_bytes)
        return {"shards": tuple(sorted(specs, key=lambda spec: spec.chunk_size))}
    writers: dict[int, _PartWriter] = {}
    try:
        for row in rows:
            size = row["chunk_size"]
            if size not in writers:
                writers[size] = _PartWriter(work, f"{prefix}-{size}", target_shard_bytes)
            writers[size].add(row)
        return {"parts": {size: writer.close() for size, writer in writers.items()}}
    finally:
        for writer in writers.values():
            writer.discard()


# --- from parts to shards -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where shards start in one part.

    Args:
        first_cut: rows of the part that belong to the shard that was open before it; None when all of them do.
        open_bytes: text bytes of the shard that is open behind it.
    """

    first_cut: int | None
    open_bytes: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows `[start, stop)` of a part."""

    location: str
    start: int
    stop: int


def align(task: tuple[Part, int], *, target_shard_bytes: int) -> Alignment:
    """Follow the cuts into a part until they fall where they would if the part began a shard.

    Args:
        task: the part, and the text bytes of the shard that is open before it.
    """
    part, filled = task
    if filled == 0:
        return Alignment(0, part.open_bytes)
    first_cut, alone = None, 0
    for at, (document_id, size) in enumerate(_sizes(part), start=1):
        filled, alone = filled + size, alone + size
        ends = ends_shard(document_id, size, filled, target_shard_bytes)
        if ends_shard(document_id, size, alone, target_shard_bytes):
            alone = 0
        if ends:
            filled = 0
            first_cut = at if first_cut is None else first_cut
            if alone == 0:
                return Alignment(first_cut, part.open_bytes)
    return Alignment(first_cut, filled)


def _sizes(part: Part) -> Iterator[tuple[str, int]]:
    with open_location(part.location) as file:
        for batch in file.iter_batches(batch_size=_ROWS_A_GROUP, columns=["document_id", "num_bytes"]):
            yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)


def _stretches(parts: Sequence[Part], target_shard_bytes: int, map_ranges: Map) -> Iterator[tuple[Slice, ...]]:
    """All rows of the parts, in pieces that start where a shard does."""
    follow = partial(align, target_shard_bytes=target_shard_bytes)
    supposed = [0, *(part.open_bytes for part in parts[:-1])]  # true wherever the part before fell into step
    stretch: list[Slice] = []
    open_bytes = 0
    tasks = list(zip(parts, supposed, strict=True))
    for (part, before), found in zip(tasks, map_ranges(follow, tasks), strict=True):
        alignment = found if before == open_bytes else follow((part, open_bytes))
        open_bytes = alignment.open_bytes
        first = part.rows if alignment.first_cut is None else alignment.first_cut
        stretch.append(Slice(part.location, 0, first))
        if alignment.first_cut is not None:
            if any(piece.stop > piece.start for piece in stretch):
                yield tuple(stretch)
            stretch = [Slice(part.location, first, part.rows)]
    yield tuple(stretch)


def cut_stretch(stretch: tuple[Slice, ...], *, work: WorkFolder, target_shard_bytes: int) -> list[ShardSpec]:
    """The shards of rows that start where a shard does; the last one ends with them."""
    work.check()
    rows = (row for piece in stretch for row in _slice_rows(piece))
    return list(cut_shards(rows, work, target_shard_bytes))


def _slice_rows(piece: Slice) -> Iterator[Row]:
    """Rows of a slice, read from its first row group on."""
    if piece.start >= piece.stop:
        return
    with open_location(piece.location) as file:
        first = piece.start // _ROWS_A_GROUP
        groups = list(range(first, -(-piece.stop // _ROWS_A_GROUP)))
        batches = file.iter_batches(batch_size=_ROWS_A_GROUP, row_groups=groups, use_threads=False)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from islice(rows, piece.start - first * _ROWS_A_GROUP, piece.stop - first * _ROWS_A_GROUP)
