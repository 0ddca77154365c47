import pytest

from refrag_core.errors import UsageError
from refrag_core.evaluation.qa import (
    ABSTENTION,
    contains_answer,
    exact_match,
    f1,
    is_abstention,
    normalise_answer,
    score_answers,
)
from refrag_core.evaluation.questions import Question


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  The Eiffel   Tower! ", "eiffel tower"),
        ("1,093 patents", "1093 patents"),
        ("A theatre in another area", "theatre in another area"),
        ("Yasujirō Ozu's", "yasujirō ozus"),
        ("The", ""),
    ],
)
def test_normalisation(text: str, normalised: str):
    assert normalise_answer(text) == normalised


def test_exact_match_accepts_any_answer():
    assert exact_match("the Tanzania.", ["Kenya", "Tanzania"]) == 1.0
    assert exact_match("in Tanzania", ["Tanzania"]) == 0.0
    assert exact_match("", []) == 0.0


def test_f1_by_hand():
    # two of three found words are right, two of four expected ones found: P = 2/3, R = 1/2
    assert f1("black hole there", ["supermassive black hole object"]) == pytest.approx(4 / 7)
    assert f1("black black", ["black hole"]) == pytest.approx(1 / 2)
    assert f1("sun", ["moon", "sun"]) == 1.0
    assert f1("sun", []) == 0.0
    assert f1("sun", ["the"]) == 0.0
    assert f1("the", ["a"]) == 1.0


def test_an_answer_is_contained_as_whole_words_only():
    assert contains_answer("It is in Burkina Faso, Africa.", ["burkina faso"]) == 1.0
    assert contains_answer("It was 1,909.", ["1909"]) == 1.0
    assert contains_answer("It was 19095.", ["1909"]) == 0.0
    assert contains_answer("Burkina and Faso", ["Burkina Faso"]) == 0.0
    assert contains_answer("anything at all", ["The", "?"]) == 0.0
    assert contains_answer("Faso", ["Burkina Faso"]) == 0.0


def test_an_abstention_begins_with_the_constant():
    assert is_abstention(ABSTENTION)
    assert is_abstention("the passages do not say")
    assert is_abstention("The passages do not say. It is Paris.")
    assert not is_abstention("The passages do not sayings")
    assert not is_abstention("")
    assert not is_abstention("Paris")


def test_scores_are_means_over_the_questions_with_answers():
    questions = [
        Question(id="1", question="?", answers=("Rumi",), gold=()),
        Question(id="2", question="?", answers=("Norwegian",), gold=()),
        Question(id="3", question="?", answers=(), gold=("x",)),
    ]
    scores = score_answers(questions, {"1": "Rumi", "2": "From Norwegian."})
    assert (scores.num_questions, scores.exact_match, scores.contains_answer) == (2, 0.5, 1.0)
    assert scores.f1 == pytest.approx((1 + 2 / 3) / 2)


def test_questions_that_cannot_be_judged_are_refused():
    unanswered = Question(id="1", question="?", answers=(), gold=("x",))
    answered = Question(id="2", question="?", answers=("x",), gold=())
    with pytest.raises(UsageError, match=r"^no question names answers; expected at least one to judge outputs by$"):
        score_answers([unanswered], {})
    with pytest.raises(UsageError, match=r"^1 questions have no output \('2', …\); expected one for each$"):
        score_answers([answered], {})
