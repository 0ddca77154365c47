"""An index opened for reading: verified manifest, mapped tables, searchable segments. Writes nothing."""

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, groupby
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refrag_core.embedding_storage import StoredRows
from refrag_core.errors import CorruptIndexError
from refrag_core.lance_tables import LanceReader
from refrag_core.manifest import Manifest, Parameters, Shard, hold_manifest, read_duplicates, read_tombstones
from refrag_core.metadata_columns import MetadataColumns
from refrag_core.predicate import parse_predicate
from refrag_core.storage import FileRecord, IndexLocation, Store, open_store
from refrag_core.tables import MappedColumn, TableFormat, map_embeddings, open_table
from refrag_core.vector_index import SearchResult, VectorIndex, exact_search

EXACT_ROWS = 1_024
EXACT_ONE_IN = 128
"""A filtered search compares all that passes where it is at most so many passages, or so small a part of the index:
then that costs no more than visiting the lists (2 µs a compared passage, 16 ns a listed one)."""

VISITS = 2
"""Lists that a filtered search visits, in those that hold as many passing passages as an unfiltered one compares: what
passes is seldom spread evenly, and the nearest of it lies further off."""

CACHED_FILTERS = 32
"""Filters whose passages are remembered, at one byte a passage each."""

_FETCHED = ("passages", "chunks", "embeddings", "scores")


class PassageRef(NamedTuple):
    """Where a passage is: its shard's position in the manifest and its row there.

    A tuple, since a question makes, hashes and compares dozens of them before its first token.
    """

    shard: int
    row: int


@dataclass(frozen=True, slots=True)
class Passing:
    """The live passages whose documents fulfil a filter."""

    masks: tuple[npt.NDArray[np.bool_], ...]
    """For each segment a read-only bool `[rows]`."""
    rows: int
    """How many they are."""
    stand_ins: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((2, 0), np.int64))
    """`[2, n]`: passages that fail, ascending, and for each its first equal that passes and may be returned instead.

    Numbered by (segment, row), all segments laid end to end.
    """


@dataclass(frozen=True, slots=True)
class FetchedPassage:
    """What the decoder's input is composed of, read from the maps."""

    tokens: npt.NDArray[np.int32]
    """`[t]` decoder tokens."""
    chunk_size: int
    embeddings: StoredRows
    """`[ceil(t / chunk_size), d_enc]` chunk embeddings, in the form that the index holds them in."""
    scores: npt.NDArray[np.float32] | None
    """`[ceil(t / chunk_size)]` mean negative log-likelihood a token, None without the column."""


@dataclass(frozen=True, slots=True)
class PassageDescription:
    """What a person wants to see of a passage."""

    passage_id: str
    document_id: str
    ordinal: int
    char_start: int
    char_end: int
    num_tokens: int
    num_chunks: int
    text: str
    metadata: Mapping[str, Any]


