"""Holds: what keeps a generation from being collected while somebody reads or fetches it.

A hold is a shared `flock` on a file that never changes: the manifest of a generation, or the list of a transfer
under way. Whoever collects takes the exclusive lock without waiting, and spares what it does not get. The kernel
drops a hold with its process, however that ends; nothing is written, so a reader needs no write access.
"""

import contextlib
import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""The last: NFS gives exclusive locks only to who may write."""


class Hold:
    """A shared lock on an open file: until `release`, the last reference or the process is gone.

    Args:
        handle: the locked file; None for a hold in name alone, where nothing can enforce one.
    """

    def __init__(self, handle: int | None = None) -> None:
        self._release = None if handle is None else weakref.finalize(self, os.close, handle)

    def release(self) -> None:
        """Let go; a second time does nothing."""
        if self._release is not None:
            self._release()


def hold(path: Path) -> Hold | None:
    """Hold the file at `path`; None when it is gone, or went while this waited for who collected it.

    On a file system without locks the hold is one in name alone, and `unheld` says False for every file there.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        _lock(handle, fcntl.LOCK_SH)
        if _names(path, handle):
            return Hold(handle)
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _lock(handle: int, operation: int) -> bool:
    """False on a file system that has no locks."""
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _names(path: Path, handle: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def unheld(path: Path) -> Iterator[bool]:
    """Whether nobody holds the file at `path`; inside the block nobody can begin to.

    False where that cannot be known. A file that is gone is held by nobody.
    """
    try:
        handle = _open_for_lock(path)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _try_exclusive(handle)
    finally:
        os.close(handle)


def _open_for_lock(path: Path) -> int:
    """For writing, which a lock over a network may need, or for reading alone: a manifest is never written to."""
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    return os.open(path, os.O_RDONLY)


def _try_exclusive(handle: int) -> bool:
    try:
        return _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Wait for and hold the exclusive lock of a folder: for moments in which two must not both look and then act."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
