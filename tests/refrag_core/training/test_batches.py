import numpy as np
import pytest

from refrag_core.errors import ConfigError
from refrag_core.training.batches import (
    continuations_batch,
    interleaved_batch,
    last_or_random_masks,
    next_paragraph_batch,
    random_masks,
    recall_batch,
    reconstruction_batch,
    run_masks,
    text_batch,
)
from refrag_core.training.losses import IGNORED

V = -1


def rows(*values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def test_reconstruction_of_two_examples_in_a_row() -> None:
    batch = reconstruction_batch(rows([1, 2, 3, 4, 5, 6, 7, 8]), chunk_size=2, num_chunks=2)
    assert batch.ids.tolist() == [[V, V, 1, 2, 3, 4, V, V, 5, 6, 7, 8]]
    assert batch.chunk_ids.tolist() == [[[1, 2], [3, 4], [5, 6], [7, 8]]]
    assert batch.places.tolist() == [[0, 1, 6, 7]]
    assert batch.predict_at.tolist() == [[1, 2, 3, 4, 7, 8, 9, 10]]
    assert batch.targets.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_every_length_of_a_curriculum_has_one_shape() -> None:
    tokens = np.arange(2 * 16).reshape(2, 16)
    shapes = {reconstruction_batch(tokens, chunk_size=2, num_chunks=n).ids.shape for n in (1, 2, 4, 8)}
    assert shapes == {(2, 24)}


def test_reconstruction_refuses_what_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="no multiple"):
        reconstruction_batch(np.zeros((1, 10), np.int64), chunk_size=4, num_chunks=1)


def test_next_paragraph_mixes_chunks_and_tokens() -> None:
    batch = next_paragraph_batch(
        rows([1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]),
        rows([7, 8], [17, 18]),
        chunk_size=2,
        expansion_mask=np.asarray([[False, True, False], [False, False, True]]),
    )
    assert batch.ids.tolist() == [[V, 3, 4, V, 7, 8], [V, V, 15, 16, 17, 18]]
    assert batch.chunk_ids.tolist() == [[[1, 2], [5, 6]], [[11, 12], [13, 14]]]
    assert batch.places.tolist() == [[0, 3], [0, 1]]
    assert batch.predict_at.tolist() == [[3, 4], [3, 4]]
    assert batch.targets.tolist() == [[7, 8], [17, 18]]


def test_next_paragraph_refuses_rows_of_unequal_length() -> None:
    mask = np.asarray([[True, False], [False, False]])
    with pytest.raises(ConfigError, match="equally many"):
        next_paragraph_batch(np.zeros((2, 4), np.int64), np.zeros((2, 1), np.int64), chunk_size=2, expansion_mask=mask)


def test_text_predicts_from_the_first_token_asked_for() -> None:
    batch = text_batch(rows([1, 2, 3, 4]), first=2)
    assert (batch.predict_at.tolist(), batch.targets.tolist()) == ([[1, 2]], [[3, 4]])
    assert batch.chunk_ids.size == 0


def test_random_masks_have_as_many_in_every_row() -> None:
    masks = random_masks(50, 8, 3, np.random.default_rng(0))
    assert masks.sum(axis=1).tolist() == [3] * 50
    assert (masks.sum(axis=0) > 0).all()


def test_some_rows_expand_the_last_chunks_and_the_rest_random_ones() -> None:
    last = np.arange(8) >= 5
    alone = random_masks(400, 8, 3, np.random.default_rng(0))
    mixed = last_or_random_masks(400, 8, 3, 0.5, np.random.default_rng(0))
    is_last = (mixed == last).all(axis=1)
    assert mixed.sum(axis=1).tolist() == [3] * 400
    assert 0.4 < is_last.mean() < 0.6
    assert (mixed[~is_last] == alone[~is_last]).all()
    assert (last_or_random_masks(400, 8, 3, 0.0, np.random.default_rng(0)) == alone).all()
    assert not last_or_random_masks(4, 8, 0, 1.0, np.random.default_rng(0)).any()


