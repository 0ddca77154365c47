"""Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009): several rankings become one."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

RANK_CONSTANT = 60
"""The constant of the paper: how far down a ranking places still count."""

Item = TypeVar("Item", bound=Hashable)


def fuse(rankings: Iterable[tuple[Sequence[Item], float]], k: int) -> list[tuple[Item, float]]:
    """The best `k` items of `(ranking, weight)` pairs by the sum of `weight / (60 + rank)`, ranks from 1.

    A ranking that lacks an item adds nothing to it. Ties fall in the order of first appearance.
    """
    scores: defaultdict[Item, float] = defaultdict(float)
    for ranking, weight in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] += weight / (RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])[:k]
