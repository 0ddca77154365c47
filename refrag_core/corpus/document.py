"""What a scan finds: documents, where they can be read again, and the records that it had to set aside."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from refrag_core.digests import JSON, canonical_json

RAW_BYTES = 64 << 10
"""Bytes of a rejected record that are kept."""

DETAIL_CHARS = 500


@dataclass(frozen=True, slots=True)
class Document:
    """One input record: a file, or a row of a file of records.

    Args:
        document_id: unique in the corpus.
        text: what is indexed; not empty.
        metadata: JSON values by field name.
        source: the file it comes from, as the corpus root was written.
    """

    document_id: str
    text: str
    metadata: Mapping[str, JSON]
    source: str


def source_digest(document: Document) -> bytes:
    """SHA-256 (32 bytes) of the canonical JSON of the document's text and metadata.

    Raises UnicodeEncodeError for lone surrogates and ValueError for non-finite numbers.
    """
    content: JSON = {"metadata": document.metadata, "text": document.text}
    return hashlib.sha256(canonical_json(content)).digest()


class RejectReason(StrEnum):
    """Why a record is not indexed. `filtered` ones are as they should be, `quarantined` ones are faults."""

    EMPTY = "empty"
    DUPLICATE = "duplicate"
    DUPLICATE_ID = "duplicate_id"
    INVALID_UTF8 = "invalid_utf8"
    INVALID_TEXT = "invalid_text"
    MALFORMED_JSON = "malformed_json"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    LINE_TOO_LONG = "line_too_long"
    DOCUMENT_TOO_LARGE = "document_too_large"
    UNREADABLE_FILE = "unreadable_file"
    TOKENIZE_FAILED = "tokenize_failed"
    ENCODE_FAILED = "encode_failed"
    EMBED_FAILED = "embed_failed"
    SCORE_FAILED = "score_failed"

    @property
    def disposition(self) -> str:
        """`filtered` or `quarantined`."""
        return "filtered" if self in (RejectReason.EMPTY, RejectReason.DUPLICATE) else "quarantined"


def printable(text: str, limit: int = DETAIL_CHARS) -> str:
    """`text` cut at `limit` characters, with what UTF-8 cannot hold written as escapes."""
    return text[:limit].encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A record set aside, with all that is needed to find it again.

    Args:
        reason: why.
        detail: what was found, in words that depend on the record alone.
        source: the file it comes from.
        position: byte offset of the line in a plain .jsonl file, number of the line or row from 0 in a
            compressed .jsonl or a .parquet file, 0 for a file that is one document.
        raw: the record's bytes, cut at 64 KiB.
        document_id: where it is known and valid.
        source_digest: where the record could be read, 32 bytes.
    """

    reason: RejectReason
    detail: str
    source: str
    position: int
    raw: bytes = b""
    document_id: str | None = None
    source_digest: bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", printable(self.detail))
        object.__setattr__(self, "source", printable(self.source, limit=len(self.source)))
        object.__setattr__(self, "raw", self.raw[:RAW_BYTES])

    @property
    def disposition(self) -> str:
        """`filtered` or `quarantined`."""
        return self.reason.disposition


def reject_row(reject: Reject) -> dict[str, str | int | bytes | None]:
    """The reject as a row of `schemas.arrow.QUARANTINE`."""
    return {
        "document_id": reject.document_id,
        "reason": reject.reason.value,
        "detail": reject.detail,
        "disposition": reject.disposition,
        "source": reject.source,
        "position": reject.position,
        "source_digest": reject.source_digest,
        "raw": reject.raw,
    }


class RecordError(Exception):
    """A record cannot be a document. Never leaves the corpus package: readers turn it into a `Reject`."""

    def __init__(self, reason: RejectReason, detail: str, document_id: str | None = None) -> None:
        super().__init__(reason, detail, document_id)
        self.reason = reason
        self.detail = detail
        self.document_id = document_id


@dataclass(frozen=True, slots=True)
class Location:
    """Where a document is read from again.

    Args:
        path: absolute path or URL.
        format: how to read what is there: `jsonl` and its field names (a line), `spool` (a frame of a spool
            file), or `txt`, `md`, `html` (a whole file).
        offset: bytes from the file's start.
        length: bytes; -1 for the whole file.
    """

    path: str
    format: str
    offset: int = 0
    length: int = -1


@dataclass(frozen=True, slots=True)
class ScannedDocument:
    """A document as the scan sees it.

    Args:
        document: the document itself.
        source_digest: its digest, 32 bytes.
        order: position in the scan of the whole corpus; unique.
        location: where it can be read again; None where the file cannot be sought (the scan spools it).
        importance: value of the chunk size field, in [0, 1]; None where there is none.
    """

    document: Document = field(repr=False)
    source_digest: bytes
    order: int
    location: Location | None
    importance: float | None = None


ScanRow = Mapping[str, Any]
"""A row of `schemas.arrow.SCAN_RUN` by column name."""

POSITION_BITS = 40
"""Bits of `order` that hold the position in the file; the file's number is above them."""


def scan_order(file_index: int, position: int) -> int:
    """Order of a record in the scan of the whole corpus: by file, then by position in it."""
    return file_index << POSITION_BITS | position


def position_of(order: int) -> int:
    """The position in its file of the record with this `order`."""
    return order & ((1 << POSITION_BITS) - 1)
