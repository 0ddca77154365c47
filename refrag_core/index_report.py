"""One page about an index, for people: what was built, how fast, how big, how well it is found, and its history.

The page is one file of HTML with its styles and drawings in it: it loads nothing, runs nothing and can be mailed.
Every text from the index is escaped.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refrag_core.errors import RefragError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.inspection import inspect_index
from refrag_core.manifest import Manifest, list_versions, read_manifest, signature_name
from refrag_core.retrieval import matching_retriever
from refrag_core.run_record import RunRecord, read_run_record
from refrag_core.storage import IndexLocation, absolute
from refrag_core.tables import MappedColumn
from refrag_core.vector_index import NprobeMeasurement, exact_search, sample_rows, sweep_nprobe

TEMPLATE = "index_report.html.jinja"
SWEEP_QUERIES = 100
SWEEP_DEPTH = 10
WIDTH, HEIGHT = 640, 200
"""Of a drawing, in units of its own that the page scales."""

_MAX_BARS = 40
_HIGHEST_PERPLEXITY = 100_000.0

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram, in units of the drawing."""

    x: float
    y: float
    width: float
    height: float
    label: str
    count: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars, and the words around them."""

    title: str
    unit: str
    bars: Sequence[Bar]
    first: str
    last: str
    summary: str


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One setting of the vector index, in units of the drawing and in numbers."""

    x: float
    y: float
    nprobe: int
    recall: float
    milliseconds: float
    chosen: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """Recall against speed; `note` says why there is none."""

    points: Sequence[SweepPoint]
    queries: int
    lowest_recall: float
    fastest_ms: float
    slowest_ms: float
    note: str


# --- histograms -------------------------------------------------------------------------------------


def draw(title: str, unit: str, counts: Counts, labels: Sequence[str], summary: str) -> Histogram:
    """Bars over the whole width, the largest over the whole height; a count above zero is never invisible."""
    largest, step = max(1, int(counts.max(initial=0))), WIDTH / max(1, len(counts))
    bars = []
    for number, count in enumerate(counts.tolist()):
        height = max(HEIGHT * count / largest, 1.5 if count else 0.0)
        bars.append(Bar(number * step + 0.5, HEIGHT - height, step - 1, height, labels[number], count))
    return Histogram(title, unit, bars, labels[0], labels[-1], summary)


def chunk_lengths(reader: IndexReader) -> Histogram:
    """How many tokens the live chunks have: all of a passage's are full but the last."""
    largest = max(shard.chunk_size for shard in reader.manifest.shards)
    counts = np.zeros(largest + 1, np.int64)
    for size, tokens, chunks in _live_passages(reader):
        counts[size] += int((chunks - 1).sum())
        counts += np.bincount(tokens - (chunks - 1) * size, minlength=largest + 1)
    total = int(counts.sum())
    full = 100 * int(counts[largest]) / max(1, total)
    labels = [str(tokens) for tokens in range(1, largest + 1)]
    return draw("Chunk length", "tokens", counts[1:], labels, f"{total:,} chunks, {full:.0f}% of {largest} tokens")


