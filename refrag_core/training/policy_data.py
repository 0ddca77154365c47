"""What the policy learns from: contexts, their chunk embeddings, and the reward of an expansion mask.

Notation: b contexts of s tokens, o output tokens, k = chunk_size, L = s/k chunks, G masks of a context, T′
expanded chunks of a mask, d_enc, d_dec and d_ret as elsewhere.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refrag_core.devices import upload
from refrag_core.errors import ConfigError
from refrag_core.policy import num_expanded
from refrag_core.training.losses import token_nll
from refrag_core.training.model import TrainingModel
from refrag_core.training.policy_answers import AnsweredContexts
from refrag_core.training.policy_config import PolicyTrainingConfig
from refrag_core.training.token_shards import Windows

Ids = npt.NDArray[np.int64]
Queries = npt.NDArray[np.float32]
EmbedQueries = Callable[[Sequence[str]], Queries]
"""Texts → the retriever's query vectors float32 `[b, d_ret]`."""
MakeQueries = Callable[[Ids], Queries]
"""First output tokens int64 `[b, t]` → their texts' query vectors float32 `[b, d_ret]`."""


@dataclass(frozen=True, slots=True)
class PolicyExample:
    """One step's contexts, on the host."""

    context: Ids
    """int64 `[b, s]`."""
    output: Ids
    """int64 `[b, o]`."""
    chunk_size: int
    expansion_fraction: float
    queries: Queries | None
    """float32 `[b, d_ret]`, zeros for a context without a query; None for a policy that reads none."""

    @property
    def num_chunks(self) -> int:
        """L."""
        return int(self.context.shape[1]) // self.chunk_size

    @property
    def count(self) -> int:
        """T′."""
        return num_expanded(self.num_chunks, self.expansion_fraction)


def make_example(
    config: PolicyTrainingConfig, windows: Windows, step: int, *, make_queries: MakeQueries | None
) -> PolicyExample:
    """The contexts of a step, which follow from the config's seed and the step's number alone."""
    random = np.random.default_rng([config.seed, step])
    rows = config.batch_windows
    tokens = windows.take(step * rows, rows)
    context, output = tokens[:, : config.context_tokens], tokens[:, config.context_tokens :]
    size = int(random.choice(config.chunk_sizes))
    fraction = float(random.choice(config.expansion_fractions))
    shuffled = random.random(rows) < config.shuffled_share
    if shuffled.any():
        documents = windows.documents(step * rows, rows)
        mixed = shuffled_contexts(context, documents, passages=config.passages, random=random)
        context = np.where(shuffled[:, None], mixed, context)
    queries = None
    if make_queries is not None:
        # Without its bias-free input, a query of zeros is no query: the policy stays usable without one.
        kept = random.random(rows) >= config.query_dropout
        queries = make_queries(output[:, : config.query_tokens]) * kept[:, None].astype(np.float32)
    return PolicyExample(context, output, size, fraction, queries)


def shuffled_contexts(context: Ids, documents: Ids, *, passages: int, random: np.random.Generator) -> Ids:
    """Contexts of several documents: one passage, at a random place, is what stands directly before the output.

    Args:
        context: int64 `[b, s]`, s a multiple of `passages`.
        documents: int64 `[b]`, which document each context is of.

    Returns:
        int64 `[b, s]`: the row's last s/passages tokens among as long passages of other rows' documents.

    Raises ConfigError when there are fewer than `passages` documents.
    """
    pieces = context.reshape(len(context), passages, -1)
    made = np.empty_like(pieces)
    for row, document in enumerate(documents):
        others = [
            int(other)
            for other in _one_of_each(documents, random.permutation(len(documents)))
            if documents[other] != document
        ]
        if len(others) < passages - 1:
            raise ConfigError(
                f"{len(documents)} windows are of {len(others) + 1} documents; expected at least {passages} for "
                f"contexts of {passages} passages: take more windows, or a shuffled_share of 0"
            )
        places = random.permutation(passages)
        made[row, places[0]] = pieces[row, -1]
        made[row, places[1:]] = pieces[others[: passages - 1], random.integers(0, passages, passages - 1)]
    return made.reshape(context.shape)


def _one_of_each(documents: Ids, order: Ids) -> Ids:
    """The rows in `order` without those whose document came before."""
    _, first = np.unique(documents[order], return_index=True)
    return order[np.sort(first)]


@dataclass(frozen=True, slots=True)
class EncodedContexts:
    """Contexts on the device."""

    chunks: Tensor
    """int64 `[b, L, k]`."""
    output: Tensor
    """int64 `[b, o]`."""
    embeddings: Tensor
    """float32 `[b, L, d_enc]`, rounded to float16 as an index stores them."""
    present: Tensor
    """bool `[b, L]`, all True."""
    queries: Tensor | None
    """float32 `[b, d_ret]`."""


