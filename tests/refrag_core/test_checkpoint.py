import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refrag_core.checkpoint import Checkpoint, initialise_checkpoint, load_checkpoint
from refrag_core.errors import ConfigError, FingerprintMismatchError, ModelNotFoundError
from refrag_core.policy import with_match
from tests.tiny_models import D_DEC, D_ENC, cache_for, checkpoint, checkpoint_folder, decoder_folder, encoder_folder


@pytest.fixture(autouse=True)
def _cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAG_CACHE", str(cache_for(request, tmp_path_factory)))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_initialisation_is_deterministic_and_follows_its_seed(tmp_path: Path) -> None:
    first, again = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert first.fingerprint == again.fingerprint  # though their models are in other folders
    assert first.encode_fingerprint == again.encode_fingerprint
    other = checkpoint(tmp_path / "c", seed=1)
    assert other.fingerprint != first.fingerprint
    assert other.encode_fingerprint == first.encode_fingerprint
    assert (first.config.d_enc, first.config.d_dec, first.config.trained) == (D_ENC, D_DEC, False)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, query_dim=6)
    loaded = Checkpoint.load(made.save(tmp_path / "saved").folder or Path())
    assert loaded.config == made.config
    assert loaded.fingerprint == made.fingerprint
    given = torch.randn((3, D_ENC), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.projection(given), made.projection(given))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "policy.safetensors",
        "projection.safetensors",
    ]


def test_a_match_term_is_stored_and_a_config_without_it_has_none(tmp_path: Path) -> None:
    plain = checkpoint(tmp_path, query_dim=6)
    plain.save(tmp_path / "plain")
    assert "match_dim" not in json.loads((tmp_path / "plain" / "config.json").read_text())["policy"]
    assert Checkpoint.load(tmp_path / "plain").policy.match is None

    policy = with_match(plain.load_policy(), 3, seed=0)
    assert policy.match is not None
    torch.nn.init.normal_(policy.match.chunk.weight)
    shape = replace(plain.config.policy, match_dim=3)
    made = replace(plain, config=replace(plain.config, policy=shape), policy=policy)
    loaded = Checkpoint.load(made.save(tmp_path / "made").folder or Path())
    assert loaded.config.policy.match_dim == loaded.policy.match_dim == 3
    assert loaded.fingerprint == made.fingerprint != plain.fingerprint
    for name, weight in policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match_dim": 4}, "does not fit the checkpoint's config"),
        ({"match_dim": -1}, "query_dim 6 and match_dim -1; expected whole numbers"),
        ({"match_dim": True}, "match_dim True; expected whole numbers"),
        ({"match_dim": 4, "query_dim": 0}, "query_dim 0 and match_dim 4; expected .* the second only beside the first"),
    ],
)
def test_a_match_term_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = checkpoint_folder(tmp_path, query_dim=6)
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, policy=config["policy"] | changes)
    with pytest.raises(ConfigError, match=message):
        Checkpoint.load(folder)


def test_equal_checkpoints_are_equal_files(tmp_path: Path) -> None:
    made = checkpoint(tmp_path)
    made.save(tmp_path / "one")
    Checkpoint.load(tmp_path / "one").save(tmp_path / "two")
    for name in ("config.json", "policy.safetensors", "projection.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_loading_needs_no_encoder(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    shutil.rmtree(tmp_path / "encoder")
    loaded = load_checkpoint(str(folder))
    assert loaded.load_decoder().dim == D_DEC
    with pytest.raises(ModelNotFoundError):
        loaded.load_encoder()


def test_the_encoder_is_verified_when_it_is_loaded(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    loaded = load_checkpoint(str(folder))
    assert loaded.load_encoder().fingerprint == loaded.encode_fingerprint
    shutil.rmtree(tmp_path / "encoder")
    encoder_folder(tmp_path / "encoder", seed=1)
    with pytest.raises(FingerprintMismatchError, match=r"the encoder in .* has fingerprint"):
        loaded.load_encoder()


def test_another_decoder_or_tokenizer_is_refused(tmp_path: Path) -> None:
    loaded = load_checkpoint(str(checkpoint_folder(tmp_path)))
    path = tmp_path / "decoder" / "tokenizer.json"
    original = path.read_text()
    path.write_text(
        original.replace('"add_prefix_space":false', '"add_prefix_space":true').replace(
            '"add_prefix_space": false', '"add_prefix_space": true'
        )
    )
    for load in (loaded.load_encoder, loaded.load_decoder):
        with pytest.raises(FingerprintMismatchError, match="the decoder tokenizer in"):
            load()
    shutil.rmtree(tmp_path / "decoder")
    decoder_folder(tmp_path / "decoder", seed=1)
    with pytest.raises(FingerprintMismatchError, match="the decoder in"):
        loaded.load_decoder()


def test_a_reference_inside_the_checkpoint_travels_with_it(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    shutil.move(tmp_path / "encoder", folder / "encoder")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, encoder=config["encoder"] | {"reference": "./encoder"})
    shutil.move(folder, tmp_path / "elsewhere")
    assert load_checkpoint(str(tmp_path / "elsewhere")).load_encoder().dim == D_ENC


def test_copies_on_a_device_are_copies(tmp_path: Path) -> None:
    made = checkpoint(tmp_path)
    projection, policy = made.load_projection(), made.load_policy()
    assert projection is not made.projection
    assert policy is not made.policy
    assert torch.equal(projection.hidden.weight, made.projection.hidden.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "config has format 'other'; expected 'refrag-checkpoint'"),
        ({"format_version": 99}, "format version 99 and this refrag reads 1"),
        ({"chunk_size": 5}, "chunk_size 5 and chunk_sizes"),
        ({"chunk_sizes": [0, 16]}, r"chunk_sizes \[0, 16\]"),
        ({"trained": "yes"}, "'trained' that is no boolean"),
        ({"surprise": 1}, "does not have the fields of format version 1"),
        ({"encoder": {}}, "does not have the fields of format version 1"),
        ({"template": {}}, "are missing or unknown"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = checkpoint_folder(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        Checkpoint.load(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    save_file({"hidden.weight": torch.zeros(2, 2)}, folder / "projection.safetensors")
    with pytest.raises(ConfigError, match="does not fit the checkpoint's config"):
        Checkpoint.load(folder)
    (folder / "projection.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        Checkpoint.load(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path)
    (folder / "policy.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"lacks .*policy\.safetensors"):
        Checkpoint.load(folder)
    with pytest.raises(ModelNotFoundError, match="no checkpoint in"):
        Checkpoint.load(tmp_path / "decoder-of-nobody")
    with pytest.raises(ConfigError, match="config has format None"):
        load_checkpoint(str(tmp_path / "decoder"))


def test_models_beside_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given together with an encoder or a decoder"):
        load_checkpoint(str(checkpoint_folder(tmp_path)), encoder="all-minilm-l6-v2")


def test_an_extra_chunk_size_joins_the_others(tmp_path: Path) -> None:
    made = initialise_checkpoint(
        encoder_reference=str(encoder_folder(tmp_path / "encoder")),
        decoder_reference=str(decoder_folder(tmp_path / "decoder")),
        chunk_size=12,
    )
    assert made.config.chunk_sizes == (8, 12, 16, 32)


@pytest.mark.models
def test_the_untrained_checkpoint_is_the_same_every_time() -> None:
    first, again = initialise_checkpoint(), initialise_checkpoint()
    assert first.fingerprint == again.fingerprint
    assert (first.config.d_enc, first.config.d_dec, first.config.chunk_size) == (384, 576, 16)
    assert first.config.template.bos == (1,)
