"""What can go wrong in a build on Beam's worker processes: the ids at the end are those of a calm local build."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from refrag.pipelines.build import BuildReport, build_index
from refrag.pipelines.components import Models
from refrag.pipelines.engines.beam import BeamEngine
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.stages import EmbedStage
from refrag_core.errors import StageError
from refrag_core.manifest import read_manifest
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests import command_line
from tests.faults.kill_builds import build_arguments, ids_of, problems_of
from tests.small_index import SmallIndex, documents, write_jsonl

pytestmark = pytest.mark.slow

WAIT_SECONDS = 120.0
BEAM = ("--engine", "beam")


@pytest.fixture
def root(tmp_path: Path, own_cache: Path) -> Path:
    """A folder with a corpus, and the index that the local engine makes of it."""
    write_jsonl(tmp_path / "corpus" / "records.jsonl", documents(300))
    assert command_line.run(*build_arguments(tmp_path, tmp_path / "calm")).code == 0
    return tmp_path


def start(root: Path) -> "subprocess.Popen[str]":
    """A build with two worker processes."""
    return command_line.start(*build_arguments(root, root / "index"), *BEAM)


def under_way(root: Path, process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Wait until some shards are done; the workers that do them."""
    command_line.wait_until(lambda: command_line.num_receipts(root / "index") > 20, process)
    return workers_of(process)


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "refrag.pipelines.engines.beam_worker" in " ".join(child.cmdline())]


@contextlib.contextmanager
def job_server() -> Iterator[str]:
    """Beam's own job server in a process; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port={port}"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        yield f"localhost:{port}"
    finally:
        server.kill()
        server.wait()


def wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("the job server did not come up")


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=WAIT_SECONDS)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def assert_calm(root: Path) -> None:
    """The index is the undisturbed one, and nothing else is in its folder."""
    assert ids_of(root / "index") == ids_of(root / "calm")
    assert list(problems_of(root / "index")) == []


def test_a_killed_worker_is_replaced(root: Path) -> None:
    process = start(root)
    for _ in range(2):
        workers = under_way(root, process)
        workers[0].kill()
        assert_gone(workers)  # the others end as well: the runner waits for the dead one for ever
        time.sleep(1.0)
    done = command_line.finish(process)
    assert done.code == 0, done.err
    assert_calm(root)


def test_the_driver_is_killed_and_the_next_run_goes_on(root: Path) -> None:
    process = start(root)
    workers = under_way(root, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert_gone(workers)
    done = command_line.run(*build_arguments(root, root / "index"), *BEAM)
    assert done.code == 0, done.err
    assert 0 < done.json["encoded_chunks"] < done.json["chunks"]
    assert_calm(root)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_no_process(root: Path, number: signal.Signals) -> None:
    process = start(root)
    workers = under_way(root, process)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal: the whole group gets it
    done = command_line.finish(process)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("interrupted: what is finished is kept")
    assert_gone(workers)
    again = command_line.run(*build_arguments(root, root / "index"), *BEAM)
    assert again.code == 0, again.err
    assert_calm(root)


def test_every_bundle_twice(root: Path) -> None:
    twice = "--beam-option=--direct_runner_bundle_repeat=1"
    done = command_line.run(*build_arguments(root, root / "index"), *BEAM, twice)
    assert done.code == 0, done.err
    assert_calm(root)


def test_a_job_server_of_its_own(root: Path) -> None:
    """The job goes to a server in another process, which asks this one for a worker."""
    with job_server() as endpoint:
        flags = ("--runner=PortableRunner", f"--job_endpoint={endpoint}", "--environment_type=LOOPBACK")
        arguments = build_arguments(root, root / "index")
        at = arguments.index("--workers")
        del arguments[at : at + 2]
        done = command_line.run(*arguments, *BEAM, *(f"--beam-option={flag}" for flag in flags))
    assert done.code == 0, done.err
    assert_calm(root)


# --- records that no model can take -----------------------------------------------------------------


class PoisonedRetriever:
    """A retriever that one text breaks."""

    def __init__(self, retriever: Any) -> None:
        self.inner = retriever

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def embed(self, texts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if any("poison" in text for text in texts):
            raise ValueError("the record is poisoned")
        found: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] = self.inner.embed(texts)
        return found


class PoisonedStage(EmbedStage):
    """An embed stage that raises on one record; a class of its own, so that worker processes have it too."""

    __slots__ = ()

    def load(self) -> Any:
        return PoisonedRetriever(super().load())


class DeadStage(EmbedStage):
    """An embed stage whose device is broken."""

    __slots__ = ()

    def __call__(self, *_: Any) -> Any:
        raise StageError("the device is broken, expected it to work: look at it")


def with_stage(kind: type[EmbedStage]) -> Callable[[Models], EmbedStage]:
    def stage(models: Models) -> EmbedStage:
        return kind(str(models.retriever), models.retriever_fingerprint, models.device)

    return stage


@pytest.fixture
def many(tmp_path: Path, own_cache: Path) -> SmallIndex:
    """10,000 records, one of them poisoned."""
    records = documents(10_000, sentences=1)
    records[4321]["text"] += " Here is the poison."
    return SmallIndex(tmp_path, records, shard_bytes=50_000)


def quarantine_of(path: Path) -> tuple[dict[str, int], str]:
    manifest = read_manifest(FolderStore(path))
    return dict(manifest.quarantine.counts), manifest.files[manifest.quarantine.file].digest


def test_one_record_in_ten_thousand(many: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ids as a local build, the same quarantine list, and the ids of the corpus without the record."""

    def run(engine: Any, output: Path) -> BuildReport:
        return build_index(replace(many.options, output=output), engine)

    local, beamed, without = (many.root / name for name in ("local", "beam", "without"))
    with monkeypatch.context() as patch:
        patch.setattr(Models, "embed_stage", with_stage(PoisonedStage))
        with LocalEngine(2) as engine:
            run(engine, local)
        with BeamEngine(workers=2, exchange=beamed) as engine:
            report = run(engine, beamed)
    assert (report.quarantined, report.indexed) == (1, 9999)
    assert dict(report.reasons) == {"embed_failed": 1}
    assert ids_of(beamed) == ids_of(local)
    assert quarantine_of(beamed) == quarantine_of(local)
    assert verify_index(FolderStore(beamed)).problems == ()
    records = documents(10_000, sentences=1)
    many.write(records[:4321] + records[4322:])
    with BeamEngine(exchange=without) as engine:
        assert run(engine, without).content_id == report.content_id


def test_a_broken_device_is_one_message_and_the_next_run_goes_on(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SmallIndex(tmp_path, documents(60))
    calm = index.build()
    options = replace(index.options, output=tmp_path / "beam")
    with monkeypatch.context() as patch:
        patch.setattr(Models, "embed_stage", with_stage(DeadStage))
        with BeamEngine(workers=2, exchange=options.output) as engine, pytest.raises(StageError) as raised:
            build_index(options, engine)
    assert str(raised.value) == "the device is broken, expected it to work: look at it"
    with BeamEngine(workers=2, exchange=options.output) as engine:
        report = build_index(options, engine)
    assert (report.content_id, report.build_id) == (calm.content_id, calm.build_id)
