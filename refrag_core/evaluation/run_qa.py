"""`refrag eval qa`: the same questions with no context, with full text, and compressed at several fractions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_core.evaluation.qa import contains_answer, exact_match, f1
from refrag_core.evaluation.questions import Question, read_questions
from refrag_core.index_reader import PassageRef
from refrag_core.policy import PolicyName
from refrag_core.runtime import Answer, AskOptions, Runtime

NO_CONTEXT, FULL = "no context", "full context"


@dataclass(frozen=True, slots=True)
class _Setting:
    name: str
    options: AskOptions
    with_passages: bool


def evaluate_qa(
    runtime: Runtime,
    questions: Path,
    *,
    top_k: int,
    fractions: Sequence[float],
    policy: PolicyName,
    max_new_tokens: int,
    on_answer: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Answer every question in every setting and score it; retrieval is done once a question.

    Returns counts per setting: `answered` (an accepted answer stands in the output as whole words),
    `answered_from_gold` (and a gold document is among the passages), exact match, F1, mean decoder positions.
    """
    asked = read_questions(questions)
    settings = _settings(fractions, policy, top_k, max_new_tokens)
    answers: dict[str, list[Answer]] = {setting.name: [] for setting in settings}
    retrieved = [_retrieve(runtime, question, top_k) for question in asked]
    found = [bool(set(question.gold) & documents) for question, (_, documents) in zip(asked, retrieved, strict=True)]
    for number, (question, (refs, _)) in enumerate(zip(asked, retrieved, strict=True), start=1):
        for setting in settings:
            given = refs if setting.with_passages else []
            answers[setting.name].append(runtime.answer_from(question.question, given, setting.options))
        if on_answer is not None:
            on_answer(f"{number}/{len(asked)} {question.question} {answers[settings[-1].name][-1].answer!r}")
    return {
        "questions": len(asked),
        "top_k": top_k,
        "gold_retrieved": sum(found),
        "settings": {s.name: _scored(asked, answers[s.name], found if s.with_passages else None) for s in settings},
        "answers": [
            {"id": question.id, "question": question.question, "gold_retrieved": hit}
            | {"outputs": {setting.name: answers[setting.name][i].answer for setting in settings}}
            for i, (question, hit) in enumerate(zip(asked, found, strict=True))
        ],
    }


def _settings(fractions: Sequence[float], policy: PolicyName, top_k: int, max_new_tokens: int) -> list[_Setting]:
    full = AskOptions(policy="all", top_k=top_k, max_new_tokens=max_new_tokens)
    settings = [_Setting(NO_CONTEXT, full, False)]
    for fraction in fractions:
        options = AskOptions(policy=policy, expansion_fraction=fraction, top_k=top_k, max_new_tokens=max_new_tokens)
        settings.append(_Setting(f"{policy} p={fraction:g}", options, True))
    return [*settings, _Setting(FULL, full, True)]


def _retrieve(runtime: Runtime, question: Question, top_k: int) -> tuple[list[PassageRef], set[str]]:
    refs = [ref for ref, _ in runtime.retrieve(question.question, top_k)]
    return refs, {runtime.reader.describe(ref).document_id for ref in refs}


def _scored(questions: Sequence[Question], answers: Sequence[Answer], found: Sequence[bool] | None) -> dict[str, Any]:
    right = [contains_answer(answer.answer, q.answers) for q, answer in zip(questions, answers, strict=True)]
    count = len(questions)
    return {
        "answered": int(sum(right)),
        "answered_from_gold": 0 if found is None else sum(bool(r) and hit for r, hit in zip(right, found, strict=True)),
        "em": round(sum(exact_match(a.answer, q.answers) for q, a in zip(questions, answers, strict=True)) / count, 4),
        "f1": round(sum(f1(a.answer, q.answers) for q, a in zip(questions, answers, strict=True)) / count, 4),
        "decoder_positions": round(sum(answer.stats.decoder_positions for answer in answers) / count, 1),
        "ttft_ms": round(sum(answer.stats.ttft_ms for answer in answers) / count, 1),
    }
