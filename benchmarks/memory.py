"""Peak memory of `refrag index build` at two corpus sizes: does it grow with the corpus?

    python -m benchmarks.memory [--megabytes 20 150] [--format jsonl|jsonl.gz|parquet] [--output FILE]

Each corpus is made from one seed (pseudo-words, Zipf frequencies) and built by the command line in a process of
its own with one worker and tiny random models, so that what is measured is the pipeline and not a model.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measurement import add_output, finish, load, say

MEGABYTE = 10**6
FORMATS = ("jsonl", "jsonl.gz", "parquet")
WIDTH = 16
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "or")]
_NUM_WORDS = 20_000
_ROWS_A_GROUP = 2_000
_SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Peak:
    """Largest memory of the build's processes together, MB (10^6 bytes)."""

    rss: float
    """Resident pages, those of mapped files and shared libraries included (counted once a process)."""
    anonymous: float
    """Resident pages that no file holds: what has to fit into memory."""
    main_anonymous: float
    """Those of the process that encodes and embeds."""
    workers_anonymous: float
    """Those of the other processes together."""


# --- corpus -------------------------------------------------------------------------------------------


def words(generator: random.Random) -> list[str]:
    """Distinct pseudo-words of one to four syllables, shorter ones first as in a language."""
    found: dict[str, None] = {}
    while len(found) < _NUM_WORDS:
        found["".join(generator.choices(_SYLLABLES, k=generator.choice((1, 2, 2, 3, 3, 4))))] = None
    return sorted(found, key=len)


def documents(num_bytes: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records with id, title and text, of `num_bytes` characters of text in all; a pure function of both."""
    generator = random.Random(seed)
    vocabulary = words(generator)
    weights = list(accumulate(1 / rank for rank in range(1, len(vocabulary) + 1)))
    left, number = num_bytes, 0
    while left > 0:
        drawn = generator.choices(vocabulary, cum_weights=weights, k=12 * generator.randint(4, 60))
        sentences = (" ".join(drawn[at : at + 12]).capitalize() + "." for at in range(0, len(drawn), 12))
        text = " ".join(sentences)
        yield {"id": f"document-{number:08d}", "title": drawn[0], "text": text}
        left, number = left - len(text), number + 1


def write_corpus(folder: Path, num_bytes: int, kind: str) -> Path:
    """Write one corpus file of text of `num_bytes`, and return its folder."""
    folder.mkdir(parents=True)
    if kind == "parquet":
        _write_parquet(folder / "documents.parquet", documents(num_bytes))
        return folder
    path = folder / f"documents.{kind}"
    with gzip.open(path, "wt", compresslevel=1) if kind.endswith(".gz") else path.open("w") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in documents(num_bytes))
    return folder


def _write_parquet(path: Path, records: Iterator[dict[str, Any]]) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("id", "title", "text")])
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, Any]] = []
        for record in records:
            rows.append(record)
            if len(rows) == _ROWS_A_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))


# --- models -------------------------------------------------------------------------------------------


def write_models(folder: Path, width: int = WIDTH) -> tuple[Path, Path]:
    """`(decoder, encoder)` folders of one-layer random models over real tokenizers; the encoder's width is given."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    text = [record["text"] for record in documents(MEGABYTE)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    piece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    piece.normalizer, piece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    piece.train_from_iterator(
        text, trainers.WordPieceTrainer(vocab_size=4096, special_tokens=names, show_progress=False)
    )
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    wide = sizes | {"hidden_size": width}
    decoder = AutoConfig.for_model(
        "llama", vocab_size=bpe.get_vocab_size(), num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes
    )
    encoder = AutoConfig.for_model("bert", vocab_size=piece.get_vocab_size(), max_position_embeddings=128, **wide)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_model(
        folder / "decoder", AutoModelForCausalLM.from_config(decoder), bpe, settings | {"eos_token": "<|eos|>"}
    )
    ends = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    _write_model(folder / "encoder", AutoModel.from_config(encoder), piece, settings | ends)
    return folder / "decoder", folder / "encoder"


def _write_model(folder: Path, model: Any, tokenizer: Any, settings: dict[str, str]) -> None:
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- measuring ----------------------------------------------------------------------------------------


