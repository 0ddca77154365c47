"""The passage index: one trained quantizer, immutable FAISS segments, and exact search to judge them by.

The only file that imports faiss. Notation: `q` queries, `n` rows, `d` the retriever's width, `k` hits.
Vectors have unit length, so the inner product is the cosine. A hit is (segment, row): the number of a
segment in the order in which its files were given, and the number of a vector in the order added to it.
"""

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from refrag_core.devices import available_cores
from refrag_core.errors import (
    ConfigError,
    CorruptIndexError,
    IndexNotFoundError,
    MissingExtraError,
    StageError,
    UsageError,
)

__all__ = [
    "IndexKind",
    "IndexSpec",
    "NprobeMeasurement",
    "NprobeTuning",
    "SearchResult",
    "VectorIndex",
    "build_segment",
    "choose_index",
    "core_share",
    "exact_search",
    "join_queries",
    "measure_recall",
    "merge_segments",
    "nprobe_values",
    "recall_of",
    "sample_rows",
    "sweep_nprobe",
    "train_quantizer",
    "training_size",
    "tune_nprobe",
]

Floats = NDArray[np.float32]
Vectors = NDArray[np.float16] | NDArray[np.float32]
RowMask = NDArray[np.bool_]
Masks = Sequence[RowMask | None]
_ALL = slice(None)
_Hits = tuple[Floats, NDArray[np.int64]]
_Made = TypeVar("_Made")
IndexKind = Literal["flat", "ivf_sqfp16", "ivf_sq8"]

FLAT_MAX_VECTORS = 4_096
"""Up to here every vector is compared: exact, and faster than going through lists."""

TRAINING_ROWS_PER_LIST = 128
RECALL_TARGET = 0.98
RECALL_DEPTH = 10

_ITERATIONS = 10
_SPLIT = 1 / 1024  # by what share each coordinate moves where a list is split in two
_RANGE_MARGIN = 0.1  # 8-bit codes clip what lies outside the sample's range: later segments get this share more
_ID_BYTES = 8
_ADD_ROWS = 16_384  # fixed, so that how the caller cuts its blocks cannot change a byte of a segment
_BLOCK_ROWS = 2_048  # compared with the centroids at once, by one thread; fixed for the same reason
_LISTS_AT_ONCE = 32  # whose means one thread takes
_TILE_ROWS = 8_192
_MANY = 4  # times as many candidates as hits: then finding the tile's own k-th score first is cheaper
_DEEPER = 8  # times as many hits, where ties ask for more
_PREFILTER_SLACK = 1e-4  # far above the rounding of a float32 product of unit vectors (~1e-6)
_ROW_BITS = 40
_TIMED_QUERIES = 32
_SEAL = struct.Struct("<8sQ")
_SEAL_MAGIC = b"refragvi"


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """What to train.

    Raises ConfigError for an unknown kind, a width below 1, or lists on a flat index (or none on another).
    """

    kind: IndexKind
    """`flat`: float16, exhaustive; `ivf_sqfp16`: inverted lists of float16; `ivf_sq8`: of 8-bit residuals."""
    dim: int
    nlist: int
    """Number of inverted lists; 0 for `flat`."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(IndexKind):
            raise ConfigError(f"index kind is {self.kind!r}; expected one of {', '.join(get_args(IndexKind))}")
        if self.dim < 1:
            raise ConfigError(f"index width is {self.dim}; expected at least 1")
        if (self.kind == "flat") != (self.nlist == 0):
            raise ConfigError(f"{self.kind} index with nlist {self.nlist}; expected 0 for flat, at least 1 otherwise")


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best hits of each query, best first, ties in the order of (segment, row).

    Places without a hit hold score -inf, segment -1 and row -1, after all hits.
    """

    scores: Floats
    """`[q, k]` float32, inner products."""
    segments: NDArray[np.int32]
    """`[q, k]`."""
    rows: NDArray[np.int64]
    """`[q, k]`."""


@dataclass(frozen=True, slots=True)
class NprobeMeasurement:
    """What visiting `nprobe` lists gives: recall@k in [0, 1], median milliseconds of a single query."""

    nprobe: int
    recall: float
    milliseconds: float


@dataclass(frozen=True, slots=True)
class NprobeTuning:
    """The `nprobe` chosen, its recall@k, and every value that was tried, in increasing order."""

    nprobe: int
    recall: float
    table: tuple[NprobeMeasurement, ...]


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "faiss is not installed and searching or building an index needs it; run "
            "`pip install 'refrag[cpu]'`, or `pip install 'refrag[gpu]'` on a host with a GPU (never both)"
        ) from error
    module: ModuleType = faiss
    return module


def trains_on_gpu() -> bool:
    """Whether faiss trains quantizers on a GPU here. Raises MissingExtraError without faiss."""
    return _has_gpu(_faiss())


def _has_gpu(faiss: ModuleType) -> bool:
    # without a device, the GPU wheel's index_cpu_to_all_gpus gives a replica that dies on its first search
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


# ---------------------------------------------------------------------------------------------- choosing