class ExpansionScorer:
    """Rewards of expansion masks: minus the log-perplexity of the output tokens that follow.

    Chunks are encoded once for all masks of a context, rows are composed on the device, and nothing waits for it.

    Args:
        model: its decoder with trained weights merged.
        autocast: makes the context that it computes in.
        first: number of the first output token that counts; those before it are read as text.
    """

    def __init__(
        self, model: TrainingModel, autocast: Callable[[], AbstractContextManager[Any]], *, first: int
    ) -> None:
        self._model = model
        self._autocast = autocast
        self._first = first
        self._device = model.head.device

    @property
    def decoder(self) -> Any:
        """The decoder that rewards are taken from."""
        return self._model.decoder

    @torch.no_grad()
    def encode(self, example: PolicyExample) -> EncodedContexts:
        """The example on the device, with its chunk embeddings."""
        chunks = upload(example.context.reshape(len(example.context), -1, example.chunk_size), self._device)
        embeddings = self._embed(chunks)
        queries = None if example.queries is None else upload(example.queries, self._device)
        present = torch.ones(chunks.shape[:2], dtype=torch.bool, device=self._device)
        return EncodedContexts(chunks, upload(example.output, self._device), embeddings, present, queries)

    @torch.no_grad()
    def encode_questions(self, contexts: AnsweredContexts, queries: Queries) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """On the device: chunk embeddings `[b, L, d_enc]`, present `[b, L]`, queries and targets `[b, L]`."""
        embeddings = self._embed(upload(contexts.chunk_ids, self._device), ragged=True)
        present, sent, targets = (upload(a, self._device) for a in (contexts.present, queries, contexts.targets))
        return embeddings, present, sent, targets

    def _embed(self, chunks: Tensor, *, ragged: bool = False) -> Tensor:
        """Embeddings float32 `[b, L, d_enc]` of chunks `[b, L, k]`, rounded to float16 as an index stores them."""
        flat = chunks.flatten(0, 1)
        # An absent chunk is read as one of a single token: nothing attends to it.
        real = (flat >= 0) | (torch.arange(flat.shape[1], device=flat.device) == 0)
        with self._autocast():
            made = self._model.encoder(flat.clamp_min(0), real) if ragged else self._model.encoder(flat)
        embeddings: Tensor = made.float().half().float().view(*chunks.shape[:2], -1)
        return embeddings

    @torch.no_grad()
    def rewards(self, contexts: EncodedContexts, masks: Tensor, count: int) -> Tensor:
        """Rewards float32 `[b, G]`, minus nats a token.

        Args:
            masks: bool `[b, G, L]`, each with `count` True.
        """
        rows, group, _ = masks.shape
        with self._autocast():
            embeds = self._compose(contexts, masks, count)
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=self._device)
            hidden = self._model.decoder.base_model(
                inputs_embeds=embeds, attention_mask=mask, use_cache=False
            ).last_hidden_state
            scored = contexts.output.shape[1] - self._first
            predicting = hidden[:, -scored - 1 : -1].flatten(0, 1)
            targets = contexts.output[:, None, self._first :].expand(-1, group, -1).flatten()
            nll = token_nll(predicting, self._model.head, targets)
        return -nll.view(rows, group, scored).mean(dim=-1)

    def _compose(self, contexts: EncodedContexts, masks: Tensor, count: int) -> Tensor:
        """Decoder input `[b·G, t, d_dec]` of contexts and outputs, t = L − T′ + T′·k + o."""
        group = masks.shape[1]
        table = self._model.decoder.get_input_embeddings()
        slots, expanded, tokens = composed_slots(contexts.chunks, masks, count)
        vectors = self._model.projection(contexts.embeddings).to(table.weight.dtype)
        index = slots.flatten(1)[:, :, None].expand(-1, -1, vectors.shape[2])
        compressed = vectors.gather(1, index).view(*slots.shape, -1)
        context = torch.where(expanded.unsqueeze(-1), table(tokens), compressed)
        output = table(contexts.output)[:, None].expand(-1, group, -1, -1)
        return torch.cat([context, output], dim=2).flatten(0, 1)


def composed_slots(chunks: Tensor, masks: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stands in each slot of mixed contexts, in one pass over static shapes.

    Args:
        chunks: int64 `[b, L, k]`.
        masks: bool `[b, G, L]`, each with `count` True.

    Returns:
        each `[b, G, t]` with t = L − T′ + T′·k: the slot's chunk int64, whether that is expanded, and the
        token int64 of an expanded chunk (any token for others).
    """
    _, length, size = chunks.shape
    widths = torch.where(masks, size, 1)
    ends = widths.cumsum(dim=-1)
    places = torch.arange(length + count * (size - 1), device=chunks.device).expand(*masks.shape[:2], -1).contiguous()
    slots = torch.searchsorted(ends, places, right=True)
    offsets = places - (ends - widths).gather(-1, slots)
    index = (slots * size + offsets).flatten(1)
    tokens = chunks.flatten(1).gather(1, index).view(places.shape)
    return slots, masks.gather(-1, slots), tokens


def picks_to_masks(picks: Tensor, num_chunks: int) -> Tensor:
    """Bool `[…, L]`, True for the chunks among picks int64 `[…, T′]`."""
    mask = torch.zeros((*picks.shape[:-1], num_chunks), dtype=torch.bool, device=picks.device)
    return mask.scatter(-1, picks, True)
