"""The decoder's keys and values: preallocated rows, one a sequence, each as long as its sequence has become.

Notation: b prompts of a forward, t inputs of each (padded on the right), h query heads, h_kv key heads, d_head their
width, w = window, cached positions that a forward looks at.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CAPACITY_STEP = 64


@dataclass(frozen=True, slots=True)
class Places:
    """Where the inputs of a forward stand in the cache."""

    rows: Tensor
    """int64 `[b]`: the row of each prompt. One may stand twice with the same inputs."""
    positions: Tensor
    """int64 `[b, t]`, consecutive. Inputs behind a prompt's end get positions too; nothing ever looks at them."""
    flat: Tensor
    """int64 `[b * t]`: where each input's key goes in a layer's `[rows * capacity, …]`."""
    window: int
    """Cached positions to look at, at least every prompt's last position + 1; 0 where all prompts begin at 0, and
    their own inputs are all there is."""

    def mask(self) -> Tensor:
        """bool `[b, 1, t, window]`: which cached positions each input sees."""
        cached = torch.arange(self.window, device=self.positions.device)
        return cached <= self.positions[:, None, :, None]


class KeyValueRows:
    """Keys and values of every layer, `[rows * capacity, h_kv, d_head]` each, allocated when a layer first writes.

    Args:
        rows: sequences side by side.
        max_positions: of one sequence. A little more is allocated, for padding behind the last position.
    """

    def __init__(self, *, rows: int, max_positions: int, num_layers: int) -> None:
        self.rows = rows
        self.capacity = (max_positions // CAPACITY_STEP + 1) * CAPACITY_STEP
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def allocated_bytes(self) -> int:
        """Of all layers that have written."""
        return sum(part.numel() * part.element_size() for part in (*self._keys, *self._values) if part is not None)

    @property
    def position_bytes(self) -> int:
        """Bytes that one position of one sequence takes in all layers."""
        return self.allocated_bytes // (self.rows * self.capacity)

    @staticmethod
    def reads_in_place(like: Tensor) -> bool:
        """Whether `attend` on this device, in this dtype, reads rows where they lie, no further than they are long."""
        return like.device.type == "cuda" and like.dtype in (torch.bfloat16, torch.float16)

    def places(self, rows: Tensor, start: Tensor, length: int, window: int) -> Places:
        """The places of `length` inputs a prompt that begin at position `start` int64 `[b]` of `rows` int64 `[b]`."""
        positions = start[:, None] + torch.arange(length, device=start.device)
        positions = positions.clamp_max(self.capacity - 1)
        flat = (rows[:, None] * self.capacity + positions).flatten()
        return Places(rows, positions, flat, window)

    def write(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values `[b, t, h_kv, d_head]` of a layer's inputs."""
        if self._keys[layer] is None:
            shape = (self.rows * self.capacity, *keys.shape[2:])
            self._keys[layer], self._values[layer] = keys.new_zeros(shape), values.new_zeros(shape)
        kept_keys, kept_values = self._layer(layer)
        kept_keys.index_copy_(0, places.flat, keys.flatten(0, 1))
        kept_values.index_copy_(0, places.flat, values.flatten(0, 1))

    def read(self, layer: int, places: Places) -> tuple[Tensor, Tensor]:
        """Keys and values `[b, window, h_kv, d_head]` of the places' rows, zero behind each row's last position."""
        # A longer sequence may have left a NaN there, and a mask does not help: 0 · NaN is NaN.
        cached = torch.arange(places.window, device=places.positions.device)
        behind = (cached > places.positions[:, -1:])[:, :, None, None]
        by_row = (part.view(self.rows, self.capacity, *part.shape[1:]) for part in self._layer(layer))
        keys, values = (part[:, : places.window][places.rows].masked_fill_(behind, 0) for part in by_row)
        return keys, values

    def attend(self, layer: int, places: Places, queries: Tensor) -> Tensor:
        """What queries `[b, t, h, d_head]` read from the cache, which has their own keys by now; the same shape."""
        if self.reads_in_place(queries):
            return self._attend_flash(layer, places, queries)
        keys, values = self.read(layer, places)
        return _attention(queries, keys, values, attn_mask=places.mask())

    def _attend_flash(self, layer: int, places: Places, queries: Tensor) -> Tensor:
        """Flash attention over the rows where they lie: nothing is copied, and the device's lengths bound the work."""
        keys, values = self._layer(layer)
        batch, length = places.positions.shape
        starts = (places.rows * self.capacity).int()
        begins = torch.arange(batch + 1, device=queries.device, dtype=torch.int32) * length
        made: Tensor = torch.ops.aten._flash_attention_forward(
            queries.flatten(0, 1),
            keys,
            values,
            begins,
            torch.cat([starts, starts[-1:] + self.capacity]),
            length,
            self.capacity,
            0.0,
            True,
            False,
            seqused_k=places.positions[:, -1].int() + 1,
        )[0]
        return made.view(queries.shape)

    def _layer(self, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None, "a layer is written before it is read"
        assert values is not None
        return keys, values


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of a prompt's own inputs alone, without a mask tensor; `[b, t, h, d_head]`."""
    return _attention(queries, keys, values, is_causal=True)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    made = nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        enable_gqa=queries.shape[2] != keys.shape[2],
        **options,
    )
    return made.transpose(1, 2)
