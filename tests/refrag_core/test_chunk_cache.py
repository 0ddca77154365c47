from pathlib import Path

import numpy as np
import pytest

from refrag_core.chunk_cache import CachedChunkEncoder, DiskChunkCache, MemoryChunkCache, chunk_keys
from refrag_core.errors import ConfigError

DIM = 4
ROW_BYTES = 32 + 2 * DIM


class CountingEncoder:
    """Embeds a chunk as the sum of its tokens, and remembers what it was asked for."""

    dim = DIM
    fingerprint = "f"

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def encode(self, token_ids: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        sums = [row[:length].sum() for row, length in zip(token_ids, num_tokens, strict=True)]
        self.encoded += [int(value) for value in sums]
        return np.repeat(np.array(sums, np.float16)[:, None], DIM, axis=1)


def chunks(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(rows), 3), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([len(tokens) for tokens in rows])


def rows(*values: float) -> np.ndarray:
    return np.repeat(np.array(values, np.float16)[:, None], DIM, axis=1)


def test_keys_are_of_fingerprint_and_tokens_alone() -> None:
    ids, lengths = chunks([1, 2], [1, 2, 0], [1, 2])
    ids[2, 2] = 9  # behind the tokens
    keys = chunk_keys("f", ids, lengths)
    assert keys[0] == keys[2] != keys[1]
    assert chunk_keys("g", ids, lengths)[0] != keys[0]


def test_memory_keeps_the_most_recently_used() -> None:
    cache = MemoryChunkCache(DIM, max_bytes=2 * ROW_BYTES)
    cache.put_many([b"a", b"b"], rows(1, 2))
    cache.get_many([b"a"])
    cache.put_many([b"c"], rows(3))
    found, embeddings = cache.get_many([b"a", b"b", b"c"])
    assert found.tolist() == [True, False, True]
    assert embeddings[:, 0].tolist() == [1, 0, 3]
    assert len(cache) == 2


def test_a_cached_row_is_nobody_else_s_memory() -> None:
    cache, given = MemoryChunkCache(DIM), rows(1)
    cache.put_many([b"a"], given)
    given[:] = 9
    cache.get_many([b"a"])[1][:] = 8
    assert cache.get_many([b"a"])[1][0, 0] == 1


def test_disk_outlives_the_cache_that_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "chunks.sqlite"
    writer = DiskChunkCache(path, DIM)
    writer.put_many([b"a"], rows(7))
    writer.close()
    cache = DiskChunkCache(path, DIM)
    found, embeddings = cache.get_many([b"x", b"a"])
    cache.close()
    assert found.tolist() == [False, True]
    assert embeddings[1].tolist() == [7] * DIM


def test_two_connections_write_and_read_one_file(tmp_path: Path) -> None:
    first, second = (DiskChunkCache(tmp_path / "c", DIM) for _ in range(2))
    first.put_many([b"a", b"b"], rows(1, 2))
    second.put_many([b"b", b"c"], rows(5, 3))
    assert first.get_many([b"a", b"b", b"c"])[1][:, 0].tolist() == [1, 5, 3]
    first.close()
    second.close()


def test_disk_drops_the_oldest(tmp_path: Path) -> None:
    cache = DiskChunkCache(tmp_path / "c", DIM, max_bytes=3 * ROW_BYTES)
    for value in range(5):
        cache.put_many([bytes([value])], rows(value))
    assert cache.get_many([bytes([value]) for value in range(5)])[0].tolist() == [False, False, True, True, True]
    cache.close()


def test_disk_finds_many_at_once(tmp_path: Path) -> None:
    cache = DiskChunkCache(tmp_path / "c", DIM)
    keys = [number.to_bytes(2, "big") for number in range(1200)]
    cache.put_many(keys, rows(*range(1200)))
    found, embeddings = cache.get_many(keys[::-1])
    assert found.all()
    assert embeddings[:, 0].tolist() == list(range(1199, -1, -1))
    cache.close()


def test_each_missing_chunk_is_encoded_once() -> None:
    encoder = CountingEncoder()
    cached = CachedChunkEncoder(encoder, [MemoryChunkCache(DIM)])
    ids, lengths = chunks([1, 2], [4], [1, 2])
    assert cached.encode(ids, lengths)[:, 0].tolist() == [3, 4, 3]
    assert encoder.encoded == [3, 4]
    assert (cached.hits, cached.misses) == (0, 3)
    ids, lengths = chunks([5, 5], [4])
    assert cached.encode(ids, lengths)[:, 0].tolist() == [10, 4]
    assert encoder.encoded == [3, 4, 10]
    assert (cached.hits, cached.misses) == (1, 4)


def test_the_disk_fills_the_memory(tmp_path: Path) -> None:
    disk, memory, encoder = DiskChunkCache(tmp_path / "c", DIM), MemoryChunkCache(DIM), CountingEncoder()
    ids, lengths = chunks([1, 2], [4])
    CachedChunkEncoder(encoder, [disk]).encode(ids, lengths)
    fresh = CachedChunkEncoder(encoder, [memory, disk])
    assert fresh.encode(ids, lengths)[:, 0].tolist() == [3, 4]
    assert (fresh.hits, fresh.misses, len(memory)) == (2, 0, 2)
    disk.close()


def test_numbers_that_are_not_finite_are_returned_and_not_kept() -> None:
    encoder = CountingEncoder()
    cached = CachedChunkEncoder(encoder, [MemoryChunkCache(DIM)])
    ids, lengths = chunks([70_000], [1])
    with np.errstate(over="ignore"):
        assert np.isinf(cached.encode(ids, lengths)[0]).all()
        cached.encode(ids, lengths)
    assert encoder.encoded == [70_000, 1, 70_000]


def test_without_chunks_nothing_happens() -> None:
    cached = CachedChunkEncoder(CountingEncoder(), [MemoryChunkCache(DIM)])
    assert cached.encode(np.zeros((0, 3), np.int32), np.zeros(0, np.int64)).shape == (0, DIM)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(1, 2\) under 1 keys; expected \(1, 4\)"):
        MemoryChunkCache(DIM).put_many([b"a"], np.zeros((1, 2), np.float16))