def _memory_of(process: psutil.Process) -> tuple[int, int]:
    """`(resident, anonymous)` bytes of one process; zeros once it is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0, 0
    found = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmRSS", "RssAnon")))
    kilobytes = [int(found.get(name, "0").split()[0]) for name in ("VmRSS", "RssAnon")]
    return 1024 * kilobytes[0], 1024 * kilobytes[1]


@dataclass(frozen=True, slots=True)
class _Sample:
    seconds: float
    rss: int
    anonymous: int
    main_anonymous: int
    workers_anonymous: int


class _Sampler(threading.Thread):
    """Watches a process and its children until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._done = threading.Event()
        self.trace: list[_Sample] = []

    def run(self) -> None:
        started = time.perf_counter()
        while not self._done.wait(_SAMPLE_SECONDS):
            try:
                members = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            found = [_memory_of(member) for member in members]
            rss, anonymous = (sum(kind) for kind in zip(*found, strict=True))
            main = found[0][1]
            self.trace.append(_Sample(time.perf_counter() - started, rss, anonymous, main, anonymous - main))

    def stop(self) -> Peak:
        self._done.set()
        self.join()
        names = [field.name for field in fields(Peak)]
        return Peak(*(round(max(getattr(sample, name) for sample in self.trace) / MEGABYTE, 1) for name in names))


def build(corpus: Path, output: Path, decoder: Path, encoder: Path, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Run one build in a process of its own; its report and its peak."""
    command = [sys.executable, "-m", "refrag.cli", "index", "build", str(corpus), "-o", str(output), "--json"]
    command += ["--decoder", str(decoder), "--encoder", str(encoder), "--retriever", str(encoder)]
    command += ["--workers", "1", "--device", "cpu", "--min-recall", "0", *extra]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    sampler = _Sampler(process.pid)
    sampler.start()
    out, log = process.communicate()
    peak = sampler.stop()
    if process.returncode:
        raise SystemExit(f"the build failed with exit code {process.returncode}:\n{log}")
    report = json.loads(out)
    kept = ("documents_in", "passages", "chunks", "tokens", "seconds", "steps")
    return {
        "peak_mb": asdict(peak),
        "mb_a_second": round(corpus_bytes(corpus) / MEGABYTE / report["seconds"], 3),
        "load_average": load(),
        **{name: report[name] for name in kept},
        "peak_by_tenth_mb": tenths(sampler.trace),
    }


def corpus_bytes(folder: Path) -> int:
    """Bytes of the corpus's files as they lie on the disk."""
    return sum(path.stat().st_size for path in folder.iterdir())


def tenths(trace: Sequence[_Sample]) -> list[float]:
    """Largest anonymous memory in each tenth of the run's time, MB: flat where nothing piles up."""
    end = trace[-1].seconds
    parts: list[list[int]] = [[] for _ in range(10)]
    for sample in trace:
        parts[min(9, int(10 * sample.seconds / end))].append(sample.anonymous)
    return [round(max(part, default=0) / MEGABYTE, 1) for part in parts]


def measure(sizes: Sequence[float], kind: str, extra: Sequence[str]) -> dict[str, Any]:
    """Build a corpus of each size (MB); the peaks, and the largest over the smallest size's."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="refrag-memory-") as temporary:
        root = Path(temporary)
        decoder, encoder = write_models(root / "models")
        for number, megabytes in enumerate(sizes):
            say(f"making {megabytes:g} MB of {kind}")
            corpus = write_corpus(root / f"corpus-{number}", int(megabytes * MEGABYTE), kind)
            say("building")
            run = build(corpus, root / f"index-{number}", decoder, encoder, extra)
            say(f"peak {run['peak_mb']}, {run['seconds']:.0f} s, {run['mb_a_second']} MB/s")
            runs.append({"text_mb": megabytes, "file_mb": round(corpus_bytes(corpus) / MEGABYTE, 1), **run})
            shutil.rmtree(corpus)
            shutil.rmtree(root / f"index-{number}")
    first, last = runs[0]["peak_mb"], runs[-1]["peak_mb"]
    return {"runs": runs, "ratio": {name: round(last[name] / first[name], 3) for name in first}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[20, 150], help="MB of text a corpus")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    parser.add_argument("--shard-bytes", type=int, help="as `refrag index build` takes it")
    add_output(parser)
    options = parser.parse_args(arguments)
    extra = [] if options.shard_bytes is None else ["--shard-bytes", str(options.shard_bytes)]
    results = measure(options.megabytes, options.format, extra)
    shown = {"megabytes": options.megabytes, "format": options.format, "shard_bytes": options.shard_bytes}
    finish("memory", shown, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
