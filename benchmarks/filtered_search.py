"""What a metadata filter costs: decoding fields, evaluating, searching what passes; and what ranking by words costs.

    python -m benchmarks.filtered_search [--passages 100000] [--queries 30] [--output FILE]

An index of synthetic passages is written first, table by table: one document, one chunk a passage, vectors in as many
clusters as the vector index has lists, texts of 80 pseudo-words with Zipf frequencies, and metadata of six fields, of
which `share` is even in [0, 1) and `topic` is the passage's cluster. Both are filtered on: passages spread evenly over
all lists, and whole clusters beside a query that is from anywhere. Times are of this process's CPU beside the clock's,
which other work on the machine lengthens.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa

from benchmarks.measurement import add_output, finish, load, say
from refrag.schemas import arrow
from refrag_core import index_reader
from refrag_core.index_reader import IndexReader, Passing
from refrag_core.lexical import LexicalIndex
from refrag_core.manifest import (
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
from refrag_core.storage import FileRecord, Store
from refrag_core.tables import fixed_binary, write_table
from refrag_core.vector_index import SearchResult, build_segment, choose_index, train_quantizer

WIDTH, CHUNK_SIZE, D_ENC, TOP_K = 384, 8, 8, 10
WORDS, VOCABULARY = 80, 200_000
SHARD_ROWS = 25_000
NPROBE = 16
SHARES = (0.001, 0.01, 0.03, 0.1, 0.16, 0.3, 0.6)
_SPREAD = 0.9

Floats = npt.NDArray[np.float32]


def clustered(count: int, random: np.random.Generator) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
    """Unit vectors `[count, 384]`, the number of each one's cluster, and the clusters' centres."""
    centres = random.normal(size=(choose_index(count, WIDTH).nlist or 16, WIDTH)).astype(np.float32)
    topics = random.integers(0, len(centres), count)
    rows = centres[topics] + _SPREAD * random.normal(size=(count, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), topics, centres


def metadata(number: int, share: float, topic: int) -> str:
    """Canonical JSON of six fields, some 100 bytes."""
    fields = {
        "lang": ("en", "de", "fr")[number % 3],
        "year": 1900 + number % 125,
        "share": share,
        "topic": topic,
        "draft": number % 7 == 0,
        "title": f"Title of document {number}",
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def words(count: int, random: np.random.Generator) -> list[str]:
    """So many texts of pseudo-words, a few of them frequent and most of them rare."""
    numbers = np.minimum(random.zipf(1.3, (count, WORDS)), VOCABULARY)
    return [" ".join(f"word{number}" for number in row) for row in numbers.tolist()]


def tables(first: int, vectors: Floats, shares: Sequence[float], topics: Sequence[int]) -> dict[str, pa.Table]:
    """The tables of one shard whose documents are numbered from `first`."""
    count = len(vectors)
    numbers = range(first, first + count)
    texts = [metadata(n, s, t) for n, s, t in zip(numbers, shares, topics, strict=True)]
    ids = [f"doc-{n:09d}" for n in numbers]
    ones = np.ones(count, np.int32)
    digests = fixed_binary(np.zeros((count, 32), np.uint8))
    documents: list[Any] = [ids, digests, digests, ["x"] * count, ones * CHUNK_SIZE, ones, ones, ones, texts]
    names = fixed_binary(np.arange(first, first + count, dtype=np.int64).repeat(2).reshape(-1, 2))
    rows = np.arange(count)
    prose = words(count, np.random.default_rng(first))
    passages: list[Any] = [names, ids, ones * 0, rows * 0, rows * 0, ones, rows, ones, prose, texts]
    chunks: list[Any] = [rows, ones * 0, ones, fixed_binary(np.ones((count, CHUNK_SIZE), "<i4"))]
    made = {
        "documents": (documents, arrow.DOCUMENTS),
        "passages": (passages, arrow.PASSAGES),
        "chunks": (chunks, arrow.chunks(CHUNK_SIZE)),
        "embeddings": ([fixed_binary(np.zeros((count, D_ENC), "<f2"))], arrow.embeddings(D_ENC)),
        "vectors": ([fixed_binary(vectors.astype("<f2"))], arrow.vectors(WIDTH)),
    }
    return {name: pa.table([_cast(c, f) for c, f in zip(v, s, strict=True)], schema=s) for name, (v, s) in made.items()}


def _cast(values: Any, field: pa.Field) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values).cast(field.type)


def write_index(folder: Path, vectors: Floats, shares: Sequence[float], topics: Sequence[int]) -> None:
    """An index of these passages, committed as any other."""
    store, files, shards = Store(folder), list[FileRecord](), list[Shard]()
    for number, first in enumerate(range(0, len(vectors), SHARD_ROWS)):
        rows = slice(first, first + SHARD_ROWS)
        name, count = f"{number:032x}", len(vectors[rows])
        made = tables(first, vectors[rows], shares[rows], topics[rows])
        records = {t: _publish(store, f"shards/{name}/{t}.parquet", table) for t, table in made.items()}
        files += records.values()
        ends = f"doc-{first:09d}", f"doc-{first + count - 1:09d}"
        shards.append(
            Shard(name, CHUNK_SIZE, *ends, count, count, count, count, {t: r.name for t, r in records.items()})
        )
    spec = choose_index(len(vectors), WIDTH)
    trained = train_quantizer(vectors[: max(1, 64 * spec.nlist)], spec)
    quantizer = store.publish("segments/quantizer.faiss", lambda path: _written(path, trained))
    segment = store.publish("segments/all.faiss", lambda path: _built(trained, vectors, path))
    component = Component("synthetic", "0" * 64)
    counts = Counts(len(vectors), len(vectors), len(vectors), len(vectors))
    commit(
        store,
        Manifest(
            version=1,
            parent=None,
            content_id="0" * 64,
            components=Components(component, component, component, None),
            parameters=Parameters(256, CHUNK_SIZE, None, D_ENC, "float16", WIDTH),
            counts=counts,
            shards=shards,
            segments=[Segment(segment.name, [shard.name for shard in shards], len(vectors))],
            vector_index=VectorIndexInfo(spec.kind, spec.nlist, NPROBE, quantizer.name, 1.0, 0),
            quarantine=QuarantineInfo(None, {}),
            tombstones=None,
            checkpoint=CheckpointInfo("checkpoints/none", "0" * 64, False),
            files={record.name: record for record in (*files, quantizer, segment)},
        ),
    )


def _publish(store: Store, name: str, table: pa.Table) -> FileRecord:
    return store.publish(name, lambda path: write_table(path, table))


def _written(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _built(trained: bytes, vectors: Floats, path: Path) -> None:
    build_segment(trained, [vectors], path)


def milliseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Of one call, by the clock and of this process's CPU."""
    started, used = time.perf_counter(), time.process_time()
    call()
    return {
        "clock": round(1000 * (time.perf_counter() - started), 2),
        "cpu": round(1000 * (time.process_time() - used), 2),
    }


