"""Bundles: one generation of an index as serving hosts need it, exported, opened, checked.

A bundle is a folder like an index, with the same manifest: the runtime opens either. It leaves out the
quarantine's records and every other generation's files, and names its own by their bytes, so that two generations
share what they have in common wherever they lie.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from refrag_core.bundle_folder import (
    CHECKPOINTS,
    DEFAULT_JOBS,
    MODELS,
    SILENT,
    Delivery,
    Meter,
    Moved,
    check_bundles,
    file_name,
    folder_name,
    in_parallel,
    is_whole,
    link_or_copy,
    receive,
)
from refrag_core.errors import ConfigError, CorruptIndexError, FingerprintMismatchError, UsageError
from refrag_core.manifest import (
    BundleInfo,
    Manifest,
    QuarantineInfo,
    Shard,
    bytes_by_kind,
    encode_manifest,
    hold_manifest,
    read_manifest,
    signature_name,
)
from refrag_core.models import fingerprint_model, remembered_digest, resolve_model
from refrag_core.signing import check_signature, sign
from refrag_core.storage import FileRecord, FolderStore, IndexLocation, Store, is_uri, open_store

_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What `refrag bundle export` can be told."""

    version: int | None = None
    """Generation of the index; None is the newest."""
    include_decoder: bool = False
    include_retriever: bool = False
    copy: bool = False
    """Copy every file, even where a hard link would do."""
    sign_key: Path | None = None
    jobs: int = DEFAULT_JOBS


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport:
    """What an export, a push or a pull did; its JSON result."""

    version: int
    content_id: str
    build_id: str
    files: int
    bytes: int
    """Of the whole generation, its manifest included."""
    moved_files: int
    moved_bytes: int
    """What had to be brought, the manifest included."""
    spared_files: int
    spared_bytes: int
    """What was there already, by digest."""
    signed: bool
    seconds: float
    bytes_a_second: float
    """Of `moved_bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenReport:
    """What `refrag bundle open` found; its JSON result."""

    version: int
    content_id: str
    build_id: str
    signed: bool
    verified_with: tuple[str, ...]
    """Public keys one of which the signature was checked with; none where no check was asked for."""
    files: int
    bytes: int
    bytes_by_kind: Mapping[str, int]
    models: Mapping[str, str]
    """Decoder and retriever: a folder in the bundle, or the reference by which the host has to find it."""
    passages: int
    chunks: int
    verify_seconds: float
    bytes_a_second: float
    """Read and hashed; reading is what warms the pages."""
    map_seconds: float
    """Mapping every table and segment."""


def report_of(manifest: Manifest, data: bytes, moved: Moved, *, signed: bool, seconds: float) -> BundleReport:
    """The report of one generation's way."""
    return BundleReport(
        version=manifest.version,
        content_id=manifest.content_id,
        build_id=manifest.build_id,
        files=len(manifest.files) + 1,
        bytes=sum(record.bytes for record in manifest.files.values()) + len(data),
        moved_files=moved.moved_files,
        moved_bytes=moved.moved_bytes,
        spared_files=moved.spared_files,
        spared_bytes=moved.spared_bytes,
        signed=signed,
        seconds=round(seconds, 3),
        bytes_a_second=round(moved.moved_bytes / seconds, 1) if seconds > 0 else 0.0,
    )


# --- export -----------------------------------------------------------------------------------------


