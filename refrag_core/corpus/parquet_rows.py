"""Rows of Parquet files in bounded batches, each cell as a plain value or as the reason why it has none."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from refrag_core.corpus.compression import DamagedFileError
from refrag_core.corpus.document import RecordError, RejectReason
from refrag_core.corpus.filesystem import is_permanent, open_binary
from refrag_core.corpus.sources import CorpusOptions, Piece

_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1024

# What Arrow raises for bytes that are not the Parquet that they claim to be.
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)


def read_rows(piece: Piece, options: CorpusOptions) -> Iterator[tuple[int, dict[str, Any]] | DamagedFileError]:
    """`(row number in the file, fields)` of the piece's row groups, or the damage that ended a row group.

    Raises DamagedFileError when the file as a whole cannot be read.
    """
    with open_binary(piece.file.path) as stream:
        parquet = _open(stream)
        stop = parquet.num_row_groups if piece.stop < 0 else piece.stop
        first = sum(parquet.metadata.row_group(group).num_rows for group in range(min(piece.start, stop)))
        for group in range(piece.start, stop):
            if group >= parquet.num_row_groups:
                raise DamagedFileError(f"row group {group} is no longer there", first)
            rows = parquet.metadata.row_group(group).num_rows
            yield from _group_rows(parquet, group, first, rows, options)
            first += rows


def _open(stream: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream)
    except _DAMAGE as error:
        raise _damage(error, 0) from None


def _group_rows(
    parquet: pq.ParquetFile, group: int, first: int, rows: int, options: CorpusOptions
) -> Iterator[tuple[int, dict[str, Any]] | DamagedFileError]:
    number = first
    batches = _batches(parquet, group, options)
    while True:
        try:
            batch = next(batches, None)
            table = None if batch is None else _plain_rows(batch)
        except _DAMAGE as error:
            yield _damage(error, number)
            return
        if table is None:
            break
        for fields in table:
            yield number, fields
            number += 1
    if number != first + rows:
        yield DamagedFileError(f"{number - first} rows read, the footer says {rows}", number)


def _damage(error: BaseException, position: int) -> DamagedFileError:
    if isinstance(error, OSError) and not is_permanent(error):
        raise error
    return DamagedFileError(f"not readable as Parquet: {' '.join(str(error).split())}", position)


def _batches(parquet: pq.ParquetFile, group: int, options: CorpusOptions) -> Iterator[pa.RecordBatch]:
    metadata = parquet.metadata.row_group(group)
    row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
    size = min(_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
    columns = [field.name for field in parquet.schema_arrow if _is_wanted(field, options)]
    batches: Iterator[pa.RecordBatch] = parquet.iter_batches(
        batch_size=size, row_groups=[group], columns=columns, use_threads=False
    )
    return batches


def _is_wanted(field: pa.Field, options: CorpusOptions) -> bool:
    if field.name in (options.id_field, options.text_field, options.chunk_size_field):
        return True
    if options.metadata_fields is not None:
        return field.name in options.metadata_fields
    return not pa.types.is_nested(field.type)


def _plain_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    names = batch.schema.names
    if not names:
        return [{} for _ in range(batch.num_rows)]
    columns = [_cells(_portable(batch.column(number))) for number in range(len(names))]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _portable(column: pa.Array) -> pa.Array:
    """Times as ISO text and durations as counts of their unit: Python's types hold neither nanoseconds nor
    every year, and what Arrow makes of those depends on whether pandas is installed."""
    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        return _portable(column.storage)
    if pa.types.is_timestamp(kind):
        instant = column.cast(pa.timestamp(kind.unit)) if kind.tz else column
        text = pc.replace_substring_regex(instant.cast(pa.string()), r"^([-\d]+) ", r"\1T")
        return pc.binary_join_element_wise(text, "Z", "") if kind.tz else text
    if pa.types.is_date(kind) or pa.types.is_time(kind):
        return column.cast(pa.string())
    if pa.types.is_duration(kind):
        return column.cast(pa.int64())
    return column.cast(pa.float32()) if pa.types.is_float16(kind) else column


def _cells(column: pa.Array) -> list[Any]:
    try:
        cells: list[Any] = column.to_pylist()
        return cells
    except (ValueError, OverflowError, pa.ArrowException):
        return [_cell(cell) for cell in column]


def _cell(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return RecordError(RejectReason.INVALID_UTF8, f"byte {error.start} of a string cell is not UTF-8")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return RecordError(RejectReason.WRONG_TYPE, f"a {cell.type} cell cannot be read: {error}")
