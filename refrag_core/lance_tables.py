"""LanceDB tables of an index: the same columns as the Parquet shards, for everybody who reads Lance.

`lance/` is a LanceDB database with the tables `documents`, `passages` and `chunks`. A shard is one fragment of
each; a generation is one version of each, made in one commit that adds the fragments of new shards, drops those
of shards that are gone and deletes the rows of removed documents, and it is tagged with the content id. The
manifest says which versions are the generation's: whatever a killed build left behind them has no meaning, and
the next build starts from the recorded version. One writer at a time: the index's lock sees to that, and a second
one that got past it is found after the commit.

Lance names its files at random. They are listed with size and digest like all others, so the build id depends on
them and the content id does not. This is the only file that imports lance.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refrag.schemas import arrow
from refrag_core.embedding_storage import Int8Rows, StoredRows
from refrag_core.errors import CommitConflictError, ConfigError, CorruptIndexError, MissingExtraError, StageError
from refrag_core.manifest import LanceInfo, LanceTable, Manifest, Parameters, Shard, read_tombstones
from refrag_core.storage import FileRecord, IndexLocation, Store, is_uri
from refrag_core.tables import MappedColumn, TableFormat, map_embeddings, open_table

FOLDER = "lance"
TABLES = ("documents", "passages", "chunks")

_ROWS_A_BATCH = 16384
_ONE_FILE = 1 << 40


def _library() -> Any:
    try:
        import lance
        import lance.commit
    except ImportError as error:
        raise MissingExtraError("LanceDB tables need the packages of an extra: pip install 'refrag[lance]'") from error
    return lance


def is_installed() -> bool:
    """Whether Lance tables can be read and written here."""
    return importlib.util.find_spec("lance") is not None


def check_writable(root: IndexLocation) -> None:
    """Raise what a build would meet only at its end: MissingExtraError, or ConfigError where the index is remote."""
    _library()
    if is_uri(root):
        raise ConfigError(
            f"Lance tables were asked for at {root}; they are only written to a folder of this machine: work there, "
            "or have a build leave them out with --tables parquet"
        )


def is_wanted(tables: TableFormat | None, latest: Manifest | None) -> bool:
    """Whether a build writes Lance tables: it was told to, or the index has them and nobody said otherwise."""
    return tables == "lance" or (tables is None and latest is not None and latest.lance is not None)


def is_private(name: str) -> bool:
    """Whether a file is Lance's own hint (a tag, the newest version): it changes, and no generation lists it."""
    parts = name.split("/")
    return parts[0] == FOLDER and ("_refs" in parts or parts[-1] == "latest_version_hint.json")


@dataclass(frozen=True, slots=True)
class LiveRows:
    """What a generation's tables are to hold."""

    shards: Sequence[Shard]
    parameters: Parameters
    removed: Mapping[str, Sequence[tuple[int, int, int]]]
    """Per shard: `(document row, first passage row, number of passages)` of removed documents."""

    @property
    def scored(self) -> bool:
        """Whether chunks have a score."""
        return all("scores" in shard.tables for shard in self.shards)

    def schema(self, table: str) -> pa.Schema:
        """Arrow schema of a Lance table."""
        if table == "documents":
            return arrow.lance_documents()
        if table == "passages":
            return arrow.lance_passages(self.parameters.vector_dim)
        return arrow.lance_chunks(self.parameters.embedding_dim, self.parameters.embedding_dtype, scored=self.scored)

    def dead(self, store: Store, shard: Shard, table: str) -> npt.NDArray[np.int64]:
        """Rows of removed documents in one table of a shard."""
        return _dead_rows(store, shard, self.removed.get(shard.name, ()))[table]


# --- rows of a shard ----------------------------------------------------------------------------------


def _dead_rows(store: Store, shard: Shard, entries: Sequence[tuple[int, int, int]]) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of removed documents in each of a shard's tables."""
    if not entries:
        return {table: np.empty(0, np.int64) for table in TABLES}
    with open_table(store.path(shard.tables["passages"])) as file:
        spans = file.read(columns=["first_chunk", "num_chunks"])
    first, count = (spans.column(name).to_numpy() for name in ("first_chunk", "num_chunks"))
    passages = np.concatenate([np.arange(start, start + number) for _, start, number in entries])
    chunks = [np.arange(first[row], first[row] + count[row]) for row in passages]
    return {
        "documents": np.array([document for document, _, _ in entries], np.int64),
        "passages": passages.astype(np.int64),
        "chunks": np.concatenate([np.empty(0, np.int64), *chunks]).astype(np.int64),
    }


