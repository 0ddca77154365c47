"""The index stage: passage embeddings of all shards → FAISS segments, and their measured recall."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refrag.pipelines.engines import Engine
from refrag.pipelines.progress import Progress
from refrag_core.corpus.filesystem import open_binary
from refrag_core.digests import digest_json
from refrag_core.errors import RecallGateError
from refrag_core.manifest import Manifest, Segment, Shard, VectorIndexInfo
from refrag_core.parts import part
from refrag_core.storage import FileRecord, Store
from refrag_core.tables import MappedColumn, open_table
from refrag_core.vector_index import (
    RECALL_DEPTH,
    RECALL_TARGET,
    IndexSpec,
    SearchResult,
    VectorIndex,
    build_segment,
    choose_index,
    core_share,
    exact_search,
    join_queries,
    merge_segments,
    nprobe_values,
    recall_of,
    sample_rows,
    train_quantizer,
    training_size,
)
from refrag_core.work_folder import WorkFolder, remove_location

SEGMENT_ROWS = 1 << 20
GATE_QUERIES = 200
_RETRAIN_FACTOR = 4
_CHEAP_SHARE = 64  # lists over those that the first round visits: so few cost next to nothing
_FIRST_NPROBES = 4  # of the first round at least: a round costs some engines seconds
_NPROBES_A_ROUND = 2  # then: the second takes as long as all that went before, so that no more can be for nothing
_SEARCHED_ROWS = 1 << 16  # for each part of the queries that a worker of its own searches a segment for
_SEARCHES = 32  # side by side at most, unless there are more segments
_COMPARED_ROWS = 1 << 17  # with the queries, one by one, in one worker
_SENTENCE = re.compile(r"[^.!?。！？\n]{20,400}[.!?。！？]?")

Live = Mapping[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """Segments of a generation, their files, and what the gate measured."""

    segments: Sequence[Segment]
    info: VectorIndexInfo
    files: Sequence[FileRecord]


def vectors_of(store: Store, shard: Shard, dim: int) -> MappedColumn:
    """A shard's passage embeddings, float16 `[passages, dim]`, mapped."""
    return MappedColumn(store.path(shard.tables["vectors"]), "vector", "<f2", dim)


def _blocks(store: Store, shards: Sequence[Shard], dim: int) -> Iterator[npt.NDArray[np.float16]]:
    for shard in shards:
        yield from vectors_of(store, shard, dim).blocks()


Sampled = list[tuple[Shard, npt.NDArray[np.int64]]]
"""Shards with the rows that are wanted of each."""


def _sample_part(picked: Sampled, *, store: Store, dim: int, work: WorkFolder) -> str:
    """Write the chosen vectors of some shards to a file of this run, float16 `[n, dim]`; its location."""
    work.check()
    parts = [vectors_of(store, shard, dim).take(rows) for shard, rows in picked]
    with work.temporary("sample") as path:
        with path.open("wb") as stream:
            np.save(stream, np.concatenate(parts), allow_pickle=False)
        return work.publish(path, prefix="sample", suffix=".npy")


def _sample(engine: Engine, store: Store, shards: Sequence[Shard], spec: IndexSpec, work: WorkFolder) -> list[str]:
    """Files of the training sample, in order: rows spread evenly over all passages, gathered where workers are."""
    work.make()
    picked = sample_rows([shard.passages for shard in shards], max(1, training_size(spec)))
    wanted = {shard.name: rows for shard, rows in zip(shards, picked, strict=True) if len(rows)}
    groups = [[(s, wanted[s.name]) for s in group if s.name in wanted] for group in _groups(shards, SEGMENT_ROWS)]
    gather = partial(_sample_part, store=store, dim=spec.dim, work=work)
    return list(engine.map(gather, [group for group in groups if group]))


def _train_quantizer(files: Sequence[str], *, store: Store, spec: IndexSpec, name: str) -> FileRecord:
    """Train on the sample and publish what was learnt."""
    parts = []
    for location in files:
        with open_binary(location) as stream:
            parts.append(np.load(stream, allow_pickle=False).astype(np.float32))
    data = train_quantizer(np.concatenate(parts), spec)
    return store.publish(name, lambda path: _write(path, data))


