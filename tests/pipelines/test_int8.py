"""Indexes with int8 chunk embeddings: what is stored, what it is worth to every reader, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from refrag.pipelines import stages
from refrag.pipelines.components import ModelOptions, resolve_models
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.estimate import estimate_build
from refrag.pipelines.progress import Silent
from refrag.pipelines.repair import RepairOptions, repair_index
from refrag.schemas import arrow
from refrag_core.checkpoint import load_checkpoint
from refrag_core.embedding_storage import Int8Rows, dequantise_rows, quantise_rows
from refrag_core.errors import ConfigError, CorruptIndexError, FingerprintMismatchError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import Manifest, encode_manifest, read_manifest
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.storage import Store
from refrag_core.tables import fixed_binary, write_table
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex, documents


def int8_index(root: Path, records: list[Any] | None = None, **changes: Any) -> SmallIndex:
    small = SmallIndex(root, documents(24) if records is None else records, **changes)
    small.options = small.with_models(embedding_dtype="int8")
    return small


@pytest.fixture
def small(tmp_path: Path, own_cache: Path) -> SmallIndex:
    return int8_index(tmp_path)


def every_passage(reader: IndexReader) -> list[PassageRef]:
    return [PassageRef(n, row) for n, shard in enumerate(reader.manifest.shards) for row in range(shard.passages)]


def encoded(small: SmallIndex, tokens: np.ndarray) -> np.ndarray:
    """What the encoder itself makes of one passage's tokens, float16."""
    rows = [tokens[i : i + 16] for i in range(0, len(tokens), 16)]
    padded = np.stack([np.pad(row, (0, 16 - len(row))) for row in rows]).astype(np.int32)
    encoder = load_checkpoint(str(small.models / "checkpoint")).load_encoder(device="cpu")
    return np.asarray(encoder.encode(padded, np.array([len(row) for row in rows], np.int16)))


def test_stored_rows_are_the_encoders_within_half_a_scale(small: SmallIndex) -> None:
    small.build()
    reader = IndexReader(small.path)
    for fetched in reader.fetch(every_passage(reader)[:5]):
        exact = encoded(small, fetched.tokens)
        assert isinstance(fetched.embeddings, Int8Rows)
        expected = quantise_rows(exact)
        assert np.array_equal(fetched.embeddings.codes, expected.codes)
        assert np.array_equal(fetched.embeddings.scales, expected.scales)
        error = np.abs(dequantise_rows(fetched.embeddings) - exact.astype(np.float32))
        bound = np.abs(exact.astype(np.float32)).max(axis=1, keepdims=True) / 254
        assert (error <= bound * (1 + 1e-5)).all()
        assert not fetched.embeddings.codes.flags.owndata  # mapped, not read
    assert verify_index(Store(small.path)).problems == ()


def test_another_dtype_is_other_content_and_needs_rebuild(small: SmallIndex) -> None:
    first = small.build()
    options = small.with_models(embedding_dtype="float16")
    with pytest.raises(FingerprintMismatchError, match="embedding_dtype int8, now float16"):
        small.build(models=options.models)
    rebuilt = small.build(models=options.models, rebuild=True)
    assert (rebuilt.version, rebuilt.encoded_chunks) == (2, rebuilt.chunks)
    assert rebuilt.content_id != first.content_id
    assert not isinstance(IndexReader(small.path).fetch([PassageRef(0, 0)])[0].embeddings, Int8Rows)
    old = IndexReader(small.path, 1)  # the generation before is still read in its own form
    assert isinstance(old.fetch([PassageRef(0, 0)])[0].embeddings, Int8Rows)


def test_an_update_encodes_only_what_changed(small: SmallIndex, tmp_path: Path) -> None:
    small.build()
    small.write([*documents(24)[1:], {"id": "new", "text": "A new harbour of glass."}])
    report = small.build(delete_missing=True)
    assert (report.new, report.deleted, report.unchanged) == (1, 1, 23)
    fresh = int8_index(tmp_path / "fresh", [*documents(24)[1:], {"id": "new", "text": "A new harbour of glass."}])
    assert fresh.build().content_id == report.content_id


def test_only_the_two_forms_are_taken(small: SmallIndex) -> None:
    options = ModelOptions(checkpoint=str(small.models / "checkpoint"), embedding_dtype="float32")
    with pytest.raises(ConfigError, match="asked for as float32, expected float16 or int8"):
        resolve_models(Store(small.path), replace(options, retriever=str(small.models / "encoder")))


def test_the_plan_counts_the_bytes(small: SmallIndex) -> None:
    """The whole difference between the two forms is d - 4 bytes a chunk."""

    def planned(options: Any) -> Any:
        with LocalEngine(0) as engine:
            return estimate_build(options, engine)

    half, codes = planned(small.with_models(embedding_dtype="float16")), planned(small.options)
    assert half.chunks == codes.chunks > 0
    assert half.disk_bytes - codes.disk_bytes == pytest.approx(half.chunks * (48 - 4), rel=0.5)


