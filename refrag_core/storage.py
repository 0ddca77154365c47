"""What holds an index: safe names, atomic publication, create-if-absent, an advisory lock.

`Store` says what the rest of refrag may ask of it; `FolderStore` is a folder of this machine. A file under a
final name is complete and never changes: it is written under a temporary name, synced, and linked to its final
name only if that name is free. Names come from content, so that whoever comes second finds the same thing and
takes it over.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

from refrag_core.digests import digest_file
from refrag_core.errors import CorruptIndexError, IndexLockedError
from refrag_core.holds import Hold, hold, unheld
from refrag_core.object_store import FolderObjects, make_folder, sync_file, sync_folder
from refrag_core.processes import process_name

IndexLocation: TypeAlias = Path | str
"""Where an index is: a folder, or a URI like s3://bucket/prefix."""

WORK = "work"
RUNS = "run-"
"""Prefix of the folders that hold one execution's own files."""

EXCHANGE = f"{WORK}/exchange"
"""Folder of results on their way from workers to a driver."""

_TEMPORARY = f"{WORK}/tmp"


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


class Store(Protocol):
    """What an index lies in. Names are POSIX paths below it; all methods raise CorruptIndexError for an unsafe one.

    Readers get local paths: of the files themselves, or of verified copies of them.
    """

    @property
    def location(self) -> str:
        """Path or URI, for messages and for opening it again."""

    def path(self, name: str) -> Path:
        """Local path of a published file, which never changes. It may not exist where the store has no such file."""

    def folder(self, name: str) -> Path:
        """Local path of a published folder with all its files."""

    def fetch(self, names: Iterable[str]) -> None:
        """Make `path` quick for these files, many at a time."""

    def expect(self, records: Iterable[FileRecord]) -> None:
        """Learn what a manifest or a receipt says of files: `path` gives no others under their names."""

    def read(self, name: str) -> bytes:
        """The bytes of a small file as it is now. Raises FileNotFoundError."""

    def exists(self, name: str) -> bool:
        """True when the file is there under its final name."""

    def size(self, name: str) -> int | None:
        """Bytes of a file as it is now, None where there is none."""

    def sizes(self, names: Iterable[str]) -> Mapping[str, int]:
        """Bytes of those of the files that are there."""

    def record(self, name: str) -> FileRecord:
        """Size and digest of a published file, read anew from where it lies. Raises FileNotFoundError."""

    def settle(self, name: str) -> FileRecord:
        """Make a finished file that another library wrote in place outlive a power cut; returns its record.

        Raises ConfigError where nothing is written in place.
        """

    def publish(self, name: str, write: Callable[[Path], None]) -> FileRecord:
        """Write a file and give it its final name if that is free; the record of the one that has the name then."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a file with `data` if no file has that name; False, and nothing done, when one has."""

    def replace(self, name: str, data: bytes) -> None:
        """Write `data` over whatever the name holds, atomically (hints and receipts, never tables)."""

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""

    def modified(self, name: str) -> float:
        """When a file was written, seconds since the epoch by the store's clock."""

    def hold(self, name: str) -> Hold | None:
        """Claim a file as in use, so that `remove_unheld` spares it; None when it is gone or being removed.

        Writes nothing. On an object store nothing can enforce a claim: it is empty, `is_held` and `remove_unheld` know
        of none, and a grace period alone protects.
        """

    def is_held(self, name: str) -> bool:
        """Whether somebody, this process included, holds the file, or nobody can tell."""

    def remove_unheld(self, name: str) -> bool:
        """Remove a file unless somebody holds it; False, and nothing done, when somebody does."""

    def prune(self) -> None:
        """Remove folders that hold nothing, work in progress aside."""

    def list(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, sorted; none where there is no such folder."""

    def files(self) -> Iterator[str]:
        """Names of all files but those of work in progress, sorted."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the advisory lock. Raises IndexLockedError while another live builder holds it."""

    def run_folder(self) -> Path:
        """Local folder for the intermediate files of this process."""

    def shared_run_location(self) -> str:
        """Path or URI for the intermediate files of this process that workers on every machine reach.

        Below a folder, that is wherever the folder is mounted.
        """

    def clear_runs(self) -> None:
        """Remove what ended executions left, but not their receipts. Only with the lock held."""

    def finish_work(self) -> None:
        """Remove this process's intermediate files, and the receipts unless another run is under way."""


class FolderStore:
    """An index's folder on a POSIX file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._objects = FolderObjects(root, _TEMPORARY)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.root)

    def path(self, name: str) -> Path:
        """See Store: the file itself."""
        return self.root / check_name(name)

    def folder(self, name: str) -> Path:
        """See Store."""
        return self.path(name)

    def fetch(self, names: Iterable[str]) -> None:
        """See Store: nothing to do."""

    def expect(self, records: Iterable[FileRecord]) -> None:
        """See Store: a file on the disk is what it is; `refrag index verify` checks it."""

    def read(self, name: str) -> bytes:
        """See Store."""
        return self.path(name).read_bytes()

    def exists(self, name: str) -> bool:
        """See Store."""
        return self.path(name).is_file()

    def size(self, name: str) -> int | None:
        """See Store."""
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def sizes(self, names: Iterable[str]) -> Mapping[str, int]:
        """See Store."""
        return {name: size for name in names if (size := self.size(name)) is not None}

    def record(self, name: str) -> FileRecord:
        """See Store."""
        path = self.path(name)
        return FileRecord(name, path.stat().st_size, digest_file(path))

    def settle(self, name: str) -> FileRecord:
        """See Store."""
        path = self.path(name)
        sync_file(path)
        sync_folder(path.parent)
        return self.record(name)

    def publish(self, name: str, write: Callable[[Path], None]) -> FileRecord:
        """See Store: written under a temporary name, synced, and linked to the final one."""
        self._objects.write(check_name(name), write, overwrite=False)
        return self.record(name)

    def create(self, name: str, data: bytes) -> bool:
        """See Store."""
        return self._objects.create(check_name(name), data)

    def replace(self, name: str, data: bytes) -> None:
        """See Store."""
        self._objects.put(check_name(name), data)

    def install(self, record: FileRecord, temporary: Path) -> None:
        """Give the file `temporary` (on this file system) its name, over whatever the name holds.

        For files whose digest is known beforehand. Raises CorruptIndexError, and leaves the name as it is, when the
        bytes are not those of `record`.
        """
        found = FileRecord(record.name, temporary.stat().st_size, digest_file(temporary))
        if found != record:
            raise CorruptIndexError(
                f"{record.name} arrived with {found.bytes} bytes and SHA-256 {found.digest[:16]}…, expected "
                f"{record.bytes} and {record.digest[:16]}…: it is damaged where it came from; remove it there and make "
                "it again (`refrag bundle push` sends no file that is there already)"
            )
        final = self.path(record.name)
        sync_file(temporary)
        make_folder(final.parent)
        os.replace(temporary, final)
        sync_folder(final.parent)

    def remove(self, name: str) -> None:
        """See Store."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def list(self, folder: str) -> list[str]:
        """See Store."""
        path = self.path(folder)
        return sorted(entry.name for entry in path.iterdir() if entry.is_file()) if path.is_dir() else []

    def modified(self, name: str) -> float:
        """See Store."""
        return self.path(name).stat().st_mtime

    def hold(self, name: str) -> Hold | None:
        """See Store: a shared lock of the kernel on the file itself, which a read-only mount has too."""
        return hold(self.path(name))

    def is_held(self, name: str) -> bool:
        """See Store."""
        with unheld(self.path(name)) as free:
            return not free

    def remove_unheld(self, name: str) -> bool:
        """See Store."""
        path = self.path(name)
        with unheld(path) as free:
            if free:
                path.unlink(missing_ok=True)
        sync_folder(path.parent)
        return free

    def prune(self) -> None:
        """See Store."""
        for folder, _, _ in os.walk(self.root, topdown=False):
            base = Path(folder).relative_to(self.root)
            if base.parts and base.parts[0] != WORK:
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    def files(self) -> Iterator[str]:
        """See Store."""
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
        is_new = not self.root.exists()
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
            try:
                yield
            finally:
                self._leave_work(holder)
                if is_new:  # a build that was refused leaves nothing behind
                    with contextlib.suppress(OSError):
                        self.root.rmdir()
        finally:
            os.close(handle)

    def _leave_work(self, holder: str) -> None:
        """Remove the folder of work in progress where no work is left in it."""
        work = self.path(WORK)
        for folder in work.iterdir() if work.is_dir() else ():
            with contextlib.suppress(OSError):
                folder.rmdir()
        if work.is_dir() and [path.name for path in work.iterdir()] == ["builder"]:
            self.path(holder).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                work.rmdir()

    def _holder(self, name: str) -> str:
        try:
            return self.path(name).read_text()
        except OSError:
            return "holder unknown"

    def run_folder(self) -> Path:
        """See Store."""
        return self.root / WORK / f"{RUNS}{process_name()}"

    def shared_run_location(self) -> str:
        """See Store."""
        return str(self.run_folder().absolute())

    def clear_runs(self) -> None:
        """See Store."""
        for folder in (self.root / WORK).iterdir():
            if folder.name.startswith(RUNS) or f"{WORK}/{folder.name}" in (_TEMPORARY, EXCHANGE):
                shutil.rmtree(folder, ignore_errors=True)

    def finish_work(self) -> None:
        """See Store."""
        shutil.rmtree(self.run_folder(), ignore_errors=True)
        if not any(path.name.startswith(RUNS) for path in (self.root / WORK).iterdir()):
            self.remove(WORK)


def is_uri(location: IndexLocation) -> bool:
    """True for `scheme://…`; a path never looks so."""
    return "://" in str(location)


def absolute(location: IndexLocation) -> str:
    """The location independent of the working folder."""
    return str(location).rstrip("/") if is_uri(location) else os.path.abspath(location)


def open_store(location: IndexLocation) -> Store:
    """The store at a path or URI; nothing is read or made yet. Raises UsageError for a URI of an unknown scheme."""
    if not is_uri(location):
        return FolderStore(Path(location))
    parts = urlsplit(str(location))
    if parts.scheme == "file":
        return FolderStore(Path(unquote(parts.path)))
    from refrag_core.remote_store import RemoteStore

    return RemoteStore(str(location))
