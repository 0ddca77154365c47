import json

import pytest

from benchmarks.engine_overhead import WORK, main


def test_every_kind_of_work_is_measured_against_its_ideal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "local", "--shards", "4", "--seconds", "0.01", "--workers", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["work"]
    assert set(found) == set(WORK)
    for entry in found.values():
        assert entry["ideal_seconds"] == 0.04
        assert entry["seconds"] >= 0.04
        assert entry["ratio"] >= 1.0
