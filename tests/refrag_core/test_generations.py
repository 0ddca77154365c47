"""Log, diff, rollback and gc over one small index with a history."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from refrag_core import generations
from refrag_core.errors import ConfigError, CorruptIndexError, IndexLockedError, IndexNotFoundError, UsageError
from refrag_core.generations import collect_garbage, diff_generations, generation_log, roll_back
from refrag_core.index_reader import IndexReader
from refrag_core.manifest import REMOVED, commit, list_versions, read_manifest, run_record_name
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex, documents

FIRST = documents(6, sentences=3)
SECOND = [*FIRST[1:5], FIRST[5] | {"text": "Edited."}, {"id": "doc-0009", "text": "New."}]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generation 1 holds FIRST, generation 2 holds SECOND, generation 3 one document more and one less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        index = SmallIndex(tmp_path_factory.mktemp("history"), FIRST)
        index.build()
        for records in (SECOND, [*SECOND[1:], {"id": "doc-0010", "text": "Newer."}]):
            index.write(records)
            index.build(delete_missing=True)
    return index.path


@pytest.fixture
def store(history: Path, tmp_path: Path) -> FolderStore:
    return FolderStore(Path(shutil.copytree(history, tmp_path / "index")))


def collect(store: FolderStore, keep: int, **options: float) -> generations.GarbageReport:
    return collect_garbage(store, keep=keep, **{"grace_seconds": 0, **options})  # type: ignore[arg-type]


# --- log ----------------------------------------------------------------------------------------------


def test_the_log_says_what_each_generation_changed(store: FolderStore) -> None:
    third, second, first = generation_log(store)
    assert [(e.version, e.state, e.parent) for e in (third, second, first)] == [
        (3, "newest", 2),
        (2, "kept", 1),
        (1, "kept", None),
    ]
    assert second.change is not None
    assert (second.change.action, second.change.new, second.change.changed, second.change.deleted) == ("build", 1, 1, 1)
    assert (second.tombstoned_documents, first.tombstoned_documents) == (2, 0)
    manifests = [read_manifest(store, version) for version in (1, 2)]
    new = manifests[1].files.keys() - manifests[0].files.keys()
    assert second.new_files == len(new)
    assert second.new_bytes == sum(manifests[1].files[name].bytes for name in new) < second.bytes
    assert (first.new_bytes, first.counts, first.build_id) == (first.bytes, manifests[0].counts, manifests[0].build_id)


def test_a_manifest_without_a_change_is_one_from_before(store: FolderStore) -> None:
    old = read_manifest(store, 3)
    shutil.rmtree(store.root / "versions")
    commit(store, replace(old, version=1, parent=None, change=None))
    assert [entry.change for entry in generation_log(store)] == [None]


def test_no_index_no_log(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match="holds no committed generation"):
        list(generation_log(FolderStore(tmp_path)))


# --- diff ---------------------------------------------------------------------------------------------


def test_a_diff_names_what_differs(store: FolderStore) -> None:
    seen: list[tuple[str, str]] = []
    report = diff_generations(store, 1, 2, lambda change, document_id: seen.append((change, document_id)))
    assert seen == [("removed", "doc-0000"), ("changed", "doc-0005"), ("added", "doc-0009")]
    counts = (report.documents_added, report.documents_removed, report.documents_changed, report.documents_unchanged)
    assert counts == (1, 1, 1, 4)
    back = diff_generations(store, 2, 1)
    assert (back.documents_added, back.documents_removed, back.documents_changed) == (1, 1, 1)
    assert back.new_bytes < report.new_bytes  # the older one's tables are all there still
    same = diff_generations(store, 2, 2)
    assert (same.documents_unchanged, same.new_files, same.models_changed) == (6, 0, [])


# --- rollback -----------------------------------------------------------------------------------------


def test_a_rollback_is_a_new_version_with_the_old_content(store: FolderStore) -> None:
    before = {path: path.read_bytes() for path in (store.root / "versions").iterdir()}
    report = roll_back(store, 1)
    assert (report.version, report.content_of, report.committed) == (4, 1, True)
    old, new = read_manifest(store, 1), read_manifest(store)
    assert (new.content_id, new.files, new.shards) == (old.content_id, old.files, old.shards)
    assert new.parent is not None
    assert new.parent.build_id == read_manifest(store, 3).build_id
    assert new.build_id != old.build_id
    assert all(path.read_bytes() == data for path, data in before.items())
    assert verify_index(store).problems == ()
    assert not (store.root / "work").exists()


def test_rollbacks_without_a_version_go_on_backwards(store: FolderStore) -> None:
    assert [roll_back(store).content_of for _ in range(2)] == [2, 1]
    with pytest.raises(UsageError, match="no generation older than 1"):
        roll_back(store)
    assert roll_back(store, 3).content_of == 3  # and forwards by name
    assert list_versions(store) == [1, 2, 3, 4, 5, 6]


def test_a_rollback_to_what_is_there_changes_nothing(store: FolderStore) -> None:
    report = roll_back(store, 3)
    assert (report.version, report.committed) == (3, False)
    assert list_versions(store) == [1, 2, 3]


def test_a_rollback_to_a_damaged_or_missing_generation_is_refused(store: FolderStore) -> None:
    with pytest.raises(IndexNotFoundError, match="holds no generation 9"):
        roll_back(store, 9)
    lost = next(iter(read_manifest(store, 1).files.keys() - read_manifest(store, 3).files.keys()), None)
    name = lost or read_manifest(store, 1).shards[0].tables["chunks"]
    store.remove(name)
    with pytest.raises(CorruptIndexError, match="is missing, expected"):
        roll_back(store, 1)
    with store.lock(), pytest.raises(IndexLockedError):
        roll_back(store, 2)
    assert list_versions(store) == [1, 2, 3]


# --- gc -----------------------------------------------------------------------------------------------


def test_generation_0_is_not_the_newest(store: FolderStore) -> None:
    for wanted in (lambda: roll_back(store, 0), lambda: diff_generations(store, 0, 1), lambda: read_manifest(store, 0)):
        with pytest.raises(IndexNotFoundError, match="holds no generation 0"):
            wanted()


def test_gc_removes_generations_and_what_only_they_name(store: FolderStore) -> None:
    old, new = read_manifest(store, 2), read_manifest(store, 3)
    report = collect(store, 1)
    assert (report.kept, report.removed, report.spared) == ([3], [1, 2], {})
    only_old = old.files.keys() - new.files.keys()
    assert len(only_old) == 1  # its list of tombstones: tables are shared
    records = [run_record_name(version) for version in (1, 2)]
    assert report.files == len(only_old) + len(records)
    assert not any(store.exists(name) for name in (*only_old, *records))
    assert store.exists(run_record_name(3))
    assert all(store.exists(name) for name in new.files)
    result = verify_index(store)
    assert (result.problems, result.unlisted) == ((), ())
    with pytest.raises(IndexNotFoundError):
        IndexReader(store.root, 1)
    log = list(generation_log(store))
    assert [(entry.version, entry.state) for entry in log] == [(3, "newest"), (2, "removed"), (1, "removed")]
    assert log[1].content_id == old.content_id
    again = collect(store, 1)
    assert (again.removed, again.files) == ([], 0)


def test_an_unexplained_gap_is_still_a_loss(store: FolderStore) -> None:
    collect(store, 2)
    assert verify_index(store).problems == ()
    store.remove("versions/2.json")
    assert [problem.file for problem in verify_index(store).problems] == ["versions/2.json"]


def test_a_rolled_back_generation_keeps_the_files_it_shares(store: FolderStore) -> None:
    roll_back(store, 1)
    report = collect(store, 1)
    assert report.kept == [4]
    assert IndexReader(store.root).manifest.content_id == read_manifest(store).content_id
    assert verify_index(store).problems == ()


def test_gc_spares_what_a_reader_of_another_process_has_open(store: FolderStore) -> None:
    code = (
        "import sys; from pathlib import Path; from refrag_core.index_reader import IndexReader\n"
        "reader = IndexReader(Path(sys.argv[1]), 1); print('open', flush=True); sys.stdin.read()"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    try:
        report = collect(store, 1)
    finally:
        reader.kill()
        reader.communicate()
    assert (report.removed, report.spared) == ([2], {1: "is open in a reader"})
    assert IndexReader(store.root, 1).manifest.version == 1
    assert collect(store, 1).removed == [1]  # the kernel dropped the claim with the process


def test_a_reader_holds_its_generation_until_it_is_closed(store: FolderStore) -> None:
    reader = IndexReader(store.root, 2)
    assert collect(store, 1).spared == {2: "is open in a reader"}
    reader.shard(0)  # opened only now
    reader.close()
    assert collect(store, 1).removed == [2]


def test_gc_spares_what_was_in_use_within_the_grace_period(store: FolderStore) -> None:
    report = collect(store, 1, grace_seconds=3600)
    assert (report.kept, report.removed) == ([1, 2, 3], [])
    assert set(report.spared.values()) == {"was the newest within the grace period"}
    os.utime(store.path("versions/2.json"), (0, 0))  # so 1 has not been the newest for decades
    assert collect(store, 1, grace_seconds=3600).removed == [1]


def test_gc_spares_young_files_of_no_generation_and_files_of_no_index(store: FolderStore) -> None:
    store.publish("shards/" + "0" * 32 + "/chunks.parquet", lambda path: path.write_bytes(b"of a build") and None)
    (store.root / "notes.txt").write_text("a person's")
    assert collect(store, 3, grace_seconds=3600).young_files == 1
    assert store.exists("shards/" + "0" * 32 + "/chunks.parquet")
    assert collect(store, 3).files == 1
    assert not (store.root / "shards" / ("0" * 32)).exists()
    assert (store.root / "notes.txt").exists()


def test_a_dry_run_removes_nothing(store: FolderStore) -> None:
    before = set(store.files())
    report = collect_garbage(store, keep=1, grace_seconds=0, dry_run=True)
    assert (report.removed, report.files > 0) == ([1, 2], True)
    assert set(store.files()) == before
    real = collect(store, 1)
    assert (real.removed, real.files, real.bytes) == (report.removed, report.files, report.bytes)


def test_gc_beside_a_build_or_an_altered_manifest_removes_nothing(store: FolderStore) -> None:
    with store.lock(), pytest.raises(IndexLockedError):
        collect(store, 1)
    store.path("versions/2.json").write_text("{}")
    before = set(store.files())
    with pytest.raises(CorruptIndexError):
        collect(store, 1)
    assert set(store.files()) == before


@pytest.mark.parametrize(("keep", "grace"), [(0, 0), (1, -1)])
def test_gc_with_senseless_settings(store: FolderStore, keep: int, grace: float) -> None:
    with pytest.raises(ConfigError, match="expected at least one generation"):
        collect(store, keep, grace_seconds=grace)


def test_gc_may_die_at_any_step(history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is readable afterwards is whole, and the next gc ends where an undisturbed one does."""

    class Died(BaseException):
        pass

    steps = [0]

    def counted(real: object) -> object:
        def step(*arguments: object, **options: object) -> object:
            steps[0] -= 1
            if steps[0] == 0:
                raise Died
            return real(*arguments, **options)  # type: ignore[operator]

        return step

    for name in ("unlink", "replace", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    calm = FolderStore(Path(shutil.copytree(history, tmp_path / "calm")))
    collect(calm, 1)
    total, expected = -steps[0], sorted(calm.files())
    assert total > 10
    for at in range(1, total + 1):
        store = FolderStore(Path(shutil.copytree(history, tmp_path / f"index-{at}")))
        steps[0] = at
        with pytest.raises(Died):
            collect(store, 1)
        steps[0] = 0
        assert verify_index(store).problems == (), at
        for version in list_versions(store):
            IndexReader(store.root, version).close()
        collect(store, 1)
        assert sorted(store.files()) == expected, at
        assert store.exists(REMOVED)
        shutil.rmtree(store.root)
