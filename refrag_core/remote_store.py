"""An index on an object store, with verified copies of its files on this machine.

Files go up under the names that follow from their content, by create-if-absent, and come down on first use into
a cache folder. A copy is written aside, synced, renamed and then sealed: its seal says which bytes it holds and
which state of the object they came from. A copy without a fitting seal is fetched again, so that the cache can
lose anything at any time.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from refrag_core.batching import cache_dir
from refrag_core.digests import digest_file, digest_json
from refrag_core.errors import ConfigError, CorruptIndexError
from refrag_core.holds import Hold
from refrag_core.lease import Lease
from refrag_core.object_store import UPLOADS, FolderObjects, RemoteObjects, sync_file
from refrag_core.processes import is_of_dead_process, process_name
from refrag_core.storage import EXCHANGE, RUNS, WORK, FileRecord, check_name

PARALLEL_FILES = 8
"""Files that are fetched at once."""

_LEASE = f"{WORK}/lease"
_RECEIPTS = f"{WORK}/receipts"
_ABANDONED = timedelta(days=1)


def _seal_name(name: str) -> str:
    return f"seals/{name}.json"


class RemoteStore:
    """A Store below a URI like s3://bucket/prefix.

    Args:
        location: the URI.
        cache: folder for copies and intermediate files; by default one a URI below refrag's cache folder.
    """

    def __init__(self, location: str, cache: Path | None = None) -> None:
        self._objects = RemoteObjects(location)
        self._given_cache = cache
        self._cache = cache or cache_dir() / "indexes" / digest_json(self._objects.location)[:32]
        self._local = FolderObjects(self._cache, WORK)
        self._known: dict[str, FileRecord] = {}

    def __reduce__(self) -> tuple[type["RemoteStore"], tuple[str, Path | None]]:
        return RemoteStore, (self._objects.location, self._given_cache)  # another machine has its own cache folder

    @property
    def location(self) -> str:
        """See Store."""
        return self._objects.location

    # --- copies on this machine

    def _copy(self, name: str) -> Path:
        return self._cache / "files" / check_name(name)

    def _seal_path(self, name: str) -> Path:
        return self._cache / _seal_name(name)

    def _seal(self, name: str) -> dict[str, Any] | None:
        """What the copy of a file is known to be; None without a whole copy."""
        try:
            seal = json.loads(self._seal_path(name).read_bytes())
            whole = self._copy(name).stat().st_size == seal["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return dict(seal) if whole else None

    def _has_copy(self, name: str) -> bool:
        """Whether the copy is what a manifest or receipt says; where none does, what the store holds now."""
        seal = self._seal(name)
        if seal is None:
            return False
        if known := self._known.get(name):
            return bool(seal["digest"] == known.digest)
        return seal["e_tag"] is not None and self._e_tag(name) == seal["e_tag"]

    def _keep(self, temporary: Path, name: str, digest: str, e_tag: str | None) -> FileRecord:
        """Make a finished file the copy of `name`."""
        record = FileRecord(name, temporary.stat().st_size, digest)
        final = self._copy(name)
        sync_file(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        self._seal_path(name).unlink(missing_ok=True)
        os.replace(temporary, final)
        seal = {"bytes": record.bytes, "digest": digest, "e_tag": e_tag}
        self._local.put(_seal_name(name), json.dumps(seal).encode())
        return record

    def _download(self, name: str) -> FileRecord:
        """Fetch a file anew, check it against what is known of it, and keep the copy. Raises FileNotFoundError."""
        with self._local.temporary() as temporary:
            info = self._objects.download(name, temporary)
            digest, known = digest_file(temporary), self._known.get(name)
            if known is not None and (info.bytes, digest) != (known.bytes, known.digest):
                raise CorruptIndexError(
                    f"{self.location}/{name} has {info.bytes} bytes and digest {digest[:16]}…, expected "
                    f"{known.bytes} bytes and {known.digest[:16]}…: run `refrag index verify`, then "
                    "`refrag index repair`"
                )
            return self._keep(temporary, name, digest, info.e_tag)

    def _fetch(self, name: str) -> None:
        if not self._has_copy(name):
            self._download(name)

    def path(self, name: str) -> Path:
        """See Store: a copy, fetched on first use. Raises CorruptIndexError where it is not what it should be."""
        path = self._copy(name)
        try:
            self._fetch(name)
        except FileNotFoundError:
            self._forget(name)
        return path

    def folder(self, name: str) -> Path:
        """See Store."""
        path = self._copy(name)
        names = [info.name for info in self._objects.list(name)]
        # What a manifest does not list is none of its files, whoever laid it there.
        self.fetch([each for each in names if each in self._known] or names)
        return path

    def fetch(self, names: Iterable[str]) -> None:
        """See Store. Files that are missing are left to whoever opens them."""

        def fetch(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fetch(check_name(name))

        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(fetch, names))

    def _forget(self, name: str) -> None:
        self._seal_path(name).unlink(missing_ok=True)
        self._copy(name).unlink(missing_ok=True)

    # --- what the store holds

    def expect(self, records: Iterable[FileRecord]) -> None:
        """See Store."""
        self._known.update((record.name, record) for record in records)

    def read(self, name: str) -> bytes:
        """See Store."""
        return self._objects.get(check_name(name))

    def exists(self, name: str) -> bool:
        """See Store."""
        return self._objects.head(check_name(name)) is not None

    def size(self, name: str) -> int | None:
        """See Store."""
        found = self._objects.head(check_name(name))
        return None if found is None else found.bytes

    def sizes(self, names: Iterable[str]) -> Mapping[str, int]:
        """See Store: one listing, whatever the number of files."""
        wanted = set(names)
        return {info.name: info.bytes for info in self._objects.list() if info.name in wanted}

    def record(self, name: str) -> FileRecord:
        """See Store: fetched anew; the copy is made from the same bytes."""
        self._known.pop(check_name(name), None)
        return self._download(name)

    def list(self, folder: str) -> "list[str]":
        """See Store."""
        prefix = check_name(folder) + "/"
        names = (info.name.removeprefix(prefix) for info in self._objects.list(folder))
        return sorted(name for name in names if "/" not in name)

    def files(self) -> Iterator[str]:
        """See Store."""
        return (info.name for info in self._objects.list() if not info.name.startswith(f"{WORK}/"))

    # --- writing

    def settle(self, name: str) -> FileRecord:
        """See Store: always refused."""
        raise ConfigError(
            f"{name} was to be written in place at {self.location}; expected a folder of this machine for files that "
            "another library writes"
        )

    def publish(self, name: str, write: Callable[[Path], None]) -> FileRecord:
        """See Store: written on this machine, then uploaded if the name is free; else the store's file stands."""
        with self._local.temporary() as temporary:
            write(temporary)
            self._known.pop(check_name(name), None)
            # Asked first, because a refused request has sent the whole file.
            if not self.exists(name) and self._objects.create(name, temporary):
                record = self._keep(temporary, name, digest_file(temporary), self._e_tag(name))
            else:
                record = self._standing(name)
        self.expect([record])
        return record

    def _standing(self, name: str) -> FileRecord:
        """The record of the file that has the name in the store; its bytes move only if there is no copy of them."""
        seal = self._seal(name)
        if seal is not None and seal["e_tag"] is not None and seal["e_tag"] == self._e_tag(name):
            return FileRecord(name, seal["bytes"], seal["digest"])
        return self._download(name)

    def _e_tag(self, name: str) -> str | None:
        found = self._objects.head(name)
        return None if found is None else found.e_tag

    def create(self, name: str, data: bytes) -> bool:
        """See Store."""
        return self._objects.create(check_name(name), data)

    def replace(self, name: str, data: bytes) -> None:
        """See Store."""
        self._objects.put(check_name(name), data)

    def remove(self, name: str) -> None:
        """See Store."""
        below = [info.name for info in self._objects.list(check_name(name))]
        gone = below or [name]
        self._objects.delete_all(gone)
        for each in gone:
            self._forget(each)
            self._known.pop(each, None)

    def modified(self, name: str) -> float:
        """See Store. Raises FileNotFoundError."""
        found = self._objects.head(check_name(name))
        if found is None:
            raise FileNotFoundError(f"{self.location} has no {name}")
        return found.modified.timestamp()

    def hold(self, name: str) -> Hold | None:
        """See Store: an empty claim, since nothing on an object store ends with a process."""
        return Hold() if self.exists(name) else None

    def is_held(self, name: str) -> bool:  # noqa: ARG002
        """See Store: never known."""
        return False

    def remove_unheld(self, name: str) -> bool:
        """See Store: removed, since no claim is known."""
        self.remove(name)
        return True

    def prune(self) -> None:
        """See Store: an object store has no folders."""

    # --- work in progress

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """See Store: a lease, which expires where its holder died."""
        return Lease(self._objects, _LEASE).held()

    def run_folder(self) -> Path:
        """See Store: below the cache folder."""
        return self._cache / WORK / f"{RUNS}{process_name()}"

    def shared_run_location(self) -> str:
        """See Store: below the store itself."""
        return f"{self.location}/{WORK}/{RUNS}{process_name()}"

    def clear_runs(self) -> None:
        """See Store. Readers and builders that live keep what is theirs; old uploads are nobody's any more."""
        for folder in self._objects.list_folder(WORK)[0]:
            if folder.removeprefix(f"{WORK}/").startswith(RUNS):
                self.remove(folder)
        self.remove(EXCHANGE)
        for path in (self._cache / WORK).glob("*"):
            if is_of_dead_process(path.name.removeprefix(RUNS)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for info in self._objects.list(UPLOADS):
            if datetime.now(UTC) - info.modified > _ABANDONED:
                self._objects.delete(info.name)

    def finish_work(self) -> None:
        """See Store: all that is left of the work but the lease, which its holder gives back."""
        shutil.rmtree(self.run_folder(), ignore_errors=True)
        self.remove(f"{WORK}/{RUNS}{process_name()}")
        self.remove(_RECEIPTS)
