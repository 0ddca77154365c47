"""The content id shard by shard against its plain definition, document by document."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from refrag.schemas import arrow
from refrag_core.content import content_of
from refrag_core.manifest import NOTHING, Counts, Manifest, Shard, content_id, live_documents
from refrag_core.storage import FolderStore
from refrag_core.tables import write_table
from tests.refrag_core.test_manifest import make_manifest


def write_shard(store: FolderStore, name: str, ids: list[str], generator: random.Random) -> Shard:
    rows = [
        {
            "document_id": document_id,
            "source_digest": generator.randbytes(32),
            "content_digest": generator.randbytes(32),
            "source": "s",
            "chunk_size": 16,
            "num_passages": generator.randint(0, 5),
            "num_chunks": generator.randint(0, 9),
            "num_tokens": generator.randint(0, 99),
            "metadata": "{}",
        }
        for document_id in ids
    ]
    file = f"shards/{name}/documents.parquet"
    store.publish(file, lambda path: write_table(path, pa.Table.from_pylist(rows, schema=arrow.DOCUMENTS)))
    return Shard(name, 16, ids[0], ids[-1], len(ids), 0, 0, 0, {"documents": file})


def plain(store: FolderStore, manifest: Manifest) -> tuple[str, Counts]:
    counts, pairs = NOTHING, []
    for live in live_documents(store, manifest):
        counts += Counts(1, live.num_passages, live.num_chunks, live.num_tokens)
        pairs.append((live.document_id, live.content_digest))
    return content_id(pairs, manifest.components, manifest.parameters), counts


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_plain_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Shards apart, shards that overlap, shards that meet in one id's neighbour, and removed documents."""
    generator, store = random.Random(seed), FolderStore(tmp_path)
    letters = ["a", "é", "z", "日", "\U0001f600", "aa"]
    ids = sorted({"".join(generator.choices(letters, k=generator.randint(1, 6))) for _ in range(90)})
    shards: list[Shard] = []
    at = 0
    while at < len(ids):
        part = ids[at : at + generator.randint(1, 25)]
        at += len(part)
        split = [part] if generator.random() < 0.6 else [part[::2], part[1::2]]
        shards += [write_shard(store, f"{len(shards) + n:032x}", p, generator) for n, p in enumerate(split) if p]
    generator.shuffle(shards)
    removed: dict[str, Any] = {
        shard.name: sorted((row, 0, 0) for row in generator.sample(range(shard.documents), shard.documents // 3))
        for shard in generator.sample(shards, len(shards) // 2)
    }
    removed[shards[0].name] = [(row, 0, 0) for row in range(shards[0].documents)]  # all of it dead
    monkeypatch.setattr("refrag_core.content.read_tombstones", lambda *_: removed)
    monkeypatch.setattr("refrag_core.manifest.read_tombstones", lambda *_: removed)
    monkeypatch.setattr("refrag_core.content._DOCUMENTS_A_BLOCK", 7)
    manifest = replace(make_manifest(), shards=shards)
    assert content_of(store, manifest) == plain(store, manifest)
