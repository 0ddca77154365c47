"""Decoders written with their adapter merged, and decoders of which only the input embeddings are loaded."""

import json
from pathlib import Path

import pytest
import torch

from refrag_core.checkpoint import Checkpoint
from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder
from refrag_core.errors import ConfigError
from refrag_core.merged_decoder import merged_folder, merged_name, write_merged
from refrag_core.models import fingerprint_tokenizer, load_tokenizer
from tests import tiny_models


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Fingerprints and merged decoders are kept there."""


@pytest.fixture
def adapted(tmp_path: Path) -> Checkpoint:
    return tiny_models.adapted_checkpoint(tmp_path / "models")


def greedy(decoder: Decoder) -> list[int]:
    prompt = decoder.embed(torch.arange(5, 25))
    return [token for (token,) in decoder.generate(pad_batch([prompt]), max_new_tokens=24)]


def test_what_is_written_decodes_as_decoder_and_adapter_do(adapted: Checkpoint, tmp_path: Path) -> None:
    source, output = adapted.decoder_folder(), tmp_path / "merged"
    (source / "LICENSE").write_text("as you like")
    name = write_merged(adapted, source, output)
    expected = Decoder.load(source, adapter=adapted.load_adapter())
    found = Decoder.load(output)
    assert greedy(found) == greedy(expected) != greedy(Decoder.load(source))
    weights = dict(expected.model.named_parameters())
    assert all(torch.equal(weight, weights[key]) for key, weight in found.model.named_parameters())
    assert fingerprint_tokenizer(output) == fingerprint_tokenizer(source)
    assert (output / "LICENSE").read_text() == "as you like"
    assert json.loads((output / "refrag_decoder.json").read_text()) == {
        "name": name,
        "dtype": "float32",
        "decoder": adapted.config.decoder.reference,
    }
    assert [path.name for path in output.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_weights_are_written_as_they_are_asked_for(adapted: Checkpoint, tmp_path: Path) -> None:
    write_merged(adapted, adapted.decoder_folder(), tmp_path / "merged", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    found = Decoder.load(tmp_path / "merged", dtype=torch.bfloat16)
    expected = Decoder.load(adapted.decoder_folder(), dtype=torch.bfloat16, adapter=adapted.load_adapter())
    weights = dict(expected.model.named_parameters())
    assert all(torch.equal(weight, weights[key]) for key, weight in found.model.named_parameters())


def test_it_may_be_written_again_but_not_over_something_else(adapted: Checkpoint, tmp_path: Path) -> None:
    source = adapted.decoder_folder()
    name = write_merged(adapted, source, tmp_path / "merged")
    assert write_merged(adapted, source, tmp_path / "merged") == name
    with pytest.raises(ConfigError, match="holds something else; expected a new folder, or one that was written"):
        write_merged(adapted, source, source)
    (tmp_path / "empty").mkdir()
    assert write_merged(adapted, source, tmp_path / "empty") == name


def test_names_tell_decoders_and_adapters_apart(adapted: Checkpoint, tmp_path: Path) -> None:
    plain = tiny_models.checkpoint(tmp_path / "plain")
    names = {
        merged_name(adapted, adapted.decoder_folder()),
        merged_name(plain, plain.decoder_folder()),
        merged_name(plain, tiny_models.decoder_folder(tmp_path / "other", seed=1)),
    }
    assert len(names) == 3
    assert all(name.startswith("refrag-") and len(name) == 19 for name in names)


def test_the_cache_keeps_it_and_a_decoder_without_adapter_is_taken_as_it_is(
    adapted: Checkpoint, tmp_path: Path, own_cache: Path
) -> None:
    plain = tiny_models.checkpoint(tmp_path / "plain")
    assert merged_folder(plain, plain.decoder_folder(), torch.float32) == plain.decoder_folder()
    kept = merged_folder(adapted, adapted.decoder_folder(), torch.float32)
    assert own_cache in kept.parents
    written = (kept / "model.safetensors").stat().st_mtime_ns
    assert merged_folder(adapted, adapted.decoder_folder(), torch.float32) == kept
    assert (kept / "model.safetensors").stat().st_mtime_ns == written


# --- input embeddings alone --------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.DECODER_FAMILIES)
def test_input_embeddings_alone_are_those_of_the_whole_decoder(family: str, tmp_path: Path) -> None:
    folder = tiny_models.decoder_folder(tmp_path / family, family)
    whole, inputs = Decoder.load(folder), Decoder.load_inputs(folder)
    ids = torch.arange(20)
    assert torch.equal(inputs.embed(ids), whole.embed(ids))
    assert (inputs.dim, inputs.dtype, inputs.device) == (whole.dim, whole.dtype, whole.device)
    assert (inputs.max_positions, inputs.bos_id, inputs.eos_ids) == (whole.max_positions, whole.bos_id, whole.eos_ids)
    held = sum(weight.numel() for weight in inputs.model.parameters() if weight.device.type != "meta")
    assert held == whole.model.get_input_embeddings().weight.numel()


def test_an_adapter_of_the_embedding_is_in_it(tmp_path: Path) -> None:
    from refrag_core.adapter import Adapter

    folder = tiny_models.decoder_folder(tmp_path / "decoder")
    rows = load_tokenizer(folder).get_vocab_size()
    state = {}
    for name, shape in {"model.embed_tokens": (rows, 32), "model.layers.0.self_attn.q_proj": (32, 32)}.items():
        state |= {f"{name}.up": torch.ones(shape[0], 1), f"{name}.down": torch.ones(1, shape[1])}
    adapter = Adapter(state, 0.5)
    ids = torch.arange(20)
    found = Decoder.load_inputs(folder, adapter=adapter).embed(ids)
    assert torch.equal(found, Decoder.load(folder, adapter=adapter).embed(ids))
    assert not torch.equal(found, Decoder.load(folder).embed(ids))


def test_a_scaled_embedding_loads_the_whole_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refrag_core import decoder as module

    folder = tiny_models.decoder_folder(tmp_path / "decoder")
    monkeypatch.setattr(module, "_stored_table", lambda folder: None)
    assert greedy(Decoder.load_inputs(folder)) == greedy(Decoder.load(folder))
