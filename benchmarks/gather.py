"""Random gathers of 64 chunk rows: from a bare memory map, from the mapped Parquet shards, from LanceDB tables.

    python -m benchmarks.gather [--index PATH] [--chunks 100000] [--gathers 500] [--embedding-dtype float16]
                                [--output FILE]

Without `--index` (which needs LanceDB tables) an index is made first, by the command line from a synthetic corpus
and one-layer random models of width 384. All pages are in memory before the clock runs. The readers take turns, each
on other rows than the one before it, which would have left them in the processor's cache.

`rows` gathers the embeddings of 64 chunks drawn one by one and copies them together; `passages` what a prompt needs,
tokens and embeddings of whole passages drawn one by one until they have 64 chunks or more: as `IndexReader.fetch`
gives them (views of the map; nothing is copied yet) and copied together.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measurement import add_output, finish, load, quantiles, say
from benchmarks.memory import build, write_corpus, write_models
from benchmarks.retrieval_latency import random_refs
from refrag_core.embedding_storage import Int8Rows, StoredRows, concatenate_rows, read_rows
from refrag_core.index_reader import IndexReader, PassageRef

ROWS = 64
WIDTH = 384
_BYTES_A_CHUNK = 50
_WARM_UP = 20

Gather = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class BareMap:
    """The whole index's columns, end to end, in files of nothing else."""

    tokens: np.ndarray
    """int32 `[n, k]`."""
    embeddings: StoredRows
    """`[n, d_enc]`."""
    starts: Sequence[int]
    """Row of each shard's first chunk."""

    def rows(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Rows in these files of chunks of one shard."""
        return self.starts[shard] + rows


def mapped_copy(path: Path, values: np.ndarray) -> np.ndarray:
    """The same values, from a file by memory map."""
    values.tofile(path)
    return np.asarray(np.memmap(path, values.dtype, "r", shape=values.shape))


def bare_map(reader: IndexReader, folder: Path) -> BareMap:
    """Write the columns of all shards end to end, and map them."""
    shards = [reader.shard(number) for number in range(len(reader.manifest.shards))]
    counts = [shard.shard.chunks for shard in shards]
    stored = concatenate_rows([s.embeddings.slice(0, n) for s, n in zip(shards, counts, strict=True)])
    tokens = np.concatenate([s.tokens.slice(0, n) for s, n in zip(shards, counts, strict=True)])
    if isinstance(stored, Int8Rows):
        mapped: StoredRows = Int8Rows(mapped_copy(folder / "c", stored.codes), mapped_copy(folder / "s", stored.scales))
    else:
        mapped = mapped_copy(folder / "e", stored)
    return BareMap(mapped_copy(folder / "t", tokens), mapped, [0, *np.cumsum(counts).tolist()])


# --- what is gathered ---------------------------------------------------------------------------------


def random_chunks(reader: IndexReader, generator: random.Random) -> list[tuple[int, int]]:
    """`ROWS` chunks `(shard, row)`, drawn evenly."""
    sizes = [shard.chunks for shard in reader.manifest.shards]
    shards = generator.choices(range(len(sizes)), sizes, k=ROWS)
    return [(shard, generator.randrange(sizes[shard])) for shard in shards]


def random_passages(reader: IndexReader, generator: random.Random) -> list[PassageRef]:
    """Passages with at least `ROWS` chunks in all."""
    found: list[PassageRef] = []
    chunks = 0
    while chunks < ROWS:
        (ref,) = random_refs(reader, 1, generator)
        found.append(ref)
        chunks += int(reader.shard(ref.shard).num_chunks[ref.row])
    return found


def bare_rows(bare: BareMap, reader: IndexReader, refs: Sequence[PassageRef]) -> np.ndarray:
    """Rows in the bare map of all chunks of passages."""
    parts = []
    for ref in refs:
        shard = reader.shard(ref.shard)
        first = int(shard.first_chunk[ref.row])
        parts.append(bare.rows(ref.shard, np.arange(first, first + int(shard.num_chunks[ref.row]))))
    return np.concatenate(parts)


def mapped_rows(reader: IndexReader, chunks: Sequence[tuple[int, int]]) -> StoredRows:
    """Embeddings of chunks, copied out of the mapped shards."""
    return concatenate_rows([reader.shard(shard).embeddings.slice(row, row + 1) for shard, row in chunks])


def fetched(reader: IndexReader, refs: Sequence[PassageRef]) -> tuple[np.ndarray, StoredRows]:
    """Tokens and embeddings of passages, copied out of whatever the reader gives."""
    found = reader.fetch(refs)
    return np.concatenate([p.tokens for p in found]), concatenate_rows([p.embeddings for p in found])


def lance_rows(reader: IndexReader) -> Gather:
    """A gather of the embeddings at offsets in the `chunks` table, as a program of Lance's own does it."""
    import lance

    assert reader.manifest.lance is not None
    table = reader.manifest.lance.tables["chunks"]
    dataset = lance.dataset(str(reader.store.path(table.folder)), version=table.version)
    names = [name for name in ("embedding", "scale") if name in dataset.schema.names]

    def take(offsets: Sequence[int]) -> Any:
        return [
            c.combine_chunks().to_numpy(zero_copy_only=False)
            if c.type == "float"
            else c.combine_chunks().flatten().to_numpy(zero_copy_only=False)
            for c in dataset.take(offsets, columns=names).columns
        ]

    return take


def lance_offsets(reader: IndexReader, chunks: Sequence[tuple[int, int]]) -> list[int]:
    """Offsets in the `chunks` table of an index without removed documents."""
    assert reader.manifest.lance is not None
    sizes = {shard.name: shard.chunks for shard in reader.manifest.shards}
    starts, at = {}, 0
    for name in reader.manifest.lance.shards:
        starts[name], at = at, at + sizes[name]
    return [starts[reader.manifest.shards[shard].name] + row for shard, row in chunks]


def check_equal(reader: IndexReader, other: IndexReader, groups: Sequence[Sequence[PassageRef]]) -> None:
    """End the program where the two readers do not give the same tokens and embeddings."""
    for refs in groups:
        one, two = fetched(reader, refs), fetched(other, refs)
        if not (np.array_equal(one[0], two[0]) and np.array_equal(read_rows(one[1]), read_rows(two[1]))):
            raise SystemExit("the Parquet shards and the LanceDB tables hold different rows: nothing was measured")


# --- measuring ----------------------------------------------------------------------------------------


def take_turns(gathers: Mapping[str, Gather], inputs: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """Seconds of each gather on its own form of the same inputs, every time on another than the gather before it."""
    count = len(next(iter(inputs.values())))
    seconds: dict[str, list[float]] = {name: [] for name in gathers}
    for at in range(count):
        for turn, (name, gather) in enumerate(gathers.items()):
            given = inputs[name][(at + turn * (count // len(gathers))) % count]
            started = time.perf_counter()
            gather(given)
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[_WARM_UP:] for name, taken in seconds.items()}


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Quantiles in microseconds, and each reader's median over the bare map's."""
    microseconds = {name: quantiles(taken, unit=1e-6) for name, taken in seconds.items()}
    base = microseconds["bare_map"]["p50"]
    ratios = {name: round(found["p50"] / base, 2) for name, found in microseconds.items() if name != "bare_map"}
    return {"microseconds": microseconds, "median_over_bare_map": ratios}


def measure(index: Path, gathers: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Both kinds of gathers from all three."""
    reader, lance_reader = IndexReader(index), IndexReader(index, tables="lance")
    generator = random.Random(seed)
    bare = bare_map(reader, folder)
    np.asarray(bare.tokens).sum()
    chunks = [random_chunks(reader, generator) for _ in range(gathers + _WARM_UP)]
    passages = [random_passages(reader, generator) for _ in range(gathers + _WARM_UP)]
    rows = [np.array([bare.starts[shard] + row for shard, row in group]) for group in chunks]
    passage_rows = [bare_rows(bare, reader, refs) for refs in passages]
    check_equal(reader, lance_reader, passages[:_WARM_UP])
    say("measuring")
    single = take_turns(
        {
            "bare_map": lambda at: bare.embeddings[at],
            "parquet": lambda group: mapped_rows(reader, group),
            "lance": lance_rows(reader),
        },
        {"bare_map": rows, "parquet": chunks, "lance": [lance_offsets(reader, group) for group in chunks]},
    )
    whole = take_turns(
        {
            "bare_map": lambda at: (bare.tokens[at], bare.embeddings[at]),
            "parquet_fetch": reader.fetch,
            "parquet_fetch_and_copy": lambda refs: fetched(reader, refs),
            "lance_fetch": lance_reader.fetch,
        },
        {
            "bare_map": passage_rows,
            "parquet_fetch": passages,
            "parquet_fetch_and_copy": passages,
            "lance_fetch": passages,
        },
    )
    return {
        "rows": {"chunks_a_gather": ROWS, **compared(single)},
        "passages": {
            "chunks_a_gather": round(float(np.mean([len(at) for at in passage_rows])), 1),
            "passages_a_gather": round(float(np.mean([len(refs) for refs in passages])), 1),
            **compared(whole),
        },
        "load_average_after": load(),
    }


def make_index(folder: Path, chunks: int, embedding_dtype: str) -> Path:
    """An index of about `chunks` chunks with LanceDB tables."""
    decoder, encoder = write_models(folder / "models", WIDTH)
    corpus = write_corpus(folder / "corpus", chunks * _BYTES_A_CHUNK, "jsonl")
    extra = ["--max-passage-tokens", "96", "--tables", "lance", "--embedding-dtype", embedding_dtype]
    report = build(corpus, folder / "index", decoder, encoder, extra)
    say(f"made an index of {report['chunks']} chunks in {report['seconds']:.0f} s: {report['steps']}")
    return folder / "index"


def describe_index(index: Path) -> dict[str, Any]:
    """What was read, and what each form of it takes."""
    manifest = IndexReader(index).manifest
    sizes = {"parquet": 0, "lance": 0}
    for record in manifest.files.values():
        kind = {"shards": "parquet", "lance": "lance"}.get(record.name.split("/")[0])
        if kind is not None:
            sizes[kind] += record.bytes
    return {
        "chunks": manifest.counts.chunks,
        "passages": manifest.counts.passages,
        "shards": len(manifest.shards),
        "chunk_size": manifest.parameters.chunk_size,
        "embedding_dim": manifest.parameters.embedding_dim,
        "embedding_dtype": manifest.parameters.embedding_dtype,
        "bytes": sizes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gather", description=__doc__.split("\n")[0])
    parser.add_argument("--index", type=Path, help="an index with LanceDB tables and nothing removed; else one is made")
    parser.add_argument("--chunks", type=int, default=100_000, help="chunks of the index that is made")
    parser.add_argument("--gathers", type=int, default=500)
    parser.add_argument("--embedding-dtype", choices=("float16", "int8"), default="float16")
    add_output(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="refrag-gather-") as temporary:
        folder = Path(temporary)
        index = options.index or make_index(folder, options.chunks, options.embedding_dtype)
        results = {"index": describe_index(index), **measure(index, options.gathers, folder)}
    finish("gather", {"gathers": options.gathers, "embedding_dtype": options.embedding_dtype}, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
