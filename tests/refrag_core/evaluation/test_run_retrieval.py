from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refrag_core.errors import FingerprintMismatchError, UsageError
from refrag_core.evaluation.questions import Question, question_lines
from refrag_core.evaluation.run_retrieval import evaluate_retrieval
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.retriever import load_retriever
from tests import tiny_models
from tests.small_index import SmallIndex, documents

NAMES = ["zebra", "yucca", "xenon", "walrus", "violin", "umbra", "tundra", "saffron"]


def records() -> list[dict[str, Any]]:
    """Documents that each hold one word of their own."""
    return [
        {"id": f"about-{name}", "text": f"{record['text']} Only this one knows of the {name}."}
        for name, record in zip(NAMES, documents(len(NAMES)), strict=True)
    ]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    """Its second generation has lost a document that was the best answer to one question."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        decoy = {"id": "decoy", "text": " ".join(["zebra"] * 20)}
        small = SmallIndex(tmp_path_factory.mktemp("index"), [*records(), decoy])
        small.build()
        small.write(records())
        small.build(delete_missing=True)
    return small


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    questions = [Question(name, f"Who knows of the {name}?", (), (f"about-{name}",)) for name in NAMES]
    path.write_text(question_lines(questions))
    return path


def live_passages(reader: IndexReader) -> list[tuple[str, str]]:
    """(document id, text) of every live passage."""
    return [
        (shown.document_id, shown.text)
        for number in range(len(reader.manifest.shards))
        for row in np.flatnonzero(reader.live_rows(number))
        for shown in [reader.describe(PassageRef(number, int(row)))]
    ]


def test_dense_scores_are_those_of_an_exact_ranking(index: SmallIndex, asked: Path) -> None:
    """Recomputed from the texts: rank of each gold document among distinct documents, best passage first."""
    retriever = load_retriever(index.models / "encoder")
    ids, texts = zip(*live_passages(IndexReader(index.path)), strict=True)
    vectors = retriever.embed(list(texts))[0].astype(np.float32)
    ranks = []
    for name in NAMES:
        order = np.argsort(-(vectors @ retriever.embed_queries([f"Who knows of the {name}?"])[0]), kind="stable")
        distinct = list(dict.fromkeys(ids[row] for row in order[:100]))
        ranks.append(distinct.index(f"about-{name}") + 1)
    report = evaluate_retrieval(index.path, asked, device="cpu")
    expected = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(NAMES) for k in (1, 5, 20)}
    expected["mrr"] = sum(1 / rank for rank in ranks) / len(NAMES)
    assert report["systems"]["dense"] == pytest.approx(expected, abs=1e-4)
    assert report["systems"]["dense"]["recall@1"] < 1  # a random retriever: the figure above says something


def test_bm25_finds_what_words_tell(index: SmallIndex, asked: Path) -> None:
    report = evaluate_retrieval(index.path, asked, device="cpu")
    assert report["systems"]["bm25"] == {"recall@1": 1.0, "recall@5": 1.0, "recall@20": 1.0, "mrr": 1.0}
    assert (report["questions"], report["version"]) == (len(NAMES), 2)
    assert report["passages"] == len(live_passages(IndexReader(index.path)))


def test_bm25_may_be_left_out(index: SmallIndex, asked: Path) -> None:
    assert set(evaluate_retrieval(index.path, asked, device="cpu", bm25=False)["systems"]) == {"dense"}


def test_a_gold_document_that_is_not_indexed(index: SmallIndex, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(question_lines([Question("q", "Who?", (), ("decoy",))]))
    with pytest.raises(UsageError, match=r"1 gold documents are not indexed \(question 'q': 'decoy', …\)"):
        evaluate_retrieval(index.path, path, device="cpu")


def test_another_retriever_is_refused(index: SmallIndex, asked: Path, tmp_path: Path) -> None:
    other = tiny_models.encoder_folder(tmp_path / "other", seed=1)
    with pytest.raises(FingerprintMismatchError):
        evaluate_retrieval(index.path, asked, retriever=str(other), device="cpu")
