"""Filters pushed into the search: with tombstones, over several segments, exactly and through the vector index."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from refrag_core import index_reader
from refrag_core.errors import FilterError
from refrag_core.index_reader import IndexReader, PassageRef, Passing
from refrag_core.vector_index import VectorIndex
from tests.small_index import SmallIndex

Rule = Callable[[dict[str, Any]], bool]

FILTERS: dict[str, Rule] = {
    "year >= 1920": lambda m: m["year"] >= 1920,
    "year < 1910 or year = 2001": lambda m: m["year"] < 1910 or m["year"] == 2001,
    "importance > .3 and year < 1935": lambda m: m.get("importance", 0) > 0.3 and m["year"] < 1935,
    "year is not null": lambda _: True,
}
"""Conditions on the library's documents, and what they mean in Python."""


@pytest.fixture(autouse=True)
def _no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared exactly is a matter of EXACT_ROWS alone."""
    monkeypatch.setattr(index_reader, "EXACT_ONE_IN", 1 << 40)


@pytest.fixture
def reader(library: SmallIndex) -> IndexReader:
    return IndexReader(library.path)


def queries() -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(5).normal(size=(6, 48)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def passages(reader: IndexReader) -> list[tuple[PassageRef, dict[str, Any], npt.NDArray[np.float32]]]:
    """Every live passage with its metadata and vector, read the ordinary way."""
    found = []
    for number, shard in enumerate(reader.manifest.shards):
        tables = {name: reader.store.path(shard.tables[name]) for name in ("passages", "vectors")}
        metadata = pq.read_table(tables["passages"]).column("metadata").to_pylist()
        vectors = pq.read_table(tables["vectors"]).column("vector").to_pylist()
        found += [
            (PassageRef(number, int(row)), json.loads(metadata[row]), np.frombuffer(vectors[row], "<f2"))
            for row in np.flatnonzero(reader.live_rows(number))
        ]
    return found


def test_the_index_has_what_the_tests_need(reader: IndexReader) -> None:
    assert reader.manifest.tombstones is not None
    assert len(reader.manifest.segments) > 2
    assert reader.manifest.tombstones.documents == 2


def test_only_live_passages_of_the_right_documents_pass(reader: IndexReader) -> None:
    """doc-0005 of 1905 was edited to be of 2001, doc-0006 of 1906 was deleted: both old rows are still there."""
    expected = [ref for ref, metadata, _ in passages(reader) if metadata["year"] in (1905, 1906, 2001)]
    passing = reader.passing("year in (1905, 1906, 2001)")
    found = [
        reader.locate(segment, int(row)) for segment, mask in enumerate(passing.masks) for row in np.flatnonzero(mask)
    ]
    assert sorted(found, key=lambda ref: (ref.shard, ref.row)) == expected
    assert passing.rows == len(expected) > 0
    assert {reader.describe(ref).metadata["year"] for ref in found} == {2001}
    assert not any(mask.flags.writeable for mask in passing.masks)


def test_dead_documents_are_counted_in_no_filter(reader: IndexReader) -> None:
    assert reader.passing("year is not null or year is null").rows == reader.manifest.counts.passages
    assert reader.passing("document_id = 'doc-0006'").rows == 0


@pytest.mark.parametrize("where", FILTERS)
@pytest.mark.parametrize("exact_rows", [0, 1 << 20], ids=["through the vector index", "exactly"])
def test_a_filtered_search_is_the_ranking_of_what_passes(
    reader: IndexReader, monkeypatch: pytest.MonkeyPatch, where: str, exact_rows: int
) -> None:
    """Recomputed from the stored vectors of the passages whose metadata Python finds to fulfil the condition."""
    monkeypatch.setattr(index_reader, "EXACT_ROWS", exact_rows)
    right = [(ref, vector) for ref, metadata, vector in passages(reader) if FILTERS[where](metadata)]
    for query in queries():
        scores = np.array([vector.astype(np.float32) @ query for _, vector in right])
        order = np.argsort(-scores, kind="stable")[:8]
        hits = reader.search(query, 8, reader.passing(where))
        assert [score for _, score in hits] == pytest.approx(scores[order].tolist(), abs=1e-5)
        assert {ref for ref, _ in hits} == {right[at][0] for at in order}


@pytest.mark.parametrize("where", FILTERS)
def test_both_ways_give_the_same(reader: IndexReader, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    found = []
    for rows in (0, 1 << 20):
        monkeypatch.setattr(index_reader, "EXACT_ROWS", rows)
        found.append([reader.search(query, 1000, reader.passing(where)) for query in queries()])
    for through_index, exact in zip(*found, strict=True):
        assert [ref for ref, _ in through_index] == [ref for ref, _ in exact]
        assert [score for _, score in through_index] == pytest.approx([score for _, score in exact], abs=1e-5)


def test_few_rows_are_compared_without_the_vector_index(reader: IndexReader, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = reader.passing("year < 1910")
    monkeypatch.setattr(VectorIndex, "search", lambda *_, **__: pytest.fail("the vector index was asked"))
    assert len(reader.search(queries()[0], 5, passing)) == 5


def test_a_small_part_of_a_large_index_is_few(reader: IndexReader, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = reader.passing("year < 1910")
    monkeypatch.setattr(index_reader, "EXACT_ROWS", 0)
    monkeypatch.setattr(index_reader, "EXACT_ONE_IN", reader.vectors.num_rows // passing.rows)
    monkeypatch.setattr(VectorIndex, "search", lambda *_, **__: pytest.fail("the vector index was asked"))
    assert len(reader.search(queries()[0], 5, passing)) == 5


def test_many_rows_visit_more_lists_the_fewer_of_them_pass(
    reader: IndexReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    search = VectorIndex.search

    def spied(self: VectorIndex, *arguments: object, nprobe: int, **rest: object) -> object:
        asked.append(nprobe)
        return search(self, *arguments, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(VectorIndex, "search", spied)
    monkeypatch.setattr(index_reader, "EXACT_ROWS", 0)
    reader.vectors.nprobe = 3
    everything = reader.manifest.counts.passages
    for rows in (everything, everything // 2, 1):
        masks = reader.passing("year is not null").masks
        reader.search(queries()[0], 5, Passing(masks, rows))
    assert asked == [6, -(-6 * everything // (everything // 2)), 6 * everything]


@pytest.mark.parametrize("exact_rows", [0, 1 << 20])
def test_a_filter_that_nothing_fulfils_finds_nothing(
    reader: IndexReader, monkeypatch: pytest.MonkeyPatch, exact_rows: int
) -> None:
    monkeypatch.setattr(index_reader, "EXACT_ROWS", exact_rows)
    passing = reader.passing("year > 3000")
    assert passing.rows == 0
    assert reader.search(queries()[0], 5, passing) == []


def test_the_last_filters_are_remembered_and_no_more(reader: IndexReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_reader, "CACHED_FILTERS", 2)
    first = reader.passing("year > 1900")
    assert reader.passing("year > 1900") is first
    reader.passing("year > 1901")
    assert reader.passing("year > 1900") is first  # used last: the next one drops the other
    reader.passing("year > 1902")
    assert reader.passing("year > 1900") is first
    assert len(reader._passing) == 2


def test_a_filter_that_is_none_leaves_the_reader_usable(reader: IndexReader) -> None:
    for text in ("yeer > 1900", "year > 1900; drop table documents"):
        with pytest.raises(FilterError):
            reader.passing(text)
    assert reader.passing("year > 1900").rows > 0


def test_filtering_writes_nothing(library: SmallIndex, tmp_path: Path) -> None:
    copy = tmp_path / "index"
    shutil.copytree(library.path, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    reader = IndexReader(copy)
    reader.search(queries()[0], 3, reader.passing("year > 1900"))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
