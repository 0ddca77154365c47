"""A decoder's trained update: of low rank for each layer, and where it has signs, one bit for each entry of the rest.

What a low rank leaves out of a whole matrix's training is much, and its sign alone, with a scale a row and a column,
says most of it: what is wrong with each entry then has no direction, and does little (BitDelta, arXiv:2402.10193).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refrag_core.errors import ConfigError

_FITS = 3
"""Rounds in which rows' and columns' scales are fitted to each other."""


@dataclass(frozen=True, slots=True)
class SignMatrix:
    """A matrix `[out, in]` whose entry (i, j) is ± rows[i] · columns[j]."""

    bits: Tensor
    """uint8 `[out, ⌈in/8⌉]`: bit j mod 8 (1, 2, 4, …) of byte j // 8 is 1 where entry j is positive."""
    rows: Tensor
    """Float `[out]`."""
    columns: Tensor
    """Float `[in]`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.rows), len(self.columns)

    @property
    def is_whole(self) -> bool:
        """Whether its parts are of one matrix."""
        ranks = (self.bits.ndim, self.rows.ndim, self.columns.ndim)
        if self.bits.dtype != torch.uint8 or ranks != (2, 1, 1):
            return False
        return tuple(self.bits.shape) == (self.shape[0], -(-self.shape[1] // 8))

    def dense(self) -> Tensor:
        """Float32 `[out, in]`, on the device of the scales."""
        bits = np.unpackbits(self.bits.cpu().numpy(), axis=1, count=self.shape[1], bitorder="little")
        signs = torch.from_numpy(bits).to(self.rows.device, torch.float32).mul_(2.0).sub_(1.0)
        return signs.mul_(self.rows.float()[:, None]).mul_(self.columns.float())


def closest_signs(matrix: Tensor) -> SignMatrix:
    """The signs of `matrix` `[out, in]`, and scales float32 that come close to its entries' sizes.

    Rows' and columns' scales are the least-squares ones for each other, in turns; those of the columns are 1 on
    average. 0 counts as positive.
    """
    sizes = matrix.detach().float().abs()
    columns = torch.ones(sizes.shape[1], device=sizes.device)
    rows = sizes.mean(dim=1)
    for _ in range(_FITS):
        columns = sizes.T @ rows / rows.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        mean = columns.mean()
        columns = torch.where(mean > 0, columns / mean, 1.0)
        rows = sizes @ columns / columns.square().sum()
    bits = np.packbits((matrix.detach() >= 0).cpu().numpy(), axis=1, bitorder="little")
    return SignMatrix(torch.from_numpy(bits), rows, columns)


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """The update of one layer's weight `[out, in]`: scale · up @ down, and `signs`."""

    down: Tensor
    """Float `[rank, in]`."""
    up: Tensor
    """Float `[out, rank]`."""
    signs: SignMatrix | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self, scale: float) -> Tensor:
        """Float32 `[out, in]`."""
        product = scale * (self.up.float() @ self.down.float())
        return product if self.signs is None else product.add_(self.signs.dense())

    def state(self, layer: str) -> dict[str, Tensor]:
        """Its tensors, named for an `Adapter` whose layer it is."""
        found = {f"{layer}.down": self.down, f"{layer}.up": self.up}
        if self.signs is not None:
            found |= {
                f"{layer}.signs": self.signs.bits,
                f"{layer}.rows": self.signs.rows,
                f"{layer}.columns": self.signs.columns,
            }
        return found


@dataclass(frozen=True, slots=True)
class Adapter:
    """Trained updates of a decoder's linear layers (LoRA, arXiv:2106.09685)."""

    state: Mapping[str, Tensor]
    """`LAYER.down` float `[rank, in]` and `LAYER.up` float `[out, rank]` of each adapted layer, and where it has them
    `LAYER.signs`, `LAYER.rows` and `LAYER.columns` as in `SignMatrix`."""
    scale: float
    """A layer's weight becomes weight + scale · up @ down (+ its signs)."""

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers, sorted."""
        return sorted({key.rpartition(".")[0] for key in self.state})

    @property
    def rank(self) -> int:
        """The highest of its factors; 0 without any. Raises ConfigError like `update`."""
        return max((len(self.update(layer).down) for layer in self.layers), default=0)

    @property
    def has_signs(self) -> bool:
        """Whether some layer has signs. Raises ConfigError like `update`."""
        return any(self.update(layer).signs is not None for layer in self.layers)

    def update(self, layer: str) -> LayerUpdate:
        """That of a layer. Raises ConfigError where its tensors do not make one."""
        parts = {key.rpartition(".")[2]: value for key, value in self.state.items() if key.rpartition(".")[0] == layer}
        kinds = {"down", "up"}, {"down", "up", "signs", "rows", "columns"}
        if parts.keys() not in kinds:
            raise ConfigError(f"the adapter's layer {layer!r} has {', '.join(sorted(parts))}; {_EXPECTED}")
        down, up = parts["down"], parts["up"]
        signs = SignMatrix(parts["signs"], parts["rows"], parts["columns"]) if "signs" in parts else None
        fits = down.ndim == up.ndim == 2 and len(down) == up.shape[1]
        if not fits or (signs is not None and not (signs.is_whole and signs.shape == (up.shape[0], down.shape[1]))):
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(parts.items()))
            raise ConfigError(f"the adapter's layer {layer!r} has {shapes}, which do not fit; {_EXPECTED}")
        return LayerUpdate(down, up, signs)


_EXPECTED = (
    "expected down [rank, in] and up [out, rank], alone or with signs, rows and columns: get the checkpoint again"
)
