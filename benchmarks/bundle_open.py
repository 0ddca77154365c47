"""Opening a bundle of a million chunks cold and warm, the host's memory, and random gathers of 64 chunk rows.

    python -m benchmarks.bundle_open [--chunks 1000000] [--folder FOLDER] [--output FILE]

The bundle is written with refrag's own writers around random numbers: opening, checking and gathering do the same
work whatever the numbers mean. "Cold" is after the kernel was told to drop the files' pages.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.measurement import add_output, finish, load, quantiles, say
from refrag.schemas import arrow
from refrag_core.digests import digest_bytes
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import (
    BundleInfo,
    CheckpointInfo,
    Component,
    Components,
    Counts,
    Manifest,
    Parameters,
    QuarantineInfo,
    Segment,
    Shard,
    VectorIndexInfo,
    commit,
)
from refrag_core.storage import FileRecord, FolderStore
from refrag_core.tables import fixed_binary, write_table
from refrag_core.vector_index import IndexSpec, build_segment, train_quantizer

CHUNK_SIZE = 16
CHUNKS_A_PASSAGE = 8
DIM = 384
PASSAGES_A_SHARD = 8_192
GATHERED = 64
_ROUNDS = 2_000


# --- a bundle of random numbers -----------------------------------------------------------------------


def random_half(generator: np.random.Generator, rows: int) -> npt.NDArray[np.float16]:
    """float16 `[rows, DIM]` in [0, 2), no NaN among them."""
    return generator.integers(0, 0x4000, (rows, DIM), dtype=np.uint16).view(np.float16)


def shard_tables(generator: np.random.Generator, number: int, passages: int) -> dict[str, pa.Table]:
    """The tables of one shard whose passages all have CHUNKS_A_PASSAGE full chunks."""
    chunks = passages * CHUNKS_A_PASSAGE
    ids = [digest_bytes(f"{number}/{row}".encode()) for row in range(passages)]
    first = np.arange(passages, dtype=np.int64) * CHUNKS_A_PASSAGE
    tokens = generator.integers(0, 49_152, (chunks, CHUNK_SIZE), dtype=np.int32)
    passage_rows = {
        "passage_id": [bytes.fromhex(text[:32]) for text in ids],
        "document_id": [f"document-{number:04d}-{row:06d}" for row in range(passages)],
        "ordinal": np.zeros(passages, np.int32),
        "char_start": np.zeros(passages, np.int64),
        "char_end": np.full(passages, 1024, np.int64),
        "num_tokens": np.full(passages, CHUNKS_A_PASSAGE * CHUNK_SIZE, np.int32),
        "first_chunk": first,
        "num_chunks": np.full(passages, CHUNKS_A_PASSAGE, np.int32),
        "text": [text * 16 for text in ids],
        "metadata": ["{}"] * passages,
    }
    schema = arrow.chunks(CHUNK_SIZE)
    chunk_rows = {
        "passage": np.repeat(np.arange(passages, dtype=np.int32), CHUNKS_A_PASSAGE),
        "ordinal": np.tile(np.arange(CHUNKS_A_PASSAGE, dtype=np.int32), passages),
        "num_tokens": np.full(chunks, CHUNK_SIZE, np.int16),
        "tokens": fixed_binary(tokens),
    }
    document_rows = {
        "document_id": passage_rows["document_id"],
        "source_digest": [bytes.fromhex(text) for text in ids],
        "content_digest": [bytes.fromhex(text) for text in ids],
        "source": ["none"] * passages,
        "chunk_size": np.full(passages, CHUNK_SIZE, np.int16),
        "num_passages": np.ones(passages, np.int32),
        "num_chunks": passage_rows["num_chunks"],
        "num_tokens": np.full(passages, CHUNKS_A_PASSAGE * CHUNK_SIZE, np.int64),
        "metadata": ["{}"] * passages,
    }
    return {
        "documents": pa.table(document_rows, schema=arrow.DOCUMENTS),
        "passages": pa.table(passage_rows, schema=arrow.PASSAGES),
        "chunks": pa.table(chunk_rows, schema=schema),
        "embeddings": pa.table([fixed_binary(random_half(generator, chunks))], schema=arrow.embeddings(DIM)),
        "vectors": pa.table([fixed_binary(random_half(generator, passages))], schema=arrow.vectors(DIM)),
    }


def make_bundle(root: Path, chunks: int) -> None:
    """Write a bundle of about `chunks` chunks whose FAISS segment is exhaustive."""
    store, generator = FolderStore(root), np.random.default_rng(0)
    files: dict[str, FileRecord] = {}
    shards: list[Shard] = []
    left = chunks // CHUNKS_A_PASSAGE
    while left > 0:
        passages = min(left, PASSAGES_A_SHARD)
        shards.append(write_shard(store, files, len(shards), passages, generator))
        left -= passages
    commit(store, manifest_of(shards, files, write_segment(store, files, shards, generator)))
    shutil.rmtree(root / "work", ignore_errors=True)


def publish(store: FolderStore, files: dict[str, FileRecord], name: str, write: Callable[[Path], None]) -> str:
    """Write one file and list it."""
    files[name] = store.publish(name, write)
    return name


def write_shard(
    store: FolderStore, files: dict[str, FileRecord], number: int, passages: int, generator: np.random.Generator
) -> Shard:
    """One shard's files."""
    key = f"{number:032x}"
    tables = {}
    for role, table in shard_tables(generator, number, passages).items():
        rows = 2048 if role == "passages" else None
        name = f"files/{number % 256:02x}/{key}-{role}.parquet"
        tables[role] = publish(store, files, name, lambda path, t=table, r=rows: write_table(path, t, rows_a_group=r))
    first, last = f"document-{number:04d}-000000", f"document-{number:04d}-{passages - 1:06d}"
    num_chunks = passages * CHUNKS_A_PASSAGE
    return Shard(key, CHUNK_SIZE, first, last, passages, passages, num_chunks, num_chunks * CHUNK_SIZE, tables)


