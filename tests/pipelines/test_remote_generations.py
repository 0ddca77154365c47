"""Generations of an index on an object store: the same commands, the same outcome as in a folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from refrag_core.bundle import ExportOptions, export_bundle, open_bundle
from refrag_core.generations import collect_garbage, diff_generations, generation_log, roll_back
from refrag_core.index_reader import IndexReader
from refrag_core.manifest import list_versions, read_manifest
from refrag_core.storage import open_store
from refrag_core.verification import verify_index
from tests.command_line import call
from tests.object_server import copy_to_bucket
from tests.small_index import SmallIndex, documents


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallIndex]:
    """An index in a folder with three generations, the last with tombstones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        small = SmallIndex(tmp_path_factory.mktemp("lived"), documents(12))
        small.build()
        for edited in (1, 2):
            small.write(
                [{**document, "text": f"Edit. {document['text']}"} for document in documents(12)[:edited]], "b.jsonl"
            )
            small.write(documents(12)[edited:])
            small.build()
        assert read_manifest(open_store(small.path)).tombstones is not None
        yield small


@pytest.fixture
def uri(lived: SmallIndex, bucket: str) -> str:
    """The same index on S3."""
    return copy_to_bucket(lived.path, f"{bucket}/index")


def all_good(uri: str) -> None:
    found = verify_index(open_store(uri))
    assert (found.problems, found.unlisted) == ((), ())


def test_log_and_diff_say_what_they_say_of_a_folder(lived: SmallIndex, uri: str) -> None:
    here, there = open_store(lived.path), open_store(uri)
    assert [(entry.version, entry.build_id, entry.new_bytes) for entry in generation_log(there)] == [
        (entry.version, entry.build_id, entry.new_bytes) for entry in generation_log(here)
    ]
    assert diff_generations(there, 1, 3) == diff_generations(here, 1, 3)
    assert [entry["version"] for entry in call("index", "log", uri, "--json").json] == [3, 2, 1]


def test_a_rollback_a_compaction_and_gc(lived: SmallIndex, uri: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    shutil.copytree(lived.path, local)
    for place in (uri, local):
        assert roll_back(open_store(place)).content_of == 2
        call("index", "compact", place, "--workers", 0)
    here, there = read_manifest(open_store(local)), read_manifest(open_store(uri))
    assert (there.version, there.build_id) == (5, here.build_id)
    all_good(uri)
    store = open_store(uri)
    dry = collect_garbage(store, keep=1, grace_seconds=0, dry_run=True)
    assert list_versions(store) == [1, 2, 3, 4, 5]
    done = collect_garbage(store, keep=1, grace_seconds=0)
    assert (done.removed, done.files, done.bytes) == (dry.removed, dry.files, dry.bytes)
    assert done.removed == [1, 2, 3, 4]
    assert sorted(store.files()) == sorted([*there.files, "CURRENT", there.name, "versions/removed.json"])
    all_good(uri)
    assert [entry.state for entry in generation_log(store)] == ["newest", *["removed"] * 4]
    assert IndexReader(uri).manifest == there


def test_gc_spares_the_grace_period(uri: str) -> None:
    done = call("index", "gc", uri, "--keep", 1, "--json").json
    assert (done["removed"], done["files"]) == ([], 0)
    all_good(uri)


def test_the_page_and_the_plan(lived: SmallIndex, uri: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = call("index", "inspect", uri, "--html", page, "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    assert read_manifest(open_store(uri)).content_id[:16] in page.read_text()
    models = ("--checkpoint", lived.models / "checkpoint", "--retriever", lived.models / "encoder")
    plan = call("index", "plan", lived.corpus, "-o", uri, *models, "--max-passage-tokens", 64, "--json")
    assert plan.code == 0, plan.err


def test_a_bundle_is_exported_from_it(uri: str, lived: SmallIndex, tmp_path: Path) -> None:
    there = export_bundle(uri, tmp_path / "there", ExportOptions())
    here = export_bundle(lived.path, tmp_path / "here", ExportOptions())
    assert (there.build_id, there.bytes) == (here.build_id, here.bytes)
    assert open_bundle(tmp_path / "there").content_id == read_manifest(open_store(uri)).content_id


def test_lance_tables_of_a_copied_index(bucket: str, tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(4), tables="lance")
    small.build()
    small.write(documents(3))
    small.build(delete_missing=True)
    uri = copy_to_bucket(small.path, f"{bucket}/index")
    asked = call("ask", uri, "Which river?", "--tables", "lance", "--device", "cpu")
    assert (asked.code, "or leave out --tables" in asked.err) == (2, True)
    compacted = call("index", "compact", uri, "--workers", 0)
    assert (compacted.code, "with --tables parquet" in compacted.err) == (2, True)
    assert call("index", "rollback", uri, "--json").json["version"] == 3
    assert call("index", "gc", uri, "--keep", 1, "--grace-hours", 0, "--json").json["removed"] == [1, 2]
    assert IndexReader(uri).manifest.counts.documents == 4
