"""Schedules as pure functions of progress, a number from 0 (start) to 1 (end of training)."""

import math
from collections.abc import Sequence
from typing import Literal

Curriculum = Literal["mixture", "geometric"]

GEOMETRIC_STAGES = 9
_FIRST_STAGE_RATIO = 1333.0
_LAST_STAGE_RATIO = 5259.0


def progress_of(step: int, steps: int, elapsed: float, seconds: float | None) -> float:
    """From 0 to 1: of the steps, or of the seconds where these are limited and nearer to their end. 1 without steps."""
    of_seconds = elapsed / seconds if seconds else 0.0
    return min(1.0, max(step / steps if steps else 1.0, of_seconds))


def learning_rate_factor(progress: float, *, warmup: float, floor: float = 0.0) -> float:
    """What the learning rate is multiplied by: linear to 1 over `warmup`, then a cosine down to `floor`."""
    if progress < warmup:
        return progress / warmup
    done = min(1.0, (progress - warmup) / (1.0 - warmup)) if warmup < 1.0 else 1.0
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def chunk_counts(context_tokens: int, chunk_size: int) -> tuple[int, ...]:
    """1, 2, 4, … chunks, up to the whole context of `context_tokens`."""
    return tuple(1 << power for power in range((context_tokens // chunk_size).bit_length()))


def length_weights(curriculum: Curriculum, progress: float, num_lengths: int) -> list[float]:
    """Shares (they sum to 1) of the lengths of a reconstruction, shortest first.

    `mixture` gives every length the same share from the first step. `geometric` has nine stages of geometric
    mixtures (REFRAG, arXiv:2509.01092, appendix): in the first the shortest is 1,333 times as frequent as
    the longest, in the last the longest 5,259 times as frequent as the shortest; between these the logarithms
    of the ratios change evenly, which is our reading of its table.
    """
    if curriculum == "mixture" or num_lengths == 1:
        return [1.0 / num_lengths] * num_lengths
    stage = min(int(progress * GEOMETRIC_STAGES), GEOMETRIC_STAGES - 1) / (GEOMETRIC_STAGES - 1)
    slope = (stage * math.log(_LAST_STAGE_RATIO) - (1.0 - stage) * math.log(_FIRST_STAGE_RATIO)) / (num_lengths - 1)
    return normalised([math.exp(slope * index) for index in range(num_lengths)])


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]
