"""Chunk embeddings of text outside the index: encoded once, kept in memory and, where wanted, on disk.

A key is a digest of the encode fingerprint and the chunk's token ids, so an entry can never be stale: another
encoder asks for other keys. Rows are raw little-endian float16.
"""

import hashlib
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from refrag_core.encoder import Embeddings, Encoder, Ids
from refrag_core.errors import ConfigError

KEY_BYTES = 32
MEMORY_BYTES = 256 << 20
DISK_BYTES = 4 << 30

_QUERY_KEYS = 500
_BUSY_SECONDS = 30.0
_STORED = np.dtype("<f2")

Mask = npt.NDArray[np.bool_]


def chunk_keys(encode_fingerprint: str, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]]) -> list[bytes]:
    """A key of KEY_BYTES bytes for each row of `token_ids` int32 `[n, k]`; tokens behind `num_tokens` don't count."""
    start = hashlib.sha256(encode_fingerprint.encode())
    rows = np.ascontiguousarray(token_ids, dtype="<i4")
    keys = []
    for row, length in zip(rows, num_tokens.tolist(), strict=True):
        hasher = start.copy()
        hasher.update(row[:length].tobytes())
        keys.append(hasher.digest())
    return keys


class ChunkCache(Protocol):
    """Chunk embeddings by key."""

    def get_many(self, keys: Sequence[bytes]) -> tuple[Mask, Embeddings]:
        """found bool `[n]`, and embeddings float16 `[n, d_enc]` (zeros where not found)."""
        ...

    def put_many(self, keys: Sequence[bytes], embeddings: Embeddings) -> None:
        """Keep `embeddings` float16 `[n, d_enc]` under `keys`."""
        ...


class MemoryChunkCache:
    """The most recently used embeddings that fit in `max_bytes` of keys and rows. Safe for threads."""

    def __init__(self, dim: int, *, max_bytes: int = MEMORY_BYTES) -> None:
        self._dim = dim
        self._max_rows = max_bytes // (KEY_BYTES + 2 * dim)
        self._rows: OrderedDict[bytes, Embeddings] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get_many(self, keys: Sequence[bytes]) -> tuple[Mask, Embeddings]:
        """See ChunkCache."""
        found = np.zeros(len(keys), dtype=np.bool_)
        embeddings = np.zeros((len(keys), self._dim), dtype=np.float16)
        with self._lock:
            for index, key in enumerate(keys):
                row = self._rows.get(key)
                if row is not None:
                    self._rows.move_to_end(key)
                    found[index], embeddings[index] = True, row
        return found, embeddings

    def put_many(self, keys: Sequence[bytes], embeddings: Embeddings) -> None:
        """See ChunkCache."""
        _check_rows(keys, embeddings, self._dim)
        with self._lock:
            for key, row in zip(keys, embeddings, strict=True):
                self._rows[key] = row.copy()  # a view would keep its whole batch alive
                self._rows.move_to_end(key)
            while len(self._rows) > self._max_rows:
                self._rows.popitem(last=False)


