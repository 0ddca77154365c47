import pytest

from refrag_core.errors import UsageError
from refrag_core.evaluation.questions import Question
from refrag_core.evaluation.retrieval import distinct, recall_at, reciprocal_rank, score_retrieval


def question(name: str, *gold: str) -> Question:
    return Question(id=name, question=f"{name}?", answers=(), gold=gold)


def test_a_document_counts_once_at_its_best_passage():
    assert distinct(["b", "a", "b", "c", "a"]) == ["b", "a", "c"]
    assert recall_at(["b", "b", "b", "a"], ["a"], 2) == 1.0
    assert reciprocal_rank(["b", "b", "b", "a"], ["a"]) == 1 / 2


def test_recall_is_the_share_of_gold_documents():
    assert recall_at(["x", "a", "y"], ["a", "b"], 1) == 0.0
    assert recall_at(["x", "a", "y"], ["a", "b"], 2) == 0.5
    assert recall_at(["b", "a"], ["a", "b", "a"], 5) == 1.0
    assert recall_at([], ["a"], 5) == 0.0


def test_reciprocal_rank_is_of_the_first_gold_document():
    assert reciprocal_rank(["x", "y", "b", "a"], ["a", "b"]) == 1 / 3
    assert reciprocal_rank(["x"], ["a"]) == 0.0


def test_scores_are_means_over_the_questions_with_gold():
    questions = [question("first", "a"), question("second", "b"), question("none")]
    scores = score_retrieval(questions, {"first": ["a"], "second": ["x", "y", "z", "b"]})
    assert scores.num_questions == 2
    assert scores.recall == {1: 0.5, 5: 1.0, 20: 1.0}
    assert scores.mrr == (1 + 1 / 4) / 2


def test_questions_that_cannot_be_judged_are_refused():
    with pytest.raises(UsageError, match=r"^no question names gold documents; expected at least one to judge"):
        score_retrieval([question("none")], {})
    with pytest.raises(UsageError, match=r"^1 questions have no ranking \('second', …\); expected one for each$"):
        score_retrieval([question("first", "a"), question("second", "b")], {"first": []})
