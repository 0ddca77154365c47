"""Chunks and passages a second through the encode and embed stages, beside the bare body and sentence-transformers.

    refrag bench encode --body minilm,roberta-base --chunk-size 16 --json --plot encode.png

All from host memory to host memory, in one run on one machine. `refrag` is `ChunkEncoder.encode`; `bare loop` the same
transformers body called on batches that lie on the device; `sentence-transformers` its best of several batch sizes.
Each from token ids, and from strings, where tokenizing counts. `rates` has what tokenizing, device and disk do alone.
"""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from refrag.benchmarks.decoder_shapes import word_tokenizer
from refrag.benchmarks.encoder_shapes import SHAPES, piece_tokenizer, shaped_body, words_of
from refrag.benchmarks.measurement import environment, say
from refrag.schemas import arrow
from refrag_core.chunking import chunk_rows, tokenize_documents
from refrag_core.encoder import ChunkEncoder, EncoderModule, load_body, strip_pooler
from refrag_core.models import resolve_model
from refrag_core.packed_body import ATTENTION_FORMS, default_form
from refrag_core.retriever import Retriever
from refrag_core.tables import fixed_binary, write_table

VOCABULARY = 49_152
PASSAGE_TOKENS = 256
_ST_BATCHES = (32, 128, 512, 2_048, 8_192)
_TEXT_BLOCK = 128
_SWEPT_TOKENS = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """What is measured."""

    body: tuple[str, ...] = ("minilm", "roberta-base")
    chunk_size: tuple[int, ...] = (16,)
    chunks: int = 1_000_000
    texts: int = 20_000
    """Chunks that sentence-transformers and the tokenizers get, and passages that are embedded (a tenth of them)."""
    sweep: bool = False
    """Try every form of attention and several batch sizes, and nothing else."""
    device: str = "cuda"


def measure(options: EncodeOptions) -> dict[str, Any]:
    """All rows, with what they were measured on."""
    rows: list[dict[str, Any]] = []
    rates: list[dict[str, Any]] = []
    matmul = matmul_flops(options.device)
    say(f"matmul {matmul / 1e12:.1f} TFLOP/s")
    words = words_of(24 * options.texts)
    for body in options.body:
        for size in options.chunk_size:
            bench = _Bench(options, body, size, matmul, words)
            if options.sweep:
                rows += bench.sweep()
                continue
            found, apart = bench.rows()
            rows += found
            rates.append(apart)
        if not options.sweep:
            rows += embed_rows(options, body, words)
    machine = environment() | {"device": options.device}
    if options.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    report: dict[str, Any] = {"environment": machine, "matmul_tflops": round(matmul / 1e12, 4)}
    report["left_out"] = [] if _has_sentence_transformers() else ["sentence-transformers: not installed"]
    return report | {"rows": rows, "rates": rates}


def _has_sentence_transformers() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None


def body_named(name: str, vocabulary: int) -> Any:
    """The transformers body of a shape or a model reference, without its pooler."""
    if name in SHAPES:
        return strip_pooler(shaped_body(name, vocabulary))
    return load_body(resolve_model(name))


def flops_a_token(body: Any) -> float:
    """Of the layers' matrix products; attention's own are left out."""
    return 2.0 * float(sum(w.numel() for name, w in body.named_parameters() if ".layer." in name and w.ndim == 2))


