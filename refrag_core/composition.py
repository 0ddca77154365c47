"""Composition: from template, passages, expansion_mask and question to the decoder's mixed input.

One composed slot is one position, consecutive from 0. A compressed chunk is one slot, an expanded chunk one
slot for each of its tokens. `arrange` is integer bookkeeping in numpy; `compose` adds exactly one embedding
lookup, one projection and one scatter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refrag_core.devices import upload_rows
from refrag_core.embedding_storage import StoredRows, concatenate_rows
from refrag_core.errors import ConfigError
from refrag_core.template import PromptTemplate

COMPRESSED = -1
"""Stands in a composed id array for a slot that holds a chunk's vector."""

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ContextPassage:
    """One passage of a prompt: its tokens and the vectors of its chunks."""

    token_ids: Ids
    """int32 `[t]`."""
    chunk_size: int
    """Tokens a chunk; the last chunk may hold fewer."""
    chunk_embeddings: StoredRows
    """`[ceil(t / chunk_size), d_enc]`, float16 or int8 with scales."""

    @property
    def num_chunks(self) -> int:
        """Chunks of the passage."""
        return -(-len(self.token_ids) // self.chunk_size)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A prompt's slots before anything is embedded."""

    ids: Ids
    """int32 `[s]`, COMPRESSED where a chunk's vector goes."""
    compressed: npt.NDArray[np.int64]
    """int64 `[c]`: the chunks, numbered over all passages, whose vectors go there, in order of their slots."""
    num_passages: int
    """Passages kept, from the first."""
    num_dropped: int
    """Lowest-ranked passages that did not fit."""
    num_expanded: int
    """Expanded chunks among the kept passages'."""


@dataclass(frozen=True, slots=True)
class Composed:
    """One prompt ready for prefill."""

    inputs_embeds: Tensor
    """`[s, d_dec]` in the decoder's dtype, on its device."""
    arrangement: Arrangement


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of different lengths side by side, padded on the left."""

    inputs_embeds: Tensor
    """`[b, s, d_dec]`, zeros in padding."""
    attention_mask: Tensor | None
    """int64 `[b, s]`, 0 in padding; None when nothing is padded, which lets attention take its fast path."""
    position_ids: Tensor
    """int64 `[b, s]`, from 0 at each prompt's first slot; 0 in padding."""


def arrange(
    template: PromptTemplate,
    passages: Sequence[ContextPassage],
    expansion_mask: Mask,
    question_ids: Sequence[int],
    *,
    history: Sequence[int] = (),
    max_positions: int | None = None,
    max_new_tokens: int = 0,
    strict: bool = False,
) -> Arrangement:
    """The slots of a prompt, best passages first; passages from the last on are dropped until it fits.

    Args:
        expansion_mask: bool over all chunks of all passages, in order; True = raw tokens.
        history: ids of a conversation's raw turns, from `PromptTemplate.turn`. They stand behind the prefix: nothing
            before their end changes from one question to the next.
        max_positions: the decoder's limit on slots + `max_new_tokens`; None for no limit.
        strict: raise instead of dropping.

    Raises ConfigError when shapes do not fit each other, when the prompt does not fit without any passage, or
    when it is strict and a passage would be dropped.
    """
    _check(passages, expansion_mask)
    slots, chunks = _passage_slots(passages, expansion_mask)
    overhead = len(template.passage_header) + len(template.passage_footer)
    fixed = template.num_fixed(0) + len(history) + len(question_ids) + max_new_tokens
    kept = _num_fitting(fixed, [len(ids) + overhead for ids in slots], max_positions)
    if kept < len(passages) and strict:
        raise ConfigError(
            f"the prompt needs {fixed + sum(len(ids) + overhead for ids in slots)} positions and the decoder has "
            f"{max_positions}; expected it to fit (strict): take fewer passages or a smaller expansion_fraction"
        )
    mask = expansion_mask[: chunks[kept]]
    return Arrangement(
        ids=_join(template, history, slots[:kept], question_ids),
        compressed=np.flatnonzero(~mask),
        num_passages=kept,
        num_dropped=len(passages) - kept,
        num_expanded=int(mask.sum()),
    )


def _check(passages: Sequence[ContextPassage], expansion_mask: Mask) -> None:
    for passage in passages:
        if len(passage.chunk_embeddings) != passage.num_chunks:
            raise ConfigError(
                f"a passage of {len(passage.token_ids)} tokens has {len(passage.chunk_embeddings)} chunk embeddings; "
                f"expected {passage.num_chunks} at chunk_size {passage.chunk_size}"
            )
    total = sum(passage.num_chunks for passage in passages)
    if expansion_mask.shape != (total,) or expansion_mask.dtype != np.bool_:
        raise ConfigError(
            f"expansion_mask is {expansion_mask.dtype} {expansion_mask.shape}; expected bool ({total},), one a chunk"
        )


def _passage_slots(passages: Sequence[ContextPassage], expansion_mask: Mask) -> tuple[list[Ids], list[int]]:
    """Slots of each passage, and the number of chunks in the passages before it (and, last, in all)."""
    slots, chunks = [], [0]
    for passage in passages:
        expanded = expansion_mask[chunks[-1] : chunks[-1] + passage.num_chunks]
        slots.append(_slots(passage.token_ids, passage.chunk_size, expanded))
        chunks.append(chunks[-1] + passage.num_chunks)
    return slots, chunks


def _slots(token_ids: Ids, chunk_size: int, expanded: Mask) -> Ids:
    """A passage's slots: a compressed chunk's is where its first token stood."""
    offsets = np.arange(len(token_ids))
    raw = expanded[offsets // chunk_size]
    slots: Ids = np.where(raw, token_ids, np.int32(COMPRESSED))[raw | (offsets % chunk_size == 0)]
    return slots


def _num_fitting(fixed: int, sizes: Sequence[int], max_positions: int | None) -> int:
    """How many passages, from the first, fit. Raises ConfigError when the prompt without any does not."""
    if max_positions is None:
        return len(sizes)
    if fixed > max_positions:
        raise ConfigError(
            f"template, question and max_new_tokens take {fixed} positions and the decoder has {max_positions}; "
            f"expected room for passages: shorten the question or lower --max-new-tokens"
        )
    ends = fixed + np.cumsum(np.asarray(sizes, dtype=np.int64))
    return int(np.searchsorted(ends, max_positions, side="right"))


def _join(template: PromptTemplate, history: Sequence[int], slots: Sequence[Ids], question_ids: Sequence[int]) -> Ids:
    question: list[Sequence[int] | Ids] = [template.before_question, question_ids, template.after_question]
    context: list[Sequence[int] | Ids] = [template.before_passages]
    for ids in slots:
        context += [template.passage_header, ids, template.passage_footer]
    content = question + context if template.question_first else context + question
    parts = [template.bos, template.prefix, history, *content, template.suffix]
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def compose(
    template: PromptTemplate,
    passages: Sequence[ContextPassage],
    expansion_mask: Mask,
    question_ids: Sequence[int],
    *,
    embed: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    history: Sequence[int] = (),
    max_positions: int | None = None,
    max_new_tokens: int = 0,
    strict: bool = False,
    rows: Tensor | None = None,
) -> Composed:
    """`arrange` the prompt and embed it.

    Args:
        rows: chunk embeddings `[L, d_enc]` of all passages where they are on the device already.
        embed: int64 ids `[s]` → `[s, d_dec]`, the decoder's input embeddings.
        project: chunk embeddings `[c, d_enc]`, float16 or (from int8) float32 → `[c, d_dec]`, φ.
        device: where `embed` and `project` compute.
    """
    arrangement = arrange(
        template,
        passages,
        expansion_mask,
        question_ids,
        history=history,
        max_positions=max_positions,
        max_new_tokens=max_new_tokens,
        strict=strict,
    )
    embeds = embed_arrangement(arrangement, passages, embed=embed, project=project, device=device, rows=rows)
    return Composed(embeds, arrangement)


@torch.inference_mode()
def embed_arrangement(
    arrangement: Arrangement,
    passages: Sequence[ContextPassage],
    *,
    embed: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    rows: Tensor | None = None,
) -> Tensor:
    """`[s, d_dec]`: embeddings of the ids, with the projected chunk vectors scattered over their slots."""
    ids = torch.from_numpy(arrangement.ids.astype(np.int64)).to(device)
    embeds = embed(ids.clamp_min(0))
    if not len(arrangement.compressed):
        return embeds
    if rows is None:
        stored = concatenate_rows([passage.chunk_embeddings for passage in passages[: arrangement.num_passages]])
        vectors = project(upload_rows(stored[arrangement.compressed], device))
    else:
        vectors = project(rows[torch.from_numpy(arrangement.compressed).to(rows.device)])
    slots = torch.from_numpy(np.flatnonzero(arrangement.ids == COMPRESSED)).to(device)
    return embeds.index_copy(0, slots, vectors.to(embeds.dtype))


def pad_batch(prompts: Sequence[Tensor]) -> PromptBatch:
    """Prompts `[s_i, d_dec]` as one batch, padded on the left so that all end together."""
    lengths = [len(prompt) for prompt in prompts]
    longest, device = max(lengths), prompts[0].device
    missing = torch.tensor([longest - length for length in lengths])
    embeds = prompts[0].new_zeros((len(prompts), longest, prompts[0].shape[1]))
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
    positions = (torch.arange(longest)[None] - missing[:, None]).clamp_min(0)
    mask = (torch.arange(longest)[None] >= missing[:, None]).long().to(device) if missing.any() else None
    return PromptBatch(embeds, mask, positions.to(device))