def _lists(rows: npt.NDArray[Any]) -> pa.Array:
    """A fixed-size-list array of the rows of `[n, d]`."""
    return pa.FixedSizeListArray.from_arrays(_aligned(rows.reshape(-1)), rows.shape[1])


def _aligned(values: npt.NDArray[Any]) -> pa.Array:
    """A copy: what is mapped in a Parquet file lies at any byte, and Lance takes aligned memory only."""
    return pa.array(np.array(values))


def _stored_columns(rows: StoredRows) -> list[pa.Array]:
    if isinstance(rows, Int8Rows):
        return [_lists(rows.codes), _aligned(rows.scales)]
    return [_lists(rows)]


def _token_lists(tokens: npt.NDArray[np.int32], num_tokens: npt.NDArray[np.integer[Any]]) -> pa.Array:
    """The tokens of each chunk without the zeros after them."""
    own = np.arange(tokens.shape[1]) < num_tokens[:, None]
    offsets = np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens[own]))


def _plain_columns(store: Store, shard: Shard, table: str) -> pa.Table:
    """The columns that are the same in both formats."""
    with open_table(store.path(shard.tables[table])) as file:
        names = [name for name in file.schema_arrow.names if name != "tokens"]
        return file.read(columns=names)


def _wide_columns(store: Store, shard: Shard, table: str, rows: LiveRows) -> Callable[[int, int], Sequence[pa.Array]]:
    """A function `(start, stop)` → the columns that Lance holds as lists."""
    parameters = rows.parameters
    if table == "documents":
        return lambda *_: ()
    if table == "passages":
        vectors = MappedColumn(store.path(shard.tables["vectors"]), "vector", "<f2", parameters.vector_dim)
        return lambda start, stop: [_lists(vectors.slice(start, stop))]
    path = store.path(shard.tables["chunks"])
    tokens = MappedColumn(path, "tokens", "<i4", shard.chunk_size)
    embeddings = map_embeddings(
        store.path(shard.tables["embeddings"]), parameters.embedding_dim, parameters.embedding_dtype
    )
    with open_table(path) as file:
        num_tokens = file.read(columns=["num_tokens"]).column(0).to_numpy()
    scores = MappedColumn(store.path(shard.tables["scores"]), "nll", "<f4") if rows.scored else None

    def columns(start: int, stop: int) -> list[pa.Array]:
        nll = [] if scores is None else [_aligned(scores.slice(start, stop))]
        own = _token_lists(tokens.slice(start, stop), num_tokens[start:stop])
        return [own, *_stored_columns(embeddings.slice(start, stop)), *nll]

    return columns


def _batches(store: Store, shard: Shard, table: str, rows: LiveRows) -> Iterator[pa.RecordBatch]:
    """The live rows of one table of a shard, in the Lance table's schema."""
    plain = _plain_columns(store, shard, table)
    wide = _wide_columns(store, shard, table, rows)
    live = np.ones(plain.num_rows, bool)
    live[rows.dead(store, shard, table)] = False
    for start in range(0, plain.num_rows, _ROWS_A_BATCH):
        stop = min(start + _ROWS_A_BATCH, plain.num_rows)
        own = [column.combine_chunks() for column in plain.slice(start, stop - start).columns]
        where = [pa.array([shard.name] * (stop - start)), pa.array(np.arange(start, stop, dtype=np.int32))]
        arrays = [_flat(array) for array in (*where, *own, *wide(start, stop))]
        batch = pa.RecordBatch.from_arrays(arrays, schema=rows.schema(table))
        yield batch if live[start:stop].all() else batch.filter(pa.array(live[start:stop]))


def _flat(array: Any) -> pa.Array:
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


