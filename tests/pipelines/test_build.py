import functools
import json
import operator
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag.pipelines import stages
from refrag.pipelines.assembly import check_accounts
from refrag.pipelines.build import build_index
from refrag.pipelines.engines.local import LocalEngine
from refrag_core import devices
from refrag_core.checkpoint import load_checkpoint
from refrag_core.encoder import ChunkEncoder
from refrag_core.errors import (
    AccountingError,
    CommitConflictError,
    ConfigError,
    CorpusError,
    FingerprintMismatchError,
    IndexLockedError,
    RecallGateError,
    StageError,
)
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import commit, live_documents, read_manifest
from refrag_core.models import load_tokenizer
from refrag_core.retriever import Retriever
from refrag_core.scoring import ChunkScorer
from refrag_core.storage import FolderStore, Store
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex, documents


@pytest.fixture
def small(tmp_path: Path, own_cache: Path) -> SmallIndex:
    return SmallIndex(tmp_path)


def passages(reader: IndexReader) -> dict[str, list[Any]]:
    """All live passages by document: (ordinal, span, tokens, embeddings)."""
    found: dict[str, list[Any]] = {}
    removed = [np.ones(shard.passages, bool) for shard in reader.manifest.shards]
    for segment, mask in enumerate(reader.live):
        for row in np.flatnonzero(~mask) if mask is not None else ():
            ref = reader.locate(segment, int(row))
            removed[ref.shard][ref.row] = False
    for number, shard in enumerate(reader.manifest.shards):
        for row in range(shard.passages):
            if removed[number][row]:
                ref = PassageRef(number, row)
                shown, fetched = reader.describe(ref), reader.fetch([ref])[0]
                entry = (
                    shown.ordinal,
                    shown.char_start,
                    shown.char_end,
                    shown.text,
                    fetched.tokens.tolist(),
                    fetched.embeddings,
                )
                found.setdefault(shown.document_id, []).append(entry)
    return {document: sorted(entries, key=lambda e: e[0]) for document, entries in found.items()}


