import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from refrag.schemas import arrow
from refrag_core.digests import canonical_json, digest_json
from refrag_core.errors import CommitConflictError, CorruptIndexError, IndexNotFoundError
from refrag_core.manifest import (
    CheckpointInfo,
    Component,
    Components,
    Counts,
    Manifest,
    Parameters,
    ParentInfo,
    QuarantineInfo,
    Segment,
    Shard,
    TombstoneInfo,
    VectorIndexInfo,
    commit,
    content_id,
    decode_manifest,
    encode_manifest,
    list_versions,
    live_documents,
    read_manifest,
)
from refrag_core.storage import FileRecord, FolderStore, Store
from refrag_core.tables import write_table

NAMES = ("documents", "passages", "chunks", "embeddings", "vectors")


def make_shard(name: str, first: str = "a", last: str = "b") -> Shard:
    tables = {table: f"shards/{name}/{table}.parquet" for table in NAMES}
    return Shard(name, 16, first, last, documents=2, passages=3, chunks=4, tokens=50, tables=tables)


def make_manifest(**changes: Any) -> Manifest:
    shard = make_shard("0" * 32)
    files = [*shard.tables.values(), "segments/s.faiss", "segments/q.faiss"]
    manifest = Manifest(
        version=1,
        parent=None,
        content_id="c" * 64,
        components=Components(Component("t", "1"), Component("e", "2"), Component("r", "3"), None),
        parameters=Parameters(256, 16, None, 8, "float16", 8),
        counts=Counts(2, 3, 4, 50),
        shards=[shard],
        segments=[Segment("segments/s.faiss", [shard.name], 3)],
        vector_index=VectorIndexInfo("flat", 0, 1, "segments/q.faiss", 1.0, 3),
        quarantine=QuarantineInfo(None, {}),
        tombstones=None,
        checkpoint=CheckpointInfo("checkpoints/x", "d" * 64, False),
        files={name: FileRecord(name, 7, "f" * 64) for name in sorted(files)},
    )
    return replace(manifest, **changes)


def test_round_trip() -> None:
    manifest = make_manifest(tombstones=None)
    assert decode_manifest(encode_manifest(manifest), where="m") == manifest


def test_the_build_id_is_the_digest_of_parent_content_and_files() -> None:
    manifest = make_manifest(parent=ParentInfo(4, "b" * 64), version=5)
    files = dict.fromkeys(manifest.files, "f" * 64)
    assert manifest.build_id == digest_json({"parent": "b" * 64, "content_id": "c" * 64, "files": files})


def test_every_flipped_byte_is_refused() -> None:
    data = encode_manifest(make_manifest())
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1
        with pytest.raises(CorruptIndexError):
            decode_manifest(bytes(altered), where="m")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_manifest_is_refused(cut: int) -> None:
    with pytest.raises(CorruptIndexError):
        decode_manifest(encode_manifest(make_manifest())[:cut], where="m")


def _forge(change: dict[str, Any]) -> bytes:
    """A manifest with valid digests of its own, as an attacker would make it."""
    body = json.loads(encode_manifest(make_manifest())) | change
    body.pop("manifest_digest")
    digests = {name: record["digest"] for name, record in body["files"].items()}
    body["build_id"] = digest_json({"parent": None, "content_id": body["content_id"], "files": digests})
    return canonical_json(body | {"manifest_digest": digest_json(body)}) + b"\n"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_a_name_outside_the_index_is_refused(name: str) -> None:
    files = json.loads(encode_manifest(make_manifest()))["files"] | {name: {"bytes": 1, "digest": "0" * 64}}
    with pytest.raises(CorruptIndexError, match="unsafe file name"):
        decode_manifest(_forge({"files": files}), where="m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r"at \$\.format"),
        ({"format_version": 2}, "reads up to 1: install a newer refrag"),
        ({"version": "1"}, r"at \$\.version"),
        ({"extra": 1}, "extra"),
        ({"checkpoint": {"folder": "../x", "fingerprint": "d" * 64, "trained": True}}, r"at \$\.checkpoint\.folder"),
        ({"segments": [{"file": "segments/none", "shards": ["0" * 32], "rows": 3}]}, "lists no digest for it"),
        (
            {"segments": [{"file": "segments/s.faiss", "shards": ["1" * 32], "rows": 3}]},
            "over a shard that it does not list",
        ),
    ],
)
def test_a_broken_invariant_has_its_own_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptIndexError, match=message):
        decode_manifest(_forge(change), where="m")


