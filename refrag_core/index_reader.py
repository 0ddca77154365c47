"""An index opened for reading: verified manifest, mapped tables, searchable segments. Writes nothing."""

import json
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from refrag_core.errors import CorruptIndexError
from refrag_core.manifest import Manifest, Shard, hold_manifest, read_tombstones
from refrag_core.storage import FileRecord, IndexLocation, Store, open_store
from refrag_core.tables import MappedColumn, open_table
from refrag_core.vector_index import VectorIndex

_FETCHED = ("passages", "chunks", "embeddings", "scores")


@dataclass(frozen=True, slots=True)
class PassageRef:
    """Where a passage is: its shard's position in the manifest and its row there."""

    shard: int
    row: int


@dataclass(frozen=True, slots=True)
class FetchedPassage:
    """What the decoder's input is composed of, read from the maps."""

    tokens: npt.NDArray[np.int32]
    """`[t]` decoder tokens."""
    chunk_size: int
    embeddings: npt.NDArray[np.float16]
    """`[ceil(t / chunk_size), d_enc]` chunk embeddings."""
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

    def __init__(self, store: Store, shard: Shard, dim: int) -> None:
        passages = store.path(shard.tables["passages"])
        self.shard = shard
        self._passages = passages
        # Three small columns are copied: one array lookup each instead of a row group search.
        self.first_chunk = self._column(passages, "first_chunk", "<i8")
        self.num_chunks = self._column(passages, "num_chunks", "<i4")
        self.num_tokens = self._column(passages, "num_tokens", "<i4")
        self.tokens = MappedColumn(store.path(shard.tables["chunks"]), "tokens", "<i4", shard.chunk_size)
        self.embeddings = MappedColumn(store.path(shard.tables["embeddings"]), "embedding", "<f2", dim)
        has_scores = "scores" in shard.tables
        self.scores = MappedColumn(store.path(shard.tables["scores"]), "nll", "<f4") if has_scores else None
        self._check_rows()

    @staticmethod
    def _column(path: Path, name: str, dtype: str) -> npt.NDArray[Any]:
        column = MappedColumn(path, name, dtype)
        return column.slice(0, column.num_rows)

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
        start = int(self.first_chunk[row])
        stop = start + int(self.num_chunks[row])
        return FetchedPassage(
            tokens=self.tokens.slice(start, stop).reshape(-1)[: int(self.num_tokens[row])],
            chunk_size=self.shard.chunk_size,
            embeddings=self.embeddings.slice(start, stop),
            scores=None if self.scores is None else self.scores.slice(start, stop),
        )

    def describe(self, row: int) -> PassageDescription:
        """Text and metadata of the passage in `row`; decompresses one row group."""
        with open_table(self._passages) as file:
            rows_a_group = file.metadata.row_group(0).num_rows
            group = file.read_row_group(row // rows_a_group)
        entry = group.slice(row % rows_a_group, 1).to_pylist()[0]
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

    Args:
        location: the index's folder or URI.
        version: the generation; the newest by default.

    Raises IndexNotFoundError, and CorruptIndexError for an altered manifest or a missing or cut file (digests of
    whole files are the business of `refrag index verify`). While the reader lives, its generation is not collected.
    """

    def __init__(self, location: IndexLocation, version: int | None = None) -> None:
        self.store: Store = open_store(location)
        self.manifest: Manifest
        self.manifest, self._hold = hold_manifest(self.store, version)
        check_sizes(self.store, self.manifest.files.values())
        self._shards: dict[int, OpenShard] = {}
        numbers = {shard.name: number for number, shard in enumerate(self.manifest.shards)}
        self._segment_shards = [[numbers[name] for name in segment.shards] for segment in self.manifest.segments]
        self._segment_starts = [self._starts(shards) for shards in self._segment_shards]

    def _starts(self, shards: Sequence[int]) -> list[int]:
        return [0, *accumulate(self.manifest.shards[number].passages for number in shards)]

    def shard(self, number: int) -> OpenShard:
        """The tables of shard `number`, opened once."""
        if number not in self._shards:
            dim = self.manifest.parameters.embedding_dim
            self._shards[number] = OpenShard(self.store, self.manifest.shards[number], dim)
        return self._shards[number]

    def map_all(self) -> None:
        """Map every table and segment now, so that no request has to wait for it."""
        for number in range(len(self.manifest.shards)):
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
    def live(self) -> list[npt.NDArray[np.bool_] | None]:
        """For each segment a read-only bool `[rows]` of what is live, None where all of it is."""
        return [self._live(shards) for shards in self._segment_shards]

    def _live(self, shards: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        if not any(self.manifest.shards[number].name in self._removed for number in shards):
            return None
        mask = np.concatenate([self.live_rows(number) for number in shards])
        mask.flags.writeable = False
        return mask

    def locate(self, segment: int, row: int) -> PassageRef:
        """The passage behind a hit of the vector index."""
        at = bisect_right(self._segment_starts[segment], row) - 1
        return PassageRef(self._segment_shards[segment][at], row - self._segment_starts[segment][at])

    def search(self, query: npt.NDArray[np.float32], top_k: int) -> list[tuple[PassageRef, float]]:
        """The `top_k` live passages nearest to one query vector `[d_ret]`, best first, with inner products."""
        found = self.vectors.search(query.reshape(1, -1), top_k, live=self.live)
        hits = zip(found.scores[0], found.segments[0], found.rows[0], strict=True)
        return [(self.locate(int(segment), int(row)), float(score)) for score, segment, row in hits if row >= 0]

    def fetch(self, refs: Sequence[PassageRef]) -> list[FetchedPassage]:
        """Tokens and embeddings of passages, from the maps."""
        numbers = {ref.shard for ref in refs} - self._shards.keys()
        tables = [self.manifest.shards[number].tables for number in sorted(numbers)]
        self.store.fetch(each[table] for each in tables for table in _FETCHED if table in each)
        return [self.shard(ref.shard).fetch(ref.row) for ref in refs]

    def describe(self, ref: PassageRef) -> PassageDescription:
        """Text and metadata of one passage."""
        return self.shard(ref.shard).describe(ref.row)


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