def median(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each kind of time."""
    return {name: round(float(np.median([one[name] for one in measured])), 3) for name in measured[0]}


def measure_filters(root: Path) -> dict[str, Any]:
    """What a filter costs whose fields are new, whose fields are decoded, and that was asked for before."""
    reader = IndexReader(root)
    reader.passing("document_id = ''")  # starts the database
    found = {
        "two_new_fields": milliseconds(lambda: reader.passing("lang = 'en' and year > 2020")),
        "fields_decoded": milliseconds(lambda: reader.passing("lang = 'de' and year > 2020")),
        "asked_before": milliseconds(lambda: reader.passing("lang = 'de' and year > 2020")),
        "one_new_text_field": milliseconds(lambda: reader.passing("title like '%99'")),
        "one_new_list_of_numbers": milliseconds(lambda: reader.passing("share < .5")),
    }
    columns = reader.metadata._columns
    return found | {"column_bytes": {".".join(path): column.nbytes for path, column in columns.items()}}


def measure_lexical(root: Path, count: int) -> dict[str, Any]:
    """Building the ranking by words in memory, the memory that it keeps, and a query of eight words."""
    reader, random = IndexReader(root), np.random.default_rng(1)
    before, made = resident(), list[LexicalIndex]()
    build = milliseconds(lambda: made.append(LexicalIndex(reader)))
    (index,) = made
    questions = [" ".join(text.split()[:8]) for text in words(count, random)]
    ranking = median([milliseconds(partial(index.rank, question, 100)) for question in questions])
    return {
        "build_milliseconds": build,
        "resident_mb": round((resident() - before) / 1e6),
        "query_milliseconds": ranking,
    }


def resident() -> int:
    """Bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


def measure_search(root: Path, wheres: dict[str, str], queries: Floats) -> list[dict[str, Any]]:
    """For each filter both ways of searching: time a query and recall@10 against exact search."""
    reader, measured = IndexReader(root), list[dict[str, Any]]()
    base = reader.vectors.nprobe
    for name, where in wheres.items():
        passing = reader.passing(where)
        truth = [_exact(reader, query, passing) for query in queries]
        row = {"filter": name, "rows": passing.rows, "share": round(passing.rows / reader.manifest.counts.passages, 4)}
        scaled = min(max(1, reader.vectors.nlist), reader.lists_to_visit(passing))
        for way, nprobe in (("lists_as_unfiltered", base), ("lists_by_share", scaled)):
            row[way] = {"nprobe": nprobe} | _timed(reader, queries, passing, truth, nprobe)
        row["exact"] = median([milliseconds(partial(_exact, reader, query, passing)) for query in queries])
        measured.append(row)
        say(json.dumps(row))
    return measured


def _exact(reader: IndexReader, query: Floats, passing: Passing) -> set[tuple[int, int]]:
    return _hits(reader._compare_all(query.reshape(1, -1), TOP_K, passing))


def _hits(found: SearchResult) -> set[tuple[int, int]]:
    pairs = zip(found.segments[0].tolist(), found.rows[0].tolist(), strict=True)
    return {(segment, row) for segment, row in pairs if row >= 0}


def _timed(
    reader: IndexReader, queries: Floats, passing: Passing, truth: Sequence[set[tuple[int, int]]], nprobe: int
) -> dict[str, Any]:
    def search(query: Floats) -> SearchResult:
        return reader.vectors.search(query.reshape(1, -1), TOP_K, live=passing.masks, nprobe=nprobe)

    found = [_hits(search(query)) for query in queries]
    shares = [len(hits & true) / len(true) for hits, true in zip(found, truth, strict=True) if true]
    return {"recall": round(float(np.mean(shares)), 4)} | median(
        [milliseconds(partial(search, query)) for query in queries]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filtered_search", description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=30)
    add_output(parser)
    options = parser.parse_args(arguments)
    random = np.random.default_rng(0)
    vectors, topics, centres = clustered(options.passages, random)
    queries = vectors[random.integers(0, len(vectors), options.queries)]
    queries = queries + 0.5 * random.normal(size=queries.shape).astype(np.float32) * np.abs(queries).mean()
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    wheres = {f"even {share:g}": f"share < {share}" for share in SHARES}
    wheres |= {f"clusters {share:g}": f"topic < {max(1, round(share * len(centres)))}" for share in SHARES[1:]}
    with tempfile.TemporaryDirectory(prefix="refrag-filters-") as temporary:
        say("writing the index")
        write_index(Path(temporary), vectors, random.random(len(vectors)).tolist(), topics.tolist())
        say("measuring")
        results: dict[str, Any] = {"filters_milliseconds": measure_filters(Path(temporary))}
        results["lexical"] = measure_lexical(Path(temporary), options.queries)
        say(json.dumps(results))
        results |= {"search": measure_search(Path(temporary), wheres, queries), "load_average_after": load()}
    shown = {"passages": options.passages, "queries": options.queries, "top_k": TOP_K, "width": WIDTH}
    shown |= {"exact_rows": index_reader.EXACT_ROWS, "exact_one_in": index_reader.EXACT_ONE_IN}
    finish("filtered_search", shown, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
