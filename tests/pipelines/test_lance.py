"""LanceDB tables: the rows of the Parquet shards, one version a generation, read by anybody and by the runtime."""

import builtins
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import lancedb
import numpy as np
import pytest

from refrag.pipelines import build as build_module
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.estimate import estimate_build
from refrag.pipelines.progress import Silent
from refrag.pipelines.repair import RepairOptions, repair_index
from refrag_core import lance_tables
from refrag_core.embedding_storage import Int8Rows
from refrag_core.errors import CommitConflictError, ConfigError, CorruptIndexError, MissingExtraError
from refrag_core.generations import collect_garbage, roll_back
from refrag_core.index_reader import FetchedPassage, IndexReader, PassageRef
from refrag_core.manifest import Manifest, encode_manifest, read_manifest
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.storage import FolderStore, Store
from refrag_core.verification import verify_index
from tests import command_line
from tests.faults.kill_builds import build_arguments
from tests.small_index import SmallIndex, documents, write_jsonl

FIRST = documents(16)
SECOND = [*FIRST[3:], {"id": "doc-0001", "text": "Edited: a harbour of copper."}, {"id": "new", "text": "A new king."}]
"""The second generation: doc-0000 and doc-0002 removed, doc-0001 edited, one new."""


def made(root: Path, **changes: Any) -> SmallIndex:
    """Two generations of an index with LanceDB tables."""
    small = SmallIndex(root, FIRST, **({"tables": "lance", "score": True} | changes))
    small.build()
    small.write(SECOND)
    small.build(delete_missing=True)
    return small


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallIndex]:
    """Not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield made(tmp_path_factory.mktemp("lance"))


@pytest.fixture
def small(built: SmallIndex, tmp_path: Path, own_cache: Path) -> SmallIndex:
    """A copy of it that may be written to."""
    copy = SmallIndex(tmp_path, SECOND, score=True)
    shutil.copytree(built.path, copy.path)
    return copy


def parquet_rows(root: Path, version: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Every live row as the Parquet shards have it, with its chunks' columns in one row each."""
    reader, found = IndexReader(root, version), {"passages": [], "chunks": []}
    for number, shard in enumerate(reader.manifest.shards):
        for row in np.flatnonzero(reader.live_rows(number)):
            ref = PassageRef(number, int(row))
            (fetched,), shown = reader.fetch([ref]), reader.describe(ref)
            found["passages"].append((shard.name, int(row), shown.passage_id, shown.document_id, shown.text))
            size = fetched.chunk_size
            for at in range(len(fetched.embeddings)):
                tokens = fetched.tokens[at * size : (at + 1) * size].tolist()
                score = None if fetched.scores is None else float(fetched.scores[at])
                found["chunks"].append((shard.name, int(row), tokens, rows_of(fetched)[at].tolist(), score))
    return found


def rows_of(fetched: FetchedPassage) -> np.ndarray:
    stored = fetched.embeddings
    return np.hstack([stored.codes, stored.scales[:, None]]) if isinstance(stored, Int8Rows) else stored


def lance_rows(root: Path, tag: str | None = None) -> dict[str, list[Any]]:
    """The same from what `lancedb.connect` shows."""
    database = lancedb.connect(root / "lance")
    tables = {name: database.open_table(name) for name in ("passages", "chunks")}
    for table in tables.values() if tag else ():
        table.checkout(tag)
    passages = tables["passages"].to_arrow().to_pylist()
    chunks = tables["chunks"].to_arrow().to_pylist()
    return {
        "passages": [(p["shard"], p["row"], p["passage_id"].hex(), p["document_id"], p["text"]) for p in passages],
        "chunks": [
            (
                c["shard"],
                c["passage"],
                c["tokens"],
                [*c["embedding"], *([c["scale"]] if "scale" in c else [])],
                c.get("nll"),
            )
            for c in chunks
        ],
    }


def by_place(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: sorted(entries, key=lambda e: e[:2]) for name, entries in rows.items()}


# --- what anybody reads -------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_shards(built: SmallIndex) -> None:
    assert by_place(lance_rows(built.path)) == by_place(parquet_rows(built.path))


def test_an_older_generation_is_read_by_its_content_id(built: SmallIndex) -> None:
    first = read_manifest(FolderStore(built.path), 1)
    assert by_place(lance_rows(built.path, first.content_id)) == by_place(parquet_rows(built.path, 1))


