import sys

import numpy as np
import pytest

from refrag_core.errors import MissingExtraError, UsageError
from refrag_core.index_reader import IndexReader
from refrag_core.lexical import BM25, LexicalIndex
from tests.small_index import SmallIndex

TEXTS = [
    "Krill are small marine crustaceans found in all oceans.",
    "The spinach is a leafy green plant.",
    "",
    "Marine biology studies marine life: krill, krill and krill.",
    "The spinach is a leafy green plant.",
]


def test_texts_that_share_words_are_ranked_ties_by_row() -> None:
    index = BM25(TEXTS)
    assert index.rank("Where do KRILL live?", 5).tolist() == [3, 0]
    assert index.rank("spinach", 5).tolist() == [1, 4]
    assert index.rank("spinach", 1).tolist() == [1]
    assert index.rank("the zebra", 5).tolist() == []
    assert index.rank("krill zebra", 5).tolist() == [3, 0]


def test_ties_fall_by_the_numbers_given() -> None:
    index = BM25(TEXTS)
    ties = np.array([4, 3, 2, 1, 0])
    assert index.rank("spinach", 5, ties=ties).tolist() == [4, 1]
    assert index.rank("spinach", 1, ties=ties).tolist() == [4]
    assert index.rank("krill", 5, ties=ties).tolist() == [3, 0]


def test_only_allowed_texts_are_ranked() -> None:
    index = BM25(TEXTS)
    assert index.rank("krill spinach", 5, np.array([True, True, True, False, False])).tolist() == [1, 0]
    assert index.rank("krill", 5, np.zeros(5, bool)).tolist() == []


def test_the_best_are_those_of_a_full_sort() -> None:
    random = np.random.default_rng(3)
    words = np.array(["krill", "spinach", "orbit", "copper", "music", "garden"])
    index = BM25(" ".join(random.choice(words, 6)) for _ in range(200))
    everything = index.rank("krill orbit", 200).tolist()
    scores = index._index.get_scores(["krill", "orbit"])
    assert everything == [row for row in np.argsort(-scores, kind="stable") if scores[row] > 0]
    assert all(index.rank("krill orbit", k).tolist() == everything[:k] for k in (1, 2, 10, 60, 150))


def test_passages_are_the_live_ones_of_the_index(library: SmallIndex) -> None:
    """doc-0005 was edited and doc-0006 deleted; an edited text counts, a dead one does not."""
    reader = IndexReader(library.path)
    index = LexicalIndex(reader)
    found = [reader.describe(ref) for ref in index.rank("edited harbour", 10)]
    assert [shown.document_id for shown in found] == ["doc-0005"]
    words = "river mountain engine chunk vector capital winter copper theory music orbit carbon garden king letter"
    live = index.rank(words, 10_000)
    assert all(reader.live_rows(ref.shard)[ref.row] for ref in live)
    texts = [reader.describe(ref).text.lower() for ref in live]
    assert len(texts) > 50
    assert all(any(word in text for word in words.split()) for text in texts)


def test_an_updated_index_ranks_as_one_over_its_live_texts(library: SmallIndex) -> None:
    reader = IndexReader(library.path)
    texts = list(reader.live_texts())
    assert len(texts) == reader.manifest.counts.passages
    query = "Which northern river is the capital of the island?"
    expected = [texts[row] for row in BM25(texts).rank(query, 20)]
    assert [reader.describe(ref).text for ref in LexicalIndex(reader).rank(query, 20)] == expected


def test_a_filter_leaves_the_ranking_of_what_passes(library: SmallIndex) -> None:
    reader = IndexReader(library.path)
    index, passing = LexicalIndex(reader), reader.passing("year < 1910")
    everything = index.rank("river copper king", 10_000)
    expected = [ref for ref in everything if reader.describe(ref).metadata["year"] < 1910]
    assert index.rank("river copper king", 10_000, passing) == expected
    assert 0 < len(expected) < len(everything)


def test_indexing_and_ranking_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    BM25(TEXTS).rank("krill", 2)
    assert capfd.readouterr() == ("", "")


def test_texts_without_words_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^2 texts without a word that is not a stop word; expected text to search$"):
        BM25(["", "the"])


def test_without_bm25s_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError) as caught:
        BM25(TEXTS)
    assert str(caught.value) == (
        "bm25s is not installed and ranking by words needs it; run `pip install 'refrag[hybrid]'`"
    )
