"""Questions that a sentence answers: what is asked for stood there, and nothing of it is left in the question."""

from random import Random

import pytest

from benchmarks import question_texts
from benchmarks.question_facts import Document, words_in
from benchmarks.question_texts import Task, asked_in_place, asked_subject

PAINTER = (
    "Ada Novak was a Czech painter who worked in Prague, and a friend of poets. "
    "She later painted 41 pictures of bridges between the wars. "
    "Her last exhibition was opened in 1937 by Karel Kral."
)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question_texts, "ASKED", ("{x}?",))


def lead(text: str, entity: str = "Ada Novak (painter)", source: str = "leads") -> Document:
    return Document("d", source, entity, "group", text)


def all_asked(document: Document) -> set[Task]:
    return {task for seed in range(200) if (task := asked_in_place(document, Random(seed)))}


def test_numbers_names_and_years_are_asked_for_where_they_stood() -> None:
    asked = all_asked(lead(PAINTER))
    assert ("Ada Novak later painted how many pictures of bridges between the wars?", "41") in asked
    assert ("Ada Novak was a Czech painter who worked in which place?", "Prague") in asked
    assert ("Ada Novak’s last exhibition was opened in 1937 by whom?", "Karel Kral") in asked
    assert ("Ada Novak’s last exhibition was opened in which year by Karel Kral?", "1937") in asked
    assert {answer for _, answer in asked} == {"41", "Prague", "Karel Kral", "1937"}  # "a Czech painter" names no thing
    assert not any(words_in(answer, question) for question, answer in asked)


@pytest.mark.parametrize(
    "text",
    [
        "The town is known for the 1921 Nobel Prize of its teacher alone.",
        'The town is called "the pearl of Bohemia" by those who live there.',
        "The town has a market on Mondays and a fair, and Prague has Prague ham.",
    ],
)
def test_half_names_quotations_and_what_stands_twice_are_left_alone(text: str) -> None:
    assert not {answer for _, answer in all_asked(lead(text))} & {"Prize", "Bohemia", "Prague"}


def test_a_subject_is_asked_for_by_what_is_said_of_it() -> None:
    asked = {asked_subject(lead(PAINTER), Random(seed)) for seed in range(20)}
    assert asked == {("Who was a Czech painter who worked in Prague, and a friend of poets?", "Ada Novak")}
    bridge = lead("Charles Bridge is a medieval stone arch bridge over the Vltava.", "Charles Bridge")
    assert asked_subject(bridge, Random(0)) == (
        "What is a medieval stone arch bridge over the Vltava?",
        "Charles Bridge",
    )
    assert asked_subject(lead(PAINTER, "Prague"), Random(0)) is None


def test_only_leads_are_asked_about() -> None:
    assert asked_in_place(lead(PAINTER, source="foldoc"), Random(0)) is None
    assert asked_subject(lead(PAINTER, source="foldoc"), Random(0)) is None
