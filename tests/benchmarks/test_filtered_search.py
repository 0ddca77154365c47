import json

import pytest

from benchmarks.filtered_search import SHARES, main


def test_both_ways_of_searching_and_what_filters_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--passages", "400", "--queries", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["filters_milliseconds"]["two_new_fields"]["clock"] > 0
    assert set(result["filters_milliseconds"]["column_bytes"]) == {"document_id", "lang", "year", "title", "share"}
    rows = {row["filter"]: row for row in result["search"]}
    assert len(rows) == 2 * len(SHARES) - 1
    assert abs(rows["even 0.3"]["rows"] - 120) < 40
    assert all(row["lists_by_share"]["recall"] == 1 for row in rows.values())  # one list holds them all
    assert isinstance(result["lexical"]["resident_mb"], int)  # below 0 where other tests' memory is freed meanwhile
