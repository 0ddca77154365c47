"""Builds that are killed, meet another builder, or run out of disk: nothing is lost, nothing is half there."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from refrag.pipelines.build import BuildReport
from refrag_core.errors import IndexLockedError
from refrag_core.manifest import list_versions, read_manifest
from refrag_core.storage import Store
from refrag_core.verification import verify_index
from tests import command_line
from tests.faults.kill_builds import build_arguments, ids_of, kill_builds, moments, problems_of
from tests.small_index import SmallIndex, documents, write_jsonl


@pytest.fixture
def root(tmp_path: Path, own_cache: Path) -> Path:
    write_jsonl(tmp_path / "corpus" / "records.jsonl", documents(20))
    return tmp_path


# --- SIGKILL at random moments ----------------------------------------------------------------------


def test_three_kills_leave_no_trace(tmp_path: Path, own_cache: Path) -> None:
    outcome = kill_builds(tmp_path, kills=3, seed=1, num_documents=40)
    assert len(outcome.killed) == 3
    assert set(outcome.ids) == {outcome.expected}
    assert outcome.problems == ()


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path, own_cache: Path) -> None:
    outcome = kill_builds(tmp_path, kills=20, seed=0, num_documents=150, log=print)
    assert len(outcome.killed) == 20
    assert set(outcome.ids) == {outcome.expected}
    assert outcome.problems == ()


def test_kills_are_spread_over_the_whole_build() -> None:
    import random

    found = sorted(moments(10, 5.0, random.Random(0)))
    assert [int(moment / 0.5) for moment in found] == list(range(10))


# --- death at every single step ---------------------------------------------------------------------


class _Died(BaseException):
    """Stands for the end of the process: no `except Exception` can hold it up."""


class Deaths:
    """Counts every change of a name in the file system, and dies before or after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.at = 0
        self.before = True
        for name in ("link", "replace"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def arm(self, at: int, *, before: bool) -> None:
        self.steps, self.at, self.before = 0, at, before

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            self.steps += 1
            if self.steps == self.at and self.before:
                raise _Died
            result = real(*arguments, **options)
            if self.steps == self.at:
                raise _Died
            return result

        return step


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Deaths:
    return Deaths(monkeypatch)


def small(root: Path, records: list[Any] | None = None) -> SmallIndex:
    return SmallIndex(root, records or documents(4), shard_bytes=1000)


def survive(index: SmallIndex, deaths: Deaths, at: int, *, before: bool, **changes: Any) -> BuildReport | None:
    """Die at one step and run again; None when the build has fewer steps."""
    deaths.arm(at, before=before)
    try:
        index.build(**changes)
    except _Died:
        deaths.arm(0, before=True)
        return index.build(**changes)
    return None


@pytest.mark.parametrize("before", [True, False])
def test_a_build_may_die_at_any_step(tmp_path: Path, own_cache: Path, deaths: Deaths, before: bool) -> None:
    calm = small(tmp_path / "calm").build()
    total = deaths.steps
    assert total > 20
    for at in range(1, total + 1):
        index = small(tmp_path / f"{at}")
        report = survive(index, deaths, at, before=before)
        assert report is not None, at
        assert (report.content_id, report.build_id) == (calm.content_id, calm.build_id), at
        assert list(problems_of(index.path)) == [], at
        shutil.rmtree(index.path)
    assert survive(small(tmp_path / "more"), deaths, total + 1, before=before) is None


def test_an_update_may_die_at_any_step(tmp_path: Path, own_cache: Path, deaths: Deaths) -> None:
    """The generation before stays whole and readable; the one after is that of an undisturbed update."""
    edited = [{"id": "doc-0001", "text": "Edited."}, *documents(4)[2:], {"id": "doc-9", "text": "New."}]
    first = small(tmp_path / "first")
    old = first.build()
    shutil.copytree(first.path, tmp_path / "calm" / "index")
    calm = small(tmp_path / "calm", edited)
    deaths.arm(0, before=True)
    expected = calm.build(delete_missing=True)
    total = deaths.steps
    assert (expected.new, expected.changed, expected.deleted) == (1, 1, 1)
    for at in range(1, total + 1):
        index = small(tmp_path / f"{at}", edited)
        shutil.copytree(first.path, index.path)
        deaths.arm(at, before=False)
        with pytest.raises(_Died):
            index.build(delete_missing=True)
        assert read_manifest(Store(index.path)).build_id in (old.build_id, expected.build_id)
        damaged = {problem.file for problem in verify_index(Store(index.path)).problems}
        assert damaged <= {"CURRENT"}, at  # a hint, which lags behind a commit that was the last thing done
        deaths.arm(0, before=True)
        report = index.build(delete_missing=True)
        assert (report.content_id, report.build_id) == (expected.content_id, expected.build_id), at
        assert list(problems_of(index.path)) == [], at
        shutil.rmtree(index.root)


# --- two builders -----------------------------------------------------------------------------------


def test_of_two_builders_one_commits_and_the_other_says_so(root: Path) -> None:
    index = root / "index"
    first = command_line.start(*build_arguments(root, index))
    command_line.wait_until((index / "work" / "builder").exists, first)
    os.kill(first.pid, signal.SIGSTOP)  # whatever the machine's load, the first is still at it
    try:
        second = command_line.run(*build_arguments(root, index))
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.code == 1
    error = command_line.without_traceback(second)
    assert f"another build is running on {index} (process {first.pid} on {os.uname().nodename}): nothing was done" in error
    done = command_line.finish(first)
    assert done.code == 0, done.err
    assert (done.json["version"], done.json["committed"]) == (1, True)
    assert list_versions(Store(index)) == [1]
    assert list(problems_of(index)) == []


HOLD = """
import sys, time
from pathlib import Path
from refrag_core.storage import Store
with Store(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_builder_killed_with_the_lock_held_does_not_block(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    store = Store(tmp_path)
    with pytest.raises(IndexLockedError, match=f"process {holder.pid} on"), store.lock():
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / "work" / "builder").read_text().startswith(f"process {holder.pid} on")
    with store.lock():
        assert (tmp_path / "work" / "builder").read_text().startswith(f"process {os.getpid()} on")


# --- a full disk ------------------------------------------------------------------------------------


def published(index: Path) -> Iterator[Path]:
    """Every file of an index that has a final name."""
    return (path for path in index.rglob("*") if path.is_file() and "work" not in path.relative_to(index).parts)


@pytest.mark.parametrize("name", ["chunks", "embeddings", "vectors", "segments/", "versions/"])
def test_a_full_disk_stops_a_build_that_then_goes_on(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calm = small(tmp_path / "calm").build()
    index, publish, create = small(tmp_path), Store.publish, Store.create

    def full(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(store: Store, target: str, what: Any) -> Any:
            if name in target:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.path(target)))
            return real(store, target, what)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", full(publish))
        patch.setattr(Store, "create", full(create))
        with pytest.raises(OSError, match="No space left on device"):
            index.build()
    assert list_versions(Store(index.path)) == []
    assert not [path for path in published(index.path) if name in str(path)]
    report = index.build()
    assert (report.content_id, report.build_id) == (calm.content_id, calm.build_id)
    assert list(problems_of(index.path)) == []


@pytest.mark.parametrize("where", ["tables", "segment"])
def test_a_file_that_cannot_grow_is_one_clear_line(root: Path, where: str) -> None:
    """The kernel itself refuses to write on, in whatever library the write happens to be."""
    index = root / "index"
    calm = SmallIndex(root / "calm", documents(20), shard_bytes=4000)
    expected = calm.build()
    sizes = {record.name: record.bytes for record in read_manifest(Store(calm.path)).files.values()}
    segment = max(size for name, size in sizes.items() if name.startswith("segments/"))
    tables = max(size for name, size in sizes.items() if name.startswith("shards/"))
    checkpoint = max(size for name, size in sizes.items() if name.startswith("checkpoints/"))
    limit = 4 * checkpoint
    assert limit
    del limit, segment, tables, expected, index
    pq.ParquetFile
    resource.getrlimit(resource.RLIMIT_FSIZE)
