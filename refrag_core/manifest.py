"""Manifests: what one committed generation of an index consists of (schemas/BUNDLE.md is the spec).

`versions/<n>.json` is written last and only if no file has that name; everything that a reader uses is
named in it with size and digest. Its bytes are canonical JSON and carry their own digest, so that any
altered byte shows.
"""

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

from refrag.schemas import FORMAT, FORMAT_VERSION, manifest_schema
from refrag_core.digests import JSON, canonical_json, digest_json
from refrag_core.embedding_storage import EmbeddingDtype
from refrag_core.errors import CommitConflictError, CorruptIndexError, IndexNotFoundError, UsageError
from refrag_core.holds import Hold
from refrag_core.storage import FileRecord, Store, check_name
from refrag_core.tables import iterate_rows

VERSIONS = "versions"
CURRENT = "CURRENT"
REMOVED = f"{VERSIONS}/removed.json"
"""What gc removed, so that a gap among the versions can be told from a loss."""
RUN_RECORDS = "runs"
CONTENT_FOLDERS = ("shards", "segments", "checkpoints", "quarantine", "tombstones", "duplicates", RUN_RECORDS)
"""Where the files lie that belong to generations; `gc` looks nowhere else."""
VERSION_NAME = re.compile(r"^[1-9][0-9]*\.json$")


@dataclass(frozen=True, slots=True)
class Component:
    """A model that the index was built with: how it was named, and the fingerprint that counts."""

    reference: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Components:
    """The models behind an index's columns; their fingerprints are part of the content id."""

    tokenizer: Component
    encoder: Component
    retriever: Component
    scorer: Component | None


@dataclass(frozen=True, slots=True)
class Parameters:
    """Settings that shape the content of an index."""

    max_passage_tokens: int
    chunk_size: int
    chunk_size_field: str | None
    embedding_dim: int
    embedding_dtype: EmbeddingDtype
    vector_dim: int
    dedup_passages: bool = False
    """Whether a search returns equal passages once: the first, by document id and ordinal."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What is live in a generation."""

    documents: int
    passages: int
    chunks: int
    tokens: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.documents + other.documents,
            self.passages + other.passages,
            self.chunks + other.chunks,
            self.tokens + other.tokens,
        )