def choose_index(num_vectors: int, dim: int, memory_budget_bytes: int | None = None) -> IndexSpec:
    """The index for `num_vectors` of width `dim`.

    Exhaustive up to `FLAT_MAX_VECTORS`; then inverted lists of float16; of 8-bit codes where the float16
    lists (2·dim + 8 bytes a vector) would exceed `memory_budget_bytes` (None: no bound).
    """
    if num_vectors <= FLAT_MAX_VECTORS:
        return IndexSpec(kind="flat", dim=dim, nlist=0)
    fp16_bytes = num_vectors * (2 * dim + _ID_BYTES)
    fits = memory_budget_bytes is None or fp16_bytes <= memory_budget_bytes
    return IndexSpec(kind="ivf_sqfp16" if fits else "ivf_sq8", dim=dim, nlist=_num_lists(num_vectors))


def _num_lists(num_vectors: int) -> int:
    """The largest power of two up to 2·sqrt(N): 128 lists for 10k vectors, 512 for 100k, 16,384 for 100M."""
    return 1 << (int(2 * num_vectors**0.5).bit_length() - 1)


def training_size(spec: IndexSpec) -> int:
    """How many sampled vectors to train `spec` on; 0 where it needs no training."""
    return TRAINING_ROWS_PER_LIST * spec.nlist


def sample_rows(num_rows_per_shard: Sequence[int], size: int) -> list[NDArray[np.int64]]:
    """Row numbers per shard (increasing) of `size` rows spread evenly over all shards; all rows if fewer.

    A function of its arguments alone: each of `size` equal stretches of the whole gives its middle row.
    """
    if not num_rows_per_shard:
        return []
    lengths = np.asarray(num_rows_per_shard, dtype=np.int64)
    ends = np.cumsum(lengths)
    size = min(size, int(ends[-1]))
    picks = ((2 * np.arange(size, dtype=np.int64) + 1) * ends[-1]) // (2 * max(size, 1))
    parts = np.split(picks, np.searchsorted(picks, ends[:-1]))
    return [part - start for part, start in zip(parts, ends - lengths, strict=True)]


# ---------------------------------------------------------------------------------------------- building


def train_quantizer(sample: Floats, spec: IndexSpec) -> bytes:
    """Train on `sample` float32 `[m, d]` and return the serialised, empty index that segments start from.

    Byte-identical between runs and numbers of threads for one faiss build and kind of processor (CPU). A flat index
    learns nothing from the sample. Raises ConfigError for a sample of another width, of fewer rows than lists, or with
    numbers that are not finite.
    """
    if sample.ndim != 2 or sample.shape[1] != spec.dim:
        raise ConfigError(f"training sample has shape {sample.shape}; expected [rows, {spec.dim}]")
    if len(sample) < spec.nlist:
        raise ConfigError(
            f"training sample has {len(sample)} rows for {spec.nlist} lists; expected at least one a list: "
            "sample more rows or choose fewer lists"
        )
    faiss = _faiss()
    index = _untrained(faiss, spec)
    if not index.is_trained:
        rows = np.ascontiguousarray(sample, dtype=np.float32)
        if not np.isfinite(rows.sum(dtype=np.float64)):
            raise ConfigError("training sample holds numbers that are not finite; expected unit vectors")
        index.quantizer.add(_cluster(faiss, rows, spec.nlist))
        with _num_threads(faiss, 1):  # the centroids are there: what is left is the range of 8-bit codes
            index.train(rows)
    return bytes(faiss.serialize_index(index).tobytes())


def _untrained(faiss: ModuleType, spec: IndexSpec) -> Any:
    codes = faiss.ScalarQuantizer.QT_8bit if spec.kind == "ivf_sq8" else faiss.ScalarQuantizer.QT_fp16
    metric = faiss.METRIC_INNER_PRODUCT
    if spec.kind == "flat":
        return faiss.IndexScalarQuantizer(spec.dim, codes, metric)
    coarse = faiss.IndexFlatIP(spec.dim)
    # residuals make 8-bit codes finer; float16 keeps the vector itself, so its scores are the exact ones
    by_residual = spec.kind == "ivf_sq8"
    index = faiss.IndexIVFScalarQuantizer(coarse, spec.dim, spec.nlist, codes, metric, by_residual)
    index.sq.rangestat_arg = _RANGE_MARGIN
    return index


def _cluster(faiss: ModuleType, rows: Floats, nlist: int) -> Floats:
    """Centroids `[nlist, d]` of unit length: spherical k-means over `rows` `[m, d]`.

    Not faiss's own, whose centroids follow from the number of threads: its products are cut among them, a score's
    last bit depends on the cut, and a row as near to two centroids goes to another list. It begins with rows spread
    evenly over the sample, which lies in the order of the passages.
    """
    (first,) = sample_rows([len(rows)], nlist)
    centroids = rows[first]
    for _ in range(_ITERATIONS):
        coarse = faiss.IndexFlatIP(rows.shape[1])
        coarse.add(centroids)
        centroids = _centroids(faiss, rows, _nearest(faiss, _on_gpus(faiss, coarse), rows), nlist)
    return centroids


