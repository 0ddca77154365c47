"""Equal passages are searched once, and which one is a matter of the documents alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from refrag.pipelines.assembly import publish_duplicates, removed_documents
from refrag.pipelines.compact import CompactOptions, compact_index
from refrag.pipelines.duplicates import duplicate_passages
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.progress import Silent
from refrag.pipelines.repair import RepairOptions, repair_index
from refrag.schemas import arrow
from refrag_core.errors import CorruptIndexError
from refrag_core.generations import roll_back
from refrag_core.index_reader import IndexReader
from refrag_core.lexical import LexicalIndex
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
    shard = manifest.shards[0].name
    places = {"shard": [shard], "passage": [99], "first_shard": [shard], "first_passage": [0]}
    info, record = publish_duplicates(store, pa.table(places, schema=arrow.DUPLICATES))
    assert info is not None
    assert record is not None
    parent = ParentInfo(manifest.version, manifest.build_id)
    files = {**manifest.files, record.name: record}
    commit(store, replace(manifest, version=2, parent=parent, duplicates=info, files=files))
    found = [(problem.file, problem.found) for problem in verify_index(store).problems]
    assert found == [(record.name, f"lists a passage that shard {manifest.shards[0].name} does not have")]


def by_words(index: SmallIndex) -> list[bytes]:
    """Ids of the passages that share words with what several documents say, best first."""
    reader = IndexReader(index.path)
    return [reader.passage_id(ref) for ref in LexicalIndex(reader).rank(SAME, 100)]


def test_equal_passages_are_ranked_by_words_in_the_order_of_their_ids(small: SmallIndex) -> None:
    small.build()
    ranked = by_words(small)
    assert ranked[:3] == sorted(ranked[:3])
    compact_index(CompactOptions(index=small.path, shard_bytes=100_000), LocalEngine(0))
    assert by_words(small) == ranked


@pytest.mark.parametrize("rows_a_pass", [1, 2, 1000])
def test_memory_does_not_change_the_result(small: SmallIndex, rows_a_pass: int) -> None:
    small.build()
    store = FolderStore(small.path)
    manifest = read_manifest(store)
    removed = removed_documents(store, manifest, ())
    hidden = duplicate_passages(store, manifest.shards, removed, rows_a_pass=rows_a_pass)
    assert hidden.num_rows == 2
    assert hidden == duplicate_passages(store, manifest.shards, removed)


YEARS = [{**record, "year": 2000 + number} for number, record in enumerate(RECORDS)]


def passing(index: SmallIndex, where: str) -> list[str]:
    """Documents that a filtered search can reach, by vectors and by words alike."""
    reader = IndexReader(index.path)
    query = np.ones(48, np.float32) / np.float32(48**0.5)
    among = reader.passing(where)
    ids = sorted(reader.describe(ref).document_id for ref, _ in reader.search(query, 100, among))
    words = LexicalIndex(reader).rank("something very same words documents says", 100, among)
    assert sorted(reader.describe(ref).document_id for ref in words) == ids
    assert among.rows == len(ids)
    return ids


@pytest.mark.parametrize("compacted", [False, True])
def test_the_first_equal_that_passes_a_filter_is_found(small: SmallIndex, *, compacted: bool) -> None:
    small.write(YEARS)
    small.build(dedup_passages=True)
    if compacted:
        compact_index(CompactOptions(index=small.path, shard_bytes=100_000), LocalEngine(0))
    assert passing(small, "year >= 2000") == ["a", "b", "e"]
    assert passing(small, "year >= 2002") == ["c", "e"]
    assert passing(small, "year = 2000 or year = 2003") == ["a", "d"]
    assert passing(small, "year = 2004") == ["e"]


def test_no_tombstoned_passage_stands_in(small: SmallIndex) -> None:
    small.write(YEARS)
    small.build(dedup_passages=True, shard_bytes=100_000)
    small.write([record for record in YEARS if record["id"] != "c"])
    small.build(dedup_passages=True, delete_missing=True)
    assert passing(small, "year >= 2002") == ["d", "e"]


def test_a_damaged_list_is_made_again(small: SmallIndex) -> None:
    small.build(dedup_passages=True)
    store = FolderStore(small.path)
    before = read_manifest(store)
    assert before.duplicates is not None
    path = store.path(before.duplicates.file)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    options = RepairOptions(index=small.path, checkpoint=small.options.models.checkpoint, device="cpu")
    report = repair_index(options, LocalEngine(0), Silent())
    assert (report.version, report.repaired) == (1, (before.duplicates.file,))
    assert found(small) == ["a", "b", "e"]


def test_a_damaged_list_of_an_older_generation_is_not_taken_over(small: SmallIndex) -> None:
    small.build(dedup_passages=True)
    store = FolderStore(small.path)
    first = read_manifest(store)
    assert first.duplicates is not None
    small.build(dedup_passages=False)
    path = store.path(first.duplicates.file)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # as long as it was
    options = RepairOptions(index=small.path, checkpoint=small.options.models.checkpoint, device="cpu")
    report = repair_index(options, LocalEngine(0), Silent())
    assert (report.version, report.lost) == (2, (first.duplicates.file,))
    with pytest.raises(CorruptIndexError, match="is missing"):
        roll_back(store, 1)
    small.build(dedup_passages=True)
    assert read_manifest(store).duplicates == first.duplicates
    assert verify_index(store).problems == ()


def test_a_rollback_takes_the_switch_back_where_nothing_is_hidden(small: SmallIndex) -> None:
    small.write(RECORDS[:2])
    plain = small.build()
    small.build(dedup_passages=True)
    report = roll_back(FolderStore(small.path), 1)
    assert (report.committed, report.content_id) == (True, plain.content_id)
