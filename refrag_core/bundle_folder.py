"""A folder of bundles on a host: generations arrive in it, are checked, and are collected again.

    files/<ab>/<digest>.*        tables and segments, named by their bytes
    checkpoints/<key>/           the checkpoint, under its own file names
    models/<key>/                decoder and retriever, where they travel along
    versions/<n>.json[.sig]      one manifest a generation, created last: the moment from which readers see it
    work/arrivals/<process>/     a generation on its way: its manifest, held, and files that are not whole yet

A file under its final name is whole and has the digest that a manifest gives it. Arriving is idempotent: killed at
any moment it is begun again, and what is there already is not fetched twice.
"""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from refrag_core.digests import digest_file, digest_json
from refrag_core.errors import CommitConflictError, ConfigError, CorruptIndexError, UsageError
from refrag_core.holds import folder_lock, hold, unheld
from refrag_core.manifest import (
    CURRENT,
    Manifest,
    beside,
    decode_manifest,
    list_versions,
    read_manifest,
    signature_name,
    version_name,
)
from refrag_core.storage import WORK, FileRecord, FolderStore

FILES, CHECKPOINTS, MODELS = "files", "checkpoints", "models"
DEFAULT_JOBS = 8
DEFAULT_GRACE_SECONDS = 3600.0

_ARRIVALS = f"{WORK}/arrivals"
_STAGED = "manifest.json"
_counter = itertools.count()

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One generation and how to get its files."""

    manifest: Manifest
    data: bytes
    """The manifest's own bytes."""
    signature: bytes | None
    fetch: Callable[[FileRecord, Path], None]
    """Puts the bytes of a file under a path; called from several threads."""


class Meter(Protocol):
    """Hears how far a transfer is; called from several threads."""

    def expect(self, total: int) -> None:
        """So many bytes are to be moved or checked."""

    def advance(self, amount: int) -> None:
        """So many more are done."""


class NoMeter:
    """Tells nobody."""

    def expect(self, total: int) -> None:
        """Ignore the total."""

    def advance(self, amount: int) -> None:
        """Ignore progress."""


SILENT = NoMeter()


@dataclass(frozen=True, slots=True)
class Moved:
    """What went over, and what was there already."""

    moved_files: int
    moved_bytes: int
    spared_files: int
    spared_bytes: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, and what it left because somebody needs it."""

    removed: tuple[int, ...]
    kept: tuple[int, ...]
    held: tuple[int, ...]
    """Old generations that a reader holds."""
    arriving: tuple[int, ...]
    """Generations on their way into this folder."""
    files: int
    bytes: int
    """Of the files removed; a byte that another folder links to is not free yet."""
    young: int
    """Unlisted files younger than the grace period."""


def in_parallel(function: Callable[[T], R], items: Iterable[T], jobs: int) -> list[R]:
    """`function` of each item, in threads; the first error stops what has not begun."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_whole(path: Path, record: FileRecord) -> bool:
    """Whether the file at `path` has the size and the digest of `record`."""
    return path.is_file() and path.stat().st_size == record.bytes and digest_file(path) == record.digest


