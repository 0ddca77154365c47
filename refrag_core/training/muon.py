"""Muon for many small matrices: those of one shape are updated together.

`torch.optim.Muon` works through its matrices one after the other, some thirty small kernels each, which a decoder of
135M parameters would wait for longer than for its gradients. Here all matrices of a shape are one batch.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7
_RMS_OF_ADAMW = 0.2


class BatchedMuon(torch.optim.Optimizer):
    """Momentum whose matrices are brought to singular values near 1 before they are applied.

    Nesterov momentum and decoupled weight decay as in torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Muon is
    Scalable for LLM Training, arXiv:2502.16982): a learning rate means what it means to AdamW.

    Args:
        groups: parameter groups of float32 matrices on one device; each has `params` and `lr`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            for weights in _by_shape(group["params"]):
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        buffers = [self._buffer(weight) for weight in weights]
        torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = orthogonalised(torch.stack(list(ahead))).to(weights[0].dtype)
        rate = group["lr"] * _RMS_OF_ADAMW * math.sqrt(max(weights[0].shape))
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.unbind()), alpha=-rate)

    def _buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _by_shape(weights: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        if weight.grad is not None:
            groups.setdefault(weight.shape, []).append(weight)
    return list(groups.values())


def orthogonalised(matrices: Tensor) -> Tensor:
    """The matrices `[n, r, c]`, in bfloat16, with all singular values brought to about .7 to 1.2 (Newton-Schulz)."""
    tall = matrices.shape[1] > matrices.shape[2]
    made = (matrices.mT if tall else matrices).bfloat16()
    made = made / made.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    linear, cubic, quintic = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = made @ made.mT
        made = torch.baddbmm(made, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), made, beta=linear)
    return made.mT if tall else made