def test_documents_and_vectors(built: SmallIndex) -> None:
    database = lancedb.connect(built.path / "lance")
    found = database.open_table("documents").to_arrow()
    assert sorted(found.column("document_id").to_pylist()) == sorted(record["id"] for record in SECOND)
    reader = IndexReader(built.path)
    passages = database.open_table("passages").to_arrow()
    query = np.asarray(passages.column("vector")[0].as_py(), np.float32)
    ref, score = reader.search(query, 1)[0]
    assert reader.describe(ref).passage_id == passages.column("passage_id")[0].as_py().hex()
    assert score == pytest.approx(1.0, abs=1e-2)
    hits = database.open_table("passages").search().where("document_id = 'new'").select(["text"]).to_list()
    assert [hit["text"] for hit in hits] == ["A new king."]


def test_one_commit_a_generation(built: SmallIndex) -> None:
    store = FolderStore(built.path)
    for table in lance_tables.TABLES:
        dataset = lance.dataset(str(built.path / "lance" / f"{table}.lance"))
        assert [entry["version"] for entry in dataset.versions()] == [1, 2]
        tags = {tag: found["version"] for tag, found in dataset.tags.list().items()}
        assert tags == {read_manifest(store, version).content_id: version for version in (1, 2)}


# --- identity -----------------------------------------------------------------------------------------


def test_the_content_id_is_that_of_parquet_fresh_and_updated(
    built: SmallIndex, tmp_path: Path, own_cache: Path
) -> None:
    plain = SmallIndex(tmp_path / "a", FIRST, score=True)
    assert plain.build().content_id == read_manifest(FolderStore(built.path), 1).content_id
    assert plain.build(tables="lance").content_id == read_manifest(FolderStore(built.path), 1).content_id
    fresh = SmallIndex(tmp_path / "b", SECOND, score=True, tables="lance").build()
    assert fresh.content_id == read_manifest(FolderStore(built.path)).content_id


def test_running_again_changes_nothing(small: SmallIndex) -> None:
    files = {path: path.stat().st_mtime_ns for path in small.path.rglob("*") if path.is_file()}
    report = small.build()
    assert (report.committed, report.version) == (False, 2)
    assert {path: path.stat().st_mtime_ns for path in small.path.rglob("*") if path.is_file()} == files


def test_tables_come_and_go_without_encoding(small: SmallIndex) -> None:
    """A generation without them, and one that has them again: live rows only, though the shards have dead ones."""
    without = small.build(tables="parquet")
    assert (without.version, without.encoded_chunks) == (3, 0)
    manifest = read_manifest(FolderStore(small.path))
    assert manifest.lance is None
    assert lance_tables.records_of(manifest) == {}
    again = small.build(tables="lance")
    assert (again.version, again.encoded_chunks, again.content_id) == (4, 0, without.content_id)
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))
    assert verify_index(FolderStore(small.path)).problems == ()


def test_scores_become_a_column(tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, FIRST, tables="lance")
    small.build()
    assert "nll" not in lancedb.connect(small.path / "lance").open_table("chunks").schema.names
    small.build(score=True)
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))


def test_int8_and_adaptive_chunk_sizes(tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, FIRST, tables="lance")
    options = small.with_models(embedding_dtype="int8", chunk_size_field="importance")
    small.options = replace(options, corpus=replace(options.corpus, chunk_size_field="importance"))
    small.build()
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))
    assert len({shard.chunk_size for shard in read_manifest(FolderStore(small.path)).shards}) == 3
    same_passages(small.path)


# --- what the runtime reads ---------------------------------------------------------------------------


def same_passages(root: Path) -> None:
    mapped, tables = IndexReader(root), IndexReader(root, tables="lance")
    refs = [
        PassageRef(number, int(row))
        for number in range(len(mapped.manifest.shards))
        for row in np.flatnonzero(mapped.live_rows(number))
    ]
    refs = [*reversed(refs), refs[0], refs[0]]
    for ref, one, other in zip(refs, mapped.fetch(refs), tables.fetch(refs), strict=True):
        assert (one.tokens.dtype, one.tokens.tolist()) == (other.tokens.dtype, other.tokens.tolist())
        assert rows_of(one).dtype == rows_of(other).dtype
        assert np.array_equal(rows_of(one), rows_of(other))
        assert (one.chunk_size, one.scores is None) == (other.chunk_size, other.scores is None)
        assert one.scores is None or np.array_equal(one.scores, other.scores)
        assert mapped.describe(ref) == tables.describe(ref)


