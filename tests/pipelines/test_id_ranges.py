"""The plan in ranges of ids against one pass over everything: the same shards, however it is divided."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refrag.pipelines import id_ranges
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.id_ranges import Part, PlanOptions, align, make_plan, split_ids
from refrag.pipelines.plan import Plan, ShardSpec, cut_shards
from refrag.pipelines.scan import IdRange, SortedRun, merge_runs, run_rows, write_run
from refrag_core.manifest import read_manifest
from refrag_core.storage import FolderStore
from refrag_core.work_folder import WorkFolder
from tests.pipelines.test_plan import row
from tests.small_index import SmallIndex, documents

TARGET = 2000


def runs_of(rows: list[Any], work: WorkFolder, count: int, seed: int = 0) -> list[SortedRun]:
    """The rows in any order, divided among sorted runs."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    parts = [shuffled[number::count] for number in range(count)]
    ordered = [sorted(part, key=lambda r: (r["document_id"], r["order"])) for part in parts if part]
    work.make()
    return [write_run(part, work, f"unit-{number}") for number, part in enumerate(ordered)]


def planned(runs: list[SortedRun], folder: Path, *, range_rows: int, map_ranges: Any = map, **options: Any) -> Plan:
    store = FolderStore(folder / "index")
    chosen = PlanOptions(target_shard_bytes=TARGET, keep_duplicates=False, **options)
    work = WorkFolder(str(folder / f"plan-{range_rows}"))
    return make_plan(
        runs, store=store, parent=None, options=chosen, work=work, map_ranges=map_ranges, range_rows=range_rows
    )


def contents(specs: Iterable[ShardSpec]) -> list[tuple[str, int, int, list[str]]]:
    """What makes a shard, but where its list lies."""
    return [
        (s.name, s.chunk_size, s.num_bytes, [r["document_id"] for r in pq.read_table(s.documents).to_pylist()])
        for s in specs
    ]


def one_pass(rows: list[Any], folder: Path) -> list[tuple[str, int, int, list[str]]]:
    """The plain definition: sort, keep the first of each id, cut from front to back."""
    ordered = sorted(rows, key=lambda r: (r["document_id"].encode(), r["order"]))
    unique = [next(group) for _, group in groupby(ordered, key=lambda r: r["document_id"])]
    found = contents(cut_shards(unique, WorkFolder(str(folder / "one")), TARGET))
    return sorted(found, key=lambda shard: shard[1])


