"""Latency of each step from a question to the decoder's input: embed, search, fetch, describe.

    python -m benchmarks.retrieval_latency [--index PATH] [--passages 10000] [--queries 500] [--output FILE]

Without `--index` an index is made first, by the command line from a synthetic corpus and one-layer random models
of width 384: its search and fetch are as real as its vectors' spread allows, its query embedding is not. With
`--index` the index's own retriever embeds the first words of its passages.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.measurement import add_output, finish, load, quantiles, say
from benchmarks.memory import build, write_corpus, write_models
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.retrieval import Searcher, open_searcher

TOP_K = 10
WIDTH = 384
_BYTES_A_PASSAGE = 300
_WARM_UP = 20


def timed(call: Callable[[Any], Any], inputs: Sequence[Any]) -> list[float]:
    """Seconds of `call` on each input, after a few that are not counted."""
    for value in inputs[:_WARM_UP]:
        call(value)
    seconds = []
    for value in inputs:
        started = time.perf_counter()
        call(value)
        seconds.append(time.perf_counter() - started)
    return seconds


def random_refs(reader: IndexReader, count: int, generator: random.Random) -> list[PassageRef]:
    """`count` passages drawn evenly from all shards."""
    sizes = [shard.passages for shard in reader.manifest.shards]
    shards = generator.choices(range(len(sizes)), sizes, k=count)
    return [PassageRef(shard, generator.randrange(sizes[shard])) for shard in shards]


def copied(reader: IndexReader, refs: Sequence[PassageRef]) -> list[bytes]:
    """Fetch passages and copy their embeddings out: a fetch alone gives views, whose pages nobody has read."""
    return [passage.embeddings.tobytes() for passage in reader.fetch(refs)]


def fetch_through_parquet(reader: IndexReader, refs: Sequence[PassageRef]) -> list[Any]:
    """The same rows read the ordinary way: open the file, decode the row group's columns, take the rows."""
    found = []
    for ref in refs:
        shard = reader.shard(ref.shard)
        start, count = int(shard.first_chunk[ref.row]), int(shard.num_chunks[ref.row])
        for table, column in (("chunks", "tokens"), ("embeddings", "embedding")):
            with pq.ParquetFile(reader.store.path(shard.shard.tables[table]), memory_map=True) as file:
                found.append(file.read(columns=[column]).column(0).slice(start, count).to_pylist())
    return found


def questions(reader: IndexReader, refs: Sequence[PassageRef]) -> list[str]:
    """The first twelve words of each passage."""
    return [" ".join(reader.describe(ref).text.split()[:12]) for ref in refs]


def make_index(folder: Path, passages: int) -> Path:
    """An index of about `passages` passages of 6 chunks under one-layer random models, both embeddings 384 wide."""
    decoder, encoder = write_models(folder / "models", WIDTH)
    corpus = write_corpus(folder / "corpus", passages * _BYTES_A_PASSAGE, "jsonl")
    extra = ["--max-passage-tokens", "96"]
    report = build(corpus, folder / "index", decoder, encoder, extra)
    say(f"made an index of {report['passages']} passages in {report['seconds']:.0f} s")
    return folder / "index"


def measure(searcher: Searcher, num_queries: int, seed: int = 0) -> dict[str, Any]:
    """Latencies of every step, over questions made from the index's own passages."""
    reader, generator = searcher.reader, random.Random(seed)
    texts = questions(reader, random_refs(reader, num_queries, generator))
    vectors = [searcher.embed(text) for text in texts]
    groups = [random_refs(reader, TOP_K, generator) for _ in range(num_queries)]
    reader.fetch([ref for group in groups for ref in group])  # opens and maps every shard
    say("measuring")
    milliseconds = {
        "query_embedding": timed(searcher.embed, texts),
        "faiss_search": timed(lambda vector: reader.search(vector, TOP_K), vectors),
        "describe_one_passage": timed(reader.describe, [group[0] for group in groups]),
        "fetch_through_parquet": timed(lambda refs: fetch_through_parquet(reader, refs), groups[:100]),
    }
    microseconds = {
        "fetch_from_map": timed(reader.fetch, groups),
        "fetch_from_map_and_copy": timed(lambda refs: copied(reader, refs), groups),
    }
    return {
        "milliseconds": {name: quantiles(taken, unit=1e-3) for name, taken in milliseconds.items()},
        "microseconds": {name: quantiles(taken, unit=1e-6) for name, taken in microseconds.items()},
        "load_average_after": load(),
    }


def describe_index(searcher: Searcher) -> dict[str, Any]:
    """What was searched."""
    manifest = searcher.reader.manifest
    return {
        "passages": manifest.counts.passages,
        "chunks": manifest.counts.chunks,
        "shards": len(manifest.shards),
        "segments": len(manifest.segments),
        "vector_dim": manifest.parameters.vector_dim,
        "embedding_dim": manifest.parameters.embedding_dim,
        "kind": manifest.vector_index.kind,
        "nlist": manifest.vector_index.nlist,
        "nprobe": manifest.vector_index.nprobe,
        "recall_at_10": manifest.vector_index.recall_at_10,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval_latency", description=__doc__.split("\n")[0])
    parser.add_argument("--index", type=Path, help="a real index; without it one is made from random models")
    parser.add_argument("--passages", type=int, default=10_000, help="passages of the index that is made")
    parser.add_argument("--queries", type=int, default=500)
    add_output(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="refrag-latency-") as temporary:
        index = options.index or make_index(Path(temporary), options.passages)
        searcher = open_searcher(index, device="cpu")
        results = {"index": describe_index(searcher), **measure(searcher, options.queries)}
    models = "random, one layer" if options.index is None else "the index's own"
    shown = {"models": models, "queries": options.queries, "top_k": TOP_K}
    finish("retrieval_latency", shown, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
