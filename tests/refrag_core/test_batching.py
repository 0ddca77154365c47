"""Batch sizes that fitted, remembered."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from refrag_core.batching import SafeBatchSize

THREADS, KEYS = 4, 60


@pytest.fixture
def _switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching")
def test_threads_that_halve_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "sizes.json"

    def halve(number: int) -> None:
        SafeBatchSize(f"key {number}", 64, memory).halve()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(halve, range(KEYS)))
    assert json.loads(memory.read_text()) == {f"key {number}": 32 for number in range(KEYS)}
    assert list(memory.parent.iterdir()) == [memory]


def test_a_size_that_threads_share_is_halved_once_for_each(tmp_path: Path) -> None:
    size = SafeBatchSize("key", 1 << THREADS, tmp_path / "sizes.json")
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda _: size.halve(), range(THREADS)))
    assert size.rows == 1
    assert SafeBatchSize("key", 64, tmp_path / "sizes.json").rows == 1
