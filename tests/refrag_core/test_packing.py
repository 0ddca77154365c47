"""Packing a checkpoint: what is lost, what has which bytes, and that the packed one is a checkpoint of its own."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refrag.schemas import checkpoint_schema
from refrag_core import packing
from refrag_core.adapter import Adapter
from refrag_core.checkpoint import Checkpoint
from refrag_core.digests import digest_file, digest_json
from refrag_core.errors import ConfigError, FingerprintMismatchError, UsageError
from refrag_core.packing import PackOptions, pack_checkpoint, pack_options
from refrag_core.stored_weights import read_weights, stored_forms
from tests.command_line import call, without_traceback
from tests.tiny_models import checkpoint
from tests.trained_checkpoints import trained_looking


@pytest.fixture(autouse=True)
def _cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints are remembered; no real model is looked at."""
    monkeypatch.setattr(packing, "SHORT_NAMES", {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(root / "cache"))
        return trained_looking(checkpoint(root / "models"), root / "checkpoint")


def updates(made: Checkpoint) -> dict[str, torch.Tensor]:
    adapter = made.load_adapter()
    assert adapter is not None
    return {name: adapter.update(name).dense(1.0) for name in adapter.layers}


def test_int8_keeps_every_entry_within_a_254th_of_its_rows_largest(trained: Checkpoint, tmp_path: Path) -> None:
    pack_checkpoint(trained, tmp_path / "packed")
    before, after = trained.load_trained_layers(), Checkpoint.load(tmp_path / "packed").load_trained_layers()
    assert before is not None
    assert after is not None
    assert before.keys() == after.keys()
    for name, given in before.items():
        if given.ndim == 2 and name != "gates":
            bound = given.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-5)
            assert bool(((after[name] - given).abs() <= bound).all()), name
            assert not torch.equal(after[name], given)
        else:
            assert torch.equal(after[name], given), name  # they were float16 before


def test_the_decoders_update_is_nearly_the_same(trained: Checkpoint, tmp_path: Path) -> None:
    report = pack_checkpoint(trained, tmp_path / "packed")
    after = updates(Checkpoint.load(tmp_path / "packed"))
    for name, given in updates(trained).items():
        assert 0 < float((after[name] - given).norm() / given.norm()) < 0.01
    assert 0 < report.parts["adapter"].relative_error < 0.01


def test_another_of_its_chunk_sizes_can_be_the_default(trained: Checkpoint, tmp_path: Path) -> None:
    other = next(size for size in trained.config.chunk_sizes if size != trained.config.chunk_size)
    pack_checkpoint(trained, tmp_path / "packed", pack_options("int8", chunk_size=other))
    assert Checkpoint.load(tmp_path / "packed").config.chunk_size == other
    with pytest.raises(ConfigError, match=r"trained for chunk sizes .*, not 7"):
        pack_checkpoint(trained, tmp_path / "no", pack_options("int8", chunk_size=7))
    assert not (tmp_path / "no").exists()


def test_the_report_says_what_each_part_takes(trained: Checkpoint, tmp_path: Path) -> None:
    report = pack_checkpoint(trained, tmp_path / "packed")
    assert list(report.parts) == ["encoder", "adapter", "projection", "policy"]
    assert [part.dtype for part in report.parts.values()] == ["int8"] * 4
    files = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert files == [
        *("adapter-00001.safetensors", "config.json", "encoder-00001.safetensors"),
        *("policy.safetensors", "projection.safetensors", "training.json"),
    ]
    size = sum((tmp_path / "packed" / name).stat().st_size for name in files if name != "training.json")
    assert report.bytes == size < report.bytes_before
    assert report.parts["projection"].bytes < 0.55 * report.parts["projection"].bytes_before
    assert 0.0 < report.parts["policy"].relative_error < 0.01
    made = Checkpoint.load(tmp_path / "packed")
    assert (made.fingerprint, made.encode_fingerprint) == (report.fingerprint, report.encode_fingerprint)