def link_or_copy(source: Path, target: Path) -> None:
    """Give the file a second name, or copy it where the two lie on different file systems."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def folder_name(parent: str, digests: Mapping[str, str]) -> str:
    """The folder of files that keep names of their own, by those names and their digests."""
    return f"{parent}/{digest_json(dict(digests))[:32]}"


def file_name(digest: str, suffix: str) -> str:
    """The name of a table or segment."""
    return f"{FILES}/{digest[:2]}/{digest}{suffix}"


def check_names(manifest: Manifest) -> None:
    """Raise CorruptIndexError for a file whose name does not follow from its bytes.

    Else one generation could put other bytes under the names of another, a manifest or a signature.
    """
    for name in manifest.files.keys() - _following_names(manifest):
        raise CorruptIndexError(
            f"{manifest.name} lists a file {name!r}, expected names that follow from the bytes, below {FILES}/, "
            f"{CHECKPOINTS}/ or {MODELS}/: nothing of it is used; have the bundle exported again"
        )


def _following_names(manifest: Manifest) -> set[str]:
    """Those of the names that follow from digests."""
    following, folders = set(), dict[tuple[str, str], dict[str, str]]()
    for name, record in manifest.files.items():
        parent, _, rest = name.partition("/")
        key, _, member = rest.partition("/")
        if parent == FILES and name == file_name(record.digest, PurePosixPath(name).suffix):
            following.add(name)
        elif parent in (CHECKPOINTS, MODELS) and member:
            folders.setdefault((parent, key), {})[member] = record.digest
    for (parent, key), members in folders.items():
        if folder_name(parent, members) == f"{parent}/{key}":
            following |= {f"{parent}/{key}/{member}" for member in members}
    return following


# --- arriving ---------------------------------------------------------------------------------------


def receive(store: FolderStore, delivery: Delivery, *, jobs: int = DEFAULT_JOBS, meter: Meter = SILENT) -> Moved:
    """Bring one generation into the folder: its missing files, each checked, then its manifest.

    Raises CommitConflictError when the folder has another generation of that number, UsageError when it is an index,
    and CorruptIndexError for a file that does not arrive as its manifest says; the generations that are there stay as
    they are.
    """
    manifest = delivery.manifest
    check_names(manifest)
    _check_free(store, delivery)
    if list_versions(store):
        refuse_index(read_manifest(store), store.location)
    store.root.mkdir(parents=True, exist_ok=True)
    with _arrival(store, delivery.data) as stage:
        present = _names_by_digest(store)

        def bring(record: FileRecord) -> bool:
            moved = _bring(store, record, stage, delivery.fetch, present.get(record.digest))
            meter.advance(record.bytes)
            return moved

        records = list(manifest.files.values())
        meter.expect(sum(record.bytes for record in records))
        moved = in_parallel(bring, records, jobs)
        created = _publish(store, delivery)
    return moved_of(records, moved, extra=len(delivery.data) if created else 0)


def _check_free(store: FolderStore, delivery: Delivery) -> None:
    version = delivery.manifest.version
    if version not in list_versions(store):
        return
    found = store.read(version_name(version))
    if found != delivery.data:
        raise CommitConflictError(
            f"{store.root} has another generation {version} (expected build id {delivery.manifest.build_id[:12]}, as "
            "the one that was to come): nothing was changed; take another folder for bundles of another index"
        )


def moved_of(records: Sequence[FileRecord], moved: Sequence[bool], extra: int) -> Moved:
    """The sums over `records`, each moved or spared, and `extra` bytes of a manifest that moved."""
    went = [record.bytes for record, yes in zip(records, moved, strict=True) if yes]
    total = sum(record.bytes for record in records)
    return Moved(len(went), sum(went) + extra, len(records) - len(went), total - sum(went))


def _bring(
    store: FolderStore, record: FileRecord, stage: Path, fetch: Callable[[FileRecord, Path], None], twin: str | None
) -> bool:
    """Put one file into place; False when its bytes were in this folder already."""
    if is_whole(store.path(record.name), record):
        return False
    temporary = stage / f"{next(_counter)}.part"
    try:
        if twin is not None and twin != record.name and is_whole(store.path(twin), record):
            link_or_copy(store.path(twin), temporary)
            store.install(record, temporary)
            return False
        fetch(record, temporary)
        store.install(record, temporary)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _names_by_digest(store: FolderStore) -> dict[str, str]:
    """A name of each digest that some generation in this folder has."""
    manifests = [read_manifest(store, version) for version in list_versions(store)]
    return {record.digest: record.name for manifest in manifests for record in manifest.files.values()}


def _publish(store: FolderStore, delivery: Delivery) -> bool:
    """Create the manifest, its signature before it; False when the generation was there already."""
    version = delivery.manifest.version
    with folder_lock(store.root):
        _check_free(store, delivery)  # another process may have been first with another generation of that number
        if delivery.signature is not None:
            store.replace(signature_name(version), delivery.signature)
        created = store.create(version_name(version), delivery.data)
        store.replace(CURRENT, f"{list_versions(store)[-1]}\n".encode())
    return created


@contextlib.contextmanager
def _arrival(store: FolderStore, data: bytes) -> Iterator[Path]:
    """A folder for a generation on its way; while it is open, `collect` spares every file that `data` lists."""
    stage = store.path(f"{_ARRIVALS}/{os.uname().nodename}-{os.getpid()}-{next(_counter)}")
    with folder_lock(store.root):
        _drop_abandoned(store)
        stage.mkdir(parents=True)
        (stage / _STAGED).write_bytes(data)
        held = hold(stage / _STAGED)
    assert held is not None, "the folder's lock keeps others from removing it"
    try:
        yield stage
    finally:
        held.release()
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(store.path(WORK))


def _stages(store: FolderStore) -> list[Path]:
    folder = store.path(_ARRIVALS)
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _drop_abandoned(store: FolderStore) -> list[Manifest]:
    """Remove what killed transfers left half-written; the manifests of those that are under way.

    Only with the folder's lock, under which alone small files are written.
    """
    shutil.rmtree(store.path(f"{WORK}/tmp"), ignore_errors=True)
    arriving = []
    for stage in _stages(store):
        with unheld(stage / _STAGED) as free:
            if free:
                shutil.rmtree(stage, ignore_errors=True)
                continue
        with contextlib.suppress(FileNotFoundError):  # it has just arrived, and is listed like any other
            arriving.append(decode_manifest((stage / _STAGED).read_bytes(), where=str(stage / _STAGED)))
    return arriving


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those in it that hold nothing."""
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(path)


