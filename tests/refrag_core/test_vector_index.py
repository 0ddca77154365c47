import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag_core import vector_index
from refrag_core.errors import (
    ConfigError,
    CorruptIndexError,
    IndexNotFoundError,
    MissingExtraError,
    StageError,
    UsageError,
)
from refrag_core.vector_index import (
    FLAT_MAX_VECTORS,
    IndexKind,
    IndexSpec,
    SearchResult,
    VectorIndex,
    build_segment,
    choose_index,
    core_share,
    exact_search,
    join_queries,
    measure_recall,
    sample_rows,
    train_quantizer,
    training_size,
    tune_nprobe,
)

faiss = pytest.importorskip("faiss")

DIM = 16
SPECS = {
    "flat": IndexSpec(kind="flat", dim=DIM, nlist=0),
    "ivf_sqfp16": IndexSpec(kind="ivf_sqfp16", dim=DIM, nlist=8),
    "ivf_sq8": IndexSpec(kind="ivf_sq8", dim=DIM, nlist=8),
}
every_kind = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def unit_vectors(num_rows: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Float16 rows of (nearly) unit length."""
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def halfway(directions: np.ndarray, num_rows: int) -> np.ndarray:
    """Float32 rows of unit length, each as near to one of `directions` as to another one."""
    pairs = np.random.default_rng(0).integers(0, len(directions), (num_rows, 2))
    rows = directions.astype(np.float32)[pairs].sum(axis=1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def queries_of(num_queries: int, dim: int = DIM) -> np.ndarray:
    return unit_vectors(num_queries, seed=99, dim=dim).astype(np.float32)


def coarse_of(quantizer: bytes) -> Any:
    """What assigns vectors to lists: the centroids as a flat index."""
    index = faiss.deserialize_index(np.frombuffer(quantizer, dtype=np.uint8))
    return faiss.clone_index(faiss.downcast_index(index).quantizer)  # the index takes its own with it


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def quantizer_for(spec: IndexSpec) -> bytes:
    return train_quantizer(unit_vectors(400, seed=5).astype(np.float32), spec)


def open_segments(folder: Path, spec: IndexSpec, segments: list[np.ndarray], nprobe: int = 8) -> VectorIndex:
    quantizer = quantizer_for(spec)
    paths = [folder / f"{number}.faiss" for number in range(len(segments))]
    for rows, path in zip(segments, paths, strict=True):
        assert build_segment(quantizer, [rows], path) == len(rows)
    return VectorIndex.open(paths, nprobe)


def pairs(result: SearchResult, query: int = 0) -> list[tuple[int, int]]:
    return list(zip(result.segments[query].tolist(), result.rows[query].tolist(), strict=True))


def assert_same_hits(left: SearchResult, right: SearchResult) -> None:
    np.testing.assert_array_equal(left.segments, right.segments)
    np.testing.assert_array_equal(left.rows, right.rows)
    np.testing.assert_allclose(left.scores, right.scores, atol=1e-5)


# ---------------------------------------------------------------------------------------------- choosing


def test_few_vectors_are_compared_exhaustively():
    assert choose_index(FLAT_MAX_VECTORS, 384) == IndexSpec(kind="flat", dim=384, nlist=0)
    assert choose_index(FLAT_MAX_VECTORS + 1, 384).kind == "ivf_sqfp16"


@pytest.mark.parametrize(("num_vectors", "nlist"), [(10_000, 128), (100_000, 512), (100_000_000, 16_384)])
def test_lists_grow_with_the_square_root(num_vectors: int, nlist: int):
    assert choose_index(num_vectors, 384).nlist == nlist


def test_lists_of_float16_that_exceed_the_budget_become_8_bit():
    fp16_bytes = 10_000 * (2 * 384 + 8)
    assert choose_index(10_000, 384, fp16_bytes).kind == "ivf_sqfp16"
    assert choose_index(10_000, 384, fp16_bytes - 1).kind == "ivf_sq8"


def test_training_size_is_rows_per_list():
    assert training_size(IndexSpec(kind="ivf_sq8", dim=4, nlist=512)) == 65_536
    assert training_size(IndexSpec(kind="flat", dim=4, nlist=0)) == 0


@pytest.mark.parametrize(
    ("kind", "dim", "nlist", "message"),
    [
        ("hnsw", 4, 0, "index kind is 'hnsw'; expected one of flat, ivf_sqfp16, ivf_sq8"),
        ("flat", 0, 0, "index width is 0; expected at least 1"),
        ("flat", 4, 8, "flat index with nlist 8; expected 0 for flat, at least 1 otherwise"),
        ("ivf_sq8", 4, 0, "ivf_sq8 index with nlist 0; expected 0 for flat, at least 1 otherwise"),
    ],
)
def test_impossible_specs_are_refused(kind: str, dim: int, nlist: int, message: str):
    with pytest.raises(ConfigError) as caught:
        IndexSpec(kind=kind, dim=dim, nlist=nlist)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([10], 2, [[2, 7]]),
        ([4, 4], 4, [[1, 3], [1, 3]]),
        ([3, 0, 2], 99, [[0, 1, 2], [], [0, 1]]),
        ([100, 1], 2, [[25, 75], []]),
        ([5], 0, [[]]),
        ([0], 3, [[]]),
        ([], 3, []),
    ],
)
def test_sampled_rows_are_spread_evenly(lengths: list[int], size: int, expected: list[list[int]]):
    assert [rows.tolist() for rows in sample_rows(lengths, size)] == expected


# ---------------------------------------------------------------------------------------------- building


@every_kind
def test_segments_are_byte_identical_whatever_the_threads_and_blocks(tmp_path: Path, spec: IndexSpec):
    rows = unit_vectors(20_000)
    files = set()
    for number, (num_threads, cut) in enumerate([(1, 20_000), (2, 7), (3, 16_384), (5, 16_385), (2, 20_000)]):
        with faiss_threads(num_threads):
            path = tmp_path / f"{number}.faiss"
            blocks = (rows[start : start + cut] for start in range(0, len(rows), cut))
            assert build_segment(quantizer_for(spec), blocks, path) == 20_000
        files.add(path.read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("kind", ["ivf_sqfp16", "ivf_sq8"])
def test_training_is_byte_identical_whatever_the_threads(kind: IndexKind):
    """Left to itself, faiss cuts its products among its threads, and their last bits follow from the cut."""
    sample = halfway(unit_vectors(24, dim=384), 8_192)
    trained = set()
    for count in (1, 2, 3):
        with faiss_threads(count):
            trained.add(train_quantizer(sample, IndexSpec(kind, 384, 64)))
            assert faiss.omp_get_max_threads() == count
    assert len(trained) == 1


def test_rows_halfway_between_centroids_go_to_the_same_lists_whatever_the_threads(tmp_path: Path):
    quantizer = train_quantizer(unit_vectors(8_192, dim=384).astype(np.float32), IndexSpec("ivf_sqfp16", 384, 64))
    rows = halfway(coarse_of(quantizer).reconstruct_n(0, 64), 16_384)
    files = set()
    for count in (1, 2, 3):
        with faiss_threads(count):
            build_segment(quantizer, [rows], tmp_path / "segment")
        files.add((tmp_path / "segment").read_bytes())
    assert len(files) == 1


def test_an_empty_list_gets_a_part_of_a_large_one():
    """Three directions for four lists, one of them with nearly all rows."""
    rows = np.repeat(np.eye(16, dtype=np.float32)[:3], [50, 2, 2], axis=0)
    rows += 0.01 * unit_vectors(len(rows)).astype(np.float32)
    coarse = coarse_of(train_quantizer(rows, IndexSpec("ivf_sqfp16", 16, 4)))
    assert np.allclose(np.linalg.norm(coarse.reconstruct_n(0, 4), axis=1), 1.0)
    assert np.bincount(coarse.search(rows, 1)[1][:, 0], minlength=4).min() > 0


def test_training_refuses_numbers_that_are_not_finite():
    sample = unit_vectors(9).astype(np.float32)
    sample[4, 2] = np.nan
    with pytest.raises(
        ConfigError, match=r"^training sample holds numbers that are not finite; expected unit vectors$"
    ):
        train_quantizer(sample, SPECS["ivf_sqfp16"])


@every_kind
def test_float32_and_float16_blocks_of_equal_values_give_equal_segments(tmp_path: Path, spec: IndexSpec):
    rows = unit_vectors(50)
    build_segment(quantizer_for(spec), [rows], tmp_path / "half")
    build_segment(quantizer_for(spec), [rows.astype(np.float32)], tmp_path / "single")
    assert (tmp_path / "half").read_bytes() == (tmp_path / "single").read_bytes()


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]):
    train_quantizer(unit_vectors(20).astype(np.float32), SPECS["ivf_sqfp16"])
    assert capfd.readouterr() == ("", "")


def test_training_needs_a_row_a_list():
    with pytest.raises(ConfigError) as caught:
        train_quantizer(unit_vectors(7).astype(np.float32), SPECS["ivf_sqfp16"])
    assert str(caught.value) == (
        "training sample has 7 rows for 8 lists; expected at least one a list: sample more rows or choose fewer lists"
    )


def test_training_refuses_another_width():
    with pytest.raises(ConfigError, match=r"^training sample has shape \(9, 4\); expected \[rows, 16\]$"):
        train_quantizer(np.zeros((9, 4), dtype=np.float32), SPECS["flat"])


def test_building_refuses_another_width(tmp_path: Path):
    with pytest.raises(StageError, match=r"^block of vectors has shape \(3, 4\); expected \[rows, 16\] as trained$"):
        build_segment(quantizer_for(SPECS["flat"]), [unit_vectors(3, dim=4)], tmp_path / "x")


def test_building_refuses_a_quantizer_that_is_none(tmp_path: Path):
    with pytest.raises(CorruptIndexError, match=r"^the trained quantizer \(5 bytes\) is not a faiss index;"):
        build_segment(b"abcde", [], tmp_path / "x")


# --------------------------------------------------------------------------------------------- searching


@every_kind
def test_hand_computed_order(tmp_path: Path, spec: IndexSpec):
    axes = np.eye(DIM, dtype=np.float16)
    index = open_segments(tmp_path, spec, [axes[:3], axes[3:5]])
    query = np.zeros((1, DIM), dtype=np.float32)
    query[0, [1, 3, 0]] = 0.8, 0.5, 0.33
    result = index.search(query, 3)
    assert pairs(result) == [(0, 1), (1, 0), (0, 0)]
    np.testing.assert_allclose(result.scores, [[0.8, 0.5, 0.33]], atol=0.05 if spec.kind == "ivf_sq8" else 1e-6)
    assert (result.scores.dtype, result.segments.dtype, result.rows.dtype) == (np.float32, np.int32, np.int64)


@pytest.mark.parametrize("kind", ["flat", "ivf_sqfp16"])
def test_all_lists_visited_equals_exact_search(tmp_path: Path, kind: str):
    segments = [unit_vectors(500, seed=1), unit_vectors(1, seed=2), unit_vectors(300, seed=3)]
    index = open_segments(tmp_path, SPECS[kind], segments)
    queries = queries_of(33)
    assert_same_hits(index.search(queries, 10), exact_search([[s] for s in segments], queries, 10))


def test_8_bit_codes_find_nearly_all_true_hits(tmp_path: Path):
    segments = [unit_vectors(500, seed=1), unit_vectors(300, seed=3)]
    index = open_segments(tmp_path, SPECS["ivf_sq8"], segments)
    queries = queries_of(50)
    exact = exact_search([[s] for s in segments], queries, 10)
    assert measure_recall(index, exact, queries) > 0.95


@every_kind
def test_tombstones_and_filters_hide_rows(tmp_path: Path, spec: IndexSpec):
    segments = [unit_vectors(40, seed=1), unit_vectors(30, seed=2)]
    index = open_segments(tmp_path, spec, segments)
    query = segments[0][7:8].astype(np.float32)
    assert pairs(index.search(query, 1)) == [(0, 7)]
    live = np.ones(40, dtype=bool)
    live[7] = False
    without = index.search(query, 70, [live, None])
    assert (0, 7) not in pairs(without)
    assert len(set(pairs(without)) - {(-1, -1)}) == 69
    odd = [np.arange(40) % 2 == 1, np.arange(30) % 2 == 1]
    found = set(pairs(index.search(query, 70, [live, None], allowed=odd))) - {(-1, -1)}
    assert found == {(0, r) for r in range(1, 40, 2) if r != 7} | {(1, r) for r in range(1, 30, 2)}


def test_a_read_only_mask_is_remembered_and_another_one_is_not_mistaken_for_it(tmp_path: Path):
    rows = unit_vectors(20)
    index = open_segments(tmp_path, SPECS["flat"], [rows])
    for hidden in (3, 4, 3):
        live = np.arange(20) != hidden
        live.flags.writeable = False
        assert pairs(index.search(rows[hidden : hidden + 1].astype(np.float32), 1, [live])) != [(0, hidden)]
        assert pairs(index.search(rows[5:6].astype(np.float32), 1, [live])) == [(0, 5)]


@every_kind
def test_missing_hits_are_padded(tmp_path: Path, spec: IndexSpec):
    index = open_segments(tmp_path, spec, [unit_vectors(2), unit_vectors(0), unit_vectors(1, seed=4)])
    result = index.search(queries_of(2), 5)
    assert result.rows.shape == (2, 5)
    assert (result.rows[:, 3:] == -1).all()
    assert (result.segments[:, 3:] == -1).all()
    assert (result.scores[:, 3:] == -np.inf).all()
    assert (result.rows[:, :3] >= 0).all()


@every_kind
def test_an_index_of_empty_segments_finds_nothing(tmp_path: Path, spec: IndexSpec):
    index = open_segments(tmp_path, spec, [unit_vectors(0)])
    assert (index.num_rows, index.rows_per_segment) == (0, (0,))
    assert pairs(index.search(queries_of(1), 2)) == [(-1, -1), (-1, -1)]


@every_kind
def test_ties_fall_in_the_order_of_segment_and_row(tmp_path: Path, spec: IndexSpec):
    repeated = unit_vectors(1, seed=8)
    segments = [unit_vectors(300, seed=1), unit_vectors(300, seed=2)]
    for segment in segments:
        segment[40:290:5] = repeated
    expected = [(0, row) for row in range(40, 65, 5)]
    for num_queries in (1, 30):
        queries = np.repeat(repeated.astype(np.float32), num_queries, axis=0)
        assert pairs(open_segments(tmp_path, spec, segments).search(queries, 5), num_queries - 1) == expected
        exact = exact_search([[s] for s in segments], queries, 5)
        assert pairs(exact, num_queries - 1) == expected
    assert pairs(exact_search([[s] for s in segments], queries, 60))[48:52] == [
        (0, 280),
        (0, 285),
        (1, 40),
        (1, 45),
    ]


@every_kind
@pytest.mark.parametrize("live", [None, [np.arange(300) % 7 > 0, np.arange(300) < 200]], ids=["all", "some live"])
def test_only_queries_whose_hits_tie_are_searched_deeper(
    tmp_path: Path, spec: IndexSpec, live: Sequence[np.ndarray] | None, monkeypatch: pytest.MonkeyPatch
):
    segments = [unit_vectors(300, seed=1), unit_vectors(300, seed=2)]
    segments[1][40:290:5] = unit_vectors(1, seed=8)
    index = open_segments(tmp_path, spec, segments)
    queries = np.concatenate([unit_vectors(20, seed=3), unit_vectors(1, seed=8), segments[0][:9]]).astype(np.float32)
    alone = [index.search(query[None], 5, live) for query in queries]
    asked, search = [], index._raw_search
    monkeypatch.setattr(index, "_raw_search", lambda *a: asked.append(a[-2].tolist()) or search(*a))
    found = index.search(queries, 5, live)
    for name in ("scores", "segments", "rows"):
        assert np.array_equal(getattr(found, name), np.concatenate([getattr(one, name) for one in alone]))
    every = list(range(30))
    assert asked[:2] == [every, every]
    assert all(20 in numbers and len(numbers) < 5 for numbers in asked[2:])
    assert len(asked) > 2


@every_kind
def test_a_segment_cut_anywhere_is_named(tmp_path: Path, spec: IndexSpec):
    path = tmp_path / "segment.faiss"
    build_segment(quantizer_for(spec), [unit_vectors(30)], path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptIndexError) as caught:
            VectorIndex.open([path], nprobe=1)
        assert str(caught.value) == (
            f"{path} ({length} bytes) does not end in its own length; expected a whole segment as build_segment "
            "writes it: verify the index and repair it"
        )


def test_a_sealed_file_of_another_format_is_named(tmp_path: Path):
    path = tmp_path / "segment.faiss"
    path.write_bytes(b"PAR1" + b"refragvi" + (4).to_bytes(8, "little"))
    with pytest.raises(CorruptIndexError, match=r"segment\.faiss is not a faiss index; expected a segment: verify"):
        VectorIndex.open([path], nprobe=1)


def test_an_index_of_another_type_is_refused(tmp_path: Path):
    path = tmp_path / "hnsw.faiss"
    foreign = faiss.serialize_index(faiss.IndexHNSWFlat(DIM, 4)).tobytes()
    path.write_bytes(foreign + b"refragvi" + len(foreign).to_bytes(8, "little"))
    with pytest.raises(CorruptIndexError, match=r"hnsw\.faiss holds a IndexHNSWFlat; expected a scalar-quantised"):
        VectorIndex.open([path], nprobe=1)


def test_segments_trained_apart_are_refused(tmp_path: Path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        quantizer = train_quantizer(unit_vectors(400, seed=seed).astype(np.float32), SPECS["ivf_sqfp16"])
        build_segment(quantizer, [unit_vectors(9)], path)
    with pytest.raises(CorruptIndexError, match=r"b was built from another trained quantizer than .*a;"):
        VectorIndex.open(paths, nprobe=1)


def test_missing_segments_are_named(tmp_path: Path):
    with pytest.raises(IndexNotFoundError, match=r"gone\.faiss is missing; expected a segment of the vector index"):
        VectorIndex.open([tmp_path / "gone.faiss"], nprobe=1)
    with pytest.raises(IndexNotFoundError, match="no segment files were given"):
        VectorIndex.open([], nprobe=1)


@every_kind
def test_a_file_system_that_cannot_map_is_read_instead(
    tmp_path: Path, spec: IndexSpec, monkeypatch: pytest.MonkeyPatch
):
    mapped = open_segments(tmp_path, spec, [unit_vectors(50)]).search(queries_of(3), 5)
    read_index, flags_seen = faiss.read_index, []

    def refuse_to_map(path: str, flags: int = 0):
        flags_seen.append(flags)
        if flags:
            raise RuntimeError("could not mmap()")
        return read_index(path)

    monkeypatch.setattr(faiss, "read_index", refuse_to_map)
    read = VectorIndex.open([tmp_path / "0.faiss"], nprobe=8).search(queries_of(3), 5)
    assert_same_hits(mapped, read)
    assert flags_seen == [faiss.IO_FLAG_MMAP_IFC, 0]


@every_kind
def test_opening_maps_the_vectors(tmp_path: Path, spec: IndexSpec):
    index = open_segments(tmp_path, spec, [unit_vectors(50)])
    assert str(tmp_path / "0.faiss") in Path("/proc/self/maps").read_text()
    assert index.num_rows == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "asked for 0 hits; expected at least 1"),
        ({"nprobe": 0}, "nprobe is 0; expected at least 1"),
        ({"queries": np.zeros((1, 3), np.float32)}, r"queries have shape \(1, 3\); expected \[queries, 16\]"),
        ({"live": []}, "tombstones of 0 segments for an index of 1; expected one each"),
        (
            {"allowed": [np.ones(3, bool)]},
            r"filter of 0.faiss are bool \(3,\); expected bool \(9,\), one a row",
        ),
    ],
)
def test_impossible_searches_are_refused(tmp_path: Path, arguments: dict, message: str):
    index = open_segments(tmp_path, SPECS["flat"], [unit_vectors(9)])
    with pytest.raises(UsageError, match=f"^{message}"):
        index.search(**({"queries": queries_of(1), "k": 1} | arguments))


@pytest.mark.parametrize("twins", [False, True], ids=["lists apart", "lists equally near"])
@pytest.mark.parametrize("kind", ["flat", "ivf_sqfp16", "ivf_sq8"])
def test_visiting_more_and_more_lists_finds_what_separate_searches_find(tmp_path: Path, kind: IndexKind, twins: bool):
    spec = IndexSpec(kind=kind, dim=DIM, nlist=0 if kind == "flat" else 16)
    rows = unit_vectors(900, seed=3)
    rows[100:200] = rows[100]  # ties: more than any search finds
    rows[600:700:7] = rows[100]
    queries = np.concatenate([unit_vectors(40, seed=4), rows[100:101]]).astype(np.float32)
    quantizer = quantizer_for(spec)
    if twins and kind != "flat":
        index = faiss.deserialize_index(np.frombuffer(quantizer, dtype=np.uint8))
        centroids = faiss.rev_swig_ptr(faiss.downcast_index(faiss.downcast_index(index).quantizer).get_xb(), 16 * DIM)
        centroids[DIM : 2 * DIM] = centroids[:DIM]
        quantizer = bytes(faiss.serialize_index(index).tobytes())
    paths = [tmp_path / "0.faiss", tmp_path / "1.faiss"]
    for path, part in zip(paths, (rows[:500], rows[500:]), strict=True):
        build_segment(quantizer, [part], path)
    opened = VectorIndex.open(paths, 1)
    for live in (None, [np.arange(500) % 3 > 0, np.arange(400) > 50]):
        for nprobes in ([1, 2, 4, 8, 16], [3, 4], [16, 16], [9, 99]):
            with faiss_threads(1):
                whole = [opened.search(queries, 10, live, nprobe=nprobe) for nprobe in nprobes]
                for asked in (slice(None), slice(0, 7), slice(30, 41)):
                    each = list(opened.search_each(queries, 10, nprobes, live, asked=asked))
                    assert len(each) == len(nprobes)
                    for found, expected in zip(each, whole, strict=True):
                        for name in ("scores", "segments", "rows"):
                            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[asked])


def test_each_list_is_visited_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = open_segments(tmp_path, IndexSpec("ivf_sqfp16", DIM, 16), [unit_vectors(300, seed=3)])
    visited: list[int] = []
    search_lists = VectorIndex._search_lists

    def counted(self: VectorIndex, queries: Any, k: int, lists: Any, bitmaps: Any) -> SearchResult:
        visited.append(lists[1].shape[1])
        return search_lists(self, queries, k, lists, bitmaps)

    monkeypatch.setattr(VectorIndex, "_search_lists", counted)
    list(opened.search_each(unit_vectors(30, seed=4).astype(np.float32), 5, [1, 2, 8, 16]))
    assert visited == [1, 1, 6, 8]


def test_results_for_parts_of_the_queries_are_joined(tmp_path: Path):
    opened = open_segments(tmp_path, IndexSpec("flat", DIM, 0), [unit_vectors(50, seed=3)])
    queries = unit_vectors(9, seed=4).astype(np.float32)
    joined = join_queries([opened.search(queries[part], 3) for part in (slice(0, 2), slice(2, 9))])
    assert_same_hits(joined, opened.search(queries, 3))


def test_those_that_work_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vector_index, "available_cores", lambda: 8)
    for allowed, beside, expected in ((8, 1, 8), (8, 3, 2), (8, 100, 1), (3, 2, 3), (1, 1, 1)):
        with faiss_threads(allowed):
            with core_share(beside):
                assert faiss.omp_get_max_threads() == expected
            assert faiss.omp_get_max_threads() == allowed


def test_a_search_leaves_the_number_of_threads_as_it_was(tmp_path: Path):
    index = open_segments(tmp_path, SPECS["flat"], [unit_vectors(9)])
    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        index.search(queries_of(1), 1)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(threads)


# ------------------------------------------------------------------------------------------ exact search


def test_exact_search_by_hand():
    axes = np.eye(4, dtype=np.float16)
    query = np.array([[0.1, 0.7, 0.3, 0.6]], dtype=np.float32)
    result = exact_search([[axes[:1], axes[1:2]], [axes[2:]]], query, 3)
    assert pairs(result) == [(0, 1), (1, 1), (1, 0)]
    np.testing.assert_allclose(result.scores, [[0.7, 0.6, 0.3]])


def test_exact_search_equals_a_full_sort_however_the_rows_are_cut():
    segments = [unit_vectors(9_000, seed=1), unit_vectors(700, seed=2)]
    queries = queries_of(5)
    rows = np.concatenate(segments).astype(np.float32)
    order = np.argsort(-(queries @ rows.T), axis=1)[:, :20]
    for cut in (97, 8_192, 10_000):
        blocks = [[s[start : start + cut] for start in range(0, len(s), cut)] for s in segments]
        result = exact_search(blocks, queries, 20)
        np.testing.assert_array_equal(result.rows + 9_000 * result.segments, order)


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 0.0])
def test_exact_search_of_vectors_that_lie_close_to_each_other(spread: float):
    """Nearly all, or all, are within the rounding of a product: then sums along each row decide, and ties their order.

    A query is held against what it found so far, and against a tile's own best only where many rows pass.
    """
    random = np.random.default_rng(8)
    rows = (unit_vectors(1, seed=1) + spread * random.standard_normal((20_000, DIM))).astype(np.float16)
    rows[::17] = rows[5]
    queries = unit_vectors(12, seed=2).astype(np.float32)
    wide = rows.astype(np.float32)
    scores = np.stack([(wide * query).sum(axis=1) for query in queries])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    found = exact_search([[rows[:9_000], rows[9_000:]]], queries, k=10)
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_array_equal(found.scores, np.take_along_axis(scores, order, axis=1))


def test_exact_search_sees_live_rows_only():
    rows = unit_vectors(30)
    live = np.arange(30) % 3 == 0
    result = exact_search([[rows[:20], rows[20:]], [rows]], queries_of(1), 50, [live, None])
    assert {row for segment, row in pairs(result) if segment == 0} == set(range(0, 30, 3))
    assert (result.rows[0, 40:] == -1).all()
    assert (result.rows[0, :40] >= 0).all()


def test_exact_search_refuses_masks_that_do_not_fit():
    rows = unit_vectors(6)
    for mask, expected in [(np.ones(5, bool), "5 rows"), (np.ones(7, bool), "7 rows")]:
        with pytest.raises(UsageError, match=f"^mask of segment 0 has {expected}"):
            exact_search([[rows]], queries_of(1), 1, [mask])
    with pytest.raises(UsageError, match=r"^masks of 2 segments for 1 segments of vectors"):
        exact_search([[rows]], queries_of(1), 1, [None, None])


# --------------------------------------------------------------------------------------------- measuring


def test_recall_counts_the_true_hits_found(tmp_path: Path):
    rows = unit_vectors(20)
    index = open_segments(tmp_path, SPECS["flat"], [rows])
    query = queries_of(1)
    truth = exact_search([[rows]], query, 4)
    assert measure_recall(index, truth, query, k=4) == 1.0
    planted = truth.rows.copy()
    planted[0, 2] = index.search(query, 20).rows[0, 19]
    wrong = SearchResult(scores=truth.scores, segments=truth.segments, rows=planted)
    assert measure_recall(index, wrong, query, k=4) == 0.75
    with pytest.raises(UsageError, match=r"^exact hits have shape \(1, 4\); expected \[1, at least 5\]$"):
        measure_recall(index, truth, query, k=5)


def test_recall_of_nothing_is_refused(tmp_path: Path):
    index = open_segments(tmp_path, SPECS["flat"], [unit_vectors(3)])
    nothing = exact_search([[unit_vectors(0)]], queries_of(1), 10)
    with pytest.raises(UsageError, match=r"^no query has a true hit"):
        measure_recall(index, nothing, queries_of(1))


def test_tuning_takes_the_smallest_nprobe_that_reaches_the_target(tmp_path: Path):
    rows = unit_vectors(2_000)
    index = open_segments(tmp_path, SPECS["ivf_sqfp16"], [rows], nprobe=1)
    queries = queries_of(40)
    exact = exact_search([[rows]], queries, 10)
    tuning = tune_nprobe(index, exact, queries, target=0.9)
    assert [point.nprobe for point in tuning.table] == [1, 2, 4, 8][: len(tuning.table)]
    assert all(point.recall < 0.9 for point in tuning.table[:-1])
    assert 1 < tuning.nprobe == tuning.table[-1].nprobe
    assert tuning.recall == tuning.table[-1].recall >= 0.9
    assert index.nprobe == 1


def test_tuning_ends_at_all_lists_when_no_nprobe_reaches_the_target(tmp_path: Path):
    rows = unit_vectors(200)
    index = open_segments(tmp_path, SPECS["ivf_sq8"], [rows])
    planted = exact_search([[rows]], queries_of(4), 200)
    worst = SearchResult(planted.scores[:, 100:110], planted.segments[:, 100:110], planted.rows[:, 100:110])
    tuning = tune_nprobe(index, worst, queries_of(4))
    assert (tuning.nprobe, tuning.recall) == (8, 0.0)


def test_a_flat_index_is_tuned_in_one_step(tmp_path: Path):
    rows = unit_vectors(50)
    tuning = tune_nprobe(
        open_segments(tmp_path, SPECS["flat"], [rows]),
        exact_search([[rows]], queries_of(4), 10),
        queries_of(4),
    )
    assert (tuning.nprobe, tuning.recall, len(tuning.table)) == (1, 1.0, 1)


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError) as caught:
        train_quantizer(unit_vectors(9).astype(np.float32), SPECS["flat"])
    assert str(caught.value) == (
        "faiss is not installed and searching or building an index needs it; run "
        "`pip install 'refrag[cpu]'`, or `pip install 'refrag[gpu]'` on a host with a GPU (never both)"
    )