def test_configs_are_valid_under_the_schema(trained: Checkpoint, tmp_path: Path) -> None:
    pack_checkpoint(trained, tmp_path / "packed")
    assert trained.folder is not None
    untrained = checkpoint(tmp_path / "models").save(tmp_path / "untrained").folder
    for folder in (trained.folder, tmp_path / "packed", untrained):
        assert folder is not None
        jsonschema.Draft202012Validator(checkpoint_schema()).validate(json.loads((folder / "config.json").read_text()))


def test_a_packed_checkpoint_has_an_identity_of_its_own(trained: Checkpoint, tmp_path: Path) -> None:
    made = [
        trained,
        *(
            Checkpoint.load(Path(pack_checkpoint(trained, tmp_path / dtype, pack_options(dtype)).output))
            for dtype in ("int8", "float32")
        ),
    ]
    assert len({one.fingerprint for one in made}) == 3
    assert len({one.encode_fingerprint for one in made}) == 3
    same = Checkpoint.load(Path(pack_checkpoint(trained, tmp_path / "same", pack_options("float16")).output))
    assert same.encode_fingerprint == trained.encode_fingerprint  # the encoder's very bytes
    assert same.fingerprint != trained.fingerprint  # its projection was float32
    again = pack_checkpoint(trained, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "int8" / "config.json").read_bytes()
    assert again.fingerprint == made[1].fingerprint


def test_saving_a_packed_checkpoint_gives_its_own_bytes(trained: Checkpoint, tmp_path: Path) -> None:
    pack_checkpoint(trained, tmp_path / "packed")
    loaded = Checkpoint.load(tmp_path / "packed")
    assert loaded.save(tmp_path / "copy").fingerprint == loaded.fingerprint
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (tmp_path / "packed" / path.name).read_bytes()


def test_its_encoder_is_nearly_the_same(trained: Checkpoint, tmp_path: Path) -> None:
    pack_checkpoint(trained, tmp_path / "packed")
    ids = np.random.default_rng(0).integers(4, 300, (6, 8), dtype=np.int32)
    lengths = np.full(6, 8)
    before = trained.load_encoder().encode(ids, lengths).astype(np.float32)
    after = Checkpoint.load(tmp_path / "packed").load_encoder().encode(ids, lengths).astype(np.float32)
    assert not np.array_equal(before, after)
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


def test_the_adapter_can_be_cut_to_a_rank(trained: Checkpoint, tmp_path: Path) -> None:
    options = PackOptions(adapter="float32", adapter_rank=2)
    report = pack_checkpoint(trained, tmp_path / "packed", options)
    adapter = Checkpoint.load(tmp_path / "packed").load_adapter()
    assert adapter is not None
    assert {weight.shape[0] for name, weight in adapter.state.items() if name.endswith(".down")} == {2}
    for name, given in updates(trained).items():
        best = torch.linalg.svdvals(given.double())[2:].square().sum().sqrt()
        error = (adapter.state[f"{name}.up"] @ adapter.state[f"{name}.down"] - given).norm()
        assert float(error) == pytest.approx(float(best), rel=1e-3)
    assert 0.0 < report.parts["adapter"].relative_error < 0.3


def test_factors_in_order_lose_the_last_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.linalg.qr(torch.randn((8, 3), generator=generator)).Q * torch.tensor([3.0, 2.0, 1.0])
    down = torch.randn((3, 5), generator=generator) * torch.tensor([[1.0], [1.0], [40.0]])
    cut = packing._cut(Adapter({"layer.up": up, "layer.down": down}, 1.0), 2)
    assert torch.equal(cut["layer.up"], up[:, :2])
    assert torch.equal(cut["layer.down"], down[:2])
    swapped = packing._cut(Adapter({"layer.up": up[:, [1, 0, 2]], "layer.down": down[[1, 0, 2]]}, 1.0), 2)
    error = (swapped["layer.up"] @ swapped["layer.down"] - up @ down).norm()
    assert float(error) < float((up[:, :2] @ down[:2] - up @ down).norm())


