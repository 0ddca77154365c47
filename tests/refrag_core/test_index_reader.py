import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from refrag_core.errors import CorruptIndexError, IndexNotFoundError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import encode_manifest, read_manifest
from refrag_core.storage import FolderStore
from tests.small_index import SmallIndex, documents


@pytest.fixture(scope="module")
def reader(library: SmallIndex) -> IndexReader:
    return IndexReader(library.path)


def table(reader: IndexReader, shard: int, name: str) -> list[dict[str, Any]]:
    """A shard's table, read the ordinary way."""
    path = reader.store.path(reader.manifest.shards[shard].tables[name])
    return pq.read_table(path, memory_map=False).to_pylist()


def refs(reader: IndexReader) -> list[PassageRef]:
    """Every passage, dead ones too."""
    return [PassageRef(n, row) for n, shard in enumerate(reader.manifest.shards) for row in range(shard.passages)]


def test_the_fixture_has_what_the_tests_need(reader: IndexReader) -> None:
    manifest = reader.manifest
    assert manifest.version == 2
    assert len(manifest.segments) > 2
    assert max(len(segment.shards) for segment in manifest.segments) > 1
    assert manifest.tombstones is not None
    assert max(shard.passages for shard in manifest.shards) > 3  # several row groups of texts


def test_fetch_gives_what_the_tables_hold(reader: IndexReader) -> None:
    for number, shard in enumerate(reader.manifest.shards):
        chunks, embeddings = table(reader, number, "chunks"), table(reader, number, "embeddings")
        scores, at = table(reader, number, "scores"), 0
        for row, passage in enumerate(table(reader, number, "passages")):
            fetched = reader.fetch([PassageRef(number, row)])[0]
            own = slice(at, at + passage["num_chunks"])
            tokens = [np.frombuffer(c["tokens"], "<i4")[: c["num_tokens"]] for c in chunks[own]]
            assert fetched.tokens.tolist() == np.concatenate(tokens).tolist()
            assert fetched.embeddings.tobytes() == b"".join(e["embedding"] for e in embeddings[own])
            assert fetched.scores is not None
            assert fetched.scores.tolist() == [s["nll"] for s in scores[own]]
            assert fetched.chunk_size == shard.chunk_size == 16
            assert fetched.embeddings.shape == (passage["num_chunks"], 48)
            at += passage["num_chunks"]
        assert at == shard.chunks


def test_fetch_looks_at_the_file_itself(reader: IndexReader) -> None:
    """A copy for each request is what the memory map is there to spare."""
    fetched = reader.fetch([PassageRef(0, 0)])[0]
    assert not fetched.embeddings.flags.owndata
    assert not fetched.embeddings.flags.writeable
    assert not fetched.tokens.flags.writeable


def test_describe_finds_the_row_in_its_row_group(reader: IndexReader) -> None:
    for number in range(len(reader.manifest.shards)):
        for row, passage in enumerate(table(reader, number, "passages")):
            shown = reader.describe(PassageRef(number, row))
            assert (shown.passage_id, shown.document_id) == (passage["passage_id"].hex(), passage["document_id"])
            assert (shown.ordinal, shown.text) == (passage["ordinal"], passage["text"])
            assert (shown.char_start, shown.char_end) == (passage["char_start"], passage["char_end"])
            assert (shown.num_tokens, shown.num_chunks) == (passage["num_tokens"], passage["num_chunks"])
    described = {d.document_id: d.metadata for d in map(reader.describe, refs(reader))}
    assert described["guide#1"] == {"year": 1999}


def test_locate_is_the_segments_rows_laid_end_to_end(reader: IndexReader) -> None:
    numbers = {shard.name: number for number, shard in enumerate(reader.manifest.shards)}
    seen = []
    for number, segment in enumerate(reader.manifest.segments):
        expected = [PassageRef(numbers[name], row) for name in segment.shards for row in range(passages(reader, name))]
        assert [reader.locate(number, row) for row in range(segment.rows)] == expected
        seen += expected
    assert sorted(seen, key=lambda ref: (ref.shard, ref.row)) == refs(reader)


