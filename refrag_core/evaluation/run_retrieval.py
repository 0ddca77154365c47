"""`refrag eval retrieval`: the index's retriever on questions with known documents, BM25 beside it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refrag_core.evaluation.bm25 import BM25
from refrag_core.evaluation.questions import Question, check_gold, read_questions
from refrag_core.evaluation.retrieval import RetrievalScores, score_retrieval
from refrag_core.index_reader import IndexReader
from refrag_core.manifest import live_documents
from refrag_core.retrieval import Searcher, open_searcher
from refrag_core.storage import IndexLocation
from refrag_core.tables import iterate_rows

DEPTH = 100
"""Passages ranked for a question: enough for 20 distinct documents when several passages are of one."""


def evaluate_retrieval(
    location: IndexLocation, questions: Path, *, retriever: str | None = None, device: str = "auto", bm25: bool = True
) -> dict[str, Any]:
    """Recall@1/5/20 and MRR over documents, of the index's own retrieval and of BM25 over the same passages.

    Raises UsageError for a question whose gold document the index does not hold.
    """
    searcher = open_searcher(location, retriever=retriever, device=device)
    asked = read_questions(questions)
    reader = searcher.reader
    check_gold(asked, (live.document_id for live in live_documents(reader.store, reader.manifest)))
    systems = {"dense": _scores(score_retrieval(asked, _dense(searcher, asked)))}
    if bm25:
        systems["bm25"] = _scores(score_retrieval(asked, _bm25(reader, asked)))
    return {
        "questions": len(asked),
        "passages": reader.manifest.counts.passages,
        "version": reader.manifest.version,
        "systems": systems,
    }


def _scores(scores: RetrievalScores) -> dict[str, float]:
    return {f"recall@{depth}": round(value, 4) for depth, value in scores.recall.items()} | {
        "mrr": round(scores.mrr, 4)
    }


def _dense(searcher: Searcher, questions: Sequence[Question]) -> dict[str, list[str]]:
    queries = searcher.retriever.embed_queries([question.question for question in questions])
    document_ids = [ids for _, ids in _live_passages(searcher.reader, "document_id")]
    ranked = {}
    for question, query in zip(questions, queries, strict=True):
        hits = searcher.reader.search(query, DEPTH)
        ranked[question.id] = [document_ids[ref.shard][ref.row] for ref, _ in hits]
    return ranked


def _bm25(reader: IndexReader, questions: Sequence[Question]) -> dict[str, list[str]]:
    live = [mask for mask, _ in _live_passages(reader, "document_id")]
    texts, ids = _flat(reader, live, "text"), _flat(reader, live, "document_id")
    index = BM25(texts)
    return {question.id: [ids[row] for row in index.rank(question.question, DEPTH)] for question in questions}


def _live_passages(reader: IndexReader, column: str) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.bool_]], list[str]]]:
    """For each shard which of its passages are live, and a column of all of them."""
    for number, shard in enumerate(reader.manifest.shards):
        rows = iterate_rows(reader.store.path(shard.tables["passages"]), [column])
        yield reader.live_rows(number), [row[column] for row in rows]


def _flat(reader: IndexReader, live: Sequence[Any], column: str) -> list[str]:
    values = (values for _, values in _live_passages(reader, column))
    return [
        value for mask, rows in zip(live, values, strict=True) for value, keep in zip(rows, mask, strict=True) if keep
    ]
