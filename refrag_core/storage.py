"""The folder that holds an index: safe names, atomic publication, create-if-absent, an advisory lock.

A file under a final name is complete and never changes: it is written under a temporary name, synced, and
linked to its final name only if that name is free. Names come from content, so that whoever comes second
finds the same thing and takes it over.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from refrag_core.digests import digest_file
from refrag_core.errors import CorruptIndexError, IndexLockedError

WORK = "work"
_TEMPORARY = f"{WORK}/tmp"
_counter = itertools.count()


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One immutable file of an index."""

    name: str
    """POSIX path below the index's root."""
    bytes: int
    digest: str
    """SHA-256, hexadecimal."""


def check_name(name: str) -> str:
    """Return `name` if it is a plain relative POSIX path, else raise CorruptIndexError.

    Refused: absolute paths, `..`, empty or `.` components, backslashes, colons, control characters.
    """
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") for part in parts) or any(c in "\\:" or ord(c) < 32 for c in name)
    if unsafe or PurePosixPath(name).is_absolute():
        raise CorruptIndexError(
            f"unsafe file name {name!r} in the manifest: expected a relative path below the index; "
            "do not use this index, fetch it again from where it was built"
        )
    return name


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it so that their names outlive a power cut."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _link_if_absent(temporary: Path, final: Path) -> bool:
    """Give `temporary` the name `final` unless that is taken; False when it was."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        # A file system without hard links: exclusive creation decides the winner, the rename fills it. An empty
        # file is what a writer left that was killed between the two: the name is still free.
        try:
            os.close(os.open(final, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if final.stat().st_size > 0:
                return False
        os.replace(temporary, final)
    return True


class Store:
    """An index's folder on a POSIX file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Path of a file below the root. Raises CorruptIndexError for an unsafe name."""
        return self.root / check_name(name)

    def exists(self, name: str) -> bool:
        """True when the file is there under its final name."""
        return self.path(name).is_file()

    def record(self, name: str) -> FileRecord:
        """Size and digest of a published file, read from the disk."""
        path = self.path(name)
        return FileRecord(name, path.stat().st_size, digest_file(path))

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        folder = self.root / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.uname().nodename}-{os.getpid()}-{next(_counter)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, name: str, write: Callable[[Path], None]) -> FileRecord:
        """Write a file under a temporary name and give it its final name if that is free.

        When another writer was first, its file stands and is the one described by the result.
        """
        final = self.path(name)
        with self._temporary() as temporary:
            write(temporary)
            _sync_file(temporary)
            _make_folder(final.parent)
            _link_if_absent(temporary, final)
        _sync_folder(final.parent)
        return self.record(name)

    def create(self, name: str, data: bytes) -> bool:
        """Create a file with `data` if no file has that name; False, and nothing done, when one has."""
        final = self.path(name)
        with self._temporary() as temporary:
            temporary.write_bytes(data)
            _sync_file(temporary)
            _make_folder(final.parent)
            created = _link_if_absent(temporary, final)
        _sync_folder(final.parent)
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write `data` over whatever the name holds, atomically (hints and receipts, never tables)."""
        final = self.path(name)
        with self._temporary() as temporary:
            temporary.write_bytes(data)
            _sync_file(temporary)
            _make_folder(final.parent)
            os.replace(temporary, final)
        _sync_folder(final.parent)

    def install(self, record: FileRecord, temporary: Path) -> None:
        """Give the file `temporary` (on this file system) its name, over whatever the name holds.

        For files whose digest is known beforehand. Raises CorruptIndexError, and leaves the name as it is, when the
        bytes are not those of `record`.
        """
        found = FileRecord(record.name, temporary.stat().st_size, digest_file(temporary))
        if found != record:
            raise CorruptIndexError(
                f"{record.name} arrived with {found.bytes} bytes and SHA-256 {found.digest[:16]}…, expected "
                f"{record.bytes} and {record.digest[:16]}…: it is damaged where it came from; make it again there"
            )
        final = self.path(record.name)
        _sync_file(temporary)
        _make_folder(final.parent)
        os.replace(temporary, final)
        _sync_folder(final.parent)

    def remove(self, name: str) -> None:
        """Remove a file or a folder below the root, if it is there."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def files(self) -> Iterator[str]:
        """Names of all files below the root but those of work in progress, sorted."""
        for folder, folders, names in os.walk(self.root):
            folders.sort()
            base = Path(folder).relative_to(self.root)
            if base == Path("."):
                folders[:] = [name for name in folders if name != WORK]
            yield from sorted((base / name).as_posix() for name in names)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the advisory lock of this index; the kernel drops it with the process, however that ends.

        It only spares two builders from doing the same work; the commit itself needs no lock. Raises
        IndexLockedError while another live process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root, os.O_RDONLY)
        holder = f"{WORK}/builder"
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise IndexLockedError(
                    f"another build is running on {self.root} ({self._holder(holder)}): nothing was done; "
                    "wait for it to end, or stop it, and run this command again"
                ) from None
            self.replace(holder, f"process {os.getpid()} on {os.uname().nodename}".encode())
            yield
        finally:
            os.close(handle)

    def _holder(self, name: str) -> str:
        try:
            return self.path(name).read_text()
        except OSError:
            return "holder unknown"
