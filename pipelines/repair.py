"""`refrag index repair`: make again what `verify` condemns, and prove that it is what it was.

Stages are pure functions of a shard, so that a damaged table is made anew under the same name. Where the
new bytes have the old digest the generation is whole again; where they cannot (another GPU, say) the repair
ends in a new generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from refrag.pipelines.assembly import publish_duplicates
from refrag.pipelines.build import BuildOptions, build_from, lock_and_clear, store_for
from refrag.pipelines.components import ModelOptions, Models, resolve_models
from refrag.pipelines.duplicates import duplicate_passages
from refrag.pipelines.engines import Engine
from refrag.pipelines.indexing import remake_segment
from refrag.pipelines.progress import Progress
from refrag.pipelines.stages import DeviceStage, committed_shard
from refrag_core import lance_tables
from refrag_core.checkpoint import shipped_checkpoint
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.errors import CorruptIndexError, UsageError
from refrag_core.manifest import (
    CURRENT,
    Change,
    Manifest,
    ParentInfo,
    QuarantineInfo,
    Shard,
    commit,
    list_versions,
    read_manifest,
    read_tombstones,
)
from refrag_core.storage import IndexLocation, Store
from refrag_core.verification import Problem, verify_index

_FROM_CORPUS = ("documents", "passages", "chunks")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairOptions:
    """What `refrag index repair` can be told."""

    index: IndexLocation
    corpus: CorpusOptions | None = None
    checkpoint: str | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did."""

    version: int
    build_id: str
    repaired: tuple[str, ...]
    lost: tuple[str, ...]
    """Files that only older generations name and that could not be made again: no rollback to those."""


def repair_index(options: RepairOptions, engine: Engine, progress: Progress) -> RepairReport:
    """Remove the condemned files and run what made them.

    Raises UsageError when the corpus is needed and was not given, and CorruptIndexError for a damaged manifest,
    which nothing but a copy can bring back.
    """
    store = store_for(engine, options.index)
    with lock_and_clear(store):
        problems = verify_index(store).problems
        manifest = _newest_intact(store, problems)
        condemned = {problem.file for problem in problems}
        if CURRENT in condemned:
            store.replace(CURRENT, f"{manifest.version}\n".encode())
        damaged = condemned & set(manifest.files)
        if damaged:
            _check_corpus(options, manifest, damaged)
            options = replace(options, checkpoint=_checkpoint(store, manifest, damaged, options))
        for name in condemned - damaged - {CURRENT}:
            store.remove(name)  # an older generation's: a build that makes it again must not find its name taken
        if damaged:
            for name in damaged:
                store.remove(name)
            manifest = _make_again(store, manifest, damaged, options, engine, progress)
    problems = verify_index(store).problems
    left = [problem for problem in problems if problem.file in manifest.files]
    if left:
        raise CorruptIndexError(
            f"{left[0].file} is still damaged after the repair ({left[0].found}): expected none; build the index anew "
            f"with `refrag index build CORPUS -o {options.index} --rebuild`"
        )
    lost = {problem.file for problem in problems}
    return RepairReport(manifest.version, manifest.build_id, tuple(sorted(condemned - lost)), tuple(sorted(lost)))


def _newest_intact(store: Store, problems: Sequence[Problem]) -> Manifest:
    broken = sorted(problem.file for problem in problems if problem.file.startswith("versions/"))
    if broken:
        raise CorruptIndexError(
            f"{store.location}/{broken[0]} is damaged or missing, and a manifest cannot be made from what it "
            f"describes: put back a copy of it, or move {store.location} away and build anew"
        )
    return read_manifest(store, list_versions(store)[-1])


def _check_corpus(options: RepairOptions, manifest: Manifest, damaged: set[str]) -> None:
    sources = {shard.tables[table] for shard in manifest.shards for table in _FROM_CORPUS}
    needed = sorted(damaged & sources) or sorted(damaged)
    if (damaged & sources or _needs_build(manifest, damaged)) and options.corpus is None:
        raise UsageError(
            f"{needed[0]} can only be made from the corpus: expected it after the index; run "
            f"`refrag index repair {options.index} CORPUS` with the same --id-field and --text-field as the build"
        )


def _make_again(
    store: Store, manifest: Manifest, damaged: set[str], options: RepairOptions, engine: Engine, progress: Progress
) -> Manifest:
    models = resolve_models(store, _model_options(manifest, options), elsewhere=engine.spans_machines)
    base = _without_lost(manifest, damaged)
    for shard in base.shards:
        for stage in _stages_of(models, shard, damaged):
            progress.note(f"making {stage.table} of shard {shard.name} again")
            stage(store, committed_shard(shard))
    kept = {shard.name for shard in base.shards}
    for shard in manifest.shards:
        if shard.name not in kept:  # its later tables hang on the tokenized ones: all are made again
            for name in shard.tables.values():
                store.remove(name)
    if len(kept) < len(manifest.shards) or _needs_build(manifest, damaged):
        return _rebuilt(store, base, manifest, models, options, engine, progress)
    for segment in manifest.segments:
        if segment.file in damaged:
            remake_segment(store, manifest, segment)
    if manifest.duplicates is not None and manifest.duplicates.file in damaged:
        publish_duplicates(store, duplicate_passages(store, manifest.shards, read_tombstones(store, manifest)))
    return _recorded(store, manifest, lance_lost=base.lance is None and manifest.lance is not None)


