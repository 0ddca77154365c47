"""Reading documents: streaming over the units of a scan, and again one by one from their locations.

No bytes make a reader fail: what cannot be a document comes out as a `Reject`, and its neighbours are read.
Errors that may pass (a network, a full table of open files) are raised, for the engine to try again.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, BinaryIO

from refrag_core.corpus.compression import DamagedFileError, decompress
from refrag_core.corpus.document import (
    RAW_BYTES,
    Document,
    Location,
    RecordError,
    Reject,
    RejectReason,
    ScannedDocument,
    ScanRow,
    printable,
    scan_order,
    source_digest,
)
from refrag_core.corpus.filesystem import is_permanent, open_binary, read_blocks
from refrag_core.corpus.html import decode_html, html_text
from refrag_core.corpus.lines import Line, split_lines
from refrag_core.corpus.parquet_rows import read_rows
from refrag_core.corpus.records import finish_document, importance_of, json_value, parse_json_object, record_document
from refrag_core.corpus.sources import CorpusOptions, Piece, ScanUnit, SourceFile, file_format
from refrag_core.corpus.spool import decode_frame
from refrag_core.digests import JSON
from refrag_core.errors import CorpusChangedError

Scanned = ScannedDocument | Reject

WINDOW_BYTES = 32 << 20
"""Text that `read_documents` holds to read files front to back and still yield in the order asked for."""


def read_unit(unit: ScanUnit, options: CorpusOptions) -> Iterator[Scanned]:
    """Every record of the unit, in scan order, as a document or as a reject.

    Holds one line, one file that is one document, or one Parquet batch at a time.
    Raises OSError only for what may pass when tried again.
    """
    for piece in unit.pieces:
        yield from _read_piece(piece, options)


def read_document(row: ScanRow, options: CorpusOptions) -> Document:
    """The document that the scan found. Raises CorpusChangedError when it is no longer what it was."""
    return next(read_documents([row], options))


def read_documents(rows: Sequence[ScanRow], options: CorpusOptions) -> Iterator[Document]:
    """The documents of `rows`, in their order; files are opened once and read front to back within 32 MiB.

    Raises CorpusChangedError when one is no longer what the scan found.
    """
    for window in _windows(rows):
        yield from _read_window(window, options)


def read_raw(row: ScanRow) -> bytes:
    """The first 64 KiB of the record's bytes (of a spooled one, of its canonical JSON), for a reject."""
    with open_binary(row.path) as stream:
        if row.format == "spool":
            return _frame_raw(_read_exactly(stream, row))
        stream.seek(row.offset)
        return stream.read(RAW_BYTES if row.length < 0 else min(row.length, RAW_BYTES))


def _read_piece(piece: Piece, options: CorpusOptions) -> Iterator[Scanned]:
    file = piece.file
    if not _is_utf8(file.path):
        yield _file_reject(file, RejectReason.INVALID_UTF8, "the file's name is not UTF-8; rename it")
        return
    readers = {"jsonl": _read_lines, "parquet": _read_parquet}
    try:
        yield from readers.get(file.format, _read_file)(piece, options)
    except DamagedFileError as damage:
        yield _damage_reject(file, damage)
    except OSError as error:
        if not is_permanent(error):
            raise
        yield _file_reject(file, RejectReason.UNREADABLE_FILE, error.strerror or type(error).__name__)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _file_reject(file: SourceFile, reason: RejectReason, detail: str, raw: bytes = b"") -> Reject:
    is_document = file.format not in ("jsonl", "parquet") and _is_utf8(file.relative)
    document_id = file.relative if is_document else None
    return Reject(reason=reason, detail=detail, source=file.source, position=0, raw=raw, document_id=document_id)


def _damage_reject(file: SourceFile, damage: DamagedFileError) -> Reject:
    return Reject(
        reason=RejectReason.UNREADABLE_FILE,
        detail=f"the rest of it cannot be read: {damage.detail}",
        source=file.source,
        position=damage.position,
        raw=damage.raw,
        document_id=_file_reject(file, RejectReason.UNREADABLE_FILE, "").document_id,
    )


