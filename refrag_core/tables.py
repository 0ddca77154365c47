"""Parquet tables of a shard: how they are written so that they can be mapped, and the mapping itself.

A column of fixed width, non-null, PLAIN and uncompressed, with one data page a row group, lies in the file
as one run of values. `MappedColumn` finds that run from the footer and the page header and looks at it
through a memory map: a gather costs what the copy costs. A file that some other writer laid out otherwise
is read the ordinary way, once, into memory.
"""

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from refrag_core.embedding_storage import EmbeddingDtype, Int8Rows, StoredRows
from refrag_core.errors import CorruptIndexError

PASSAGE_ROWS_A_GROUP = 2048
"""Row group of the passages table: showing one passage decompresses the text of at most so many."""

TableFormat = Literal["parquet", "lance"]
"""Tables that an index may have: the Parquet shards, which are always there, or LanceDB tables beside them."""

_ONE_PAGE = 1 << 31
_PAGE_BYTES = 1 << 30
"""Of a page's column at most; Parquet counts them in an int32."""
_MAX_PAGE_HEADER = 256
_DATA_PAGE = 0


def _fixed_width(kind: pa.DataType) -> int | None:
    """Bytes a value, or None for types without a fixed width in Parquet's PLAIN encoding."""
    if pa.types.is_fixed_size_binary(kind):
        return int(kind.byte_width)
    return {pa.int32(): 4, pa.int64(): 8, pa.float32(): 4, pa.float64(): 8}.get(kind)


def write_table(path: Path, table: pa.Table, *, rows_a_group: int | None = None) -> None:
    """Write `table` to `path` so that its fixed-width columns can be mapped.

    One row group by default, and more of equal size only where a column's page would be larger than Parquet counts.
    """
    strings = [field.name for field in table.schema if _fixed_width(field.type) is None]
    writer = pq.ParquetWriter(
        path,
        table.schema,
        compression={field.name: "zstd" if field.name in strings else "none" for field in table.schema},
        use_dictionary=strings,
        write_statistics=strings,
        data_page_size=_ONE_PAGE,
        max_rows_per_page=_ONE_PAGE,
        data_page_version="1.0",
        store_schema=True,
    )
    with writer:
        writer.write_table(table, row_group_size=rows_a_group or _rows_of_one_page(table))