def _nearest(faiss: ModuleType, coarse: Any, rows: Floats) -> NDArray[np.int64]:
    """The list `[n]` of each of `rows` `[n, d]`."""

    def search(start: int) -> NDArray[np.int64]:
        return coarse.search(rows[start : start + _BLOCK_ROWS], 1)[1][:, 0]  # type: ignore[no-any-return]

    if _has_gpu(faiss):
        return coarse.search(rows, 1)[1][:, 0]  # type: ignore[no-any-return]
    return np.concatenate(_side_by_side(faiss, search, range(0, len(rows), _BLOCK_ROWS)))


def _centroids(faiss: ModuleType, rows: Floats, lists: NDArray[np.int64], nlist: int) -> Floats:
    """The mean directions `[nlist, d]` of the rows of each list; a list without rows gets half of a large one."""
    order = np.argsort(lists, kind="stable")
    ends = np.searchsorted(lists, np.arange(nlist + 1), sorter=order)
    sums = np.zeros((nlist, rows.shape[1]), dtype=np.float64)

    def add(first: int) -> None:
        for number in range(first, min(first + _LISTS_AT_ONCE, nlist)):
            for start in range(ends[number], ends[number + 1], _ADD_ROWS):
                own = order[start : min(start + _ADD_ROWS, ends[number + 1])]
                sums[number] += rows[own].sum(axis=0, dtype=np.float64)

    _side_by_side(faiss, add, range(0, nlist, _LISTS_AT_ONCE))
    _split_large(sums, np.diff(ends))
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    centroids: Floats = (sums / np.maximum(lengths, np.finfo(np.float64).tiny)).astype(np.float32)
    return centroids


def _side_by_side(faiss: ModuleType, function: Callable[[int], _Made], numbers: Sequence[int]) -> list[_Made]:
    """`function` of each number, as many at a time as faiss has threads; each call has one thread for its products."""
    threads = min(faiss.omp_get_max_threads(), len(numbers))
    if threads <= 1:
        with _num_threads(faiss, 1):
            return list(map(function, numbers))
    # the setting is each thread's own: that of the caller stays as it is
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, numbers))


def _split_large(sums: NDArray[np.float64], sizes: NDArray[np.int64]) -> None:
    """Put the directions of the largest lists in place of those of empty lists, both turned a little, in place."""
    empty = np.flatnonzero(sizes == 0)
    filled = np.argsort(-sizes, kind="stable")[: len(sizes) - len(empty)]
    halved = np.resize(filled, len(empty))
    apart = np.where(np.arange(sums.shape[1]) % 2, 1 + _SPLIT, 1 - _SPLIT)
    sums[empty] = sums[halved] * apart
    sums[np.unique(halved)] *= 2 - apart


def build_segment(quantizer: bytes, blocks: Iterable[Vectors], path: Path) -> int:
    """Add `blocks` (`[n, d]`, in order) to a copy of `quantizer`, write it to `path`, return the row count.

    The file is a faiss index followed by a magic and its length (16 bytes, which faiss itself ignores).
    Byte-identical between runs, numbers of threads and ways of cutting the same rows into blocks (CPU).
    Holds one segment's codes and 16,384 float32 rows in memory. Publishing `path` is the caller's.
    Raises CorruptIndexError for a quantizer that is none, StageError for a block of another width, and OSError
    when the file cannot be written.
    """
    faiss = _faiss()
    index = _deserialize(faiss, quantizer)
    coarse = _on_gpus(faiss, getattr(index, "quantizer", None))
    for rows in _regrouped(blocks, index.d, _ADD_ROWS):
        _add(faiss, index, coarse, rows)
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # what the system said, a full disk for one, is in faiss's text
        raise OSError(f"{path} cannot be written ({error})") from error
    _seal(path)
    return int(index.ntotal)


def _seal(path: Path) -> None:
    """Append the file's length: mapping a file that was cut short can crash faiss or go unnoticed by it."""
    with path.open("ab") as stream:
        stream.write(_SEAL.pack(_SEAL_MAGIC, stream.tell()))


def _is_whole(path: Path) -> bool:
    length = path.stat().st_size - _SEAL.size
    if length < 0:
        return False
    with path.open("rb") as stream:
        stream.seek(length)
        return stream.read() == _SEAL.pack(_SEAL_MAGIC, length)


def _deserialize(faiss: ModuleType, quantizer: bytes) -> Any:
    try:
        return faiss.deserialize_index(np.frombuffer(quantizer, dtype=np.uint8))
    except RuntimeError as error:
        raise CorruptIndexError(
            f"the trained quantizer ({len(quantizer)} bytes) is not a faiss index; expected the output of "
            f"train_quantizer: train again ({error})"
        ) from error


def _on_gpus(faiss: ModuleType, coarse: Any) -> Any:
    """What assigns vectors to lists, on the GPUs where there are any; None (a flat index) stays None."""
    return faiss.index_cpu_to_all_gpus(coarse) if coarse is not None and _has_gpu(faiss) else coarse


