"""Time to the first token of the runtime's own path, beside the same decoder reading the full tokens.

    refrag bench ttft --decoder llama-2-7b --context 2048,4096,8192,16384 --chunk-size 8,16,32 \
        --expansion-fraction 0,.1,.25 --json --plot ttft.png

A question goes through query embedding, search among `passages`, fetch from mapped tables, upload, policy, projection
and composition, prefill and the choice of a token: `Runtime.ask` over synthetic tables, nothing of it imitated. The
full context is the same call with every chunk expanded: `full_ttft_ms` by the transformers model run eagerly with SDPA,
as everyone measures, `full_best_ttft_ms` by the captured forward with flash attention. Medians; a first call of each
shape is not counted. Weights, passages and vectors are random: speed does not depend on them.
"""

import gc
import math
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from refrag.benchmarks.decoder_shapes import decoder_named
from refrag.benchmarks.encoder_shapes import SHAPES as ENCODER_SHAPES
from refrag.benchmarks.encoder_shapes import shaped_encoder_module, shaped_retriever
from refrag.benchmarks.measurement import environment, say
from refrag.benchmarks.synthetic_index import PASSAGE_TOKENS, PassageVectors, SyntheticIndex
from refrag_core.batching import is_out_of_memory
from refrag_core.checkpoint import Checkpoint, CheckpointConfig, DecoderConfig, EncoderConfig, PolicyConfig
from refrag_core.chunking import chunk_rows
from refrag_core.decoder import Decoder
from refrag_core.encoder import ChunkEncoder
from refrag_core.errors import UsageError
from refrag_core.fast_path import FastPath
from refrag_core.policy import initialise_policy
from refrag_core.projection import initialise_projection
from refrag_core.retrieval import Searcher
from refrag_core.runtime import AskOptions, Runtime, Stats
from refrag_core.slot_decoder import SlotDecoder
from refrag_core.template import PromptTemplate

QUESTION = "What is in these papers?"
PAPER_SPEEDUP = {
    8: {2048: 3.91, 4096: 6.49, 8192: 7.40, 16384: 9.21},
    16: {2048: 3.74, 4096: 7.58, 8192: 13.8, 16384: 16.5},
    32: {2048: 3.87, 4096: 7.24, 8192: 16.1, 16384: 30.9},
}
"""REFRAG, arXiv:2509.01092: TTFT over LLaMA-2-7B, cached, one A100, read off its figure."""

STEPS = ("retrieval", "fetch", "upload", "policy", "compose", "prefill")
_SPARE_POSITIONS = 128
_NEW_TOKENS = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftOptions:
    """What is measured."""

    decoder: str = "llama-2-7b"
    context: tuple[int, ...] = (2048, 4096, 8192, 16384)
    chunk_size: tuple[int, ...] = (8, 16, 32)
    expansion_fraction: tuple[float, ...] = (0.0, 0.1, 0.25)
    passages: int = 100_000
    encoder: str = "minilm"
    batch: tuple[int, ...] = (1, 2, 4, 8)
    """Prompts at once in the throughput rows; none for no such rows."""
    repeats: int = 15
    full: bool = True
    """Measure the full context too."""
    device: str = "cuda"
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rows share."""

    options: TtftOptions
    decoder: Decoder
    checkpoint: Checkpoint
    fast: FastPath
    full_fast: FastPath | None

    @property
    def device(self) -> torch.device:
        """The decoder's."""
        return self.decoder.device


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of that name. Raises UsageError for any but float32, bfloat16 and float16."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise UsageError(f"--dtype is {name!r}; expected one of {', '.join(known)}")
    return None if name is None else known[name]


