"""What is trained: encoder body, projection and decoder adapter as one module.

Notation as in `refrag_core.training.batches`; d_enc and d_dec as elsewhere.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refrag_core.adapter import Adapter, LayerUpdate, SignMatrix
from refrag_core.encoder import EncoderModule
from refrag_core.errors import ConfigError, UnsupportedDecoderError
from refrag_core.training.low_rank import balanced_factors, closest_factors, closest_update

DecoderTraining = Literal["frozen", "lora", "full"]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_HEAD_TOLERANCE = 1e-2
_CAUSAL = "refrag-causal-sdpa"
_MASK_WHERE_GIVEN = "refrag-mask-where-given-sdpa"


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trained update of its weight, which `enabled` switches off.

    The update is added to the weight and not to the output: the forward pass then is exactly what a decoder
    with merged weights computes, and costs one matrix product a layer.
    """

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.enabled = True

    def forward(self, inputs: Tensor) -> Tensor:
        """`[…, in]` → `[…, out]`."""
        weight = self.weight() if self.enabled else self.base.weight
        return nn.functional.linear(inputs, weight, self.base.bias)

    def weight(self) -> Tensor:
        """`[out, in]`, base and update."""
        raise NotImplementedError

    def stored(self, rank: int, moment: Tensor | None = None, *, signs: bool = False) -> LayerUpdate:
        """The update as a checkpoint holds it, with factors of that rank.

        Where it has more than that rank they are what comes closest, by the second moment `[in, in]` of the inputs
        where that is given; with `signs` the rest is stored as signs.
        """
        raise NotImplementedError

    def takes(self, update: LayerUpdate) -> bool:
        """Whether the update can start from a stored one, of any rank."""
        return (self.base.out_features, self.base.in_features) == update.shape

    def start_from(self, update: LayerUpdate) -> None:
        """Make the update the stored one, or what comes closest to it."""
        raise NotImplementedError


class LoRALinear(AdaptedLinear):
    """The update is of low rank: scale · up @ down (LoRA, arXiv:2106.09685), beside signs that stay as they are."""

    signed: Tensor | None
    """Float32, the base's weight with the signs added; None without signs."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base, scale)
        self.down = nn.Parameter(torch.empty((rank, base.in_features), dtype=torch.float32, device=base.weight.device))
        self.up = nn.Parameter(torch.zeros((base.out_features, rank), dtype=torch.float32, device=base.weight.device))
        self.signs: SignMatrix | None = None
        self.register_buffer("signed", None, persistent=False)

    def weight(self) -> Tensor:
        """`[out, in]`."""
        if self.signed is None:
            return torch.addmm(self.base.weight, self.up, self.down, alpha=self.scale)
        # Rounded once, as merged weights are: the factors would learn to correct another rounding of the signs.
        return (self.signed + self.scale * (self.up @ self.down)).to(self.base.weight.dtype)

    def stored(self, rank: int, moment: Tensor | None = None, *, signs: bool = False) -> LayerUpdate:  # noqa: ARG002
        """Its own factors, and the signs that it started from. Raises ConfigError for another rank."""
        if rank != len(self.down):
            raise ConfigError(f"the decoder is trained with rank {len(self.down)}; expected adapter_rank {rank}")
        return LayerUpdate(self.down.detach(), self.up.detach(), self.signs)

    def start_from(self, update: LayerUpdate) -> None:
        """Balance the factors; of more than its rank it takes the closest, with fewer the rest begins at nothing."""
        rank, down, up = len(self.down), update.down, update.up
        if update.signs is not None:
            self.signs, weight = update.signs, self.base.weight
            self.signed = weight.float() + update.signs.dense().to(weight.device)
        if len(down) > rank:
            down, up = closest_factors(self.scale * (up.float() @ down.float()), rank, self.scale)
        down, up = balanced_factors(down.float(), up.float())
        self.down[: len(down)].copy_(down)
        self.up[:, : len(down)].copy_(up)


class FullLinear(AdaptedLinear):
    """The update is a whole matrix, float32 beside a base of the run's precision; saved as its closest of low rank,
    and perhaps signs."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__(base, scale)
        self.update = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))

    def weight(self) -> Tensor:
        """`[out, in]`, rounded once."""
        return (self.base.weight.float() + self.update).to(self.base.weight.dtype)

    def stored(self, rank: int, moment: Tensor | None = None, *, signs: bool = False) -> LayerUpdate:
        """What comes closest to the update."""
        return closest_update(self.update, rank, self.scale, moment, signs=signs)

    def start_from(self, update: LayerUpdate) -> None:
        """Multiply the stored one out."""
        self.update.copy_(update.dense(self.scale))


