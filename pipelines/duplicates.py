"""Passages that say what another one says: found by their tokens, so that a search returns each text once.

Of equal passages the first counts, by document id and place in the document. Which are hidden is therefore a
function of the documents alone, and a passage comes back into search when the one before it leaves the index, or
fails a search's filter.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refrag.pipelines.assembly import Removed
from refrag.schemas import arrow
from refrag_core.manifest import LiveDocument, Shard, documents_of
from refrag_core.storage import Store
from refrag_core.tables import MappedColumn

ROWS_A_PASS = 1 << 24
"""Passages compared at once (24 bytes each); a larger index is gone through several times."""

NO_DUPLICATES = arrow.DUPLICATES.empty_table()


class _PassageTokens:
    """The tokens of a shard's passages, mapped."""

    def __init__(self, store: Store, shard: Shard) -> None:
        passages = store.path(shard.tables["passages"])
        self._first = MappedColumn(passages, "first_chunk", "<i8").slice_all()
        self._chunks = MappedColumn(passages, "num_chunks", "<i4").slice_all()
        self._tokens_in = MappedColumn(passages, "num_tokens", "<i4").slice_all()
        self._tokens = MappedColumn(store.path(shard.tables["chunks"]), "tokens", "<i4", shard.chunk_size)

    def digest(self, row: int) -> bytes:
        """16 bytes that stand for the tokens of one passage, however they are cut into chunks."""
        start = int(self._first[row])
        tokens = self._tokens.slice(start, start + int(self._chunks[row])).reshape(-1)[: int(self._tokens_in[row])]
        return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def duplicate_passages(
    store: Store, shards: Sequence[Shard], removed: Removed, *, rows_a_pass: int = ROWS_A_PASS
) -> pa.Table:
    """The live passages whose tokens an earlier live passage has, and that passage (`arrow.DUPLICATES`), in order.

    Args:
        rows_a_pass: bounds the memory; the result does not depend on it.
    """
    passes = max(1, -(-sum(shard.passages for shard in shards) // rows_a_pass))
    found = np.concatenate([_in_pass(store, shards, removed, number, passes) for number in range(passes)])
    places = found[np.argsort(found[:, 0])]
    names = pa.array([shard.name for shard in shards], pa.string())
    rows = [pa.array(places[:, at], pa.int32()) for at in (2, 4)]
    columns = [names.take(pa.array(places[:, 1])), rows[0], names.take(pa.array(places[:, 3])), rows[1]]
    return pa.Table.from_arrays(columns, schema=arrow.DUPLICATES)


def rows_by_shard(duplicates: pa.Table) -> Mapping[str, npt.NDArray[np.int64]]:
    """Per shard the rows of its passages that equal an earlier one."""
    if not duplicates.num_rows:
        return {}
    names = duplicates.column("shard").combine_chunks().dictionary_encode()
    shards, rows = names.indices.to_numpy(), duplicates.column("passage").to_numpy().astype(np.int64)
    order = np.argsort(shards, kind="stable")
    parts = np.split(rows[order], np.cumsum(np.bincount(shards))[:-1])
    return dict(zip(names.dictionary.to_pylist(), parts, strict=True))


def _in_pass(
    store: Store, shards: Sequence[Shard], removed: Removed, number: int, passes: int
) -> npt.NDArray[np.int64]:
    """`[n, 5]` int64 of the hidden passages among those whose digest falls to this pass.

    Columns: place in the order of all passages; shard and row; shard and row of the first of the equal ones.
    """
    digests = bytearray()
    places: list[tuple[int, int, int]] = []
    for order, (shard, row, digest) in enumerate(_digests(store, shards, removed)):
        if int.from_bytes(digest[:8], "little") % passes == number:
            digests += digest
            places.append((order, shard, row))
    if not places:
        return np.empty((0, 5), np.int64)
    keys = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
    _, first_of, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    table, first = np.array(places, np.int64), first_of[group.reshape(-1)]
    with_first = np.column_stack([table, table[first, 1:]])
    hidden: npt.NDArray[np.int64] = with_first[first != np.arange(len(table))]
    return hidden


def _digests(store: Store, shards: Sequence[Shard], removed: Removed) -> Iterator[tuple[int, int, bytes]]:
    """(shard, row, digest) of all live passages, in the order of document ids and then of ordinals."""
    numbers = {shard.name: number for number, shard in enumerate(shards)}
    tokens: dict[int, _PassageTokens] = {}
    for document in documents_of(store, shards, removed):
        number = numbers[document.shard]
        if number not in tokens:
            tokens[number] = _PassageTokens(store, shards[number])
        for row in _rows(document):
            yield number, row, tokens[number].digest(row)


def _rows(document: LiveDocument) -> range:
    return range(document.first_passage, document.first_passage + document.num_passages)