def matmul_flops(device: str) -> float:
    """FLOP/s of one large square product, best of ten: what the card or the CPU does at its best."""
    on_cuda = device.startswith("cuda")
    size, dtype = (8_192, torch.bfloat16) if on_cuda else (1_024, torch.float32)
    a, b = (torch.randn((size, size), device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / min(seconds_of(device, lambda: a @ b) for _ in range(10))


def seconds_of(device: str, run: Callable[[], object]) -> float:
    """Wall seconds of `run`, the device waited for on both sides."""
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best_rate(device: str, count: int, run: Callable[[], object], repeats: int = 3) -> float:
    """Items a second, best of `repeats` behind one that warms up."""
    return count / min([seconds_of(device, run) for _ in range(repeats + 1)][1:])


class _Bench:
    """One body at one chunk size."""

    def __init__(self, options: EncodeOptions, body: str, chunk_size: int, matmul: float, words: Sequence[str]) -> None:
        self.options, self.name, self.size, self.matmul = options, body, chunk_size, matmul
        self.device = options.device
        self.pieces = piece_tokenizer()
        self.body = body_named(body, self.pieces.get_vocab_size())
        width = int(self.body.config.hidden_size)
        table = torch.randn((VOCABULARY, width), generator=torch.Generator().manual_seed(1)) * 0.05
        self.module = EncoderModule(body_named(body, self.pieces.get_vocab_size()), table)
        random = np.random.default_rng(0)
        self.ids = random.integers(0, VOCABULARY, (options.chunks, chunk_size), dtype=np.int32)
        self.lengths = np.full(options.chunks, chunk_size, np.int16)
        self.flops = flops_a_token(self.body)
        self.words = words

    def row(self, rate: float, baseline: str, **more: Any) -> dict[str, Any]:
        """A row of the report."""
        tokens = rate * self.size
        share = round(tokens * self.flops / self.matmul, 4)
        found = {"body": self.name, "stage": "encode", "chunk_size": self.size, "chunks_per_s": round(rate, 1)}
        found |= {"tokens_per_s": round(tokens, 1), "matmul_share": share, "baseline": baseline} | more
        say(f"{self.name} k={self.size} {baseline}: {rate:,.0f} chunks/s, {100 * share:.1f}% of matmul {more or ''}")
        return found

    def encoder(self, **options: Any) -> ChunkEncoder:
        """A chunk encoder over this body."""
        return ChunkEncoder(self.module, fingerprint="shape", device=self.device, **options)

    def sweep(self) -> list[dict[str, Any]]:
        """Every form of attention at every batch size."""
        rows = []
        for form in ATTENTION_FORMS:
            if form == "tiled" and not self.device.startswith("cuda"):
                continue
            for tokens in _SWEPT_TOKENS:
                batch = max(1, tokens // self.size)
                if batch > self.options.chunks:
                    continue
                encoder = self.encoder(packed=True, form=form, batch_rows=batch)
                rate = best_rate(self.device, len(self.ids), lambda e=encoder: e.encode(self.ids, self.lengths))  # type: ignore[misc]
                rows.append(self.row(rate, "refrag", form=form, batch_tokens=tokens))
        return rows

    def rows(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """refrag and its baselines, from ids and from strings, and the rates of the parts."""
        ours, strings = self._ours()
        rows = [ours, strings["row"], self._bare()]
        if _has_sentence_transformers():
            rows += self._sentence_transformers()
        for row in rows:
            same = strings["row"] if "strings" in row["baseline"] else ours
            row["speedup"] = round(same["chunks_per_s"] / row["chunks_per_s"], 3)
        return rows, strings["rates"] | {"body": self.name, "chunk_size": self.size}

    def _ours(self) -> tuple[dict[str, Any], dict[str, Any]]:
        encoder = self.encoder()
        heads = int(self.body.config.num_attention_heads)
        form = default_form(encoder.device, self.size, int(self.body.config.hidden_size) // heads)
        rate = best_rate(self.device, len(self.ids), lambda: encoder.encode(self.ids, self.lengths))
        ours = self.row(rate, "refrag, ids", form=form, max_relative_error=self._error(encoder))
        tokenizer = word_tokenizer(VOCABULARY)
        texts = [" ".join(self.words[at : at + 24 * 10]) for at in range(0, len(self.words), 24 * 10)]

        def tokenized() -> list[npt.NDArray[np.int32]]:
            return [tokens.ids for tokens in tokenize_documents(texts, tokenizer)]

        rows = [chunk_rows(ids, self.size) for ids in tokenized()]
        ids, lengths = (np.concatenate([part[i] for part in rows]) for i in (0, 1))
        cpu = best_rate("cpu", len(ids), tokenized)

        def whole() -> None:
            """Side by side, as in a build: a block of texts is tokenized while the one before is encoded."""

            def chunked(block: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
                made = [chunk_rows(tokens.ids, self.size) for tokens in tokenize_documents(block, tokenizer)]
                return np.concatenate([ids for ids, _ in made]), np.concatenate([lengths for _, lengths in made])

            blocks = [texts[at : at + _TEXT_BLOCK] for at in range(0, len(texts), _TEXT_BLOCK)]
            with ThreadPoolExecutor(1) as tokenizing:
                for future in [tokenizing.submit(chunked, block) for block in blocks]:
                    encoder.encode(*future.result())

        strings = self.row(best_rate(self.device, len(ids), whole), "refrag, strings")
        disk = self._disk_rate(encoder.encode(ids, lengths))
        rates = {"tokenize": round(cpu, 1), "device": ours["chunks_per_s"], "disk": round(disk, 1)}
        slowest = min(rates, key=lambda name: rates[name])
        say(f"{self.name} k={self.size}: chunks/s by part {rates}: {slowest} is the bottleneck")
        return ours, {"row": strings, "rates": {"chunks_per_s": rates, "bottleneck": slowest}}

    def _error(self, encoder: ChunkEncoder) -> float:
        """Largest relative error of an embedding against float32 on the CPU, of 256 chunks."""
        ids, lengths = self.ids[:256], self.lengths[:256]
        made = encoder.encode(ids, lengths).astype(np.float32)
        plain = EncoderModule(
            body_named(self.name, self.pieces.get_vocab_size()), self.module.embedding.weight.float().cpu()
        )
        expected = ChunkEncoder(plain, fingerprint="shape").encode(ids, lengths).astype(np.float32)
        error = np.linalg.norm(made - expected, axis=1) / np.linalg.norm(expected, axis=1)
        return round(float(error.max()), 6)

    def _disk_rate(self, rows: npt.NDArray[np.float16]) -> float:
        """Chunks a second that are written and synced as a shard's embeddings."""
        rows = np.tile(rows, (max(1, 200_000 // len(rows)), 1))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "embeddings.parquet"

            def write() -> None:
                schema = arrow.embeddings(rows.shape[1], "float16")
                write_table(path, pa.Table.from_arrays([fixed_binary(rows)], schema=schema))
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())

            return best_rate("cpu", len(rows), write)

    def _bare(self) -> dict[str, Any]:
        """The transformers body on batches that are there already; best of several sizes."""
        module = self.module
        ids = torch.from_numpy(self.ids[: max(_ST_BATCHES[-1], self.options.texts)]).to(self.device).long()
        rates = {}
        for batch in (512, 2_048, 8_192):
            if batch > len(ids):
                continue

            @torch.inference_mode()
            def run(batch: int = batch) -> None:
                for at in range(0, len(ids), batch):
                    module(ids[at : at + batch])

            rates[batch] = best_rate(self.device, len(ids), run)
        if not rates:
            with torch.inference_mode():
                rates[len(ids)] = best_rate(self.device, len(ids), lambda: module(ids))
        best = max(rates, key=lambda size: rates[size])
        return self.row(rates[best], "bare loop, ids", batch=best)

    def _sentence_transformers(self) -> list[dict[str, Any]]:
        texts = [" ".join(self.words[at : at + 8]) for at in range(0, 8 * self.options.texts, 8)]
        with tempfile.TemporaryDirectory() as folder:
            model = sentence_transformer(Path(folder), self.body, self.pieces, self.device)
            pairs = sentence_transformer_rates(model, texts, self.device, self.size + 2)
        return [self.row(rate, f"sentence-transformers, {what}", batch=batch) for what, (batch, rate) in pairs.items()]


def sentence_transformer(folder: Path, body: Any, tokenizer: Any, device: str) -> Any:
    """The same body as a sentence-transformers model, in half precision on CUDA."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import PreTrainedTokenizerFast

    body.save_pretrained(folder)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **special).save_pretrained(folder)
    layers = [Transformer(str(folder)), Pooling(int(body.config.hidden_size))]
    model = SentenceTransformer(modules=layers, device=device)
    return model.half() if device.startswith("cuda") else model


def sentence_transformer_rates(
    model: Any, texts: Sequence[str], device: str, tokens: int
) -> dict[str, tuple[int, float]]:
    """`strings` and `ids` → its best batch size and texts a second there; ids are random, `tokens` a text."""
    found: dict[str, tuple[int, float]] = {}
    vocabulary = int(model[0].auto_model.config.vocab_size)
    ids = torch.randint(0, vocabulary, (len(texts), tokens))
    present = torch.ones_like(ids)

    def by_ids(batch: int) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> None:
            for at in range(0, len(ids), batch):
                rows = slice(at, at + batch)
                features = {"input_ids": ids[rows].to(device), "attention_mask": present[rows].to(device)}
                model(features)["sentence_embedding"].cpu()

        return run

    for batch in (size for size in _ST_BATCHES if size <= max(len(texts), _ST_BATCHES[0])):
        runs: dict[str, Callable[[], object]] = {
            "strings": lambda size=batch: model.encode(list(texts), batch_size=size, show_progress_bar=False),  # type: ignore[misc]
            "ids": by_ids(batch),
        }
        for what, run in runs.items():
            rate = best_rate(device, len(texts), run, repeats=1)
            if rate > found.get(what, (0, 0.0))[1]:
                found[what] = (batch, rate)
    return found


def embed_rows(options: EncodeOptions, name: str, words: Sequence[str]) -> list[dict[str, Any]]:
    """Passages a second through `Retriever.embed` with that body, beside sentence-transformers."""
    pieces = piece_tokenizer()
    body = body_named(name, pieces.get_vocab_size())
    retriever = Retriever(body, pieces, max_length=256, pad_id=0, fingerprint="shape", device=options.device)
    lengths = np.random.default_rng(0).integers(20, 120, max(32, options.texts // 10))
    ends = np.cumsum(lengths)
    texts = [" ".join(words[end - length : end]) for end, length in zip(ends % len(words), lengths, strict=True)]
    encodings = [np.array(e.ids, np.int32) for e in pieces.encode_batch(texts)]
    tokens = sum(map(len, encodings)) / len(encodings)
    rates = {
        "refrag, strings": best_rate(options.device, len(texts), lambda: retriever.embed(texts)),
        "refrag, ids": best_rate(options.device, len(texts), lambda: retriever.embed_ids(encodings)),
    }
    if _has_sentence_transformers():
        with tempfile.TemporaryDirectory() as folder:
            model = sentence_transformer(
                Path(folder), body_named(name, pieces.get_vocab_size()), pieces, options.device
            )
            made = sentence_transformer_rates(model, texts, options.device, round(tokens))
        rates |= {f"sentence-transformers, {what}": rate for what, (_, rate) in made.items()}
    rows = []
    for baseline, rate in rates.items():
        ours = rates["refrag, strings" if "strings" in baseline else "refrag, ids"]
        row = {"body": name, "stage": "embed", "chunk_size": None, "passages_per_s": round(rate, 1)}
        row |= {"tokens_per_s": round(rate * tokens, 1), "baseline": baseline, "speedup": round(ours / rate, 3)}
        say(f"{name} embed {baseline}: {rate:,.0f} passages/s")
        rows.append(row)
    return rows


def table(report: Mapping[str, Any]) -> str:
    """The rows for a person to read."""
    lines = [f"{'body':<14} {'k':>3}  {'what':<32} {'a second':>12} {'tokens/s':>13} {'of matmul':>9} {'refrag is':>9}"]
    for row in report["rows"]:
        rate = row.get("chunks_per_s") or row.get("passages_per_s")
        share = "" if row.get("matmul_share") is None else f"{100 * row['matmul_share']:.1f}%"
        times = f"{row['speedup']:.2f}x" if row.get("speedup") else ""
        what = f"{row['baseline']} {row.get('form', '') if 'batch_tokens' in row else ''} {row.get('batch_tokens', '')}"
        lines.append(
            f"{row['body']:<14} {row['chunk_size'] or '':>3}  {what.strip():<32} {rate:>12,.0f} "
            f"{row['tokens_per_s']:>13,.0f} {share:>9} {times:>9}"
        )
    lines += [
        f"{r['body']} k={r['chunk_size']}: chunks/s {r['chunks_per_s']}, bottleneck {r['bottleneck']}"
        for r in report["rates"]
    ]
    return "\n".join([*lines, *(f"left out: {what}" for what in report["left_out"])])


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Tokens a second of every row, as PNG."""
    from refrag.benchmarks.bench_plots import plot_rates

    plot_rates(report, path, name="tokens_per_s", label="tokens a second")
