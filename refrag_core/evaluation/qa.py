"""Answer metrics as SQuAD defines them (Rajpurkar et al., arXiv:1606.05250, its evaluation script).

`contains_answer` is the usual measure for chatty models: the answer appears as whole words in the output.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refrag_core.errors import UsageError
from refrag_core.evaluation.questions import Question

ABSTENTION = "The passages do not say."
"""What instruction tuning teaches to answer where the passages hold no answer, and what counts as abstaining."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Means over `num_questions` questions, each in [0, 1]."""

    num_questions: int
    exact_match: float
    f1: float
    contains_answer: float


def normalise_answer(text: str) -> str:
    """Lower case without ASCII punctuation and English articles, single spaces (SQuAD's normalisation)."""
    without_punctuation = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", without_punctuation).split())


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised output is one of the normalised answers, else 0.0."""
    return float(normalise_answer(output) in map(normalise_answer, answers))


def f1(output: str, answers: Sequence[str]) -> float:
    """Best F1 of word overlap with an answer, in [0, 1]; 0.0 without answers."""
    return max(
        (_f1(normalise_answer(output).split(), normalise_answer(answer).split()) for answer in answers), default=0.0
    )


def _f1(found: Sequence[str], expected: Sequence[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))


def contains_answer(output: str, answers: Sequence[str]) -> float:
    """1.0 if a normalised answer stands in the normalised output as whole words, else 0.0.

    An answer of which normalisation leaves nothing ("The", "?") is never contained.
    """
    words = f" {normalise_answer(output)} "
    normalised = (normalise_answer(answer) for answer in answers)
    return float(any(answer and f" {answer} " in words for answer in normalised))


def is_abstention(output: str) -> bool:
    """Whether the normalised output begins with ABSTENTION."""
    return f"{normalise_answer(output)} ".startswith(f"{normalise_answer(ABSTENTION)} ")


def score_answers(questions: Sequence[Question], outputs: Mapping[str, str]) -> AnswerScores:
    """Means over the questions that name answers; `outputs` maps question ids to what the model wrote.

    Raises UsageError when no question names answers or one that does has no output.
    """
    judged = [question for question in questions if question.answers]
    if not judged:
        raise UsageError("no question names answers; expected at least one to judge outputs by")
    silent = [question.id for question in judged if question.id not in outputs]
    if silent:
        raise UsageError(f"{len(silent)} questions have no output ({silent[0]!r}, …); expected one for each")
    return AnswerScores(
        num_questions=len(judged),
        exact_match=sum(exact_match(outputs[q.id], q.answers) for q in judged) / len(judged),
        f1=sum(f1(outputs[q.id], q.answers) for q in judged) / len(judged),
        contains_answer=sum(contains_answer(outputs[q.id], q.answers) for q in judged) / len(judged),
    )
