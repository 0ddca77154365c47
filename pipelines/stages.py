"""The stages of a build: pure functions from one shard to one receipt.

Each reads its input, computes, publishes tables under names that follow from input and fingerprint, and
returns a receipt. Retries, duplicates and kills are therefore harmless, and engines need only map. Models
are loaded once a process, on first use.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refrag.pipelines.plan import Row, ShardSpec, read_specified
from refrag.pipelines.receipts import Receipt, Rejected, find_receipt, write_receipt
from refrag.schemas import arrow
from refrag_core.batching import is_out_of_memory
from refrag_core.chunking import (
    ChunkingOptions,
    TokenizedText,
    chunk_rows,
    content_digest,
    cut_passages,
    passage_id,
    tokenize_documents,
)
from refrag_core.corpus.document import Document, RejectReason
from refrag_core.corpus.readers import read_documents
from refrag_core.devices import resolve_device
from refrag_core.digests import JSON, canonical_json, digest_json
from refrag_core.embedding_storage import EmbeddingDtype, Int8Rows, store_rows
from refrag_core.errors import RefragError, StageError
from refrag_core.manifest import Shard
from refrag_core.parts import collected, part
from refrag_core.storage import FileRecord, Store, open_store
from refrag_core.tables import PASSAGE_ROWS_A_GROUP, MappedColumn, fixed_binary, open_table, write_table

CHECKPOINTS = "checkpoints"
"""Folder of an index with the checkpoints of its generations."""

_DOCUMENTS_A_BATCH = 256
_CHECKED_ROWS = 4096
_EXPONENT = 0x7C00  # of a float16

_LOADING = threading.Lock()
"""Two threads that want a model at once load it once."""

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class TokenizedShard:
    """A shard with its documents, passages and chunks written: the input of the later stages."""

    name: str
    chunk_size: int
    tables: Mapping[str, str]
    passages: int
    chunks: int


class DeviceStage(Protocol):
    """A stage over tokenized shards: encode, embed or score."""

    @property
    def table(self) -> str:
        """Name of the table that it makes."""

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides its output but the shard."""

    @property
    def device(self) -> str:
        """Where it runs; `auto` is for each worker to say."""

    def load(self) -> Any:
        """The model, loaded once a process."""

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:
        """Make the table of one shard, or take over the one that is there."""


def _stage_key(fingerprint: str, *inputs: JSON) -> str:
    return digest_json([fingerprint, *inputs])[:32]


def table_name(shard: str, table: str, fingerprint: str) -> str:
    """Where a device stage with this fingerprint puts its table of a shard."""
    return f"shards/{shard}/{table}-{_stage_key(fingerprint, shard)[:16]}.parquet"


def isolate(run: Callable[[Sequence[Item]], Made], items: Sequence[Item]) -> tuple[Made | None, dict[int, Exception]]:
    """Run over all items at once; when that raises, find the items that raise by themselves.

    Returns the result for all items, or None and the failures by position. An error that is not some
    items' fault (all of them fail, or none alone) and running out of memory are raised as they are.
    """
    try:
        return run(items), {}
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (RefragError, OSError)):
            raise
        failures = {i: failure for i, item in enumerate(items) if (failure := _failure(run, item))}
        if not failures or (len(failures) == len(items) > 1):
            raise
        return None, failures


def _failure(run: Callable[[Sequence[Item]], Any], item: Item) -> Exception | None:
    try:
        run([item])
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (RefragError, OSError)):
            raise
        return error
    return None


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


# --- tokenize ---------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _checked(kind: str, reference: str, folder: str, fingerprint: str) -> str:
    """The folder of a model on this machine, once it is known to be the driver's: checked once a process."""
    from refrag_core import models

    path = models.model_on_this_machine(reference, folder)
    models.check_fingerprint(kind, path, fingerprint_of(kind, path), fingerprint)
    return str(path)


def fingerprint_of(kind: str, path: Path) -> str:
    """Of what a stage reads of a `tokenizer`, `retriever` or `decoder` in this folder."""
    from refrag_core.models import fingerprint_model, fingerprint_tokenizer

    if kind == "retriever":
        from refrag_core.retriever import retriever_fingerprint

        return retriever_fingerprint(path)
    return fingerprint_tokenizer(path) if kind == "tokenizer" else fingerprint_model(path)


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    from refrag_core.models import load_tokenizer

    return load_tokenizer(Path(path))


