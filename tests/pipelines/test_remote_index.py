"""Indexes on an object store: a real S3 server, real processes, and a proxy that fails."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refrag_core.errors import CommitConflictError, CorruptIndexError, IndexLockedError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.lease import Lease
from refrag_core.manifest import commit, read_manifest
from refrag_core.object_store import RemoteObjects
from refrag_core.remote_store import RemoteStore
from refrag_core.storage import open_store
from refrag_core.verification import verify_index
from tests.command_line import call, kill_group, start, wait_until, without_traceback
from tests.object_server import Fault, FaultyServer, copy_to_bucket
from tests.small_index import SmallIndex, documents


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallIndex]:
    """The same corpus indexed in a folder, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        small = SmallIndex(tmp_path_factory.mktemp("calm"), documents(12))
        small.build()
        yield small


@pytest.fixture
def remote(bucket: str, calm: SmallIndex, tmp_path: Path) -> SmallIndex:
    """The same corpus with an index on S3, not built yet."""
    return SmallIndex(tmp_path, documents(12), output=f"{bucket}/index")


@pytest.fixture
def built(calm: SmallIndex, remote: SmallIndex) -> str:
    """URI of the index on S3, built: it holds what the folder holds, so a copy of that will do."""
    return copy_to_bucket(calm.path, str(remote.options.output))


