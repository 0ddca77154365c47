import pytest

from refrag_core.training.schedule import chunk_counts, learning_rate_factor, length_weights, progress_of


def test_progress_follows_what_is_nearer_to_its_end() -> None:
    assert progress_of(25, 100, 9.0, None) == 0.25
    assert progress_of(25, 100, 9.0, 10.0) == 0.9
    assert progress_of(120, 100, 9.0, 10.0) == 1.0
    assert progress_of(0, 0, 0.0, 10.0) == 1.0


def test_warm_up_then_cosine() -> None:
    factors = [learning_rate_factor(p, warmup=0.2, floor=0.1) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


def test_chunk_counts_double_up_to_the_context() -> None:
    assert chunk_counts(512, 16) == (1, 2, 4, 8, 16, 32)


def test_mixture_is_even_from_the_first_step() -> None:
    assert length_weights("mixture", 0.0, 4) == [0.25] * 4


def test_geometric_ratios_of_the_first_and_last_stage() -> None:
    first, last = length_weights("geometric", 0.0, 9), length_weights("geometric", 1.0, 9)
    assert first[0] / first[-1] == pytest.approx(1333.0)
    assert last[-1] / last[0] == pytest.approx(5259.0)
    assert (sum(first), sum(last)) == pytest.approx((1.0, 1.0))
    assert first[0] / first[1] == pytest.approx(first[1] / first[2])


def test_geometric_has_nine_stages() -> None:
    assert len({tuple(length_weights("geometric", step / 900, 9)) for step in range(900)}) == 9
