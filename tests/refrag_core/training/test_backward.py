from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from refrag_core.training.backward import Backward, Gradients
from refrag_core.training.example_stream import prepared
from refrag_core.training.loop import Trainer
from refrag_core.training.micro_batches import MicroBatch, make_example
from refrag_core.training.model import read_rows_causally
from tests.refrag_core.training.conftest import settings
from tests.refrag_core.training.test_loop import losses


def test_gradients_of_all_weights_are_added_up_in_one_buffer() -> None:
    used, unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[5.0]]))
    gradients = Gradients([used, unused])
    backward = Backward(gradients, scale=0.5)

    def compute(inputs: Any) -> Any:
        total = (used * inputs[0]).sum()
        return total, (total.detach(), total.detach())

    for factor in (3.0, 1.0):
        reported = backward(compute, (torch.tensor([factor, -factor]),), "key")
    assert reported[0] == pytest.approx(-1.0)
    assert gradients.flat.tolist() == [2.0, -2.0, 0.0]
    assert used.grad is not None
    assert used.grad.tolist() == [2.0, -2.0]
    gradients.clip(1.0)
    assert used.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    gradients.clip(5.0)
    assert used.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
    gradients.clear()
    assert used.grad.tolist() == [0.0, 0.0]


def test_a_decoder_reads_rows_causally_as_it_did_before(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    trainer = Trainer(settings(data, models, tmp_path))
    decoder = trainer.base.load_decoder().model
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    before = decoder(input_ids=ids).logits
    assert read_rows_causally(decoder)
    with torch.no_grad():
        after = decoder(input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool)).logits
    assert torch.allclose(before, after, atol=1e-6)


def test_a_decoder_with_windows_keeps_its_own_attention(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    decoder = Trainer(settings(data, models, tmp_path)).base.load_decoder().model
    decoder.config.sliding_window = 4
    assert not read_rows_causally(decoder)
    assert decoder.config._attn_implementation == "sdpa"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
def test_captured_passes_learn_what_eager_ones_do(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    tasks = [
        {"kind": "reconstruct", "batch_rows": 4},
        {"kind": "next-paragraph", "batch_rows": 4, "distillation": 0.5},
    ]
    for name in ("captured", "eager"):
        changes = {"tasks": tasks, "steps": 12, "device": "cuda", "compile": False, "capture": name == "captured"}
        assert Trainer(settings(data, models, tmp_path / name, **changes)).run()
    captured, eager = losses(tmp_path / "captured"), losses(tmp_path / "eager")
    for mine, theirs in zip(captured, eager, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


class NothingWaits(TorchDispatchMode):
    """Raises where a value is asked for, which a device would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capturing", [False, True])
def test_passes_wait_for_no_value_and_make_no_mask(
    tmp_path: Path, data: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    """Also not where transformers takes another way while a graph is captured."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: capturing)
    tasks = [
        {"kind": "reconstruct", "batch_rows": 2},
        {"kind": "next-paragraph", "batch_rows": 2, "distillation": 0.5},
        {"kind": "text", "batch_rows": 2},
    ]
    trainer = Trainer(settings(data, models, tmp_path, tasks=tasks, decoder_training="lora"))
    masks = []
    for layer in (trainer.model.decoder.model.layers[0], trainer.model.encoder.body.encoder.layer[0]):
        layer.register_forward_pre_hook(
            lambda _, given, named: masks.append(named.get("attention_mask", (*given, None)[1])), with_kwargs=True
        )
    for position, task in enumerate(trainer.config.tasks):
        planned = MicroBatch(task, position, 4, 0.0, np.random.default_rng(0))
        example = make_example(trainer.config, trainer.windows, planned, progress=0.0)
        with NothingWaits():
            trainer._backward(prepared(example, pinned=False))
    assert len(masks) >= 5
    assert set(masks) == {None}
