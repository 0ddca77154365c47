"""BM25 over the same passages: the baseline that a dense retriever's scores are read against."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from refrag_core.errors import MissingExtraError, UsageError

K1 = 1.5
B = 0.75


def _bm25s() -> ModuleType:
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError(
            "bm25s is not installed and the BM25 baseline needs it; run `pip install 'refrag[eval]'`"
        ) from error
    module: ModuleType = bm25s
    return module


class BM25:
    """BM25 (Lucene's form; k1 = 1.5, b = 0.75) over lower-cased words without English stop words.

    Raises UsageError for no texts, or for texts without a single word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._library = _bm25s()
        corpus = self._tokenize(texts)
        if not any(corpus):
            raise UsageError(f"{len(texts)} texts without a word that is not a stop word; expected text to search")
        self._index: Any = self._library.BM25(k1=K1, b=B, method="lucene")
        self._index.index(corpus, show_progress=False)
        self.num_texts = len(texts)

    def rank(self, query: str, k: int) -> npt.NDArray[np.int64]:
        """Rows of the up to `k` best texts that share a word with `query`, best first, ties by row."""
        words = self._tokenize([query])[0]
        scores = self._index.get_scores(words) if words else np.zeros(self.num_texts, dtype=np.float32)
        best = np.argsort(-scores, kind="stable")[:k].astype(np.int64)
        return best[scores[best] > 0]

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        tokens: list[list[str]] = self._library.tokenize(
            list(texts), stopwords="en", return_ids=False, show_progress=False
        )
        return tokens