def test_places_of_the_training_machine_are_not_told(trained: Checkpoint, tmp_path: Path) -> None:
    report = pack_checkpoint(trained, tmp_path / "packed")
    record = json.loads((tmp_path / "packed" / "training.json").read_text())
    assert record["config"] == {"data": "tokens", "output": "runs/toy", "steps": 4}
    assert len(report.notes) == 2  # tiny models have no name that others know
    assert "a folder of this machine" in report.notes[0]


def test_a_model_that_has_a_short_name_is_called_by_it(
    trained: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SHORT_NAMES", {"tiny": object(), "absent": object()})
    real = packing.resolve_model
    monkeypatch.setattr(
        packing, "resolve_model", lambda name: trained.decoder_folder() if name == "tiny" else real(name)
    )
    pack_checkpoint(trained, tmp_path / "packed")
    config = Checkpoint.load(tmp_path / "packed").config
    assert config.decoder.reference == "tiny"
    assert config.encoder.reference == trained.config.encoder.reference


def test_packing_again_replaces_the_checkpoint_and_keeps_the_model_card(trained: Checkpoint, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "README.md").write_text("a card")
    pack_checkpoint(trained, packed)
    (packed / "adapter-00002.safetensors").write_bytes(b"of an older one")
    report = pack_checkpoint(trained, packed, pack_options("float16"))
    assert Checkpoint.load(packed).fingerprint == report.fingerprint
    assert (packed / "README.md").read_text() == "a card"
    assert not (packed / "adapter-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_no_place_for_a_checkpoint_stays_as_it_is(trained: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt and no checkpoint; expected a new folder"):
        pack_checkpoint(trained, tmp_path)
    assert trained.folder is not None
    with pytest.raises(UsageError, match="is the checkpoint that is to be packed"):
        pack_checkpoint(trained, trained.folder)


def test_what_cannot_be_packed(trained: Checkpoint, tmp_path: Path) -> None:
    untrained = checkpoint(tmp_path / "models").save(tmp_path / "untrained")
    with pytest.raises(ConfigError, match="is not trained; expected trained weights to pack"):
        pack_checkpoint(untrained, tmp_path / "packed")
    inside = replace(
        trained,
        config=replace(trained.config, encoder=replace(trained.config.encoder, reference="./encoder")),
    )
    with pytest.raises(ConfigError, match="carries a model of its own"):
        pack_checkpoint(inside, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("dtype", "parts", "message"),
    [
        ("int4", [], "--dtype is 'int4'; expected one of float32, float16, int8, int5"),
        (
            *("int8", ["policy=int4"]),
            "--part is 'policy=int4'; expected one of encoder, adapter, projection, policy, then '=' and one of "
            "float32, float16, int8, int5",
        ),
        ("int8", ["head=int8"], "--part is 'head=int8'"),
        ("int8", ["adapter"], "--part is 'adapter'"),
    ],
)
def test_forms_that_there_are_not(dtype: str, parts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        pack_options(dtype, parts)


def test_forms_of_single_parts() -> None:
    assert pack_options("int8", ["adapter=float16", "projection=float32"]) == PackOptions(
        adapter="float16", projection="float32"
    )
    assert pack_options("float32").policy == "float32"
    assert pack_options("int8", ["policy=int5"]) == PackOptions(policy="int5")


def test_every_part_in_int5(trained: Checkpoint, tmp_path: Path) -> None:
    report = pack_checkpoint(trained, tmp_path / "packed", pack_options("int5"))
    bytes_in_int8 = pack_checkpoint(trained, tmp_path / "int8").parts
    for name, part in report.parts.items():
        assert part.dtype == "int5"
        assert 0.01 < part.relative_error < 0.1, name
        assert part.bytes < bytes_in_int8[name].bytes, name
    made = Checkpoint.load(tmp_path / "packed")
    assert (made.config.projection_dtype, made.config.policy.dtype) == ("int5", "int5")
    assert {weight.dtype for weight in made.policy.state_dict().values()} == {torch.float32}
    for name in ("policy", "projection"):
        forms = set(stored_forms(load_file(tmp_path / "packed" / f"{name}.safetensors")).values())
        assert forms == {"int5", "float16"}
    jsonschema.Draft202012Validator(checkpoint_schema()).validate(
        json.loads((tmp_path / "packed" / "config.json").read_text())
    )
    again = pack_checkpoint(made, tmp_path / "again", pack_options("int5"))
    assert again.fingerprint == made.fingerprint
    assert [part.relative_error for part in again.parts.values()] == [0.0] * 4


@pytest.mark.parametrize("dtype", ["int8", "int5"])
def test_the_fingerprint_is_of_the_files_as_they_are(trained: Checkpoint, tmp_path: Path, dtype: str) -> None:
    report = pack_checkpoint(trained, tmp_path / "packed", pack_options(dtype))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["encoder"]["reference"] = config["decoder"]["reference"] = ""
    digests = {name: digest_file(tmp_path / "packed" / f"{name}.safetensors") for name in ("projection", "policy")}
    assert report.fingerprint == digest_json({"config": config, **digests})


def test_a_projection_in_another_form_is_refused(trained: Checkpoint, tmp_path: Path) -> None:
    for dtype in ("int8", "int5"):
        pack_checkpoint(trained, tmp_path / dtype, pack_options(dtype))
    shutil.copyfile(tmp_path / "int8" / "projection.safetensors", tmp_path / "int5" / "projection.safetensors")
    with pytest.raises(ConfigError, match=r"'hidden\.weight' as int8; expected int5, for the checkpoint's config says"):
        Checkpoint.load(tmp_path / "int5")


def test_configs_from_before_keep_their_members(trained: Checkpoint, tmp_path: Path) -> None:
    config = trained.config.to_json()
    assert "projection_dtype" not in config
    policy = config["policy"]
    assert isinstance(policy, dict)
    assert "dtype" not in policy
    packed = pack_checkpoint(trained, tmp_path / "packed", pack_options("float16"))
    assert json.loads((Path(packed.output) / "config.json").read_text())["projection_dtype"] == "float16"


def test_an_altered_file_is_refused(trained: Checkpoint, tmp_path: Path) -> None:
    pack_checkpoint(trained, tmp_path / "packed")
    path = tmp_path / "packed" / "adapter-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    made = Checkpoint.load(tmp_path / "packed")
    with pytest.raises(FingerprintMismatchError, match="get the checkpoint again"):
        made.load_adapter()
    assert read_weights([path])  # it still is a file of weights: only its digest says


def test_the_command_says_what_it_made(trained: Checkpoint, tmp_path: Path) -> None:
    done = call("checkpoint", "pack", trained.folder, "-o", tmp_path / "packed", "--part", "adapter=float16", "--json")
    assert done.code == 0
    assert done.json["parts"]["adapter"]["dtype"] == "float16"
    assert done.json["fingerprint"] == Checkpoint.load(tmp_path / "packed").fingerprint
    assert "note: it names" in done.err
    shown = call("checkpoint", "pack", trained.folder, "-o", tmp_path / "packed")
    rows = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert rows["checkpoint"] == str(tmp_path / "packed")
    assert re.fullmatch(r"int8, [\d,]+ weights, [\d.]+ KiB \([\d.]+ KiB before\), changed by 0\.\d\d%", rows["encoder"])


def test_the_command_refuses_in_one_line(trained: Checkpoint, tmp_path: Path) -> None:
    refused = call("checkpoint", "pack", trained.folder, "-o", tmp_path / "packed", "--dtype", "int4")
    assert refused.code == 2
    assert without_traceback(refused) == "error: --dtype is 'int4'; expected one of float32, float16, int8, int5"
