from pathlib import Path

import pytest

from refrag_core.errors import UsageError
from refrag_core.index_reader import IndexReader
from refrag_core.inspection import inspect_index, inspect_passage, inspect_quarantine
from refrag_core.manifest import read_manifest
from refrag_core.storage import FolderStore
from tests.small_index import SmallIndex, documents


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Models are looked up for their tokenizers."""


def test_the_summary_says_what_the_manifest_says(library: SmallIndex) -> None:
    manifest, shown = read_manifest(FolderStore(library.path)), inspect_index(library.path)
    assert shown["index"] == {
        "version": 2,
        "versions": 2,
        "content_id": manifest.content_id,
        "build_id": manifest.build_id,
        "trained": False,
        "tables": "parquet",
    }
    assert shown["counts"]["documents"] == 40
    assert shown["counts"]["shards"] == len(manifest.shards)
    assert shown["counts"]["segments"] == len(manifest.segments)
    assert manifest.tombstones is not None
    assert shown["counts"]["tombstoned_passages"] == manifest.tombstones.passages > 0
    assert shown["quarantine"] == {"malformed_json": 1}
    assert set(shown["models"]) == {"tokenizer", "encoder", "retriever", "scorer"}
    assert shown["models"]["encoder"].endswith(manifest.components.encoder.fingerprint[:16])
    assert shown["parameters"]["max_passage_tokens"] == 64
    assert shown["vector_index"]["recall_at_10"] == manifest.vector_index.recall_at_10


def test_bytes_are_those_on_the_disk(library: SmallIndex) -> None:
    sizes = inspect_index(library.path)["bytes"]
    named = read_manifest(FolderStore(library.path)).files
    on_disk = {name: (library.path / name).stat().st_size for name in named}
    assert sizes["total"] == sum(on_disk.values()) == sum(v for k, v in sizes.items() if k != "total")
    for kind in ("embeddings", "vectors", "scores", "chunks", "passages", "documents"):
        files = [size for name, size in on_disk.items() if name.rsplit("/", 1)[-1].startswith(kind)]
        assert sizes[kind] == sum(files) > 0
    assert sizes["segments"] == sum(size for name, size in on_disk.items() if name.startswith("segments/"))


def test_an_older_generation(library: SmallIndex) -> None:
    shown = inspect_index(library.path, 1)
    assert (shown["index"]["version"], shown["index"]["versions"]) == (1, 2)


def test_a_passage_is_shown_with_its_chunks(library: SmallIndex) -> None:
    text = documents(1)[0]["text"]
    shown = inspect_passage(library.path, "doc-0000#0")
    assert (shown["document_id"], shown["ordinal"], shown["char_start"]) == ("doc-0000", 0, 0)
    assert text.startswith(shown["text"])
    assert "".join(chunk["text"] for chunk in shown["chunks"]) == shown["text"]
    assert [chunk["ordinal"] for chunk in shown["chunks"]] == list(range(shown["num_chunks"]))
    sizes = [chunk["num_tokens"] for chunk in shown["chunks"]]
    assert sizes[:-1] == [16] * (len(sizes) - 1)
    assert sum(sizes) == shown["num_tokens"]
    assert all(chunk["nll"] > 0 for chunk in shown["chunks"])
    assert shown["metadata"] == {"year": 1900, "importance": 0.0}


def test_a_passage_by_its_id_is_the_same(library: SmallIndex) -> None:
    shown = inspect_passage(library.path, "doc-0031#1")
    assert shown["ordinal"] == 1
    assert inspect_passage(library.path, shown["passage_id"]) == shown


def test_a_document_id_may_hold_a_number_sign(library: SmallIndex) -> None:
    assert inspect_passage(library.path, "guide#1#0")["text"].startswith("A guide to the copper orbit")


def test_an_edited_document_is_shown_as_it_is_now(library: SmallIndex) -> None:
    assert inspect_passage(library.path, "doc-0005#0")["text"].startswith("Edited: the capital")
    old = inspect_passage(library.path, "doc-0005#0", version=1)
    assert documents(6)[5]["text"].startswith(old["text"])
    with pytest.raises(UsageError):  # the passage of the text that it had before
        inspect_passage(library.path, old["passage_id"])


def test_a_removed_document_is_gone(library: SmallIndex) -> None:
    with pytest.raises(UsageError, match=r"no passage 'doc-0006#0' in .* expected a passage id"):
        inspect_passage(library.path, "doc-0006#0")
    assert inspect_passage(library.path, "doc-0006#0", version=1)["document_id"] == "doc-0006"


@pytest.mark.parametrize("wanted", ["doc-0000#99", "nobody#0", "f" * 32, "", "#", "doc-0000"])
def test_a_passage_that_is_not_there(library: SmallIndex, wanted: str) -> None:
    with pytest.raises(UsageError, match="expected a passage id"):
        inspect_passage(library.path, wanted)


def test_the_quarantine_says_what_and_why(library: SmallIndex) -> None:
    (record,) = inspect_quarantine(library.path)
    assert record["reason"] == "malformed_json"
    assert record["disposition"] == "quarantined"
    assert record["raw"] == "{broken"
    assert record["document_id"] is None
    assert record["position"] == 0
    assert str(record["source"]).endswith("records.jsonl")


def test_no_quarantine_is_an_empty_list(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(2))
    small.build()
    assert inspect_quarantine(small.path) == []
    assert IndexReader(small.path).manifest.quarantine.file is None
