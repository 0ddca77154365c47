"""A running runtime takes up generations: without a pause, and without ever mixing two in one answer."""

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refrag_core.bundle import ExportOptions, export_bundle
from refrag_core.bundle_folder import collect
from refrag_core.errors import CorruptIndexError, IndexNotFoundError
from refrag_core.generations import collect_garbage
from refrag_core.manifest import read_manifest
from refrag_core.retrieval import RetrievalOptions
from refrag_core.runtime import Answer, AskOptions, Runtime
from refrag_core.storage import FolderStore
from tests.small_index import SmallIndex

QUESTION = "Which river is the capital of the northern island?"
OPTIONS = AskOptions(top_k=3, policy="all", max_new_tokens=4)


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


def marked(generation: int) -> list[dict[str, Any]]:
    """A corpus every document of which says the generation that it was written for."""
    return [{"id": f"doc-{number}", "text": f"River {number} of generation {generation:03d}."} for number in range(4)]


def updated(small: SmallIndex, generation: int) -> None:
    small.write(marked(generation))
    assert small.build().version == generation


@pytest.fixture
def small(tmp_path: Path) -> SmallIndex:
    """Two generations."""
    made = SmallIndex(tmp_path, marked(1), shard_bytes=100_000)
    made.build()
    updated(made, 2)
    return made


def check_whole(answer: Answer) -> None:
    """All of an answer is of the generation that it says."""
    assert len(answer.passages) == 3
    for passage in answer.passages:
        assert f"generation {answer.version:03d}" in passage.text, (answer.version, passage.text)


def test_it_takes_up_the_newest_and_rolls_back(small: SmallIndex) -> None:
    runtime = Runtime.open(small.path, version=1, device="cpu")
    first = runtime.ask(QUESTION, OPTIONS)
    models = runtime.decoder, runtime.searcher.retriever, runtime.projection
    assert runtime.reload() == runtime.version == 2
    second = runtime.ask(QUESTION, OPTIONS)
    assert (first.version, second.version) == (1, 2)
    assert (runtime.decoder, runtime.searcher.retriever, runtime.projection) == models  # loaded once
    assert runtime.reload(1) == 1
    third = runtime.ask(QUESTION, OPTIONS)
    assert (third.answer, third.passages) == (first.answer, first.passages)
    for answer in (first, second, third):
        check_whole(answer)


def test_a_ranking_by_words_in_use_is_built_before_it_is_asked(small: SmallIndex) -> None:
    runtime = Runtime.open(small.path, version=1, device="cpu")
    runtime.reload(2)
    assert "lexical" not in vars(runtime.searcher)
    assert runtime.searcher.lexical.rank("generation 002", 1)
    runtime.reload(1)
    assert "lexical" in vars(runtime.searcher)
    assert len(runtime.searcher.lexical.rank("generation", 10)) == 4


def test_where_nothing_is_new_nothing_is_opened(small: SmallIndex) -> None:
    runtime = Runtime.open(small.path, device="cpu")
    reader = runtime.reader
    assert runtime.reload() == 2
    assert runtime.reader is reader


def test_a_request_ends_on_the_generation_that_it_began_with(small: SmallIndex) -> None:
    runtime = Runtime.open(small.path, version=1, device="cpu")
    seen: list[int] = []

    def reload_in_the_middle(text: str) -> None:
        runtime.reload()
        seen.append(runtime.version)

    answer = runtime.ask(QUESTION, OPTIONS, on_text=reload_in_the_middle)
    assert seen
    assert runtime.version == 2
    assert answer.version == 1
    check_whole(answer)
    check_whole(runtime.ask(QUESTION, OPTIONS))


def test_a_pinned_runtime_stays_where_it_is(small: SmallIndex) -> None:
    runtime = Runtime.open(small.path, version=1, device="cpu")
    pinned = runtime.pinned()
    refs = [ref for ref, _ in pinned.retrieve(QUESTION, 3)]
    runtime.reload()
    answer = pinned.answer_from(QUESTION, refs, OPTIONS)
    assert (answer.version, runtime.version) == (1, 2)
    check_whole(answer)