def _quantizer(engine: Engine, store: Store, shards: Sequence[Shard], spec: IndexSpec, work: WorkFolder) -> FileRecord:
    """Train once, in a worker, on a sample that is spread evenly over all passages; the name follows from its input."""
    key = digest_json(["quantizer/2", spec.kind, spec.dim, spec.nlist, [shard.tables["vectors"] for shard in shards]])
    name = f"segments/quantizer-{key[:32]}.faiss"
    files = _sample(engine, store, shards, spec, work)
    (record,) = engine.map(partial(_train_quantizer, store=store, spec=spec, name=name), [files])
    for location in files:
        remove_location(location)
    return record


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _groups(shards: Sequence[Shard], most: int) -> Iterator[list[Shard]]:
    """Neighbours with up to `most` passages together, or one with more."""
    group: list[Shard] = []
    for shard in shards:
        if group and sum(s.passages for s in group) + shard.passages > most:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def _segments(
    engine: Engine, store: Store, quantizer: str, dim: int, shards: Sequence[Shard]
) -> list[tuple[Segment, FileRecord]]:
    """Build the segments over these shards, a worker each."""
    groups = list(_groups(shards, SEGMENT_ROWS))
    return list(engine.map(partial(_segment, store, quantizer, dim, beside=len(groups)), groups))


def _segment(
    store: Store, quantizer: str, dim: int, shards: list[Shard], *, beside: int = 1
) -> tuple[Segment, FileRecord]:
    """Build one segment of `beside`; the name follows from the quantizer and the shards' embeddings."""
    key = digest_json(["segment/1", quantizer, [shard.tables["vectors"] for shard in shards]])
    trained = store.path(quantizer).read_bytes()

    def write(path: Path) -> None:
        with core_share(beside):
            build_segment(trained, _blocks(store, shards, dim), path)

    record = store.publish(f"segments/{key[:32]}.faiss", write)
    return Segment(record.name, [s.name for s in shards], sum(s.passages for s in shards)), record


def _unchanged(parent: Manifest, shards: Sequence[Shard], live: Live) -> bool:
    """Whether the parent's segments cover exactly these shards, with as many dead passages as now."""
    same = [s.tables["vectors"] for s in shards] == [s.tables["vectors"] for s in parent.shards]
    covered = sum(segment.rows for segment in parent.segments) == sum(shard.passages for shard in shards)
    dead = sum(int((~mask).sum()) for mask in live.values())
    return same and covered and dead == sum(info.passages for info in (parent.tombstones, parent.duplicates) if info)


def _kept(parent: Manifest | None, spec: IndexSpec, shards: Sequence[Shard]) -> list[Segment]:
    """The parent's segments whose shards are all there, when its quantizer still fits: same kind, list count within 4x.

    A segment without one of its shards cannot be searched: what is left of it goes into a new one.
    """
    if parent is None:
        return []
    info, present = parent.vector_index, {shard.name for shard in shards}
    fits = info.kind == spec.kind and info.nlist * _RETRAIN_FACTOR >= spec.nlist
    whole = [segment for segment in parent.segments if all(name in present for name in segment.shards)]
    return whole if fits else []


def build_vector_index(
    store: Store,
    engine: Engine,
    shards: Sequence[Shard],
    *,
    dim: int,
    live: Live,
    retriever: Any,
    parent: Manifest | None,
    min_recall: float,
    memory_budget_bytes: int | None,
    progress: Progress,
    work: WorkFolder,
    dead: Collection[str] = (),
) -> BuiltIndex:
    """Segments over all shards; those of the parent are kept while recall stays above the gate.

    Training anew leaves out shards that are all dead, which a kept segment has to go on covering.

    Args:
        dim: d_ret.
        live: per shard name a bool `[passages]`, for shards with removed passages.
        retriever: embeds the held-out queries (sentences of sampled passages).
        min_recall: recall@10 under which nothing is published.
        dead: names of the shards without a live document.
        work: folder of this run that every worker reaches.
        memory_budget_bytes: above this, inverted lists hold 8-bit codes instead of float16; None is no bound.

    Raises RecallGateError when even freshly trained segments stay below `min_recall`.
    """
    if parent is not None and _unchanged(parent, shards, live) and parent.vector_index.recall_at_10 >= min_recall:
        names = [parent.vector_index.quantizer, *(segment.file for segment in parent.segments)]
        return BuiltIndex(parent.segments, parent.vector_index, [parent.files[name] for name in names])
    spec = choose_index(sum(shard.passages for shard in shards), dim, memory_budget_bytes)
    kept = _kept(parent, spec, shards)
    with part("queries"):
        queries = _held_out_queries(engine, store, shards, live, retriever)
    if kept and parent is not None:
        built = _extend(store, engine, shards, kept, parent, dim=dim, live=live, queries=queries)
        if built.info.recall_at_10 >= min_recall:
            return built
        progress.note(f"recall@10 fell to {built.info.recall_at_10:.3f}: training the index anew")
    alive = [shard for shard in shards if shard.name not in dead]
    built = _train(store, engine, alive, spec, live=live, queries=queries, work=work)
    if built.info.recall_at_10 < min_recall:
        raise RecallGateError(
            f"recall@10 is {built.info.recall_at_10:.3f} on {len(queries)} held-out queries, expected at least "
            f"{min_recall}: nothing was published; lower --min-recall if that is good enough"
        )
    return built


