import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from refrag_core.errors import CorruptIndexError, IndexLockedError
from refrag_core.storage import FolderStore, check_name


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/./b", "a/../b", "", "a\\b", "c:x", "a\nb", "a/"])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(CorruptIndexError, match="unsafe file name"):
        check_name(name)


def test_publish_gives_size_and_digest(tmp_path: Path) -> None:
    record = FolderStore(tmp_path).publish("a/b", lambda path: path.write_bytes(b"abc") and None)
    assert (record.name, record.bytes) == ("a/b", 3)
    assert record.digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_first_published_file_stands(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first = store.publish("x", lambda path: path.write_bytes(b"first") and None)
    second = store.publish("x", lambda path: path.write_bytes(b"second") and None)
    assert second == first
    assert (tmp_path / "x").read_bytes() == b"first"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        FolderStore(tmp_path).publish("x", write)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_create_is_won_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert store.create("versions/1.json", b"1")
    assert not store.create("versions/1.json", b"2")
    assert (tmp_path / "versions/1.json").read_bytes() == b"1"


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = FolderStore(tmp_path)
    assert store.create("x", b"1")
    assert not store.create("x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"
    (tmp_path / "y").touch()  # a writer was killed between creating the name and filling it
    assert store.create("y", b"3")
    assert (tmp_path / "y").read_bytes() == b"3"


def test_files_leave_out_work_in_progress(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for name in ("b/2", "a/1", "CURRENT", "work/receipts/r"):
        store.create(name, b"")
    assert list(store.files()) == ["CURRENT", "a/1", "b/2"]


def test_a_builder_that_made_nothing_leaves_nothing(tmp_path: Path) -> None:
    """Not even the folder that it made; one that was there stays, and so does what somebody wrote."""
    made, there, used = (tmp_path / name for name in ("made", "there", "used"))
    there.mkdir()
    for root in (made, there):
        with pytest.raises(ValueError, match="refused"), FolderStore(root).lock():
            raise ValueError("refused")
    with FolderStore(used).lock():
        FolderStore(used).create("CURRENT", b"1")
    assert (made.exists(), there.exists(), (used / "CURRENT").read_bytes()) == (False, True, b"1")


def _hold(root: Path) -> None:
    with FolderStore(root).lock():
        time.sleep(60)


def test_a_live_lock_is_respected_and_a_killed_one_is_not(tmp_path: Path) -> None:
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path,))
    holder.start()
    try:
        while not (tmp_path / "work/builder").exists():
            time.sleep(0.05)
        with pytest.raises(IndexLockedError, match=f"process {holder.pid} on "), FolderStore(tmp_path).lock():
            pass
    finally:
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    with FolderStore(tmp_path).lock():
        pass