def test_recall_continues_pieces_of_its_own_context() -> None:
    batch = recall_batch(
        rows([1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]),
        rows([0, 3], [2, 1]),
        span_tokens=3,
        given_tokens=1,
        chunk_size=2,
        expansion_mask=np.asarray([[False, True, False], [False, False, True]]),
    )
    assert batch.ids.tolist() == [[V, 3, 4, V, 1, 2, 3, 4, 5, 6], [V, V, 15, 16, 13, 14, 15, 12, 13, 14]]
    assert batch.predict_at.tolist() == [[3, 4, 5, 6, 7, 8]] * 2
    assert batch.targets.tolist() == [[IGNORED, 2, 3, IGNORED, 5, 6], [IGNORED, 14, 15, IGNORED, 13, 14]]


def test_interleaved_predicts_its_expanded_tokens_from_slots_and_from_the_full_text() -> None:
    batch, full = interleaved_batch(
        rows([1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]),
        chunk_size=2,
        expansion_mask=np.asarray([[False, True, False, True], [False, False, True, True]]),
    )
    assert batch.ids.tolist() == [[V, 3, 4, V, 7, 8], [V, V, 15, 16, 17, 18]]
    assert batch.chunk_ids.tolist() == [[[1, 2], [5, 6]], [[11, 12], [13, 14]]]
    assert batch.places.tolist() == [[0, 3], [0, 1]]
    assert batch.predict_at.tolist() == [[0, 1, 3, 4], [1, 2, 3, 4]]
    assert batch.targets.tolist() == full.targets.tolist() == [[3, 4, 7, 8], [15, 16, 17, 18]]
    assert full.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]]
    assert full.predict_at.tolist() == [[1, 2, 5, 6], [3, 4, 5, 6]]


def test_interleaved_refuses_a_first_chunk_that_nothing_precedes() -> None:
    with pytest.raises(ConfigError, match="begins with an expanded chunk"):
        interleaved_batch(np.zeros((1, 4), np.int64), chunk_size=2, expansion_mask=np.asarray([[True, False]]))


def test_continuations_branch_off_a_compressed_text() -> None:
    batch, full = continuations_batch(
        rows([1, 2, 3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18]),
        np.asarray([1, 2]),
        chunk_size=2,
        span_tokens=3,
    )
    assert batch.ids.tolist() == [[V, V, V, V, 3, 4, 5, 6], [V, V, V, V, 13, 14, 15, 16]]
    assert batch.chunk_ids.tolist() == [[[1, 2], [3, 4], [5, 6], [7, 8]], [[11, 12], [13, 14], [15, 16], [17, 18]]]
    assert batch.places.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.predict_at.tolist() == [[0, 4, 5, 1, 6, 7]] * 2
    assert batch.targets.tolist() == full.targets.tolist() == [[3, 4, 5, 5, 6, 7], [13, 14, 15, 15, 16, 17]]
    assert full.predict_at.tolist() == [[1, 2, 3, 3, 4, 5]] * 2
    assert batch.branches is not None
    assert batch.branches.positions.tolist() == [0, 1, 2, 3, 1, 2, 2, 3]
    assert batch.branches.visible.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]
    assert (batch.mean_attended, full.mean_attended) == (22 / 8, 4.0)
    assert [array.shape for array in batch.arrays] == [(2, 8), (2, 4, 2), (2, 4), (2, 6), (8,), (8, 8), (2, 6)]


@pytest.mark.parametrize("starts", [[0, 1], [1, 3]])
def test_continuations_need_a_chunk_before_them_and_all_of_their_tokens(starts: list[int]) -> None:
    with pytest.raises(ConfigError, match="8 tokens in chunks of 2 have no branches of 3 tokens at chunks"):
        continuations_batch(np.zeros((1, 8), np.int64), np.asarray(starts), chunk_size=2, span_tokens=3)


def test_run_masks_alternate_in_as_many_runs_in_every_row() -> None:
    masks = run_masks(200, 12, 5, 3, np.random.default_rng(0))
    starts = masks[:, 1:] & ~masks[:, :-1]
    assert masks.sum(axis=1).tolist() == [5] * 200
    assert starts.sum(axis=1).tolist() == [3] * 200
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    assert len(np.unique(masks, axis=0)) > 60  # of the 90 ways: 6 to cut five chunks in three, 15 to cut seven


def test_run_masks_refuse_more_runs_than_chunks_of_a_kind() -> None:
    with pytest.raises(ConfigError, match="3 runs of 2 expanded among 12 chunks"):
        run_masks(1, 12, 2, 3, np.random.default_rng(0))