class _TokenizedColumns:
    """The columns of a shard's documents, passages and chunks while they are filled."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.documents: list[dict[str, Any]] = []
        self.passages: list[dict[str, Any]] = []
        self.tokens: list[npt.NDArray[np.int32]] = []
        self.num_tokens: list[npt.NDArray[np.int16]] = []
        self.num_chunks = 0

    def add(self, row: Mapping[str, Any], document: Document, tokens: TokenizedText, options: ChunkingOptions) -> None:
        """Append one document with its passages and chunks."""
        metadata = canonical_json(dict(document.metadata)).decode()
        passages = cut_passages(document.text, tokens, options)
        seen: dict[str, int] = {}
        first_passage, first_chunk, ids = len(self.passages), self.num_chunks, []
        for passage in passages:
            occurrence = seen[passage.text] = seen.get(passage.text, -1) + 1
            ids.append(passage_id(document.document_id, passage.text, occurrence))
            self._add_passage(document, metadata, passage, ids[-1], tokens.ids[passage.token_start : passage.token_end])
        digest = content_digest(
            document_id=document.document_id,
            metadata=dict(document.metadata),
            chunk_size=self.chunk_size,
            passages=[
                (i, p.char_start, p.char_end, tokens.ids[p.token_start : p.token_end])
                for i, p in zip(ids, passages, strict=True)
            ],
        )
        self.documents.append(
            {
                "document_id": document.document_id,
                "source_digest": row["source_digest"],
                "content_digest": digest,
                "source": document.source,
                "chunk_size": self.chunk_size,
                "num_passages": len(self.passages) - first_passage,
                "num_chunks": self.num_chunks - first_chunk,
                "num_tokens": sum(p["num_tokens"] for p in self.passages[first_passage:]),
                "metadata": metadata,
            }
        )

    def _add_passage(
        self, document: Document, metadata: str, passage: Any, identity: bytes, ids: npt.NDArray[np.int32]
    ) -> None:
        tokens, num_tokens = chunk_rows(ids, self.chunk_size)
        self.passages.append(
            {
                "passage_id": identity,
                "document_id": document.document_id,
                "ordinal": passage.ordinal,
                "char_start": passage.char_start,
                "char_end": passage.char_end,
                "num_tokens": len(ids),
                "first_chunk": self.num_chunks,
                "num_chunks": len(tokens),
                "text": passage.text,
                "metadata": metadata,
            }
        )
        self.tokens.append(tokens)
        self.num_tokens.append(num_tokens)
        self.num_chunks += len(tokens)

    def tables(self) -> dict[str, pa.Table]:
        """The three tables, in the schemas of refrag.schemas.arrow."""
        counts = [len(rows) for rows in self.num_tokens]
        tokens = np.concatenate([np.empty((0, self.chunk_size), np.int32), *self.tokens]).astype("<i4")
        num_tokens = np.concatenate([np.empty(0, np.int16), *self.num_tokens]).astype(np.int16)
        ordinals = np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in counts)])
        chunks = [
            pa.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts)),
            pa.array(ordinals),
            pa.array(num_tokens),
            fixed_binary(tokens),
        ]
        return {
            "documents": pa.Table.from_pylist(self.documents, schema=arrow.DOCUMENTS),
            "passages": pa.Table.from_pylist(self.passages, schema=arrow.PASSAGES),
            "chunks": pa.Table.from_arrays(chunks, schema=arrow.chunks(self.chunk_size)),
        }


@dataclass(frozen=True, slots=True)
class TokenizeStage:
    """Documents → passages and chunk tokens, on the CPU."""

    tokenizer: str
    """Folder of the decoder's tokenizer, where the driver found it."""
    tokenizer_fingerprint: str
    max_passage_tokens: int
    reference: str = ""
    """The decoder's, for machines that have no such folder."""

    def load(self) -> Any:
        """The tokenizer, loaded once a process.

        Raises ModelNotFoundError and FingerprintMismatchError where this machine has none, or another one.
        """
        return _tokenizer(_checked("tokenizer", self.reference, self.tokenizer, self.tokenizer_fingerprint))

    @property
    def fingerprint(self) -> str:
        """Digest of tokenizer and chunking."""
        return digest_json(["tokenize/1", self.tokenizer_fingerprint, self.max_passage_tokens])

    def key(self, spec: ShardSpec) -> str:
        """Name of the tokenized shard."""
        return _stage_key(self.fingerprint, spec.name, spec.chunk_size)

    def __call__(self, store: Store, spec: ShardSpec) -> Receipt:
        """Write the documents, passages and chunks of one shard."""
        key = self.key(spec)
        if (receipt := find_receipt(store, "tokenize", key)) is not None:
            return receipt
        started = time.perf_counter()
        columns, rejected = self._columns(spec)
        files = {
            name: store.publish(f"shards/{key}/{name}.parquet", table_writer(name, table))
            for name, table in columns.tables().items()
        }
        receipt = Receipt(
            stage="tokenize",
            key=key,
            shard=key,
            files=files,
            rows=_rows(columns),
            seconds=time.perf_counter() - started,
            rejected=tuple(rejected),
            facts=_facts(columns),
        )
        write_receipt(store, receipt)
        return receipt

    def _columns(self, spec: ShardSpec) -> tuple[_TokenizedColumns, list[Rejected]]:
        columns, rejected = _TokenizedColumns(spec.chunk_size), []
        rows = read_specified(spec)
        documents = zip(rows, read_documents(rows), strict=True)
        for batch in _batches(documents, _DOCUMENTS_A_BATCH):
            rejected += self._tokenize(batch, columns)
        return columns, rejected

    def _tokenize(self, batch: list[tuple[Row, Document]], columns: _TokenizedColumns) -> list[Rejected]:
        def run(pairs: Sequence[tuple[Row, Document]]) -> list[TokenizedText]:
            return tokenize_documents([document.text for _, document in pairs], self.load())

        options = ChunkingOptions(chunk_size=columns.chunk_size, max_passage_tokens=self.max_passage_tokens)
        tokenized, failures = isolate(run, batch)
        if tokenized is None:
            batch, failed = [p for i, p in enumerate(batch) if i not in failures], batch
            tokenized = run(batch)
            rejected = [_rejection(failed[i][0], RejectReason.TOKENIZE_FAILED, e) for i, e in failures.items()]
        else:
            rejected = []
        for (row, document), tokens in zip(batch, tokenized, strict=True):
            columns.add(row, document, tokens, options)
        return rejected


