"""Faults while shards are worked on: bad records, a full disk, the same shard twice, memory that runs out."""

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from refrag.pipelines import stages
from refrag.pipelines.build import BuildReport
from refrag.pipelines.components import resolve_models
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.plan import ShardSpec, cut_shards
from refrag.pipelines.scan import merge_runs, scan_corpus
from refrag.pipelines.stages import Stages
from refrag_core import encoder as encoder_module
from refrag_core.manifest import list_versions, read_manifest
from refrag_core.object_store import RemoteObjects
from refrag_core.remote_store import RemoteStore
from refrag_core.storage import FolderStore, Store
from refrag_core.verification import verify_index
from refrag_core.work_folder import WorkFolder
from tests.small_index import SmallIndex, documents

# --- one record in many ------------------------------------------------------------------------------

BAD = {name: f"{name} zqxzqx zqxzqx" for name in ("tokenize", "encode", "embed")}


def break_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each stage raise on the one document that is named after it."""
    real_tokenize, real_encoder, real_retriever = stages.tokenize_documents, stages._encoder, stages._retriever
    broken: set[bytes] = set()

    def tokenize(texts: Any, tokenizer: Any) -> Any:
        if any(text == BAD["tokenize"] for text in texts):
            raise ValueError("this text breaks the tokenizer")
        made = real_tokenize(texts, tokenizer)
        broken.update(m.ids[:16].tobytes() for t, m in zip(texts, made, strict=True) if t == BAD["encode"])
        return made

    class Encoder:
        def __init__(self, *place: str) -> None:
            self.real = real_encoder(*place)
            self.dim = self.real.dim

        def encode(self, tokens: Any, num_tokens: Any) -> Any:
            if any(row[:n].tobytes() in broken for row, n in zip(tokens, num_tokens, strict=True)):
                raise ValueError("these tokens break the encoder")
            return self.real.encode(tokens, num_tokens)

    class Retriever:
        def __init__(self, *place: str) -> None:
            self.real = real_retriever(*place)
            self.dim, self.embed_queries = self.real.dim, self.real.embed_queries

        def embed(self, texts: list[str]) -> Any:
            if BAD["embed"] in texts:
                raise ValueError("this text breaks the retriever")
            return self.real.embed(texts)

    monkeypatch.setattr(stages, "tokenize_documents", tokenize)
    monkeypatch.setattr(stages, "_encoder", Encoder)
    monkeypatch.setattr(stages, "_retriever", Retriever)


def quarantined(index: SmallIndex) -> list[dict[str, Any]]:
    manifest = read_manifest(FolderStore(index.path))
    assert manifest.quarantine.file is not None
    return list(pq.read_table(index.path / manifest.quarantine.file).to_pylist())


def check_bad_records(root: Path, monkeypatch: pytest.MonkeyPatch, count: int, shard_bytes: int) -> BuildReport:
    """Among `count` records one breaks each stage: the ids are those of the corpus without these."""
    good = documents(count, sentences=3)
    bad = [
        {"id": f"doc-{number:04d}-bad", "text": text} for number, text in zip((3, 17, 40), BAD.values(), strict=True)
    ]
    calm = SmallIndex(root / "calm", good, shard_bytes=shard_bytes).build()
    break_stages(monkeypatch)
    lists = []
    for name, size in (("one", shard_bytes), ("two", shard_bytes // 2)):
        index = SmallIndex(root / name, [*good, *bad], shard_bytes=size)
        report = index.build()
        assert report.reasons == {"embed_failed": 1, "encode_failed": 1, "tokenize_failed": 1}
        assert report.content_id == calm.content_id
        assert verify_index(FolderStore(index.path)).problems == ()
        lists.append(quarantined(index))
    assert lists[0] == lists[1]
    assert [(row["document_id"], row["detail"]) for row in lists[0]] == [
        ("doc-0003-bad", "ValueError: this text breaks the tokenizer"),
        ("doc-0017-bad", "ValueError: these tokens break the encoder"),
        ("doc-0040-bad", "ValueError: this text breaks the retriever"),
    ]
    return report


def test_a_stage_that_raises_on_a_record(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_bad_records(tmp_path, monkeypatch, 60, 4000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stage_that_raises_on_one_record_in_ten_thousand(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = check_bad_records(tmp_path, monkeypatch, 30_000, 1 << 18)  # one for each of three stages
    assert report.quarantined / report.documents_in == pytest.approx(1e-4, rel=0.01)


# --- a full disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scan", "plan", "index", "stages"])
def test_a_disk_that_is_full_for_intermediate_files(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    index = SmallIndex(tmp_path, ["{broken", *documents(4, sentences=3)])
    calm = index.build()
    shutil.rmtree(index.path)
    real = WorkFolder.publish

    def full(work: WorkFolder, temporary: Path, **names: str) -> str:
        if f"/{kind}" in f"{work.location}/{names['prefix']}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
        return real(work, temporary, **names)

    break_stages(monkeypatch)
    index.write(["{broken", *documents(4, sentences=3), {"id": "zz", "text": BAD["embed"]}])
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "publish", full)
        with pytest.raises(OSError, match="No space left on device"):
            index.build()
    assert list_versions(FolderStore(index.path)) == []
    report = index.build()
    assert report.content_id == calm.content_id
    assert verify_index(FolderStore(index.path)).problems == ()
    assert not (index.path / "work").exists()


# --- the same shard twice at once ---------------------------------------------------------------------


def run_shard(store: Store, work: Stages, spec: ShardSpec, meet: Any, said: Any) -> None:
    """One of two processes that begin the same shard at the same moment."""
    for stage in work.device:
        stage.load()
    meet.wait()
    (result,) = LocalEngine(0).run(store, work, [spec])
    said.put(
        json.dumps(
            [{k: v for k, v in asdict(r).items() if k not in ("seconds", "parts", "reused")} for r in result.receipts]
        )
    )


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return tmp_path / "index" if request.param == "folder" else f"{request.getfixturevalue('bucket')}/index"


def test_two_processes_at_the_same_shard_make_one(place: Any, tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, documents(6), output=place)
    store: Store = FolderStore(place) if isinstance(place, Path) else RemoteStore(place)
    models = resolve_models(store, small.options.models)
    work = WorkFolder(str(tmp_path / "work"))
    scan = scan_corpus(small.options.corpus, work, chunk_sizes=models.chunk_sizes, default_chunk_size=16)
    (spec,) = cut_shards(merge_runs(scan.runs, work=work), work, 1 << 40)
    context = multiprocessing.get_context("spawn")
    meet, said = context.Barrier(2), context.Queue()
    arguments = (store, models.stages(score=False), spec, meet, said)
    processes = [context.Process(target=run_shard, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    receipts = [said.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert receipts[0] == receipts[1]
    for receipt in json.loads(receipts[0]):
        for record in receipt["files"].values():
            assert asdict(store.record(record["name"])) == record
    report = small.build(shard_bytes=1 << 40)
    assert report.encoded_chunks == 0  # both left what a build takes over
    assert verify_index(store).problems == ()
    if isinstance(place, str):
        assert list(RemoteObjects(place).list("work")) == []


# --- memory that runs out -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The build goes on, and the embeddings are the same: how many chunks go through at once changes nothing."""
    calm = SmallIndex(tmp_path / "calm", documents(20)).build(shard_bytes=1 << 20)
    stages._encoder.cache_clear()
    seen: list[int] = []
    most = encoder_module.CPU_MIN_TOKENS + 16  # a smaller batch is widened to that
    real: Callable[..., Any] = encoder_module.EncoderModule.forward

    def limited(module: Any, token_ids: torch.Tensor, *rest: Any) -> Any:
        seen.append(token_ids.numel())
        if token_ids.numel() > most:
            raise error("out of memory")
        return real(module, token_ids, *rest)

    monkeypatch.setattr(encoder_module.EncoderModule, "forward", limited)
    index = SmallIndex(tmp_path / "index", documents(20))
    report = index.build(shard_bytes=1 << 20)
    stages._encoder.cache_clear()
    assert max(seen) > most
    assert sum(tokens <= most for tokens in seen) > 2
    assert report.quarantined == 0
    assert report.content_id == calm.content_id
    (before, after) = (read_manifest(FolderStore(root)) for root in (tmp_path / "calm" / "index", index.path))
    name = before.shards[0].tables["embeddings"]
    assert after.shards[0].tables["embeddings"] == name
    rows = [pq.read_table(root / name).column(0).to_pylist() for root in (tmp_path / "calm" / "index", index.path)]
    values = [np.frombuffer(b"".join(column), "<f2").astype(np.float32) for column in rows]
    np.testing.assert_allclose(values[1], values[0], atol=2e-3)
