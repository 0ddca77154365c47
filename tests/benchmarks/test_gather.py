import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gather import bare_map, bare_rows, fetched, lance_offsets, lance_rows, main, mapped_rows, random_chunks
from benchmarks.retrieval_latency import random_refs
from refrag_core.embedding_storage import Int8Rows
from refrag_core.index_reader import IndexReader
from tests.small_index import SmallIndex, documents


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_reader_gathers_the_same_rows(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    import random

    small = SmallIndex(tmp_path, documents(16), tables="lance")
    small.options = replace(small.with_models(embedding_dtype=dtype))
    small.build()
    reader, generator = IndexReader(small.path), random.Random(0)
    bare = bare_map(reader, tmp_path)
    chunks = random_chunks(reader, generator)
    wanted = bare.embeddings[np.array([bare.starts[shard] + row for shard, row in chunks])]
    parts = [wanted.codes, wanted.scales] if isinstance(wanted, Int8Rows) else [wanted]
    found = mapped_rows(reader, chunks)
    mapped = [found.codes, found.scales] if isinstance(found, Int8Rows) else [found]
    taken = lance_rows(reader)(lance_offsets(reader, chunks))
    for one, two, three in zip(parts, mapped, taken, strict=True):
        assert np.array_equal(one, two)
        assert np.array_equal(one.reshape(-1), three)
    refs = random_refs(reader, 5, generator)
    assert len(bare_rows(bare, reader, refs)) == len(fetched(reader, refs)[1])

    assert main(["--index", str(small.path), "--gathers", "5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["index"]["embedding_dtype"] == dtype
    assert result["rows"]["chunks_a_gather"] == 64 <= result["passages"]["chunks_a_gather"]
    for kind in ("rows", "passages"):
        for named in result[kind]["microseconds"].values():
            assert 0 < named["min"] <= named["p50"] <= named["p99"] <= named["max"]
