"""Verification: every file of an index against its digest, every table against what refers to it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refrag.schemas import arrow
from refrag_core import lance_tables
from refrag_core.content import content_of
from refrag_core.embedding_storage import LARGEST_CODE
from refrag_core.errors import CorruptIndexError, IndexNotFoundError
from refrag_core.generations import read_removed
from refrag_core.manifest import (
    CURRENT,
    REMOVED,
    Manifest,
    Parameters,
    Shard,
    beside,
    list_versions,
    read_manifest,
    version_name,
)
from refrag_core.storage import FileRecord, Store
from refrag_core.tables import MappedInt8Rows, iterate_rows, open_table
from refrag_core.vector_index import VectorIndex

_ROWS_A_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with an index, and the file that it lies in."""

    file: str
    found: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `refrag index verify`."""

    version: int | None
    content_id: str | None
    files: int
    """Files checked."""
    bytes: int
    problems: tuple[Problem, ...]
    unlisted: tuple[str, ...]
    """Files that no generation names (left by an interrupted build); harmless."""


def verify_index(store: Store, on_file: Callable[[FileRecord], None] | None = None) -> Verification:
    """Check all generations of an index: digests of every file, then row counts, references and the content id.

    Raises IndexNotFoundError where no generation was ever committed.
    """
    manifests, problems = _read_manifests(store)
    problems += _check_current(store)
    files = {record.name: record for manifest in manifests for record in manifest.files.values()}
    for record in files.values():
        problems += _check_file(store, record)
        if on_file is not None:
            on_file(record)
    newest = max(manifests, key=lambda manifest: manifest.version, default=None)
    damaged = {problem.file for problem in problems}
    if newest is not None and not damaged & set(newest.files):
        problems += _check_content(store, newest)
    versions = list_versions(store)
    named = set(files) | {CURRENT, REMOVED} | {name for version in versions for name in beside(version)}
    return Verification(
        version=newest.version if newest else None,
        content_id=newest.content_id if newest else None,
        files=len(files) + len(manifests) + 1,
        bytes=sum(record.bytes for record in files.values()),
        problems=tuple(problems),
        unlisted=tuple(name for name in store.files() if name not in named and not lance_tables.is_private(name)),
    )


def _read_manifests(store: Store) -> tuple[list[Manifest], list[Problem]]:
    versions = list_versions(store)
    if not versions and not store.exists(CURRENT):
        raise IndexNotFoundError(
            f"{store.location} holds no index: expected {version_name(1)}; build one with "
            f"`refrag index build CORPUS -o {store.location}`"
        )
    manifests, problems = [], []
    for version in versions:
        try:
            manifests.append(read_manifest(store, version))
        except CorruptIndexError as error:
            problems.append(Problem(version_name(version), str(error)))
    expected = {manifest.parent.version for manifest in manifests if manifest.parent}
    lost = expected - set(versions) - set(read_removed(store))
    problems += [Problem(version_name(v), "missing: a later generation was built on it") for v in sorted(lost)]
    return manifests, problems


def _check_current(store: Store) -> list[Problem]:
    versions = list_versions(store)
    try:
        hint = store.read(CURRENT).decode("ascii")
    except (OSError, ValueError):
        return [Problem(CURRENT, "missing or not readable")]
    if versions and hint == f"{versions[-1]}\n":
        return []
    number = int(hint) if hint.strip().isascii() and hint.strip().isdigit() and len(hint) < 20 else None
    if number is not None and hint == f"{number}\n" and number == (versions[-1] if versions else 0) + 1:
        return [Problem(version_name(number), f"missing: {CURRENT} says that it was committed")]
    return [Problem(CURRENT, f"says {hint[:20]!r}, the newest generation is {versions[-1] if versions else 'missing'}")]


def _check_file(store: Store, record: FileRecord) -> list[Problem]:
    size = store.size(record.name)
    if size is None:
        return [Problem(record.name, "missing")]
    if size != record.bytes:
        return [Problem(record.name, f"{size} bytes, expected {record.bytes}")]
    if store.record(record.name).digest != record.digest:
        return [Problem(record.name, f"its bytes changed: SHA-256 is not {record.digest[:16]}…")]
    return []


def _check_content(store: Store, manifest: Manifest) -> Iterator[Problem]:
    for shard in manifest.shards:
        yield from _check_shard(store, shard)
        yield from _check_embeddings(store, shard, manifest.parameters)
    yield from _check_segments(store, manifest)
    yield from _check_lance(store, manifest)
    if content_of(store, manifest)[0] != manifest.content_id:
        yield Problem(manifest.name, "the documents' digests do not give its content id")


def _check_shard(store: Store, shard: Shard) -> Iterator[Problem]:
    expected = {
        "documents": shard.documents,
        "passages": shard.passages,
        "chunks": shard.chunks,
        "embeddings": shard.chunks,
        "vectors": shard.passages,
        "scores": shard.chunks,
    }
    wrong = False
    for table, name in shard.tables.items():
        with open_table(store.path(name)) as file:
            rows = file.metadata.num_rows
        if rows != expected[table]:
            wrong = True
            yield Problem(name, f"{rows} rows, expected {expected[table]}")
    if not wrong:
        yield from _check_references(store, shard)


def _check_embeddings(store: Store, shard: Shard, parameters: Parameters) -> Iterator[Problem]:
    """The chunk embeddings have the form that the manifest says; int8 ones hold what quantising can give."""
    name, dim, dtype = shard.tables["embeddings"], parameters.embedding_dim, parameters.embedding_dtype
    with open_table(store.path(name)) as file:
        found = file.schema_arrow
    if not found.equals(arrow.embeddings(dim, dtype)):
        yield Problem(name, f"its columns are not those of {dim} entries a chunk in {dtype}")
    elif dtype == "int8" and not _are_codes(MappedInt8Rows(store.path(name), dim)):
        yield Problem(name, "some scale or code is none that quantising gives")


def _are_codes(rows: MappedInt8Rows) -> bool:
    blocks = (rows.slice(start, start + _ROWS_A_BLOCK) for start in range(0, rows.num_rows, _ROWS_A_BLOCK))
    return all(
        bool(
            (np.isfinite(block.scales) & (block.scales >= 0)).all()
            and (block.codes >= -LARGEST_CODE).all()
            and not block.codes[block.scales == 0].any()
        )
        for block in blocks
    )


def _columns(store: Store, name: str, *columns: str) -> dict[str, Any]:
    with open_table(store.path(name)) as file:
        table = file.read(columns=list(columns))
    return {column: table.column(column).to_numpy(zero_copy_only=False) for column in columns}


def _check_references(store: Store, shard: Shard) -> Iterator[Problem]:
    """Passages partition the chunks in order, and documents the passages."""
    passages = _columns(store, shard.tables["passages"], "document_id", "first_chunk", "num_chunks", "num_tokens")
    chunks = _columns(store, shard.tables["chunks"], "passage")
    starts = np.cumsum(passages["num_chunks"]) - passages["num_chunks"]
    if not np.array_equal(starts, passages["first_chunk"]):
        yield Problem(shard.tables["passages"], "its passages do not follow one another in the chunks")
    if not np.array_equal(-(-passages["num_tokens"] // shard.chunk_size), passages["num_chunks"]):
        yield Problem(shard.tables["passages"], "a passage's number of chunks does not follow from its tokens")
    if not np.array_equal(chunks["passage"], np.repeat(np.arange(shard.passages), passages["num_chunks"])):
        yield Problem(shard.tables["chunks"], "its chunks refer to other passages than those that hold them")
    documents = _columns(store, shard.tables["documents"], "document_id", "num_passages")
    if not np.array_equal(np.repeat(documents["document_id"], documents["num_passages"]), passages["document_id"]):
        yield Problem(shard.tables["passages"], "its passages belong to other documents than the documents table says")


def _check_segments(store: Store, manifest: Manifest) -> Iterator[Problem]:
    passages = {shard.name: shard.passages for shard in manifest.shards}
    covered = sorted(name for segment in manifest.segments for name in segment.shards)
    if covered != sorted(passages):
        yield Problem(manifest.name, "its segments do not cover every shard exactly once")
    for segment in manifest.segments:
        rows = VectorIndex.open([store.path(segment.file)], nprobe=1).num_rows
        if not rows == segment.rows == sum(passages[name] for name in segment.shards):
            yield Problem(segment.file, f"{rows} vectors, expected {segment.rows}")
    yield from _check_duplicates(store, manifest, passages)


def _check_duplicates(store: Store, manifest: Manifest, passages: Mapping[str, int]) -> Iterator[Problem]:
    """Hidden passages and what they equal are rows that there are."""
    if manifest.duplicates is None:
        return
    with open_table(store.path(manifest.duplicates.file)) as file:
        found = file.schema_arrow
    if not found.equals(arrow.DUPLICATES):
        yield Problem(manifest.duplicates.file, f"its columns are {', '.join(found.names)}")
        return
    largest: dict[str, int] = {}
    for row in iterate_rows(store.path(manifest.duplicates.file)):
        for shard, passage in ((row["shard"], row["passage"]), (row["first_shard"], row["first_passage"])):
            largest[shard] = max(largest.get(shard, 0), passage)
    for name, passage in largest.items():
        if passage >= passages.get(name, 0):
            yield Problem(manifest.duplicates.file, f"lists a passage that shard {name} does not have")


def _check_lance(store: Store, manifest: Manifest) -> Iterator[Problem]:
    """The LanceDB tables hold the live rows, as far as that can be told here: without Lance, digests have to do."""
    if manifest.lance is None or not lance_tables.is_installed():
        return
    if {shard.name for shard in manifest.shards} != set(manifest.lance.shards):
        yield Problem(manifest.name, "its LanceDB tables hold other shards than it lists")
        return
    for table in lance_tables.TABLES:
        for found in lance_tables.differences(store, manifest, table):
            yield Problem(manifest.lance.tables[table].manifest, found)
