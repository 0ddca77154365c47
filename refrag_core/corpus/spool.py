"""A spool: copies of records that cannot be sought where they came from, each a zstd frame by itself."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import zstandard

from refrag_core.corpus.document import Document
from refrag_core.digests import canonical_json
from refrag_core.work_folder import WorkFolder

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


class SpoolWriter:
    """Appends documents to a temporary file, made at the first one, and publishes it in the run's folder."""

    def __init__(self, work: WorkFolder) -> None:
        self._work = work
        self._open_file = ExitStack()
        self._temporary: Path | None = None
        self._stream: BinaryIO | None = None
        self._offset = 0

    def add(self, document: Document) -> tuple[int, int]:
        """`(offset, length)` of the document's frame in the spool."""
        frame = encode_frame(document)
        self._open().write(frame)
        offset, self._offset = self._offset, self._offset + len(frame)
        return offset, len(frame)

    def publish(self, prefix: str) -> str | None:
        """Close the spool under its final name and begin anew; its location, None when nothing was added."""
        if self._stream is None or self._temporary is None:
            return None
        self._stream.close()
        final = self._work.publish(self._temporary, prefix=prefix, suffix=".spool")
        self.discard()
        return final

    def discard(self) -> None:
        """Remove what was not published."""
        self._open_file.close()
        self._temporary, self._stream, self._offset = None, None, 0

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self._temporary = self._open_file.enter_context(self._work.temporary("spool"))
            self._stream = self._open_file.enter_context(self._temporary.open("wb"))
        return self._stream
