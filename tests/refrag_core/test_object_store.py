"""The object layer against a real S3 server, and against one that fails."""

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from refrag_core import object_store
from refrag_core.errors import MissingExtraError, ObjectStoreError, UsageError
from refrag_core.object_store import FolderObjects, ObjectStore, RemoteObjects, open_objects
from refrag_core.storage import open_store
from tests.command_line import kill_group, wait_until
from tests.object_server import Fault, FaultyServer

BIG = os.urandom(11 << 20)


@pytest.fixture(params=["folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Both forms, empty."""
    if request.param == "folder":
        return open_objects(tmp_path / "objects")
    return open_objects(f"{request.getfixturevalue('bucket')}/some/where")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 5 MiB, the least that S3 takes."""
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(object_store, "CREATE_BYTES", 8 << 20)


def test_what_is_put_is_there(objects: ObjectStore, tmp_path: Path) -> None:
    objects.put("a/b", b"one")
    objects.put("a/b", b"two!")
    assert objects.get("a/b") == b"two!"
    info = objects.head("a/b")
    assert info is not None
    assert (info.name, info.bytes) == ("a/b", 4)
    assert objects.download("a/b", tmp_path / "copy").bytes == 4
    assert (tmp_path / "copy").read_bytes() == b"two!"


def test_many_are_removed_together(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = RemoteObjects(bucket)
    for number in range(7):
        objects.put(f"a/{number}", b"x")
    monkeypatch.setattr(object_store, "_DELETED_TOGETHER", 3)
    objects.delete_all(["a/0", "a/1", "a/gone", *(f"a/{number}" for number in range(2, 6))])
    assert [info.name for info in objects.list()] == ["a/6"]
    objects.delete_all([])


def test_only_the_first_creates(objects: ObjectStore) -> None:
    assert objects.create("a", b"one")
    assert not objects.create("a", b"two")
    assert objects.get("a") == b"one"


def test_what_is_absent(objects: ObjectStore, tmp_path: Path) -> None:
    assert objects.head("a") is None
    with pytest.raises(FileNotFoundError):
        objects.get("a")
    with pytest.raises(FileNotFoundError):
        objects.download("a", tmp_path / "copy")
    objects.delete("a")


def test_lists_are_ordered_and_below_a_folder(objects: ObjectStore) -> None:
    assert list(objects.list()) == []
    for name in ("b/x", "a", "b/c/y", "bx"):
        objects.put(name, name.encode())
    assert [info.name for info in objects.list()] == ["a", "b/c/y", "b/x", "bx"]
    assert [info.name for info in objects.list("b")] == ["b/c/y", "b/x"]
    objects.delete("b/x")
    assert [info.name for info in objects.list("b")] == ["b/c/y"]


def test_empty_objects(objects: ObjectStore, tmp_path: Path) -> None:
    assert objects.create("a", b"")
    assert objects.get("a") == b""
    assert objects.download("a", tmp_path / "copy").bytes == 0
    assert (tmp_path / "copy").read_bytes() == b""


def test_large_files_travel_in_parts(objects: ObjectStore, small_parts: None, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    (tmp_path / "other").write_bytes(BIG[::-1])
    assert objects.create("big", tmp_path / "big")
    assert not objects.create("big", tmp_path / "other")
    objects.put("over", tmp_path / "other")
    assert objects.download("big", tmp_path / "copy").bytes == len(BIG)
    assert (tmp_path / "copy").read_bytes() == BIG
    assert objects.get("over") == BIG[::-1]
    assert [info.name for info in objects.list()] == ["big", "over"]


def test_ranges_and_conditional_updates(bucket: str) -> None:
    objects = RemoteObjects(bucket)
    objects.put("a", b"0123456789")
    assert objects.get_range("a", 3, 4) == b"3456"
    before = objects.head("a")
    assert before is not None
    assert objects.update("a", b"new", before.e_tag)
    assert not objects.update("a", b"newer", before.e_tag)
    assert objects.get("a") == b"new"


def test_it_travels_without_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    objects = RemoteObjects(bucket)
    objects.put("a", b"1")
    travelled = pickle.dumps(objects)
    assert b"do-not-tell" not in travelled
    assert b"testing" not in travelled
    assert pickle.loads(travelled).get("a") == b"1"  # noqa: S301


# --- faults


def test_server_errors_are_retried(bucket: str, faulty: FaultyServer) -> None:
    objects = RemoteObjects(bucket)
    requests = (("PUT", "/a"), ("GET", "/a"), ("HEAD", "/a"), ("POST", "delete"))
    faulty.faults = [Fault("error", method, part, times=2) for method, part in requests]
    assert objects.create("a", b"1")
    objects.put("a", b"2")
    assert objects.get("a") == b"2"
    assert objects.head("a") is not None
    objects.delete("a")
    assert objects.head("a") is None
    assert [fault.times for fault in faulty.faults] == [0, 0, 0, 0]


def test_errors_in_the_middle_of_a_large_upload_are_retried(
    bucket: str, faulty: FaultyServer, small_parts: None, tmp_path: Path
) -> None:
    objects = RemoteObjects(bucket)
    (tmp_path / "big").write_bytes(BIG)
    faulty.faults = [
        Fault("error", "PUT", "partNumber=2"),
        Fault("error", "POST", "uploads", times=1),
        Fault("error", "POST", "uploadId", times=1),
    ]
    assert objects.create("big", tmp_path / "big")
    assert [fault.times for fault in faulty.faults] == [0, 0, 0]
    assert objects.get("big") == BIG


def test_a_lost_answer_does_not_lose_the_creation(bucket: str, faulty: FaultyServer) -> None:
    objects = RemoteObjects(bucket)
    faulty.faults = [Fault("lost", "PUT", "/a")]
    assert objects.create("a", b"1")
    assert not objects.create("a", b"1")
    assert sum(method == "PUT" for method, _ in faulty.seen) == 3


KILLED = """
import sys
from pathlib import Path
from refrag_core import object_store
object_store.PART_BYTES, object_store.CREATE_BYTES = 5 << 20, 8 << 20
object_store.RemoteObjects(sys.argv[1]).create("big", Path(sys.argv[2]))
"""


def test_an_upload_killed_half_way_leaves_no_object(
    bucket: str, faulty: FaultyServer, small_parts: None, tmp_path: Path
) -> None:
    objects = RemoteObjects(bucket)
    (tmp_path / "big").write_bytes(BIG)
    faulty.faults = [Fault("held", "PUT", "partNumber=2", times=100)]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, bucket, tmp_path / "big"], text=True, start_new_session=True
    )
    wait_until(lambda: faulty.faults[0].times < 100, process)
    kill_group(process)
    assert list(objects.list()) == []
    faulty.faults.clear()
    assert objects.create("big", tmp_path / "big")
    assert objects.get("big") == BIG
    assert [info.name for info in objects.list()] == ["big"]


def test_an_answer_cut_short_is_asked_for_again(
    bucket: str, faulty: FaultyServer, small_parts: None, tmp_path: Path
) -> None:
    objects = RemoteObjects(bucket)
    objects.put("a", BIG)
    faulty.faults = [Fault("cut", "GET", "/a", times=2)]
    assert objects.get("a") == BIG
    faulty.faults = [Fault("cut", "GET", "/a", times=3)]
    objects.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == BIG


def test_a_slow_answer_is_waited_for_and_a_stuck_one_is_not(
    bucket: str, faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "TIMEOUT_SECONDS", 1.0)
    objects = RemoteObjects(bucket)
    faulty.faults = [Fault("slow", "PUT", "/a", seconds=0.3), Fault("slow", "GET", "/a", seconds=0.3)]
    assert objects.create("a", b"1")
    assert objects.get("a") == b"1"
    faulty.faults = [Fault("held", "GET", "/a"), Fault("held", "PUT", "/b")]
    assert objects.get("a") == b"1"
    assert objects.create("b", b"2")


def test_a_store_that_only_fails(bucket: str, faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.3)
    faulty.faults = [Fault("error", "GET", "/a", times=1000)]
    with pytest.raises(ObjectStoreError, match=r"/a: the object store did not answer as expected, in 2 rounds"):
        RemoteObjects(bucket).get("a")


# --- what is wrong from the start


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "has_client", lambda: False)
    with pytest.raises(MissingExtraError) as caught:
        open_store("s3://bucket/index")
    assert str(caught.value) == (
        "s3://bucket/index is an object store, which needs the extra `s3`: run `pip install 'refrag[s3]'`"
    )


def test_no_message_holds_what_a_url_may_hold_of_credentials() -> None:
    said = object_store._reason(Exception("GET https://me:pass@host/b?prefix=i&sig=abc%3D&X-Amz-Signature=123 failed"))
    assert said == "GET https://…@host/b?prefix=i&sig=…&X-Amz-Signature=… failed"


def test_a_bucket_that_does_not_exist(bucket: str) -> None:
    objects = RemoteObjects("s3://no-such-bucket/x")
    for request in (lambda: objects.get("a"), lambda: objects.put("a", b""), lambda: list(objects.list())):
        with pytest.raises(ObjectStoreError) as caught:
            request()
        assert str(caught.value) == (
            "s3://no-such-bucket/x: its bucket does not exist, expected one to write to: make it, or mend the name"
        )


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(object_store, "_METADATA_SERVICE", ("127.0.0.1", 9))
    with pytest.raises(ObjectStoreError, match="no credentials were found, expected AWS_ACCESS_KEY_ID and"):
        RemoteObjects(bucket).get("a")


@pytest.mark.parametrize("half", [False, True])
def test_a_machine_without_a_role(
    bucket: str, faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Something answers in the metadata service's place but gives no credentials, or half of them are set."""
    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    if not half:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", endpoint.geturl())
    monkeypatch.setattr(object_store, "_METADATA_SERVICE", (endpoint.hostname, endpoint.port))
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 0.3)
    faulty.faults = [Fault("error", method, "/latest/", times=1000) for method in ("PUT", "GET")]
    with pytest.raises(ObjectStoreError, match="no credentials were found, expected AWS_ACCESS_KEY_ID and"):
        RemoteObjects(bucket).get("a")


@pytest.mark.parametrize("location", ["ftp://host/x", "s3:///x", "memory://x"])
def test_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(UsageError, match=r"expected a folder, or a bucket and a path like s3://bucket/path"):
        open_objects(location)


def test_a_folder_takes_no_notice_of_what_is_being_written(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path, temporary="tmp")
    objects.put("a", b"1")
    (tmp_path / "tmp" / "half").write_bytes(b"x")
    assert [info.name for info in objects.list()] == ["a"]
    found = objects.head("a")
    assert found is not None
    assert found.modified.utcoffset() == timedelta(0)
