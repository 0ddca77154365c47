from pathlib import Path

import numpy as np
import pytest

from refrag_core.errors import ConfigError, FilterError, FingerprintMismatchError
from refrag_core.retrieval import BY_VECTORS, RetrievalOptions, Searcher, open_searcher
from refrag_core.retriever import load_retriever
from tests import tiny_models
from tests.small_index import SmallIndex, documents

QUESTION = "Which river is the capital of the northern island?"


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


@pytest.fixture
def searcher(library: SmallIndex) -> Searcher:
    return open_searcher(library.path, device="cpu")


def test_hits_are_the_nearest_passages_by_the_retriever(searcher: Searcher, library: SmallIndex) -> None:
    """Recomputed from the texts of all live passages, by the retriever alone."""
    retriever = load_retriever(library.models / "encoder")
    everything = searcher.search(QUESTION, 10_000)
    assert len(everything) == searcher.reader.manifest.counts.passages
    vectors, _ = retriever.embed([hit.text for hit in everything])
    scores = vectors.astype(np.float32) @ retriever.embed_queries([QUESTION])[0]
    assert [hit.score for hit in everything] == pytest.approx(scores.tolist(), abs=2e-3)
    assert [hit.score for hit in everything] == sorted((hit.score for hit in everything), reverse=True)
    assert [hit.rank for hit in everything] == list(range(1, len(everything) + 1))


def test_a_hit_is_what_a_person_wants_to_see(searcher: Searcher) -> None:
    hits = {hit.doc_id: hit for hit in searcher.search(QUESTION, 10_000)}
    assert hits["guide#1"].text == "A guide to the copper orbit of the northern king."
    assert hits["guide#1"].metadata == {"year": 1999}
    assert len(bytes.fromhex(hits["guide#1"].passage)) == 16
    assert hits["doc-0005"].text.startswith("Edited")
    assert "doc-0006" not in hits


def test_fewer_are_the_first_of_more(searcher: Searcher) -> None:
    assert searcher.search(QUESTION, 3) == searcher.search(QUESTION, 20)[:3]
    assert [ref for ref, _ in searcher.retrieve(QUESTION, 3)] == [r for r, _ in searcher.retrieve(QUESTION, 20)][:3]


def test_a_query_vector_is_a_unit_vector_of_the_index_s_width(searcher: Searcher) -> None:
    vector = searcher.embed(QUESTION)
    assert (vector.shape, vector.dtype) == ((48,), np.float32)
    assert float(np.linalg.norm(vector)) == pytest.approx(1, abs=1e-3)


def test_an_older_generation_is_searched_as_it_was(library: SmallIndex) -> None:
    hits = {hit.doc_id: hit for hit in open_searcher(library.path, version=1).search(QUESTION, 10_000)}
    assert hits["doc-0005"].text in documents(6)[5]["text"]
    assert {"doc-0006"} <= set(hits)
    assert "guide#1" not in hits


def test_another_retriever_is_refused(library: SmallIndex, tmp_path: Path) -> None:
    other = tiny_models.encoder_folder(tmp_path / "other", seed=1)
    with pytest.raises(
        FingerprintMismatchError, match=r"the passages were embedded with .*give that one with --retriever"
    ):
        open_searcher(library.path, retriever=str(other))


def test_the_same_retriever_elsewhere_is_the_same(library: SmallIndex, tmp_path: Path) -> None:
    copy = tiny_models.encoder_folder(tmp_path / "copy")
    found = open_searcher(library.path, retriever=str(copy)).search(QUESTION, 3)
    assert found == open_searcher(library.path).search(QUESTION, 3)


# --- filters and fusion


def test_a_filter_leaves_the_ranking_of_what_passes(searcher: Searcher) -> None:
    everything = searcher.search(QUESTION, 10_000)
    found = searcher.search(QUESTION, 10_000, RetrievalOptions(where="year < 1920 and importance > .2"))
    wanted = [h for h in everything if h.metadata["year"] < 1920 and h.metadata.get("importance", 0) > 0.2]
    assert [hit.passage for hit in found] == [hit.passage for hit in wanted]
    assert 0 < len(found) < len(everything)


def test_a_filter_that_nothing_fulfils_is_an_empty_result(searcher: Searcher) -> None:
    assert searcher.search(QUESTION, 5, RetrievalOptions(where="year > 3000")) == []
    assert searcher.search(QUESTION, 5, RetrievalOptions(where="year > 3000", hybrid=True)) == []


def test_a_filter_that_is_none_is_refused(searcher: Searcher) -> None:
    with pytest.raises(FilterError, match="names the field 'yeer', which no document has"):
        searcher.search(QUESTION, 5, RetrievalOptions(where="yeer > 1900"))


@pytest.mark.parametrize("where", [None, "year < 1920"])
def test_hybrid_scores_are_the_reciprocal_ranks_of_both(searcher: Searcher, where: str | None) -> None:
    passing = None if where is None else searcher.reader.passing(where)
    dense = [ref for ref, _ in searcher.reader.search(searcher.embed(QUESTION), 100, passing)]
    lexical = searcher.lexical.rank(QUESTION, 100, passing)
    options = RetrievalOptions(where=where, hybrid=True, dense_weight=2.0, lexical_weight=0.5)
    found = searcher.retrieve(QUESTION, 10, options)
    expected = {
        ref: sum(w / (61 + ranks.index(ref)) for ranks, w in ((dense, 2.0), (lexical, 0.5)) if ref in ranks)
        for ref in {*dense, *lexical}
    }
    assert [score for _, score in found] == pytest.approx(sorted(expected.values(), reverse=True)[:10])
    assert all(score == pytest.approx(expected[ref]) for ref, score in found)
    assert found == searcher.retrieve(QUESTION, 20, options)[:10]


def test_one_weight_alone_is_that_ranking(searcher: Searcher) -> None:
    dense = [ref for ref, _ in searcher.retrieve(QUESTION, 10)]
    words = searcher.lexical.rank(QUESTION, 10)
    only_dense = searcher.retrieve(QUESTION, 10, RetrievalOptions(hybrid=True, lexical_weight=0))
    only_words = searcher.retrieve(QUESTION, 10, RetrievalOptions(hybrid=True, dense_weight=0))
    assert [ref for ref, _ in only_dense] == dense
    assert [ref for ref, _ in only_words] == words
    assert dense != words


def test_a_question_without_words_is_ranked_by_vectors(searcher: Searcher) -> None:
    dense = [ref for ref, _ in searcher.retrieve("?", 5)]
    assert [ref for ref, _ in searcher.retrieve("?", 5, RetrievalOptions(hybrid=True))] == dense


def test_vectors_alone_build_no_lexical_index(searcher: Searcher) -> None:
    searcher.search(QUESTION, 3, RetrievalOptions(where="year > 1900"))
    assert "lexical" not in vars(searcher)
    assert RetrievalOptions() == BY_VECTORS


@pytest.mark.parametrize("weights", [(0, 0), (-1, 1), (1, float("nan")), (1, float("inf"))])
def test_weights_that_are_none(weights: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="expected numbers from 0 up, not both 0"):
        RetrievalOptions(hybrid=True, dense_weight=weights[0], lexical_weight=weights[1])
