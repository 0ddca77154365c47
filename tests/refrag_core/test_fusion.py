import pytest

from refrag_core.fusion import RANK_CONSTANT, fuse


def test_scores_are_sums_of_reciprocal_ranks() -> None:
    """a: 1/61 + 1/63; b: 1/62 + 1/61; c: 1/63; d: 1/62."""
    assert RANK_CONSTANT == 60
    fused = fuse([(["a", "b", "c"], 1.0), (["b", "d", "a"], 1.0)], 10)
    assert [item for item, _ in fused] == ["b", "a", "d", "c"]
    assert [score for _, score in fused] == pytest.approx([0.0325225, 0.0322665, 0.0161290, 0.0158730], abs=1e-7)


def test_weights_decide_between_rankings() -> None:
    """a: 2/61 and b: 2/62 against c: 1/61 and d: 1/62."""
    assert [item for item, _ in fuse([("ab", 2.0), ("cd", 1.0)], 4)] == ["a", "b", "c", "d"]
    assert [item for item, _ in fuse([("ab", 1.0), ("cd", 3.0)], 4)] == ["c", "d", "a", "b"]
    assert fuse([("ab", 2.0)], 1) == [("a", pytest.approx(2 / 61))]


def test_ties_fall_in_the_order_of_the_rankings() -> None:
    assert [item for item, _ in fuse([("ab", 1.0), ("cd", 1.0)], 4)] == ["a", "c", "b", "d"]


def test_nothing_in_nothing_out() -> None:
    assert fuse([], 3) == []
    assert fuse([("", 1.0), ("x", 1.0)], 3) == [("x", pytest.approx(1 / 61))]
