"""New generations under load, and the server as a process: signals, one line of output, its end."""

import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from refrag_core.errors import CorruptIndexError
from refrag_core.manifest import read_manifest
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.serving.answering import Answering
from refrag_core.serving.generations import Generations
from refrag_core.serving.scheduler import embedded_engine
from refrag_core.serving.server import reload_newest
from refrag_core.serving.settings import ServeSettings
from refrag_core.storage import FolderStore
from tests import tiny_models
from tests.command_line import start
from tests.refrag_core.test_reload import QUESTION, marked, updated
from tests.served import MODEL, Running, served
from tests.small_index import SmallIndex

BODY = {
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 6,
    "top_k": 3,
    "policy": "all",
    "include_passages": True,
}


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


@pytest.fixture
def small(tmp_path: Path) -> SmallIndex:
    made = SmallIndex(tmp_path, marked(1), shard_bytes=100_000)
    made.build()
    return made


class Askers:
    """Threads that ask and ask; each answer is checked to be of one generation."""

    def __init__(self, running: Running, count: int) -> None:
        self.versions: list[int] = []
        self.answers: dict[int, set[str]] = {}
        self._running = running
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._futures = [self._pool.submit(self._run) for _ in range(count)]

    def _run(self) -> None:
        with httpx.Client(base_url=self._running.url, timeout=60) as client:
            while not self._over.is_set():
                self._take(client.post("/v1/chat/completions", json=BODY))

    def _take(self, reply: Any) -> None:
        assert reply.status_code == 200, reply.text
        body = reply.json()
        version = body["refrag"]["version"]
        assert body["system_fingerprint"].startswith(f"generation-{version}-")
        assert len(body["refrag"]["passages"]) == 3
        assert all(f"generation {version:03d}" in passage["text"] for passage in body["refrag"]["passages"])
        self.answers.setdefault(version, set()).add(body["choices"][0]["message"]["content"].strip())
        self.versions.append(version)

    def __enter__(self) -> "Askers":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for future in self._futures:
            future.result()


@pytest.mark.parametrize("updates", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_request_is_lost_or_mixed_while_generations_change(small: SmallIndex, updates: int) -> None:
    runtime = Runtime.open(small.path, device="cpu")
    with served(runtime, max_positions=512) as running, Askers(running, 6) as askers:
        for generation in range(2, updates + 2):
            running.until(lambda wanted=generation - 1: wanted in askers.versions)
            updated(small, generation)
            found = httpx.post(f"{running.url}/v1/reload", json={})
            assert found.json() == {"version": generation}
        running.until(lambda: updates + 1 in askers.versions)
        metrics = httpx.get(f"{running.url}/metrics").text
    assert set(askers.versions) == set(range(1, updates + 2))
    assert f"refrag_reloads_total {float(updates)}" in metrics
    for version, answers in askers.answers.items():
        pinned = Runtime.open(small.path, version=version, device="cpu")
        assert answers == {pinned.ask(QUESTION, AskOptions(top_k=3, policy="all", max_new_tokens=6)).answer}


def test_a_generation_that_there_is_not_changes_nothing(small: SmallIndex) -> None:
    with served(Runtime.open(small.path, device="cpu"), max_positions=512) as running:
        found = httpx.post(f"{running.url}/v1/reload", json={"version": 9})
        message = "there is no generation 9; expected one that the index has"
        assert (found.status_code, found.json()["error"]["message"]) == (400, message)
        assert httpx.get(f"{running.url}/readyz").json()["version"] == 1


def test_a_generation_that_cannot_be_opened_is_logged(small: SmallIndex, caplog: pytest.LogCaptureFixture) -> None:
    with served(Runtime.open(small.path, device="cpu"), max_positions=512) as running:
        updated(small, 2)
        new = set(read_manifest(FolderStore(small.path)).files) - set(read_manifest(FolderStore(small.path), 1).files)
        (small.path / min(new)).unlink()
        reload_newest(running.answering)
        assert "still answering from generation 1" in caplog.text
        with pytest.raises(CorruptIndexError):
            running.answering.generations.reload()
        assert httpx.post(f"{running.url}/v1/chat/completions", json=BODY).status_code == 200


def test_another_decoder_brings_an_engine_and_the_old_one_ends_with_its_last_request(
    small: SmallIndex, tmp_path: Path
) -> None:
    runtime = Runtime.open(small.path, device="cpu")
    generations = Generations(runtime, lambda of: embedded_engine(of.decoder, slots=2, max_positions=256))
    answering = Answering(generations, ServeSettings(model_name=MODEL))
    first = generations.current
    with generations.hold() as held:
        tiny_models.checkpoint_folder(tmp_path / "other", seed=3)
        small.build(rebuild=True, models=small.with_models(checkpoint=str(tmp_path / "other" / "checkpoint")).models)
        assert generations.reload() == 2
        assert generations.current.engine is not held.engine is first.engine
        prepared = held.runtime.prepare(QUESTION, AskOptions(top_k=1, policy="all", max_new_tokens=3))
        assert prepared.composed is not None
        from refrag_core.decoder_engine import Sampling

        assert len(list(held.engine.submit(prepared.composed.inputs_embeds, Sampling(max_new_tokens=3)))) <= 3
    closing = [thread for thread in threading.enumerate() if thread.name == "close-decoder"]
    for thread in closing:
        thread.join(30)
    assert held.engine._queue.closed  # type: ignore[attr-defined]
    assert not generations.current.engine._queue.closed  # type: ignore[attr-defined]
    answering.close()


# --- the process --------------------------------------------------------------------------------------


@pytest.fixture
def process(small: SmallIndex) -> Iterator["subprocess.Popen[str]"]:
    command = ["serve", small.path, "--port", "0", "--max-positions", "512", "--device", "cpu", "--slots", "2"]
    started = start(*command, "--retriever", small.models / "encoder")
    yield started
    if started.poll() is None:
        started.kill()
    started.communicate()


def test_the_process_reloads_on_sighup_and_drains_on_sigterm(
    small: SmallIndex, process: "subprocess.Popen[str]"
) -> None:
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    with httpx.Client(base_url=url, timeout=60) as client:
        while True:
            try:
                assert client.get("/readyz").json() == {"status": "ready", "version": 1}
                break
            except httpx.ConnectError:
                continue
        assert client.get("/v1/models").json()["data"][0]["id"] == "index"
        updated(small, 2)
        process.send_signal(signal.SIGHUP)
        while client.get("/readyz").json()["version"] != 2:
            pass
        with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True, "max_tokens": 60}) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    out, log = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "answering from generation 2 (before: 1)" in log
    assert "Traceback" not in log
    assert "untrained" in log.lower()