def add_adapter(decoder: Any, *, rank: int, scale: float, targets: Sequence[str], seed: int) -> None:
    """Put a `LoRALinear`, which at first changes nothing, in place of the linear layers named `targets`.

    Raises ConfigError when no layer has such a name.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in _target_names(decoder, targets):
        layer = LoRALinear(decoder.get_submodule(name), rank, scale)
        down = torch.randn(layer.down.shape, generator=generator) / math.sqrt(layer.down.shape[1])
        layer.down.data.copy_(down)
        _replace(decoder, name, layer)


def unfreeze(decoder: Any, *, scale: float, targets: Sequence[str]) -> None:
    """Put a `FullLinear`, which at first changes nothing, in place of the linear layers named `targets`.

    Raises ConfigError when no layer has such a name.
    """
    for name in _target_names(decoder, targets):
        _replace(decoder, name, FullLinear(decoder.get_submodule(name), scale))


def _target_names(decoder: Any, targets: Sequence[str]) -> list[str]:
    found = [
        name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in targets
    ]
    if not found:
        raise ConfigError(f"the decoder has no linear layer named {', '.join(targets)}; give its own adapter_targets")
    return sorted(found)


def _replace(decoder: Any, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(decoder.get_submodule(parent), own, layer)


def adapter_layers(decoder: Any) -> dict[str, AdaptedLinear]:
    """The adapted layers, by name."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, AdaptedLinear)}


def adapter_state(
    decoder: Any, rank: int, moments: Mapping[str, Tensor] | None = None, *, signs: bool = False
) -> dict[str, Tensor]:
    """Every adapted layer's update, as the state of a `refrag_core.adapter.Adapter`.

    Args:
        moments: `refrag_core.training.low_rank.input_moments` of the layers, for updates of more than `rank`.
        signs: store what the rank leaves out of such updates as signs.
    """
    state: dict[str, Tensor] = {}
    for name, layer in sorted(adapter_layers(decoder).items()):
        state |= layer.stored(rank, None if moments is None else moments[name], signs=signs).state(name)
    return state


@torch.no_grad()
def start_adapter(decoder: Any, adapter: Adapter) -> None:
    """Make the adapted layers' updates the adapter's, as far as their ranks go. Raises ConfigError for other layers."""
    layers = adapter_layers(decoder)
    odd = sorted(layers.keys() ^ set(adapter.layers)) or [
        name for name, layer in layers.items() if not layer.takes(adapter.update(name))
    ]
    if odd:
        raise ConfigError(
            f"the checkpoint's adapter differs from the config's in {len(odd)} layers ({odd[0]}, …); expected the same "
            f"adapter_targets and decoder to go on training it"
        )
    for name, layer in layers.items():
        layer.start_from(adapter.update(name))


@contextmanager
def without_adapter(decoder: Any) -> Iterator[None]:
    """The decoder as it was before training."""
    layers = list(adapter_layers(decoder).values())
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


