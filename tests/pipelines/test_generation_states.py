"""Whatever happens to an index, it answers as one built from scratch: edits, kills, rollbacks, compactions, gc.

A model holds, for every version that can be read, the documents that were live in it. After each step the newest
generation is compared with an index built in one go from the same documents: passages, ids, tokens, metadata equal;
embeddings and scores within what float16 rounds (CPU batches are bit-equal, other devices need not be).
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from refrag.pipelines.build import BuildReport
from refrag.pipelines.compact import CompactOptions, compact_index
from refrag.pipelines.engines.local import LocalEngine
from refrag_core.errors import IndexNotFoundError
from refrag_core.generations import collect_garbage, diff_generations, roll_back
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import CURRENT, list_versions
from refrag_core.storage import FolderStore
from refrag_core.tables import MappedColumn
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex

TOLERANCE = 2.0**-9
"""Of embeddings, absolute: two units in the last place of a float16 between 1 and 2."""

SENTENCES = (
    "The river runs north of the old bridge and past the mill.",
    "Copper and carbon were carried by ship to the island.",
    "A king wrote a letter about music, winter and the stone road.",
    "The silent engine of the theory is a number in orbit.",
    "Water and light fall on paper and glass in the garden.",
    "Nothing of this is in any other document of the whole corpus.",
)
IDS = tuple(f"doc-{number}" for number in range(9))
TEXTS = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=9).map(" ".join)


class Died(BaseException):
    """Stands for the end of the process: no `except Exception` can hold it up."""


class Deaths:
    """Dies right after the n-th change of a name in the file system; never while `left` is None."""

    NAMES = ("link", "replace", "unlink", "rmdir", "mkdir")

    def __init__(self) -> None:
        self.left: int | None = None
        self._real = {name: getattr(os, name) for name in (*self.NAMES, "fsync")}

    def install(self) -> None:
        for name in self.NAMES:
            setattr(os, name, partial(self._step, self._real[name]))
        os.fsync = lambda handle: None  # type: ignore[assignment]  # only a power cut would tell the difference

    def uninstall(self) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _step(self, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                self.left = None
                raise Died
        return result


def contents(reader: IndexReader) -> dict[str, tuple[Any, Any, Any]]:
    """By passage id: what must be equal, and (chunk embeddings, passage embedding), which must be close."""
    found = {}
    for number, shard in enumerate(reader.manifest.shards):
        vectors = MappedColumn(reader.store.path(shard.tables["vectors"]), "vector", "<f2", 48)
        for row in np.flatnonzero(reader.live_rows(number)):
            ref = PassageRef(number, int(row))
            shown, fetched = reader.describe(ref), reader.fetch([ref])[0]
            exact = (
                shown.document_id, shown.ordinal, shown.char_start, shown.char_end, shown.text,
                dict(shown.metadata), fetched.tokens.tolist(), fetched.chunk_size,
            )  # fmt: skip
            assert shown.passage_id not in found
            found[shown.passage_id] = (
                exact,
                fetched.embeddings.copy(),
                vectors.slice(int(row), int(row) + 1)[0].copy(),
            )
    return found


def ranking(reader: IndexReader, query: Any) -> list[tuple[float, str]]:
    """Every passage that a search can reach, best first (the index is flat: search is exact)."""
    return [(score, reader.describe(ref).passage_id) for ref, score in reader.search(query, 10_000)]


def check_equal(found: IndexReader, expected: IndexReader) -> None:
    """Raise AssertionError unless both answer alike and nothing more is reachable in one than in the other."""
    assert found.manifest.content_id == expected.manifest.content_id
    assert found.manifest.counts == expected.manifest.counts
    left, right = contents(found), contents(expected)
    assert left.keys() == right.keys()
    for identity, (exact, embeddings, vector) in right.items():
        assert left[identity][0] == exact
        np.testing.assert_allclose(left[identity][1].astype("f4"), embeddings.astype("f4"), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(left[identity][2].astype("f4"), vector.astype("f4"), rtol=0, atol=TOLERANCE)
    generator = np.random.default_rng(0)
    for _ in range(3):
        query = generator.standard_normal(48).astype(np.float32)
        query /= np.linalg.norm(query)
        ours, theirs = ranking(found, query), ranking(expected, query)
        texts = [right[identity][0][4] for _, identity in ours]
        if found.manifest.parameters.dedup_passages:
            assert sorted(texts) == sorted({exact[4] for exact, _, _ in right.values()})
        else:
            assert {identity for _, identity in ours} == right.keys()
        assert [identity for _, identity in ours] == [identity for _, identity in theirs]
        top = [[reader.passage_id(ref).hex() for ref, _ in reader.search(query, 3)] for reader in (found, expected)]
        assert top[0] == top[1] == [identity for _, identity in ours[:3]]
        np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in theirs], atol=TOLERANCE)


class Generations(RuleBasedStateMachine):
    """An index under everything that its commands do, killed now and then, beside what it should hold."""

    scratch: dict[str, Path]
    """Indexes built in one go, by the documents they hold; shared by all runs."""
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.folder))
        self.deaths = Deaths()
        self.deaths.install()
        self.index = SmallIndex(self.root, [], shard_bytes=300)
        self.store = FolderStore(self.index.path)
        self.corpus: dict[str, str] = {}
        self.versions: dict[int, dict[str, str]] = {}
        self.gone: set[int] = set()
        self.dedup = False

    def teardown(self) -> None:
        self.deaths.uninstall()
        shutil.rmtree(self.root)

    # -- what the corpus's owner does

    @initialize(texts=st.dictionaries(st.sampled_from(IDS), TEXTS, min_size=2), dedup=st.booleans())
    def first_build(self, texts: dict[str, str], dedup: bool) -> None:
        self.corpus, self.dedup = dict(texts), dedup
        self.update(None)

    @rule(document=st.sampled_from(IDS), text=TEXTS)
    def write_document(self, document: str, text: str) -> None:
        """Add a document, or edit the one of that name."""
        self.corpus[document] = text

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(data=st.data())
    def remove_document(self, data: st.DataObject) -> None:
        del self.corpus[data.draw(st.sampled_from(sorted(self.corpus)))]

    # -- commands; `dies` is the step after which the process is no more

    @rule(dies=st.none() | st.integers(1, 60))
    def update(self, dies: int | None) -> None:
        """Build, and if that dies build again: both must end where an undisturbed build would."""
        self.index.write([{"id": name, "text": text, "size": len(text)} for name, text in sorted(self.corpus.items())])
        self._run(self._build, dies, dict(self.corpus))
        self._build()
        self._note(dict(self.corpus))

    def _build(self) -> BuildReport:
        return self.index.build(delete_missing=True, dedup_passages=self.dedup)

    @rule(dies=st.none() | st.integers(1, 40), shard_bytes=st.sampled_from([300, 2000, 100_000]))
    def compact(self, dies: int | None, shard_bytes: int) -> None:
        options = CompactOptions(index=self.index.path, shard_bytes=shard_bytes)
        self._run(lambda: compact_index(options, LocalEngine(0)), dies, self._newest())
        report = compact_index(options, LocalEngine(0))
        self._note(self._newest())
        reader = IndexReader(self.index.path)
        assert reader.manifest.tombstones is None
        assert report.content_id == reader.manifest.content_id

    @rule(data=st.data(), dies=st.none() | st.integers(1, 6))
    def roll_back(self, data: st.DataObject, dies: int | None) -> None:
        version = data.draw(st.sampled_from(sorted(self.versions)))
        documents = self.versions[version]
        self._run(lambda: roll_back(self.store, version), dies, documents)
        roll_back(self.store, version)
        self._note(documents)

    @rule(data=st.data(), keep=st.integers(1, 3), dies=st.none() | st.integers(1, 60))
    def collect(self, data: st.DataObject, keep: int, dies: int | None) -> None:
        """Remove old generations while a reader has one of them open."""
        held = data.draw(st.sampled_from(sorted(self.versions)))
        reader = IndexReader(self.index.path, held)
        before = contents(reader).keys()
        self._run(lambda: collect_garbage(self.store, keep=keep, grace_seconds=0), dies, self._newest())
        self._see_what_is_left()
        collect_garbage(self.store, keep=keep, grace_seconds=0)
        self._see_what_is_left()
        assert held in self.versions
        assert contents(reader).keys() == before
        reader.close()
        collect_garbage(self.store, keep=keep, grace_seconds=0)
        self._see_what_is_left()
        assert len(self.versions) <= keep
        assert verify_index(self.store).unlisted == ()

    def _run(self, command: Callable[[], object], dies: int | None, documents: dict[str, str]) -> None:
        """Run a command that may die; the newest generation is then the one before or one with `documents`."""
        self.deaths.left = dies
        try:
            command()
        except Died:
            damaged = {problem.file for problem in verify_index(self.store).problems} if self.versions else set()
            assert damaged <= {CURRENT}  # the hint lags where the commit was the last thing done
        finally:
            self.deaths.left = None
        self._note(documents)

    def _note(self, documents: dict[str, str]) -> None:
        for version in set(list_versions(self.store)) - self.versions.keys():
            self.versions[version] = documents

    def _see_what_is_left(self) -> None:
        left = list_versions(self.store)
        self.gone |= self.versions.keys() - set(left)
        self.versions = {version: self.versions[version] for version in left}

    def _newest(self) -> dict[str, str]:
        return self.versions[max(self.versions)]

    # -- what must hold after every step

    @invariant()
    def it_answers_as_one_built_from_scratch(self) -> None:
        if not self.versions:
            return
        reader = IndexReader(self.index.path)
        assert reader.manifest.version == max(self.versions)
        check_equal(reader, IndexReader(self._from_scratch(self._newest())))
        reader.close()

    @invariant()
    def all_versions_are_whole_and_no_other_can_be_read(self) -> None:
        if not self.versions:
            return
        assert set(list_versions(self.store)) == self.versions.keys()
        assert verify_index(self.store).problems == ()
        assert not (self.index.path / "work").exists()
        for version in self.gone:
            with pytest.raises(IndexNotFoundError):
                IndexReader(self.index.path, version)
        oldest, newest = min(self.versions), max(self.versions)
        self._check_diff(oldest, newest)

    def _check_diff(self, oldest: int, newest: int) -> None:
        seen: list[tuple[str, str]] = []
        report = diff_generations(self.store, oldest, newest, lambda change, name: seen.append((change, name)))
        old, new = self.versions[oldest], self.versions[newest]
        assert sorted(seen) == sorted(
            [("added", name) for name in new.keys() - old.keys()]
            + [("removed", name) for name in old.keys() - new.keys()]
            + [("changed", name) for name in new.keys() & old.keys() if new[name] != old[name]]
        )
        assert report.documents_unchanged == sum(old.get(name) == text for name, text in new.items())

    def _from_scratch(self, documents: dict[str, str]) -> Path:
        key = repr((self.dedup, sorted(documents.items())))
        if key not in self.scratch:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            records = [{"id": name, "text": text, "size": len(text)} for name, text in documents.items()]
            SmallIndex(folder, records, shard_bytes=100_000).build(dedup_passages=self.dedup)
            self.scratch[key] = folder / "index"
        return self.scratch[key]


def run(folder: Path, *, examples: int, steps: int) -> None:
    machine = type("Machine", (Generations,), {"scratch": {}, "folder": folder})
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=examples < 10,
        phases=[Phase.generate] if examples < 10 else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=profile)


def test_any_history_gives_the_index_of_its_documents(tmp_path: Path, own_cache: Path) -> None:
    run(tmp_path, examples=4, steps=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_histories_give_the_index_of_their_documents(tmp_path: Path, own_cache: Path) -> None:
    run(tmp_path, examples=40, steps=20)