class OpenShard:
    """The tables of one shard, mapped."""

    def __init__(self, store: Store, shard: Shard, parameters: Parameters) -> None:
        passages = store.path(shard.tables["passages"])
        self.shard = shard
        self._passages = passages
        # Three small columns are copied: one array lookup each instead of a row group search.
        self.first_chunk = self._column(passages, "first_chunk", "<i8")
        self.num_chunks = self._column(passages, "num_chunks", "<i4")
        self.num_tokens = self._column(passages, "num_tokens", "<i4")
        self.passage_ids = MappedColumn(passages, "passage_id", "|u1", 16)
        self.tokens = MappedColumn(store.path(shard.tables["chunks"]), "tokens", "<i4", shard.chunk_size)
        embeddings = store.path(shard.tables["embeddings"])
        self.embeddings = map_embeddings(embeddings, parameters.embedding_dim, parameters.embedding_dtype)
        has_scores = "scores" in shard.tables
        self.scores = MappedColumn(store.path(shard.tables["scores"]), "nll", "<f4") if has_scores else None
        self._vectors = store.path(shard.tables["vectors"])
        self._vector_dim = parameters.vector_dim
        self._check_rows()

    @cached_property
    def vectors(self) -> MappedColumn:
        """Passage embeddings, float16 `[passages, d_ret]`."""
        return MappedColumn(self._vectors, "vector", "<f2", self._vector_dim)

    @staticmethod
    def _column(path: Path, name: str, dtype: str) -> npt.NDArray[Any]:
        return MappedColumn(path, name, dtype).slice_all()

    def _check_rows(self) -> None:
        found = (len(self.first_chunk), self.tokens.num_rows, self.embeddings.num_rows)
        expected = (self.shard.passages, self.shard.chunks, self.shard.chunks)
        if found != expected:
            raise CorruptIndexError(
                f"shard {self.shard.name} has (passages, chunks, embeddings) {found}, its manifest says {expected}: "
                "run `refrag index verify`, then `refrag index repair`"
            )

    def fetch(self, row: int) -> FetchedPassage:
        """Tokens and embeddings of the passage in `row`: views of the map where they are contiguous."""
        start = self.first_chunk.item(row)
        stop, size = start + self.num_chunks.item(row), self.shard.chunk_size
        return FetchedPassage(
            self.tokens.elements(start * size, start * size + self.num_tokens.item(row)),
            size,
            self.embeddings.slice(start, stop),
            None if self.scores is None else self.scores.slice(start, stop),
        )

    def describe(self, row: int) -> PassageDescription:
        """Text and metadata of the passage in `row`; decompresses one row group."""
        with open_table(self._passages) as file:
            rows_a_group = file.metadata.row_group(0).num_rows
            group = file.read_row_group(row // rows_a_group)
        return _description(group.slice(row % rows_a_group, 1).to_pylist()[0])


def _description(entry: Mapping[str, Any]) -> PassageDescription:
    return PassageDescription(
        passage_id=entry["passage_id"].hex(),
        document_id=entry["document_id"],
        ordinal=entry["ordinal"],
        char_start=entry["char_start"],
        char_end=entry["char_end"],
        num_tokens=entry["num_tokens"],
        num_chunks=entry["num_chunks"],
        text=entry["text"],
        metadata=json.loads(entry["metadata"]),
    )


class IndexReader:
    """One generation of an index. Shards are mapped on first use.

    Until `close`, or the end of the object, it holds its generation: `refrag index gc` removes nothing of it.

    Args:
        location: the index's folder or URI.
        version: the generation; the newest by default.
        tables: where passages are read from: the mapped Parquet shards, or the LanceDB tables if the index has them.

    Raises IndexNotFoundError, and CorruptIndexError for an altered manifest or a missing or cut file (digests of
    whole files are the business of `refrag index verify`). While the reader lives, its generation is not collected.
    """

    def __init__(self, location: IndexLocation, version: int | None = None, *, tables: TableFormat = "parquet") -> None:
        self.store: Store = open_store(location)
        self.manifest: Manifest
        self.manifest, self._hold = hold_manifest(self.store, version)
        check_sizes(self.store, self.manifest.files.values())
        self.tables = tables
        self._lance = LanceReader(self.store, self.manifest) if tables == "lance" else None
        self._shards: dict[int, OpenShard] = {}
        numbers = {shard.name: number for number, shard in enumerate(self.manifest.shards)}
        self._segment_shards = [[numbers[name] for name in segment.shards] for segment in self.manifest.segments]
        self._segment_starts = [self._starts(shards) for shards in self._segment_shards]
        self._passing: OrderedDict[str, Passing] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the generation; passages that were fetched stay readable."""
        self._hold.release()

    def _starts(self, shards: Sequence[int]) -> list[int]:
        return [0, *accumulate(self.manifest.shards[number].passages for number in shards)]

    def shard(self, number: int) -> OpenShard:
        """The tables of shard `number`, opened once."""
        if number not in self._shards:
            self._shards[number] = OpenShard(self.store, self.manifest.shards[number], self.manifest.parameters)
        return self._shards[number]

    def map_all(self) -> None:
        """Map every table and segment now, so that no request has to wait for it."""
        numbers = range(len(self.manifest.shards))
        self._fetch_files(numbers)
        for number in numbers:
            self.shard(number)
        _ = self.vectors, self.live

    def included(self, role: Literal["decoder", "retriever"]) -> Path | None:
        """Folder of a model that travels in the bundle; None where the host has to have it."""
        info = self.manifest.bundle
        folder = None if info is None else getattr(info, role)
        return None if folder is None else self.store.folder(folder)

    @cached_property
    def vectors(self) -> VectorIndex:
        """The FAISS segments, mapped."""
        names = [segment.file for segment in self.manifest.segments]
        self.store.fetch(names)
        paths = [self.store.path(name) for name in names]
        return VectorIndex.open(paths, nprobe=self.manifest.vector_index.nprobe)

    @cached_property
    def _removed(self) -> dict[str, list[tuple[int, int, int]]]:
        return read_tombstones(self.store, self.manifest)

    def live_rows(self, number: int) -> npt.NDArray[np.bool_]:
        """Which passages of shard `number` are live, bool `[passages]`."""
        shard = self.manifest.shards[number]
        mask = np.ones(shard.passages, bool)
        for _, first, count in self._removed.get(shard.name, ()):
            mask[first : first + count] = False
        return mask

    @cached_property
    def _duplicates(self) -> dict[str, list[int]]:
        return read_duplicates(self.store, self.manifest)

    def searchable_rows(self, number: int) -> npt.NDArray[np.bool_]:
        """Which passages of shard `number` a search may return, bool `[passages]`: live, and no hidden duplicates."""
        mask = self.live_rows(number)
        mask[self._duplicates.get(self.manifest.shards[number].name, [])] = False
        return mask

    @cached_property
    def live(self) -> list[npt.NDArray[np.bool_] | None]:
        """For each segment a read-only bool `[rows]` of what a search may return, None where that is all of it."""
        return [self._live(shards) for shards in self._segment_shards]

    def _live(self, shards: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        names = {self.manifest.shards[number].name for number in shards}
        if names.isdisjoint(self._removed) and names.isdisjoint(self._duplicates):
            return None
        mask = np.concatenate([self.searchable_rows(number) for number in shards])
        mask.flags.writeable = False
        return mask

    def locate(self, segment: int, row: int) -> PassageRef:
        """The passage behind a hit of the vector index."""
        at = bisect_right(self._segment_starts[segment], row) - 1
        return PassageRef(self._segment_shards[segment][at], row - self._segment_starts[segment][at])

    # --- filters

    @cached_property
    def metadata(self) -> MetadataColumns:
        """The documents' metadata, decoded field by field as filters ask for it."""
        # Not a method of this reader: a circle of references would keep the hold until Python looks for circles.
        return MetadataColumns(partial(_document_column, self.store, self.manifest.shards))

    def column(self, number: int, table: str, name: str) -> pa.ChunkedArray:
        """One column of a table of shard `number`."""
        return _column(self.store, self.manifest.shards[number], table, name)

    def live_texts(self) -> Iterator[str]:
        """Texts of the passages that a search may return, by (segment, row); one shard's in memory at a time."""
        for number in (number for shards in self._segment_shards for number in shards):
            texts = self.column(number, "passages", "text")
            yield from texts.filter(pa.array(self.searchable_rows(number))).to_pylist()

    def searchable_ids(self) -> npt.NDArray[np.void]:
        """Ids of the passages that a search may return, 16 bytes each, by (segment, row)."""
        numbers = [number for shards in self._segment_shards for number in shards]
        passages = (self.store.path(self.manifest.shards[number].tables["passages"]) for number in numbers)
        columns = (MappedColumn(path, "passage_id", "|u1", 16).slice_all() for path in passages)
        ids = [rows[self.searchable_rows(number)] for number, rows in zip(numbers, columns, strict=True)]
        return np.ascontiguousarray(np.concatenate(ids)).view("V16").reshape(-1)

    def passing(self, where: str) -> Passing:
        """The live passages whose documents fulfil the condition `where`; the last filters asked for are remembered.

        Raises FilterError for text that is no condition over the fields of the index.
        """
        with self._lock:
            if where not in self._passing:
                self._passing[where] = self._select(where)
            self._passing.move_to_end(where)
            while len(self._passing) > CACHED_FILTERS:
                self._passing.popitem(last=False)
            return self._passing[where]

    def _select(self, where: str) -> Passing:
        documents = self.metadata.select(parse_predicate(where))
        by_shard, start = [], 0
        for number, counts in enumerate(_document_column(self.store, self.manifest.shards, "num_passages")):
            chosen = np.repeat(documents[start : start + len(counts)], counts.to_numpy())
            by_shard.append(chosen & self.live_rows(number))
            start += len(counts)
        passing = np.concatenate([by_shard[number] for shards in self._segment_shards for number in shards])
        stand_ins = self._stand_ins(passing)
        passing[self._copies[1]] = False
        passing[stand_ins[1]] = True
        passing.flags.writeable = False
        ends = np.cumsum([starts[-1] for starts in self._segment_starts])
        return Passing(tuple(np.split(passing, ends[:-1])), int(passing.sum()), stand_ins)

    def _stand_ins(self, passing: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """The columns of `_copies` that are the first to pass where what they equal does not, by what they equal."""
        first, copy = self._copies
        candidates = self._copies[:, passing[copy] & ~passing[first]]
        return candidates[:, np.unique(candidates[0], return_index=True)[1]]

    @cached_property
    def _copies(self) -> npt.NDArray[np.int64]:
        """`[2, n]`: what hidden duplicates equal, and they themselves, in the order of documents.

        Passages are numbered by (segment, row), all segments laid end to end.
        """
        if self.manifest.duplicates is None:
            return np.empty((2, 0), np.int64)
        with open_table(self.store.path(self.manifest.duplicates.file)) as file:
            table = file.read()
        shards = [self.manifest.shards[number] for numbers in self._segment_shards for number in numbers]
        ends = accumulate((shard.passages for shard in shards), initial=0)
        starts = {shard.name: start for shard, start in zip(shards, ends, strict=False)}

        def numbered(shard: str, row: str) -> npt.NDArray[np.int64]:
            places = zip(table.column(shard).to_pylist(), table.column(row).to_pylist(), strict=True)
            return np.array([starts[name] + passage for name, passage in places], np.int64)

        copies = [numbered("first_shard", "first_passage"), numbered("shard", "passage")]
        return np.asarray(copies, np.int64)

    # --- search

    def search(
        self, query: npt.NDArray[np.float32], top_k: int, passing: Passing | None = None
    ) -> list[tuple[PassageRef, float]]:
        """The `top_k` live passages nearest to one query vector `[d_ret]`, best first, with inner products.

        Passages of equal score come in the order of their ids: where their rows lie is history, not content.

        Args:
            passing: only these passages. Where few pass, all of them are compared; where many do, as many more lists
                are visited as fewer of their rows count.
        """
        depth = top_k + 1 if top_k > 0 else top_k  # the vector index has the words for a senseless number
        while True:
            found = self._nearest(query.reshape(1, -1), depth, passing)
            # a hit of -inf is none: all that there is was found
            if found.scores[0][-1] == -np.inf or found.scores[0][-1] < found.scores[0][top_k - 1]:
                break
            depth *= 2
        hits = zip(found.scores[0].tolist(), found.segments[0].tolist(), found.rows[0].tolist(), strict=True)
        located = [(self.locate(segment, row), score) for score, segment, row in hits if row >= 0]
        return self._ties_by_id(located)[:top_k]

    def _nearest(self, queries: npt.NDArray[np.float32], depth: int, passing: Passing | None) -> SearchResult:
        if passing is None:
            return self.vectors.search(queries, depth, live=self.live)
        if passing.rows <= max(EXACT_ROWS, self.vectors.num_rows // EXACT_ONE_IN):
            return self._compare_all(queries, depth, passing)
        return self.vectors.search(queries, depth, live=passing.masks, nprobe=self.lists_to_visit(passing))

    def _ties_by_id(self, hits: Sequence[tuple[PassageRef, float]]) -> list[tuple[PassageRef, float]]:
        ordered: list[tuple[PassageRef, float]] = []
        for _, group in groupby(hits, key=lambda hit: hit[1]):
            tied = list(group)
            ordered += tied if len(tied) == 1 else sorted(tied, key=lambda hit: self.passage_id(hit[0]))
        return ordered

    def passage_id(self, ref: PassageRef) -> bytes:
        """The 16 bytes of a passage's id, from the map."""
        ids = self.shard(ref.shard).passage_ids
        return bytes(ids.slice(ref.row, ref.row + 1)[0])

    def lists_to_visit(self, passing: Passing) -> int:
        """How many lists of the vector index a search among these passages visits."""
        return ceil(VISITS * self.vectors.nprobe * self.manifest.counts.passages / max(1, passing.rows))

    def _compare_all(self, query: npt.NDArray[np.float32], top_k: int, passing: Passing) -> SearchResult:
        """Exact search for one query `[1, d_ret]` among the passing passages: their vectors alone are read."""
        rows = [np.flatnonzero(mask) for mask in passing.masks]
        found = exact_search((self._vectors_at(s, chosen) for s, chosen in enumerate(rows)), query, top_k)
        hits = zip(found.segments[0].tolist(), found.rows[0].tolist(), strict=True)
        numbers = [rows[segment][row] if row >= 0 else -1 for segment, row in hits]
        return SearchResult(found.scores, found.segments, np.asarray([numbers], dtype=np.int64))

    def _vectors_at(self, segment: int, rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float16]]:
        """Passage embeddings of increasing rows of a segment, shard by shard."""
        starts = self._segment_starts[segment]
        cuts = np.searchsorted(rows, starts)
        for number, start, first, last in zip(self._segment_shards[segment], starts, cuts, cuts[1:], strict=False):
            if last > first:
                yield self.shard(number).vectors.take(rows[first:last] - start)

    def fetch(self, refs: Sequence[PassageRef]) -> list[FetchedPassage]:
        """Tokens and embeddings of passages: from the maps, or from LanceDB tables in one read."""
        shards = [self.manifest.shards[ref.shard] for ref in refs]
        if self._lance is None:
            self._fetch_files({ref.shard for ref in refs} - self._shards.keys())
            return [self.shard(ref.shard).fetch(ref.row) for ref in refs]
        found = self._lance.fetch([(shard.name, ref.row) for shard, ref in zip(shards, refs, strict=True)])
        return [
            FetchedPassage(rows.tokens, shard.chunk_size, rows.embeddings, rows.scores)
            for shard, rows in zip(shards, found, strict=True)
        ]

    def _fetch_files(self, numbers: Collection[int]) -> None:
        """The files of these shards that `fetch` reads, side by side where they are far away."""
        tables = [self.manifest.shards[number].tables for number in sorted(numbers)]
        if tables:
            self.store.fetch(each[table] for each in tables for table in _FETCHED if table in each)

    def describe(self, ref: PassageRef) -> PassageDescription:
        """Text and metadata of one passage."""
        if self._lance is None:
            return self.shard(ref.shard).describe(ref.row)
        return _description(self._lance.passage(self.manifest.shards[ref.shard].name, ref.row))


def _column(store: Store, shard: Shard, table: str, name: str) -> pa.ChunkedArray:
    with open_table(store.path(shard.tables[table])) as file:
        return file.read(columns=[name]).column(0)


def _document_column(store: Store, shards: Sequence[Shard], name: str) -> Iterator[pa.ChunkedArray]:
    """A column of the documents of all shards, dead ones included, shard by shard."""
    return (_column(store, shard, "documents", name) for shard in shards)


def check_sizes(store: Store, files: Collection[FileRecord]) -> None:
    """Raise CorruptIndexError for the first file that is missing or not as long as it was when published."""
    sizes = store.sizes([record.name for record in files])
    for record in files:
        found = sizes.get(record.name)
        if found != record.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CorruptIndexError(
                f"{store.location}/{record.name} {state}, expected {record.bytes} bytes: run "
                "`refrag index verify`, then `refrag index repair` (a bundle is mended by pulling it again)"
            )
