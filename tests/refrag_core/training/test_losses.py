import math

import pytest
import torch

from refrag_core.training.losses import IGNORED, slice_terms, token_nll, vocabulary_loss


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((5, 3), generator=generator, requires_grad=True)
    head = torch.randn((7, 3), generator=generator, requires_grad=True)
    return hidden, head, torch.tensor([0, 6, 2, 2, 5]), torch.randn((5, 3), generator=generator)


def test_cross_entropy_and_gradient_by_hand() -> None:
    # p = (3/4, 1/4), target 1: −log ¼ and p − y.
    cross_entropy, divergence, gradient = slice_terms(
        torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([1]), None, 0.0
    )
    assert float(cross_entropy) == pytest.approx(math.log(4.0))
    assert float(divergence) == 0.0
    assert gradient.tolist() == [pytest.approx([0.75, -0.75])]


def test_divergence_and_gradient_by_hand() -> None:
    # q = (1/2, 1/2): KL(q‖p) = ½ log ⅔ + ½ log 2 = ½ log 4/3; gradient at w = 1 is p − q.
    student = torch.tensor([[math.log(3.0), 0.0]])
    _, divergence, gradient = slice_terms(student, torch.tensor([1]), torch.zeros((1, 2)), 1.0)
    assert float(divergence) == pytest.approx(0.5 * math.log(4.0 / 3.0))
    assert gradient.tolist() == [pytest.approx([0.25, -0.25])]


@pytest.mark.parametrize("slice_rows", [1, 2, 100])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_slices_equal_the_whole(slice_rows: int, weight: float) -> None:
    hidden, head, targets, teacher = problem()
    made = vocabulary_loss(hidden, head, targets, teacher=teacher, teacher_weight=weight, slice_rows=slice_rows)
    (2.0 * made.total).backward()
    found = hidden.grad, head.grad
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    q = torch.softmax(teacher @ head.detach().T, -1)
    divergence = (q * (q.log() - torch.log_softmax(logits, -1))).sum(-1).mean()
    expected = (1 - weight) * torch.nn.functional.cross_entropy(logits, targets) + weight * divergence
    (2.0 * expected).backward()
    assert made.total.item() == pytest.approx(expected.item(), abs=1e-6)
    assert made.divergence.item() == pytest.approx(divergence.item(), abs=1e-6)
    for one, other in zip(found, (hidden.grad, head.grad), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, targets, _ = problem()
    vocabulary_loss(hidden, head.detach(), targets).total.backward()
    assert head.grad is None
    assert hidden.grad is not None


def test_token_nll_of_every_target() -> None:
    hidden, head, targets, _ = problem()
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    assert torch.allclose(token_nll(hidden, head, targets, slice_rows=2), expected, atol=1e-6)


def test_ignored_targets_count_for_nothing() -> None:
    hidden, head, targets, teacher = problem()
    some = targets.clone()
    some[[1, 3]] = IGNORED
    made = vocabulary_loss(hidden, head, some, teacher=teacher, teacher_weight=0.4, slice_rows=2)
    made.total.backward()
    found = hidden.grad
    assert found is not None
    assert found[[1, 3]].abs().sum() == 0.0
    kept = [0, 2, 4]
    alone = hidden.detach()[kept].requires_grad_()
    expected = vocabulary_loss(alone, head.detach(), targets[kept], teacher=teacher[kept], teacher_weight=0.4)
    expected.total.backward()
    assert made.total.item() == pytest.approx(expected.total.item(), abs=1e-6)
    assert alone.grad is not None
    assert torch.allclose(found[kept], alone.grad, atol=1e-6)
    assert token_nll(hidden.detach(), head.detach(), some)[1] == 0.0