# --- collecting -------------------------------------------------------------------------------------


def collect(root: Path, *, keep: int = 2, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> Collected:
    """Remove old generations from a folder of bundles, and the files that no generation needs any more.

    Args:
        keep: how many of the newest generations stay whatever happens.
        grace_seconds: age from which a file that no manifest names is removed; a killed pull goes on from younger ones.

    What a reader holds or a transfer brings stays, and is said. Raises UsageError for an index, which has its own
    `refrag index gc`, and CorruptIndexError, removing nothing, when a manifest cannot be read.
    """
    if keep < 1:
        raise ConfigError(f"{keep} generations are to stay, expected at least 1: a host serves the newest")
    store = FolderStore(root)
    check_bundles(store)
    with folder_lock(root):
        arriving = _drop_abandoned(store)
        _remove_empty(store.path(WORK))
        versions = list_versions(store)
        for version in versions:
            read_manifest(store, version)
        removed = [version for version in versions[:-keep] if _retire(store, version)]
        needed = [*arriving, *(read_manifest(store, version) for version in list_versions(store))]
        files, size, young = _sweep(store, needed, grace_seconds)
    left = [version for version in versions if version not in removed]
    held = [version for version in left if version in versions[:-keep]]
    on_their_way = tuple(sorted({manifest.version for manifest in arriving}))
    return Collected(tuple(removed), tuple(left), tuple(held), on_their_way, files, size, young)


def check_bundles(store: FolderStore) -> Manifest:
    """The newest generation of a folder of bundles. Raises UsageError for an index, IndexNotFoundError for neither."""
    manifest = read_manifest(store)
    if manifest.bundle is None:
        raise UsageError(
            f"{store.root} is an index, expected a bundle: export one with `refrag bundle export {store.root} BUNDLE`"
        )
    return manifest


def refuse_index(newest: Manifest, location: str) -> None:
    """Raise UsageError where bundles were to be brought to an index."""
    if newest.bundle is None:
        raise UsageError(
            f"{location} is an index, expected a place for bundles: nothing was changed; name an empty place, or one "
            "that holds bundles of this index"
        )


def _retire(store: FolderStore, version: int) -> bool:
    """Remove a generation's manifest unless somebody holds it."""
    manifest, *others = beside(version)
    with unheld(store.path(manifest)) as free:
        if free:
            for name in (manifest, *others):
                store.remove(name)
    return free


def _sweep(store: FolderStore, needed: Sequence[Manifest], grace_seconds: float) -> tuple[int, int, int]:
    """Remove files of a bundle's own folders that nobody names: `(files, bytes)` removed, and how many are young."""
    named = {name for manifest in needed for name in manifest.files}
    oldest = time.time() - grace_seconds
    files = size = young = 0
    for name in [name for name in store.files() if name.split("/")[0] in (FILES, CHECKPOINTS, MODELS)]:
        if name in named:
            continue
        status = store.path(name).stat()
        if status.st_ctime > oldest:  # when it got this name, whatever its bytes' own age
            young += 1
            continue
        store.remove(name)
        files, size = files + 1, size + status.st_size
    for folder in (FILES, CHECKPOINTS, MODELS):
        _remove_empty(store.path(folder))
    return files, size, young