def test_a_generation_that_cannot_be_opened_changes_nothing(small: SmallIndex) -> None:
    runtime = Runtime.open(small.path, version=1, device="cpu")
    before = runtime.ask(QUESTION, OPTIONS)
    new = set(read_manifest(FolderStore(small.path)).files) - set(read_manifest(FolderStore(small.path), 1).files)
    (small.path / min(new)).unlink()
    with pytest.raises(CorruptIndexError):
        runtime.reload()
    with pytest.raises(IndexNotFoundError):
        runtime.reload(9)
    after = runtime.ask(QUESTION, OPTIONS)
    assert (after.version, after.answer, after.passages) == (1, before.answer, before.passages)


def test_what_a_runtime_has_left_can_be_collected(small: SmallIndex, tmp_path: Path) -> None:
    host = tmp_path / "host"
    for version in (1, 2):
        export_bundle(small.path, host, ExportOptions(version=version))
    runtime = Runtime.open(host, version=1, device="cpu")
    assert collect(host, keep=1, grace_seconds=0).held == (1,)
    check_whole(runtime.ask(QUESTION, OPTIONS))
    runtime.reload()
    assert collect(host, keep=1, grace_seconds=0).removed == (1,)
    check_whole(runtime.ask(QUESTION, OPTIONS))


@pytest.mark.parametrize("tables", ["parquet", "lance"])
def test_filters_words_and_caches_are_those_of_the_generation(
    tmp_path: Path, tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [{**record, "mark": "old"} for record in marked(1)]
    small = SmallIndex(tmp_path, old, shard_bytes=100_000, tables=tables)
    small.build()
    runtime = Runtime.open(small.path, device="cpu", tables=tables, chunk_cache=tmp_path / "chunks.sqlite")
    options = replace(OPTIONS, retrieval=RetrievalOptions(where="mark = 'old'", hybrid=True))
    given = {"notes": "A bridge of stone over the silent river."}
    first = runtime.ask(QUESTION, options, given=given)
    assert (first.passing, first.passages[0].doc_id) == (4, "notes")
    check_whole(replace(first, passages=first.passages[1:]))
    small.write([{**record, "mark": record["id"]} for record in marked(2)])
    small.build()
    gc.disable()  # nothing but the end of its last use ends a hold
    try:
        runtime.reload()
        assert not FolderStore(small.path).is_held("versions/1.json")
    finally:
        gc.enable()
    collect_garbage(FolderStore(small.path), keep=1, grace_seconds=0)
    encoder = runtime.chunk_encoder
    monkeypatch.setattr(type(encoder._encoder), "encode", None)  # the text from outside is in the cache
    options = replace(options, retrieval=RetrievalOptions(where="mark < 'doc-3'", hybrid=True))
    second = runtime.ask(QUESTION, options, given=given)
    assert (second.version, second.passing) == (2, 3)
    check_whole(replace(second, passages=second.passages[1:]))
    assert {passage.doc_id for passage in second.passages[1:]} == {"doc-0", "doc-1", "doc-2"}


class Readers:
    """Threads that ask and ask, and keep every answer and every failure."""

    def __init__(self, runtime: Runtime, count: int) -> None:
        self.runtime = runtime
        self.answers: list[Answer] = []
        self.failures: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                answer = self.runtime.ask(QUESTION, OPTIONS)
                check_whole(answer)
                self.answers.append(answer)
                self._over.wait(0.02)  # leaves the builder some of the processor
            except BaseException as error:
                self.failures.append(error)
                return

    def __enter__(self) -> "Readers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def serve_through_updates(tmp_path: Path, updates: int) -> Readers:
    """Readers on a host while the index is built, exported, taken up and collected `updates` times."""
    small = SmallIndex(tmp_path, marked(1), shard_bytes=100_000)
    small.build()
    host = tmp_path / "host"
    export_bundle(small.path, host, ExportOptions())
    runtime = Runtime.open(host, device="cpu")
    with Readers(runtime, 2) as readers:
        for generation in range(2, updates + 2):
            updated(small, generation)
            export_bundle(small.path, host, ExportOptions())
            assert runtime.reload() == generation
            if generation % 5 == 0:  # back and forth
                assert runtime.reload(generation - 1) == generation - 1
                assert runtime.reload() == generation
            collect(host, keep=2, grace_seconds=0)
    return readers


@pytest.mark.parametrize("updates", [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_readers_during_updates_see_no_failure_and_no_mixture(tmp_path: Path, updates: int) -> None:
    readers = serve_through_updates(tmp_path, updates)
    assert readers.failures == []
    versions = [answer.version for answer in readers.answers]
    assert len(set(versions)) > updates // 2
    print(f"{len(versions)} answers from {len(set(versions))} generations, no failure, no mixture")