def _read_lines(piece: Piece, options: CorpusOptions) -> Iterator[Scanned]:
    file = piece.file
    begin = max(piece.start - 1, 0)  # one byte back: is it a newline, the first line is this piece's own
    with open_binary(file.path) as stream:
        stream.seek(begin)
        blocks = decompress(read_blocks(stream), file.compression)
        for line in split_lines(blocks, offset=begin, max_bytes=options.max_line_bytes):
            if 0 <= piece.stop <= line.offset:
                return
            if line.offset >= piece.start and line.data.strip():
                yield _read_line(line, file, options)


def _read_line(line: Line, file: SourceFile, options: CorpusOptions) -> Scanned:
    plain = file.compression is None
    position = line.offset if plain else line.number
    location = Location(file.path, "jsonl", line.offset, line.length) if plain else None
    try:
        if line.length > options.max_line_bytes:
            detail = f"the line has {line.length} bytes, at most {options.max_line_bytes} are read"
            raise RecordError(RejectReason.LINE_TOO_LONG, detail)
        return _scanned(parse_json_object(line.data), file, position, location, options)
    except RecordError as error:
        return _record_reject(error, file, position, line.data)


def _scanned(
    fields: dict[str, Any], file: SourceFile, position: int, location: Location | None, options: CorpusOptions
) -> ScannedDocument:
    document, digest = record_document(fields, source=file.source, options=options)
    try:
        importance = importance_of(fields, options)
    except RecordError as error:
        raise RecordError(error.reason, error.detail, document.document_id) from None
    return ScannedDocument(document, digest, scan_order(file.index, position), location, importance)


def _record_reject(error: RecordError, file: SourceFile, position: int, raw: bytes) -> Reject:
    return Reject(
        reason=error.reason,
        detail=error.detail,
        source=file.source,
        position=position,
        raw=raw,
        document_id=error.document_id,
    )


def _read_parquet(piece: Piece, options: CorpusOptions) -> Iterator[Scanned]:
    for row in read_rows(piece, options):
        if isinstance(row, DamagedFileError):
            yield _damage_reject(piece.file, row)
            continue
        position, fields = row
        try:
            yield _scanned(fields, piece.file, position, None, options)
        except RecordError as error:
            yield _record_reject(error, piece.file, position, _row_raw(fields))


def _row_raw(fields: dict[str, Any]) -> bytes:
    """A row has no bytes of its own: its JSON, long values cut."""
    cut = {name: value[:RAW_BYTES] if isinstance(value, str | bytes) else value for name, value in fields.items()}
    values = {name: json_value(value) for name, value in cut.items()}
    return json.dumps(values, sort_keys=True).encode("ascii")[:RAW_BYTES]


def _read_file(piece: Piece, options: CorpusOptions) -> Iterator[Scanned]:
    file = piece.file
    with open_binary(file.path) as stream:
        data = _read_limited(stream, file.compression, options.max_document_bytes)
    try:
        document, digest = _file_document(data, file.format, file.relative, file.source, options)
    except RecordError as error:
        yield _file_reject(file, error.reason, error.detail, data)
    else:
        yield ScannedDocument(document, digest, scan_order(file.index, 0), Location(file.path, file.format))


def _read_limited(stream: BinaryIO, compression: str | None, limit: int) -> bytes:
    """Up to a little more than `limit` plain bytes: enough to see that there are too many."""
    held = bytearray()
    with closing(chain_blocks(stream, compression)) as blocks:
        for block in blocks:
            held += block
            if len(held) > limit:
                break
    return bytes(held)


def chain_blocks(stream: BinaryIO, compression: str | None) -> Iterator[bytes]:
    return decompress(read_blocks(stream), compression)


def _file_document(
    data: bytes, kind: str, document_id: str, source: str, options: CorpusOptions
) -> tuple[Document, bytes]:
    if len(data) > options.max_document_bytes:
        detail = f"the file has more than the {options.max_document_bytes} bytes that are indexed"
        raise RecordError(RejectReason.DOCUMENT_TOO_LARGE, detail)
    text, metadata = _html_file(data, options) if kind == "html" else (_plain_file(data), {})
    return finish_document(Document(document_id, text, metadata, source))
