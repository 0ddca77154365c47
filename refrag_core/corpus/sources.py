"""Which files a corpus has, in which order, and how they are cut into units of work.

A file that is one document takes as id its POSIX path relative to its root: the folder itself, for a glob the
longest folder before the first wildcard, for a single file its own folder. Hidden files and folders are left
out, links to folders are not followed, and files of unknown suffix are counted.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.parquet as pq

from refrag_core.corpus.document import POSITION_BITS
from refrag_core.corpus.filesystem import Entry, is_permanent, is_url, list_folder, lookup, open_binary
from refrag_core.errors import ConfigError, CorpusError

FORMATS = {
    ".txt": "txt",
    ".md": "md",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

MAX_FILES = 1 << (63 - POSITION_BITS)
MAX_FILE_BYTES = 1 << POSITION_BITS

UNIT_BYTES = 32 << 20
"""Small files are scanned together up to this many bytes."""

RANGE_BYTES = 64 << 20
"""A larger .jsonl or .parquet file is scanned in pieces of about this many bytes."""

UNIT_PIECES = 4096

_WILDCARD = re.compile(r"[*?\[]")
_SUFFIXES = " ".join(sorted(FORMATS))
_EVERYTHING = frozenset([("**",)])

Patterns = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """Which documents a corpus has and how its records are read.

    Args:
        roots: folders, files or globs (`**` matches folders at any depth), local or URLs.
        id_field: field of a record that is its id; "" takes the digest of the record's content.
        text_field: field of a record that is its text.
        metadata_fields: fields kept as metadata; None keeps every scalar field but id and text.
        chunk_size_field: field with the document's importance in [0, 1], which chooses its chunk size.
        excluded_folder: absolute path of a folder whose files are never part of the corpus (the index itself).
        max_line_bytes: longer lines of a .jsonl file are quarantined without being held in memory.
        max_document_bytes: longer texts (UTF-8) and files are quarantined.
    """

    roots: tuple[str, ...]
    id_field: str = "id"
    text_field: str = "text"
    metadata_fields: tuple[str, ...] | None = None
    chunk_size_field: str | None = None
    excluded_folder: str | None = None
    max_line_bytes: int = 64 << 20
    max_document_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not self.roots or not all(self.roots):
            raise ConfigError(f"roots {self.roots!r}: expected at least one folder, file or glob. Name the corpus.")
        if not self.text_field:
            raise ConfigError("text_field is empty: expected a field's name. Name the field that holds the text.")
        for name in ("max_line_bytes", "max_document_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} {getattr(self, name)}: expected more than 0. Choose a positive limit.")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus.

    Args:
        path: absolute path or URL.
        source: POSIX path below the root: what rejects and documents name, and the id of a file that is one
            document. The root itself is named nowhere, so that an index is the same wherever its corpus lies.
        format: `txt`, `md`, `html`, `jsonl` or `parquet`.
        compression: `gzip`, `zstd` or None.
        num_bytes: as stored.
        index: number of the file in the listing.
    """

    path: str
    source: str
    format: str
    compression: str | None
    num_bytes: int
    index: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one file: bytes `[start, stop)` of a plain .jsonl (the lines that start there), row groups
    `[start, stop)` of a .parquet, or with `stop` -1 the whole file."""

    file: SourceFile
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ScanUnit:
    """Consecutive pieces that are scanned together."""

    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Unique in one listing and in its order."""
        first = self.pieces[0]
        return f"{first.file.index:06x}-{first.start:010x}"


