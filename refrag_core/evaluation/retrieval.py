"""Retrieval metrics over ranked documents: recall@k and mean reciprocal rank."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from refrag_core.errors import UsageError
from refrag_core.evaluation.questions import Question

RECALL_DEPTHS = (1, 5, 20)


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """Means over `num_questions` questions, each in [0, 1]."""

    num_questions: int
    recall: Mapping[int, float]
    """Per depth k, the share of a question's gold documents among its first k documents."""
    mrr: float
    """1 / rank of the first gold document, 0 where none was retrieved."""


def distinct(document_ids: Iterable[str]) -> list[str]:
    """Each document once, at the rank of its best passage."""
    return list(dict.fromkeys(document_ids))


def recall_at(ranked: Sequence[str], gold: Collection[str], k: int) -> float:
    """Share of `gold` among the first `k` distinct documents of `ranked`; `gold` must not be empty."""
    return len(set(distinct(ranked)[:k]) & set(gold)) / len(set(gold))


def reciprocal_rank(ranked: Sequence[str], gold: Collection[str]) -> float:
    """1 / rank (from 1, over distinct documents) of the first gold document; 0.0 without one."""
    ranks = (rank for rank, document in enumerate(distinct(ranked), start=1) if document in gold)
    first = next(ranks, None)
    return 0.0 if first is None else 1 / first


def score_retrieval(
    questions: Sequence[Question], ranked: Mapping[str, Sequence[str]], depths: Sequence[int] = RECALL_DEPTHS
) -> RetrievalScores:
    """Means over the questions that name gold documents.

    Args:
        ranked: per question id the document ids of its retrieved passages, best first. Retrieve more
            passages than the greatest depth where several may come from one document.

    Raises UsageError when no question names gold documents or one that does has no ranking.
    """
    judged = [question for question in questions if question.gold]
    if not judged:
        raise UsageError("no question names gold documents; expected at least one to judge retrieval by")
    unranked = [question.id for question in judged if question.id not in ranked]
    if unranked:
        raise UsageError(f"{len(unranked)} questions have no ranking ({unranked[0]!r}, …); expected one for each")
    return RetrievalScores(
        num_questions=len(judged),
        recall={k: _mean(recall_at(ranked[q.id], q.gold, k) for q in judged) for k in depths},
        mrr=_mean(reciprocal_rank(ranked[q.id], q.gold) for q in judged),
    )


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return sum(collected) / len(collected)
