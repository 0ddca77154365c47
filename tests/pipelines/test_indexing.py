"""Segments, their quantizer, and the gate: over plain tables of random vectors, without a model."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from refrag.pipelines import indexing
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.indexing import BuiltIndex, build_vector_index, live_by_segment, live_passages, remake_segment
from refrag.pipelines.progress import Silent
from refrag.schemas import arrow
from refrag_core import vector_index
from refrag_core.errors import RecallGateError
from refrag_core.manifest import Manifest, Shard, TombstoneInfo
from refrag_core.storage import FolderStore, Store
from refrag_core.tables import fixed_binary, write_table
from refrag_core.vector_index import VectorIndex, exact_search, tune_nprobe
from refrag_core.work_folder import WorkFolder

DIM = 16


def unit(rows: int, seed: int) -> Any:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Retriever:
    """Gives every sentence a direction of its own, and remembers what it was asked."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def embed_queries(self, texts: Sequence[str]) -> Any:
        self.sentences += texts
        return np.concatenate([unit(1, zlib.crc32(text.encode())) for text in texts])


class Notes(Silent):
    """Keeps the log's lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return FolderStore(tmp_path)


def make_shard(store: Store, name: str, passages: int) -> Shard:
    """A shard with random vectors, and a text of two sentences a passage."""
    seed = zlib.crc32(name.encode())
    vectors = pa.Table.from_arrays([fixed_binary(unit(passages, seed).astype(np.float16))], schema=arrow.vectors(DIM))
    texts = [
        f"The first sentence of passage {i} in {name}. The second one of passage {i} in {name}."
        for i in range(passages)
    ]
    store.publish(f"shards/{name}/vectors.parquet", lambda path: write_table(path, vectors))
    store.publish(f"shards/{name}/passages.parquet", lambda path: write_table(path, pa.table({"text": texts})))
    tables = {kind: f"shards/{name}/{kind}.parquet" for kind in ("vectors", "passages")}
    return Shard(name, 16, name, name, passages, passages, passages, passages, tables)


def make_shards(store: Store, **sizes: int) -> list[Shard]:
    return [make_shard(store, name, passages) for name, passages in sizes.items()]


def build(store: Store, shards: Sequence[Shard], parent: Manifest | None = None, **changes: Any) -> BuiltIndex:
    settings: dict[str, Any] = {
        "dim": DIM,
        "live": {},
        "retriever": Retriever(),
        "min_recall": 0.5,
        "memory_budget_bytes": None,
        "progress": Silent(),
        "work": WorkFolder(store.shared_run_location()),
    }
    settings["work"].make()
    return build_vector_index(store, LocalEngine(0), shards, parent=parent, **settings | changes)


def generation(built: BuiltIndex, shards: Sequence[Shard], dead: int = 0) -> Manifest:
    """A parent as far as the index stage looks at one."""
    nothing: Any = None
    return Manifest(
        version=1,
        parent=None,
        content_id="",
        components=nothing,
        parameters=nothing,
        counts=nothing,
        shards=list(shards),
        segments=built.segments,
        vector_index=built.info,
        quarantine=nothing,
        tombstones=TombstoneInfo("t", dead, dead) if dead else None,
        checkpoint=nothing,
        files={record.name: record for record in built.files},
    )


def grouped(built: BuiltIndex) -> list[list[str]]:
    return [list(segment.shards) for segment in built.segments]


# --- segments -----------------------------------------------------------------------------------------


def test_shards_are_grouped_in_order_up_to_a_segment_s_rows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SEGMENT_ROWS", 100)
    shards = make_shards(store, a=40, b=60, c=1, d=120, e=10, f=90, g=1)
    built = build(store, shards)
    assert grouped(built) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert [segment.rows for segment in built.segments] == [100, 1, 120, 100, 1]


def test_a_segment_holds_the_vectors_of_its_shards_end_to_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SEGMENT_ROWS", 50)
    shards = make_shards(store, a=30, b=20, c=25)
    built = build(store, shards)
    index = VectorIndex.open([store.path(segment.file) for segment in built.segments], nprobe=1)
    assert index.rows_per_segment == (50, 25)
    for segment, row, name, at in ((0, 0, "a", 0), (0, 29, "a", 29), (0, 30, "b", 0), (0, 49, "b", 19), (1, 7, "c", 7)):
        found = index.search(unit(50, zlib.crc32(name.encode()))[at : at + 1], 1)
        assert (int(found.segments[0, 0]), int(found.rows[0, 0])) == (segment, row)
        assert float(found.scores[0, 0]) == pytest.approx(1, abs=2e-3)


def test_names_and_bytes_follow_from_the_vectors_alone(tmp_path: Path) -> None:
    def made(folder: str, **sizes: int) -> dict[str, str]:
        store = FolderStore(tmp_path / folder)
        return {record.name: record.digest for record in build(store, make_shards(store, **sizes)).files}

    assert made("one", a=30, b=20) == made("two", a=30, b=20)
    assert not made("one", a=30, b=20).keys() & made("three", a=30, c=20).keys()


def test_a_segment_made_again_is_the_same(store: Store) -> None:
    shards = make_shards(store, a=30, b=20)
    built = build(store, shards)
    (segment,) = built.segments
    before = store.path(segment.file).read_bytes()
    store.remove(segment.file)
    parameters: Any = type("Parameters", (), {"vector_dim": DIM})
    remake_segment(store, replace(generation(built, shards), parameters=parameters), segment)
    assert store.path(segment.file).read_bytes() == before


# --- updates ------------------------------------------------------------------------------------------


def test_an_update_adds_a_segment_and_keeps_the_rest(store: Store) -> None:
    first = make_shards(store, a=30, b=20)
    old = build(store, first)
    stamps = {record.name: store.path(record.name).stat().st_mtime_ns for record in old.files}
    shards = [*first, *make_shards(store, c=10, d=5)]
    new = build(store, shards, generation(old, first))
    assert new.segments[0] == old.segments[0]
    assert grouped(new) == [["a", "b"], ["c", "d"]]
    assert new.info.quantizer == old.info.quantizer
    assert {record.name for record in new.files} == {*stamps, new.segments[1].file}
    assert {name: store.path(name).stat().st_mtime_ns for name in stamps} == stamps


def test_nothing_changed_is_nothing_measured(store: Store) -> None:
    shards = make_shards(store, a=30, b=20)
    old, asked = build(store, shards), Retriever()
    new = build(store, shards, generation(old, shards), retriever=asked)
    assert (new.segments, new.info) == (old.segments, old.info)
    assert {record.name for record in new.files} == {record.name for record in old.files}
    assert asked.sentences == []
    again = build(store, shards, generation(old, shards), retriever=asked, live={"a": np.arange(30) > 3})
    assert again.segments == old.segments
    assert asked.sentences != []  # with passages gone, recall on those that live has to be measured


def test_another_kind_of_index_is_trained_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_index, "FLAT_MAX_VECTORS", 60)
    first = make_shards(store, a=30, b=20)
    old = build(store, first)
    assert (old.info.kind, old.info.nlist) == ("flat", 0)
    shards = [*first, *make_shards(store, c=400)]
    new = build(store, shards, generation(old, first))
    assert (new.info.kind, new.info.nlist) == ("ivf_sqfp16", 32)  # 2·sqrt(450) = 42.4
    assert new.info.quantizer != old.info.quantizer
    assert grouped(new) == [["a", "b", "c"]]
    assert not {record.name for record in new.files} & {record.name for record in old.files}
    assert new.info.recall_at_10 >= 0.98
    assert 1 <= new.info.nprobe <= 32


def test_a_smaller_memory_budget_is_another_kind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_index, "FLAT_MAX_VECTORS", 10)
    first = make_shards(store, a=50)
    old = build(store, first)
    shards = [*first, *make_shards(store, b=5)]
    new = build(store, shards, generation(old, first), memory_budget_bytes=100)
    assert (old.info.kind, new.info.kind) == ("ivf_sqfp16", "ivf_sq8")
    assert grouped(new) == [["a", "b"]]


def test_inverted_lists_are_kept_until_they_are_four_times_too_few(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_index, "FLAT_MAX_VECTORS", 10)
    first = make_shards(store, a=50)
    old = build(store, first)
    assert old.info.nlist == 8
    larger = [*first, *make_shards(store, b=400)]  # 32 lists now, four times as many
    assert build(store, larger, generation(old, first)).info.quantizer == old.info.quantizer
    largest = [*larger, *make_shards(store, c=900)]  # 64
    grown = build(store, largest, generation(old, first))
    assert grown.info.nlist == 64
    assert grouped(grown) == [["a", "b", "c"]]


def test_a_shard_that_is_gone_takes_the_old_segments_with_it(store: Store) -> None:
    first = make_shards(store, a=30, b=20, c=10)
    old = build(store, first)
    new = build(store, first[:2], generation(old, first))
    assert grouped(new) == [["a", "b"]]
    assert new.segments[0].file != old.segments[0].file


# --- the gate -----------------------------------------------------------------------------------------


@pytest.fixture
def recalls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next measurements will give."""
    upcoming: list[float] = []
    monkeypatch.setattr(indexing, "_tune", lambda *_: (1, upcoming.pop(0)))
    return upcoming


