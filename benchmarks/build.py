"""`refrag index build` from text to a committed index, and what its slowest stage would allow by itself.

    refrag bench build --megabytes 1000 --encoder minilm --chunk-size 16 --json

Text of invented words is made first, in JSON lines; models have random weights in the encoder's shape. A first, small
build loads the retriever and compiles kernels in this process, and is not counted; the encoder lies in the index and is
loaded, and its graphs captured, again. A stage's `own_mb_per_s` is the text over the seconds that it was at work
(tokenizing over those of its processes side by side, encoding and embedding over those of their threads, but never
less than their models took): `share_of_slowest` is the whole build's rate over the slowest stage's own. `parts` are a
stage's seconds by part, summed over what runs side by side.
"""

import importlib.util
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refrag.benchmarks.decoder_shapes import word_tokenizer
from refrag.benchmarks.encoder_shapes import piece_tokenizer, shaped_body, words_of
from refrag.benchmarks.measurement import environment, say
from refrag.pipelines.build import BuildOptions, BuildReport, build_index
from refrag.pipelines.components import ModelOptions
from refrag.pipelines.engines.local import LocalEngine, default_workers, threads_for
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.errors import MissingExtraError

MEGABYTE = 1_000_000
_BLOCK_WORDS = 2_000_000
_DOCUMENT_WORDS = 220
_WARM_UP_MEGABYTES = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildBenchOptions:
    """What is built."""

    megabytes: float = 1_000.0
    """MB of text."""
    encoder: str = "minilm"
    """Shape of encoder body and retriever."""
    chunk_size: int = 16
    workers: int | None = None
    """Tokenizing processes; None takes the default."""
    shard_bytes: int | None = None
    device: str = "cuda"


def measure(options: BuildBenchOptions) -> dict[str, Any]:
    """The report; says what is left out where faiss is missing."""
    report: dict[str, Any] = {"environment": environment() | {"device": options.device}, "rows": [], "left_out": []}
    if options.device.startswith("cuda"):
        report["environment"]["gpu"] = torch.cuda.get_device_name()
    if importlib.util.find_spec("faiss") is None:
        report["left_out"] = ["the whole build: faiss is missing and an index cannot be made (pip install faiss-cpu)"]
        return report
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        models = write_models(root, options.encoder, chunk_size=options.chunk_size, device=options.device)
        _build(root, "first", _WARM_UP_MEGABYTES, models, options)
        started = time.perf_counter()
        made = _build(root, "whole", options.megabytes, models, options)
        report |= _summary(made, options, report, time.perf_counter() - started)
    return report


def write_models(root: Path, shape: str, *, chunk_size: int, device: str) -> ModelOptions:
    """Folders of an encoder body, which is the retriever too, and of a decoder that only lends its tokenizer."""
    say(f"models in the shape of {shape}")
    pieces, words = piece_tokenizer(), word_tokenizer(49_152)
    shaped_body(shape, pieces.get_vocab_size()).save_pretrained(root / "encoder")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=256, **special).save_pretrained(root / "encoder")
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "decoder")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=words.id_to_token(1)).save_pretrained(root / "decoder")
    return ModelOptions(
        encoder=str(root / "encoder"),
        decoder=str(root / "decoder"),
        retriever=str(root / "encoder"),
        chunk_size=chunk_size,
        device=device,
    )


def write_corpus(folder: Path, megabytes: float) -> int:
    """JSON lines of so much text, every document another; returns its bytes."""
    folder.mkdir(parents=True)
    words, written, number = words_of(min(_BLOCK_WORDS, int(megabytes * MEGABYTE / 4))), 0, 0
    while written < megabytes * MEGABYTE:
        with (folder / f"part-{number:06d}.jsonl").open("w", encoding="utf-8") as stream:
            for start in range(number % _DOCUMENT_WORDS, len(words), _DOCUMENT_WORDS):
                text = f"{' '.join(words[start : start + _DOCUMENT_WORDS])}. {number}"
                stream.write(json.dumps({"id": f"{number}-{start}", "text": text}) + "\n")
                written += len(text)
                if written >= megabytes * MEGABYTE:
                    break
        number += 1
    return written


