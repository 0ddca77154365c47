"""The exchange of results: in a folder and in a bucket, apart from other drivers', and gone at the end."""

import os
import time
from pathlib import Path

import pytest

from refrag.pipelines.engines import exchange as module
from refrag.pipelines.engines.exchange import Exchange
from refrag_core.storage import EXCHANGE, open_store


@pytest.fixture(params=["folder", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else f"{request.getfixturevalue('bucket')}/index"


def test_results_come_back_by_their_keys(location: str) -> None:
    mine, other = Exchange.of(location), Exchange.of(location)
    assert list(mine.present()) == []
    mine.put("00000001", b"one")
    mine.put("00000001", b"one")
    other.put("00000002", b"two")
    assert list(mine.present()) == ["00000001"]
    assert mine.take("00000001") == b"one"
    mine.remove()
    assert list(mine.present()) == []
    assert list(other.present()) == ["00000002"]


def test_workers_take_up_items_while_somebody_waits(location: str) -> None:
    mine, other = Exchange.of(location), Exchange.of(location)
    assert mine.stopped()
    mine.open()
    other.open()
    assert not mine.stopped()
    assert list(mine.present()) == []
    mine.stop()
    assert (mine.stopped(), other.stopped()) == (True, False)
    mine.open()
    mine.remove()
    assert mine.stopped()
    other.remove()
    assert open_store(location).list(EXCHANGE) == []


def test_what_a_killed_driver_left_goes_with_the_next_run_of_any_engine(location: str) -> None:
    """And its workers, which may live on elsewhere, stop."""
    dead, store = Exchange.of(location), open_store(location)
    dead.open()
    dead.put("a", b"result")
    with store.lock():
        store.clear_runs()
    assert dead.stopped()
    assert store.list(EXCHANGE) == []


def test_what_killed_drivers_left_goes_after_a_day(tmp_path: Path) -> None:
    dead, mine = Exchange.of(tmp_path), Exchange.of(tmp_path)
    dead.put("a", b"old")
    dead.put("b", b"new")
    name = next(name for name in (tmp_path / EXCHANGE).iterdir() if ".a." in name.name)
    before = time.time() - module._ABANDONED_SECONDS - 1
    os.utime(name, (before, before))
    mine.remove()
    assert list(dead.present()) == ["b"]
