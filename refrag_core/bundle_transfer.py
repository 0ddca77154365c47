"""Bundles between places: a build host pushes to a folder or an object store, serving hosts pull from there.

Only files that the other side lacks travel, several at once, each checked against its digest; the manifest comes
last. A transfer that is killed at any moment is begun again and goes on with the files that are missing.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from refrag_core.bundle import BundleReport, report_of
from refrag_core.bundle_folder import (
    CHECKPOINTS,
    DEFAULT_JOBS,
    FILES,
    MODELS,
    SILENT,
    Delivery,
    Meter,
    Moved,
    check_bundles,
    check_names,
    in_parallel,
    is_whole,
    moved_of,
    receive,
    refuse_index,
)
from refrag_core.errors import CommitConflictError, CorruptIndexError, IndexNotFoundError, UsageError
from refrag_core.holds import Hold, hold
from refrag_core.manifest import (
    CURRENT,
    VERSION_NAME,
    VERSIONS,
    Manifest,
    decode_manifest,
    encode_manifest,
    hold_manifest,
    signature_name,
    version_name,
)
from refrag_core.object_store import FolderObjects, ObjectStore, open_objects
from refrag_core.signing import check_signature
from refrag_core.storage import FileRecord, FolderStore

MAX_MANIFEST_BYTES = 1 << 30
"""A longer manifest is refused unread: it is held in memory."""

MAX_SIGNATURE_BYTES = 4096


# --- push -------------------------------------------------------------------------------------------


def push_bundle(
    bundle: Path,
    destination: str,
    *,
    version: int | None = None,
    jobs: int = DEFAULT_JOBS,
    meter: Meter = SILENT,
) -> BundleReport:
    """Bring one generation of a bundle to a folder or URI; run again to go on after an interruption.

    Raises CommitConflictError when another generation of that number is there, CorruptIndexError for a damaged
    bundle, and UsageError for an index at either end.
    """
    started = time.perf_counter()
    store = FolderStore(bundle)
    check_bundles(store)
    manifest, held = hold_manifest(store, version)
    delivery = _delivery_from(store, manifest)
    objects = open_objects(destination)
    if isinstance(objects, FolderObjects):
        moved = receive(FolderStore(objects.root), delivery, jobs=jobs, meter=meter)
    else:
        moved = _upload(store, delivery, objects, jobs, meter)
    if held is not None:
        held.release()
    signed = delivery.signature is not None
    return report_of(manifest, delivery.data, moved, signed=signed, seconds=time.perf_counter() - started)


def _delivery_from(store: FolderStore, manifest: Manifest) -> Delivery:
    path = store.path(signature_name(manifest.version))
    signature = path.read_bytes() if path.is_file() else None

    def fetch(record: FileRecord, target: Path) -> None:
        shutil.copyfile(_whole(store, record), target)

    return Delivery(manifest, encode_manifest(manifest), signature, fetch)


def _whole(store: FolderStore, record: FileRecord) -> Path:
    path = store.path(record.name)
    if not is_whole(path, record):
        raise CorruptIndexError(
            f"{path} is missing or does not have the bytes that its manifest lists: nothing of it was sent; export or "
            "pull this bundle again"
        )
    return path


def _upload(store: FolderStore, delivery: Delivery, objects: ObjectStore, jobs: int, meter: Meter) -> Moved:
    """Names follow from the bytes, so that an object of that name and size is that file."""
    check_names(delivery.manifest)
    _check_remote(objects, delivery)
    _refuse_remote_index(objects)
    present = _sizes(objects)

    def bring(record: FileRecord) -> bool:
        missing = present.get(record.name) != record.bytes
        if missing:
            objects.put(record.name, _whole(store, record))
        meter.advance(record.bytes)
        return missing

    records = list(delivery.manifest.files.values())
    meter.expect(sum(record.bytes for record in records))
    moved = in_parallel(bring, records, jobs)
    version = delivery.manifest.version
    if delivery.signature is not None:
        objects.put(signature_name(version), delivery.signature)
    created = objects.create(version_name(version), delivery.data)
    _check_remote(objects, delivery)
    objects.put(CURRENT, f"{_remote_versions(objects)[-1]}\n".encode())
    return moved_of(records, moved, extra=len(delivery.data) if created else 0)


def _check_remote(objects: ObjectStore, delivery: Delivery) -> None:
    name = delivery.manifest.name
    if objects.head(name) is not None and objects.get(name) != delivery.data:
        raise CommitConflictError(
            f"{objects.location} has another generation {delivery.manifest.version} (expected build id "
            f"{delivery.manifest.build_id[:12]}, as the one that was to come): nothing was changed; take another place "
            "for bundles of another index"
        )


def _refuse_remote_index(objects: ObjectStore) -> None:
    for version in _remote_versions(objects)[-1:]:
        name = version_name(version)
        with contextlib.suppress(CorruptIndexError):  # which is for whoever pulls it to say
            refuse_index(decode_manifest(objects.get(name), where=f"{objects.location}/{name}"), objects.location)


def _sizes(objects: ObjectStore) -> Mapping[str, int]:
    """Bytes of the files that are there, by name."""
    return {info.name: info.bytes for folder in (FILES, CHECKPOINTS, MODELS) for info in objects.list(folder)}


def _remote_versions(objects: ObjectStore) -> list[int]:
    names = [info.name.rpartition("/")[2] for info in objects.list(VERSIONS)]
    return sorted(int(name.removesuffix(".json")) for name in names if VERSION_NAME.match(name))


# --- pull -------------------------------------------------------------------------------------------


def pull_bundle(
    source: str,
    folder: Path,
    *,
    version: int | None = None,
    verify_keys: Sequence[Path] = (),
    jobs: int = DEFAULT_JOBS,
    meter: Meter = SILENT,
) -> BundleReport:
    """Bring one generation from a folder or URI into `folder`; run again to go on after an interruption.

    Generations that are there stay, readers see the new one when all of it is in place and checked.

    Args:
        version: the generation; the newest by default.
        verify_keys: public keys; with them a manifest that is not signed with one is refused before anything is
            fetched.

    Raises IndexNotFoundError, SignatureError, CorruptIndexError for what is not as its manifest says, UsageError for
    an index, and CommitConflictError when `folder` has another generation of that number.
    """
    started = time.perf_counter()
    objects = open_objects(source)
    number = _newest(objects) if version is None else version
    held = _hold_source(objects, number)
    delivery = _read_delivery(objects, number, verify_keys)
    moved = receive(FolderStore(folder), delivery, jobs=jobs, meter=meter)
    if held is not None:
        held.release()
    signed = delivery.signature is not None
    return report_of(delivery.manifest, delivery.data, moved, signed=signed, seconds=time.perf_counter() - started)


def _newest(objects: ObjectStore) -> int:
    versions = _remote_versions(objects)
    if not versions:
        raise IndexNotFoundError(
            f"{objects.location} holds no bundle: expected a manifest under {VERSIONS}/; put one there with "
            f"`refrag bundle push BUNDLE {objects.location}`"
        )
    return versions[-1]


def _hold_source(objects: ObjectStore, version: int) -> Hold | None:
    """A folder's generation is held while it is read; None for an object store, which no `gc` of a host touches."""
    return hold(objects.root / version_name(version)) if isinstance(objects, FolderObjects) else None


