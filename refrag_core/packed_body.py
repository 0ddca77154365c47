"""An encoder body over texts of one length, for a GPU: full chunks as one run of tokens, none padded, none masked.

BERT and RoBERTa bodies alone. Weights for queries, keys and values are merged, what lies between the matrix products is
compiled into one kernel each, and attention, whose 8 to 32 tokens a chunk would leave most of a tensor core's tile
empty, takes several chunks a tile. Shorter texts may be among them, padded, if it is told where they end. Results are
those of the transformers model within rounding.
Notation: n chunks, t tokens of each, d_enc width, h heads, d_head their width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from refrag_core.captured import compiled
from refrag_core.chunk_attention import attend_within_chunks, fits_a_tile
from refrag_core.errors import ConfigError

PACKED_TYPES = ("bert", "roberta", "xlm-roberta")

AttentionForm = Literal["tiled", "masked", "batched", "plain"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)
"""tiled: a kernel that takes several chunks a tile. masked: several chunks as one sequence under a block-diagonal mask.
batched: two batched matrix products. plain: PyTorch's own attention, one chunk a sequence."""

_MASKED_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _Norm:
    """A layer norm's parameters."""

    weight: Tensor
    bias: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class _Product:
    """A linear layer's parameters."""

    weight: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    query_key_value: _Product
    attention_output: _Product
    attention_norm: _Norm
    feed_forward_input: _Product
    feed_forward_output: _Product
    feed_forward_norm: _Norm


def add_norm(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Layer norm of the sum."""
    return nn.functional.layer_norm(hidden + update, weight.shape, weight, bias, epsilon)


@cache
def _pointwise(on_cuda: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if not on_cuda:
        return add_norm, nn.functional.gelu
    return compiled(add_norm), compiled(nn.functional.gelu)


def is_packable(body: Any) -> bool:
    """Whether `PackedBody` computes what this transformers encoder does."""
    config = body.config
    return (
        config.model_type in PACKED_TYPES
        and config.hidden_act == "gelu"
        and getattr(config, "position_embedding_type", None) in (None, "absolute")
        and not getattr(config, "is_decoder", False)
    )


def default_form(device: torch.device, chunk_size: int, head_dim: int) -> AttentionForm:
    """The form that is meant for this device and shape."""
    return "tiled" if device.type == "cuda" and fits_a_tile(chunk_size, head_dim) else "plain"


class PackedBody:
    """The last layer's vectors of chunks or other texts, from their input embeddings.

    Args:
        body: a transformers encoder for which `is_packable` holds, on its device and in its dtype; its weights are
            copied where they are merged, shared where they are not.
        form: how attention is computed; None takes `default_form`.

    Raises ConfigError for a form that does not exist.
    """

    def __init__(self, body: Any, *, form: AttentionForm | None = None) -> None:
        if form is not None and form not in ATTENTION_FORMS:
            raise ConfigError(f"unknown form of attention {form!r}; expected one of {', '.join(ATTENTION_FORMS)}")
        config, embeddings = body.config, body.embeddings
        first = 0 if config.model_type == "bert" else int(config.pad_token_id) + 1
        offsets = embeddings.position_embeddings.weight[first:]
        if hasattr(embeddings, "token_type_embeddings"):
            offsets = offsets + embeddings.token_type_embeddings.weight[0]
        self._offsets = offsets
        self._norm = _norm(embeddings.LayerNorm)
        self._layers = [_layer(layer) for layer in body.encoder.layer]
        self._heads = int(config.num_attention_heads)
        self._head_dim = int(config.hidden_size) // self._heads
        self._form = form
        self._add_norm, self._gelu = _pointwise(offsets.device.type == "cuda")

    def __call__(self, embeds: Tensor, present: Tensor | None = None) -> Tensor:
        """`[n, t, d_enc]` of input embeddings `[n, t, d_enc]`.

        Args:
            present: bool `[n, t]`, False behind the end of short ones, whose vectors there mean nothing; None where all
                are t tokens long.
        """
        chunks, length, width = embeds.shape
        form = self._form or default_form(embeds.device, length, self._head_dim)
        norm = self._norm
        hidden = self._add_norm(embeds, self._offsets[:length], norm.weight, norm.bias, norm.epsilon).view(-1, width)
        for layer in self._layers:
            merged = layer.query_key_value(hidden).view(chunks, length, 3, self._heads, self._head_dim)
            attended = _attend(merged, form) if present is None else _attend_present(merged, present)
            mixed = layer.attention_output(attended.view(-1, width))
            hidden = self._normed(hidden, mixed, layer.attention_norm)
            inner = self._gelu(layer.feed_forward_input(hidden))
            hidden = self._normed(hidden, layer.feed_forward_output(inner), layer.feed_forward_norm)
        return hidden.view(chunks, length, width)

    def _normed(self, hidden: Tensor, update: Tensor, norm: _Norm) -> Tensor:
        return self._add_norm(hidden, update, norm.weight, norm.bias, norm.epsilon)


def _attend(merged: Tensor, form: AttentionForm) -> Tensor:
    """`[n, t, h * d_head]` of queries, keys and values `[n, t, 3, h, d_head]`; chunks see themselves alone."""
    if form == "tiled":
        return attend_within_chunks(merged)
    if form == "masked":
        return _attend_masked(merged)
    queries, keys, values = merged.permute(2, 0, 3, 1, 4)
    if form == "batched":
        scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(2, 3))
        mixed = torch.matmul(scores.softmax(dim=-1), values)
    else:
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
    return mixed.transpose(1, 2).flatten(2)


def _attend_present(merged: Tensor, present: Tensor) -> Tensor:
    """As `_attend`, to the tokens that are present alone."""
    queries, keys, values = merged.permute(2, 0, 3, 1, 4)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=present[:, None, None, :])
    return mixed.transpose(1, 2).flatten(2)


def _attend_masked(merged: Tensor) -> Tensor:
    """As many chunks a sequence as make about 128 tokens and divide their number."""
    chunks, length = merged.shape[:2]
    together = max(size for size in range(1, max(1, _MASKED_TOKENS // length) + 1) if chunks % size == 0)
    queries, keys, values = merged.view(-1, together * length, *merged.shape[2:]).permute(2, 0, 3, 1, 4)
    chunk = torch.arange(together * length, device=merged.device) // length
    own = chunk[:, None] == chunk
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=own)
    return mixed.transpose(1, 2).reshape(chunks, length, -1)


def _layer(layer: Any) -> _Layer:
    attention = layer.attention
    parts = (attention.self.query, attention.self.key, attention.self.value)
    return _Layer(
        query_key_value=_Product(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])),
        attention_output=_product(attention.output.dense),
        attention_norm=_norm(attention.output.LayerNorm),
        feed_forward_input=_product(layer.intermediate.dense),
        feed_forward_output=_product(layer.output.dense),
        feed_forward_norm=_norm(layer.output.LayerNorm),
    )


def _product(linear: nn.Linear) -> _Product:
    return _Product(linear.weight, linear.bias)


def _norm(norm: nn.LayerNorm) -> _Norm:
    return _Norm(norm.weight, norm.bias, norm.eps)
