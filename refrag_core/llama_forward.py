"""The forward of Llama-family decoders over preallocated rows, with as few passes over memory as there must be.

The model's own weights, merged: one product for queries, keys and values, one for gate and up. What lies between the
products (norms, rotary positions, activations) is small functions that PyTorch compiles into one kernel each on CUDA
and runs as they stand on a CPU. The transformers model keeps working: its weights become views of the merged ones.
Notation: b prompts, t inputs of each, d_dec width, h query heads, h_kv key heads, d_head their width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from refrag_core.captured import compiled
from refrag_core.key_value_rows import KeyValueRows, Places, causal_attention

LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose angles depend on the position alone, not on how long a sequence is."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights; a bias or norm is None where the model has none."""

    input_norm: Tensor
    query_key_value: Tensor
    query_key_value_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_output: Tensor
    attention_output_bias: Tensor | None
    feed_forward_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Pointwise:
    """What lies between the matrix products."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    head_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor], Tensor]


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`hidden` over its root mean square, in float32 as the models do, times `weight`."""
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return weight * scaled.to(hidden.dtype)


def head_norm(heads: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` of every head of `[b, t, h, d_head]`; of its own, since a compiled function has one rank."""
    return rms_norm(heads, weight, epsilon)


def add_norm(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`hidden + update`, and that normalised."""
    total = hidden + update
    return total, rms_norm(total, weight, epsilon)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `[b, t, h, d_head]`, cos and sin `[b, t, 1, d_head]`."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of the two halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@cache
def _pointwise(on_cuda: bool) -> Pointwise:
    if not on_cuda:
        return Pointwise(rms_norm, head_norm, add_norm, rotate, gated)

    return Pointwise(compiled(rms_norm), compiled(head_norm), compiled(add_norm), compiled(rotate), compiled(gated))


def is_llama_like(model: Any) -> bool:
    """Whether `LlamaForward` computes what this transformers model does."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        model.config.model_type in LLAMA_TYPES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _ROPE_TYPES
        and not any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and all(type(module) is nn.Linear for module in _projections(model))
        and is_on_one_device(model)
    )


def is_on_one_device(model: Any) -> bool:
    """Whether no layer of it lies elsewhere than the others."""
    return len({parameter.device for parameter in model.parameters()}) == 1


class LlamaForward:
    """Logits float32 `[b, V]` of each prompt's last input; keys and values go into the rows.

    Args:
        model: a transformers model for which `is_llama_like` holds; its weights are merged in place.
        max_positions: for which rotary angles are kept.
    """

    def __init__(self, model: Any, rows: KeyValueRows, *, max_positions: int) -> None:
        config = model.config.get_text_config()
        self._rows = rows
        self._epsilon = float(config.rms_norm_eps)
        self._head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._num_kv_heads = int(config.num_key_value_heads)
        self._layers = [_merged(layer) for layer in model.model.layers]
        self._norm = model.model.norm.weight
        self._head = model.get_output_embeddings()
        embeddings = model.get_input_embeddings().weight
        self._cos, self._sin = _angles(model, max(max_positions, rows.capacity), embeddings)
        self._between = _pointwise(embeddings.device.type == "cuda")
        self.bounded_by_device = rows.reads_in_place(embeddings)

    def __call__(self, embeds: Tensor, places: Places, last: Tensor) -> Tensor:
        """Logits after inputs `[b, t, d_dec]`, of input `last` int64 `[b]` of each prompt."""
        between, epsilon = self._between, self._epsilon
        cos, sin = (table[places.positions][:, :, None] for table in (self._cos, self._sin))
        hidden = embeds
        normed = between.rms_norm(hidden, self._layers[0].input_norm, epsilon)
        norms = [*(layer.input_norm for layer in self._layers[1:]), self._norm]
        for number, (layer, norm) in enumerate(zip(self._layers, norms, strict=True)):
            mixed = self._mix(number, layer, normed, places, cos, sin)
            if layer is self._layers[-1]:  # behind its keys and values, the last layer owes only the last input's
                hidden, mixed = (_pick(part, last) for part in (hidden, mixed))
            update = nn.functional.linear(mixed, layer.attention_output, layer.attention_output_bias)
            hidden, normed = between.add_norm(hidden, update, layer.feed_forward_norm, epsilon)
            inner = between.gated(nn.functional.linear(normed, layer.gate_up, layer.gate_up_bias))
            update = nn.functional.linear(inner, layer.down, layer.down_bias)
            hidden, normed = between.add_norm(hidden, update, norm, epsilon)
        logits: Tensor = self._head(normed[:, 0]).float()
        return logits

    def _mix(self, number: int, layer: _Layer, normed: Tensor, places: Places, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer's attention `[b, t, h * d_head]`, before its output product."""
        merged = nn.functional.linear(normed, layer.query_key_value, layer.query_key_value_bias)
        heads = merged.view(*merged.shape[:2], -1, self._head_dim)
        queries, keys, values = heads.tensor_split((-2 * self._num_kv_heads, -self._num_kv_heads), dim=2)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = self._between.head_norm(queries, layer.query_norm, self._epsilon)
            keys = self._between.head_norm(keys, layer.key_norm, self._epsilon)
        queries, keys = (self._between.rotate(part, cos, sin) for part in (queries, keys))
        self._rows.write(number, places, keys, values)
        if places.window:
            return self._rows.attend(number, places, queries).flatten(2)
        return causal_attention(queries, keys, values).flatten(2)


def _pick(hidden: Tensor, last: Tensor) -> Tensor:
    """`[b, 1, …]`: input `last` int64 `[b]` of each prompt."""
    return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))


def _angles(model: Any, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[count, d_head]` of the model's own rotary positions, in its dtype."""
    positions = torch.arange(count, device=like.device)[None]
    cos, sin = model.model.rotary_emb(like[:1], positions)
    return cos[0], sin[0]


def _projections(model: Any) -> list[Any]:
    return [
        module
        for layer in model.model.layers
        for block, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down")))
        for module in (getattr(block, f"{name}_proj", None) for name in names)
    ]


def _merged(layer: Any) -> _Layer:
    attention, feed_forward = layer.self_attn, layer.mlp
    merged, bias = _merge(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _merge(feed_forward.gate_proj, feed_forward.up_proj)
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        query_key_value=merged,
        query_key_value_bias=bias,
        query_norm=_weight(attention, "q_norm"),
        key_norm=_weight(attention, "k_norm"),
        attention_output=attention.o_proj.weight,
        attention_output_bias=attention.o_proj.bias,
        feed_forward_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=feed_forward.down_proj.weight,
        down_bias=feed_forward.down_proj.bias,
    )


def _weight(block: Any, name: str) -> Tensor | None:
    norm = getattr(block, name, None)
    return None if norm is None else norm.weight


def _merge(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The parts' weights one below the other; each part's own becomes a view, so that nothing is held twice."""
    names = ("weight",) if parts[0].bias is None else ("weight", "bias")
    whole = []
    for name in names:
        own = [getattr(part, name) for part in parts]
        found = _already_merged([tensor.data for tensor in own])
        merged = torch.cat([tensor.data for tensor in own]) if found is None else found
        for tensor, view in zip(own, torch.split(merged, [len(tensor) for tensor in own]), strict=True):
            tensor.data = view
        whole.append(merged)
    return whole[0], whole[1] if len(whole) == 2 else None


def _already_merged(own: list[Tensor]) -> Tensor | None:
    """What an earlier merge made: neighbours in one storage; None where they are not."""
    starts, place = [], own[0].storage_offset()
    for tensor in own:
        starts.append(place)
        place += tensor.numel()
    first = own[0].untyped_storage().data_ptr()
    if any(
        t.untyped_storage().data_ptr() != first or t.storage_offset() != s for t, s in zip(own, starts, strict=True)
    ):
        return None
    shape = (sum(len(tensor) for tensor in own), *own[0].shape[1:])
    return own[0].as_strided(shape, own[0].stride(), own[0].storage_offset())
