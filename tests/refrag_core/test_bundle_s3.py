"""Bundles on an object store: a real S3-speaking server, a push that is killed, a bucket that is tampered with."""

from pathlib import Path

import pytest

from refrag_core.bundle import ExportOptions, export_bundle, open_bundle
from refrag_core.bundle_transfer import pull_bundle, push_bundle
from refrag_core.errors import CommitConflictError, CorruptIndexError, IndexNotFoundError, SignatureError, UsageError
from refrag_core.manifest import list_versions, read_manifest
from refrag_core.object_store import RemoteObjects, open_objects
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.signing import write_key_pair
from refrag_core.storage import FolderStore
from tests.small_index import SmallIndex


def test_a_bucket_between_two_hosts(library: SmallIndex, tmp_path: Path, bucket: str) -> None:
    source, host, place = tmp_path / "source", tmp_path / "host", f"{bucket}/bundles"
    with pytest.raises(IndexNotFoundError, match="holds no bundle: expected a manifest under versions/"):
        pull_bundle(place, host)
    export_bundle(library.path, source, ExportOptions(version=1))
    pushed = push_bundle(source, place)
    assert pushed.moved_bytes == pushed.bytes
    assert pull_bundle(place, host).moved_bytes == pushed.bytes
    export_bundle(library.path, source, ExportOptions())
    delta = push_bundle(source, place)
    assert 0 < delta.moved_bytes < delta.bytes / 2
    pulled = pull_bundle(place, host)
    assert (pulled.moved_files, pulled.moved_bytes) == (delta.moved_files, delta.moved_bytes)
    assert list_versions(FolderStore(host)) == [1, 2]
    assert open_bundle(host).version == 2
    assert push_bundle(source, place).moved_files == 0


def test_a_push_that_broke_off_goes_on(
    library: SmallIndex, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = tmp_path / "source", f"{bucket}/bundles"
    export_bundle(library.path, source, ExportOptions())
    put, sent = RemoteObjects.put, []

    def breaks(objects: RemoteObjects, name: str, data: bytes | Path) -> None:
        if len(sent) == 5:
            raise KeyboardInterrupt
        put(objects, name, data)
        sent.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteObjects, "put", breaks)
        with pytest.raises(KeyboardInterrupt):
            push_bundle(source, place, jobs=1)
    with pytest.raises(IndexNotFoundError):
        pull_bundle(place, tmp_path / "host")
    assert push_bundle(source, place).spared_files == 5
    assert pull_bundle(place, tmp_path / "host").version == 2


def test_a_signed_bundle_answers_from_the_bucket_and_takes_no_strangers(
    library: SmallIndex, tmp_path: Path, bucket: str
) -> None:
    public, place = write_key_pair(tmp_path / "key"), f"{bucket}/bundles"
    options = ExportOptions(sign_key=tmp_path / "key", include_decoder=True)
    export_bundle(library.path, tmp_path / "source", options)
    push_bundle(tmp_path / "source", place)
    info = read_manifest(FolderStore(tmp_path / "source")).bundle
    assert info is not None
    open_objects(place).put(f"{info.decoder}/adapter_config.json", b"not even JSON")
    runtime = Runtime.open(place, device="cpu", verify_keys=(public,))
    assert not (runtime._generation.decoder_folder / "adapter_config.json").exists()
    assert runtime.ask("Which river?", AskOptions(top_k=1, policy="all", max_new_tokens=2)).version == 2
    open_objects(place).delete("versions/2.json.sig")
    with pytest.raises(SignatureError, match="is not signed"):
        Runtime.open(place, device="cpu", verify_keys=(public,))


def test_an_index_in_a_bucket_is_left_alone(library: SmallIndex, tmp_path: Path, bucket: str) -> None:
    objects, store = open_objects(f"{bucket}/index"), FolderStore(library.path)
    objects.put("versions/1.json", store.read("versions/1.json"))
    export_bundle(library.path, tmp_path / "source", ExportOptions())
    with pytest.raises(UsageError, match="is an index, expected a place for bundles: nothing was changed"):
        push_bundle(tmp_path / "source", objects.location)
    assert [info.name for info in objects.list()] == ["versions/1.json"]


def test_a_bucket_that_was_tampered_with(library: SmallIndex, tmp_path: Path, bucket: str) -> None:
    source, host, place = tmp_path / "source", tmp_path / "host", f"{bucket}/bundles"
    export_bundle(library.path, source, ExportOptions())
    push_bundle(source, place)
    objects = open_objects(place)
    name = read_manifest(FolderStore(source)).shards[0].tables["passages"]
    whole = objects.get(name)
    objects.put(name, b"x" + whole[1:])
    with pytest.raises(CorruptIndexError, match="arrived with"):
        pull_bundle(place, host)
    objects.put(name, whole + b"x")
    with pytest.raises(CorruptIndexError, match=r"has \d+ bytes, expected"):
        pull_bundle(place, host)
    objects.put(name, whole)
    assert pull_bundle(place, host).version == 2
    objects.put("versions/2.json", objects.get("versions/2.json").replace(b'"content_id":"', b'"content_id":"0'))
    with pytest.raises(CommitConflictError, match="has another generation 2"):
        push_bundle(source, place)
    with pytest.raises(CorruptIndexError):
        pull_bundle(place, tmp_path / "third")
