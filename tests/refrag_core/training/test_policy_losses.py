import math

import pytest
import torch

from refrag_core.policy import draw_picks, pick_log_probs
from refrag_core.training.policy_losses import (
    chunk_importance,
    clipped_loss,
    first_pick_divergence,
    first_pick_entropy,
    group_advantages,
    importance_targets,
    warm_start_loss,
)

INF = math.inf


def test_log_probs_of_a_batch_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 0.0]]).log()
    picks = torch.tensor([[[2, 0], [0, 1]], [[0, 1], [1, 0]]])
    # weights 1, 2, 3: third 3/6, then first 1/3; first 1/6, then second 2/5. Weights 1, 1 and no third: 1/2, then 1.
    expected = torch.tensor([[[1 / 2, 1 / 3], [1 / 6, 2 / 5]], [[1 / 2, 1.0], [1 / 2, 1.0]]])
    torch.testing.assert_close(pick_log_probs(logits, picks).exp(), expected)


def test_picks_of_a_batch_never_repeat_nor_take_what_is_masked() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -INF], [-INF, 0.0, 0.0, 0.0, 0.0]])
    picks = draw_picks(logits, 3, torch.Generator().manual_seed(0), num_samples=200)
    assert picks.shape == (2, 200, 3)
    assert all(len(set(row)) == 3 for row in picks.flatten(0, 1).tolist())
    assert 4 not in picks[0]
    assert 0 not in picks[1]


def test_advantages_by_hand() -> None:
    found = group_advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))


def test_the_clipped_objective_by_hand() -> None:
    log_probs = torch.tensor([[[2.0, 0.5], [2.0, 0.5]]]).log().requires_grad_()
    made = clipped_loss(log_probs, torch.zeros(1, 2, 2), torch.tensor([[1.0, -1.0]]), clip=0.2)
    # A = 1: min(2, 1.2) = 1.2 and min(.5, .8) = .5; A = -1: min(-2, -1.2) = -2 and min(-.5, -.8) = -.8
    assert made.loss.item() == pytest.approx(-(1.2 + 0.5 - 2.0 - 0.8) / 4)
    assert made.clip_fraction.item() == 1.0
    (gradient,) = torch.autograd.grad(made.loss, log_probs)
    # Where the clipped term is the smaller one there is none; else -A·ratio/4.
    torch.testing.assert_close(gradient, torch.tensor([[[0.0, -0.125], [0.5, 0.0]]]))


def test_the_first_updates_gradient_is_the_plain_policy_gradient() -> None:
    log_probs = torch.tensor([[[-1.0], [-2.0]]], requires_grad=True)
    made = clipped_loss(log_probs, log_probs.detach(), torch.tensor([[3.0, -1.0]]), clip=0.2)
    (gradient,) = torch.autograd.grad(made.loss, log_probs)
    torch.testing.assert_close(gradient, torch.tensor([[[-1.5], [0.5]]]))
    assert made.clip_fraction.item() == 0.0


def test_entropy_and_divergence_by_hand_and_with_finite_gradients_where_masked() -> None:
    logits = torch.tensor([[0.0, 0.0, -INF]], requires_grad=True)
    reference = torch.tensor([[math.log(0.25), math.log(0.75), -INF]])
    entropy, divergence = first_pick_entropy(logits), first_pick_divergence(logits, reference)
    assert entropy.item() == pytest.approx(math.log(2))
    assert divergence.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    (entropy + divergence).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_importance_by_hand() -> None:
    masks = torch.tensor([[[True, False], [False, True]]])
    # centred: X = [[.5, -.5], [-.5, .5]], y = [1, -1]; XXᵀ = [[.5, -.5], [-.5, .5]], on y that is 1; ridge 1: y / 2
    found = chunk_importance(masks, torch.tensor([[3.0, 1.0]]), ridge=1.0)
    torch.testing.assert_close(found, torch.tensor([[0.5, -0.5]]))


def test_importance_finds_what_each_chunk_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    worth = torch.tensor([0.0, 0.3, -0.1, 0.0, 1.0, 0.0])
    masks = torch.rand((1, 400, 6), generator=generator) < 0.5
    found = chunk_importance(masks, masks.float() @ worth + 7.0, ridge=1e-3)
    torch.testing.assert_close(found[0], worth, atol=1e-3, rtol=0)


def test_soft_labels_by_hand() -> None:
    found = importance_targets(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), temperature=2.0)
    # centred -1, 1, 0, 0, deviation sqrt(1/2): softmax of ±sqrt(2)/2
    high = 1.0 / (1.0 + math.exp(-math.sqrt(2.0)))
    torch.testing.assert_close(found, torch.tensor([[1.0 - high, high], [0.5, 0.5]]))
    even = importance_targets(torch.zeros(1, 4), temperature=1.0)
    torch.testing.assert_close(even, torch.full((1, 4), 0.25))


def test_the_warm_start_is_cross_entropy() -> None:
    logits = torch.tensor([[math.log(0.25), math.log(0.75), -INF]], requires_grad=True)
    loss = warm_start_loss(logits, torch.tensor([[0.5, 0.5, 0.0]]))
    assert loss.item() == pytest.approx(-0.5 * math.log(0.25) - 0.5 * math.log(0.75))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.25, 0.0]]))
