"""Reading documents: streaming over the units of a scan, and again one by one from their locations.

No bytes make a reader fail: what cannot be a document comes out as a `Reject`, and its neighbours are read.
Errors that may pass (a network, a full table of open files) are raised, for the engine to try again.
"""

import codecs
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import groupby
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
    scan_order,
    source_digest,
)
from refrag_core.corpus.filesystem import is_permanent, open_binary, read_blocks
from refrag_core.corpus.html import decode_html, html_text
from refrag_core.corpus.lines import Line, split_lines
from refrag_core.corpus.parquet_rows import read_rows
from refrag_core.corpus.records import finish_document, importance_of, json_value, parse_json_object, record_document
from refrag_core.corpus.sources import CorpusOptions, Piece, ScanUnit, SourceFile, file_format
from refrag_core.corpus.spool import decode_frame, decode_frame_bytes
from refrag_core.digests import JSON, canonical_json
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


def read_document(row: ScanRow) -> Document:
    """The document that the scan found. Raises CorpusChangedError when it is no longer what it was."""
    return next(read_documents([row]))


def read_documents(rows: Sequence[ScanRow]) -> Iterator[Document]:
    """The documents of `rows`, in their order; files are opened once and read front to back within 32 MiB.

    Raises CorpusChangedError when one is no longer what the scan found.
    """
    for window in _windows(rows):
        yield from _read_window(window)


def read_raw(row: ScanRow) -> bytes:
    """The first 64 KiB of the record's bytes (of a spooled one, of its canonical JSON), for a reject.

    Raises CorpusChangedError when they are no longer there.
    """
    with _unchanged(row), open_binary(row["path"]) as stream:
        if row["format"] == "spool":
            return decode_frame_bytes(_read_span(stream, row))[:RAW_BYTES]
        stream.seek(row["offset"])
        return stream.read(RAW_BYTES if row["length"] < 0 else min(row["length"], RAW_BYTES))


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
    is_document = file.format not in ("jsonl", "parquet") and _is_utf8(file.source)
    document_id = file.source if is_document else None
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
            if line.offset >= piece.start and line.data.removeprefix(codecs.BOM_UTF8).strip():
                yield _read_line(line, file, options)


def _read_line(line: Line, file: SourceFile, options: CorpusOptions) -> Scanned:
    plain = file.compression is None
    position = line.offset if plain else line.number
    location = Location(file.path, _line_format(options), line.offset, line.length) if plain else None
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
        if len(data) > options.max_document_bytes:
            detail = f"the file has more than the {options.max_document_bytes} bytes that are indexed"
            raise RecordError(RejectReason.DOCUMENT_TOO_LARGE, detail)
        document, digest = _file_document(data, file.format, file.source)
    except RecordError as error:
        yield _file_reject(file, error.reason, error.detail, data)
    else:
        yield ScannedDocument(document, digest, scan_order(file.index, 0), Location(file.path, file.format))


def _read_limited(stream: BinaryIO, compression: str | None, limit: int) -> bytes:
    """The plain bytes, up to a little more than `limit`: enough to see that there are too many."""
    held = bytearray()
    for block in decompress(read_blocks(stream), compression):
        held += block
        if len(held) > limit:
            break
    return bytes(held)


def _file_document(data: bytes, kind: str, source: str) -> tuple[Document, bytes]:
    """`(document, source digest)` of a file that is one document. Raises RecordError."""
    metadata: dict[str, JSON] = {}
    if kind == "html":
        text, title = html_text(decode_html(data))
        metadata = {"title": title} if title else {}
    else:
        text = _plain_text(data)
    return finish_document(Document(source, text, metadata, source))


def _plain_text(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(RejectReason.INVALID_UTF8, f"byte {error.start} of the file is not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- again, from a location -------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _line_format(options: CorpusOptions) -> str:
    """How a line is read, in full: workers are given rows, not the corpus's options."""
    fields: JSON = {
        "id_field": options.id_field,
        "text_field": options.text_field,
        "metadata_fields": options.metadata_fields,
    }
    return f"jsonl {canonical_json(fields).decode()}"


@lru_cache(maxsize=16)
def _line_options(line_format: str) -> CorpusOptions:
    fields = json.loads(line_format.removeprefix("jsonl "))
    names = fields["metadata_fields"]
    return CorpusOptions(
        roots=(".",),
        id_field=fields["id_field"],
        text_field=fields["text_field"],
        metadata_fields=None if names is None else tuple(names),
        max_document_bytes=sys.maxsize,  # the scan has checked it
    )


def _windows(rows: Iterable[ScanRow]) -> Iterator[list[ScanRow]]:
    window: list[ScanRow] = []
    held = 0
    for row in rows:
        if window and held + row["num_bytes"] > WINDOW_BYTES:
            yield window
            window, held = [], 0
        window.append(row)
        held += row["num_bytes"]
    if window:
        yield window


def _read_window(rows: Sequence[ScanRow]) -> Iterator[Document]:
    found: dict[int, Document] = {}
    by_place = sorted(range(len(rows)), key=lambda number: (rows[number]["path"], rows[number]["offset"]))
    for path, numbers in groupby(by_place, key=lambda number: rows[number]["path"]):
        with ExitStack() as opened:
            stream: BinaryIO | None = None
            for number in numbers:
                with _unchanged(rows[number]):
                    stream = stream or opened.enter_context(open_binary(path))
                    found[number] = _read_checked(stream, rows[number])
    for number in range(len(rows)):
        yield found.pop(number)


@contextmanager
def _unchanged(row: ScanRow) -> Iterator[None]:
    """Says of every way in which a document can fail to be there that the corpus has changed."""
    try:
        yield
    except (RecordError, DamagedFileError, ValueError) as error:
        raise CorpusChangedError(_changed(row, "can no longer be read")) from error
    except OSError as error:
        if not is_permanent(error):
            raise
        raise CorpusChangedError(_changed(row, "can no longer be opened")) from error


def _changed(row: ScanRow, how: str) -> str:
    return (
        f"document {row['document_id']!r} of {row['path']} {how}, expected it to stay as the scan found it. "
        "Leave the corpus alone during a build and run the build again."
    )


def _read_checked(stream: BinaryIO, row: ScanRow) -> Document:
    document, digest = _read_again(stream, row)
    if document.document_id != row["document_id"] or digest != row["source_digest"]:
        raise CorpusChangedError(_changed(row, "has changed since the scan"))
    return document


def _read_again(stream: BinaryIO, row: ScanRow) -> tuple[Document, bytes]:
    kind = row["format"]
    if kind == "spool":
        document = decode_frame(_read_span(stream, row))
        return document, source_digest(document)
    if kind.startswith("jsonl "):
        fields = parse_json_object(_read_span(stream, row))
        return record_document(fields, source=row["source"], options=_line_options(kind))
    known = file_format(row["path"])
    data = _read_limited(stream, known[1] if known else None, sys.maxsize)
    return _file_document(data, kind, row["source"])


def _read_span(stream: BinaryIO, row: ScanRow) -> bytes:
    stream.seek(row["offset"])
    return stream.read(row["length"])
