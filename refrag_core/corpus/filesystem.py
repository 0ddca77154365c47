"""Listing and opening files by path or URL.

The local disk directly; buckets through the object layer where the extra `s3` is installed; all else, and buckets
without it, through fsspec's drivers or Arrow's own clients.
"""

import errno
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from refrag_core.errors import MissingExtraError
from refrag_core.object_store import ObjectFile, RemoteObjects, has_client, is_object_store

BLOCK_BYTES = 1 << 20

BUFFER_BYTES = 4 << 20
"""An object is read in ranges of at least this many bytes."""

Kind = Literal["file", "folder", "other"]

_PERMANENT = {
    None,  # raised by a format's own reader, not by the operating system
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a folder. `other` is what is never read: devices, pipes, links to folders."""

    name: str
    path: str
    kind: Kind
    size: int


def is_url(path: str) -> bool:
    """True for `protocol://…`; an absolute local path never looks so."""
    return "://" in path


def is_permanent(error: OSError) -> bool:
    """True where trying again cannot help: no such file, no permission, or contents that are no such format."""
    return error.errno in _PERMANENT


def lookup(path: str) -> Entry | None:
    """The entry at `path` itself, links followed; None when there is none."""
    if _is_bucket(path):
        return _bucket_lookup(path)
    if is_url(path):
        return _remote_lookup(path)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Entry(os.path.basename(path), path, _kind(found.st_mode), found.st_size)


def list_folder(path: str) -> list[Entry]:
    """The entries of a folder sorted by name. Raises OSError when it cannot be listed."""
    listing = _bucket_entries if _is_bucket(path) else _remote_entries if is_url(path) else _local_entries
    entries = listing(path)
    return sorted(entries, key=lambda entry: entry.name)


def open_binary(path: str) -> BinaryIO:
    """Open for reading; the stream can be sought. Raises OSError."""
    if _is_bucket(path):
        objects, name = _bucket(path)
        return cast(BinaryIO, io.BufferedReader(ObjectFile(objects, name), BUFFER_BYTES))
    if is_url(path):
        filesystem, inner = _remote(path)
        return cast(BinaryIO, filesystem.open(inner, "rb"))
    return open(path, "rb")


def read_blocks(stream: BinaryIO) -> Iterator[bytes]:
    """What is left in `stream`, in blocks of at most 1 MiB."""
    while block := stream.read(BLOCK_BYTES):
        yield block


def _kind(mode: int) -> Kind:
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "other"


def _local_entries(path: str) -> Iterator[Entry]:
    with os.scandir(path) as entries:
        for entry in entries:
            yield _local_entry(entry)


def _local_entry(entry: "os.DirEntry[str]") -> Entry:
    try:
        found = entry.stat()
    except OSError:  # a broken link: listed as a file, so that reading it is refused with a reason
        return Entry(entry.name, entry.path, "file", 0)
    kind = _kind(found.st_mode)
    if kind == "folder" and entry.is_symlink():  # may lead back up: would never end
        kind = "other"
    return Entry(entry.name, entry.path, kind, found.st_size)


# --- buckets


def _is_bucket(path: str) -> bool:
    return is_object_store(path) and has_client()


@lru_cache(maxsize=16)
def _client(bucket: str, endpoint: str | None) -> RemoteObjects:
    del endpoint  # another endpoint is another bucket
    return RemoteObjects(bucket)


def _bucket(path: str) -> tuple[RemoteObjects, str]:
    """The bucket of a URI, and the object's name in it."""
    parts = urlsplit(path, allow_fragments=False)
    bucket, name = f"{parts.scheme}://{parts.netloc}", path.split("://", 1)[1].partition("/")[2]
    return _client(bucket, os.environ.get("AWS_ENDPOINT_URL")), name.strip("/")


def _bucket_lookup(path: str) -> Entry | None:
    objects, name = _bucket(path)
    found = objects.head(name) if name else None
    if found is not None and not path.endswith("/"):
        return _object_entry(path, found.bytes)
    folders, below = objects.list_folder(name)
    if not (folders or below or found or not name):
        return None
    return Entry(name.rpartition("/")[2], path.rstrip("/"), "folder", 0)


def _bucket_entries(path: str) -> Iterator[Entry]:
    objects, name = _bucket(path)
    folders, below = objects.list_folder(name)
    start = f"{path.rstrip('/')}/"
    for folder in folders:
        inner = folder.rpartition("/")[2]
        yield Entry(inner, start + inner, "folder", 0)
    for info in below:
        yield _object_entry(start + info.name.rpartition("/")[2], info.bytes)


def _object_entry(path: str, size: int) -> Entry:
    return Entry(path.rpartition("/")[2], path, "file", size)


# --- all other URLs


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(path))
    except ImportError as missing:
        return _arrow(path, missing)
    except ValueError as unknown:
        raise MissingExtraError(f"{path}: {unknown}. Install the fsspec driver for this protocol.") from unknown


def _arrow(path: str, missing: ImportError) -> tuple[Any, str]:
    """Arrow's own S3, GCS and HDFS clients, where fsspec's driver is not installed."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import ArrowException, fs

    try:
        filesystem, inner = fs.FileSystem.from_uri(path)
    except ArrowException as unknown:
        raise MissingExtraError(f"{path}: {missing}. Install the fsspec driver for this protocol.") from unknown
    return ArrowFSWrapper(filesystem), inner


def _remote_lookup(path: str) -> Entry | None:
    filesystem, inner = _remote(path)
    filesystem.invalidate_cache()
    try:
        return _remote_entry(path, filesystem.info(inner))
    except FileNotFoundError:
        return None


def _remote_entries(path: str) -> Iterator[Entry]:
    filesystem, inner = _remote(path)
    for found in filesystem.ls(inner, detail=True):
        name = found["name"].rstrip("/").rpartition("/")[2]
        if found["name"].rstrip("/") != inner.rstrip("/"):  # object stores list a folder's own marker in it
            yield _remote_entry(f"{path.rstrip('/')}/{name}", found)


def _remote_entry(path: str, found: dict[str, Any]) -> Entry:
    kinds: dict[str, Kind] = {"file": "file", "directory": "folder"}
    name = path.rstrip("/").rpartition("/")[2]
    return Entry(name, path, kinds.get(found["type"], "other"), int(found.get("size") or 0))
