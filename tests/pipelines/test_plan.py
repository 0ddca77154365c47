import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from refrag.pipelines.plan import Join, cut_shards, default_shard_bytes, ends_shard, without
from refrag_core.manifest import LiveDocument
from refrag_core.work_folder import WorkFolder


def row(
    document_id: str, order: int = 0, *, text: str = "", num_bytes: int = 100, chunk_size: int = 16
) -> dict[str, Any]:
    return {
        "document_id": document_id,
        "source_digest": hashlib.sha256((document_id + text).encode()).digest(),
        "chunk_size": chunk_size,
        "num_bytes": num_bytes,
        "order": order,
        "source": "s",
        "path": "p",
        "format": "jsonl",
        "offset": 0,
        "length": 1,
    }


def live(entry: dict[str, Any], at: int = 0) -> LiveDocument:
    return LiveDocument(
        entry["document_id"], entry["source_digest"], bytes(32), entry["chunk_size"], "s" * 32, at, at, 1, 1, 10
    )


def rows(count: int, **options: Any) -> list[dict[str, Any]]:
    return [row(f"doc-{i:05d}", **options) for i in range(count)]


def names(documents: list[dict[str, Any]], folder: Path, target: int = 2000) -> list[str]:
    return [spec.name for spec in cut_shards(documents, WorkFolder(str(folder)), target)]


def test_every_document_is_in_exactly_one_shard(tmp_path: Path) -> None:
    documents = rows(1000)
    specs = list(cut_shards(documents, WorkFolder(str(tmp_path)), 2000))
    written = [r["document_id"] for spec in specs for r in pq.read_table(spec.documents).to_pylist()]
    assert written == [r["document_id"] for r in documents]
    assert sum(spec.num_documents for spec in specs) == 1000
    assert sum(spec.num_bytes for spec in specs) == 100_000
    assert all(spec.num_bytes <= 2 * 2000 for spec in specs)


def test_shard_sizes_are_near_the_target(tmp_path: Path) -> None:
    count = len(names(rows(4000), tmp_path))
    assert 150 < count < 300  # 400,000 bytes over a target of 2,000


def test_cuts_fall_into_step_again_after_an_insertion(tmp_path: Path) -> None:
    documents = rows(2000)
    before = names(documents, tmp_path / "a")
    more = sorted([*documents, row("doc-00003x")], key=lambda r: r["document_id"])
    after = names(more, tmp_path / "b")
    assert len(set(before) - set(after)) <= 5


def test_chunk_sizes_never_share_a_shard(tmp_path: Path) -> None:
    mixed = [row(f"doc-{i:05d}", chunk_size=(8, 16, 32)[i % 3]) for i in range(300)]
    specs = list(cut_shards(mixed, WorkFolder(str(tmp_path)), 2000))
    assert {spec.chunk_size for spec in specs} == {8, 16, 32}
    for spec in specs:
        assert {r["chunk_size"] for r in pq.read_table(spec.documents).to_pylist()} == {spec.chunk_size}


def test_a_shard_is_named_after_its_documents(tmp_path: Path) -> None:
    base = names(rows(3), tmp_path / "a", 1 << 40)
    assert names(rows(3, num_bytes=7), tmp_path / "b", 1 << 40) == base
    assert names(rows(3, text="other"), tmp_path / "c", 1 << 40) != base
    assert names(rows(3, chunk_size=8), tmp_path / "d", 1 << 40) != base


def test_a_boundary_needs_half_the_target_and_comes_by_twice_of_it() -> None:
    assert not any(ends_shard(f"d{i}", 100, 900, 2000) for i in range(1000))
    assert all(ends_shard(f"d{i}", 100, 4000, 2000) for i in range(1000))
    share = sum(ends_shard(f"d{i}", 100, 1500, 2000) for i in range(10_000)) / 10_000
    assert share == pytest.approx(0.1, abs=0.02)


def test_default_shard_bytes_are_powers_of_two_within_bounds() -> None:
    assert default_shard_bytes(0) == 256 << 10
    assert default_shard_bytes(20_000_000) == 256 << 10
    assert default_shard_bytes(150_000_000) == 1 << 20
    assert default_shard_bytes(10**13) == 64 << 20


class Joined(Join):
    """A join that keeps what comes of it."""

    def __init__(self, scanned: list[Any], parent: list[LiveDocument], **options: Any) -> None:
        self.retired: list[str] = []
        self.on_hold: list[str] = []
        super().__init__(
            lambda document: self.retired.append(document.document_id),
            lambda row: self.on_hold.append(row["document_id"]),
            **options,
        )
        self.built = [entry["document_id"] for entry in self.to_build(scanned, iter(parent))]


def test_the_join_tells_new_changed_unchanged_and_missing() -> None:
    scanned = [row("a"), row("b", text="new"), row("d")]
    parent = [live(row("b"), 0), live(row("c"), 1), live(row("d"), 2), live(row("e"), 3)]
    plan = Joined(scanned, parent)
    assert (plan.new, plan.changed, plan.unchanged, plan.missing, plan.deleted) == (1, 1, 1, 2, 0)
    assert plan.retired == ["b"]
    assert plan.built == ["a", "b"]


def test_nothing_is_deleted_without_being_told() -> None:
    plan = Joined([], [live(row("a"))], delete_missing=True)
    assert (plan.deleted, plan.missing) == (1, 0)
    assert plan.retired == ["a"]


def test_another_chunk_size_is_a_change() -> None:
    plan = Joined([row("a", chunk_size=8)], [live(row("a"))])
    assert (plan.changed, plan.unchanged) == (1, 0)


def test_a_held_document_waits_until_it_changes() -> None:
    held = {"a": row("a")["source_digest"], "b": row("b")["source_digest"]}
    plan = Joined([row("a"), row("b", text="mended"), row("c")], [], held=held)
    assert plan.on_hold == ["a"]
    assert plan.new == 2


def test_the_join_agrees_with_sets() -> None:
    generator = random.Random(0)
    for _ in range(30):
        universe = [f"d{i}" for i in range(40)]
        corpus, old = (sorted(generator.sample(universe, 25)) for _ in range(2))
        edited = set(generator.sample(old, 5))
        scanned = [row(i, text="!" if i in edited else "") for i in corpus]
        plan = Joined(scanned, [live(row(i)) for i in old])
        both = set(corpus) & set(old)
        assert plan.new == len(set(corpus) - set(old))
        assert plan.changed == len(both & edited)
        assert plan.unchanged == len(both - edited)
        assert plan.missing == len(set(old) - set(corpus))


def test_a_shard_without_some_documents_is_another_shard(tmp_path: Path) -> None:
    (spec,) = cut_shards(rows(5), WorkFolder(str(tmp_path)), 1 << 40)
    (rest,) = without(spec, frozenset({"doc-00001"}), WorkFolder(str(tmp_path)))
    expected = [entry for entry in rows(5) if entry["document_id"] != "doc-00001"]
    assert [rest.name] == names(expected, tmp_path / "x", 1 << 40)
    assert list(without(rest, frozenset(r["document_id"] for r in expected), WorkFolder(str(tmp_path)))) == []
