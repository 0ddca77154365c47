from pathlib import Path
from typing import Any

import pytest

from refrag_core.evaluation.qa import contains_answer, exact_match, f1
from refrag_core.evaluation.questions import Question, question_lines
from refrag_core.evaluation.run_qa import evaluate_qa
from refrag_core.runtime import AskOptions, Runtime
from tests.small_index import SmallIndex

ASKED = ["Which river is the capital?", "Where is the copper engine?", "What is in the northern garden?"]
TOP_K = 3


@pytest.fixture(scope="module")
def runtime(library: SmallIndex, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Runtime.open(library.path, device="cpu")


def full(runtime: Runtime, question: str) -> Any:
    return runtime.ask(question, AskOptions(policy="all", top_k=TOP_K, max_new_tokens=12))


@pytest.fixture(scope="module")
def questions(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two take what the decoder says with the full context as right, the first also what it says without
    any; only the first has its gold retrieved."""
    closed = runtime.answer_from(ASKED[0], [], AskOptions(policy="all", max_new_tokens=12)).answer
    answers = [full(runtime, question) for question in ASKED]
    retrieved = {p.doc_id for p in answers[0].passages}
    assert retrieved.isdisjoint({"guide#1"})
    made = [
        Question("a", ASKED[0], (answers[0].answer, closed), (answers[0].passages[-1].doc_id,)),
        Question("b", ASKED[1], ("something else", answers[1].answer), ("guide#1",)),
        Question("c", ASKED[2], ("never said",), ("guide#1",)),
    ]
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text(question_lines(made))
    return path


@pytest.fixture(scope="module")
def report(runtime: Runtime, questions: Path) -> dict[str, Any]:
    lines: list[str] = []
    made = evaluate_qa(
        runtime,
        questions,
        top_k=TOP_K,
        fractions=[0.0, 0.25],
        policy="random",
        max_new_tokens=12,
        on_answer=lines.append,
    )
    assert [line.split(" ")[0] for line in lines] == ["1/3", "2/3", "3/3"]
    return made


def test_every_setting_is_measured(report: dict[str, Any]) -> None:
    assert list(report["settings"]) == ["no context", "random p=0", "random p=0.25", "full context"]
    assert (report["questions"], report["top_k"]) == (3, TOP_K)
    for scores in report["settings"].values():
        assert set(scores) == {"answered", "answered_from_gold", "em", "f1", "decoder_positions", "ttft_ms"}


def test_the_full_context_gives_the_answers_that_ask_gives(report: dict[str, Any], runtime: Runtime) -> None:
    assert [a["outputs"]["full context"] for a in report["answers"]] == [full(runtime, q).answer for q in ASKED]
    scores = report["settings"]["full context"]
    assert (scores["answered"], scores["answered_from_gold"]) == (2, 1)
    assert scores["em"] == pytest.approx(2 / 3, abs=1e-4)
    assert scores["f1"] >= scores["em"]


def test_gold_counts_only_where_it_was_retrieved(report: dict[str, Any]) -> None:
    assert report["gold_retrieved"] == 1
    assert [a["gold_retrieved"] for a in report["answers"]] == [True, False, False]
    assert report["settings"]["no context"]["answered"] == 1
    assert report["settings"]["no context"]["answered_from_gold"] == 0  # what it was not shown it did not use


def test_scores_follow_from_the_outputs(report: dict[str, Any], questions: Path) -> None:
    from refrag_core.evaluation.questions import read_questions

    asked = read_questions(questions)
    for name, scores in report["settings"].items():
        outputs = [a["outputs"][name] for a in report["answers"]]
        pairs = list(zip(outputs, asked, strict=True))
        assert scores["answered"] == sum(contains_answer(o, q.answers) for o, q in pairs)
        assert scores["em"] == pytest.approx(sum(exact_match(o, q.answers) for o, q in pairs) / 3, abs=1e-4)
        assert scores["f1"] == pytest.approx(sum(f1(o, q.answers) for o, q in pairs) / 3, abs=1e-4)


def test_positions_grow_with_what_is_expanded(report: dict[str, Any], runtime: Runtime) -> None:
    positions = [scores["decoder_positions"] for scores in report["settings"].values()]
    assert positions == sorted(positions)
    assert len(set(positions)) == 4
    mean = sum(full(runtime, question).stats.decoder_positions for question in ASKED) / 3
    assert positions[-1] == pytest.approx(mean, abs=0.05)


def test_no_fractions_leave_the_two_ends(runtime: Runtime, questions: Path) -> None:
    made = evaluate_qa(runtime, questions, top_k=1, fractions=[], policy="learned", max_new_tokens=2)
    assert list(made["settings"]) == ["no context", "full context"]