def test_a_document_with_nan_is_quarantined(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stages._encoder

    class Poisoned:
        dim = 48

        def encode(self, tokens: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
            rows = real(str(checkpoint), "cpu").encode(tokens, num_tokens).copy()
            rows[(tokens == poison).any(axis=1)] = np.nan
            return np.asarray(rows)

    from refrag_core.models import load_tokenizer

    (poison,) = load_tokenizer(small.models / "decoder").encode("#", add_special_tokens=False).ids
    checkpoint = small.models / "checkpoint"
    small.write([*documents(24), {"id": "poisoned", "text": "Stone # glass."}])
    monkeypatch.setattr(stages, "_encoder", lambda folder, device: Poisoned())
    report = small.build()
    assert report.reasons == {"encode_failed": 1}
    assert (report.indexed, report.quarantined) == (24, 1)


# --- reading ------------------------------------------------------------------------------------------


def test_an_answer_composes_the_dequantised_rows(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the floats that the codes stand for, the same runtime says the same, token for token."""
    small.build()
    runtime = Runtime.open(small.path, device="cpu")
    question, options = "Which river is silent?", AskOptions(top_k=3, policy="none", max_new_tokens=16)
    answer = runtime.ask(question, options)
    learned = runtime.ask(question, replace(options, policy="learned", expansion_fraction=0.3))
    fetch = runtime.reader.fetch

    def floats(refs: Any) -> list[Any]:
        return [replace(p, embeddings=dequantise_rows(p.embeddings)) for p in fetch(refs)]  # type: ignore[arg-type]

    monkeypatch.setattr(runtime.reader, "fetch", floats)
    assert runtime.ask(question, options).answer == answer.answer
    again = runtime.ask(question, replace(options, policy="learned", expansion_fraction=0.3))
    assert [used.expanded for used in again.passages] == [used.expanded for used in learned.passages]
    assert again.answer == learned.answer


def test_text_from_outside_is_stored_as_the_index_stores_its_own(small: SmallIndex) -> None:
    small.build()
    runtime = Runtime.open(small.path, device="cpu")
    shown, stored = runtime.reader.describe(PassageRef(0, 0)), runtime.reader.fetch([PassageRef(0, 0)])[0]
    made = runtime.encode_text("notes", shown.text)[0][1]
    assert isinstance(made.embeddings, Int8Rows)
    assert isinstance(stored.embeddings, Int8Rows)
    assert np.array_equal(made.embeddings.codes, stored.embeddings.codes)
    answer = runtime.ask("Which river?", AskOptions(policy="none", max_new_tokens=4), given={"notes": shown.text})
    assert answer.passages[0].score is None


# --- damage -------------------------------------------------------------------------------------------


def forged(small: SmallIndex, rows: Int8Rows | np.ndarray, schema: pa.Schema) -> tuple[Manifest, str]:
    """The index with other embeddings in its first shard under a manifest that lists their true digest."""
    store = Store(small.path)
    manifest = read_manifest(store)
    name = manifest.shards[0].tables["embeddings"]
    columns = [fixed_binary(rows.codes), pa.array(rows.scales)] if isinstance(rows, Int8Rows) else [fixed_binary(rows)]
    store.remove(name)
    write_table(store.path(name), pa.Table.from_arrays(columns, schema=schema))
    liar = replace(manifest, files={**manifest.files, name: store.record(name)})
    (small.path / manifest.name).write_bytes(encode_manifest(liar))
    return manifest, name


def set_code(rows: Int8Rows) -> None:
    rows.codes[0, 0] = -128


def set_nan(rows: Int8Rows) -> None:
    rows.scales[0] = np.nan


def set_negative(rows: Int8Rows) -> None:
    rows.scales[0] = -1.0


def set_zero(rows: Int8Rows) -> None:
    rows.scales[0] = 0.0


@pytest.mark.parametrize("damage", [set_code, set_nan, set_negative, set_zero])
def test_verify_finds_what_quantising_cannot_give(small: SmallIndex, damage: Callable[[Int8Rows], None]) -> None:
    small.build()
    chunks = read_manifest(Store(small.path)).shards[0].chunks
    rows = Int8Rows(np.ones((chunks, 48), np.int8), np.ones(chunks, np.float32))
    damage(rows)
    _, name = forged(small, rows, arrow.embeddings(48, "int8"))
    assert [(p.file, p.found) for p in verify_index(Store(small.path)).problems] == [
        (name, "some scale or code is none that quantising gives")
    ]


def test_verify_and_open_refuse_the_other_form(small: SmallIndex) -> None:
    small.build()
    chunks = read_manifest(Store(small.path)).shards[0].chunks
    _, name = forged(small, np.ones((chunks, 48), np.float16), arrow.embeddings(48))
    assert [(p.file, p.found) for p in verify_index(Store(small.path)).problems] == [
        (name, "its columns are not those of 48 entries a chunk in int8")
    ]
    with pytest.raises(CorruptIndexError, match="column 'embedding' has 96 bytes a row, expected 48"):
        IndexReader(small.path).fetch([PassageRef(0, 0)])


def test_repair_makes_the_same_bytes_again(small: SmallIndex) -> None:
    small.build()
    manifest = read_manifest(Store(small.path))
    name = manifest.shards[0].tables["embeddings"]
    before = (small.path / name).read_bytes()
    (small.path / name).unlink()
    options = RepairOptions(index=small.path, checkpoint=str(small.models / "checkpoint"), device="cpu")
    with LocalEngine(0) as engine:
        assert repair_index(options, engine, Silent()).repaired == (name,)
    assert (small.path / name).read_bytes() == before
