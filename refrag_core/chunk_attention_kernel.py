"""The kernel of `chunk_attention`; Triton comes with PyTorch for CUDA, and only with that."""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    merged,
    mixed,
    tokens,
    scale,
    length: tl.constexpr,
    per_tile: tl.constexpr,
    width: tl.constexpr,
    head_dim: tl.constexpr,
    tile: tl.constexpr,
):
    """One head of one tile: `per_tile` tokens in chunks of `length`, of `merged` `[tokens, 3, width]`."""
    own = tl.arange(0, tile)
    rows = tl.program_id(0) * per_tile + own
    inside = (own < per_tile) & (rows < tokens)
    columns = tl.program_id(1) * head_dim + tl.arange(0, head_dim)
    places = rows[:, None].to(tl.int64) * (3 * width) + columns[None, :]
    queries = tl.load(merged + places, mask=inside[:, None], other=0.0)
    keys = tl.load(merged + places + width, mask=inside[:, None], other=0.0)
    values = tl.load(merged + places + 2 * width, mask=inside[:, None], other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    chunk = own // length
    scores = tl.where(chunk[:, None] == chunk[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    read = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    target = mixed + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(target, read.to(mixed.dtype.element_ty), mask=inside[:, None])