def _rows_of_one_page(table: pa.Table) -> int:
    largest = max((column.nbytes for column in table.columns), default=0)
    groups = max(1, -(-largest // _PAGE_BYTES))
    return max(1, -(-int(table.num_rows) // groups))


def fixed_binary(values: npt.NDArray[Any]) -> pa.Array:
    """A non-null fixed-size-binary Arrow array over the rows of a C-contiguous `[n, width]` array."""
    rows = np.ascontiguousarray(values)
    width = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows)])


def open_table(path: Path) -> pq.ParquetFile:
    """Open a Parquet file by memory map. Raises CorruptIndexError that names the file."""
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise CorruptIndexError(f"{path} is missing: run `refrag index verify`, then `refrag index repair`") from None
    except (OSError, pa.ArrowException) as error:
        raise CorruptIndexError(
            f"{path} is not a readable Parquet file ({error}): run `refrag index repair`"
        ) from error


def iterate_rows(path: Path, columns: Sequence[str] | None = None, batch_rows: int = 4096) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file as dicts, `batch_rows` in memory at a time."""
    with open_table(path) as file:
        for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
            yield from batch.to_pylist()


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7


def _page_type_and_bytes(header: memoryview) -> tuple[int, int]:
    """(page type, uncompressed bytes) of a Parquet PageHeader: its first two fields, compact Thrift i32."""
    if header[0] != 0x15 or header[2] != 0x15:
        raise ValueError("not a page header")
    kind, _ = _varint(header, 1)
    size, _ = _varint(header, 3)
    return kind >> 1, size >> 1


def _values_offset(data: memoryview, column: Any, rows: int, width: int) -> int | None:
    """Offset of the run of values of one column chunk, or None when it is not one plain, bare page."""
    total = int(column.total_compressed_size)
    header_bytes = total - rows * width
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page or not 0 < header_bytes < _MAX_PAGE_HEADER:
        return None
    start = int(column.data_page_offset)
    kind, size = _page_type_and_bytes(data[start : start + header_bytes])
    return start + header_bytes if (kind, size) == (_DATA_PAGE, rows * width) else None


class MappedColumn:
    """A fixed-width column of a Parquet file as an array `[rows, *shape]`, mapped in place where possible.

    Args:
        path: the file.
        name: the column.
        dtype: dtype of one element, e.g. `<f2` for an embedding.
        width: elements a row; 0 for a scalar column.

    Raises CorruptIndexError when the column is absent or of another width.
    """

    def __init__(self, path: Path, name: str, dtype: str, width: int = 0) -> None:
        self._dtype = np.dtype(dtype)
        self._width = width
        with open_table(path) as file:
            self.num_rows = int(file.metadata.num_rows)
            self._check(path, file.schema_arrow, name)
            views = self._map(path, file.metadata, file.schema_arrow.get_field_index(name))
            self.mapped = views is not None
            self._views = views if views is not None else [self._read(file, name)]
        self._rows_a_group = max(1, len(self._views[0])) if self._views else 1
        self._whole = self._views[0] if len(self._views) == 1 else None
        self._flat = None if self._whole is None else self._whole.reshape(-1)

    def _row_bytes(self) -> int:
        return self._dtype.itemsize * max(1, self._width)

    def _check(self, path: Path, schema: pa.Schema, name: str) -> None:
        index = schema.get_field_index(name)
        found = None if index < 0 else _fixed_width(schema.field(index).type)
        if found != self._row_bytes():
            raise CorruptIndexError(
                f"{path}: column {name!r} has {found} bytes a row, expected {self._row_bytes()}: "
                "the file belongs to another index; run `refrag index repair`"
            )

    def _map(self, path: Path, metadata: Any, index: int) -> list[npt.NDArray[Any]] | None:
        if self.num_rows == 0:
            return []
        with path.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        data = memoryview(mapping)
        views: list[npt.NDArray[Any]] = []
        for group in range(metadata.num_row_groups):
            rows = int(metadata.row_group(group).num_rows)
            offset = _values_offset(data, metadata.row_group(group).column(index), rows, self._row_bytes())
            if offset is None or (views and len(views[-1]) != len(views[0])):
                return None
            views.append(self._shaped(np.frombuffer(mapping, self._dtype, rows * max(1, self._width), offset)))
        return views

    def _shaped(self, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return flat.reshape(-1, self._width) if self._width else flat

    def _read(self, file: pq.ParquetFile, name: str) -> npt.NDArray[Any]:
        column = file.read(columns=[name]).column(0).combine_chunks()
        array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        start = array.offset * self._row_bytes()
        flat = np.frombuffer(array.buffers()[1], np.uint8)[start : start + len(array) * self._row_bytes()]
        return self._shaped(flat.view(self._dtype))

    def slice(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `[start, stop)`: a view where they lie in one row group, else a copy."""
        if self._whole is not None:
            return self._whole[start:stop]
        if not self._views:
            return self._shaped(np.empty(0, self._dtype))
        first, last = start // self._rows_a_group, max(start, stop - 1) // self._rows_a_group
        if first == last:
            base = first * self._rows_a_group
            return self._views[first][start - base : stop - base]
        bounds = [group * self._rows_a_group for group in range(first, last + 1)]
        parts = [self._views[first + i][max(0, start - base) : stop - base] for i, base in enumerate(bounds)]
        return np.concatenate(parts)

    def elements(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements `[start, stop)` of the rows laid end to end: a view where they lie in one row group."""
        if self._flat is not None:
            return self._flat[start:stop]
        width = max(1, self._width)
        first = start // width
        return self.slice(first, -(-stop // width)).reshape(-1)[start - first * width : stop - first * width]

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A copy of the rows with these numbers, which have to be in increasing order."""
        if len(self._views) <= 1:
            return self.slice(0, self.num_rows)[rows]
        groups = rows // self._rows_a_group
        parts = [self._views[int(g)][rows[groups == g] - g * self._rows_a_group] for g in np.unique(groups)]
        return np.concatenate(parts) if parts else self.slice(0, 0)

    def slice_all(self) -> npt.NDArray[Any]:
        """All rows."""
        return self.slice(0, self.num_rows)

    def blocks(self, rows: int = 16384) -> Iterator[npt.NDArray[Any]]:
        """The whole column in order, at most `rows` at a time."""
        for start in range(0, self.num_rows, rows):
            yield self.slice(start, min(start + rows, self.num_rows))


class EmbeddingColumn(Protocol):
    """Chunk embeddings of a shard, mapped: whatever form they are stored in."""

    num_rows: int

    def slice(self, start: int, stop: int) -> StoredRows:
        """Rows `[start, stop)`: views of the map where they are contiguous."""


class MappedInt8Rows:
    """The columns `embedding` (codes int8 `[n, dim]`) and `scale` (float32 `[n]`) of one file, mapped."""

    def __init__(self, path: Path, dim: int) -> None:
        self._codes = MappedColumn(path, "embedding", "i1", dim)
        self._scales = MappedColumn(path, "scale", "<f4")
        self.num_rows = self._codes.num_rows
        self.mapped = self._codes.mapped and self._scales.mapped

    def slice(self, start: int, stop: int) -> Int8Rows:
        """Rows `[start, stop)`, not multiplied out."""
        return Int8Rows(self._codes.slice(start, stop), self._scales.slice(start, stop))


def map_embeddings(path: Path, dim: int, dtype: EmbeddingDtype) -> EmbeddingColumn:
    """Map a shard's chunk embeddings. Raises CorruptIndexError where the file holds another form or width."""
    return MappedInt8Rows(path, dim) if dtype == "int8" else MappedColumn(path, "embedding", "<f2", dim)