def _add(faiss: ModuleType, index: Any, coarse: Any, rows: Floats) -> None:
    if coarse is None:
        index.add(rows)
        return
    lists = np.ascontiguousarray(_nearest(faiss, coarse, rows))
    index.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(lists))


def _regrouped(blocks: Iterable[Vectors], dim: int, size: int) -> Iterator[Floats]:
    """The rows of `blocks` as contiguous float32 blocks of `size` rows, the last one shorter."""
    buffer = np.empty((size, dim), dtype=np.float32)
    filled = 0
    for block in blocks:
        if block.ndim != 2 or block.shape[1] != dim:
            raise StageError(f"block of vectors has shape {block.shape}; expected [rows, {dim}] as trained")
        start = 0
        while start < len(block):
            taken = min(size - filled, len(block) - start)
            buffer[filled : filled + taken] = block[start : start + taken]
            filled, start = filled + taken, start + taken
            if filled == size:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


# --------------------------------------------------------------------------------------------- searching


class VectorIndex:
    """Segments of one trained quantizer, mapped in place and searched as one. Build it with `open`."""

    def __init__(self, segments: Sequence[Any], paths: Sequence[Path], nprobe: int) -> None:
        self._faiss = _faiss()
        self._segments = segments
        self._paths = paths
        self._packed: dict[int, tuple[RowMask, NDArray[np.uint8]]] = {}
        self.dim = int(segments[0].d)
        self.nlist = int(getattr(segments[0], "nlist", 0))
        self.nprobe = self._clamped(nprobe)
        self.rows_per_segment = tuple(int(segment.ntotal) for segment in segments)

    @classmethod
    def open(cls, paths: Sequence[Path], nprobe: int) -> "VectorIndex":
        """Map the segments at `paths`; writes nothing and copies none of their vectors.

        `nprobe` is how many lists a search visits (at most all; without meaning for a flat index).
        Truncation is found here; altered bytes are for the manifest's digests to find, before opening.
        Raises IndexNotFoundError without any path or for a missing file, and CorruptIndexError, naming the
        file, for one that is truncated, no index of this module, or trained apart from the first.
        """
        if not paths:
            raise IndexNotFoundError("no segment files were given; expected at least one: build the index first")
        faiss = _faiss()
        segments = [_map_segment(faiss, path) for path in paths]
        for segment, path in zip(segments, paths, strict=True):
            if not _same_quantizer(segments[0], segment):
                raise CorruptIndexError(
                    f"{path} was built from another trained quantizer than {paths[0]}; expected one for all "
                    "segments: rebuild the vector index"
                )
        return cls(segments, list(paths), nprobe)

    @property
    def num_segments(self) -> int:
        """How many segments are searched."""
        return len(self._segments)

    @property
    def num_rows(self) -> int:
        """Vectors in all segments, deleted ones included."""
        return sum(self.rows_per_segment)

    def search(
        self,
        queries: Floats,
        k: int,
        live: Masks | None = None,
        *,
        allowed: Masks | None = None,
        nprobe: int | None = None,
    ) -> SearchResult:
        """The `k` best live and allowed rows of all segments for `queries` float32 `[q, d]`.

        Args:
            live: one bool mask `[rows]` a segment, or None where nothing was deleted (the tombstones'
                complement). A read-only array is packed once and remembered.
            allowed: likewise, for one request's filter. Where few rows are left, lists that are not
                visited may hold them: use `exact_search`.
            nprobe: lists to visit, in place of the index's own.

        All rows tied at the last place are compared, so that the order by (score, segment, row) is exact
        among the rows visited.
        Raises UsageError for a k below 1, queries of another width, or masks that do not fit the segments.
        """
        queries = self._checked_queries(queries, k)
        bitmaps = [self._bitmap(number, live, allowed) for number in range(self.num_segments)]
        with _no_idle_threads(self._faiss, len(queries)):
            lists = self._nearest_lists(queries, self.nprobe if nprobe is None else self._clamped(nprobe))
            return self._search_lists(queries, k, lists, bitmaps)

    def search_each(
        self,
        queries: Floats,
        k: int,
        nprobes: Sequence[int],
        live: Masks | None = None,
        *,
        asked: slice = _ALL,
    ) -> Iterator[SearchResult]:
        """What `search` finds with each of `nprobes` (increasing), for the queries `asked`: `[q of these, k]` each.

        Each visits only the lists that the one before did not. All `queries` are needed to choose the lists: the
        scores of a part of them may be rounded differently.
        Raises UsageError as `search` does.
        """
        queries = self._checked_queries(queries, k)
        bitmaps = [self._bitmap(number, live, None) for number in range(self.num_segments)]
        own = np.ascontiguousarray(queries[asked])
        found: SearchResult | None = None
        visited: _Hits | None = None
        for lists in self._lists_of_each(queries, [self._clamped(nprobe) for nprobe in nprobes], asked):
            fresh = _unvisited(lists, visited, self.nlist)
            with _no_idle_threads(self._faiss, len(own)):
                more = self._search_lists(own, k, lists if fresh is None else fresh, bitmaps)
            found = more if found is None or fresh is None else _better(found, more)
            visited = lists
            yield found

    def _lists_of_each(self, queries: Floats, nprobes: Sequence[int], asked: slice) -> Iterator[_Hits | None]:
        """The lists that `search` visits for each of `nprobes`, for the queries `asked`.

        They are the first of those for the largest, unless lists at either side of the cut are equally near: which of
        these is taken is only known by asking.
        """
        with _num_threads(self._faiss, 1):
            most = self._nearest_lists(queries, max(nprobes, default=1))
        for nprobe in nprobes:
            lists = most
            if most is not None and nprobe < most[0].shape[1]:
                lists = (most[0][:, :nprobe], most[1][:, :nprobe])
                if not (most[0][asked, nprobe - 1] > most[0][asked, nprobe]).all():
                    with _num_threads(self._faiss, 1):
                        lists = self._nearest_lists(queries, nprobe)
            yield None if lists is None else (lists[0][asked], lists[1][asked])

    def _search_lists(
        self, queries: Floats, k: int, lists: _Hits | None, bitmaps: Sequence[NDArray[np.uint8] | None]
    ) -> SearchResult:
        """The `k` best rows of these lists (None for a flat index) in all segments."""
        found = [
            _resolve_ties(partial(self._raw_search, segment, queries, lists, bitmap), len(queries), k, rows)
            for segment, bitmap, rows in zip(self._segments, bitmaps, self.rows_per_segment, strict=True)
        ]
        return _merge(found, k)

    def _clamped(self, nprobe: int) -> int:
        if nprobe < 1:
            raise UsageError(f"nprobe is {nprobe}; expected at least 1")
        return min(nprobe, max(self.nlist, 1))

    def _checked_queries(self, queries: Floats, k: int) -> Floats:
        if k < 1:
            raise UsageError(f"asked for {k} hits; expected at least 1")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise UsageError(
                f"queries have shape {queries.shape}; expected [queries, {self.dim}]: embed them with the "
                "retriever that the index was built with"
            )
        return np.ascontiguousarray(queries, dtype=np.float32)

    def _bitmap(self, number: int, live: Masks | None, allowed: Masks | None) -> NDArray[np.uint8] | None:
        """Bits of the rows of segment `number` that may be found; None for all of them."""
        alive = self._mask(number, live, "tombstones")
        passing = self._mask(number, allowed, "filter")
        if passing is not None:
            return np.packbits(passing if alive is None else passing & alive, bitorder="little")
        if alive is None:
            return None
        if alive.flags.writeable:
            return np.packbits(alive, bitorder="little")
        if number not in self._packed or self._packed[number][0] is not alive:
            self._packed[number] = (alive, np.packbits(alive, bitorder="little"))
        return self._packed[number][1]

    def _mask(self, number: int, masks: Masks | None, name: str) -> RowMask | None:
        if masks is None:
            return None
        if len(masks) != self.num_segments:
            raise UsageError(f"{name} of {len(masks)} segments for an index of {self.num_segments}; expected one each")
        mask = masks[number]
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (self.rows_per_segment[number],)):
            raise UsageError(
                f"{name} of {self._paths[number].name} are {mask.dtype} {mask.shape}; expected bool "
                f"({self.rows_per_segment[number]},), one a row"
            )
        return mask

    def _nearest_lists(self, queries: Floats, nprobe: int) -> _Hits | None:
        """Scores and numbers of the lists to visit, found once: all segments share their centroids."""
        if not self.nlist:
            return None
        return self._segments[0].quantizer.search(queries, nprobe)  # type: ignore[no-any-return]

    def _raw_search(
        self,
        segment: Any,
        queries: Floats,
        lists: _Hits | None,
        bitmap: NDArray[np.uint8] | None,
        asked: NDArray[np.int64],
        depth: int,
    ) -> _Hits:
        """Up to `depth` best hits in one segment of the queries with these numbers, best first, padded with row -1."""
        faiss = self._faiss
        queries = np.ascontiguousarray(queries[asked])
        selector = None if bitmap is None else faiss.IDSelectorBitmap(bitmap)
        if lists is None:
            return segment.search(queries, depth, params=faiss.SearchParameters(sel=selector))  # type: ignore[no-any-return]
        scores = np.empty((len(queries), depth), dtype=np.float32)
        rows = np.empty((len(queries), depth), dtype=np.int64)
        list_scores, list_numbers = (np.ascontiguousarray(each[asked]) for each in lists)
        segment.search_preassigned_c(
            *(len(queries), faiss.swig_ptr(queries), depth),
            *(faiss.swig_ptr(list_numbers), faiss.swig_ptr(list_scores)),
            *(faiss.swig_ptr(scores), faiss.swig_ptr(rows), False),
            faiss.SearchParametersIVF(sel=selector, nprobe=list_numbers.shape[1]),
        )
        return scores, rows


