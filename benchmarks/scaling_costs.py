"""What one core of this machine takes for the parts of a build that a cluster's size depends on.

    python -m benchmarks.scaling_costs [--records 300000] [--vectors 120000] [--output FILE]

Synthetic records, tables and vectors (width 384, float16) stand for a corpus. The stages themselves are measured by
`refrag index plan` on a sample and by `benchmarks.gpu_check`; here it is what lies around them: planning, publishing
a shard's files, receipts, the manifest, the pass over all documents for the content id, and FAISS.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measurement import add_output, finish, say
from benchmarks.plan_memory import TEXT_BYTES, write_runs
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.id_ranges import PlanOptions, make_plan
from refrag.pipelines.receipts import Receipt, find_receipt, write_receipt
from refrag.pipelines.scan import scan_corpus
from refrag.schemas import arrow
from refrag_core import manifest as manifests
from refrag_core.chunking import tokenize_documents
from refrag_core.content import content_of
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.manifest import Manifest, Segment, Shard, content_id, decode_manifest, encode_manifest, live_documents
from refrag_core.models import DEFAULT_DECODER, load_tokenizer, resolve_model
from refrag_core.storage import FileRecord, FolderStore
from refrag_core.tables import write_table
from refrag_core.vector_index import IndexSpec, VectorIndex, build_segment, exact_search, train_quantizer
from refrag_core.work_folder import WorkFolder

DIM = 384
LISTS = 1024
QUERIES = 200


def _seconds(work: Any) -> float:
    """CPU seconds of this process, all its threads: other work on the machine stretches the clock, hardly these."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _clock(work: Any) -> float:
    """Seconds of the clock, for work that waits for the disk."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plan_cost(folder: Path, records: int) -> dict[str, float]:
    """Seconds of one core for a record: merged, joined, written down, cut into shards, over four ranges."""
    work = WorkFolder(str(folder / "plan"))
    with LocalEngine(0) as engine:
        runs = write_runs(engine, work.below("scan"), records)
        options = PlanOptions(target_shard_bytes=8 << 20, keep_duplicates=False)
        plan = partial(make_plan, runs, store=FolderStore(folder / "none"), parent=None, options=options)
        seconds = _seconds(lambda: plan(work=work.below("p"), map_ranges=engine.map, range_rows=records // 4))
    return {"plan_seconds_a_record": seconds / records}


def _documents(folder: Path, shards: int, rows: int) -> list[Shard]:
    store, made = FolderStore(folder), []
    for number in range(shards):
        ids = [f"document/{number:04d}/{row:08d}" for row in range(rows)]
        columns = {
            "document_id": ids,
            "source_digest": [os.urandom(32) for _ in ids],
            "content_digest": [os.urandom(32) for _ in ids],
            "source": ["part.jsonl"] * rows,
            "chunk_size": [16] * rows,
            "num_passages": [5] * rows,
            "num_chunks": [63] * rows,
            "num_tokens": [1000] * rows,
            "metadata": ["{}"] * rows,
        }
        name = f"shards/{number:032x}/documents.parquet"
        table = pa.table(columns, schema=arrow.DOCUMENTS)
        store.publish(name, partial(write_table, table=table))
        made.append(
            Shard(f"{number:032x}", 16, ids[0], ids[-1], rows, 5 * rows, 63 * rows, 1000 * rows, {"documents": name})
        )
    return made


def text_costs(folder: Path) -> dict[str, float]:
    """Seconds of one core for a byte of JSON lines that is scanned, and for a token that is made of English text."""
    root = Path(__file__).resolve().parents[1]
    text = " ".join((root / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "schemas/BUNDLE.md"))
    documents = [text[at : at + 4000] for at in range(0, len(text) - 4000, 997)]
    lines = (json.dumps({"id": f"{n}", "text": documents[n % len(documents)]}) + "\n" for n in range(8000))
    (folder / "corpus").mkdir()
    size = (folder / "corpus" / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    scan = partial(scan_corpus, CorpusOptions((str(folder / "corpus"),)), chunk_sizes=(16,), default_chunk_size=16)
    scanning = _seconds(lambda: scan(WorkFolder(str(folder / "scan"))))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(resolve_model(DEFAULT_DECODER))
    tokens: list[int] = []
    tokenizing = _seconds(lambda: tokens.extend(len(t.ids) for t in tokenize_documents(documents, tokenizer)))
    return {"scan_seconds_a_byte": scanning / size, "tokenize_seconds_a_token": tokenizing / sum(tokens)}


def content_cost(folder: Path) -> dict[str, float]:
    """Seconds a document of the one pass that makes the content id, as `identified` does it."""
    shards = _documents(folder / "documents", 4, 25_000)
    store, draft = FolderStore(folder / "documents"), replace(_manifest(1), shards=shards)
    documents = sum(shard.documents for shard in shards)
    pairs = ((live.document_id, live.content_digest) for live in live_documents(store, draft))
    row_by_row = _seconds(lambda: content_id(pairs, draft.components, draft.parameters))
    by_shard = _seconds(lambda: content_of(store, draft))
    return {"content_seconds_a_document": by_shard / documents, "content_seconds_row_by_row": row_by_row / documents}


def _manifest(shards: int) -> Manifest:
    """A manifest of so many shards, as a build writes it."""
    tables = ("documents", "passages", "chunks", "embeddings", "vectors")
    listed = [
        Shard(
            f"{n:032x}", 16, f"document/{n:08d}/first", f"document/{n:08d}/last", 16_000, 80_000, 10**6, 16 * 10**6,
            {t: f"shards/{n:032x}/{t}-{n:016x}.parquet" for t in tables},
        )
        for n in range(shards)
    ]  # fmt: skip
    files = {name: FileRecord(name, 10**6, f"{n:064x}") for n, s in enumerate(listed) for name in s.tables.values()}
    segments = [Segment(f"segments/{n:032x}.faiss", [listed[n].name], 80_000) for n in range(0, shards, 12)]
    files |= {s.file: FileRecord(s.file, 10**8, "0" * 64) for s in segments}
    files["segments/q.faiss"] = FileRecord("segments/q.faiss", 1, "0" * 64)
    component = manifests.Component("model", "0" * 64)
    return Manifest(
        version=1,
        parent=None,
        content_id="0" * 64,
        components=manifests.Components(component, component, component, None),
        parameters=manifests.Parameters(256, 16, None, DIM, "float16", DIM),
        counts=manifests.NOTHING,
        shards=listed,
        segments=segments,
        vector_index=manifests.VectorIndexInfo("ivf_sqfp16", LISTS, 8, "segments/q.faiss", 0.98, QUERIES),
        quarantine=manifests.QuarantineInfo(None, {}),
        tombstones=None,
        checkpoint=manifests.CheckpointInfo("checkpoints/x", "0" * 64, False),
        files={name: files[name] for name in sorted(files)},
        change=manifests.Change("build", 1, 0, 0),
    )


def manifest_cost(folder: Path) -> dict[str, float]:
    """Seconds and bytes a shard of writing and of reading a manifest, and of a shard's three receipts."""
    shards = 4000
    made = _manifest(shards)
    data = encode_manifest(made)
    store = FolderStore(folder / "receipts")
    receipts = [Receipt("tokenize", f"{n:032x}", f"{n:032x}", {}, {"chunks": 1}, 1.0) for n in range(300)]
    writing = _clock(lambda: [write_receipt(store, receipt) for receipt in receipts])
    finding = _clock(lambda: [find_receipt(store, receipt.stage, receipt.key) for receipt in receipts])
    blob = os.urandom(1 << 20)
    publishing = _clock(
        lambda: [store.publish(f"a/{n}", lambda path: path.write_bytes(blob) and None) for n in range(100)]
    )
    encode, decode = _seconds(lambda: encode_manifest(made)), _seconds(lambda: decode_manifest(data, where="manifest"))
    return {
        "manifest_bytes_a_shard": len(data) / shards,
        "manifest_encode_seconds_a_shard": encode / shards,
        "manifest_decode_seconds_a_shard": decode / shards,
        "driver_seconds_a_shard": (encode + decode) / shards,
        "receipt_write_seconds": writing / len(receipts),
        "receipt_find_seconds": finding / len(receipts),
        "publish_mib_seconds": publishing / 100,
    }


