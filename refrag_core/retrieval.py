"""Retrieval: a question → the live passages nearest to it, of a filter's documents, by meaning and by words."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from refrag_core.errors import ConfigError, FingerprintMismatchError
from refrag_core.fusion import fuse
from refrag_core.index_reader import IndexReader, PassageRef, Passing
from refrag_core.lexical import LexicalIndex
from refrag_core.models import resolve_model
from refrag_core.retriever import Retriever, load_retriever, retriever_fingerprint
from refrag_core.storage import IndexLocation

FUSED_DEPTH = 100
"""How far down each ranking is read for fusion, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalOptions:
    """Which passages may be found, and how they are ranked.

    Raises ConfigError for weights that are negative or both 0.
    """

    where: str | None = None
    """Condition over the documents' metadata, like `lang = 'en' and year > 2020`."""
    hybrid: bool = False
    """Fuse the ranks by vectors with the ranks by words (BM25)."""
    dense_weight: float = 1.0
    """Of the ranks by vectors in fusion."""
    lexical_weight: float = 1.0
    """Of the ranks by words in fusion."""

    def __post_init__(self) -> None:
        weights = self.dense_weight, self.lexical_weight
        if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
            raise ConfigError(
                f"the weights of fusion are {weights[0]:g} (dense) and {weights[1]:g} (lexical); expected numbers from "
                "0 up, not both 0: give others with --dense-weight and --lexical-weight"
            )


BY_VECTORS = RetrievalOptions()


@dataclass(frozen=True, slots=True)
class Hit:
    """One retrieved passage as it is shown."""

    rank: int
    """From 1."""
    score: float
    """Inner product of unit vectors; in hybrid retrieval the fused reciprocal ranks."""
    doc_id: str
    passage: str
    """Passage id, hexadecimal."""
    text: str
    metadata: Mapping[str, Any]


class Searcher:
    """A retriever and an index that was embedded with it."""

    def __init__(self, reader: IndexReader, retriever: Retriever) -> None:
        self.reader = reader
        self.retriever = retriever

    def embed(self, query: str) -> npt.NDArray[np.float32]:
        """Query vector, float32 `[d_ret]`."""
        vector: npt.NDArray[np.float32] = self.retriever.embed_queries([query])[0]
        return vector

    @cached_property
    def lexical(self) -> LexicalIndex:
        """BM25 over the live passages, built on first use."""
        return LexicalIndex(self.reader)

    def retrieve(
        self, query: str, top_k: int, options: RetrievalOptions = BY_VECTORS
    ) -> list[tuple[PassageRef, float]]:
        """Where the best passages are, best first, with scores."""
        return self.nearest(query, self.embed(query), top_k, options)

    def nearest(
        self, query: str, vector: npt.NDArray[np.float32], top_k: int, options: RetrievalOptions = BY_VECTORS
    ) -> list[tuple[PassageRef, float]]:
        """Likewise, for a query whose vector `[d_ret]` is known.

        Raises FilterError for a filter that is no condition over the index's fields.
        """
        passing = None if options.where is None else self.reader.passing(options.where)
        if not options.hybrid:
            return self.reader.search(vector, top_k, passing)
        return self._fused(query, vector, top_k, passing, options)

    def _fused(
        self,
        query: str,
        vector: npt.NDArray[np.float32],
        top_k: int,
        passing: Passing | None,
        options: RetrievalOptions,
    ) -> list[tuple[PassageRef, float]]:
        depth, rankings = max(top_k, FUSED_DEPTH), []
        if options.dense_weight:
            rankings.append(([ref for ref, _ in self.reader.search(vector, depth, passing)], options.dense_weight))
        if options.lexical_weight:
            rankings.append((self.lexical.rank(query, depth, passing), options.lexical_weight))
        return fuse(rankings, top_k)

    def search(self, query: str, top_k: int, options: RetrievalOptions = BY_VECTORS) -> list[Hit]:
        """The best passages with their text."""
        found = self.retrieve(query, top_k, options)
        return [self.hit(rank, ref, score) for rank, (ref, score) in enumerate(found, start=1)]

    def hit(self, rank: int, ref: PassageRef, score: float) -> Hit:
        """One retrieved passage as it is shown."""
        shown = self.reader.describe(ref)
        return Hit(rank, round(score, 4), shown.document_id, shown.passage_id, shown.text, shown.metadata)


def open_searcher(
    location: IndexLocation, *, version: int | None = None, retriever: str | None = None, device: str = "auto"
) -> Searcher:
    """Open an index for retrieval alone.

    Raises FingerprintMismatchError when the retriever is not the one that embedded the passages.
    """
    reader = IndexReader(location, version)
    return Searcher(reader, matching_retriever(reader, retriever, device))


def matching_retriever(reader: IndexReader, reference: str | None, device: str) -> Retriever:
    """The retriever named by `reference` (the index's own by default), if it is the one that the index needs."""
    needed = reader.manifest.components.retriever
    included = None if reference else reader.included("retriever")
    path = included or resolve_model(reference or needed.reference)
    found = retriever_fingerprint(path)
    if found != needed.fingerprint:
        raise FingerprintMismatchError(
            f"retriever {reference or needed.reference} has fingerprint {found[:12]}, the passages were embedded with "
            f"{needed.fingerprint[:12]} ({needed.reference}): give that one with --retriever, or rebuild the index"
        )
    return load_retriever(path, device=device)
