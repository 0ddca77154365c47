"""The decoder: a causal language model that is fed embeddings, token by token exact.

Notation: b prompts, s slots of the longest, d_dec width of the input embeddings, V vocabulary.
"""

import importlib.util
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from refrag_core.adapter import Adapter
from refrag_core.composition import PromptBatch
from refrag_core.errors import ConfigError, ModelNotFoundError, UnsupportedDecoderError
from refrag_core.models import load_tokenizer, without_progress_bars

FINISHED = -1
"""Stands in a step's tokens for a prompt whose answer has ended."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

REFUSED_TYPES = {
    "gemma3n": "its layers look token ids up in tables of their own",
    "gemma3n_text": "its layers look token ids up in tables of their own",
}
_REQUIRED_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "logits_to_keep")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_RMS_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a prefill leaves behind."""

    logits: Tensor
    """float32 `[b, V]`, of the last slot only: the first new token comes from these."""
    cache: Any
    """The model's key-value cache over all slots."""


class Decoder:
    """A causal language model, its tokenizer and the ids that end an answer.

    Args:
        model: a transformers causal language model, already on its device.
        tokenizer: turns its ids into text.
        eos_ids: ids that end an answer; None takes the model's own.

    Raises UnsupportedDecoderError for a model that cannot be fed embeddings in place of ids.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, eos_ids: Sequence[int] | None = None) -> None:
        refuse_unsupported(model.config)
        _refuse_signature(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(own_eos_ids(model) if eos_ids is None else eos_ids)
        # Looked up once: transformers searches for both anew each time, which every question would pay several times.
        self._embeddings = self.model.get_input_embeddings()
        self._config = self.model.config.get_text_config()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        adapter: Adapter | None = None,
        device_map: str | None = None,
    ) -> "Decoder":
        """The decoder in `folder`, from safetensors; float32 on a CPU, bfloat16 elsewhere unless `dtype` says.

        An `adapter` is merged into its weights. With a `device_map` (one of `DEVICE_MAPS`) the layers are spread over
        all GPUs of the machine, for decoders larger than one, and `device` counts for the dtype alone. Raises
        UnsupportedDecoderError, ModelNotFoundError when weights are missing, and ConfigError for an adapter of another
        decoder and where layers cannot be spread.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        refuse_unsupported(AutoConfig.from_pretrained(folder, local_files_only=True))
        if device_map is not None:
            _check_device_map(device_map)
        chosen = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        with without_progress_bars():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=chosen,
                attn_implementation=attn_implementation,
                device_map=device_map,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        if loaded["missing_keys"]:
            raise ModelNotFoundError(
                f"{folder} lacks {len(loaded['missing_keys'])} weights of its decoder "
                f"({min(loaded['missing_keys'])}, …); expected all of them: get the complete model"
            )
        if device_map is not None and any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError(
                f"the decoder in {folder} does not fit this machine's GPUs: some of its layers would stay on the host; "
                "expected all on GPUs: take a smaller decoder, or a machine with more of them"
            )
        if adapter is not None:
            merge_adapter(model, adapter)
        return cls(model if device_map is not None else model.to(device), load_tokenizer(folder))

    @classmethod
    def load_inputs(
        cls,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        adapter: Adapter | None = None,
    ) -> "Decoder":
        """The decoder in `folder` with its input embeddings alone in memory, to compose prompts that others decode.

        The other weights are on PyTorch's `meta` device: `prefill`, `step` and `generate` are not for it. A decoder
        whose embedding does more than look a row up is loaded whole. Arguments and errors are those of `load`.
        """
        table = _stored_table(folder)
        if table is None:
            return cls.load(folder, device=device, dtype=dtype, adapter=adapter)
        model = _empty_model(folder)
        embedding = model.get_input_embeddings()
        chosen = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        embedding.weight = nn.Parameter(table.to(chosen), requires_grad=False)
        if adapter is not None:
            merge_adapter(model, adapter, only=embedding)
        embedding.weight = nn.Parameter(embedding.weight.to(device), requires_grad=False)
        return cls(model, load_tokenizer(folder))

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are."""
        device: torch.device = self._embeddings.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the input embeddings."""
        dtype: torch.dtype = self._embeddings.weight.dtype
        return dtype

    @property
    def dim(self) -> int:
        """d_dec: width of the *input* embeddings, which some decoders (OPT-350m) widen afterwards."""
        return int(self._embeddings.weight.shape[1])

    @property
    def bos_id(self) -> int | None:
        """The id that a document starts with, None where the decoder has none."""
        found = self._config.bos_token_id
        return None if found is None else int(found)

    @property
    def max_positions(self) -> int | None:
        """Slots + new tokens that the decoder can place, None where its config sets no limit."""
        limit = getattr(self._config, "max_position_embeddings", None)
        return None if limit is None else int(limit)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Input embeddings `[…, d_dec]` of int64 ids, as the decoder itself would make them."""
        embeddings: Tensor = self._embeddings(token_ids)
        return embeddings

    @torch.inference_mode()
    def embedding_rms(self) -> float:
        """Root mean square over all entries of all input embeddings."""
        rows = int(self._embeddings.weight.shape[0])
        ids = torch.arange(rows, device=self.device)
        return _rms(self.embed(block) for block in torch.split(ids, _RMS_BLOCK))

    @torch.inference_mode()
    def prefill(self, batch: PromptBatch) -> Prefilled:
        """Run the prompts once; logits of the last slot alone are computed."""
        output = self.model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=True,
            logits_to_keep=1,
        )
        return Prefilled(output.logits[:, -1].float(), output.past_key_values)

    @torch.inference_mode()
    def step(self, token_ids: Tensor, cache: Any, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """Logits float32 `[b, V]` after one more token int64 `[b]` a prompt; the cache grows in place.

        Args:
            attention_mask: int64 `[b, slots so far + 1]`, None when no prompt is padded.
            position_ids: int64 `[b]`.
        """
        output = self.model(
            input_ids=token_ids[:, None],
            attention_mask=attention_mask,
            position_ids=position_ids[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def generate(
        self,
        batch: PromptBatch,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[int]]:
        """Yield each step's tokens, one a prompt, as soon as they are known.

        The first step's come from the prefill's own logits. A prompt's last token is its end-of-sequence id,
        unless `max_new_tokens` came first; after that its place holds FINISHED.

        Args:
            temperature: 0 is greedy; otherwise tokens are drawn by `seed` from the `top_p` nucleus.

        Raises ConfigError for settings out of range, before anything is computed.
        """
        check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        return self.steps(batch, max_new_tokens, Sampler(temperature, top_p, seed, self.device))

    def steps(self, batch: PromptBatch, max_new_tokens: int, sampler: "Sampler") -> Iterator[list[int]]:
        """`generate` with a sampler that exists already."""
        prefilled = self.prefill(batch)
        mask, position = batch.attention_mask, batch.position_ids[:, -1]
        chosen = sampler.choose(prefilled.logits)
        finished = np.zeros(len(chosen), dtype=np.bool_)
        for number in range(1, max_new_tokens + 1):
            tokens = chosen.cpu().numpy()
            yield np.where(finished, FINISHED, tokens).tolist()
            finished |= np.isin(tokens, list(self.eos_ids))
            if finished.all() or number == max_new_tokens:
                return
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(chosen), 1)], dim=1)
            position = position + 1
            chosen = sampler.choose(self.step(chosen, prefilled.cache, mask, position))


@overload
def lowest(limit: int, /, *more: int | None) -> int: ...


@overload
def lowest(*limits: int | None) -> int | None: ...


def lowest(*limits: int | None) -> int | None:
    """Of the limits on positions that there are, as `max_positions` gives them; None for no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


