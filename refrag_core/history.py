"""What of a conversation stands in the next prompt: newest turns raw, older ones as passages, the oldest perhaps not.

A prompt begins with the raw turns, and the passages of the older ones stand with the retrieved passages, right before
the question. So the policy may expand an old turn for one question and not for the next, and all before the passages
stays what it was: its keys and values are reused. Only when turns stop being raw does that beginning change. It
happens seldom, since then as many of them become passages as leave half of the budget free.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refrag_core.errors import ConfigError

POSITIONS = 1024
"""Decoder positions that earlier turns may take, by default."""
TURN_WEIGHT = 0.5
"""By `benchmarks/follow_up_queries.py`: with less, follow-up questions miss their passages; with more, new subjects."""

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryOptions:
    """What becomes of a conversation's earlier turns. Raises ConfigError for numbers below 0."""

    positions: int = POSITIONS
    """Decoder positions that they may take, raw turns and passages together; 0 forgets every turn."""
    turn_weight: float = TURN_WEIGHT
    """Share of the turn before in what is searched for, beside the question's 1; 0 searches for the question alone."""
    reuse: bool = True
    """Keep the decoder's keys and values from one question to the next, and read only what is new of a prompt."""

    def __post_init__(self) -> None:
        if self.positions < 0 or not 0.0 <= self.turn_weight < math.inf:
            raise ConfigError(
                f"a conversation has {self.positions} positions for its history and weight {self.turn_weight:g} of the "
                f"turn before in its queries; expected numbers from 0 up: give others with --history-positions and "
                f"--turn-weight"
            )


@dataclass(frozen=True, slots=True)
class Window:
    """Turns from 0: those before `first_passage` are dropped, those before `first_raw` passages, the others raw."""

    first_passage: int
    first_raw: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryUse:
    """What became of a conversation's earlier turns in one prompt."""

    dropped: int
    """Oldest turns that are not in the prompt."""
    passages: int
    """Turns after these that are passages, compressed or expanded as the policy has it."""
    raw: int
    """Newest turns, as the chat template renders them."""
    positions: int
    """Decoder positions of both, at most `budget`."""
    budget: int
    """Positions that they might have taken."""


def windows(raw_sizes: Sequence[int], budget: int, first_raw: int, *, compressible: bool) -> Iterator[Window]:
    """Ways to place the turns, best first; the first that takes no more than `budget` positions is the one to take.

    What the passages of a window take is for the caller to find out, as the policy decides it. The last window has no
    turn at all.

    Args:
        raw_sizes: positions of each turn when it is raw.
        first_raw: the first raw turn of the prompt before.
        compressible: whether a turn is shorter as passages; if not, turns stay raw for as long as they are there.
    """
    turns = len(raw_sizes)
    if sum(raw_sizes) <= budget:
        yield Window(0, 0)
        return
    if not compressible:
        yield from (Window(start, start) for start in range(1, turns + 1) if sum(raw_sizes[start:]) <= budget)
        return
    if first_raw and sum(raw_sizes[first_raw:]) <= budget:
        yield Window(0, first_raw)
    later = range(first_raw + 1, turns + 1)
    yield from (Window(0, start) for start in later if 2 * sum(raw_sizes[start:]) <= budget)
    yield from (Window(start, turns) for start in range(1, turns + 1))


def last_first_raw(raw_sizes: Sequence[int], passage_sizes: Sequence[int], budget: int, *, compressible: bool) -> int:
    """The first raw turn of the prompt before, for a conversation of which only the turns are known.

    All prompts up to there are placed again, so that a beginning stays raw from one request to the next.

    Args:
        raw_sizes: as for `windows`, all turns up to the question.
        passage_sizes: positions of each turn as passages, as far as that can be told without the policy's choice.
    """
    first_raw = 0
    for turns in range(1, len(raw_sizes)):
        for window in windows(raw_sizes[:turns], budget, first_raw, compressible=compressible):
            raw, passages = raw_sizes[window.first_raw : turns], passage_sizes[window.first_passage : window.first_raw]
            if sum(raw) + sum(passages) <= budget:
                first_raw = window.first_raw
                break
    return first_raw


def query_vector(question: Vector, turn: Vector | None, turn_weight: float) -> Vector:
    """What to search for, of unit length: the question's vector and, weighted, that of the turn before it.

    Vectors are mixed, not texts: a question that stands for itself keeps its own passages then.
    """
    if turn is None or not turn_weight:
        return question
    mixed = question + np.float32(turn_weight) * turn
    made: Vector = mixed / np.linalg.norm(mixed)
    return made
