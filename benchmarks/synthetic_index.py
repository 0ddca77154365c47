"""An index's tables with random content, mapped as a host maps them: what retrieval and fetch read, at any size.

Passages, chunk tokens and chunk embeddings are Parquet files in the form of a shard; passage vectors are in one FAISS
segment, or, where faiss is missing, in a plain matrix on the device (`exact`). Nothing is tokenized or encoded.
"""

import gc
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from refrag.schemas import arrow
from refrag_core.index_reader import FetchedPassage, OpenShard, PassageDescription, PassageRef
from refrag_core.manifest import Parameters, Shard
from refrag_core.retriever import Retriever
from refrag_core.storage import FolderStore
from refrag_core.tables import fixed_binary, write_table

PASSAGE_TOKENS = 256
_BLOCK_ROWS = 1 << 14
_NPROBE = 16


class SyntheticIndex:
    """What a runtime asks of a searcher and a reader, over one random shard.

    Args:
        folder: gets the tables.
        passages: of PASSAGE_TOKENS tokens each.
    """

    def __init__(
        self,
        folder: Path,
        *,
        passages: int,
        chunk_size: int,
        d_enc: int,
        vocabulary: int,
        retriever: Retriever,
        vectors: "PassageVectors",
    ) -> None:
        self.retriever = retriever
        self.reader = self
        self.passages = passages
        self._vectors = vectors
        self._store = FolderStore(folder)
        self._parameters = Parameters(PASSAGE_TOKENS, chunk_size, None, d_enc, "float16", retriever.dim)
        chunks = passages * (PASSAGE_TOKENS // chunk_size)
        tables = {name: f"{name}-{chunk_size}.parquet" for name in ("passages", "chunks", "embeddings", "vectors")}
        self._shard = Shard(
            name="synthetic", chunk_size=chunk_size, first_document="a", last_document="z", documents=1,
            passages=passages, chunks=chunks, tokens=passages * PASSAGE_TOKENS, tables=tables,
        )  # fmt: skip
        self.manifest = SimpleNamespace(version=1, parameters=self._parameters)
        _write_tables(folder, self._shard, d_enc, vocabulary)
        self._open = self._mapped()

    def _mapped(self) -> OpenShard:
        return OpenShard(self._store, self._shard, self._parameters)

    def reopen_cold(self) -> None:
        """Map the tables anew, none of their pages in memory."""
        del self._open
        gc.collect()
        for name in ("chunks", "embeddings"):
            with self._store.path(self._shard.tables[name]).open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._open = self._mapped()

    # --- a searcher

    def embed(self, question: str) -> npt.NDArray[np.float32]:
        """See Searcher."""
        vector: npt.NDArray[np.float32] = self.retriever.embed_queries([question])[0]
        return vector

    def nearest(self, _: str, vector: npt.NDArray[np.float32], top_k: int, __: Any) -> list[tuple[PassageRef, float]]:
        """See Searcher."""
        rows, scores = self._vectors.search(vector, top_k)
        return [(PassageRef(0, row), score) for row, score in zip(rows, scores, strict=True)]

    # --- a reader

    def fetch(self, refs: Sequence[PassageRef]) -> list[FetchedPassage]:
        """See IndexReader."""
        return [self._open.fetch(ref.row) for ref in refs]

    def describe(self, ref: PassageRef) -> PassageDescription:
        """Nothing but where it is: a description is made after the first token is out."""
        number = PASSAGE_TOKENS // self._shard.chunk_size
        return PassageDescription(
            passage_id=f"{ref.row:032x}", document_id="synthetic", ordinal=ref.row, char_start=0, char_end=0,
            num_tokens=PASSAGE_TOKENS, num_chunks=number, text="", metadata={},
        )  # fmt: skip


class PassageVectors:
    """Random unit vectors of all passages, searchable."""

    def __init__(self, folder: Path, passages: int, dim: int, device: str) -> None:
        random = np.random.default_rng(0)
        vectors = random.standard_normal((passages, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self.kind = "exact product on the device: faiss is missing"
        self._index: Any = None
        if importlib.util.find_spec("faiss") is None:
            self._matrix = torch.from_numpy(vectors).to(device)
            return
        from refrag_core.vector_index import VectorIndex, build_segment, choose_index, train_quantizer, training_size

        spec = choose_index(passages, dim)
        quantizer = train_quantizer(vectors[: max(training_size(spec), 1)], spec)
        build_segment(quantizer, [vectors], folder / "segment.faiss")
        self.kind = f"faiss {spec.kind}, nlist {spec.nlist}, nprobe {_NPROBE}"
        self._index = VectorIndex.open([folder / "segment.faiss"], _NPROBE)

    def search(self, vector: npt.NDArray[np.float32], top_k: int) -> tuple[list[int], list[float]]:
        """Rows and scores, best first."""
        if self._index is not None:
            found = self._index.search(vector[None], top_k)
            return found.rows[0].tolist(), found.scores[0].tolist()
        scores = self._matrix @ torch.from_numpy(vector).to(self._matrix.device)
        best = scores.topk(top_k)
        return best.indices.tolist(), best.values.tolist()


def _write_tables(folder: Path, shard: Shard, d_enc: int, vocabulary: int) -> None:
    """Random blocks, repeated: a gather cannot tell, and writing takes seconds."""
    random = np.random.default_rng(1)
    size, a_passage = shard.chunk_size, PASSAGE_TOKENS // shard.chunk_size
    tokens = random.integers(1, vocabulary, (_BLOCK_ROWS, size), dtype=np.int32)
    embeddings = random.standard_normal((_BLOCK_ROWS, d_enc), dtype=np.float32).astype("<f2")
    lengths = pa.array(np.full(shard.chunks, size, np.int16))
    schema = arrow.chunks(size)
    columns = {"tokens": fixed_binary(_tiled(tokens, shard.chunks)), "num_tokens": lengths}
    _write(folder / shard.tables["chunks"], schema, columns)
    table = {"embedding": fixed_binary(_tiled(embeddings, shard.chunks))}
    _write(folder / shard.tables["embeddings"], arrow.embeddings(d_enc, "float16"), table)
    rows = np.arange(shard.passages)
    passages = {
        "passage_id": fixed_binary(random.integers(0, 255, (shard.passages, 16), dtype=np.uint8)),
        "num_tokens": pa.array(np.full(shard.passages, PASSAGE_TOKENS, np.int32)),
        "first_chunk": pa.array(rows.astype(np.int64) * a_passage),
        "num_chunks": pa.array(np.full(shard.passages, a_passage, np.int32)),
    }
    _write(folder / shard.tables["passages"], arrow.PASSAGES, passages)


def _tiled(block: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    return np.tile(block, (-(-rows // len(block)), 1))[:rows]


def _write(path: Path, schema: pa.Schema, columns: dict[str, pa.Array]) -> None:
    """The columns that are read, under the schema's own fields."""
    chosen = pa.schema([schema.field(name) for name in columns])
    write_table(path, pa.Table.from_arrays(list(columns.values()), schema=chosen))