def other_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on, nothing is cached on this machine."""
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "other-cache"))


def test_it_is_the_index_that_a_folder_holds(
    calm: SmallIndex, remote: SmallIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    report, local = remote.build(), read_manifest(open_store(calm.path))
    assert (report.content_id, report.build_id) == (local.content_id, local.build_id)
    assert not remote.build().committed
    written = [path for path in Path(os.environ["REFRAG_CACHE"]).rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not any(b"do-not-tell" in path.read_bytes() for path in written)
    other_machine(monkeypatch, tmp_path)
    store = open_store(remote.options.output)
    assert read_manifest(store).files == local.files
    result = verify_index(store)
    assert (result.problems, result.unlisted) == ((), ())
    assert sorted(store.files()) == sorted(open_store(calm.path).files())
    assert list(RemoteObjects(str(remote.options.output)).list("work")) == []
    there, here = IndexReader(remote.options.output), IndexReader(calm.path)
    query = np.ones(there.manifest.parameters.vector_dim, np.float32)
    assert there.search(query, 5) == here.search(query, 5)
    refs = [PassageRef(0, 0), PassageRef(len(there.manifest.shards) - 1, 0)]
    for left, right in zip(there.fetch(refs), here.fetch(refs), strict=True):
        assert np.array_equal(left.embeddings, right.embeddings)
        assert np.array_equal(left.tokens, right.tokens)
    assert there.describe(refs[0]) == here.describe(refs[0])


def test_another_machine_updates_it(built: str, remote: SmallIndex, tmp_path: Path) -> None:
    chunks = read_manifest(open_store(built)).counts.chunks
    remote.write([*documents(12)[1:], {"id": "new", "text": "A new harbour for the island."}])
    second = remote.build(delete_missing=True)
    assert (second.version, second.new, second.deleted, second.unchanged) == (2, 1, 1, 11)
    assert second.encoded_chunks < chunks / 4
    fresh = SmallIndex(tmp_path / "fresh", [*documents(12)[1:], {"id": "new", "text": "A new harbour for the island."}])
    assert second.content_id == fresh.build().content_id
    assert verify_index(open_store(remote.options.output)).problems == ()


def test_commands_take_its_uri(built: str) -> None:
    uri = built
    assert call("index", "verify", uri).out.endswith("all good\n")
    assert call("index", "inspect", uri, "--json").json["counts"]["documents"] == 12
    assert call("index", "inspect", uri, "--passage", "doc-0003#0", "--json").json["document_id"] == "doc-0003"
    hits = call("index", "search", uri, "harbour", "--top-k", 2, "--device", "cpu", "--json").json["hits"]
    assert len(hits) == 2
    missing = call("index", "inspect", f"{uri}-not")
    assert missing.code == 1
    assert "-not holds no committed generation" in without_traceback(missing)


def test_a_build_survives_errors_and_slowness(calm: SmallIndex, remote: SmallIndex, faulty: FaultyServer) -> None:
    faulty.faults = [
        Fault("error", "PUT", "shards/", times=3),
        Fault("lost", "PUT", "shards/", times=2),
        Fault("error", "PUT", "segments/"),
        Fault("slow", "PUT", "embeddings-", seconds=0.3),
        Fault("error", "GET", "receipts/", times=2),
        Fault("lost", "PUT", "versions/1.json"),
        Fault("error", "PUT", "CURRENT"),
    ]
    report = remote.build()
    assert [fault.times for fault in faulty.faults] == [0] * len(faulty.faults)
    assert report.build_id == read_manifest(open_store(calm.path)).build_id
    assert verify_index(open_store(remote.options.output)).problems == ()


@pytest.mark.slow
def test_an_update_killed_in_an_upload_goes_on_elsewhere(
    built: str, remote: SmallIndex, faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = read_manifest(open_store(built))
    edited = [{**document, "text": f"Edited. {document['text']}"} for document in documents(12)]
    remote.write(edited)
    faulty.faults = [Fault("slow", "PUT", "vectors-", times=1), Fault("held", "PUT", "vectors-", times=1000)]
    models = remote.models
    process = start(
        *("index", "build", remote.corpus, "-o", remote.options.output, "--checkpoint", models / "checkpoint"),
        *("--retriever", models / "encoder", "--max-passage-tokens", "64", "--shard-bytes", "2000"),
        *("--workers", "0", "--device", "cpu", "--min-recall", "0.5"),
    )
    wait_until(lambda: faulty.faults[1].times < 1000, process)
    kill_group(process)
    faulty.faults.clear()
    assert read_manifest(open_store(built)) == first
    assert verify_index(open_store(built)).problems == ()
    objects = RemoteObjects(built)
    objects.put("work/lease", objects.get("work/lease").replace(b"30.0", b"1.0"))  # spares the test half a minute
    other_machine(monkeypatch, tmp_path)
    report, fresh = remote.build(), SmallIndex(tmp_path / "fresh", edited).build()
    assert (report.version, report.changed, report.content_id) == (2, 12, fresh.content_id)
    assert 0 < report.encoded_chunks < report.chunks
    assert verify_index(open_store(built)).problems == ()
    assert verify_index(open_store(built)).unlisted == ()
    assert read_manifest(open_store(built), 1) == first


# --- several writers

COMMIT = """
import sys
from dataclasses import replace
from refrag_core.errors import CommitConflictError
from refrag_core.manifest import ParentInfo, commit, read_manifest
from refrag_core.remote_store import RemoteStore
from pathlib import Path

uri, cache, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
store = RemoteStore(uri, cache)
now = read_manifest(store)
mine = replace(
    now, version=now.version + 1, parent=ParentInfo(now.version, now.build_id), content_id=name * 64,
)
print("ready", flush=True)
sys.stdin.readline()
try:
    commit(store, mine)
except CommitConflictError:
    print("lost")
else:
    print("won")