def write_segment(
    store: FolderStore, files: dict[str, FileRecord], shards: Sequence[Shard], generator: np.random.Generator
) -> Segment:
    """One exhaustive segment over vectors of unit length."""
    quantizer = train_quantizer(np.zeros((1, DIM), np.float32), IndexSpec(kind="flat", dim=DIM, nlist=0))

    def blocks() -> Iterator[npt.NDArray[np.float16]]:
        for shard in shards:
            rows = random_half(generator, shard.passages).astype(np.float32)
            yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)

    publish(store, files, "files/quantizer.faiss", lambda path: path.write_bytes(quantizer) and None)
    name = publish(store, files, "files/segment.faiss", lambda path: build_segment(quantizer, blocks(), path) and None)
    return Segment(name, [shard.name for shard in shards], sum(shard.passages for shard in shards))


def manifest_of(shards: Sequence[Shard], files: dict[str, FileRecord], segment: Segment) -> Manifest:
    """The manifest of a bundle that no model stands behind."""
    nobody = Component("none", "0" * 64)
    counts = sum((shard.counts for shard in shards), Counts(0, 0, 0, 0))
    return Manifest(
        version=1,
        parent=None,
        content_id="0" * 64,
        components=Components(nobody, nobody, nobody, None),
        parameters=Parameters(CHUNKS_A_PASSAGE * CHUNK_SIZE, CHUNK_SIZE, None, DIM, "float16", DIM),
        counts=counts,
        shards=shards,
        segments=[segment],
        vector_index=VectorIndexInfo("flat", 0, 1, "files/quantizer.faiss", 1.0, 0),
        quarantine=QuarantineInfo(None, {}),
        tombstones=None,
        checkpoint=CheckpointInfo("checkpoints/none", "0" * 64, False),
        files=dict(sorted(files.items())),
        bundle=BundleInfo("0" * 64, None, None),
    )


# --- opening ------------------------------------------------------------------------------------------


def drop_pages(root: Path) -> None:
    """Ask the kernel to forget the pages of every file below `root`."""
    for path in root.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


_OPEN = """
import json, sys, time
from pathlib import Path
from refrag_core.bundle import open_bundle
from refrag_core.index_reader import IndexReader
import refrag_core.vector_index, faiss
from dataclasses import asdict
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmHWM", "RssAnon")))
    return {name: int(value.split()[0]) / 1000 for name, value in lines.items()}
root, check = Path(sys.argv[1]), sys.argv[2] == "check"
before, started = memory(), time.perf_counter()
if check:
    report = asdict(open_bundle(root))
else:
    reader = IndexReader(root); reader.map_all(); report = {}
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "before_mb": before, "after_mb": memory(), **report}))
"""


def opened(root: Path, how: str) -> dict[str, Any]:
    """Open in a process of its own: seconds, the peak of resident memory, and what of it no file holds."""
    command = [sys.executable, "-c", _OPEN, str(root), how]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "seconds": round(done["seconds"], 3),
        "peak_rss_mb": round(done["after_mb"]["VmHWM"], 1),
        "peak_rss_before_mb": round(done["before_mb"]["VmHWM"], 1),
        "anonymous_mb": round(done["after_mb"]["RssAnon"], 1),
        **({"mb_a_second": round(done["bytes_a_second"] / 1e6, 1)} if "bytes_a_second" in done else {}),
    }


def openings(root: Path) -> dict[str, Any]:
    """Opening with and without a check of every byte, cold and warm."""
    results = {}
    for how in ("check", "map"):
        for state in ("cold", "warm"):
            if state == "cold":
                drop_pages(root)
            results[f"{how}_{state}"] = opened(root, how)
            say(f"{how}, {state}: {results[f'{how}_{state}']}")
    return results


# --- gathers ------------------------------------------------------------------------------------------