def measure(options: TtftOptions) -> dict[str, Any]:
    """All rows, with what they were measured on."""
    for context in options.context:
        if context % PASSAGE_TOKENS:
            raise UsageError(f"--context {context} is no multiple of a passage's {PASSAGE_TOKENS} tokens")
    with tempfile.TemporaryDirectory() as folder:
        bench, retriever = _prepare(options), shaped_retriever(options.encoder, options.device)
        say(f"{options.passages:,} passage vectors")
        vectors = PassageVectors(Path(folder), options.passages, retriever.dim, options.device)
        rows, throughput = [], []
        full: dict[int, dict[str, Any]] = {}
        for chunk_size in options.chunk_size:
            say(f"tables of {options.passages:,} passages in chunks of {chunk_size}")
            index = SyntheticIndex(
                Path(folder),
                passages=options.passages,
                chunk_size=chunk_size,
                d_enc=ENCODER_SHAPES[options.encoder]["hidden_size"],
                vocabulary=bench.decoder.model.config.vocab_size,
                retriever=retriever,
                vectors=vectors,
            )
            for context in options.context:
                if options.full and context not in full:
                    full[context] = _full_context(bench, index, context)
                uncached = _encode_ms(bench, index, context, chunk_size)
                for fraction in options.expansion_fraction:
                    row = _row(bench, index, context, chunk_size, fraction, uncached, full.get(context, {}))
                    rows.append(row)
                    _say_row(row)
            del index
        for context in options.context[:1]:
            throughput = _throughput(bench, context, options)
    report: dict[str, Any] = {
        "environment": _environment(options),
        "search": vectors.kind,
        "rows": rows,
        "throughput": throughput,
    }
    report["weights_read_ms"] = _weights_read_ms(bench)
    return report