def faiss_cost(folder: Path, vectors: int) -> dict[str, float]:
    """Training by list and sample row, adding by row, and the gate's searches by row."""
    rows = np.random.default_rng(0).standard_normal((vectors, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    spec, found = IndexSpec("ivf_sqfp16", DIM, LISTS), dict[str, float]()
    started = time.process_time()
    quantizer = train_quantizer(rows, spec)
    found["train_seconds_a_row_and_list"] = (time.process_time() - started) / (vectors * LISTS)
    half = rows.astype(np.float16)
    path = folder / "segment.faiss"
    adding = _seconds(lambda: build_segment(quantizer, [half], path))
    found["add_seconds_a_row"] = adding / vectors
    queries = rows[:QUERIES] + 0.02
    exact = _seconds(lambda: exact_search([[half]], queries, k=10))
    found["exact_seconds_a_row"] = exact / vectors
    index = VectorIndex.open([path], nprobe=1)
    search = _seconds(lambda: [index.search(queries, 10, nprobe=nprobe) for nprobe in (1, 2, 4, 8, 16)])
    found["gate_seconds_a_row"] = search / vectors
    found["index_seconds_a_passage"] = (adding + exact + search) / vectors
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--vectors", type=int, default=120_000)
    add_output(parser)
    given = parser.parse_args()
    costs: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="refrag-scaling-") as name:
        folder = Path(name)
        around = [partial(plan_cost, folder, given.records), partial(text_costs, folder), partial(content_cost, folder)]
        for part in (*around, partial(manifest_cost, folder), partial(faiss_cost, folder, given.vectors)):
            costs |= part()
            say(f"{len(costs)} costs")
    shown = {"records": given.records, "vectors": given.vectors, "text_bytes_a_record": TEXT_BYTES}
    finish("scaling_costs", shown, {"costs": {k: float(f"{v:.4g}") for k, v in costs.items()}}, given.output)


if __name__ == "__main__":
    main()
