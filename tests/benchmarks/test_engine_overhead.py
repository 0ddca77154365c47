import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from benchmarks import engine_overhead
from benchmarks.engine_overhead import WORK, main
from refrag.pipelines.engines.local import LocalEngine


def test_every_kind_of_work_is_measured_against_its_ideal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "local", "--shards", "4", "--seconds", "0.01", "--workers", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["work"]
    assert set(found) == set(WORK)
    for entry in found.values():
        assert entry["ideal_seconds"] == 0.04
        assert entry["seconds"] >= 0.04
        assert entry["ratio"] >= 1.0


class SlowStart(LocalEngine):
    """Starts its workers anew for every map, as Beam does for every pipeline."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        time.sleep(0.5)
        yield from super().map(function, items)


def test_workers_that_start_anew_are_reported_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_overhead, "opened", lambda _name, _workers: SlowStart(0))
    found = engine_overhead.measure("beam", "map", shards=4, workers=1, seconds=0.01)
    assert found["first_start_seconds"] >= 0.5
    assert found["seconds"] >= 0.04
    assert found["ratio"] == pytest.approx(found["seconds"] / 0.04, abs=0.02)
    assert found["start_up_seconds"] >= 0.5