class ChunkReadout(nn.Module):
    """A linear map for each place in a chunk, from the chunk's vector to what the output layer reads that token from.

    It teaches encoder and projection to keep every token apart before the decoder has learnt to look, which is slow as
    long as the vectors say nothing. Of a checkpoint it is no part.
    """

    def __init__(self, size: int, width: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.maps = nn.Parameter(torch.randn((size, width, width), generator=random) / math.sqrt(width))
        self.norm = nn.RMSNorm(width)

    def forward(self, vectors: Tensor, size: int) -> Tensor:
        """Projected vectors `[n, d_dec]` of chunks of `size` tokens → `[n·size, d_dec]`."""
        made: Tensor = self.norm(torch.einsum("nd,ked->nke", vectors, self.maps[:size].to(vectors.dtype)))
        return made.flatten(0, 1)


class TrainingModel(nn.Module):
    """Encoder (frozen embedding table, trained body), projection, and a decoder that is frozen or has an adapter.

    Args:
        encoder: with the body's layers to train, float32.
        projection: φ, float32.
        decoder: a transformers causal language model whose logits are its output layer over its last hidden
            state; UnsupportedDecoderError for others.
        readout: what reads tokens from vectors without the decoder, None for a model without it.
    """

    def __init__(
        self, encoder: EncoderModule, projection: nn.Module, decoder: Any, readout: ChunkReadout | None = None
    ) -> None:
        super().__init__()
        refuse_other_heads(decoder)
        self.encoder = encoder
        self.projection = projection
        self.decoder = decoder
        self.readout = readout
        self._causal = read_rows_causally(decoder)
        mask_where_given(encoder.body)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(not _is_table(name))

    @property
    def head(self) -> Tensor:
        """`[V, d_dec]`, the output layer's weight."""
        weight: Tensor = self.decoder.get_output_embeddings().weight
        return weight

    @property
    def reads_branches(self) -> bool:
        """Whether rows may have `refrag_core.training.batches.Branches`."""
        return self._causal

    def forward(
        self,
        ids: Tensor,
        chunk_ids: Tensor,
        places: Tensor,
        predict_at: Tensor,
        *branches: Tensor,
        ragged: bool = False,
    ) -> Tensor:
        """Last hidden states `[b·m, d_dec]` of the slots `predict_at`; arguments as in `TrainingBatch.arrays`."""
        return self.read(ids, self.vectors(chunk_ids, ragged), places, predict_at, *branches)

    def read(
        self,
        ids: Tensor,
        vectors: Tensor | None,
        places: Tensor,
        predict_at: Tensor,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """The same from `vectors` of the chunks; `positions` and `visible` as in `Branches`."""
        mask = torch.ones_like(ids, dtype=torch.bool) if self._causal else None
        hidden: Tensor = self.decoder.base_model(
            inputs_embeds=self.embed(ids, vectors, places),
            attention_mask=mask if visible is None else visible[None, None],
            position_ids=None if positions is None else positions[None],
            use_cache=False,
        ).last_hidden_state
        index = predict_at[:, :, None].expand(-1, -1, hidden.shape[2])
        return hidden.gather(1, index).flatten(0, 1)

    def vectors(self, chunk_ids: Tensor, ragged: bool = False) -> Tensor | None:
        """Projected chunk vectors `[b, n, d_dec]` of `[b, n, k]`; None where n is 0."""
        rows, count, size = chunk_ids.shape
        if count == 0:
            return None
        chunks = chunk_ids.reshape(rows * count, size)
        encoded = self.encoder(chunks.clamp_min(0), chunks >= 0) if ragged else self.encoder(chunks)
        projected: Tensor = self.projection(encoded)
        return projected.view(rows, count, -1)

    def embed(self, ids: Tensor, vectors: Tensor | None, places: Tensor) -> Tensor:
        """Decoder input `[b, t, d_dec]`: token embeddings with the projected chunk vectors in their slots."""
        embeds: Tensor = self.decoder.get_input_embeddings()(ids.clamp_min(0))
        if vectors is None:
            return embeds
        index = places[:, :, None].expand(-1, -1, embeds.shape[2])
        return embeds.scatter(1, index, vectors.to(embeds.dtype))

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trained parameters by part: encoder, projection, decoder and perhaps readout; sorted by name."""
        parts: dict[str, nn.Module] = {
            "encoder": self.encoder,
            "projection": self.projection,
            "decoder": self.decoder,
        } | ({} if self.readout is None else {"readout": self.readout})
        return {
            part: sorted((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)
            for part, module in parts.items()
        }


def _is_table(name: str) -> bool:
    return name.startswith("embedding.") or name.endswith("word_embeddings.weight")


def read_rows_causally(decoder: Any) -> bool:
    """Tell a decoder whose layers all attend to the whole row that rows hold one text each, without padding.

    transformers otherwise looks for several texts in a row, by values that it waits for on the device: that stalls
    every step and cannot be captured. A mask given then means nothing to the decoder, but spares the search.
    Returns False, and changes nothing, for a decoder with other attention or another implementation of it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = decoder.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa" or kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return False
    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    AttentionMaskInterface.register(_CAUSAL, _no_mask)
    decoder.set_attn_implementation(_CAUSAL)  # some decoders leave it as it was, with a warning
    return bool(config._attn_implementation == _CAUSAL)


def _no_mask(*_: Any, **__: Any) -> None:
    """sdpa without a mask is causal."""


def mask_where_given(body: Any) -> None:
    """Tell an encoder body to make no attention mask of its own where it gets none.

    Some versions of transformers make one, of ones alone, only while a CUDA graph is captured: the compiled layers
    then meet a new case at the one moment when nothing can be compiled.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if body.config._attn_implementation == "sdpa":
        AttentionInterface.register(_MASK_WHERE_GIVEN, sdpa_attention_forward)
        AttentionMaskInterface.register(_MASK_WHERE_GIVEN, _given_mask)
        body.set_attn_implementation(_MASK_WHERE_GIVEN)


def _given_mask(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


@torch.no_grad()
def refuse_other_heads(decoder: Any) -> None:
    """Raise UnsupportedDecoderError where logits are not simply the output layer over the last hidden state."""
    device = decoder.get_input_embeddings().weight.device
    ids = torch.arange(4, device=device)[None]
    logits = decoder(input_ids=ids, use_cache=False).logits.float()
    hidden = decoder.base_model(input_ids=ids, use_cache=False).last_hidden_state
    made = (hidden @ decoder.get_output_embeddings().weight.to(hidden.dtype).T).float()
    if logits.shape != made.shape or not torch.allclose(logits, made, rtol=_HEAD_TOLERANCE, atol=_HEAD_TOLERANCE):
        raise UnsupportedDecoderError(
            f"decoder type {decoder.config.model_type!r} does more to its last hidden state than its output layer; "
            f"expected plain logits to train with: take a Llama, Qwen, Mistral or GPT-2 kind of decoder"
        )


def compile_layers(model: TrainingModel, *, static_shapes: bool = False) -> None:
    """Compile the layers of body and decoder in place: once for all shapes of a run, or each for every static one."""
    torch._dynamo.config.recompile_limit = 64
    for stack in (model.decoder.base_model, model.encoder.body):
        for layer in _layers(stack):
            layer.compile(dynamic=not static_shapes)


def _layers(module: nn.Module) -> nn.ModuleList:
    """The longest list of layers in `module`: its stack."""
    lists = [found for found in module.modules() if isinstance(found, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())