# --- writing a generation -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Base:
    """A table as the parent left it: its fragments by shard, as far as they are still good."""

    recorded: int
    """The version that the parent's manifest names."""
    dataset: Any
    """That version, or a restored copy of it where a killed build left another one after it."""
    kept: Mapping[str, Any]
    gone: Sequence[int]
    """Ids of the fragments that leave."""


def with_lance(store: Store, draft: Manifest, parent: Manifest | None) -> Manifest:
    """The draft of a generation with its rows in LanceDB tables: their versions, and the records of their files.

    Args:
        parent: the generation that the draft was made from; its fragments stay where their shards do. None, or one
            without Lance tables, for all rows anew.

    Raises CommitConflictError when another writer changed a table meanwhile; the manifest of neither names the
    mixture, and the next build sets it right.
    """
    check_writable(store.location)
    rows = LiveRows(draft.shards, draft.parameters, read_tombstones(store, draft))
    info, names = write_tables(store, rows, draft.content_id, parent)
    # Fragments that stay need not be read again. Without any, a name may come back with other bytes.
    known = {} if parent is None or parent.lance is None else dict(parent.files)
    files = dict(draft.files) | {name: known.get(name) or store.settle(name) for name in names}
    return replace(draft, lance=info, files={name: files[name] for name in sorted(files)})


def write_tables(store: Store, rows: LiveRows, content_id: str, parent: Manifest | None) -> tuple[LanceInfo, list[str]]:
    """Bring the three tables to these rows, tagged with `content_id`; returns versions and the files of each."""
    kept = _kept_shards(rows, parent)
    order = [*kept, *(shard.name for shard in rows.shards if shard.name not in set(kept))]
    tables, files = {}, []
    for table in TABLES:
        version = _write_table(store, rows, parent, table, order)
        names = _files_of(store, table, version)
        tables[table] = LanceTable(_folder(table), version, next(n for n in names if n.endswith(".manifest")))
        files += names
        _tag(store, table, version, content_id)
    return LanceInfo(order, tables), files


def _folder(table: str) -> str:
    return f"{FOLDER}/{table}.lance"


def _kept_shards(rows: LiveRows, parent: Manifest | None) -> list[str]:
    """Shards whose fragments may stay, in the order of the fragments: the parent had the same tables of them."""
    if parent is None or parent.lance is None:
        return []
    before = {shard.name: dict(shard.tables) for shard in parent.shards}
    now = {shard.name: dict(shard.tables) for shard in rows.shards}
    return [name for name in parent.lance.shards if name in now and before.get(name) == now[name]]


def _write_table(store: Store, rows: LiveRows, parent: Manifest | None, table: str, order: Sequence[str]) -> int:
    """Bring one table to these rows in one commit at most, its fragments in this order; returns its version."""
    base = _base(store, rows, parent, table)
    shards = {shard.name: shard for shard in rows.shards}
    new = [shards[name] for name in order if base is None or name not in base.kept]
    made = [_write_fragment(store, shard, table, rows, base) for shard in new]
    if base is None:
        return _commit_fresh(store, table, rows.schema(table), made)
    updated = [_without_dead(store, shards[name], table, rows, fragment) for name, fragment in base.kept.items()]
    return _commit_update(store, table, base, made, [fragment for fragment in updated if fragment is not None])


def _without_dead(store: Store, shard: Shard, table: str, rows: LiveRows, fragment: Any) -> Any:
    """A kept fragment without the rows that are dead by now; None where it has none of them any more."""
    dead = rows.dead(store, shard, table)
    everything = {"documents": shard.documents, "passages": shard.passages, "chunks": shard.chunks}[table]
    if fragment.count_rows() == everything - len(dead):
        return None
    return fragment.delete(f"row IN ({', '.join(map(str, dead))})")


def _base(store: Store, rows: LiveRows, parent: Manifest | None, table: str) -> _Base | None:
    """The parent's version of a table, made the newest again; None where no fragment of it can stay."""
    if parent is None or parent.lance is None:
        return None
    recorded = parent.lance.tables[table]
    dataset = _at(store, recorded)
    if not dataset.schema.equals(rows.schema(table)):
        return None
    dataset = _newest_again(store, table, dataset)
    fragments = dict(zip(parent.lance.shards, dataset.get_fragments(), strict=True))
    kept = _kept_shards(rows, parent)
    gone = [fragment.fragment_id for name, fragment in fragments.items() if name not in set(kept)]
    return _Base(recorded.version, dataset, {name: fragments[name] for name in kept}, gone)


