"""Question sets: JSON lines of `{"id", "question", "answers": [...], "gold": [document ids]}`."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refrag_core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the answers that count as right, and the documents that hold one."""

    id: str
    question: str
    answers: tuple[str, ...]
    """Accepted spellings; empty where the set gives none (then only retrieval can be judged)."""
    gold: tuple[str, ...]
    """Document ids; empty where the set gives none (then only answers can be judged)."""


_FIELDS = "id, question, answers, gold"


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON Lines file, in its order; blank lines are skipped.

    Raises UsageError, naming the line, for what is no question, a repeated id, an unreadable or empty file.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text ({error}); expected JSON lines of questions") from error
    questions: dict[str, Question] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            question = parse_question(line, where=f"{path} line {number}")
            if question.id in questions:
                raise UsageError(f"{path} line {number}: id {question.id!r} occurs twice; expected unique ids")
            questions[question.id] = question
    if not questions:
        raise UsageError(f'{path} has no questions; expected JSON lines with "{_FIELDS}"')
    return list(questions.values())


def parse_question(line: str, *, where: str) -> Question:
    """The question in one JSON line; UsageError starts with `where`."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error}); expected one object with {_FIELDS}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where}: a JSON {type(record).__name__}; expected one object with {_FIELDS}")
    unknown, missing = sorted(record.keys() - _field_names()), sorted(_field_names() - record.keys())
    if unknown or missing:
        raise UsageError(f"{where}: missing {missing}, unknown {unknown}; expected exactly {_FIELDS}")
    return Question(
        id=_text(record, "id", where),
        question=_text(record, "question", where),
        answers=_texts(record, "answers", where),
        gold=_texts(record, "gold", where),
    )


def _field_names() -> set[str]:
    return set(_FIELDS.split(", "))


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: {field} is {value!r}; expected a text that is not blank")
    return value


def _texts(record: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = record[field]
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise UsageError(f"{where}: {field} is {value!r}; expected a list of texts that are not blank")
    return tuple(value)


def question_lines(questions: Iterable[Question]) -> str:
    """The file that `read_questions` reads back: one JSON object a line, in order."""
    return "".join(json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions)


def check_gold(questions: Sequence[Question], document_ids: Iterable[str]) -> None:
    """Raise UsageError when a gold document is not among `document_ids`: its question could not be answered."""
    known = set(document_ids)
    absent = [(question.id, gold) for question in questions for gold in question.gold if gold not in known]
    if absent:
        raise UsageError(
            f"{len(absent)} gold documents are not indexed (question {absent[0][0]!r}: {absent[0][1]!r}, …); "
            "expected the corpus that the questions were made for"
        )