def test_everything_that_came_in_is_in_the_index(small: SmallIndex) -> None:
    report = small.build()
    assert (report.documents_in, report.indexed, report.filtered, report.quarantined) == (60, 60, 0, 0)
    assert (report.new, report.committed, report.version) == (60, True, 1)
    assert report.encoded_chunks == report.chunks
    reader = IndexReader(small.path)
    found = passages(reader)
    tokenizer = load_tokenizer(small.models / "decoder")
    for record in documents(60):
        entries = found[record["id"]]
        assert entries[0][1] == 0
        assert entries[-1][2] == len(record["text"])
        assert [tokenizer.decode(e[4], skip_special_tokens=False) for e in entries] == [e[3] for e in entries]
        assert (
            functools.reduce(operator.iadd, (e[4] for e in entries), [])
            == tokenizer.encode(record["text"], add_special_tokens=False).ids
        )
        assert all(len(e[5]) == -(-len(e[4]) // 16) for e in entries)
    assert verify_index(FolderStore(small.path)).problems == ()


def test_stored_embeddings_are_the_encoders(small: SmallIndex) -> None:
    small.build()
    reader = IndexReader(small.path)
    encoder = load_checkpoint(str(small.models / "checkpoint")).load_encoder(device="cpu")
    fetched = reader.fetch([PassageRef(0, 0)])[0]
    rows = [fetched.tokens[i : i + 16] for i in range(0, len(fetched.tokens), 16)]
    padded = np.stack([np.pad(row, (0, 16 - len(row))) for row in rows]).astype(np.int32)
    expected = encoder.encode(padded, np.array([len(row) for row in rows], np.int16))
    assert np.array_equal(fetched.embeddings, expected)


def test_metadata_is_kept(small: SmallIndex) -> None:
    small.build()
    reader = IndexReader(small.path)
    assert reader.describe(PassageRef(0, 0)).metadata == {"year": 1900, "importance": 0.0}


def test_running_again_changes_nothing(small: SmallIndex) -> None:
    first = small.build()
    files = {path: path.stat().st_mtime_ns for path in small.path.rglob("*") if path.is_file()}
    second = small.build()
    assert (second.committed, second.version, second.encoded_chunks, second.unchanged) == (False, 1, 0, 60)
    assert (second.content_id, second.build_id) == (first.content_id, first.build_id)
    assert {path: path.stat().st_mtime_ns for path in small.path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_counts_give_equal_indexes(tmp_path: Path, own_cache: Path, workers: int) -> None:
    alone = SmallIndex(tmp_path / "a").build(workers=0)
    many = SmallIndex(tmp_path / "b").build(workers=workers)
    assert (many.content_id, many.build_id) == (alone.content_id, alone.build_id)


def test_shards_side_by_side_on_the_device_give_an_equal_index(tmp_path: Path, own_cache: Path) -> None:
    one, three = SmallIndex(tmp_path / "1"), SmallIndex(tmp_path / "3")
    report = one.build(shard_bytes=2_000)
    with LocalEngine(0, device_threads=3) as engine:
        again = build_index(replace(three.options, shard_bytes=2_000), engine)
    assert (again.content_id, again.build_id) == (report.content_id, report.build_id)
    for stage in ("embeddings", "vectors"):
        assert {"read", "load", "model", "check", "write"} <= set(again.parts[stage])
        assert sum(again.parts[stage].values()) <= again.steps[stage] + 0.01


class _OnDevice:
    """Notes who computes, in which thread, and how many did so at one time; each takes a while longer than it needs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.threads, self.seen = 0, set[int](), set[str]()
        self._now, self._lock = 0, threading.Lock()
        for owner, name in ((ChunkEncoder, "_encode_plain"), (Retriever, "_embed_ids"), (ChunkScorer, "_score_bucket")):
            monkeypatch.setattr(owner, name, self._noting(name, getattr(owner, name)))

    def _noting(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with self._lock:
                self._now += 1
                self.most = max(self.most, self._now)
                self.threads.add(threading.get_ident())
                self.seen.add(name)
            time.sleep(0.01)
            try:
                return compute(*arguments)
            finally:
                with self._lock:
                    self._now -= 1

        return call


def test_threads_take_turns_on_the_device(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_turns", lambda _: True)
    noted, small = _OnDevice(monkeypatch), SmallIndex(tmp_path)
    with LocalEngine(0, device_threads=3) as engine:
        build_index(replace(small.options, shard_bytes=2_000, score=True), engine)
    assert noted.seen == {"_encode_plain", "_embed_ids", "_score_bucket"}
    assert len(noted.threads) > 1
    assert noted.most == 1


def test_the_content_id_does_not_depend_on_files_or_shards(tmp_path: Path, own_cache: Path) -> None:
    one = SmallIndex(tmp_path / "a").build()
    split = SmallIndex(tmp_path / "b", documents(60)[40:] + documents(60)[:10])
    split.write(documents(60)[10:40], "more.jsonl")
    other = split.build(shard_bytes=700)
    assert other.content_id == one.content_id
    assert other.build_id != one.build_id


def test_an_update_encodes_only_what_changed(small: SmallIndex, tmp_path: Path) -> None:
    small.build()
    records = documents(60)
    records[5] = records[5] | {"text": "An edited text. " + records[5]["text"]}
    records.append({"id": "doc-9999", "text": "A document that is new."})
    small.write(records)
    report = small.build()
    assert (report.new, report.changed, report.unchanged, report.version) == (1, 1, 59, 2)
    assert report.encoded_chunks < 0.1 * report.chunks
    fresh = SmallIndex(tmp_path / "fresh", records)
    assert fresh.build().content_id == report.content_id
    updated, anew = passages(IndexReader(small.path)), passages(IndexReader(fresh.path))
    assert updated.keys() == anew.keys()
    for document, entries in anew.items():
        assert [e[:5] for e in updated[document]] == [e[:5] for e in entries]
        assert all(np.array_equal(a[5], b[5]) for a, b in zip(updated[document], entries, strict=True))
    assert verify_index(FolderStore(small.path)).problems == ()


def test_removed_passages_are_never_found(small: SmallIndex) -> None:
    small.build()
    edited = [record | {"text": "Something else."} if i == 7 else record for i, record in enumerate(documents(60))]
    small.write(edited)
    small.build()
    reader = IndexReader(small.path)
    query = np.ones(48, np.float32)
    hits = [reader.describe(ref) for ref, _ in reader.search(query / np.linalg.norm(query), 1000)]
    assert [hit.text for hit in hits if hit.document_id == "doc-0007"] == ["Something else."]
    assert len(hits) == reader.manifest.counts.passages


def test_nothing_is_deleted_without_being_told(small: SmallIndex) -> None:
    small.build()
    small.write(documents(60)[:50])
    kept = small.build()
    assert (kept.missing, kept.deleted, kept.committed) == (10, 0, False)
    gone = small.build(delete_missing=True)
    assert (gone.missing, gone.deleted, gone.version) == (0, 10, 2)
    manifest = read_manifest(FolderStore(small.path))
    assert [d.document_id for d in live_documents(FolderStore(small.path), manifest)] == [
        d["id"] for d in documents(50)
    ]


def test_bad_records_are_quarantined_with_their_reasons(small: SmallIndex) -> None:
    bad: list[Any] = [
        "{broken",
        {"id": "no-text"},
        {"id": "empty", "text": "  \n"},
        documents(1)[0],
        {"id": "doc-0003", "text": "other"},
    ]
    small.write([*documents(60), *bad])
    report = small.build()
    assert (report.documents_in, report.indexed, report.filtered, report.quarantined) == (65, 60, 2, 3)
    assert report.reasons == {"duplicate": 1, "duplicate_id": 1, "empty": 1, "malformed_json": 1, "missing_field": 1}
    small.write([*documents(60), {"id": "no-text", "text": "mended"}])
    assert small.build().reasons == {}


class Poison:
    """Makes a stage's model fail on passages that hold a marker, and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcome: Exception | float) -> None:
        self.real = stages._retriever
        self.outcome = outcome
        self.active = True
        monkeypatch.setattr(stages, "_retriever", lambda reference, device: self)

    dim = 48

    def embed(self, texts: list[str]) -> tuple[Any, Any]:
        vectors, truncated = self.real(self.folder, "cpu").embed(texts)
        hit = [i for i, text in enumerate(texts) if "poison" in text]
        if hit and self.active:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            vectors = vectors.copy()
            vectors[hit] = self.outcome
        return vectors, truncated

    def embed_queries(self, texts: list[str]) -> Any:
        return self.real(self.folder, "cpu").embed_queries(texts)


@pytest.mark.parametrize("outcome", [ValueError("cannot read this"), float("nan")])
def test_a_poisonous_document_leaves_alone(
    small: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Any
) -> None:
    poisonous = [{"id": "poisoned-1", "text": "One poison here."}, {"id": "poisoned-2", "text": "And poison there."}]
    small.write([*documents(60), *poisonous])
    poison = Poison(monkeypatch, outcome)
    poison.folder = str(small.models / "encoder")
    report = small.build()
    assert report.reasons == {"embed_failed": 2}
    assert (report.documents_in, report.indexed, report.quarantined) == (62, 60, 2)
    clean = SmallIndex(tmp_path / "clean")
    assert clean.build().content_id == report.content_id
    # They stay out, without being tried, until they are asked for again.
    again = small.build()
    assert (again.reasons, again.committed, again.quarantined) == ({"embed_failed": 2}, False, 2)
    poison.active = False
    mended = small.build(retry_quarantined=True)
    assert (mended.reasons, mended.indexed, mended.version) == ({}, 62, 2)


def test_a_fault_that_is_nobodys_fails_the_run_and_keeps_what_is_done(
    small: SmallIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, RuntimeError("device lost"))
    poison.folder = str(small.models / "encoder")
    small.write([record | {"text": record["text"] + " poison"} for record in documents(60)])
    with pytest.raises(RuntimeError, match="device lost"):
        small.build()
    assert not (small.path / "versions").exists()
    poison.active = False
    report = small.build()
    assert report.indexed == 60
    assert report.encoded_chunks < report.chunks  # the first shard's embeddings were there already


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_seen(dtype: type, bad: float) -> None:
    rows = np.full((5_000, 3), np.finfo(np.float16).max, dtype)
    rows[::2] = np.finfo(np.float16).min
    rows[1] = 0.0, -0.0, np.finfo(np.float16).smallest_subnormal
    assert stages._all_finite(rows)
    assert stages._all_finite(rows[:0])
    rows[4_999, 1] = bad
    assert not stages._all_finite(rows)


def test_non_finite_output_everywhere_is_not_a_documents_fault(
    small: SmallIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, float("inf"))
    poison.folder = str(small.models / "encoder")
    small.write([record | {"text": record["text"] + " poison"} for record in documents(60)])
    with pytest.raises(StageError, match="not finite for any of"):
        small.build()


def test_adaptive_chunk_sizes(small: SmallIndex) -> None:
    options = small.with_models(chunk_size_field="importance")
    options = replace(options, corpus=replace(options.corpus, chunk_size_field="importance"))
    small.options = options
    report = small.build()
    reader = IndexReader(small.path)
    assert {shard.chunk_size for shard in reader.manifest.shards} == {8, 16, 32}
    for number in range(len(reader.manifest.shards)):
        ref = PassageRef(number, 0)
        importance = float(reader.describe(ref).metadata["importance"])
        expected = 8 if importance >= 2 / 3 else 16 if importance >= 1 / 3 else 32
        assert reader.fetch([ref])[0].chunk_size == expected
    assert verify_index(FolderStore(small.path)).problems == ()
    assert report.indexed == 60


def test_scores_are_added_without_encoding_again(small: SmallIndex) -> None:
    plain = small.build()
    scored = small.build(score=True)
    assert (scored.version, scored.encoded_chunks, scored.new) == (2, 0, 0)
    assert scored.content_id != plain.content_id
    fetched = IndexReader(small.path).fetch([PassageRef(0, 0)])[0]
    assert fetched.scores is not None
    assert (fetched.scores > 0).all()
    small.write([*documents(60), {"id": "x", "text": "One more document."}])
    assert small.build().version == 3  # new shards get the column without being asked
    assert all("scores" in shard.tables for shard in read_manifest(FolderStore(small.path)).shards)


def test_other_models_or_settings_are_refused_or_rebuilt(small: SmallIndex) -> None:
    small.build()
    small.options = small.with_models(max_passage_tokens=32)
    with pytest.raises(FingerprintMismatchError, match="max_passage_tokens 64, now 32"):
        small.build()
    report = small.build(rebuild=True)
    assert (report.version, report.new) == (2, 60)
    assert verify_index(FolderStore(small.path)).problems == ()


def test_a_chunk_size_that_the_checkpoint_was_not_made_for(small: SmallIndex) -> None:
    small.options = small.with_models(chunk_size=11)
    with pytest.raises(ConfigError, match="chunk size 11 was asked for, the checkpoint was made for"):
        small.build()
    assert not small.path.exists()


def test_an_empty_corpus_commits_nothing(small: SmallIndex) -> None:
    small.write([{"id": "a", "text": " "}])
    with pytest.raises(CorpusError, match="none of 1 documents can be indexed"):
        small.build()
    assert not (small.path / "versions").exists()


def test_the_recall_gate_publishes_nothing_below_it(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    from refrag.pipelines import indexing

    monkeypatch.setattr(indexing, "_tune", lambda *arguments: (1, 0.4))
    with pytest.raises(RecallGateError, match=r"recall@10 is 0\.400 .* expected at least 0\.5"):
        small.build()
    assert not (small.path / "versions").exists()


def test_two_builders_at_once(small: SmallIndex) -> None:
    with FolderStore(small.path).lock(), pytest.raises(IndexLockedError, match="another build is running"):
        small.build()
    assert small.build().version == 1


def test_without_the_lock_the_commit_still_has_one_winner(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see the same parent; whoever links versions/1.json first has committed."""
    from refrag.pipelines import build

    def overtaken(store: Store, manifest: Any) -> None:
        commit(store, replace(manifest, content_id="f" * 64))
        commit(store, manifest)

    monkeypatch.setattr(build, "commit", overtaken)
    with pytest.raises(CommitConflictError, match="another build committed version 1"):
        small.build()
    assert read_manifest(FolderStore(small.path)).content_id == "f" * 64


def test_accounts_must_balance() -> None:
    check_accounts(documents_in=10, indexed=7, rejected=3, missing=2, held_in_index=9)
    with pytest.raises(AccountingError, match=r"10 documents came in; 6 indexed \+ 3 filtered"):
        check_accounts(documents_in=10, indexed=6, rejected=3, missing=0, held_in_index=6)
    with pytest.raises(AccountingError, match="the generation holds 8 documents"):
        check_accounts(documents_in=10, indexed=7, rejected=3, missing=2, held_in_index=8)


def test_work_in_progress_is_gone_after_the_commit(small: SmallIndex) -> None:
    small.build()
    assert not (small.path / "work").exists()
    assert verify_index(FolderStore(small.path)).unlisted == ()
    json.loads((small.path / "versions" / "1.json").read_text())
