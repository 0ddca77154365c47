"""Attention within chunks of a few tokens, several chunks a tile: a Triton kernel, compiled on first use.

A tile holds whole chunks, up to 64 tokens of one head; scores between chunks are masked in registers. Queries,
keys and values are read where the merged product left them, and nothing is transposed in memory.
"""

import torch
from torch import Tensor

TILE_TOKENS = 64
_SMALLEST_DOT = 16
"""Rows and columns that a tile's matrix product has at least."""


def fits_a_tile(chunk_size: int, head_dim: int) -> bool:
    """Whether the kernel takes chunks of this many tokens and heads of this width."""
    return chunk_size <= TILE_TOKENS and head_dim >= _SMALLEST_DOT and head_dim & (head_dim - 1) == 0


def attend_within_chunks(merged: Tensor) -> Tensor:
    """`[n, t, h * d_head]` of queries, keys and values `[n, t, 3, h, d_head]`, contiguous."""
    chunks, length, _, heads, head_dim = merged.shape
    tokens, per_tile = chunks * length, TILE_TOKENS // length * length
    mixed = torch.empty((chunks, length, heads * head_dim), dtype=merged.dtype, device=merged.device)
    from refrag_core.chunk_attention_kernel import attend_tile

    attend_tile[(-(-tokens // per_tile), heads)](
        merged,
        mixed,
        tokens,
        head_dim**-0.5,
        length,
        per_tile,
        heads * head_dim,
        head_dim,
        TILE_TOKENS,
    )
    return mixed
