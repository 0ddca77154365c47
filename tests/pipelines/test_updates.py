"""Updates: found by content alone, costing what changed, refused where the index's models are others."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from refrag_core.checkpoint import initialise_checkpoint
from refrag_core.errors import FingerprintMismatchError, UsageError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import read_manifest
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests import tiny_models
from tests.small_index import SmallIndex, documents

RECORDS = documents(12, sentences=4)


@pytest.fixture
def small(tmp_path: Path, own_cache: Path) -> SmallIndex:
    return SmallIndex(tmp_path, RECORDS)


def test_neither_time_nor_file_makes_a_document_new(small: SmallIndex) -> None:
    first = small.build()
    small.write(RECORDS[:5], "moved.jsonl")
    small.write(RECORDS[5:])
    os.utime(small.corpus / "records.jsonl", (0, 0))
    second = small.build()
    assert (second.unchanged, second.encoded_chunks, second.committed) == (12, 0, False)
    assert second.build_id == first.build_id


def test_metadata_is_content(small: SmallIndex) -> None:
    first = small.build()
    small.write([RECORDS[0] | {"year": 2020}, *RECORDS[1:]])
    second = small.build()
    assert (second.changed, second.unchanged) == (1, 11)
    assert second.content_id != first.content_id


def test_an_edit_leaves_the_ids_of_the_passages_before_it(small: SmallIndex) -> None:
    def ids() -> list[str]:
        reader = IndexReader(small.path)
        refs = [
            PassageRef(n, int(row))
            for n in range(len(reader.manifest.shards))
            for row in reader.live_rows(n).nonzero()[0]
        ]
        shown = [reader.describe(ref) for ref in refs]
        return [p.passage_id for p in sorted(shown, key=lambda p: p.ordinal) if p.document_id == "long"]

    long = " ".join(record["text"] for record in RECORDS)
    small.write([{"id": "long", "text": long}])
    small.build()
    before = ids()
    small.write([{"id": "long", "text": long + " One sentence more."}])
    small.build()
    after = ids()
    assert len(before) > 5
    assert after[: len(before) - 1] == before[:-1]
    assert after[-1] != before[-1]


def test_another_projection_or_policy_encodes_nothing(small: SmallIndex, tmp_path: Path) -> None:
    first = small.build()
    other = initialise_checkpoint(
        encoder_reference=str(small.models / "encoder"), decoder_reference=str(small.models / "decoder"), seed=1
    )
    other.save(tmp_path / "other")
    small.options = small.with_models(checkpoint=str(tmp_path / "other"))
    second = small.build()
    assert (second.version, second.encoded_chunks, second.unchanged) == (2, 0, 12)
    assert second.content_id == first.content_id
    old, new = (read_manifest(FolderStore(small.path), version) for version in (1, 2))
    assert new.checkpoint.fingerprint == other.fingerprint != old.checkpoint.fingerprint
    assert (new.shards, new.segments) == (old.shards, old.segments)


@pytest.mark.parametrize("what", ["encoder", "retriever", "chunk_size"])
def test_other_models_are_refused_or_encode_all_anew(small: SmallIndex, tmp_path: Path, what: str) -> None:
    small.build()
    models = small.options.models
    if what == "encoder":
        encoder = tiny_models.encoder_folder(tmp_path / "other", seed=1)
        made = initialise_checkpoint(encoder_reference=str(encoder), decoder_reference=str(small.models / "decoder"))
        models = replace(models, checkpoint=str(made.save(tmp_path / "checkpoint").folder))
    elif what == "retriever":
        models = replace(models, retriever=str(tiny_models.encoder_folder(tmp_path / "other", seed=1)))
    else:
        models = replace(models, chunk_size=8)
    small.options = replace(small.options, models=models)
    with pytest.raises(FingerprintMismatchError, match=f"was built with other settings: .*{what}.*--rebuild"):
        small.build()
    assert read_manifest(FolderStore(small.path)).version == 1
    report = small.build(rebuild=True)
    assert (report.version, report.new, report.encoded_chunks) == (2, 12, report.chunks)
    assert verify_index(FolderStore(small.path)).problems == ()


def test_a_rebuild_loses_no_document_without_being_told(small: SmallIndex) -> None:
    small.build()
    small.write(RECORDS[:10])
    small.options = small.with_models(chunk_size=8)
    with pytest.raises(UsageError, match="holds 2 documents that the corpus no longer has"):
        small.build(rebuild=True)
    assert read_manifest(FolderStore(small.path)).version == 1
    report = small.build(rebuild=True, delete_missing=True)
    assert (report.version, report.deleted, report.indexed) == (2, 2, 10)


def test_a_document_edited_again_and_again_leaves_the_other_segments_alone(small: SmallIndex) -> None:
    """Its shard of the update before is all dead then; that is no reason to make the rest of the index anew."""
    small.build()
    store = FolderStore(small.path)
    first = read_manifest(store)
    for edition in range(3):
        small.write([RECORDS[0] | {"text": f"Edition {edition}."}, *RECORDS[1:]])
        report = small.build()
        assert report.encoded_chunks < 0.1 * report.chunks
    last = read_manifest(store)
    assert last.vector_index.quantizer == first.vector_index.quantizer
    assert [segment.file for segment in first.segments] == [last.segments[0].file]
    assert len(last.segments) == 2  # an edition's segment goes with its shard
    assert verify_index(store).problems == ()


def test_a_shard_that_died_lives_again_with_its_documents(small: SmallIndex) -> None:
    small.build()
    extra = [{"id": f"extra-{n}", "text": f"Extra number {n}."} for n in range(2)]
    small.write([*RECORDS, extra[0]])
    small.build()
    small.options = replace(small.options, shard_bytes=10_000)
    first = small.build()
    small.write([RECORDS[0] | {"text": "Edited."}, *RECORDS[1:], extra[1]])
    small.build(delete_missing=True)
    small.write([*RECORDS, extra[0]])
    again = small.build(delete_missing=True)
    assert again.content_id == first.content_id
    assert verify_index(FolderStore(small.path)).problems == ()
