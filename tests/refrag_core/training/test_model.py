import json
import math
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from refrag_core.adapter import Adapter, LayerUpdate, closest_signs
from refrag_core.checkpoint import Checkpoint
from refrag_core.decoder import Decoder, merge_adapter
from refrag_core.errors import ConfigError, UnsupportedDecoderError
from refrag_core.packing import PackOptions, pack_checkpoint
from refrag_core.training.batches import NO_TOKEN, TrainingBatch, continuations_batch, next_paragraph_batch
from refrag_core.training.loop import Trainer, base_checkpoint
from refrag_core.training.losses import token_nll
from refrag_core.training.low_rank import closest_factors
from refrag_core.training.model import (
    ChunkReadout,
    FullLinear,
    LoRALinear,
    adapter_state,
    compile_layers,
    without_adapter,
)
from refrag_core.training.trained_checkpoint import load_training_model
from tests.refrag_core.training.conftest import settings
from tests.tiny_models import decoder_folder

LINEAR = {"mistral": ["q_proj"], "falcon": ["query_key_value"]}


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4, bias=False)


def factors(layer: FullLinear, rank: int) -> tuple[Tensor, Tensor]:
    update = layer.stored(rank)
    assert update.signs is None
    return update.down, update.up


def test_a_full_update_is_saved_as_its_closest_of_low_rank() -> None:
    layer = FullLinear(linear(), scale=2.0)
    with torch.no_grad():
        # Singular values 6 and 1 by hand: one direction is kept of two.
        layer.update[0, 1], layer.update[2, 2] = 6.0, 1.0
    down, up = factors(layer, 1)
    assert (down.shape, up.shape) == ((1, 3), (4, 1))
    expected = torch.zeros((4, 3))
    expected[0, 1] = 6.0
    assert torch.allclose(2.0 * up @ down, expected, atol=1e-5)
    down, up = factors(layer, 3)
    assert torch.allclose(2.0 * up @ down, layer.update.detach(), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_closest_of_low_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    layer = FullLinear(nn.Linear(shape[1], shape[0], bias=False), scale=2.0)
    with torch.no_grad():
        layer.update.normal_()
    down, up = factors(layer, 3)
    left, values, right = torch.linalg.svd(layer.update.detach())
    assert torch.allclose(2.0 * up @ down, left[:, :3] * values[:3] @ right[:3], atol=1e-5)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0), atol=1e-5)


def test_an_update_of_nothing_has_factors_of_nothing() -> None:
    down, up = factors(FullLinear(linear(), scale=2.0), 2)
    assert not down.any()
    assert not up.any()


def test_factors_of_rank_0_are_none() -> None:
    down, up = closest_factors(torch.ones((4, 3)), 0, 1.0)
    assert (down.shape, up.shape) == ((0, 3), (4, 0))


def test_a_full_update_goes_on_from_factors_of_any_rank() -> None:
    layer = FullLinear(linear(), scale=2.0)
    update = LayerUpdate(torch.ones((1, 3)), torch.full((4, 1), 0.5))
    assert layer.takes(update)
    with torch.no_grad():
        layer.start_from(update)
    assert torch.allclose(layer.weight(), layer.base.weight + 1.0)


def test_low_rank_layers_grow_from_fewer_and_take_the_closest_of_more() -> None:
    layer = LoRALinear(linear(), rank=2, scale=1.0)
    with torch.no_grad():
        layer.start_from(LayerUpdate(torch.ones((1, 3)), torch.full((4, 1), 2.0)))
        assert torch.allclose(layer.up @ layer.down, torch.full((4, 3), 2.0))
        assert (layer.down[1] != 1.0).any()
        wanted = torch.randn((4, 3))
        layer.start_from(LayerUpdate(torch.eye(3), wanted))
    left, values, right = torch.linalg.svd(wanted)
    assert torch.allclose(layer.up @ layer.down, left[:, :2] * values[:2] @ right[:2], atol=1e-5)
    assert not layer.takes(LayerUpdate(torch.ones((1, 4)), torch.ones((4, 1))))
    with pytest.raises(ConfigError, match="rank 2"):
        layer.stored(1)