def _build(root: Path, name: str, megabytes: float, models: ModelOptions, options: BuildBenchOptions) -> BuildReport:
    corpus = root / f"corpus-{name}"
    written = write_corpus(corpus, megabytes)
    say(f"building from {written / MEGABYTE:,.1f} MB")
    chosen = BuildOptions(
        corpus=CorpusOptions((str(corpus),)),
        output=root / f"index-{name}",
        models=models,
        shard_bytes=options.shard_bytes,
        min_recall=0.0,
    )
    with LocalEngine(options.workers) as engine:
        return build_index(chosen, engine)


def _summary(
    made: BuildReport, options: BuildBenchOptions, report: Mapping[str, Any], wall_seconds: float
) -> dict[str, Any]:
    workers = default_workers() if options.workers is None else max(1, options.workers)
    threads = threads_for([options.device])
    rows = []
    for stage, seconds in made.steps.items():
        parts = made.parts.get(stage, {})
        beside = {"tokenize": workers, "embeddings": threads, "vectors": threads}.get(stage, 1)
        side_by_side = max(seconds / beside, parts.get("model", 0.0) + parts.get("capture", 0.0))
        row: dict[str, Any] = {"stage": stage, "seconds": round(side_by_side, 3)}
        row["own_mb_per_s"] = round(options.megabytes / side_by_side, 2) if side_by_side > 0 else None
        if parts:
            row["parts"] = dict(parts)
        rows.append(row)
        say(f"{stage}: {side_by_side:.2f} s {row.get('parts', '')}")
    slowest = max(rows, key=lambda row: row["seconds"])
    say(f"{made.seconds:.1f} s in all; slowest by itself: {slowest['stage']}, {slowest['seconds']:.1f} s")
    return {
        "environment": {**report["environment"], "workers": workers, "encoder": options.encoder},
        "rows": rows,
        "megabytes": options.megabytes,
        "seconds": made.seconds,
        "wall_seconds": round(wall_seconds, 3),
        "mb_per_s": round(options.megabytes / made.seconds, 3),
        "chunks": made.chunks,
        "tokens": made.tokens,
        "chunks_per_s": round(made.chunks / made.seconds, 1),
        "tokens_per_s": round(made.tokens / made.seconds, 1),
        "bottleneck": slowest["stage"],
        "share_of_slowest": round(slowest["seconds"] / made.seconds, 3),
        "gpu_index": _gpu_index(),
        "recall_at_10": made.recall_at_10,
        "peak_rss_bytes": {
            "this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "largest worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        },
        "peak_device_bytes": torch.cuda.max_memory_allocated() if options.device.startswith("cuda") else None,
    }


def _gpu_index() -> bool:
    """Whether faiss trains on a GPU here."""
    from refrag_core.vector_index import trains_on_gpu

    try:
        return trains_on_gpu()
    except MissingExtraError:
        return False


def table(report: Mapping[str, Any]) -> str:
    """The report for a person to read."""
    if not report["rows"]:
        return "\n".join(f"left out: {what}" for what in report["left_out"])
    lines = [
        f"{row['stage']:<12} {row['seconds']:>9.2f} s {row['own_mb_per_s'] or 0:>10,.1f} MB/s" for row in report["rows"]
    ]
    lines.append(
        f"{report['megabytes']:,.0f} MB in {report['seconds']:.1f} s: {report['mb_per_s']:.2f} MB/s, "
        f"{report['chunks_per_s']:,.0f} chunks/s, {report['tokens_per_s']:,.0f} tokens/s; "
        f"{100 * report['share_of_slowest']:.0f}% of {report['bottleneck']}'s own rate"
    )
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Every stage's own rate, as PNG."""
    from refrag.benchmarks.bench_plots import plot_rates

    plot_rates(report, path, name="own_mb_per_s", label="MB of text a second, each stage by itself")