@contextmanager
def _num_threads(faiss: ModuleType, num_threads: int) -> Iterator[None]:
    """What faiss and its linear algebra use within, in this thread: the setting is a thread's own."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def core_share(beside: int) -> Iterator[None]:
    """Let faiss use, in this thread, a share of the cores: one of `beside` that work side by side. Never more than
    it would use anyway.
    """
    faiss = _faiss()
    with _num_threads(faiss, max(1, min(faiss.omp_get_max_threads(), available_cores() // max(1, beside)))):
        yield


def _no_idle_threads(faiss: ModuleType, num_queries: int) -> AbstractContextManager[None]:
    """At most one thread a query: FAISS divides queries, and waiting for threads that have none to do costs
    a single search tens of milliseconds where other work wants the cores.
    """
    return _num_threads(faiss, max(1, min(faiss.omp_get_max_threads(), num_queries)))


def _map_segment(faiss: ModuleType, path: Path) -> Any:
    if not path.is_file():
        raise IndexNotFoundError(f"{path} is missing; expected a segment of the vector index: verify the index")
    if not _is_whole(path):
        raise CorruptIndexError(
            f"{path} ({path.stat().st_size} bytes) does not end in its own length; expected a whole segment "
            "as build_segment writes it: verify the index and repair it"
        )
    try:
        segment = _read(faiss, path)
    except (RuntimeError, MemoryError) as error:
        raise CorruptIndexError(
            f"{path} is not a faiss index; expected a segment: verify the index and repair it ({error})"
        ) from error
    known = isinstance(segment, faiss.IndexScalarQuantizer | faiss.IndexIVFScalarQuantizer)
    if not known or segment.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise CorruptIndexError(
            f"{path} holds a {type(segment).__name__}; expected a scalar-quantised inner-product index as "
            "build_segment writes it: rebuild the vector index"
        )
    return segment


def _read(faiss: ModuleType, path: Path) -> Any:
    """Mapped where the file system can (`IO_FLAG_MMAP_IFC`), else read into memory."""
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (AttributeError, RuntimeError):
        return faiss.read_index(str(path))


def _same_quantizer(first: Any, other: Any) -> bool:
    """Equal type, width and lists; three centroids stand for all, so that opening stays cheap."""
    nlist = getattr(first, "nlist", 0)
    if (type(first), first.d, nlist) != (type(other), other.d, getattr(other, "nlist", 0)):
        return False
    if first.sq.qtype != other.sq.qtype:
        return False
    return all(
        np.array_equal(first.quantizer.reconstruct(i), other.quantizer.reconstruct(i))
        for i in ([0, nlist // 2, nlist - 1] if nlist else [])
    )


def _resolve_ties(search: Callable[[NDArray[np.int64], int], _Hits], num_queries: int, k: int, num_rows: int) -> _Hits:
    """Search deeper for the queries whose k-th hit ties with the last found: FAISS keeps any of those.

    Only for these: an index with thousands of equal vectors has some queries among them, and a deep search costs.
    """
    asked, depth = np.arange(num_queries), min(k + 1, num_rows) or 1
    scores, rows = search(asked, depth)
    asked = _tied(scores, rows, k)
    while depth < num_rows and len(asked):
        depth = min(_DEEPER * depth, num_rows)
        deeper = search(asked, depth)
        for query, its_scores, its_rows in zip(asked, *deeper, strict=True):
            scores[query, :k], rows[query, :k] = _first_of_ties(its_scores, its_rows, k)
        rows[asked, k:] = -1
        asked = asked[_tied(*deeper, k)]
    return scores, rows


def _first_of_ties(scores: Floats, rows: NDArray[np.int64], k: int) -> _Hits:
    """The best `k` of one query's hits, which come best first, in the order of their rows where scores are equal."""
    equal_or_better = int((scores >= scores[k - 1]).sum())
    order = np.lexsort((rows[:equal_or_better], -scores[:equal_or_better]))[:k]
    return scores[order], rows[order]


