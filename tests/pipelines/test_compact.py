"""Compaction: fewer shards and segments, no dead rows, the same content, and not one chunk encoded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag.pipelines import stages
from refrag.pipelines.compact import CompactOptions, CompactReport, compact_index
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.progress import Silent
from refrag.pipelines.repair import RepairOptions, repair_index
from refrag_core.errors import AccountingError, IndexLockedError, IndexNotFoundError
from refrag_core.index_reader import IndexReader
from refrag_core.manifest import read_manifest
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests.pipelines.test_build import passages
from tests.small_index import SmallIndex, documents


@pytest.fixture
def small(tmp_path: Path, own_cache: Path) -> SmallIndex:
    """An index after three updates: many small shards, some dead rows."""
    index = SmallIndex(tmp_path, documents(20))
    index.build()
    records = documents(20)
    for number in (3, 8, 14):
        records[number] = records[number] | {"text": f"Edited, number {number}. " + records[number]["text"]}
        index.write(records)
        index.build()
    return index


def compact(index: SmallIndex, **options: Any) -> CompactReport:
    settings = {"shard_bytes": 100_000} | options
    return compact_index(CompactOptions(index=index.path, **settings), LocalEngine(0))


def test_content_stays_and_dead_rows_go(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    before, old = passages(IndexReader(small.path)), read_manifest(FolderStore(small.path))
    for name in ("_encoder", "_retriever", "_tokenizer"):  # no model is as much as loaded
        monkeypatch.setattr(stages, name, lambda *_: pytest.fail("a model was loaded"))
    report = compact(small)
    assert (report.committed, report.version, report.content_id) == (True, 5, old.content_id)
    assert (report.shards_after, report.segments_after) == (1, 1)
    assert report.dropped_documents == 3
    new = read_manifest(FolderStore(small.path))
    assert new.tombstones is None
    assert (new.counts, new.vector_index) == (old.counts, old.vector_index)
    assert new.shards[0].counts == new.counts
    after = passages(IndexReader(small.path))
    assert after.keys() == before.keys()
    for name, entries in before.items():
        assert [entry[:5] for entry in after[name]] == [entry[:5] for entry in entries]
        assert all(np.array_equal(a[5], b[5]) for a, b in zip(after[name], entries, strict=True))
    assert verify_index(FolderStore(small.path)).problems == ()


def test_the_files_are_those_that_a_build_would_make(small: SmallIndex, tmp_path: Path) -> None:
    """Under the same names, so that `repair` can make each again, and byte for byte on a CPU."""
    compact(small)
    fresh = SmallIndex(tmp_path / "fresh", [], shard_bytes=10_000_000)
    records = documents(20)
    for number in (3, 8, 14):
        records[number] = records[number] | {"text": f"Edited, number {number}. " + records[number]["text"]}
    fresh.write(records)
    fresh.build()
    ours, theirs = (read_manifest(FolderStore(index.path)) for index in (small, fresh))
    assert ours.shards == theirs.shards
    assert {n: r for n, r in ours.files.items() if n.startswith("shards/")} == {
        n: r for n, r in theirs.files.items() if n.startswith("shards/")
    }


def test_a_second_one_finds_nothing_to_do(small: SmallIndex) -> None:
    first = compact(small)
    second = compact(small)
    assert (second.committed, second.version, second.build_id) == (False, first.version, first.build_id)
    assert not (small.path / "work").exists()


def test_shards_are_cut_at_the_size_asked_for(small: SmallIndex) -> None:
    few, many = compact(small, shard_bytes=2_000), compact(small, shard_bytes=100_000)
    assert few.shards_after > many.shards_after == 1


def test_shards_with_few_dead_rows_may_stay(small: SmallIndex) -> None:
    report = compact(small, shard_bytes=1, min_dead_fraction=0.9)
    tombstones = read_manifest(FolderStore(small.path)).tombstones
    assert tombstones is not None
    assert tombstones.documents + report.dropped_documents == 3


def test_scores_and_adaptive_chunk_sizes_survive(small: SmallIndex) -> None:
    small.build(score=True)
    before = read_manifest(FolderStore(small.path))
    compact(small)
    after = read_manifest(FolderStore(small.path))
    assert after.components == before.components
    assert all("scores" in shard.tables for shard in after.shards)
    assert verify_index(FolderStore(small.path)).problems == ()


def test_an_update_builds_on_it(small: SmallIndex) -> None:
    compact(small)
    small.write([*documents(20)[:19], {"id": "new", "text": "A new document."}])
    report = small.build(delete_missing=True)
    assert (report.new, report.changed, report.deleted, report.unchanged) == (1, 3, 1, 16)
    assert verify_index(FolderStore(small.path)).problems == ()


def test_a_damaged_table_of_it_can_be_repaired(small: SmallIndex) -> None:
    compact(small)
    manifest = read_manifest(FolderStore(small.path))
    name = manifest.shards[0].tables["embeddings"]
    (small.path / name).write_bytes(b"damaged")
    options = RepairOptions(index=small.path, checkpoint=str(small.models / "checkpoint"), device="cpu")
    report = repair_index(options, LocalEngine(0), Silent())
    assert (report.version, report.repaired) == (manifest.version, (name,))


def test_a_lost_row_is_noticed_before_the_commit(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    from refrag.pipelines import compact as compacting

    real = compacting.merged_shards
    monkeypatch.setattr(compacting, "merged_shards", lambda *arguments: list(real(*arguments))[:-1])
    with pytest.raises(AccountingError, match="nothing was committed"):
        compact(small, shard_bytes=2000)
    assert read_manifest(FolderStore(small.path)).version == 4


def test_not_beside_a_build_and_not_without_an_index(small: SmallIndex, tmp_path: Path) -> None:
    with FolderStore(small.path).lock(), pytest.raises(IndexLockedError, match="another build is running"):
        compact(small)
    with pytest.raises(IndexNotFoundError):
        compact_index(CompactOptions(index=tmp_path / "none"), LocalEngine(0))
    assert not (tmp_path / "none").exists()


def test_the_receipts_of_an_interrupted_build_stay(small: SmallIndex) -> None:
    store = FolderStore(small.path)
    store.replace("work/receipts/embeddings-1.json", b"{}")
    assert compact(small).committed
    assert [path.name for path in (small.path / "work" / "receipts").iterdir()] == ["embeddings-1.json"]


def test_lance_tables_and_int8_embeddings_follow(tmp_path: Path, own_cache: Path) -> None:
    pytest.importorskip("lancedb")
    index = SmallIndex(tmp_path / "other", documents(8), tables="lance")
    index.options = index.with_models(embedding_dtype="int8")
    index.build()
    index.write([documents(8)[0] | {"text": "Edited."}, *documents(8)[1:]])
    before = index.build()
    report = compact(index)
    assert (report.committed, report.content_id) == (True, before.content_id)
    assert verify_index(FolderStore(index.path)).problems == ()
    manifest = read_manifest(FolderStore(index.path))
    assert manifest.lance is not None
    assert set(manifest.lance.shards) == {shard.name for shard in manifest.shards}


def test_the_generation_says_what_it_is(small: SmallIndex) -> None:
    compact(small)
    body = json.loads((small.path / "versions" / "5.json").read_bytes())
    assert body["change"]["action"] == "compact"
