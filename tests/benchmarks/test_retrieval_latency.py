import json
from pathlib import Path

import pytest

from benchmarks.retrieval_latency import fetch_through_parquet, main, random_refs
from refrag_core.index_reader import IndexReader
from tests.small_index import SmallIndex

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def small(tmp_path: Path) -> SmallIndex:
    index = SmallIndex(tmp_path)
    index.build()
    return index


def test_latencies_of_a_given_index(small: SmallIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--index", str(small.path), "--queries", "30"]) == 0
    text = capsys.readouterr().out
    result = json.loads(text)
    assert result["index"]["passages"] == IndexReader(small.path).manifest.counts.passages
    assert set(result["milliseconds"]) == {
        "query_embedding", "faiss_search", "describe_one_passage", "fetch_through_parquet",
    }  # fmt: skip
    for named in (*result["milliseconds"].values(), *result["microseconds"].values()):
        assert 0 < named["min"] <= named["p50"] <= named["p99"] <= named["max"]
    assert str(small.path) not in text


def test_both_ways_of_fetching_read_the_same_bytes(small: SmallIndex) -> None:
    import random

    reader = IndexReader(small.path)
    refs = random_refs(reader, 20, random.Random(0))
    assert len({ref.shard for ref in refs}) > 1
    rows = fetch_through_parquet(reader, refs)
    for fetched, embeddings in zip(reader.fetch(refs), rows[1::2], strict=True):
        assert fetched.embeddings.tobytes() == b"".join(embeddings)
