"""Documents' metadata as typed columns in memory, decoded from JSON and filtered by DuckDB.

The only file that imports duckdb. A field is decoded when a filter first names it, in C and in blocks; the columns
stay in memory, the least recently used ones going first above CACHED_BYTES. DuckDB sees Arrow tables and SQL that
was made here: it may open no file, fetch no extension and change no setting.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from refrag_core.errors import FilterError, MissingExtraError
from refrag_core.predicate import DOCUMENT_ID, Field, Kind, Predicate, column_name, to_sql

CACHED_BYTES = 256 << 20
"""Typed columns kept in memory."""

BLOCK_ROWS = 1 << 18
"""Documents decoded at a time."""

_SHOWN_FIELDS = 40
_SETTINGS = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "lock_configuration": "true",
}

# `integer` is kept where all numbers of a field are whole and fit: it compares exactly above 2^53.
_DECODE = """
SELECT CASE WHEN kind = 'VARCHAR' THEN value END AS text,
       CASE WHEN kind IN ('BIGINT', 'UBIGINT', 'DOUBLE') THEN TRY_CAST(value AS DOUBLE) END AS number,
       CASE WHEN kind IN ('BIGINT', 'UBIGINT') THEN TRY_CAST(value AS BIGINT) END AS integer,
       CASE WHEN kind = 'BOOLEAN' THEN value = 'true' END AS flag,
       CASE WHEN kind = 'ARRAY' THEN value END AS list,
       kind IS NOT NULL AND kind <> 'NULL' AS present,
       kind IS NOT NULL AS named
FROM (SELECT json_type(metadata, $1) AS kind, json_extract_string(metadata, $1) AS value, place FROM documents)
ORDER BY place
"""
_KEYS = "SELECT DISTINCT unnest(json_keys(metadata)) AS field FROM documents"


@dataclass(frozen=True, slots=True)
class FieldColumns:
    """One field of all documents, in the index's order."""

    values: Mapping[Kind, pa.ChunkedArray]
    """By type the values of that type, null elsewhere; types without any value are left out."""
    present: pa.ChunkedArray
    """bool: the document has a value that is not null."""

    @property
    def nbytes(self) -> int:
        """Memory."""
        return int(self.present.nbytes) + sum(int(column.nbytes) for column in self.values.values())


class MetadataColumns:
    """The metadata of all documents of a generation, field by field.

    Args:
        read: gives one table a shard with the columns asked for, `document_id` (string) or `metadata` (JSON objects).
    """

    def __init__(self, read: Callable[[str], Iterable[pa.ChunkedArray]]) -> None:
        self._read = read
        self._columns: OrderedDict[Field, FieldColumns] = OrderedDict()
        self._lock = threading.Lock()

    def select(self, predicate: Predicate) -> npt.NDArray[np.bool_]:
        """Which documents fulfil the condition, bool `[documents]`; NULL counts as no.

        Raises FilterError, naming the fields that there are, for a field that no document has.
        """
        with self._lock:
            fields = {path: self._field(path, predicate) for path in predicate.fields}
            self._forget()
        sql, parameters = to_sql(predicate, {path: frozenset(f.values) for path, f in fields.items()})
        columns: dict[str, pa.ChunkedArray] = {}
        for number, found in enumerate(fields.values()):
            columns[column_name(number, "present")] = found.present
            columns |= {column_name(number, kind): column for kind, column in found.values.items()}
        if not columns:
            raise FilterError(f"the filter {predicate.shown} names no field; expected a condition over at least one")
        made = _run(
            f"SELECT COALESCE({sql}, FALSE) AS passes FROM documents ORDER BY place", pa.table(columns), parameters
        )
        return np.asarray(made.column("passes").to_numpy())

    def _field(self, path: Field, predicate: Predicate) -> FieldColumns:
        if path not in self._columns:
            self._columns[path] = self._ids() if path == DOCUMENT_ID else self._decoded(path, predicate)
        self._columns.move_to_end(path)
        return self._columns[path]

    def _forget(self) -> None:
        while len(self._columns) > 1 and sum(column.nbytes for column in self._columns.values()) > CACHED_BYTES:
            self._columns.popitem(last=False)

    def _ids(self) -> FieldColumns:
        ids = pa.chunked_array([chunk for column in self._read("document_id") for chunk in column.chunks], pa.string())
        return FieldColumns({"text": ids}, pa.chunked_array([np.ones(len(ids), bool)], pa.bool_()))

    def _decoded(self, path: Field, predicate: Predicate) -> FieldColumns:
        blocks = [_run(_DECODE, block, [_pointer(path)]) for block in self._blocks()]
        table = pa.concat_tables(blocks)
        if not pc.any(table.column("named")).as_py():
            raise FilterError(
                f"the filter {predicate.shown} names the field {'.'.join(path)!r}, which no document has; "
                f"expected one of: {self._known_fields()}"
            )
        return FieldColumns(_typed(table), table.column("present"))

    def _blocks(self) -> Iterable[pa.Table]:
        waiting: list[pa.Array] = []
        for column in self._read("metadata"):
            waiting += column.chunks
            if sum(len(chunk) for chunk in waiting) >= BLOCK_ROWS:
                yield _documents(waiting)
                waiting = []
        yield _documents(waiting)

    def _known_fields(self) -> str:
        found = {key for block in self._blocks() for key in _run(_KEYS, block, []).column("field").to_pylist()}
        names = [".".join(DOCUMENT_ID), *sorted(found)]
        more = f" and {len(names) - _SHOWN_FIELDS:,} more" if len(names) > _SHOWN_FIELDS else ""
        return ", ".join(names[:_SHOWN_FIELDS]) + more


def _documents(chunks: list[pa.Array]) -> pa.Table:
    return pa.table({"metadata": pa.chunked_array(chunks, pa.string())})


def _pointer(path: Field) -> str:
    """JSON pointer (RFC 6901)."""
    return "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in path)


def _typed(table: pa.Table) -> dict[Kind, pa.ChunkedArray]:
    """The columns that hold any value; whole numbers as int64 where all of a field's are."""
    columns = {name: table.column(name) for name in ("text", "number", "flag", "list")}
    if table.column("integer").null_count == columns["number"].null_count:
        columns["number"] = table.column("integer")
    kinds: tuple[Kind, ...] = get_args(Kind)
    return {kind: columns[kind] for kind in kinds if columns[kind].null_count < len(table)}


def _duckdb() -> ModuleType:
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtraError(
            "duckdb is not installed and filtering needs it; run `pip install duckdb`, or install refrag again"
        ) from error
    module: ModuleType = duckdb
    return module


@cache
def _database() -> Any:
    """One database of this process for all queries: it holds nothing, and starting it outlasts most of them."""
    return _duckdb().connect(":memory:", config=_SETTINGS)


def _run(sql: str, documents: pa.Table, parameters: list[Any]) -> pa.Table:
    """The result of a query over the one table `documents`, whose column `place` counts its rows.

    A query that wants them in order says so: what several threads read of an Arrow table comes back in any.
    """
    placed = documents.append_column("place", [np.arange(len(documents))])
    try:
        with _database().cursor() as connection:  # a connection of its own, so that threads do not meet
            connection.register("documents", placed)
            return connection.sql(sql, params=parameters).to_arrow_table()
    except _duckdb().Error as error:
        raise FilterError(
            f"the filter cannot be evaluated ({str(error).splitlines()[0]}): compare fields with values of their types"
        ) from error