def _rejection(row: Mapping[str, Any], reason: str, error: Exception) -> Rejected:
    detail = f"{type(error).__name__}: {error}"[:500]
    return Rejected(row["document_id"], row["source_digest"].hex(), row["source"], str(reason), detail)


def table_writer(name: str, table: pa.Table) -> Callable[[Path], None]:
    """What writes the table `name` of a shard: passages in row groups, all others in one."""
    rows = PASSAGE_ROWS_A_GROUP if name == "passages" else None
    return lambda path: write_table(path, table, rows_a_group=rows)


def _rows(columns: _TokenizedColumns) -> dict[str, int]:
    return {
        "documents": len(columns.documents),
        "passages": len(columns.passages),
        "chunks": columns.num_chunks,
        "tokens": sum(document["num_tokens"] for document in columns.documents),
    }


def _facts(columns: _TokenizedColumns) -> dict[str, Any]:
    ids = [document["document_id"] for document in columns.documents]
    return {
        "chunk_size": columns.chunk_size,
        "first_document": ids[0] if ids else "",
        "last_document": ids[-1] if ids else "",
    }


def tokenized_shard(receipt: Receipt) -> TokenizedShard:
    """The later stages' input, from the receipt of the tokenize stage."""
    tables = {name: record.name for name, record in receipt.files.items()}
    return TokenizedShard(
        receipt.shard, receipt.facts["chunk_size"], tables, receipt.rows["passages"], receipt.rows["chunks"]
    )


def committed_shard(shard: Shard) -> TokenizedShard:
    """The later stages' input, from a shard of a committed generation."""
    tables = {name: shard.tables[name] for name in ("documents", "passages", "chunks")}
    return TokenizedShard(shard.name, shard.chunk_size, tables, shard.passages, shard.chunks)


# --- encode, embed, score ---------------------------------------------------------------------------


