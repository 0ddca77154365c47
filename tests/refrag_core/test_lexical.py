import sys

import pytest

from refrag_core.errors import MissingExtraError, UsageError

TEXTS = [
    "Krill are small marine crustaceans found in all oceans.",
    "The spinach is a leafy green plant.",
    "",
    "Marine biology studies marine life: krill, krill and krill.",
    "The spinach is a leafy green plant.",
]


def test_texts_that_share_words_are_ranked_ties_by_row():
    pytest.importorskip("bm25s")
    from refrag_core.lexical import BM25

    index = BM25(TEXTS)
    assert index.rank("Where do KRILL live?", 5).tolist() == [3, 0]
    assert index.rank("spinach", 5).tolist() == [1, 4]
    assert index.rank("spinach", 1).tolist() == [1]
    assert index.rank("the zebra", 5).tolist() == []
    assert index.rank("krill zebra", 5).tolist() == [3, 0]


def test_indexing_and_ranking_print_nothing(capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("bm25s")
    from refrag_core.lexical import BM25

    BM25(TEXTS).rank("krill", 2)
    assert capfd.readouterr() == ("", "")


def test_texts_without_words_are_refused():
    pytest.importorskip("bm25s")
    from refrag_core.lexical import BM25

    with pytest.raises(UsageError, match=r"^2 texts without a word that is not a stop word; expected text to search$"):
        BM25(["", "the"])


def test_without_bm25s_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    from refrag_core.lexical import BM25

    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError) as caught:
        BM25(TEXTS)
    assert str(caught.value) == (
        "bm25s is not installed and ranking by words needs it; run `pip install 'refrag[hybrid]'`"
    )