"""


def test_one_of_several_processes_commits(built: str, tmp_path: Path) -> None:
    uri = built
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", COMMIT, uri, tmp_path / name, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    for writer in writers:  # all have read the same parent before any goes on
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.communicate()[0].strip() for writer in writers]
    assert sorted(said) == ["lost", "lost", "won"]
    newest = read_manifest(open_store(uri))
    assert (newest.version, newest.content_id) == (2, "abc"[said.index("won")] * 64)
    assert read_manifest(open_store(uri), 1).version == 1


def test_the_loser_of_a_commit_changes_nothing(built: str) -> None:
    store = open_store(built)
    first = read_manifest(store)
    with pytest.raises(CommitConflictError, match=r"another build committed version 1 of s3://.* while this one ran"):
        commit(store, replace(first, content_id="f" * 64))
    assert read_manifest(store) == first


HOLD = """
import sys
from refrag_core.lease import Lease
from refrag_core.object_store import RemoteObjects
with Lease(RemoteObjects(sys.argv[1]), "work/lease", 1.5).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_living_builder_is_respected_and_a_dead_one_is_not(bucket: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, bucket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    store = RemoteStore(bucket)
    with pytest.raises(IndexLockedError) as caught, store.lock():
        pass
    assert str(caught.value) == (
        f"another build is running on {bucket} (process {process.pid} on {os.uname().nodename}): nothing was done; "
        "wait for it to end, or stop it, and run this command again"
    )
    process.kill()
    process.communicate()
    with store.lock():
        assert RemoteObjects(bucket).head("work/lease") is not None
    assert list(RemoteObjects(bucket).list()) == []


def test_a_lease_that_was_lost_is_left_to_its_new_holder(bucket: str) -> None:
    objects = RemoteObjects(bucket)
    with Lease(objects, "work/lease", 0.3).held():
        objects.put("work/lease", b'{"token": "another", "seconds": 0.3}')
        time.sleep(0.5)
    assert b"another" in objects.get("work/lease")


# --- copies and damage


def test_a_damaged_copy_is_fetched_again(bucket: str) -> None:
    store = RemoteStore(bucket)
    record = store.publish("shards/a", lambda path: path.write_bytes(b"whole") and None)
    store.path("shards/a").write_bytes(b"who")
    assert store.path("shards/a").read_bytes() == b"whole"
    assert RemoteStore(bucket).path("shards/a").read_bytes() == b"whole"
    assert store.record("shards/a") == record


def test_the_first_writer_of_a_name_stands(bucket: str, tmp_path: Path) -> None:
    one, two = RemoteStore(bucket, tmp_path / "one"), RemoteStore(bucket, tmp_path / "two")
    record = one.publish("shards/a", lambda path: path.write_bytes(b"first") and None)
    assert two.publish("shards/a", lambda path: path.write_bytes(b"second") and None) == record
    assert two.path("shards/a").read_bytes() == b"first"


def test_a_copy_follows_what_the_store_holds(bucket: str, tmp_path: Path) -> None:
    one, two = RemoteStore(bucket, tmp_path / "one"), RemoteStore(bucket, tmp_path / "two")
    one.publish("a/x", lambda path: path.write_bytes(b"old") and None)
    assert two.path("a/x").read_bytes() == b"old"
    one.remove("a")
    assert not two.path("a/x").exists()
    made_again = one.publish("a/x", lambda path: path.write_bytes(b"new") and None)
    assert two.path("a/x").read_bytes() == b"new"
    two.expect([made_again])
    assert two.folder("a").joinpath("x").read_bytes() == b"new"


def test_altered_objects_are_found_and_mended(
    built: str, remote: SmallIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = built
    manifest, objects = read_manifest(open_store(uri)), RemoteObjects(uri)
    IndexReader(uri).fetch([PassageRef(0, 0)])
    damaged = manifest.shards[0].tables["embeddings"]
    data = bytearray(objects.get(damaged))
    data[len(data) // 2] ^= 1
    objects.put(damaged, bytes(data))
    # The copies on this machine are whole, and verify does not take their word for it.
    assert [problem.file for problem in verify_index(open_store(uri)).problems] == [damaged]
    other_machine(monkeypatch, tmp_path)
    with pytest.raises(CorruptIndexError, match=r"digest .*, expected .*: run `refrag index verify`"):
        IndexReader(uri).fetch([PassageRef(0, 0)])
    models = ("--checkpoint", remote.models / "checkpoint", "--device", "cpu", "--workers", "0")
    assert f"repaired {damaged}" in call("index", "repair", uri, *models).out
    assert read_manifest(open_store(uri)) == manifest
    assert verify_index(open_store(uri)).problems == ()


def test_a_missing_object_is_named(built: str) -> None:
    uri = built
    lost = read_manifest(open_store(uri)).segments[0].file
    RemoteObjects(uri).delete(lost)
    with pytest.raises(CorruptIndexError, match=rf"{lost} is missing, expected"):
        IndexReader(uri)