@torch.no_grad()
def merge_adapter(model: Any, adapter: Adapter, *, only: nn.Module | None = None) -> None:
    """Add the adapter's updates to the weights in place, in float32. Raises ConfigError where they do not fit.

    Args:
        only: the one layer that is changed; all are checked.
    """
    layers = dict(model.named_modules())
    for name in adapter.layers:
        update, weight = adapter.update(name), getattr(layers.get(name), "weight", None)
        if weight is None or update.shape != tuple(weight.shape):
            raise ConfigError(
                f"the adapter's layer {name!r} does not fit the decoder of type {model.config.model_type!r}; expected "
                f"the decoder that the checkpoint was trained for: leave --decoder out"
            )
        if only is None or layers[name] is only:
            weight.copy_(weight.float() + update.dense(adapter.scale).to(weight.device))


def _check_device_map(device_map: str) -> None:
    if device_map not in DEVICE_MAPS:
        raise ConfigError(f"device_map is {device_map!r}; expected one of {', '.join(DEVICE_MAPS)}")
    if not torch.cuda.is_available():
        raise ConfigError(
            "a device_map spreads a decoder over GPUs, and PyTorch finds none here; expected none on a CPU"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("a device_map needs the package accelerate: pip install 'refrag[train]'")


def refuse_unsupported(config: Any) -> None:
    """Raise UnsupportedDecoderError for a config whose model needs ids in every layer, or is no decoder."""
    reason = REFUSED_TYPES.get(config.model_type)
    if reason is None and getattr(config.get_text_config(), "hidden_size_per_layer_input", None):
        reason = "its layers look token ids up in tables of their own"
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model"
    if reason is not None:
        raise UnsupportedDecoderError(
            f"decoder type {config.model_type!r} cannot be fed chunk vectors: {reason}; expected a decoder that takes "
            f"input embeddings, such as Llama, Mistral, Qwen, GPT-2, GPT-NeoX or OPT"
        )


def _refuse_signature(model: Any) -> None:
    missing = sorted(set(_REQUIRED_ARGUMENTS) - set(inspect.signature(model.forward).parameters))
    if missing:
        raise UnsupportedDecoderError(
            f"decoder type {model.config.model_type!r} cannot be fed chunk vectors: its forward has no "
            f"{', '.join(missing)}; expected a decoder that takes input embeddings with positions, such as Llama, "
            f"Mistral, Qwen, GPT-2, GPT-NeoX or OPT"
        )


def own_eos_ids(model: Any) -> list[int]:
    """All ids that the generation settings, else the config, name as ends."""
    for settings in (getattr(model, "generation_config", None), model.config.get_text_config()):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def check_sampling(*, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise ConfigError for generation settings out of range."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if not 0.0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be 0 (greedy) or more, found {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p must be more than 0 and at most 1, found {top_p}")


class Sampler:
    """Chooses the next tokens; with a temperature, by draws that the seed decides."""

    def __init__(self, temperature: float, top_p: float, seed: int, device: torch.device) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generator = torch.Generator(device=device).manual_seed(seed) if temperature else None

    def choose(self, logits: Tensor) -> Tensor:
        """int64 `[b]` from float32 `[b, V]`."""
        if self._temperature == 0.0:
            return logits.argmax(dim=-1)
        weights = nucleus(torch.softmax(logits / self._temperature, dim=-1), self._top_p)
        return torch.multinomial(weights, 1, generator=self._generator)[:, 0]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest most likely tokens that together reach `top_p`; `[b, V]`, not renormalised."""
    if top_p >= 1.0:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked
    return torch.zeros_like(probabilities).scatter(-1, order, ranked.masked_fill(before >= top_p, 0.0))


class TextStream:
    """Turns one answer's ids into text piece by piece, never half a character.

    Ids are decoded together with those before them, since a token's text can depend on its neighbours, and
    text that ends inside a UTF-8 character waits for the token that completes it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often "" within a multi-byte character."""
        self._ids.append(token_id)
        piece = self._pending()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left: the replacement character of an answer that stops inside a character, else ""."""
        piece = self._pending()
        self._context = self._emitted = len(self._ids)
        return piece

    def _pending(self) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._emitted], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)[len(known) :]