def test_commit_is_won_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    commit(store, make_manifest())
    with pytest.raises(CommitConflictError, match="another build committed version 1"):
        commit(store, make_manifest(content_id="e" * 64))
    assert read_manifest(store).content_id == "c" * 64
    assert (tmp_path / "CURRENT").read_text() == "1\n"


def test_the_newest_version_is_read_and_missing_ones_are_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with pytest.raises(IndexNotFoundError, match="holds no committed generation"):
        read_manifest(store)
    for version in range(1, 12):
        commit(store, make_manifest(version=version))
    assert list_versions(store) == list(range(1, 12))
    assert read_manifest(store).version == 11
    assert read_manifest(store, 3).version == 3
    with pytest.raises(IndexNotFoundError, match="holds no generation 12"):
        read_manifest(store, 12)


def test_a_manifest_under_another_number_is_refused(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.create("versions/2.json", encode_manifest(make_manifest()))
    with pytest.raises(CorruptIndexError, match="is the manifest of version 1"):
        read_manifest(store)


def _write_documents(store: Store, shard: Shard, ids: list[str]) -> None:
    rows = [
        {
            "document_id": i, "source_digest": bytes(32), "content_digest": i.encode().ljust(32, b"."), "source": "s",
            "chunk_size": 16, "num_passages": 2, "num_chunks": 3, "num_tokens": 40, "metadata": "{}",
        }
        for i in ids
    ]  # fmt: skip
    path = store.path(shard.tables["documents"])
    path.parent.mkdir(parents=True)
    write_table(path, pa.Table.from_pylist(rows, schema=arrow.DOCUMENTS))


def test_live_documents_are_merged_without_the_removed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    shards = [make_shard("1" * 32, "b", "f"), make_shard("2" * 32, "a", "é"), make_shard("3" * 32, "z", "z")]
    for shard, ids in zip(shards, (["b", "d", "f"], ["a", "e", "é"], ["z"]), strict=True):
        _write_documents(store, shard, ids)
    removed = pa.Table.from_pylist(
        [{"shard": "1" * 32, "document": 1, "first_passage": 2, "num_passages": 2}], schema=arrow.TOMBSTONES
    )
    (tmp_path / "tombstones").mkdir()
    write_table(tmp_path / "tombstones/t.parquet", removed)
    manifest = make_manifest(shards=shards, tombstones=TombstoneInfo("tombstones/t.parquet", 1, 2))
    live = list(live_documents(store, manifest))
    assert [document.document_id for document in live] == ["a", "b", "e", "f", "z", "é"]
    assert [document.first_passage for document in live] == [0, 0, 2, 4, 0, 4]


def test_the_content_id_depends_on_documents_and_models_alone() -> None:
    manifest = make_manifest()
    documents = [("a", b"1" * 32), ("b", b"2" * 32)]

    def identity(documents: list[tuple[str, bytes]], **changes: Any) -> str:
        components = replace(manifest.components, **changes)
        return content_id(documents, components, manifest.parameters)

    same = identity(documents, encoder=Component("renamed", "2"))
    assert identity(documents) == same
    others = [
        identity(documents[:1]),
        identity([("a", b"1" * 32), ("b", b"3" * 32)]),
        identity(documents, encoder=Component("e", "9")),
    ]
    assert len({same, *others}) == 4
    # Length prefixes keep an id from running into the next one's digest.
    assert identity([("ab", b"1" * 32)]) != identity([("a", b"b" + b"1" * 31)])
