import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refrag_core.errors import UsageError
from refrag_core.evaluation import qa_answers
from refrag_core.evaluation.qa import ABSTENTION, contains_answer, exact_match, f1
from refrag_core.evaluation.qa_answers import closest_passages
from refrag_core.evaluation.qa_passages import PassageSource, RetrieverMode
from refrag_core.evaluation.qa_table import table_lines
from refrag_core.evaluation.questions import Question, question_lines
from refrag_core.evaluation.run_qa import QaOptions, evaluate_qa
from refrag_core.retrieval import RetrievalOptions
from refrag_core.runtime import AskOptions, Runtime
from tests.small_index import SmallIndex

ASKED = ["Which river is the capital?", "Where is the copper engine?", "What is in the northern garden?"]
TOP_K = 3
OPTIONS = QaOptions(top_k=TOP_K, fractions=[0.0, 0.25], policy="random", max_new_tokens=12, timed_questions=2)
SCORES = {
    *("answered", "answered_from_gold", "em", "f1", "em_with_gold", "f1_with_gold"),
    *("abstained", "abstained_without_answer", "decoder_positions", "ttft_ms"),
}


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
    made = evaluate_qa(runtime, questions, OPTIONS, on_answer=lines.append)
    assert [line.split(" ")[0] for line in lines] == ["1/3", "2/3", "3/3"]
    return made


def test_every_setting_is_measured(report: dict[str, Any]) -> None:
    assert list(report["settings"]) == ["no context", "random p=0", "random p=0.25", "full context"]
    assert (report["questions"], report["top_k"]) == (3, TOP_K)
    for scores in report["settings"].values():
        assert set(scores) == SCORES
        assert scores["ttft_ms"] > 0


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
    made = evaluate_qa(runtime, questions, QaOptions(top_k=1, fractions=[], max_new_tokens=2, timed_questions=0))
    assert list(made["settings"]) == ["no context", "full context"]
    assert made["equal_latency"] == {}
    assert made["settings"]["full context"]["ttft_ms"] is None


def test_a_batch_answers_as_one_prompt_does(report: dict[str, Any], runtime: Runtime) -> None:
    for fraction, name in ((0.0, "random p=0"), (0.25, "random p=0.25")):
        options = AskOptions(policy="random", expansion_fraction=fraction, top_k=TOP_K, max_new_tokens=12)
        alone = [runtime.ask(question, options) for question in ASKED]
        assert [answer["outputs"][name] for answer in report["answers"]] == [answer.answer for answer in alone]
        mean = sum(answer.stats.decoder_positions for answer in alone) / 3
        assert report["settings"][name]["decoder_positions"] == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize(
    ("compressed", "sizes", "count"),
    [
        (60, [100, 100, 100], 1),  # none would be closer, but one is the least
        (199, [100, 100, 100], 1),  # of 150 and 250
        (200, [100, 100, 100], 2),  # of 150 and 250 the larger
        (201, [100, 100, 100], 2),
        (9000, [100, 100, 100], 3),
        (60, [], 0),
    ],
)
def test_the_full_passages_of_equal_positions_by_hand(compressed: int, sizes: list[int], count: int) -> None:
    assert closest_passages(compressed, 50, sizes) == count


def test_equal_latency_gives_fewer_passages_in_full(report: dict[str, Any], runtime: Runtime) -> None:
    for fraction, pair in report["equal_latency"].items():
        compressed, full = pair["compressed"], pair["full"]
        assert compressed == report["settings"][f"random p={fraction}"]
        assert 1 <= pair["full_passages"] < TOP_K
        assert full["decoder_positions"] < report["settings"]["full context"]["decoder_positions"]
        assert set(full) == SCORES
    one = [full_of(runtime, question, 1).stats.decoder_positions for question in ASKED]
    assert report["equal_latency"]["0"]["full"]["decoder_positions"] == pytest.approx(sum(one) / 3, abs=0.05)


def full_of(runtime: Runtime, question: str, top_k: int) -> Any:
    return runtime.ask(question, AskOptions(policy="all", top_k=top_k, max_new_tokens=12))


def test_retrieval_stands_beside_the_answers(report: dict[str, Any], runtime: Runtime) -> None:
    last = [p.doc_id for p in full(runtime, ASKED[0]).passages]
    rank = list(dict.fromkeys(last)).index(last[-1]) + 1
    assert report["retrieval"]["recall@1"] == pytest.approx((rank == 1) / 3, abs=1e-4)
    assert report["retrieval"]["recall@3"] == pytest.approx(1 / 3, abs=1e-4)
    assert report["retrieval"]["mrr"] == pytest.approx(1 / rank / 3, abs=1e-4)
    scores = report["settings"]["full context"]
    assert (scores["em_with_gold"], scores["f1_with_gold"]) == (1.0, 1.0)


