from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refrag.pipelines.stages import _embeddings_table
from refrag.schemas import arrow
from refrag_core.embedding_storage import read_rows
from refrag_core.errors import CorruptIndexError
from refrag_core.tables import (
    MappedColumn,
    MappedInt8Rows,
    fixed_binary,
    iterate_rows,
    map_embeddings,
    open_table,
    write_table,
)

ROWS, DIM = 5000, 24


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM)).astype("<f2")


def _table(values: np.ndarray) -> pa.Table:
    return pa.Table.from_arrays([fixed_binary(values)], schema=arrow.embeddings(DIM))


@pytest.mark.parametrize("rows_a_group", [None, 512, 5000, 1])
def test_what_is_written_is_mapped_in_place(tmp_path: Path, values: np.ndarray, rows_a_group: int | None) -> None:
    some = values[:200] if rows_a_group == 1 else values
    write_table(tmp_path / "t", _table(some), rows_a_group=rows_a_group)
    column = MappedColumn(tmp_path / "t", "embedding", "<f2", DIM)
    assert column.mapped
    assert np.array_equal(column.slice(0, len(some)), some)
    assert np.array_equal(column.slice(100, 190), some[100:190])
    assert column.slice(3, 3).shape == (0, DIM)
    assert np.array_equal(column.elements(70, 90 * DIM + 5), some.reshape(-1)[70 : 90 * DIM + 5])
    assert np.array_equal(np.concatenate(list(column.blocks(300))), some)


def test_columns_larger_than_a_page_take_several_row_groups(
    tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refrag_core.tables._PAGE_BYTES", values.nbytes // 3 + 1)
    write_table(tmp_path / "t", _table(values))
    assert pq.ParquetFile(tmp_path / "t").metadata.num_row_groups == 3
    column = MappedColumn(tmp_path / "t", "embedding", "<f2", DIM)
    assert column.mapped
    assert np.array_equal(column.slice(0, ROWS), values)


def test_a_map_is_a_view_of_the_file(tmp_path: Path, values: np.ndarray) -> None:
    write_table(tmp_path / "t", _table(values))
    rows = MappedColumn(tmp_path / "t", "embedding", "<f2", DIM).slice(10, 20)
    assert not rows.flags.owndata
    assert not rows.flags.writeable


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"use_dictionary": True}, {"data_page_version": "2.0"}])
def test_another_layout_is_read_all_the_same(tmp_path: Path, values: np.ndarray, options: dict) -> None:
    pq.write_table(_table(values), tmp_path / "t", **({"compression": "none"} | options), row_group_size=700)
    column = MappedColumn(tmp_path / "t", "embedding", "<f2", DIM)
    assert not column.mapped
    assert np.array_equal(column.slice(650, 1500), values[650:1500])


def test_many_pages_are_not_taken_for_one(tmp_path: Path, values: np.ndarray) -> None:
    pq.write_table(_table(values), tmp_path / "t", compression="none", use_dictionary=False, data_page_size=1000)
    column = MappedColumn(tmp_path / "t", "embedding", "<f2", DIM)
    assert np.array_equal(column.slice(0, ROWS), values)


def test_scalars_and_an_empty_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t", pa.Table.from_arrays([pa.array([0.5, 1.5], pa.float32())], schema=arrow.SCORES))
    assert MappedColumn(tmp_path / "t", "nll", "<f4").slice(0, 2).tolist() == [0.5, 1.5]
    write_table(tmp_path / "e", arrow.embeddings(DIM).empty_table())
    empty = MappedColumn(tmp_path / "e", "embedding", "<f2", DIM)
    assert (empty.num_rows, empty.slice(0, 0).shape) == (0, (0, DIM))


def test_a_column_of_another_width_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    write_table(tmp_path / "t", _table(values))
    with pytest.raises(CorruptIndexError, match=r"'embedding' has 48 bytes a row, expected 64"):
        MappedColumn(tmp_path / "t", "embedding", "<f2", 32)


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"garbage" * 100])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(damage)
    with pytest.raises(CorruptIndexError, match=r"t\.parquet is not a readable Parquet file"):
        open_table(tmp_path / "t.parquet")
    with pytest.raises(CorruptIndexError, match=r"missing\.parquet is missing"):
        open_table(tmp_path / "missing.parquet")


def test_rows_are_streamed_in_order(tmp_path: Path) -> None:
    write_table(tmp_path / "t", pa.table({"a": list(range(1000))}), rows_a_group=64)
    assert [row["a"] for row in iterate_rows(tmp_path / "t", ["a"], batch_rows=10)] == list(range(1000))


# --- int8 embeddings ----------------------------------------------------------------------------------

INT8_CODES = bytes.fromhex("7f40ff0000810200")
INT8_SCALES = bytes.fromhex("0000803f00000040")
"""Two chunks of four entries, [127, 63.5, -1.4, 0] and [.5, -254, 3, 1], as they must lie in a file: scales 1 and 2."""


def test_the_bytes_of_int8_embeddings(tmp_path: Path) -> None:
    """Golden: codes and scales are each one plain run of bytes in the file, little-endian."""
    rows = np.array([[127.0, 63.5, -1.4, 0.0], [0.5, -254.0, 3.0, 1.0]], np.float32)
    write_table(tmp_path / "t", _embeddings_table(rows, "int8"))
    data = (tmp_path / "t").read_bytes()
    assert data.count(INT8_CODES) == 1
    assert data.count(INT8_SCALES) == 1
    with open_table(tmp_path / "t") as file:
        assert file.schema_arrow.equals(arrow.embeddings(4, "int8"), check_metadata=True)
    mapped = map_embeddings(tmp_path / "t", 4, "int8")
    assert isinstance(mapped, MappedInt8Rows)
    assert mapped.mapped
    np.testing.assert_array_equal(read_rows(mapped.slice(0, 2)), [[127.0, 64.0, -1.0, 0.0], [0.0, -254.0, 4.0, 0.0]])
    assert read_rows(mapped.slice(1, 2)).tolist() == [[0.0, -254.0, 4.0, 0.0]]
