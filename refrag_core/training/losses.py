"""Losses over the vocabulary that never hold all logits: slices of positions, forward and gradient at once.

Notation: n positions, d width, V vocabulary.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

SLICE_ROWS = int(os.environ.get("REFRAG_LOSS_SLICE_ROWS", "4096"))

IGNORED = -1
"""A target that no loss counts."""

Terms = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class VocabularyLoss:
    """Mean losses over positions, in nats a token."""

    total: Tensor
    """(1 − w)·cross_entropy + w·divergence; the one that has a gradient."""
    cross_entropy: Tensor
    divergence: Tensor
    """KL(teacher ‖ student); 0 without a teacher."""


def slice_terms(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, weight: float) -> Terms:
    """Of one slice: summed cross-entropy, summed divergence, and the gradient of their weighted sum by the logits.

    Args:
        logits: `[n, V]`, of any float dtype.
        targets: int64 `[n]`, IGNORED where nothing is to be predicted.
        teacher_logits: `[n, V]` or None.
        weight: w, the divergence's share.

    With p the student's distribution, q the teacher's and y the target: ∂/∂logits = p − (1 − w)·y − w·q.
    """
    counted = (targets >= 0)[:, None].float()
    log_p = torch.log_softmax(logits.float(), dim=-1)
    cross_entropy = -(log_p.gather(1, targets.clamp_min(0)[:, None]) * counted).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    if teacher_logits is None:
        gradient = (log_p.exp() - is_target.float()) * counted
        return cross_entropy, cross_entropy.new_zeros(()), gradient.to(logits.dtype)
    log_q = torch.log_softmax(teacher_logits.float(), dim=-1)
    q = log_q.exp()
    gradient = (log_p.exp() - (1.0 - weight) * is_target.float() - weight * q) * counted
    return cross_entropy, (q * (log_q - log_p) * counted).sum(), gradient.to(logits.dtype)


@cache
def _terms(compiled: bool) -> Callable[[Tensor, Tensor, Tensor | None, float], Terms]:
    return torch.compile(slice_terms, dynamic=False) if compiled else slice_terms


class _SlicedLoss(torch.autograd.Function):
    """Mean loss, with the gradients by `hidden` (and `head`) already made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        weight: float,
        slice_rows: int,
        compiled: bool,
    ) -> Terms:
        terms = _terms(compiled)
        table = head.to(hidden.dtype)
        sums = hidden.new_zeros(2, dtype=torch.float32)
        by_hidden = torch.empty_like(hidden)
        by_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), slice_rows):
            part = slice(start, start + slice_rows)
            from_teacher = None if teacher is None else teacher[part].to(table.dtype) @ table.T
            cross_entropy, divergence, gradient = terms(hidden[part] @ table.T, targets[part], from_teacher, weight)
            sums += torch.stack([cross_entropy, divergence])
            by_hidden[part] = gradient @ table
            if by_head is not None:
                by_head += (gradient.T @ hidden[part]).float()
        count = (targets >= 0).sum().clamp_min(1)
        ctx.save_for_backward(by_hidden, by_head, count)
        cross_entropy, divergence = sums / count
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return (1.0 - weight) * cross_entropy + weight * divergence, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_head, count = ctx.saved_tensors
        scale = gradients[0] / count
        return by_hidden * scale.to(by_hidden.dtype), None if by_head is None else by_head * scale, *([None] * 5)


def vocabulary_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    teacher: Tensor | None = None,
    teacher_weight: float = 0.0,
    slice_rows: int = SLICE_ROWS,
    compiled: bool = False,
) -> VocabularyLoss:
    """Cross-entropy and, with a teacher, distillation from its next-token distribution.

    Args:
        hidden: `[n, d]`, what the decoder hands to its output layer.
        head: `[V, d]`, the output layer's weight.
        targets: int64 `[n]`; those that are IGNORED count for nothing, also not in the means.
        teacher: `[n, d]` without gradient, through the same head; None for none.
        teacher_weight: w of `VocabularyLoss.total`; must be 0 without a teacher.
        slice_rows: positions whose logits are held at once.
        compiled: fuse the arithmetic on logits (torch.compile).
    """
    weight = teacher_weight if teacher is not None else 0.0
    made: Terms = _SlicedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, teacher, weight, slice_rows, compiled
    )
    return VocabularyLoss(*made)


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, targets: Tensor, *, slice_rows: int = SLICE_ROWS) -> Tensor:
    """Negative log-likelihood float32 `[n]` of every target, in nats; 0 where it is IGNORED."""
    table = head.to(hidden.dtype)
    parts = []
    for start in range(0, len(hidden), slice_rows):
        part = slice(start, start + slice_rows)
        parts.append(
            torch.nn.functional.cross_entropy(
                (hidden[part] @ table.T).float(), targets[part], reduction="none", ignore_index=IGNORED
            )
        )
    return torch.cat(parts)
