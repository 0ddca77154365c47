"""Lexical ranking: BM25 over the live passages of an index, in memory.

The only file that imports bm25s. Nothing of it is stored: it is built from the stored texts on first use, which takes
time and memory in proportion to the passages, and so it counts just what is live. Passages are numbered by segment
and row, as the vector index numbers them.
"""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from refrag_core.errors import MissingExtraError, UsageError
from refrag_core.index_reader import IndexReader, PassageRef, Passing

K1 = 1.5
B = 0.75


def _bm25s() -> ModuleType:
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError(
            "bm25s is not installed and ranking by words needs it; run `pip install 'refrag[hybrid]'`"
        ) from error
    module: ModuleType = bm25s
    return module


class BM25:
    """BM25 (Lucene's form; k1 = 1.5, b = 0.75) over lower-cased words without English stop words.

    Raises UsageError for no texts, or for texts without a single word.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._library = _bm25s()
        corpus = self._library.tokenize(list(texts), stopwords="en", show_progress=False)
        self.num_texts = len(corpus.ids)
        if not any(corpus.ids):
            raise UsageError(f"{self.num_texts} texts without a word that is not a stop word; expected text to search")
        self._index: Any = self._library.BM25(k1=K1, b=B, method="lucene")
        self._index.index(corpus, show_progress=False)

    def rank(
        self,
        query: str,
        k: int,
        allowed: npt.NDArray[np.bool_] | None = None,
        ties: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Rows of the up to `k` best texts that share a word with `query`, best first, ties by row.

        Args:
            allowed: only these texts, bool `[texts]`.
            ties: `[texts]`, distinct: of equal texts the one with the lower number comes first, in place of its row.
        """
        words = self._library.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        if not words:
            return np.empty(0, dtype=np.int64)
        scores = self._index.get_scores(words)
        if allowed is not None:
            scores = np.where(allowed, scores, 0)
        return _best(scores, k, np.arange(len(scores)) if ties is None else ties)


def _best(scores: npt.NDArray[np.float32], k: int, ties: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of the `k` highest scores above 0, ties by `ties`, without sorting them all."""
    if len(scores) > k:
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = np.flatnonzero((scores >= least) & (scores > 0))
    else:
        rows = np.flatnonzero(scores > 0)
    best: npt.NDArray[np.int64] = rows[np.lexsort((ties[rows], -scores[rows]))][:k]
    return best


class LexicalIndex:
    """BM25 over the live passages of an opened index."""

    def __init__(self, reader: IndexReader) -> None:
        self._reader = reader
        live = [np.ones(rows, bool) if mask is None else mask for rows, mask in zip(*_segments(reader), strict=True)]
        self._starts = np.cumsum([0, *(len(mask) for mask in live)])
        self._rows = np.flatnonzero(np.concatenate(live))
        # By passage id, as the vector index orders them: where rows lie is history, not content.
        self._ties = np.argsort(np.argsort(reader.searchable_ids(), kind="stable"))
        self._bm25 = BM25(text for text in reader.live_texts())

    def rank(self, query: str, k: int, passing: Passing | None = None) -> list[PassageRef]:
        """The up to `k` best live (and passing) passages that share a word with `query`, best first, ties by id."""
        if passing is None:
            return [self._locate(row) for row in self._rows[self._bm25.rank(query, k, None, self._ties)].tolist()]
        first, copy = passing.stand_ins
        every = np.concatenate(passing.masks)
        every[first] = True  # its words are those of what stands in for it
        found = self._rows[self._bm25.rank(query, k, every[self._rows], self._ties)]
        at = np.searchsorted(first, found)
        failing = np.append(first, -1)[at] == found
        found[failing] = copy[at[failing]]
        return [self._locate(row) for row in found.tolist()]

    def _locate(self, row: int) -> PassageRef:
        segment = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._reader.locate(segment, row - int(self._starts[segment]))


def _segments(reader: IndexReader) -> tuple[list[int], list[npt.NDArray[np.bool_] | None]]:
    return [segment.rows for segment in reader.manifest.segments], reader.live