def _make_table(
    store: Store,
    shard: TokenizedShard,
    *,
    table: str,
    fingerprint: str,
    make: Callable[[], tuple[pa.Table | None, Sequence[Rejected], dict[str, Any]]],
) -> Receipt:
    """Run `make` for one table of a shard unless its receipt is there; publish, and write the receipt.

    `make` returns the table, or None and the documents that must leave the shard first.
    """
    key = _stage_key(fingerprint, shard.name)
    if (receipt := find_receipt(store, table, key)) is not None:
        return receipt
    started = time.perf_counter()
    files: dict[str, FileRecord] = {}
    with collected() as parts:
        made, rejected, facts = make()
        if made is not None:
            name = table_name(shard.name, table, fingerprint)
            with part("write"):
                files[table] = store.publish(name, lambda path: write_table(path, made))
    receipt = Receipt(
        stage=table,
        key=key,
        shard=shard.name,
        files=files,
        rows={table: 0 if made is None else made.num_rows},
        seconds=time.perf_counter() - started,
        rejected=tuple(rejected),
        facts=facts,
        parts={name: round(seconds, 6) for name, seconds in parts.items()},
    )
    if made is not None:  # rejected documents leave the shard, and their shard gets another name
        write_receipt(store, receipt)
    return receipt


@lru_cache(maxsize=1)
def _encoder(checkpoint: str, device: str) -> Any:
    from refrag_core.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint).load_encoder(device=resolve_device(device))


@lru_cache(maxsize=2)
def _stored_checkpoint(index: str, name: str) -> str:
    """Folder of an index's checkpoint on this machine; where the index is a URI, the copy of all its files."""
    return str(open_store(index).folder(f"{CHECKPOINTS}/{name}"))


@lru_cache(maxsize=1)
def _retriever(folder: str, device: str) -> Any:
    from refrag_core.retriever import load_retriever

    return load_retriever(Path(folder), device=resolve_device(device))


def _documents_of_passages(store: Store, shard: TokenizedShard) -> list[str]:
    with open_table(store.path(shard.tables["passages"])) as file:
        return list(file.read(columns=["document_id"]).column(0).to_pylist())


def _document_ranges(store: Store, shard: TokenizedShard, column: str) -> dict[str, slice]:
    """Rows of each document in a table with `column` (`num_chunks` or `num_passages`) rows a document."""
    with open_table(store.path(shard.tables["documents"])) as file:
        rows = file.read(columns=["document_id", column]).to_pydict()
    bounds = [0, *accumulate(rows[column])]
    spans = zip(rows["document_id"], bounds[:-1], bounds[1:], strict=True)
    return {document: slice(start, stop) for document, start, stop in spans}


def _reject_documents(
    store: Store, shard: TokenizedShard, failures: Mapping[str, Exception], reason: str
) -> list[Rejected]:
    with open_table(store.path(shard.tables["documents"])) as file:
        rows = file.read(columns=["document_id", "source_digest", "source"]).to_pylist()
    return [_rejection(row, reason, failures[row["document_id"]]) for row in rows if row["document_id"] in failures]


def _by_document(
    store: Store,
    shard: TokenizedShard,
    column: str,
    compute: Callable[[slice], npt.NDArray[Any]],
    num_rows: int,
) -> tuple[npt.NDArray[Any] | None, dict[str, Exception]]:
    """Compute all rows of a shard at once; on a failure or non-finite rows, name the documents at fault."""
    with part("read"):
        ranges = _document_ranges(store, shard, column)
    ids = list(ranges)

    def run(documents: Sequence[str]) -> npt.NDArray[Any]:
        if len(documents) == len(ids):
            return compute(slice(0, num_rows))
        return np.concatenate([compute(ranges[document]) for document in documents])

    made, failures = isolate(run, ids)
    if made is None:
        return None, {ids[i]: error for i, error in failures.items()}
    with part("check"):
        if _all_finite(made):
            return made, {}
    broken = ~np.isfinite(made.reshape(len(made), -1)).all(axis=1)
    at_fault = {d: ValueError("the model's output is not finite") for d, rows in ranges.items() if broken[rows].any()}
    if len(at_fault) == len(ids) > 1:
        raise StageError(
            f"shard {shard.name}: the model's output is not finite for any of {len(ids)} documents, expected "
            "finite numbers: check the checkpoint, or run with --device cpu"
        )
    return None, dict(at_fault)