def _read_delivery(objects: ObjectStore, version: int, keys: Sequence[Path]) -> Delivery:
    name = version_name(version)
    where = f"{objects.location}/{name}"
    data = _read_small(objects, name)
    if data is None:
        raise IndexNotFoundError(
            f"{where} is not there; expected a generation among {_remote_versions(objects)}: leave --version out for "
            "the newest"
        )
    signature = _read_small(objects, signature_name(version), MAX_SIGNATURE_BYTES)
    if keys:
        check_signature(data, signature, keys, where=where)
    manifest = decode_manifest(data, where=where)
    if manifest.bundle is None:
        raise UsageError(
            f"{objects.location} is an index, expected a bundle: export one with `refrag bundle export` and push it"
        )
    if manifest.version != version:
        raise CorruptIndexError(f"{where} is the manifest of version {manifest.version}: have the bundle pushed again")
    return Delivery(manifest, data, signature, _fetch_from(objects, _sizes(objects)))


def _read_small(objects: ObjectStore, name: str, most: int = MAX_MANIFEST_BYTES) -> bytes | None:
    """A manifest or signature; None where there is none."""
    info = objects.head(name)
    if info is None:
        return None
    if info.bytes > most:
        raise CorruptIndexError(
            f"{objects.location}/{name} has {info.bytes} bytes, expected at most {most}: have the bundle pushed again"
        )
    return objects.get(name)


def _fetch_from(objects: ObjectStore, sizes: Mapping[str, int]) -> Callable[[FileRecord, Path], None]:
    """Downloads, of files that have the right size there: nothing longer than its manifest says is written."""

    def fetch(record: FileRecord, path: Path) -> None:
        found = sizes.get(record.name)
        if found != record.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CorruptIndexError(
                f"{objects.location}/{record.name} {state}, expected {record.bytes} bytes: have the bundle pushed again"
            )
        objects.download(record.name, path)

    return fetch