def test_both_tables_give_the_same_passages(built: SmallIndex) -> None:
    same_passages(built.path)
    assert IndexReader(built.path, tables="lance").fetch([]) == []


@pytest.mark.parametrize("policy", ["none", "learned", "perplexity"])
def test_both_tables_give_the_same_answer(built: SmallIndex, policy: Any) -> None:
    options = AskOptions(top_k=4, policy=policy, expansion_fraction=0.3, max_new_tokens=12)
    answers = [
        Runtime.open(built.path, device="cpu", tables=tables).ask("Which harbour is new?", options)
        for tables in ("parquet", "lance")
    ]
    one, other = (replace(answer, stats=None) for answer in answers)  # type: ignore[arg-type]
    assert one == other
    assert answers[0].stats.decoder_positions == answers[1].stats.decoder_positions


def test_a_removed_passage_is_not_to_be_had(built: SmallIndex) -> None:
    reader = IndexReader(built.path, tables="lance")
    number, row = next(
        (n, int(np.flatnonzero(~reader.live_rows(n))[0]))
        for n in range(len(reader.manifest.shards))
        if not reader.live_rows(n).all()
    )
    with pytest.raises(CorruptIndexError, match=f"has no live row {row} of shard"):
        reader.fetch([PassageRef(number, row)])


def test_an_index_without_them_says_so(tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, FIRST[:4])
    small.build()
    with pytest.raises(
        ConfigError, match="has no Lance tables in version 1, expected an index built with --tables lance"
    ):
        IndexReader(small.path, tables="lance")


# --- kills and other writers --------------------------------------------------------------------------


class _Died(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("step", "at"),
    [("_write_fragment", 1), ("_committed", 1), ("_committed", 2), ("_tag", 3), ("commit", 1), ("commit", 2)],
)
def test_a_killed_update_leaves_no_row_twice(
    built: SmallIndex, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, step: str, at: int
) -> None:
    """Dead right after the `at`-th time that `step` was done, or before `commit`, the manifest's."""
    small = SmallIndex(tmp_path, SECOND, score=True)
    shutil.copytree(built.path, small.path)
    small.write([*SECOND[2:], {"id": "newer", "text": "An even newer king of glass."}])
    owner = build_module if step == "commit" else lance_tables
    real, calls = getattr(owner, step), []

    def dying(*arguments: Any) -> Any:
        calls.append(step)
        if step == "commit":
            raise _Died
        result = real(*arguments)
        if len(calls) == at:
            raise _Died
        return result

    monkeypatch.setattr(owner, step, dying)
    with pytest.raises(_Died):
        small.build(delete_missing=True)
    monkeypatch.setattr(owner, step, real)
    assert read_manifest(FolderStore(small.path)).version == 2
    same_passages(small.path)  # the generation before is whole
    if at == 2 and step == "commit":
        small.write(SECOND)  # the corpus went back meanwhile: no generation, and its rows are shown again
        assert small.build(delete_missing=True).committed is False
        assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))
        return
    report = small.build(delete_missing=True)
    assert (report.version, report.committed) == (3, True)
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))
    assert verify_index(FolderStore(small.path)).problems == ()
    same_passages(small.path)


def test_a_killed_first_build_leaves_no_row_twice(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SmallIndex(tmp_path, FIRST, tables="lance")

    def dying(*arguments: Any) -> None:
        raise _Died

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "commit", dying)
        with pytest.raises(_Died):
            small.build()
    assert small.build().version == 1
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))


@pytest.mark.slow
def test_kill_9_at_eight_moments_of_an_update(tmp_path: Path, own_cache: Path) -> None:
    """The moments are spread over the last third of a build, where the tables are written."""
    index = tmp_path / "index"
    arguments = [*build_arguments(tmp_path, index), "--tables", "lance", "--delete-missing"]
    write_jsonl(tmp_path / "corpus" / "records.jsonl", FIRST)
    assert command_line.run(*arguments).code == 0
    shutil.copytree(index, tmp_path / "before")
    write_jsonl(tmp_path / "corpus" / "records.jsonl", SECOND)
    started = time.monotonic()
    assert command_line.run(*arguments).code == 0
    longest = time.monotonic() - started
    expected = read_manifest(FolderStore(index)).content_id
    shutil.rmtree(index)
    shutil.copytree(tmp_path / "before", index)
    killed = [kill_after_with(arguments, longest * (2 / 3 + at / 24)) for at in range(8)]
    assert any(killed)
    assert command_line.run(*arguments).code == 0
    assert read_manifest(FolderStore(index)).content_id == expected
    assert by_place(lance_rows(index)) == by_place(parquet_rows(index))
    assert verify_index(FolderStore(index)).problems == ()