def _all_finite(made: npt.NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite: in float16 one whose exponent has all bits set, which a CPU finds some
    twenty times as fast as by converting it."""
    blocks = (made[start : start + _CHECKED_ROWS] for start in range(0, len(made), _CHECKED_ROWS))
    if made.dtype != np.float16:
        return all(bool(np.isfinite(rows).all()) for rows in blocks)
    return all(int((rows.view(np.uint16) & _EXPONENT).max(initial=0)) < _EXPONENT for rows in blocks)


@dataclass(frozen=True, slots=True)
class EncodeStage:
    """Chunk tokens → chunk embeddings `[chunks, d_enc]`, float16 or int8 with a scale a row."""

    checkpoint: str
    """Folder of the checkpoint."""
    encode_fingerprint: str
    device: str
    """`auto` is for each worker to say."""
    dtype: EmbeddingDtype = "float16"
    table: str = "embeddings"
    index: str = ""
    """Path or URI of the index that holds the checkpoint, for machines that have no such folder."""

    @property
    def fingerprint(self) -> str:
        """Digest of encoder weights, embedding form, pooling and dtype."""
        stored = [] if self.dtype == "float16" else [self.dtype]
        return digest_json(["encode/1", self.encode_fingerprint, *stored])

    def load(self) -> Any:
        """The encoder with its weights, loaded once a process.

        Raises ModelNotFoundError and FingerprintMismatchError where this machine lacks its body or has another one.
        """
        stored = _stored_checkpoint(self.index, Path(self.checkpoint).name) if self.index else self.checkpoint
        with _LOADING:
            return _encoder(stored, self.device)

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:
        """Write the embeddings of one shard's chunks."""

        def make() -> tuple[pa.Table | None, Sequence[Rejected], dict[str, Any]]:
            path = store.path(shard.tables["chunks"])
            with part("read"):
                tokens = MappedColumn(path, "tokens", "<i4", shard.chunk_size).slice(0, shard.chunks)
                with open_table(path) as file:
                    num_tokens = file.read(columns=["num_tokens"]).column(0).to_numpy()
            with part("load"):
                encoder = self.load()
            rows, failures = _by_document(
                store, shard, "num_chunks", lambda s: encoder.encode(tokens[s], num_tokens[s]), shard.chunks
            )
            rejected = _reject_documents(store, shard, failures, RejectReason.ENCODE_FAILED)
            return None if rows is None else _embeddings_table(rows, self.dtype), rejected, {"dim": encoder.dim}

        return _make_table(store, shard, table=self.table, fingerprint=self.fingerprint, make=make)


def _embeddings_table(rows: npt.NDArray[Any], dtype: EmbeddingDtype) -> pa.Table:
    schema, stored = arrow.embeddings(rows.shape[1], dtype), store_rows(rows, dtype)
    if isinstance(stored, Int8Rows):
        columns = [fixed_binary(stored.codes), pa.array(stored.scales.astype("<f4", copy=False))]
        return pa.Table.from_arrays(columns, schema=schema)
    return _one_column(schema, stored)


def _one_column(schema: pa.Schema, rows: npt.NDArray[Any]) -> pa.Table:
    return pa.Table.from_arrays([fixed_binary(rows.astype("<f2", copy=False))], schema=schema)


@dataclass(frozen=True, slots=True)
class EmbedStage:
    """Passage text → passage embeddings, float16 `[passages, d_ret]`, unit length."""

    retriever: str
    """Folder of the retriever, where the driver found it."""
    retriever_fingerprint: str
    device: str
    """`auto` is for each worker to say."""
    table: str = "vectors"
    reference: str = ""
    """The retriever's, for machines that have no such folder."""

    @property
    def fingerprint(self) -> str:
        """Digest of the retriever."""
        return digest_json(["embed/1", self.retriever_fingerprint])

    def load(self) -> Any:
        """The retriever with its weights, loaded once a process.

        Raises ModelNotFoundError and FingerprintMismatchError where this machine has none, or another one.
        """
        folder = _checked("retriever", self.reference, self.retriever, self.retriever_fingerprint)
        with _LOADING:
            return _retriever(folder, self.device)

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:
        """Write the embeddings of one shard's passages."""

        def make() -> tuple[pa.Table | None, Sequence[Rejected], dict[str, Any]]:
            with part("read"), open_table(store.path(shard.tables["passages"])) as file:
                texts = file.read(columns=["text"]).column(0).to_pylist()
            with part("load"):
                retriever = self.load()
            truncated = np.zeros(len(texts), bool)

            def compute(rows: slice) -> npt.NDArray[Any]:
                vectors, truncated[rows] = retriever.embed(texts[rows])
                return np.asarray(vectors)

            rows, failures = _by_document(store, shard, "num_passages", compute, shard.passages)
            rejected = _reject_documents(store, shard, failures, RejectReason.EMBED_FAILED)
            table = None if rows is None else _one_column(arrow.vectors(retriever.dim), rows)
            return table, rejected, {"dim": retriever.dim, "truncated": int(truncated.sum())}

        return _make_table(store, shard, table=self.table, fingerprint=self.fingerprint, make=make)


@lru_cache(maxsize=1)
def _scorer(decoder: str, fingerprint: str, device: str) -> Any:
    from refrag_core.decoder import Decoder
    from refrag_core.scoring import ChunkScorer

    return ChunkScorer(Decoder.load(Path(decoder), device=resolve_device(device)), fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class ScoreStage:
    """Chunk tokens → mean negative log-likelihood a token under the decoder, float32 `[chunks]`."""

    decoder: str
    """Folder of the decoder, where the driver found it."""
    decoder_fingerprint: str
    device: str
    """`auto` is for each worker to say."""
    table: str = "scores"
    reference: str = ""
    """The decoder's, for machines that have no such folder."""

    def load(self) -> Any:
        """The decoder as a scorer, loaded once a process.

        Raises ModelNotFoundError and FingerprintMismatchError where this machine has none, or another one.
        """
        folder = _checked("decoder", self.reference, self.decoder, self.decoder_fingerprint)
        with _LOADING:
            return _scorer(folder, self.decoder_fingerprint, self.device)

    @property
    def fingerprint(self) -> str:
        """Digest of the decoder."""
        return digest_json(["score/1", self.decoder_fingerprint])

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:
        """Write the scores of one shard's chunks."""

        def make() -> tuple[pa.Table | None, Sequence[Rejected], dict[str, Any]]:
            passages = _passage_tokens(store, shard)
            scores = self.load().score(passages, shard.chunk_size)
            rows = np.concatenate([np.empty(0, np.float32), *scores])
            if not np.isfinite(rows).all():
                raise StageError(
                    f"shard {shard.name}: {int((~np.isfinite(rows)).sum())} chunks got a score that is not "
                    "finite, expected finite numbers: check the decoder, or run with --device cpu"
                )
            return pa.Table.from_arrays([pa.array(rows)], schema=arrow.SCORES), (), {}

        return _make_table(store, shard, table=self.table, fingerprint=self.fingerprint, make=make)


def _passage_tokens(store: Store, shard: TokenizedShard) -> list[npt.NDArray[np.int32]]:
    tokens = MappedColumn(store.path(shard.tables["chunks"]), "tokens", "<i4", shard.chunk_size)
    with open_table(store.path(shard.tables["passages"])) as file:
        spans = file.read(columns=["first_chunk", "num_chunks", "num_tokens"]).to_pylist()
    return [
        tokens.slice(s["first_chunk"], s["first_chunk"] + s["num_chunks"]).reshape(-1)[: s["num_tokens"]] for s in spans
    ]


# --- one shard through all stages -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a build, in order."""

    tokenize: TokenizeStage
    device: tuple[DeviceStage, ...]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """All receipts of one shard; `shard` is None while documents have to leave it first, or none is left."""

    spec: ShardSpec
    receipts: tuple[Receipt, ...]
    shard: Shard | None

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Documents that failed in some stage."""
        return tuple(entry for receipt in self.receipts for entry in receipt.rejected)


def run_device_stages(store: Store, stages: Sequence[DeviceStage], spec: ShardSpec, tokenized: Receipt) -> ShardResult:
    """Encode, embed and score a tokenized shard; stops at the first stage that rejects documents."""
    receipts = [tokenized]
    if tokenized.rows["documents"] == 0:
        return ShardResult(spec, tuple(receipts), None)
    shard = tokenized_shard(tokenized)
    for stage in stages:
        receipts.append(stage(store, shard))
        if not receipts[-1].files:
            return ShardResult(spec, tuple(receipts), None)
    return ShardResult(spec, tuple(receipts), shard_of(tokenized, receipts))


def shard_of(tokenized: Receipt, receipts: Sequence[Receipt]) -> Shard:
    """The manifest's entry of a shard: its rows and facts, and the tables of all receipts."""
    tables = {name: record.name for receipt in receipts for name, record in receipt.files.items()}
    facts = tokenized.facts
    return Shard(
        name=tokenized.shard,
        chunk_size=facts["chunk_size"],
        first_document=facts["first_document"],
        last_document=facts["last_document"],
        tables=tables,
        **tokenized.rows,
    )


def add_table(store: Store, stage: DeviceStage, shard: Shard) -> tuple[Shard, Receipt]:
    """A committed shard with one more table (the scores, or a table that is made anew)."""
    receipt = stage(store, committed_shard(shard))
    tables = dict(shard.tables) | {name: record.name for name, record in receipt.files.items()}
    return replace(shard, tables=tables), receipt