ROWS = st.lists(
    st.builds(
        row,
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=3),
        st.integers(0, 1 << 40),
        num_bytes=st.one_of(st.integers(1, 400), st.integers(1, 6000)),
        chunk_size=st.sampled_from([8, 16]),
        text=st.sampled_from(["", "!"]),
    ),
    min_size=1,
    max_size=120,
    unique_by=lambda r: r["order"],
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, runs=st.integers(1, 5), range_rows=st.integers(1, 60))
def test_shards_are_those_of_one_pass(
    rows: list[Any], runs: int, range_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refrag.pipelines.scan.MARK_ROWS", 3)  # as if runs were long
        patch.setattr(id_ranges, "_ROWS_A_GROUP", 5)
        plan = planned(runs_of(rows, WorkFolder(str(folder / "scan")), runs), folder, range_rows=range_rows)
        assert contents(plan.shards) == one_pass(rows, folder)
    assert plan.new == len({r["document_id"] for r in rows})
    assert plan.reasons.total() == len(rows) - plan.new


@pytest.mark.parametrize("range_rows", [7, 300, 5000])
def test_long_streams_fall_into_step(tmp_path: Path, range_rows: int) -> None:
    generator = random.Random(1)
    rows = [row(f"doc-{i:06d}", i, num_bytes=generator.randint(1, 300)) for i in range(1000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refrag.pipelines.scan.MARK_ROWS", 4)
        plan = planned(runs_of(rows, WorkFolder(str(tmp_path / "scan")), 7), tmp_path, range_rows=range_rows)
    assert contents(plan.shards) == one_pass(rows, tmp_path)


def test_more_runs_than_are_merged_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_ranges, "FAN_IN", 3)
    rows = [row(f"doc-{i:06d}", i) for i in range(400)]
    merged: list[str] = []
    real = id_ranges._merge_group
    monkeypatch.setattr(id_ranges, "_merge_group", lambda runs, work: merged.append("group") or real(runs, work=work))
    plan = planned(runs_of(rows, WorkFolder(str(tmp_path / "scan")), 20), tmp_path, range_rows=50)
    assert contents(plan.shards) == one_pass(rows, tmp_path)
    assert len(merged) == 7 + 3  # groups of three: 20 runs, then 7, then 3


def test_ranges_are_planned_and_cut_in_workers(tmp_path: Path) -> None:
    rows = [row(f"doc-{i:06d}", i) for i in range(600)]
    with LocalEngine(2) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr("refrag.pipelines.scan.MARK_ROWS", 16)
        runs = runs_of(rows, WorkFolder(str(tmp_path / "scan")), 3)
        plan = planned(runs, tmp_path, range_rows=100, map_ranges=engine.map)
    assert contents(plan.shards) == one_pass(rows, tmp_path)


def test_the_driver_sees_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a worker sends back, nothing grows with the documents of its range."""
    import pickle

    sizes: list[list[int]] = []

    def measured(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        sizes.append([])
        for item in items:
            made = function(item)
            sizes[-1].append(len(pickle.dumps(made)))
            yield made

    rows = [row(f"doc-{i:06d}", i, text=str(i)) for i in range(4000)]
    monkeypatch.setattr("refrag.pipelines.scan.MARK_ROWS", 64)
    runs = runs_of([*rows, *(row(r["document_id"], 9999 + i) for i, r in enumerate(rows))], _work(tmp_path), 3)
    plan = planned(runs, tmp_path, range_rows=2000, map_ranges=measured)
    assert plan.reasons == {"duplicate_id": 4000}
    assert len(sizes) == 3
    assert max(sizes[0]) < 1000
    assert max(sizes[1]) < 300


def _work(folder: Path) -> WorkFolder:
    return WorkFolder(str(folder / "scan"))


def test_ranges_hold_every_id_once(tmp_path: Path) -> None:
    rows = [row(f"doc-{i:06d}", i) for i in range(100)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refrag.pipelines.scan.MARK_ROWS", 8)
        runs = runs_of(rows, _work(tmp_path), 3)
    ranges = split_ids(runs, 4)
    assert len(ranges) == 4
    assert (ranges[0].start, ranges[-1].stop) == (None, None)
    assert all(before.stop == after.start for before, after in pairwise(ranges))
    found = [[r["document_id"] for r in merge_runs(runs, work=_work(tmp_path), ids=ids)] for ids in ranges]
    assert [document for part in found for document in part] == [r["document_id"] for r in rows]
    assert all(5 < len(part) < 60 for part in found)
    assert split_ids([], 4) == [IdRange()]


def test_only_row_groups_that_may_hold_the_range_are_read(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refrag.pipelines.scan.MARK_ROWS", 10)
        (run,) = runs_of([row(f"{i:03d}", i) for i in range(100)], _work(tmp_path), 1)
    assert pq.ParquetFile(run.location).num_row_groups == 10
    assert run.marks == ("000", "010", "020", "030", "040", "050", "060", "070", "080", "090", "099")
    found = [r["document_id"] for r in run_rows(run.location, IdRange("015", "022"))]
    assert found == [f"{i:03d}" for i in range(15, 22)]


def test_a_part_that_never_falls_into_step_passes_its_state_on(tmp_path: Path) -> None:
    rows = [row(f"d{i}", i, num_bytes=100) for i in range(5)]  # 500 of 2,000 bytes: no cut at all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refrag.pipelines.scan.MARK_ROWS", 10)
        (run,) = runs_of(rows, _work(tmp_path), 1)
    part = Part(run.location, 5, 500)
    assert align((part, 0), target_shard_bytes=TARGET) == id_ranges.Alignment(0, 500)
    assert align((part, 300), target_shard_bytes=TARGET) == id_ranges.Alignment(None, 800)
    assert align((part, 3600), target_shard_bytes=TARGET) == id_ranges.Alignment(4, 100)


# --- builds -------------------------------------------------------------------------------------------


def test_builds_do_not_depend_on_the_ranges(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First build, update with deletions, and quarantine: byte for byte, one range or many."""
    records = [*documents(40), *documents(40)[5:9], {"id": "doc-0003", "text": "Another text."}, "{broken"]
    edited = [*documents(40)[7:35], {"id": "doc-0030", "text": "Changed."}, {"id": "zz", "text": "New."}]
    edited = [record for record in edited if record != documents(40)[30]]
    manifests = []
    for name, range_rows in (("one", 1 << 20), ("many", 9)):
        monkeypatch.setattr("refrag.pipelines.scan.MARK_ROWS", 4096 if name == "one" else 4)
        monkeypatch.setitem(make_plan.__kwdefaults__, "range_rows", range_rows)
        index = SmallIndex(tmp_path / name, records)
        index.build()
        index.write(edited)
        report = index.build(delete_missing=True)
        assert (report.new, report.changed, report.deleted) == (1, 1, 12)
        manifests.append([read_manifest(FolderStore(index.path), version) for version in (1, 2)])
    assert [m.build_id for m in manifests[0]] == [m.build_id for m in manifests[1]]


def test_duplicates_keep_the_same_bytes_whatever_the_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_ranges, "read_raw", lambda row: b"x" * 40)
    monkeypatch.setattr(id_ranges, "DUPLICATE_RAW_BYTES", 100)
    monkeypatch.setattr("refrag.pipelines.scan.DUPLICATE_RAW_BYTES", 100)
    monkeypatch.setattr("refrag.pipelines.scan.MARK_ROWS", 4)
    rows = [row(f"doc-{i:03d}", i) for i in range(40)]
    rows += [row(f"doc-{i:03d}", 100 + i, text="!") for i in (1, 2, 11, 21, 31, 39)]
    runs = runs_of(rows, _work(tmp_path), 2)
    kept = []
    for range_rows in (1 << 20, 20, 5):
        store, work = FolderStore(tmp_path / "index"), WorkFolder(str(tmp_path / f"raw-{range_rows}"))
        options = PlanOptions(target_shard_bytes=TARGET)
        plan = make_plan(
            runs, store=store, parent=None, options=options, work=work, map_ranges=map, range_rows=range_rows
        )
        found = [r for part in plan.duplicates for r in pq.read_table(part).to_pylist()]
        kept.append([(r["document_id"], len(r["raw"])) for r in found])
    assert kept[0] == [
        ("doc-001", 40),
        ("doc-002", 40),
        ("doc-011", 40),
        ("doc-021", 0),
        ("doc-031", 0),
        ("doc-039", 0),
    ]
    assert kept[1] == kept[2] == kept[0]
