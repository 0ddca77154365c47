"""Builds that are killed, meet another builder, or run out of disk: nothing is lost, nothing is half there."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag_core.checkpoint import PolicyConfig, load_checkpoint
from refrag_core.errors import IndexLockedError
from refrag_core.manifest import list_versions, read_manifest
from refrag_core.policy import initialise_policy
from refrag_core.storage import FolderStore, Store
from refrag_core.vector_index import IndexSpec, build_segment, train_quantizer
from refrag_core.verification import verify_index
from tests import command_line
from tests.faults.kill_builds import build_arguments, ids_of, kill_builds, moments, problems_of
from tests.small_index import SmallIndex, documents, models_folder, write_jsonl


@pytest.fixture
def root(tmp_path: Path, own_cache: Path) -> Path:
    write_jsonl(tmp_path / "corpus" / "records.jsonl", documents(20))
    return tmp_path


# --- SIGKILL at random moments ----------------------------------------------------------------------


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path: Path, own_cache: Path) -> None:
    outcome = kill_builds(tmp_path, kills=3, seed=1, num_documents=24)
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
    found = sorted(moments(10, 5.0, random.Random(0)))
    assert [int(moment / 0.5) for moment in found] == list(range(10))


# --- death at every single step ---------------------------------------------------------------------


class _Died(BaseException):
    """Stands for the end of the process: no `except Exception` can hold it up."""


class Deaths:
    """Counts every change of a name in the file system, and dies right after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.at = 0
        for name in ("link", "replace"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # only a power cut would tell the difference

    def arm(self, at: int) -> None:
        self.steps, self.at = 0, at

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            self.steps += 1
            if self.steps == self.at:
                raise _Died
            return result

        return step


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Deaths:
    return Deaths(monkeypatch)


RECORDS = documents(4, sentences=3)
EDITED = [{"id": "doc-0001", "text": "Edited."}, *RECORDS[2:], {"id": "doc-0009", "text": "New."}]


def test_a_build_may_die_at_any_step(tmp_path: Path, own_cache: Path, deaths: Deaths) -> None:
    index = SmallIndex(tmp_path, RECORDS)
    index.build()  # the first also remembers the models' fingerprints, in refrag's cache
    shutil.rmtree(index.path)
    deaths.arm(0)
    calm = index.build()
    total = deaths.steps
    assert total > 15
    for at in range(1, total + 1):
        shutil.rmtree(index.path)
        deaths.arm(at)
        with pytest.raises(_Died):
            index.build()
        deaths.arm(0)
        report = index.build()
        assert (report.content_id, report.build_id) == (calm.content_id, calm.build_id), at
        assert list(problems_of(index.path)) == [], at


def test_an_update_may_die_at_any_step(tmp_path: Path, own_cache: Path, deaths: Deaths) -> None:
    """The generation before stays whole and readable; the one after is that of an undisturbed update."""
    index, before = SmallIndex(tmp_path, RECORDS), tmp_path / "before"
    old = index.build()
    shutil.copytree(index.path, before)
    index.write(EDITED)
    deaths.arm(0)
    calm = index.build(delete_missing=True)
    total = deaths.steps
    assert (calm.new, calm.changed, calm.deleted, calm.version) == (1, 1, 1, 2)
    assert total > 10
    for at in range(1, total + 1):
        shutil.rmtree(index.path)
        shutil.copytree(before, index.path)
        deaths.arm(at)
        with pytest.raises(_Died):
            index.build(delete_missing=True)
        assert read_manifest(FolderStore(index.path)).build_id in (old.build_id, calm.build_id)
        damaged = {problem.file for problem in verify_index(FolderStore(index.path)).problems}
        assert damaged <= {"CURRENT"}, at  # the hint lags where the commit was the last thing done
        deaths.arm(0)
        report = index.build(delete_missing=True)
        assert (report.content_id, report.build_id) == (calm.content_id, calm.build_id), at
        assert list(problems_of(index.path)) == [], at


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
    assert (
        f"another build is running on {index} (process {first.pid} on {os.uname().nodename}): nothing was done" in error
    )
    done = command_line.finish(first)
    assert done.code == 0, done.err
    assert (done.json["version"], done.json["committed"]) == (1, True)
    assert list_versions(FolderStore(index)) == [1]
    assert list(problems_of(index)) == []


HOLD = """
import sys, time
from pathlib import Path
from refrag_core.storage import FolderStore, Store
with FolderStore(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_builder_killed_with_the_lock_held_does_not_block(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    store = FolderStore(tmp_path)
    with pytest.raises(IndexLockedError, match=f"process {holder.pid} on"), store.lock():
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / "work" / "builder").read_text().startswith(f"process {holder.pid} on")
    with store.lock():
        assert (tmp_path / "work" / "builder").read_text().startswith(f"process {os.getpid()} on")


# --- a full disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chunks", "embeddings", "vectors", "segments/", "versions/"])
def test_a_full_disk_stops_a_build_that_then_goes_on(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    index = SmallIndex(tmp_path, RECORDS)
    calm = index.build()
    shutil.rmtree(index.path)

    def full(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(store: Store, target: str, what: Any) -> Any:
            if name in target:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.path(target)))
            return real(store, target, what)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "publish", full(FolderStore.publish))
        patch.setattr(FolderStore, "create", full(FolderStore.create))
        with pytest.raises(OSError, match="No space left on device"):
            index.build()
    assert list_versions(FolderStore(index.path)) == []
    report = index.build()
    assert (report.content_id, report.build_id) == (calm.content_id, calm.build_id)
    assert list(problems_of(index.path)) == []


def test_faiss_on_a_full_disk_says_so_as_the_system_does() -> None:
    """A traceback is what faiss's own RuntimeError would become."""
    quantizer = train_quantizer(np.ones((1, 8), np.float32), IndexSpec(kind="flat", dim=8, nlist=0))
    with pytest.raises(OSError, match=r"/dev/full cannot be written \(.*No space left on device\)"):
        build_segment(quantizer, [np.ones((100_000, 8), np.float32)], Path("/dev/full"))


def light_checkpoint(folder: Path) -> Path:
    """The session's checkpoint with a tiny policy: no file of its own is larger than the tables."""
    opened = load_checkpoint(str(models_folder() / "checkpoint"))
    shape = PolicyConfig(width=8, num_heads=1, num_layers=1)
    policy = initialise_policy(opened.config.d_enc, width=8, num_heads=1, num_layers=1, seed=0)
    replace(opened, config=replace(opened.config, policy=shape), policy=policy).save(folder)
    return folder


def test_a_file_that_cannot_grow_is_one_clear_line(root: Path) -> None:
    """The kernel itself refuses to write on, in a worker: the error crosses to the driver as it is."""
    checkpoint = light_checkpoint(root / "checkpoint")

    def arguments(index: Path) -> list[str]:
        return build_arguments(root, index, checkpoint=checkpoint, shard_bytes=1 << 20)

    assert command_line.call(*arguments(root / "calm")).code == 0
    files = read_manifest(FolderStore(root / "calm")).files.values()
    (chunks,) = (record.bytes for record in files if "chunks" in record.name)
    assert max(record.bytes for record in files if "checkpoints" in record.name) < chunks
    limit = (chunks - 1, chunks - 1)
    failed = command_line.run(
        *arguments(root / "index"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert failed.code == 1
    error = command_line.without_traceback(failed)
    assert "File too large" in error
    assert error.endswith("nothing half-written is left; mend the cause and run the command again")
    left = {path.name for path in (root / "index").rglob("*.parquet") if "work" not in path.parts}
    assert left == {"documents.parquet", "passages.parquet"}
    assert command_line.call(*arguments(root / "index")).code == 0
    assert ids_of(root / "index") == ids_of(root / "calm")
    assert list(problems_of(root / "index")) == []
