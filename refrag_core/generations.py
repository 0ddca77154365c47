"""Generations once they are committed: their log, what differs between two, going back to one, removing old ones.

Each is a manifest; none is ever rewritten. Going back is a new generation with an old one's content. Removing
takes the manifest first and its files after, so that whatever is readable is whole at every moment.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise

from refrag_core import lance_tables
from refrag_core.digests import canonical_json
from refrag_core.errors import ConfigError, UsageError
from refrag_core.index_reader import check_sizes
from refrag_core.manifest import (
    CONTENT_FOLDERS,
    REMOVED,
    Change,
    Counts,
    LiveDocument,
    Manifest,
    ParentInfo,
    commit,
    document_key,
    finish_commit,
    hold_manifest,
    list_versions,
    live_documents,
    read_manifest,
    refuse_bundle,
    run_record_name,
)
from refrag_core.storage import FileRecord, Store

DEFAULT_GRACE_SECONDS = 24 * 3600.0


# --- log --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Generation:
    """One line of an index's log."""

    version: int
    state: str
    """`newest`, `kept`, or `removed` by gc."""
    committed: str | None
    """When its manifest was written, UTC by the file system's clock; None for a removed one."""
    parent: int | None
    build_id: str
    content_id: str
    change: Change | None
    counts: Counts
    shards: int
    segments: int
    tombstoned_documents: int
    """Documents whose rows are still in the shards and are hidden; `compact` drops them."""
    tombstoned_passages: int
    bytes: int
    """Of all files that it names."""
    new_files: int
    """Files that its parent does not name; all of them where the parent was removed."""
    new_bytes: int
    models_changed: Sequence[str]
    """Roles whose model is not the parent's."""


def generation_log(store: Store) -> Iterator[Generation]:
    """All generations, newest first; those that gc has removed are remembered with what was known of them.

    Raises IndexNotFoundError where nothing is committed and CorruptIndexError for an altered manifest.
    """
    versions = list_versions(store) or [read_manifest(store).version]
    removed = read_removed(store)
    following: Manifest | None = read_manifest(store, versions[-1])
    for version in sorted({*versions, *removed}, reverse=True):
        if version not in versions:
            yield removed[version]
            continue
        manifest = following if following and following.version == version else read_manifest(store, version)
        parent = manifest.parent.version if manifest.parent else None
        following = read_manifest(store, parent) if parent in versions else None
        state = "newest" if version == versions[-1] else "kept"
        yield _described(manifest, following, state, _time(store.modified(manifest.name)))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _described(manifest: Manifest, parent: Manifest | None, state: str, committed: str | None) -> Generation:
    new = [record for name, record in manifest.files.items() if parent is None or name not in parent.files]
    tombstones = manifest.tombstones
    return Generation(
        version=manifest.version,
        state=state,
        committed=committed,
        parent=manifest.parent.version if manifest.parent else None,
        build_id=manifest.build_id,
        content_id=manifest.content_id,
        change=manifest.change,
        counts=manifest.counts,
        shards=len(manifest.shards),
        segments=len(manifest.segments),
        tombstoned_documents=tombstones.documents if tombstones else 0,
        tombstoned_passages=tombstones.passages if tombstones else 0,
        bytes=_total(manifest.files.values()),
        new_files=len(new),
        new_bytes=_total(new),
        models_changed=_models_changed(parent, manifest) if parent else [],
    )


def _total(records: Iterable[FileRecord]) -> int:
    return sum(record.bytes for record in records)


def _models_changed(before: Manifest, after: Manifest) -> list[str]:
    """Roles whose fingerprint differs, and `checkpoint` for what only the runtime reads of it."""
    old, new = asdict(before.components), asdict(after.components)
    roles = [role for role in old if (old[role] or {}).get("fingerprint") != (new[role] or {}).get("fingerprint")]
    return roles + (["checkpoint"] if before.checkpoint.fingerprint != after.checkpoint.fingerprint else [])


def read_removed(store: Store) -> dict[int, Generation]:
    """What gc wrote down of the generations that it removed, by version."""
    if not store.exists(REMOVED):
        return {}
    return {entry["version"]: _removed(entry) for entry in json.loads(store.read(REMOVED))}


def _removed(entry: Mapping[str, object]) -> Generation:
    fields = dict(entry)
    change, counts = fields.pop("change"), fields.pop("counts")
    return Generation(
        **fields,  # type: ignore[arg-type]
        change=Change(**change) if isinstance(change, dict) else None,
        counts=Counts(**counts),  # type: ignore[arg-type]
    )


