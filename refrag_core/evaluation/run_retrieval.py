"""`refrag eval retrieval`: an index's retrieval on questions with known documents, by vectors, words and both."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from refrag_core.evaluation.questions import Question, check_gold, read_questions
from refrag_core.evaluation.retrieval import RetrievalScores, score_retrieval
from refrag_core.index_reader import PassageRef
from refrag_core.manifest import live_documents
from refrag_core.retrieval import BY_VECTORS, RetrievalOptions, Searcher, open_searcher

DEPTH = 100
"""Passages ranked for a question: enough for 20 distinct documents when several passages are of one."""


def evaluate_retrieval(
    root: Path,
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
    searcher = open_searcher(root, retriever=retriever, device=device)
    asked = read_questions(questions)
    reader = searcher.reader
    check_gold(asked, (live.document_id for live in live_documents(reader.store, reader.manifest)))
    ranked = {"dense": _ranked(searcher, asked, replace(options, hybrid=False))}
    if bm25:
        ranked["bm25"] = _ranked(searcher, asked, replace(options, hybrid=True, dense_weight=0.0, lexical_weight=1.0))
    if options.hybrid:
        ranked["hybrid"] = _ranked(searcher, asked, options)
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


def _ranked(searcher: Searcher, questions: Sequence[Question], options: RetrievalOptions) -> dict[str, list[str]]:
    """By question the documents of the best passages, best first, with repetitions."""
    reader = searcher.reader
    documents = [
        reader.column(number, "passages", "document_id").to_pylist() for number in range(len(reader.manifest.shards))
    ]
    queries = searcher.retriever.embed_queries([question.question for question in questions])

    def best(question: Question, vector: Any) -> list[PassageRef]:
        return [ref for ref, _ in searcher.nearest(question.question, vector, DEPTH, options)]

    return {
        question.id: [documents[ref.shard][ref.row] for ref in best(question, vector)]
        for question, vector in zip(questions, queries, strict=True)
    }
