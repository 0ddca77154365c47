"""Averaging checkpoints: the mean by hand, what it is refused for, and that the result is a checkpoint of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refrag_core.averaging import AverageOptions, average_checkpoints
from refrag_core.checkpoint import Checkpoint
from refrag_core.errors import ConfigError, UsageError
from refrag_core.policy import PointerPolicy
from refrag_core.stored_weights import write_weights
from tests.command_line import call, without_traceback
from tests.tiny_models import checkpoint
from tests.trained_checkpoints import RECORD, trained_looking

HALF = 1e-3
"""What float16 leaves of numbers up to 1, and of matrices' norms."""


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Fingerprints are remembered."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    root = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(root / "cache"))
        first, second = (
            trained_looking(checkpoint(root / "models"), root / name, seed=seed) for seed, name in enumerate("ab")
        )
    return first, second


def updates(made: Checkpoint) -> dict[str, torch.Tensor]:
    adapter = made.load_adapter()
    assert adapter is not None
    return {name: adapter.update(name).dense(adapter.scale) for name in adapter.layers}


def test_every_part_is_the_weighted_mean(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    options = AverageOptions(weights=(3.0, 1.0), adapter_rank=8)  # two updates of rank 4 fit into 8
    report = average_checkpoints(pair, tmp_path / "mean", options)
    assert list(report.weights) == [0.75, 0.25]
    made = Checkpoint.load(tmp_path / "mean")
    first, second = (each.load_trained_layers() or {} for each in pair)
    for name, weight in (made.load_trained_layers() or {}).items():
        assert torch.allclose(weight, 0.75 * first[name] + 0.25 * second[name], atol=HALF, rtol=HALF), name
    for name, mean in updates(made).items():
        wanted = 0.75 * updates(pair[0])[name] + 0.25 * updates(pair[1])[name]
        assert float((mean - wanted).norm() / wanted.norm()) < HALF, name
    for part in ("projection", "policy"):
        own, *given = (dict(getattr(each, part).state_dict()) for each in (made, *pair))
        for name, weight in own.items():
            assert torch.allclose(weight, 0.75 * given[0][name] + 0.25 * given[1][name], atol=HALF, rtol=HALF), name
    assert report.relative_error < HALF
    assert report.fingerprint == made.fingerprint


def test_the_heavier_one_is_nearer(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    report = average_checkpoints(pair, tmp_path / "mean", AverageOptions(weights=(3.0, 1.0)))
    near, far = report.distances
    assert far == pytest.approx(3 * near, rel=0.01)


def test_what_the_rank_leaves_out_is_said_and_signs_keep_most_of_it(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    low = average_checkpoints(pair, tmp_path / "low", AverageOptions(adapter_rank=1))
    signs = average_checkpoints(pair, tmp_path / "signs", AverageOptions(adapter_rank=1, adapter_signs=True))
    assert 0.0 < signs.relative_error < low.relative_error
    assert Checkpoint.load(tmp_path / "signs").load_adapter().has_signs  # type: ignore[union-attr]
    average_checkpoints([Checkpoint.load(tmp_path / "signs"), pair[0]], tmp_path / "again")
    assert Checkpoint.load(tmp_path / "again").load_adapter().has_signs  # type: ignore[union-attr]


def test_a_checkpoint_with_itself_stays_what_it_is(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    report = average_checkpoints([pair[0], pair[0]], tmp_path / "same")
    assert max(report.distances) == 0.0
    made = Checkpoint.load(tmp_path / "same")
    for name, update in updates(made).items():
        wanted = updates(pair[0])[name]
        assert float((update - wanted).norm() / wanted.norm()) < HALF
    first, own = pair[0].load_trained_layers() or {}, made.load_trained_layers() or {}
    assert all(torch.equal(own[name], first[name]) for name in first)


def test_the_record_says_what_it_is_made_of(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    average_checkpoints(pair, tmp_path / "mean")
    record = json.loads((tmp_path / "mean" / "training.json").read_text())
    assert record == {
        "averaged": [{"fingerprint": each.fingerprint, "weight": 0.5, "training": RECORD} for each in pair]
    }


def test_checkpoints_that_differ_in_more_than_weights_are_refused(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    first, second = pair
    other = replace(second, config=replace(second.config, chunk_sizes=(*second.config.chunk_sizes, 64)))
    with pytest.raises(ConfigError, match="differ in chunk sizes"):
        average_checkpoints([first, other], tmp_path / "no")
    untrained = replace(second, config=replace(second.config, trained=False))
    with pytest.raises(ConfigError, match="not trained"):
        average_checkpoints([first, untrained], tmp_path / "no")
    bare = replace(second, config=replace(second.config, adapter=None))
    with pytest.raises(ConfigError, match=r"differ in a trained decoder update \(True and False\)"):
        average_checkpoints([first, bare], tmp_path / "no")
    config = second.config
    inside = replace(second, config=replace(config, encoder=replace(config.encoder, reference="./encoder")))
    with pytest.raises(ConfigError, match=r"carries a model of its own; expected references .* to average"):
        average_checkpoints([first, inside], tmp_path / "no")
    wider = replace(second, policy=PointerPolicy(config.encoder.dim, width=2 * config.policy.width))
    with pytest.raises(ConfigError, match="policy weights differ in names or shapes"):
        average_checkpoints([first, wider], tmp_path / "no")
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_other_layers_are_refused(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    adapter = pair[1].load_adapter()
    assert adapter is not None
    assert pair[1].config.adapter is not None
    name = adapter.layers[0]
    shutil.copytree(pair[1].folder or "", tmp_path / "other")
    for message, state in (
        ("adapt other layers", {key: value for key, value in adapter.state.items() if not key.startswith(f"{name}.")}),
        ("differ in shape", {**adapter.state, f"{name}.up": torch.zeros((3, adapter.rank))}),
    ):
        files = write_weights(tmp_path / "other", "adapter", state, dtype="float16")
        config = replace(pair[1].config, adapter=replace(pair[1].config.adapter, files=files))
        other = replace(pair[1], config=config, folder=tmp_path / "other")
        with pytest.raises(ConfigError, match=message):
            average_checkpoints([pair[0], other], tmp_path / "no")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_updates_of_another_scale_are_multiplied_out(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    assert pair[0].config.adapter is not None
    doubled = replace(pair[0], config=replace(pair[0].config, adapter=replace(pair[0].config.adapter, scale=2.0)))
    average_checkpoints([pair[0], doubled], tmp_path / "mean")
    own = updates(pair[0])
    for name, mean in updates(Checkpoint.load(tmp_path / "mean")).items():
        assert float((mean - 1.5 * own[name]).norm() / own[name].norm()) < 2 * HALF


def test_checkpoints_without_an_update_are_averaged(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    bare = [replace(each, config=replace(each.config, adapter=None)) for each in pair]
    report = average_checkpoints(bare, tmp_path / "mean")
    assert list(report.distances) == []
    assert report.relative_error == 0.0
    assert Checkpoint.load(tmp_path / "mean").load_adapter() is None


def test_a_damaged_record_is_refused_before_anything_is_written(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    shutil.copytree(pair[1].folder or "", tmp_path / "other")
    (tmp_path / "other" / "training.json").write_text("{")
    with pytest.raises(ConfigError, match=r"training\.json is not JSON"):
        average_checkpoints([pair[0], Checkpoint.load(tmp_path / "other")], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_weights_and_folders_that_make_no_sense_are_refused(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        average_checkpoints(pair[:1], tmp_path / "no")
    for weights in ((1.0,), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(UsageError, match="one number above 0 for each"):
            average_checkpoints(pair, tmp_path / "no", AverageOptions(weights=weights))
    assert pair[1].folder is not None
    with pytest.raises(UsageError, match="one of the checkpoints"):
        average_checkpoints(pair, pair[1].folder)
    for names in (["notes.txt"], ["model.safetensors"], ["config.json", "model.safetensors"]):
        folder = tmp_path / names[-1]
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text("{}")
        with pytest.raises(UsageError, match=r"no checkpoint.*expected a new folder"):
            average_checkpoints(pair, folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    with pytest.raises(UsageError, match="is a file"):
        average_checkpoints(pair, tmp_path / "notes.txt" / "notes.txt")


def test_the_command_prints_what_it_made(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    folders = [str(each.folder) for each in pair]
    result = call("checkpoint", "average", *folders, "-o", tmp_path / "mean", "--weights", "1,3", "--json")
    assert result.json["weights"] == [0.25, 0.75]
    shown = call("checkpoint", "average", *folders, "-o", tmp_path / "mean")
    assert "from the mean" in shown.out
    refused = call("checkpoint", "average", *folders, "-o", tmp_path / "no", "--weights", "1,many")
    assert refused.code != 0
    assert "--weights is '1,many'" in without_traceback(refused)