# --- diff -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GenerationDiff:
    """What differs between two generations."""

    old: int
    new: int
    documents_added: int
    documents_removed: int
    documents_changed: int
    documents_unchanged: int
    counts_old: Counts
    counts_new: Counts
    models_changed: Sequence[str]
    new_files: int
    """Files that only the new one names: what a host that has the old one would have to fetch."""
    new_bytes: int


def diff_generations(
    store: Store, old: int, new: int, on_document: Callable[[str, str], object] | None = None
) -> GenerationDiff:
    """Join the documents of two generations, as streams ordered by id: memory does not grow with either.

    Args:
        on_document: called with `added`, `removed` or `changed` and the id of each document that differs.

    Raises IndexNotFoundError for a generation that is not there.
    """
    (before, old_hold), (after, new_hold) = hold_manifest(store, old), hold_manifest(store, new)
    totals = {"added": 0, "removed": 0, "changed": 0, "unchanged": 0}
    for change, document_id in _changes(live_documents(store, before), live_documents(store, after)):
        totals[change] += 1
        if change != "unchanged" and on_document is not None:
            on_document(change, document_id)
    old_hold.release()
    new_hold.release()
    fresh = [record for name, record in after.files.items() if name not in before.files]
    return GenerationDiff(
        old=old,
        new=new,
        **{f"documents_{change}": total for change, total in totals.items()},
        counts_old=before.counts,
        counts_new=after.counts,
        models_changed=_models_changed(before, after),
        new_files=len(fresh),
        new_bytes=_total(fresh),
    )


def _changes(before: Iterator[LiveDocument], after: Iterator[LiveDocument]) -> Iterator[tuple[str, str]]:
    left, right = next(before, None), next(after, None)
    while left is not None or right is not None:
        order = _order(left, right)
        if order < 0 and left is not None:
            yield "removed", left.document_id
        elif order > 0 and right is not None:
            yield "added", right.document_id
        elif left is not None and right is not None:
            yield "unchanged" if left.content_digest == right.content_digest else "changed", left.document_id
        left = next(before, None) if order <= 0 else left
        right = next(after, None) if order >= 0 else right


def _order(left: LiveDocument | None, right: LiveDocument | None) -> int:
    """Negative where only the left stream has its document next, positive where only the right one has."""
    if left is None or right is None:
        return 1 if left is None else -1
    a, b = document_key(left.document_id), document_key(right.document_id)
    return (a > b) - (a < b)


# --- rollback ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RollbackReport:
    """What a rollback did."""

    version: int
    """The newest generation now."""
    content_of: int
    """The generation whose content it has."""
    committed: bool
    """False when the newest generation had this content already."""
    content_id: str
    build_id: str
    counts: Counts


def roll_back(store: Store, version: int | None = None) -> RollbackReport:
    """Commit a new generation with the content of an old one; nothing is rewritten and nothing is encoded.

    Args:
        version: the old generation; by default the one before the newest content: a second rollback goes on
            from where the first one went.

    Raises IndexNotFoundError for a generation that is not there, UsageError where none is older and for a bundle,
    CorruptIndexError when a file of it is missing or cut, IndexLockedError beside a running build, CommitConflictError
    behind one.
    """
    refuse_bundle(store)
    read_manifest(store)
    with store.lock():
        newest = read_manifest(store)
        target, hold = hold_manifest(store, _before(store, newest) if version is None else version)
        check_sizes(store, target.files.values())
        same = (target.content_id, target.files) == (newest.content_id, newest.files)
        manifest = newest if same else _again(target, newest)
        if not same:
            commit(store, manifest)
        else:
            finish_commit(store, newest)
        if lance_tables.is_installed():
            lance_tables.make_newest(store, manifest)
        hold.release()
    return RollbackReport(
        manifest.version, _origin(target), not same, manifest.content_id, manifest.build_id, manifest.counts
    )


def _origin(manifest: Manifest) -> int:
    """The generation that first had this one's content."""
    change = manifest.change
    return change.version if change and change.version is not None else manifest.version


def _before(store: Store, newest: Manifest) -> int:
    older = [version for version in list_versions(store) if version < _origin(newest)]
    if not older:
        raise UsageError(
            f"{store.location} has no generation older than {_origin(newest)}: expected one to go back to; "
            f"`refrag index log {store.location}` lists what there is, and any of it can be named"
        )
    return older[-1]