def generated_ids(steps: Iterator[list[int]], eos_ids: frozenset[int]) -> list[npt.NDArray[np.int64]]:
    """All answers' ids from `Decoder.generate`'s steps, without the ids that ended them."""
    columns = np.asarray(list(steps), dtype=np.int64).T
    return [column[(column != FINISHED) & ~np.isin(column, list(eos_ids))] for column in columns]


def input_embedding_size(folder: Path) -> tuple[int, float]:
    """d_dec and the RMS of the input embeddings of the decoder in `folder`, on one table's memory.

    Only the embedding table is read where the safetensors name it as the architecture does; else the whole
    model is loaded. Raises UnsupportedDecoderError.
    """
    table = _stored_table(folder)
    if table is None:
        decoder = Decoder.load(folder, dtype=torch.float32)
        return decoder.dim, decoder.embedding_rms()
    return int(table.shape[1]), _rms(torch.split(table, _RMS_BLOCK))


@torch.inference_mode()
def input_embeddings(folder: Path) -> Tensor:
    """Input embeddings float32 `[V, d_dec]` of every id of the decoder in `folder`; memory as `input_embedding_size`.

    Raises UnsupportedDecoderError.
    """
    table = _stored_table(folder)
    if table is None:
        decoder = Decoder.load(folder, dtype=torch.float32)
        table = decoder.embed(torch.arange(decoder.model.get_input_embeddings().weight.shape[0]))
    return table.float().clone()


def _stored_table(folder: Path) -> Tensor | None:
    """The embedding table as it is stored; None where the embedding does more than look up a row."""
    model = _empty_model(folder)
    embedding = model.get_input_embeddings()
    return _stored_tensor(folder, _names(model, embedding)) if type(embedding) is nn.Embedding else None


def _empty_model(folder: Path) -> Any:
    """The model in `folder` with its generation settings and no weight in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    refuse_unsupported(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _names(model: Any, embedding: nn.Module) -> list[str]:
    """Names that the embedding's weight may have in a file: with the model's prefix, and without."""
    full = next(name for name, module in model.named_modules() if module is embedding)
    return [f"{full}.weight", f"{full.removeprefix(model.base_model_prefix + '.')}.weight"]


def _stored_tensor(folder: Path, names: Sequence[str]) -> Tensor | None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in names:
                if name in stored.keys():  # noqa: SIM118 (not a mapping)
                    tensor: Tensor = stored.get_tensor(name)
                    return tensor
    return None


def _rms(blocks: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for block in blocks:
        total += float(block.double().square().sum())
        count += block.numel()
    return math.sqrt(total / count)
