from pathlib import Path

import numpy as np
import pytest

from refrag_core.errors import FingerprintMismatchError
from refrag_core.retrieval import Searcher, open_searcher
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