def _newest_again(store: Store, table: str, dataset: Any) -> Any:
    """The same rows as the newest version of their table: what lies after them belongs to no generation."""
    newest = _library().dataset(str(store.path(_folder(table))))
    if not newest.describe_indices() and _fragments_of(newest) == _fragments_of(dataset):  # restored before
        return newest
    dataset.restore()
    return _library().dataset(str(store.path(_folder(table))))


def _fragments_of(dataset: Any) -> list[Any]:
    """What a version's rows are: its fragments with their data and deletion files."""
    return [fragment.metadata.to_json() for fragment in dataset.get_fragments()]


def make_newest(store: Store, manifest: Manifest) -> None:
    """Let `lancedb.connect` show this generation again, after a killed build or a rollback."""
    if manifest.lance is None or is_uri(store.location):  # where nothing is written in place
        return
    for table, recorded in manifest.lance.tables.items():
        _newest_again(store, table, _at(store, recorded))


def drop_versions(store: Store, kept: Sequence[Manifest]) -> int:
    """Remove the table versions that none of the `kept` generations records, and the files that only those have.

    The newest version of a table stays in any case. Only with the index's lock held. Returns the bytes removed.
    """
    if is_uri(store.location):
        return 0
    return sum(_drop_versions(store, table, kept) for table in TABLES if _exists(store.path(_folder(table))))


def _drop_versions(store: Store, table: str, kept: Sequence[Manifest]) -> int:
    dataset = _library().dataset(str(store.path(_folder(table))))
    wanted = {manifest.lance.tables[table].version for manifest in kept if manifest.lance} | {dataset.version}
    unwanted = [found["version"] for found in dataset.versions() if found["version"] not in wanted]
    if not unwanted:
        return 0
    for name, tag in dataset.tags.list().items():
        if tag["version"] in unwanted:
            dataset.tags.delete(name)
    # Nobody else writes under the lock, so what no version refers to is a killed build's.
    return int(dataset.cleanup_old_versions(versions=unwanted, delete_unverified=True).bytes_removed)


def _at(store: Store, table: LanceTable) -> Any:
    path = store.path(table.folder)
    try:
        return _library().dataset(str(path), version=table.version)
    except (OSError, ValueError) as error:
        raise CorruptIndexError(
            f"{path} has no readable version {table.version} ({str(error)[:200]}), expected the one that the manifest "
            "names: run `refrag index verify`, then `refrag index repair`"
        ) from error


def _exists(path: Path) -> bool:
    """Whether a table has any version."""
    return any(path.glob("_versions/*.manifest"))


def _write_fragment(store: Store, shard: Shard, table: str, rows: LiveRows, base: _Base | None) -> Any:
    """Write one shard's live rows as a fragment that no version has yet."""
    path, schema = store.path(_folder(table)), rows.schema(table)
    made = _library().fragment.write_fragments(
        pa.RecordBatchReader.from_batches(schema, _batches(store, shard, table, rows)),
        str(path),
        schema=schema,
        mode="append" if base is not None else "overwrite" if _exists(path) else "create",
        max_rows_per_file=_ONE_FILE,
        max_bytes_per_file=_ONE_FILE,
    )
    if len(made) != 1:
        raise StageError(
            f"shard {shard.name} became {len(made)} fragments of the Lance table {table}, expected 1: nothing was "
            "committed; please report this"
        )
    return made[0]


def _commit_fresh(store: Store, table: str, schema: pa.Schema, made: Sequence[Any]) -> int:
    """Commit fragments in place of all that the table held, if there was one."""
    lance = _library()
    path = store.path(_folder(table))
    newest = lance.dataset(str(path)).version if _exists(path) else None
    return _committed(store, table, lance.LanceOperation.Overwrite(schema, made), newest, str(path), made)