class DiskChunkCache:
    """An SQLite file of embeddings, shared by any number of processes and threads; oldest rows go first.

    Args:
        path: the file, made with its folder when it does not exist.
        max_bytes: keys and rows kept.
    """

    def __init__(self, path: Path, dim: int, *, max_bytes: int = DISK_BYTES) -> None:
        self._dim = dim
        self._max_rows = max(1, max_bytes // (KEY_BYTES + 2 * dim))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS chunk_embeddings "
            "(id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, embedding BLOB NOT NULL)"
        )

    def close(self) -> None:
        """Close the file; the cache is not usable afterwards."""
        self._database.close()

    def get_many(self, keys: Sequence[bytes]) -> tuple[Mask, Embeddings]:
        """See ChunkCache."""
        rows: dict[bytes, bytes] = {}
        with self._lock:
            for start in range(0, len(keys), _QUERY_KEYS):
                rows.update(self._query(keys[start : start + _QUERY_KEYS]))
        found = np.zeros(len(keys), dtype=np.bool_)
        embeddings = np.zeros((len(keys), self._dim), dtype=np.float16)
        for index, key in enumerate(keys):
            row = rows.get(key)
            if row is not None and len(row) == 2 * self._dim:
                found[index], embeddings[index] = True, np.frombuffer(row, dtype=_STORED)
        return found, embeddings

    def _query(self, keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        marks = ",".join("?" * len(keys))
        query = f"SELECT key, embedding FROM chunk_embeddings WHERE key IN ({marks})"
        return self._database.execute(query, list(keys)).fetchall()

    def put_many(self, keys: Sequence[bytes], embeddings: Embeddings) -> None:
        """See ChunkCache."""
        _check_rows(keys, embeddings, self._dim)
        rows = zip(keys, (row.tobytes() for row in embeddings.astype(_STORED)), strict=True)
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._database.executemany(
                    "INSERT OR REPLACE INTO chunk_embeddings (key, embedding) VALUES (?, ?)", rows
                )
                self._database.execute(
                    "DELETE FROM chunk_embeddings WHERE id <= (SELECT max(id) FROM chunk_embeddings) - ?",
                    (self._max_rows,),
                )
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def _check_rows(keys: Sequence[bytes], embeddings: Embeddings, dim: int) -> None:
    if embeddings.shape != (len(keys), dim):
        raise ConfigError(
            f"cannot cache embeddings of shape {embeddings.shape} under {len(keys)} keys; expected ({len(keys)}, {dim})"
        )


class CachedChunkEncoder:
    """An encoder that asks its caches first, in order, and encodes each distinct missing chunk once.

    Args:
        encoder: encodes what no cache has.
        caches: fastest first; what a later one or the encoder gives is put into those before it.
    """

    def __init__(self, encoder: Encoder, caches: Sequence[ChunkCache]) -> None:
        self._encoder = encoder
        self._caches = list(caches)
        self.hits = 0
        self.misses = 0

    @property
    def dim(self) -> int:
        """d_enc."""
        return self._encoder.dim

    @property
    def fingerprint(self) -> str:
        """The encode fingerprint."""
        return self._encoder.fingerprint

    def encode(self, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]]) -> Embeddings:
        """See Encoder. `hits` and `misses` count rows; a chunk twice in one call that had to be encoded is two
        misses. Rows that are not finite are returned and not cached."""
        keys = chunk_keys(self.fingerprint, token_ids, num_tokens)
        embeddings = np.zeros((len(keys), self.dim), dtype=np.float16)
        missing = np.arange(len(keys))
        for depth, cache in enumerate(self._caches):
            missing = self._fill(depth, cache, keys, missing, embeddings)
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if len(missing):
            embeddings[missing] = self._encode_distinct(keys, missing, token_ids, num_tokens)
        return embeddings

    def _fill(
        self,
        depth: int,
        cache: ChunkCache,
        keys: Sequence[bytes],
        missing: npt.NDArray[np.int64],
        embeddings: Embeddings,
    ) -> npt.NDArray[np.int64]:
        """Copy what `cache` has of `missing` to `embeddings` and the faster caches; what is missing still."""
        found, rows = cache.get_many([keys[index] for index in missing])
        embeddings[missing[found]] = rows[found]
        for faster in self._caches[:depth]:
            faster.put_many([keys[index] for index in missing[found]], rows[found])
        return missing[~found]

    def _encode_distinct(
        self,
        keys: Sequence[bytes],
        missing: npt.NDArray[np.int64],
        token_ids: Ids,
        num_tokens: npt.NDArray[np.integer[Any]],
    ) -> Embeddings:
        distinct = {keys[index]: place for place, index in reversed(list(enumerate(missing)))}
        first = missing[sorted(distinct.values())]
        encoded = self._encoder.encode(token_ids[first], num_tokens[first])
        finite = np.isfinite(encoded).all(axis=1)
        for cache in self._caches:
            cache.put_many([keys[index] for index in first[finite]], encoded[finite])
        row_of = {keys[index]: row for row, index in enumerate(first)}
        return encoded[[row_of[keys[index]] for index in missing]]
