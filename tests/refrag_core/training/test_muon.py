import torch
from torch import Tensor

from refrag_core.training.muon import BatchedMuon, orthogonalised

SHAPES = [(6, 4), (4, 6), (6, 4), (5, 5)]


def weights() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).requires_grad_() for shape in SHAPES]


def steps(optimizer: torch.optim.Optimizer, trained: list[Tensor], count: int) -> None:
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in trained:
            weight.grad = torch.randn(weight.shape, generator=random)
        optimizer.step()


def test_it_does_what_torch_does_one_by_one() -> None:
    batched, single, start = weights(), weights(), weights()
    steps(BatchedMuon([{"params": batched, "lr": 0.1}], momentum=0.9, weight_decay=0.1), batched, 3)
    other = torch.optim.Muon(single, lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    steps(other, single, 3)
    for made, expected, before in zip(batched, single, start, strict=True):
        moved = (expected - before).abs().max()
        assert moved > 0.05
        # Both round to bfloat16 on the way, in different places.
        assert (made - expected).abs().max() < 0.03 * moved


def test_matrices_without_a_gradient_stay() -> None:
    trained = weights()
    trained[0].grad = torch.ones(SHAPES[0])
    BatchedMuon([{"params": trained, "lr": 0.1}], momentum=0.9, weight_decay=0.0).step()
    assert not torch.equal(trained[0], weights()[0])
    assert torch.equal(trained[2], weights()[2])


def test_singular_values_become_about_one() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
    for made in orthogonalised(torch.stack([matrix, 100 * matrix])).float():
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.6
        assert values.max() < 1.3
