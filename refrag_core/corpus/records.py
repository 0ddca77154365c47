"""From the fields of one record to a document, or to the reason why it is none."""

import codecs
import json
import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, NoReturn

import numpy as np

from refrag_core.corpus.document import Document, RecordError, RejectReason, printable, source_digest
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.digests import JSON

MAX_DEPTH = 200
"""Objects and lists within one another. Fixed, as Python's own limit depends on the caller's stack."""

MAX_ID_BYTES = 4096

Fields = Mapping[str, Any]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?+', re.DOTALL)


def parse_json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises RecordError: invalid_utf8, malformed_json or wrong_type.

    A byte order mark before it is skipped: files are joined with theirs.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(RejectReason.INVALID_UTF8, f"byte {error.start} of the line is not UTF-8") from None
    _check_depth(data)
    try:
        record = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(RejectReason.MALFORMED_JSON, f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise RecordError(RejectReason.WRONG_TYPE, f"the line holds {_kind(record)}, expected an object")
    return record


def record_document(fields: Fields, *, source: str, options: CorpusOptions) -> tuple[Document, bytes]:
    """`(document, its source digest)`.

    Args:
        fields: the record by field name: JSON values, or what Arrow gives for a Parquet cell; a RecordError
            in place of a value says that the cell cannot be read.
        source: the file that it comes from.

    Raises RecordError, with the document's id where it is known.
    """
    document_id = _identifier(fields, options.id_field) if options.id_field else ""
    try:
        text = _text(fields, options)
        return finish_document(Document(document_id, text, _metadata(fields, options), source))
    except RecordError as error:
        raise RecordError(error.reason, error.detail, document_id or None) from None


def finish_document(document: Document) -> tuple[Document, bytes]:
    """`(document, source digest)`; an empty id becomes the digest. Raises RecordError where it has no digest."""
    if not document.text or document.text.isspace():
        raise RecordError(RejectReason.EMPTY, "no text but whitespace", document.document_id or None)
    try:
        digest = source_digest(document)
    except UnicodeEncodeError:
        detail = "the text or metadata has half of a surrogate pair, which is no character"
        raise RecordError(RejectReason.INVALID_TEXT, detail, document.document_id or None) from None
    if document.document_id:
        return document, digest
    return Document(digest.hex(), document.text, document.metadata, document.source), digest


def importance_of(fields: Fields, options: CorpusOptions) -> float | None:
    """The chunk size field's value, None where it is missing. Raises RecordError unless it is in [0, 1]."""
    value = fields.get(options.chunk_size_field) if options.chunk_size_field else None
    if isinstance(value, RecordError):
        raise value
    if value is None or value != value:  # NaN is a table's missing number
        return None
    number = float(value) if isinstance(value, int | float | Decimal) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= 1:
        detail = f"{options.chunk_size_field} is {printable(repr(value), 80)}, expected a number in [0, 1]"
        raise RecordError(RejectReason.WRONG_TYPE, detail)
    return number


def json_value(value: Any) -> JSON:
    """The JSON form of a cell: ISO dates, decimals as strings, bytes as UTF-8 or else hexadecimal text.

    NaN, which tables use for a missing number, becomes null; infinities become "Infinity" and "-Infinity".
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return _finite(value)
        case bytes():
            return _bytes_text(value)
        case datetime() | date() | time():
            return value.isoformat()
        case dict():
            return {str(key): json_value(inner) for key, inner in value.items()}
        case list() | tuple():
            return [json_value(inner) for inner in value]
        case _:
            return str(value)


def _finite(value: float) -> JSON:
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"


def _bytes_text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.hex()


def _check_depth(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    marks = np.frombuffer(_STRING.sub(b"", data), dtype=np.uint8)
    steps = np.isin(marks, (ord("["), ord("{"))).astype(np.int64) - np.isin(marks, (ord("]"), ord("}")))
    if len(steps) and steps.cumsum().max() > MAX_DEPTH:
        raise RecordError(RejectReason.MALFORMED_JSON, f"values nested more than {MAX_DEPTH} deep")


def _kind(value: object) -> str:
    names = {bool: "true or false", type(None): "null", dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), f"a {type(value).__name__}")


def _required(fields: Fields, name: str) -> Any:
    if name not in fields:
        raise RecordError(RejectReason.MISSING_FIELD, f"no field {name!r}")
    value = fields[name]
    if isinstance(value, RecordError):
        raise value
    return value


def _identifier(fields: Fields, name: str) -> str:
    value = _required(fields, name)
    match value:
        case bool() | None | dict() | list() | tuple():
            raise RecordError(RejectReason.WRONG_TYPE, f"{name!r} is {_kind(value)}, expected a string or number")
        case float() if not math.isfinite(value):
            raise RecordError(RejectReason.WRONG_TYPE, f"{name!r} is {value}, expected a finite number or string")
        case bytes():
            return _checked_id(name, _utf8(value, name))
        case _:
            return _checked_id(name, str(value))


def _checked_id(name: str, document_id: str) -> str:
    if not document_id:
        raise RecordError(RejectReason.MISSING_FIELD, f"{name!r} is empty")
    try:
        size = len(document_id.encode("utf-8"))
    except UnicodeEncodeError:
        raise RecordError(RejectReason.INVALID_TEXT, f"{name!r} has half of a surrogate pair") from None
    if size > MAX_ID_BYTES:
        raise RecordError(RejectReason.WRONG_TYPE, f"{name!r} has {size} bytes, expected at most {MAX_ID_BYTES}")
    return document_id


def _text(fields: Fields, options: CorpusOptions) -> str:
    name = options.text_field
    value = _required(fields, name)
    if isinstance(value, bytes):
        value = _utf8(value, name)
    if not isinstance(value, str):
        raise RecordError(RejectReason.WRONG_TYPE, f"{name!r} is {_kind(value)}, expected a string")
    size = len(value.encode("utf-8", "surrogatepass"))
    if size > options.max_document_bytes:
        detail = f"{name!r} has {size} bytes, at most {options.max_document_bytes} are indexed"
        raise RecordError(RejectReason.DOCUMENT_TOO_LARGE, detail)
    return value


def _utf8(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(RejectReason.INVALID_UTF8, f"byte {error.start} of {name!r} is not UTF-8") from None


def _metadata(fields: Fields, options: CorpusOptions) -> dict[str, JSON]:
    """Nulls are left out, so that a missing JSON field and an empty table cell are the same."""
    metadata: dict[str, JSON] = {}
    for name, value in _chosen(fields, options).items():
        if isinstance(value, RecordError):
            raise value
        converted = json_value(value)
        if converted is not None:
            metadata[name] = converted
    return metadata


def _chosen(fields: Fields, options: CorpusOptions) -> Fields:
    if options.metadata_fields is not None:
        return {name: fields[name] for name in options.metadata_fields if name in fields}
    left_out = (options.id_field, options.text_field)
    return {
        name: value
        for name, value in fields.items()
        if name not in left_out and not isinstance(value, dict | list | tuple)
    }
