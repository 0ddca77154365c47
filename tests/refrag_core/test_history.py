import numpy as np
import pytest

from refrag_core.errors import ConfigError
from refrag_core.history import HistoryOptions, Window, last_first_raw, query_vector, windows


def ways(sizes: list[int], budget: int, first_raw: int = 0, *, compressible: bool = True) -> list[tuple[int, int]]:
    found = windows(sizes, budget, first_raw, compressible=compressible)
    return [(window.first_passage, window.first_raw) for window in found]


def test_what_fits_raw_is_raw_whatever_was_before() -> None:
    assert ways([40, 30, 30], 100) == [(0, 0)]
    assert ways([40, 30, 30], 100, first_raw=2) == [(0, 0)]  # a larger budget than before
    assert ways([], 0) == [(0, 0)]


def test_as_many_turns_become_passages_as_leave_half_of_the_budget() -> None:
    assert ways([40, 30, 30, 20], 100)[0] == (0, 2)
    assert ways([10, 10, 10, 90], 100)[0] == (0, 4)


def test_turns_that_were_passages_stay_so_while_the_rest_fits() -> None:
    assert ways([40, 30, 30, 20], 100, first_raw=1)[0] == (0, 1)
    assert ways([40, 30, 30, 50], 100, first_raw=1)[0] == (0, 3)


def test_the_oldest_is_dropped_only_when_every_turn_is_a_passage() -> None:
    assert ways([40, 30, 30], 90) == [(0, 2), (0, 3), (1, 3), (2, 3), (3, 3)]
    assert ways([40], 0) == [(0, 1), (1, 1)]


def test_turns_that_passages_would_not_shorten_stay_raw_and_are_dropped() -> None:
    assert ways([40, 30, 30], 60, compressible=False) == [(1, 1), (2, 2), (3, 3)]
    assert ways([40, 30, 30], 45, first_raw=1, compressible=False) == [(2, 2), (3, 3)]
    assert ways([40], 0, compressible=False) == [(1, 1)]


@pytest.mark.parametrize("compressible", [True, False])
@pytest.mark.parametrize("budget", [0, 45, 100, 130, 1000])
def test_where_turns_were_raw_before_follows_from_the_turns(budget: int, compressible: bool) -> None:
    sizes, passages, first_raw = [40, 30, 30, 20, 60, 10, 45, 20], [8, 6, 6, 4, 12, 2, 9, 4], 0
    for turns in range(len(sizes)):
        assert last_first_raw(sizes[:turns], passages, budget, compressible=compressible) == first_raw
        placed = ways(sizes[:turns], budget, first_raw, compressible=compressible)
        first_raw = next(raw for old, raw in placed if sum(passages[old:raw]) + sum(sizes[raw:turns]) <= budget)
    assert (first_raw > 0) == (budget < 1000)


@pytest.mark.parametrize("compressible", [True, False])
def test_the_last_way_always_fits(compressible: bool) -> None:
    for budget in range(0, 120, 7):
        assert list(windows([40, 30, 30], budget, 1, compressible=compressible))[-1] in (Window(3, 3), Window(0, 0))


def test_a_query_leans_towards_the_turn_before() -> None:
    question, turn = np.array([1, 0], np.float32), np.array([0, 1], np.float32)
    assert query_vector(question, None, 0.5) is question
    assert query_vector(question, turn, 0.0) is question
    mixed = query_vector(question, turn, 0.75)
    assert mixed.tolist() == pytest.approx([0.8, 0.6])
    assert mixed.dtype == np.float32


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="-1 positions"):
        HistoryOptions(positions=-1)
    for weight in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"weight (-0\.5|nan|inf) .*--turn-weight"):
            HistoryOptions(turn_weight=weight)
