"""Retrieval: a question → the live passages nearest to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from refrag_core.errors import FingerprintMismatchError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.models import resolve_model
from refrag_core.retriever import Retriever, load_retriever, retriever_fingerprint
from refrag_core.storage import IndexLocation


@dataclass(frozen=True, slots=True)
class Hit:
    """One retrieved passage as it is shown."""

    rank: int
    """From 1."""
    score: float
    """Inner product of unit vectors."""
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

    def retrieve(self, query: str, top_k: int) -> list[tuple[PassageRef, float]]:
        """Where the nearest passages are, best first, with scores."""
        return self.reader.search(self.embed(query), top_k)

    def search(self, query: str, top_k: int) -> list[Hit]:
        """The nearest passages with their text."""
        return [self.hit(rank, ref, score) for rank, (ref, score) in enumerate(self.retrieve(query, top_k), start=1)]

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