def test_recall_below_the_gate_publishes_nothing(store: Store, recalls: list[float]) -> None:
    recalls[:] = [0.4]
    message = (
        r"^recall@10 is 0\.400 on 30 held-out queries, expected at least 0\.5: nothing was published; lower --min-"
    )
    with pytest.raises(RecallGateError, match=message):
        build(store, make_shards(store, a=30))
    recalls[:] = [0.5]
    assert build(store, make_shards(store, a=30)).info.recall_at_10 == 0.5


def test_an_update_that_falls_below_the_gate_is_trained_anew(store: Store, recalls: list[float]) -> None:
    first, notes = make_shards(store, a=30), Notes()
    shards = [*first, *make_shards(store, b=20)]
    recalls[:] = [0.9, 0.4, 0.8]
    old = build(store, first)
    new = build(store, shards, generation(old, first), progress=notes)
    assert notes.lines == ["recall@10 fell to 0.400: training the index anew"]
    assert new.info.recall_at_10 == 0.8
    assert new.info.quantizer != old.info.quantizer
    assert grouped(new) == [["a", "b"]]
    recalls[:] = [0.4, 0.45]
    with pytest.raises(RecallGateError, match=r"recall@10 is 0\.450"):
        build(store, shards, generation(old, first))


def test_recall_is_measured_against_exact_search(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one visited list of many it falls, by exactly what a brute-force search misses."""
    monkeypatch.setattr(vector_index, "FLAT_MAX_VECTORS", 10)
    monkeypatch.setattr(vector_index, "RECALL_TARGET", 0.98)
    shards, asked = make_shards(store, a=300), Retriever()
    built = build(store, shards, retriever=asked)
    queries = np.concatenate([unit(1, zlib.crc32(text.encode())) for text in asked.sentences])
    vectors = unit(300, zlib.crc32(b"a")).astype(np.float16).astype(np.float32)
    truth = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    index = VectorIndex.open([store.path(built.segments[0].file)], nprobe=built.info.nprobe)
    found = index.search(queries, 10).rows
    recall = np.mean([len(set(t) & set(f)) / 10 for t, f in zip(truth.tolist(), found.tolist(), strict=True)])
    assert built.info.recall_at_10 == pytest.approx(recall, abs=2e-3)
    assert built.info.queries == len(asked.sentences) == indexing.GATE_QUERIES


def test_gate_queries_are_sentences_of_live_passages_and_never_whole_ones(store: Store) -> None:
    shards, asked = make_shards(store, a=30, b=20), Retriever()
    live = live_passages(shards, {"a": [(0, 0, 10)]})
    build(store, shards, retriever=asked, live=live)
    assert len(asked.sentences) == 40
    assert not [s for s in asked.sentences if s.endswith("in a.") and int(s.split()[5]) < 10]
    assert all(sentence.startswith("The second one of passage") for sentence in asked.sentences)


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Only one sentence stands here.", "Only one sentence st"),
        ("Short.", "Shor"),
        (
            "A first sentence of some length. A second sentence of some length. Third.",
            "A second sentence of some length.",
        ),
        ("これは最初の文でありかなり長い文です、本当に。これは二番目の文でありやはり長い文なのです。", None),
    ],
)
def test_a_gate_query_is_never_an_indexed_text(text: str, query: str | None) -> None:
    found = indexing.middle_sentence(text)
    assert found != text
    assert 0 < len(found) < len(text)
    assert query is None or found == query


@pytest.mark.parametrize("dead", [False, True])
def test_segments_searched_one_by_one_give_what_one_search_gives(
    store: Store, monkeypatch: pytest.MonkeyPatch, dead: bool
) -> None:
    """The gate never has all vectors in one place: its figures are those of a search over all of them."""
    monkeypatch.setattr(vector_index, "FLAT_MAX_VECTORS", 10)
    monkeypatch.setattr(indexing, "SEGMENT_ROWS", 120)
    shards, asked = make_shards(store, a=70, b=50, c=90, d=40, e=110), Retriever()
    live = {"a": np.arange(70) % 3 > 0, "d": np.arange(40) > 35} if dead else {}
    built = build(store, shards, retriever=asked, live=live)
    assert len(built.segments) == 4
    queries = np.concatenate([unit(1, zlib.crc32(text.encode())) for text in asked.sentences])
    by_name = {shard.name: shard for shard in shards}
    masks = live_by_segment(built.segments, by_name, live)
    index = VectorIndex.open([store.path(segment.file) for segment in built.segments], nprobe=1)
    blocks = [list(indexing._blocks(store, [by_name[name] for name in s.shards], DIM)) for s in built.segments]
    exact = exact_search(blocks, queries, k=10, live=masks)
    searched = [
        indexing.SearchedSegment(segment.file, tuple(by_name[name] for name in segment.shards), DIM, mask)
        for segment, mask in zip(built.segments, masks, strict=True)
    ]
    for most in (1 << 17, 60, 1):
        monkeypatch.setattr(indexing, "_COMPARED_ROWS", most)
        merged = indexing._true_hits(LocalEngine(0), store, searched, queries)
        for name in ("scores", "segments", "rows"):
            assert np.array_equal(getattr(merged, name), getattr(exact, name))
    tuned = tune_nprobe(index, exact, queries, k=10, live=masks)
    assert (built.info.nprobe, built.info.recall_at_10) == (tuned.nprobe, round(tuned.recall, 4))
    hits = [
        indexing._hits(indexing._Search(segment, slice(None)), store=store, queries=queries, nprobes=[1, 4], beside=1)
        for segment in searched
    ]
    for at, nprobe in enumerate((1, 4)):
        merged, whole = (
            vector_index.merge_segments([h[at] for h in hits], 10),
            index.search(queries, 10, masks, nprobe=nprobe),
        )
        for name in ("scores", "segments", "rows"):
            assert np.array_equal(getattr(merged, name), getattr(whole, name))


@pytest.mark.parametrize("nlist", [0, 8, 128, 2048, 16_384])
def test_rounds_try_every_nprobe_in_order(nlist: int) -> None:
    rounds = list(indexing._rounds(nlist))
    assert [value for values in rounds for value in values] == vector_index.nprobe_values(nlist)
    assert len(rounds) <= 4


def test_few_large_segments_are_searched_for_a_part_of_the_queries_each() -> None:
    def parts(passages: int, segments: int, queries: int = 200) -> list[slice]:
        shard = Shard("a", 16, "a", "a", passages, passages, passages, passages, {})
        return list(indexing._parts(indexing.SearchedSegment("a", (shard,), DIM, None), segments, queries))

    assert parts(1 << 20, 1, queries=1) == [slice(0, 1)]
    for passages, segments, expected in ((100_000, 1, 1), (1 << 20, 1, 16), (1 << 20, 4, 8), (1 << 20, 40, 1)):
        cut = parts(passages, segments)
        assert len(cut) == expected
        assert [query for part in cut for query in range(part.start, part.stop)] == list(range(200))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_nprobe_chosen_does_not_depend_on_how_queries_and_lists_are_cut(
    store: Store, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(vector_index, "FLAT_MAX_VECTORS", 10)
    monkeypatch.setattr(indexing, "SEGMENT_ROWS", 1_000)
    shards, asked = make_shards(store, a=700, b=900), Retriever()
    built = build(store, shards, retriever=asked)
    queries = np.concatenate([unit(1, zlib.crc32(text.encode())) for text in asked.sentences])
    searched = [
        indexing.SearchedSegment(segment.file, (shard,), DIM, None)
        for segment, shard in zip(built.segments, shards, strict=True)
    ]
    monkeypatch.setattr(indexing, "_SEARCHED_ROWS", 50)
    assert len(list(indexing._parts(searched[0], 2, len(queries)))) == 14
    with LocalEngine(workers) as engine:
        nprobe, recall = indexing._tune(engine, store, searched, queries, built.info.nlist)
    assert (nprobe, round(recall, 4)) == (built.info.nprobe, built.info.recall_at_10)


def test_training_and_measuring_happen_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files and figures, bit for bit; nothing as large as the vectors comes back to the driver."""
    monkeypatch.setattr(vector_index, "FLAT_MAX_VECTORS", 10)
    one, two = FolderStore(tmp_path / "one"), FolderStore(tmp_path / "two")
    here = build(one, make_shards(one, a=300, b=200))
    with LocalEngine(1) as engine:
        shards, work = make_shards(two, a=300, b=200), WorkFolder(str(tmp_path / "work"))
        work.make()
        monkeypatch.setattr(indexing, "choose_index", lambda rows, *_: vector_index.choose_index(rows, DIM))
        there = build_vector_index(
            two,
            engine,
            shards,
            dim=DIM,
            live={},
            retriever=Retriever(),
            parent=None,
            min_recall=0.5,
            memory_budget_bytes=None,
            progress=Silent(),
            work=work,
        )
    assert here.info.nlist == there.info.nlist == 32
    assert (there.segments, there.info, there.files) == (here.segments, here.info, here.files)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".reachable"]


