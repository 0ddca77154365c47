"""A spool: copies of records that cannot be sought where they came from, each a zstd frame by itself."""

import json
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import zstandard

from refrag_core.corpus.document import Document
from refrag_core.digests import canonical_json, digest_file

_LEVEL = 1


def encode_frame(document: Document) -> bytes:
    """One zstd frame of the canonical JSON of the document."""
    record = canonical_json(
        {
            "document_id": document.document_id,
            "text": document.text,
            "metadata": document.metadata,
            "source": document.source,
        }
    )
    return zstandard.ZstdCompressor(level=_LEVEL).compress(record)


def decode_frame_bytes(frame: bytes) -> bytes:
    """The canonical JSON in one frame. Raises ValueError when the bytes are not one."""
    try:
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a spooled record: {error}") from error


def decode_frame(frame: bytes) -> Document:
    """The document in one frame. Raises ValueError when the bytes are not one."""
    fields = json.loads(decode_frame_bytes(frame))
    return Document(fields["document_id"], fields["text"], fields["metadata"], fields["source"])


def publish_file(temporary: Path, *, folder: Path, prefix: str, suffix: str) -> Path:
    """Give a finished file its name `<prefix>-<digest><suffix>`, durably and at once.

    Two workers that made the same file publish it under the same name; a kill leaves the temporary one only.
    """
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    final = folder / f"{prefix}-{digest_file(temporary)[:16]}{suffix}"
    temporary.replace(final)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return final


class SpoolWriter:
    """Appends documents to a temporary file in `folder`, made at the first one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary: Path | None = None
        self._stream: BinaryIO | None = None
        self._offset = 0

    def add(self, document: Document) -> tuple[int, int]:
        """`(offset, length)` of the document's frame in the spool."""
        frame = encode_frame(document)
        self._open().write(frame)
        offset, self._offset = self._offset, self._offset + len(frame)
        return offset, len(frame)

    def publish(self, prefix: str) -> Path | None:
        """Close the spool under its final name and begin anew; None when nothing was added."""
        if self._stream is None or self._temporary is None:
            return None
        self._stream.close()
        final = publish_file(self._temporary, folder=self._folder, prefix=prefix, suffix=".spool")
        self._temporary, self._stream, self._offset = None, None, 0
        return final

    def discard(self) -> None:
        """Remove what was not published."""
        if self._stream is not None and self._temporary is not None:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        if self._stream is None:
            handle, name = tempfile.mkstemp(prefix=".spool-", dir=self._folder)
            self._temporary, self._stream = Path(name), os.fdopen(handle, "wb")
        return self._stream
