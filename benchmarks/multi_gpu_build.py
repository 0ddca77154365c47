"""The encode stage on one GPU and on two or more, through Ray: `refrag index build --engine ray --device-workers N`.

    python -m benchmarks.multi_gpu_build [--workers 1 2] [--megabytes 16] [--encoder roberta-large]
        [--cpus 32] [--device cuda|cpu] [--output FILE]

Builds one corpus of pseudo-words once for each number of device workers, each with a GPU of its own, on a Ray of this
process's own. Encoder and retriever are a random body of the given shape (by default that of the encoder in the
REFRAG paper), so that the GPUs have the work and not the tokenizers. `chunks_per_s` is of the chunks that were
finished after as many shards as there are workers, over the time since then: starting Ray and loading the models is
left out, and told as `first_shard_seconds`. `seconds` is the whole step. `speedup` is the rate over that of the first
number of workers. All builds must have the same content id.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.build import MEGABYTE, write_corpus, write_models
from benchmarks.encoder_shapes import SHAPES
from benchmarks.measurement import add_output, finish, load, say
from refrag.pipelines.build import BuildOptions, BuildReport, build_index
from refrag.pipelines.components import ModelOptions
from refrag.pipelines.engines.ray import RayEngine, RayOptions
from refrag_core.corpus.sources import CorpusOptions

_STEP = "encode"


@dataclass(slots=True)
class Timeline:
    """When how many documents of the encode step were done."""

    step: str = ""
    began: float = 0.0
    ended: float = 0.0
    done: list[tuple[float, int]] = field(default_factory=list)

    def start(self, step: str, total: int | None, unit: str) -> None:
        """A step begins."""
        self.step = step
        say(f"  {step}: {total} {unit}")
        if step == _STEP:
            self.began = time.perf_counter()

    def advance(self, amount: int) -> None:
        """A shard, or more of the scan, is done."""
        if self.step == _STEP:
            self.done.append((time.perf_counter(), amount))

    def finish(self) -> None:
        """The step is over."""
        if self.step == _STEP:
            self.ended = time.perf_counter()

    def note(self, message: str) -> None:
        """A line for the log."""
        say(f"  {message}")

    def rate(self, workers: int) -> float:
        """Documents a second after the first shard of every worker."""
        began, later = self.done[workers - 1][0], self.done[workers:]
        return sum(amount for _, amount in later) / (later[-1][0] - began)


def build(
    corpus: Path, output: Path, models: ModelOptions, workers: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One index, by `workers` device workers."""
    timeline = Timeline()
    ray = RayOptions(device=options.device, device_workers=(workers, workers), local_cpus=options.cpus)
    shard_bytes = int(options.megabytes * MEGABYTE / options.shards)
    made = BuildOptions(corpus=CorpusOptions((str(corpus),)), output=output, models=models, shard_bytes=shard_bytes)
    with RayEngine(ray, timeline) as engine:
        report: BuildReport = build_index(made, engine, timeline)
    return {
        "content_id": report.content_id,
        "chunks": report.chunks,
        "tokens": report.tokens,
        "seconds": round(timeline.ended - timeline.began, 3),
        "first_shard_seconds": round(timeline.done[0][0] - timeline.began, 3),
        "chunks_per_s": round(timeline.rate(workers) * report.chunks / report.indexed, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=float, default=16.0)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--encoder", choices=SHAPES, default="roberta-large")
    parser.add_argument("--cpus", type=int, default=None, help="of Ray; the machine's cores by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_output(parser)
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="refrag-gpus-") as folder:
        work = Path(folder)
        models = write_models(work, options.encoder, chunk_size=16, device=options.device)
        corpus = work / "corpus"
        write_corpus(corpus, options.megabytes)
        for workers in options.workers:
            say(f"{workers} device workers on {options.device}")
            made = build(corpus, work / f"index-{workers}", models, workers, options)
            found[str(workers)] = made | {"load_average": load()}
            say(f"{workers} device workers: {made['chunks_per_s']:,.0f} chunks/s")
    first = found[str(options.workers[0])]
    for made in found.values():
        made["speedup"] = round(made["chunks_per_s"] / first["chunks_per_s"], 3)
    equal = len({made["content_id"] for made in found.values()}) == 1
    given = {name: value for name, value in vars(options).items() if name != "output"}
    finish("multi_gpu_build", given, {"device_workers": found, "equal": equal}, options.output)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
