"""Training batches: token windows → what the decoder reads and what it must predict. Integers in numpy only.

One form serves every task: rows of equal length whose slots are tokens or compressed chunks, and the places
whose next token counts. Notation: b rows, s context tokens, o output tokens, k = chunk_size, L chunks of a
context (s = L·k), t slots of a row, n compressed chunks of a row, m predictions of a row.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from refrag_core.composition import COMPRESSED
from refrag_core.errors import ConfigError
from refrag_core.training.losses import IGNORED

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NO_TOKEN = -1
"""Fills a short chunk up."""


@dataclass(frozen=True, slots=True)
class Branches:
    """What the slots of rows see that are no single text but a trunk and branches from it; the same in all rows."""

    positions: Ids
    """int64 `[t]`: the position of each slot in the text that it goes on with."""
    visible: Mask
    """bool `[t, t]`: which slots (columns) a slot (row) attends to."""


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows of one shape. Every row has as many compressed chunks and as many predictions as the others."""

    ids: Ids
    """int64 `[b, t]`, COMPRESSED where a chunk's vector goes."""
    chunk_ids: Ids
    """int64 `[b, n, k]`: tokens of the chunks that are compressed, NO_TOKEN behind the end of short ones."""
    places: Ids
    """int64 `[b, n]`: the slots of their vectors."""
    predict_at: Ids
    """int64 `[b, m]`: slots whose next token is predicted."""
    targets: Ids
    """int64 `[b, m]`: those tokens, `losses.IGNORED` where there is none."""
    branches: Branches | None = None
    """None where every slot sees all before it."""

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """What `TrainingModel` is called with, in its order, and the targets."""
        seen = () if self.branches is None else (self.branches.positions, self.branches.visible)
        return (self.ids, self.chunk_ids, self.places, self.predict_at, *seen, self.targets)

    @property
    def mean_attended(self) -> float:
        """Slots that a slot attends to on average; half of the row where it sees all before it."""
        slots = int(self.ids.shape[1])
        # Counted for every micro-batch between two steps: count_nonzero, which is many times quicker than a sum.
        return slots / 2 if self.branches is None else np.count_nonzero(self.branches.visible) / slots

    @property
    def ragged(self) -> bool:
        """Whether some chunk is short."""
        return bool((self.chunk_ids < 0).any())

    @property
    def num_positions(self) -> int:
        """Decoder positions, b·t."""
        return int(self.ids.size)