def _tied(scores: Floats, rows: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Numbers of the queries whose k-th hit is no better than the last, beyond which there may be more like it."""
    return np.flatnonzero((rows[:, -1] >= 0) & (scores[:, -1] == scores[:, min(k, scores.shape[1]) - 1]))


def _unvisited(lists: _Hits | None, visited: _Hits | None, nlist: int) -> _Hits | None:
    """Of each query's `lists`, those that are not among its `visited`; None where not all of these are among them."""
    if lists is None or visited is None:
        return None
    num_queries, width = lists[1].shape
    seen = np.zeros((num_queries, nlist), dtype=np.bool_)
    np.put_along_axis(seen, visited[1], True, axis=1)
    fresh = ~np.take_along_axis(seen, lists[1], axis=1)
    left = width - visited[1].shape[1]
    if left < 1 or not (fresh.sum(axis=1) == left).all():
        return None
    return lists[0][fresh].reshape(num_queries, left), lists[1][fresh].reshape(num_queries, left)


def _better(found: SearchResult, more: SearchResult) -> SearchResult:
    """The best of two results for the same queries, as wide as the first, from rows that they do not share."""
    return _best(
        np.concatenate([found.scores, more.scores], axis=1),
        np.concatenate([found.segments, more.segments], axis=1),
        np.concatenate([found.rows, more.rows], axis=1),
        found.rows.shape[1],
    )


def _merge(found: Sequence[_Hits], k: int) -> SearchResult:
    """The best `k` of all segments' hits `[q, depth]`; row -1 marks no hit."""
    segments = np.concatenate(
        [np.where(rows < 0, -1, number).astype(np.int32) for number, (_, rows) in enumerate(found)], axis=1
    )
    rows = np.concatenate([rows for _, rows in found], axis=1)
    scores = np.where(rows < 0, -np.inf, np.concatenate([scores for scores, _ in found], axis=1)).astype(np.float32)
    return _best(scores, segments, rows, k)


def _best(scores: Floats, segments: NDArray[np.int32], rows: NDArray[np.int64], k: int) -> SearchResult:
    """The best `k` of each query's hits `[q, any number]`; no hit has score -inf."""
    best = np.arange(len(rows))[:, None], np.lexsort((rows, segments, -scores), axis=1)[:, :k]
    return SearchResult(
        scores=_filled(scores[best], k, -np.inf),
        segments=_filled(segments[best], k, -1),
        rows=_filled(rows[best], k, -1),
    )


def _filled(values: NDArray[Any], k: int, missing: float) -> NDArray[Any]:
    """`[q, k]`: the values `[q, at most k]` with `missing` behind them."""
    filled = np.full((len(values), k), missing, dtype=values.dtype)
    filled[:, : values.shape[1]] = values
    return filled


def merge_segments(found: Iterable[SearchResult], k: int) -> SearchResult:
    """The best `k` of what was found in each segment alone, in the order of the segments.

    What searching all of them at once gives, hit for hit, from searches that ran in different processes.
    """
    return _merge([(result.scores, result.rows) for result in found], k)


def join_queries(results: Sequence[SearchResult]) -> SearchResult:
    """One result of those for consecutive parts of the queries, `[q of all, k]`."""
    return SearchResult(
        scores=np.concatenate([result.scores for result in results]),
        segments=np.concatenate([result.segments for result in results]),
        rows=np.concatenate([result.rows for result in results]),
    )


def nprobe_values(nlist: int) -> list[int]:
    """The powers of two below `nlist`, and it: what is tried in turn until the recall suffices."""
    return [*(1 << power for power in range(nlist.bit_length()) if 1 << power < nlist), max(1, nlist)]


def exact_search(
    segments: Iterable[Iterable[Vectors]], queries: Floats, k: int, live: Masks | None = None
) -> SearchResult:
    """The true `k` best rows for `queries` float32 `[q, d]`, comparing every live row. Needs no FAISS.

    Args:
        segments: for each segment its vectors as blocks `[n, d]` in order (memory maps will do: 8,192
            rows are converted and compared at a time, whatever the blocks); the blocks need not be those that the
            index was built from.
        live: one bool mask a segment over the rows of all its blocks, or None for all.

    Equal vectors get equal scores, so ties fall in the order of (segment, row) here as in the index.
    Raises UsageError for a k below 1 or masks that do not fit.
    """
    if k < 1:
        raise UsageError(f"asked for {k} hits; expected at least 1")
    best = _merge([(_no_scores(len(queries)), _no_rows(len(queries)))], k)
    number = -1
    for number, blocks in enumerate(segments):
        mask = None if live is None or number >= len(live) else live[number]
        best = _exact_segment(blocks, number, queries, mask, best)
    if live is not None and len(live) != number + 1:
        raise UsageError(f"masks of {len(live)} segments for {number + 1} segments of vectors; expected one each")
    return best


def _no_scores(num_queries: int) -> Floats:
    return np.full((num_queries, 1), -np.inf, dtype=np.float32)


def _no_rows(num_queries: int) -> NDArray[np.int64]:
    return np.full((num_queries, 1), -1, dtype=np.int64)


def _exact_segment(
    blocks: Iterable[Vectors], number: int, queries: Floats, mask: RowMask | None, best: SearchResult
) -> SearchResult:
    start = 0
    for tile in _regrouped(blocks, queries.shape[1], _TILE_ROWS):
        rows = np.arange(start, start + len(tile), dtype=np.int64)
        start += len(tile)
        if mask is not None:
            if start > len(mask):
                raise UsageError(f"mask of segment {number} has {len(mask)} rows; expected one for every vector")
            kept = mask[rows]
            tile, rows = tile[kept], rows[kept]
        if len(rows):
            best = _with_tile(best, number, rows, tile, queries)
    if mask is not None and start != len(mask):
        raise UsageError(f"mask of segment {number} has {len(mask)} rows; expected {start}, one a vector")
    return best


def _with_tile(best: SearchResult, number: int, rows: NDArray[np.int64], tile: Floats, queries: Floats) -> SearchResult:
    """`best` with the rows of `tile` `[n, d]` taken in; rows come in increasing (segment, row) order."""
    approximate = queries @ tile.T
    k = best.rows.shape[1]
    passing = _candidates(approximate, best.scores[:, -1], k)
    scores, segments, kept_rows = best.scores.copy(), best.segments.copy(), best.rows.copy()
    for query in np.flatnonzero(passing.any(axis=1)):
        candidates = np.flatnonzero(passing[query])
        # a matrix product rounds equal rows differently by their place in it; a sum along each row does not
        exact = np.concatenate([best.scores[query], (tile[candidates] * queries[query]).sum(axis=1)])
        order = np.argsort(-exact, kind="stable")[:k]
        scores[query] = exact[order]
        segments[query] = np.concatenate([best.segments[query], np.full(len(candidates), number, np.int32)])[order]
        kept_rows[query] = np.concatenate([best.rows[query], rows[candidates]])[order]
    return SearchResult(scores=scores, segments=segments, rows=kept_rows)


def _candidates(approximate: Floats, kth: Floats, k: int) -> RowMask:
    """Bool `[q, n]`: which rows may be among a query's best `k` by their `approximate` scores `[q, n]`.

    `kth` `[q]` is the k-th best score so far, -inf before there are as many.
    """
    passing = approximate >= (kth - np.float32(_PREFILTER_SLACK))[:, None]
    num_rows = approximate.shape[1]
    if num_rows > k:
        many = np.flatnonzero(np.count_nonzero(passing, axis=1) > _MANY * k)
        own = np.partition(approximate[many], num_rows - k, axis=1)[:, num_rows - k]
        passing[many] &= approximate[many] >= (own - np.float32(_PREFILTER_SLACK))[:, None]
    return passing


# --------------------------------------------------------------------------------------------- measuring


def measure_recall(
    index: VectorIndex,
    exact_hits: SearchResult,
    queries: Floats,
    k: int = RECALL_DEPTH,
    *,
    live: Masks | None = None,
    nprobe: int | None = None,
) -> float:
    """Recall@k in [0, 1]: the share of the true hits (`exact_search` of the same rows) that `index` finds.

    Raises UsageError when `exact_hits` are fewer than k wide, of other queries, or empty.
    """
    if exact_hits.rows.shape[0] != len(queries) or exact_hits.rows.shape[1] < k:
        raise UsageError(f"exact hits have shape {exact_hits.rows.shape}; expected [{len(queries)}, at least {k}]")
    return recall_of(index.search(queries, k, live, nprobe=nprobe), exact_hits, k)


def recall_of(found: SearchResult, exact_hits: SearchResult, k: int = RECALL_DEPTH) -> float:
    """Recall@k in [0, 1]: the share of the true hits that are among those found.

    Raises UsageError when there are no true hits.
    """
    truth = _hit_numbers(exact_hits)[:, :k]
    num_true = int((truth >= 0).sum())
    if not num_true:
        raise UsageError("no query has a true hit; expected at least one live row and one query")
    hits = _hit_numbers(found)
    num_found = sum(int(np.isin(t[t >= 0], f).sum()) for t, f in zip(truth, hits, strict=True))
    return num_found / num_true


def _hit_numbers(hits: SearchResult) -> NDArray[np.int64]:
    """One number a hit; negative for none."""
    return (hits.segments.astype(np.int64) << _ROW_BITS) + hits.rows


def tune_nprobe(
    index: VectorIndex,
    exact_hits: SearchResult,
    queries: Floats,
    *,
    target: float = RECALL_TARGET,
    k: int = RECALL_DEPTH,
    live: Masks | None = None,
) -> NprobeTuning:
    """The smallest power of two whose recall@k reaches `target`, else the largest that the lists allow.

    Whether the recall reached suffices is the caller's to judge (RecallGateError). `milliseconds` is a
    clock's and differs between runs; the choice does not depend on it.
    """
    table: list[NprobeMeasurement] = []
    for nprobe in nprobe_values(index.nlist):
        recall = measure_recall(index, exact_hits, queries, k, live=live, nprobe=nprobe)
        milliseconds = _median_milliseconds(index, queries, k, live, nprobe)
        table.append(NprobeMeasurement(nprobe=nprobe, recall=recall, milliseconds=milliseconds))
        if recall >= target:
            break
    return NprobeTuning(nprobe=table[-1].nprobe, recall=table[-1].recall, table=tuple(table))


def sweep_nprobe(
    index: VectorIndex,
    exact_hits: SearchResult,
    queries: Floats,
    *,
    k: int = RECALL_DEPTH,
    live: Masks | None = None,
) -> tuple[NprobeMeasurement, ...]:
    """Recall@k and milliseconds a query at every power of two up to all lists: what speed costs. One row if flat."""
    return tuple(
        NprobeMeasurement(
            nprobe=nprobe,
            recall=measure_recall(index, exact_hits, queries, k, live=live, nprobe=nprobe),
            milliseconds=_median_milliseconds(index, queries, k, live, nprobe),
        )
        for nprobe in nprobe_values(index.nlist)
    )


def _median_milliseconds(index: VectorIndex, queries: Floats, k: int, live: Masks | None, nprobe: int) -> float:
    seconds = []
    for query in queries[:_TIMED_QUERIES]:
        start = time.perf_counter()
        index.search(query[None], k, live, nprobe=nprobe)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds))
