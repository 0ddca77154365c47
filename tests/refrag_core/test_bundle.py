"""Bundles: what an export holds, what opening finds, how generations arrive and are collected again."""

import os
import shutil
import signal
import stat
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refrag.pipelines.compact import CompactOptions, compact_index
from refrag.pipelines.engines.local import LocalEngine
from refrag_core import bundle as bundles
from refrag_core import bundle_folder, models
from refrag_core.bundle import ExportOptions, export_bundle, open_bundle
from refrag_core.bundle_folder import collect
from refrag_core.bundle_transfer import pull_bundle, push_bundle
from refrag_core.errors import (
    CommitConflictError,
    ConfigError,
    CorruptIndexError,
    FingerprintMismatchError,
    IndexNotFoundError,
    SignatureError,
    UsageError,
)
from refrag_core.generations import collect_garbage, roll_back
from refrag_core.index_reader import IndexReader
from refrag_core.inspection import inspect_index, inspect_passage
from refrag_core.manifest import encode_manifest, list_versions, read_manifest
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.signing import write_key_pair
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests import tiny_models
from tests.small_index import SmallIndex, documents

QUESTION = "Which river is the capital of the northern island?"
PLAIN = ExportOptions()


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


def long_one(beginning: str = "A beginning.") -> dict[str, Any]:
    """A document that fills a shard of its own."""
    return {"id": "doc-0000", "text": f"{beginning} {documents(30, seed=3)[7]['text'] * 12}"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    """An index of two small generations, in few files; the second has a shard that the first lacks. Not to be written
    to.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        small = SmallIndex(
            tmp_path_factory.mktemp("two"), ["{broken", long_one(), *documents(6)[1:]], shard_bytes=2_000
        )
        small.build()
        small.write([long_one("An edited beginning."), *documents(6)[1:]])
        small.build()
    return small


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file and folder below `root`."""
    return {str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*")}


def ask(root: Path, **options: Any) -> Any:
    answer = Runtime.open(root, device="cpu", **options).ask(
        QUESTION, AskOptions(top_k=3, max_new_tokens=8, policy="all")
    )
    return answer.answer, answer.passages, answer.version


def flip(path: Path, at: int = -1) -> None:
    """Change one byte of a file that may be linked elsewhere, under its name alone."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))


def some_file(root: Path, kind: str = "embeddings") -> Path:
    return root / read_manifest(FolderStore(root)).shards[0].tables[kind]


def collect_garbage_of(store: FolderStore) -> object:
    return collect_garbage(store, keep=1)


# --- export -----------------------------------------------------------------------------------------


def test_a_bundle_answers_as_its_index_does(library: SmallIndex, tmp_path: Path) -> None:
    report = export_bundle(library.path, tmp_path / "bundle", PLAIN)
    assert ask(tmp_path / "bundle") == ask(library.path)
    index = read_manifest(FolderStore(library.path))
    assert (report.version, report.content_id) == (2, index.content_id)
    assert report.moved_bytes == report.bytes > 0


def test_hidden_copies_codes_and_lance_tables_of_the_index(tmp_path: Path) -> None:
    copies = [{"id": f"copy-{number}", "text": documents(1)[0]["text"]} for number in range(3)]
    small = SmallIndex(tmp_path, [*documents(6)[1:], *copies])
    options = small.with_models(embedding_dtype="int8").models
    small.build(models=options, dedup_passages=True, tables="lance")
    export_bundle(small.path, tmp_path / "bundle", PLAIN)
    assert ask(tmp_path / "bundle") == ask(small.path)
    manifest = read_manifest(FolderStore(tmp_path / "bundle"))
    assert manifest.duplicates is not None
    assert manifest.duplicates.passages > 0
    assert manifest.lance is None
    assert not (tmp_path / "bundle" / "lance").exists()
    open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("change", [collect_garbage_of, roll_back])
def test_what_changes_an_index_refuses_a_bundle(
    library: SmallIndex, tmp_path: Path, change: Callable[[FolderStore], object]
) -> None:
    export_bundle(library.path, tmp_path / "bundle", PLAIN)
    before = tree(tmp_path / "bundle")
    with pytest.raises(UsageError, match="is a bundle, expected an index"):
        change(FolderStore(tmp_path / "bundle"))
    assert tree(tmp_path / "bundle") == before


def test_it_holds_what_serving_needs_and_nothing_else(library: SmallIndex, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    export_bundle(library.path, root, PLAIN)
    manifest, index = read_manifest(FolderStore(root)), read_manifest(FolderStore(library.path))
    assert all(
        set(shard.tables) == {"documents", "passages", "chunks", "embeddings", "vectors", "scores"}
        for shard in manifest.shards
    )
    assert manifest.quarantine.file is None
    assert manifest.quarantine.counts == index.quarantine.counts != {}
    assert manifest.bundle is not None
    assert manifest.bundle.source_build_id == index.build_id
    assert manifest.parent is None
    assert set(FolderStore(root).files()) == {*manifest.files, "versions/2.json", "CURRENT"}
    assert not (root / "work").exists()
    assert verify_index(FolderStore(root)).problems == ()
    assert inspect_index(root)["bytes"]["embeddings"] == inspect_index(library.path)["bytes"]["embeddings"]


def test_files_are_named_by_their_bytes(library: SmallIndex, tmp_path: Path) -> None:
    export_bundle(library.path, tmp_path / "bundle", PLAIN)
    for record in read_manifest(FolderStore(tmp_path / "bundle")).files.values():
        folder = record.name.split("/")[0]
        assert folder in ("files", "checkpoints")
        assert folder == "checkpoints" or Path(record.name).stem == record.digest


def test_it_can_be_moved_and_the_index_removed(two: SmallIndex, tmp_path: Path) -> None:
    shutil.copytree(two.path, tmp_path / "index")
    expected = ask(tmp_path / "index")
    export_bundle(tmp_path / "index", tmp_path / "bundle", PLAIN)
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    assert ask(tmp_path / "elsewhere") == expected


@pytest.mark.parametrize("copy", [False, True])
def test_files_are_linked_unless_copies_are_asked_for(two: SmallIndex, tmp_path: Path, copy: bool) -> None:
    export_bundle(two.path, tmp_path / "bundle", ExportOptions(copy=copy))
    index = read_manifest(FolderStore(two.path)).shards[0].tables["embeddings"]
    assert some_file(tmp_path / "bundle").samefile(two.path / index) is not copy


def test_models_can_travel_along(two: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, passage = ask(two.path), inspect_passage(two.path, "doc-0001#0")
    export_bundle(two.path, tmp_path / "bundle", ExportOptions(include_decoder=True, include_retriever=True))

    def nowhere(reference: str) -> Path:
        raise AssertionError(f"{reference} was looked up on this host")

    for module in ("runtime", "retrieval", "inspection", "checkpoint"):
        monkeypatch.setattr(f"refrag_core.{module}.resolve_model", nowhere)
    assert ask(tmp_path / "bundle") == expected
    assert inspect_passage(tmp_path / "bundle", "doc-0001#0") == passage
    assert set(open_bundle(tmp_path / "bundle").models) == {"decoder", "retriever"}


def test_a_model_that_the_index_was_not_made_for_does_not_travel(
    two: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "fingerprint_model", lambda folder: "f" * 64)
    with pytest.raises(
        FingerprintMismatchError, match=r"the decoder in .* has fingerprint ffffffffffff, the index was"
    ):
        export_bundle(two.path, tmp_path / "bundle", ExportOptions(include_decoder=True))
    assert not (tmp_path / "bundle").exists()


def test_a_second_generation_shares_its_files_with_the_first(two: SmallIndex, tmp_path: Path) -> None:
    first = export_bundle(two.path, tmp_path / "bundle", ExportOptions(version=1))
    second = export_bundle(two.path, tmp_path / "bundle", PLAIN)
    assert first.spared_files == 0
    assert second.spared_bytes > 0
    assert second.moved_bytes < first.moved_bytes
    assert list_versions(FolderStore(tmp_path / "bundle")) == [1, 2]
    again = export_bundle(two.path, tmp_path / "bundle", PLAIN)
    assert (again.moved_files, again.moved_bytes) == (0, 0)


def test_a_damaged_index_is_not_exported(two: SmallIndex, tmp_path: Path) -> None:
    shutil.copytree(two.path, tmp_path / "index")
    flip(some_file(tmp_path / "index"))
    with pytest.raises(CorruptIndexError, match=r"arrived with \d+ bytes and SHA-256 .* expected"):
        export_bundle(tmp_path / "index", tmp_path / "bundle", PLAIN)
    assert list_versions(FolderStore(tmp_path / "bundle")) == []


def test_a_bundle_of_another_index_is_not_overwritten(two: SmallIndex, library: SmallIndex, tmp_path: Path) -> None:
    export_bundle(two.path, tmp_path / "bundle", PLAIN)
    before = tree(tmp_path / "bundle")
    with pytest.raises(CommitConflictError, match=r"has another generation 2 .* nothing was changed"):
        export_bundle(library.path, tmp_path / "bundle", PLAIN)
    assert tree(tmp_path / "bundle") == before


def test_bundles_and_indexes_are_told_apart(two: SmallIndex, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    export_bundle(two.path, root, PLAIN)
    with pytest.raises(UsageError, match="is a bundle, expected the index that it was exported from"):
        export_bundle(root, tmp_path / "other", PLAIN)
    for call in (open_bundle, collect):
        with pytest.raises(UsageError, match="is an index, expected a bundle"):
            call(two.path)
    with pytest.raises(UsageError, match="is an index, expected a bundle"):
        push_bundle(two.path, str(tmp_path / "other"))
    with pytest.raises(UsageError, match="is an index, expected a bundle"):
        pull_bundle(str(two.path), tmp_path / "other")
    with pytest.raises(ConfigError, match="lies in the index"):
        export_bundle(two.path, two.path / "bundle", PLAIN)
    with pytest.raises(UsageError, match="is a bundle, expected an index"):
        two.build(output=root)


# --- opening ----------------------------------------------------------------------------------------


def test_opening_checks_every_byte_and_writes_nothing(two: SmallIndex, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    export_bundle(two.path, root, ExportOptions(copy=True))
    before = tree(root)
    report = open_bundle(root)
    assert tree(root) == before
    assert report.bytes == sum(record.bytes for record in read_manifest(FolderStore(root)).files.values())
    assert sum(report.bytes_by_kind.values()) == report.bytes
    assert not report.signed
    for record in read_manifest(FolderStore(root)).files.values():
        path = root / record.name
        kept = path.read_bytes()
        flip(path, at=len(kept) // 2)
        with pytest.raises(
            CorruptIndexError, match=rf"1 of \d+ files .*{record.digest[:8]}|1 of \d+ files .*checkpoints"
        ):
            open_bundle(root)
        path.write_bytes(kept)
    assert open_bundle(root).files == report.files


# --- arriving: pulls --------------------------------------------------------------------------------


def test_a_pull_moves_what_is_missing_and_keeps_the_generation_before(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, ExportOptions(version=1))
    first = pull_bundle(str(source), host)
    assert first.moved_bytes == first.bytes
    export_bundle(two.path, source, PLAIN)
    second = pull_bundle(str(source), host)
    old, new = (read_manifest(FolderStore(source), version).files for version in (1, 2))
    missing = [record for name, record in new.items() if name not in old]
    assert second.moved_files == len(missing)
    assert second.moved_bytes == sum(r.bytes for r in missing) + (source / "versions/2.json").stat().st_size
    assert second.moved_bytes + second.spared_bytes == second.bytes
    assert list_versions(FolderStore(host)) == [1, 2]
    assert ask(host) == ask(two.path)
    assert ask(host, version=1) == ask(two.path, version=1)
    assert (host / "CURRENT").read_text() == "2\n"


def test_an_older_generation_may_be_pulled_later(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    for version in (1, 2):
        export_bundle(two.path, source, ExportOptions(version=version))
    pull_bundle(str(source), host)
    assert list_versions(FolderStore(host)) == [2]
    assert pull_bundle(str(source), host, version=1).version == 1
    assert (host / "CURRENT").read_text() == "2\n"
    with pytest.raises(IndexNotFoundError, match=r"versions/7.json is not there; expected a generation among \[1, 2\]"):
        pull_bundle(str(source), host, version=7)


def test_bytes_that_are_there_under_another_name_do_not_move(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, ExportOptions(include_decoder=True, version=1))
    pull_bundle(str(source), host)
    manifest = read_manifest(FolderStore(source))
    assert manifest.bundle is not None
    decoder = [record for record in manifest.files.values() if record.name.startswith("models/")]
    again = bundle_folder.folder_name("models", {f"again/{Path(r.name).name}": r.digest for r in decoder})
    renamed = {r.name: replace(r, name=f"{again}/again/{Path(r.name).name}") for r in decoder}
    for old, new in renamed.items():
        (source / new.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / old, source / new.name)
    files = {r.name: r for r in manifest.files.values() if r.name not in renamed} | {
        r.name: r for r in renamed.values()
    }
    info = replace(manifest.bundle, decoder=again)
    second = replace(manifest, version=2, files=files, bundle=info)
    (source / "versions/2.json").write_bytes(encode_manifest(second))
    report = pull_bundle(str(source), host)
    assert report.version == 2
    assert report.moved_files == 0
    assert open_bundle(host).version == 2


@pytest.mark.parametrize("kind", ["embeddings", "passages"])
def test_a_damaged_source_is_refused_and_the_host_serves_on(two: SmallIndex, tmp_path: Path, kind: str) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, ExportOptions(version=1))
    pull_bundle(str(source), host)
    expected = ask(host)
    export_bundle(two.path, source, PLAIN)
    new = read_manifest(FolderStore(source)).shards[-1].tables[kind]
    old = read_manifest(FolderStore(source), 1).files
    (damaged,) = {s.tables[kind] for s in read_manifest(FolderStore(source)).shards} - set(old)
    assert new
    flip(source / damaged)
    with pytest.raises(CorruptIndexError, match="arrived with"):
        pull_bundle(str(source), host)
    (source / damaged).write_bytes(b"short")
    with pytest.raises(CorruptIndexError, match="has 5 bytes, expected"):
        pull_bundle(str(source), host)
    (source / damaged).unlink()
    with pytest.raises(CorruptIndexError, match="is missing, expected"):
        pull_bundle(str(source), host)
    assert list_versions(FolderStore(host)) == [1]
    assert ask(host) == expected
    assert not (host / "work").exists()


def test_a_file_that_rotted_on_the_host_is_fetched_again(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, PLAIN)
    pull_bundle(str(source), host)
    flip(some_file(host))
    assert pull_bundle(str(source), host).moved_files == 1
    assert open_bundle(host).version == 2


def test_a_manifest_with_an_unsafe_name_is_refused_before_any_file(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, PLAIN)
    manifest = read_manifest(FolderStore(source))
    for name in ("../outside", "/etc/outside", "files/../../outside", "files\\outside"):
        record = next(iter(manifest.files.values()))
        evil = replace(manifest, version=9, files={**manifest.files, name: replace(record, name=name)})
        (source / "versions/9.json").write_bytes(encode_manifest(evil))
        with pytest.raises(CorruptIndexError, match="unsafe file name"):
            pull_bundle(str(source), host)
        assert not host.exists()


def test_names_that_do_not_follow_from_the_bytes_are_refused(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, ExportOptions(include_decoder=True))
    pull_bundle(str(source), host)
    manifest, before = read_manifest(FolderStore(source)), tree(host)
    files = manifest.files
    model = next(name for name in files if name.startswith("models/"))
    first, second = [name for name in files if name.startswith("files/")][:2]
    for name in ("versions/2.json", "CURRENT", "work/x", first, str(Path(model).with_name("extra.json")), "models/x"):
        evil = replace(manifest, version=9, files={**files, name: replace(files[second], name=name)})
        (source / "versions/9.json").write_bytes(encode_manifest(evil))
        with pytest.raises(CorruptIndexError, match=r"lists a file .*, expected names that follow from the bytes"):
            pull_bundle(str(source), host)
    assert tree(host) == before


def test_bundles_are_not_brought_to_an_index(two: SmallIndex, library: SmallIndex, tmp_path: Path) -> None:
    bundle, index = tmp_path / "bundle", tmp_path / "index"
    export_bundle(two.path, bundle, PLAIN)
    shutil.copytree(library.path, index)
    for version in list_versions(FolderStore(index))[1:]:
        (index / f"versions/{version}.json").unlink()
    before = tree(index)
    for bring in (
        lambda: export_bundle(two.path, index, PLAIN),
        lambda: push_bundle(bundle, str(index)),
        lambda: pull_bundle(str(bundle), index),
    ):
        with pytest.raises(UsageError, match="is an index, expected a place for bundles: nothing was changed"):
            bring()
    assert tree(index) == before


def test_a_link_in_the_source_arrives_as_a_file_or_not_at_all(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, PLAIN)
    path = some_file(source)
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    pull_bundle(str(source), host)
    assert not any(found.is_symlink() for found in host.rglob("*"))


# --- killed at every step ---------------------------------------------------------------------------


def killed(run: Callable[[], object], step: int) -> bool:
    """Run in a process of its own that is killed right after its `step`-th change of a name; False if it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork beside threads is fine for a child that only moves files
        child = os.fork()
    if child == 0:
        _arm(step)
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _arm(step: int) -> None:
    left = [step]
    for name in ("link", "replace", "mkdir"):
        setattr(os, name, _counted(getattr(os, name), left))


def _counted(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


@pytest.mark.parametrize("what", ["export", "push", "pull"])
def test_killed_at_every_step_it_goes_on_and_readers_never_notice(two: SmallIndex, tmp_path: Path, what: str) -> None:
    source = tmp_path / "source"
    export_bundle(two.path, source, ExportOptions(version=1))
    push_bundle(source, str(tmp_path / "before"))
    export_bundle(two.path, source, PLAIN)

    def run(target: Path) -> object:
        if what == "export":
            return export_bundle(two.path, target, ExportOptions(jobs=1))
        if what == "push":
            return push_bundle(source, str(target), jobs=1)
        return pull_bundle(str(source), target, jobs=1)

    step, seen = 0, set()
    while True:
        step += 1
        target = tmp_path / f"target-{step}"
        shutil.copytree(tmp_path / "before", target)
        if not killed(lambda at=target: run(at), step):  # type: ignore[misc]
            break
        version = open_bundle(target).version
        seen.add(version)
        run(target)
        assert open_bundle(target).version == 2
        assert open_bundle(target, version=1).version == 1
        assert not (target / "work").exists()
        assert verify_index(FolderStore(target)).problems == ()
        shutil.rmtree(target)
    assert seen == {1, 2}
    assert step > 10


# --- collecting -------------------------------------------------------------------------------------


@pytest.fixture
def host(two: SmallIndex, tmp_path: Path) -> Path:
    """A folder with both generations."""
    for version in (1, 2):
        export_bundle(two.path, tmp_path / "host", ExportOptions(version=version, copy=True))
    return tmp_path / "host"


def test_old_generations_and_their_files_go(host: Path, two: SmallIndex, tmp_path: Path) -> None:
    index = Path(shutil.copytree(two.path, tmp_path / "index"))
    with LocalEngine(0) as engine:
        assert compact_index(CompactOptions(index=index, shard_bytes=100_000), engine).committed
    export_bundle(index, host, ExportOptions(copy=True))
    old = {name for version in (1, 2) for name in read_manifest(FolderStore(host), version).files}
    only_old = old - set(read_manifest(FolderStore(host)).files)
    done = collect(host, keep=1, grace_seconds=0)
    assert (done.removed, done.kept, done.held) == ((1, 2), (3,), ())
    assert done.files == len(only_old) > 0
    assert set(FolderStore(host).files()) == {*read_manifest(FolderStore(host)).files, "versions/3.json", "CURRENT"}
    assert open_bundle(host).version == 3
    assert ask(host)[:2] == ask(two.path)[:2]


def test_nothing_goes_that_is_to_be_kept(host: Path) -> None:
    before = tree(host)
    assert collect(host, keep=2, grace_seconds=0).removed == ()
    assert tree(host) == before
    with pytest.raises(ConfigError, match="0 generations are to stay, expected at least 1"):
        collect(host, keep=0)


def test_a_generation_that_a_reader_holds_stays_until_it_lets_go(host: Path) -> None:
    reader = IndexReader(host, 1)
    done = collect(host, keep=1, grace_seconds=0)
    assert (done.removed, done.held, done.files) == ((), (1,), 0)
    reader.map_all()
    del reader
    assert collect(host, keep=1, grace_seconds=0).removed == (1,)
    with pytest.raises(IndexNotFoundError):
        IndexReader(host, 1)


def test_files_on_their_way_stay(two: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    for version in (1, 2):
        export_bundle(two.path, source, ExportOptions(version=version))
    pull_bundle(str(source), host, version=1)
    arriving = []
    install = FolderStore.install

    def beside(store: FolderStore, record: Any, temporary: Path) -> None:
        install(store, record, temporary)
        arriving.append(collect(host, keep=1, grace_seconds=0))

    monkeypatch.setattr(FolderStore, "install", beside)
    pull_bundle(str(source), host, jobs=1)
    assert arriving
    assert all(done.arriving == (2,) and done.files == 0 for done in arriving)
    assert open_bundle(host).version == 2


def test_what_a_killed_pull_left_stays_for_the_grace_period(two: SmallIndex, tmp_path: Path) -> None:
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, ExportOptions(version=1))
    pull_bundle(str(source), host)
    export_bundle(two.path, source, PLAIN)
    assert killed(lambda: pull_bundle(str(source), host, jobs=1), 9)
    left = set(FolderStore(host).files()) - {*read_manifest(FolderStore(host)).files, "versions/1.json", "CURRENT"}
    assert left
    done = collect(host)
    assert (done.files, done.young) == (0, len(left))
    assert collect(host, grace_seconds=0).files == len(left)
    assert not (host / "work").exists()
    assert open_bundle(host).version == 1


def test_files_that_are_not_a_bundle_s_are_left_alone(host: Path) -> None:
    (host / "notes.txt").write_text("mine")
    (host / "files" / "stray").write_bytes(b"from a killed transfer")
    collect(host, keep=1, grace_seconds=0)
    assert (host / "notes.txt").exists()
    assert not (host / "files" / "stray").exists()


# --- signatures -------------------------------------------------------------------------------------


def test_a_signed_bundle_opens_with_its_key_and_no_other(two: SmallIndex, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public, other = write_key_pair(tmp_path / "key"), write_key_pair(tmp_path / "other")
    root = tmp_path / "bundle"
    assert export_bundle(two.path, root, ExportOptions(sign_key=tmp_path / "key")).signed
    report = open_bundle(root, verify_keys=[other, public])
    assert report.signed
    assert ask(root, verify_keys=[public]) == ask(two.path)
    with pytest.raises(SignatureError, match=r"was not made with .*other\.pub over these bytes"):
        open_bundle(root, verify_keys=[other])
    with pytest.raises(SignatureError):
        Runtime.open(root, device="cpu", verify_keys=[other])
    assert verify_index(FolderStore(root)).unlisted == ()


def test_keys_are_private_and_never_overwritten(tmp_path: Path, two: SmallIndex) -> None:
    pytest.importorskip("cryptography")
    public = write_key_pair(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="a key is never overwritten"):
        write_key_pair(tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(ConfigError, match="has mode 0644, expected 0600"):
        export_bundle(two.path, tmp_path / "bundle", ExportOptions(sign_key=tmp_path / "key"))
    export_bundle(two.path, tmp_path / "bundle", PLAIN)
    with pytest.raises(ConfigError, match="is no public Ed25519 key"):
        open_bundle(tmp_path / "bundle", verify_keys=[tmp_path / "key"])
    public.chmod(0o600)
    with pytest.raises(ConfigError, match="is no private Ed25519 key"):
        export_bundle(two.path, tmp_path / "bundle", ExportOptions(sign_key=public))


def test_unsigned_and_altered_bundles_are_refused(two: SmallIndex, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public = write_key_pair(tmp_path / "key")
    source, host = tmp_path / "source", tmp_path / "host"
    export_bundle(two.path, source, PLAIN)
    for refused in (
        lambda: open_bundle(source, verify_keys=[public]),
        lambda: Runtime.open(source, device="cpu", verify_keys=[public]),
        lambda: pull_bundle(str(source), host, verify_keys=[public]),
    ):
        with pytest.raises(SignatureError, match=r"is not signed, expected a signature with .*key\.pub"):
            refused()
    assert not host.exists()
    export_bundle(two.path, source, ExportOptions(sign_key=tmp_path / "key"))  # signs what is there
    pull_bundle(str(source), host, verify_keys=[public])
    altered = replace(read_manifest(FolderStore(host)), content_id="0" * 64)
    (host / "versions/2.json").write_bytes(encode_manifest(altered))
    with pytest.raises(SignatureError, match="it was altered, or signed with another key"):
        Runtime.open(host, device="cpu", verify_keys=[public])
    with pytest.raises(SignatureError):
        pull_bundle(str(host), tmp_path / "third", verify_keys=[public])


def test_a_runtime_with_a_key_checks_every_byte(two: SmallIndex, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public = write_key_pair(tmp_path / "key")
    root = tmp_path / "bundle"
    export_bundle(two.path, root, ExportOptions(sign_key=tmp_path / "key", copy=True))
    flip(some_file(root))
    Runtime.open(root, device="cpu")  # sizes alone are looked at
    with pytest.raises(CorruptIndexError, match=r"1 of \d+ files .* nothing of it is used; pull the bundle again"):
        Runtime.open(root, device="cpu", verify_keys=[public])


def test_a_file_that_nobody_signed_is_not_read_with_a_model(two: SmallIndex, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    public = write_key_pair(tmp_path / "key")
    export_bundle(two.path, root, ExportOptions(include_decoder=True, copy=True, sign_key=tmp_path / "key"))
    info = read_manifest(FolderStore(root)).bundle
    assert info is not None
    stranger = root / str(info.decoder) / "adapter_config.json"
    assert not stranger.exists()
    ask(root, verify_keys=(public,))
    stranger.write_text("{}")
    with pytest.raises(CorruptIndexError, match=r"adapter_config.json is none of the files that .* lists"):
        ask(root, verify_keys=(public,))
    with pytest.raises(CorruptIndexError, match="remove that file"):
        open_bundle(root)


def test_a_signed_bundle_answers_with_the_decoder_that_it_was_made_for_alone(two: SmallIndex, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    public = write_key_pair(tmp_path / "key")
    root = tmp_path / "bundle"
    options = ExportOptions(sign_key=tmp_path / "key", include_decoder=True)
    export_bundle(two.path, root, options)
    checkpoint = Runtime.open(root, device="cpu", verify_keys=[public]).checkpoint
    other = tiny_models.decoder_folder(tmp_path / "other", seed=9)
    with pytest.raises(FingerprintMismatchError, match=r"the decoder in .*other has fingerprint"):
        checkpoint.verify_decoder(other)


def test_folder_names_are_what_the_specification_says() -> None:
    assert (bundle_folder.FILES, bundle_folder.CHECKPOINTS, bundle_folder.MODELS) == ("files", "checkpoints", "models")
    assert models.CONVERSION_FILE.endswith(".json")  # a converted decoder's note travels with it