def kill_after_with(arguments: list[str], seconds: float) -> bool:
    """Start a command and kill it; False when it had ended by then."""
    process = command_line.start(*arguments)
    time.sleep(seconds)
    if process.poll() is not None:
        command_line.finish(process)
        return False
    command_line.kill_group(process)
    return True


def test_another_writer_is_noticed_and_set_right(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    small.write([*SECOND[2:], {"id": "newer", "text": "An even newer king of glass."}])
    real = lance_tables._write_fragment

    def meddling(store: Store, shard: Any, table: str, rows: Any, base: Any) -> Any:
        made = real(store, shard, table, rows, base)
        path = store.path(f"lance/{table}.lance")
        lance.write_dataset(lance.dataset(str(path)).head(1), str(path), mode="append")
        return made

    monkeypatch.setattr(lance_tables, "_write_fragment", meddling)
    with pytest.raises(CommitConflictError, match=r"another writer changed .*documents.lance while this build did"):
        small.build(delete_missing=True)
    monkeypatch.setattr(lance_tables, "_write_fragment", real)
    assert read_manifest(FolderStore(small.path)).version == 2
    assert small.build(delete_missing=True).version == 3
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))


def test_an_older_generation_can_be_shown_again(small: SmallIndex) -> None:
    lance_tables.make_newest(FolderStore(small.path), read_manifest(FolderStore(small.path), 1))
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path, 1))
    assert verify_index(FolderStore(small.path)).problems == ()


def test_a_rollback_is_what_anybody_reads(small: SmallIndex) -> None:
    roll_back(FolderStore(small.path), 1)
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path, 1))
    assert verify_index(FolderStore(small.path)).problems == ()


def test_a_build_without_changes_after_a_rollback_writes_no_version(small: SmallIndex) -> None:
    roll_back(FolderStore(small.path), 1)
    before = [entry["version"] for entry in lance.dataset(str(small.path / "lance" / "chunks.lance")).versions()]
    small.write(FIRST)
    assert not small.build().committed
    roll_back(FolderStore(small.path), 1)
    after = [entry["version"] for entry in lance.dataset(str(small.path / "lance" / "chunks.lance")).versions()]
    assert after == before == [1, 2, 3]
    small.write(SECOND)
    assert small.build(delete_missing=True).committed
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))
    assert verify_index(FolderStore(small.path)).problems == ()


def test_gc_drops_the_versions_of_removed_generations(small: SmallIndex) -> None:
    store = FolderStore(small.path)
    first = read_manifest(store, 1)
    old = lance_tables.records_of(first).keys() - lance_tables.records_of(read_manifest(store)).keys()
    collect_garbage(store, keep=1, grace_seconds=0, dry_run=True)
    assert all(store.exists(name) for name in old)
    assert collect_garbage(store, keep=1, grace_seconds=0).removed == [1]
    assert old
    assert not any(store.exists(name) for name in old)
    assert first.content_id not in lance.dataset(str(small.path / "lance" / "chunks.lance")).tags.list()
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))
    assert verify_index(store).problems == ()


# --- damage and repair --------------------------------------------------------------------------------


def lance_file(manifest: Manifest, part: str) -> str:
    return next(name for name in lance_tables.records_of(manifest) if "chunks.lance" in name and part in name)