def _again(target: Manifest, newest: Manifest) -> Manifest:
    return replace(
        target,
        version=newest.version + 1,
        parent=ParentInfo(newest.version, newest.build_id),
        change=Change("rollback", version=_origin(target)),
    )


# --- gc ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What gc did, or would do."""

    kept: Sequence[int]
    removed: Sequence[int]
    spared: Mapping[int, str]
    """Generations beyond those asked for that stay, with the reason."""
    files: int
    """Files removed, manifests and those of LanceDB tables aside."""
    bytes: int
    """Of all files removed, those of LanceDB tables included where these packages are installed; not in a dry run."""
    young_files: int
    """Files that no generation names and that are within the grace period: a build may still want them."""


def collect_garbage(
    store: Store,
    *,
    keep: int,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    dry_run: bool = False,
    on_file: Callable[[str], object] | None = None,
) -> GarbageReport:
    """Remove all generations but the `keep` newest, and the files that none of the kept ones names.

    Stays: what a reader holds (`Store.hold`), a generation that was the newest within the grace period, and files
    written within it. A kill at any moment leaves every manifest that is still there with all of its files.

    Raises ConfigError for settings out of range, UsageError for a bundle, CorruptIndexError, with nothing removed,
    for an altered manifest, and IndexLockedError beside a running build.
    """
    if keep < 1 or grace_seconds < 0:
        raise ConfigError(
            f"gc was asked to keep {keep} generations with a grace period of {grace_seconds} s: expected at least one "
            "generation, and a grace period that is not negative"
        )
    refuse_bundle(store)
    read_manifest(store)
    with store.lock():
        oldest_wanted = time.time() - grace_seconds
        manifests = [read_manifest(store, version) for version in list_versions(store)]
        doomed, spared = _doomed(store, manifests, keep, oldest_wanted)
        if not dry_run:
            _remove_generations(store, doomed, spared)
        gone = [manifest for manifest in doomed if manifest.version not in spared]
        left = [manifest for manifest in manifests if manifest not in gone]
        files, size, young = _remove_files(store, left, oldest_wanted, dry_run, on_file)
        if not dry_run and lance_tables.is_installed():
            size += lance_tables.drop_versions(store, left)
    return GarbageReport(
        [manifest.version for manifest in left], [manifest.version for manifest in gone], spared, files, size, young
    )


def _doomed(
    store: Store, manifests: Sequence[Manifest], keep: int, oldest_wanted: float
) -> tuple[list[Manifest], dict[int, str]]:
    """The generations to remove, and those that stay for a reason."""
    doomed, spared = [], {}
    for manifest, following in list(pairwise(manifests))[: max(0, len(manifests) - keep)]:
        if store.modified(following.name) > oldest_wanted:
            spared[manifest.version] = "was the newest within the grace period"
        elif store.is_held(manifest.name):
            spared[manifest.version] = "is open in a reader"
        else:
            doomed.append(manifest)
    return doomed, spared


def _remove_generations(store: Store, doomed: Sequence[Manifest], spared: dict[int, str]) -> None:
    """Write down what goes, so that its absence has an explanation, then take the manifests, oldest first."""
    if not doomed:
        return
    known = {version: asdict(entry) for version, entry in read_removed(store).items()}
    known |= {manifest.version: asdict(_described(manifest, None, "removed", None)) for manifest in doomed}
    store.replace(REMOVED, canonical_json([known[version] for version in sorted(known)]))
    for manifest in doomed:
        if not store.remove_unheld(manifest.name):
            spared[manifest.version] = "is open in a reader"


def _remove_files(
    store: Store, left: Sequence[Manifest], oldest_wanted: float, dry_run: bool, on_file: Callable[[str], object] | None
) -> tuple[int, int, int]:
    named = {name for manifest in left for name in (*manifest.files, run_record_name(manifest.version))}
    files = size = young = 0
    for name in list(_unnamed(store, named)):
        if store.modified(name) > oldest_wanted:
            young += 1
            continue
        files, size = files + 1, size + (store.size(name) or 0)
        if on_file is not None:
            on_file(name)
        if not dry_run:
            store.remove(name)
    if not dry_run:
        store.prune()
    return files, size, young


def _unnamed(store: Store, named: set[str]) -> Iterator[str]:
    for name in store.files():
        if name.split("/", 1)[0] in CONTENT_FOLDERS and name not in named:
            yield name
