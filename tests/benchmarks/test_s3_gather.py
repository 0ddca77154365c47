import os
from pathlib import Path

import pytest

from benchmarks.s3_gather import measure
from tests.small_index import SmallIndex, documents

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.slow
def test_cold_and_warm_figures(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(12))
    small.build()
    before = dict(os.environ)
    result = measure(small.path, rows=16, gathers=3, rounds=2, delay=0.001)
    assert dict(os.environ) == before
    assert result["index"]["files"] > 10
    for named in (*result["milliseconds"].values(), *result["microseconds"].values()):
        assert 0 < named["min"] <= named["p50"] <= named["p99"] <= named["max"]