def test_a_killed_evaluation_goes_on(
    runtime: Runtime, questions: Path, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "runs" / "answers.jsonl"
    options = replace(OPTIONS, timed_questions=0)
    evaluate_qa(runtime, questions, options, saved=saved)
    lines = saved.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    saved.write_text("".join(lines[:2]) + lines[2][:20])
    asked: list[str] = []
    again = evaluate_qa(runtime, questions, options, saved=saved, on_answer=asked.append)
    assert [line.split(" ")[0] for line in asked] == ["2/3", "3/3"]
    assert again["answers"] == report["answers"]
    assert sorted(saved.read_text().splitlines()) == sorted("".join(lines).splitlines())
    with pytest.raises(UsageError, match=r"answers of another evaluation \(top_k differ"):
        evaluate_qa(runtime, questions, replace(options, top_k=TOP_K), saved=rewritten(saved, top_k=7))
    saved.write_text("{}\n[]\n")
    with pytest.raises(UsageError, match="holds no saved answers"):
        evaluate_qa(runtime, questions, options, saved=saved)


def rewritten(saved: Path, **changes: Any) -> Path:
    first, *rest = saved.read_text().splitlines(keepends=True)
    saved.write_text(json.dumps(json.loads(first) | changes) + "\n" + "".join(rest))
    return saved


def test_a_limit_takes_the_first_questions(runtime: Runtime, questions: Path) -> None:
    made = evaluate_qa(runtime, questions, replace(OPTIONS, fractions=[], limit=2, timed_questions=0))
    assert [answer["id"] for answer in made["answers"]] == ["a", "b"]


def test_gold_passages_are_given_among_random_ones(runtime: Runtime) -> None:
    asked = [Question(str(n), "Which guide?", ("copper orbit",), ("guide#1", "doc-0003")) for n in range(6)]
    source = PassageSource(runtime, asked, mode="gold", top_k=5, seed=0)
    placed = []
    for number in range(6):
        refs = source.given(number)
        documents = [passage.document_id for passage in source.described(refs)]
        assert len(set(refs)) == 5
        assert documents.count("guide#1") == documents.count("doc-0003") == 1
        placed.append(documents.index("guide#1"))
    assert len(set(placed)) > 1
    again = PassageSource(runtime, asked, mode="gold", top_k=5, seed=0)
    assert [again.given(n) for n in range(6)] == [source.given(n) for n in range(6)]
    with pytest.raises(UsageError, match="no question names gold documents"):
        PassageSource(runtime, [Question("a", "?", (), ())], mode="gold", top_k=5, seed=0)


def test_a_weak_retriever_loses_about_half_of_its_passages(runtime: Runtime) -> None:
    asked = [Question(str(n), ASKED[n % 3], ("x",), ("guide#1",)) for n in range(30)]
    strong = PassageSource(runtime, asked, mode="strong", top_k=4, seed=0)
    weak = PassageSource(runtime, asked, mode="weak", top_k=4, seed=0)
    kept = [a == b for n in range(30) for a, b in zip(strong.given(n), weak.given(n), strict=True)]
    assert 40 <= sum(kept) <= 80  # of 120


@pytest.mark.parametrize("mode", ["gold", "weak"])
def test_random_passages_pass_the_filter(runtime: Runtime, mode: RetrieverMode) -> None:
    asked = [Question(str(n), f"Question {n}?", (), ("doc-0011",)) for n in range(10)]
    retrieval = RetrievalOptions(where="year < 1920")
    source = PassageSource(runtime, asked, mode=mode, top_k=4, seed=0, retrieval=retrieval)
    given = [runtime.reader.describe(ref) for number in range(10) for ref in source.given(number)]
    assert len(given) == 40
    assert all(shown.metadata["year"] < 1920 for shown in given)


def test_abstentions_are_counted(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(question_lines([Question("a", ASKED[0], ("x",), ()), Question("b", ASKED[1], (), ())]))
    monkeypatch.setattr(qa_answers, "_text", lambda *_: ABSTENTION)
    made = evaluate_qa(runtime, path, replace(OPTIONS, timed_questions=0))
    for scores in made["settings"].values():
        assert (scores["abstained"], scores["abstained_without_answer"]) == (1.0, 1.0)
        assert (scores["answered"], scores["em"], scores["em_with_gold"]) == (0, 0.0, None)
    assert made["retrieval"]["mrr"] is None
    assert any("(without an answer 1.000)" in line for line in table_lines(made))