def _commit_update(store: Store, table: str, base: _Base, made: Sequence[Any], updated: Sequence[Any]) -> int:
    lance = _library()
    if not (made or updated or base.gone):
        return base.recorded
    operation = lance.LanceOperation.Update(
        removed_fragment_ids=list(base.gone), updated_fragments=list(updated), new_fragments=list(made)
    )
    kept = [fragment.metadata for fragment in base.kept.values()]
    return _committed(store, table, operation, base.dataset.version, base.dataset, [*kept, *made])


def _committed(
    store: Store, table: str, operation: Any, read_version: int | None, target: Any, expected: Sequence[Any]
) -> int:
    """Commit, and check that the new version holds exactly the expected fragments."""
    lance = _library()
    try:
        dataset = lance.LanceDataset.commit(target, operation, read_version=read_version, max_retries=0)
        found = [_data_files(fragment.metadata) for fragment in dataset.get_fragments()]
        mixed = found != [_data_files(metadata) for metadata in expected]
    except lance.commit.CommitConflictError:
        mixed = True
    if mixed:
        raise CommitConflictError(
            f"another writer changed {store.path(_folder(table))} while this build did: nothing of this one was "
            "committed; let no other program write there, and run the command again"
        )
    return int(dataset.version)


def _data_files(metadata: Any) -> list[str]:
    return [file.path for file in metadata.files]


def _files_of(store: Store, table: str, version: int) -> list[str]:
    """Names of all files that one version of a table consists of."""
    dataset = _library().dataset(str(store.path(_folder(table))), version=version)
    rows = dataset.tracked_files(min_version=version).read_all().to_pylist()
    return sorted({f"{_folder(table)}/{row['path']}" for row in rows if row["version"] == version})


def _tag(store: Store, table: str, version: int, content_id: str) -> None:
    """Let the tag `content_id` name this version; Lance's own clean-up spares tagged ones."""
    tags = _library().dataset(str(store.path(_folder(table)))).tags
    tag = tags.list().get(content_id)
    if tag is None:
        tags.create(content_id, version)
    elif tag["version"] != version:
        tags.update(content_id, version)


# --- reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Columns of consecutive chunks."""

    tokens: npt.NDArray[np.int32]
    """`[t]`, the chunks' own tokens one after another."""
    embeddings: StoredRows
    """`[n, d_enc]`."""
    scores: npt.NDArray[np.float32] | None
    """`[n]`, None without the column."""


@dataclass(frozen=True, slots=True)
class _Spans:
    """The live passages of a fragment, in order."""

    rows: npt.NDArray[np.int32]
    """Row of each in its shard, ascending."""
    first_chunk: npt.NDArray[np.int64]
    """Offset of each one's first chunk among the fragment's live chunks."""
    num_chunks: npt.NDArray[np.int64]