NOTHING = Counts(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard's rows, tombstoned ones included, and the files that hold its tables."""

    name: str
    chunk_size: int
    first_document: str
    last_document: str
    documents: int
    passages: int
    chunks: int
    tokens: int
    tables: Mapping[str, str]

    @property
    def counts(self) -> Counts:
        """Rows of this shard."""
        return Counts(self.documents, self.passages, self.chunks, self.tokens)


@dataclass(frozen=True, slots=True)
class Segment:
    """One FAISS file: the passages of `shards`, one after another, `rows` in all."""

    file: str
    shards: Sequence[str]
    rows: int


@dataclass(frozen=True, slots=True)
class VectorIndexInfo:
    """How the segments were made and what the recall gate measured."""

    kind: str
    nlist: int
    nprobe: int
    quantizer: str
    recall_at_10: float
    queries: int


@dataclass(frozen=True, slots=True)
class QuarantineInfo:
    """Where the records lie that are not in the index, and how many for each reason."""

    file: str | None
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TombstoneInfo:
    """Where the removed documents of kept shards are listed."""

    file: str
    documents: int
    passages: int


@dataclass(frozen=True, slots=True)
class DuplicateInfo:
    """Where the live passages are listed that equal an earlier one and stay out of search."""

    file: str
    passages: int


@dataclass(frozen=True, slots=True)
class LanceTable:
    """One LanceDB table and the version of it that is this generation's."""

    folder: str
    version: int
    manifest: str
    """Name of the version's own manifest file."""


@dataclass(frozen=True, slots=True)
class LanceInfo:
    """The LanceDB tables of a generation."""

    shards: Sequence[str]
    """The shard behind each fragment, in the order of the fragments; the same in every table."""
    tables: Mapping[str, LanceTable]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """The folder that holds the projection, the policy and the prompt template."""

    folder: str
    fingerprint: str
    trained: bool


@dataclass(frozen=True, slots=True)
class ParentInfo:
    """The generation that this one was built on."""

    version: int
    build_id: str


@dataclass(frozen=True, slots=True)
class Change:
    """How a generation came from its parent, for people; no id depends on it."""

    action: str
    """`build`, `compact`, `repair` or `rollback`."""
    new: int = 0
    """Documents that the parent did not have."""
    changed: int = 0
    deleted: int = 0
    version: int | None = None
    """Of a rollback: the generation whose content this one has again."""


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """What only the manifest of a bundle has: where it came from, and the models that travel with it."""

    source_build_id: str
    """Build id of the index's generation that was exported."""
    decoder: str | None
    """Folder of the decoder below the bundle; None: by the checkpoint's reference."""
    retriever: str | None
    """Folder of the retriever below the bundle; None: by the reference in `components`."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One generation. `files` is the only place with sizes and digests."""

    version: int
    parent: ParentInfo | None
    content_id: str
    components: Components
    parameters: Parameters
    counts: Counts
    shards: Sequence[Shard]
    segments: Sequence[Segment]
    vector_index: VectorIndexInfo
    quarantine: QuarantineInfo
    tombstones: TombstoneInfo | None
    checkpoint: CheckpointInfo
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    change: Change | None = None
    duplicates: DuplicateInfo | None = None
    lance: LanceInfo | None = None
    """None for an index whose only tables are the Parquet shards."""
    bundle: BundleInfo | None = None
    """None for an index's own generation."""

    @property
    def build_id(self) -> str:
        """Digest of the parent, the content id and the digests of every file; names the generation."""
        parent = self.parent.build_id if self.parent else None
        digests: dict[str, JSON] = {name: record.digest for name, record in self.files.items()}
        return digest_json({"parent": parent, "content_id": self.content_id, "files": digests})

    @property
    def name(self) -> str:
        """Name of its file below the index."""
        return version_name(self.version)


def version_name(version: int) -> str:
    """Name of the manifest of generation `version`."""
    return f"{VERSIONS}/{version}.json"


def signature_name(version: int) -> str:
    """Name of the signature of generation `version`, where a bundle has one."""
    return f"{version_name(version)}.sig"


def run_record_name(version: int) -> str:
    """Name of the record of the run that made generation `version`: rates and times, no part of the generation."""
    return f"{RUN_RECORDS}/{version}.json"


def beside(version: int) -> tuple[str, ...]:
    """Names that belong to generation `version` without being listed in its manifest, itself included."""
    return version_name(version), signature_name(version), run_record_name(version)


def _to_json(manifest: Manifest) -> dict[str, Any]:
    body = asdict(manifest)
    body["parameters"] = _parameters(manifest.parameters)
    for member in ("change", "duplicates"):  # absent where there is nothing to say
        if body[member] is None:
            del body[member]
    body["files"] = {r.name: {"bytes": r.bytes, "digest": r.digest} for r in manifest.files.values()}
    body |= {"format": FORMAT, "format_version": FORMAT_VERSION, "build_id": manifest.build_id}
    if manifest.bundle is None:
        del body["bundle"]
    return body


def _parameters(parameters: Parameters) -> dict[str, JSON]:
    """The parameters as JSON; a switch that is off is left out, so that ids from before it stay what they were."""
    body: dict[str, JSON] = asdict(parameters)
    if not parameters.dedup_passages:
        del body["dedup_passages"]
    return body


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `versions/<n>.json`: canonical JSON, its own digest included, and a newline."""
    body = _to_json(manifest)
    return canonical_json(body | {"manifest_digest": digest_json(body)}) + b"\n"


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Check and read the bytes of a manifest; `where` names it in errors.

    Raises CorruptIndexError for altered bytes, another format, or a name that leaves the index.
    """
    body = _parse(data, where)
    if body.get("format") == FORMAT and body.get("format_version", 0) > FORMAT_VERSION:
        raise CorruptIndexError(
            f"{where} has format version {body['format_version']}, this refrag reads up to {FORMAT_VERSION}: "
            "install a newer refrag"
        )
    _check_names(body)
    _check_schema(body, where)
    _check_bytes(body, data, where)
    manifest = _from_json(body)
    if manifest.build_id != body["build_id"]:
        raise CorruptIndexError(f"{where}: its build id is not the digest of what it lists. {_REFETCH}")
    _check_references(manifest, where)
    return manifest


_REFETCH = "It was altered or damaged: fetch the index again, or build it anew with `refrag index build`."


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptIndexError(f"{where} is not JSON. {_REFETCH}") from None
    if not isinstance(body, dict):
        raise CorruptIndexError(f"{where} is not a JSON object. {_REFETCH}")
    return body


def _check_names(body: Mapping[str, Any]) -> None:
    files = body.get("files")
    for name in files if isinstance(files, dict) else ():
        check_name(name)


def _check_schema(body: Mapping[str, Any], where: str) -> None:
    validator = jsonschema.Draft202012Validator(manifest_schema())
    error = jsonschema.exceptions.best_match(validator.iter_errors(body))
    if error is not None:
        raise CorruptIndexError(f"{where} at {error.json_path}: {error.message[:200]}. {_REFETCH}")


def _check_bytes(body: Mapping[str, Any], data: bytes, where: str) -> None:
    rest = {key: value for key, value in body.items() if key != "manifest_digest"}
    if digest_json(rest) != body["manifest_digest"] or canonical_json(dict(body)) + b"\n" != data:
        raise CorruptIndexError(f"{where} does not match its own digest. {_REFETCH}")


def _check_references(manifest: Manifest, where: str) -> None:
    named = {name for shard in manifest.shards for name in shard.tables.values()}
    named |= {segment.file for segment in manifest.segments} | {manifest.vector_index.quantizer}
    lists = (manifest.quarantine, manifest.tombstones, manifest.duplicates)
    named |= {info.file for info in lists if info and info.file}
    named |= {table.manifest for table in manifest.lance.tables.values()} if manifest.lance else set()
    unlisted = sorted(named - set(manifest.files))
    if unlisted:
        raise CorruptIndexError(f"{where} names {unlisted[0]} but lists no digest for it. {_REFETCH}")
    shards = {shard.name for shard in manifest.shards}
    if any(name not in shards for segment in manifest.segments for name in segment.shards):
        raise CorruptIndexError(f"{where} has a segment over a shard that it does not list. {_REFETCH}")


def _from_json(body: Mapping[str, Any]) -> Manifest:
    models: dict[str, Any] = {k: Component(**v) if v else None for k, v in body["components"].items()}
    return Manifest(
        version=body["version"],
        parent=ParentInfo(**body["parent"]) if body["parent"] else None,
        content_id=body["content_id"],
        components=Components(**models),
        parameters=Parameters(**body["parameters"]),
        counts=Counts(**body["counts"]),
        shards=[Shard(**shard) for shard in body["shards"]],
        segments=[Segment(**segment) for segment in body["segments"]],
        vector_index=VectorIndexInfo(**body["vector_index"]),
        quarantine=QuarantineInfo(**body["quarantine"]),
        tombstones=TombstoneInfo(**body["tombstones"]) if body["tombstones"] else None,
        checkpoint=CheckpointInfo(**body["checkpoint"]),
        files={name: FileRecord(name, **record) for name, record in body["files"].items()},
        change=Change(**body["change"]) if "change" in body else None,
        duplicates=DuplicateInfo(**body["duplicates"]) if "duplicates" in body else None,
        lance=_lance_from_json(body.get("lance")),
        bundle=BundleInfo(**body["bundle"]) if "bundle" in body else None,
    )


def _lance_from_json(body: Mapping[str, Any] | None) -> LanceInfo | None:
    if body is None:
        return None
    return LanceInfo(body["shards"], {name: LanceTable(**table) for name, table in body["tables"].items()})


def list_versions(store: Store) -> list[int]:
    """Numbers of the committed generations, ascending."""
    names = store.list(VERSIONS)
    return sorted(int(name.removesuffix(".json")) for name in names if VERSION_NAME.match(name))


def read_manifest(store: Store, version: int | None = None) -> Manifest:
    """The manifest of generation `version`, the newest by default.

    Raises IndexNotFoundError where nothing is committed and CorruptIndexError for an altered manifest.
    """
    versions = list_versions(store)
    if not versions or (version is not None and version not in versions):
        raise _not_found(store, version, versions)
    name = version_name(versions[-1] if version is None else version)
    where = f"{store.location}/{name}"
    manifest = decode_manifest(store.read(name), where=where)
    if manifest.name != name:
        raise CorruptIndexError(f"{where} is the manifest of version {manifest.version}. {_REFETCH}")
    store.expect(manifest.files.values())
    return manifest


def _not_found(store: Store, version: int | None, versions: Sequence[int]) -> IndexNotFoundError:
    """What to say of an index without generations, or of one that lacks this one."""
    if version is not None and versions:
        return IndexNotFoundError(
            f"{store.location} holds no generation {version}: expected generation {version} under {VERSIONS}/, where "
            f"the newest is {versions[-1]}; `refrag index log {store.location}` lists all that there are and were"
        )
    wanted = "a committed generation" if version is None else f"generation {version}"
    return IndexNotFoundError(
        f"{store.location} holds no {wanted.removeprefix('a ')}: expected {wanted} under {VERSIONS}/; "
        f"build one with `refrag index build CORPUS -o {store.location}`"
    )


def hold_manifest(store: Store, version: int | None = None) -> tuple[Manifest, Hold]:
    """What `read_manifest` gives, and a claim on that generation: while it lasts, `gc` spares all that it names.

    Raises as `read_manifest` does, and IndexNotFoundError for a generation that is being removed.
    """
    while True:
        number = read_manifest(store).version if version is None else version
        hold = store.hold(version_name(number))
        if hold is not None:
            return read_manifest(store, number), hold
        if read_manifest(store, version).version == number:
            raise IndexNotFoundError(
                f"generation {number} of {store.location} is being removed by gc: expected one that stays; "
                f"`refrag index log {store.location}` lists them"
            )


def latest_manifest(store: Store) -> Manifest | None:
    """The newest generation, or None for a new index."""
    return read_manifest(store) if list_versions(store) else None


def refuse_bundle(store: Store) -> None:
    """Raise UsageError where the newest generation is a bundle's, which lacks what a build starts from."""
    try:
        latest = latest_manifest(store)
    except CorruptIndexError:
        return  # which is for whoever reads it next to say, or to repair
    if latest is not None and latest.bundle is not None:
        raise UsageError(
            f"{store.location} is a bundle, expected an index: change the index that it was exported from and export "
            "it again, or pull the bundle again to mend it"
        )


def commit(store: Store, manifest: Manifest) -> None:
    """Make `manifest` the next generation: create its file if that version is free.

    Raises CommitConflictError, leaving the winner's generation as it is, when another builder was first.
    """
    if not store.create(manifest.name, encode_manifest(manifest)):
        raise CommitConflictError(
            f"another build committed version {manifest.version} of {store.location} while this one ran: "
            "nothing of this one was committed; run the command again, what is already encoded is reused"
        )
    store.replace(CURRENT, _hint(manifest.version))


def finish_commit(store: Store, newest: Manifest) -> None:
    """Let CURRENT name the newest generation where the builder that committed it died before it could."""
    if not store.exists(CURRENT) or store.read(CURRENT) == _hint(newest.version - 1):
        store.replace(CURRENT, _hint(newest.version))


def _hint(version: int) -> bytes:
    return f"{version}\n".encode()


@dataclass(frozen=True, slots=True)
class LiveDocument:
    """A document of a generation and where its rows are."""

    document_id: str
    source_digest: bytes
    content_digest: bytes
    chunk_size: int
    shard: str
    row: int
    first_passage: int
    num_passages: int
    num_chunks: int
    num_tokens: int
    first_chunk: int = 0


def read_tombstones(store: Store, manifest: Manifest) -> dict[str, list[tuple[int, int, int]]]:
    """Removed documents of each shard: `(document row, first passage row, number of passages)`."""
    removed: dict[str, list[tuple[int, int, int]]] = {}
    if manifest.tombstones is None:
        return removed
    for row in iterate_rows(store.path(manifest.tombstones.file)):
        entry = (row["document"], row["first_passage"], row["num_passages"])
        removed.setdefault(row["shard"], []).append(entry)
    return removed


def read_duplicates(store: Store, manifest: Manifest) -> dict[str, list[int]]:
    """Rows of the passages of each shard that equal an earlier one and stay out of search."""
    hidden: dict[str, list[int]] = {}
    if manifest.duplicates is not None:
        for row in iterate_rows(store.path(manifest.duplicates.file), ("shard", "passage")):
            hidden.setdefault(row["shard"], []).append(row["passage"])
    return hidden


_DOCUMENT_COLUMNS = (
    "document_id", "source_digest", "content_digest", "chunk_size", "num_passages", "num_chunks", "num_tokens",
)  # fmt: skip


def _shard_documents(store: Store, shard: Shard, removed: Iterable[int]) -> Iterator[LiveDocument]:
    skip = set(removed)
    first_passage = first_chunk = 0
    for row, entry in enumerate(iterate_rows(store.path(shard.tables["documents"]), _DOCUMENT_COLUMNS)):
        if row not in skip:
            yield LiveDocument(shard=shard.name, row=row, first_passage=first_passage, first_chunk=first_chunk, **entry)
        first_passage += entry["num_passages"]
        first_chunk += entry["num_chunks"]


def document_key(document_id: str) -> bytes:
    """Sort key of a document id: its UTF-8 bytes, the order of all tables."""
    return document_id.encode("utf-8")


def live_documents(store: Store, manifest: Manifest) -> Iterator[LiveDocument]:
    """All live documents of a generation ordered by id."""
    yield from documents_of(store, manifest.shards, read_tombstones(store, manifest))


def documents_of(
    store: Store, shards: Sequence[Shard], removed: Mapping[str, Sequence[tuple[int, int, int]]]
) -> Iterator[LiveDocument]:
    """The documents of `shards` that are not `removed`, ordered by id.

    A shard's table is open only while its range of ids is passed.
    """
    store.fetch(shard.tables["documents"] for shard in shards)
    heap: list[tuple[bytes, int, LiveDocument | None, Iterator[LiveDocument]]] = []
    for number, shard in enumerate(shards):
        rows = _shard_documents(store, shard, (entry[0] for entry in removed.get(shard.name, ())))
        heap.append((document_key(shard.first_document), number, None, rows))
    heapq.heapify(heap)
    while heap:
        _, number, document, rows = heap[0]
        if document is not None:
            yield document
        following = next(rows, None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (document_key(following.document_id), number, following, rows))


def content_id(documents: Iterable[tuple[str, bytes]], components: Components, parameters: Parameters) -> str:
    """Digest of an index's logical content: `(document id, content digest)` in order of the ids.

    Independent of engine, table format, worker count, shard boundaries and history.
    """
    hasher = content_hasher(components, parameters)
    for document_id, digest in documents:
        hasher.update(encode_document(document_id, digest))
    return hasher.hexdigest()


def content_hasher(components: Components, parameters: Parameters) -> "hashlib._Hash":
    """What `content_id` starts from; `encode_document` of every document follows."""
    models = {k: v["fingerprint"] if v else None for k, v in asdict(components).items()}
    header: dict[str, JSON] = {
        "format_version": FORMAT_VERSION,
        "components": models,
        "parameters": _parameters(parameters),
    }
    return hashlib.sha256(canonical_json(header))


def encode_document(document_id: str, content_digest: bytes) -> bytes:
    """What a document adds to the content id: the length of its key in 8 bytes, its key, its digest."""
    key = document_key(document_id)
    return len(key).to_bytes(8, "little") + key + content_digest


def manifest_path(root: Path, version: int) -> Path:
    """Path of the manifest of generation `version` of the index at `root`."""
    return root / version_name(version)


def bytes_by_kind(manifest: Manifest) -> dict[str, int]:
    """Bytes of a generation's files by what they hold: a table's name, segments, checkpoint, models …"""
    kinds = dict(_kinds(manifest))
    sizes: dict[str, int] = {}
    for record in manifest.files.values():
        kind = kinds.get(record.name) or record.name.split("/", 1)[0]
        sizes[kind] = sizes.get(kind, 0) + record.bytes
    return dict(sorted(sizes.items()))


def _kinds(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    for shard in manifest.shards:
        yield from ((name, role) for role, name in shard.tables.items())
    for name in (manifest.vector_index.quantizer, *(segment.file for segment in manifest.segments)):
        yield name, "segments"
    if manifest.tombstones is not None:
        yield manifest.tombstones.file, "tombstones"