def _train(
    store: Store,
    engine: Engine,
    shards: Sequence[Shard],
    spec: IndexSpec,
    *,
    live: Live,
    queries: npt.NDArray[np.float32],
    work: WorkFolder,
) -> BuiltIndex:
    with part("train"):
        quantizer = _quantizer(engine, store, shards, spec, work)
    with part("segments"):
        made = _segments(engine, store, quantizer.name, spec.dim, shards)
    segments, files = [segment for segment, _ in made], [quantizer, *(record for _, record in made)]
    return _measured(engine, store, shards, segments, files, spec.kind, spec.nlist, spec.dim, live, queries)


def _extend(
    store: Store,
    engine: Engine,
    shards: Sequence[Shard],
    kept: Sequence[Segment],
    parent: Manifest,
    *,
    dim: int,
    live: Live,
    queries: npt.NDArray[np.float32],
) -> BuiltIndex:
    info = parent.vector_index
    covered = {name for segment in kept for name in segment.shards}
    added = [shard for shard in shards if shard.name not in covered]
    with part("segments"):
        made = _segments(engine, store, info.quantizer, dim, added)
    segments = [*kept, *(segment for segment, _ in made)]
    old = [parent.files[name] for name in (info.quantizer, *(segment.file for segment in kept))]
    files = [*old, *(record for _, record in made)]
    return _measured(engine, store, shards, segments, files, info.kind, info.nlist, dim, live, queries)


def _measured(
    engine: Engine,
    store: Store,
    shards: Sequence[Shard],
    segments: Sequence[Segment],
    files: Sequence[FileRecord],
    kind: str,
    nlist: int,
    dim: int,
    live: Live,
    queries: npt.NDArray[np.float32],
) -> BuiltIndex:
    """Tune nprobe on the held-out queries against exact search over the stored embeddings."""
    by_name = {shard.name: shard for shard in shards}
    masks = live_by_segment(segments, by_name, live)
    searched = [
        SearchedSegment(segment.file, tuple(by_name[name] for name in segment.shards), dim, mask)
        for segment, mask in zip(segments, masks, strict=True)
    ]
    with part("recall"):
        nprobe, recall = _tune(engine, store, searched, queries, nlist)
    info = VectorIndexInfo(
        kind=kind,
        nlist=nlist,
        nprobe=nprobe,
        quantizer=files[0].name,
        recall_at_10=round(recall, 4),
        queries=len(queries),
    )
    return BuiltIndex(segments, info, files)


@dataclass(frozen=True, slots=True)
class SearchedSegment:
    """One segment for the gate: its file, its shards' embeddings, and which rows are live (None for all).

    Some of a segment's shards, with their rows, stand for it where nothing but these are read.
    """

    file: str
    shards: tuple[Shard, ...]
    dim: int
    live: npt.NDArray[np.bool_] | None


def _tune(
    engine: Engine,
    store: Store,
    segments: Sequence[SearchedSegment],
    queries: npt.NDArray[np.float32],
    nlist: int,
) -> tuple[int, float]:
    """The least nprobe whose recall@10 suffices (else the largest), and that recall.

    Workers search a segment each, or a large one for a part of the queries each, with several nprobes at a time; only
    their best hits come here.
    """
    exact = _true_hits(engine, store, segments, queries)
    searches = [_Search(segment, part) for segment in segments for part in _parts(segment, len(segments), len(queries))]
    nprobe, recall = 1, 0.0
    for nprobes in _rounds(nlist):
        search = partial(_hits, store=store, queries=queries, nprobes=nprobes, beside=len(searches))
        found = _by_segment(searches, engine.map(search, searches))
        for at, nprobe in enumerate(nprobes):
            recall = recall_of(merge_segments((join_queries(hits[at]) for hits in found), RECALL_DEPTH), exact)
            if recall >= RECALL_TARGET:
                return nprobe, recall
    return nprobe, recall


