"""Equal passages are searched once, and which one is a matter of the documents alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refrag.pipelines.assembly import publish_duplicates, removed_documents
from refrag.pipelines.compact import CompactOptions, compact_index
from refrag.pipelines.duplicates import duplicate_passages
from refrag.pipelines.engines.local import LocalEngine
from refrag_core.index_reader import IndexReader
from refrag_core.manifest import ParentInfo, commit, read_manifest
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex

SAME = "The very same words in several documents."
RECORDS = [
    {"id": "a", "text": "Something that only the first says."},
    {"id": "b", "text": SAME},
    {"id": "c", "text": SAME},
    {"id": "d", "text": SAME},
    {"id": "e", "text": "Something that only the last says."},
]


@pytest.fixture
def small(tmp_path: Path, own_cache: Path) -> SmallIndex:
    return SmallIndex(tmp_path, RECORDS, shard_bytes=60)


def found(index: SmallIndex) -> list[str]:
    """Documents that a search can reach."""
    reader = IndexReader(index.path)
    query = np.ones(48, np.float32) / np.float32(48**0.5)
    return sorted(reader.describe(ref).document_id for ref, _ in reader.search(query, 100))


def test_the_first_of_equal_passages_is_searched(small: SmallIndex) -> None:
    report = small.build(dedup_passages=True)
    assert (report.duplicate_passages, report.passages, report.indexed) == (2, 5, 5)
    assert found(small) == ["a", "b", "e"]
    assert verify_index(FolderStore(small.path)).problems == ()


def test_the_next_one_takes_its_place_when_the_first_leaves(small: SmallIndex) -> None:
    small.build(dedup_passages=True)
    small.write([record for record in RECORDS if record["id"] != "b"])
    report = small.build(delete_missing=True)
    assert (report.duplicate_passages, report.encoded_chunks) == (1, 0)
    assert found(small) == ["a", "c", "e"]


def test_it_is_a_parameter_of_the_index_and_encodes_nothing(small: SmallIndex) -> None:
    plain = small.build()
    assert found(small) == ["a", "b", "c", "d", "e"]
    hidden = small.build(dedup_passages=True)
    assert (hidden.version, hidden.encoded_chunks, hidden.unchanged) == (2, 0, 5)
    assert hidden.content_id != plain.content_id
    kept = small.build()  # nothing said: as the index has it
    assert (kept.committed, kept.content_id) == (False, hidden.content_id)
    shown = small.build(dedup_passages=False)
    assert (shown.version, shown.content_id, shown.duplicate_passages) == (3, plain.content_id, 0)
    assert found(small) == ["a", "b", "c", "d", "e"]


def test_without_duplicates_the_switch_still_counts(small: SmallIndex) -> None:
    small.write(RECORDS[:2])
    plain = small.build()
    assert small.build(dedup_passages=True).content_id != plain.content_id
    assert read_manifest(FolderStore(small.path)).duplicates is None


def test_compaction_hides_the_same_passages(small: SmallIndex) -> None:
    before = small.build(dedup_passages=True)
    report = compact_index(CompactOptions(index=small.path, shard_bytes=100_000), LocalEngine(0))
    assert (report.committed, report.content_id) == (True, before.content_id)
    assert found(small) == ["a", "b", "e"]


def test_verify_finds_a_list_of_other_rows(small: SmallIndex) -> None:
    small.build(dedup_passages=True)
    store = FolderStore(small.path)
    manifest = read_manifest(store)
    info, record = publish_duplicates(store, {manifest.shards[0].name: np.array([99])})
    assert info is not None
    assert record is not None
    parent = ParentInfo(manifest.version, manifest.build_id)
    files = {**manifest.files, record.name: record}
    commit(store, replace(manifest, version=2, parent=parent, duplicates=info, files=files))
    found = [(problem.file, problem.found) for problem in verify_index(store).problems]
    assert found == [(record.name, f"lists a passage that shard {manifest.shards[0].name} does not have")]


@pytest.mark.parametrize("rows_a_pass", [1, 2, 1000])
def test_memory_does_not_change_the_result(small: SmallIndex, rows_a_pass: int) -> None:
    small.build()
    store = FolderStore(small.path)
    manifest = read_manifest(store)
    removed = removed_documents(store, manifest, ())
    hidden = duplicate_passages(store, manifest.shards, removed, rows_a_pass=rows_a_pass)
    assert sum(len(rows) for rows in hidden.values()) == 2