def test_a_sample_is_gathered_in_the_order_of_the_rows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_index, "TRAINING_ROWS_PER_LIST", 2)
    monkeypatch.setattr(indexing, "SEGMENT_ROWS", 60)
    shards = make_shards(store, a=50, b=30, c=40)
    work = WorkFolder(store.shared_run_location())
    work.make()
    spec = vector_index.IndexSpec("ivf_sqfp16", DIM, 16)
    files = indexing._sample(LocalEngine(0), store, shards, spec, work)
    assert len(files) == 3
    every = np.concatenate(
        [unit(n, zlib.crc32(name.encode())).astype(np.float16) for name, n in (("a", 50), ("b", 30), ("c", 40))]
    )
    picks = ((2 * np.arange(32) + 1) * 120) // 64
    assert np.array_equal(np.concatenate([np.load(path) for path in files]), every[picks])


# --- what is live -------------------------------------------------------------------------------------


def test_live_masks_follow_the_removed_documents(store: Store) -> None:
    shards = make_shards(store, a=4, b=3, c=2)
    live = live_passages(shards, {"a": [(0, 0, 1), (2, 2, 2)], "c": [(1, 1, 1)]})
    assert {name: mask.tolist() for name, mask in live.items()} == {
        "a": [False, True, False, False],
        "c": [True, False],
    }
    segments: Any = [type("S", (), {"shards": names}) for names in (["a", "b"], ["b"], ["b", "c"])]
    masks = live_by_segment(segments, {shard.name: shard for shard in shards}, live)
    assert [None if mask is None else mask.tolist() for mask in masks] == [
        [False, True, False, False, True, True, True],
        None,
        [True, True, True, True, False],
    ]