def reconstruction_batch(token_ids: Ids, *, chunk_size: int, num_chunks: int) -> TrainingBatch:
    """Examples of `num_chunks` vectors followed by the tokens that they stand for, which are predicted.

    Args:
        token_ids: `[b, s]` with s a multiple of chunk_size · num_chunks. A row is cut into that many examples,
            one behind the other in the decoder, so that all lengths of a curriculum have one shape (t = s + s/k).

    Every token is predicted once, an example's first from its last vector.
    """
    rows, size = token_ids.shape
    length = chunk_size * num_chunks
    if size % length:
        raise ConfigError(
            f"{size} tokens a row are no multiple of {num_chunks} chunks of {chunk_size}; expected a context that is "
            f"a power of two times the chunk size"
        )
    examples = token_ids.reshape(rows, size // length, length)
    slots = np.full((*examples.shape[:2], num_chunks), COMPRESSED, dtype=np.int64)
    starts = np.arange(size // length) * (num_chunks + length)
    return TrainingBatch(
        ids=np.concatenate([slots, examples], axis=2).reshape(rows, -1),
        chunk_ids=token_ids.reshape(rows, -1, chunk_size),
        places=_every_row(starts[:, None] + np.arange(num_chunks), rows),
        predict_at=_every_row(starts[:, None] + num_chunks - 1 + np.arange(length), rows),
        targets=token_ids,
    )


def _every_row(places: Ids, rows: int) -> Ids:
    return np.broadcast_to(places.reshape(1, -1), (rows, places.size)).copy()


def next_paragraph_batch(context: Ids, output: Ids, *, chunk_size: int, expansion_mask: Mask) -> TrainingBatch:
    """Contexts of compressed and expanded chunks, followed by the output tokens, which are predicted.

    Args:
        context: `[b, s]`, s = L·k.
        output: `[b, o]`.
        expansion_mask: bool `[b, L]`, True = raw tokens; the same number of True in every row.
    """
    rows, size = context.shape
    counts = expansion_mask.sum(axis=1)
    if size != expansion_mask.shape[1] * chunk_size or (counts != counts[0]).any():
        raise ConfigError(
            f"{size} context tokens, chunk_size {chunk_size} and an expansion_mask {expansion_mask.shape} with "
            f"{int(counts.min())} to {int(counts.max())} expanded chunks do not fit; expected one mask entry a chunk "
            f"and equally many expanded in every row"
        )
    chunks = context.reshape(rows, -1, chunk_size)
    expanded = expansion_mask[:, :, None]
    valid = expanded | (np.arange(chunk_size) == 0)
    slots = np.where(expanded, chunks, COMPRESSED)[valid].reshape(rows, -1)
    return TrainingBatch(
        ids=np.concatenate([slots, output], axis=1),
        chunk_ids=chunks[~expansion_mask].reshape(rows, -1, chunk_size),
        places=np.nonzero(slots == COMPRESSED)[1].reshape(rows, -1),
        predict_at=_every_row(slots.shape[1] - 1 + np.arange(output.shape[1]), rows),
        targets=output,
    )


def recall_batch(
    context: Ids, starts: Ids, *, span_tokens: int, given_tokens: int, chunk_size: int, expansion_mask: Mask
) -> TrainingBatch:
    """Contexts followed by pieces of themselves, each to be continued from its first tokens.

    To predict a piece the decoder has to find the chunk that its first tokens are in and to go on from there: what
    a next paragraph asks of it here and there, asked of every token.

    Args:
        context: `[b, s]`, s = L·k.
        starts: `[b, r]`, where in its context each of a row's r pieces begins; the pieces follow one another.
        span_tokens: tokens of a piece.
        given_tokens: those of its first that are not predicted, since nothing tells which piece comes.
        expansion_mask: as in `next_paragraph_batch`.
    """
    rows, pieces = starts.shape
    index = (starts[:, :, None] + np.arange(span_tokens)).reshape(rows, -1)
    output = np.take_along_axis(context, index, axis=1)
    batch = next_paragraph_batch(context, output, chunk_size=chunk_size, expansion_mask=expansion_mask)
    predicted = np.arange(pieces * span_tokens) % span_tokens >= given_tokens
    return replace(batch, targets=np.where(predicted, output, IGNORED))


def interleaved_batch(token_ids: Ids, *, chunk_size: int, expansion_mask: Mask) -> tuple[TrainingBatch, TrainingBatch]:
    """Text in which compressed and expanded chunks alternate, whose expanded tokens are predicted.

    What a decoder gains from a context is gained mostly in the tokens right behind it: where the text before a run of
    expanded chunks is compressed, every run asks what the first tokens of a next paragraph ask.

    Args:
        token_ids: `[b, s]`, s = L·k.
        expansion_mask: bool `[b, L]`, True = raw tokens, which are predicted; the same number of True in every row,
            and none in the first place, which nothing stands before.

    Returns:
        the batch, and the same predictions from the full text.
    """
    if expansion_mask[:, 0].any():
        raise ConfigError("a row begins with an expanded chunk; expected a compressed one, from which it is predicted")
    nothing = np.empty((len(token_ids), 0), dtype=np.int64)
    batch = next_paragraph_batch(token_ids, nothing, chunk_size=chunk_size, expansion_mask=expansion_mask)
    rows = len(token_ids)
    predicted = np.nonzero(expansion_mask.repeat(chunk_size, axis=1))[1].reshape(rows, -1)
    targets = np.take_along_axis(token_ids, predicted, axis=1)
    slots = np.nonzero(batch.ids != COMPRESSED)[1].reshape(rows, -1)
    full = replace(text_batch(token_ids), predict_at=predicted - 1, targets=targets)
    return replace(batch, predict_at=slots - 1, targets=targets), full


def continuations_batch(
    token_ids: Ids, starts: Ids, *, chunk_size: int, span_tokens: int
) -> tuple[TrainingBatch, TrainingBatch]:
    """Texts of which everything is compressed, with the tokens behind some places in them, each a branch of its own.

    A branch sees the chunks before its place and its own tokens: as many short next paragraphs as there are branches,
    for whose contexts encoder and decoder run once. One pass over the full text is the teacher of all of them.

    Args:
        token_ids: `[b, s]`, s = L·k.
        starts: `[r]`, the chunks, none of them the first, in whose place a branch begins; the same in every row.
        span_tokens: tokens that are predicted in a branch, its first from the vector before it.

    Returns:
        the batch (t = L + r·(span_tokens − 1)), and the same predictions from the full text.
    """
    rows, size = token_ids.shape
    count, given = size // chunk_size, span_tokens - 1
    first = starts * chunk_size
    if size % chunk_size or first.min() == 0 or first.max() + span_tokens > size:
        raise ConfigError(
            f"{size} tokens in chunks of {chunk_size} have no branches of {span_tokens} tokens at chunks "
            f"{int(starts.min())} to {int(starts.max())}; expected whole chunks, one before every branch, and all of "
            f"its tokens"
        )
    predicted = (first[:, None] + np.arange(span_tokens)).reshape(-1)
    read = (first[:, None] + np.arange(given)).reshape(-1)
    slots = count + np.arange(len(starts) * given).reshape(len(starts), given)
    compressed = np.full((rows, count), COMPRESSED, dtype=np.int64)
    targets = token_ids[:, predicted]
    batch = TrainingBatch(
        ids=np.concatenate([compressed, token_ids[:, read]], axis=1),
        chunk_ids=token_ids.reshape(rows, count, chunk_size),
        places=_every_row(np.arange(count), rows),
        predict_at=_every_row(np.concatenate([starts[:, None] - 1, slots], axis=1), rows),
        targets=targets,
        branches=_branches(starts, count, given),
    )
    return batch, replace(text_batch(token_ids), predict_at=_every_row(predicted - 1, rows), targets=targets)


def _branches(starts: Ids, count: int, given: int) -> Branches:
    """Of `count` chunks with `given` tokens behind every one of `starts`."""
    positions = np.concatenate([np.arange(count), (starts[:, None] + np.arange(given)).reshape(-1)])
    branch = np.concatenate([np.full(count, -1), np.repeat(np.arange(len(starts)), given)])  # -1: the chunks, the trunk
    trunk_read = np.concatenate([np.arange(count) + 1, np.repeat(starts, given)])
    slots = np.arange(len(positions))
    of_trunk = (branch == -1) & (slots < trunk_read[:, None])
    of_branch = (branch != -1) & (branch == branch[:, None]) & (slots <= slots[:, None])
    return Branches(positions, of_trunk | of_branch)


def text_batch(token_ids: Ids, *, first: int = 1) -> TrainingBatch:
    """Plain text `[b, t]`, of which the tokens from number `first` (at least 1) on are predicted."""
    rows, size = token_ids.shape
    return TrainingBatch(
        ids=token_ids,
        chunk_ids=np.empty((rows, 0, 1), dtype=np.int64),
        places=np.empty((rows, 0), dtype=np.int64),
        predict_at=_every_row(np.arange(first - 1, size - 1), rows),
        targets=token_ids[:, first:],
    )


def random_masks(rows: int, num_chunks: int, count: int, random: np.random.Generator) -> Mask:
    """Bool `[rows, num_chunks]` with `count` True in every row, each set equally likely."""
    ranks = random.random((rows, num_chunks)).argsort(axis=1).argsort(axis=1)
    mask: Mask = ranks < count
    return mask


def last_or_random_masks(
    rows: int, num_chunks: int, count: int, last_share: float, random: np.random.Generator
) -> Mask:
    """Bool `[rows, num_chunks]` with `count` True in every row: the last ones in a share of the rows, else random."""
    masks = random_masks(rows, num_chunks, count, random)
    # Nothing is drawn where no row needs it, so that a config without the share gives the batches that it gave before.
    if last_share and count:
        masks[random.random(rows) < last_share] = np.arange(num_chunks) >= num_chunks - count
    return masks


def run_masks(rows: int, num_chunks: int, count: int, runs: int, random: np.random.Generator) -> Mask:
    """Bool `[rows, num_chunks]` with `count` True in every row, in `runs` runs, each behind a run of False.

    The lengths of both kinds of runs are drawn so that every way to cut them is equally likely.

    Raises ConfigError when there are not as many chunks of either kind as runs.
    """
    if not 1 <= runs <= min(count, num_chunks - count):
        raise ConfigError(
            f"{runs} runs of {count} expanded among {num_chunks} chunks; expected at least one chunk of either kind a "
            f"run"
        )
    mask = np.zeros((rows, num_chunks), dtype=np.bool_)
    for row in mask:
        lengths = np.stack(
            [_random_parts(num_chunks - count, runs, random), _random_parts(count, runs, random)], axis=1
        )
        row[:] = np.repeat(np.tile([False, True], runs), lengths.reshape(-1))
    return mask


def _random_parts(size: int, parts: int, random: np.random.Generator) -> Ids:
    """Int64 `[parts]`, each at least 1, that sum to `size`."""
    cuts = np.sort(random.permutation(size - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=size)