class _Renaming:
    """New names of the files that go into a bundle, and where their bytes are now."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self.files: dict[str, FileRecord] = {}
        self.sources: dict[str, Path] = {}

    def add(self, name: str, digest: str, size: int, source: Path) -> str:
        """Put one file into the bundle under `name`."""
        self.files[name] = FileRecord(name, size, digest)
        self.sources[name] = source
        return name

    def by_digest(self, name: str) -> str:
        """The name that a table or segment of the index gets: its digest."""
        record = self._manifest.files[name]
        renamed = file_name(record.digest, PurePosixPath(name).suffix)
        return self.add(renamed, record.digest, record.bytes, self._store.path(name))

    def folder(self, parent: str, members: Mapping[str, tuple[Path, str]]) -> str:
        """The folder that files with names of their own get: by the digest of all names and bytes.

        Args:
            members: path and digest by name below the folder.
        """
        folder = folder_name(parent, {name: digest for name, (_, digest) in members.items()})
        for name, (source, digest) in members.items():
            self.add(f"{folder}/{name}", digest, source.stat().st_size, source)
        return folder


def export_bundle(index: IndexLocation, bundle: Path, options: ExportOptions, meter: Meter = SILENT) -> BundleReport:
    """Put one generation of `index` into the folder `bundle`; run again to go on after an interruption.

    Every file is checked against its digest on the way. Raises CorruptIndexError for a damaged index,
    CommitConflictError when the folder holds another generation of that number, and UsageError for a bundle in
    place of an index.
    """
    started = time.perf_counter()
    store = open_store(index)
    manifest, held = hold_manifest(store, options.version)
    _check_source(manifest, index, bundle)
    exported, sources = bundle_manifest(store, manifest, options)
    data = encode_manifest(exported)
    signature = None if options.sign_key is None else sign(data, options.sign_key)
    place = shutil.copyfile if options.copy else link_or_copy
    delivery = Delivery(exported, data, signature, lambda record, path: _place(place, sources[record.name], path))
    moved = receive(FolderStore(bundle), delivery, jobs=options.jobs, meter=meter)
    if held is not None:
        held.release()
    signed = FolderStore(bundle).exists(signature_name(exported.version))
    return report_of(exported, data, moved, signed=signed, seconds=time.perf_counter() - started)


def _place(place: Callable[[Path, Path], object], source: Path, target: Path) -> None:
    if not source.is_file():
        raise CorruptIndexError(f"{source} is missing: run `refrag index verify`, then `refrag index repair`")
    place(source, target)


def _check_source(manifest: Manifest, index: IndexLocation, bundle: Path) -> None:
    if manifest.bundle is not None:
        raise UsageError(
            f"{index} is a bundle, expected the index that it was exported from: take a bundle elsewhere with "
            "`refrag bundle push`"
        )
    if is_uri(index):
        return
    root = Path(index).resolve()
    if root == bundle.resolve() or root in bundle.resolve().parents:
        raise ConfigError(f"{bundle} lies in the index that is to be exported; expected a folder outside of {index}")


def bundle_manifest(store: Store, manifest: Manifest, options: ExportOptions) -> tuple[Manifest, Mapping[str, Path]]:
    """The manifest that a generation gets in a bundle, and where each file's bytes lie now."""
    store.fetch(_exported_files(manifest))
    renaming = _Renaming(store, manifest)
    shards = [_exported_shard(shard, renaming) for shard in manifest.shards]
    tombstones, duplicates = manifest.tombstones, manifest.duplicates
    exported = replace(
        manifest,
        parent=None,
        shards=shards,
        segments=[replace(segment, file=renaming.by_digest(segment.file)) for segment in manifest.segments],
        vector_index=replace(manifest.vector_index, quantizer=renaming.by_digest(manifest.vector_index.quantizer)),
        quarantine=QuarantineInfo(None, manifest.quarantine.counts),
        tombstones=tombstones and replace(tombstones, file=renaming.by_digest(tombstones.file)),
        duplicates=duplicates and replace(duplicates, file=renaming.by_digest(duplicates.file)),
        lance=None,
        checkpoint=replace(manifest.checkpoint, folder=renaming.folder(CHECKPOINTS, _checkpoint(store, manifest))),
        bundle=BundleInfo(
            source_build_id=manifest.build_id,
            decoder=renaming.folder(MODELS, _decoder(store, manifest)) if options.include_decoder else None,
            retriever=renaming.folder(MODELS, _retriever(manifest)) if options.include_retriever else None,
        ),
        files=dict(sorted(renaming.files.items())),
    )
    return exported, renaming.sources


def _exported_files(manifest: Manifest) -> list[str]:
    """Files of the index that go into a bundle: all but its LanceDB tables and the quarantine's records."""
    left = tuple(f"{table.folder}/" for table in manifest.lance.tables.values()) if manifest.lance else ()
    return [name for name in manifest.files if name != manifest.quarantine.file and not name.startswith(left)]


def _exported_shard(shard: Shard, renaming: _Renaming) -> Shard:
    return replace(
        shard,
        tables={role: renaming.by_digest(name) for role, name in shard.tables.items()},
    )


def _checkpoint(store: Store, manifest: Manifest) -> dict[str, tuple[Path, str]]:
    prefix = f"{manifest.checkpoint.folder}/"
    records = [record for record in manifest.files.values() if record.name.startswith(prefix)]
    return {record.name.removeprefix(prefix): (store.path(record.name), record.digest) for record in records}


def _decoder(store: Store, manifest: Manifest) -> dict[str, tuple[Path, str]]:
    from refrag_core.checkpoint import Checkpoint

    checkpoint = Checkpoint.load(store.folder(manifest.checkpoint.folder))
    folder, needed = checkpoint.decoder_folder(), checkpoint.config.decoder
    _check_model("decoder", folder, fingerprint_model(folder), needed.fingerprint)
    return _model_files(folder)


def _retriever(manifest: Manifest) -> dict[str, tuple[Path, str]]:
    from refrag_core.retriever import retriever_fingerprint

    needed = manifest.components.retriever
    folder = resolve_model(needed.reference)
    _check_model("retriever", folder, retriever_fingerprint(folder), needed.fingerprint)
    return _model_files(folder)


def _check_model(role: str, folder: Path, found: str, needed: str) -> None:
    if found != needed:
        raise FingerprintMismatchError(
            f"the {role} in {folder} has fingerprint {found[:12]}, the index was made for {needed[:12]}: put that one "
            f"there, or export without --include-{role}"
        )