def _rounds(nlist: int) -> Iterator[Sequence[int]]:
    """The values of nprobe to try, in increasing order, as many at a time as a round of the workers takes."""
    values = nprobe_values(nlist)
    first = max(_FIRST_NPROBES, sum(value * _CHEAP_SHARE <= nlist for value in values))
    yield values[:first]
    yield from (values[at : at + _NPROBES_A_ROUND] for at in range(first, len(values), _NPROBES_A_ROUND))


@dataclass(frozen=True, slots=True)
class _Search:
    """A segment, and the queries to search it for."""

    segment: SearchedSegment
    asked: slice


def _parts(segment: SearchedSegment, num_segments: int, num_queries: int) -> Iterator[slice]:
    """The queries, cut so that a few large segments have work for many workers.

    Many segments are as many searches already, and each part has the lists of all queries to choose anew.
    """
    rows = sum(shard.passages for shard in segment.shards)
    parts = max(1, min(rows // _SEARCHED_ROWS, _SEARCHES // num_segments, num_queries))
    bounds = [number * num_queries // parts for number in range(parts + 1)]
    return (slice(first, stop) for first, stop in pairwise(bounds))


def _by_segment(
    searches: Sequence[_Search], found: Iterable[Sequence[SearchResult]]
) -> list[list[tuple[SearchResult, ...]]]:
    """What the searches found: for each segment and each nprobe, the results for the parts of the queries in order."""
    pairs = zip(searches, found, strict=True)
    groups = groupby(pairs, key=lambda pair: pair[0].segment.file)
    return [list(zip(*(hits for _, hits in group), strict=True)) for _, group in groups]


def _true_hits(
    engine: Engine, store: Store, segments: Sequence[SearchedSegment], queries: npt.NDArray[np.float32]
) -> SearchResult:
    """The true best rows of all segments, of which workers compare a piece each."""
    pieces = [(number, *piece) for number, segment in enumerate(segments) for piece in _pieces(segment)]
    exact = partial(_exact_hits, store=store, queries=queries)
    found = merge_segments(engine.map(exact, [piece for _, _, piece in pieces]), RECALL_DEPTH)
    missing, numbers, firsts = found.segments < 0, *(np.array([piece[at] for piece in pieces]) for at in (0, 1))
    return SearchResult(
        scores=found.scores,
        segments=np.where(missing, -1, numbers[found.segments]).astype(np.int32),
        rows=np.where(missing, -1, firsts[found.segments] + found.rows),
    )


def _pieces(segment: SearchedSegment) -> Iterator[tuple[int, SearchedSegment]]:
    """The segment cut between shards, each piece with the number of its first row."""
    first = 0
    for shards in _groups(segment.shards, _COMPARED_ROWS):
        stop = first + sum(shard.passages for shard in shards)
        live = None if segment.live is None else segment.live[first:stop]
        yield first, replace(segment, shards=tuple(shards), live=live)
        first = stop


def _exact_hits(segment: SearchedSegment, *, store: Store, queries: npt.NDArray[np.float32]) -> SearchResult:
    """The true best rows of one segment; its embeddings pass block by block."""
    return exact_search([_blocks(store, segment.shards, segment.dim)], queries, k=RECALL_DEPTH, live=[segment.live])


def _hits(
    search: _Search, *, store: Store, queries: npt.NDArray[np.float32], nprobes: Sequence[int], beside: int
) -> list[SearchResult]:
    """What the index finds in one segment for some of the queries, for each nprobe; `beside` such searches run."""
    segment = search.segment
    index = VectorIndex.open([store.path(segment.file)], nprobe=1)
    with core_share(beside):
        return list(index.search_each(queries, RECALL_DEPTH, nprobes, [segment.live], asked=search.asked))


def live_by_segment(
    segments: Sequence[Segment], shards: Mapping[str, Shard], live: Live
) -> list[npt.NDArray[np.bool_] | None]:
    """For each segment a bool `[rows]` of what is live, or None where all of it is."""
    masks: list[npt.NDArray[np.bool_] | None] = []
    for segment in segments:
        if not any(name in live for name in segment.shards):
            masks.append(None)
            continue
        parts = [live.get(name, np.ones(shards[name].passages, bool)) for name in segment.shards]
        masks.append(np.concatenate(parts))
    return masks


def _held_out_queries(
    engine: Engine, store: Store, shards: Sequence[Shard], live: Live, retriever: Any
) -> npt.NDArray[np.float32]:
    """Sentences from evenly sampled live passages: close to what is asked, and never an indexed vector."""
    picked = sample_rows([shard.passages for shard in shards], GATE_QUERIES)
    chosen: Sampled = []
    for shard, rows in zip(shards, picked, strict=True):
        mask = live.get(shard.name)
        alive = rows if mask is None else rows[mask[rows]]
        if len(alive):
            chosen.append((shard, alive))
    sentences = [sentence for found in engine.map(partial(_sentences, store=store), chosen) for sentence in found]
    return np.asarray(retriever.embed_queries(sentences or ["?"]), np.float32)


def _sentences(sampled: tuple[Shard, npt.NDArray[np.int64]], *, store: Store) -> list[str]:
    """One sentence of each chosen passage of a shard that has one."""
    shard, rows = sampled
    return [sentence for text in _texts(store, shard, rows) if (sentence := middle_sentence(text))]


def _texts(store: Store, shard: Shard, rows: npt.NDArray[np.int64]) -> Iterator[str]:
    """Texts of the passages `rows` (increasing), from the row groups that hold them."""
    with open_table(store.path(shard.tables["passages"])) as file:
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            wanted = rows[(rows >= start) & (rows < stop)] - start
            if len(wanted):
                column = file.read_row_group(group, columns=["text"]).column(0)
                yield from column.take(pa.array(wanted)).to_pylist()
            start = stop


def middle_sentence(text: str) -> str:
    """A sentence from the middle of a passage, or a part of it: never the whole."""
    sentences = _SENTENCE.findall(text)
    chosen = sentences[len(sentences) // 2].strip() if sentences else text[:200].strip()
    return chosen if chosen != text.strip() else chosen[: max(1, len(chosen) * 2 // 3)]


def live_passages(
    shards: Sequence[Shard],
    removed: Mapping[str, Sequence[tuple[int, int, int]]],
    hidden: Mapping[str, npt.NDArray[np.int64]] | None = None,
) -> Live:
    """Per shard with removed documents or hidden duplicates a bool `[passages]`, False for their passages."""
    live: dict[str, npt.NDArray[np.bool_]] = {}
    duplicates = hidden or {}
    for shard in shards:
        if shard.name in removed or shard.name in duplicates:
            mask = np.ones(shard.passages, bool)
            for _, first, count in removed.get(shard.name, ()):
                mask[first : first + count] = False
            mask[duplicates.get(shard.name, [])] = False
            live[shard.name] = mask
    return live


def regroup(
    store: Store, engine: Engine, parent: Manifest, shards: Sequence[Shard]
) -> tuple[list[Segment], list[FileRecord]]:
    """Segments over `shards` from the parent's quantizer, with the records of those that are new.

    Kept are the parent's segments over shards that all stay, unless they are one of several small ones. The same
    lists hold the same live vectors however rows are grouped, so that nprobe and the measured recall stay true.
    """
    present = {shard.name for shard in shards}
    whole = [segment for segment in parent.segments if all(name in present for name in segment.shards)]
    small = [segment for segment in whole if segment.rows < SEGMENT_ROWS // 2]
    mergeable = len(small) > 1 or len(whole) < len(parent.segments)
    kept = [segment for segment in whole if not (mergeable and segment in small)]
    covered = {name for segment in kept for name in segment.shards}
    added = [shard for shard in shards if shard.name not in covered]
    made = _segments(engine, store, parent.vector_index.quantizer, parent.parameters.vector_dim, added)
    return [*kept, *(segment for segment, _ in made)], [record for _, record in made]


def remake_segment(store: Store, manifest: Manifest, segment: Segment) -> None:
    """Build one segment of a committed generation again, from its quantizer and its shards' embeddings."""
    by_name = {shard.name: shard for shard in manifest.shards}
    shards = [by_name[name] for name in segment.shards]
    _segment(store, manifest.vector_index.quantizer, manifest.parameters.vector_dim, shards)
