"""Intermediate files of one run: below a folder, or below a URI that workers on every machine reach.

Files are written on the machine that makes them and published under names that follow from their content, so
that whoever makes one twice makes the same one. What names a published file is its location, a path or a URI,
which every worker can open.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq

from refrag_core.batching import cache_dir
from refrag_core.corpus.filesystem import open_binary
from refrag_core.digests import digest_file
from refrag_core.errors import StageError
from refrag_core.object_store import RemoteObjects, make_folder, sync_file, sync_folder
from refrag_core.processes import is_of_dead_process, process_name
from refrag_core.storage import is_uri

_MARK = ".reachable"
_counter = itertools.count()


@lru_cache(maxsize=16)
def _client(location: str, endpoint: str | None) -> RemoteObjects:
    del endpoint  # another endpoint is another store
    return RemoteObjects(location)


@lru_cache(maxsize=16)
def _scratch(folder: Path) -> Path:
    """Where this machine writes what goes to a URI; what killed processes left there is removed once a process."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if is_of_dead_process(path.name):
            path.unlink(missing_ok=True)
    return folder


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """Where the intermediate files of one run lie; it travels to workers as its location alone."""

    location: str
    """An absolute folder, or a URI of an object store."""

    @property
    def _objects(self) -> RemoteObjects:
        return _client(self.location, os.environ.get("AWS_ENDPOINT_URL"))

    def below(self, name: str) -> "WorkFolder":
        """A folder in this one."""
        return WorkFolder(f"{self.location}/{name}")

    def make(self) -> None:
        """Make the folder, and leave the mark by which workers know that it is this very one that they see."""
        if is_uri(self.location):
            self._objects.put(_MARK, b"refrag\n")
            return
        make_folder(Path(self.location))
        Path(self.location, _MARK).touch()

    def check(self) -> None:
        """Raise StageError on a machine that does not see the folder that `make` made."""
        remote = is_uri(self.location)
        seen = self._objects.head(_MARK) is not None if remote else Path(self.location, _MARK).is_file()
        if not seen:
            raise StageError(
                f"{os.uname().nodename} does not see {self.location}, expected the folder of this run's intermediate "
                "files: put the index and the corpus on storage that all machines share (a mount under the same path "
                "everywhere, or s3://…), or name a shared folder or URI with --work, and run the command again"
            )

    @contextlib.contextmanager
    def temporary(self, kind: str) -> Iterator[Path]:
        """A path of this process's own for a file to be published; removed at the end if it is still there."""
        name = f"{process_name()}-{next(_counter)}"
        if is_uri(self.location):
            path = _scratch(cache_dir() / "work") / f"{name}-{kind}"
        else:
            Path(self.location).mkdir(parents=True, exist_ok=True)
            path = Path(self.location, f".{kind}-{name}")
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, temporary: Path, *, prefix: str, suffix: str) -> str:
        """Give a finished file its name `<prefix>-<digest><suffix>`, durably and at once; its location.

        Two workers that made the same file publish it under the same name; a kill leaves the temporary one only.
        """
        name = f"{prefix}-{digest_file(temporary)[:16]}{suffix}"
        if is_uri(self.location):
            self._objects.put(name, temporary)
        else:
            sync_file(temporary)
            temporary.replace(Path(self.location, name))
            sync_folder(Path(self.location))
        return f"{self.location}/{name}"

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        if not is_uri(self.location):
            shutil.rmtree(self.location, ignore_errors=True)
            return
        self._objects.delete_all(info.name for info in self._objects.list())


def remove_location(location: str) -> None:
    """Remove one published file."""
    if is_uri(location):
        folder, _, name = location.rpartition("/")
        WorkFolder(folder)._objects.delete(name)
    else:
        Path(location).unlink(missing_ok=True)


@contextlib.contextmanager
def open_location(location: str) -> Iterator[pq.ParquetFile]:
    """A published Parquet file; of a remote one only what is asked for is fetched.

    Raises StageError where it is gone or this machine does not see it.
    """
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(open_binary(location)) if is_uri(location) else location
            file = stack.enter_context(pq.ParquetFile(source))
        except FileNotFoundError as error:
            raise StageError(
                f"{location} is missing on {os.uname().nodename}, expected an intermediate file of this run: keep the "
                "index, or the folder of --work, on storage that all machines share and run the command again"
            ) from error
        yield file
