"""What a CUDA device does with the main job, beside the CPU: `python -m benchmarks.gpu_check CORPUS --output FILE`.

Builds the same index on both (equal content ids, embeddings within rounding), forces an out-of-memory error, times
the encode stage on full chunks, and answers one question. Prints JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refrag.pipelines.build import BuildOptions, BuildReport, build_index
from refrag.pipelines.components import ModelOptions
from refrag.pipelines.engines.local import LocalEngine
from refrag_core.checkpoint import load_checkpoint
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.index_reader import IndexReader
from refrag_core.runtime import AskOptions, Runtime

QUESTION = "In which city was the poet Omar Khayyam born?"


def say(message: str) -> None:
    """A line for the log."""
    print(message, file=sys.stderr, flush=True)


def build(corpus: Path, output: Path, device: str, workers: int) -> BuildReport:
    """Index `corpus` on one device."""
    options = BuildOptions(
        corpus=CorpusOptions((str(corpus),)), output=output, models=ModelOptions(device=device), shard_bytes=1 << 20
    )
    with LocalEngine(workers) as engine:
        return build_index(options, engine)


def head(corpus: Path, target: Path, lines: int) -> Path:
    """The first `lines` records of a .jsonl corpus."""
    target.mkdir()
    source = next(corpus.glob("*.jsonl"))
    (target / source.name).write_text("".join(source.read_text().splitlines(keepends=True)[:lines]))
    return target


def compare(cpu: Path, cuda: Path) -> dict[str, float]:
    """Relative error of every chunk embedding, CUDA against CPU, of the same index content."""
    left, right = IndexReader(cpu), IndexReader(cuda)
    errors = []
    for number in range(len(left.manifest.shards)):
        a, b = (r.shard(number).embeddings for r in (left, right))
        x, y = (c.slice(0, c.num_rows).astype(np.float32) for c in (a, b))
        errors.append(np.linalg.norm(x - y, axis=1) / np.linalg.norm(x, axis=1))
    return {"mean": float(np.concatenate(errors).mean()), "max": float(np.concatenate(errors).max())}


def encode_rates(chunk_sizes: tuple[int, ...], rows: int) -> dict[str, float]:
    """Chunks a second of the encoder on full random chunks, host to host, best of three after one warm-up."""
    encoder = load_checkpoint().load_encoder(device="cuda")
    generator = np.random.default_rng(0)
    rates = {}
    for k in chunk_sizes:
        tokens = generator.integers(0, 49152, (rows, k), dtype=np.int32)
        lengths = np.full(rows, k, np.int16)
        encoder.encode(tokens[: rows // 4], lengths[: rows // 4])
        rates[str(k)] = rows / min(_seconds(lambda t=tokens, n=lengths: encoder.encode(t, n)) for _ in range(3))
        say(f"k={k}: {rates[str(k)]:,.0f} chunks/s")
    return rates


def _seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def out_of_memory() -> dict[str, Any]:
    """Encode with batches that cannot fit: they are halved, and the result is the same within rounding."""
    tokens = np.random.default_rng(1).integers(0, 49152, (400_000, 32), dtype=np.int32)
    lengths = np.full(len(tokens), 32, np.int16)
    expected = load_checkpoint().load_encoder(device="cuda").encode(tokens, lengths).astype(np.float32)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.03)
    try:
        crowded = load_checkpoint().load_encoder(device="cuda", batch_rows=400_000)
        made = crowded.encode(tokens, lengths).astype(np.float32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = np.linalg.norm(made - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return {"asked_rows": 400_000, "max_relative_error": float(error.max())}


def ask(index: Path) -> dict[str, Any]:
    """One question on CUDA in bfloat16, after a first one to warm up, and on the CPU in float32."""
    options = AskOptions(policy="all", top_k=3, max_new_tokens=32)
    runtime = Runtime.open(index, device="cuda")
    runtime.ask(QUESTION, options)
    answer = runtime.ask(QUESTION, options)
    slow = Runtime.open(index, device="cpu").ask(QUESTION, options)
    return {
        "cuda": answer.answer,
        "cpu": slow.answer,
        "cuda_ttft_ms": answer.stats.ttft_ms,
        "cpu_ttft_ms": slow.stats.ttft_ms,
    }


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compared", type=int, default=400, help="documents in the comparison with the CPU")
    parser.add_argument("--rows", type=int, default=2_000_000, help="chunks in a timed run")
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        some = head(arguments.corpus, root / "some", arguments.compared)
        say("comparing devices")
        cuda, cpu = (build(some, root / device, device, arguments.workers) for device in ("cuda", "cpu"))
        result: dict[str, Any] = {
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "equal_content_ids": cuda.content_id == cpu.content_id,
            "embedding_relative_error": compare(root / "cpu", root / "cuda"),
        }
        say(json.dumps(result))
        result["out_of_memory"] = out_of_memory()
        say(json.dumps(result["out_of_memory"]))
        result["encode_chunks_per_s"] = encode_rates((8, 16, 32), arguments.rows)
        say("building from the whole corpus")
        whole = build(arguments.corpus, root / "whole", "cuda", arguments.workers)
        result["build"] = {
            "documents": whole.indexed, "passages": whole.passages, "chunks": whole.chunks, "tokens": whole.tokens,
            "recall_at_10": whole.recall_at_10, "seconds": whole.seconds, "steps": dict(whole.steps),
        }  # fmt: skip
        result["ask"] = ask(root / "whole")
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
