"""The optimizers of a run as one: AdamW and, for matrices of body and decoder where the config says so, Muon."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refrag_core.training.config import TrainingConfig
from refrag_core.training.model import TrainingModel
from refrag_core.training.muon import BatchedMuon

_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95


class Optimizers:
    """Several optimizers of disjoint weights, stepped together.

    Every group has, besides its learning rate `lr`, the `peak` that a schedule scales.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self._members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups."""
        return [group for member in self._members for group in member.param_groups]

    @property
    def weights(self) -> list[Tensor]:
        """All weights."""
        return [weight for group in self.param_groups for weight in group["params"]]

    def set_factor(self, factor: float) -> None:
        """Make every learning rate `factor` of its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    def step(self) -> None:
        """Update all weights."""
        for member in self._members:
            member.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for member in self._members:
            member.zero_grad(set_to_none=True)

    def moments(self, weight: Tensor) -> Mapping[str, Any]:
        """What is remembered of a weight, empty before the first step."""
        state: Mapping[str, Any] = self._owner(weight).state.get(weight, {})
        return state

    def restore(self, weight: Tensor, kind: str, value: Tensor) -> None:
        """Put back one of the `moments`."""
        self._owner(weight).state[weight][kind] = value

    def _owner(self, weight: Tensor) -> torch.optim.Optimizer:
        # By identity: == compares elements.
        return next(
            member
            for member in self._members
            if any(weight is own for group in member.param_groups for own in group["params"])
        )


def make_optimizer(model: TrainingModel, config: TrainingConfig) -> Optimizers:
    """Optimizers with a learning rate for encoder, projection (and readout) and decoder each."""
    rates = {
        "encoder": config.encoder_learning_rate,
        "projection": config.projection_learning_rate,
        "readout": config.projection_learning_rate,
        "decoder": config.decoder_learning_rate,
    }
    groups = {part: [weight for _, weight in weights] for part, weights in model.groups().items()}
    chosen = {
        "encoder": _body_matrices(model) if config.encoder_optimizer == "muon" else [],
        "decoder": _decoder_matrices(model) if config.decoder_optimizer == "muon" else [],
    }
    taken = {id(weight) for weights in chosen.values() for weight in weights}
    adamw = [
        {"params": rest, "lr": rates[part], "peak": rates[part]}
        for part, weights in groups.items()
        if (rest := [weight for weight in weights if id(weight) not in taken])
    ]
    muon = [{"params": weights, "lr": rates[part], "peak": rates[part]} for part, weights in chosen.items() if weights]
    members: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adamw, betas=_BETAS, weight_decay=config.weight_decay, fused=model.head.is_cuda)
    ]
    if muon:
        members.append(BatchedMuon(muon, momentum=_MOMENTUM, weight_decay=config.weight_decay))
    return Optimizers(members)


def _body_matrices(model: TrainingModel) -> list[nn.Parameter]:
    """The body's weights that multiply hidden states; not its embeddings of positions and types."""
    return [
        weight
        for name, weight in model.encoder.body.named_parameters()
        if weight.requires_grad and weight.ndim == 2 and "embeddings" not in name
    ]


def _decoder_matrices(model: TrainingModel) -> list[nn.Parameter]:
    """The updates of the decoder's matrices, or their factors."""
    return [weight for weight in model.decoder.parameters() if weight.requires_grad and weight.ndim == 2]
