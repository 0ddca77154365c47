"""Writers in processes of their own that all reach the commit of the same version: one wins, the others say so."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refrag_core.errors import CommitConflictError
from refrag_core.manifest import list_versions, read_manifest
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex, documents

WRITER = """
import contextlib, sys, time
from pathlib import Path
from refrag.pipelines import build, compact
from refrag_core import generations
from refrag_core.errors import RefragError
from refrag_core.manifest import commit
from refrag_core.storage import FolderStore
from tests.small_index import SmallIndex
import tests.small_index as small_index

root, models, name, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
small_index.models_folder = lambda: models

def wait_for_the_others(store, manifest):
    (root / f"ready-{name}").touch()
    while not (root / "go").exists():
        time.sleep(0.002)
    commit(store, manifest)

# A lock that does not work, as on some network file systems: the commit itself has to decide.
FolderStore.lock = lambda store: contextlib.nullcontext()
build.lock_and_clear = compact.lock_and_clear = lambda store: contextlib.nullcontext()
for module in (build, compact, generations):
    module.commit = wait_for_the_others
index = SmallIndex(root, corpus=root / f"corpus-{name}")
try:
    if command == "build":
        index.build()
    elif command == "compact":
        from refrag.pipelines.engines.local import LocalEngine
        compact.compact_index(compact.CompactOptions(index=index.path, shard_bytes=100_000), LocalEngine(0))
    else:
        generations.roll_back(FolderStore(index.path), 1)
except RefragError as error:
    print(type(error).__name__, error)
    raise SystemExit(1)
print("committed")
"""
COMMANDS = ("build", "build", "compact", "rollback")


@pytest.mark.slow
def test_of_concurrent_writers_exactly_one_commits(tmp_path: Path, own_cache: Path) -> None:
    index = SmallIndex(tmp_path, documents(8, sentences=3))
    index.build()
    index.write(documents(9, sentences=3))
    index.build()
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    writers = []
    for number, command in enumerate(COMMANDS):
        index.corpus = tmp_path / f"corpus-{number}"
        index.write([*documents(9, sentences=3), {"id": f"of-{number}", "text": f"What writer {number} adds."}])
        arguments = [sys.executable, str(script), str(tmp_path), str(index.models), str(number), command]
        folders = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
        writers.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment))
    try:
        while not all((tmp_path / f"ready-{number}").exists() for number in range(len(COMMANDS))):
            assert not any(writer.poll() for writer in writers), [w.stdout and w.stdout.read() for w in writers]
            time.sleep(0.01)
        (tmp_path / "go").touch()
        said = [writer.communicate(timeout=120)[0] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers].count(0) == 1
    losers = [text for writer, text in zip(writers, said, strict=True) if writer.returncode]
    assert all(text.startswith(CommitConflictError.__name__) for text in losers)
    assert all("another build committed version 3" in text for text in losers)
    store = FolderStore(index.path)
    assert list_versions(store) == [1, 2, 3]
    assert verify_index(store).problems == ()
    index.corpus = tmp_path / "corpus"
    index.write([*documents(9, sentences=3), {"id": "later", "text": "Who lost runs again, on top of the winner."}])
    last = index.build()
    assert (last.version, read_manifest(store).parent.version) == (4, 3)  # type: ignore[union-attr]
    assert verify_index(store).problems == ()


def test_a_conflict_is_one_clear_message(tmp_path: Path, own_cache: Path) -> None:
    from dataclasses import replace

    from refrag_core.manifest import commit

    index = SmallIndex(tmp_path, documents(2, sentences=2))
    index.build()
    manifest = read_manifest(FolderStore(index.path))
    with pytest.raises(CommitConflictError, match="nothing of this one was committed; run the command again"):
        commit(FolderStore(index.path), replace(manifest, content_id="f" * 64))
