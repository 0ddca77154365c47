"""Storage forms of chunk embeddings, with numbers worked out by hand."""

import numpy as np
import pytest

from refrag_core.embedding_storage import (
    Int8Rows,
    bytes_per_row,
    concatenate_rows,
    dequantise_rows,
    quantise_rows,
    read_rows,
    store_rows,
    stored_and_read,
)
from refrag_core.errors import ConfigError


def test_codes_are_the_nearest_multiples_of_the_rows_own_scale() -> None:
    rows = np.array([[127.0, 63.5, -1.4, 0.0], [0.5, -254.0, 3.0, 1.0]], dtype=np.float32)
    stored = quantise_rows(rows)
    np.testing.assert_array_equal(stored.scales, np.array([1.0, 2.0], dtype=np.float32))
    np.testing.assert_array_equal(stored.codes, [[127, 64, -1, 0], [0, -127, 2, 0]])
    np.testing.assert_array_equal(dequantise_rows(stored), [[127.0, 64.0, -1.0, 0.0], [0.0, -254.0, 4.0, 0.0]])


def test_an_entry_comes_back_within_half_a_scale() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 384)).astype(np.float16)
    back = dequantise_rows(quantise_rows(rows))
    bound = np.abs(rows.astype(np.float32)).max(axis=1, keepdims=True) / 254
    assert (np.abs(back - rows.astype(np.float32)) <= bound * (1 + 1e-5)).all()


def test_zeros_and_numbers_too_small_to_scale_come_back_as_zeros() -> None:
    smallest = np.finfo(np.float32).smallest_subnormal
    rows = np.array([[0.0, 0.0], [smallest, -smallest]], dtype=np.float32)
    np.testing.assert_array_equal(dequantise_rows(quantise_rows(rows)), np.zeros((2, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_no_scale_holds_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="1 of 2 rows"):
        quantise_rows(np.array([[1.0, 2.0], [1.0, bad]], dtype=np.float32))


def test_bytes_of_a_row() -> None:
    assert [bytes_per_row(dtype, 384) for dtype in ("float32", "float16", "int8")] == [1536, 768, 388]


def test_what_is_read_back_keeps_its_shape() -> None:
    rows = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)
    assert stored_and_read(rows, "float32").tolist() == rows.tolist()
    assert stored_and_read(rows, "float16").dtype == np.float16
    read = stored_and_read(rows, "int8")
    np.testing.assert_array_equal(read[1, 2], dequantise_rows(quantise_rows(rows[1, 2:]))[0])
    assert read.shape == rows.shape


def test_codes_stay_codes_until_somebody_wants_numbers() -> None:
    rows = np.array([[127.0, 63.5], [0.5, -254.0], [1.0, 0.0]], dtype=np.float32)
    stored = store_rows(rows, "int8")
    assert isinstance(stored, Int8Rows)
    joined = concatenate_rows([stored[:1], stored[np.array([2, 1])]])
    assert isinstance(joined, Int8Rows)
    assert (len(joined), joined.codes.dtype, joined.scales.tolist()) == (3, np.int8, [1.0, np.float32(1 / 127), 2.0])
    np.testing.assert_array_equal(read_rows(joined), read_rows(stored)[[0, 2, 1]])


def test_codes_beside_floats_become_floats() -> None:
    mixed = concatenate_rows([store_rows(np.array([[127.0, 1.4]]), "int8"), np.array([[0.5, 2.0]], np.float16)])
    np.testing.assert_array_equal(mixed, np.array([[127.0, 1.0], [0.5, 2.0]], np.float32))


def test_floats_are_stored_as_they_are() -> None:
    rows = np.array([[1.0, 2.0]], np.float16)
    assert store_rows(rows, "float16") is rows
    assert read_rows(rows) is rows
