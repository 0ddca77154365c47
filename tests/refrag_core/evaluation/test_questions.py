from pathlib import Path

import pytest

from refrag_core.errors import UsageError
from refrag_core.evaluation.questions import Question, check_gold, question_lines, read_questions

CAPITAL = Question(id="1", question="What is the capital of Côte d'Ivoire?", answers=("Yamoussoukro",), gold=("ci",))
UNJUDGED = Question(id="2", question="Why?", answers=(), gold=())
LINE = '{"id": "1", "question": "Who?", "answers": ["Ada"], "gold": ["doc"]}'
FIELDS = "id, question, answers, gold"


def read_text(tmp_path: Path, text: str) -> list[Question]:
    path = tmp_path / "questions.jsonl"
    path.write_text(text, encoding="utf-8")
    return read_questions(path)


def test_written_questions_read_back_in_order(tmp_path: Path):
    text = question_lines([CAPITAL, UNJUDGED])
    assert text.count("\n") == 2
    assert "Côte" in text
    assert read_text(tmp_path, text + "\n\n") == [CAPITAL, UNJUDGED]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path):
    question = Question(id="1", question="one\u2028two\x85three", answers=("x",), gold=())
    assert read_text(tmp_path, question_lines([question])) == [question]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", f"a JSON list; expected one object with {FIELDS}"),
        ('{"id": "1"}', f"missing ['answers', 'gold', 'question'], unknown []; expected exactly {FIELDS}"),
        (LINE[:-1] + ', "extra": 1}', f"missing [], unknown ['extra']; expected exactly {FIELDS}"),
        (LINE.replace('"Who?"', '" "'), "question is ' '; expected a text that is not blank"),
        (LINE.replace('"id": "1"', '"id": 1'), "id is 1; expected a text that is not blank"),
        (LINE.replace('["Ada"]', '"Ada"'), "answers is 'Ada'; expected a list of texts that are not blank"),
        (LINE.replace('["doc"]', '["doc", ""]'), "gold is ['doc', '']; expected a list of texts that are not blank"),
        (LINE.replace('"id": "1"', '"id": "0"'), "id '0' occurs twice; expected unique ids"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str):
    with pytest.raises(UsageError) as caught:
        read_text(tmp_path, LINE.replace('"id": "1"', '"id": "0"') + "\n\n" + line)
    assert str(caught.value) == f"{tmp_path / 'questions.jsonl'} line 3: {message}"


def test_what_is_not_json_is_named(tmp_path: Path):
    with pytest.raises(
        UsageError, match=rf"questions\.jsonl line 1: not JSON \(.*\); expected one object with {FIELDS}"
    ):
        read_text(tmp_path, "{")


def test_empty_missing_and_binary_files_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"questions\.jsonl has no questions; expected JSON lines with"):
        read_text(tmp_path, "\n")
    with pytest.raises(UsageError, match=r"gone\.jsonl cannot be read as UTF-8 text \(.*No such file"):
        read_questions(tmp_path / "gone.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"binary cannot be read as UTF-8 text"):
        read_questions(tmp_path / "binary")


def test_gold_documents_must_be_indexed():
    check_gold([CAPITAL, UNJUDGED], ["other", "ci"])
    with pytest.raises(UsageError) as caught:
        check_gold([CAPITAL, UNJUDGED], ["other"])
    assert str(caught.value) == (
        "1 gold documents are not indexed (question '1': 'ci', …); expected the corpus that the questions were made for"
    )
