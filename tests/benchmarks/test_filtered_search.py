import json
import weakref
from typing import Any

import psutil
import pytest

from benchmarks import filtered_search
from benchmarks.filtered_search import SHARES, main, resident
from refrag_core.lexical import LexicalIndex


@pytest.fixture
def _seven_megabytes_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as if it held ranking indexes alone: the process's own also falls when earlier work's is given back."""
    alive: weakref.WeakSet[LexicalIndex] = weakref.WeakSet()

    def made(*arguments: Any) -> LexicalIndex:
        index = LexicalIndex(*arguments)
        alive.add(index)
        return index

    monkeypatch.setattr(filtered_search, "LexicalIndex", made)
    monkeypatch.setattr(filtered_search, "resident", lambda: 300_000_000 + 7_000_000 * len(alive))


@pytest.mark.usefixtures("_seven_megabytes_an_index")
def test_both_ways_of_searching_and_what_filters_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--passages", "400", "--queries", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["filters_milliseconds"]["two_new_fields"]["clock"] > 0
    assert set(result["filters_milliseconds"]["column_bytes"]) == {"document_id", "lang", "year", "title", "share"}
    rows = {row["filter"]: row for row in result["search"]}
    assert len(rows) == 2 * len(SHARES) - 1
    assert abs(rows["even 0.3"]["rows"] - 120) < 40
    assert all(row["lists_by_share"]["recall"] == 1 for row in rows.values())  # one list holds them all
    assert result["lexical"]["resident_mb"] == 7


def test_memory_is_told_in_bytes() -> None:
    assert 10_000_000 < resident() < psutil.virtual_memory().total