def _model_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Config, weights and tokenizer by name, with those of the folders below (a sentence encoder's pooling)."""
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.rglob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): (path, remembered_digest(path)) for path in paths}


# --- opening ----------------------------------------------------------------------------------------


def read_bundle_manifest(store: Store, version: int | None, keys: Sequence[Path]) -> tuple[Manifest, bool]:
    """A generation's manifest, its signature checked when `keys` are given; and whether it has a signature.

    Raises SignatureError for a manifest that is not signed with one of `keys`, before anything in it is believed.
    """
    manifest = read_manifest(store, version)
    return manifest, check_signed(store, manifest, keys)


def check_signed(store: Store, manifest: Manifest, keys: Sequence[Path]) -> bool:
    """Whether a generation has a signature; with `keys` it must, made with one of them, else SignatureError."""
    name = signature_name(manifest.version)
    signature = store.read(name) if store.exists(name) else None
    if keys:  # a manifest's bytes follow from what it says, so that these are the ones that were read
        check_signature(encode_manifest(manifest), signature, keys, where=f"{store.location}/{manifest.name}")
    return signature is not None


def check_files(store: Store, manifest: Manifest, *, jobs: int = DEFAULT_JOBS, meter: Meter = SILENT) -> None:
    """Compare every file of a generation with its digest, which also brings it into the page cache.

    Raises CorruptIndexError that names what is damaged, or lies among a bundle's models without being of them.
    """

    def check(record: FileRecord) -> str | None:
        whole = is_whole(store.path(record.name), record)
        meter.advance(record.bytes)
        return None if whole else record.name

    meter.expect(sum(record.bytes for record in manifest.files.values()))
    damaged = [name for name in in_parallel(check, manifest.files.values(), jobs) if name is not None]
    if damaged:
        shown = ", ".join(damaged[:_SHOWN_PROBLEMS]) + (", …" if len(damaged) > _SHOWN_PROBLEMS else "")
        remedy = "pull the bundle again" if manifest.bundle is not None else "run `refrag index repair`"
        raise CorruptIndexError(
            f"{len(damaged)} of {len(manifest.files)} files of {store.location}/{manifest.name} are missing or do not "
            f"have the bytes that it lists ({shown}): nothing of it is used; {remedy}"
        )
    _refuse_strangers(store, manifest)


def _refuse_strangers(store: Store, manifest: Manifest) -> None:
    """Raise CorruptIndexError for a file that a model or checkpoint would be read with, and no digest vouches for."""
    info = manifest.bundle
    folders = () if info is None else (manifest.checkpoint.folder, info.decoder, info.retriever)
    for folder in filter(None, folders):
        root = store.folder(folder)
        for path in root.rglob("*"):
            name = f"{folder}/{path.relative_to(root).as_posix()}"
            if not path.is_dir() and name not in manifest.files:
                raise CorruptIndexError(
                    f"{path} is none of the files that {manifest.name} lists, and lies where a model would be read "
                    "with it: nothing of this bundle is used; remove that file"
                )


def open_bundle(
    root: Path,
    *,
    version: int | None = None,
    verify_keys: Sequence[Path] = (),
    jobs: int = DEFAULT_JOBS,
    meter: Meter = SILENT,
) -> OpenReport:
    """Check every byte of a bundle and warm its pages, so that the first question finds them. Writes nothing.

    Raises UsageError for an index, SignatureError, and CorruptIndexError for anything that is not as exported.
    """
    from refrag_core.index_reader import IndexReader

    store = FolderStore(root)
    check_bundles(store)
    manifest, signed = read_bundle_manifest(store, version, verify_keys)
    started = time.perf_counter()
    check_files(store, manifest, jobs=jobs, meter=meter)
    verified = time.perf_counter()
    IndexReader(root, manifest.version).map_all()
    mapped = time.perf_counter()
    size = sum(record.bytes for record in manifest.files.values())
    return OpenReport(
        version=manifest.version,
        content_id=manifest.content_id,
        build_id=manifest.build_id,
        signed=signed,
        verified_with=tuple(str(key) for key in verify_keys),
        files=len(manifest.files) + 1,
        bytes=size,
        bytes_by_kind=bytes_by_kind(manifest),
        models=_models(manifest),
        passages=manifest.counts.passages,
        chunks=manifest.counts.chunks,
        verify_seconds=round(verified - started, 4),
        bytes_a_second=round(size / max(verified - started, 1e-9), 1),
        map_seconds=round(mapped - verified, 4),
    )


def _models(manifest: Manifest) -> dict[str, str]:
    info, components = manifest.bundle, manifest.components
    assert info is not None
    return {
        "decoder": info.decoder or components.tokenizer.reference,
        "retriever": info.retriever or components.retriever.reference,
    }
