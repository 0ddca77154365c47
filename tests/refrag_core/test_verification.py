"""Every way to damage one file of an index is found, named, refused by the runtime where it must be, and mended."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.progress import Silent
from refrag.pipelines.repair import RepairOptions, repair_index
from refrag_core.errors import CorruptIndexError, IndexNotFoundError, UsageError
from refrag_core.index_reader import IndexReader
from refrag_core.manifest import read_manifest
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex, documents


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    """Two generations, tombstones, quarantine and scores: every kind of file that there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        small = SmallIndex(tmp_path_factory.mktemp("index"), ["{broken", *documents(24)], shard_bytes=6000, score=True)
        small.build()
        small.write(["{broken", *documents(24)[1:], {"id": "new", "text": "A new document about a river."}])
        small.build(delete_missing=True)
    return small


@pytest.fixture
def index(built: SmallIndex, tmp_path: Path, own_cache: Path) -> Path:
    shutil.copytree(built.path, tmp_path / "index")
    return tmp_path / "index"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: list[Callable[[Path], None]] = [flip, truncate, Path.unlink]


def test_a_whole_index_has_no_problems(index: Path) -> None:
    result = verify_index(FolderStore(index))
    assert result.problems == result.unlisted == ()
    kinds = {name.split("/")[0] for name in FolderStore(index).files()}
    assert kinds == {"CURRENT", "checkpoints", "quarantine", "runs", "segments", "shards", "tombstones", "versions"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_every_damaged_file(index: Path, damage: Callable[[Path], None]) -> None:
    for name in [name for name in FolderStore(index).files() if not name.startswith("runs/")]:
        path = index / name
        original = path.read_bytes()
        damage(path)
        assert name in {problem.file for problem in verify_index(FolderStore(index)).problems}, name
        path.write_bytes(original)
    assert verify_index(FolderStore(index)).problems == ()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_reader_refuses_an_altered_manifest_and_missing_or_cut_files(
    index: Path, damage: Callable[[Path], None]
) -> None:
    manifest = read_manifest(FolderStore(index))
    names = [manifest.name] if damage is flip else [manifest.name, *manifest.files]
    for name in names:
        path = index / name
        original = path.read_bytes()
        damage(path)
        if name == manifest.name and damage is Path.unlink:
            assert IndexReader(index).manifest.version == 1  # the generation before it is whole
        else:
            with pytest.raises(CorruptIndexError, match=path.name):
                IndexReader(index)
        path.write_bytes(original)


def test_no_index_at_all(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match=r"holds no index: expected versions/1\.json"):
        verify_index(FolderStore(tmp_path))


def test_rows_that_do_not_fit_are_found_though_all_digests_are_right(index: Path) -> None:
    """A manifest that lies about its tables: sizes and digests agree, rows do not."""
    from dataclasses import replace

    from refrag_core.manifest import encode_manifest

    store = FolderStore(index)
    manifest = read_manifest(store)
    first = manifest.shards[0]
    liar = replace(manifest, shards=[replace(first, passages=first.passages + 1), *manifest.shards[1:]])
    (index / manifest.name).write_bytes(encode_manifest(liar))
    files = {problem.file for problem in verify_index(store).problems}
    assert {first.tables["passages"], first.tables["vectors"]} <= files


def repair(built: SmallIndex, index: Path, *, corpus: bool) -> tuple[str, ...]:
    options = RepairOptions(index=index, corpus=built.options.corpus if corpus else None, device="cpu")
    with LocalEngine(0) as engine:
        return repair_index(options, engine, Silent()).repaired


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("table", ["embeddings", "vectors", "scores", "segment", "checkpoint", "CURRENT"])
def test_repair_without_the_corpus(built: SmallIndex, index: Path, damage: Callable[[Path], None], table: str) -> None:
    manifest = read_manifest(FolderStore(index))
    names = {
        "segment": manifest.segments[0].file,
        "checkpoint": f"{manifest.checkpoint.folder}/policy.safetensors",
        "CURRENT": "CURRENT",
    }
    name = names.get(table) or manifest.shards[0].tables[table]
    before = (index / name).read_bytes()
    damage(index / name)
    assert repair(built, index, corpus=False) == (name,)
    assert (index / name).read_bytes() == before
    assert read_manifest(FolderStore(index)) == manifest


@pytest.mark.parametrize("table", ["documents", "passages", "chunks", "quarantine"])
def test_repair_from_the_corpus(built: SmallIndex, index: Path, table: str) -> None:
    manifest = read_manifest(FolderStore(index))
    quarantine = manifest.quarantine.file
    assert quarantine is not None
    last = next(s for s in manifest.shards if s.first_document == "new")
    name = quarantine if table == "quarantine" else last.tables[table]
    flip(index / name)
    with pytest.raises(UsageError, match=f"{name} can only be made from the corpus"):
        repair(built, index, corpus=False)
    assert repair(built, index, corpus=True) == (name,)
    assert read_manifest(FolderStore(index)) == manifest
    assert verify_index(FolderStore(index)).problems == ()


def test_a_shard_with_removed_documents_comes_back_without_them(built: SmallIndex, index: Path) -> None:
    manifest = read_manifest(FolderStore(index))
    partly_dead = next(s for s in manifest.shards if s.first_document == "doc-0000")
    (index / partly_dead.tables["chunks"]).unlink()
    options = RepairOptions(index=index, corpus=built.options.corpus, device="cpu")
    with LocalEngine(0) as engine:
        report = repair_index(options, engine, Silent())
    assert partly_dead.tables["chunks"] in report.lost  # the generation before needs it, with its documents
    repaired = read_manifest(FolderStore(index))
    assert repaired.content_id == manifest.content_id
    assert repaired.version == manifest.version + 1


def test_a_damaged_manifest_is_beyond_repair(built: SmallIndex, index: Path) -> None:
    flip(index / "versions" / "2.json")
    with pytest.raises(CorruptIndexError, match="put back a copy of it, or move"):
        repair(built, index, corpus=True)
