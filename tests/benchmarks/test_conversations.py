"""The scripted conversations, and what is measured on them, over tiny models."""

import json
from pathlib import Path

import pytest

from benchmarks import conversations, follow_up_queries
from benchmarks.conversations import QUESTIONS, TURNS, make_scripts
from refrag_core.evaluation.qa import contains_answer
from refrag_core.evaluation.questions import read_questions
from tests.small_index import SmallIndex, documents

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        small = SmallIndex(tmp_path_factory.mktemp("library"), documents(20))
        small.build()
    return small


def test_the_fact_is_told_first_asked_last_and_nowhere_between() -> None:
    scripts = make_scripts(50, read_questions(QUESTIONS))
    assert len({script.turns[0].question for script in scripts}) > 40
    for script in scripts:
        assert len(script.turns) == TURNS - 1
        assert contains_answer(script.turns[0].question, script.answers)
        assert not contains_answer(script.question, script.answers)
        assert not any(contains_answer(f"{turn.question} {turn.answer}", script.answers) for turn in script.turns[1:])


def test_scripts_are_equal_on_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        assert conversations.main(["--scripts", "--conversations", "3"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert [len(json.loads(line)["turns"]) for line in printed[0].splitlines()] == [TURNS - 1] * 3


def test_every_setting_places_the_first_turn_as_it_says(
    library: SmallIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(library.path), "--conversations", "1", "--top-k", "1", "--max-new-tokens", "2", "--fractions", "0"]
    assert conversations.main([*arguments, "--allow-untrained", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert str(library.path) not in text
    result = json.loads(text)
    placed = {name: setting["first_turn"] for name, setting in result["settings"].items()}
    assert placed["dropped"] == {"raw": 0, "passage": 0, "dropped": 1}
    assert result["settings"]["dropped"]["mean_history_positions"] == 0
    assert set(placed) == {"raw", "expanded", "dropped", "raw, p=0", "compressed, p=0"}
    assert placed["compressed, p=0"] == {"raw": 0, "passage": 1, "dropped": 0}


def test_follow_ups_lose_their_subject_and_get_it_back(
    library: SmallIndex, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    question = next(one for one in read_questions(QUESTIONS) if one.gold[0] in one.question)
    (tmp_path / "leads.jsonl").write_text(json.dumps({"id": question.gold[0], "text": "Some words about it."}) + "\n")
    assert follow_up_queries.main([str(library.path), "--corpus", str(tmp_path / "leads.jsonl")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["ways"]) == set(follow_up_queries.ways())
    follow_ups, changes = follow_up_queries.make_cases({question.gold[0]: "Some words."}, 5)
    assert question.gold[0] not in follow_ups[0].question
    assert question.gold[0] in follow_ups[0].turn
    assert question.gold[0] in changes[0].question
