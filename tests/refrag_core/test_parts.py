"""Seconds by part."""

import time

import pytest

from refrag_core.parts import collected, part


def test_a_part_within_a_part_counts_for_itself_alone() -> None:
    with collected() as seconds, part("model"):
        time.sleep(0.02)
        for _ in range(2):
            with part("capture"):
                time.sleep(0.05)
    assert list(seconds) == ["capture", "model"]
    assert seconds["capture"] >= 0.1
    assert 0.02 <= seconds["model"] < 0.09


def test_what_fails_is_counted_and_nothing_is_where_nobody_collects() -> None:
    with pytest.raises(ValueError, match="torn"), collected() as seconds, part("read"):
        raise ValueError("torn")
    with part("write"):
        pass
    assert list(seconds) == ["read"]
