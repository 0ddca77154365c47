"""The stored update that is closest to a whole matrix's: by its entries, or by what it does to a layer's inputs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refrag_core.adapter import LayerUpdate, closest_signs

_RIDGE = 1e-3
"""Added to the inputs' second moment, as a share of its mean: no direction counts for nothing."""
_NEGLIGIBLE = 1e-9
"""Of the largest singular value."""
_FITS = 3
"""Rounds in which factors and signs are fitted to each other: a third leaves a tenth or two less than one."""


def closest_factors(update: Tensor, rank: int, scale: float, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`down` float32 `[rank, in]` and `up` float32 `[out, rank]`, `scale` · up @ down ≈ `update` `[out, in]`.

    The rank is less where the update has no more. Without a moment the sum of squared differences is the least
    possible (Eckart-Young). With the second moment `[in, in]` of the layer's inputs (E[x xᵀ] = L Lᵀ) it is the mean
    squared difference of the layer's output that is: that of update · L, divided by L again.

    By eigenvectors of the smaller Gram matrix: a few hundred matrices take seconds that way, not minutes.
    """
    matrix = update.detach().double()
    if not rank:
        return matrix.new_zeros((0, matrix.shape[1])).float(), matrix.new_zeros((matrix.shape[0], 0)).float()
    root = None if moment is None else _root(moment)
    seen = matrix if root is None else matrix @ root
    tall = seen.shape[0] > seen.shape[1]
    wide = seen.T if tall else seen
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    singular = squares[-rank:].clamp_min(0.0).sqrt().flip(0)
    kept = singular > _NEGLIGIBLE * singular[0]
    half = torch.where(kept, (singular / scale).sqrt(), 0.0)
    own = vectors[:, -rank:].flip(1)
    other = (own.T @ wide) * torch.where(kept, 1.0 / (scale * half), 0.0)[:, None]
    down, up = ((own * half).T, other.T) if tall else (other, own * half)
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return down.float(), up.float()


def closest_update(
    update: Tensor, rank: int, scale: float, moment: Tensor | None = None, *, signs: bool = False
) -> LayerUpdate:
    """`update` `[out, in]` as an adapter holds it: `closest_factors`, and with `signs` those of the rest.

    With signs the factors are fitted to what those leave, and they anew to what the factors leave, in turns.
    """
    whole = update.detach()
    down, up = closest_factors(whole, rank, scale, moment)
    if not signs:
        return LayerUpdate(down, up)
    for _ in range(_FITS):
        rest = closest_signs(whole - scale * (up @ down))
        down, up = closest_factors(whole - rest.dense(), rank, scale, moment)
    return LayerUpdate(down, up, closest_signs(whole - scale * (up @ down)))


def balanced_factors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same update from factors `[rank, in]` and `[out, rank]` of which each pair has one length.

    Factors cut by what they do to a layer's outputs have a short `down` and a long `up`. Adam's steps are of one size
    for all entries and would change the short ones beyond recognition.
    """
    lengths = down.norm(dim=1), up.norm(dim=0)
    some = (lengths[0] > 0) & (lengths[1] > 0)
    ratio = torch.where(some, lengths[1] / lengths[0].where(some, 1.0), 1.0).sqrt()
    return down * ratio[:, None], up / ratio


def _root(moment: Tensor) -> Tensor:
    """L of L Lᵀ."""
    matrix = moment.double()
    mean = matrix.diagonal().mean()
    ridge = torch.where(mean > 0, _RIDGE * mean, 1.0)
    root: Tensor = torch.linalg.cholesky(
        matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    )
    return root


@contextmanager
def input_moments(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Second moments float64 `[in, in]` (sums) of what each layer reads while the context is open, by its name.

    In float64: rounded sums are no longer positive definite where a few features are a thousand times the others.
    """
    sums: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(_add, sums, name)).remove)
        yield sums


@torch.no_grad()
def _add(sums: dict[str, Tensor], name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    with torch.autocast(inputs[0].device.type, enabled=False):
        rows = inputs[0].flatten(0, -2).double()
        product = rows.T @ rows
    sums[name] = product if name not in sums else sums[name] + product