def passages(reader: IndexReader, name: str) -> int:
    return next(shard.passages for shard in reader.manifest.shards if shard.name == name)


def stored_vectors(reader: IndexReader) -> np.ndarray[Any, np.dtype[np.float32]]:
    """All passage embeddings float32 `[passages, 48]`, in the order of `refs`."""
    rows = [v["vector"] for n in range(len(reader.manifest.shards)) for v in table(reader, n, "vectors")]
    return np.stack([np.frombuffer(row, "<f2") for row in rows]).astype(np.float32)


def test_search_is_the_exact_search_over_the_stored_vectors(reader: IndexReader) -> None:
    """The segments' rows, the tables' rows and what `locate` says of them agree, in every segment."""
    vectors, everything = stored_vectors(reader), refs(reader)
    alive = np.concatenate([reader.live_rows(n) for n in range(len(reader.manifest.shards))])
    for query in vectors[::7]:
        scores = np.where(alive, vectors @ query, -np.inf)
        hits = reader.search(query, 5)
        assert [score for _, score in hits] == pytest.approx(sorted(scores, reverse=True)[:5], abs=1e-3)
        for ref, score in hits:
            assert score == pytest.approx(scores[everything.index(ref)], abs=1e-3)


def test_what_was_removed_is_not_live(reader: IndexReader) -> None:
    dead = [r for r in refs(reader) if not reader.live_rows(r.shard)[r.row]]
    texts = {reader.describe(ref).document_id: reader.describe(ref).text for ref in dead}
    assert set(texts) == {"doc-0005", "doc-0006"}
    assert not texts["doc-0005"].startswith("Edited")
    alive = [ref for ref, _ in reader.search(np.full(48, 48**-0.5, np.float32), 10_000)]
    assert len(alive) == len(set(alive)) == reader.manifest.counts.passages
    assert set(alive).isdisjoint(dead)


def test_masks_are_only_made_for_segments_that_lost_something(reader: IndexReader) -> None:
    by_segment = [[reader.locate(s, r) for r in range(seg.rows)] for s, seg in enumerate(reader.manifest.segments)]
    for mask, located in zip(reader.live, by_segment, strict=True):
        rows = [bool(reader.live_rows(ref.shard)[ref.row]) for ref in located]
        if mask is None:
            assert all(rows)
        else:
            assert mask.tolist() == rows
            assert not all(rows)
            assert not mask.flags.writeable  # what makes the packed bitmap be kept between searches
    assert {mask is None for mask in reader.live} == {True, False}


def test_older_generations_can_be_read(library: SmallIndex) -> None:
    before = IndexReader(library.path, 1)
    assert before.manifest.version == 1
    assert before.live == [None] * len(before.manifest.segments)
    text = next(d.text for d in map(before.describe, refs(before)) if d.document_id == "doc-0005")
    assert documents(6)[5]["text"].startswith(text)
    with pytest.raises(IndexNotFoundError, match=r"holds no generation 7: expected generation 7 under versions/"):
        IndexReader(library.path, 7)


def test_reading_writes_nothing(library: SmallIndex) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in library.path.rglob("*")}

    before = state()
    reader = IndexReader(library.path)
    reader.search(np.ones(48, np.float32), 3)
    reader.fetch(refs(reader))
    reader.describe(PassageRef(0, 0))
    assert state() == before


def test_a_shard_whose_tables_have_other_rows_is_refused(library: SmallIndex, tmp_path: Path) -> None:
    shutil.copytree(library.path, tmp_path / "index")
    store = FolderStore(tmp_path / "index")
    manifest = read_manifest(store)
    liar = replace(manifest, shards=[replace(manifest.shards[0], chunks=7), *manifest.shards[1:]])
    store.path(manifest.name).write_bytes(encode_manifest(liar))
    with pytest.raises(CorruptIndexError, match=rf"{manifest.shards[0].name} has \(passages, chunks, embeddings\)"):
        IndexReader(store.root).fetch([PassageRef(0, 0)])


def test_an_index_without_scores_has_none(tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, documents(2))
    small.build()
    assert IndexReader(small.path).fetch([PassageRef(0, 0)])[0].scores is None
