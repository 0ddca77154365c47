"""The pass over all documents that makes a generation's content id, a shard at a time where ids allow.

The id is one digest over all documents in the order of their ids, so that one process has to see them all. Where a
shard's ids lie between its neighbours', as in a fresh index, its rows follow one another in that order, and what
they add to the digest is laid out from its columns at once; only shards whose ids overlap are merged row by row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from refrag_core.manifest import (
    NOTHING,
    Counts,
    Manifest,
    Shard,
    content_hasher,
    document_key,
    documents_of,
    encode_document,
    read_tombstones,
)
from refrag_core.storage import Store
from refrag_core.tables import open_table

Removed: TypeAlias = Mapping[str, Sequence[tuple[int, int, int]]]

_COLUMNS = ("document_id", "content_digest", "num_passages", "num_chunks", "num_tokens")
_LENGTH_BYTES = 8
_DIGEST_BYTES = 32
_DOCUMENTS_A_BLOCK = 4096


def content_of(store: Store, manifest: Manifest) -> tuple[str, Counts]:
    """The content id of a generation's live documents, and how many rows of each kind they have.

    Raises CorruptIndexError for a table that cannot be read.
    """
    hasher, counts = content_hasher(manifest.components, manifest.parameters), NOTHING
    for encoded, more in _blocks(store, manifest.shards, read_tombstones(store, manifest)):
        hasher.update(encoded)
        counts += more
    return hasher.hexdigest(), counts


def _blocks(store: Store, shards: Sequence[Shard], removed: Removed) -> Iterator[tuple[bytes, Counts]]:
    """What the documents add to the digest, in order, and their counts."""
    store.fetch(shard.tables["documents"] for shard in shards)
    for group in _overlapping(shards):
        if len(group) == 1:
            yield _shard_block(store, group[0], [row for row, _, _ in removed.get(group[0].name, ())])
        else:
            yield from _merged_blocks(store, group, removed)


def _overlapping(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """Shards by groups whose ranges of ids do not meet, in the order of ids."""
    group: list[Shard] = []
    last = b""
    for shard in sorted(shards, key=lambda shard: document_key(shard.first_document)):
        if group and document_key(shard.first_document) > last:
            yield group
            group = []
        last = max(last if group else b"", document_key(shard.last_document))
        group.append(shard)
    if group:
        yield group


def _shard_block(store: Store, shard: Shard, removed: Sequence[int]) -> tuple[bytes, Counts]:
    with open_table(store.path(shard.tables["documents"])) as file:
        table = file.read(columns=list(_COLUMNS), use_threads=False)
    if removed:
        live = np.ones(table.num_rows, bool)
        live[list(removed)] = False
        table = table.take(np.flatnonzero(live))
    table = table.combine_chunks()
    sums = [int(table.column(name).to_numpy().sum()) for name in _COLUMNS[2:]]
    counts = Counts(table.num_rows, *sums)
    return (_encoded(table) if table.num_rows else b""), counts


def _encoded(table: Any) -> bytes:
    """`encode_document` of every row, end to end, without a step in Python for each."""
    ids, digests = (table.column(name).chunk(0) for name in _COLUMNS[:2])
    rows = len(ids)
    bounds = np.frombuffer(ids.buffers()[1], "<i4")[ids.offset : ids.offset + rows + 1].astype(np.int64)
    keys = np.frombuffer(ids.buffers()[2], np.uint8)[bounds[0] : bounds[-1]]
    start = digests.offset * _DIGEST_BYTES
    digest_bytes = np.frombuffer(digests.buffers()[1], np.uint8)[start : start + rows * _DIGEST_BYTES]
    lengths, bounds = np.diff(bounds), bounds - bounds[0]
    ends = np.cumsum(lengths + _LENGTH_BYTES + _DIGEST_BYTES)
    starts = ends - lengths - _LENGTH_BYTES - _DIGEST_BYTES
    out = np.empty(int(ends[-1]), np.uint8)
    _lay(out, starts, lengths.astype("<u8").view(np.uint8).reshape(rows, _LENGTH_BYTES))
    _lay(out, ends - _DIGEST_BYTES, digest_bytes.reshape(rows, _DIGEST_BYTES))
    out[np.arange(len(keys)) + np.repeat(starts + _LENGTH_BYTES - bounds[:-1], lengths)] = keys
    return out.tobytes()


def _lay(out: npt.NDArray[np.uint8], at: npt.NDArray[np.int64], fields: npt.NDArray[np.uint8]) -> None:
    out[at[:, None] + np.arange(fields.shape[1])] = fields


def _merged_blocks(store: Store, shards: Sequence[Shard], removed: Removed) -> Iterator[tuple[bytes, Counts]]:
    encoded, counts = bytearray(), NOTHING
    for live in documents_of(store, shards, removed):
        encoded += encode_document(live.document_id, live.content_digest)
        counts += Counts(1, live.num_passages, live.num_chunks, live.num_tokens)
        if counts.documents == _DOCUMENTS_A_BLOCK:
            yield bytes(encoded), counts
            encoded, counts = bytearray(), NOTHING
    yield bytes(encoded), counts