@pytest.mark.parametrize("part", ["/data/", "/_versions/", "/_deletions/"])
def test_a_damaged_file_is_found_and_repaired(small: SmallIndex, part: str) -> None:
    store = FolderStore(small.path)
    before = read_manifest(store)
    name = lance_file(before, part)
    data = bytearray((small.path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (small.path / name).write_bytes(data)
    assert name in {problem.file for problem in verify_index(store).problems}
    with LocalEngine(0) as engine:
        options = RepairOptions(index=small.path, checkpoint=str(small.models / "checkpoint"), device="cpu")
        report = repair_index(options, engine, Silent())
    assert report.version == 3
    after = read_manifest(store)
    assert (after.content_id, after.shards) == (before.content_id, before.shards)
    assert by_place(lance_rows(small.path)) == by_place(parquet_rows(small.path))
    same_passages(small.path)


def test_verify_counts_rows(small: SmallIndex) -> None:
    """A manifest that names an older version of one table: every digest is right, the rows are not."""
    store = FolderStore(small.path)
    manifest, first = read_manifest(store), read_manifest(store, 1)
    assert manifest.lance is not None
    assert first.lance is not None
    old = first.lance.tables["chunks"]
    liar = replace(manifest, lance=replace(manifest.lance, tables={**manifest.lance.tables, "chunks": old}))
    (small.path / manifest.name).write_bytes(encode_manifest(liar))
    with pytest.raises(CorruptIndexError, match="lists no digest for it"):
        read_manifest(store)
    liar = replace(liar, files={**manifest.files, **lance_tables.records_of(first)})
    (small.path / manifest.name).write_bytes(encode_manifest(liar))
    problems = verify_index(store).problems
    expected = f"{first.counts.chunks} rows, expected {manifest.counts.chunks}"
    assert {problem.file for problem in problems} == {old.manifest}
    assert problems[0].found == expected


def test_verify_finds_a_file_without_a_digest(small: SmallIndex) -> None:
    manifest = read_manifest(FolderStore(small.path))
    name = lance_file(manifest, "/data/")
    files = {known: record for known, record in manifest.files.items() if known != name}
    (small.path / manifest.name).write_bytes(encode_manifest(replace(manifest, files=files)))
    found = [problem.found for problem in verify_index(FolderStore(small.path)).problems]
    assert found == [f"{name} is part of it, and the manifest lists no digest for it"]


def test_verify_finds_other_columns_and_fragments(small: SmallIndex) -> None:
    """What another program made of a table under a manifest that lists all of its files."""
    store, path = FolderStore(small.path), small.path / "lance" / "chunks.lance"
    manifest = read_manifest(store)
    assert manifest.lance is not None
    rows = lance.dataset(str(path)).to_table().drop_columns(["nll"])
    written = lance.write_dataset(rows, str(path), mode="overwrite")
    names = lance_tables._files_of(store, "chunks", written.version)
    table = replace(
        manifest.lance.tables["chunks"],
        version=written.version,
        manifest=next(name for name in names if name.endswith(".manifest")),
    )
    info = replace(manifest.lance, tables={**manifest.lance.tables, "chunks": table})
    files = {**manifest.files, **{name: store.record(name) for name in names}}
    (small.path / manifest.name).write_bytes(encode_manifest(replace(manifest, lance=info, files=files)))
    assert [problem.found for problem in verify_index(store).problems] == [
        "its columns are not those of the Parquet shards",
        f"1 fragments, expected one for each of {len(manifest.shards)} shards",
    ]


def test_other_shards_than_the_manifests(small: SmallIndex) -> None:
    store = FolderStore(small.path)
    manifest = read_manifest(store)
    assert manifest.lance is not None
    liar = replace(manifest, lance=replace(manifest.lance, shards=manifest.lance.shards[1:]))
    (small.path / manifest.name).write_bytes(encode_manifest(liar))
    found = {problem.found for problem in verify_index(store).problems}
    assert found == {"its LanceDB tables hold other shards than it lists"}
    with pytest.raises(CorruptIndexError, match="hold other shards than its manifest lists"):
        IndexReader(small.path, tables="lance")


def test_lances_own_hints_are_nobodys_leftovers(built: SmallIndex) -> None:
    result = verify_index(FolderStore(built.path))
    assert (result.problems, result.unlisted) == ((), ())


# --- what is missing or cannot be ---------------------------------------------------------------------


def test_without_the_extra(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "lance":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError) as caught:
        SmallIndex(tmp_path, FIRST[:2], tables="lance").build()
    assert str(caught.value) == "LanceDB tables need the packages of an extra: pip install 'refrag[lance]'"
    assert not (tmp_path / "index").exists()


def test_a_remote_index_is_refused(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, FIRST[:2], tables="lance")
    with pytest.raises(ConfigError, match=r"asked for at s3://bucket/index; they are only written to a folder of this"):
        small.build(output="s3://bucket/index")


def test_the_plan_counts_them(tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, FIRST)
    with LocalEngine(0) as engine:
        plain, doubled = (estimate_build(replace(small.options, tables=t), engine) for t in ("parquet", "lance"))
    assert 1.2 * plain.disk_bytes < doubled.disk_bytes
    assert doubled.seconds["lance"] > 0
    assert "lance" not in plain.seconds
