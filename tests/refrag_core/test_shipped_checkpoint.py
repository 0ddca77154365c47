"""The checkpoint that comes with refrag: found by its decoder's weights, used unless another is asked for."""

from dataclasses import replace
from pathlib import Path

import pytest

from refrag import checkpoints
from refrag.pipelines.build import build_index
from refrag.pipelines.components import ModelOptions
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.progress import Silent
from refrag.pipelines.repair import RepairOptions, repair_index
from refrag_core import checkpoint as checkpoint_module
from refrag_core.checkpoint import Checkpoint, load_checkpoint, shipped_checkpoint
from refrag_core.errors import FingerprintMismatchError, UsageError
from refrag_core.manifest import read_manifest
from refrag_core.packing import pack_checkpoint, pack_options
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests.small_index import SmallIndex
from tests.tiny_models import decoder_folder
from tests.trained_checkpoints import trained_looking

LARGEST_BYTES = 32 << 20


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Fingerprints are remembered."""


def test_checkpoints_have_the_fingerprints_that_their_cards_say() -> None:
    for folder in checkpoints.shipped():
        assert f"Fingerprint `{Checkpoint.load(folder).fingerprint}`" in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shipped checkpoints: one, for the session's tiny decoder, in int8."""
    root = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(root / "cache"))
        patch.setattr("refrag_core.packing.SHORT_NAMES", {})
        small = SmallIndex(root)
        base = load_checkpoint(str(small.models / "checkpoint"))
        pack_checkpoint(trained_looking(base, root / "trained"), root / "checkpoints" / "refrag-tiny")
    return root / "checkpoints"


@pytest.fixture
def shipped(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """It, in the place where refrag looks."""
    monkeypatch.setattr(checkpoints, "ROOT", packed)
    return Checkpoint.load(packed / "refrag-tiny")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallIndex:
    """An index over the tiny models, which are the default ones."""
    small = SmallIndex(tmp_path)
    monkeypatch.setattr(checkpoint_module, "DEFAULT_DECODER", str(small.models / "decoder"))
    monkeypatch.setattr(checkpoint_module, "DEFAULT_ENCODER", str(small.models / "encoder"))
    models = ModelOptions(retriever=str(small.models / "encoder"), max_passage_tokens=64, device="cpu")
    small.options = replace(small.options, models=models)
    return small


def built_with(small: SmallIndex) -> str:
    return read_manifest(FolderStore(small.path)).checkpoint.fingerprint


def test_a_build_takes_it_by_default_and_answers_from_compressed_chunks(shipped: Checkpoint, small: SmallIndex) -> None:
    assert small.build().trained
    assert built_with(small) == shipped.fingerprint
    runtime = Runtime.open(small.path, device="cpu")
    answer = runtime.ask("Which river?", AskOptions(policy="learned", expansion_fraction=0.1, max_new_tokens=4))
    assert answer.stats.num_expanded < answer.stats.num_chunks
    assert runtime.trained


def test_int8_embeddings_and_another_of_its_chunk_sizes(shipped: Checkpoint, small: SmallIndex) -> None:
    small.options = small.with_models(embedding_dtype="int8", chunk_size=8)
    assert small.build().trained
    runtime = Runtime.open(small.path, device="cpu")
    runtime.ask("Which river?", AskOptions(policy="none", max_new_tokens=4))


def test_without_one_a_build_is_untrained(small: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "ROOT", tmp_path / "nothing")
    assert not small.build().trained
    assert shipped_checkpoint(str(small.models / "decoder")) is None


def test_another_decoder_or_a_named_encoder_is_untrained(
    shipped: Checkpoint, small: SmallIndex, tmp_path: Path
) -> None:
    other = str(decoder_folder(tmp_path / "other", seed=5))
    assert shipped_checkpoint(other) is None
    assert not load_checkpoint(decoder=other).config.trained
    small.options = small.with_models(encoder=str(small.models / "encoder"))
    assert not small.build().trained


def test_the_same_weights_elsewhere_are_the_same_decoder(
    shipped: Checkpoint, small: SmallIndex, tmp_path: Path
) -> None:
    copy = str(decoder_folder(tmp_path / "copy"))
    found = load_checkpoint(decoder=copy)
    assert found.fingerprint == shipped.fingerprint
    assert found.config.decoder.reference == copy
    assert str(found.decoder_folder()) == copy


def test_an_untrained_index_is_not_silently_made_anew(shipped: Checkpoint, small: SmallIndex) -> None:
    untrained = small.with_models(encoder=str(small.models / "encoder"))
    with LocalEngine(0) as engine:
        build_index(untrained, engine)
    with pytest.raises(FingerprintMismatchError, match="was built with other settings: encoder"):
        small.build()
    assert small.build(rebuild=True).trained


def test_an_index_of_the_same_checkpoint_in_another_form_is_refused(
    shipped: Checkpoint, small: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refrag_core.packing.SHORT_NAMES", {})
    small.build()
    pack_checkpoint(shipped, tmp_path / "float16", pack_options("float16"))
    with pytest.raises(FingerprintMismatchError, match="the checkpoint's encoder has fingerprint"):
        Runtime.open(small.path, device="cpu", checkpoint=str(tmp_path / "float16"))


def damage(small: SmallIndex, pattern: str) -> None:
    path = next(small.path.glob(pattern))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def repair(small: SmallIndex) -> None:
    with LocalEngine(0) as engine:
        repair_index(RepairOptions(index=small.path, device="cpu"), engine, Silent())


def test_repair_uses_the_index_s_own_checkpoint(
    shipped: Checkpoint, small: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.build()
    damage(small, "shards/*/embeddings-*.parquet")
    monkeypatch.setattr(checkpoints, "ROOT", tmp_path / "nothing")
    repair(small)
    assert verify_index(FolderStore(small.path)).problems == ()
    damage(small, "checkpoints/*/adapter-*.safetensors")
    with pytest.raises(UsageError, match="no corpus brings trained weights back: expected the checkpoint"):
        repair(small)
    assert next(small.path.glob("checkpoints/*/adapter-*.safetensors")).is_file()


def test_repair_takes_the_shipped_one_in_the_place_of_a_damaged_copy(shipped: Checkpoint, small: SmallIndex) -> None:
    small.build()
    damage(small, "checkpoints/*/encoder-*.safetensors")
    repair(small)
    assert verify_index(FolderStore(small.path)).problems == ()
    assert built_with(small) == shipped.fingerprint


def test_what_the_repository_holds_is_small_enough_and_whole() -> None:
    for folder in checkpoints.shipped():
        assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST_BYTES
        found = Checkpoint.load(folder)
        assert found.config.trained
        found.load_trained_layers()
        found.load_adapter()
        assert (folder / "README.md").is_file()
        assert found.fingerprint in (folder / "README.md").read_text(encoding="utf-8")