class LanceReader:
    """The LanceDB tables of one generation, read by row. Thread-safe as far as Lance is; writes nothing.

    Raises UsageError (ConfigError) for an index without Lance tables, MissingExtraError without Lance, and
    CorruptIndexError where the tables are not those of the manifest.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        if manifest.lance is None:
            raise ConfigError(
                f"{store.location} has no Lance tables in version {manifest.version}, expected an index built with "
                "--tables lance: build it so, or leave out --tables"
            )
        if is_uri(store.location):
            raise ConfigError(
                f"the Lance tables of {store.location} were asked for, expected a folder of this machine: copy "
                "the index to one, or leave out --tables"
            )
        if {shard.name for shard in manifest.shards} != set(manifest.lance.shards):
            raise CorruptIndexError(
                f"{store.location}: the Lance tables of version {manifest.version} hold other shards than its manifest "
                "lists: run `refrag index repair`"
            )
        self._scored = all("scores" in shard.tables for shard in manifest.shards)
        self._dtype = manifest.parameters.embedding_dtype
        self._dim = manifest.parameters.embedding_dim
        self._passages = _at(store, manifest.lance.tables["passages"])
        self._chunks = _at(store, manifest.lance.tables["chunks"])
        self._positions = {name: at for at, name in enumerate(manifest.lance.shards)}
        self._spans: dict[str, _Spans] = {}

    @cached_property
    def _fragments(self) -> list[Any]:
        return list(self._passages.get_fragments())

    @cached_property
    def _passage_starts(self) -> list[int]:
        return [0, *accumulate(fragment.count_rows() for fragment in self._fragments)]

    @cached_property
    def _chunk_starts(self) -> list[int]:
        return [0, *accumulate(fragment.count_rows() for fragment in self._chunks.get_fragments())]

    def _of(self, shard: str) -> _Spans:
        if shard not in self._spans:
            table = self._fragments[self._positions[shard]].to_table(columns=["row", "num_chunks"])
            num_chunks = table.column("num_chunks").to_numpy().astype(np.int64)
            self._spans[shard] = _Spans(table.column("row").to_numpy(), np.cumsum(num_chunks) - num_chunks, num_chunks)
        return self._spans[shard]

    def _locate(self, shard: str, row: int) -> tuple[_Spans, int]:
        spans = self._of(shard)
        at = int(np.searchsorted(spans.rows, row))
        if at == len(spans.rows) or spans.rows[at] != row:
            raise CorruptIndexError(
                f"{self._passages.uri} has no live row {row} of shard {shard}, expected one: "
                "run `refrag index verify`, then `refrag index repair`"
            )
        return spans, at

    def fetch(self, passages: Sequence[tuple[str, int]]) -> list[ChunkRows]:
        """The chunks of passages `(shard, row)`, all in one read."""
        located = [(shard, *self._locate(shard, row)) for shard, row in passages]
        counts = [int(spans.num_chunks[at]) for _, spans, at in located]
        if not sum(counts):
            return [self._rows(self._empty, 0, 0) for _ in passages]
        starts = [self._chunk_starts[self._positions[shard]] + spans.first_chunk[at] for shard, spans, at in located]
        wanted = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        table = self._chunks.take(wanted.tolist(), columns=self._columns)
        bounds = [0, *accumulate(counts)]
        return [self._rows(table, start, stop) for start, stop in pairwise(bounds)]

    @property
    def _columns(self) -> list[str]:
        scale = ["scale"] if self._dtype == "int8" else []
        return ["tokens", "embedding", *scale, *(["nll"] if self._scored else [])]

    @property
    def _empty(self) -> pa.Table:
        return self._chunks.schema.empty_table().select(self._columns)

    def _rows(self, table: pa.Table, start: int, stop: int) -> ChunkRows:
        part = table.slice(start, stop - start)
        columns = {name: part.column(name).combine_chunks() for name in part.column_names}
        rows = columns["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(-1, self._dim)
        scales = columns["scale"].to_numpy(zero_copy_only=False) if self._dtype == "int8" else None
        embeddings = rows if scales is None else Int8Rows(rows, scales)
        tokens = columns["tokens"].flatten().to_numpy(zero_copy_only=False)
        return ChunkRows(tokens, embeddings, columns["nll"].to_numpy(zero_copy_only=False) if self._scored else None)

    def passage(self, shard: str, row: int) -> dict[str, Any]:
        """One row of the passages table, its vector left out."""
        _, at = self._locate(shard, row)
        columns = [name for name in self._passages.schema.names if name != "vector"]
        table = self._passages.take([self._passage_starts[self._positions[shard]] + at], columns=columns)
        return dict(table.to_pylist()[0])


def differences(store: Store, manifest: Manifest, table: str) -> Iterator[str]:
    """What a table's recorded version has otherwise than the manifest says, in words; nothing of a whole one."""
    if manifest.lance is None:
        return
    dataset = _at(store, manifest.lance.tables[table])
    rows, expected = dataset.count_rows(), getattr(manifest.counts, table)
    if rows != expected:
        yield f"{rows} rows, expected {expected}"
    if not dataset.schema.equals(LiveRows(manifest.shards, manifest.parameters, {}).schema(table)):
        yield "its columns are not those of the Parquet shards"
    fragments = len(dataset.get_fragments())
    if fragments != len(manifest.lance.shards):
        yield f"{fragments} fragments, expected one for each of {len(manifest.lance.shards)} shards"
    unlisted = sorted(set(_files_of(store, table, dataset.version)) - set(manifest.files))
    if unlisted:
        yield f"{unlisted[0]} is part of it, and the manifest lists no digest for it"


def records_of(manifest: Manifest) -> dict[str, FileRecord]:
    """The files of a generation's Lance tables."""
    return {name: record for name, record in manifest.files.items() if name.startswith(f"{FOLDER}/")}
