"""Losses of the policy's training: a warm start from chunk importance, then policy gradients.

Notation: b prompts, L chunks of each, G samples of a prompt, T′ picks of a sample.
Source: REFRAG, arXiv:2509.01092, section 3 and appendix; the group baseline is GRPO's (arXiv:2402.03300), the
clipped objective PPO's (arXiv:1707.06347). `refrag_core.policy.pick_log_probs` has the log-probabilities.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ADVANTAGE_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """PPO's objective, negated, and how much of it was clipped."""

    loss: Tensor
    """Mean over prompts, samples and picks."""
    clip_fraction: Tensor
    """Share of the picks whose ratio lies outside 1 ± clip."""


def group_advantages(rewards: Tensor) -> Tensor:
    """(r − mean) / (std + ε) over each prompt's samples: float `[b, G]` → `[b, G]`; std divides by G."""
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True).sqrt() + ADVANTAGE_EPSILON)


def clipped_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip: float) -> ClippedLoss:
    """−mean of min(ratio · A, clamp(ratio, 1 ± clip) · A), every pick with its own ratio and its sample's advantage.

    Args:
        log_probs: float `[b, G, T′]` under the policy that learns.
        old_log_probs: the same under the policy that sampled.
        advantages: float `[b, G]`.
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    advantage = advantages.unsqueeze(-1)
    objective = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    return ClippedLoss(-objective.mean(), ((ratio.detach() - 1.0).abs() > clip).float().mean())


def first_pick_entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of the first pick's distribution; logits `[b, L]`, -inf where no chunk is."""
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1).mean()


def first_pick_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Mean KL(policy ‖ reference) of the first pick's distributions; both `[b, L]`, -inf at the same chunks."""
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(reference, dim=-1)
    difference = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    return (log_p.exp() * difference).sum(dim=-1).mean()


def chunk_importance(masks: Tensor, rewards: Tensor, *, ridge: float) -> Tensor:
    """What expanding each chunk adds to the reward: ridge regression of rewards on random masks.

    Args:
        masks: bool `[b, R, L]`, the expansion masks of R samples.
        rewards: float `[b, R]`.
        ridge: added to the diagonal. Coefficients of R < L samples are shrunk: only their proportions count.

    Returns:
        float `[b, L]`: Xᵀ(XXᵀ + ridge·I)⁻¹y with X and y centred over the samples.
    """
    inputs = masks.float() - masks.float().mean(dim=1, keepdim=True)
    outputs = (rewards - rewards.mean(dim=1, keepdim=True)).unsqueeze(-1)
    gram = inputs @ inputs.mT + ridge * torch.eye(masks.shape[1], device=masks.device)
    # solve_ex does not look at the outcome, which would wait for the device; a positive ridge makes it solvable.
    weights: Tensor = torch.linalg.solve_ex(gram, outputs).result
    return (inputs.mT @ weights).squeeze(-1)


def importance_targets(importance: Tensor, *, temperature: float) -> Tensor:
    """Soft labels `[b, L]` that sum to 1: softmax of the importance in units of its deviation in the batch.

    The deviation is the batch's and not the row's: a context whose chunks matter little keeps flat labels.
    """
    centred = importance - importance.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean().sqrt().clamp_min(torch.finfo(centred.dtype).tiny)
    return torch.softmax(centred / (deviation * temperature), dim=-1)


def warm_start_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the first pick's distribution with soft labels; both `[b, L]`."""
    log_p = torch.log_softmax(logits, dim=-1)
    return -(targets * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1).mean()