def test_what_a_rank_leaves_out_is_stored_as_signs() -> None:
    layer = FullLinear(nn.Linear(40, 30, bias=False), scale=2.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.update.copy_(torch.randn((30, 40), generator=generator))
    without, update = layer.stored(4), layer.stored(4, signs=True)
    whole = layer.update.detach()

    def missing(found: LayerUpdate) -> float:
        return float((found.dense(2.0) - whole).norm() / whole.norm())

    # Signs alone leave sqrt(1 - 2/π) = .60 of a random matrix.
    assert missing(update) < 0.6 < missing(without)
    assert update.signs is not None
    again = closest_signs(whole - 2.0 * update.up @ update.down)
    assert torch.equal(update.signs.bits, again.bits)


def test_low_rank_training_goes_on_beside_signs() -> None:
    """By hand: the signs are ± 1/2, the factors add 1 everywhere, and a step changes the factors alone."""
    signs = closest_signs(torch.tensor([[0.5, -0.5, 0.5]]).repeat(4, 1))
    stored = LayerUpdate(torch.ones((1, 3)), torch.full((4, 1), 0.5), signs)
    layer = LoRALinear(linear(), rank=2, scale=2.0)
    with torch.no_grad():
        layer.start_from(stored)
    added = torch.tensor([1.5, 0.5, 1.5])
    assert torch.allclose(layer.weight(), layer.base.weight + added)
    layer.weight().sum().backward()
    assert layer.base.weight.grad is None
    assert layer.up.grad is not None
    kept = layer.stored(2)
    assert kept.signs is signs
    assert torch.allclose(kept.dense(2.0), added.repeat(4, 1))
    layer.enabled = False
    ones = torch.ones(3)
    assert torch.equal(layer(ones), layer.base(ones))


def test_what_is_trained_beside_signs_is_what_is_merged() -> None:
    """In bfloat16 too: one rounding of the same sum."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    stored = LayerUpdate(
        torch.randn((4, 64), generator=generator) * 1e-2,
        torch.randn((48, 4), generator=generator) * 1e-2,
        closest_signs(torch.randn((48, 64), generator=generator) * 1e-3),
    )
    layer = LoRALinear(base, rank=4, scale=2.0)
    with torch.no_grad():
        layer.start_from(stored)
    merged = nn.Sequential(OrderedDict(layer=nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)))
    merged.layer.load_state_dict(base.state_dict())
    merge_adapter(merged, Adapter(layer.stored(4).state("layer"), 2.0))
    assert torch.equal(layer.weight(), merged.layer.weight)


@pytest.mark.parametrize("then", ["lora", "full"])
def test_a_checkpoint_with_signs_is_trained_on(
    tmp_path: Path, data: Path, models: tuple[Path, Path], then: str
) -> None:
    exact: dict[str, Any] = {"adapter_dtype": "float32", "adapter_rank": 2, "steps": 2}
    first = settings(data, models, tmp_path / "full", decoder_training="full", adapter_signs=True, **exact)
    assert Trainer(first).run()
    made = Checkpoint.load(tmp_path / "full" / "checkpoint")
    adapter = made.load_adapter()
    assert adapter is not None
    assert all(adapter.update(name).signs is not None for name in adapter.layers)
    ids = torch.arange(6)[None]
    stored = made.load_decoder().model(input_ids=ids).logits
    changes: dict[str, Any] = {
        "decoder_training": then,
        "checkpoint": str(made.folder),
        "adapter_signs": then == "full",
    }
    trainer = Trainer(settings(data, models, tmp_path / "then", **exact | changes))
    assert torch.allclose(trainer.model.decoder(input_ids=ids).logits, stored, atol=1e-4)
    with without_adapter(trainer.model.decoder):
        expected = Decoder.load(made.verified_decoder_folder()).model(input_ids=ids).logits
        assert torch.allclose(trainer.model.decoder(input_ids=ids).logits, expected, atol=1e-5)
    if then == "full":
        with pytest.raises(ConfigError, match="which would lose them"):
            Trainer(settings(data, models, tmp_path / "lost", **exact | changes | {"adapter_signs": False}))
    assert trainer.run()
    again = Checkpoint.load(tmp_path / "then" / "checkpoint")
    trained = trainer.model.decoder(input_ids=ids).logits
    assert torch.allclose(again.load_decoder().model(input_ids=ids).logits, trained, atol=1e-4)
    kept = again.load_adapter()
    assert kept is not None
    if then == "lora":
        assert all(torch.equal(kept.state[name], bits) for name, bits in adapter.state.items() if "signs" in name)
        packed = tmp_path / "packed"
        report = pack_checkpoint(again, packed, PackOptions(adapter="int5", adapter_rank=1))
        shapes = [kept.update(name).shape for name in kept.layers]
        assert report.parts["adapter"].weights == sum(2 * (o + i) + o * 8 * -(-i // 8) for o, i in shapes)
        small = Checkpoint.load(packed).load_adapter()
        assert small is not None
        assert small.rank == 1
        assert all(torch.equal(small.state[name], bits) for name, bits in kept.state.items() if "signs" in name)


def test_gradient_checkpointing_changes_nothing_but_memory(
    tmp_path: Path, data: Path, models: tuple[Path, Path]
) -> None:
    found, counts = [], []
    for name, on in (("plain", False), ("checkpointed", True)):
        trainer = Trainer(settings(data, models, tmp_path / name, gradient_checkpointing=on))
        norm = Mock(wraps=trainer.model.decoder.base_model.layers[0].input_layernorm.forward)
        trainer.model.decoder.base_model.layers[0].input_layernorm.forward = norm
        assert trainer.run()
        counts.append(norm.call_count)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([loss for line in lines for loss in json.loads(line).get("losses", {}).values()])
    assert len(found[0]) >= 4
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert counts[1] > counts[0]


def test_a_run_beside_signs_resumes_with_these_alone(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    changes: dict[str, Any] = {"adapter_dtype": "float32", "adapter_rank": 2, "steps": 2}
    for name, seed in (("one", 0), ("other", 1)):
        whole = {"decoder_training": "full", "adapter_signs": True, "seed": seed}
        assert Trainer(settings(data, models, tmp_path / name, **changes | whole)).run()
    base = tmp_path / "base"
    shutil.copytree(tmp_path / "one" / "checkpoint", base)
    config = settings(data, models, tmp_path / "run", **changes | {"checkpoint": str(base)})
    assert Trainer(config).run()
    Trainer(config)
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "other" / "checkpoint", base)
    with pytest.raises(ConfigError, match="saved by a run with other checkpoint"):
        Trainer(config)


def test_full_training_is_what_the_checkpoint_holds(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    changes: dict[str, Any] = {"decoder_training": "full", "adapter_rank": 64, "adapter_dtype": "float32"}
    trainer = Trainer(settings(data, models, tmp_path, **changes))
    assert trainer.run()
    ids = torch.arange(6)[None]
    trained = trainer.model.decoder(input_ids=ids).logits
    stored = Checkpoint.load(tmp_path / "checkpoint").load_decoder().model(input_ids=ids).logits
    assert torch.allclose(stored, trained, atol=1e-4)
    base = trainer.base.load_decoder().model
    with without_adapter(trainer.model.decoder):
        assert torch.allclose(trainer.model.decoder(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(base(input_ids=ids).logits, trained, atol=1e-3)
    state = adapter_state(trainer.model.decoder, 64)
    merge_adapter(base, Adapter(state, trainer.config.adapter_scale))
    assert torch.allclose(base(input_ids=ids).logits, trained, atol=1e-4)


def test_a_readout_has_a_map_for_each_place() -> None:
    """By hand: the map of place 0 keeps a vector, that of place 1 turns it round; both are brought to an RMS of 1."""
    readout = ChunkReadout(3, 2, seed=0)
    with torch.no_grad():
        readout.maps[0], readout.maps[1] = torch.eye(2), -torch.eye(2)
        made = readout(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 2)
    rms = math.sqrt(12.5)
    expected = torch.tensor([[3 / rms, 4 / rms], [-3 / rms, -4 / rms], [0, math.sqrt(2)], [0, -math.sqrt(2)]])
    assert torch.allclose(made, expected, atol=1e-5)


def test_a_readout_teaches_and_stays_out_of_the_checkpoint(
    tmp_path: Path, data: Path, models: tuple[Path, Path]
) -> None:
    tasks = [{"kind": "reconstruct", "batch_rows": 8}]
    trainer = Trainer(settings(data, models, tmp_path, readout=0.5, steps=60, log_every=20, tasks=tasks))
    assert trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [sum(line["readouts"].values()) / len(line["readouts"]) for line in lines]
    assert seen[-1] < seen[0] - 0.1
    assert trainer.model.readout is not None
    names = {name for path in (tmp_path / "checkpoint").glob("*.safetensors") for name in load_file(path)}
    assert not [name for name in names if "maps" in name]


def test_short_chunks_are_encoded_as_if_alone(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    model = Trainer(settings(data, models, tmp_path)).model.eval()
    with torch.no_grad():
        assert model.encoder.token_map is not None
        model.encoder.token_map.weight.normal_()
    ids = np.arange(8).reshape(1, 8)
    batch = next_paragraph_batch(ids, np.array([[9, 10]]), chunk_size=4, expansion_mask=np.zeros((1, 2), dtype=bool))
    slots, chunks, places = (torch.from_numpy(array) for array in (batch.ids, batch.chunk_ids, batch.places))
    short = chunks.clone()
    short[0, 1, 2:] = NO_TOKEN
    with torch.no_grad():
        whole = model.embed(slots, model.vectors(chunks), places)
        assert torch.allclose(model.embed(slots, model.vectors(chunks, ragged=True), places), whole, atol=1e-5)
        ragged = model.embed(slots, model.vectors(short, ragged=True), places)
        alone = model.projection(model.encoder(torch.tensor([[4, 5]])))
    assert torch.allclose(ragged[0, 0], whole[0, 0], atol=1e-5)
    assert torch.allclose(ragged[0, 1], alone[0], atol=1e-5)
    assert not torch.allclose(ragged[0, 1], whole[0, 1], atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_layers_are_compiled_once_for_all_shapes(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    """The same hidden states and gradients as without, whatever the shape."""
    config = settings(data, models, tmp_path)
    plain, compiled = (load_training_model(base_checkpoint(config), config) for _ in range(2))
    compile_layers(compiled)
    graphs = []
    for rows, context in ((2, 8), (3, 16), (2, 24)):
        tokens = np.arange(rows * (context + 4), dtype=np.int32).reshape(rows, -1) % 50
        expanded = np.zeros((rows, context // 4), bool)
        batch = next_paragraph_batch(tokens[:, :context], tokens[:, context:], chunk_size=4, expansion_mask=expanded)
        parts = (batch.ids, batch.chunk_ids, batch.places, batch.predict_at)
        inputs = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
        hidden = [model(*inputs) for model in (plain, compiled)]
        assert torch.allclose(hidden[0], hidden[1], atol=1e-5)
        for made in hidden:
            made.square().mean().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    pairs = zip(plain.parameters(), compiled.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-4) for a, b in pairs if a.grad is not None and b.grad is not None)
    assert graphs[2] == graphs[1]  # the first two shapes may share a size by chance


def test_branches_read_as_if_each_were_a_row_of_its_own(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    """Of every branch the same losses as of its context and tokens alone, in the order of its predictions."""
    model = Trainer(settings(data, models, tmp_path)).model.eval()
    tokens = np.random.default_rng(0).integers(5, 60, (2, 16))
    starts = np.asarray([1, 2, 3])
    batch, _ = continuations_batch(tokens, starts, chunk_size=4, span_tokens=4)

    def losses(made: TrainingBatch) -> Tensor:
        *arrays, targets = (torch.from_numpy(array) for array in made.arrays)
        with torch.no_grad():
            return token_nll(model(*arrays), model.head, targets.reshape(-1)).reshape(targets.shape)

    found = losses(batch).reshape(2, 3, 4)
    for branch, start in enumerate(starts.tolist()):
        mask = np.zeros((2, start), dtype=bool)
        context, output = tokens[:, : 4 * start], tokens[:, 4 * start : 4 * start + 4]
        alone = losses(next_paragraph_batch(context, output, chunk_size=4, expansion_mask=mask))
        assert torch.allclose(found[:, branch], alone, atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), [("mistral", {"sliding_window": 8}), ("falcon", {"alibi": True})])
def test_branches_need_a_decoder_with_full_attention(
    tmp_path: Path, data: Path, models: tuple[Path, Path], family: str, changes: dict[str, Any]
) -> None:
    folder = decoder_folder(tmp_path / "decoder", family, **changes)
    tasks = [{"kind": "continuations", "batch_rows": 4, "span_tokens": 4, "branches": 3}]
    config = settings(data, (models[0], folder), tmp_path / "run", tasks=tasks, adapter_targets=LINEAR[family])
    message = (
        rf"^a continuations task gives attention a mask of its own, and decoder type '{family}' with attention "
        r"'sdpa' takes none, or has layers that see a part of the row; expected full attention by sdpa: leave the task "
        r"out, next-paragraph learns the same from one place a row$"
    )
    with pytest.raises(UnsupportedDecoderError, match=message):
        Trainer(config)
