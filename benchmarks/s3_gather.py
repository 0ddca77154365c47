"""An index on S3, opened cold and warm, with random gathers of chunk rows; beside the same index in a folder.

    python -m benchmarks.s3_gather [--index PATH] [--chunks 20000] [--gathers 50] [--rows 64] [--output FILE]

An S3 server is started on this machine (moto, from the development extras; nothing but its own figures depends on
it being no real store), the index is copied into a bucket, and `--delay-ms` is added to every request to stand for a
network. Cold: a new cache folder for each round. Warm: all copies are there. Without `--index` one is made from
random models.
"""

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measurement import add_output, finish, load, quantiles, say
from benchmarks.retrieval_latency import make_index, random_refs
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.object_store import RemoteObjects
from refrag_core.storage import open_store
from tests.object_server import FaultyServer, environment, make_bucket, s3_server

BUCKET = "bench"
_CHUNKS_A_PASSAGE = 6


@contextlib.contextmanager
def index_on_s3(index: Path, delay: float) -> Iterator[str]:
    """Serve a copy of an index from S3, each request `delay` seconds late; yields its URI.

    The credentials of the server are in the environment for as long, which is restored afterwards.
    """
    with mock.patch.dict(os.environ), s3_server() as endpoint:
        make_bucket(endpoint, BUCKET)
        proxy = FaultyServer(endpoint, delay)
        with proxy.running() as slowed:
            os.environ.update(environment(endpoint))
            uri = f"s3://{BUCKET}/index"
            upload(index, uri)
            os.environ.update(environment(slowed))
            yield uri


def upload(index: Path, uri: str) -> None:
    """Copy every file of an index in a folder below `uri`."""
    store, objects = open_store(index), RemoteObjects(uri)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: objects.put(name, store.path(name)), store.files()))


def gather(reader: IndexReader, refs: Sequence[PassageRef]) -> Any:
    """The first chunk embedding of each passage, copied out: float16 `[len(refs), d_enc]`."""
    import numpy as np

    return np.concatenate([passage.embeddings[:1] for passage in reader.fetch(refs)])


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall clock of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def cold(uri: str, refs: Sequence[PassageRef]) -> tuple[float, float, float]:
    """Seconds to open an index of which nothing is on this machine, for its first search, and its first gather."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="refrag-cold-") as cache:
        os.environ["REFRAG_CACHE"] = cache
        started = time.perf_counter()
        reader = IndexReader(uri)
        opened = time.perf_counter() - started
        query = np.ones(reader.manifest.parameters.vector_dim, np.float32)
        searched = seconds_of(lambda: reader.search(query, 10))
        return opened, searched, seconds_of(lambda: gather(reader, refs))


def warm(location: str | Path, groups: Sequence[Sequence[PassageRef]]) -> tuple[list[float], list[float]]:
    """Seconds to open, five times, and for each gather once every shard is mapped."""
    opened = [seconds_of(lambda: IndexReader(location)) for _ in range(5)]
    reader = IndexReader(location)
    for number in range(len(reader.manifest.shards)):
        reader.fetch([PassageRef(number, 0)])
    return opened, [seconds_of(lambda refs=refs: gather(reader, refs)) for refs in groups]  # type: ignore[misc]


def measure(index: Path, *, rows: int, gathers: int, rounds: int, delay: float) -> dict[str, Any]:
    """All figures of one index."""
    local, generator = IndexReader(index), random.Random(0)
    groups = [random_refs(local, rows, generator) for _ in range(gathers)]
    with index_on_s3(index, delay) as uri, tempfile.TemporaryDirectory(prefix="refrag-warm-") as cache:
        say("cold")
        opened, searched, gathered = zip(*(cold(uri, refs) for refs in groups[:rounds]), strict=True)
        say("warm")
        os.environ["REFRAG_CACHE"] = cache
        warm_opened, warm_gathered = warm(uri, groups)
    folder_opened, folder_gathered = warm(index, groups)
    manifest = local.manifest
    return {
        "index": {
            "passages": manifest.counts.passages,
            "chunks": manifest.counts.chunks,
            "shards": len(manifest.shards),
            "files": len(manifest.files),
            "bytes": sum(record.bytes for record in manifest.files.values()),
        },
        "milliseconds": {
            "s3_cold_open": quantiles(opened, unit=1e-3),
            "s3_cold_first_search": quantiles(searched, unit=1e-3),
            "s3_cold_first_gather": quantiles(gathered, unit=1e-3),
            "s3_warm_open": quantiles(warm_opened, unit=1e-3),
            "folder_open": quantiles(folder_opened, unit=1e-3),
        },
        "microseconds": {
            "s3_warm_gather": quantiles(warm_gathered, unit=1e-6),
            "folder_gather": quantiles(folder_gathered, unit=1e-6),
        },
        "load_average_after": load(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.s3_gather", description=__doc__.split("\n")[0])
    parser.add_argument("--index", type=Path, help="a real index; without it one is made from random models")
    parser.add_argument("--chunks", type=int, default=20_000, help="chunks of the index that is made")
    parser.add_argument("--rows", type=int, default=64, help="chunk rows a gather, each of a random passage")
    parser.add_argument("--gathers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10, help="cold rounds")
    parser.add_argument("--delay-ms", type=float, default=10.0, help="added to every request")
    add_output(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="refrag-s3-") as temporary:
        index = options.index or make_index(Path(temporary), options.chunks // _CHUNKS_A_PASSAGE)
        results = measure(
            index, rows=options.rows, gathers=options.gathers, rounds=options.rounds, delay=options.delay_ms / 1e3
        )
    shown = {"rows": options.rows, "gathers": options.gathers, "rounds": options.rounds, "delay_ms": options.delay_ms}
    finish("s3_gather", shown, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