def microseconds(call: Callable[[Any], object], inputs: Sequence[Any]) -> dict[str, float]:
    """Of `call` on each input, after a round that is not counted."""
    taken = []
    for value in [*inputs[:50], *inputs]:
        started = time.perf_counter()
        call(value)
        taken.append(time.perf_counter() - started)
    return quantiles(taken[50:], unit=1e-6)


def write_raw(reader: IndexReader, path: Path) -> npt.NDArray[np.float16]:
    """All chunk embeddings in one bare file, mapped: what gathers are compared with."""
    with path.open("wb") as stream:
        for number, shard in enumerate(reader.manifest.shards):
            stream.write(reader.shard(number).embeddings.slice(0, shard.chunks).tobytes())
    # as a plain array: slicing numpy's own memmap class costs microseconds each time
    return np.asarray(np.memmap(path, np.float16, "r").reshape(-1, DIM))


def gathers(root: Path, raw: Path) -> dict[str, Any]:
    """64 random chunk rows, and 8 random passages of 8 chunks, from the mapped Parquet files and from one bare map."""
    reader = IndexReader(root)
    reader.map_all()
    bare, shards = write_raw(reader, raw), reader.manifest.shards
    views = [reader.shard(number).embeddings.slice(0, shard.chunks) for number, shard in enumerate(shards)]
    starts = np.concatenate([[0], np.cumsum([shard.chunks for shard in shards])])
    generator = np.random.default_rng(0)
    rows = [np.sort(generator.choice(len(bare), GATHERED, replace=False)) for _ in range(_ROUNDS)]
    near = [np.sort(generator.choice(shards[0].chunks, GATHERED, replace=False)) for _ in range(_ROUNDS)]
    passages = [some[:: GATHERED // 8] // CHUNKS_A_PASSAGE for some in rows]
    spots = [[_spot(int(row), starts) for row in some] for some in rows]
    placed = [[(views[shard], row) for shard, row in some] for some in spots]
    bare_placed = [[(bare, int(row)) for row in some] for some in rows]
    refs = [[_ref(int(passage) * CHUNKS_A_PASSAGE, starts) for passage in some] for some in passages]

    def row_by_row(some: Sequence[tuple[npt.NDArray[np.float16], int]]) -> npt.NDArray[np.float16]:
        made = np.empty((len(some), DIM), np.float16)
        for at, (view, row) in enumerate(some):
            made[at] = view[row]
        return made

    def fetched(some: Sequence[PassageRef]) -> npt.NDArray[np.float16]:
        return np.concatenate([passage.embeddings for passage in reader.fetch(some)])

    def sliced(some: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        return np.concatenate([bare[at : at + CHUNKS_A_PASSAGE] for at in (some * CHUNKS_A_PASSAGE).tolist()])

    assert np.array_equal(row_by_row(placed[0]), bare[rows[0]])
    assert np.array_equal(fetched(refs[0]), sliced(passages[0]))
    found = {
        "parquet_64_rows_of_one_shard": microseconds(lambda some: views[0][some], near),
        "bare_map_64_rows_of_one_shard": microseconds(lambda some: bare[some], near),
        "parquet_64_rows_of_all_shards": microseconds(row_by_row, placed),
        "bare_map_64_rows_one_by_one": microseconds(row_by_row, bare_placed),
        "parquet_64_rows_of_all_shards_beside_one_call": microseconds(row_by_row, placed),
        "bare_map_64_rows_in_one_call": microseconds(lambda some: bare[some], rows),
        "fetch_8_passages_of_8": microseconds(fetched, refs),
        "bare_map_8_passages_of_8": microseconds(sliced, passages),
    }
    pairs = list(found)
    ratios = {
        one: round(found[one]["p50"] / found[other]["p50"], 2) for one, other in zip(*[iter(pairs)] * 2, strict=True)
    }
    return {"microseconds": found, "ratio_to_bare_map_of_medians": ratios}


def _spot(chunk: int, starts: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Shard and row of a chunk of all shards together."""
    shard = int(np.searchsorted(starts, chunk, "right")) - 1
    return shard, chunk - int(starts[shard])


def _ref(chunk: int, starts: npt.NDArray[np.int64]) -> PassageRef:
    """The passage that begins with this chunk."""
    shard, row = _spot(chunk, starts)
    return PassageRef(shard, row // CHUNKS_A_PASSAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bundle_open", description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="make the bundle here, and use the one that is here")
    add_output(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="refrag-open-") as temporary:
        root = options.folder or Path(temporary) / "bundle"
        if not (root / "versions").is_dir():
            say("writing the bundle")
            make_bundle(root, options.chunks)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        results = {"bundle_mb": round(size / 1e6, 1), "openings": openings(root)}
        results |= {"gathers": gathers(root, Path(temporary) / "raw"), "load_average_after": load()}
    shown = {"chunks": options.chunks, "dim": DIM, "chunk_size": CHUNK_SIZE, "gathered": GATHERED}
    finish("bundle_open", shown, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