def _prepare(options: TtftOptions) -> Bench:
    say(f"decoder {options.decoder} on {options.device}")
    longest = max(options.context)
    needed = longest + _SPARE_POSITIONS * (1 + longest // PASSAGE_TOKENS // 64)
    decoder = decoder_named(options.decoder, device=options.device, dtype=options.dtype, max_positions=needed)
    checkpoint = synthetic_checkpoint(decoder, ENCODER_SHAPES[options.encoder]["hidden_size"])
    parts = (decoder, checkpoint.projection, checkpoint.policy)
    compressed = int(max(_positions(longest, k, p) for k in options.chunk_size for p in options.expansion_fraction))
    fast = FastPath(*parts, max_positions=min(needed, compressed + _SPARE_POSITIONS))
    return Bench(options, decoder, checkpoint, fast, FastPath(*parts, max_positions=needed) if options.full else None)


def synthetic_checkpoint(decoder: Decoder, d_enc: int) -> Checkpoint:
    """An untrained checkpoint in memory, in the decoder's dtype, with a template of a few tokens."""
    config = CheckpointConfig(
        encoder=EncoderConfig("synthetic", "", d_enc, "subtoken-mean-1", "mean"),
        decoder=DecoderConfig("synthetic", "", "", decoder.dim),
        policy=PolicyConfig(),
        template=PromptTemplate((1,), (2, 3), (4,), (), (), (5,), (6,), (7, 8), False),
        chunk_size=16,
        chunk_sizes=(8, 16, 32),
        trained=True,
        seed=0,
    )
    projection = initialise_projection(d_enc, decoder.dim, output_rms=0.02, seed=0)
    policy = initialise_policy(d_enc, seed=0)
    device, dtype = decoder.device, decoder.dtype
    return Checkpoint(config, projection.to(device, dtype), policy.to(device, dtype))


def _positions(context: int, chunk_size: int, fraction: float) -> int:
    """Slots of the context, about."""
    chunks = context // chunk_size
    return math.ceil(chunks * (1 + fraction * (chunk_size - 1)))


def _runtime(bench: Bench, index: SyntheticIndex, fast: FastPath | None) -> Runtime:
    searcher: Searcher = index  # type: ignore[assignment]
    return Runtime.assemble(searcher=searcher, checkpoint=bench.checkpoint, decoder=bench.decoder, fast=fast)


def _asked(
    runtime: Runtime, options: AskOptions, repeats: int, before: Callable[[], object] | None = None
) -> list[Stats]:
    """Stats of `repeats` answers behind two that are not counted, each to a question of its own."""
    stats = []
    for number in range(-2, repeats):
        if before is not None:
            before()
        synchronise(runtime.decoder.device)
        stats.append(runtime.ask(f"{QUESTION[:-3]} {number + 10:02d}?", options).stats)
    return stats[2:]


def _medians(stats: Sequence[Stats]) -> dict[str, Any]:
    steps = {name: round(median(getattr(s, f"{name}_ms") for s in stats), 3) for name in STEPS}
    return {"ttft_ms": round(median(s.ttft_ms for s in stats), 3), "steps": steps}


def _row(
    bench: Bench,
    index: SyntheticIndex,
    context: int,
    chunk_size: int,
    fraction: float,
    encode_ms: float,
    full: Mapping[str, Any],
) -> dict[str, Any]:
    options = AskOptions(
        top_k=context // PASSAGE_TOKENS, policy="learned", expansion_fraction=fraction, max_new_tokens=_NEW_TOKENS
    )
    runtime = _runtime(bench, index, bench.fast)
    reset_peak(bench.device)
    stats = _asked(runtime, options, bench.options.repeats)
    peak, found = peak_bytes(bench.device), _medians(stats)
    positions = stats[0].decoder_positions
    bare = prefill_ms(bench.fast.decoder, positions, bench.options.repeats)
    cold = _asked(_runtime(bench, index, bench.fast), options, 3, index.reopen_cold)
    ttft, position_bytes = found["ttft_ms"], bench.fast.decoder.position_bytes
    row = {
        "context": context,
        "chunk_size": chunk_size,
        "expansion_fraction": fraction,
        "positions": positions,
        **found,
        "prefill_alone_ms": bare,
        "over_prefill_ms": round(ttft - bare, 3),
        "query_embedding_ms": _query_ms(bench, index),
        "ttit_ms": round(median(s.ttit_ms for s in stats), 3),
        "uncached_ttft_ms": round(ttft + encode_ms, 3),
        "encode_ms": encode_ms,
        "cold_ttft_ms": _medians(cold)["ttft_ms"],
        "peak_bytes": peak,
        "kv_bytes": positions * position_bytes,
        "paper_speedup": PAPER_SPEEDUP.get(chunk_size, {}).get(context) if fraction == 0 else None,
        **full,
    }
    for name, against in (("speedup", "full_ttft_ms"), ("speedup_best", "full_best_ttft_ms")):
        row[name] = round(full[against] / ttft, 2) if full.get(against) else None
    return row


def _full_context(bench: Bench, index: SyntheticIndex, context: int) -> dict[str, Any]:
    """The same question with every chunk expanded: eagerly, and by captured graphs."""
    options = AskOptions(top_k=context // PASSAGE_TOKENS, policy="all", max_new_tokens=_NEW_TOKENS)
    repeats = max(3, bench.options.repeats // 4)
    found: dict[str, Any] = {}
    for name, fast in (("full", None), ("full_best", bench.full_fast)):
        say(f"context {context}: {'eager' if fast is None else 'captured'} full context")
        reset_peak(bench.device)
        stats = _asked(_runtime(bench, index, fast), options, repeats)
        medians = _medians(stats)
        found |= {f"{name}_ttft_ms": medians["ttft_ms"], f"{name}_peak_bytes": peak_bytes(bench.device)}
        found |= {
            f"{name}_ttit_ms": round(median(s.ttit_ms for s in stats), 3),
            "full_positions": stats[0].decoder_positions,
        }
    assert bench.full_fast is not None
    found["full_kv_bytes"] = found["full_positions"] * bench.full_fast.decoder.position_bytes
    say(f"context {context}: full {found['full_ttft_ms']:.1f} ms eager, {found['full_best_ttft_ms']:.1f} ms captured")
    return found


def _encode_ms(bench: Bench, index: SyntheticIndex, context: int, chunk_size: int) -> float:
    """What encoding the context's chunks at request time takes: the value of having done it before."""
    module = shaped_encoder_module(bench.options.encoder, bench.decoder.model.config.vocab_size)
    encoder = ChunkEncoder(module, fingerprint="shape", device=bench.options.device)
    found = index.nearest("", index.embed(QUESTION), context // PASSAGE_TOKENS, None)
    tokens = [chunk_rows(passage.tokens, chunk_size) for passage in index.fetch([ref for ref, _ in found])]
    ids, lengths = (torch.cat([torch.from_numpy(part[i].copy()) for part in tokens]).numpy() for i in (0, 1))
    times = [_seconds(bench.device, lambda: encoder.encode(ids, lengths)) for _ in range(2 + bench.options.repeats)]
    return round(1000 * median(times[2:]), 3)


def _query_ms(bench: Bench, index: SyntheticIndex) -> float:
    """The retriever's part of the retrieval step."""
    times = [_seconds(bench.device, lambda: index.embed(QUESTION)) for _ in range(2 + bench.options.repeats)]
    return round(1000 * median(times[2:]), 3)


def prefill_ms(decoder: SlotDecoder, positions: int, repeats: int) -> float:
    """A captured prefill alone, its logits on the device: what the whole path is compared with."""
    prompt = _prompt(decoder.decoder, positions)
    times = [_seconds(decoder.decoder.device, lambda: decoder.prefill([0], [prompt])) for _ in range(2 + repeats)]
    decoder.release(0)
    return round(1000 * median(times[2:]), 3)


def _prompt(decoder: Decoder, positions: int) -> Tensor:
    """`[s, d_dec]` of random tokens: products of zeros switch few transistors, and a GPU may clock higher for them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.model.config.vocab_size, (positions,), generator=generator)
    return decoder.embed(ids.to(decoder.device))


def _throughput(bench: Bench, context: int, options: TtftOptions) -> list[dict[str, Any]]:
    """Requests and tokens a second at growing batch: a prefill and _NEW_TOKENS tokens, compressed and in full."""
    rows = []
    for batch in options.batch:
        row: dict[str, Any] = {"context": context, "batch": batch, "new_tokens": _NEW_TOKENS}
        sizes = {f"k={k}": context // k for k in options.chunk_size} | ({"full": context} if options.full else {})
        for name, positions in sizes.items():
            row[name] = _requests(bench.decoder, batch, positions)
        say(f"batch {batch}: {row}")
        rows.append(row)
    return rows


def _requests(decoder: Decoder, batch: int, positions: int) -> dict[str, float] | None:
    """Requests and tokens a second; None where the batch does not fit."""
    slots = list(range(batch))
    try:
        slotted = SlotDecoder(decoder, slots=batch, max_positions=positions + _NEW_TOKENS)
        prompts = [_prompt(decoder, positions)] * batch

        def run() -> None:
            chosen: Tensor = slotted.prefill(slots, prompts).argmax(dim=-1)
            for _ in range(_NEW_TOKENS - 1):
                chosen = slotted.step(slots, chosen).argmax(dim=-1)

        seconds = median([_seconds(decoder.device, run) for _ in range(5)][2:])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        slotted = None  # type: ignore[assignment]
        gc.collect()
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"requests_per_s": round(batch / seconds, 3), "tokens_per_s": round(batch * _NEW_TOKENS / seconds, 1)}


def _weights_read_ms(bench: Bench) -> float:
    """One read of the decoder's layers at the rate of a large copy: the floor of any prefill."""
    model = bench.decoder.model
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)
    block = torch.empty(1 << (30 if bench.device.type == "cuda" else 26), dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(block)
    seconds = min(_seconds(bench.device, lambda: other.copy_(block)) for _ in range(5))
    return round(1000 * float(weights) / (2 * block.numel() / seconds), 3)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def reset_peak(device: torch.device) -> None:
    """Begin to watch the device's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes allocated on the device since `reset_peak`; on a CPU the process's peak so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _environment(options: TtftOptions) -> dict[str, Any]:
    found = environment() | {"device": options.device, "decoder": options.decoder, "encoder": options.encoder}
    if options.device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"passages": options.passages, "repeats": options.repeats}


def _say_row(row: Mapping[str, Any]) -> None:
    say(
        f"context {row['context']} k={row['chunk_size']} p={row['expansion_fraction']}: {row['positions']} positions, "
        f"{row['ttft_ms']:.2f} ms (prefill alone {row['prefill_alone_ms']:.2f}, cold {row['cold_ttft_ms']:.2f}), "
        f"speed-up {row['speedup']} / {row['speedup_best']}"
    )


def table(report: Mapping[str, Any]) -> str:
    """The rows for a person to read."""
    lines = ["context  k   p     positions  ttft ms  prefill  full ms  speed-up  best full  speed-up  paper"]
    for row in report["rows"]:
        values = [
            row.get(name) for name in ("full_ttft_ms", "speedup", "full_best_ttft_ms", "speedup_best", "paper_speedup")
        ]
        shown = "".join(f"{'-' if value is None else format(value, '.2f'):>10}" for value in values)
        lines.append(
            f"{row['context']:>7} {row['chunk_size']:>3} {row['expansion_fraction']:>5} {row['positions']:>9} "
            f"{row['ttft_ms']:>9.2f} {row['prefill_alone_ms']:>8.2f}{shown}"
        )
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Time to the first token and speed-up by context, one line a chunk size, as PNG."""
    from refrag.benchmarks.bench_plots import plot_ttft

    plot_ttft(report, path)