def passage_lengths(reader: IndexReader) -> Histogram:
    """How many tokens the live passages have."""
    lengths = np.concatenate([tokens for _, tokens, _ in _live_passages(reader)])
    width = max(1, -(-int(lengths.max()) // _MAX_BARS))
    counts = np.bincount((lengths - 1) // width)
    labels = [f"{at * width + 1}–{(at + 1) * width}" if width > 1 else str(at + 1) for at in range(len(counts))]
    summary = f"{len(lengths):,} passages, median {int(np.median(lengths))} tokens"
    return draw("Passage length", "tokens", counts, labels, summary)


def _live_passages(reader: IndexReader) -> Iterator[tuple[int, Counts, Counts]]:
    """For each shard its chunk size, and tokens and chunks of its live passages."""
    for number in range(len(reader.manifest.shards)):
        shard, live = reader.shard(number), reader.live_rows(number)
        yield shard.shard.chunk_size, shard.num_tokens[live].astype(np.int64), shard.num_chunks[live].astype(np.int64)


def perplexities(reader: IndexReader) -> Histogram | None:
    """Perplexity of the live chunks under the decoder, on a logarithmic scale; None without scores."""
    if any("scores" not in shard.tables for shard in reader.manifest.shards):
        return None
    edges = np.linspace(0.0, np.log(_HIGHEST_PERPLEXITY), _MAX_BARS + 1)
    values = np.concatenate([_live_scores(reader, number) for number in range(len(reader.manifest.shards))])
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    used = np.flatnonzero(counts)
    shown = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
    labels = [f"{np.exp(low):,.0f}–{np.exp(high):,.0f}" for low, high in itertools.pairwise(edges)]
    summary = f"median {np.exp(np.median(values)):,.1f}; the perplexity policy expands the highest"
    return draw("Chunk perplexity", "logarithmic", counts[shown], labels[shown], summary)


def _live_scores(reader: IndexReader, number: int) -> npt.NDArray[np.float32]:
    shard = reader.shard(number)
    assert shard.scores is not None
    live = np.repeat(reader.live_rows(number), shard.num_chunks)
    return shard.scores.slice(0, shard.scores.num_rows)[live]


# --- recall against speed ---------------------------------------------------------------------------


def measure_sweep(reader: IndexReader, retriever: str | None, device: str) -> Sweep:
    """Recall@10 against exact search and milliseconds a query, for parts of passages as queries."""
    try:
        embedder = matching_retriever(reader, retriever, device)
    except RefragError as error:
        return Sweep((), 0, 0.0, 0.0, 0.0, f"Not measured: {error}")
    texts = list(_sample_texts(reader))
    queries = np.asarray(embedder.embed_queries(texts), np.float32)
    blocks = [[block for number in shards for block in _vectors(reader, number)] for shards in _segment_shards(reader)]
    exact = exact_search(blocks, queries, k=SWEEP_DEPTH, live=reader.live)
    rows = sweep_nprobe(reader.vectors, exact, queries, k=SWEEP_DEPTH, live=reader.live)
    return draw_sweep(rows, len(texts), reader.manifest.vector_index.nprobe)


def _sample_texts(reader: IndexReader) -> Iterator[str]:
    """The middle words of live passages that are spread evenly over the index."""
    picked = sample_rows([shard.passages for shard in reader.manifest.shards], SWEEP_QUERIES)
    for number, rows in enumerate(picked):
        live = reader.live_rows(number)
        for row in rows:
            if live[row]:
                words = reader.describe(PassageRef(number, int(row))).text.split()
                yield " ".join(words[len(words) // 4 : len(words) // 4 + 16]) or "?"


def _segment_shards(reader: IndexReader) -> Iterator[list[int]]:
    numbers = {shard.name: number for number, shard in enumerate(reader.manifest.shards)}
    for segment in reader.manifest.segments:
        yield [numbers[name] for name in segment.shards]


def _vectors(reader: IndexReader, number: int) -> Iterator[npt.NDArray[Any]]:
    path = reader.store.path(reader.manifest.shards[number].tables["vectors"])
    return MappedColumn(path, "vector", "<f2", reader.manifest.parameters.vector_dim).blocks()


def draw_sweep(rows: Sequence[NprobeMeasurement], queries: int, chosen: int) -> Sweep:
    """Points from left (fast) to right (slow, logarithmic), recall from the lowest at the bottom to 1 at the top."""
    fastest, slowest = min(row.milliseconds for row in rows), max(row.milliseconds for row in rows)
    decades = math.log(slowest / fastest) or 1.0
    lowest = min(0.9, min(row.recall for row in rows))
    points = [
        SweepPoint(
            x=round(WIDTH * math.log(row.milliseconds / fastest) / decades, 2),
            y=round(HEIGHT * (1 - row.recall) / (1 - lowest), 2),
            nprobe=row.nprobe,
            recall=row.recall,
            milliseconds=row.milliseconds,
            chosen=row.nprobe == chosen or len(rows) == 1,
        )
        for row in rows
    ]
    return Sweep(points, queries, lowest, fastest, slowest, "")


# --- the page ---------------------------------------------------------------------------------------


def gather(
    root: IndexLocation, version: int | None = None, *, retriever: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    reader = IndexReader(root, version)
    manifest = reader.manifest
    shown = inspect_index(root, manifest.version)
    total = shown["bytes"].pop("total")
    histograms = [chunk_lengths(reader), passage_lengths(reader), perplexities(reader)]
    return {
        "name": absolute(root).rpartition("/")[2],
        "manifest": manifest,
        "kind": "Index" if manifest.bundle is None else "Bundle",
        "signed": reader.store.exists(signature_name(manifest.version)),
        "counts": shown["counts"],
        "parameters": shown["parameters"],
        "models": {role: value for role, value in asdict(manifest.components).items() if value is not None},
        "bytes": shown["bytes"],
        "total_bytes": total,
        "run": read_run_record(reader.store, manifest.version, manifest.build_id),
        "histograms": [histogram for histogram in histograms if histogram is not None],
        "sweep": measure_sweep(reader, retriever, device),
        "history": list(_history(reader)),
        "width": WIDTH,
        "height": HEIGHT,
    }


def _history(reader: IndexReader) -> Iterator[tuple[Manifest, RunRecord | None]]:
    for version in reversed(list_versions(reader.store)):
        manifest = read_manifest(reader.store, version)
        yield manifest, read_run_record(reader.store, version, manifest.build_id)


def render(values: Mapping[str, Any]) -> str:
    """The page. Raises jinja2.UndefinedError where the template asks for what `values` lacks."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": _size, "number": "{:,}".format, "compact": _compact, "rate": _rate}
    source = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(values)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _compact(count: int) -> str:
    """A number for a card: all its digits as long as they fit."""
    for size, unit in ((10**10, "G"), (10**7, "M")):
        if count >= size:
            return f"{count / (size // 10):,.1f} {unit}"
    return f"{count:,}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def write_report(
    root: IndexLocation, output: Path, version: int | None = None, *, retriever: str | None = None, device: str = "cpu"
) -> None:
    """Write the page about one generation to `output`, in place of what is there."""
    page = render(gather(root, version, retriever=retriever, device=device))
    temporary = output.with_name(f"{output.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
