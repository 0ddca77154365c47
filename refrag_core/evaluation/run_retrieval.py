"""`refrag eval retrieval`: an index's retrieval on questions with known documents, by vectors, words and both."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refrag_core.evaluation.questions import Question, check_gold, read_questions
from refrag_core.evaluation.retrieval import RetrievalScores, score_retrieval
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import live_documents
from refrag_core.retrieval import BY_VECTORS, RetrievalOptions, Searcher, open_searcher
from refrag_core.storage import IndexLocation

DEPTH = 100
"""Passages ranked for a question: enough for 20 distinct documents when several passages are of one."""


def evaluate_retrieval(
    location: IndexLocation,
    questions: Path,
    *,
    retriever: str | None = None,
    device: str = "auto",
    bm25: bool = True,
    options: RetrievalOptions = BY_VECTORS,
) -> dict[str, Any]:
    """Recall@1/5/20 and MRR over documents of the index's vectors, of BM25, and of both fused where options say so.

    Raises UsageError for a question whose gold document the index does not hold, and FilterError for a filter that is
    no condition over its fields.
    """
    searcher = open_searcher(location, retriever=retriever, device=device)
    asked = read_questions(questions)
    reader = searcher.reader
    check_gold(asked, (live.document_id for live in live_documents(reader.store, reader.manifest)))
    systems = {"dense": replace(options, hybrid=False)}
    if bm25:
        systems["bm25"] = replace(options, hybrid=True, dense_weight=0.0, lexical_weight=1.0)
    if options.hybrid:
        systems["hybrid"] = options
    queries = searcher.retriever.embed_queries([question.question for question in asked])
    ranked = {name: _documents(reader, _ranked(searcher, asked, queries, system)) for name, system in systems.items()}
    return {
        "questions": len(asked),
        "passages": reader.manifest.counts.passages,
        "passing": None if options.where is None else reader.passing(options.where).rows,
        "version": reader.manifest.version,
        "options": asdict(options),
        "systems": {name: _scores(score_retrieval(asked, found)) for name, found in ranked.items()},
    }


def _scores(scores: RetrievalScores) -> dict[str, float]:
    return {f"recall@{depth}": round(value, 4) for depth, value in scores.recall.items()} | {
        "mrr": round(scores.mrr, 4)
    }


def _ranked(
    searcher: Searcher, questions: Sequence[Question], queries: npt.NDArray[np.float32], options: RetrievalOptions
) -> dict[str, list[PassageRef]]:
    """By question, whose vector is a row of `queries`, the best passages, best first."""
    return {
        question.id: [ref for ref, _ in searcher.nearest(question.question, query, DEPTH, options)]
        for question, query in zip(questions, queries, strict=True)
    }


def _documents(reader: IndexReader, ranked: dict[str, list[PassageRef]]) -> dict[str, list[str]]:
    """The passages' documents, with repetitions."""
    shards = range(len(reader.manifest.shards))
    ids = [reader.column(number, "passages", "document_id").to_pylist() for number in shards]
    return {question: [ids[ref.shard][ref.row] for ref in refs] for question, refs in ranked.items()}