def _without_lost(manifest: Manifest, damaged: set[str]) -> Manifest:
    """The manifest without the shards that only the corpus can bring back, and without damaged lists."""
    lost = {shard.name for shard in manifest.shards if damaged & {shard.tables[table] for table in _FROM_CORPUS}}
    if manifest.tombstones is not None and manifest.tombstones.file in damaged:
        # Nothing says any more which rows are dead: no shard can be trusted to be all alive.
        return replace(manifest, shards=[], segments=[], tombstones=None, lance=None)
    lance = None if damaged & set(lance_tables.records_of(manifest)) else manifest.lance
    quarantine = QuarantineInfo(None, {}) if manifest.quarantine.file in damaged else manifest.quarantine
    shards = [shard for shard in manifest.shards if shard.name not in lost]
    trained = manifest.vector_index.quantizer not in damaged and all(s.file not in damaged for s in manifest.segments)
    segments = manifest.segments if trained else []
    return replace(manifest, shards=shards, segments=segments, quarantine=quarantine, lance=lance)


def _needs_build(manifest: Manifest, damaged: set[str]) -> bool:
    lists = [manifest.quarantine.file, manifest.tombstones.file if manifest.tombstones else None]
    return bool(damaged & {name for name in (manifest.vector_index.quantizer, *lists) if name})


def _recorded(store: Store, manifest: Manifest, *, lance_lost: bool) -> Manifest:
    """The manifest itself when all files are what they were, else a new generation with the new digests.

    Lost LanceDB tables are written anew from the shards: Lance never gives a file the same name twice.
    """
    left_out = lance_tables.records_of(manifest) if lance_lost else {}
    files = {name: store.record(name) for name in manifest.files if name not in left_out}
    if files == dict(manifest.files):
        return manifest
    parent = ParentInfo(manifest.version, manifest.build_id)
    changed = replace(manifest, version=manifest.version + 1, parent=parent, files=files, change=Change("repair"))
    if lance_lost:
        changed = lance_tables.with_lance(store, replace(changed, lance=None), None)
    commit(store, changed)
    return changed


def _checkpoint(store: Store, manifest: Manifest, damaged: set[str], options: RepairOptions) -> str | None:
    """The checkpoint to repair with; None for one that was never trained, which is made anew.

    Raises UsageError where a trained one is damaged, and is not the one that comes with refrag.
    """
    own = manifest.checkpoint
    if options.checkpoint is not None or not own.trained:
        return options.checkpoint
    if not any(name.startswith(f"{own.folder}/") for name in damaged):
        return str(store.folder(own.folder))
    shipped = shipped_checkpoint(manifest.components.tokenizer.reference)
    if shipped is not None and shipped.fingerprint == own.fingerprint:
        return str(shipped.folder)
    raise UsageError(
        f"{own.folder} is damaged, and no corpus brings trained weights back: expected the checkpoint that the index "
        f"was built with; name its folder with --checkpoint"
    )


def _model_options(manifest: Manifest, options: RepairOptions) -> ModelOptions:
    components = manifest.components
    return ModelOptions(
        checkpoint=options.checkpoint,
        encoder=None if options.checkpoint else components.encoder.reference,
        decoder=None if options.checkpoint else components.tokenizer.reference,
        retriever=components.retriever.reference,
        chunk_size=manifest.parameters.chunk_size,
        chunk_size_field=manifest.parameters.chunk_size_field,
        max_passage_tokens=manifest.parameters.max_passage_tokens,
        embedding_dtype=manifest.parameters.embedding_dtype,
        device=options.device,
    )


def _stages_of(models: Models, shard: Shard, damaged: set[str]) -> list[DeviceStage]:
    stages = models.stages(score="scores" in shard.tables).device
    return [stage for stage in stages if shard.tables[stage.table] in damaged]


def _rebuilt(
    store: Store,
    base: Manifest,
    latest: Manifest,
    models: Models,
    options: RepairOptions,
    engine: Engine,
    progress: Progress,
) -> Manifest:
    """Bring back the lost shards by a build on top of the intact ones."""
    if options.corpus is None:
        raise UsageError(
            f"the index needs its corpus to be repaired: run `refrag index repair {options.index} CORPUS` with the "
            "same --id-field and --text-field as the build"
        )
    corpus = replace(options.corpus, chunk_size_field=base.parameters.chunk_size_field)
    build = BuildOptions(corpus=corpus, output=options.index, models=_model_options(latest, options))
    build_from(build, engine, progress, store=store, models=models, latest=latest, parent=base)
    return read_manifest(store)