def file_format(name: str) -> tuple[str, str | None] | None:
    """`(format, compression)` by suffix, in any case; None for a suffix that is not read."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    kind = FORMATS.get(suffix)
    if kind is None or (kind == "parquet" and compression):
        return None
    return kind, compression


def list_files(options: CorpusOptions, *, ignored: Counter[str] | None = None) -> Iterator[SourceFile]:
    """The corpus's files, root by root and in each by path components.

    Args:
        ignored: receives the number of files left out, by suffix.

    Raises CorpusError when a root is missing or cannot be listed, when a file is named that is of no known
    suffix or too large, and at the end when nothing was found.
    """
    counts: Counter[str] = Counter() if ignored is None else ignored
    index = 0
    for root in options.roots:
        for source, entry in _root_entries(root):
            if options.excluded_folder and entry.path.startswith(f"{options.excluded_folder}/"):
                continue
            known = file_format(entry.name) if entry.kind == "file" else None
            if known is None:
                counts[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
                continue
            _check_limits(entry, index)
            yield SourceFile(entry.path, source, *known, entry.size, index)
            index += 1
    if index == 0:
        raise CorpusError(_nothing_found(options, counts))


def scan_units(options: CorpusOptions, *, ignored: Counter[str] | None = None) -> Iterator[ScanUnit]:
    """The corpus as bounded units of work, in scan order. Arguments and errors as in `list_files`."""
    held: list[Piece] = []
    held_bytes = 0
    for file in list_files(options, ignored=ignored):
        for piece in file_pieces(file):
            if held and (held_bytes + piece.num_bytes > UNIT_BYTES or len(held) == UNIT_PIECES):
                yield ScanUnit(tuple(held))
                held, held_bytes = [], 0
            held.append(piece)
            held_bytes += piece.num_bytes
    if held:
        yield ScanUnit(tuple(held))


def file_pieces(file: SourceFile) -> Iterator[Piece]:
    """Cut a large file of records into pieces that can be read apart; others are one piece."""
    if file.format == "parquet":
        yield from _row_group_pieces(file)
    elif file.format == "jsonl" and file.compression is None and file.num_bytes > 0:
        for start in range(0, file.num_bytes, RANGE_BYTES):
            stop = min(start + RANGE_BYTES, file.num_bytes)
            yield Piece(file, start, stop, stop - start)
    else:
        yield Piece(file, 0, -1, file.num_bytes)


def _row_group_pieces(file: SourceFile) -> Iterator[Piece]:
    sizes = _row_group_bytes(file)
    if sizes is None:  # the reader refuses it, with the reason
        yield Piece(file, 0, -1, file.num_bytes)
        return
    start = held = 0
    for group, size in enumerate(sizes):
        if group > start and held + size > RANGE_BYTES:
            yield Piece(file, start, group, held)
            start, held = group, 0
        held += size
    if start < len(sizes):
        yield Piece(file, start, len(sizes), held)


def _row_group_bytes(file: SourceFile) -> list[int] | None:
    """Uncompressed bytes of each row group; None when the footer cannot be read."""
    try:
        with open_binary(file.path) as stream, pq.ParquetFile(stream) as parquet:
            metadata = parquet.metadata
            return [max(0, metadata.row_group(group).total_byte_size) for group in range(metadata.num_row_groups)]
    except OSError as error:
        if not is_permanent(error):
            raise
        return None
    except (pa.ArrowException, ValueError, MemoryError):
        return None


def _root_entries(root: str) -> Iterator[tuple[str, Entry]]:
    """`(path below the root, entry)` of all that is below one root and not hidden."""
    path = root if is_url(root) else os.path.abspath(os.path.expanduser(root))
    found = _look(path)
    if found is None and _WILDCARD.search(root):
        prefix, patterns = _split_glob(root)
        base = prefix if is_url(prefix) else os.path.abspath(os.path.expanduser(prefix))
        if _look(base) is None:
            raise CorpusError(f"{prefix or '.'}, which {root} starts from, is not there. Name a folder that exists.")
        yield from _walk(base, "", patterns)
    elif found is None:
        raise CorpusError(f"{root} is not there: expected a folder, a file or a glob. Check the path.")
    elif found.kind == "folder":
        yield from _walk(path, "", _EVERYTHING)
    elif file_format(found.name) is None:
        raise CorpusError(f"{root} is not of a known format: expected one of {_SUFFIXES}. Rename or convert it.")
    else:
        yield found.name, found


def _look(path: str) -> Entry | None:
    try:
        return lookup(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror or error}). Check its permissions.") from error


def _split_glob(root: str) -> tuple[str, Patterns]:
    parts = root.split("/")
    first = next(number for number, part in enumerate(parts) if _WILDCARD.search(part))
    prefix = "/".join(parts[:first])
    if not prefix and root.startswith("/"):
        prefix = "/"
    return prefix, frozenset([tuple(part for part in parts[first:] if part)])


def _walk(path: str, source: str, patterns: Patterns) -> Iterator[tuple[str, Entry]]:
    """Files below `path` that match what is left of the glob. A matched folder counts with all that is in it."""
    try:
        entries = list_folder(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be listed ({error.strerror or error}). Check its permissions.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        below = _advance(patterns, entry.name)
        matched = any(all(part == "**" for part in pattern) for pattern in below)
        inner = f"{source}/{entry.name}" if source else entry.name
        if entry.kind == "folder":
            if below:
                yield from _walk(entry.path, inner, _EVERYTHING if matched else below)
        elif matched:
            yield inner, entry


def _advance(patterns: Patterns, name: str) -> Patterns:
    """What is left of each pattern after one path component; `**` matches any number of them, none too."""
    left: set[tuple[str, ...]] = set()
    for pattern in patterns:
        rest = pattern
        while rest and rest[0] == "**":
            left.add(rest)
            rest = rest[1:]
        if rest and fnmatchcase(name, rest[0]):
            left.add(rest[1:])
    return frozenset(left)


def _check_limits(entry: Entry, index: int) -> None:
    if entry.size >= MAX_FILE_BYTES:
        raise CorpusError(f"{entry.path} has {entry.size} bytes: at most 1 TiB a file can be read. Split it.")
    if index >= MAX_FILES:
        raise CorpusError(f"more than {MAX_FILES} files: too many for one corpus. Pack them into .jsonl files.")


def _nothing_found(options: CorpusOptions, ignored: Counter[str]) -> str:
    other = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items()))
    found = f"only files of other kinds ({other})" if other else "no files"
    return f"{' '.join(options.roots)}: {found}, expected {_SUFFIXES} (also .gz, .zst). Check the path."
