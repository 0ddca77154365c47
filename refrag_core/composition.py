"""Composition: from template, passages, expansion_mask and question to the decoder's mixed input.

One composed slot is one position, consecutive from 0. A compressed chunk is one slot, an expanded chunk one
slot for each of its tokens. `arrange` is integer bookkeeping in numpy; `compose` adds exactly one embedding
lookup, one projection and one scatter, and one copy to the device of all numbers that they need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refrag_core.devices import upload, upload_rows
from refrag_core.embedding_storage import StoredRows, concatenate_rows
from refrag_core.errors import ConfigError
from refrag_core.template import PromptTemplate

COMPRESSED = -1
"""Stands in a composed id array for a slot that holds a chunk's vector."""

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class ContextPassage(NamedTuple):
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
    chunks = _chunks_of(passages)
    _check(passages, chunks, expansion_mask)
    firsts = _running(np.where(expansion_mask, chunks.lengths, 1))
    sizes = np.diff(firsts[chunks.bounds])
    overhead = len(template.passage_header) + len(template.passage_footer)
    fixed = template.num_fixed(0) + len(history) + len(question_ids) + max_new_tokens
    kept = _num_fitting(fixed, sizes + overhead, max_positions)
    if kept < len(passages) and strict:
        raise ConfigError(
            f"the prompt needs {fixed + int((sizes + overhead).sum())} positions and the decoder has "
            f"{max_positions}; expected it to fit (strict): take fewer passages or a smaller expansion_fraction"
        )
    mask = expansion_mask[: chunks.bounds[kept]]
    slots = _slots([passage.token_ids for passage in passages[:kept]], chunks.lengths[: len(mask)], mask, firsts)
    compressed = np.flatnonzero(~mask)
    return Arrangement(
        ids=_join(template, history, _framed(slots, sizes[:kept], template), question_ids),
        compressed=compressed,
        num_passages=kept,
        num_dropped=len(passages) - kept,
        num_expanded=len(mask) - len(compressed),
    )


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The chunks of all passages, L of them in n passages."""

    lengths: npt.NDArray[np.int64]
    """int64 `[L]`: tokens of each."""
    bounds: npt.NDArray[np.int64]
    """int64 `[n + 1]`: chunks before each passage and, last, in all."""


def _chunks_of(passages: Sequence[ContextPassage]) -> _Chunks:
    tokens = np.array([len(passage.token_ids) for passage in passages], dtype=np.int64)
    sizes = np.array([passage.chunk_size for passage in passages], dtype=np.int64)
    counts = -(-tokens // sizes)
    bounds, lengths = _running(counts), np.repeat(sizes, counts)
    some = counts > 0
    lengths[bounds[1:][some] - 1] -= (counts * sizes - tokens)[some]
    return _Chunks(lengths, bounds)


def _running(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 `[n + 1]`: the sum of the values before each and, last, of all."""
    sums = np.zeros(len(values) + 1, np.int64)
    values.cumsum(out=sums[1:])
    return sums


def _check(passages: Sequence[ContextPassage], chunks: _Chunks, expansion_mask: Mask) -> None:
    given = np.array([len(passage.chunk_embeddings) for passage in passages], dtype=np.int64)
    for wrong in np.flatnonzero(given != np.diff(chunks.bounds)).tolist():
        passage = passages[wrong]
        raise ConfigError(
            f"a passage of {len(passage.token_ids)} tokens has {len(passage.chunk_embeddings)} chunk embeddings; "
            f"expected {passage.num_chunks} at chunk_size {passage.chunk_size}"
        )
    total = len(chunks.lengths)
    if expansion_mask.shape != (total,) or expansion_mask.dtype != np.bool_:
        raise ConfigError(
            f"expansion_mask is {expansion_mask.dtype} {expansion_mask.shape}; expected bool ({total},), one a chunk"
        )


def _num_fitting(fixed: int, sizes: npt.NDArray[np.int64], max_positions: int | None) -> int:
    """How many passages, from the first, fit. Raises ConfigError when the prompt without any does not."""
    if max_positions is None:
        return len(sizes)
    if fixed > max_positions:
        raise ConfigError(
            f"template, question and max_new_tokens take {fixed} positions and the decoder has {max_positions}; "
            f"expected room for passages: shorten the question or lower --max-new-tokens"
        )
    return int(np.searchsorted(fixed + np.cumsum(sizes), max_positions, side="right"))


def _slots(
    token_ids: Sequence[Ids], lengths: npt.NDArray[np.int64], expanded: Mask, firsts: npt.NDArray[np.int64]
) -> Ids:
    """The chunks' slots one behind the other, int32: one COMPRESSED, or the tokens of an expanded one.

    Cost goes with chunks and expanded tokens, not with all tokens: it stands between a question and its first token.

    Args:
        firsts: int64 `[L + 1]` or more: where each chunk's slots begin and, behind them, where the last chunk's end.
    """
    slots = np.full(firsts[len(lengths)], COMPRESSED, dtype=np.int32)
    chosen = np.flatnonzero(expanded)
    if len(chosen):
        tokens, starts = np.concatenate(token_ids), _running(lengths)
        slots[_ranges(firsts[chosen], lengths[chosen])] = tokens[_ranges(starts[chosen], lengths[chosen])]
    return slots


def _ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`start, start + 1, …` of every range, one behind the other."""
    before = _running(lengths)
    return np.arange(before[-1]) + np.repeat(starts - before[:-1], lengths)


def _framed(slots: Ids, sizes: npt.NDArray[np.int64], template: PromptTemplate) -> Ids:
    """The passages' slots, `sizes` int64 `[n]` of each, every passage between its header and its footer."""
    header, footer = template.passage_header, template.passage_footer
    overhead = len(header) + len(footer)
    if not overhead:
        return slots
    begins = _running(sizes + overhead)
    framed = np.empty(begins[-1], dtype=np.int32)
    bodies = begins[:-1] + len(header)
    framed[begins[:-1, None] + np.arange(len(header))] = header
    framed[_ranges(bodies, sizes)] = slots
    framed[(bodies + sizes)[:, None] + np.arange(len(footer))] = footer
    return framed


def _join(template: PromptTemplate, history: Sequence[int], passages: Ids, question_ids: Sequence[int]) -> Ids:
    question = (*template.before_question, *question_ids, *template.after_question)
    first, last = (question, ()) if template.question_first else ((), question)
    before = (*template.bos, *template.prefix, *history, *first, *template.before_passages)
    return np.concatenate([np.array(before, np.int32), passages, np.array((*last, *template.suffix), np.int32)])


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
        embed: int64 ids `[s]` → `[s, d_dec]`, the decoder's input embeddings, in memory of their own.
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
    of_chunks = np.flatnonzero(arrangement.ids == COMPRESSED)
    numbers = upload(np.concatenate([np.maximum(arrangement.ids, 0), of_chunks, arrangement.compressed]), device)
    ids, slots, chunks = numbers.split_with_sizes([len(arrangement.ids), len(of_chunks), len(of_chunks)])
    embeds = embed(ids)
    if not len(of_chunks):
        return embeds
    if rows is None:
        stored = concatenate_rows([passage.chunk_embeddings for passage in passages[: arrangement.num_passages]])
        chosen = upload_rows(stored[arrangement.compressed], device)
    else:
        chosen = rows if len(chunks) == len(rows) else rows[chunks]
    return embeds.index_copy_(0, slots, project(chosen).to(embeds.dtype))


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
